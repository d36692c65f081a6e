"""Random walks over the protocol's table, and over the verbs that it is the law of.

The model is a handful of sentences, written without a look at the table: a connection begins with
a handshake, which is answered once; what is accepted is open until one side ends it; after the end
everything raises, but for ends, which do nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from flask_websockets import ConnectionClosed
from flask_websockets.errors import InvalidState
from flask_websockets.protocol import Action, State, transition

from .profiles import profile
from .world import PATIENCE, Client, World

GOODBYE = (1012, "the server stops")


class TableMachine(RuleBasedStateMachine):
    """The pure table: what follows, what raises, and that what raises changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State.CONNECTING
        self.answered = self.refused = self.over = False

    def take(self, action: Action, code: int = 1006, reason: str = "") -> None:
        self.state = transition(self.state, action, code, reason)

    @rule(
        action=st.sampled_from([Action.ACCEPT, Action.REFUSE]),
        code=st.integers(1000, 4999),
        reason=st.text(max_size=5),
    )
    def answers(self, action: Action, code: int, reason: str) -> None:
        if self.over:
            self.raises(action, code, reason)
        elif self.answered:
            with pytest.raises(InvalidState):
                self.take(action)
        else:
            self.take(action)
            self.answered, self.refused = True, action is Action.REFUSE
            self.over = self.refused

    @rule(code=st.integers(1000, 4999), reason=st.text(max_size=5))
    def sends(self, code: int, reason: str) -> None:
        if self.over:
            self.raises(Action.SEND, code, reason)
        elif not self.answered:
            with pytest.raises(InvalidState):
                self.take(Action.SEND)
        else:
            self.take(Action.SEND)

    @rule()
    def closes(self) -> None:
        # Before the answer a close is one: a refusal.
        if not self.over:
            self.refused, self.answered = not self.answered, True
        self.take(Action.CLOSE)
        self.over = True

    @rule()
    def is_lost(self) -> None:
        self.take(Action.LOSE)
        self.over = True

    def raises(self, action: Action, code: int, reason: str) -> None:
        with pytest.raises(ConnectionClosed) as caught:
            self.take(action, code, reason)
        assert (caught.value.code, caught.value.reason) == (code, reason)

    def teardown(self) -> None:
        if self.over:
            assert self.state is (State.REFUSED if self.refused else State.CLOSED)
        else:
            assert self.state is (State.OPEN if self.answered else State.CONNECTING)


TableMachine.TestCase.settings = profile(200, steps=12)


class TestTable(TableMachine.TestCase):  # type: ignore[misc, valid-type]
    """Every walk through the table ends where the sentences say."""


class VerbsMachine(RuleBasedStateMachine):
    """One handshake and what comes of it, by the verbs of a real view on a real loop."""

    world: World
    client: Client

    @initialize(
        kind=st.sampled_from(["sync", "async"]), backend=st.sampled_from(["asyncio", "trio"])
    )
    def begin(self, kind: str, backend: str) -> None:
        self.world = World(kind, backend)
        self.client = self.world.open(socket_messages=100)
        self.world.wait_for(lambda: self.client.ws, "the view does not begin")
        self.state = "connecting"
        self.code, self.reason = 1006, ""
        #: What the peer is told, in order.
        self.said: list[tuple[Any, ...]] = []

    @property
    def is_over(self) -> bool:
        return self.state in ("refused", "closed", "lost")

    def does(self, verb: str, *arguments: Any) -> Any:
        """A verb that accepts by itself, and raises after the end."""
        if self.is_over:
            with pytest.raises(ConnectionClosed) as caught:
                self.client.ask(verb, *arguments)
            assert (caught.value.code, caught.value.reason) == (self.code, self.reason)
            return None
        if self.state == "connecting":
            self.state = "open"
            self.said.append(("websocket.accept",))
        return self.client.ask(verb, *arguments)

    @rule()
    def accepts(self) -> None:
        if self.state == "open":
            with pytest.raises(InvalidState):
                self.client.ask("accept")
        else:
            self.does("accept")
        self.compare()

    @rule(data=st.one_of(st.text(st.characters(codec="utf-8"), max_size=5), st.binary(max_size=5)))
    def sends(self, data: str | bytes) -> None:
        self.does("send", data)
        if not self.is_over:
            self.said.append(("websocket.send", data))
        self.compare()

    @rule()
    def receives(self) -> None:
        assert self.does("receive", 0.001) is None
        self.compare()

    @rule()
    def waits_for_the_end(self) -> None:
        if self.is_over:
            assert self.client.ask("wait_closed", PATIENCE) is True
        else:
            assert self.does("wait_closed", 0.001) is False
        self.compare()

    @rule(data=st.sampled_from([None, 5, ["x"], object()]))
    def sends_what_is_no_message(self, data: Any) -> None:
        with pytest.raises(TypeError):
            self.client.ask("send", data)
        self.compare()

    @rule(code=st.sampled_from([999, 1005, 1006, 1015, 2000, 5000]))
    def closes_as_nobody_may(self, code: int) -> None:
        with pytest.raises(ValueError):
            self.client.ask("close", code)
        self.compare()

    @rule(code=st.sampled_from([1000, 1001, 3000, 4999]), reason=st.sampled_from(["", "enough"]))
    def closes(self, code: int, reason: str) -> None:
        assert self.client.ask("close", code, reason) is None
        if self.state == "connecting":
            # The server makes a 403 of it; there was no conversation that could have a code.
            self.state = "refused"
            self.said.append(("websocket.close", code, reason))
        elif self.state == "open":
            self.ends("closed", code, reason)
            self.said.append(("websocket.close", code, reason))
        self.compare()

    @precondition(lambda self: not self.is_over)
    @rule(code=st.sampled_from([1000, 1001, 1006, 4000]))
    def peer_leaves(self, code: int) -> None:
        self.client.leave(code, "so long")
        self.ends("lost", code, "so long")
        self.compare()

    @rule()
    def is_expelled(self) -> None:
        self.world.call(self.client.ws.link.expel, 1008, "out")
        if self.state == "open":
            self.ends("closed", 1008, "out")
            self.said.append(("websocket.close", 1008, "out"))
        self.compare()

    @rule()
    def is_dismissed(self) -> None:
        self.world.call(self.client.ws.link.dismiss, *GOODBYE, (503, [], b"later"))
        if self.state == "open":
            self.ends("closed", *GOODBYE)
            self.said.append(("websocket.close", *GOODBYE))
        elif self.state == "connecting":
            self.state, self.reason = "refused", GOODBYE[1]
            self.said.append(("websocket.http.response.start", 503))
            self.said.append(("websocket.http.response.body", b"later"))
        self.compare()

    def ends(self, state: str, code: int, reason: str) -> None:
        self.state, self.code, self.reason = state, code, reason

    def compare(self) -> None:
        ws = self.client.ws
        known = (self.code, self.reason) if self.is_over else (None, None)
        expected = (self.state == "open", self.is_over, *known)
        self.world.settle(
            lambda: (ws.connected, ws.closed, ws.close_code, ws.close_reason), expected
        )

    def teardown(self) -> None:
        if not hasattr(self, "client"):
            return
        try:
            self.client.stop()
            if not self.is_over:  # a view that returns has accepted, and says goodbye
                if self.state == "connecting":
                    self.said.append(("websocket.accept",))
                self.said.append(("websocket.close", 1000, ""))
            self.client.hear_the_rest()
            heard = [_said(message) for message in self.client.heard]
            if self.state == "lost":  # what was on its way may not have arrived
                assert heard == self.said[: len(heard)]
            else:
                assert heard == self.said
        finally:
            self.world.close()


def _said(message: Any) -> tuple[Any, ...]:
    match message["type"]:
        case "websocket.send":
            data = message.get("text")
            return message["type"], message["bytes"] if data is None else data
        case "websocket.close":
            return message["type"], message["code"], message["reason"]
        case "websocket.http.response.start":
            return message["type"], message["status"]
        case "websocket.http.response.body":
            return message["type"], message["body"]
    return (message["type"],)


VerbsMachine.TestCase.settings = profile(60, steps=15, shrink=False)


class TestVerbs(VerbsMachine.TestCase):  # type: ignore[misc, valid-type]
    """Every walk through the verbs tells the peer what the model says, and raises where it does."""
