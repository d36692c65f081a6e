"""Both sides. The task of an async view."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

logger: logging.Logger = logging.getLogger("flask_websockets")


class ViewTask:
    """Loop. A task that belongs to nobody: nobody has to wait for it without end (I9).

    :param run: what it runs.
    :param context: where it runs; the task's own from here on.
    """

    def __init__(
        self, run: Callable[[], Coroutine[Any, Any, None]], context: contextvars.Context
    ) -> None:
        self._task: asyncio.Task[None] | None = None
        self._scope: anyio.CancelScope | None = None  # while it runs
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            import trio

            trio.lowlevel.spawn_system_task(self._run, run, context=context)
        else:
            self._task = loop.create_task(self._run(run), context=context)

    def cancel(self) -> None:
        """Cancel it, in the way that its loop's users know.

        asyncio cancels once, and a ``finally`` may await; under trio every later wait in the
        view ends at once, but for those that are shielded.
        """
        if self._task is not None and self._scope is not None:
            self._task.cancel()
        else:
            self.insist()

    def expire(self, seconds: float) -> None:
        """Loop. Let it go on for so long at most; then have every wait in it end at once."""
        if self._scope is not None:
            self._scope.deadline = anyio.current_time() + seconds

    def insist(self) -> None:
        """Have every wait in it end at once, whatever it catches."""
        if self._scope is not None:
            self._scope.cancel()

    async def _run(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with anyio.CancelScope() as self._scope:
            try:
                await run()
            except Exception:
                logger.exception("An async view's task failed; this is a bug, please report it")
