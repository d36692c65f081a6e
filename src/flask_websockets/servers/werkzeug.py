"""Both sides. ``app.run(...)``: Werkzeug's server takes the handshake, uvicorn's protocol the rest.

Werkzeug's development server speaks no WebSocket, but hands its socket to the application. A
handshake that reaches this app's ``wsgi_app`` is taken over: the socket moves to uvicorn's own
protocol class on the runtime's loop, and the handshake goes on from here with the environ that
came here, so that middleware outside and inside has seen it once. No class, function or command
of Flask or Werkzeug is replaced.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from ..asgi import UPGRADE
from ..bridge import LoopThread
from ..config import Config
from ..connection import Upgrade
from ..environ import WEBSOCKET, WSGIEnviron

#: Seconds in which the loop takes over a socket: it only makes a transport of it.
TAKE_OVER_TIMEOUT = 10.0

WSGIApp = Callable[..., Iterable[bytes]]


class DevelopmentLoop:
    """The event loop behind all applications of one ``WebSockets`` object, on its own thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: LoopThread | None = None  # guarded by _lock

    def get(self) -> LoopThread:
        """Any thread. Started lazily, where it is served: the reloader's parent needs none."""
        with self._lock:
            if self._thread is None:
                self._thread = LoopThread("flask-websockets-loop")
            return self._thread

    def forget(self) -> None:
        """The child of a fork: the loop's thread stayed with the parent."""
        self._lock = threading.Lock()
        self._thread = None


class DevelopmentServer:
    """WSGI middleware: passes everything on, but for handshakes that Werkzeug's server brings.

    :param wsgi_app: the application's ``wsgi_app`` so far.
    :param asgi_app: makes its ASGI application, when the first handshake comes.
    :param loop: where that is served.
    """

    def __init__(
        self,
        wsgi_app: WSGIApp,
        asgi_app: Callable[[], Callable[..., Any]],
        config: Config,
        loop: DevelopmentLoop,
    ) -> None:
        self._wsgi_app = wsgi_app
        self._asgi_app = asgi_app
        self._config = config
        self._loop = loop
        self._front: _Front | None = None  # guarded by _lock
        self._lock = threading.Lock()

    def __call__(self, environ: WSGIEnviron, start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Any thread."""
        connection = environ.get("werkzeug.socket")
        if connection is None or WEBSOCKET in environ or not _is_handshake(environ):
            return self._wsgi_app(environ, start_response)
        if isinstance(connection, ssl.SSLSocket) or environ.get("wsgi.multiprocess"):
            return _unsupported(start_response)
        head = _request_head(environ)
        front = self._get_front()
        live, rest, other_end = _take_over(connection, environ)
        front.adopt(live, head + rest, Upgrade(app=self._wsgi_app, environ=environ))
        start_response("101 Switching Protocols", [])  # for the log; it is written to the dummy
        return _Nothing(other_end)

    def forget(self) -> None:
        """The child of a fork: the loop's thread stayed with the parent."""
        self._lock = threading.Lock()
        self._front = None

    def _get_front(self) -> _Front:
        with self._lock:
            if self._front is None:
                self._front = _Front(self._asgi_app(), self._config, self._loop.get())
            return self._front


class _Front:
    """uvicorn's WebSocket protocol, on a loop of a thread."""

    def __init__(self, asgi_app: Callable[..., Any], config: Config, loop: LoopThread) -> None:
        self._config = uvicorn.Config(
            asgi_app,
            lifespan="off",
            log_config=None,
            proxy_headers=False,  # the environ that we were given has been through ProxyFix
            ws_max_size=config.max_message_bytes,
            ws_per_message_deflate=False,
        )
        self._config.load()
        self._state = ServerState()
        self._loop = loop

    def adopt(self, live: socket.socket, head: bytes, upgrade: Upgrade) -> None:
        """Werkzeug's thread. Go on with a connection whose request head has been read."""
        self._loop.call(self._adopt(live, head, upgrade), TAKE_OVER_TIMEOUT)

    async def _adopt(self, live: socket.socket, head: bytes, upgrade: Upgrade) -> None:
        """Loop. What uvicorn's own HTTP protocols do in ``handle_websocket_upgrade``."""
        protocol_class: Any = self._config.ws_protocol_class
        protocol = protocol_class(
            config=self._config, server_state=self._state, app_state={UPGRADE: upgrade}
        )
        await self._loop.loop.connect_accepted_socket(lambda: protocol, live)
        protocol.data_received(head)


def _is_handshake(environ: WSGIEnviron) -> bool:
    tokens = [token.strip().lower() for token in environ.get("HTTP_CONNECTION", "").split(",")]
    return (
        environ["REQUEST_METHOD"] == "GET"
        and environ.get("HTTP_UPGRADE", "").lower() == "websocket"
        and "upgrade" in tokens
    )


class _Nothing:
    """A response without a body, that keeps the dummy's other end open until it is out."""

    def __init__(self, other_end: socket.socket) -> None:
        self._other_end = other_end

    def __iter__(self) -> Iterator[bytes]:
        return iter(())

    def close(self) -> None:
        self._other_end.close()


def _take_over(
    connection: socket.socket, environ: WSGIEnviron
) -> tuple[socket.socket, bytes, socket.socket]:
    """Take the connection out of Werkzeug's hands; leave it a dummy to write to and to close.

    :returns: the connection, what was read from it beyond the request head, and the dummy's
        other end.
    """
    connection.setblocking(False)
    body, environ["wsgi.input"] = environ["wsgi.input"], BytesIO()
    rest: bytes = body.peek() if hasattr(body, "peek") else b""
    live = socket.socket(fileno=connection.detach())
    dummy, other_end = socket.socketpair()
    # Its handler holds this very object, in its reader and writer too.
    connection.__init__(fileno=dummy.detach())  # type: ignore[misc]
    # Werkzeug drains its input when the response is out: let it find the end at once. What it
    # writes is a status line and a few headers, which fit into the buffer of a socket pair.
    other_end.shutdown(socket.SHUT_WR)
    return live, rest, other_end


def _request_head(environ: WSGIEnviron) -> bytes:
    """The request head as it came, as far as the WebSocket protocol looks at it."""
    target = environ.get("RAW_URI") or environ.get("REQUEST_URI") or "/"
    lines = [f"GET {target} HTTP/1.1"]
    for key, value in environ.items():
        if key.startswith("HTTP_"):
            lines.append(f"{key[5:].replace('_', '-').title()}: {value}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _unsupported(start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("501 Not Implemented", [("Content-Type", "text/plain; charset=utf-8")])
    return [
        b"The development server serves WebSockets without TLS and in one process only. "
        b"Serve asgi_app() with uvicorn for wss.\n"
    ]
