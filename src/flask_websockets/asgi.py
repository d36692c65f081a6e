"""Loop side. The ASGI application: scope dispatch, lifespan, and the way into a connection."""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

import anyio

from .bridge import Entry, HttpPool, Link, tune_process
from .config import Config
from .connection import Connection, Upgrade, WSGIApp
from .environ import Scope, WSGIEnviron, build_environ
from .errors import UsageError
from .http import HttpAdapter
from .protocol import PlainResponse, plain_response, refusal_messages
from .runtime import Runtime
from .servers import uvicorn
from .writer import Receive, Send

#: Under this key of ``scope["state"]`` a front in this process leaves an :class:`Upgrade`.
UPGRADE = "flask_websockets.upgrade"


class Answer(Protocol):
    """The view's side of a handshake: calls the WSGI application in the view's thread."""

    def __call__(
        self, app: WSGIApp, environ: WSGIEnviron, link: Link, offered: list[str]
    ) -> BaseException | None: ...


class Application:
    """One Flask application as an ASGI application.

    :param wsgi_app: calls the application's ``wsgi_app`` of the moment, middleware included.
    :param runtime: the running loop's runtime, started if it is not there.
    :param restart: starts a runtime on the running loop: a server has come up.
    :param stop: the server goes down.
    :param answer: the view's side of a handshake.
    """

    def __init__(
        self,
        wsgi_app: WSGIApp,
        config: Config,
        *,
        runtime: Callable[[Config], Runtime],
        restart: Callable[[Config], Runtime],
        stop: Callable[[], Awaitable[None]],
        answer: Answer,
    ) -> None:
        self._wsgi_app = wsgi_app
        self._config = config
        self._runtime = runtime
        self._restart = restart
        self._stop = stop
        self._answer = answer
        # One of each for a runtime: a forked child has a runtime of its own, and no threads.
        self._http: tuple[Runtime, HttpAdapter] | None = None
        self._handshakes: tuple[Runtime, anyio.Semaphore] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                runtime = self._runtime(self._config)
                await self._adapter(runtime)(scope, receive, send)
            case "websocket":
                await self._websocket(scope, receive, send)
            case "lifespan":
                await self._lifespan(receive, send)
            case kind:
                raise ValueError(
                    f"Expected an ASGI scope of type http, websocket or lifespan; got {kind!r}."
                )

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    self._restart(self._config)
                except UsageError as error:
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                if self._config.tune_process:
                    tune_process()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self._stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Admit a handshake, start its view, and serve the connection (I3).

        The limits that hold for everybody are settled here, before any thread is taken.
        """
        runtime = self._runtime(self._config)
        if (await receive())["type"] != "websocket.connect":
            return  # the client left before we came to it
        known = scope["path"], _peer(scope), scope.get("extensions"), _upgrade(scope).on_answer
        entry = Entry(runtime.registry, *known)
        refusal = runtime.admit(self._config, entry)
        if refusal is not None:
            await self._turn_away(scope, send, refusal)
            return
        try:
            connection = await self._start(runtime, entry, scope, receive, send)
            if isinstance(connection, Connection):
                await runtime.serve(connection)
            else:
                await self._turn_away(scope, send, connection)
                return
        finally:
            runtime.discharge()
        upgrade = _upgrade(scope)
        if upgrade.on_error is not None and connection.view.error is not None:
            upgrade.on_error(connection.view.error)

    async def _start(
        self, runtime: Runtime, entry: Entry, scope: Scope, receive: Receive, send: Send
    ) -> Connection | PlainResponse:
        """Start the view of a handshake that was admitted; or what it is refused with."""
        try:
            environ = _upgrade(scope).environ or build_environ(scope)
        except ValueError as error:
            return plain_response(400, str(error))
        slots = self._slots(runtime)
        if not await _acquired(slots, self._config.handshake_timeout):
            return runtime.refuse_handshake(self._config, entry)
        if runtime.draining:
            slots.release()
            return runtime.refuse_draining(entry)
        link = Link(runtime.door, self._config, entry)
        connection = Connection(link, runtime.counters, receive, send, slots)
        try:
            self._start_view(runtime, connection, scope, environ)
        except RuntimeError:
            link.lose(1013)
            connection.end_handshake()
            return runtime.refuse_thread(entry)
        return connection

    def _start_view(
        self, runtime: Runtime, connection: Connection, scope: Scope, environ: WSGIEnviron
    ) -> None:
        offered = [name.strip() for name in scope.get("subprotocols") or ()]
        app = _upgrade(scope).app or self._wsgi_app
        # A copy: middleware's variables are seen in the view, and the view's nowhere else.
        context = contextvars.copy_context()
        run = partial(context.run, self._answer, app, environ, connection.link, offered)
        over = partial(runtime.view_over, connection)
        connection.view.start(run, over, runtime.finishing)

    def _adapter(self, runtime: Runtime) -> HttpAdapter:
        if self._http is None or self._http[0] is not runtime:
            config = self._config
            pool = HttpPool(config.http_threads, runtime.door.relay)
            runtime.http_pools.append(pool)
            adapter = HttpAdapter(self._wsgi_app, pool, runtime.door, runtime.counters, config)
            self._http = (runtime, adapter)
        return self._http[1]

    def _slots(self, runtime: Runtime) -> anyio.Semaphore:
        if self._handshakes is None or self._handshakes[0] is not runtime:
            limit = self._config.max_handshakes
            self._handshakes = (runtime, anyio.Semaphore(limit, fast_acquire=True))
        return self._handshakes[1]

    async def _turn_away(self, scope: Scope, send: Send, response: PlainResponse) -> None:
        protocol = uvicorn.protocol_of(send)
        _upgrade(scope).on_answer(response[0])

        async def answer() -> None:
            for message in refusal_messages(scope.get("extensions"), *response):
                await send(message)
            uvicorn.note_refusal(protocol)

        if uvicorn.takes_at_once(protocol):
            return await answer()  # a deadline would cost half as much again
        with anyio.move_on_after(self._config.send_timeout):
            await answer()


async def _acquired(slots: anyio.Semaphore, timeout: float) -> bool:
    """Take one of *slots*, now or within *timeout* seconds; False if none was free."""
    try:
        slots.acquire_nowait()
    except anyio.WouldBlock:
        with anyio.move_on_after(timeout) as waiting:
            await slots.acquire()
        return not waiting.cancelled_caught
    return True


def _peer(scope: Scope) -> str:
    """Where a connection comes from, for the log; a unix socket's clients have no address."""
    client = scope.get("client")
    return str(client[0]) if client else "without an address"


def _upgrade(scope: Scope) -> Upgrade:
    state: dict[str, Any] = scope.get("state") or {}
    upgrade: Upgrade = state.get(UPGRADE) or Upgrade()
    return upgrade
