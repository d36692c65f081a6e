"""Loop side. The runtime: what one ``WebSockets`` object has on one event loop, start to stop."""

from __future__ import annotations

import math
from collections.abc import Callable

import anyio

from .bridge import Door, HttpPool
from .channels import Hub
from .config import Config
from .connection import Connection
from .counters import Counters, Stats
from .protocol import unavailable
from .running_view import RunningView
from .servers import uvicorn

#: "Service Restart", of the IANA registry of close codes: come back soon.
GOING_DOWN = 1012

#: Seconds beyond the drain timeout in which everything left to do is to let go.
DRAIN_GRACE = 0.25


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
        self._draining = False
        self._deadline = math.inf  # of the stop, once draining
        self._views: set[RunningView] = set()
        self._emptied = anyio.Event()
        self._watch = uvicorn.Watch(config.close_timeout, self._count_abort)

    def admit(self, config: Config) -> bool:
        """Count one more connection, if it is allowed. A stuck view still counts."""
        if self._draining:
            return False
        if self._admitted + self._orphans >= config.max_connections:
            self.counters.refused_full += 1
            return False
        self._admitted += 1
        return True

    @property
    def draining(self) -> bool:
        """Whether the server is about to stop: nobody is let in any more."""
        return self._draining

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

    async def drain(self, timeout: float) -> None:
        """Refuse handshakes, close every connection with 1012, wait, and cut what is left (I9).

        Returns as soon as every connection is over and its view has ended or is reported. What
        a :meth:`stop` after it has left to wait for is bounded by the same deadline.

        :param timeout: seconds until the rest is cut.
        """
        self._draining = True
        self._deadline = anyio.current_time() + timeout + DRAIN_GRACE
        refusal = unavailable("The server stops.")
        for connection in tuple(self.connections):
            connection.link.dismiss(GOING_DOWN, "the server stops", *refusal)
        with anyio.move_on_after(timeout):
            await self._all_over()
        for connection in tuple(self.connections):
            connection.cut()
            connection.view.cancel()
        with anyio.move_on_after(DRAIN_GRACE / 2):
            await self._all_over()
        for connection in tuple(self.connections):
            connection.view.give_up()

    async def stop(self) -> None:
        """End every connection, give their views their time, and close the door."""
        for connection in tuple(self.connections):
            connection.link.lose(GOING_DOWN, "the server stops")
        with anyio.CancelScope(deadline=self._deadline):
            await self._all_over()
            # A server may have cancelled its connections, and nobody has waited for their views.
            async with anyio.create_task_group() as waiting:
                for view in self._views:
                    if not view.reported:
                        waiting.start_soon(view.wait)
        for view in self._views:
            if not view.reported:
                view.give_up()
        self._watch.close()
        self.door.close()

    async def _all_over(self) -> None:
        while self.connections:  # each bounds the wait for its own view (I9)
            self._emptied = anyio.Event()
            await self._emptied.wait()

    def _count_abort(self) -> None:
        self.counters.aborted += 1
