"""Several connections in several channels, against one outbox model for each of them.

After every step of a program each outbox holds what its model says, every drop is counted once,
and the hub knows of exactly those subscriptions that there are. The storm at the end has threads
publish, subscribe and leave at once, and compares their records.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    precondition,
    rule,
)

from flask_websockets import ConnectionClosed

from ..test_channels_model import BYTES, MESSAGES, Block, Item, Model, channels
from ..test_channels_model import size as some_size
from ..test_slow_consumers import DROPPING, POLICIES, counted
from .profiles import profile
from .world import PATIENCE, Client, Order, World, world

# --- The machine

#: Those that drop are more often right where the outbox is full.
policies = st.sampled_from([*DROPPING, *DROPPING, "close"])


@dataclass(eq=False)
class Subscriber:
    """A connection, and the model of its outbox."""

    client: Client
    model: Model = field(default_factory=Model)
    blocks: dict[Block, Any] = field(default_factory=dict)
    end: tuple[int, str] | None = None

    @property
    def there(self) -> list[Item]:
        return ([self.model.begun] if self.model.begun else []) + self.model.waiting


class HubMachine(RuleBasedStateMachine):
    """Up to five connections in four channels."""

    world: World
    there = Bundle("there")

    @initialize(
        target=there,
        kind=st.sampled_from(["sync", "async"]),
        backend=st.sampled_from(["asyncio", "trio"]),
        first=st.lists(st.tuples(channels, policies), min_size=1, max_size=3),
    )
    def begin(self, kind: str, backend: str, first: list[tuple[tuple[str, ...], str]]) -> Any:
        self.world = World(
            kind, backend, WEBSOCKETS_OUTBOX_MESSAGES=MESSAGES, WEBSOCKETS_OUTBOX_BYTES=BYTES
        )
        self.everybody: list[Subscriber] = []
        self.published = self.closed_slow = self.number = 0
        return multiple(*[self.connects(names, on_slow) for names, on_slow in first])

    def data(self, size: int) -> str:
        self.number += 1
        return f"{self.number:04}".ljust(size, "x")

    @property
    def open(self) -> list[Subscriber]:
        return [each for each in self.everybody if each.end is None]

    # -- connections -------------------------------------------------------------------------------

    @precondition(lambda self: len(self.open) < 5)
    @rule(target=there, names=channels, on_slow=policies)
    def connects(self, names: tuple[str, ...], on_slow: str) -> Subscriber:
        subscriber = Subscriber(self.world.connect())
        self.everybody.append(subscriber)
        self.enters(subscriber, names, on_slow)
        return subscriber

    @rule(subscriber=consumes(there), code=st.sampled_from([1000, 1001, 1006, 4000]))
    def disconnects(self, subscriber: Subscriber, code: int) -> None:
        if subscriber.end is None:
            subscriber.client.leave(code)
            self.world.wait_for(lambda: subscriber.client.ws.closed, "the view knows of no end")
            self.ends(subscriber, code, "")
            subscriber.client.stop()
            subscriber.model.begun, subscriber.model.waiting = None, []
            self.compare()

    @rule(subscriber=consumes(there), code=st.sampled_from([1000, 4000]))
    def view_closes(self, subscriber: Subscriber, code: int) -> None:
        if subscriber.end is None:
            subscriber.client.ask("close", code, "enough", second=True)
            self.ends(subscriber, code, "enough")
            subscriber.client.stop()
            self.hear_the_end(subscriber)
            self.compare()

    def ends(self, subscriber: Subscriber, code: int, reason: str) -> None:
        subscriber.end = code, reason
        subscriber.model.subscribed.clear()

    # -- channels ----------------------------------------------------------------------------------

    @rule(subscriber=there, names=channels, on_slow=policies)
    def enters(self, subscriber: Subscriber, names: tuple[str, ...], on_slow: str) -> None:
        if subscriber.end is not None:
            with pytest.raises(ConnectionClosed) as caught:
                subscriber.client.enter(names, on_slow)
            assert (caught.value.code, caught.value.reason) == subscriber.end
            return
        block = Block(names, on_slow)
        subscriber.model.enter(block)
        subscriber.blocks[block] = subscriber.client.enter(names, on_slow)
        self.compare()

    @rule(subscriber=there)
    def leaves(self, subscriber: Subscriber) -> None:
        if subscriber.model.blocks:
            subscriber.client.leave_block()
            if subscriber.end is None:
                subscriber.model.leave()
            else:
                subscriber.model.ended.append(subscriber.model.blocks.pop())
            self.compare()

    @rule(subscriber=there, names=channels)
    def unsubscribes(self, subscriber: Subscriber, names: tuple[str, ...]) -> None:
        subscriber.client.unsubscribe(names)
        subscriber.model.unsubscribe(names)
        self.compare()

    # -- messages ----------------------------------------------------------------------------------

    @rule(
        names=channels,
        sizes=st.lists(some_size, min_size=1, max_size=5),
        excluded=st.sets(st.integers(0, 4), max_size=2),
        where=st.sampled_from(["loop", "thread"]),
    )
    def is_published(
        self, names: tuple[str, ...], sizes: list[int], excluded: set[int], where: str
    ) -> None:
        for size in sizes:
            data = self.data(size)
            without = [each for number, each in enumerate(self.everybody) if number in excluded]
            local = self.distribute(data, names, without)
            exclude = [each.client.ws for each in without]
            if where == "loop":
                assert self.world.publish_here(data, names, exclude=exclude) == local
            else:
                self.world.websockets.publish(data, names, exclude=exclude)
            self.expect_slow()
            self.compare()

    @rule(subscriber=there, names=channels, size=some_size, others=st.booleans())
    def view_publishes(
        self, subscriber: Subscriber, names: tuple[str, ...], size: int, others: bool
    ) -> None:
        data = self.data(size)
        self.distribute(data, names, [subscriber] if others else [])
        exclude = subscriber.client.ws if others else ()
        subscriber.client.publish(data, names, exclude=exclude)
        self.expect_slow()
        self.compare()

    def distribute(self, data: str, names: Sequence[str], without: Sequence[Subscriber]) -> int:
        self.published += 1
        return sum(
            subscriber.model.publish(data, names)
            for subscriber in self.open
            if subscriber not in without
        )

    def expect_slow(self) -> None:
        for subscriber in self.open:
            if subscriber.model.closed:
                self.closed_slow += 1
                self.ends(subscriber, 1013, "slow consumer")
                subscriber.model.waiting = []
                self.hear_the_end(subscriber)

    @rule(subscriber=there, size=some_size)
    def view_sends(self, subscriber: Subscriber, size: int) -> None:
        if subscriber.end is None and subscriber.model.fits(size):
            data = self.data(size)
            subscriber.model.send(data)
            subscriber.client.ask("send", data)
            self.compare()

    @rule(subscriber=there, number=st.integers(1, 5))
    def peer_reads(self, subscriber: Subscriber, number: int) -> None:
        if subscriber.end is None:
            for _ in range(min(number, len(subscriber.there))):
                subscriber.model.read()
                assert subscriber.client.hear()["text"] == subscriber.model.received[-1]
            self.compare()

    # -- comparing ---------------------------------------------------------------------------------

    def hear_the_end(self, subscriber: Subscriber) -> None:
        """What is still on its way to the peer, and then the goodbye."""
        said = len(subscriber.client.heard)
        subscriber.client.hear_until_goodbye()
        *messages, last = subscriber.client.heard[said:]
        assert [each["text"] for each in messages] == [item.data for item in subscriber.there]
        assert last["type"] == "websocket.close"
        assert (last["code"], last["reason"]) == subscriber.end
        subscriber.model.begun, subscriber.model.waiting = None, []

    def compare(self) -> None:
        everyone = [block for each in self.everybody for block in each.blocks]
        names = {name for each in self.open for name in each.model.subscribed}
        expected = {
            "published": self.published,
            "delivered": sum(each.model.delivered for each in self.everybody),
            "closed_slow": self.closed_slow,
            "channels": len(names),
            "subscriptions": sum(len(each.model.subscribed) for each in self.open),
            "dropped": {
                policy: sum(block.dropped for block in everyone if block.on_slow == policy)
                for policy in DROPPING
            },
            "blocks": [block.dropped for block in everyone],
            "outboxes": [
                (len(each.there), sum(item.size for item in each.there), bool(each.there))
                for each in self.open
            ],
            "ends": [each.end for each in self.everybody],
        }
        self.world.settle(self.picture, expected)

    def picture(self) -> dict[str, Any]:
        """Loop."""
        stats = self.world.websockets.stats()
        for each in self.open:
            _, _, messages, size = each.client.ws.link.depths
            assert messages <= MESSAGES and (size <= BYTES or messages == 1)
        return {
            "published": stats.published,
            "delivered": stats.delivered,
            "closed_slow": stats.closed_slow,
            "channels": stats.channels,
            "subscriptions": stats.subscriptions,
            "dropped": counted(self.world.websockets),
            "blocks": [
                subscription.dropped
                for each in self.everybody
                for subscription in each.blocks.values()
            ],
            "outboxes": [
                (*each.client.ws.link.depths[2:], each.client.stalled) for each in self.open
            ],
            "ends": [
                (each.client.ws.close_code, each.client.ws.close_reason)
                if each.client.ws.closed
                else None
                for each in self.everybody
            ],
        }

    def teardown(self) -> None:
        if not hasattr(self, "everybody"):
            return
        try:
            for subscriber in self.open:  # a slow peer becomes a fast one
                subscriber.client.stop()
                subscriber.end = 1000, ""
                self.hear_the_end(subscriber)
        finally:
            self.world.close()


HubMachine.TestCase.settings = profile(80, steps=40, shrink=False)


class TestHub(HubMachine.TestCase):  # type: ignore[misc, valid-type]
    """Random programs: each outbox is its model's, and the hub forgets everybody."""


# --- The storm

#: Reads that nobody numbers: one stamp is taken at a time.
Clock = partial(next, itertools.count())


@dataclass
class Published:
    """One message: when its publish began and ended, by whom and where to."""

    text: str
    names: tuple[str, ...]
    began: int
    ended: int = 1 << 60


@dataclass
class Stay:
    """One subscription: from when to when it held for certain, and at most."""

    names: tuple[str, ...]
    entering: int
    entered: int = 1 << 60
    leaving: int = 1 << 60
    left: int = 1 << 60
    subscription: Any = None


class Storm:
    """Publishers in threads and on the loop; subscribers that come, go and read as they like."""

    def __init__(self, kind: str, backend: str, subscribers: int, socket_messages: int) -> None:
        self.world = World(
            kind, backend, WEBSOCKETS_OUTBOX_MESSAGES=20, WEBSOCKETS_OUTBOX_BYTES=10_000
        )
        self.clients = [self.world.connect(socket_messages) for _ in range(subscribers)]
        self.published: list[Published] = []
        self.stays: dict[Client, list[Stay]] = {client: [] for client in self.clients}

    # -- everybody ---------------------------------------------------------------------------------

    def publish(self, publisher: str, names: list[tuple[str, ...]]) -> None:
        """A thread."""
        for number, where in enumerate(names):
            one = Published(f"{publisher}{number:03}", where, Clock())
            self.published.append(one)
            self.world.websockets.publish(one.text, where)
            one.ended = Clock()

    async def apublish(self, publisher: str, names: list[tuple[str, ...]]) -> None:
        for number, where in enumerate(names):
            one = Published(f"{publisher}{number:03}", where, Clock())
            self.published.append(one)
            await self.world.websockets.apublish(one.text, where)
            one.ended = Clock()
            await anyio.sleep(0)

    def comes_and_goes(
        self, client: Client, stays: list[tuple[tuple[str, ...], str, int]]
    ) -> Order:
        """The view's program: it subscribes, stays for so many turns, and leaves."""
        websockets = self.world.websockets

        def on_thread(ws: Any) -> None:
            for names, on_slow, turns in stays:
                stay = Stay(names, Clock())
                self.stays[client].append(stay)
                stay.subscription = websockets.subscribe(ws, names, on_slow=on_slow)  # type: ignore[arg-type]
                try:
                    with stay.subscription:
                        stay.entered = Clock()
                        for _ in range(turns):
                            ws.wait_closed(0.0005)
                        stay.leaving = Clock()
                    stay.left = Clock()
                except ConnectionClosed:
                    return

        async def on_loop(ws: Any) -> None:
            for names, on_slow, turns in stays:
                stay = Stay(names, Clock())
                self.stays[client].append(stay)
                stay.subscription = websockets.subscribe(ws, names, on_slow=on_slow)  # type: ignore[arg-type]
                try:
                    async with stay.subscription:
                        stay.entered = Clock()
                        for _ in range(turns):
                            await anyio.sleep(0)
                        stay.leaving = Clock()
                    stay.left = Clock()
                except ConnectionClosed:
                    return

        return Order(on_thread, on_loop)

    async def reads(self, client: Client, pause: int) -> None:
        with anyio.fail_after(2 * PATIENCE):
            while True:
                for _ in range(pause):
                    await anyio.sleep(0)
                try:
                    client.heard.append(await client.peer._from_app.receive())
                except anyio.EndOfStream:
                    return

    def run(
        self,
        publishers: list[list[tuple[str, ...]]],
        programs: list[list[tuple[tuple[str, ...], str, int]]],
        pauses: list[int],
    ) -> None:
        portal = self.world.portal
        readers = [
            portal.start_task_soon(self.reads, client, pause)
            for client, pause in zip(self.clients, pauses, strict=False)
        ]
        first, *others = publishers
        with ThreadPoolExecutor(max(1, len(others))) as threads:
            orders = [
                self.comes_and_goes(client, program)
                for client, program in zip(self.clients, programs, strict=False)
            ]
            for client, order in zip(self.clients, orders, strict=False):
                client.view.tell(order)
            running = [portal.start_task_soon(self.apublish, "L", first)]
            running += [
                threads.submit(self.publish, "ABC"[number], names)
                for number, names in enumerate(others)
            ]
            for each in [*running, *(order.future for order in orders)]:
                each.result(2 * PATIENCE)
        for client in self.clients:
            client.stop()
        for reader in readers:
            reader.result(2 * PATIENCE)
        self.check()

    # -- afterwards --------------------------------------------------------------------------------

    def check(self) -> None:
        stats = self.world.websockets.stats()
        assert stats.published == len(self.published)
        heard = {
            client: [each["text"] for each in client.heard if each["type"] == "websocket.send"]
            for client in self.clients
        }
        dropped = 0
        for client, texts in heard.items():
            assert len(set(texts)) == len(texts), "something came twice"
            for publisher in "LABC":
                own = [text for text in texts if text[0] == publisher]
                assert own == sorted(own), "one publisher's messages changed places"
            self.check_stays(client, set(texts))
            dropped += sum(stay.subscription.dropped for stay in self.stays[client])
        assert dropped == sum(counted(self.world.websockets).values())
        for channel in "abcd":
            self.check_order(channel, list(heard.values()))

    def check_stays(self, client: Client, heard: set[str]) -> None:
        stays = self.stays[client]
        missed = 0
        for one in self.published:
            stayed = [stay for stay in stays if set(stay.names) & set(one.names)]
            certain = any(s.entered < one.began and one.ended < s.leaving for s in stayed)
            possible = any(s.entering < one.ended and one.began < s.left for s in stayed)
            assert possible or one.text not in heard, "nobody had subscribed to that"
            missed += certain and one.text not in heard
        if client.ws.close_code != 1013:
            assert missed <= sum(stay.subscription.dropped for stay in stays)

    def check_order(self, channel: str, heard: list[list[str]]) -> None:
        there = {one.text for one in self.published if channel in one.names}
        orders = [[text for text in texts if text in there] for texts in heard]
        for one, other in itertools.combinations(orders, 2):
            common = set(one) & set(other)
            assert [text for text in one if text in common] == [
                text for text in other if text in common
            ], "two subscribers of one channel saw different orders"


names = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True).map(tuple)
stay = st.tuples(names, st.sampled_from(POLICIES), st.integers(0, 8))


@profile(60, shrink=False)
@given(
    st.sampled_from(["sync", "async"]),
    st.sampled_from(["asyncio", "trio"]),
    st.integers(0, 2),
    st.lists(st.lists(names, max_size=30), min_size=2, max_size=4),
    st.lists(st.lists(stay, max_size=5), min_size=2, max_size=4),
    st.lists(st.integers(0, 5), min_size=4, max_size=4),
)
def test_one_order_for_everybody(
    kind: str,
    backend: str,
    socket_messages: int,
    publishers: list[list[tuple[str, ...]]],
    programs: list[list[tuple[tuple[str, ...], str, int]]],
    pauses: list[int],
) -> None:
    """Per channel one order, at most once, nothing missed that was not dropped, nothing after."""
    storm = Storm(kind, backend, len(programs), socket_messages)
    try:
        storm.run(publishers, programs, pauses)
    except BaseException:
        storm.world.abandon()
        raise
    storm.world.close()


# --- What was found


def test_who_has_closed_is_not_slow() -> None:
    """A view that closes while what was published finds no room: the view's code, no 1013."""
    with world("sync", WEBSOCKETS_OUTBOX_MESSAGES=1) as here:
        client = here.connect()
        client.enter("a", "close")
        here.publish_here("begun", "a")
        looking, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            looking.set()
            assert go_on.wait(PATIENCE)

        held = here.portal.start_task_soon(hold)
        assert looking.wait(PATIENCE)
        here.websockets.publish("too much", "a")  # the loop comes to it
        client.ask("close", 4000, "enough")  # when the view has closed
        go_on.set()
        held.result(PATIENCE)
        client.hear_until_goodbye()
        assert client.heard[-1]["code"] == client.ws.close_code == 4000
        assert here.websockets.stats().closed_slow == 0
