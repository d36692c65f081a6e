"""Both sides. What the loop gives to threads that wait, and how they are woken: in a relay."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")

#: Threads that are woken at the end of a turn. With one the next would be woken only after the
#: interpreter was free; with eight, and with all, they are in each other's way.
WOKEN_AT_ONCE = 2


class Sleeper(Protocol):
    """A thread that waits, or several of which one is meant."""

    def wake(self) -> bool:
        """Any thread. Wake it; whether it will call :meth:`Relay.pass_on` for that, and soon."""
        ...


class Relay:
    """Both sides. Wakes threads: a few at the end of the loop's turn, and each of them the next.

    Whoever is woken wants the interpreter. In the middle of a turn the loop has it; and where a
    hundred are woken at once, ninety-eight find it taken, sleep again, and ask for it every 5 ms.

    Nobody in the line is forgotten: while somebody stands there, the loop is about to wake one, or
    a thread that was woken has not yet passed on. One that did not wait when its turn came will
    not pass on; so whoever woke it wakes one more.

    :param at_turn_end: has ``start`` called at the end of the loop's turn; None where a loop has
        no such place: each is woken at once then.
    """

    def __init__(self, at_turn_end: Callable[[], object] | None) -> None:
        self._at_turn_end = at_turn_end  # set once
        self._line: deque[Sleeper] = deque()  # the loop appends, anybody pops

    def add(self, sleeper: Sleeper) -> None:
        """Loop. Have *sleeper* woken."""
        if self._at_turn_end is None:
            sleeper.wake()
            return
        self._line.append(sleeper)
        # After it was appended: who takes the one before it, and does not wake a thread with it,
        # finds this one.
        if len(self._line) == 1:
            self._at_turn_end()

    def start(self) -> None:
        """Loop. Wake the first ones."""
        for _ in range(WOKEN_AT_ONCE):
            self.pass_on()

    def pass_on(self) -> bool:
        """Any thread. Wake the next one; False if there is none."""
        try:
            while not self._line.popleft().wake():
                pass
        except IndexError:
            return False
        return True


class Handover(Generic[T]):
    """Both sides. What the loop has for one thread, first in first out."""

    __slots__ = ("_given", "_is_awaited", "_relay", "_wakes")

    def __init__(self, relay: Relay) -> None:
        self._relay = relay  # set once
        self._given: list[T] = []  # the loop appends, the thread pops
        self._wakes: SimpleQueue[None] = SimpleQueue()  # one for each that was given
        self._is_awaited = False  # set and cleared by the thread

    def give(self, item: T) -> None:
        """Loop. Give *item* to the thread, and have it woken."""
        self._given.append(item)
        self._relay.add(self)

    def put(self, item: T) -> None:
        """Loop. Leave *item* for whoever looks."""
        self._given.append(item)
        self._wakes.put(None)

    def wake(self) -> bool:
        """Any thread. Let the thread take what was given; False if it did not wait for it."""
        self._wakes.put(None)
        return self._is_awaited

    def get(self, timeout: float | None) -> T:
        """Thread. Wait for what is given.

        :raises Empty: when *timeout* seconds have passed; it is there for the next.
        """
        self._is_awaited = True
        try:
            self._wakes.get(True, timeout)
        finally:
            self._is_awaited = False  # before it passes on: see the relay
            self._relay.pass_on()
        return self._given.pop(0)

    def get_nowait(self) -> T:
        """Any thread. What was given.

        :raises Empty: if nothing was.
        """
        self._wakes.get_nowait()
        return self._given.pop(0)

    def is_empty(self) -> bool:
        """Any thread. Whether nothing was given that was not taken."""
        return not self._given
