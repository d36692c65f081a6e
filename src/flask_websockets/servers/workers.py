"""Both sides. The worker processes of ``serve``: started, replaced when they die, stopped in time.

uvicorn has a supervisor of its own, but it runs uvicorn's own server class in its workers, which
knows no drain, and waits for them without limit.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

#: Seconds between two starts of the same worker, so that one which always dies costs little:
#: twice as many after each that could not even start.
RESTART_INTERVAL, MAX_RESTART_INTERVAL = 1.0, 60.0
#: The exit code where a worker could not start; uvicorn's own.
STARTUP_FAILURE = 3

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_spawn = multiprocessing.get_context("spawn")

#: The server's own, which uvicorn sets up.
logger: logging.Logger = logging.getLogger("uvicorn.error")

#: Serves in a worker's process; it is given its number, and what to call when it has started.
Work = Callable[[int, Callable[[], None]], None]


class _Worker:
    """Parent. One worker's process."""

    def __init__(self, work: Work, number: int) -> None:
        self._news, worker_end = _spawn.Pipe(duplex=False)
        self._process: SpawnProcess = _spawn.Process(target=_work, args=(work, number, worker_end))
        self.born = time.monotonic()
        self._process.start()
        worker_end.close()

    @property
    def sentinel(self) -> int:
        """Is ready when the process has ended."""
        return self._process.sentinel

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def exitcode(self) -> int | None:
        return self._process.exitcode

    @property
    def has_started(self) -> bool:
        """Whether it has ever served."""
        try:
            return self._news.poll() and bool(self._news.recv())
        except EOFError:
            return False

    def tell(self) -> None:
        """Have it drain and end."""
        if self._process.is_alive():
            self._process.terminate()

    def end(self, timeout: float) -> None:
        """Wait for its end; kill it when the seconds have passed."""
        self._process.join(max(0, timeout))
        if self._process.is_alive():
            logger.error("Worker %s did not end in time and is killed", self.pid)
            self._process.kill()
            self._process.join()
        self._process.close()
        self._news.close()


def _work(work: Work, number: int, news: Any) -> None:
    work(number, lambda: news.send(True))


class Workers:
    """Parent. Keeps a number of workers until a signal comes.

    :param count: how many.
    :param work: what each does; can be pickled.
    :param patience: seconds that they have to end; what is left is killed.
    """

    def __init__(self, count: int, work: Work, patience: float) -> None:
        self._count = count
        self._work = work
        self._patience = patience
        self._signals = 0
        #: When they were told to end.
        self.told_at: float = 0.0

    def run(self, on_start: Callable[[], None]) -> int:
        """Serve until a signal comes, or a worker cannot start.

        :param on_start: called when signals are heard.
        :returns: the exit code.
        """
        rung, bell = socket.socketpair()
        bell.setblocking(False)
        rung.setblocking(False)
        previous = {number: signal.signal(number, self._heard) for number in STOPPING_SIGNALS}
        previous_bell = signal.set_wakeup_fd(bell.fileno())
        places = [_Place(self._work, number) for number in range(self._count)]
        try:
            on_start()
            started = self._keep(places, rung)
        finally:
            self._stop([place.worker for place in places if place.worker is not None], rung)
            signal.set_wakeup_fd(previous_bell)
            for number, handler in previous.items():
                signal.signal(number, handler)
            rung.close()
            bell.close()
        if not started:
            return STARTUP_FAILURE
        return 0 if self._signals == 1 else 1

    def _heard(self, number: int, frame: FrameType | None) -> None:
        """Signal handler. The first one stops, the second one ends."""
        self._signals += 1

    def _keep(self, places: list[_Place], rung: socket.socket) -> bool:
        """Replace workers that die, until a signal comes; False if one cannot even start."""
        while not self._signals:
            now = time.monotonic()
            for place in places:
                if not place.look_after(now):
                    return False
            alive = [place.worker.sentinel for place in places if place.worker is not None]
            due = [place.due for place in places if place.worker is None]
            wait([rung, *alive], max(0, min(due) - now) if due else None)
            _drain_bell(rung)
        return True

    def _stop(self, workers: list[_Worker], rung: socket.socket) -> None:
        self.told_at = time.monotonic()
        signals, deadline = max(1, self._signals), self.told_at + self._patience
        for worker in workers:
            worker.tell()
        alive = list(workers)
        while alive and time.monotonic() < deadline and self._signals <= signals:
            wait([rung, *(worker.sentinel for worker in alive)], deadline - time.monotonic())
            _drain_bell(rung)
            alive = [worker for worker in alive if worker.exitcode is None]
        for worker in workers:
            worker.end(0)


class _Place:
    """Parent. Where one worker is, and after it another."""

    def __init__(self, work: Work, number: int) -> None:
        self._work = work
        self._number = number
        self._interval: float | None = None  # to its next start, once it has served
        #: When the next worker starts, where there is none.
        self.due: float = 0.0
        self.worker: _Worker | None = None

    def look_after(self, now: float) -> bool:
        """Replace a worker that died; False if none has ever started here."""
        worker = self.worker
        if worker is None:
            if now >= self.due:
                return self._start(now)
        elif worker.exitcode is not None:
            if worker.has_started:
                self._interval = RESTART_INTERVAL
            elif self._interval is not None:
                self._interval = min(2 * self._interval, MAX_RESTART_INTERVAL)
            else:
                logger.error("Worker %s could not start; the others end", worker.pid)
                return False
            self.due, self.worker = worker.born + self._interval, None
            logger.error(
                "Worker %s died (exit code %s); another starts", worker.pid, worker.exitcode
            )
            worker.end(0)
            return self.look_after(now)
        return True

    def _start(self, now: float) -> bool:
        try:
            self.worker = _Worker(self._work, self._number)
        except OSError as error:  # the system has no process or descriptor left
            logger.error("A worker could not be started: %s", error)
            if self._interval is None:
                return False
            self._interval = min(2 * self._interval, MAX_RESTART_INTERVAL)
            self.due = now + self._interval
        return True


def _drain_bell(rung: socket.socket) -> None:
    try:
        rung.recv(64)
    except BlockingIOError:
        pass
