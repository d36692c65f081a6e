"""The load: numbered messages, each checked where it arrives, before and while it is timed."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import uvloop
from picows import WSCloseCode, WSListener, WSMsgType, ws_connect

#: Deliveries that are checked before the clock starts; they warm the server up as well.
CHECKED = 10_000
#: Seconds without any delivery after which what is missing counts as lost. Slow is no fault.
SILENCE = 30.0


class Fault(Exception):
    """A message was lost, doubled or reordered, or an answer to a request was wrong."""


@dataclass(frozen=True)
class Mode:
    path: str
    connections: int = 1
    in_flight: int = 1  # for each sender
    fan_out: bool = False  # the first connection sends, all receive


MODES = {
    "echo-1": Mode("/echo"),
    "echo-50": Mode("/echo", 50),
    "echo-500": Mode("/echo", 500),
    "in-flight-100": Mode("/echo", in_flight=100),
    "fan-out-500": Mode("/fan-out", 500, in_flight=3, fan_out=True),
}


@dataclass(frozen=True)
class Measurement:
    rate: float  # deliveries per second
    client_cpu: float  # share of one core; at 1 the client is what was measured


@dataclass(slots=True)
class Message:
    payload: bytes
    missing: int  # recipients that do not have it yet
    sender: Connection | None = None


class Connection(WSListener):
    """One client: what it expects, in order, and how many messages it may still send."""

    def __init__(self, load: Load, number: int) -> None:
        self.load = load
        self.number = number
        self.expected = deque([Message(b"ready", 1)])
        self.transport: Any = None
        self.sent = 0
        self.left: float = 0

    def on_ws_connected(self, transport: Any) -> None:
        self.transport = transport

    def on_ws_frame(self, transport: Any, frame: Any) -> None:
        if frame.msg_type == WSMsgType.TEXT:
            self.load.arrived(self, frame.get_payload_as_bytes())

    def on_ws_disconnected(self, transport: Any) -> None:
        if not self.load.closing:
            self.load.fail(f"Connection {self.number} was closed by the server.")


class Clocked:
    """What is counted, and the waits, each of which ends at once with the first fault."""

    def __init__(self) -> None:
        self.delivered = 0
        self.pending = 0
        self.closing = False
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, reason: str) -> None:
        if not self.failed.done():
            self.failed.set_exception(Fault(reason))

    async def pause(self, seconds: float) -> None:
        await asyncio.wait([self.failed], timeout=seconds)
        if self.failed.done():
            self.failed.result()

    async def timed(self, seconds: float) -> tuple[float, float]:
        """Count for *seconds*; return the deliveries per second and the client's share of CPU."""
        await self.pause(seconds / 4)  # until the pace is steady
        before = self.snapshot()
        await self.pause(seconds)
        clock, cpu, delivered = (b - a for a, b in zip(before, self.snapshot(), strict=True))
        return delivered / clock, cpu / clock

    def snapshot(self) -> tuple[float, float, int]:
        return time.perf_counter(), sum(os.times()[:2]), self.delivered

    async def settled(self) -> bool:
        """Wait until nothing is pending; False after a silence that is too long."""
        delivered, clock = self.delivered, time.monotonic()
        while self.pending:
            await self.pause(0.01)
            if delivered != self.delivered:
                delivered, clock = self.delivered, time.monotonic()
            elif time.monotonic() - clock > SILENCE:
                return False
        return True


class Load(Clocked):
    """The clients of one mode. A message is complete, and followed by its sender's next one, when
    each recipient has it; a recipient takes nothing but the message that it expects next.
    ``pending`` counts the messages that somebody does not have yet."""

    def __init__(self, mode: Mode) -> None:
        super().__init__()
        self.mode = mode
        self.connections: list[Connection] = []

    async def run(self, port: int, seconds: float) -> Measurement:
        url = f"ws://127.0.0.1:{port}{self.mode.path}"
        try:
            for number in range(self.mode.connections):
                connection = Connection(self, number)
                self.connections.append(connection)
                self.pending += 1  # its "ready"
                # One after another, as handshakes are not what is measured.
                await ws_connect(lambda c=connection: c, url, websocket_handshake_timeout=60)
            await self.drain()
            self.start(CHECKED // self.mode.connections)
            await self.drain()
            self.start(math.inf)
            rate, client_cpu = await self.timed(seconds)
            for connection in self.connections:
                connection.left = 0
            await self.drain()
            await self.close()
            return Measurement(rate, client_cpu)
        finally:
            self.closing = True
            for connection in self.connections:
                if connection.transport is not None:
                    connection.transport.disconnect(graceful=False)

    def start(self, messages: float) -> None:
        """Let each sender send *messages* messages, ``in_flight`` of them at once."""
        for sender in self.connections[:1] if self.mode.fan_out else self.connections:
            sender.left = messages
            for _ in range(self.mode.in_flight):
                self.send(sender)

    def send(self, sender: Connection) -> None:
        if sender.left <= 0:
            return
        sender.left -= 1
        sender.sent += 1
        recipients = self.connections if self.mode.fan_out else [sender]
        payload = b"%08d:%055d" % (sender.number, sender.sent)  # 64 bytes
        message = Message(payload, len(recipients), sender)
        for recipient in recipients:
            recipient.expected.append(message)
        self.pending += 1
        sender.transport.send(WSMsgType.TEXT, payload)

    def arrived(self, connection: Connection, payload: bytes) -> None:
        message = connection.expected.popleft() if connection.expected else None
        if message is None or payload != message.payload:
            expected = message and message.payload
            self.fail(f"Connection {connection.number} expected {expected!r}, got {payload!r}.")
            return
        self.delivered += 1
        message.missing -= 1
        if not message.missing:
            self.pending -= 1
            if message.sender is not None:
                self.send(message.sender)

    async def drain(self) -> None:
        """Wait until everybody has every message."""
        if not await self.settled():
            raise Fault(f"{self.pending} messages were lost: silence for {SILENCE:g} s.")

    async def close(self) -> None:
        """Read up to the server's close frames: a doubled last message comes before them."""
        self.closing = True
        for connection in self.connections:
            connection.transport.send_close(WSCloseCode.OK)
        ends = [asyncio.ensure_future(c.transport.wait_disconnected()) for c in self.connections]
        await asyncio.wait(ends, timeout=10)
        await self.pause(0)


def measure(mode: Mode, port: int, seconds: float) -> Measurement:
    """Put the load of *mode* on the server on *port*; raise :exc:`Fault` if it loses messages."""

    async def run() -> Measurement:
        return await Load(mode).run(port, seconds)

    return uvloop.run(run())
