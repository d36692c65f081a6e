"""ASGI scope to WSGI environ, and the Origin rule."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Any
from wsgiref.validate import check_environ

import pytest
from werkzeug.wrappers import Request

from flask_websockets.config import validate_origins
from flask_websockets.environ import build_environ, origin_allowed


def http_scope(**changes: Any) -> dict[str, Any]:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/items",
        "raw_path": b"/items",
        "query_string": b"a=1&b=%20",
        "root_path": "",
        "headers": [(b"host", b"example.com"), (b"content-length", b"3")],
        "client": ("192.0.2.7", 50123),
        "server": ("example.com", 8000),
    }
    return {**scope, **changes}


def websocket_scope(**changes: Any) -> dict[str, Any]:
    scope = http_scope(
        type="websocket",
        scheme="ws",
        path="/ws",
        raw_path=b"/ws",
        headers=[
            (b"host", b"example.com"),
            (b"connection", b"keep-alive, Upgrade"),
            (b"upgrade", b"websocket"),
            (b"sec-websocket-version", b"13"),
            (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
        ],
        subprotocols=[],
    )
    del scope["method"]
    return {**scope, **changes}


SCOPES = {
    "http": http_scope(),
    "websocket": websocket_scope(),
    "bare http": {"type": "http", "path": "/"},
    "bare websocket": {"type": "websocket", "path": "/"},
    "mounted": websocket_scope(root_path="/api", path="/api/ws"),
    "root path alone": http_scope(root_path="/api", path="/api"),
    "unix socket": http_scope(client=None, server=("/run/app.sock", None)),
    "utf-8": http_scope(path="/käse/😀"),
    "http/2": websocket_scope(http_version="2", scheme="wss", headers=[(b"host", b"a.example")]),
}


class TestEnviron:
    """The WSGI environ of a scope."""

    @pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
    def test_is_valid(self, scope):
        """The standard library's checker has nothing to say, not even a warning."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_environ(build_environ(scope))

    def test_http(self):
        """Every part of a request arrives under its WSGI name."""
        body = io.BytesIO(b"abc")
        assert build_environ(http_scope(), body) == {
            "REQUEST_METHOD": "POST",
            "SCRIPT_NAME": "",
            "PATH_INFO": "/items",
            "QUERY_STRING": "a=1&b=%20",
            "REQUEST_URI": "/items?a=1&b=%20",
            "RAW_URI": "/items?a=1&b=%20",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "SERVER_NAME": "example.com",
            "SERVER_PORT": "8000",
            "REMOTE_ADDR": "192.0.2.7",
            "REMOTE_PORT": "50123",
            "HTTP_HOST": "example.com",
            "CONTENT_LENGTH": "3",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": body,
            "wsgi.input_terminated": True,
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }

    def test_websocket(self):
        """A handshake is a GET with the upgrade headers and an empty body."""
        environ = build_environ(websocket_scope())
        assert environ["REQUEST_METHOD"] == "GET"
        assert environ["PATH_INFO"] == "/ws"
        assert environ["HTTP_CONNECTION"] == "Upgrade"
        assert environ["HTTP_UPGRADE"] == "websocket"
        assert environ["HTTP_SEC_WEBSOCKET_VERSION"] == "13"
        assert environ["wsgi.input"].read() == b""

    def test_websocket_over_http2(self):
        """An extended CONNECT has no upgrade headers; the router looks for them all the same."""
        environ = build_environ(SCOPES["http/2"])
        assert environ["SERVER_PROTOCOL"] == "HTTP/2"
        assert environ["HTTP_CONNECTION"] == "Upgrade"
        assert environ["HTTP_UPGRADE"] == "websocket"

    def test_http_gets_no_upgrade_headers(self):
        """A plain request does not become a handshake."""
        environ = build_environ(http_scope())
        assert "HTTP_UPGRADE" not in environ
        assert "HTTP_CONNECTION" not in environ

    @pytest.mark.parametrize(
        ("scheme", "expected"),
        [("ws", "http"), ("wss", "https"), ("http", "http"), ("https", "https")],
    )
    def test_scheme(self, scheme, expected):
        """The scheme is that of HTTP."""
        environ = build_environ(websocket_scope(scheme=scheme))
        assert environ["wsgi.url_scheme"] == expected
        assert Request(environ).is_secure is (expected == "https")

    def test_missing_keys(self):
        """What ASGI allows a server to leave out has a default."""
        environ = build_environ({"type": "websocket", "path": "/"})
        assert environ["wsgi.url_scheme"] == "http"
        assert environ["QUERY_STRING"] == ""
        assert environ["SCRIPT_NAME"] == ""
        assert environ["SERVER_PROTOCOL"] == "HTTP/1.1"
        assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == ("localhost", "80")
        assert "REMOTE_ADDR" not in environ
        assert "REMOTE_PORT" not in environ

    @pytest.mark.parametrize(
        ("server", "scheme", "expected"),
        [
            (None, "ws", ("localhost", "80")),
            (None, "wss", ("localhost", "443")),
            (("/run/app.sock", None), "http", ("localhost", "80")),
            (("/run/app.sock", None), "https", ("localhost", "443")),
            (("::1", 8443), "https", ("::1", "8443")),
        ],
    )
    def test_server(self, server, scheme, expected):
        """A server without a port, or an unknown one, has the scheme's port."""
        environ = build_environ(http_scope(server=server, scheme=scheme))
        assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == expected

    def test_unknown_client(self):
        """A client without an address leaves no REMOTE_ADDR, rather than a false one."""
        environ = build_environ(http_scope(client=None))
        assert "REMOTE_ADDR" not in environ
        assert "REMOTE_PORT" not in environ

    @pytest.mark.parametrize(
        ("root_path", "path", "path_info"),
        [
            ("", "/ws", "/ws"),
            ("/api", "/api/ws", "/ws"),
            ("/api", "/api", ""),
            ("/api", "/api/", "/"),
            ("/api", "/apiary/ws", "/apiary/ws"),
            ("/api", "/ws", "/ws"),
            ("/api", "/api/api/ws", "/api/ws"),
            ("/a/b", "/a/b/c", "/c"),
            ("/a/b", "/a/bc", "/a/bc"),
            ("/kä", "/kä/se", "/s\u0065"),
        ],
    )
    def test_root_path(self, root_path, path, path_info):
        """The root path is taken off by whole segments, and where it is not there, not at all."""
        environ = build_environ(http_scope(root_path=root_path, path=path))
        assert environ["PATH_INFO"] == path_info
        assert environ["SCRIPT_NAME"] == root_path.encode().decode("latin-1")

    @pytest.mark.parametrize("path", ["/käse", "/😀", "/a b", "/日本/語", "/per%cent", "/\xff"])
    def test_path_is_bytes_in_disguise(self, path):
        """The path goes as UTF-8 posing as Latin-1, and comes out whole at the other end."""
        environ = build_environ(http_scope(path=path))
        assert environ["PATH_INFO"].encode("latin-1") == path.encode()
        assert Request(environ).path == path

    def test_path_with_undecodable_bytes(self):
        """Bytes that were no UTF-8 come through as the bytes that they were."""
        path = b"/\xff\xfe".decode("utf-8", "surrogateescape")
        assert build_environ(http_scope(path=path))["PATH_INFO"].encode("latin-1") == b"/\xff\xfe"

    def test_query_string_is_not_decoded(self):
        """The query string stays as it came."""
        environ = build_environ(http_scope(query_string=b"q=%C3%A4&r=\xe4"))
        assert environ["QUERY_STRING"] == "q=%C3%A4&r=\xe4"

    def test_underscore_headers_are_dropped(self):
        """X_Forwarded_For does not pose as X-Forwarded-For, nor content_length as itself."""
        environ = build_environ(
            http_scope(
                headers=[
                    (b"x_forwarded_for", b"evil"),
                    (b"x-forwarded_for", b"evil"),
                    (b"x-forwarded-for", b"192.0.2.1"),
                    (b"content_length", b"9"),
                ]
            )
        )
        assert environ["HTTP_X_FORWARDED_FOR"] == "192.0.2.1"
        assert "CONTENT_LENGTH" not in environ
        assert not any("evil" in str(value) for value in environ.values())

    def test_cookies_are_joined_with_semicolons(self):
        """Cookies that HTTP/2 has split come together again."""
        environ = build_environ(
            http_scope(headers=[(b"cookie", b"a=1"), (b"accept", b"*/*"), (b"cookie", b"b=2")])
        )
        assert environ["HTTP_COOKIE"] == "a=1; b=2"
        assert dict(Request(environ).cookies) == {"a": "1", "b": "2"}

    def test_other_headers_are_joined_with_commas(self):
        """Repeated headers become one list, in their order."""
        environ = build_environ(
            http_scope(
                headers=[
                    (b"x-forwarded-for", b"192.0.2.1"),
                    (b"x-forwarded-for", b"198.51.100.2"),
                    (b"X-Forwarded-For", b"203.0.113.3"),
                ]
            )
        )
        assert environ["HTTP_X_FORWARDED_FOR"] == "192.0.2.1,198.51.100.2,203.0.113.3"

    def test_content_headers_have_no_prefix(self):
        """CONTENT_TYPE and CONTENT_LENGTH are CGI's own names."""
        environ = build_environ(
            http_scope(headers=[(b"content-type", b"text/plain"), (b"content-length", b"3")])
        )
        assert environ["CONTENT_TYPE"] == "text/plain"
        assert environ["CONTENT_LENGTH"] == "3"
        assert not any(key.startswith("HTTP_CONTENT") for key in environ)

    def test_header_values_are_latin_1(self):
        """The bytes of a header's value survive."""
        environ = build_environ(http_scope(headers=[(b"x-name", "Käse".encode())]))
        assert environ["HTTP_X_NAME"].encode("latin-1") == "Käse".encode()

    def test_proxy_header_cannot_pose_as_server_variable(self):
        """A header is always below HTTP_: it cannot set REMOTE_ADDR or wsgi.url_scheme."""
        environ = build_environ(
            http_scope(headers=[(b"remote-addr", b"10.0.0.1"), (b"wsgi.url-scheme", b"https")])
        )
        assert environ["REMOTE_ADDR"] == "192.0.2.7"
        assert environ["wsgi.url_scheme"] == "http"

    def test_scope_stays_as_it_was(self):
        """Nothing in the scope is changed."""
        scope = websocket_scope(root_path="/api", path="/api/ws")
        before = {key: list(value) if key == "headers" else value for key, value in scope.items()}
        build_environ(scope)
        assert scope == before


SUBDOMAINS = ["https://*.example.com"]

#: origin, host, allowed, expected.
ORIGINS = {
    # The application's own pages.
    "absent": (None, "example.com", [], True),
    "same": ("https://example.com", "example.com", [], True),
    "same with port": ("http://localhost:5000", "localhost:5000", [], True),
    "other host": ("https://evil.org", "example.com", [], False),
    "subdomain of own": ("https://a.example.com", "example.com", [], False),
    "parent of own": ("https://example.com", "a.example.com", [], False),
    "own as suffix": ("https://evilexample.com", "example.com", [], False),
    "own as prefix": ("https://example.com.evil.org", "example.com", [], False),
    "own as user": ("https://example.com@evil.org", "example.com", [], False),
    "other port": ("http://localhost:3000", "localhost:5000", [], False),
    "port against none": ("https://example.com:8443", "example.com", [], False),
    "none against port": ("https://example.com", "example.com:8443", [], False),
    "http port filled in": ("http://example.com", "example.com:80", [], True),
    "https port filled in": ("https://example.com", "example.com:443", [], True),
    "http port in the origin": ("http://example.com:80", "example.com", [], True),
    "https port in the origin": ("https://example.com:443", "example.com", [], True),
    "port of the other scheme": ("https://example.com", "example.com:80", [], False),
    "upper case origin": ("HTTPS://Example.COM", "example.com", [], True),
    "upper case host": ("https://example.com", "EXAMPLE.com", [], True),
    # The proxy ends TLS: the page is https, the environ says http, and the host has no port.
    "behind TLS termination": ("https://example.com", "example.com", [], True),
    "IPv6": ("http://[::1]:5000", "[::1]:5000", [], True),
    "other IPv6": ("http://[::2]:5000", "[::1]:5000", [], False),
    # What is no page of ours in any way.
    "null": ("null", "example.com", [], False),
    "null against null": ("null", "null", [], False),
    "empty": ("", "example.com", [], False),
    "empty against empty": ("", "", [], False),
    "scheme alone": ("https://", "example.com", [], False),
    "scheme alone against empty": ("https://", "", [], False),
    "host alone": ("example.com", "example.com", [], False),
    "no scheme": ("//example.com", "example.com", [], False),
    "port no number": ("https://example.com:x", "example.com", [], False),
    "port too large": ("https://example.com:99999", "example.com", [], False),
    "open bracket": ("https://[::1", "[::1", [], False),
    "two origins": ("https://example.com https://evil.org", "evil.org", [], False),
    "not ASCII": ("https://exämple.com", "example.com", [], False),
    "garbage": ("\x00\xff:%%", "example.com", [], False),
    "file": ("file://", "", [], False),
    # What is allowed beside them.
    "listed": ("https://app.example.org", "example.com", ["https://app.example.org"], True),
    "second in the list": (
        "https://b.org",
        "example.com",
        ["https://a.org", "https://b.org"],
        True,
    ),
    "listed, upper case": ("https://APP.example.org", "x", ["https://app.example.org"], True),
    "listed, other scheme": ("http://app.example.org", "x", ["https://app.example.org"], False),
    "listed, other port": ("https://app.example.org:1", "x", ["https://app.example.org"], False),
    "listed with port": ("https://app.org:8443", "x", ["https://app.org:8443"], True),
    "not listed": ("https://other.example.org", "x", ["https://app.example.org"], False),
    "own beside a list": ("https://example.com", "example.com", ["https://app.org"], True),
    "everything": ("https://evil.org", "example.com", ["*"], True),
    "everything, null": ("null", "example.com", ["*"], True),
    "null allowed": ("null", "example.com", ["null"], True),
    # Subdomains, of any depth.
    "subdomain": ("https://a.example.com", "x", SUBDOMAINS, True),
    "deep subdomain": ("https://a.b.c.example.com", "x", SUBDOMAINS, True),
    "upper case subdomain": ("https://A.Example.com", "x", SUBDOMAINS, True),
    "domain itself": ("https://example.com", "x", SUBDOMAINS, False),
    "no dot between": ("https://evilexample.com", "x", SUBDOMAINS, False),
    "domain as prefix": ("https://example.com.evil.org", "x", SUBDOMAINS, False),
    "subdomain as prefix": ("https://a.example.com.evil.org", "x", SUBDOMAINS, False),
    "subdomain as user": ("https://a.example.com@evil.org", "x", SUBDOMAINS, False),
    "subdomain, other scheme": ("http://a.example.com", "x", SUBDOMAINS, False),
    "subdomain, other port": ("https://a.example.com:8443", "x", SUBDOMAINS, False),
    "subdomain with port": ("https://a.example.com:1", "x", ["https://*.example.com:1"], True),
    "subdomain, null": ("null", "x", SUBDOMAINS, False),
    "subdomain, garbage": (".example.com", "x", SUBDOMAINS, False),
}


class TestOrigin:
    """Which pages may open a WebSocket."""

    @pytest.mark.parametrize(
        ("origin", "host", "allowed", "expected"), ORIGINS.values(), ids=ORIGINS
    )
    def test_rule(self, origin, host, allowed, expected):
        """The table above."""
        assert origin_allowed(origin, host, allowed) is expected

    @pytest.mark.parametrize("allowed", [case[2] for case in ORIGINS.values() if case[2]])
    def test_patterns_are_valid(self, allowed):
        """The patterns of the table are such as the configuration lets through, unchanged."""
        assert validate_origins("origins", tuple(allowed)) == tuple(allowed)

    def test_host_as_the_request_has_it(self):
        """An https page behind a proxy that ends TLS may speak to the http environ it reaches."""
        environ = build_environ(
            websocket_scope(
                headers=[(b"host", b"example.com"), (b"origin", b"https://example.com")]
            )
        )
        request = Request(environ)
        assert request.scheme == "http"  # nobody told the application of TLS
        assert origin_allowed(request.headers["Origin"], request.host, ())
