"""Connections that do nothing: what each costs, how fast they open, what works beside them."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from dataclasses import dataclass
from typing import Any
from urllib.request import urlopen

import uvloop

from .client import SILENCE, Clocked, Fault
from .flood import HANDSHAKE
from .speech import OFFER, TAIL

#: How many, for each mode.
IDLE_MODES = {"idle-2000": 2_000, "idle-10000": 10_000}
#: Handshakes at the same time.
AT_ONCE = 50
#: Connections that are open before anything is measured, and are part of the number.
FIRST = 50
#: One in so many is asked for an echo while all are open.
ASKED = 100


@dataclass(frozen=True)
class IdleMeasurement:
    resident: float | None  # bytes per connection, None where the system does not tell
    handshakes: float  # per second
    threads: int  # of the server, with all of them open
    answer: float  # seconds that an HTTP request took then
    client_cpu: float  # share of one core while they were opened


class Idle(asyncio.Protocol):
    """One connection. It speaks as little as it can: 10,000 of them must cost the client little.
    It masks with zeros, and answers pings."""

    def __init__(self, load: Crowd, number: int) -> None:
        self.load = load
        self.asked = number % ASKED == 0
        self.data = b""
        self.decoder: Any = None  # of compressed messages
        self.expected: bytes | None = b"ready"
        self.transport: Any = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.load.handshake)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.load.closing:
            self.wrong("An idle connection was closed by the server.")

    def wrong(self, reason: str) -> None:
        self.load.fail(reason)
        if not self.ready.done():
            self.ready.set_result(None)

    def data_received(self, data: bytes) -> None:
        self.data += data
        if not self.ready.done() and self.expected == b"ready":
            head, end, frames = self.data.partition(b"\r\n\r\n")
            if end and head.startswith(b"HTTP/1.1 101 "):
                self.data = frames
                if b"permessage-deflate" in head:
                    self.decoder = zlib.decompressobj(-15)
            elif self.data.startswith(b"HTTP/"):
                if end:
                    self.wrong(f"A connection was not let in: {head[:80]!r}.")
                return
        while len(self.data) > 1 and len(self.data) >= 2 + self.data[1]:
            size = 2 + self.data[1]  # nothing here is longer than 125 bytes
            self.frame(self.data[0], self.data[2:size])
            self.data = self.data[size:]

    def frame(self, first: int, payload: bytes) -> None:
        if first == 0x89:  # ping
            self.write(0x8A, payload)
            return
        if first == 0xC1 and self.decoder is not None:
            first, payload = 0x81, self.decoder.decompress(payload + TAIL)
        if first != 0x81 or payload != self.expected:
            self.wrong(f"An idle connection expected {self.expected!r}; got {payload!r}.")
            return
        self.expected = None
        self.load.pending -= 1
        self.load.delivered += 1
        if not self.ready.done():
            self.ready.set_result(None)
        if not self.asked:
            self.decoder = None

    def ask(self) -> None:
        self.load.pending += 1
        self.expected = b"still there?"
        self.write(0x81, self.expected)

    def write(self, first: int, payload: bytes) -> None:
        self.transport.write(bytes([first, 0x80 | len(payload)]) + bytes(4) + payload)


class Crowd(Clocked):
    """Many connections to one view."""

    def __init__(self, port: int, path: str, deflate: bool = False) -> None:
        super().__init__()
        self.port = port
        self.handshake = HANDSHAKE.replace(b"/wait", path.encode(), 1)
        if deflate:
            offer = b"\r\nSec-WebSocket-Extensions: " + OFFER.encode() + b"\r\n\r\n"
            self.handshake = self.handshake[:-4] + offer
        self.connections: list[Idle] = []

    async def open(self, count: int) -> None:
        """Open *count* more, some of them at the same time; each view has said that it runs."""
        loop, numbers = asyncio.get_running_loop(), iter(range(count))

        async def one_after_another() -> None:
            for number in numbers:
                connection = Idle(self, number)
                self.connections.append(connection)
                self.pending += 1
                await loop.create_connection(lambda: connection, "127.0.0.1", self.port)  # noqa: B023
                await connection.ready

        opening = asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))
        either: list[asyncio.Future[Any]] = [opening, self.failed]
        try:
            while not opening.done():
                delivered = self.delivered
                await asyncio.wait(either, timeout=SILENCE, return_when=asyncio.FIRST_COMPLETED)
                await self.pause(0)
                if not opening.done() and delivered == self.delivered:
                    raise Fault(f"{self.pending} connections did not open in {SILENCE:g} s.")
        finally:
            opening.cancel()
        opening.result()

    async def ask(self) -> None:
        """Have one in a hundred echo something."""
        for connection in self.connections:
            if connection.asked:
                connection.ask()
        if not await self.settled():
            raise Fault(f"{self.pending} of the idle connections do not answer.")

    def close(self) -> None:
        self.closing = True
        for connection in self.connections:
            if connection.transport is not None:
                connection.transport.abort()


async def told(port: int, path: str = "/resident") -> dict[str, Any]:
    """What the application on *port* answers an HTTP request, as JSON."""

    def fetch() -> dict[str, Any]:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=SILENCE) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    return await asyncio.to_thread(fetch)


async def idle(port: int, count: int, deflate: bool = False) -> IdleMeasurement:
    """Open *count* connections, and see what they cost."""
    crowd = Crowd(port, "/echo", deflate)
    try:
        await told(port)  # its thread is there
        await crowd.open(min(FIRST, count // 2))
        before = await told(port)
        first, clock = len(crowd.connections), crowd.snapshot()
        await crowd.open(count - first)
        rate, client_cpu = crowd.since(clock)
        asked = time.perf_counter()
        after = await told(port)
        answer = time.perf_counter() - asked
        await crowd.ask()
        await crowd.pause(0)
    finally:
        crowd.close()
    resident = None
    if before["resident"] is not None:
        resident = (after["resident"] - before["resident"]) / (count - first)
    return IdleMeasurement(resident, rate, after["threads"], answer, client_cpu)


def measure_idle(port: int, count: int, deflate: bool) -> IdleMeasurement:
    return uvloop.run(idle(port, count, deflate))
