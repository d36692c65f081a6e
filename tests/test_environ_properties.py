"""The environ against Werkzeug's reading of the same bytes, and for scopes of every shape.

One side is uvicorn's parser and ``build_environ``, the other is the parser of Werkzeug's
development server. Both get the same request, byte for byte.
"""

from __future__ import annotations

import asyncio
import logging
import string
import warnings
from io import BytesIO
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, quote_from_bytes, unquote, unquote_to_bytes
from wsgiref.validate import check_environ

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState
from werkzeug.serving import WSGIRequestHandler
from werkzeug.wrappers import Request

from flask_websockets.environ import build_environ

# Every run is the same run.
profile = settings(max_examples=300, deadline=None, derandomize=True, database=None)

CLIENT = ("192.0.2.7", 50123)
SERVER = ("192.0.2.1", 8000)

TOKEN = string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~"

# --- What is generated


def percent_encoded(raw: bytes) -> str:
    return "".join(f"%{byte:02X}" for byte in raw)


#: Printable ASCII without what ends a path.
PATH_CHARACTERS = "".join(c for c in string.printable[:94] if c not in "?#")

ODD_PIECES = [
    *("/", "//", ".", "..", "/./", "/../", ";v=1", "+", "~", ":", "@", "&", "="),
    *("%2F", "%2f", "%2E%2e", "%5C", "%20", "%00", "%0D%0A", "%25", "%252F", "%3F", "%23"),
    *("%", "%2", "%zz", "%u00e4", "%%", "%C3%A4", "%F0%9F%98%80", "%EF%BF%BD"),
    *("%FF", "%C3", "%A4", "%E2%82", "%C0%AF", "%ED%A0%80", "%F4%90%80%80"),
]

pieces = st.one_of(
    st.sampled_from(ODD_PIECES),
    st.text(PATH_CHARACTERS, max_size=4),
    st.binary(max_size=4).map(percent_encoded),
    st.text(max_size=3).map(quote),
)
paths = st.lists(pieces, max_size=6).map(lambda parts: "/" + "".join(parts))
queries = st.lists(
    st.one_of(pieces, st.sampled_from(["?", "&", "=", "a=1", "&b=%FF", "a=+", "&&"])), max_size=6
).map("".join)
targets = st.builds(
    lambda path, query, fragment: path + query + fragment,
    paths,
    st.one_of(st.just(""), queries.map("?{}".format)),
    st.sampled_from(["", "", "", "#part", "#a?b"]),
)

# A space around a value belongs to the line, not to the value.
values = st.binary(max_size=12).map(
    lambda raw: bytes(b for b in raw if b >= 0x20 and b != 0x7F).strip(b" ")
)
# Framing is the server's business: whether a body follows, and where it ends.
FRAMING = ("connection", "content-length", "expect", "transfer-encoding", "upgrade")
names = st.one_of(
    st.sampled_from(
        [
            *("X-Forwarded-For", "x-forwarded-for", "X_Forwarded_For", "Accept", "ACCEPT"),
            *("Content-Type", "Content_Length", "Cookie", "cookie", "Host", "Origin"),
            *("Remote-Addr", "wsgi.url-scheme", "HTTP-Host", "Script-Name", "Path-Info"),
        ]
    ),
    st.text(TOKEN, min_size=1, max_size=8),
).filter(lambda name: name.lower() not in FRAMING)
cookies = st.sampled_from([b"a=1", b"b=2", b"a=3; c=4", b'd="x;y"', b"e", b"=f", b"g=\xc3\xa4"])
hosts = st.sampled_from([b"example.com", b"example.com:80", b"EXAMPLE.com:8000", b"[::1]:1", b"_"])
header_lists = st.lists(
    st.one_of(
        st.tuples(names.map(str.encode), values),
        st.tuples(st.just(b"Cookie"), cookies),
        st.tuples(st.just(b"Host"), hosts),
    ),
    max_size=10,
)
methods = st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "PURGE"])
versions = st.sampled_from(["HTTP/1.0", "HTTP/1.1"])

Headers = list[tuple[bytes, bytes]]

# --- The two readers


class _Transport(asyncio.Transport):
    closed = False

    def __init__(self) -> None:
        super().__init__({"peername": CLIENT, "sockname": SERVER})

    def write(self, data: Any) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class _Task:
    def add_done_callback(self, callback: Any) -> None:
        pass


class _Loop:
    """Takes the task, and lets it rest: only its scope is of interest."""

    def create_task(self, coroutine: Any, **options: Any) -> _Task:
        coroutine.close()
        return _Task()

    def call_later(self, *arguments: Any) -> Any:
        return SimpleNamespace(cancel=lambda: None)


async def _application(scope: Any, receive: Any, send: Any) -> None: ...


CONFIG = Config(
    _application, lifespan="off", log_config=None, http="httptools", ws="none", proxy_headers=False
)
CONFIG.load()
# It would tell of every request that it refuses.
SILENT = logging.Logger("silent", logging.CRITICAL)


def uvicorn_scope(method: str, target: str, version: str, headers: Headers) -> Any:
    """The scope that uvicorn makes of a request, or None where its parser refuses it."""
    protocol = HttpToolsProtocol(CONFIG, ServerState(), {}, _loop=_Loop())
    protocol.logger = SILENT
    transport = _Transport()
    protocol.connection_made(transport)
    lines = [f"{method} {target} {version}".encode()]
    lines += [name + b": " + value for name, value in headers]
    protocol.data_received(b"\r\n".join(lines) + b"\r\n\r\n")
    if transport.closed or protocol.cycle is None:
        return None
    return protocol.cycle.scope


def werkzeug_environ(method: str, target: str, version: str, headers: Headers) -> dict[str, Any]:
    """What Werkzeug's development server makes of the same request."""
    handler = WSGIRequestHandler.__new__(WSGIRequestHandler)
    handler.client_address = CLIENT
    handler.server = SimpleNamespace(  # type: ignore[assignment]
        ssl_context=None,
        multithread=True,
        multiprocess=False,
        server_address=SERVER,
        _server_version="Werkzeug",
    )
    handler.connection = handler.wfile = None  # type: ignore[assignment]
    handler.raw_requestline = f"{method} {target} {version}\r\n".encode()
    head = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    handler.rfile = BytesIO(head + b"\r\n")
    assert handler.parse_request()
    return handler.make_environ()


def both(method: str, target: str, version: str, headers: Headers) -> Any:
    scope = uvicorn_scope(method, target, version, headers)
    assume(scope is not None)
    return build_environ(scope), werkzeug_environ(method, target, version, headers)


# --- Where Werkzeug's reading is not ours


def one_slash(text: str, target: str) -> str:
    """http.server joins leading slashes into one (python/cpython#87389); ASGI keeps them."""
    return text[len(target) - len(target.lstrip("/")) - 1 :]


def lossy(wsgi_text: str) -> str:
    """Werkzeug's server decodes the path, and bytes that are no UTF-8 are lost; ours stay."""
    return wsgi_text.encode("latin-1").decode("utf-8", "replace").encode().decode("latin-1")


def for_asgi(target: str) -> str:
    """uvicorn drops a fragment, and the ``?`` of an empty query: ASGI has no place for them."""
    path, mark, query = target.partition("#")[0].partition("?")
    return path + mark + query if query else path


def header_variables(environ: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in environ.items()
        if name.startswith("HTTP_") or name in ("CONTENT_TYPE", "CONTENT_LENGTH")
    }


def cookie_variable(headers: Headers) -> dict[str, str]:
    """Werkzeug joins cookies with a comma like everything else, which parts none of them."""
    found = [value.decode("latin-1") for name, value in headers if name.lower() == b"cookie"]
    return {"HTTP_COOKIE": "; ".join(found)} if found else {}


class TestAgainstWerkzeug:
    """The same request, read twice."""

    @profile
    @given(methods, targets, versions, header_lists)
    @example("GET", "//a//b?x", "HTTP/1.1", [])
    @example("GET", "/%FF/%C3%A4", "HTTP/1.1", [])
    @example("GET", "/%EF%BF%BD/%FF", "HTTP/1.1", [])
    @example("GET", "/?", "HTTP/1.1", [])
    @example("GET", "/a?b?c#d", "HTTP/1.0", [])
    def test_the_request_line(self, method, target, version, headers):
        """Method, path, query and target are the same, and the path keeps its bytes."""
        ours, theirs = both(method, target, version, headers)
        for name in ("REQUEST_METHOD", "SCRIPT_NAME", "QUERY_STRING", "SERVER_PROTOCOL"):
            assert ours[name] == theirs[name], name
        for name in ("SERVER_NAME", "SERVER_PORT", "REMOTE_ADDR", "wsgi.url_scheme"):
            assert ours[name] == theirs[name], name
        assert ours["REMOTE_PORT"] == str(theirs["REMOTE_PORT"])
        assert lossy(one_slash(ours["PATH_INFO"], target)) == theirs["PATH_INFO"]
        path = target.partition("#")[0].partition("?")[0]
        assert ours["PATH_INFO"].encode("latin-1") == unquote_to_bytes(path)
        for name in ("REQUEST_URI", "RAW_URI"):
            assert ours[name] == for_asgi(target)
            assert one_slash(ours[name], target) == for_asgi(theirs[name])

    @profile
    @given(methods, targets, header_lists)
    def test_the_headers(self, method, target, headers):
        """Each header has the same name and value, but for cookies, which join as cookies."""
        ours, theirs = both(method, target, "HTTP/1.1", headers)
        expected = header_variables(theirs) | cookie_variable(headers)
        assert header_variables(ours) == expected

    @profile
    @given(methods, targets, header_lists)
    def test_the_request(self, method, target, headers):
        """A Werkzeug request says the same of both."""
        ours, theirs = both(method, target, "HTTP/1.1", headers)
        theirs |= cookie_variable(headers)
        request, expected = Request(ours), Request(theirs)
        assert request.path == expected.path
        assert request.args == expected.args
        assert request.query_string == expected.query_string
        assert request.host == expected.host
        assert request.url == expected.url
        assert request.base_url == expected.base_url
        assert request.full_path == expected.full_path
        assert request.cookies == expected.cookies
        assert sorted(request.headers) == sorted(expected.headers)
        assert request.mimetype == expected.mimetype
        assert list(request.access_route) == list(expected.access_route)

    @profile
    @given(methods, targets, header_lists)
    def test_the_environ_is_valid(self, method, target, headers):
        """The standard library's checker accepts what comes out of a real parser."""
        scope = uvicorn_scope(method, target, "HTTP/1.1", headers)
        assume(scope is not None)
        check(build_environ(scope))

    def test_most_requests_count(self):
        """The strategy makes requests that the parser lets through, or nothing is compared."""
        passed = refused = 0

        @profile
        @given(methods, targets, header_lists)
        def count(method, target, headers):
            nonlocal passed, refused
            if uvicorn_scope(method, target, "HTTP/1.1", headers) is None:
                refused += 1
            else:
                passed += 1

        count()
        assert passed > 250 > 3 * refused


# --- Scopes of every shape

#: Text as a server may decode a path: any, and bytes that escaped as lone surrogates.
decoded = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.binary(max_size=6).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
)
segments = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\N{REPLACEMENT CHARACTER}"),
    min_size=1,
    max_size=5,
)
prefixes = st.lists(segments, max_size=3).map(lambda parts: "".join(f"/{part}" for part in parts))
addresses = st.one_of(
    st.none(),
    st.tuples(st.sampled_from(["127.0.0.1", "::1", "localhost", ""]), st.integers(0, 65535)),
    st.sampled_from([("/run/app.sock", None), ["127.0.0.1", 8000], ("", 0), ("@abstract", None)]),
)
scope_headers = st.lists(
    st.tuples(
        st.one_of(
            st.text(TOKEN.lower(), min_size=1, max_size=8).map(str.encode),
            st.sampled_from([b":authority", b":method", b":path", b":scheme", b"cookie", b"host"]),
            st.sampled_from([b"content-type", b"X_Y", b"x-y", b"X-Y", b"connection"]),
        ).filter(lambda name: name.lower() != b"content-length"),
        st.binary(max_size=8).map(lambda raw: raw.strip(b" \t")),
    ),
    max_size=12,
)
optional = {
    "asgi": st.just({"version": "3.0", "spec_version": "2.3"}),
    "http_version": st.sampled_from(["1.0", "1.1", "2", "3"]),
    "raw_path": st.one_of(st.none(), paths.map(str.encode), st.binary(max_size=8)),
    "query_string": st.binary(max_size=12),
    "root_path": st.one_of(prefixes, prefixes.map("{}/".format)),
    "headers": st.one_of(scope_headers, scope_headers.map(tuple)),
    "client": addresses,
    "server": addresses,
    "state": st.just({}),
    "extensions": st.sampled_from([{}, {"http.response.pathsend": {}}]),
}
http_scopes = st.fixed_dictionaries(
    {
        "type": st.just("http"),
        "method": methods,
        "path": st.one_of(st.just(""), decoded.map("/{}".format)),
    },
    optional={**optional, "scheme": st.sampled_from(["http", "https"])},
)
websocket_scopes = st.fixed_dictionaries(
    {"type": st.just("websocket"), "path": decoded.map("/{}".format)},
    optional={
        **optional,
        "scheme": st.sampled_from(["ws", "wss", "http", "https"]),
        "subprotocols": st.just([]),
    },
)


def check(environ: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # It warns of methods that it does not know, and everybody may invent one.
        warnings.filterwarnings("ignore", "Unknown REQUEST_METHOD")
        check_environ(environ)


class TestScopes:
    """What the ASGI specification allows a server to say, or to leave out."""

    @profile
    @given(st.one_of(http_scopes, websocket_scopes))
    def test_every_scope_makes_a_valid_environ(self, scope):
        """Whatever is missing or odd: no exception, a valid environ, and a Request can read it."""
        environ = build_environ(scope)
        check(environ)
        for name in ("REMOTE_PORT", "SERVER_PORT"):
            assert environ.get(name, "0").isdigit()
        assert ("REMOTE_ADDR" in environ) == bool(scope.get("client"))
        request = Request(environ)
        assert request.path.startswith("/")
        assert request.url and request.cookies is not None and request.headers is not None
        assert environ["wsgi.input_terminated"] is True
        assert environ["wsgi.multithread"] is True
        assert environ["wsgi.multiprocess"] is False
        assert environ["wsgi.url_scheme"] in ("http", "https")

    @profile
    @given(st.one_of(http_scopes, websocket_scopes))
    def test_nothing_but_latin_1(self, scope):
        """PEP 3333: every variable is bytes that pose as text."""
        for name, value in build_environ(scope).items():
            if isinstance(value, str):
                name.encode("latin-1")
                value.encode("latin-1")

    @profile
    @given(st.one_of(http_scopes, websocket_scopes))
    def test_the_scope_stays_as_it_was(self, scope):
        """Building an environ changes nothing, and gives the same again."""
        before = repr(scope)
        first, second = build_environ(scope), build_environ(scope)
        assert repr(scope) == before
        first.pop("wsgi.input"), second.pop("wsgi.input")
        assert first == second

    @profile
    @given(st.binary(max_size=16))
    def test_the_query_string_keeps_its_bytes(self, query):
        """Bytes that should have been encoded come through as they are."""
        assume(b"#" not in query)  # it begins a fragment, and a query ends before it
        scope = {"type": "http", "method": "GET", "path": "/", "query_string": query}
        environ = build_environ(scope)
        assert environ["QUERY_STRING"].encode("latin-1") == query
        expected = b"/?" + query if query else b"/"
        assert environ["REQUEST_URI"].encode("latin-1") == expected

    @profile
    @given(st.binary(max_size=8), st.booleans())
    @example(b"\xff", True)
    @example("\N{REPLACEMENT CHARACTER}".encode(), True)
    @example("\N{REPLACEMENT CHARACTER}\xff".encode() + b"\xff", False)
    def test_the_path_keeps_its_bytes(self, raw, quoted):
        """PATH_INFO has all bytes of the path, even those that ``path`` has lost."""
        raw = b"/" + raw
        # A client may have left them unencoded; a # would begin a fragment.
        encoded = quoted or b"%" in raw or b"#" in raw
        raw_path = quote_from_bytes(raw).encode() if encoded else raw
        path = raw.decode("utf-8", "replace")
        environ = build_environ(
            {"type": "http", "method": "GET", "path": path, "raw_path": raw_path}
        )
        assert environ["PATH_INFO"].encode("latin-1") == raw
        assert environ["REQUEST_URI"].encode("latin-1") == raw_path

    @profile
    @given(decoded.map("/{}".format), st.one_of(st.binary(max_size=8), paths.map(str.encode)))
    @example("/\N{REPLACEMENT CHARACTER}", b"/%FE/other")
    @example("/changed", b"/%FF")
    def test_path_decides(self, path, raw_path):
        """A raw_path that says something else, as after a middleware's rewriting, says nothing."""
        assume(unquote_to_bytes(raw_path).decode("utf-8", "replace") != path)
        scope = {"type": "http", "method": "GET", "path": path, "raw_path": raw_path}
        environ = build_environ(scope)
        assert environ["PATH_INFO"].encode("latin-1") == path.encode("utf-8", "surrogateescape")

    @profile
    @given(decoded.map("/{}".format))
    @example("/100%41")
    @example("/a?b#c")
    def test_without_raw_path_the_target_is_quoted(self, path):
        """REQUEST_URI is made of the path, and leads back to it."""
        environ = build_environ({"type": "http", "method": "GET", "path": path})
        uri = environ["REQUEST_URI"]
        assert uri.isascii() and uri.isprintable() and " " not in uri and "?" not in uri
        assert unquote_to_bytes(uri) == path.encode("utf-8", "surrogateescape")
        assert environ["RAW_URI"] == uri

    @profile
    @given(prefixes, st.booleans(), decoded.map("/{}".format), st.booleans(), st.booleans())
    @example("/api", True, "/\N{REPLACEMENT CHARACTER}", False, True)
    @example("/api", False, "/api", False, False)
    def test_mounts(self, prefix, slash, path, included, empty):
        """The root path goes off by whole segments, whether the path includes it or not."""
        if empty:
            path = ""
        # A path that begins with the prefix anyway is taken to include it: no server says which.
        assume(not prefix or not f"{path}/".startswith(f"{prefix}/"))
        scope = {
            "type": "http",
            "method": "GET",
            "root_path": prefix + "/" * slash,
            "path": prefix + path if included else path,
        }
        environ = build_environ(scope)
        assert environ["SCRIPT_NAME"].encode("latin-1") == prefix.encode()
        expected = path.encode("utf-8", "surrogateescape")
        assert environ["PATH_INFO"].encode("latin-1") == expected
        check(environ)

    @profile
    @given(prefixes, segments, paths)
    def test_a_longer_segment_is_no_mount(self, prefix, more, rest):
        """A path whose segment only begins like the root path keeps it."""
        assume(prefix)
        path = prefix + more + unquote(rest)
        environ = build_environ(
            {"type": "http", "method": "GET", "root_path": prefix, "path": path}
        )
        assert environ["PATH_INFO"].encode("latin-1") == path.encode()

    @profile
    @given(prefixes, paths, st.booleans(), st.booleans())
    @example("/api", "/%FF", True, True)
    @example("/api", "/%FF", False, True)
    @example("/api", "/%FF", True, False)
    @example("/api", "/%FF", False, False)
    def test_a_mount_keeps_bytes_too(self, prefix, target, included, raw_included):
        """Undecodable bytes stay below a root path, whichever of the two paths includes it."""
        path, raw_path = unquote(target), target
        assume(not prefix or not f"{path}/".startswith(f"{prefix}/"))
        # raw_path may have the root path while path has not (as after a mount's rewriting).
        scope = {
            "type": "http",
            "method": "GET",
            "root_path": prefix,
            "path": prefix + path if included else path,
            "raw_path": (quote(prefix) + raw_path if raw_included else raw_path).encode(),
        }
        environ = build_environ(scope)
        assert environ["SCRIPT_NAME"].encode("latin-1") == prefix.encode()
        if included and not raw_included and prefix:
            # The two speak of different things: path decides.
            expected = path.encode()
        else:
            expected = unquote_to_bytes(target)
        assert environ["PATH_INFO"].encode("latin-1") == expected

    @profile
    @given(addresses, st.sampled_from(["http", "https", "ws", "wss"]))
    def test_the_server(self, server, scheme):
        """A server without a port, or none at all, is localhost on the scheme's port."""
        scope = {"type": "http", "method": "GET", "path": "/", "server": server, "scheme": scheme}
        environ = build_environ(scope)
        if server is None or server[1] is None:
            port = "443" if scheme in ("https", "wss") else "80"
            assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == ("localhost", port)
            assert Request(environ).host == "localhost"
        elif server[0] and server[1]:
            assert environ["SERVER_NAME"] == server[0]
            assert environ["SERVER_PORT"] == str(server[1])


class TestHeaders:
    """Names, joins, and the limit of copies."""

    @profile
    @given(scope_headers)
    def test_pseudo_headers(self, headers):
        """No name with a colon gets through; ``:authority`` is the host where no host is."""
        scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
        environ = build_environ(scope)
        assert not any(":" in name for name in environ)
        hosts = [value for name, value in headers if name == b"host"]
        authorities = [value for name, value in headers if name == b":authority"]
        if hosts:
            assert environ["HTTP_HOST"] == b",".join(hosts).decode("latin-1")
        elif authorities:
            assert environ["HTTP_HOST"].encode("latin-1") in authorities
        else:
            assert "HTTP_HOST" not in environ

    @profile
    @given(scope_headers)
    def test_every_header_and_no_other(self, headers):
        """Each variable is the join of its header's values, in their order."""
        scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
        expected: dict[str, list[str]] = {}
        for name, value in headers:
            if b"_" not in name and not name.startswith(b":"):
                variable = name.decode().upper().replace("-", "_")
                expected.setdefault(variable, []).append(value.decode("latin-1"))
        environ = build_environ(scope)
        for variable, found in expected.items():
            if variable == "CONTENT_TYPE":
                assert environ[variable] == found[-1]
                assert "HTTP_CONTENT_TYPE" not in environ
            else:
                separator = "; " if variable == "COOKIE" else ","
                assert environ[f"HTTP_{variable}"] == separator.join(found)
        others = {name.removeprefix("HTTP_") for name in header_variables(environ)}
        assert others - {"HOST"} == expected.keys() - {"HOST"}

    @profile
    @given(st.lists(st.sampled_from([b"content-type", b"content-length"]), max_size=5))
    def test_the_last_content_header_counts(self, repeated):
        """Content-Type and Content-Length do not join: the last one is taken."""
        headers = [(name, str(number).encode()) for number, name in enumerate(repeated)]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
        last = {name.decode().upper().replace("-", "_"): value.decode() for name, value in headers}
        assert header_variables(build_environ(scope)) == last

    @pytest.mark.parametrize("kind", ["http", "websocket"])
    @pytest.mark.parametrize("name", [b"x-many", b"cookie", b"host", b"content-type", b"accept"])
    def test_the_limit_of_copies(self, kind, name):
        """A hundred copies of one header join, one more is too many, however it is written."""
        scope = {"type": kind, "path": "/", "headers": [(name, b"v")] * 100}
        variable = name.decode().upper().replace("-", "_")
        environ = build_environ(scope)
        if name == b"content-type":
            assert environ[variable] == "v"
        else:
            assert environ[f"HTTP_{variable}"].count("v") == 100
        with pytest.raises(ValueError):
            build_environ({**scope, "headers": [*scope["headers"], (name, b"v")]})
        with pytest.raises(ValueError):
            build_environ({**scope, "headers": [*scope["headers"], (name.upper(), b"v")]})
        elsewhere = [*scope["headers"], (b"x-other", b"v")]
        assert build_environ({**scope, "headers": elsewhere})["HTTP_X_OTHER"] == "v"

    def test_the_limit_is_per_header(self):
        """Twenty thousand headers of different names are none too many."""
        headers = [(b"x-%d" % number, b"v") for number in range(20_000)]
        environ = build_environ({"type": "http", "method": "GET", "path": "/", "headers": headers})
        assert len(header_variables(environ)) == 20_000

    def test_a_flood_of_copies(self):
        """A hundred thousand copies are refused, not joined."""
        headers = [(b"x", b"v" * 100)] * 100_000
        with pytest.raises(ValueError):
            build_environ({"type": "http", "method": "GET", "path": "/", "headers": headers})
