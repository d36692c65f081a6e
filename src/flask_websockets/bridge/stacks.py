"""Both sides. Where threads and coroutines are right now, for the log."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

#: The places of one stack, the outermost first: file, line, function. Equal stacks are equal.
Stack: TypeAlias = tuple[tuple[str, int, str], ...]


def thread_frames() -> Mapping[int, FrameType]:
    """Any thread. The innermost frame of each thread, by its ident."""
    return sys._current_frames()


#: Functions of this package that call the user's code: what is before them tells nobody anything.
_ENTRANCES = {
    (str(Path(__file__).parent.parent / module), function)
    for module, function in (("answers.py", "_call"), ("views.py", "_run"), ("views.py", "_await"))
}


def stack_of_thread(ident: int, frames: Mapping[int, FrameType]) -> Stack:
    """Any thread. Where the thread *ident* is; empty if it has ended.

    :param frames: of :func:`thread_frames`, which costs too much to ask for each thread.
    """
    places: list[tuple[str, int, str]] = []
    frame = frames.get(ident)
    while frame is not None:
        places.append(_place(frame))
        frame = frame.f_back
    return _from_the_users_code(tuple(reversed(places)))


def stack_of_coroutine(coroutine: Any) -> Stack:
    """Loop. Where a coroutine waits; empty if it has ended."""
    return _from_the_users_code(tuple(map(_place, _awaited(coroutine))))


def format_stack(stack: Stack) -> str:
    """Any thread. The stack as a traceback shows it."""
    lines = []
    for file, number, function in stack:
        lines.append(f'  File "{file}", line {number}, in {function}')
        if source := linecache.getline(file, number).strip():
            lines.append(f"    {source}")
    return "\n".join(lines)


def _from_the_users_code(stack: Stack) -> Stack:
    begin = 0
    for index, (file, _, function) in enumerate(stack, 1):
        if (file, function) in _ENTRANCES:
            begin = index
    return stack[begin:] or stack


def _place(frame: FrameType) -> tuple[str, int, str]:
    return frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_qualname


def _awaited(coroutine: Any) -> Iterator[FrameType]:
    """The frames of a coroutine, and of what it awaits, as far as that is Python."""
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is None:
            return
        yield frame
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
