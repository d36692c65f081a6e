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

#: Seconds between two starts of the same worker, so that one which always dies costs little.
RESTART_INTERVAL = 1.0
#: The exit code where a worker could not start; uvicorn's own.
STARTUP_FAILURE = 3

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_spawn = multiprocessing.get_context("spawn")

#: The server's own, which uvicorn sets up.
logger: logging.Logger = logging.getLogger("uvicorn.error")

#: Serves in a worker's process; it is given what to call when it has started.
Work = Callable[[Callable[[], None]], None]


class _Worker:
    """Parent. One worker's process."""

    def __init__(self, work: Work) -> None:
        self._news, worker_end = _spawn.Pipe(duplex=False)
        self._process: SpawnProcess = _spawn.Process(target=_work, args=(work, worker_end))
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


def _work(work: Work, news: Any) -> None:
    work(lambda: news.send(True))


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
        workers: list[_Worker] = []
        try:
            on_start()
            workers.extend(_Worker(self._work) for _ in range(self._count))
            return self._keep(workers, rung)
        finally:
            signal.set_wakeup_fd(previous_bell)
            for number, handler in previous.items():
                signal.signal(number, handler)
            rung.close()
            bell.close()

    def _heard(self, number: int, frame: FrameType | None) -> None:
        """Signal handler. The first one stops, the second one ends."""
        self._signals += 1

    def _keep(self, workers: list[_Worker], rung: socket.socket) -> int:
        while not self._signals:
            wait([rung, *(worker.sentinel for worker in workers)])
            for number, worker in enumerate(workers):
                if worker.exitcode is None or self._signals:
                    continue
                if not worker.has_started:
                    logger.error("Worker %s could not start; the others end", worker.pid)
                    self._stop(workers, rung)
                    return STARTUP_FAILURE
                logger.error("Worker %s died (exit code %s)", worker.pid, worker.exitcode)
                worker.end(0)
                pause = worker.born + RESTART_INTERVAL - time.monotonic()
                if pause > 0:
                    wait([rung], pause)
                workers[number] = _Worker(self._work)
        self._stop(workers, rung)
        return 0 if self._signals == 1 else 1

    def _stop(self, workers: list[_Worker], rung: socket.socket) -> None:
        signals, deadline = max(1, self._signals), time.monotonic() + self._patience
        for worker in workers:
            worker.tell()
        alive = list(workers)
        while alive and time.monotonic() < deadline and self._signals <= signals:
            _drain_bell(rung)
            wait([rung, *(worker.sentinel for worker in alive)], deadline - time.monotonic())
            alive = [worker for worker in alive if worker.exitcode is None]
        for worker in workers:
            worker.end(0)


def _drain_bell(rung: socket.socket) -> None:
    try:
        rung.recv(64)
    except BlockingIOError:
        pass
