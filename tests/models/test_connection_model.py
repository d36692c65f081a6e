"""Whole connections, from handshake to goodbye, while the server fills up, drains and starts anew.

The model counts: who is let in, who is refused and why, who has been told goodbye and with what.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from flask import Flask
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from werkzeug.exceptions import NotFound, Unauthorized

from flask_websockets import ConnectionClosed

from .profiles import profile
from .world import PATIENCE, Client, Failed, World

MAX_CONNECTIONS, MAX_HANDSHAKES = 4, 2
#: Seconds after which a hasty application answers for its view.
HASTE = 0.02
#: Seconds of a drain; half of it for views that have something to finish.
DRAIN = 0.3
GOODBYE = (1012, "the server stops")

#: How the peer sees a view end, by what the view does.
ENDS: dict[str, tuple[Exception | None, int]] = {
    "returns": (None, 1000),
    "fails": (Failed(), 1011),
    "aborts": (Unauthorized(), 4401),
}
#: And how it sees a handshake end.
ANSWERS: dict[str, tuple[Exception | None, list[Any]]] = {
    "returns": (None, ["websocket.accept", 1000]),
    "fails": (Failed(), [500]),
    "aborts": (NotFound(), [404]),
}


@dataclass(eq=False)
class Guest:
    """One connection, and what the model says of it."""

    client: Client
    #: queued, pending, open, or over.
    state: str = "queued"
    #: Everything that its peer must have heard in the end.
    heard: list[Any] | None = None
    receiving: Future[Any] | None = None
    #: Whether its view has been told to end.
    ended: bool = False


picks = st.integers(0, MAX_CONNECTIONS)
#: What happens, how often, and with what. Often, what lets somebody in.
ACTIONS: dict[str, tuple[int, tuple[st.SearchStrategy[Any], ...]]] = {
    "knocks": (5, ()),
    "several_are_let_in": (3, (st.integers(1, MAX_CONNECTIONS),)),
    "knocks_and_gets_no_answer": (1, ()),
    "is_accepted": (4, (picks,)),
    "is_answered": (2, (picks, st.sampled_from([*ANSWERS, "closes"]))),
    "view_waits": (3, (picks,)),
    "view_ends": (2, (picks, st.sampled_from(list(ENDS)))),
    "view_closes": (2, (picks, st.sampled_from([1000, 3000, 4999]), st.booleans())),
    "peer_is_gone": (2, (picks, st.sampled_from(["leaves", "is cancelled"]), st.booleans())),
    "views_return_at_last": (2, ()),
    "drains": (
        1,
        (
            st.tuples(*[st.sampled_from(["receives", "returns", "is busy"])] * MAX_CONNECTIONS),
            st.integers(0, MAX_CONNECTIONS),
            st.integers(0, MAX_CONNECTIONS),
        ),
    ),
    "server_starts_anew": (2, ()),
}
names = st.sampled_from([name for name, (weight, _) in ACTIONS.items() for _ in range(weight)])
action: st.SearchStrategy[tuple[Any, ...]] = names.flatmap(
    lambda name: st.tuples(st.just(name), *ACTIONS[name][1])
)


def _pick(guests: list[Guest], number: int) -> Guest:
    return guests[number % len(guests)]


class ConnectionMachine(RuleBasedStateMachine):
    """A server with room for a few."""

    world: World

    @initialize(
        kind=st.sampled_from(["sync", "async"]), backend=st.sampled_from(["asyncio", "trio"])
    )
    def begin(self, kind: str, backend: str) -> None:
        limits = {
            "WEBSOCKETS_MAX_CONNECTIONS": MAX_CONNECTIONS,
            "WEBSOCKETS_MAX_HANDSHAKES": MAX_HANDSHAKES,
            "PROPAGATE_EXCEPTIONS": False,
        }
        self.world = World(kind, backend, WEBSOCKETS_HANDSHAKE_TIMEOUT=60, **limits)
        hasty = Flask("hasty")
        hasty.config.update(limits, WEBSOCKETS_HANDSHAKE_TIMEOUT=HASTE, WEBSOCKETS_CLOSE_TIMEOUT=60)
        self.world.websockets.init_app(hasty)
        self.hasty = self.world.websockets.asgi_app(hasty)
        self.guests: list[Guest] = []
        self.draining = False
        self.reset()

    def reset(self) -> None:
        self.total = self.full = self.late = self.drained = 0

    def those(self, *states: str) -> list[Guest]:
        return [guest for guest in self.guests if guest.state in states]

    @property
    def inside(self) -> int:
        """How many count: a view that has not ended does, whether its connection is over or not."""
        return len(self.those("queued", "pending", "open")) + len(
            [guest for guest in self.those("over") if not guest.ended]
        )

    @rule(program=st.lists(action, min_size=3, max_size=12))
    def acts(self, program: list[tuple[Any, ...]]) -> None:
        for name, *arguments in program:
            getattr(self, name)(*arguments)

    # -- handshakes --------------------------------------------------------------------------------

    def knocks(self) -> None:
        guest = Guest(self.world.open(socket_messages=100))
        if self.draining:
            self.drained += 1
            self.is_refused(guest)
        elif self.inside >= MAX_CONNECTIONS:
            self.full += 1
            self.is_refused(guest)
        else:
            self.guests.append(guest)
            self.let_in()
        self.compare()

    def several_are_let_in(self, number: int) -> None:
        if self.those("queued", "pending"):
            return
        for _ in range(number):
            self.knocks()
            for guest in self.those("pending"):
                self.accept(guest)

    def knocks_and_gets_no_answer(self) -> None:
        if self.draining or self.inside >= MAX_CONNECTIONS:
            return
        guest = Guest(self.world.open(socket_messages=100, asgi=self.hasty), "over", [503])
        self.guests.append(guest)
        self.late += 1
        guest.client.hear_until_goodbye()
        with pytest.raises(ConnectionClosed) as caught:
            guest.client.ask("accept")
        assert caught.value.reason == "the handshake timed out"
        self.compare()

    def is_refused(self, guest: Guest) -> None:
        guest.state, guest.heard, guest.ended = "over", [503], True
        self.guests.append(guest)
        guest.client.hear_until_goodbye()
        headers = dict(guest.client.heard[0]["headers"])
        assert b"retry-after" in headers

    def let_in(self) -> None:
        """Those who wait for a handshake take the free places, in their order."""
        for guest in self.those("queued"):
            if len(self.those("pending")) < MAX_HANDSHAKES:
                guest.state = "pending"
                self.world.wait_for(partial(getattr, guest.client, "ws"), "no view begins")

    def is_accepted(self, pick: int) -> None:
        if not self.those("pending"):
            return
        self.accept(_pick(self.those("pending"), pick))

    def accept(self, guest: Guest) -> None:
        guest.client.ask("accept")
        assert guest.client.hear()["type"] == "websocket.accept"
        self.total += 1
        guest.state, guest.heard = "open", ["websocket.accept"]
        self.let_in()
        self.compare()

    def is_answered(self, pick: int, how: str) -> None:
        if not self.those("pending"):
            return
        guest = _pick(self.those("pending"), pick)
        if how == "closes":
            guest.client.ask("close")
            guest.heard = [1000]  # before the accept: the server makes a 403 of it
            guest.client.stop()
        else:
            error, heard = ANSWERS[how]
            guest.heard = list(heard)
            guest.client.stop(error)
            self.total += how == "returns"
        guest.state, guest.ended = "over", True
        guest.client.hear_until_goodbye()
        self.let_in()
        self.compare()

    # -- ends --------------------------------------------------------------------------------------

    def view_ends(self, pick: int, how: str) -> None:
        if not self.those("open"):
            return
        guest = _pick(self.those("open"), pick)
        if guest.receiving is not None:
            return
        error, code = ENDS[how]
        guest.client.stop(error)
        guest.ended = True
        self.hears(guest, code)
        self.compare()

    def view_closes(self, pick: int, code: int, lingers: bool) -> None:
        if not self.those("open"):
            return
        guest = _pick(self.those("open"), pick)
        guest.client.ask("close", code, second=True)
        self.hears(guest, code)
        self.learns(guest, (code, ""))
        self.may_linger(guest, lingers)
        self.compare()

    def peer_is_gone(self, pick: int, how: str, lingers: bool) -> None:
        if not self.those("open", "pending"):
            return
        guest = _pick(self.those("open", "pending"), pick)
        if how == "leaves":
            guest.client.leave(4444, "so long")
            end = (4444, "so long")
        else:
            self.world.call(guest.client.peer.cancel)
            end = (1006, "")
        guest.state = "over"
        guest.heard = guest.heard or []
        self.learns(guest, end)
        self.may_linger(guest, lingers)
        self.let_in()
        self.compare()

    def views_return_at_last(self) -> None:
        if not self.those("over"):
            return
        for guest in self.those("over"):
            self.may_linger(guest, False)
        self.compare()

    def view_waits(self, pick: int) -> None:
        if not self.those("open"):
            return
        guest = _pick(self.those("open"), pick)
        if guest.receiving is None:
            guest.receiving = guest.client.tell("receive")
            self.world.wait_for(guest.client.ws.link._receiving.locked, "nobody receives")
            self.world.call(lambda: None)  # the loop knows that the thread waits

    def may_linger(self, guest: Guest, lingers: bool) -> None:
        if not lingers and not guest.ended:
            guest.ended = True
            guest.client.stop()

    def hears(self, guest: Guest, code: int) -> None:
        """The peer is told goodbye."""
        guest.state = "over"
        assert guest.heard is not None
        guest.heard.append(code)
        guest.client.hear_until_goodbye()

    def learns(self, guest: Guest, end: tuple[int, str]) -> None:
        """The view learns of the end where it waits for a message."""
        ws = guest.client.ws
        self.world.wait_for(lambda: ws.closed, "the view knows of no end")
        assert (ws.close_code, ws.close_reason) == end
        if guest.receiving is not None:
            with pytest.raises(ConnectionClosed) as caught:
                guest.receiving.result(PATIENCE)
            assert (caught.value.code, caught.value.reason) == end
            guest.receiving = None

    # -- the server --------------------------------------------------------------------------------

    def drains(self, ways: tuple[str, ...], let_in: int, knock: int) -> None:
        if self.draining:
            return
        self.several_are_let_in(let_in)
        for _ in range(knock):
            self.knocks()
        self._drain(ways)

    def _drain(self, ways: tuple[str, ...]) -> None:
        self.draining = True
        for guest in self.those("over"):
            self.may_linger(guest, False)
        over = self.world.portal.start_task_soon(self.world.websockets.adrain, DRAIN)
        # Those who have no answer get it at once, and those in the queue in their turn.
        self.drained += len(self.those("queued", "pending"))
        for guest in self.those("queued"):
            guest.state, guest.heard, guest.ended = "over", [503], True
        for guest in self.those("pending"):
            guest.state, guest.heard = "over", [503]
            guest.client.hear_until_goodbye()
            self.may_linger(guest, False)
        for guest, way in zip(self.those("open"), ways, strict=False):
            if guest.receiving is None and way == "receives":
                guest.receiving = guest.client.tell("receive")
            elif guest.receiving is None and way == "returns":
                runtime = self.world.websockets._runtime
                assert runtime is not None
                self.world.wait_for(partial(getattr, runtime, "draining"), "no drain")
                guest.client.stop()
                guest.ended = True
        for guest in self.those("open"):
            said = len(guest.client.heard)
            guest.client.hear_until_goodbye()
            code = guest.client.heard[-1]["code"]
            assert len(guest.client.heard) == said + 1
            assert code == 1012 or (guest.ended and code == 1000)
            guest.state = "over"
            assert guest.heard is not None
            guest.heard.append(code)
            if not guest.ended:
                self.learns(guest, GOODBYE)
            self.may_linger(guest, False)
        over.result(DRAIN + PATIENCE)
        self.compare()

    def server_starts_anew(self) -> None:
        if not self.draining:
            return
        self.world.stop()
        self.world.start()
        self.draining = False
        self.reset()
        self.compare()

    # -- comparing ---------------------------------------------------------------------------------

    def compare(self) -> None:
        expected = {
            "total": self.total,
            "full": self.full,
            "late": self.late,
            "drained": self.drained,
            "views": self.inside - len(self.those("queued")),
            "inside": self.inside,
        }
        self.world.settle(self.picture, expected)

    def picture(self) -> dict[str, int]:
        """Loop."""
        stats, runtime = self.world.websockets.stats(), self.world.websockets._runtime
        assert runtime is not None
        views = stats.view_threads if self.world.kind == "sync" else stats.view_tasks
        assert stats.connections <= MAX_CONNECTIONS
        assert views <= MAX_CONNECTIONS
        assert stats.stuck_views == stats.send_timeouts == 0
        return {
            "total": stats.connections_total,
            "full": stats.refused_full,
            "late": stats.handshake_timeouts,
            "drained": stats.refused_draining,
            "views": views,
            "inside": runtime._admitted + runtime._orphans,
        }

    def teardown(self) -> None:
        if not hasattr(self, "guests"):
            return
        self.world.close()
        for guest in self.guests:
            if guest.heard is None or guest.state != "over":
                continue
            heard = []
            for message in guest.client.heard:
                match message["type"]:
                    case "websocket.close":
                        heard.append(message["code"])
                    case "websocket.http.response.start":
                        heard.append(message["status"])
                    case "websocket.http.response.body":
                        assert not message.get("more_body")
                    case kind:
                        heard.append(kind)
            # One goodbye each, and nothing after it.
            assert heard == guest.heard


ConnectionMachine.TestCase.settings = profile(40, steps=6, shrink=False)


class TestConnections(ConnectionMachine.TestCase):  # type: ignore[misc, valid-type]
    """Never more than are allowed, one goodbye for each, and counters that add up."""
