"""What others' trouble costs those who behave: their p99, with it and without it, in one run."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from picows import WSListener, WSMsgType, ws_connect

from .bystanders_app import LIMIT, SLOW
from .client import SILENCE, Clocked, Fault, Paced, p99
from .flood import HANDSHAKE
from .http_client import parse_head
from .idle import told
from .servers import serve

#: Clients whose requests are timed, each on one connection that is kept alive.
CLIENTS = 20
#: Requests in a second, of all of them together, evenly spread.
REQUESTS = 400
#: Handshakes above the limit, and those at the same time.
HANDSHAKES = 10_000
AT_ONCE = 100
#: Subscribers that read what comes.
HEALTHY = 998
#: Messages in a second; each goes to all of them.
PUBLISHES = 20
#: Checked before the clock starts: handshakes, requests, messages.
CHECKED = 200
#: The most that fills what lies between a publisher and a peer that does not read.
FILLS = 1000
#: What a peer may cost beside its outbox.
SPARE_BYTES = 1024 * 1024


async def stats_of(port: int) -> dict[str, Any]:
    return await told(port, "/stats")


# -- HTTP beside handshakes that are refused --------------------------------------------------


class Requests(Paced):
    """The page's visitors."""

    async def open(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        self.visitors = [
            (await loop.create_connection(lambda: Visitor(self), "127.0.0.1", port))[1]
            for _ in range(CLIENTS)
        ]

    def close(self) -> None:
        self.closing = True
        for visitor in self.visitors:
            visitor.transport.abort()

    def ask(self, number: int, due: float) -> None:
        self.pending += 1
        self.visitors[number % CLIENTS].ask(due)

    async def measured(self, until: Callable[[int, float], bool]) -> tuple[float, float]:
        """The p99 of the requests, and that of the client's own lateness."""
        self.clear()
        await self.pace(1 / REQUESTS, until, self.ask)
        await self.answered()
        return p99(self.times), p99(self.lags)


class Visitor(asyncio.Protocol):
    def __init__(self, load: Requests) -> None:
        self.load = load
        self.due: deque[float] = deque()
        self.data = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if not self.load.closing:
            self.load.fail("A connection that asks for the page was closed.")

    def ask(self, due: float) -> None:
        self.due.append(due)
        if len(self.due) == 1:
            self._send()

    def _send(self) -> None:
        self.transport.write(b"GET /small HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, end, body = self.data.partition(b"\r\n\r\n")
        if not end or (body != b"ok" and b"ok".startswith(body)):
            return
        if parse_head(head).status != 200 or body != b"ok" or not self.due:
            self.load.fail(f"Expected 200 and ok; got {self.data!r}.")
            return
        self.data = b""
        self.load.times.append(time.perf_counter() - self.due.popleft())
        self.load.delivered += 1
        self.load.pending -= 1
        if self.due:
            self._send()


@asynccontextmanager
async def flooding(port: int, count: int) -> Any:
    """A process that shakes hands *count* times; the block gets a future of what came."""
    command = ["-m", "benchmarks.flood", str(port), str(count), str(min(AT_ONCE, count))]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        cwd=Path(__file__).parent.parent,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        if await process.stdout.readline() != b"started\n":
            raise RuntimeError("The flood did not start.")
        yield asyncio.ensure_future(process.stdout.readline())
    finally:
        if process.returncode is None:
            try:
                process.kill()
            except ProcessLookupError:
                pass
        await process.wait()


async def _refused(port: int, count: int, meanwhile: Callable[[Any], Awaitable[None]]) -> float:
    """Have *count* handshakes refused; how many that were in a second."""
    async with flooding(port, count) as ended:
        await meanwhile(ended)
        result = json.loads(await ended)
    if result["came"] != {"503": count}:
        raise Fault(f"{count} handshakes were to be refused with 503; came: {result['came']}.")
    return count / float(result["seconds"])


async def refusals(port: int, seconds: float, handshakes: int = HANDSHAKES) -> dict[str, float]:
    """The p99 of a page, quiet, and while handshakes above the limit are refused."""
    load = Requests()
    async with AsyncExitStack() as stack:
        for _ in range(LIMIT):
            listener = Ready(load)
            transport, _ = await ws_connect(lambda: listener, f"ws://127.0.0.1:{port}/wait")  # noqa: B023
            stack.callback(transport.disconnect, graceful=False)
        stack.callback(setattr, load, "closing", True)
        await load.open(port)
        stack.callback(load.close)
        await load.answered()
        await load.measured(lambda number, _: number == CHECKED)
        await _refused(port, CHECKED, lambda ended: asyncio.sleep(0))
        before = await stats_of(port)
        quiet, quiet_lag = await load.measured(lambda _, passed: passed >= seconds)
        timed: list[tuple[float, float]] = []

        async def time_it(ended: Any) -> None:
            timed.append(await load.measured(lambda *_: ended.done()))

        rate = await _refused(port, handshakes, time_it)
        after = await stats_of(port)
    expected = {
        "refused_full": before["refused_full"] + handshakes,
        "connections": LIMIT,
        "view_threads": LIMIT,
    }
    if expected != (came := {name: after[name] for name in expected}):
        raise Fault(f"Expected {expected}; got {came}.")
    [(busy, busy_lag)] = timed
    return {
        "without": quiet,
        "with": busy,
        "handshakes": rate,
        "lag_without": quiet_lag,
        "lag_with": busy_lag,
    }


class Ready(WSListener):
    """A connection that waits, once it has heard that its view runs."""

    def __init__(self, load: Clocked) -> None:
        self.load = load
        load.pending += 1

    def on_ws_frame(self, transport: Any, frame: Any) -> None:
        if frame.msg_type == WSMsgType.TEXT:
            self.text(frame.get_payload_as_bytes())

    def text(self, payload: bytes) -> None:
        if payload != b"ready":
            self.load.fail(f"Expected ready; got {payload[:80]!r}.")
        self.load.pending -= 1
        self.load.delivered += 1

    def on_ws_disconnected(self, transport: Any) -> None:
        if not self.load.closing:
            self.load.fail("A connection was closed by the server.")


# -- subscribers beside such that do not read -----------------------------------------------------


class Channel(Paced):
    """One channel with its publisher and those of its subscribers that read."""

    def __init__(self) -> None:
        super().__init__()
        self.due: list[float] = []  # of each message

    async def open(self, stack: AsyncExitStack, port: int, subscribers: int) -> None:
        self.subscribers = subscribers
        for number in range(subscribers + 1):
            path = "everyone" if number else "publish"
            listener = Subscriber(self) if number else Ready(self)
            transport, _ = await ws_connect(
                lambda: listener,  # noqa: B023
                f"ws://127.0.0.1:{port}/{path}",
                websocket_handshake_timeout=60,
            )
            stack.callback(transport.disconnect, graceful=False)
            if not number:
                self.publisher = transport
        stack.callback(setattr, self, "closing", True)
        await self.answered()

    def publish(self, _: int, due: float) -> None:
        self.pending += self.subscribers
        self.publisher.send(WSMsgType.TEXT, b"%064d" % len(self.due))
        self.due.append(due)

    def fill(self) -> None:
        """Publish to the slow ones alone."""
        self.publisher.send(WSMsgType.TEXT, b"fill")

    async def measured(self, until: Callable[[int, float], bool]) -> tuple[float, float]:
        """The p99 of the deliveries, and that of the client's own lateness."""
        self.clear()
        await self.pace(1 / PUBLISHES, until, self.publish)
        await self.answered()
        return p99(self.times), p99(self.lags)


class Subscriber(Ready):
    """Expects each message once, in order."""

    load: Channel

    def __init__(self, load: Channel) -> None:
        super().__init__(load)
        self.expected = -1  # the next one's number; first comes "ready"

    def text(self, payload: bytes) -> None:
        now, number = time.perf_counter(), self.expected
        self.expected += 1
        if number < 0:
            super().text(payload)
        elif payload != b"%064d" % number:
            self.load.fail(f"Expected message {number}; got {payload[:80]!r}.")
        else:
            self.load.times.append(now - self.load.due[number])
            self.load.pending -= 1
            self.load.delivered += 1


def slow_peer(port: int, channel: str) -> socket.socket:
    """Open a connection to a slow subscriber's view, and read no more than the answer's head."""
    peer = socket.socket()
    peer.settimeout(SILENCE)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.connect(("127.0.0.1", port))
    peer.sendall(HANDSHAKE.replace(b"/wait", b"/slow/" + channel.encode()))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += peer.recv(1)
        if len(head) > 4096 or not head:
            raise Fault(f"A subscriber was not let in: {head[:80]!r}.")
    if not head.startswith(b"HTTP/1.1 101 "):
        raise Fault(f"A subscriber was not let in: {head[:80]!r}.")
    return peer


async def trickle(peer: socket.socket) -> None:
    """Read one byte a second."""
    peer.setblocking(False)
    while True:
        await asyncio.get_running_loop().sock_recv(peer, 1)
        await asyncio.sleep(1)


async def slow_subscribers(
    port: int, seconds: float, slow: bool, subscribers: int = HEALTHY
) -> dict[str, Any]:
    """The p99 of those that read, with one that is stuck and one that trickles, or without."""
    load = Channel()
    async with AsyncExitStack() as stack:
        await load.open(stack, port, subscribers)
        await load.measured(lambda number, _: number == max(2, CHECKED // PUBLISHES))
        before = await stats_of(port)
        if slow:
            peers = [await asyncio.to_thread(slow_peer, port, channel) for channel in SLOW]
            for peer in peers:
                stack.callback(peer.close)
            trickling = asyncio.ensure_future(trickle(peers[1]))
            stack.callback(trickling.cancel)
            limit = before["outbox_limit"]
            for _ in range(FILLS):
                load.fill()
                await load.pause(0.005)
                stats = await stats_of(port)
                # Both are full to the last message; each has dropped some.
                if stats["outbox_bytes"] > 1.9 * limit and stats["dropped_oldest"] > 10:
                    break
            else:
                raise Fault(f"The outboxes of the slow did not fill: {stats}.")
        result, lag = await load.measured(lambda _, passed: passed >= seconds)
        after = await stats_of(port)
    expected = subscribers + 1 + 2 * slow
    if (after["connections"], after["view_threads"]) != (expected, expected):
        raise Fault(f"Of {expected} connections {after['connections']} were left.")
    if slow and after["dropped_oldest"] <= stats["dropped_oldest"]:
        raise Fault("The slow did not slow down anything: nothing was dropped for them.")
    grown = None
    if after["resident"] is not None:
        grown = after["resident"] - before["resident"]
    return {"p99": result, "lag": lag, "grown": grown, "outbox": after["outbox_limit"]}


# -- both -----------------------------------------------------------------------------------------


def _measure_refusals(ws: str, core: int | None, seconds: float) -> dict[str, Any]:
    # A terminal is no place for what uvicorn's sans-I/O implementation says of each refusal.
    with (
        tempfile.TemporaryFile() as log,
        serve("benchmarks.bystanders_app:refusals", ws, core, log) as port,
    ):
        return uvloop.run(refusals(port, seconds))


def _measure_slow(ws: str, core: int | None, seconds: float) -> dict[str, Any]:
    found = []
    for slow in (False, True):
        with serve("benchmarks.bystanders_app:slow_subscribers", ws, core) as port:
            found.append(uvloop.run(slow_subscribers(port, seconds, slow)))
    without, beside = found
    return {
        "without": without["p99"],
        "with": beside["p99"],
        "lag_without": without["lag"],
        "lag_with": beside["lag"],
        "grown_without": without["grown"],
        "grown_with": beside["grown"],
        "allowed": len(SLOW) * (beside["outbox"] + SPARE_BYTES),
    }


BYSTANDER_MODES: dict[str, Callable[[str, int | None, float], dict[str, Any]]] = {
    "refusals": _measure_refusals,
    "slow-subscribers": _measure_slow,
}


def bystander_summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One mode: the ratio of each run's two p99s, and the medians of all that was measured."""
    ratios = [run["with"] / run["without"] for run in runs]
    medians = {
        name: None if runs[0][name] is None else median(run[name] for run in runs)
        for name in runs[0]
    }
    return {"ratio": median(ratios), "ratios": ratios, "medians": medians, "runs": runs}


def bystander_table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "mode              with/without  of the runs     p99 without      with  client late (p99)"
    ]
    notes = []
    for mode, result in results.items():
        medians, ratios = result["medians"], result["ratios"]
        line = f"{mode:17} {result['ratio']:12.2f}  {min(ratios):.2f} to {max(ratios):.2f}".ljust(
            46
        )
        line += "".join(f"{medians[name] * 1000:8.2f} ms" for name in ("without", "with"))
        line += "".join(f"{medians[name] * 1000:7.2f} ms" for name in ("lag_without", "lag_with"))
        lines.append(line)
        if "handshakes" in medians:
            notes.append(
                f"{mode}: {HANDSHAKES:,} handshakes were refused in each run, "
                f"{medians['handshakes']:,.0f}/s; no view was started for them"
            )
        elif medians["grown_with"] is not None:
            grown = [f"{run['grown_with'] / 2**20:.2f}" for run in result["runs"]]
            notes.append(
                f"{mode}: resident memory grew by {', '.join(grown)} MiB in the runs, of "
                f"{medians['allowed'] / 2**20:.2f} allowed for the two; by "
                f"{medians['grown_without'] / 2**20:.2f} without them"
            )
    return "\n".join([*lines, *notes])
