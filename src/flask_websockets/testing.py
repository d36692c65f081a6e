"""Both sides. The test client: WebSockets in process, without a server, with the real bridge.

::

    client = websockets.test_client()
    with client.websocket_connect("/ws") as ws:
        ws.send("hello")
        assert ws.receive() == "hello"
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self
from weakref import WeakKeyDictionary

import anyio
from flask import Flask
from flask import json as flask_json
from flask.testing import EnvironBuilder, FlaskClient
from werkzeug.datastructures import Headers
from werkzeug.wrappers import Request

from .asgi import UPGRADE
from .bridge import LoopThread
from .connection import Upgrade
from .environ import WSGIEnviron
from .errors import ConnectionClosed, ConnectionRejected, InvalidMessage, UsageError

if TYPE_CHECKING:
    from .extension import WebSockets

#: Seconds that a test waits for anything, unless it says otherwise.
DEFAULT_TIMEOUT = 5.0
#: Messages that the client's side takes before the test receives them, as a socket's buffers do.
SOCKET_MESSAGES = 16
#: The close code for a view that has raised (RFC 6455, section 7.4.1).
VIEW_FAILED = 1011


class WebSocketClient(FlaskClient):
    """The application's own test client, which can open WebSockets as well."""

    websockets: WebSockets

    def websocket_connect(
        self,
        path: str = "/",
        *,
        subprotocols: Sequence[str] = (),
        timeout: float = DEFAULT_TIMEOUT,
        **options: Any,
    ) -> ClientConnection:
        """Open a WebSocket. Use it in a ``with`` statement, which closes it.

        Cookies are sent and stored as for any other request of this client.

        :param path: path and query string.
        :param subprotocols: offered to the server.
        :param timeout: seconds that each wait of this connection may take.
        :param options: what Werkzeug's ``EnvironBuilder`` takes: ``headers``, ``base_url``,
            ``query_string``, ``environ_base``.
        :raises ConnectionRejected: on entering, if the handshake is answered with a response.
        :raises TimeoutError: on entering, if it is not answered.
        """
        options["environ_base"] = self._copy_environ(options.get("environ_base", {}))
        builder = EnvironBuilder(self.application, path, **options)
        try:
            environ = builder.get_environ()
        finally:
            builder.close()
        self._add_cookies_to_wsgi(environ)
        return ClientConnection(self, environ, subprotocols, timeout)

    def keep_cookies(self, request: Request, headers: Headers) -> None:
        """Store the cookies of a handshake's response."""
        self._update_cookies_from_response(
            request.host.partition(":")[0], request.path, headers.getlist("Set-Cookie")
        )


class ClientConnection:
    """The client's end of a connection, from a test. Every wait has a timeout.

    What :meth:`WebSocketClient.websocket_connect` returns, to be used in a ``with`` statement.
    """

    #: The subprotocol that the server chose.
    accepted_subprotocol: str | None
    #: The headers of the 101 response that the application set.
    handshake_headers: Headers
    #: The server's close code; None while none came.
    close_code: int | None
    #: The server's close reason; None while none came.
    close_reason: str | None

    def __init__(
        self,
        client: WebSocketClient,
        environ: WSGIEnviron,
        subprotocols: Sequence[str],
        timeout: float,
    ) -> None:
        self._client = client
        self._environ = environ
        self._subprotocols = list(subprotocols)
        self._timeout = timeout
        self._errors: list[BaseException] = []
        self._left = False
        self._started = False
        self.accepted_subprotocol = None
        self.handshake_headers = Headers()
        self.close_code = self.close_reason = None

    def __enter__(self) -> Self:
        self._server = _Server.enter(self._client.websockets)
        try:
            self._connect()
        except BaseException:
            self._leave(1001)
            self._server.exit()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave with 1000 if the connection is open, and wait for the view to end.

        What came out of the application is raised here, as Flask's own client does it.

        :raises TimeoutError: if the view does not end in time.
        """
        try:
            self._leave(1000)
        finally:
            self._server.exit()
        if error is None:
            self._raise_errors()

    def send(self, data: str | bytes) -> None:
        """Send a text message for ``str``, a binary one for ``bytes``.

        :raises ConnectionClosed: if the connection is over.
        :raises TimeoutError: if the inbox is full, and the view takes nothing for the timeout of
            the connection.
        """
        key = "text" if isinstance(data, str) else "bytes"
        self._put({"type": "websocket.receive", key: data})

    def send_json(self, data: Any) -> None:
        """Send *data* as JSON in a text message. See :meth:`send`."""
        with self._client.application.app_context():
            self.send(flask_json.dumps(data))

    def receive(self, timeout: float | None = None) -> str | bytes:
        """The server's next message.

        :param timeout: seconds to wait, by default those of the connection.
        :raises TimeoutError: if none came.
        :raises ConnectionClosed: if the server closed the connection. Where the view has raised,
            and the application propagates exceptions, what it raised is the cause.
        """
        if self.close_code is not None:
            raise ConnectionClosed(self.close_code, self.close_reason or "")
        message = self._get(self._timeout if timeout is None else timeout)
        if message["type"] == "websocket.close":
            self.close_code = message.get("code", 1000)
            self.close_reason = message.get("reason") or ""
            raise self._closed()
        data: str | bytes | None = message.get("text")
        return message["bytes"] if data is None else data

    def receive_json(self, timeout: float | None = None) -> Any:
        """The server's next message, parsed as JSON. See :meth:`receive`.

        :raises InvalidMessage: if it is not JSON.
        """
        data = self.receive(timeout)
        try:
            with self._client.application.app_context():
                return flask_json.loads(data)
        except ValueError as error:
            raise InvalidMessage(f"Expected JSON; got {data[:40]!r}: {error}") from error

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Say goodbye. The server's messages that came before can still be received.

        A second close does nothing. A test that only leaves need not call it: the end of the
        ``with`` block does, with 1000.
        """
        if not self._left:
            self._left = True
            self._put({"type": "websocket.disconnect", "code": code, "reason": reason})

    # -- the handshake ----------------------------------------------------------------------------

    def _connect(self) -> None:
        self._server.call(self._start(), self._timeout)
        request = Request(self._environ)
        message = self._get(self._timeout)
        self._raise_errors()
        headers = Headers(
            [
                (name.decode("latin-1"), value.decode("latin-1"))
                for name, value in message.get("headers", ())
            ]
        )
        self._client.keep_cookies(request, headers)
        if message["type"] == "websocket.accept":
            self.accepted_subprotocol = message.get("subprotocol")
            self.handshake_headers = headers
            return
        body = b""
        if message["type"] == "websocket.http.response.start":
            more = True
            while more:
                part = self._get(self._timeout)
                body += part.get("body", b"")
                more = part.get("more_body", False)
        # What the application raised is better than the 500 that it became.
        self._leave(1000)
        self._raise_errors()
        status = str(message.get("status", 403))
        response = self._client.response_wrapper([body], status, headers, request)
        raise ConnectionRejected(response)

    async def _start(self) -> None:
        """Loop. Call the application, as a server does."""
        self._to_app, from_client = anyio.create_memory_object_stream[dict[str, Any]](
            SOCKET_MESSAGES
        )
        to_client, self._from_app = anyio.create_memory_object_stream[dict[str, Any]](
            SOCKET_MESSAGES
        )
        self._ended = anyio.Event()
        app = self._server.app(self._client.application)
        scope = _scope(self._environ, self._subprotocols, Upgrade(on_error=self._errors.append))

        async def run() -> None:
            try:
                with from_client, to_client:
                    await app(scope, from_client.receive, to_client.send)
            except Exception as error:
                self._errors.append(error)
            finally:
                self._ended.set()

        self._to_app.send_nowait({"type": "websocket.connect"})
        self._server.start(run())
        self._started = True

    def _put(self, message: dict[str, Any]) -> None:
        try:
            self._server.call(self._to_app.send(message), self._timeout)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            raise ConnectionClosed(self.close_code or 1006, self.close_reason or "") from None
        except TimeoutError:
            raise TimeoutError(
                f"The view took nothing for {self._timeout:g} s, and its inbox is full."
            ) from None

    def _get(self, timeout: float) -> dict[str, Any]:
        try:
            return self._server.call(_receive(self._from_app, timeout), timeout + 1)
        except anyio.EndOfStream:
            self._raise_errors()
            raise ConnectionClosed(1006, "the application returned without a close") from None
        except TimeoutError:
            raise TimeoutError(f"Nothing came from the server within {timeout:g} s.") from None

    def _leave(self, code: int) -> None:
        """Disconnect, and wait for the application to return."""
        if not self._started:
            return
        self._started = False
        if not self._left:
            self._left = True
            with suppress(ConnectionClosed):
                self._put({"type": "websocket.disconnect", "code": code, "reason": ""})
        try:
            self._server.call(self._drain_and_wait(), self._timeout)
        except TimeoutError:
            raise TimeoutError(
                f"The view of {self._environ['PATH_INFO']} did not end within "
                f"{self._timeout:g} s of its client's leaving."
            ) from None
        finally:
            self._server.call(self._close_streams(), self._timeout)

    async def _drain_and_wait(self) -> None:
        """Loop. Take what the application still sends; nobody reads it any more."""
        with suppress(anyio.EndOfStream):
            while True:
                message = await self._from_app.receive()
                if message["type"] == "websocket.close" and self.close_code is None:
                    self.close_code = message.get("code", 1000)
                    self.close_reason = message.get("reason") or ""
        await self._ended.wait()

    async def _close_streams(self) -> None:
        self._to_app.close()
        self._from_app.close()

    def _closed(self) -> ConnectionClosed:
        """Why nothing comes any more; what the view failed with is the cause."""
        assert self.close_code is not None
        closed = ConnectionClosed(self.close_code, self.close_reason or "")
        if self.close_code == VIEW_FAILED:
            with suppress(TimeoutError):  # the view itself said so, and goes on
                self._server.call(self._ended.wait(), self._timeout)
            if not self._errors and not self._client.application.testing:
                closed.add_note(
                    "If the view has raised, its error is in the log; with app.testing = True it "
                    "is raised here."
                )
        closed.__cause__ = self._errors[0] if self._errors else None
        return closed

    def _raise_errors(self) -> None:
        if self._errors:
            raise self._errors[0]


async def _receive(stream: Any, timeout: float) -> dict[str, Any]:
    with anyio.fail_after(timeout):
        message: dict[str, Any] = await stream.receive()
        return message


def _scope(environ: WSGIEnviron, subprotocols: list[str], upgrade: Upgrade) -> dict[str, Any]:
    """The ASGI scope of a WSGI environ: the way back from ``build_environ``."""
    headers = [
        (key[5:].replace("_", "-").lower().encode(), value.encode("latin-1"))
        for key, value in environ.items()
        if key.startswith("HTTP_")
    ]
    if subprotocols:
        headers.append((b"sec-websocket-protocol", ", ".join(subprotocols).encode()))
    path = environ["SCRIPT_NAME"] + environ["PATH_INFO"]
    return {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "wss" if environ["wsgi.url_scheme"] == "https" else "ws",
        "path": path.encode("latin-1").decode("utf-8", "surrogateescape"),
        "query_string": environ["QUERY_STRING"].encode("latin-1"),
        "root_path": environ["SCRIPT_NAME"].encode("latin-1").decode("utf-8", "surrogateescape"),
        "headers": headers,
        "server": (environ["SERVER_NAME"], int(environ["SERVER_PORT"])),
        "client": (environ.get("REMOTE_ADDR", "127.0.0.1"), 50000),
        "subprotocols": subprotocols,
        "extensions": {"websocket.http.response": {}},
        "state": {UPGRADE: upgrade},
    }


class _Server:
    """The loop behind all open test connections of one :class:`WebSockets` object.

    It is there while one of them is, so that they share channels, and nothing is left behind
    when they are gone.
    """

    #: Guarded by _lock.
    _servers: ClassVar[WeakKeyDictionary[WebSockets, _Server]] = WeakKeyDictionary()
    _lock = threading.Lock()

    def __init__(self, websockets: WebSockets) -> None:
        self._websockets = websockets
        self._users = 0  # guarded by _lock
        self._apps: dict[Flask, Callable[..., Any]] = {}  # loop only
        self._tasks: set[Any] = set()  # loop only
        self._loop = LoopThread("flask-websockets-test")
        self.call = self._loop.call

    @classmethod
    def enter(cls, websockets: WebSockets) -> _Server:
        with cls._lock:
            server = cls._servers.get(websockets)
            if server is None:
                server = cls._servers[websockets] = cls(websockets)
            server._users += 1
            return server

    def exit(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            del self._servers[self._websockets]
        self.call(self._stop(), DEFAULT_TIMEOUT)
        self._loop.stop(DEFAULT_TIMEOUT)

    def app(self, app: Flask) -> Callable[..., Any]:
        """Loop. One ASGI application for each Flask application, as a server has it."""
        if app not in self._apps:
            self._apps[app] = self._websockets.asgi_app(app)
        return self._apps[app]

    def start(self, run: Any) -> None:
        """Loop."""
        task = self._loop.loop.create_task(run)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stop(self) -> None:
        await self._websockets.stop_testing()


def make_client(websockets: WebSockets, app: Flask, options: Mapping[str, Any]) -> WebSocketClient:
    """A client of a class that is the application's own and ours."""
    base = app.test_client_class or FlaskClient
    if not issubclass(base, FlaskClient):
        raise UsageError(
            f"{base.__name__} is no FlaskClient: the WebSocket test client extends the "
            "application's test_client_class."
        )
    kind = type("WebSocketClient", (WebSocketClient, base), {"websockets": websockets})
    made: WebSocketClient = kind(app, app.response_class, use_cookies=True, **options)
    return made
