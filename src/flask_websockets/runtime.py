"""Loop side. The runtime: what one ``WebSockets`` object has on one event loop, start to stop."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import anyio

from .bridge import Door, Entry, HttpPool, Link, Registry, spare_connections, start_view_thread
from .channels import Hub
from .config import Config
from .connection import Connection
from .counters import REFUSALS, Counters, Stats
from .errors import NotRunning
from .protocol import PlainResponse, plain_response, unavailable
from .running_view import RunningView, report
from .servers import uvicorn

#: "Service Restart", of the IANA registry of close codes: come back soon.
GOODBYE = (1012, "the server stops")

#: Connections that are told to leave at once: their clients come back together, to whoever
#: serves them now. As many handshakes may be under way at the same time.
BATCH = 100
#: Seconds from one batch to the next, on average: 1,000 connections leave in a second.
BATCH_INTERVAL = 0.1

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
        self.registry: Registry = Registry()  # any thread
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

    def admit(self, config: Config, entry: Entry) -> PlainResponse | None:
        """Count one more connection. A stuck view still counts.

        :returns: the refusal, if there is no room.
        """
        if self._draining:
            return self.refuse_draining(entry)
        if self._admitted + self._orphans >= config.max_connections:
            self.registry.refuse(
                "refused_full",
                "All connections are taken (WEBSOCKETS_MAX_CONNECTIONS, %d): the handshake of %s "
                "was answered 503",
                *(config.max_connections, entry),
            )
            return unavailable("All connections are taken.")
        self._admitted += 1
        return None

    def refuse_draining(self, entry: Entry) -> PlainResponse:
        """Refuse a handshake because the server is about to stop."""
        self.registry.refuse(
            "refused_draining",
            "The server drains: the handshake of %s was answered 503",
            entry,
        )
        return unavailable("The server stops.")

    def refuse_handshake(self, config: Config, entry: Entry) -> PlainResponse:
        """Refuse a handshake that waited in vain for others to get their answer."""
        self.registry.refuse(
            "refused_handshakes",
            "Too many handshakes at the same time (WEBSOCKETS_MAX_HANDSHAKES, %d, for "
            "WEBSOCKETS_HANDSHAKE_TIMEOUT, %g s): that of %s was answered 503",
            *(config.max_handshakes, config.handshake_timeout, entry),
        )
        return unavailable("Too many handshakes at the same time.")

    def refuse_thread(self, entry: Entry) -> PlainResponse:
        """Refuse a handshake because no thread could be started for its view."""
        self.registry.refuse(
            "refused_threads",
            "The system has no thread left: the handshake of %s was answered 503; a plain view "
            "takes one thread for each connection",
            entry,
        )
        return unavailable("No thread is left.")

    @property
    def draining(self) -> bool:
        """Whether the server is about to stop: nobody is let in any more."""
        return self._draining

    def discharge(self) -> None:
        """An admitted connection is over."""
        self._admitted -= 1

    async def serve(self, connection: Connection) -> None:
        """Serve one connection whose view has been started."""
        if connection.protocol is not None:
            self._watch.add(connection.protocol)
        tunes = connection.link.config.tune_process
        self.connections.add(connection)
        if tunes:
            spare_connections(len(self.connections))
        self._views.add(connection.view)
        try:
            await connection.run()
        finally:
            self.hub.forget(connection.link)
            self.connections.discard(connection)
            if tunes:
                spare_connections(len(self.connections))
            if connection.view.running:
                self._orphans += 1
            else:
                self.registry.forget(connection.link)
            if not self.connections:
                self._emptied.set()
                self._emptied = anyio.Event()  # for those who come after this moment

    def view_over(self, connection: Connection) -> None:
        """A connection's view is over."""
        self._views.discard(connection.view)
        if connection not in self.connections:
            self._orphans -= 1
            self.registry.forget(connection.link)

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
            **{kind: self.registry.refused(kind) for kind in REFUSALS},
        )

    def expel(self, order: tuple[tuple[Link, ...], int, str]) -> None:
        """End connections of a user who may not stay. What waits for them is dropped."""
        links, code, reason = order
        refusal = plain_response(401, reason or "This login holds no more.")
        for link in links:
            if link.expel(code, reason, refusal):
                self.counters.disconnected += 1
            self.hub.forget(link)

    async def drain(self, timeout: float, announce: Callable[[], object] | None = None) -> None:
        """Refuse handshakes, close every connection with 1012, wait, and cut what is left (I9).

        Returns as soon as every connection is over and its view has ended or is reported. What
        a :meth:`stop` after it has left to wait for is bounded by the same deadline. A second
        drain beside the first hurries it, if its own timeout is shorter.

        :param timeout: seconds until the rest is cut.
        :param announce: called in a thread before the first connection is told to leave; it
            has a quarter of the time.
        """
        start = anyio.current_time()
        self._deadline = min(self._deadline, start + timeout + DRAIN_GRACE)
        if not self._draining:
            self._draining = True
            for connection in tuple(self.connections):
                if not connection.link.settled.is_set():
                    refusal = self.refuse_draining(connection.link.entry)
                    connection.link.dismiss(*GOODBYE, refusal)
            if announce is not None:
                await self._announce(announce, timeout / 4)
        await self._dismiss_all(start + timeout / 2)
        await self._all_over(start + timeout)
        for connection in tuple(self.connections):
            connection.cut()
            connection.view.cancel()
        await self._all_over(start + timeout + DRAIN_GRACE / 2)
        views = [connection.view for connection in tuple(self.connections)]
        report(views, "at the end of the drain (WEBSOCKETS_DRAIN_TIMEOUT)")

    async def _announce(self, announce: Callable[[], object], seconds: float) -> None:
        """Let the application say goodbye, in a thread: it may block, and publish."""
        over = anyio.Event()

        def run() -> None:
            try:
                announce()
            finally:
                try:
                    self.door.post(lambda _: over.set(), None)
                except NotRunning:
                    pass  # the loop did not wait so long

        try:
            start_view_thread(run, "flask-websockets-goodbye")
        except RuntimeError:
            return  # no thread is left; those who leave make room for none of this
        with anyio.move_on_after(seconds):
            await over.wait()

    async def _dismiss_all(self, deadline: float) -> None:
        """Have everybody leave, in batches of about a second's tenth; by the deadline at last.

        Views may finish what they have received until then.
        """
        refusal = unavailable("The server stops.")
        waiting = list(self.connections)
        random.shuffle(waiting)
        while waiting and self.connections:
            left = deadline - anyio.current_time()
            size = max(BATCH, math.ceil(len(waiting) * BATCH_INTERVAL / max(left, BATCH_INTERVAL)))
            for connection in waiting[-size:]:
                connection.link.let_finish(*GOODBYE, refusal)
            del waiting[-size:]
            if waiting:
                jitter = random.uniform(0.5, 1.5)
                await anyio.sleep(max(0.0, min(jitter * BATCH_INTERVAL, left - BATCH_INTERVAL)))
        await self._all_over(deadline)
        for connection in tuple(self.connections):
            connection.link.dismiss(*GOODBYE, refusal)

    async def stop(self) -> None:
        """End every connection, give their views their time, and close the door."""
        for connection in tuple(self.connections):
            connection.link.lose(*GOODBYE)
        await self._all_over(self._deadline)
        with anyio.CancelScope(deadline=self._deadline):
            # A server may have cancelled its connections, and nobody has waited for their views.
            async with anyio.create_task_group() as waiting:
                for view in self._views:
                    if not view.reported:
                        waiting.start_soon(view.wait)
        report(tuple(self._views), "at the end of the drain (WEBSOCKETS_DRAIN_TIMEOUT)")
        self._watch.close()
        self.door.close()

    async def _all_over(self, deadline: float) -> None:
        """Wait until no connection is left; each bounds the wait for its own view (I9)."""
        with anyio.CancelScope(deadline=deadline):
            while self.connections:
                await self._emptied.wait()

    def _count_abort(self) -> None:
        self.counters.aborted += 1
