"""Both sides. What this process asks of its kernel and its interpreter, so that threads cost less.

Nothing here changes what is done, only how long it takes. Each is asked for where it is known,
and where it is refused everything goes on without it; WEBSOCKETS_TUNE_PROCESS switches all of
it off. Figures are in docs/explanation/performance.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

#: prctl(2), since Linux 6.16.
PR_FUTEX_HASH, PR_FUTEX_HASH_SET_SLOTS = 78, 1
#: Buckets for threads that wait for a lock: more than there may be connections, by default.
FUTEX_SLOTS = 16_384

#: So many connections are worth a rarer look at all objects.
MANY = 1_000
#: Collections of the middle generation before one of all that there is: Python's default, and
#: while there are many connections.
USUAL_THRESHOLD, OLD_THRESHOLD = 10, 100


@cache
def tune_process() -> None:
    """Any thread. Tune this process, once: a server is about to serve."""
    enlarge_futex_hash()
    spare_the_collector()


def enlarge_futex_hash() -> bool:
    """Any thread. Have the kernel find waiting threads at once; False where it will not.

    Since Linux 6.16 a process has a hash table of its own for the locks that its threads wait
    for, of 16 buckets on two cores. With 5,000 parked views each release of a lock walks through
    hundreds of them. Older kernels have one large table for all, and answer EINVAL.
    """
    if sys.platform != "linux":
        return False
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return bool(prctl(PR_FUTEX_HASH, PR_FUTEX_HASH_SET_SLOTS, FUTEX_SLOTS, 0, 0) == 0)


def spare_the_collector() -> None:
    """Any thread. Have the collector not look again at what was loaded before the start.

    Modules, classes, routes stay as long as the process: looking at all of them takes tens of
    milliseconds, in which nothing else happens.
    """
    gc.collect()
    gc.freeze()


def spare_connections(count: int) -> None:
    """Loop. Have the collector look at all connections a tenth as often while there are many.

    They stay, or nearly: looking at 10,000 takes 0.7 s, and while they come it was done with every
    quarter that came. What is garbage in a circle waits longer for it, so with few it is as ever.

    :param count: of connections, told at each change.
    """
    if count not in (MANY, MANY // 2):
        return
    young, middle, old = gc.get_threshold()
    if count == MANY and old == USUAL_THRESHOLD:  # or the application has its own, or its Python
        gc.set_threshold(young, middle, OLD_THRESHOLD)
    elif count == MANY // 2 and old == OLD_THRESHOLD:
        gc.set_threshold(young, middle, USUAL_THRESHOLD)


def yield_to_the_loop() -> None:
    """Thread. Have the kernel not preempt the loop when it wakes this thread.

    A thread that is woken while the loop holds the interpreter takes the core, fails to get
    the interpreter and sleeps again: two wasted switches a message. Under SCHED_BATCH, which
    needs no privilege, it waits for its turn.
    """
    if hasattr(os, "SCHED_BATCH"):
        try:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        except OSError:
            pass  # a sandbox that forbids it: slower, nothing else


def can_pin() -> bool:
    """Any thread. Whether threads can be kept on a core here."""
    return hasattr(os, "sched_setaffinity")


@contextmanager
def pinned(number: int) -> Iterator[None]:
    """Any thread. Keep this thread, and those that it starts meanwhile, on one core.

    The interpreter is handed from the loop to a view and back for each message. From one core to
    another that takes a wake-up of the other core; on one core it is a switch of threads.

    :param number: of the process among its like; they share the cores that they may use in turn.
    """
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(allowed)[number % len(allowed)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
