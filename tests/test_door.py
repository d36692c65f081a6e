"""The door: how threads reach the loop (I1), on asyncio and on trio."""

from __future__ import annotations

import contextvars
import logging
import threading
import time

import anyio
import anyio.lowlevel
import pytest

from flask_websockets import NotRunning
from flask_websockets.bridge import Door
from flask_websockets.bridge.door import COMMANDS_PER_TURN

TIMEOUT = 5


def in_thread(target, *args):
    thread = threading.Thread(target=target, args=args)
    thread.start()
    return thread


async def wait_until(condition):
    while not condition():
        await anyio.sleep(0.001)


def test_i1_commands_run_on_the_loop_in_their_order(run):
    """What one thread posts runs on the loop's thread, in the order of the posts."""

    async def main():
        door = Door(10)
        seen = []

        def post():
            for number in range(1000):
                door.post(lambda n: seen.append((n, threading.get_ident())), number)

        thread = in_thread(post)
        await wait_until(lambda: len(seen) == 1000)
        thread.join(TIMEOUT)
        assert seen == [(number, threading.get_ident()) for number in range(1000)]

    run(main)


def test_many_posts_are_one_ring(run):
    """A ring is pending from the first post until the loop looks."""

    async def main():
        door = Door(10)
        rings = []
        ring = door._ring
        door._ring = lambda: rings.append(1) or ring()
        seen = []
        for number in range(50):
            door.post(seen.append, number)
        assert (len(rings), door.pending) == (1, 50)
        await wait_until(lambda: len(seen) == 50)
        door.post(seen.append, 50)
        assert len(rings) == 2
        await wait_until(lambda: len(seen) == 51)

    run(main)


def test_the_loop_gets_its_turn_between_many_commands(run):
    """A long queue is answered in several turns."""

    async def main():
        door = Door(10)
        seen = []
        for number in range(COMMANDS_PER_TURN * 3):
            door.post(seen.append, number)
        steps = 0
        while len(seen) < COMMANDS_PER_TURN * 3:
            await anyio.lowlevel.checkpoint()
            steps += 1
            # trio may answer twice between two steps of this task.
            assert len(seen) <= 2 * COMMANDS_PER_TURN * steps
        assert steps >= 2

    run(main)


def test_a_failing_command_does_not_stop_the_others(run, caplog):
    """The error is logged, the next command runs."""

    async def main():
        door = Door(10)
        seen = []
        door.post(lambda _: 1 / 0, None)
        door.post(seen.append, "next")
        await wait_until(lambda: seen)

    with caplog.at_level(logging.ERROR):
        run(main)
    assert "ZeroDivisionError" in caplog.text


def test_the_ring_carries_no_context(run):
    """Context variables of the ringing thread do not reach the loop."""
    variable = contextvars.ContextVar("variable", default="loop")

    async def main():
        door = Door(10)
        seen = []

        def post():
            variable.set("thread")
            door.post(lambda _: seen.append(variable.get()), None)

        thread = in_thread(post)
        await wait_until(lambda: seen)
        thread.join(TIMEOUT)
        assert seen == ["loop"]

    run(main)


def test_drain_answers_what_was_posted_before(run):
    """drain runs everything that is pending, at once."""

    async def main():
        door = Door(10)
        seen = []
        for number in range(COMMANDS_PER_TURN + 1):
            door.post(seen.append, number)
        door.drain()
        assert len(seen) == COMMANDS_PER_TURN + 1

    run(main)


def test_a_closed_door(run):
    """What was posted is answered; then post and publish raise NotRunning."""

    async def main():
        door = Door(10)
        seen = []
        door.post(seen.append, 1)
        door.close()
        assert seen == [1]
        assert door.shut
        with pytest.raises(NotRunning):
            door.post(seen.append, 2)
        with pytest.raises(NotRunning):
            door.take_slot(timeout=1)
            door.post_in_slot(seen.append, 2)
        await anyio.sleep(0)
        assert seen == [1]

    run(main)


def test_a_door_whose_loop_is_gone(run):
    """A loop that ended without closing its door is found out."""

    async def main():
        return Door(10)

    door = run(main)
    assert door.shut
    with pytest.raises(NotRunning):
        door.post(print, 1)


def test_i6_pending_publishes_are_bounded(run):
    """Above the bound a publish waits for the loop, at most its timeout, then raises."""

    async def main():
        door = Door(2)
        seen, errors = [], []

        def publish(number, timeout):
            door.take_slot(timeout)
            door.post_in_slot(seen.append, number)

        def publish_too_many():
            publish(1, 0.05)
            publish(2, 0.05)
            started = time.monotonic()
            try:
                publish(3, 0.05)
            except TimeoutError as error:
                errors.append((str(error), time.monotonic() - started))

        thread = in_thread(publish_too_many)
        thread.join(TIMEOUT)  # blocks the loop: nothing is taken
        assert seen == []
        assert "WEBSOCKETS_MAX_PENDING_PUBLISHES" in errors[0][0]
        assert 0.05 <= errors[0][1] < 2
        await wait_until(lambda: seen == [1, 2])

        waiting = in_thread(lambda: [publish(n, TIMEOUT) for n in range(3, 50)])
        await wait_until(lambda: len(seen) == 49)
        waiting.join(TIMEOUT)
        assert seen == list(range(1, 50))

    run(main)


def test_closing_the_door_frees_waiting_publishers(run):
    """A publisher that waits while the server stops gets NotRunning, not its timeout."""

    async def main():
        door = Door(1)
        errors = []
        door.take_slot(timeout=1)

        def publish():
            try:
                door.take_slot(timeout=TIMEOUT)
            except NotRunning as error:
                errors.append(error)

        thread = in_thread(publish)
        deadline = time.monotonic() + TIMEOUT
        while not door._waiting:  # the loop must not look meanwhile, so no await here
            assert time.monotonic() < deadline
        door.close()
        thread.join(TIMEOUT)
        assert len(errors) == 1

    run(main)
