"""Both sides. The threads: one per sync view, a pool for HTTP, and a loop's own."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from .handover import Relay
from .tuning import yield_to_the_loop

T = TypeVar("T")

#: An idle HTTP thread ends after so many seconds. Longer than the gaps of steady traffic, short
#: enough that a quiet process gives its threads back.
IDLE_SECONDS = 10.0
#: Requests that may wait for each HTTP thread. At 40 threads and 10 ms a request the last of
#: the queue waits a quarter of a second; what comes above it is told to try again.
QUEUED_PER_THREAD = 25


def start_view_thread(run: Callable[[], None], name: str, *, yields: bool = True) -> int:
    """Loop. Run *run* on a new daemon thread: a stuck view never keeps the process alive (I9).

    :param yields: whether it lets the loop go first.
    :returns: the thread's ident.
    :raises RuntimeError: if the system has no thread left.
    """
    thread = threading.Thread(target=_run_view, args=(run, yields), name=name, daemon=True)
    thread.start()
    assert thread.ident is not None  # it has started
    return thread.ident


def _run_view(run: Callable[[], None], yields: bool) -> None:
    """Thread."""
    if yields:
        yield_to_the_loop()
    run()


class HttpPool:
    """Loop side starts the work, its threads run it. At most *size* at a time (I8).

    :param relay: in which the threads are woken, with those of the views.
    """

    def __init__(self, size: int, relay: Relay) -> None:
        self._size = size  # set once
        self._relay = relay  # set once
        self._work: deque[Callable[[], None]] = deque()  # the loop appends, threads pop
        self._wakes: SimpleQueue[None] = SimpleQueue()  # one for each piece of work, in its turn
        self._lock = threading.Lock()
        self._threads = 0  # guarded by _lock
        self._started = 0  # guarded by _lock: ever, for their names
        self._busy = 0  # guarded by _lock: running or queued

    @property
    def threads(self) -> int:
        """Any thread. How many threads there are."""
        return self._threads

    def submit(self, run: Callable[[], None]) -> bool:
        """Loop. Have a thread run *run*; False if too many requests wait, or no thread is left."""
        with self._lock:
            if self._busy >= self._size * (1 + QUEUED_PER_THREAD):
                return False
            start = self._busy >= self._threads and self._threads < self._size
            self._busy += 1
            self._threads += start
            self._started += start
            number = self._started
        if start:
            try:
                threading.Thread(
                    target=self._run, name=f"flask-websockets-http-{number}", daemon=True
                ).start()
            except RuntimeError:  # the system has no thread left
                with self._lock:
                    self._threads -= 1
                    if not self._threads:
                        self._busy -= 1
                        return False
        self._work.append(run)
        self._relay.add(self)
        return True

    def wake(self) -> bool:
        """Any thread. Have a thread take the next piece; False if there are not enough of them."""
        self._wakes.put(None)
        with self._lock:
            return self._busy <= self._threads

    def _run(self) -> None:
        """Thread. Run what comes, and end when nothing does.

        Unlike a view's thread it does not yield to the loop: while a flood of handshakes keeps
        the loop busy, requests would have to wait for a gap.
        """
        while True:
            try:
                self._wakes.get(timeout=IDLE_SECONDS)
            except Empty:
                with self._lock:
                    # Work may have been submitted since: it counts as busy from then on.
                    if self._busy < self._threads:
                        self._threads -= 1
                        return
                continue
            self._relay.pass_on()
            run = self._work.popleft()
            try:
                run()
            except BaseException as error:
                # Told as of any thread; but this one has more to do.
                threading.excepthook(
                    threading.ExceptHookArgs(
                        (type(error), error, error.__traceback__, threading.current_thread())
                    )
                )
            finally:
                with self._lock:
                    self._busy -= 1
            del run  # an idle thread must not keep a request alive


class Rounds:
    """Any thread. Calls something again and again, on a daemon thread of its own.

    :param every: seconds between the end of one call and the next.
    :param run: called each time; False ends the rounds.
    """

    def __init__(self, every: float, run: Callable[[], bool]) -> None:
        self._every = every
        self._run_once = run
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="flask-websockets-rounds", daemon=True).start()

    def stop(self) -> None:
        """Any thread. Call it no more; does not wait for a call that is under way."""
        self._stopped.set()

    def _run(self) -> None:
        yield_to_the_loop()
        while not self._stopped.wait(self._every) and self._run_once():
            pass


class LoopThread:
    """Both sides. An asyncio loop on a daemon thread, for servers that have none of their own."""

    def __init__(self, name: str) -> None:
        # Set once, before the thread starts.
        self.loop: asyncio.AbstractEventLoop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, run: Coroutine[Any, Any, T], timeout: float) -> T:
        """Any thread but the loop's. Run a coroutine on the loop and return its result.

        :param timeout: seconds; the coroutine is cancelled when they have passed.
        :raises TimeoutError: when they have.
        """
        future = asyncio.run_coroutine_threadsafe(run, self.loop)
        try:
            return future.result(timeout)
        except TimeoutError:
            future.cancel()
            raise

    def stop(self, timeout: float) -> None:
        """Any thread but the loop's. Cancel what still runs, close the loop, join the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            self.loop.close()
