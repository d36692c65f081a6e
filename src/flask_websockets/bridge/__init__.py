"""Both sides. The only crossing between threads and the event loop (I1).

The law of this folder:

1. Work for a WebSocket crosses from a thread to the loop through :class:`Door` alone, and from
   the loop to a thread through the hand-over queue of a :class:`Link` alone.
2. Memory streams are touched on the loop only: they are not thread-safe (I2).
3. Every attribute that both sides see names its owner on its line.

``door.py`` is the door, ``link.py`` what lies between one view and one socket, ``pipe.py`` what
lies between one HTTP request's thread and the loop, ``threads.py`` the threads themselves.
A writer and an async view have a task of ``tasks.py``; ``handshake.py`` is for what Flask does in
a thread. What waits in a link lies in the streams of ``stream.py``; what a thread waits for comes
by ``handover.py``.
``stacks.py`` says for the log where a view is that does not end.
``tuning.py`` asks kernel and interpreter for what makes threads cheaper.
``registry.py`` knows who is connected, where a limit holds for one address or one user.
"""

from .door import Door, Flag
from .handshake import Handshake
from .link import ASGIMessage, AsyncView, Finish, Item, Link, Outbound, Rest, Ticket
from .pipe import Pipe
from .registry import Entry, Registry, User, address_key, user_key
from .stacks import Stack, format_stack, stack_of_thread, thread_frames
from .tasks import Alarm, FreeTask, run_on_the_loop
from .threads import HttpPool, LoopThread, Rounds, start_view_thread
from .tuning import can_pin, pinned, spare_connections, tune_process

__all__ = [
    "ASGIMessage",
    "Alarm",
    "AsyncView",
    "Door",
    "Entry",
    "Finish",
    "Flag",
    "FreeTask",
    "Handshake",
    "HttpPool",
    "Item",
    "Link",
    "LoopThread",
    "Outbound",
    "Pipe",
    "Registry",
    "Rest",
    "Rounds",
    "Stack",
    "Ticket",
    "User",
    "address_key",
    "can_pin",
    "format_stack",
    "pinned",
    "run_on_the_loop",
    "spare_connections",
    "stack_of_thread",
    "start_view_thread",
    "thread_frames",
    "tune_process",
    "user_key",
]
