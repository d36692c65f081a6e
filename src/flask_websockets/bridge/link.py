"""Both sides. The link: what lies between one view's thread and one socket's tasks.

Two anyio memory streams, both on the loop: messages in, ASGI messages out. The thread never
touches them; it posts commands at the door, and finds what was received in its hand-over queue.

In: the reader puts each message into the inbound stream, or, when the thread waits already,
hands it over directly. A thread that has used up its batch sets a flag, which the reader sees;
it posts *ask* only if more has come meanwhile, and the loop hands over all that lies in the stream.

Out: ``send`` posts the message; the loop gives it to the server at once where that is known to
be safe (``inline``), else puts it into the outbound stream for the writer task. Published
messages take the same way, so there is one outbox, first in first out.

An async view lives on the loop itself: it takes from the inbound stream and gives to the
server without the door. Its verbs here begin with an *a*.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterable
from queue import Empty
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import anyio
import anyio.lowlevel

from ..config import Config
from ..errors import ConcurrencyError, ConnectionClosed, NotRunning, UsageError, WrongThread
from ..protocol import (
    Action,
    Pairs,
    PlainResponse,
    State,
    message_bytes,
    refusal_messages,
    transition,
)
from .door import Door, Event, Flag
from .handover import Handover
from .registry import Entry
from .stream import Stream

T = TypeVar("T")

logger: logging.Logger = logging.getLogger("flask_websockets")

ASGIMessage: TypeAlias = dict[str, Any]


class Rest(Protocol):
    """The rest of an ASGI ``send`` that was begun inline and has to wait."""

    def __await__(self) -> Generator[Any, Any, None]: ...

    def close(self) -> None: ...


class Ticket:
    """Loop. A published message that waits in the outbox, and may be dropped there.

    Nothing can be taken out of an anyio stream, so its place in the stream stays; what is
    dropped is the message.

    :param taken: called with the ticket when its message is on its way.
    """

    __slots__ = ("_taken", "message", "size")

    def __init__(self, message: ASGIMessage, size: int, taken: Callable[[Ticket], object]) -> None:
        self.message: ASGIMessage | None = message  # None when it was dropped
        self.size: int = size
        self._taken = taken

    def redeem(self) -> ASGIMessage | None:
        """Loop. The message, for the writer; None if it was dropped."""
        if self.message is not None:
            self._taken(self)
        return self.message

    def close(self) -> None:
        """Loop. The connection is over, and nobody comes for the message."""


#: What is left to a thread when an async view has ended, if anything is. Returns the error that
#: came out of the application, if one did.
Finish: TypeAlias = Callable[[], BaseException | None] | None
#: An async view, with the context to run it in.
AsyncView: TypeAlias = tuple[Callable[[], Coroutine[Any, Any, Finish]], contextvars.Context]

#: What the writer finishes.
Outbound: TypeAlias = ASGIMessage | Rest | Ticket
#: With its size in bytes.
Item: TypeAlias = tuple[Outbound, int]

#: A failed send means that the peer is gone, but the reader knows with which code: it gets so
#: many seconds to say so. On the servers measured the disconnect is queued already.
DISCONNECT_GRACE = 1.0

#: Sends of an async view after which it lets the loop turn, if nothing else has made it wait:
#: a view that sends in a tight loop must not starve the others.
SENDS_PER_TURN = 32

_END: Final = object()


class Link:
    """What one view and one connection share. Made on the loop, in the handshake."""

    # A dict of so many attributes has 1.6 kB.
    __slots__ = (
        *("_arrived", "_asked", "_awaiting_end", "_batch", "_blocked", "_closed", "_code"),
        *("_dismissal", "_door", "_dropped", "_given", "_handover", "_hung_up", "_inbound"),
        *("_inbox_ended", "_is_writing", "_levels", "_lock", "_moved", "_moved_bytes"),
        *("_on_loop", "_outbound", "_outbox_bytes", "_outbox_messages", "_posted"),
        *("_posted_bytes", "_reason", "_received", "_received_bytes", "_receiving", "_room"),
        *("_sent_in_turn", "_state", "_taken", "_taken_bytes", "_waiting", "config", "deaf"),
        *("ending", "entry", "inline", "over", "patience", "settled", "start_task"),
        *("start_writer", "timed_out", "view_thread"),
    )

    def __init__(self, door: Door, config: Config, entry: Entry | None = None) -> None:
        self._door = door  # set once
        #: What is known of the connection.
        self.entry: Entry = entry or Entry()  # set once; the view's thread completes it
        #: The limits of this connection: the application's, or its route's.
        self.config: Config = config  # set by the view's thread, before the accept

        self._lock = threading.Lock()
        self._state = State.CONNECTING  # guarded by _lock; reading alone needs none
        self._code, self._reason = 1006, ""  # guarded by _lock
        self._posted = self._posted_bytes = 0  # guarded by _lock: sends given to the door
        self._levels: dict[str, int] = {}  # guarded by _lock: channel -> nested subscribes
        self._closed: threading.Event | None = None  # guarded by _lock; made when waited for
        self._hung_up = False  # guarded by _lock: our side said goodbye
        self._dismissal: tuple[int, str] | None = None  # guarded by _lock: how to leave
        self._awaiting_end = 0  # guarded by _lock: waits of the view itself, not of its helpers

        self._receiving = threading.Lock()
        self._batch: list[Any] = []  # guarded by _receiving: newest first, so that pop() is next
        self._asked = False  # guarded by _receiving: the next batch has been asked for
        self._taken = self._taken_bytes = 0  # guarded by _receiving; the loop reads them
        self._handover: Handover[list[Any]] = Handover(door.relay)  # the loop gives, it gets

        # Loop only. Bounded by deliver, which sees what the thread was handed as well.
        self._inbound: Stream[str | bytes] = Stream()
        self._waiting = False  # the thread sets it when it waits, the loop clears it as it gives
        # Loop only: an async view; a writer is at it; the end has been handed over.
        self._on_loop = self._is_writing = self._inbox_ended = False
        self._arrived: Event | None = None  # loop only: what an async view waits for
        self._given: str | bytes | None = None  # loop only: what it was given while it waited
        self._received = self._received_bytes = 0  # set on the loop: all that _taken will come to
        self._room: anyio.Event | None = None  # loop only; threads see whether the reader waits

        # The bound is kept by _fits, which sees what is still at the door as well; a limit of
        # the stream's own could only lose a message that was accepted already.
        self._outbound: Stream[Item] = Stream()  # loop only
        self._moved = self._moved_bytes = 0  # loop only: of _posted, those that reached the loop
        self._outbox_messages = self._outbox_bytes = 0  # loop only: in the stream or being sent
        # Loop only: tickets in the stream without a message; sends of an async view.
        self._dropped = self._sent_in_turn = 0
        # Whom to wake, and the size that must fit. Threads append, the loop pops.
        self._blocked: list[tuple[Callable[[], object], int]] = []

        #: The thread of the handshake, in which a plain view runs.
        self.view_thread: int = 0  # set once, by that thread
        #: Nothing is taken for the peer any more.
        self.deaf: bool = False  # loop only
        #: Loop only. Starts an async view; set by the connection, while it has no view yet.
        self.start_task: Callable[[AsyncView], None] | None = None
        #: Loop only. Starts a writer, which takes what is to be sent until nothing is.
        self.start_writer: Callable[[], None] | None = None
        #: Loop only. Hands a message to the server without a task; returns what is left to the
        #: writer. None where that is not known to be safe, and before the accept.
        self.inline: Callable[[ASGIMessage], Outbound | None] | None = None
        self.settled: Flag = Flag()  # loop only: the handshake has its answer
        self.ending: Flag = Flag()  # loop only: nothing but goodbye is left to say
        #: Seconds that the goodbye may take.
        self.patience: float = config.send_timeout  # loop only, once accepted
        self.timed_out: bool = False  # loop only: a view's send came to its deadline
        #: The last word is said, or nobody is there.
        self.over: Flag = Flag()  # loop only

    # -- any thread ---------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Any thread."""
        return self._state

    @property
    def code(self) -> int:
        """Any thread. The close code, once the connection is over."""
        return self._code

    @property
    def reason(self) -> str:
        """Any thread. The close reason, once the connection is over."""
        return self._reason

    def belongs_to(self, door: Door) -> bool:
        """Any thread. Whether this link leads through *door*."""
        return self._door is door

    @property
    def depths(self) -> tuple[int, int, int, int]:
        """Any thread. Messages and bytes in the inbox, messages and bytes in the outbox."""
        return (
            self._received - self._taken,
            self._received_bytes - self._taken_bytes,
            self._posted - self._moved + self._outbox_messages,
            self._posted_bytes - self._moved_bytes + self._outbox_bytes,
        )

    def statistics(self) -> dict[str, Any]:
        """Any thread. What lies in the two streams, as anyio reports it."""
        return {"inbound": self._inbound.statistics(), "outbound": self._outbound.statistics()}

    def accept(self, message: ASGIMessage) -> None:
        """Any thread. Accept the connection; does not wait for the loop."""
        with self._lock:
            following = transition(self._state, Action.ACCEPT, self._code, self._reason)
            self._door.post(self._settle, [message])
            self._state = following

    def refuse(self, status: int, headers: Pairs, body: bytes) -> None:
        """Any thread. Answer the handshake with an HTTP response; does not wait."""
        messages = refusal_messages(self.entry.extensions, status, headers, body)
        with self._lock:
            self._state = transition(self._state, Action.REFUSE, self._code, self._reason)
            self._over_for_threads()
            self._post_quietly(self._turn_away, messages)

    def send(self, message: ASGIMessage, size: int) -> None:
        """Any thread. Post one message of *size* bytes; wait while the outbox is full (I6).

        :raises ConnectionClosed: if the connection is over, or if the peer made no room within
            the send timeout, after which it is.
        """
        with self._lock:
            if self._state is not State.OPEN:
                transition(self._state, Action.SEND, self._code, self._reason)
            if self._fits(size):
                return self._post_send(message, size)
        self._wait_and_send(message, size)

    def receive(self, timeout: float | None) -> str | bytes | None:
        """View thread. The next message, or None when *timeout* seconds have passed.

        :raises ConnectionClosed: after the last message, when the connection is over.
        :raises ConcurrencyError: if another thread is receiving.
        """
        if not self._receiving.acquire(blocking=False):
            raise ConcurrencyError(
                "Another thread is receiving on this connection. Many threads may send, "
                "one may receive: let one thread receive and pass on what it gets."
            )
        try:
            if self._hung_up:
                raise ConnectionClosed(self._code, self._reason)
            if not self._batch and not self._fetch(timeout):
                return None
            if self._batch[-1] is _END:  # left where it is: the end stays the end
                self._depart()
                raise ConnectionClosed(self._code, self._reason)
            message = self._took(self._batch.pop())
            if self._room is not None:
                self._post_quietly(self._make_room, None)
            return message
        finally:
            self._receiving.release()

    def close(self, code: int, reason: str) -> None:
        """Any thread. Say goodbye once what was sent before is gone; does not wait."""
        with self._lock:
            connecting = self._state is State.CONNECTING
            following = transition(self._state, Action.CLOSE)
            if following is self._state:
                return
            self._state = following
            message: ASGIMessage = {"type": "websocket.close", "code": code, "reason": reason}
            if not connecting:
                self._code, self._reason = code, reason
            self._hung_up = True
            self._over_for_threads()
            self._post_quietly(self._turn_away, [message])

    def _depart(self) -> None:
        """View's side. It has come to the end of what it was to finish: say goodbye."""
        if self._dismissal is not None:
            self.close(*self._dismissal)

    def wait_closed(self, timeout: float | None) -> bool:
        """Any thread. Wait until the connection is over; False if *timeout* passes first."""
        self._must_not_block_the_loop("wait_closed")
        own = threading.get_ident() == self.view_thread
        with self._lock:
            closed = self._end_for_threads()
            departs = own and self._dismissal is not None
            self._awaiting_end += own
        try:
            if departs:
                self._depart()
            return closed.wait(timeout)
        finally:
            with self._lock:
                self._awaiting_end -= own

    def join(self, channels: Iterable[str], subscribe: Callable[[Any], None]) -> None:
        """Any thread. Enter *channels* one level deeper; have the loop subscribe the new ones.

        :raises ConnectionClosed: if the connection is over.
        :raises UsageError: above the limit of channels; then nothing is subscribed.
        """
        # A leave is posted for each join at most: bounding the joins bounds both (I6).
        try:
            self._door.take_slot(self.config.send_timeout)
        except TimeoutError:
            self.entry.registry.count("refused_subscribes")
            raise
        try:
            with self._lock:
                self._door.post_in_slot(subscribe, (self, self._enter(channels)))
        except BaseException:
            self._door.return_slot()
            raise

    def join_here(self, channels: Iterable[str], subscribe: Callable[[Any], None]) -> None:
        """Loop. Enter *channels*, as ``join`` does; they are subscribed when it returns."""
        with self._lock:
            self._door.post(subscribe, (self, self._enter(channels)))
        self._door.drain()

    def _enter(self, channels: Iterable[str]) -> list[str]:
        """Any thread, with the lock held. Those of *channels* that are new."""
        if self._state is not State.OPEN:
            transition(self._state, Action.SEND, self._code, self._reason)
        new = [name for name in channels if name not in self._levels]
        limit = self.config.max_channels_per_connection
        if len(self._levels) + len(new) > limit:
            self.entry.registry.count("refused_subscribes")
            raise UsageError(
                f"A connection may be subscribed to {limit} channels "
                f"(WEBSOCKETS_MAX_CHANNELS_PER_CONNECTION); {len(self._levels)} and "
                f"{len(new)} new ones are more. Nothing was subscribed."
            )
        for name in channels:
            self._levels[name] = self._levels.get(name, 0) + 1
        return new

    def leave(
        self, channels: Iterable[str], unsubscribe: Callable[[Any], None], *, entirely: bool
    ) -> None:
        """Any thread. Undo one ``join`` of *channels*, or all of them."""
        with self._lock:
            gone = []
            for name in channels:
                level = self._levels.get(name, 0)
                if level > 1 and not entirely:
                    self._levels[name] = level - 1
                elif level:
                    del self._levels[name]
                    gone.append(name)
            if gone:
                self._post_quietly(unsubscribe, (self, gone))

    def configure(self, config: Config) -> None:
        """View thread. Set the limits of this connection, before it is accepted."""
        self.config, self.patience = config, config.send_timeout

    def post(self, command: Callable[[T], None], argument: T) -> None:
        """Any thread. Have the loop run ``command(argument)`` soon.

        :raises NotRunning: if the loop has stopped.
        """
        self._door.post(command, argument)

    def report(self, command: Callable[[T], None], argument: T) -> None:
        """View thread. The same; nothing happens if the loop has stopped."""
        self._post_quietly(command, argument)

    def _fits(
        self, size: int, *, low_water: bool = False, freed: int = 0, freed_bytes: int = 0
    ) -> bool:
        """Any thread. Whether the outbox takes one more message of *size* bytes.

        Between the high and the low mark lies half the outbox: a sender that was stopped is
        not woken for every single message that leaves.
        """
        messages = self._posted - self._moved + self._outbox_messages - freed
        if not messages:
            return True  # one message larger than the outbox passes when it is empty
        taken = self._posted_bytes - self._moved_bytes + self._outbox_bytes - freed_bytes + size
        share = 2 if low_water else 1
        return (
            messages < self.config.outbox_messages / share
            and taken <= self.config.outbox_bytes / share
        )

    def _post_send(self, message: ASGIMessage, size: int) -> None:
        # Inside the lock, so that several senders' messages are posted as they are counted.
        self._posted += 1
        self._posted_bytes += size
        self._door.post(self._move, (message, size))

    def _wait_and_send(self, message: ASGIMessage, size: int) -> None:
        self._must_not_block_the_loop("send")
        deadline = time.monotonic() + self.config.send_timeout
        while True:
            with self._lock:
                if self._state is not State.OPEN:
                    transition(self._state, Action.SEND, self._code, self._reason)
                if self._fits(size):
                    return self._post_send(message, size)
                turn = threading.Lock()
                turn.acquire()
                waiting = (turn.release, size)
                self._blocked.append(waiting)
            # The loop may have made room before the lock stood in line: let it look again.
            self._post_quietly(self._unblock, None)
            if not turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
                self._post_quietly(self._wait_no_more, waiting)
                with self._lock:
                    # A peer that reads slowly, but reads, has made room above the low mark.
                    if self._state is State.OPEN and self._fits(size):
                        return self._post_send(message, size)
                self._post_quietly(self._give_up, None)
                with self._lock:
                    closed = self._end_for_threads()
                closed.wait(DISCONNECT_GRACE)  # whoever hears of it finds the connection over
                raise self._made_no_room()

    def _made_no_room(self) -> ConnectionClosed:
        return ConnectionClosed(1006, f"the peer made no room for {self.config.send_timeout:g} s")

    def _fetch(self, timeout: float | None) -> bool:
        """View thread. Get the next batch; False when *timeout* passes."""
        self._must_not_block_the_loop("receive")
        if not self._asked:
            # Before the look: the loop counts what it receives, and then looks for this. So either
            # the look sees the message, or the loop sees that somebody waits for it.
            self._asked = self._waiting = True  # stay so after a timeout
            if self._received != self._taken:  # all that was handed over has been taken
                self._post_quietly(self._ask, None)
            # A loop that stopped in order has handed over the end to every link.
            if self._door.shut and self._handover.is_empty():
                raise ConnectionClosed(self._code, self._reason)
        try:
            self._batch = self._handover.get(timeout)
        except Empty:
            return False
        self._asked = False
        return True

    def _must_not_block_the_loop(self, verb: str) -> None:
        if threading.get_ident() == self._door.thread:
            raise WrongThread(
                f"{verb} was called on the event loop's own thread and would stop every "
                "connection. Call it from a view's thread, or from a thread of your own."
            )

    def _post_quietly(self, command: Callable[[Any], object], argument: Any) -> None:
        try:
            self._door.post(command, argument)
        except NotRunning:
            pass  # the loop has stopped: it ended this link already, nothing is left to do

    def _end_for_threads(self) -> threading.Event:
        """Any thread, with the lock held. What is set once the connection is over."""
        if self._closed is None:
            self._closed = threading.Event()
            if self._state in (State.CLOSED, State.REFUSED):
                self._closed.set()
        return self._closed

    def _over_for_threads(self) -> None:
        """Any thread, with the lock held."""
        if self._closed is not None:
            self._closed.set()

    # -- loop: what threads posted --------------------------------------------------------------

    def _settle(self, messages: list[ASGIMessage]) -> None:
        if not self.settled.is_set():
            is_accept = messages[0]["type"] == "websocket.accept"
            self.entry.on_answer(101 if is_accept else messages[0].get("status", 403))
        for message in messages:
            self.write(message, 0)
        self.settled.set()

    def _turn_away(self, messages: list[ASGIMessage]) -> None:
        """Loop. The last words of our side: a refusal, or a close."""
        if self.deaf:
            return
        self._end_inbox()
        self.inline = None  # the writer stops the reader before it says goodbye
        self._settle(messages)
        self.deaf = True
        self._unblock(None)  # the state is no longer open: they all go on, and raise
        self.ending.set()

    def _move(self, item: tuple[ASGIMessage, int]) -> None:
        """Loop. A view's message has come through the door."""
        message, size = item
        self.write(message, size)
        # After it: a thread that looks in between counts the message twice, and not never.
        self._moved += 1
        self._moved_bytes += size
        if self._blocked:
            self._unblock(None)

    def _ask(self, _: None) -> None:
        """Loop. The thread has used up its batch, and has seen that more is there."""
        # It may have been given that meanwhile, or the end, and may wait for the next already.
        if self._waiting and not self._inbox_ended and self._received != self._taken:
            self.hand_over_all()

    def _make_room(self, _: None) -> None:
        """Loop. The thread has taken a message while the reader waits for room."""
        if self._room is not None:
            self._room.set()

    def _wait_no_more(self, waiting: tuple[Callable[[], object], int]) -> None:
        """Loop. Forget a sender that waited for room."""
        if waiting in self._blocked:
            self._blocked.remove(waiting)

    def _give_up(self, _: None) -> None:
        """Loop. A send has waited for as long as it may (I11)."""
        self.timed_out = True
        self.fail(patience=0)

    def _unblock(self, _: None) -> None:
        """Loop. Let those senders go on for whom there is room."""
        for _turn in range(len(self._blocked)):
            wake, size = self._blocked.pop(0)
            if self._state is not State.OPEN or self._fits(size, low_water=True):
                wake()
            else:
                self._blocked.append((wake, size))

    # -- loop: an async view ----------------------------------------------------------------------

    def start_async(self, view: AsyncView) -> None:
        """Loop. The view is async: start it, and have its messages where it takes them."""
        self._on_loop = True
        if self.start_task is not None:
            self.start_task(view)

    async def areceive(self, timeout: float | None) -> str | bytes | None:
        """Loop. The next message, or None when *timeout* seconds have passed.

        :raises ConnectionClosed: after the last message, when the connection is over.
        :raises ConcurrencyError: if another task is receiving.
        """
        if not self._receiving.acquire(blocking=False):
            await anyio.lowlevel.checkpoint()  # whatever fails lets the loop turn first
            raise ConcurrencyError(
                "Another task is receiving on this connection. Many tasks may send, one may "
                "receive: let one task receive and pass on what it gets."
            )
        try:
            while not self._inbox_ended and not self._hung_up:
                if (data := self._next()) is not None:
                    return self._took(data)
                self._sent_in_turn = 0
                # Waiting here, not in the stream, is cheaper; and a wait that is cancelled
                # leaves the message where it is.
                self._arrived = self._door.event()
                if timeout is None:
                    await self._arrived.wait()
                    continue
                with anyio.move_on_after(timeout):
                    await self._arrived.wait()
                if not self._arrived.is_set():
                    return None
            if self._hung_up or self._at_end():
                self._depart()
                await anyio.lowlevel.checkpoint()
                raise ConnectionClosed(self._code, self._reason)
            return self._took(self._batch.pop())
        finally:
            self._arrived = None
            self._make_room(None)
            self._receiving.release()

    def _next(self) -> str | bytes | None:
        """Loop. What an async view gets next, if it is there."""
        data, self._given = self._given, None
        if data is None and self._received != self._taken:
            data = self._inbound.take()
        return data

    def _at_end(self) -> bool:
        if not self._batch:
            try:
                self._batch = self._handover.get_nowait()
            except Empty:
                return True  # it ended before the view began
        return self._batch[-1] is _END

    def _took(self, message: str | bytes) -> str | bytes:
        """View thread or loop. Count a message that the view takes."""
        self._taken += 1
        self._taken_bytes += message_bytes(message)
        return message

    async def asend(self, message: ASGIMessage, size: int) -> None:
        """Loop. Send one message of *size* bytes; wait while the outbox is full (I6).

        :raises ConnectionClosed: if the connection is over, or if the peer made no room within
            the send timeout, after which it is.
        """
        self._sent_in_turn += 1
        if self._sent_in_turn > SENDS_PER_TURN or self._state is not State.OPEN:
            self._sent_in_turn = 0
            await anyio.lowlevel.checkpoint()
        if self._door.pending:
            self._door.drain()  # what threads published before comes first
        if not self._fits(size):
            await self._wait_for_room(size)
        if self._state is not State.OPEN:
            transition(self._state, Action.SEND, self._code, self._reason)
        self.write(message, size)

    async def _wait_for_room(self, size: int) -> None:
        with anyio.move_on_after(self.config.send_timeout):
            while self._state is State.OPEN and not self._fits(size):
                turn = anyio.Event()
                waiting = (turn.set, size)
                self._blocked.append(waiting)
                try:
                    await turn.wait()
                finally:
                    self._wait_no_more(waiting)
        # A peer that reads slowly, but reads, has made room above the low mark.
        if self._state is State.OPEN and not self._fits(size):
            self._give_up(None)
            with anyio.move_on_after(DISCONNECT_GRACE):
                await self.over.wait()  # whoever hears of it finds the connection over
            raise self._made_no_room()

    async def await_closed(self, timeout: float | None) -> bool:
        """Loop. Wait until the connection is over; False if *timeout* passes first."""
        self._depart()
        with self._lock:
            self._awaiting_end += 1
        try:
            with anyio.move_on_after(timeout):
                await self.ending.wait()
                if self._state is State.OPEN:  # a send has failed; the reader may know more
                    await self.over.wait()
        finally:
            with self._lock:
                self._awaiting_end -= 1
        return self._state in (State.CLOSED, State.REFUSED)

    def catch_up(self) -> None:
        """Loop. Have everything done that was posted so far, by this view too."""
        self.must_be_on_the_loop()
        self._door.drain()

    def must_be_on_the_loop(self) -> None:
        """Loop. What an async view's connection asks of whoever uses it.

        :raises WrongThread: in another thread, which may have a loop of its own.
        """
        if threading.get_ident() != self._door.thread:
            raise WrongThread(
                "An async view's connection belongs to the server's event loop, and this is "
                "another thread: pass the call on with anyio.from_thread.run, or with "
                "asyncio.run_coroutine_threadsafe and the server's loop."
            )

    # -- loop: reader, writer, hub ----------------------------------------------------------------

    def deliver(self, data: str | bytes, size: int) -> bool:
        """Loop. Give a received message to the view; False if the inbox is full (I6)."""
        if self._inbox_ended:
            return True  # our side said goodbye: the peer's messages go nowhere
        # What the thread was handed and has not taken yet is held as well.
        held = self._received - self._taken
        held_bytes = self._received_bytes - self._taken_bytes
        if held and (
            held >= self.config.inbox_messages or held_bytes + size > self.config.inbox_bytes
        ):
            return False
        self._received += 1
        self._received_bytes += size
        if self._waiting and not held:
            self._waiting = False
            self._handover.give([data])
        elif self._arrived is not None and not held:
            self._given = data
            self._arrived.set()
        else:
            self._inbound.put(data)
            if self._waiting:
                self.hand_over_all()
        return True

    async def deliver_when_room(self, data: str | bytes, size: int) -> None:
        """Loop. Wait until the view has made room for *data*, and deliver it."""
        try:
            while True:
                # Before the look: the thread counts what it takes, and then looks for this. So
                # either the look sees the room, or the thread sees that it is waited for.
                self._room = anyio.Event()
                if self.deliver(data, size):
                    return
                await self._room.wait()
        finally:
            self._room = None

    def hand_over_all(self, *, end: bool = False) -> None:
        """Loop. Hand over what lies in the inbound stream, and the end if it is one."""
        batch: list[Any] = [] if self._given is None else [self._given]
        self._given = None
        try:
            while True:
                batch.append(self._inbound.take())
        except anyio.WouldBlock:
            pass
        if end:
            batch.append(_END)
        batch.reverse()
        self._waiting = False
        if self._on_loop:
            self._handover.put(batch)  # its view looks there as soon as the stream has ended
        else:
            self._handover.give(batch)

    def offer(self, message: ASGIMessage, size: int) -> bool:
        """Loop. Take one published message for the peer; False if the outbox is full (I6)."""
        left = self._take_short_way(message)
        if left is message and not self._fits(size):
            return False
        if left is not None:
            self._enqueue(left, size)
        return True

    def has_room(self, size: int, freed: int = 0, freed_bytes: int = 0) -> bool:
        """Loop. Whether a message that may be dropped fits, once so much was dropped.

        While a view's send waits for room, such messages may take the place of others, and not
        become more: they must not keep the outbox full for ever.
        """
        if self._blocked and not freed:
            return False
        return self._fits(size, freed=freed, freed_bytes=freed_bytes)

    def write_droppable(
        self, message: ASGIMessage, size: int, taken: Callable[[Ticket], object]
    ) -> Ticket | None:
        """Loop. Give a message to the server at once, or let it wait: then under a ticket."""
        left = self._take_short_way(message)
        if left is not message:
            if left is not None:
                self._enqueue(left, size)
            return None
        ticket = Ticket(message, size, taken)
        self._enqueue(ticket, size)
        return ticket

    def drop(self, ticket: Ticket) -> None:
        """Loop. Take a waiting message out of the outbox."""
        ticket.message = None
        self._outbox_messages -= 1
        self._outbox_bytes -= ticket.size
        self._dropped += 1
        if self._dropped > self.config.outbox_messages:
            # Empty places are bounded too (I6): put back what still waits, in its order.
            waiting = self._drain_outbox()
            for item in waiting:
                self._outbound.put(item)

    def redeem(self, ticket: Ticket) -> ASGIMessage | None:
        """Writer. The message of a ticket; None if it was dropped."""
        if ticket.message is None:
            self._dropped -= 1
        return ticket.redeem()

    def write(self, message: ASGIMessage, size: int) -> None:
        """Loop. Give a message to the server, or to the writer behind those that wait."""
        if self.deaf:
            return
        left = self._take_short_way(message)
        if left is not None:
            self._enqueue(left, size)

    def _take_short_way(self, message: ASGIMessage) -> Outbound | None:
        """Loop. Give a message to the server at once, if that is safe; what is left to send."""
        if self.inline is None or self._outbox_messages:
            return message
        try:
            return self.inline(message)
        except Exception:  # whatever the server calls it: the peer cannot be reached
            logger.debug("The server could not send", exc_info=True)
            self.fail()
            return None

    def _enqueue(self, left: Outbound, size: int) -> None:
        self._outbox_messages += 1
        self._outbox_bytes += size
        self._outbound.put((left, size))
        if not self._is_writing and self.start_writer is not None:
            self._is_writing = True
            self.start_writer()

    def next_outbound(self) -> Item | None:
        """Writer. What is to be sent next; None if nothing is, and the writer is over."""
        try:
            return self._outbound.take()
        except (anyio.WouldBlock, anyio.EndOfStream, anyio.ClosedResourceError):
            self._is_writing = False
            return None

    def written(self, size: int) -> None:
        """Loop. The server has taken a message of *size* bytes."""
        self._outbox_messages -= 1
        self._outbox_bytes -= size
        if self._blocked:
            self._unblock(None)

    # -- loop: endings --------------------------------------------------------------------------

    def expel(self, code: int, reason: str, refusal: PlainResponse | None = None) -> bool:
        """Loop. Close because of the peer, or of who it is; what waits for it is dropped.

        The close frame goes out if the peer takes anything within the close timeout.

        :param refusal: the answer to a handshake that has none yet.
        :returns: False if the connection is over already.
        """
        messages = self._end(code, reason, refusal)
        if not messages:
            return False
        self.patience = self.config.close_timeout
        if self._state is State.CLOSED and not self.settled.is_set():
            # The accept is still at the door, and comes first.
            self._post_quietly(self._turn_away, messages)
            return True
        for left, size in self._drop_outbox():
            if isinstance(left, dict) and left["type"] == "websocket.accept":
                self._enqueue(left, size)  # or the close would be a refusal
        self._turn_away(messages)
        return True

    def dismiss(self, code: int, reason: str, refusal: PlainResponse) -> None:
        """Loop. Have the peer leave; what was sent before goes out first.

        :param refusal: the answer to a handshake that has none yet.
        """
        messages = self._end(code, reason, refusal)
        if messages:
            self._door.drain()  # what threads sent before
            self._turn_away(messages)

    def let_finish(self, code: int, reason: str, refusal: PlainResponse) -> None:
        """Loop. Have the peer leave when the view is done with what it has received.

        One that waits for the end is done. One that waits for a message, now or later, gets the
        end of the inbox instead, and says goodbye itself.
        """
        with self._lock:
            busy = self._state is State.OPEN and not self._awaiting_end
            if busy:
                self._dismissal = code, reason
        if busy:
            self._end_inbox()
        else:
            self.dismiss(code, reason, refusal)

    def _end(self, code: int, reason: str, refusal: PlainResponse | None) -> list[ASGIMessage]:
        """Loop. Make an end; the last words, none if there is one already."""
        with self._lock:
            if self._state is State.OPEN:
                self._state = transition(self._state, Action.CLOSE)
                self._code = code
                messages: list[ASGIMessage] = [
                    {"type": "websocket.close", "code": code, "reason": reason}
                ]
            elif self._state is State.CONNECTING and refusal is not None:
                self._state = transition(self._state, Action.REFUSE)
                messages = refusal_messages(self.entry.extensions, *refusal)
            else:
                return []
            self._reason = reason
            self._over_for_threads()
        return messages

    def fail(self, patience: float = DISCONNECT_GRACE) -> None:
        """Loop. The peer cannot be reached; the reader may still learn why."""
        self.deaf = True
        self.patience = min(self.patience, patience)
        self.ending.set()

    def lose(self, code: int, reason: str = "") -> None:
        """Loop. The peer is gone, or we are: nothing crosses this link any more. Idempotent."""
        with self._lock:
            if self._state in (State.CONNECTING, State.OPEN):
                self._state = transition(self._state, Action.LOSE)
                self._code, self._reason = code, reason
                self._over_for_threads()
        self.deaf = True
        self._end_inbox()
        self._drop_outbox()
        self._outbound.close()
        self._unblock(None)
        if not self.settled.is_set():
            self.entry.on_answer(None)
        for event in (self.over, self.ending, self.settled):
            event.set()

    def time_out_handshake(self, refusal: PlainResponse) -> bool:
        """Loop. Answer for a view that does not; False if it has answered meanwhile."""
        # Not _end: a view that accepts in this very moment keeps its connection.
        with self._lock:
            if self._state is not State.CONNECTING:
                return False
            self._state = transition(self._state, Action.REFUSE)
            self._reason = "the handshake timed out"
            self._over_for_threads()
        self._turn_away(refusal_messages(self.entry.extensions, *refusal))
        return True

    def _end_inbox(self) -> None:
        # The end is handed over whether the thread waits or not: after it no loop is needed.
        if not self._inbox_ended:
            self._inbox_ended = True
            self.hand_over_all(end=True)
            self._inbound.close()
            if self._room is not None:
                self._room.set()
            if self._arrived is not None:
                self._arrived.set()

    def _drop_outbox(self) -> list[Item]:
        """Loop. Drop what waits; what it was."""
        waiting = self._drain_outbox()
        for left, size in waiting:
            if not isinstance(left, dict):
                left.close()
            self._outbox_messages -= 1
            self._outbox_bytes -= size
        return waiting

    def _drain_outbox(self) -> list[Item]:
        """Loop. Take everything out of the outbound stream that was not dropped."""
        waiting: list[Item] = []
        try:
            while True:
                left, size = self._outbound.take()
                if not isinstance(left, Ticket) or left.message is not None:
                    waiting.append((left, size))
        except (anyio.WouldBlock, anyio.EndOfStream, anyio.ClosedResourceError):
            pass
        self._dropped = 0
        return waiting
