"""Channels under load: what real clients logged is replayed by an independent checker.

The first tests show that the checker sees: they feed it logs that were tampered with.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import random
import time
from collections.abc import Callable
from typing import Any
from urllib.request import Request, urlopen

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from .checker import Fault, Published, Subscriber, check
from .conftest import ServerProcess
from .waiting import wait_until

# -- the checker -----------------------------------------------------------------------------------


def published(*messages: str) -> list[Published]:
    """Calls of one publisher: "a3" began at 3 and returned half a second later."""
    return [Published(text, float(text[1:]), float(text[1:]) + 0.5) for text in messages]


def honest_logs() -> tuple[dict[str, list[Published]], list[Subscriber]]:
    """Two publishers and four subscribers that saw what they had to."""
    publishers = {"a": published("a1", "a3", "a5", "a7"), "b": published("b2", "b4", "b6", "b8")}
    everything = ["a1", "b2", "a3", "b4", "a5", "b6", "a7", "b8"]
    return publishers, [
        Subscriber("one", list(everything), subscribed_at=0, leaving_at=9),
        Subscriber("two", list(everything), subscribed_at=0, leaving_at=9),
        # Got b2 before it was told that it is subscribed, and b6 although it was leaving.
        Subscriber("brief", everything[1:6], subscribed_at=2.2, leaving_at=6.2),
        # Went without a word: a7 and b8 were on their way.
        Subscriber("gone", everything[2:6], subscribed_at=2.8),
    ]


def test_honest_logs_have_no_faults():
    """The checker finds nothing in logs that keep every promise."""
    assert check(*honest_logs()) == []


@pytest.mark.parametrize("message", ["a1", "b4", "b8"])
def test_a_lost_message_is_found(message):
    """A promised message that one subscriber never got is found: first, in between or last."""
    publishers, subscribers = honest_logs()
    subscribers[0].received.remove(message)
    assert check(publishers, subscribers) == [Fault("lost", "one", (message,))]


def test_a_message_that_nobody_got_is_found():
    """A message that reached no subscriber at all is found, although no log shows a hole."""
    publishers, subscribers = honest_logs()
    publishers["a"].append(Published("a8", 8.6, 8.7))
    assert check(publishers, subscribers) == [
        Fault("lost", "one", ("a8",)),
        Fault("lost", "two", ("a8",)),
    ]


def test_a_hole_is_found_without_a_promise_at_the_end():
    """One that went without a word may miss the end, but nothing before what it got."""
    publishers, subscribers = honest_logs()
    subscribers[3].received.remove("a5")
    assert check(publishers, subscribers) == [Fault("lost", "gone", ("a5",))]


def test_a_hole_in_one_publishers_messages_needs_no_witness():
    """A subscriber that is alone shows a hole by its publisher's own sequence."""
    alone = Subscriber("alone", ["a1", "a5"])
    assert check({"a": published("a1", "a3", "a5", "a7")}, [alone]) == [
        Fault("lost", "alone", ("a3",))
    ]


@pytest.mark.parametrize("place", [3, 4, 8])
def test_a_doubled_message_is_found(place):
    """A message that came twice is found, right behind the first or much later."""
    publishers, subscribers = honest_logs()
    subscribers[1].received.insert(place, "a3")
    assert check(publishers, subscribers) == [Fault("doubled", "two", ("a3",))]


def test_messages_of_two_publishers_in_another_order_are_found():
    """Two neighbours of different publishers, swapped for one subscriber, break the one order."""
    publishers, subscribers = honest_logs()
    subscribers[0].received[2:4] = ["b4", "a3"]
    kinds = {fault.kind for fault in check(publishers, subscribers)}
    assert kinds == {"one order"}


def test_a_publishers_messages_in_another_order_are_found():
    """One publisher's messages, swapped in the same way for everybody, break its own order."""
    alone = Subscriber("alone", ["a1", "a5", "a3", "a7"])
    assert check({"a": published("a1", "a3", "a5", "a7")}, [alone]) == [
        Fault("publisher's order", "alone", ("a5", "a3"))
    ]


def test_three_logs_that_agree_only_in_pairs_are_found():
    """Any two of these logs have a common order; all three have none."""
    publishers = {name: published(f"{name}1") for name in "abc"}
    subscribers = [Subscriber(f"{x}{y}", [f"{x}1", f"{y}1"]) for x, y in ("ab", "bc", "ca")]
    faults = check(publishers, subscribers)
    assert [fault.kind for fault in faults] == ["one order"]


def test_a_message_after_leaving_is_found():
    """What comes after a subscriber was told that it has left is found."""
    publishers, subscribers = honest_logs()
    subscribers[2].received_after_leaving.append("a7")
    assert check(publishers, subscribers) == [Fault("late", "brief", ("a7",))]


def test_a_message_that_nobody_published_is_found():
    """A message that no publisher logged is found."""
    publishers, subscribers = honest_logs()
    subscribers[0].received.append("c9")
    assert check(publishers, subscribers) == [Fault("unknown", "one", ("c9",))]


# -- the load --------------------------------------------------------------------------------------

STAYING = 50
CHURNING = 12  # clients that come and go, over and over
MESSAGES = 2_000
#: Messages that may be on their way to the slowest of those that stay. With it nobody who reads
#: can fill an outbox of 1,000.
WINDOW = 300
#: Every wait of a client; far above what a loaded machine needs for one message.
PATIENCE = 20.0

SERVED = """
    import threading
    import time
    from dataclasses import asdict

    from flask import Flask
    from flask_websockets import WebSocket, WebSockets

    app = Flask(__name__)
    app.config.update(SETTINGS)
    websockets = WebSockets(app)
    credit = threading.Semaphore(0)
    logs = {"a": [], "b": []}
    unfinished = threading.Semaphore(0)

    @websockets.route("/listen/<channels>")
    def listen(ws: WebSocket, channels: str) -> None:
        with websockets.subscribe(ws, channels.split("+")):
            ws.send("subscribed")
            assert ws.receive() == "leave"
        ws.send("left")
        ws.receive()

    @websockets.route("/credit")
    def give_credit(ws: WebSocket) -> None:
        for count in ws.iter_text():
            credit.release(int(count))

    def publish(name: str, count: int, padding: int) -> None:
        for number in range(count):
            if not credit.acquire(timeout=20):
                return  # the log is short, and the test says so
            message = f"{name}{number}"
            padded = message + "." * padding
            began = time.monotonic()
            websockets.publish(padded, ["room", "hall"])
            logs[name].append((message, began, time.monotonic()))
        unfinished.release()

    @app.post("/start/<int:count>/<int:padding>")
    def start(count: int, padding: int):
        for name in logs:
            threading.Thread(target=publish, args=(name, count, padding), daemon=True).start()
        return "started"

    @app.get("/logs")
    def finished_logs():
        for _ in logs:
            unfinished.acquire(timeout=20)
        return logs

    @app.get("/stats")
    def stats():
        return asdict(websockets.stats())

    asgi = websockets.asgi_app()
"""


def served(settings: dict[str, int]) -> str:
    return SERVED.replace("SETTINGS", repr(settings))


def fetch(server: ServerProcess, path: str, method: str = "GET") -> bytes:
    with urlopen(Request(server.url(path), method=method), timeout=30) as response:
        body: bytes = response.read()
        return body


def fetch_logs(server: ServerProcess) -> dict[str, list[Published]]:
    logged = json.loads(fetch(server, "/logs"))
    return {name: [Published(*call) for call in calls] for name, calls in logged.items()}


class Listener:
    """One client's subscription, and the log that it keeps."""

    def __init__(self, name: str, ws: ClientConnection, finished: asyncio.Event) -> None:
        self.log = Subscriber(name)
        self._ws = ws
        self._finished = finished  # nothing more is published
        self._gone = False

    async def leave(self) -> None:
        """Ask to leave, unless it has done so, or vanished, or is not subscribed yet."""
        if self.log.subscribed_at is not None and self.log.leaving_at is None and not self._gone:
            # The clock is the machine's, not the process's: the server's log has the same.
            self.log.leaving_at = time.monotonic()
            await self._ws.send("leave")

    async def listen(
        self, quota: float, *, vanish: bool = False, progress: Callable[[], None] | None = None
    ) -> None:
        """Log all that comes; leave after *quota* messages, in order or without a word."""
        log, ws = self.log, self._ws
        left = False
        while True:
            try:
                message = await asyncio.wait_for(ws.recv(), PATIENCE)
            except ConnectionClosed:
                assert left, f"{log.name} was closed: {ws.close_code} {ws.close_reason}"
                assert ws.close_code == 1000
                return
            assert isinstance(message, str)
            if message == "subscribed":
                log.subscribed_at = time.monotonic()
            elif message == "left":
                left = True
                await ws.send("bye")
            elif left:
                log.received_after_leaving.append(message)
            else:
                log.received.append(message.rstrip("."))  # without its padding
                if progress is not None:
                    progress()
            if len(log.received) >= quota and vanish:
                self._gone = True
                ws.transport.abort()
                return
            if len(log.received) >= quota or self._finished.is_set():
                await self.leave()


class Load:
    """All clients of one run, on one event loop."""

    def __init__(self, server: ServerProcess, messages: int) -> None:
        self._server = server
        self._messages = messages
        self._random = random.Random(6455)
        self._finished = asyncio.Event()  # those that stay have got everything
        self._advanced = asyncio.Event()  # the slowest of them may have got further
        self._names = itertools.count()
        self.staying: list[Listener] = []
        self.churning: list[Listener] = []

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(STAYING):
                tasks.create_task(self._stay())
            publishing = tasks.create_task(self._give_credit())
            for _ in range(CHURNING):
                tasks.create_task(self._churn())
            await publishing
            self._finished.set()
            for listener in self.staying + self.churning:
                await listener.leave()

    def _connect(self, path: str) -> connect:
        return connect(
            self._server.ws_url(path), compression=None, proxy=None, open_timeout=PATIENCE
        )

    def _room(self) -> str:
        # Every message goes to both channels, and must reach one that is in both only once.
        return "/listen/" + self._random.choice(["room", "hall", "room+hall"])

    async def _stay(self) -> None:
        async with self._connect(self._room()) as ws:
            listener = Listener(f"staying {next(self._names)}", ws, self._finished)
            self.staying.append(listener)
            await listener.listen(float("inf"), progress=self._advanced.set)

    async def _churn(self) -> None:
        while not self._finished.is_set():
            async with self._connect(self._room()) as ws:
                listener = Listener(f"churning {next(self._names)}", ws, self._finished)
                self.churning.append(listener)
                vanish = self._random.random() < 0.3
                await listener.listen(self._random.randrange(150), vanish=vanish)

    async def _give_credit(self) -> None:
        """Let the publishers go on as far as the slowest of those that stay allows."""
        async with self._connect("/credit") as ws:
            async with asyncio.timeout(PATIENCE):
                while sum(one.log.subscribed_at is not None for one in self.staying) < STAYING:
                    await asyncio.sleep(0.01)
            half = self._messages // 2
            await asyncio.to_thread(fetch, self._server, f"/start/{half}/0", "POST")
            given = 0
            while (slowest := min(len(one.log.received) for one in self.staying)) < 2 * half:
                more = min(slowest + WINDOW, 2 * half) - given
                if more >= WINDOW // 4 or (more and given + more == 2 * half):
                    await ws.send(str(more))
                    given += more
                self._advanced.clear()
                await asyncio.wait_for(self._advanced.wait(), PATIENCE)


@pytest.mark.slow
def test_what_was_promised_arrives_once_and_in_one_order(uvicorn_server, capsys):
    """2,000 messages of two publishers reach 50 clients as promised, while others come and go."""
    server = uvicorn_server(served({}))

    async def run() -> Load:
        load = Load(server, MESSAGES)
        async with asyncio.timeout(60):
            await load.run()
        return load

    started = time.monotonic()
    load = asyncio.run(run())
    seconds = time.monotonic() - started

    publishers = fetch_logs(server)
    staying = [listener.log for listener in load.staying]
    churning = [listener.log for listener in load.churning]
    subscribers = staying + churning
    assert sum(map(len, publishers.values())) == MESSAGES
    assert check(publishers, subscribers) == []
    assert [len(log.received) for log in staying] == [MESSAGES] * STAYING

    # The run was one worth checking: clients joined and left while messages were flowing.
    left = [log for log in churning if log.received and log.leaving_at is not None]
    vanished = [log for log in churning if log.received and log.leaving_at is None]
    assert len(left) >= 10
    assert len(vanished) >= 3
    stats = json.loads(fetch(server, "/stats"))
    assert stats["published"] == MESSAGES
    assert stats["closed_slow"] == stats["stuck_views"] == 0
    assert stats["subscriptions"] == stats["channels"] == 0
    assert "Traceback" not in server.log()
    with capsys.disabled():
        print(
            f"\n  {sum(len(log.received) for log in subscribers)} deliveries to {STAYING} staying "
            f"clients, {len(left)} that left and {len(vanished)} that vanished, {seconds:.1f} s"
        )

    # The same logs, tampered with, are not passed: the checker has something to hold on to.
    for kind, tamper in TAMPERING.items():
        tampered = copy.deepcopy(subscribers)
        tamper(tampered[0].received)
        assert kind in {fault.kind for fault in check(publishers, tampered)}


def _swap(received: list[str]) -> None:
    """Swap the first two neighbours that come from different publishers."""
    place = next(n for n in range(MESSAGES) if received[n][0] != received[n + 1][0])
    received[place], received[place + 1] = received[place + 1], received[place]


TAMPERING: dict[str, Callable[[list[str]], object]] = {
    "lost": lambda received: received.pop(MESSAGES // 2),
    "doubled": lambda received: received.append(received[MESSAGES // 2]),
    "one order": _swap,
}


@pytest.mark.slow
def test_one_that_reads_late_gets_everything_in_order(uvicorn_server):
    """What piled up in an outbox and what is published while it drains arrive in one order."""
    size, half = 16 * 1024, 600  # half of them are more than the kernel's buffers hold
    settings = {"WEBSOCKETS_OUTBOX_MESSAGES": 4 * half, "WEBSOCKETS_OUTBOX_BYTES": 4 * half * size}
    server = uvicorn_server(served(settings))

    async def run() -> Subscriber:
        options: dict[str, Any] = {"compression": None, "proxy": None, "max_queue": 1}
        async with (
            asyncio.timeout(60),
            connect(server.ws_url("/credit"), **options) as credit,
            connect(server.ws_url("/listen/room"), **options) as ws,
        ):
            finished = asyncio.Event()
            listener = Listener("late", ws, finished)
            assert await ws.recv() == "subscribed"
            listener.log.subscribed_at = time.monotonic()
            await asyncio.to_thread(fetch, server, f"/start/{half}/{size}", "POST")
            await credit.send(str(half))
            await asyncio.to_thread(
                wait_until,
                lambda: json.loads(fetch(server, "/stats"))["published"] == half,
                PATIENCE,
                "the first half",
            )
            steps = asyncio.Queue[None]()
            async with asyncio.TaskGroup() as tasks:
                # Each message read lets one more be published, while the outbox is draining.
                listening = listener.listen(2 * half, progress=lambda: steps.put_nowait(None))
                tasks.create_task(listening)
                for _ in range(half):
                    await steps.get()
                    await credit.send("1")
            return listener.log

    log = asyncio.run(run())
    assert check(fetch_logs(server), [log]) == []
    assert len(log.received) == 2 * half
    assert json.loads(fetch(server, "/stats"))["closed_slow"] == 0
