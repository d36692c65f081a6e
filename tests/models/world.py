"""An application whose views do what they are told, on a loop in a thread of its own.

The test's own thread tells views, peers and the loop what to do, one after the other or all at
once, and looks at what becomes of it.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import count
from queue import SimpleQueue
from typing import Any

import anyio
from anyio.from_thread import start_blocking_portal
from flask import Flask

from flask_websockets import WebSockets

from ..asgi_driver import Message, Peer

#: Seconds in which loop and threads must have come to rest after a step.
PATIENCE = 5.0
#: Seconds for which a view waits for its next order: longer than any run.
IDLE = 60.0


class Failed(Exception):
    """What a view fails with when it is told to."""


class Order:
    """Something that a view is told to do, and what came of it."""

    def __init__(
        self, on_thread: Callable[[Any], Any], on_loop: Callable[[Any], Awaitable[Any]]
    ) -> None:
        self.on_thread = on_thread
        self.on_loop = on_loop
        self.future: Future[Any] = Future()

    def run(self, ws: Any) -> None:
        try:
            self.future.set_result(self.on_thread(ws))
        except Exception as error:
            self.future.set_exception(error)

    async def arun(self, ws: Any) -> None:
        try:
            self.future.set_result(await self.on_loop(ws))
        except Exception as error:
            self.future.set_exception(error)


class Actor:
    """One thread or task that has a connection. None tells it to end, an exception to raise."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._orders: SimpleQueue[Order | Exception | None] = SimpleQueue()
        self._rang = threading.Semaphore(0)
        self._rang_on_loop: Any = None  # loop only

    def tell(self, order: Order | Exception | None) -> None:
        """Any thread but the loop's."""
        self._orders.put(order)
        if self._world.kind == "async":
            self._world.call(self._ring)

    def _ring(self) -> None:
        if self._rang_on_loop is not None:
            self._rang_on_loop.set()

    def run(self, ws: Any) -> None:
        while (order := self._orders.get(timeout=IDLE)) is not None:
            if isinstance(order, Exception):
                raise order
            order.run(ws)

    async def arun(self, ws: Any) -> None:
        with anyio.fail_after(IDLE):
            while True:
                self._rang_on_loop = anyio.Event()
                if self._orders.empty():
                    await self._rang_on_loop.wait()
                    continue
                order = self._orders.get()
                if order is None:
                    return
                if isinstance(order, Exception):
                    raise order
                await order.arun(ws)


class Client:
    """One connection: its peer, its view, and a second thread or task of the view's."""

    def __init__(self, world: World, number: int, socket_messages: float) -> None:
        self.world = world
        self.number = number
        self.ws: Any = None  # from the start of its view
        self.peer: Peer = world.call(
            Peer,
            {
                "type": "websocket",
                "path": f"/{number}",
                "headers": [(b"host", b"localhost")],
                "extensions": {"websocket.http.response": {}},
            },
            socket_messages,
        )
        self.view = Actor(world)
        self.second = Actor(world)
        self.entered: list[Any] = []
        #: Everything that the application has said, in order, as far as the peer has read it.
        self.heard: list[Message] = []
        self.running: Future[Any]

    def begin(self, asgi: Any) -> None:
        """The server calls the application."""
        self.running = self.world.portal.start_task_soon(self.peer.run, asgi)
        self.put({"type": "websocket.connect"})

    # -- the view ------------------------------------------------------------------------------

    def serve(self, ws: Any) -> None:
        """View thread."""
        second = threading.Thread(target=self.second.run, args=(ws,), name="second", daemon=True)
        second.start()
        self.ws = ws
        try:
            self.view.run(ws)
        finally:
            self.second.tell(None)
            second.join(PATIENCE)

    async def aserve(self, ws: Any) -> None:
        """Loop, for an async view."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.second.arun, ws)
            self.ws = ws
            try:
                await self.view.arun(ws)
            finally:
                tasks.cancel_scope.cancel()

    def tell(self, verb: str, *arguments: Any, second: bool = False, **options: Any) -> Future[Any]:
        """Have the view, or its second thread, do something; does not wait for the end of it."""

        async def on_loop(ws: Any) -> Any:
            return await getattr(ws, verb)(*arguments, **options)

        order = Order(lambda ws: getattr(ws, verb)(*arguments, **options), on_loop)
        (self.second if second else self.view).tell(order)
        return order.future

    def ask(self, verb: str, *arguments: Any, **options: Any) -> Any:
        """The same, and wait for what it returns or raises."""
        return self.tell(verb, *arguments, **options).result(PATIENCE)

    def enter(self, channels: Any, on_slow: str) -> Any:
        """Have the second thread enter a ``with subscribe`` block."""
        websockets = self.world.websockets

        def on_thread(ws: Any) -> Any:
            subscription = websockets.subscribe(ws, channels, on_slow=on_slow)  # type: ignore[arg-type]
            return subscription.__enter__()

        async def on_loop(ws: Any) -> Any:
            subscription = websockets.subscribe(ws, channels, on_slow=on_slow)  # type: ignore[arg-type]
            return await subscription.__aenter__()

        subscription = self._order(on_thread, on_loop)
        self.entered.append(subscription)
        return subscription

    def leave_block(self) -> None:
        """Have the second thread leave the innermost block."""
        innermost = self.entered.pop()
        self._order(
            lambda _: innermost.__exit__(None, None, None),
            lambda _: innermost.__aexit__(None, None, None),
        )

    def unsubscribe(self, channels: Any) -> None:
        websockets = self.world.websockets
        self._order(
            lambda ws: websockets.unsubscribe(ws, channels),
            lambda ws: websockets.aunsubscribe(ws, channels),
        )

    def publish(self, data: str, channels: Any, **options: Any) -> None:
        """The second thread publishes, with the twin that is its kind's."""
        websockets = self.world.websockets
        self._order(
            lambda _: websockets.publish(data, channels, **options),
            lambda _: websockets.apublish(data, channels, **options),
        )

    def _order(
        self, on_thread: Callable[[Any], Any], on_loop: Callable[[Any], Awaitable[Any]]
    ) -> Any:
        order = Order(on_thread, on_loop)
        self.second.tell(order)
        return order.future.result(PATIENCE)

    def stop(self, error: Exception | None = None) -> None:
        """Have the view return, or raise *error*."""
        self.view.tell(error)

    # -- the peer ------------------------------------------------------------------------------

    def put(self, message: Message) -> None:
        self.world.call(self.peer.put, message)

    def leave(self, code: int | None = 1000, reason: str = "") -> None:
        self.put({"type": "websocket.disconnect", "code": code, "reason": reason})

    @property
    def stalled(self) -> bool:
        """Loop. Whether the server is in the middle of a send that the peer does not take."""
        waiting: int = self.peer._to_peer.statistics().tasks_waiting_send
        return waiting == 1

    def hear(self) -> Message:
        """The next message of the application's."""
        message: Message = self.world.call(self.peer.get)
        self.heard.append(message)
        return message

    def hear_until_goodbye(self) -> None:
        """Read up to the application's last word."""
        while self.hear()["type"] not in ("websocket.close", "websocket.http.response.body"):
            pass

    def hear_the_rest(self) -> None:
        """Read until the application has returned."""

        async def hear() -> None:
            with anyio.fail_after(PATIENCE):
                while True:
                    try:
                        self.heard.append(await self.peer._from_app.receive())
                    except anyio.EndOfStream:
                        break
                await self.peer.returned.wait()

        self.world.call(hear)

    def close(self) -> None:
        self.world.call(self.peer.close)


class _Errors(logging.Handler):
    """What the package logs as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


class World:
    """The application, its server, and everybody who is connected.

    :param kind: of its views: sync or async.
    :param settings: WEBSOCKETS_* settings.
    """

    def __init__(self, kind: str, backend: str, **settings: Any) -> None:
        self.kind = kind
        self.app = Flask("model")
        self.app.config.update(
            {
                "WEBSOCKETS_SEND_TIMEOUT": IDLE,
                "WEBSOCKETS_INBOX_TIMEOUT": IDLE,
                "WEBSOCKETS_CLOSE_TIMEOUT": IDLE,
                **settings,
            }
        )
        self.websockets = WebSockets(self.app)
        self.asgi = self.websockets.asgi_app(self.app)
        self.clients: dict[int, Client] = {}
        self._numbers = count()
        self.errors = _Errors()
        logging.getLogger("flask_websockets").addHandler(self.errors)
        self._context = start_blocking_portal(backend)
        self.portal = self._context.__enter__()
        self._add_views()
        self._lifespan: Any
        self._serving: Future[Any]
        self.start()

    def start(self) -> None:
        """The server comes up."""
        self._lifespan = self.call(_Lifespan)
        self._serving = self.portal.start_task_soon(self._lifespan.run, self.asgi)
        assert self._lifespan.started.wait(PATIENCE)

    def stop(self) -> None:
        """The server goes down."""
        self.call(self._lifespan.stop)
        self._serving.result(2 * PATIENCE)

    def _add_views(self) -> None:
        if self.kind == "sync":

            @self.websockets.route("/<int:number>")
            def view(ws: Any, number: int) -> None:
                self.clients[number].serve(ws)

        else:

            @self.websockets.route("/<int:number>")
            async def aview(ws: Any, number: int) -> None:
                await self.clients[number].aserve(ws)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function, or a coroutine function, on the loop."""
        return self.portal.call(function, *arguments)

    def open(self, socket_messages: float = 0, asgi: Any = None) -> Client:
        """A new connection, whose handshake begins."""
        number = next(self._numbers)
        client = self.clients[number] = Client(self, number, socket_messages)
        client.begin(asgi or self.asgi)
        return client

    def connect(self, socket_messages: float = 0) -> Client:
        """A new connection that is accepted."""
        client = self.open(socket_messages)
        accepting = client.tell("accept")
        assert client.hear()["type"] == "websocket.accept"
        accepting.result(PATIENCE)
        return client

    def publish_here(self, data: str, channels: Any, **options: Any) -> int:
        """Publish on the loop; how many outboxes took it."""

        async def publish() -> int:
            return (await self.websockets.apublish(data, channels, **options)).local

        local: int = self.call(publish)
        return local

    def settle(self, picture: Callable[[], Any], expected: Any) -> None:
        """Wait until the loop's *picture* is what the model expects."""
        deadline = time.monotonic() + PATIENCE
        while (seen := self.call(picture)) != expected:
            assert time.monotonic() < deadline, f"expected {expected}, seen {seen}"
            time.sleep(0.0002)

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.0002)

    def close(self) -> None:
        """Everybody leaves, the server stops, and nothing may be left."""
        try:
            for client in self.clients.values():
                if not client.running.done():
                    client.leave()
                client.stop()
            for client in self.clients.values():
                client.hear_the_rest()
                client.running.result(PATIENCE)
                client.close()
            if self.websockets._runtime is not None:
                self.wait_for(self._nobody_is_left, "something is left")
            self.stop()
            assert self.errors.lines == []
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Stop the loop; after a failure, whatever runs on it."""
        logging.getLogger("flask_websockets").removeHandler(self.errors)
        for client in self.clients.values():
            client.stop()
        try:
            self._context.__exit__(*sys.exc_info())
        finally:
            for client in self.clients.values():
                client.peer.close()

    def _nobody_is_left(self) -> bool:
        stats = self.websockets.stats()
        return not any(
            (
                stats.connections,
                stats.view_threads,
                stats.view_tasks,
                stats.channels,
                stats.subscriptions,
                stats.pending,
                stats.inbox_messages,
                stats.outbox_messages,
            )
        )


@contextmanager
def world(kind: str, backend: str = "asyncio", **settings: Any) -> Iterator[World]:
    """A world for the length of a ``with`` block."""
    made = World(kind, backend, **settings)
    try:
        yield made
    except BaseException:
        made.abandon()
        raise
    made.close()


class _Lifespan:
    """The server's start and stop. Made on the loop."""

    def __init__(self) -> None:
        self._give, self._receive = anyio.create_memory_object_stream[Message](2)
        self._give.send_nowait({"type": "lifespan.startup"})
        self.started = threading.Event()

    async def run(self, app: Any) -> None:
        async def send(message: Message) -> None:
            assert message["type"].endswith(".complete"), message
            self.started.set()

        with self._give, self._receive:
            await app({"type": "lifespan"}, self._receive.receive, send)

    def stop(self) -> None:
        self._give.send_nowait({"type": "lifespan.shutdown"})
