"""The HTTP load: keep-alive clients that check the status and every byte of each answer."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import uvloop

from .client import SILENCE, Clocked, Measurement, p99, percentile
from .http_app import HEARTBEAT_START, HEARTBEAT_STOP, PAYLOAD, SLEEP, record

CLIENTS = 20
#: Beside the answer's body: its head and the chunks' sizes.
ROOM = 65_536


@dataclass(frozen=True)
class HttpMode:
    path: str  # in which {number} is the client's
    answer: Callable[[int], bytes]
    upload: bytes | None = None
    apart: float = 0.0  # seconds between the clients' first requests


def _json(number: int) -> bytes:
    return json.dumps(record(number), sort_keys=True, separators=(",", ":")).encode() + b"\n"


HTTP_MODES = {
    "http-small": HttpMode("/small", lambda number: b"ok"),
    "http-json": HttpMode("/json/{number}", _json),
    # Evenly spread: in step, 20 answers at once would fall into the time or just outside it.
    "http-sleep": HttpMode("/sleep", lambda number: b"ok", apart=SLEEP / CLIENTS),
    "http-stream": HttpMode("/stream", lambda number: PAYLOAD),
    "http-upload": HttpMode("/upload", lambda number: b"%d" % len(PAYLOAD), upload=PAYLOAD),
    "http-download": HttpMode("/download", lambda number: PAYLOAD),
}


@dataclass(frozen=True)
class HttpMeasurement(Measurement):
    """The rate is that of the right answers."""

    answers: int  # all of them, the wrong ones too, before and after the clock as well
    errors: int
    error: str | None  # the first one
    longest_turn: float | None  # of the server's loop, in seconds
    p50: float | None = None  # seconds from a request to the end of its answer
    p99: float | None = None


@dataclass(frozen=True)
class Head:
    status: int
    length: int | None  # None: chunked
    close: bool


@lru_cache(maxsize=1024)  # one that comes again, within a second, is the same to the byte
def parse_head(head: bytes) -> Head:
    """Parse a status line and headers; raise :exc:`ValueError` for what no client could read."""
    status_line, *lines = head.lower().split(b"\r\n")
    version, status = status_line.split(b" ")[:2]
    lengths, codings, close = [], [], version != b"http/1.1"
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon:
            raise ValueError(f"no header: {line!r}")
        if name == b"content-length":
            lengths.append(int(value))
        elif name == b"transfer-encoding":
            codings.append(value.strip())
        elif name == b"connection":
            close = value.strip() == b"close"
    if len(lengths) + len(codings) != 1 or codings not in ([], [b"chunked"]):
        raise ValueError("neither one Content-Length nor Transfer-Encoding: chunked")
    return Head(int(status), lengths[0] if lengths else None, close)


class Client(asyncio.BufferedProtocol):
    """One client, over all its connections: it connects again where a wrong answer ended one."""

    def __init__(self, load: HttpLoad, number: int) -> None:
        mode = load.mode
        body = mode.upload
        self.load = load
        self.number = number
        self.method = "GET" if body is None else "POST"
        self.path = mode.path.format(number=number)
        lines = [f"{self.method} {self.path} HTTP/1.1", "Host: 127.0.0.1", "Accept: */*"]
        lines += ["User-Agent: benchmark"]
        if body is not None:
            lines += ["Content-Type: application/octet-stream", f"Content-Length: {len(body)}"]
        self.request = "\r\n".join([*lines, "", ""]).encode() + (body or b"")
        self.expected = mode.answer(number)
        self.expected_view = memoryview(self.expected)
        self.buffer = bytearray(2 * len(self.expected) + ROOM)
        self.view = memoryview(self.buffer)
        self.transport: Any = None
        self.left: float = 0  # requests that it may still send
        self.waiting = False
        self.sent = 0.0
        self.reset()

    def reset(self) -> None:
        self.end = 0  # of what has come, in the buffer
        self.at = 0  # what is still to be looked at
        self.head: Head | None = None
        self.right = 0  # bytes of the body that have come in chunks, and were right

    def send(self) -> None:
        if self.left <= 0 or self.waiting or self.transport is None:
            return
        self.left -= 1
        self.load.pending += 1
        self.waiting = True
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    # What the transport calls.

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.reset()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.view[self.end :]

    def buffer_updated(self, count: int) -> None:
        self.end += count
        try:
            complete = self.look()
        except ValueError as error:
            self.wrong(str(error))
            return
        if complete:
            self.answered()
        elif self.end == len(self.buffer):
            self.wrong("an answer that does not end")

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self.waiting:
            self.wrong("a closed connection")
        self.load.connection_lost(self)

    # The answer.

    def look(self) -> bool:
        """Whether the answer is complete; :exc:`ValueError` as soon as it is a wrong one."""
        if not self.waiting:
            raise ValueError("bytes that nobody asked for")
        if self.head is None:
            at = self.buffer.find(b"\r\n\r\n", 0, self.end)
            if at < 0:
                return False
            self.head = parse_head(bytes(self.view[:at]))
            self.at = at + 4
        if self.head.status != 200:
            raise ValueError(f"status {self.head.status}")
        if self.head.length is None:
            complete = self.look_at_chunks()
        else:
            if self.head.length != len(self.expected):
                raise ValueError(f"a body of {self.head.length} bytes")
            if self.end < self.at + self.head.length:
                return False
            complete = True
            if not self.buffer.startswith(self.expected, self.at):
                raise ValueError("another body")
            self.at += self.head.length
        if complete and self.at != self.end:
            raise ValueError("bytes after its end")
        return complete

    def look_at_chunks(self) -> bool:
        """Compare those that are complete; True after the last one."""
        while True:
            line = self.buffer.find(b"\r\n", self.at, self.end)
            if line < 0:
                return False
            size = int(bytes(self.view[self.at : line]).partition(b";")[0], 16)
            data, end = line + 2, line + 2 + size
            if self.end < end + 2:
                return False
            expected = self.expected_view[self.right : self.right + size]
            if len(expected) != size or not self.buffer.startswith(expected, data):
                raise ValueError("another body")
            if not self.buffer.startswith(b"\r\n", end):
                raise ValueError("a chunk that is longer than its size")
            self.right += size
            self.at = end + 2
            if size == 0:
                if self.right != len(self.expected):
                    raise ValueError(f"a body of {self.right} bytes")
                return True

    def answered(self) -> None:
        assert self.head is not None
        close = self.head.close
        self.waiting = False
        self.load.pending -= 1
        self.load.delivered += 1
        if self.load.timing:
            self.load.times.append(time.perf_counter() - self.sent)
        self.reset()
        if close:  # its server said so
            self.disconnect()
        else:
            self.send()

    def wrong(self, what: str) -> None:
        if self.waiting:
            self.waiting = False
            self.load.pending -= 1
        got = bytes(self.view[: min(self.end, 200)])
        self.load.wrong(
            f"Client {self.number}, {self.method} {self.path}: expected status 200 and "
            f"{len(self.expected)} bytes, got {what}.\n{got!r}"
        )
        self.disconnect()

    def disconnect(self) -> None:
        transport, self.transport = self.transport, None
        if transport is not None:
            transport.abort()


class HttpLoad(Clocked):
    """The clients of one mode, each with one request under way. ``pending`` counts those.

    :param strict: whether a wrong answer is a fault; it is counted in any case.
    """

    def __init__(self, mode: HttpMode, port: int, strict: bool) -> None:
        super().__init__()
        self.mode = mode
        self.port = port
        self.strict = strict
        self.errors = 0
        self.error: str | None = None
        self.timing = False
        self.times: list[float] = []  # of right answers, while the clock runs
        self.tasks: set[asyncio.Task[None]] = set()
        self.clients = [Client(self, number) for number in range(CLIENTS)]

    async def run(self, seconds: float, observe: bool) -> HttpMeasurement:
        try:
            for client in self.clients:
                await self.connect(client)
            self.start(1)  # each has seen one answer, or an error, before the clock starts
            await self.drain()
            self.start(math.inf)
            self.timing = True
            rate, client_cpu = await self.timed(seconds)
            self.timing = False
            turn = await self.longest_turn(seconds / 2) if observe else None
            for client in self.clients:
                client.left = 0
            await self.drain()
            answers = self.delivered + self.errors
            times = sorted(self.times)
            return HttpMeasurement(
                *(rate, client_cpu, answers, self.errors, self.error, turn),
                p50=percentile(times, 0.5) if times else None,
                p99=p99(times) if times else None,
            )
        finally:
            self.closing = True
            for client in self.clients:
                client.disconnect()
            for task in self.tasks:
                task.cancel()

    def start(self, requests: float) -> None:
        loop = asyncio.get_running_loop()
        for client in self.clients:
            client.left = requests
            if self.mode.apart and requests > 1:
                loop.call_later(client.number * self.mode.apart, client.send)
            else:
                client.send()

    async def connect(self, client: Client) -> None:
        loop = asyncio.get_running_loop()
        while not self.closing:
            try:
                await loop.create_connection(lambda: client, "127.0.0.1", self.port)
                return
            except OSError as error:
                self.wrong(f"Client {client.number} could not connect: {error}")
                await asyncio.sleep(0.05)

    def connection_lost(self, client: Client) -> None:
        if self.closing:
            return

        async def again() -> None:
            await self.connect(client)
            client.send()

        task = asyncio.ensure_future(again())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def wrong(self, what: str) -> None:
        if self.closing:
            return
        self.errors += 1
        self.error = self.error or what
        if self.strict:
            self.fail(what)

    async def drain(self) -> None:
        """Wait for every answer that is under way."""
        if not await self.settled():
            for client in self.clients:
                if client.waiting:
                    client.wrong("silence")
        await self.pause(0)

    async def longest_turn(self, seconds: float) -> float:
        """Let the server's heart beat for *seconds*, under the same load."""
        await ask(self.port, HEARTBEAT_START)
        await self.pause(seconds)
        found = await ask(self.port, HEARTBEAT_STOP)
        return float(found["longest"])


async def ask(port: int, path: str) -> dict[str, Any]:
    """Get what :class:`~benchmarks.http_app.Observed` answers itself, on a fresh connection."""
    async with asyncio.timeout(SILENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", "", ""]
        writer.write("\r\n".join(lines).encode())
        text = await reader.read()
        writer.close()
    found: dict[str, Any] = json.loads(text.partition(b"\r\n\r\n")[2])
    return found


def measure_http(
    mode: HttpMode, port: int, seconds: float, *, strict: bool, observe: bool = False
) -> HttpMeasurement:
    """Put the load of *mode* on the server on *port*.

    :param strict: raise :exc:`~benchmarks.client.Fault` at the first wrong answer.
    :param observe: the server has a heartbeat.
    """

    async def run() -> HttpMeasurement:
        return await HttpLoad(mode, port, strict).run(seconds, observe)

    return uvloop.run(run())
