"""Loop side. The ASGI application: scope dispatch, lifespan, and the runtime behind it."""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

import anyio

from .bridge import Door, HttpPool, Link
from .channels import Hub
from .config import Config
from .connection import Connection, Receive, Send, Upgrade, WSGIApp
from .counters import Counters, Stats
from .environ import Scope, WSGIEnviron, build_environ
from .errors import UsageError
from .http import HttpAdapter
from .protocol import PlainResponse, plain_response, refusal_messages, unavailable
from .running_view import RunningView
from .servers import uvicorn

#: Under this key of ``scope["state"]`` a front in this process leaves an :class:`Upgrade`.
UPGRADE = "flask_websockets.upgrade"


class Answer(Protocol):
    """The view's side of a handshake: calls the WSGI application in the view's thread."""

    def __call__(
        self, app: WSGIApp, environ: WSGIEnviron, link: Link, offered: list[str]
    ) -> BaseException | None: ...


class Runtime:
    """What one :class:`WebSockets` object has on one event loop: door, hub, connections.

    Made on the loop, and touched on the loop only where nothing else is said.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.counters: Counters = Counters()
        self.door: Door = Door(config.max_pending_publishes)  # any thread
        self.hub: Hub = Hub(self.counters)
        self.connections: set[Connection] = set()
        self.http_pools: list[HttpPool] = []  # one for each application
        # As many async views may have their teardown at the same time as may have handshakes.
        self.finishing: anyio.Semaphore = anyio.Semaphore(config.max_handshakes)
        self._admitted = 0
        self._orphans = 0  # views whose connection is over
        self._views: set[RunningView] = set()
        self._emptied = anyio.Event()
        self._watch = uvicorn.Watch(config.close_timeout, self._count_abort)

    def admit(self, config: Config) -> bool:
        """Count one more connection, if it is allowed. A stuck view still counts."""
        if self._admitted + self._orphans >= config.max_connections:
            self.counters.refused_full += 1
            return False
        self._admitted += 1
        return True

    def discharge(self) -> None:
        """An admitted connection is over."""
        self._admitted -= 1

    async def serve(self, connection: Connection, handshake_done: Callable[[], None]) -> None:
        """Serve one connection whose view has been started."""
        if connection.protocol is not None:
            self._watch.add(connection.protocol)
        self.connections.add(connection)
        self._views.add(connection.view)
        try:
            await connection.run(handshake_done)
        finally:
            self.hub.forget(connection.link)
            self.connections.discard(connection)
            self._orphans += connection.view.running
            if not self.connections:
                self._emptied.set()

    def view_over(self, connection: Connection) -> None:
        """A connection's view is over."""
        self._views.discard(connection.view)
        self._orphans -= connection not in self.connections

    def stats(self) -> Stats:
        """Any thread."""
        counted = vars(self.counters).copy()
        depths = [connection.link.depths for connection in tuple(self.connections)]
        inbox_messages, inbox_bytes, outbox_messages, outbox_bytes = map(
            sum, zip((0, 0, 0, 0), *depths, strict=True)
        )
        return Stats(
            connections=len(self.connections),
            http_threads=sum(pool.threads for pool in self.http_pools),
            inbox_messages=inbox_messages,
            inbox_bytes=inbox_bytes,
            outbox_messages=outbox_messages,
            outbox_bytes=outbox_bytes,
            channels=self.hub.channels,
            subscriptions=self.hub.subscriptions,
            pending=self.door.pending,
            connections_total=counted.pop("connections"),
            **counted,
        )

    async def stop(self) -> None:
        """End every connection, give their views their time, and close the door."""
        for connection in tuple(self.connections):
            connection.link.lose(1012, "the server stops")
        while self.connections:  # each bounds the wait for its own view (I9)
            self._emptied = anyio.Event()
            await self._emptied.wait()
        # A server may have cancelled its connections, and nobody has waited for their views.
        async with anyio.create_task_group() as waiting:
            for view in self._views:
                if not view.reported:
                    waiting.start_soon(view.wait)
        self._watch.close()
        self.door.close()

    def _count_abort(self) -> None:
        self.counters.aborted += 1


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
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self._stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Admit a handshake, start its view, and serve the connection (I3).

        The limits that hold for everybody are settled here, before any thread is taken.
        """
        runtime, config = self._runtime(self._config), self._config
        if (await receive())["type"] != "websocket.connect":
            return  # the client left before we came to it
        try:
            environ = _upgrade(scope).environ or build_environ(scope)
        except ValueError as error:
            await self._turn_away(scope, send, plain_response(400, str(error)))
            return
        if not runtime.admit(config):
            await self._turn_away(scope, send, unavailable("All connections are taken."))
            return
        try:
            await self._admitted(runtime, scope, environ, receive, send)
        finally:
            runtime.discharge()

    async def _admitted(
        self, runtime: Runtime, scope: Scope, environ: WSGIEnviron, receive: Receive, send: Send
    ) -> None:
        slots, config = self._slots(runtime), self._config
        with anyio.move_on_after(config.handshake_timeout) as waiting:
            await slots.acquire()
        if waiting.cancelled_caught:
            runtime.counters.refused_full += 1
            reason = "Too many handshakes at the same time."
            await self._turn_away(scope, send, unavailable(reason))
            return
        held = True

        def handshake_done() -> None:
            nonlocal held
            if held:
                held = False
                slots.release()

        try:
            connection = self._connect(runtime, scope, environ, receive, send)
            if connection is None:
                runtime.counters.refused_full += 1
                await self._turn_away(scope, send, unavailable("No thread is left."))
                return
            await runtime.serve(connection, handshake_done)
        finally:
            handshake_done()
        upgrade = _upgrade(scope)
        if upgrade.on_error is not None and connection.view.error is not None:
            upgrade.on_error(connection.view.error)

    def _connect(
        self, runtime: Runtime, scope: Scope, environ: WSGIEnviron, receive: Receive, send: Send
    ) -> Connection | None:
        """Start the view of a handshake; None if the system has no thread for it."""
        upgrade = _upgrade(scope)
        link = Link(runtime.door, self._config, scope.get("extensions"))
        connection = Connection(link, runtime.counters, scope, receive, send)
        offered = [name.strip() for name in scope.get("subprotocols") or ()]
        app = upgrade.app or self._wsgi_app
        # A copy: middleware's variables are seen in the view, and the view's nowhere else.
        context = contextvars.copy_context()
        run = partial(context.run, self._answer, app, environ, link, offered)
        try:
            over = partial(runtime.view_over, connection)
            connection.view.start(run, over, runtime.finishing)
        except RuntimeError:
            link.lose(1013)
            return None
        return connection

    def _adapter(self, runtime: Runtime) -> HttpAdapter:
        if self._http is None or self._http[0] is not runtime:
            config = self._config
            pool = HttpPool(config.http_threads)
            runtime.http_pools.append(pool)
            adapter = HttpAdapter(
                self._wsgi_app, pool, runtime.door, runtime.counters, config.send_timeout
            )
            self._http = (runtime, adapter)
        return self._http[1]

    def _slots(self, runtime: Runtime) -> anyio.Semaphore:
        if self._handshakes is None or self._handshakes[0] is not runtime:
            limit = self._config.max_handshakes
            self._handshakes = (runtime, anyio.Semaphore(limit, fast_acquire=True))
        return self._handshakes[1]

    async def _turn_away(self, scope: Scope, send: Send, response: PlainResponse) -> None:
        with anyio.move_on_after(self._config.send_timeout):
            for message in refusal_messages(scope.get("extensions"), *response):
                await send(message)


def _upgrade(scope: Scope) -> Upgrade:
    state: dict[str, Any] = scope.get("state") or {}
    upgrade: Upgrade = state.get(UPGRADE) or Upgrade()
    return upgrade
