"""Pure. ASGI scope to WSGI environ, for HTTP and WebSocket alike; and the Origin rule."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, MutableMapping
from functools import lru_cache
from io import BytesIO
from typing import Any
from urllib.parse import quote, unquote_to_bytes

WSGIEnviron = dict[str, Any]
#: ASGI scopes and messages are dicts of whatever the specification says.
Scope = MutableMapping[str, Any]

#: Where a handshake's WebSocket lies in the environ.
WEBSOCKET = "flask_websockets.websocket"

#: asgiref's figure, and more than any client sends.
MAX_COPIES = 100

#: Headers whose variables have no prefix, and no lists: the last copy counts, as in gunicorn.
_SINGLE = {"CONTENT_LENGTH", "CONTENT_TYPE"}

#: What comes before the path in the absolute form of a target (RFC 9112 section 3.2.2).
_AUTHORITY = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")

_SCHEMES = {"ws": "http", "wss": "https"}
_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


def build_environ(scope: Scope, body: Any = None) -> WSGIEnviron:
    """Build the WSGI environ (PEP 3333) of an ASGI ``http`` or ``websocket`` scope.

    The scheme of a WebSocket is ``http`` or ``https``: Werkzeug's router makes ``ws`` of it
    from the Upgrade header, and ``request.is_secure`` stays true.

    :param body: the readable ``wsgi.input``; empty if None.
    :raises ValueError: for more than ``MAX_COPIES`` copies of one header, and for a body of
        which nobody knows the end (RFC 9112 section 6.3): a server may call before it refuses.
    """
    root_path, path_info = _split_path(scope)
    # A unix socket's path is no server name.
    server = scope.get("server")
    name, port = server if server and server[1] is not None else ("localhost", None)
    scheme = scope.get("scheme", "http")
    scheme = _SCHEMES.get(scheme, scheme)
    query = scope.get("query_string", b"").decode("latin-1")
    uri = _raw_path(scope) + (f"?{query}" if query else "")
    query = query.partition("#")[0]  # some servers leave the fragment of a target there
    environ: WSGIEnviron = {
        "REQUEST_METHOD": scope.get("method", "GET"),
        "SCRIPT_NAME": root_path,
        "PATH_INFO": path_info,
        "QUERY_STRING": query,
        "REQUEST_URI": uri,
        "RAW_URI": uri,
        "SERVER_PROTOCOL": f"HTTP/{scope.get('http_version', '1.1')}",
        "SERVER_NAME": str(name),
        "SERVER_PORT": str(port or _DEFAULT_PORTS.get(str(scheme), 80)),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scheme,
        "wsgi.input": BytesIO() if body is None else body,
        # The end of the body is its end: no Content-Length is needed to find it.
        "wsgi.input_terminated": True,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    if client := scope.get("client"):
        environ["REMOTE_ADDR"] = str(client[0])
        if client[1] is not None:
            environ["REMOTE_PORT"] = str(client[1])
    _add_headers(environ, scope.get("headers", ()))
    if scope["type"] == "websocket":
        # An HTTP/2 extended CONNECT carries neither, and Werkzeug's router looks for both.
        environ["HTTP_CONNECTION"] = "Upgrade"
        environ["HTTP_UPGRADE"] = "websocket"
    return environ


def _split_path(scope: Scope) -> tuple[str, str]:
    """SCRIPT_NAME and PATH_INFO as PEP 3333 wants them: bytes posing as Latin-1 characters."""
    root_path = scope.get("root_path", "").rstrip("/")
    path = _path(scope, root_path)
    # Servers and frameworks differ in whether the path includes the root path.
    if root_path and (path == root_path or path.startswith(f"{root_path}/")):
        path = path[len(root_path) :]
    return _wsgi_text(root_path), _wsgi_text(path)


def _path(scope: Scope, root_path: str) -> str:
    """The path without what servers leave in it: a fragment, the host, bytes decoded to U+FFFD."""
    path: str = scope["path"]
    raw_path: bytes = scope.get("raw_path") or b""
    if "\ufffd" not in path and b"#" not in raw_path and not _AUTHORITY.match(raw_path):
        return path
    # The path decides: a middleware may have changed it and left the raw one.
    if unquote_to_bytes(raw_path).decode("utf-8", "replace") not in (path, root_path + path):
        return path
    kept = _AUTHORITY.sub(b"", raw_path.partition(b"#")[0])
    return unquote_to_bytes(kept).decode("utf-8", "surrogateescape")


def _wsgi_text(text: str) -> str:
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("latin-1")


def _raw_path(scope: Scope) -> str:
    raw_path = scope.get("raw_path")
    if raw_path is None:
        return quote(scope["path"].encode("utf-8", "surrogateescape"), safe="/:@!$&'()*+,;=~")
    return str(raw_path.decode("latin-1"))


def _add_headers(environ: WSGIEnviron, headers: Iterable[tuple[bytes, bytes]]) -> None:
    # Lists and one join: repeated concatenation is quadratic (CVE-2025-14550).
    repeated: dict[str, list[str]] = {}
    authority = None
    for raw_name, raw_value in headers:
        name, value = _variable(raw_name), raw_value.strip(b" \t").decode("latin-1")
        if name is None:
            if raw_name == b":authority":
                authority = value
        elif name not in environ:
            environ[name] = value
        else:
            copies = repeated.setdefault(name, [environ[name]])
            if len(copies) == MAX_COPIES:
                raise ValueError(
                    f"Expected at most {MAX_COPIES} headers {raw_name.decode('latin-1')}; got more."
                )
            copies.append(value)
    for name, values in repeated.items():
        if name in _SINGLE:
            environ[name] = values[-1]
        else:
            # RFC 9113 section 8.2.3: HTTP/2 splits cookies, and they join with a semicolon.
            environ[name] = ("; " if name == "HTTP_COOKIE" else ",").join(values)
    if authority is not None:
        environ.setdefault("HTTP_HOST", authority)
    coding = environ.get("HTTP_TRANSFER_ENCODING", "chunked").rpartition(",")[2].strip()
    if coding.lower() != "chunked":
        raise ValueError(f"Expected a Transfer-Encoding that ends in chunked; got {coding}.")


@lru_cache(maxsize=512)
def _variable(raw_name: bytes) -> str | None:
    """The variable of a header; None for one that has none."""
    # X_Forwarded_For must not pose as X-Forwarded-For (CVE-2015-0219). A colon begins the
    # pseudo-headers of HTTP/2.
    if b"_" in raw_name or raw_name.startswith(b":"):
        return None
    name = raw_name.decode("latin-1").upper().replace("-", "_")
    return name if name in _SINGLE else f"HTTP_{name}"


def origin_allowed(origin: str | None, host: str, allowed: Iterable[str]) -> bool:
    """Whether a page of *origin* may open a WebSocket to *host*.

    Browsers send cookies with a handshake from any page (CWE-1385), and CORS does not
    govern WebSockets: so the server must look.

    :param origin: the Origin header; None when the client sent none, and is no browser.
    :param host: host and port as the application sees itself, ``request.host``.
    :param allowed: more origins: ``https://app.example.com``, ``https://*.example.com``
        (subdomains of any depth), ``null`` or ``*``.
    """
    if origin is None:
        return True
    parsed = parse_origin(origin)
    for pattern in allowed:
        if pattern == "*" or pattern.lower() == origin.lower():
            return True
        if parsed is not None and _matches(parsed, parse_origin(pattern)):
            return True
    # Only hosts are compared: behind TLS termination the application believes in http.
    return (
        parsed is not None
        and parsed[0] in ("http", "https")
        and parse_origin(f"{parsed[0]}://{host}") == parsed
    )


#: Scheme, host and port, the scheme's default port filled in.
Origin = tuple[str, str, int | None]

_ORIGIN = re.compile(
    r"([a-z][a-z0-9+.-]*)://((?:\*\.)?[^\s/?#@:*]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?"
)


def parse_origin(text: str) -> Origin | None:
    """The parts of an origin, or of a pattern with ``*.`` before its host; None if it is none."""
    match = _ORIGIN.fullmatch(text.lower())
    if match is None:
        return None
    scheme, host, port = match.groups()
    return scheme, host, int(port) if port else _DEFAULT_PORTS.get(scheme)


def _matches(origin: Origin, pattern: Origin | None) -> bool:
    if pattern is None or (origin[0], origin[2]) != (pattern[0], pattern[2]):
        return False
    if pattern[1].startswith("*."):
        subdomain = origin[1].removesuffix(pattern[1][1:])
        return subdomain not in ("", origin[1])
    return origin[1] == pattern[1]
