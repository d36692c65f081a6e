"""Pure. ASGI scope to WSGI environ, for HTTP and WebSocket alike; and the Origin rule."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, MutableMapping
from io import BytesIO
from typing import Any

WSGIEnviron = dict[str, Any]
#: ASGI scopes and messages are dicts of whatever the specification says.
Scope = MutableMapping[str, Any]

#: Where a handshake's WebSocket lies in the environ.
WEBSOCKET = "flask_websockets.websocket"

_SCHEMES = {"ws": "http", "wss": "https"}
_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


def build_environ(scope: Scope, body: Any = None) -> WSGIEnviron:
    """Build the WSGI environ (PEP 3333) of an ASGI ``http`` or ``websocket`` scope.

    The scheme of a WebSocket is ``http`` or ``https``: Werkzeug's router makes ``ws`` of it
    from the Upgrade header, and ``request.is_secure`` stays true.

    :param body: the readable ``wsgi.input``; empty if None.
    """
    root_path = scope.get("root_path", "").rstrip("/")
    path = scope["path"]
    if root_path and (path == root_path or path.startswith(root_path + "/")):
        path = path[len(root_path) :]
    server = scope.get("server") or ("localhost", None)
    scheme = scope.get("scheme", "http")
    scheme = _SCHEMES.get(scheme, scheme)
    environ: WSGIEnviron = {
        "REQUEST_METHOD": scope.get("method", "GET"),
        "SCRIPT_NAME": _wsgi_text(root_path),
        "PATH_INFO": _wsgi_text(path),
        "QUERY_STRING": scope.get("query_string", b"").decode("latin-1"),
        "SERVER_PROTOCOL": f"HTTP/{scope.get('http_version', '1.1')}",
        "SERVER_NAME": str(server[0]),
        "SERVER_PORT": str(server[1] or _DEFAULT_PORTS.get(str(scheme), 80)),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scheme,
        "wsgi.input": BytesIO() if body is None else body,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    if client := scope.get("client"):
        environ["REMOTE_ADDR"] = str(client[0])
        environ["REMOTE_PORT"] = str(client[1])
    environ.update(_header_variables(scope.get("headers", ())))
    if scope["type"] == "websocket":
        # An HTTP/2 extended CONNECT carries neither, and Werkzeug's router looks for both.
        environ["HTTP_CONNECTION"] = "Upgrade"
        environ["HTTP_UPGRADE"] = "websocket"
    return environ


def _wsgi_text(text: str) -> str:
    """Text as PEP 3333 wants it: bytes, each posing as a Latin-1 character."""
    return text.encode("utf-8", "surrogateescape").decode("latin-1")


def _header_variables(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    # Lists and one join: repeated concatenation is quadratic (CVE-2025-14550).
    collected: dict[str, list[str]] = {}
    for raw_name, raw_value in headers:
        # X_Forwarded_For must not pose as X-Forwarded-For (CVE-2015-0219).
        if b"_" in raw_name:
            continue
        name = raw_name.decode("latin-1").upper().replace("-", "_")
        if name not in ("CONTENT_LENGTH", "CONTENT_TYPE"):
            name = f"HTTP_{name}"
        collected.setdefault(name, []).append(raw_value.decode("latin-1"))
    # RFC 9113 section 8.2.3: HTTP/2 splits cookies, and they join with a semicolon.
    return {
        name: ("; " if name == "HTTP_COOKIE" else ",").join(values)
        for name, values in collected.items()
    }


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
