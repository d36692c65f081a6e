"""Slow consumers: a peer that does not read, under each policy, message by message.

The peer's socket holds nothing (``socket_messages=0``): once the writer has begun one message,
everything else lies in the outbox. That one counts towards the outbox's bound and can no longer
be dropped.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from queue import SimpleQueue
from typing import Any

import anyio
import pytest

from flask_websockets import (
    AsyncWebSocket,
    ConnectionClosed,
    PublishResult,
    Subscription,
    UsageError,
    WebSockets,
    WrongThread,
)

from .asgi_driver import TIMEOUT, connection, wait_until

DROPPING = ("drop_oldest", "drop_newest", "latest")
POLICIES = ("close", *DROPPING)


class Order:
    """Something that a view is told to do, and what came of it."""

    def __init__(
        self, on_thread: Callable[[Any], Any], on_loop: Callable[[Any], Awaitable[Any]]
    ) -> None:
        self.on_thread = on_thread
        self.on_loop = on_loop
        self.done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self, ws: Any) -> None:
        try:
            self._result = self.on_thread(ws)
        except BaseException as error:
            self._error = error
        self.done.set()

    async def arun(self, ws: Any) -> None:
        try:
            self._result = await self.on_loop(ws)
        except Exception as error:
            self._error = error
        self.done.set()

    async def result(self) -> Any:
        """What it returned or raised, once it has ended."""
        await wait_until(self.done.is_set)
        if self._error is not None:
            raise self._error
        return self._result


class Puppet:
    """A view that does what the test says, on a thread or as a coroutine, and its peer."""

    def __init__(self, websockets: WebSockets, kind: str) -> None:
        self.websockets = websockets
        self.kind = kind
        self.peer: Any = None
        self.ws: Any = None
        self.entered: list[Subscription] = []
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._rang: Any = None  # on the loop only
        self._marks = count()

    # -- the view -------------------------------------------------------------------------------

    def view(self, ws: Any) -> None:
        self.ws = ws
        ws.accept()
        while (order := self._orders.get(timeout=2 * TIMEOUT)) is not None:
            order.run(ws)
        while self.entered:
            self.entered.pop().__exit__(None, None, None)

    async def aview(self, ws: Any) -> None:
        self.ws = ws
        await ws.accept()
        while True:
            await self._rang.wait()
            self._rang = anyio.Event()
            while not self._orders.empty():
                order = self._orders.get()
                if order is None:
                    while self.entered:
                        await self.entered.pop().__aexit__(None, None, None)
                    return
                await order.arun(ws)

    # -- what it is told ------------------------------------------------------------------------

    def begin(
        self, on_thread: Callable[[Any], Any], on_loop: Callable[[Any], Awaitable[Any]]
    ) -> Order:
        """Give an order without waiting for its end."""
        order = Order(on_thread, on_loop)
        self._orders.put(order)
        self._rang.set()
        return order

    def stop(self) -> None:
        """Have the view return."""
        self._orders.put(None)
        self._rang.set()

    async def enter(self, channels: Any, on_slow: str = "close") -> Subscription:
        """Enter a ``with`` or ``async with`` block."""

        def on_thread(ws: Any) -> Subscription:
            subscription = self.websockets.subscribe(ws, channels, on_slow=on_slow)
            entered = subscription.__enter__()
            assert entered is subscription
            self.entered.append(subscription)
            return subscription

        async def on_loop(ws: Any) -> Subscription:
            subscription = self.websockets.subscribe(ws, channels, on_slow=on_slow)
            entered = await subscription.__aenter__()
            assert entered is subscription
            self.entered.append(subscription)
            return subscription

        subscription: Subscription = await self.begin(on_thread, on_loop).result()
        return subscription

    async def leave(self) -> None:
        """Leave the innermost block."""
        innermost = self.entered.pop()

        async def on_loop(_: Any) -> None:
            await innermost.__aexit__(None, None, None)

        await self.begin(lambda _: innermost.__exit__(None, None, None), on_loop).result()

    async def unsubscribe(self, channels: Any) -> None:
        order = self.begin(
            lambda ws: self.websockets.unsubscribe(ws, channels),
            lambda ws: self.websockets.aunsubscribe(ws, channels),
        )
        await order.result()

    def begin_send(self, data: str | bytes) -> Order:
        return self.begin(lambda ws: ws.send(data), lambda ws: ws.send(data))

    async def send(self, data: str | bytes) -> None:
        await self.begin_send(data).result()

    async def publish(self, data: str | bytes, channels: Any, **options: Any) -> None:
        """The view publishes, with the twin that is its kind's."""
        order = self.begin(
            lambda _: self.websockets.publish(data, channels, **options),
            lambda _: self.websockets.apublish(data, channels, **options),
        )
        await order.result()

    # -- the peer -------------------------------------------------------------------------------

    @property
    def stalled(self) -> bool:
        """Whether the server is in the middle of a send that the peer does not take."""
        waiting: int = self.peer._to_peer.statistics().tasks_waiting_send
        return waiting == 1

    async def stall(self, channel: str) -> None:
        """Publish one message that the server begins to send, and does not come to the end of."""
        await wait_until(lambda: not self.stalled)
        assert await self.websockets.apublish("begun", channel) == PublishResult(1)
        await wait_until(lambda: self.stalled)

    async def read(self, number: int = 1) -> list[Any]:
        """The data of the next messages."""
        messages = [await self.peer.get() for _ in range(number)]
        assert {message["type"] for message in messages} <= {"websocket.send"}, messages
        return [message.get("text") or message.get("bytes") for message in messages]

    async def read_all(self) -> list[Any]:
        """Everything that waits: what comes before a mark that the view sends behind it."""
        mark = f"mark {next(self._marks)}"
        sending = self.begin_send(mark)
        found: list[Any] = []
        while (data := (await self.read())[0]) != mark:
            found.append(data)
        await sending.result()
        return found


class Stage:
    """An application whose views are puppets, and the driver's side of it."""

    def __init__(self, app: Any, kind: str, **settings: Any) -> None:
        app.config.update(settings)
        self.kind = kind
        self.websockets = WebSockets(app)
        self.puppets: dict[int, Puppet] = {}
        self.asgi = self.websockets.asgi_app(app)
        self._numbers = count()
        if kind == "sync":

            @self.websockets.route("/<int:number>")
            def view(ws: Any, number: int) -> None:
                self.puppets[number].view(ws)

        else:

            @self.websockets.route("/<int:number>")
            async def aview(ws: Any, number: int) -> None:
                await self.puppets[number].aview(ws)

    @asynccontextmanager
    async def puppet(self, socket_messages: float = 0) -> AsyncIterator[Puppet]:
        """One connection, accepted; its peer reads when the test says so."""
        number = next(self._numbers)
        puppet = self.puppets[number] = Puppet(self.websockets, self.kind)
        puppet._rang = anyio.Event()
        path = f"/{number}"
        async with connection(self.asgi, path, socket_messages=socket_messages) as peer:
            puppet.peer = peer
            assert await peer.get_status() == 101
            try:
                yield puppet
            finally:
                puppet.stop()

    async def publish(self, messages: Iterable[str], channels: Any) -> list[int]:
        """Publish on the loop; return for each message how many outboxes took it."""
        return [(await self.websockets.apublish(data, channels)).local for data in messages]


@pytest.fixture(params=["sync", "async"])
def stage(request, app):
    """A stage for either kind of view, with these settings."""

    def make(**settings: Any) -> Stage:
        return Stage(app, request.param, **settings)

    return make


def numbers(*bounds: int) -> list[str]:
    return [str(number) for number in range(*bounds)]


def counted(websockets: WebSockets) -> dict[str, int]:
    stats = websockets.stats()
    return {
        policy: getattr(stats, f"dropped_{policy.removeprefix('drop_')}") for policy in DROPPING
    }


def only(policy: str, number: int) -> dict[str, int]:
    return {name: number if name == policy else 0 for name in DROPPING}


# --- Each policy, in messages


def test_drop_oldest_keeps_the_newest(run, stage):
    """The oldest waiting message makes room for each new one, and all that is dropped counts."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=5)

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter("a", "drop_oldest")
            await puppet.stall("a")
            assert await stage.publish(numbers(20), "a") == [1] * 20
            stats = stage.websockets.stats()
            assert (stats.outbox_messages, stats.closed_slow) == (5, 0)
            assert (stats.published, stats.delivered) == (21, 21)
            assert counted(stage.websockets) == only("drop_oldest", 16)
            assert subscription.dropped == 16
            assert await puppet.read_all() == ["begun", *numbers(16, 20)]

    run(main)


def test_drop_newest_keeps_the_first(run, stage):
    """What does not fit is dropped, what waits stays; the drops count and are not delivered."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=5)

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter("a", "drop_newest")
            await puppet.stall("a")
            assert await stage.publish(numbers(20), "a") == [1] * 4 + [0] * 16
            stats = stage.websockets.stats()
            assert (stats.outbox_messages, stats.closed_slow) == (5, 0)
            assert (stats.published, stats.delivered) == (21, 5)
            assert counted(stage.websockets) == only("drop_newest", 16)
            assert subscription.dropped == 16
            assert await puppet.read_all() == ["begun", *numbers(4)]

    run(main)


def test_latest_keeps_the_newest_of_each_channel(run, stage):
    """One message for each channel waits, the newest, behind what came before it."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=5)

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter(["a", "b", "c"], "latest")
            await puppet.stall("a")
            for number in range(10):
                assert await stage.publish([f"a{number}"], "a") == [1]
                assert await stage.publish([f"b{number}"], "b") == [1]
            assert await stage.publish(["c", "a10"], "c") == [1, 1]
            assert await stage.publish(["a11"], "a") == [1]
            stats = stage.websockets.stats()
            assert (stats.outbox_messages, stats.closed_slow) == (4, 0)
            assert (stats.published, stats.delivered) == (24, 24)
            assert counted(stage.websockets) == only("latest", 20)
            assert subscription.dropped == 20
            assert await puppet.read_all() == ["begun", "b9", "a10", "a11"]

    run(main)


def test_latest_has_no_room_for_one_more_channel(run, stage):
    """A message that does not fit because of others is dropped; one that takes a place is not."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=3)

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter(["a", "b", "c"], "latest")
            await puppet.stall("a")
            assert await stage.publish(["a0"], "a") == [1]
            assert await stage.publish(["b0"], "b") == [1]
            assert await stage.publish(["c0"], "c") == [0]
            assert await stage.publish(["a1"], "a") == [1]
            assert subscription.dropped == 2
            assert await puppet.read_all() == ["begun", "b0", "a1"]

    run(main)


def test_close_says_1013(run, stage):
    """on_slow="close": the message that does not fit closes the connection; what waits is gone."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=5)

    async def main():
        async with stage.puppet() as puppet:
            await puppet.enter("a")
            await puppet.stall("a")
            assert await stage.publish(numbers(6), "a") == [1] * 4 + [0] * 2
            assert (puppet.ws.close_code, puppet.ws.close_reason) == (1013, "slow consumer")
            with pytest.raises(ConnectionClosed) as caught:
                await puppet.send("late")
            assert (caught.value.code, caught.value.reason) == (1013, "slow consumer")
            stats = stage.websockets.stats()
            assert (stats.closed_slow, stats.subscriptions) == (1, 0)
            assert counted(stage.websockets) == only("close", 0)
            assert await puppet.read() == ["begun"]
            message = await puppet.peer.get()
            assert message["type"] == "websocket.close"
            assert (message["code"], message["reason"]) == (1013, "slow consumer")

    run(main)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_peer_that_reads_gets_everything(run, stage, policy):
    """No policy drops anything while the peer reads, and each ends with an ordinary close."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=3)

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter(["a", "b"], policy)
            for number in range(0, 60, 2):
                await puppet.send(str(number))
                assert await stage.publish([str(number + 1)], "ab"[number % 4 // 2]) == [1]
                assert await puppet.read(2) == numbers(number, number + 2)
            assert subscription.dropped == 0
            assert counted(stage.websockets) == only(policy, 0)
            puppet.stop()
            assert (await puppet.peer.get())["code"] == 1000

    run(main)


@pytest.mark.parametrize("policy", DROPPING)
def test_dropping_stops_when_the_peer_reads_again(run, stage, policy):
    """Stalled, reading, stalled again: each time the same, and the drops add up."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=4)
    kept = {"drop_oldest": numbers(7, 10), "drop_newest": numbers(3), "latest": ["9"]}[policy]

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter("a", policy)
            for turn in range(1, 4):
                await puppet.stall("a")
                await stage.publish(numbers(10), "a")
                assert subscription.dropped == turn * (10 - len(kept))
                assert await puppet.read_all() == ["begun", *kept]
            assert counted(stage.websockets) == only(policy, subscription.dropped)

    run(main)


@pytest.mark.parametrize("policy", ["", "drop", "CLOSE", "drop-oldest", None, 1])
def test_an_unknown_policy(run, stage, policy):
    """Anything else is a ValueError that names the four, and nothing is subscribed."""
    stage = stage()

    async def main():
        async with stage.puppet() as puppet:
            with pytest.raises(ValueError) as caught:
                await puppet.enter("a", policy)
            assert all(name in str(caught.value) for name in POLICIES)
            assert repr(policy) in str(caught.value)
            await wait_until(lambda: stage.websockets.stats().subscriptions == 0)

    run(main)


# --- Bytes


def test_drop_oldest_drops_as_many_as_it_takes(run, stage):
    """Several small messages make room for a large one, up to the last byte and none too many."""
    stage = stage(WEBSOCKETS_OUTBOX_BYTES=100)

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter("a", "drop_oldest")
            await puppet.stall("a")  # 5 bytes
            small = [letter * 19 for letter in "abcde"]
            assert await stage.publish(small, "a") == [1] * 5  # exactly 100
            assert stage.websockets.stats().outbox_bytes == 100
            assert subscription.dropped == 0
            assert await stage.publish(["x" * 38], "a") == [1]
            assert subscription.dropped == 2
            assert stage.websockets.stats().outbox_bytes == 100
            assert await stage.publish(["y" * 20], "a") == [1]  # one byte more than one of them
            assert subscription.dropped == 4
            expected = ["begun", small[4], "x" * 38, "y" * 20]
            assert await puppet.read_all() == expected

    run(main)


@pytest.mark.parametrize("policy", DROPPING)
def test_one_that_could_not_fit_is_dropped_alone(run, stage, policy):
    """A message that dropping everything would not make room for is dropped, and nothing else."""
    stage = stage(WEBSOCKETS_OUTBOX_BYTES=100)

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter(["a", "b"], policy)
            await puppet.stall("a")
            assert await stage.publish(["kept a"], "a") == [1]
            assert await stage.publish(["kept b"], "b") == [1]
            assert await stage.publish(["x" * 96, "x" * 200], "a") == [0, 0]
            assert subscription.dropped == 2
            assert counted(stage.websockets) == only(policy, 2)
            assert await puppet.read_all() == ["begun", "kept a", "kept b"]

    run(main)


def test_latest_takes_the_bytes_of_the_one_it_replaces(run, stage):
    """A larger message for the channel fits where the one before it lay."""
    stage = stage(WEBSOCKETS_OUTBOX_BYTES=100)

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter(["a", "b"], "latest")
            await puppet.stall("a")
            assert await stage.publish(["a" * 50], "a") == [1]
            assert await stage.publish(["b" * 40], "b") == [1]
            assert await stage.publish(["A" * 55], "a") == [1]  # exactly 100
            assert stage.websockets.stats().outbox_bytes == 100
            assert subscription.dropped == 1
            assert await puppet.read_all() == ["begun", "b" * 40, "A" * 55]

    run(main)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_larger_message_passes_when_the_outbox_is_empty(run, stage, policy):
    """It passes under each policy; what comes behind it has no room until it is gone."""
    stage = stage(WEBSOCKETS_OUTBOX_BYTES=100)
    large, larger = "x" * 101, "y" * 10_000

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter("a", policy)
            for data in (large, larger):
                assert await stage.publish([data], "a") == [1]
                await wait_until(lambda: puppet.stalled)
                assert stage.websockets.stats().outbox_bytes == len(data)
                if policy != "close":
                    assert await stage.publish(["no room"], "a") == [0]
                assert await puppet.read() == [data]
                await wait_until(lambda: stage.websockets.stats().outbox_messages == 0)
            assert subscription.dropped == (0 if policy == "close" else 2)
            assert stage.websockets.stats().closed_slow == 0
            if policy == "close":
                await stage.publish([large], "a")
                await wait_until(lambda: puppet.stalled)
                assert await stage.publish(["no room"], "a") == [0]
                assert puppet.ws.close_code == 1013

    run(main)


def test_bytes_are_counted_as_utf_8(run, stage):
    """Text counts as the bytes that it becomes."""
    stage = stage(WEBSOCKETS_OUTBOX_BYTES=100)

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter("a", "drop_newest")
            await puppet.stall("a")
            assert await stage.publish(["€" * 31, "€"], "a") == [1, 0]  # 5 + 93, and 3 more
            assert subscription.dropped == 1
            assert stage.websockets.stats().outbox_bytes == 98

    run(main)


# --- Whose messages are dropped


@pytest.mark.parametrize("policy", DROPPING)
def test_the_views_own_sends_are_never_dropped(run, stage, policy):
    """Sends lie between the published messages, and all of them arrive, in their order."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=6)
    kept = {
        "drop_oldest": ["send 0", "send 1", "send 2", "8", "9"],
        "drop_newest": ["send 0", "0", "send 1", "1", "send 2"],
        "latest": ["send 0", "send 1", "send 2", "9"],
    }[policy]

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter("a", policy)
            await puppet.stall("a")
            await puppet.send("send 0")
            await stage.publish(["0"], "a")
            await puppet.send("send 1")
            await stage.publish(["1"], "a")
            await puppet.send("send 2")
            await stage.publish(numbers(2, 10), "a")
            assert await puppet.read_all() == ["begun", *kept]
            assert subscription.dropped == 10 - sum(data.isdigit() for data in kept)

    run(main)


def test_nothing_of_its_own_to_drop(run, stage):
    """An outbox full of the view's sends has no room for a published message, and loses none."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=3)

    async def main():
        async with stage.puppet() as puppet:
            taken = [await puppet.enter(policy, policy) for policy in DROPPING]
            for number in range(3):
                await puppet.send(f"send {number}")
            await wait_until(lambda: puppet.stalled)
            for policy in DROPPING:
                assert await stage.publish(["x", "y"], policy) == [0, 0]
            assert [subscription.dropped for subscription in taken] == [2, 2, 2]
            assert counted(stage.websockets) == dict.fromkeys(DROPPING, 2)
            assert await puppet.read_all() == [f"send {number}" for number in range(3)]

    run(main)


def test_each_subscription_drops_its_own(run, stage):
    """Three subscriptions of one connection: none drops what another has queued."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=7)

    async def main():
        async with stage.puppet() as puppet:
            oldest = await puppet.enter("oldest", "drop_oldest")
            newest = await puppet.enter("newest", "drop_newest")
            latest = await puppet.enter("latest", "latest")
            await puppet.stall("newest")
            for number in range(2):
                for channel in ("newest", "oldest", "latest"):
                    assert await stage.publish([f"{channel} {number}"], channel) == [1]
            await puppet.send("send")
            # Six wait and one is begun: it is full.
            for number in range(2, 5):
                assert await stage.publish([f"oldest {number}"], "oldest") == [1]
                assert await stage.publish([f"newest {number}"], "newest") == [0]
                assert await stage.publish([f"latest {number}"], "latest") == [1]
            assert (oldest.dropped, newest.dropped, latest.dropped) == (3, 3, 4)
            assert await puppet.read_all() == [
                *("begun", "newest 0", "newest 1", "send"),
                *("oldest 3", "oldest 4", "latest 4"),
            ]
            assert counted(stage.websockets) == dict(zip(DROPPING, (3, 3, 4), strict=True))

    run(main)


def test_close_is_not_spared_by_anothers_messages(run, stage):
    """Droppable messages of another subscription are not dropped for one that closes."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=3)

    async def main():
        async with stage.puppet() as puppet:
            other = await puppet.enter("oldest", "drop_oldest")
            await puppet.enter("close")
            await puppet.stall("oldest")
            await stage.publish(numbers(2), "oldest")
            assert await stage.publish(["x"], "close") == [0]
            assert puppet.ws.close_code == 1013
            assert other.dropped == 0
            assert counted(stage.websockets) == only("close", 0)

    run(main)


@pytest.mark.parametrize(
    ("first", "second"), [(one, two) for one in POLICIES for two in POLICIES if one != two]
)
def test_two_named_channels_of_two_subscriptions(run, stage, first, second):
    """The message comes once, under the policy of the first named channel subscribed to."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=2)

    async def main():
        async with stage.puppet() as puppet:
            # The order of subscribing is not the order of naming.
            other = await puppet.enter("b", second)
            named_first = await puppet.enter("a", first)
            await puppet.stall("a")
            assert await stage.publish(["once"], ["nobody's", "a", "b", "a"]) == [1]
            taken = first in ("drop_oldest", "latest")
            assert await stage.publish(["more"], ["a", "b"]) == [taken]
            assert other.dropped == 0
            if first == "close":
                assert puppet.ws.close_code == 1013
                return
            assert named_first.dropped == 1
            assert counted(stage.websockets) == only(first, 1)
            assert await puppet.read_all() == ["begun", "more" if taken else "once"]

    run(main)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [("drop_newest", "drop_oldest"), ("latest", "close"), ("drop_oldest", "latest")],
)
def test_the_outermost_policy_holds(run, stage, outer, inner):
    """A nested subscribe changes nothing for a channel already subscribed, only for new ones."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=3)

    async def fill(puppet, channel):
        await puppet.stall(channel)
        await stage.publish(numbers(6), channel)
        return await puppet.read_all()

    kept = {"drop_newest": numbers(2), "drop_oldest": numbers(4, 6), "latest": ["5"]}

    async def main():
        async with stage.puppet() as puppet:
            one = await puppet.enter("a", outer)
            two = await puppet.enter(["a", "b"], inner)
            assert await fill(puppet, "a") == ["begun", *kept[outer]]
            assert (one.dropped, two.dropped) == (6 - len(kept[outer]), 0)
            if inner != "close":
                assert await fill(puppet, "b") == ["begun", *kept[inner]]
                assert two.dropped == 6 - len(kept[inner])
            await puppet.leave()
            assert await fill(puppet, "a") == ["begun", *kept[outer]]
            await puppet.leave()
            assert await stage.publish(["nobody"], ["a", "b"]) == [0]
            # Left entirely, the channel is free for another policy.
            await puppet.enter("a", "latest")
            assert await fill(puppet, "a") == ["begun", "5"]

    run(main)


def test_unsubscribe_and_subscribe_again_takes_the_new_policy(run, stage):
    """After unsubscribe of all levels the next subscribe is the outermost."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=3)

    async def main():
        async with stage.puppet() as puppet:
            before = await puppet.enter(["a", "b"], "drop_newest")
            await puppet.unsubscribe("a")
            after = await puppet.enter("a", "drop_oldest")
            await puppet.stall("a")
            await stage.publish(numbers(5), "a")
            assert (before.dropped, after.dropped) == (0, 3)
            assert await stage.publish(["x"], "b") == [0]
            assert (before.dropped, after.dropped) == (1, 3)
            assert await puppet.read_all() == ["begun", *numbers(3, 5)]
            await puppet.leave()
            assert await stage.publish(["nobody"], "a") == [0]
            assert await stage.publish(["still"], "b") == [1]
            assert await puppet.read() == ["still"]

    run(main)


# --- What was queued before


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", ["leave", "unsubscribe"])
def test_what_was_queued_before_an_unsubscribe_goes_out(run, stage, policy, how):
    """The end of a subscription drops nothing, and stops what is published after it."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=5)

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter(["a", "b"], policy)
            await puppet.stall("a")
            await stage.publish(["queued a"], "a")
            await stage.publish(["queued b"], "b")
            if how == "leave":
                await puppet.leave()
            else:
                await puppet.unsubscribe(["a", "b", "never"])
            assert await stage.publish(numbers(10), ["a", "b"]) == [0] * 10
            assert await puppet.read_all() == ["begun", "queued a", "queued b"]
            assert subscription.dropped == 0
            await wait_until(lambda: stage.websockets.stats().subscriptions == 0)

    run(main)


@pytest.mark.parametrize("policy", DROPPING)
def test_a_new_subscription_does_not_drop_an_older_ones_messages(run, stage, policy):
    """What an ended subscription has queued is no longer anybody's to drop."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=4)

    async def main():
        async with stage.puppet() as puppet:
            old = await puppet.enter("a", policy)
            await puppet.stall("a")
            await stage.publish(["old"], "a")
            await puppet.leave()
            new = await puppet.enter("a", policy)
            await stage.publish(numbers(5), "a")
            kept = {"drop_oldest": numbers(3, 5), "drop_newest": numbers(2), "latest": ["4"]}
            assert await puppet.read_all() == ["begun", "old", *kept[policy]]
            assert (old.dropped, new.dropped) == (0, 5 - len(kept[policy]))

    run(main)


@pytest.mark.parametrize("policy", DROPPING)
def test_the_goodbye_comes_behind_what_was_queued(run, stage, policy):
    """A view that returns while messages wait: they go out, and then the close."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=4)

    async def main():
        async with stage.puppet() as puppet:
            await puppet.enter(["a", "b"], policy)
            await puppet.stall("a")
            await stage.publish(["queued a"], "a")
            await stage.publish(["queued b"], "b")
            puppet.stop()
            await wait_until(lambda: stage.websockets.stats().subscriptions == 0)
            assert await puppet.read(3) == ["begun", "queued a", "queued b"]
            assert (await puppet.peer.get())["code"] == 1000

    run(main)


@pytest.mark.parametrize("policy", DROPPING)
def test_a_peer_that_leaves_while_messages_wait(run, stage, policy):
    """Nothing is left of its outbox, and the view gets ConnectionClosed."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=4)

    async def main():
        async with stage.puppet() as other:
            await other.enter("other", policy)
            async with stage.puppet() as puppet:
                await puppet.enter("a", policy)
                await puppet.stall("a")
                await stage.publish(numbers(10), "a")
                assert stage.websockets.stats().outbox_messages > 1
                puppet.peer.leave(1001)
                await wait_until(lambda: puppet.ws.closed)
                with pytest.raises(ConnectionClosed) as caught:
                    await puppet.send("late")
                assert caught.value.code == 1001
                assert await stage.publish(numbers(3), "a") == [0] * 3
            stats = stage.websockets.stats()
            assert (stats.outbox_messages, stats.outbox_bytes) == (0, 0)
            assert stats.subscriptions == 1

    run(main)


# --- The view's own sends


@pytest.mark.parametrize("policy", DROPPING)
def test_a_send_waits_for_room_in_an_outbox_of_published_messages(run, stage, policy):
    """It neither fails nor pushes one out; it goes on when the peer reads."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=4, WEBSOCKETS_SEND_TIMEOUT=TIMEOUT)

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter(["a", "b", "c"], policy)
            await puppet.stall("a")
            for channel in "abc":
                assert await stage.publish([channel], channel) == [1]
            sending = puppet.begin_send("send")
            for _ in range(20):
                await anyio.sleep(0.002)
                assert not sending.done.is_set()
            assert stage.websockets.stats().outbox_messages == 4
            assert await puppet.read(5) == ["begun", "a", "b", "c", "send"]
            await sending.result()
            assert subscription.dropped == 0

    run(main)


@pytest.mark.parametrize("policy", DROPPING)
def test_a_send_is_not_starved_by_publishes(run, stage, policy):
    """While the peer reads, a send gets its turn, though a publish takes every place at once."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=4, WEBSOCKETS_SEND_TIMEOUT=4)

    async def main():
        async with stage.puppet() as puppet:
            channels = ["a", "b", "c", "d"]
            await puppet.enter(channels, policy)
            await puppet.stall("a")
            published = count()

            async def refill():
                for channel in channels:
                    await stage.publish([str(next(published))], channel)

            await refill()
            sending = puppet.begin_send("send")
            await anyio.sleep(0.05)
            assert not sending.done.is_set()
            read: list[Any] = []
            while "send" not in read and len(read) < 40:
                read += await puppet.read()
                await refill()
                await anyio.sleep(0.002)
            assert "send" in read
            await sending.result()

    run(main)


def test_latest_is_the_newest_while_a_send_waits(run, stage):
    """A longer message for the channel takes its place then too: the peer gets the last value."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=3, WEBSOCKETS_SEND_TIMEOUT=TIMEOUT)

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter("a", "latest")
            await puppet.stall("a")
            assert await stage.publish(["9"], "a") == [1]
            await puppet.send("send 1")
            sending = puppet.begin_send("send 2")
            await wait_until(lambda: puppet.ws.link._blocked)
            assert await stage.publish(["10", "100"], "a") == [1, 1]
            assert subscription.dropped == 2
            assert await puppet.read(4) == ["begun", "send 1", "100", "send 2"]
            await sending.result()

    run(main)


def test_drop_oldest_drops_no_more_than_it_must_while_a_send_waits(run, stage):
    """The oldest message makes room for a longer one, if that is all it takes."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=4, WEBSOCKETS_SEND_TIMEOUT=TIMEOUT)

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter("a", "drop_oldest")
            await puppet.stall("a")
            assert await stage.publish(["1", "2", "3"], "a") == [1, 1, 1]
            sending = puppet.begin_send("send")
            await wait_until(lambda: puppet.ws.link._blocked)
            assert await stage.publish(["four"], "a") == [1]
            assert subscription.dropped == 1
            assert await puppet.read(5) == ["begun", "2", "3", "four", "send"]
            await sending.result()

    run(main)


def test_a_send_that_has_waited_leaves_nothing_behind(run, stage):
    """One that found room at its deadline, above the low mark, no longer keeps others out."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=6, WEBSOCKETS_SEND_TIMEOUT=1)

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter("a", "drop_newest")
            await puppet.stall("a")
            assert await stage.publish(numbers(5), "a") == [1] * 5
            sending = puppet.begin_send("send")
            await wait_until(lambda: puppet.ws.link._blocked)
            # The server may wait as long for the peer: so the peer takes one halfway.
            await anyio.sleep(0.5)
            assert await puppet.read() == ["begun"]
            await sending.result()  # it goes on at the deadline: the outbox is not half empty
            assert await puppet.read() == ["0"]
            await wait_until(lambda: stage.websockets.stats().outbox_messages == 5)
            assert await stage.publish(["5"], "a") == [1]
            assert subscription.dropped == 0
            assert await puppet.read(6) == ["1", "2", "3", "4", "send", "5"]

    run(main)


@pytest.mark.parametrize("policy", ["drop_oldest", "latest"])
def test_i6_dropping_for_ever_takes_no_memory(run, stage, policy):
    """What was dropped leaves no place behind that adds up, and the order stays."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=5)

    async def main():
        async with stage.puppet() as puppet:
            await puppet.enter("a", policy)
            await puppet.stall("a")
            await stage.publish(["0"], "a")
            await puppet.send("send 0")
            await stage.publish(numbers(1, 500), "a")
            if policy == "latest":  # under drop_oldest it would wait for room
                await puppet.send("send 1")
            await stage.publish(numbers(500, 1000), "a")
            assert puppet.ws.link.statistics()["outbound"].current_buffer_used <= 2 * 5
            kept = {
                "drop_oldest": ["send 0", *numbers(997, 1000)],
                "latest": ["send 0", "send 1", "999"],
            }
            assert await puppet.read_all() == ["begun", *kept[policy]]

    run(main)


@pytest.mark.parametrize("policy", DROPPING)
def test_i11_a_send_waits_no_longer_than_the_send_timeout(run, stage, policy):
    """With a peer that takes nothing the connection is gone when the time has passed."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=3, WEBSOCKETS_SEND_TIMEOUT=0.3)

    async def main():
        async with stage.puppet() as puppet:
            await puppet.enter(["a", "b"], policy)
            await puppet.stall("a")
            for channel in "ab":
                assert await stage.publish([channel], channel) == [1]
            with anyio.fail_after(0.3 + 2):
                with pytest.raises(ConnectionClosed) as caught:
                    await puppet.send("send")
            assert caught.value.code == 1006
            assert stage.websockets.stats().closed_slow == 0

    run(main)


@pytest.mark.parametrize("policy", POLICIES)
def test_sends_and_publishes_of_one_view_keep_their_order(run, stage, policy):
    """send, publish, send by one view arrive in that order under every policy."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=1000)

    async def main():
        async with stage.puppet() as puppet:
            await puppet.enter([str(number) for number in range(0, 90, 3)], policy)
            for number in range(0, 90, 3):  # a channel for each, so that latest replaces none
                await puppet.send(str(number))
                await puppet.publish(str(number + 1), str(number))
                await puppet.send(str(number + 2))
            assert await puppet.read_all() == numbers(90)

    run(main)


@pytest.mark.parametrize("policy", DROPPING)
def test_order_around_drops(run, stage, policy):
    """A message that was published after a send does not come before it because of a drop."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=4)
    kept = {
        "drop_oldest": ["send", "2", "3"],
        "drop_newest": ["0", "send", "1"],
        "latest": ["send", "3"],
    }

    async def main():
        async with stage.puppet() as puppet:
            await puppet.enter("a", policy)
            await puppet.stall("a")
            await stage.publish(["0"], "a")
            await puppet.send("send")
            await stage.publish(numbers(1, 4), "a")
            assert await puppet.read_all() == ["begun", *kept[policy]]

    run(main)


# --- Others


def test_others_miss_nothing(run, stage):
    """Four peers that do not read, one for each policy, cost the one that reads nothing."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=5)

    async def main():
        async with AsyncExitStack() as stack:
            slow = [await stack.enter_async_context(stage.puppet()) for _ in POLICIES]
            quick = await stack.enter_async_context(stage.puppet())
            for puppet, policy in zip(slow, POLICIES, strict=True):
                await puppet.enter("a", policy)
            await quick.enter("a")
            for number in range(50):
                await stage.websockets.apublish(str(number), "a")
                assert await quick.read() == [str(number)]
                if number == 0:
                    await wait_until(lambda: all(puppet.stalled for puppet in slow))
                # The next is published once the server has seen that this one was read.
                await wait_until(lambda: not quick.stalled)
            closed, oldest, newest, latest = slow
            assert closed.ws.close_code == 1013
            assert await oldest.read_all() == ["0", *numbers(46, 50)]
            assert await newest.read_all() == numbers(5)
            assert await latest.read_all() == ["0", "49"]
            stats = stage.websockets.stats()
            assert (stats.closed_slow, stats.published) == (1, 50)
            dropped = {"drop_oldest": 45, "drop_newest": 45, "latest": 48}
            assert counted(stage.websockets) == dropped

    run(main)


def test_exclude(run, stage):
    """exclude= takes one connection or several of either kind, from an iterator too."""
    stage = stage()

    async def main():
        async with stage.puppet() as one, stage.puppet() as two, stage.puppet() as three:
            puppets = [one, two, three]
            for puppet in puppets:
                await puppet.enter("a")
            publish, publish_json = stage.websockets.apublish, stage.websockets.apublish_json
            sockets = [puppet.ws for puppet in puppets]
            assert await publish("not one", "a", exclude=one.ws) == PublishResult(2)
            assert await publish("three", "a", exclude=sockets[:2]) == PublishResult(1)
            generator = (ws for ws in sockets[1:])
            assert await publish_json(["one"], ["a"], exclude=generator) == PublishResult(1)
            assert await publish_json(None, "a", exclude=sockets) == PublishResult(0)
            await one.publish("from one", "a", exclude=one.ws)
            assert await publish("end", ["a", "a"], exclude=()) == PublishResult(3)
            assert await one.read(2) == ['["one"]', "end"]
            assert await two.read(3) == ["not one", "from one", "end"]
            assert await three.read(4) == ["not one", "three", "from one", "end"]

    run(main)


def test_an_excluded_connection_drops_nothing(run, stage):
    """What is not for a connection does not touch its outbox."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=2)

    async def main():
        async with stage.puppet() as puppet:
            subscription = await puppet.enter("a", "drop_oldest")
            await puppet.stall("a")
            await stage.publish(["kept"], "a")
            result = await stage.websockets.apublish("x", "a", exclude=puppet.ws)
            assert result == PublishResult(0)
            assert subscription.dropped == 0
            assert await puppet.read_all() == ["begun", "kept"]

    run(main)


def test_the_limit_of_channels(run, stage):
    """One channel above WEBSOCKETS_MAX_CHANNELS_PER_CONNECTION nothing at all is subscribed."""
    stage = stage(WEBSOCKETS_MAX_CHANNELS_PER_CONNECTION=3)

    async def main():
        async with stage.puppet() as puppet, stage.puppet() as other:
            await puppet.enter(["a", "b"], "latest")
            with pytest.raises(UsageError, match="3"):
                await puppet.enter(["b", "c", "d"], "drop_oldest")
            await wait_until(lambda: stage.websockets.stats().subscriptions == 2)
            assert await stage.publish(["no"], ["c", "d"]) == [0]
            await puppet.enter(["a", "b", "c"], "drop_oldest")  # exactly three
            with pytest.raises(UsageError):
                await puppet.enter("d")
            await wait_until(lambda: stage.websockets.stats().subscriptions == 3)
            await other.enter(["d", "e", "f"])  # the limit is each connection's own
            await puppet.leave()
            await wait_until(lambda: stage.websockets.stats().subscriptions == 5)
            await puppet.enter("d")
            assert await stage.publish(["yes"], "d") == [2]
            assert await puppet.read() == ["yes"]

    run(main)


# --- Threads and the loop


def test_the_wrong_with_in_a_sync_view(run, app):
    """``async with`` in a view's thread, in a loop of its own, raises WrongThread."""
    websockets = WebSockets(app)
    caught: list[Any] = []

    @websockets.route("/ws")
    def view(ws):
        async def enter():
            async with websockets.subscribe(ws, "a"):
                raise AssertionError("entered")

        with pytest.raises(WrongThread) as error:
            asyncio.run(enter())
        caught.append(str(error.value))
        ws.send(str(websockets.stats().subscriptions))

    async def main():
        async with connection(websockets.asgi_app(app), "/ws") as peer:
            assert await peer.get_status() == 101
            assert (await peer.get())["text"] == "0"

    run(main)
    assert len(caught) == 1


def test_the_wrong_with_in_an_async_view(run, app):
    """``with`` on the loop raises WrongThread, and says ``async with``."""
    websockets = WebSockets(app)

    @websockets.route("/ws")
    async def view(ws: AsyncWebSocket) -> None:
        await ws.accept()
        with (
            pytest.raises(WrongThread, match="async with"),
            websockets.subscribe(ws, "a", on_slow="latest"),
        ):
            raise AssertionError("entered")
        await ws.send(str(websockets.stats().subscriptions))

    async def main():
        async with connection(websockets.asgi_app(app), "/ws") as peer:
            assert await peer.get_status() == 101
            assert (await peer.get())["text"] == "0"

    run(main)


def test_dropped_is_read_in_the_block(websockets, client):
    """The documented way: ``with ... as subscription``, read on the view's own thread."""

    @websockets.route("/ws")
    def view(ws):
        with websockets.subscribe(ws, "a", on_slow="drop_newest") as subscription:
            assert isinstance(subscription, Subscription)
            for _ in ws.iter_data():
                ws.send_json(subscription.dropped)

    with client.websocket_connect("/ws") as ws:
        for _ in range(3):
            ws.send("?")
            assert ws.receive_json() == 0


def test_many_publishers_and_senders(run, stage):
    """Under load from five threads nothing overtakes, and every message is received or counted."""
    stage = stage(WEBSOCKETS_OUTBOX_MESSAGES=8, WEBSOCKETS_SEND_TIMEOUT=TIMEOUT)
    each = 300

    async def main():
        async with stage.puppet() as puppet:
            taken = {policy: await puppet.enter(policy, policy) for policy in DROPPING}
            failures: list[BaseException] = []

            def publish(policy):
                for number in range(each):
                    stage.websockets.publish(f"{policy} {number}", policy)

            def thread(target, *arguments):
                def guarded():
                    try:
                        target(*arguments)
                    except BaseException as error:
                        failures.append(error)

                made = threading.Thread(target=guarded)
                made.start()
                return made

            threads = [thread(publish, policy) for policy in DROPPING]
            sends = deque(puppet.begin_send(f"send {number}") for number in range(each))
            received: list[str] = []
            most = 0
            while not received or received[-1] != f"send {each - 1}":
                received += await puppet.read()
                most = max(most, stage.websockets.stats().outbox_messages)
            for sent in sends:
                await sent.result()
            await wait_until(lambda: not any(made.is_alive() for made in threads))
            assert not failures
            await wait_until(lambda: stage.websockets.stats().published == 3 * each)
            received += await puppet.read_all()
            assert most <= 8
            for name in ("send", *DROPPING):
                found = [int(data.split()[1]) for data in received if data.split()[0] == name]
                assert found == sorted(set(found))
                lost = each - len(found)
                assert lost == (0 if name == "send" else taken[name].dropped)
            assert counted(stage.websockets) == {name: taken[name].dropped for name in DROPPING}

    run(main)
