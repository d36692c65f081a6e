"""Loop side. The view of one connection, while it runs: its thread, or its task and threads.

A plain view is one thread. An async view is a task, and has a thread where Flask blocks: for
its handshake, until it has accepted, and for its teardown.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from types import FrameType

import anyio

from .bridge import (
    AsyncView,
    Finish,
    Flag,
    FreeTask,
    Link,
    Stack,
    format_stack,
    stack_of_thread,
    start_view_thread,
    thread_frames,
)
from .counters import Counters

#: How often an async view is cancelled before it is reported: once for what it waits for, once
#: more for what its ``finally`` waits for.
CANCELLATIONS = 2

logger: logging.Logger = logging.getLogger("flask_websockets")


class RunningView:
    """One view, from the start of its thread until nothing of it runs any more."""

    def __init__(self, link: Link, counters: Counters) -> None:
        self._link = link
        self._counters = counters
        self._over = Flag()
        self._on_over: Callable[[], None] = lambda: None
        self._finishing: anyio.Semaphore | None = None
        self._waiting: anyio.CancelScope | None = None
        self._holds_place = False  # of those that _finishing has
        self._threads = 0  # one, or for a moment two: the teardown's may be quicker
        self._ident = 0  # of the last one that was started
        self._task: FreeTask | None = None  # of an async view
        self._returned = False  # an async view: what blocks is left, and is not cancelled
        self._abandoned = False
        #: It did not end in its time.
        self.reported: bool = False
        #: What came out of the application, if anything did.
        self.error: BaseException | None = None

    @property
    def running(self) -> bool:
        """Whether anything of it still runs."""
        return self._threads > 0 or self._task is not None

    def start(
        self,
        run: Callable[[], BaseException | None],
        on_over: Callable[[], None],
        finishing: anyio.Semaphore,
    ) -> None:
        """Start the thread of the handshake, which is a plain view's own.

        :param run: returns what came out of the application, if anything did.
        :param on_over: called when the view is over.
        :param finishing: holds a place for the thread that an async view needs at its end.
        :raises RuntimeError: if the system has no thread left.
        """
        self._on_over, self._finishing = on_over, finishing
        self._link.start_task = self._start_task
        self._start_thread(run)

    async def wait(self) -> None:
        """Give the view its time to finish; cancel or report it if it does not (I5, I9)."""
        if not self.reported:
            with anyio.CancelScope() as self._waiting:
                await self._wait()

    async def _wait(self) -> None:
        timeout = self._link.config.close_timeout
        # One that was abandoned is cancelled without us, and has its time after that as well.
        if await self._ends_within(timeout * (1 + self._abandoned)):
            return
        for _attempt in range(CANCELLATIONS - self._abandoned):
            if self.cancel() and await self._ends_within(timeout):
                return
        when = f"{timeout:g} s after its connection ended (WEBSOCKETS_CLOSE_TIMEOUT)"
        report([self], when)

    def cancel(self) -> bool:
        """Cancel what waits in an async view; False if there is nothing to cancel."""
        if self._task is None or self._returned:
            return False
        self._task.cancel()
        return True

    def leave_alone(self) -> None:
        """Have nobody wait for it any more: it is reported."""
        if self._task is not None:
            self._task.leave()
        self.reported = True
        self._counters.stuck_views += 1
        if self._waiting is not None:
            self._waiting.cancel()

    @property
    def endpoint(self) -> str:
        """The endpoint of its connection; the path, where it was not routed yet."""
        return self._link.entry.endpoint or self._link.entry.path

    def __str__(self) -> str:
        """Its connection, for the log."""
        return str(self._link.entry)

    def where(self, frames: Mapping[int, FrameType]) -> tuple[str, Stack]:
        """What runs, and where it is.

        :param frames: of ``thread_frames``.
        """
        if self._threads:
            return "thread", stack_of_thread(self._ident, frames)
        return "task, which was cancelled,", () if self._task is None else self._task.stack

    def abandon(self) -> None:
        """Nobody waits any more: an async view still has its time, and then ends."""
        if self._task is not None and not self._returned:
            self._abandoned = True
            self._task.expire(self._link.config.close_timeout)

    async def _ends_within(self, timeout: float) -> bool:
        if self.running:
            with anyio.move_on_after(timeout):
                await self._over.wait()
        return not self.running

    def _start_thread(self, run: Callable[[], BaseException | None]) -> None:
        def run_and_report() -> None:
            error: BaseException | None = None
            try:
                error = run()
            finally:
                link.report(self._thread_over, error)

        link = self._link
        name, yields = f"flask-websockets-view {link.entry.path}", link.config.tune_process
        self._ident = start_view_thread(run_and_report, name, yields=yields)
        self._threads += 1
        self._counters.view_threads += 1

    def _thread_over(self, error: BaseException | None) -> None:
        """The thread is about to end; it said so at the door."""
        self._threads -= 1
        self._counters.view_threads -= 1
        self.error = self.error or error
        self._end()

    def _start_task(self, view: AsyncView) -> None:
        """The view is async: the handshake's thread has sent it here."""
        self._link.start_task = None
        self._counters.view_tasks += 1
        run, context = view
        self._task = FreeTask(partial(self._perform, run), context)

    async def _perform(self, view: Callable[[], Awaitable[Finish]]) -> None:
        """The task of an async view. At its end a thread does what blocks, such as teardown."""
        try:
            finish = await view()
            self._returned = True
            if self._task is not None:
                self._task.spare()
            if finish is not None and self._finishing is not None:
                # Whoever waits in vain goes on all the same: a teardown is never left out.
                with anyio.move_on_after(self._link.config.close_timeout, shield=True):
                    await self._finishing.acquire()
                    self._holds_place = True
                try:
                    self._start_thread(finish)
                except RuntimeError as error:
                    # Blocking for once is better than a database connection that stays away.
                    # From Python 3.12 on a process that ends starts no threads.
                    logger.warning("The teardown of %s runs on the event loop: %s", self, error)
                    self.error = finish()
        finally:
            self._task = None
            self._counters.view_tasks -= 1
            self._end()

    def _end(self) -> None:
        if not self.running:
            if self._holds_place and self._finishing is not None:
                self._finishing.release()
            self._over.set()
            on_over, self._on_over = self._on_over, lambda: None
            self._link.start_task = None
            on_over()


def report(views: Iterable[RunningView], when: str) -> None:
    """Log views that did not end in their time, each stack once, and leave them alone (I9)."""
    frames = thread_frames()
    groups: dict[tuple[str, str, Stack], list[RunningView]] = {}
    for view in views:
        if view.running and not view.reported:
            groups.setdefault((view.endpoint, *view.where(frames)), []).append(view)
            view.leave_alone()
    for (endpoint, what, stack), stuck in groups.items():
        if len(stuck) == 1:
            said = f"The view of {stuck[0]} still runs {when}; its {what} is left to itself"
        else:
            said = (
                f"{len(stuck)} views of endpoint {endpoint} still run {when}, all in the same "
                "place; they are left to themselves"
            )
        logger.warning("%s. It is here:\n%s", said, format_stack(stack))
