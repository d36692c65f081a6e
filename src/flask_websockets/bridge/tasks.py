"""Both sides. Tasks that belong to nobody, and calls that come later."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

from .door import Door
from .stacks import Stack, stack_of_coroutine

logger: logging.Logger = logging.getLogger("flask_websockets")


def run_on_the_loop(
    door: Door, run: Callable[[], Coroutine[Any, Any, None]], timeout: float
) -> None:
    """Any thread but the loop's. Run a coroutine on the loop, and wait for its end.

    :param timeout: seconds to wait at most; the coroutine knows its own end.
    :raises NotRunning: if the loop has stopped.
    """
    over = threading.Event()

    async def run_and_tell() -> None:
        try:
            await run()
        finally:
            over.set()

    door.post(lambda _: FreeTask(run_and_tell, contextvars.Context()), None)
    over.wait(timeout)


class FreeTask:
    """Loop. A task that belongs to nobody: nobody has to wait for it without end (I9).

    :param run: what it runs.
    :param context: where it runs; the task's own from here on.
    """

    def __init__(
        self, run: Callable[[], Coroutine[Any, Any, None]], context: contextvars.Context
    ) -> None:
        self._task: asyncio.Task[None] | None = None  # on asyncio
        self._scope: anyio.CancelScope | None = None  # on trio
        self._timer: asyncio.TimerHandle | None = None  # of expire, on asyncio
        self._coroutine: Coroutine[Any, Any, None] | None = None  # while it runs
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            import trio

            trio.lowlevel.spawn_system_task(self._run_cancellable, run, context=context)
        else:
            self._task = loop.create_task(self._run(run), context=context)

    def cancel(self) -> None:
        """Cancel it, in the way that its loop's users know.

        asyncio cancels once for each call, and what the view awaits then, in a ``finally``, is
        not cancelled. Under trio all that it awaits ends at once, but for what is shielded.
        """
        if self._task is not None:
            self._task.cancel()
        elif self._scope is not None:
            self._scope.cancel()

    def expire(self, seconds: float) -> None:
        """Cancel it when so many seconds have passed."""
        if self._task is not None:
            self._timer = self._task.get_loop().call_later(seconds, self._task.cancel)
        elif self._scope is not None:
            self._scope.deadline = anyio.current_time() + seconds

    def spare(self) -> None:
        """Have it not expire any more: what is left of it must be done."""
        if self._timer is not None:
            self._timer.cancel()

    @property
    def stack(self) -> Stack:
        """Where it waits."""
        return stack_of_coroutine(self._coroutine)

    def leave(self) -> None:
        """Have nobody wait for it: it was cancelled, and goes on.

        ``asyncio.run`` waits for every task that is registered, without end. Under trio there is
        no such way out.
        """
        if self._task is not None:
            asyncio._unregister_task(self._task)

    async def _run_cancellable(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with anyio.CancelScope() as self._scope:
            await self._run(run)

    async def _run(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._coroutine = run()
        try:
            await self._coroutine
        except Exception:
            logger.exception("A task of a connection failed; this is a bug, please report it")
        finally:
            self._coroutine = None


class Alarm:
    """Loop. One call that comes later, unless another takes its place or it is taken back."""

    __slots__ = ("_scope", "_timer")

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None  # on asyncio
        self._scope: anyio.CancelScope | None = None  # on trio

    def set(self, seconds: float, call: Callable[[], object]) -> None:
        """Have *call* called when so many seconds have passed, instead of what was to be."""
        self.cancel()
        context = contextvars.Context()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            import trio

            self._scope = anyio.CancelScope()
            trio.lowlevel.spawn_system_task(
                _call_later, self._scope, seconds, call, context=context
            )
        else:
            self._timer = loop.call_later(seconds, call, context=context)

    def cancel(self) -> None:
        """Have nothing called."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif self._scope is not None:
            self._scope.cancel()
            self._scope = None


async def _call_later(scope: anyio.CancelScope, seconds: float, call: Callable[[], object]) -> None:
    with scope:
        await anyio.sleep(seconds)
    if not scope.cancel_called:
        call()
