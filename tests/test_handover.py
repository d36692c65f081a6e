"""How threads that wait are given what comes, and woken by each other."""

from __future__ import annotations

import random
import threading
from queue import Empty

import anyio
import pytest

from flask_websockets.bridge import Door
from flask_websockets.bridge.handover import WOKEN_AT_ONCE, Handover, Relay

from .asgi_driver import TIMEOUT, wait_until


class Turn:
    """Stands for the end of a loop's turn, which comes when a test says so."""

    def __init__(self):
        self.asked = 0
        self.relay = Relay(self.ask)

    def ask(self):
        self.asked += 1

    def waiting(self):
        """A hand-over whose thread waits, as far as anybody can see; without a thread."""
        handover = Handover(self.relay)
        handover._is_awaited = True
        return handover


def woken(handovers):
    """How many of them were woken."""
    return sum(not handover._wakes.empty() for handover in handovers)


def test_a_few_are_woken_and_each_wakes_the_next():
    """At the end of the turn two; from then on one for each that has come to its turn."""
    turn = Turn()
    handovers = [turn.waiting() for _ in range(5)]
    for handover in handovers:
        handover.give("a")
    assert turn.asked == 1
    assert woken(handovers) == 0
    turn.relay.start()
    assert woken(handovers) == WOKEN_AT_ONCE == 2
    assert handovers[0].get(0) == "a"
    assert [handover._wakes.empty() for handover in handovers] == [True, False, False, True, True]


def test_whoever_does_not_wait_is_passed_over():
    """A view that gave up waiting for a moment wakes nobody: those behind it are woken."""
    turn = Turn()
    gone = [Handover(turn.relay) for _ in range(WOKEN_AT_ONCE * 2)]
    last = turn.waiting()
    for handover in [*gone, last]:
        handover.give("a")
    turn.relay.start()
    assert woken([last]) == 1
    assert [handover.get_nowait() for handover in gone] == ["a"] * len(gone)


def test_whoever_waited_too_long_passes_on():
    """One whose time is over in that moment wakes the next, and finds its own later."""
    turn = Turn()
    late, last = Handover(turn.relay), turn.waiting()
    for handover in (last, turn.waiting(), turn.waiting()):
        handover.give("a")
    with pytest.raises(Empty):
        late.get(0.001)
    assert woken([last]) == 1
    late.put("b")
    assert not late.is_empty()
    assert late.get(0) == "b"
    assert late.is_empty()


def test_the_loop_is_asked_while_nobody_is_on_the_way():
    """Once for a line, however long, and again as soon as it was empty."""
    turn = Turn()
    first, second = turn.waiting(), turn.waiting()
    first.give(1)
    second.give(2)
    assert turn.asked == 1
    turn.relay.start()
    first.give(3)
    assert turn.asked == 2
    assert [first.get(0), first.get(0), second.get(0)] == [1, 3, 2]


def test_a_crowd_gets_everything_in_order(run):
    """Whatever each waits for, and however long: each gets all that was given, in order."""
    crowd, rounds = 60, 100

    async def main():
        door = Door(10)
        handovers = [Handover(door.relay) for _ in range(crowd)]
        got = [[] for _ in range(crowd)]

        def take(handover, got, chance):
            while len(got) < rounds:
                try:
                    got.append(handover.get(chance.choice([None, 0, 0.0001, 0.01])))
                except Empty:
                    pass

        threads = [
            threading.Thread(target=take, args=(*each, random.Random(number)), daemon=True)
            for number, each in enumerate(zip(handovers, got, strict=True))
        ]
        for thread in threads:
            thread.start()
        chance = random.Random(7)
        for number in range(rounds):
            chance.shuffle(handovers)
            for handover in handovers:
                handover.give(number)
                if chance.random() < 0.1:
                    await anyio.lowlevel.checkpoint()
        await wait_until(lambda: not any(thread.is_alive() for thread in threads))
        assert got == [list(range(rounds))] * crowd

    run(main)


def test_a_closed_door_wakes_everybody(run):
    """Who stands in the line when the loop ends its work is woken, however many there are."""

    async def main():
        door = Door(10)
        handovers = [Handover(door.relay) for _ in range(50)]
        got = []
        threads = [
            threading.Thread(target=lambda each=each: got.append(each.get(TIMEOUT)), daemon=True)
            for each in handovers
        ]
        for thread in threads:
            thread.start()
        for handover in handovers:
            handover.give("end")
        door.close()
        for thread in threads:
            thread.join(TIMEOUT)
        assert got == ["end"] * 50

    run(main)
