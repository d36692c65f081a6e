"""Loop side. One connection: its reader, its deadlines.

Its own task, in which the server called us, is the reader, and waits for the view at the end; it
alone calls ASGI ``receive`` (I4). A connection ends by closing its link (I5): the view finds out at
its next word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import anyio

from .bridge import Alarm, Link
from .counters import Counters
from .environ import WSGIEnviron
from .protocol import LOGIN_OVER, message_bytes, plain_response, unavailable
from .rate import RateLimit
from .running_view import RunningView
from .servers import uvicorn
from .writer import Receive, Send, Writer

WSGIApp = Callable[..., Iterable[bytes]]


#: RFC 6455, section 7.4.1: a message is too big.
TOO_LARGE = 1009
#: RFC 6455 registry: "try again later".
BUSY = (1013, "the server is too busy")


@dataclass(frozen=True)
class Upgrade:
    """A handshake that is already under way in this process, and where it goes on.

    The development server and the test client hand one over in ``scope["state"]``.
    """

    #: The application from where it goes on, instead of from its beginning.
    app: WSGIApp | None = None
    #: The environ that reached that place, instead of one built from the scope.
    environ: WSGIEnviron | None = None
    #: Called on the loop with the exception that came out of the application.
    on_error: Callable[[BaseException], None] | None = None
    #: Called with the HTTP status that the handshake is answered with, None if its client has left
    #: before: on the loop, and by whoever finds that the server has refused it itself.
    on_answer: Callable[[int | None], object] = lambda status: None


class Connection:
    """One WebSocket connection, from its handshake to the end of its view.

    :param slots: of handshakes at the same time; it has one.
    """

    def __init__(
        self,
        link: Link,
        counters: Counters,
        receive: Receive,
        send: Send,
        slots: anyio.Semaphore,
    ) -> None:
        self.link = link
        self.counters = counters
        self._receive = receive
        self._protocol = uvicorn.protocol_of(send)
        self.reading = anyio.CancelScope()
        self._alarm = Alarm()  # for the handshake, for the login's age, for the goodbye
        self._send = send
        self._slots: anyio.Semaphore | None = slots  # one is held until the handshake's end
        self._idle = False  # the reader has nothing in its hands
        self._rate: RateLimit | None = None  # the reader's, where there is a limit
        self._pause_ends: float | None = None  # the reader's, where a message waits for the rate
        #: The view behind it.
        self.view: RunningView = RunningView(link, counters)

    @property
    def protocol(self) -> Any | None:
        """uvicorn's protocol object, where it is uvicorn that calls us."""
        return self._protocol

    async def run(self) -> None:
        """Serve the connection until it is over and its view has ended, or is reported."""
        link = self.link
        writer = Writer(self, self._send)  # not kept: it has the connection
        writer.follow()
        link.settled.then(self._settle)
        link.ending.then(self._await_goodbye)
        link.over.then(self.reading.cancel)
        self._alarm.set(link.config.handshake_timeout, self._time_out_handshake)
        try:
            try:
                await self._read()
                await link.over.wait()
            finally:
                # Whatever ends this task, the server's cancellation included, ends the link (I5).
                link.lose(1006)
                self._alarm.cancel()
                writer.leave()
                if self._protocol is not None:
                    uvicorn.take_from(self._protocol, None)
            await self.view.wait()
        except anyio.get_cancelled_exc_class():
            self.view.abandon()  # the server cancels us; the link is closed by now
            raise

    def end_handshake(self) -> None:
        """Let the next one have its handshake. Idempotent."""
        if self._slots is not None:
            self._slots.release()
            self._slots = None

    def cut(self) -> None:
        """End a connection whose peer takes nothing any more (I11)."""
        self.link.lose(1006, "the peer did not take what was sent")
        if self._protocol is not None:
            uvicorn.abort(self._protocol)
            self.counters.aborted += 1

    def time_out_send(self) -> None:
        """Cut it, because its peer did not take a message in time."""
        if self.link.over.is_set():
            return
        self.counters.send_timeouts += 1
        self.link.entry.registry.warn(
            "send_timeouts",
            "The peer of %s did not take a message for %g s (WEBSOCKETS_SEND_TIMEOUT); it was cut",
            *(self.link.entry, self.link.config.send_timeout),
        )
        self.cut()

    def _time_out_handshake(self) -> None:
        link = self.link
        if link.time_out_handshake(unavailable("The handshake took too long.")):
            self.counters.handshake_timeouts += 1
            link.entry.registry.warn(
                "handshake_timeouts",
                "The view of %s neither accepted nor refused within %g s "
                "(WEBSOCKETS_HANDSHAKE_TIMEOUT); its handshake was answered 503",
                *(link.entry, link.config.handshake_timeout),
            )

    def _settle(self) -> None:
        """The handshake has its answer."""
        self.end_handshake()
        if self.link.ending.is_set():
            return  # the accept failed where it was sent: the alarm is for the goodbye
        self._alarm.cancel()
        if self.link.entry.max_age is not None:
            self._alarm.set(self.link.entry.max_age, self._expire)

    def _expire(self) -> None:
        self.counters.expired += self.link.expel(LOGIN_OVER, "the login is too old")

    def _await_goodbye(self) -> None:
        """Nothing but goodbye is left to say, and there is a time for that."""
        if not self.link.over.is_set():
            self._alarm.set(self.link.patience, self._await_no_more)

    def _await_no_more(self) -> None:
        if self.link.timed_out:
            self.time_out_send()
        else:
            self.cut()

    async def _read(self) -> None:
        """Reader. Take what comes as soon as it comes (I10), until the peer is gone."""
        link, receive = self.link, self._receive
        with self.reading:
            while True:
                self._idle = True
                message = await receive()
                self._idle = False
                if message["type"] == "websocket.receive":
                    data = message.get("text")
                    if data is None:
                        data = message.get("bytes") or b""
                    size = message_bytes(data)
                    if not link.config.passes(size) and not await self._is_allowed(size):
                        return
                    if not link.deliver(data, size) and not await self._make_room(data, size):
                        return
                elif message["type"] == "websocket.disconnect":
                    if message.get("code") == TOO_LARGE and uvicorn.has_closed(self._protocol):
                        self._refuse_size()  # under serve its limit is ours
                    # After it receive is never called again: hypercorn and daphne would hang.
                    link.lose(message.get("code") or 1005, message.get("reason") or "")
                    return

    def take(self, data: str | bytes) -> bool:
        """Reader's side. Take a message as it comes; False if the reader has to see it."""
        size = message_bytes(data)
        return self._idle and self.link.config.passes(size) and self.link.deliver(data, size)

    def _refuse_size(self) -> None:
        self.link.entry.registry.refuse(
            "oversized",
            "The peer of %s sent a message of more than %d bytes (WEBSOCKETS_MAX_MESSAGE_BYTES); "
            "it was closed with 1009",
            *(self.link.entry, self.link.config.max_message_bytes),
        )

    async def _is_allowed(self, size: int) -> bool:
        """Reader. Whether the peer may send a message of *size* bytes, now or in a moment.

        Called where there is something to look at only.

        :returns: False if the connection is closed for it.
        """
        link, config = self.link, self.link.config
        if size > config.max_message_bytes:
            reason = f"a message may have {config.max_message_bytes} bytes"
            if link.expel(TOO_LARGE, reason, plain_response(413, reason)):
                self._refuse_size()
            return False
        messages, size_limit = config.max_messages_per_second, config.max_bytes_per_second
        self._pause_ends, now = None, anyio.current_time()
        if self._rate is None:
            self._rate = RateLimit(messages, size_limit, now)
        seconds = self._rate.wait(size, now)
        if not seconds:
            return True
        if config.rate_exceeded == "slow_down":
            self.counters.rate_slowed += 1
            # Or the pong would not be read (I10); and whoever waits for room after it has the rest.
            self._pause_ends = now + config.inbox_timeout
            while now + seconds <= self._pause_ends:
                await anyio.sleep(seconds)
                now = anyio.current_time()
                seconds = self._rate.wait(size, now)
                if not seconds:
                    return True
        reason = "too much was sent in too short a time"
        if link.expel(1008, reason, plain_response(429, reason)):
            link.entry.registry.refuse(
                "rate_closed",
                "The peer of %s sent more than it may (WEBSOCKETS_MAX_MESSAGES_PER_SECOND: %s, "
                "WEBSOCKETS_MAX_BYTES_PER_SECOND: %s); it was closed with 1008",
                *(link.entry, messages, size_limit),
            )
        return False

    async def _make_room(self, data: str | bytes, size: int) -> bool:
        """Reader. The inbox is full: do what WEBSOCKETS_INBOX_FULL says (I10).

        :returns: False if the connection is closed for it.
        """
        link, config = self.link, self.link.config
        if config.inbox_full == "drop_newest":
            self.counters.inbox_dropped += 1
            return True
        if config.inbox_full == "pause":
            with anyio.CancelScope() as pause:
                pause.deadline = self._pause_ends or anyio.current_time() + config.inbox_timeout
                await link.deliver_when_room(data, size)
                return True
        if not link.expel(*BUSY, unavailable("The server is too busy.")):
            return False  # its view has closed meanwhile
        self.counters.inbox_closed += 1
        link.entry.registry.warn(
            "inbox_closed",
            "The view of %s did not take what it received; its inbox was full for %g s "
            "(WEBSOCKETS_INBOX_MESSAGES, _BYTES, _TIMEOUT) and it is closed with 1013",
            *(link.entry, config.inbox_timeout if config.inbox_full == "pause" else 0),
        )
        return False
