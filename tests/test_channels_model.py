"""One connection's outbox against a model of it that is too simple to be wrong.

The model is a list. Random programs of subscribes, publishes, sends, unsubscribes and reads run
against both; after every step the bounds, the counters and what waits must be the same, and what
the peer has read must be what the model says, in the model's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from flask import Flask
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from .test_slow_consumers import DROPPING, POLICIES, Puppet, Stage, counted

#: Small enough that a program of twenty steps meets them again and again.
MESSAGES, BYTES = 4, 60
#: Seconds in which loop and threads must have come to rest after a step.
PATIENCE = 5.0

# Every run is the same run. A failing program is short enough to be read; to shorten it would
# take minutes, because what does not come to rest is waited for.
profile = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
)

# --- The model


@dataclass(eq=False)
class Block:
    """One ``with subscribe`` block."""

    channels: tuple[str, ...]
    on_slow: str
    dropped: int = 0


@dataclass(eq=False)
class Item:
    """One message that was sent or published."""

    data: str
    owner: Block | None = None
    channel: str | None = None

    @property
    def size(self) -> int:
        return len(self.data)


@dataclass
class Model:
    """The outbox: one item is begun, the others wait behind it in the order they came."""

    begun: Item | None = None
    waiting: list[Item] = field(default_factory=list)
    received: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    ended: list[Block] = field(default_factory=list)
    #: Channel to the block whose policy holds, and the number of nested blocks.
    subscribed: dict[str, tuple[Block, int]] = field(default_factory=dict)
    published: int = 0
    delivered: int = 0
    closed: bool = False

    def enter(self, block: Block) -> None:
        self.blocks.append(block)
        for name in block.channels:
            outermost, level = self.subscribed.get(name, (block, 0))
            self.subscribed[name] = (outermost, level + 1)

    def leave(self) -> None:
        block = self.blocks.pop()
        self.ended.append(block)
        for name in block.channels:
            if name in self.subscribed:
                outermost, level = self.subscribed.pop(name)
                if level > 1:
                    self.subscribed[name] = (outermost, level - 1)

    def unsubscribe(self, channels: Sequence[str]) -> None:
        for name in channels:
            self.subscribed.pop(name, None)

    def fits(self, size: int, waiting: list[Item] | None = None) -> bool:
        there = ([self.begun] if self.begun else []) + (
            self.waiting if waiting is None else waiting
        )
        return not there or (
            len(there) < MESSAGES and sum(item.size for item in there) + size <= BYTES
        )

    def send(self, data: str) -> None:
        self._put(Item(data), self.waiting)

    def publish(self, data: str, channels: Sequence[str]) -> int:
        """What ``PublishResult.local`` says."""
        self.published += 1
        named = [name for name in channels if name in self.subscribed]
        if not named:
            return 0
        block = self.subscribed[named[0]][0]
        item = Item(data, block, named[0])
        left = list(self.waiting)
        if block.on_slow == "drop_oldest":
            while not self.fits(item.size, left) and (own := _of(left, block)):
                left.remove(own[0])
        elif block.on_slow == "latest":
            left = [one for one in left if (one.owner, one.channel) != (block, named[0])]
        if self.fits(item.size, left):
            block.dropped += len(self.waiting) - len(left)
            self.delivered += 1
            self._put(item, left)
            return 1
        if block.on_slow == "close":
            self.closed = True
        else:
            block.dropped += 1
        return 0

    def read(self) -> None:
        assert self.begun is not None
        self.received.append(self.begun.data)
        self.begun = self.waiting.pop(0) if self.waiting else None

    def _put(self, item: Item, waiting: list[Item]) -> None:
        self.waiting = [*waiting, item]
        if self.begun is None:
            self.begun = self.waiting.pop(0)

    def picture(self) -> dict[str, Any]:
        """What must be seen from outside once everything has come to rest."""
        there = ([self.begun] if self.begun else []) + self.waiting
        everyone = [*self.blocks, *self.ended]
        return {
            "messages": len(there),
            "bytes": sum(item.size for item in there),
            "stalled": self.begun is not None,
            "subscriptions": len(self.subscribed),
            "published": self.published,
            "delivered": self.delivered,
            "blocks": [block.dropped for block in everyone],
            "dropped": {
                policy: sum(block.dropped for block in everyone if block.on_slow == policy)
                for policy in DROPPING
            },
        }


def _of(items: list[Item], block: Block) -> list[Item]:
    return [item for item in items if item.owner is block]


# --- Programs

channel = st.sampled_from("abc")
channels = st.lists(channel, min_size=1, max_size=3, unique=True).map(tuple)
#: Up to above the bound in bytes; mostly so that the bound in messages counts as well.
size = st.one_of(st.integers(4, 16), st.integers(4, 64))
policy = st.sampled_from([*DROPPING, *DROPPING, "close"])
step = st.one_of(
    st.tuples(st.just("enter"), channels, policy),
    st.tuples(st.just("publish"), channels, size),
    st.tuples(st.just("publish"), channels, size),
    st.tuples(st.just("publish"), channels, size),
    st.tuples(st.just("view publishes"), channels, size),
    st.tuples(st.just("send"), size),
    st.tuples(st.just("read"), st.integers(1, 3)),
    st.tuples(st.just("unsubscribe"), channels),
    st.tuples(st.just("leave")),
)
Step = tuple[Any, ...]


class Trial:
    """One program, run step by step against a real connection and the model."""

    def __init__(self, stage: Stage, puppet: Puppet) -> None:
        self._stage = stage
        self._puppet = puppet
        self._model = Model()
        self._taken: dict[Block, Any] = {}  # block -> its Subscription
        self._received: list[str] = []
        self._number = 0

    async def run(self, program: Sequence[Step]) -> None:
        for step in program:
            await self._take(step)
            if self._model.closed:
                await self._expect_1013()
                return
            await self._compare()
        await self._read(1 + len(self._model.waiting) if self._model.begun else 0)
        await self._compare()

    async def _take(self, step: Step) -> None:
        model, puppet = self._model, self._puppet
        match step:
            case "enter", names, on_slow:
                block = Block(names, on_slow)
                model.enter(block)
                self._taken[block] = await puppet.enter(names, on_slow)
            case ("leave",):
                if model.blocks:
                    model.leave()
                    await puppet.leave()
            case "unsubscribe", names:
                model.unsubscribe(names)
                await puppet.unsubscribe(names)
            case "publish", names, size:
                data = self._data(size)
                expected = model.publish(data, names)
                assert await self._stage.publish([data], names) == [expected]
            case "view publishes", names, size:
                data = self._data(size)
                model.publish(data, names)
                await puppet.publish(data, names)
            case "send", size:
                if model.fits(size):  # one that has to wait is another file's business
                    data = self._data(size)
                    model.send(data)
                    await puppet.send(data)
            case "read", number:
                there = 1 + len(model.waiting) if model.begun else 0
                await self._read(min(number, there))

    async def _read(self, number: int) -> None:
        for _ in range(number):
            self._model.read()
            self._received += await self._puppet.read()
        assert self._received == self._model.received

    def _data(self, size: int) -> str:
        self._number += 1
        return f"{self._number:04}".ljust(size, "x")

    async def _compare(self) -> None:
        expected = self._model.picture()
        with anyio.move_on_after(PATIENCE):
            while self._picture() != expected:
                await anyio.sleep(0.0005)
        assert self._picture() == expected
        assert self._stage.websockets.stats().closed_slow == 0

    def _picture(self) -> dict[str, Any]:
        stats = self._stage.websockets.stats()
        # Never above the bound, at rest or not; one larger message lies there alone.
        assert stats.outbox_messages <= MESSAGES
        assert stats.outbox_bytes <= BYTES or stats.outbox_messages == 1
        everyone = [*self._model.blocks, *self._model.ended]
        return {
            "messages": stats.outbox_messages,
            "bytes": stats.outbox_bytes,
            "stalled": self._puppet.stalled,
            "subscriptions": stats.subscriptions,
            "published": stats.published,
            "delivered": stats.delivered,
            "blocks": [self._taken[block].dropped for block in everyone],
            "dropped": counted(self._stage.websockets),
        }

    async def _expect_1013(self) -> None:
        """The begun message can still go out, nothing else does, and then the goodbye."""
        with anyio.fail_after(PATIENCE):
            while not self._puppet.ws.closed:
                await anyio.sleep(0.0005)
        assert (self._puppet.ws.close_code, self._puppet.ws.close_reason) == (
            1013,
            "slow consumer",
        )
        if self._model.begun is not None:
            self._model.read()
            self._received += await self._puppet.read()
        assert self._received == self._model.received
        message = await self._puppet.peer.get()
        assert (message["type"], message["code"]) == ("websocket.close", 1013)
        stats = self._stage.websockets.stats()
        assert (stats.closed_slow, stats.subscriptions) == (1, 0)
        assert stats.delivered == self._model.delivered


def run_program(backend: str, kind: str, program: Sequence[Step]) -> None:
    app = Flask("model")
    app.config.update(WEBSOCKETS_CLOSE_TIMEOUT=2, WEBSOCKETS_SEND_TIMEOUT=5)
    stage = Stage(app, kind, WEBSOCKETS_OUTBOX_MESSAGES=MESSAGES, WEBSOCKETS_OUTBOX_BYTES=BYTES)

    async def main() -> None:
        with anyio.fail_after(20):
            async with stage.puppet() as puppet:
                await Trial(stage, puppet).run(program)

    anyio.run(main, backend=backend)


def fill(names: tuple[str, ...], number: int, size: int = 4) -> list[Step]:
    return [("publish", names, size)] * number


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@profile
@given(st.tuples(channels, policy), st.lists(step, min_size=5, max_size=30))
@example(("a", "drop_oldest"), [*fill(("a",), 2), ("send", 4), *fill(("a",), 4)])
@example(("a", "drop_oldest"), [*fill(("a",), 3, 15), ("publish", ("a",), 46)])
@example(("a", "drop_oldest"), [*fill(("a",), 3, 15), ("publish", ("a",), 45), ("read", 2)])
@example(("ab", "latest"), [*fill(("a",), 2), ("publish", ("b", "a"), 4), *fill(("a",), 2)])
@example(("a", "latest"), [("enter", ("a", "b"), "close"), *fill(("b",), 4), *fill(("a",), 2)])
@example(
    ("a", "drop_newest"),
    [("enter", ("b",), "drop_oldest"), *fill(("b", "a"), 5), *fill(("a", "b"), 3)],
)
@example(
    ("a", "drop_newest"),
    [("enter", ("a",), "drop_oldest"), *fill(("a",), 6), ("leave",), *fill(("a",), 2)],
)
@example(
    ("a", "drop_oldest"),
    [*fill(("a",), 4), ("unsubscribe", ("a",)), ("enter", ("a",), "drop_oldest"), *fill(("a",), 3)],
)
def test_i6_the_outbox_is_what_its_model_says(backend, kind, first, program):
    """Random programs: the same messages in the same order, the same drops, never above a bound."""
    names, on_slow = first
    run_program(backend, kind, [("enter", tuple(names), on_slow), *program])


def test_the_model_meets_every_case():
    """The programs are worth running: each policy drops, and close closes."""
    for on_slow in POLICIES:
        model = Model()
        model.enter(Block(("a",), on_slow))
        results = [model.publish(f"{number:04}", ("a",)) for number in range(6)]
        assert (
            results
            == {
                "close": [1, 1, 1, 1, 0, 0],
                "drop_oldest": [1] * 6,
                "drop_newest": [1, 1, 1, 1, 0, 0],
                "latest": [1] * 6,
            }[on_slow]
        )
        waiting = [item.data for item in model.waiting]
        assert (
            waiting
            == {
                "close": ["0001", "0002", "0003"],
                "drop_oldest": ["0003", "0004", "0005"],
                "drop_newest": ["0001", "0002", "0003"],
                "latest": ["0005"],
            }[on_slow]
        )
