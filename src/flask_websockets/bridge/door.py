"""Both sides. The door: how a thread reaches the loop, many hand-overs for one ring."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import anyio
import anyio.lowlevel

from ..errors import NotRunning
from .handover import Relay

T = TypeVar("T")

logger: logging.Logger = logging.getLogger("flask_websockets")

#: Commands answered in one turn of the loop. Enough that the ring's cost does not count, few
#: enough that the sockets get their turn: a publisher in a tight loop must not starve readers.
COMMANDS_PER_TURN = 500


class Event(Protocol):
    """What one task waits for, once."""

    def set(self) -> object:
        """Let the task go on."""

    def wait(self) -> Awaitable[object]:
        """What one awaits until it is set."""

    def is_set(self) -> bool:
        """Whether it is set."""
        ...


class _Future:
    """An event for one task of an asyncio loop, made for every message that one waits for.

    anyio's own looks for the running loop twice, which took an async view's echo a fifth of its
    time.
    """

    __slots__ = ("_future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._future = loop.create_future()

    def set(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def wait(self) -> Awaitable[object]:
        return self._future

    def is_set(self) -> bool:
        return self._future.done() and not self._future.cancelled()


class Flag:
    """Loop. An event, of which no more is made than it is used for.

    A connection has four, and waits for one of them at its end. anyio's take a thousand bytes.
    """

    __slots__ = ("_event", "_is_set", "_then")

    def __init__(self) -> None:
        self._is_set = False
        self._event: anyio.Event | None = None  # once somebody waits
        self._then: Callable[[], object] | None = None

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._is_set

    def set(self) -> None:
        """Let everybody go on who waits. Idempotent."""
        if self._is_set:
            return
        self._is_set = True
        if self._event is not None:
            self._event.set()
        if self._then is not None:
            then, self._then = self._then, None
            then()

    def then(self, call: Callable[[], object]) -> None:
        """Have *call* called when it is set, now if it is."""
        if self._is_set:
            call()
        else:
            self._then = call

    async def wait(self) -> None:
        """Wait until it is set."""
        if self._is_set:
            await anyio.lowlevel.checkpoint()
            return
        if self._event is None:
            self._event = anyio.Event()
        await self._event.wait()


class Door:
    """The one way from threads to one event loop.

    A thread *posts* a command, a callable and its argument, and goes on. The loop runs the
    commands in the order in which they were posted, whichever thread posted them: a send and a
    publish by one thread reach a subscriber in that order. Only the first post after the loop
    last looked rings; the loop then answers all of them in one wake-up.

    The door takes no lock, so a signal handler may post. Deques append and pop atomically, and
    the only flag is set before the ring and cleared before the look: a post that finds it set
    is seen by the look that follows the clearing.

    Must be made on the loop that it leads to.

    :param max_publishes: publishes and subscriptions that may wait at the same time.
    """

    def __init__(self, max_publishes: int) -> None:
        self._token = token = anyio.lowlevel.current_token().native_token
        self._ring: Callable[[], object]  # set once, before any thread knows the door
        self.relay: Relay  # set once: how threads are woken
        if isinstance(token, asyncio.AbstractEventLoop):
            # Without a context of its own, the ring would carry the ringing view's context
            # variables (its request, its g) into whatever the loop starts from there.
            context = contextvars.Context()
            self._ring = partial(token.call_soon_threadsafe, self._answer, context=context)
            self.relay = Relay(lambda: token.call_soon(self.relay.start, context=context))
        else:
            self._ring = partial(token.run_sync_soon, self._answer)  # type: ignore[attr-defined]
            self.relay = Relay(None)
        self.thread: int = threading.get_ident()  # set once: the loop's own thread
        self._commands: deque[tuple[Callable[[Any], object], Any]] = deque()  # threads append
        self._rung = False  # set by threads, cleared by the loop
        self._shut = False  # loop only; threads read it
        # One entry for each place that is free: pop is atomic, and so is the bound.
        self._slots: deque[None] = deque([None] * max_publishes)  # popped and appended anywhere
        self._waiting: deque[threading.Lock] = deque()  # appended and popped anywhere

    # -- any thread ---------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Any thread. Commands that the loop has not answered."""
        return len(self._commands)

    @property
    def shut(self) -> bool:
        """Any thread. Whether the loop has stopped answering, in order or not."""
        if self._shut:
            return True
        if isinstance(self._token, asyncio.AbstractEventLoop):
            self._shut = self._token.is_closed()
        else:
            try:
                self._ring()
            except RuntimeError:
                self._shut = True
        return self._shut

    def post(self, command: Callable[[T], object], argument: T) -> None:
        """Any thread, signal handlers included. Have the loop run ``command(argument)`` soon.

        :raises NotRunning: if the loop has stopped.
        """
        if self._shut:
            raise NotRunning("The server has stopped; nothing can be sent any more.")
        self._commands.append((command, argument))
        if not self._rung:
            self._rung = True
            try:
                self._ring()
            except RuntimeError as error:  # the loop was closed without a goodbye
                self._shut = True
                raise NotRunning("The server's event loop is closed.") from error

    def take_slot(self, timeout: float) -> None:
        """Any thread. Take one of the places for publishes and subscriptions; wait for one.

        :param timeout: seconds to wait at most.
        :raises NotRunning: if the loop has stopped.
        :raises TimeoutError: if the loop did not catch up in time.
        """
        deadline: float | None = None
        while True:
            try:
                return self._slots.pop()
            except IndexError:
                if self._shut:
                    raise NotRunning("The server has stopped.") from None
            now = time.monotonic()
            deadline = now + timeout if deadline is None else deadline
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
            # A slot may have come back before the lock stood in line: then do not wait.
            if not self._slots and not turn.acquire(timeout=max(0.0, deadline - now)):
                raise TimeoutError(
                    f"The event loop did not take a publish or subscribe for {timeout:g} s: "
                    "WEBSOCKETS_MAX_PENDING_PUBLISHES are waiting already."
                )

    def return_slot(self) -> None:
        """Any thread. Give back a place; whoever waits for one looks again."""
        self._slots.append(None)
        while self._waiting:
            try:
                self._waiting.popleft().release()
            except IndexError:
                return  # another thread was quicker

    def post_in_slot(self, command: Callable[[T], object], argument: T) -> None:
        """Any thread. Post in a place that was taken; it is free when the loop runs the command.

        :raises NotRunning: if the loop has stopped.
        """
        self.post(self._run_in_slot, (command, argument))

    # -- loop only ----------------------------------------------------------------------------

    @property
    def leads_here(self) -> bool:
        """Loop. Whether the running loop is the one that this door leads to."""
        if isinstance(self._token, asyncio.AbstractEventLoop):  # the short way: once a request
            try:
                return asyncio.get_running_loop() is self._token
            except RuntimeError:
                return False
        return anyio.lowlevel.current_token().native_token is self._token

    def event(self) -> Event:
        """Loop. What one task can wait for."""
        if isinstance(self._token, asyncio.AbstractEventLoop):
            return _Future(self._token)
        return anyio.Event()

    def drain(self) -> None:
        """Loop. Answer everything that was posted before this call.

        What the loop does next comes after it, as if it had been posted as well.
        """
        self._run(len(self._commands))

    def close(self) -> None:
        """Loop. Answer what was posted, and nothing any more."""
        self._shut = True
        self.drain()
        while self.relay.pass_on():
            pass
        while self._waiting:
            self._waiting.popleft().release()

    def _answer(self) -> None:
        """Loop. A thread rang."""
        self._rung = False  # before the look: see the class
        self._run(min(len(self._commands), COMMANDS_PER_TURN))
        if self._commands and not self._rung:
            self._rung = True
            self._ring()

    def _run(self, count: int) -> None:
        for _ in range(count):
            command, argument = self._commands.popleft()
            try:
                command(argument)
            except Exception:
                # One connection's trouble is not the others': they are behind in the queue.
                logger.exception("A command failed at the door; this is a bug, please report it")

    def _run_in_slot(self, posted: tuple[Callable[[Any], object], Any]) -> None:
        command, argument = posted
        self.return_slot()
        command(argument)
