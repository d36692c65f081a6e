"""One connection with everybody at it at once: what remains true whoever comes first.

A view's thread, a second one, a publisher, the peer's two directions and whatever ends it run
side by side, each through a program of its own. Afterwards their records are compared.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.lowlevel
from hypothesis import given
from hypothesis import strategies as st

from flask_websockets import ConnectionClosed

from ..test_channels_model import BYTES as OUTBOX_BYTES
from ..test_channels_model import MESSAGES as OUTBOX_MESSAGES
from ..test_slow_consumers import POLICIES, counted
from .profiles import profile
from .test_link_model import INBOX_BYTES, INBOX_MESSAGES
from .world import PATIENCE, Client, Order, World

#: Seconds of a wait that may find nothing.
BRIEF = 0.001
#: Seconds of each step that receives; to drain is to receive until the end.
PATIENCES = {"receive": PATIENCE, "poll": BRIEF, "drain": None}


@dataclass
class Record:
    """What one thread or task of the view has done."""

    sent: list[str] = field(default_factory=list)
    received: list[str] = field(default_factory=list)
    errors: set[tuple[int, str]] = field(default_factory=set)


def data(kind: str, number: int) -> str:
    """A numbered message; every seventh is large."""
    return f"{kind}{number:03}".ljust(45 if number % 7 == 6 else 4 + number % 3 * 6, ".")


def order(steps: list[str], kind: str, record: Record) -> Order:
    """What has a view's thread go through *steps*, whether the connection ends meanwhile or not."""

    def step_on_thread(ws: Any, step: str, number: int) -> None:
        if step == "send":
            ws.send(data(kind, number))
            record.sent.append(data(kind, number))
        elif step == "turn":
            ws.wait_closed(BRIEF)
        elif step == "close":
            ws.close(4000, "enough")
        else:
            while (found := ws.receive(PATIENCES[step])) is not None:
                record.received.append(found)
                if step != "drain":
                    break

    async def step_on_loop(ws: Any, step: str, number: int) -> None:
        if step == "send":
            await ws.send(data(kind, number))
            record.sent.append(data(kind, number))
        elif step == "turn":
            await ws.wait_closed(BRIEF)
        elif step == "close":
            await ws.close(4000, "enough")
        else:
            while (found := await ws.receive(PATIENCES[step])) is not None:
                record.received.append(found)
                if step != "drain":
                    break

    def on_thread(ws: Any) -> None:
        for number, step in enumerate(steps):
            try:
                step_on_thread(ws, step, number)
            except ConnectionClosed as error:
                record.errors.add((error.code, error.reason))

    async def on_loop(ws: Any) -> None:
        for number, step in enumerate(steps):
            try:
                await step_on_loop(ws, step, number)
            except ConnectionClosed as error:
                record.errors.add((error.code, error.reason))

    return Order(on_thread, on_loop)


class Storm:
    """One run."""

    def __init__(
        self, kind: str, backend: str, inbox_full: str, on_slow: str, socket_messages: int
    ) -> None:
        self.inbox_full = inbox_full
        self.world = World(
            kind,
            backend,
            WEBSOCKETS_INBOX_MESSAGES=INBOX_MESSAGES,
            WEBSOCKETS_INBOX_BYTES=INBOX_BYTES,
            WEBSOCKETS_INBOX_FULL=inbox_full,
            WEBSOCKETS_OUTBOX_MESSAGES=OUTBOX_MESSAGES,
            WEBSOCKETS_OUTBOX_BYTES=OUTBOX_BYTES,
        )
        self.client: Client = self.world.connect(socket_messages)
        self.subscription = self.client.enter(["a", "b"], on_slow)
        self.view, self.second = Record(), Record()
        self.put: list[str] = []
        self.over = False

    def run(
        self, view: list[str], second: list[str], peer: list[str], reader: list[str], end: str
    ) -> None:
        world, client = self.world, self.client
        graceful = end == "return"
        if graceful:  # nobody waits for what does not come
            view = ["poll" if step == "receive" else step for step in view]
        else:
            view = [*view, "drain"]
        if end == "close":
            second = [*second, "close"]
        orders = order(view, "v", self.view), order(second, "s", self.second)
        tasks = [
            world.portal.start_task_soon(self.peer_writes, peer, end),
            world.portal.start_task_soon(self.peer_reads, reader),
            world.portal.start_task_soon(self.watch),
        ]
        with ThreadPoolExecutor(1) as publisher:
            publishing = publisher.submit(self.publish)
            client.view.tell(orders[0])
            client.second.tell(orders[1])
            if end not in ("return", "close", "leave"):
                world.call(self.end, end)
            publishing.result(2 * PATIENCE)
            for each in orders:
                each.future.result(2 * PATIENCE)
        world.wait_for(lambda: world.websockets.stats().published == 10, "not all is published")
        client.stop()
        client.running.result(2 * PATIENCE)
        self.over = True
        for task in tasks:
            task.result(PATIENCE)
        self.check(end)

    # -- everybody ---------------------------------------------------------------------------------

    def publish(self) -> None:
        for number in range(10):
            self.world.websockets.publish(data("p", number), "ab"[number % 2])

    async def peer_writes(self, steps: list[str], end: str) -> None:
        for number, step in enumerate(steps):
            if step == "send":
                self.put.append(data("r", number))
                self.client.peer.send(data("r", number))
            else:
                await anyio.sleep(BRIEF / 4)
        if end == "leave":
            self.client.peer.put(
                {"type": "websocket.disconnect", "code": 4321, "reason": "the peer's"}
            )

    async def peer_reads(self, steps: list[str]) -> None:
        with anyio.fail_after(3 * PATIENCE):
            for step in [*steps, *["read"] * 1000]:
                if step == "read":
                    try:
                        self.client.heard.append(await self.client.peer._from_app.receive())
                    except anyio.EndOfStream:
                        return
                else:
                    await anyio.sleep(BRIEF / 4)

    async def watch(self) -> None:
        """Never above a bound; one larger message lies there alone."""
        while not self.over:
            ws = self.client.ws
            messages, size, out_messages, out_size = ws.link.depths
            assert messages <= INBOX_MESSAGES
            assert size <= INBOX_BYTES or messages == 1
            if ws.connected:
                assert out_messages <= OUTBOX_MESSAGES
                assert out_size <= OUTBOX_BYTES or out_messages == 1
            await anyio.sleep(BRIEF / 10)

    async def end(self, end: str) -> None:
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        time.sleep(0.002)  # threads go on, and the loop learns of it behind this end only
        link = self.client.ws.link
        if end == "expel":
            link.expel(1008, "out")
        elif end == "dismiss":
            link.dismiss(1012, "the server stops", (503, [], b""))
        elif end == "finish":
            link.let_finish(1012, "the server stops", (503, [], b""))
        elif end == "lose":
            link.lose(1006, "lost")
        else:
            self.client.peer.cancel()

    # -- afterwards --------------------------------------------------------------------------------

    def check(self, end: str) -> None:
        stats, ws = self.world.websockets.stats(), self.client.ws
        *messages, last = self.client.heard[1:] or [{"type": "nothing"}]
        if last["type"] == "websocket.send":
            messages.append(last)
        else:
            assert last["type"] in ("websocket.close", "nothing"), last
        assert {message["type"] for message in messages} <= {"websocket.send"}
        heard = [message["text"] for message in messages]
        assert len(set(heard)) == len(heard), "something came twice"

        # One end, the same for everybody.
        slow = stats.closed_slow + stats.inbox_closed
        assert slow <= 1
        code = 1013 if slow else CODES[end]
        assert ws.close_code == code
        assert self.view.errors | self.second.errors <= {(ws.close_code, ws.close_reason)}
        if last["type"] == "websocket.close":
            assert (last["code"], last["reason"]) == (ws.close_code, ws.close_reason)
        elif end not in ("leave", "lose", "cancel"):  # then it may have come too late
            raise AssertionError("nobody said goodbye")

        # What the view sent, in order. What was accepted is sent before a goodbye of its own.
        all_sent = not slow and end in ("return", "close", "dismiss", "finish")
        for record, kind in ((self.view, "v"), (self.second, "s")):
            own = [text for text in heard if text[0] == kind]
            assert own == (record.sent if all_sent else record.sent[: len(own)])

        # What was published: in order, what was dropped is counted.
        published = [text for text in heard if text[0] == "p"]
        assert published == sorted(published)
        dropped = self.subscription.dropped
        assert dropped == sum(counted(self.world.websockets).values())
        if end == "return" and not slow:
            assert len(published) + dropped == 10 == stats.published
        else:
            assert len(published) + dropped <= 10

        # What the peer sent.
        received = self.view.received
        if self.inbox_full == "drop_newest":
            assert received == [text for text in self.put if text in set(received)]
            if end == "leave" and not slow:
                assert len(received) + stats.inbox_dropped == len(self.put)
        elif end == "leave" and not slow:
            assert received == self.put
        else:
            assert received == self.put[: len(received)]


CODES = {
    "return": 1000,
    "close": 4000,
    "leave": 4321,
    "expel": 1008,
    "dismiss": 1012,
    "finish": 1012,
    "lose": 1006,
    "cancel": 1006,
}


def steps(*names: str, max_size: int = 25) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names), max_size=max_size)


@profile(120, shrink=False)
@given(
    st.sampled_from(["sync", "async"]),
    st.sampled_from(["asyncio", "trio"]),
    st.sampled_from(["pause", "pause", "close", "drop_newest"]),
    st.sampled_from(POLICIES),
    st.integers(0, 3),
    steps("receive", "receive", "poll", "send", "turn"),
    steps("send", "send", "turn"),
    steps("send", "send", "turn"),
    steps("read", "turn", max_size=12),
    st.sampled_from(list(CODES)),
)
def test_whoever_comes_first(
    kind: str,
    backend: str,
    inbox_full: str,
    on_slow: str,
    socket_messages: int,
    view: list[str],
    second: list[str],
    peer: list[str],
    reader: list[str],
    end: str,
) -> None:
    """Order is kept, nothing comes twice, nothing is lost that was not dropped, one end for all."""
    storm = Storm(kind, backend, inbox_full, on_slow, socket_messages)
    try:
        storm.run(view, second, peer, reader, end)
    except BaseException:
        storm.world.abandon()
        raise
    storm.world.close()
