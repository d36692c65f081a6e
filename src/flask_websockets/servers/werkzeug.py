"""Both sides. ``app.run(...)``: Werkzeug's server takes the handshake, uvicorn's protocol the rest.

Werkzeug's development server speaks no WebSocket, but hands its socket to the application. A
handshake that reaches this app's ``wsgi_app`` is taken over: the socket moves to uvicorn's own
protocol class on the runtime's loop, and the handshake goes on from here with the environ that
came here, so that middleware outside and inside has seen it once. No class, function or command
of Flask or Werkzeug is replaced.
"""

from __future__ import annotations

import atexit
import inspect
import logging
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from io import BytesIO
from queue import Empty, SimpleQueue
from typing import Any

import anyio
import uvicorn
from werkzeug.http import HTTP_STATUS_CODES

from ..asgi import UPGRADE
from ..bridge import LoopThread
from ..connection import Upgrade
from ..environ import WEBSOCKET, WSGIEnviron
from .relay import HandedOverTLS, await_relays, start_relay
from .uvicorn import answer_refused_handshake

#: Seconds that open connections have when the process ends, or is reloaded.
GOODBYE_TIMEOUT = 1.0
#: And what the bytes of the last of them have, between the loop and the socket.
LEAST_GOODBYE = 0.2
#: Seconds that a relay waits longer than the loop behind it.
RELAY_MARGIN = 1.0
#: Carries a secret of this process where a connection takes a detour.
TOKEN_HEADER = b"x-flask-websockets-token"

#: Seconds in which the loop takes over a socket: it only makes a transport of it.
TAKE_OVER_TIMEOUT = 10.0
#: What the log says of a client that left before its handshake was answered, as nginx does.
LEFT = 499

WSGIApp = Callable[..., Iterable[bytes]]
ASGIApp = Callable[..., Awaitable[None]]

logger: logging.Logger = logging.getLogger("flask_websockets")


class DevelopmentLoop:
    """The event loop behind all applications of one ``WebSockets`` object, on its own thread.

    :param drain: has everybody leave within so many seconds.
    """

    def __init__(self, drain: Callable[[float], Coroutine[Any, Any, None]]) -> None:
        self._drain = drain
        self._lock = threading.Lock()
        self._thread: LoopThread | None = None  # guarded by _lock

    def get(self) -> LoopThread:
        """Any thread. Started lazily, where it is served: the reloader's parent needs none."""
        with self._lock:
            if self._thread is None:
                self._thread = LoopThread("flask-websockets-loop")
                # Also how the reloader ends a process. Daemon threads still run then.
                atexit.register(self._say_goodbye, self._thread)
            return self._thread

    def forget(self) -> None:
        """The child of a fork: the loop's thread stayed with the parent."""
        self._lock = threading.Lock()
        self._thread = None

    def _say_goodbye(self, thread: LoopThread) -> None:
        """Main thread, at its end. Clients see 1012 and not a reset, if they read at all."""
        if thread is not self._thread:
            return
        deadline = time.monotonic() + GOODBYE_TIMEOUT
        try:
            thread.call(self._drain(GOODBYE_TIMEOUT), 2 * GOODBYE_TIMEOUT)
        except TimeoutError:
            logger.warning("The development loop is blocked; its connections are cut")
        await_relays(max(LEAST_GOODBYE, deadline - time.monotonic()))


class DevelopmentServer:
    """WSGI middleware: passes everything on, but for handshakes that Werkzeug's server brings.

    :param wsgi_app: the application's ``wsgi_app`` so far.
    :param asgi_app: makes its ASGI application, when the first handshake comes.
    :param max_message_bytes: tells the bytes of the largest message that it takes.
    :param send_timeout: seconds after which a client that takes nothing is cut.
    :param loop: where that is served.
    """

    def __init__(
        self,
        wsgi_app: WSGIApp,
        asgi_app: Callable[[], ASGIApp],
        max_message_bytes: Callable[[], int],
        send_timeout: float,
        loop: DevelopmentLoop,
    ) -> None:
        self._wsgi_app = wsgi_app
        self._asgi_app = asgi_app
        self._max_message_bytes = max_message_bytes
        self._patience = send_timeout + RELAY_MARGIN
        self._loop = loop
        self._front: _Front | None = None  # guarded by _lock
        self._lock = threading.Lock()

    def __call__(self, environ: WSGIEnviron, start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Any thread."""
        connection = environ.get("werkzeug.socket")
        if connection is None or WEBSOCKET in environ or not _is_handshake(environ):
            return self._wsgi_app(environ, start_response)
        if environ.get("wsgi.multiprocess"):
            return _unsupported(start_response)
        head = _request_head(environ)
        front = self._get_front()
        nothing: Iterable[bytes] = ()
        if isinstance(connection, ssl.SSLSocket):
            live, rest = _take_over_tls(connection, environ, self._patience)
        else:
            live, rest, other_end = _take_over(connection, environ)
            nothing = _Nothing(other_end)
        answers: SimpleQueue[int | None] = SimpleQueue()
        upgrade = Upgrade(app=self._wsgi_app, environ=environ, on_answer=answers.put)
        front.adopt(live, head + rest, upgrade)
        status: int | None = 101
        if environ.get("wsgi.multithread"):  # or nobody else would be served meanwhile
            with suppress(Empty):
                status = answers.get(timeout=self._patience)
        phrase = HTTP_STATUS_CODES.get(status or LEFT, "Client Closed Request")
        start_response(f"{status or LEFT} {phrase}", [])  # for the log; nobody else gets it
        return nothing

    def forget(self) -> None:
        """The child of a fork: the loop's thread stayed with the parent."""
        self._lock = threading.Lock()
        self._front = None

    def _get_front(self) -> _Front:
        with self._lock:
            if self._front is None:
                self._front = _Front(
                    self._asgi_app(), self._max_message_bytes(), self._patience, self._loop.get()
                )
            return self._front


class _Front:
    """uvicorn's WebSocket protocol, on a loop of a thread.

    Where its class is not what we know, a whole uvicorn stands behind a port of this machine
    instead, and a thread carries the bytes of each connection there.
    """

    def __init__(
        self, asgi_app: ASGIApp, max_message_bytes: int, patience: float, loop: LoopThread
    ) -> None:
        self._loop = loop
        self._patience = patience
        # By the token in their head. Each step on it is one of the interpreter's.
        self._pending: dict[bytes, Upgrade] = {}
        self._config = uvicorn.Config(
            asgi_app,
            lifespan="off",
            log_config=None,
            proxy_headers=False,  # the environ that we were given has been through ProxyFix
            ws_max_size=max_message_bytes,
            ws_per_message_deflate=False,
        )
        self._config.load()
        self._address: Any = None  # of the uvicorn behind a port
        self._state = _server_state(self._config.ws_protocol_class)
        if self._state is None:
            logger.warning(
                "uvicorn %s has a WebSocket protocol that the development server does not know; "
                "WebSockets take a detour through a port of this machine",
                uvicorn.__version__,
            )
            self._address = loop.call(self._start_uvicorn(asgi_app), TAKE_OVER_TIMEOUT)

    def adopt(self, live: socket.socket, head: bytes, upgrade: Upgrade) -> None:
        """Werkzeug's thread. Go on with a connection whose request head has been read."""
        if self._address is None:
            self._loop.call(self._adopt(live, head, upgrade), TAKE_OVER_TIMEOUT)
            return
        token = secrets.token_hex().encode()
        line, rest = head.split(b"\r\n", 1)
        head = b"%b\r\n%b: %b\r\n%b" % (line, TOKEN_HEADER, token, rest)
        self._pending[token] = upgrade
        inner = socket.create_connection(self._address, TAKE_OVER_TIMEOUT)

        def forget() -> None:
            if self._pending.pop(token, None) is not None:
                upgrade.on_answer(400)  # uvicorn has refused it itself

        start_relay(live, inner, self._patience, head, forget)

    async def _adopt(self, live: socket.socket, head: bytes, upgrade: Upgrade) -> None:
        """Loop. What uvicorn's own HTTP protocols do in ``handle_websocket_upgrade``."""
        protocol_class: Any = self._config.ws_protocol_class
        protocol = protocol_class(
            config=self._config, server_state=self._state, app_state={UPGRADE: upgrade}
        )
        transport, _ = await self._loop.loop.connect_accepted_socket(lambda: protocol, live)
        try:
            protocol.data_received(head)
        except BaseException:
            transport.abort()
            raise
        answer_refused_handshake(transport)
        if transport.is_closing():
            upgrade.on_answer(400)  # uvicorn has refused it itself

    async def _start_uvicorn(self, asgi_app: ASGIApp) -> Any:
        """Loop. Serve on a port that nobody else gets anything from; return its address."""

        async def detour(scope: Any, receive: Any, send: Any) -> None:
            upgrade = None
            if scope["type"] == "websocket":
                # Ours is the first; a client may have sent another.
                values = (value for name, value in scope["headers"] if name == TOKEN_HEADER)
                upgrade = self._pending.pop(next(values, b""), None)
            if upgrade is None:
                return  # uvicorn answers 500
            await asgi_app({**scope, "state": {UPGRADE: upgrade}}, receive, send)

        self._config.loaded, self._config.app = False, detour
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(self._config)
        self._server = self._loop.loop.create_task(server.serve([listener]))
        while not server.started:
            await anyio.sleep(0.01)
        return listener.getsockname()


def _server_state(protocol_class: Any) -> Any | None:
    """What connections of a protocol class share; None if it is not one that we know."""
    try:
        from uvicorn.server import ServerState

        state = ServerState()
        inspect.signature(protocol_class).bind(config=None, server_state=state, app_state={})
    except (ImportError, TypeError):
        return None
    known = all(hasattr(protocol_class, name) for name in ("connection_made", "data_received"))
    return state if known else None


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


def _take_over_tls(
    connection: ssl.SSLSocket, environ: WSGIEnviron, patience: float
) -> tuple[socket.socket, bytes]:
    """Take a TLS connection over: a thread carries its bytes to what is returned."""
    connection.setblocking(False)
    body, environ["wsgi.input"] = environ["wsgi.input"], BytesIO()
    try:
        rest: bytes = body.peek() if hasattr(body, "peek") else b""
    except ssl.SSLWantReadError:
        rest = b""
    connection.__class__ = HandedOverTLS
    live, inner = socket.socketpair()
    start_relay(connection, inner, patience)
    return live, rest


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
        b"The development server serves WebSockets in one process only. Leave out processes=, "
        b"or serve asgi_app() with uvicorn.\n"
    ]
