"""The load: numbered messages, each checked where it arrives, before and while it is timed."""

from __future__ import annotations

import asyncio
import math
import os
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import uvloop
from picows import WSCloseCode, WSListener, WSMsgType, ws_connect

#: Deliveries that are checked before the clock starts; they warm the server up as well.
CHECKED = 10_000
#: Those of a paced mode: publishes.
CHECKED_PACED = 5
#: Handshakes at the same time. They are not what is measured.
OPENING = 20
#: Seconds without any delivery after which what is missing counts as lost. Slow is no fault.
SILENCE = 30.0


class Fault(Exception):
    """A message was lost, doubled or reordered, or an answer to a request was wrong."""


def percentile(seconds: Iterable[float], share: float) -> float:
    """What *share* of them does not exceed."""
    ordered = sorted(seconds)
    return ordered[math.ceil(len(ordered) * share) - 1]


def p99(seconds: Iterable[float]) -> float:
    """The 99th percentile: one in a hundred took longer."""
    return percentile(seconds, 0.99)


@dataclass(frozen=True)
class Mode:
    path: str
    connections: int = 1
    in_flight: int = 1  # for each sender
    fan_out: bool = False  # the first connection sends, all receive
    paced: float = 0.0  # messages in a second; 0: the next one when the last has arrived

    @property
    def latency(self) -> bool:
        """Whether the time from a message's start to its arrival means anything."""
        return bool(self.paced) or (self.in_flight == 1 and not self.fan_out)


MODES = {
    "echo-1": Mode("/echo"),
    "echo-50": Mode("/echo", 50),
    "echo-500": Mode("/echo", 500),
    "in-flight-100": Mode("/echo", in_flight=100),
    "fan-out-500": Mode("/fan-out", 500, in_flight=3, fan_out=True),
    "fan-out-2000": Mode("/fan-out", 2_000, in_flight=3, fan_out=True),
    "fan-out-5000": Mode("/fan-out", 5_000, in_flight=3, fan_out=True),
    "fan-out-paced-2000": Mode("/fan-out", 2_000, fan_out=True, paced=10),
}
#: Those that other projects' servers take part in.
PEER_MODES = ("echo-1", "echo-50", "echo-500", "in-flight-100", "fan-out-500")


@dataclass(frozen=True)
class Measurement:
    rate: float  # deliveries per second
    client_cpu: float  # share of one core; at 1 the client is what was measured


@dataclass(frozen=True)
class WsMeasurement(Measurement):
    """:attr:`errors` are a peer's; one of ours is a :exc:`Fault`."""

    p50: float | None = None
    p99: float | None = None
    deliveries: int = 0  # all of them, before and after the clock as well
    errors: Counter[str] | None = None
    error: str | None = None  # the first one


@dataclass(slots=True, eq=False)
class Message:
    payload: bytes
    missing: int  # recipients that do not have it yet
    sender: Connection | None = None
    sent: float = 0.0


def text(number: int, sent: int) -> bytes:
    """64 bytes, and which message of which connection they are."""
    return b"%08d:%055d" % (number, sent)


class Connection(WSListener):
    """One client: what it expects, in order, and how many messages it may still send."""

    def __init__(self, load: Load, number: int) -> None:
        self.load = load
        self.number = number
        self.expected = deque([Message(self.wrapped(b"ready"), 1)])
        self.late: list[Message] = []  # of a peer: later ones have come before them
        self.transport: Any = None
        self.sent = 0
        self.left: float = 0

    def missing(self) -> int:
        return len(self.late) + len(self.expected)

    def url(self, port: int) -> str:
        return f"ws://127.0.0.1:{port}{self.load.mode.path}"

    def headers(self) -> dict[str, str]:
        return {}

    def wrapped(self, payload: bytes) -> bytes:
        """*payload* as it goes over the wire, both ways."""
        return payload

    def send(self, payload: bytes) -> None:
        self.transport.send(WSMsgType.TEXT, payload)

    def text(self, payload: bytes) -> None:
        self.load.arrived(self, payload)

    def reveal(self) -> None:
        """Look at what was only counted while the clock ran."""

    def on_ws_connected(self, transport: Any) -> None:
        self.transport = transport

    def on_ws_frame(self, transport: Any, frame: Any) -> None:
        if frame.msg_type == WSMsgType.TEXT:
            self.load.arrived(self, frame.get_payload_as_bytes())

    def on_ws_disconnected(self, transport: Any) -> None:
        if not self.load.closing:
            self.load.gone(self)


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

    def begin(self) -> None:
        """The clock starts."""

    async def timed(self, seconds: float) -> tuple[float, float]:
        """Count for *seconds*; return the deliveries per second and the client's share of CPU."""
        await self.pause(seconds / 4)  # until the pace is steady
        self.begin()
        before = self.snapshot()
        await self.pause(seconds)
        return self.since(before)

    def snapshot(self) -> tuple[float, float, int]:
        return time.perf_counter(), sum(os.times()[:2]), self.delivered

    def since(self, before: tuple[float, float, int]) -> tuple[float, float]:
        clock, cpu, delivered = (b - a for a, b in zip(before, self.snapshot(), strict=True))
        return delivered / clock, cpu / clock

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


class Paced(Clocked):
    """Something at a steady pace. Times count from the moment at which it was to happen: what a
    late answer holds up is late as well."""

    def __init__(self) -> None:
        super().__init__()
        self.times = array("d")  # seconds that something took
        self.lags = array("d")  # seconds that the client itself was late

    def clear(self) -> None:
        self.times, self.lags = array("d"), array("d")

    async def pace(
        self, each: float, until: Callable[[int, float], bool], act: Callable[[int, float], None]
    ) -> None:
        """Call *act* every *each* seconds with a number and its time, *until* says True."""
        started, number = time.perf_counter(), 0
        while not until(number, time.perf_counter() - started):
            due = started + number * each
            if (wait := due - time.perf_counter()) > 0:
                await self.pause(wait)
            self.lags.append(max(0.0, time.perf_counter() - due))
            act(number, due)
            number += 1

    async def answered(self) -> None:
        if not await self.settled():
            raise Fault(f"{self.pending} were lost: silence for {SILENCE:g} s.")


class Load(Paced):
    """The clients of one mode. A message is complete, and followed by its sender's next one, when
    each recipient has it; a recipient takes nothing but the message that it expects next.
    ``pending`` counts the messages that somebody does not have yet.

    :param strict: what is wrong is a fault; else it is counted.
    :param connection: how its connections speak.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        strict: bool = True,
        connection: Callable[[Load, int], Connection] = Connection,
        payload: Callable[[int, int], bytes] = text,
    ) -> None:
        super().__init__()
        self.mode = mode
        self.strict = strict
        self.payload = payload
        self.latency = mode.latency
        self.timing = False
        self.unread = False  # what comes is counted, and looked at when the clock has stopped
        self.errors = Counter[str]()
        self.error: str | None = None
        self.connections = [connection(self, number) for number in range(mode.connections)]
        self.recipients = list(self.connections)

    async def run(self, port: int, seconds: float) -> WsMeasurement:
        try:
            await self.open(port)
            await self.check()
            measurement = await self.measured(seconds)
            await self.end()
        finally:
            self.abandon()
        return measurement

    async def open(self, port: int) -> None:
        waiting = iter(self.connections)

        async def one_after_another() -> None:
            for connection in waiting:
                self.pending += 1  # its "ready"
                await ws_connect(
                    lambda: connection,  # noqa: B023
                    connection.url(port),
                    extra_headers=connection.headers(),
                    websocket_handshake_timeout=60,
                )

        await asyncio.gather(*(one_after_another() for _ in range(OPENING)))
        await self.drain()

    async def check(self) -> None:
        """A round before the clock starts."""
        if self.mode.paced:
            await self.pace(
                1 / self.mode.paced, lambda number, _: number == CHECKED_PACED, self.publish
            )
        else:
            self.start(max(2, CHECKED // self.mode.connections))
        await self.drain()

    async def measured(self, seconds: float) -> WsMeasurement:
        self.unread = True
        if self.mode.paced:
            rate, client_cpu = await self.timed_pace(seconds)
        else:
            self.start(math.inf)
            rate, client_cpu = await self.timed(seconds)
        self.timing = self.unread = False
        for connection in self.connections:
            connection.left = 0
            connection.reveal()
        await self.drain()
        times = sorted(self.times) or None
        return WsMeasurement(
            rate,
            client_cpu,
            p50=times and percentile(times, 0.5),
            p99=times and p99(times),
            deliveries=self.delivered,
            errors=self.errors,
            error=self.error,
        )

    async def timed_pace(self, seconds: float) -> tuple[float, float]:
        self.begin()
        before, end = self.snapshot(), time.perf_counter() + seconds
        await self.pace(
            1 / self.mode.paced, lambda number, _: number >= seconds * self.mode.paced, self.publish
        )
        await self.pause(max(0.0, end - time.perf_counter()))
        await self.drain()
        return self.since(before)

    def begin(self) -> None:
        self.clear()
        self.timing = self.latency

    def start(self, messages: float) -> None:
        """Let each sender send *messages* messages, ``in_flight`` of them at once."""
        for sender in self.connections[:1] if self.mode.fan_out else self.connections:
            sender.left = messages
            for _ in range(self.mode.in_flight):
                self.send(sender)

    def publish(self, _: int, due: float) -> None:
        self.connections[0].left = 1
        self.send(self.connections[0], due)

    def send(self, sender: Connection, due: float | None = None) -> None:
        if sender.left <= 0:
            return
        sender.left -= 1
        sender.sent += 1
        recipients = self.recipients if self.mode.fan_out else [sender]
        payload = sender.wrapped(self.payload(sender.number, sender.sent))
        message = Message(payload, len(recipients), sender)
        if self.latency:
            message.sent = time.perf_counter() if due is None else due
        for recipient in recipients:
            recipient.expected.append(message)
        self.pending += 1
        sender.send(payload)

    def arrived(self, connection: Connection, payload: bytes) -> None:
        message = connection.expected.popleft() if connection.expected else None
        if message is None or payload != message.payload:
            message = self.astray(connection, message, payload)
            if message is None:
                return
        self.delivered += 1
        if self.timing:
            self.times.append(time.perf_counter() - message.sent)
        message.missing -= 1
        if not message.missing:
            self.complete(message)

    def complete(self, message: Message) -> None:
        """Everybody has it."""
        self.pending -= 1
        if message.sender is not None:
            self.send(message.sender)

    # What goes wrong.

    def wrong(self, kind: str, reason: str, count: int = 1) -> None:
        self.errors[kind] += count
        self.error = self.error or reason
        if self.strict:
            self.fail(reason)

    def astray(
        self, connection: Connection, expected: Message | None, payload: bytes
    ) -> Message | None:
        """Something else came. A peer's may be one that was expected later, or one that is late."""
        if expected is not None:
            connection.expected.appendleft(expected)
        wanted = expected and expected.payload
        reason = f"Connection {connection.number} expected {wanted!r}, got {payload!r}."
        for message in () if self.strict else connection.late:
            if message.payload == payload:
                self.wrong("out of order", reason)
                connection.late.remove(message)
                return message
        if self.strict or all(each.payload != payload for each in connection.expected):
            self.wrong("unexpected", reason)
            return None
        while (message := connection.expected.popleft()).payload != payload:
            connection.late.append(message)  # or lost; that shows at the end
        return message

    def gone(self, connection: Connection) -> None:
        """The server closed it: what it expects will not come."""
        self.wrong("closed", f"Connection {connection.number} was closed by the server.")
        connection.left = 0
        if connection in self.recipients:
            self.recipients.remove(connection)
        self.give_up(connection)

    def give_up(self, connection: Connection) -> None:
        messages = [*connection.late, *connection.expected]
        connection.late.clear()
        connection.expected.clear()
        for message in messages:
            message.missing -= 1
            if not message.missing:
                self.complete(message)

    async def drain(self) -> None:
        """Wait until everybody has every message."""
        if await self.settled():
            return
        reason = f"{self.pending} messages were lost: silence for {SILENCE:g} s."
        self.wrong("lost", reason, sum(map(Connection.missing, self.connections)))
        for connection in self.connections:
            connection.left = 0
        for connection in self.connections:
            self.give_up(connection)
        await self.pause(0)

    async def end(self) -> None:
        """Read up to the server's close frames: a doubled last message comes before them."""
        self.closing = True
        for connection in self.connections:
            connection.transport.send_close(WSCloseCode.OK)
        ends = [asyncio.ensure_future(c.transport.wait_disconnected()) for c in self.connections]
        await asyncio.wait(ends, timeout=10)
        await self.pause(0)

    def abandon(self) -> None:
        self.closing = True
        for connection in self.connections:
            if connection.transport is not None:
                connection.transport.disconnect(graceful=False)


def measure(mode: Mode, port: int, seconds: float, **how: Any) -> WsMeasurement:
    """Put the load of *mode* on the server on *port*; raise :exc:`Fault` if it loses messages.

    :param how: what else :class:`Load` takes.
    """

    async def run() -> WsMeasurement:
        return await Load(mode, **how).run(port, seconds)

    return uvloop.run(run())
