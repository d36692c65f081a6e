"""The pool of HTTP threads: its bound, its queue, its end."""

from __future__ import annotations

import threading
import time

import pytest

from flask_websockets.bridge import HttpPool, threads
from flask_websockets.bridge.handover import Handover, Relay
from flask_websockets.bridge.threads import QUEUED_PER_THREAD

TIMEOUT = 8

#: Seconds in which something that must not happen would; no test can fail for it.
GRACE = 0.05


@pytest.fixture(autouse=True)
def short_idle(monkeypatch):
    """Threads that have nothing to do end soon, and with their test."""
    monkeypatch.setattr(threads, "IDLE_SECONDS", 0.02)


class Work:
    """Pieces of work that wait until the test lets them end."""

    def __init__(self):
        self.go_on = threading.Event()
        self.ran = []  # numbers, in their order
        self.on = []  # threads
        self._lock = threading.Lock()
        self.running = self.most = 0

    def __call__(self, number=0, *, waits=True):
        """A function for the pool."""

        def run():
            with self._lock:
                self.ran.append(number)
                self.on.append(threading.current_thread())
                self.running += 1
                self.most = max(self.most, self.running)
            if waits:
                assert self.go_on.wait(TIMEOUT)
            with self._lock:
                self.running -= 1

        return run

    def count(self):
        return len(self.ran)


@pytest.fixture
def work():
    work = Work()
    yield work
    work.go_on.set()
    for thread in set(work.on):
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "an idle thread stays"


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.001)


def no_thread(self):
    raise RuntimeError("can't start new thread")


def test_i8_at_most_size_threads(work):
    """Above its size the pool queues; no piece is lost, and none runs twice."""
    pool = HttpPool(3, Relay(None))
    for number in range(20):
        assert pool.submit(work(number))
    wait_until(lambda: work.running == 3)
    time.sleep(GRACE)
    assert work.count() == 3
    work.go_on.set()
    wait_until(lambda: work.count() == 20)
    assert sorted(work.ran) == list(range(20))
    assert work.most == 3
    assert len(set(work.on)) == 3


def test_one_thread_runs_in_order(work):
    """What waits is run first come, first served."""
    pool = HttpPool(1, Relay(None))
    for number in range(20):
        assert pool.submit(work(number))
    work.go_on.set()
    wait_until(lambda: work.count() == 20)
    assert work.ran == list(range(20))


def test_threads_are_daemons_with_names(work):
    """No request keeps the process alive (I9), and a stack dump says what a thread is for."""
    pool = HttpPool(2, Relay(None))
    for number in range(2):
        pool.submit(work(number))
    wait_until(lambda: work.count() == 2)
    assert all(thread.daemon for thread in work.on)
    names = [f"flask-websockets-http-{number}" for number in (1, 2)]
    assert sorted(thread.name for thread in work.on) == names


def test_no_two_threads_have_one_name(work):
    """A name is not given again while a later thread still has its own."""
    pool, other = HttpPool(2, Relay(None)), Work()
    pool.submit(other(0))
    wait_until(lambda: other.running == 1)
    pool.submit(work(1))
    wait_until(lambda: work.running == 1)
    other.go_on.set()
    wait_until(lambda: pool._threads == 1)
    pool.submit(work(2))
    wait_until(lambda: work.running == 2)
    first, second = work.on
    assert first.name != second.name


def test_an_idle_thread_is_used_again(work, monkeypatch):
    """One request after the other needs one thread."""
    monkeypatch.setattr(threads, "IDLE_SECONDS", 0.5)
    pool = HttpPool(10, Relay(None))
    for number in range(10):
        pool.submit(work(number, waits=False))
        wait_until(lambda number=number: work.count() == number + 1 and not pool._busy)
    assert len(set(work.on)) == 1


def test_idle_threads_end_and_others_come(work):
    """A quiet process gives its threads back, and has them again when it needs them."""
    pool = HttpPool(4, Relay(None))
    for round_ in (1, 2):
        for number in range(4):
            assert pool.submit(work(number))
        wait_until(lambda: work.running == 4)
        work.go_on.set()
        wait_until(lambda: not any(thread.is_alive() for thread in work.on))
        assert (pool._threads, pool._busy) == (0, 0)
        assert len(set(work.on)) == 4 * round_
        work.go_on.clear()


def test_work_that_comes_as_the_threads_end_is_run(work, monkeypatch):
    """Submitted in the moment in which the last thread gives up waiting, it is not left."""
    monkeypatch.setattr(threads, "IDLE_SECONDS", 0.001)
    pool = HttpPool(2, Relay(None))
    for number in range(300):
        assert pool.submit(work(number, waits=False))
        wait_until(lambda number=number: work.count() == number + 1)
        time.sleep(0.0005 + number % 10 / 10_000)
    wait_until(lambda: not pool._threads)
    assert work.ran == list(range(300))


def test_i6_the_queue_is_bounded(work):
    """What is above the bound is refused, never runs and leaves no trace in the count."""
    pool = HttpPool(2, Relay(None))
    bound = 2 * (1 + QUEUED_PER_THREAD)
    assert all(pool.submit(work(number)) for number in range(bound))
    assert not pool.submit(work(-1))
    assert not pool.submit(work(-2))
    work.go_on.set()
    wait_until(lambda: work.count() == bound)
    wait_until(lambda: not pool._busy)
    assert sorted(work.ran) == list(range(bound))
    assert pool.submit(work(bound))
    wait_until(lambda: work.count() == bound + 1)


def test_work_that_raises_costs_the_pool_nothing(work, monkeypatch):
    """Its place and its thread come back, though nothing should come out of work."""
    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    pool = HttpPool(1, Relay(None))

    def fail():
        raise ValueError("of the work")

    pool.submit(fail)
    wait_until(lambda: seen and not pool._busy)
    assert pool.submit(work(1, waits=False))
    wait_until(lambda: work.ran == [1] and not pool._busy)
    assert [args.exc_type for args in seen] == [ValueError]


def test_a_thread_keeps_no_request_alive(work, monkeypatch):
    """What it ran is let go when it has run, and not with the next piece."""
    monkeypatch.setattr(threads, "IDLE_SECONDS", 4)
    pool, gone = HttpPool(1, Relay(None)), threading.Event()

    class Request:
        def __call__(self):
            work(waits=False)()

        def __del__(self):
            gone.set()

    pool.submit(Request())
    assert gone.wait(3), "the idle thread has it still"


class TestNoThreadLeft:
    """The system has no thread left: Thread.start raises RuntimeError."""

    def test_without_any_thread_the_work_is_refused(self, work, monkeypatch):
        """Nobody would run it; a thread that starts later does not run it either."""
        pool = HttpPool(2, Relay(None))
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            assert not pool.submit(work(1))
            assert not pool.submit(work(2))
        assert (pool._threads, pool._busy) == (0, 0)
        assert pool.submit(work(3))
        work.go_on.set()
        wait_until(lambda: not pool._threads)
        assert work.ran == [3]

    def test_with_a_thread_the_work_waits_for_it(self, work, monkeypatch):
        """One thread is enough to take it."""
        pool = HttpPool(3, Relay(None))
        assert pool.submit(work(1))
        wait_until(lambda: work.running == 1)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            assert pool.submit(work(2))
            assert pool.submit(work(3))
        assert (pool._threads, pool._busy) == (1, 3)
        work.go_on.set()
        wait_until(lambda: not pool._threads)
        assert work.ran == [1, 2, 3]
        assert pool._busy == 0

    def test_the_counts_are_right_afterwards(self, work, monkeypatch):
        """The bound is where it was, and so is the number of threads."""
        pool = HttpPool(2, Relay(None))
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            for _ in range(5):
                assert not pool.submit(work(-1))
        bound = 2 * (1 + QUEUED_PER_THREAD)
        assert all(pool.submit(work(number)) for number in range(bound))
        assert not pool.submit(work(-1))
        wait_until(lambda: work.running == 2)
        work.go_on.set()
        wait_until(lambda: not pool._threads)
        assert sorted(work.ran) == list(range(bound))
        assert work.most == 2


class TestRelay:
    """The threads of the pool are woken with those of the views, and hold up none."""

    def test_each_passes_on_before_it_works(self, work):
        """However long the work takes, the next thread is woken."""
        relay = Relay(lambda: None)
        pool = HttpPool(4, relay)
        for number in range(4):
            assert pool.submit(work(number))
        relay.start()
        wait_until(lambda: work.count() == 4)

    def test_without_a_free_thread_the_relay_goes_on(self, work):
        """Work that nobody can take yet holds up nobody behind it."""
        relay = Relay(lambda: None)
        pool, behind = HttpPool(1, relay), Handover(relay)
        assert pool.submit(work(0))
        relay.start()
        wait_until(lambda: work.running == 1)
        for number in (1, 2, 3):
            assert pool.submit(work(number))
        behind.give("a")
        relay.start()
        assert behind.get_nowait() == "a"
        work.go_on.set()
        wait_until(lambda: work.count() == 4)
        assert work.ran == [0, 1, 2, 3]
