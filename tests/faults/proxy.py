"""A TCP proxy that makes the faults of networks, switched while connections run through it.

One thread with an event loop. A direction holds one piece of at most :data:`CHUNK` bytes; the rest
waits in the kernel's buffers, and makes whoever sends wait as a network would.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

#: Bytes that one direction holds at most.
CHUNK = 64 * 1024
#: Seconds that anything may take that the proxy is asked to do.
TIMEOUT = 10.0

#: From the client to the server, and from the server to the client.
Direction = Literal["c2s", "s2c"]
C2S: Direction = "c2s"
S2C: Direction = "s2c"


@dataclass
class Fault:
    """What happens to the bytes of one direction."""

    #: They are read and never arrive, and neither does the end of the stream.
    swallow: bool = False
    #: They are not read: whoever sends finds the window closed.
    stall: bool = False
    #: Bytes per second.
    rate: float | None = None
    #: Seconds by which each piece is late.
    latency: float = 0.0
    #: Bytes that each connection may still carry; then it is cut.
    cut_after: int | None = None


@dataclass(eq=False)
class _Pair:
    """One connection through the proxy."""

    client: socket.socket
    server: socket.socket
    #: It ends by the end of this.
    task: asyncio.Task[None] | None = None
    #: What is left of a ``cut_after``, by direction.
    left: dict[Direction, int] = field(default_factory=dict)
    #: Both sides are to see a TCP reset.
    reset: bool = False

    def close(self) -> None:
        for each in (self.client, self.server):
            if self.reset:
                with suppress(OSError):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.close()


class _Cut(Exception):
    """A connection has carried all that it may."""


class Proxy:
    """Carries TCP connections to a port of this machine, until it is told otherwise.

    :param target: the server's port.
    :param buffer: bytes for the kernel's buffers of each socket; its own choice if None.
    """

    def __init__(self, target: int, *, buffer: int | None = None) -> None:
        self._target = target
        self._buffer = buffer
        self._faults: dict[Direction, Fault] = {C2S: Fault(), S2C: Fault()}
        self._pairs: set[_Pair] = set()
        self._changed = asyncio.Event()
        self._accepting: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        #: Where clients connect. It stays the same after a :meth:`down`.
        self.port = 0

    def __enter__(self) -> Proxy:
        self._thread.start()
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT)
        self._loop.close()

    @property
    def connections(self) -> int:
        """Connections that run through it, those in a black hole included."""
        return len(self._pairs)

    # -- faults -----------------------------------------------------------------------------------

    def pass_all(self) -> None:
        """No fault: what was held goes on, what was swallowed is lost."""
        self._set((C2S, S2C))

    def blackhole(self) -> None:
        """Nothing arrives any more, either way, and nobody is told."""
        self._set((C2S, S2C), swallow=True)

    def half_open(self, lost: Direction) -> None:
        """What goes one way is lost, what goes the other arrives."""
        self._set((lost,), swallow=True)

    def stall(self, *directions: Direction) -> None:
        """Take nothing any more: the sender's buffers fill. Both ways if none is named."""
        self._set(directions or (C2S, S2C), stall=True)

    def rate(self, bytes_per_second: float, *directions: Direction) -> None:
        """Carry so many bytes a second. Both ways if none is named."""
        self._set(directions or (C2S, S2C), rate=bytes_per_second)

    def latency(self, seconds: float) -> None:
        """Each piece is late, both ways; what comes meanwhile waits for it."""
        self._set((C2S, S2C), latency=seconds)

    def cut_after(self, count: int, direction: Direction) -> None:
        """Cut each connection without a reset once it has carried so many bytes more."""
        self._set((direction,), cut_after=count)

    def reset(self) -> None:
        """Cut all connections with a TCP reset, to both sides."""
        self._call(self._reset)

    def down(self) -> None:
        """Refuse connections, and reset those that there are."""
        self._call(self._down)

    def up(self) -> None:
        """Accept connections again, at the same port; faults stay as they are."""
        self._call(self._up)

    def _call(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Any thread. Run *function* on the loop."""
        asyncio.run_coroutine_threadsafe(function(), self._loop).result(TIMEOUT)

    def _set(self, directions: tuple[Direction, ...], **fault: Any) -> None:
        """Any thread. Another fault, which ends the waits of the one before."""

        async def change() -> None:
            for direction in directions:
                self._faults[direction] = Fault(**fault)
                for pair in self._pairs:
                    pair.left.pop(direction, None)
            self._changed.set()
            self._changed = asyncio.Event()

        self._call(change)

    # -- on the proxy's loop ----------------------------------------------------------------------

    async def _up(self) -> None:
        if self._accepting is None:
            listener = self._socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self.port))
            listener.listen(2048)
            self.port = listener.getsockname()[1]
            self._accepting = self._loop.create_task(self._accept(listener))

    async def _down(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
            self._accepting = None
        await self._reset()

    def _socket(self) -> socket.socket:
        made = socket.socket()
        made.setblocking(False)
        if self._buffer is not None:  # what a listener accepts inherits it
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer)
        return made

    async def _reset(self) -> None:
        tasks = []
        for pair in self._pairs:
            assert pair.task is not None
            pair.reset = True
            pair.task.cancel()
            tasks.append(pair.task)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                client, _ = await self._loop.sock_accept(listener)
                pair = _Pair(client, self._socket())
                self._pairs.add(pair)
                pair.task = self._loop.create_task(self._carry(pair))

    async def _carry(self, pair: _Pair) -> None:
        """One connection, until both directions have ended."""
        pumps: list[asyncio.Task[None]] = []
        try:
            await self._loop.sock_connect(pair.server, ("127.0.0.1", self._target))
            for source, sink, way, back in (
                (pair.client, pair.server, C2S, S2C),
                (pair.server, pair.client, S2C, C2S),
            ):
                pumps.append(self._loop.create_task(self._pump(pair, source, sink, way, back)))
            await asyncio.gather(*pumps)
        except _Cut:
            pass
        except OSError:
            pair.reset = True
        finally:
            for pump in pumps:
                pump.cancel()
            try:
                await asyncio.gather(*pumps, return_exceptions=True)
            finally:
                pair.close()
                self._pairs.discard(pair)

    async def _pump(
        self,
        pair: _Pair,
        source: socket.socket,
        sink: socket.socket,
        way: Direction,
        back: Direction,
    ) -> None:
        """Carry the bytes of one direction to their end."""
        while True:
            while self._faults[way].stall:
                await self._changed.wait()
            error, data = None, b""
            try:
                data = await self._loop.sock_recv(source, CHUNK)
            except OSError as reset:
                error = reset
            while not data and self._faults[way].swallow:
                await self._changed.wait()  # the other side does not hear of the end
            if error is not None:
                raise error
            if not data:
                with suppress(OSError):
                    sink.shutdown(socket.SHUT_WR)
                return
            while data:
                data = data[await self._forward(pair, data, sink, way, back) :]

    async def _forward(
        self, pair: _Pair, data: bytes, sink: socket.socket, way: Direction, back: Direction
    ) -> int:
        """Give the sink what the fault of the moment lets through; how much is done with."""
        fault = self._faults[way]
        if fault.swallow:
            return len(data)
        piece, delay = data, fault.latency
        if fault.rate is not None:
            piece = data[: max(1, int(fault.rate / 10))]
            delay += len(piece) / fault.rate
        if fault.stall or delay:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), None if fault.stall else delay)
                return 0  # there is another fault now
        if fault.cut_after is not None:
            left = pair.left.setdefault(way, fault.cut_after)
            piece = piece[:left]
            pair.left[way] -= len(piece)
        try:
            await self._loop.sock_sendall(sink, piece)
        except OSError:
            if not self._faults[back].swallow:
                raise  # else the news of it is lost, like all else that goes that way
        if fault.cut_after is not None and not pair.left.get(way, 1):
            raise _Cut
        return len(piece)
