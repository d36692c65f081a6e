"""One connection against a model of its link: two bounded queues, and one end.

A program tells the view's thread, a second thread of the view, the peer and the loop what to do.
After every step what waits, what was counted and what was told to whom must be what the model
says. The storm at the end of this file has everybody act at once, and looks at what remains true.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from flask_websockets import ConcurrencyError, ConnectionClosed

from ..test_channels_model import BYTES as OUTBOX_BYTES
from ..test_channels_model import MESSAGES as OUTBOX_MESSAGES
from ..test_channels_model import Block, Item, Model, channels
from ..test_channels_model import size as some_size
from ..test_slow_consumers import DROPPING, counted
from .profiles import profile
from .world import PATIENCE, Client, World, world

INBOX_MESSAGES, INBOX_BYTES = 3, 40

#: What a server that stops says.
GOODBYE = (1012, "the server stops")
#: Seconds of a receive that is to find nothing.
BRIEF = 0.005

# --- The model


@dataclass
class Inbox:
    """What has come from the peer and was not taken, and what the reader does when it is full."""

    policy: str
    waiting: list[str] = field(default_factory=list)
    held: str | None = None  # by the reader, which has paused
    behind: list[str] = field(default_factory=list)  # with the server, while the reader has paused
    dropped: int = 0
    ended: bool = False

    def end(self) -> None:
        """What has come may still be taken; nothing more comes in."""
        self.ended, self.held, self.behind = True, None, []

    def fits(self, data: str) -> bool:
        size = sum(map(len, self.waiting)) + len(data)
        return not self.waiting or (len(self.waiting) < INBOX_MESSAGES and size <= INBOX_BYTES)

    def arrive(self, data: str) -> bool:
        """False if the connection is closed for it."""
        if self.ended:
            return True  # it goes nowhere
        if self.held is not None:
            self.behind.append(data)
        elif self.fits(data):
            self.waiting.append(data)
        elif self.policy == "drop_newest":
            self.dropped += 1
        elif self.policy == "pause":
            self.held = data
        else:
            return False
        return True

    def take(self) -> str:
        data = self.waiting.pop(0)
        if self.held is not None and self.fits(self.held):
            self.waiting.append(self.held)
            self.held = None
            while self.behind and self.held is None:
                self.arrive(self.behind.pop(0))
        return data


class Outbox(Model):
    """The outbox of ``test_channels_model``, and one sender that waits for room in it."""

    blocked: Item | None = None
    may_drop = False

    def fits(self, size: int, waiting: list[Item] | None = None) -> bool:
        # What may be dropped takes no room that a sender waits for, but another's place.
        if (
            self.may_drop
            and self.blocked
            and waiting is not None
            and len(waiting) >= len(self.waiting)
        ):
            return False
        return super().fits(size, waiting)

    def publish(self, data: str, channels: Any) -> int:
        named = [name for name in channels if name in self.subscribed]
        self.may_drop = bool(named) and self.subscribed[named[0]][0].on_slow != "close"
        try:
            return super().publish(data, channels)
        finally:
            self.may_drop = False

    def begin_send(self, data: str) -> None:
        if self.fits(len(data)):
            self.send(data)
        else:
            self.blocked = Item(data)

    def read(self) -> None:
        super().read()
        there = ([self.begun] if self.begun else []) + self.waiting
        if self.blocked is not None and (
            not there
            or (
                len(there) < OUTBOX_MESSAGES / 2
                and sum(item.size for item in there) + self.blocked.size <= OUTBOX_BYTES / 2
            )
        ):
            self.send(self.blocked.data)
            self.blocked = None


# --- The machine

#: Up to above the inbox's bound in bytes; mostly so that the bound in messages counts as well.
small = st.one_of(st.integers(4, 9), st.integers(4, 9), st.integers(4, 50))


policies = st.sampled_from([*DROPPING, *DROPPING, "close"])
#: What is done while the connection is open, and with what. Often, what fills the two queues.
ACTIONS: dict[str, tuple[int, tuple[st.SearchStrategy[Any], ...]]] = {
    "peer_sends": (6, (small,)),
    "view_receives": (3, ()),
    "view_receives_for_a_while": (1, ()),
    "view_sends": (3, (some_size,)),
    "peer_reads": (5, ()),
    "enters": (2, (channels, policies)),
    "leaves": (1, ()),
    "unsubscribes": (1, (channels,)),
    "is_published": (6, (channels, some_size, st.sampled_from(["loop", "thread"]))),
    "view_publishes_to_others": (1, (channels, some_size)),
    "is_not_over": (1, ()),
}
names = st.sampled_from([name for name, (weight, _) in ACTIONS.items() for _ in range(weight)])
action: st.SearchStrategy[tuple[Any, ...]] = names.flatmap(
    lambda name: st.tuples(st.just(name), *ACTIONS[name][1])
)


class LinkMachine(RuleBasedStateMachine):
    """One accepted connection, from its first message to its last."""

    world: World
    client: Client

    @initialize(
        kind=st.sampled_from(["sync", "async"]),
        backend=st.sampled_from(["asyncio", "trio"]),
        policy=st.sampled_from(["pause", "pause", "close", "drop_newest"]),
        lifetime=st.integers(0, 30),
    )
    def begin(self, kind: str, backend: str, policy: str, lifetime: int) -> None:
        self.world = World(
            kind,
            backend,
            WEBSOCKETS_INBOX_MESSAGES=INBOX_MESSAGES,
            WEBSOCKETS_INBOX_BYTES=INBOX_BYTES,
            WEBSOCKETS_INBOX_FULL=policy,
            WEBSOCKETS_OUTBOX_MESSAGES=OUTBOX_MESSAGES,
            WEBSOCKETS_OUTBOX_BYTES=OUTBOX_BYTES,
        )
        self.client = self.world.connect()
        self.inbox, self.outbox = Inbox(policy), Outbox()
        self.end: tuple[int, str] | None = None
        #: Whether the peer hears a goodbye, and whether the view gets what was received before.
        self.goodbye = self.keeps_inbox = False
        self.blocks: dict[Block, Any] = {}
        self.receiving: Future[Any] | None = None
        self.sending: Future[Any] | None = None
        self.received: list[str] = []
        self.finishing = False
        self.closed_slow = self.inbox_closed = self.steps = 0
        self.lifetime = lifetime

    def data(self, size: int) -> str:
        self.steps += 1
        return f"{self.steps:04}".ljust(size, "x")

    @property
    def is_open(self) -> bool:
        return self.end is None

    # -- while it is open ------------------------------------------------------------------------

    @precondition(lambda self: self.is_open)
    @rule(program=st.lists(action, min_size=3, max_size=15))
    def acts(self, program: list[tuple[Any, ...]]) -> None:
        for name, *arguments in program:
            if self.is_open:
                getattr(self, name)(*arguments)

    def peer_sends(self, size: int) -> None:
        data = self.data(size)
        self.client.put({"type": "websocket.receive", "text": data})
        if self.receiving is not None:
            assert self.receiving.result(PATIENCE) == data
            self.receiving = None
            self.received.append(data)
        elif not self.inbox.arrive(data):
            self.inbox_closed += 1
            self.over(1013, "the server is too busy", drops=True)
        self.compare()

    def view_receives(self) -> None:
        if self.receiving is not None:
            return self.two_receive()
        future = self.client.tell("receive")
        if self.inbox.waiting:
            self.take(future)
        else:
            self.receiving = future
            if self.finishing:
                self.over(*GOODBYE, keeps_inbox=False)
            else:
                self.world.wait_for(self.client.ws.link._receiving.locked, "nobody receives")
                self.world.call(lambda: None)  # the loop knows that the thread waits
        self.compare()

    def view_receives_for_a_while(self) -> None:
        if self.receiving is not None:
            return self.two_receive()
        if self.inbox.waiting:
            self.take(self.client.tell("receive", PATIENCE))
        elif self.finishing:
            self.receiving = self.client.tell("receive", BRIEF)
            self.over(*GOODBYE, keeps_inbox=False)
        else:
            assert self.client.ask("receive", BRIEF) is None
        self.compare()

    def two_receive(self) -> None:
        if self.sending is None:
            with pytest.raises(ConcurrencyError):
                self.client.ask("receive", BRIEF, second=True)

    def view_sends(self, size: int) -> None:
        if self.sending is not None:
            return
        data = self.data(size)
        self.outbox.begin_send(data)
        self.sending = self.client.tell("send", data, second=True)
        if self.outbox.blocked is None:
            self.sent()
        else:
            self.world.wait_for(lambda: self.client.ws.link._blocked, "nobody waits")
        self.compare()

    def peer_reads(self) -> None:
        if self.outbox.begun is None:
            return
        self.outbox.read()
        self.hear()
        if self.outbox.blocked is None and self.sending is not None:
            self.sent()
        self.compare()

    def enters(self, names: tuple[str, ...], on_slow: str) -> None:
        if self.sending is not None:
            return
        block = Block(names, on_slow)
        self.outbox.enter(block)
        self.blocks[block] = self.client.enter(names, on_slow)
        self.compare()

    def leaves(self) -> None:
        if self.sending is None and self.outbox.blocks:
            self.outbox.leave()
            self.client.leave_block()
            self.compare()

    def unsubscribes(self, names: tuple[str, ...]) -> None:
        if self.sending is None:
            self.outbox.unsubscribe(names)
            self.client.unsubscribe(names)
            self.compare()

    def is_published(self, names: tuple[str, ...], size: int, where: str) -> None:
        data = self.data(size)
        local = self.outbox.publish(data, names)
        if where == "loop":
            assert self.world.publish_here(data, names) == local
        else:
            self.world.websockets.publish(data, names)
        if self.outbox.closed:
            self.closed_slow += 1
            self.over(1013, "slow consumer", drops=True)
        self.compare()

    def view_publishes_to_others(self, names: tuple[str, ...], size: int) -> None:
        if self.sending is None:
            self.outbox.published += 1
            self.client.publish(self.data(size), names, exclude=self.client.ws)
            self.compare()

    def is_not_over(self) -> None:
        if self.sending is not None:
            return
        # A wait for the end is the end of what a view has to finish. On the loop every task is
        # the view's; in a thread beside the view's own it may wait for something else.
        departs = self.finishing and self.world.kind == "async"
        assert self.client.ask("wait_closed", BRIEF, second=True) is departs
        if departs:
            self.over(*GOODBYE, keeps_inbox=False)

    # -- the end -----------------------------------------------------------------------------------

    @precondition(lambda self: self.is_open and self.sending is None)
    @precondition(lambda self: self.steps >= self.lifetime)
    @rule(code=st.sampled_from([1000, 1001, 3000, 4999]), reason=st.text("abc€", max_size=9))
    def view_closes(self, code: int, reason: str) -> None:
        self.client.ask("close", code, reason, second=True)
        self.over(code, reason, keeps_inbox=False)

    @precondition(lambda self: self.is_open and self.steps >= self.lifetime)
    @rule(code=st.sampled_from([1000, 1001, 1005, 1006, 4999, None]), reason=st.text("abc€"))
    def peer_leaves(self, code: int | None, reason: str) -> None:
        if self.inbox.held is not None:
            return  # a paused reader does not see it
        self.client.leave(code, reason)
        self.over(code or 1005, reason, goodbye=False)

    @precondition(lambda self: self.is_open and self.steps >= self.lifetime)
    @rule()
    def server_cancels(self) -> None:
        self.world.call(self.client.peer.cancel)
        self.over(1006, "", goodbye=False)

    @precondition(lambda self: self.is_open and self.steps >= self.lifetime)
    @rule(code=st.sampled_from([1008, 1009, 1013]))
    def is_expelled(self, code: int) -> None:
        self.world.call(self.client.ws.link.expel, code, "out")
        self.over(code, "out", drops=True)

    @precondition(lambda self: self.is_open and self.steps >= self.lifetime)
    @rule()
    def is_dismissed(self) -> None:
        self.world.call(self.client.ws.link.dismiss, *GOODBYE, (503, [], b""))
        self.over(*GOODBYE)

    @precondition(lambda self: self.is_open and not self.finishing)
    @precondition(lambda self: self.steps >= self.lifetime)
    @rule()
    def may_finish(self) -> None:
        self.world.call(self.client.ws.link.let_finish, *GOODBYE, (503, [], b""))
        if self.receiving is not None:  # it has nothing to finish
            self.over(*GOODBYE)
        else:
            self.finishing = True
            self.inbox.end()
        self.compare()

    def over(
        self,
        code: int,
        reason: str,
        *,
        goodbye: bool = True,
        keeps_inbox: bool = True,
        drops: bool = False,
    ) -> None:
        self.end = code, reason
        self.goodbye, self.keeps_inbox = goodbye, keeps_inbox
        self.outbox.subscribed.clear()
        if drops or not goodbye:
            self.outbox.waiting.clear()
        if not goodbye:
            self.outbox.begun = None
        for future in (self.receiving, self.sending):
            if future is not None:
                self.raises(future)
        self.receiving = self.sending = None
        self.compare()

    # -- afterwards --------------------------------------------------------------------------------

    @precondition(lambda self: not self.is_open)
    @rule(verb=st.sampled_from(["send", "enter", "accept", "receive", "receive for a while"]))
    def every_verb_raises(self, verb: str) -> None:
        client = self.client
        if verb == "enter":
            with pytest.raises(ConnectionClosed) as caught:
                client.enter("a", "close")
            assert (caught.value.code, caught.value.reason) == self.end
        elif verb.startswith("receive"):
            arguments = () if verb == "receive" else (PATIENCE,)
            future = client.tell("receive", *arguments)
            if self.keeps_inbox and self.inbox.waiting:
                assert future.result(PATIENCE) == self.inbox.waiting.pop(0)
            else:
                self.raises(future)
        else:
            self.raises(client.tell(verb, *(("x",) if verb == "send" else ()), second=True))

    @precondition(lambda self: not self.is_open)
    @rule(code=st.sampled_from([1000, 4000]))
    def a_second_end_does_nothing(self, code: int) -> None:
        assert self.client.ask("close", code, "again", second=True) is None
        assert self.client.ask("wait_closed", PATIENCE, second=True) is True
        self.world.call(self.client.ws.link.expel, 1008, "again")
        self.client.unsubscribe("a")
        ws = self.client.ws
        assert (ws.connected, ws.closed) == (False, True)
        assert (ws.close_code, ws.close_reason) == self.end

    @precondition(lambda self: not self.is_open)
    @rule(names=channels)
    def nobody_gets_what_is_published(self, names: tuple[str, ...]) -> None:
        assert self.world.publish_here("nothing", names) == 0
        self.outbox.published += 1

    # -- comparing ---------------------------------------------------------------------------------

    def take(self, future: Future[Any]) -> None:
        data = future.result(PATIENCE)
        self.received.append(data)
        assert data == self.inbox.take()

    def sent(self) -> None:
        assert self.sending is not None
        assert self.sending.result(PATIENCE) is None
        self.sending = None

    def hear(self) -> None:
        message = self.client.hear()
        assert message["type"] == "websocket.send", message
        assert message["text"] == self.outbox.received[-1]

    def raises(self, future: Future[Any]) -> None:
        with pytest.raises(ConnectionClosed) as caught:
            future.result(PATIENCE)
        assert (caught.value.code, caught.value.reason) == self.end

    def compare(self) -> None:
        everyone = [*self.outbox.blocks, *self.outbox.ended]
        expected: dict[str, Any] = {
            "published": self.outbox.published,
            "delivered": self.outbox.delivered,
            "dropped": {
                policy: sum(block.dropped for block in everyone if block.on_slow == policy)
                for policy in DROPPING
            },
            "blocks": [block.dropped for block in everyone],
            "inbox": (self.inbox.dropped, self.inbox_closed, self.closed_slow),
            "end": self.end,
        }
        if self.is_open:
            there = ([self.outbox.begun] if self.outbox.begun else []) + self.outbox.waiting
            expected["depths"] = (
                len(self.inbox.waiting),
                sum(map(len, self.inbox.waiting)),
                len(there),
                sum(item.size for item in there),
            )
            expected["stalled"] = self.outbox.begun is not None
            expected["subscriptions"] = len(self.outbox.subscribed)
        self.world.settle(self.picture, expected)

    def picture(self) -> dict[str, Any]:
        """Loop. The same of the real one."""
        stats, ws = self.world.websockets.stats(), self.client.ws
        link = ws.link
        messages, size, out_messages, out_size = link.depths
        # Never above a bound, at rest or not; one larger message lies there alone.
        assert messages <= INBOX_MESSAGES and (size <= INBOX_BYTES or messages == 1)
        assert out_messages <= OUTBOX_MESSAGES + (not ws.connected)  # and the goodbye
        assert out_size <= OUTBOX_BYTES or out_messages == 1 or not ws.connected
        found: dict[str, Any] = {
            "published": stats.published,
            "delivered": stats.delivered,
            "dropped": counted(self.world.websockets),
            "blocks": [
                self.blocks[block].dropped for block in [*self.outbox.blocks, *self.outbox.ended]
            ],
            "inbox": (stats.inbox_dropped, stats.inbox_closed, stats.closed_slow),
            "end": (ws.close_code, ws.close_reason) if ws.closed else None,
        }
        if self.is_open:
            found["depths"] = link.depths
            found["stalled"] = self.client.stalled
            found["subscriptions"] = stats.subscriptions
        return found

    def teardown(self) -> None:
        if not hasattr(self, "client"):
            return
        try:
            client, said = self.client, len(self.client.heard)
            if not self.is_open:  # what came before the end may still be taken, or not
                untaken = self.inbox.waiting if self.keeps_inbox else []
                assert [client.ask("receive") for _ in untaken] == untaken
                self.raises(client.tell("receive"))
            if self.is_open and self.receiving is None and self.sending is None:
                client.stop()  # its goodbye comes behind what it has sent
                self.end, self.goodbye = (1000, ""), True
            elif self.is_open:
                client.leave(1001)
                if self.inbox.held is None:
                    self.over(1001, "", goodbye=False)
            if self.goodbye:
                client.hear_until_goodbye()
                left = ([self.outbox.begun] if self.outbox.begun else []) + self.outbox.waiting
                *messages, last = client.heard[said:]
                assert [message["text"] for message in messages] == [item.data for item in left]
                assert last["type"] == "websocket.close"
                assert (last["code"], last["reason"]) == self.end
        finally:
            self.world.close()


LinkMachine.TestCase.settings = profile(100, steps=12, shrink=False)


class TestLink(LinkMachine.TestCase):  # type: ignore[misc, valid-type]
    """Random programs: the same order, the same drops, the same end, never above a bound."""


# --- What was found


@pytest.mark.parametrize("wait", ["receive", "wait_closed"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_view_that_has_waited_and_is_busy_may_finish(kind: str, wait: str) -> None:
    """A wait that has timed out is over: the view still gets what came, and may still send."""
    with world(kind) as here:
        client = here.connect(socket_messages=10)
        assert not client.ask(wait, BRIEF)
        here.call(client.ws.link.let_finish, *GOODBYE, (503, [], b""))
        client.ask("send", "the last word")
        with pytest.raises(ConnectionClosed) as caught:
            client.ask("receive")
        assert (caught.value.code, caught.value.reason) == GOODBYE
        client.hear_until_goodbye()
        assert client.heard[-2]["text"] == "the last word"
        assert client.heard[-1]["code"] == GOODBYE[0]


def test_what_was_sent_before_a_dismissal_goes_out() -> None:
    """The loop comes to the send after it has made the end: it was accepted, and is sent."""
    with world("sync") as here:
        client = here.connect(socket_messages=10)
        looking, go_on = threading.Event(), threading.Event()

        def hold_and_dismiss() -> None:
            looking.set()
            assert go_on.wait(PATIENCE)
            client.ws.link.dismiss(*GOODBYE, (503, [], b""))

        held = here.portal.start_task_soon(hold_and_dismiss)
        assert looking.wait(PATIENCE)
        client.ask("send", "the last word")
        go_on.set()
        held.result(PATIENCE)
        client.hear_until_goodbye()
        assert [message.get("text") for message in client.heard[1:]] == ["the last word", None]
