"""Loop side. What only uvicorn can do: a send without a task, an end and a beginning that come.

Everything here looks inside uvicorn's WebSocket protocol classes, and its classes of one HTTP
exchange. ``protocol_of`` and ``exchange_of`` decide whether they are what we know; where not,
everything works without this module, only slower. tests/test_servers_uvicorn.py is the contract.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import lru_cache
from typing import Any, cast

import h11

from ..bridge import ASGIMessage, Rest
from .frames import takes_messages

_KNOWN = {
    ("uvicorn.protocols.websockets.wsproto_impl", "WSProtocol"),
    ("uvicorn.protocols.websockets.websockets_sansio_impl", "WebSocketsSansIOProtocol"),
}

_KNOWN_EXCHANGES = {
    ("uvicorn.protocols.http.httptools_impl", "RequestResponseCycle"),
    ("uvicorn.protocols.http.h11_impl", "RequestResponseCycle"),
}

#: Seconds between two looks at transports that should be closing.
WATCH_INTERVAL = 1.0


def protocol_of(send: Callable[..., Any]) -> Any | None:
    """The uvicorn protocol whose own ``send`` this is; None for anything else.

    A ``send`` that a middleware has wrapped is anything else.
    """
    protocol = getattr(send, "__self__", None)
    kind = type(protocol)
    if (
        (kind.__module__, kind.__qualname__) in _KNOWN
        and getattr(send, "__func__", None) is getattr(kind, "send", None)
        and isinstance(getattr(protocol, "writable", None), asyncio.Event)
        and hasattr(getattr(protocol, "transport", None), "abort")
        and isinstance(getattr(protocol, "connections", None), set)
        and isinstance(getattr(protocol, "handshake_complete", None), bool)
        and isinstance(getattr(protocol, "close_sent", None), bool)
    ):
        return protocol
    return None


#: The answer to a handshake that cannot be read.
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"

#: Fragments of one message. At 1 KiB each they are uvicorn's largest message; whoever sends smaller
#: ones has us keep an object for each, and for empty ones no limit of bytes ever comes.
MAX_FRAGMENTS = 16 * 1024


@lru_cache
def _limited(kind: Any) -> Any:
    """One of uvicorn's WebSocket protocol classes, without two ways to fill its memory."""

    class Limited(takes_messages(kind)):  # type: ignore[misc]
        # uvicorn's
        read_paused: bool
        frames: list[bytes]  # websockets-sansio's
        _pongs_wait = False  # loop only: reading is paused, the peer does not take its pongs

        def handle_ping(self, *event: Any) -> None:
            """Answer, and read no more from whoever does not take the answers."""
            super().handle_ping(*event)
            if not self.writable.is_set() and not self.read_paused:
                self.read_paused = self._pongs_wait = True
                self.transport.pause_reading()

        def resume_writing(self) -> None:
            """Called by the transport. The peer has taken its pongs."""
            super().resume_writing()
            if self._pongs_wait:
                self._pongs_wait = False
                if self.read_paused and self.queue.empty():
                    self.read_paused = False
                    self.transport.resume_reading()

        def handle_cont(self, event: Any) -> None:
            """websockets-sansio. Take one more fragment, if there may be one."""
            if self.close_sent:
                return
            if len(self.frames) < MAX_FRAGMENTS:
                super().handle_cont(event)
            else:
                self.conn.fail(1009, f"a message may have {MAX_FRAGMENTS} fragments")
                self.handle_parser_exception()

    # Under its own name: it is still one of those that are known.
    Limited.__name__, Limited.__qualname__ = kind.__name__, kind.__qualname__
    Limited.__module__ = kind.__module__
    return Limited


def limit_frames(protocol: Any) -> None:
    """Limit what a peer can have uvicorn (0.54) keep for it, beside messages."""
    kind: Any = type(protocol)
    if not hasattr(kind, "take"):
        protocol.__class__ = _limited(kind)


def take_from(protocol: Any, take: Callable[[str | bytes], bool] | None) -> None:
    """Have *take* called with each message as it comes, instead of ``receive`` returning it."""
    if hasattr(protocol, "take"):
        protocol.take = take


def has_closed(protocol: Any | None) -> bool:
    """Whether uvicorn has said goodbye by itself. Ask while we have not."""
    return protocol is not None and bool(protocol.close_sent)


def takes_at_once(protocol: Any | None) -> bool:
    """Whether a connection's ``send`` returns at once. False where nobody knows."""
    return protocol is not None and bool(protocol.writable.is_set())


def note_refusal(protocol: Any | None) -> None:
    """Have uvicorn know that a handshake was answered with a response.

    Its websockets-sansio protocol (0.54) does not notice, and logs an error for each.
    """
    if protocol is not None:
        protocol.handshake_complete = True


class InlineSend:
    """Steps uvicorn's ``send`` without a task, while whoever else sends is idle (I4).

    uvicorn's ``send`` waits for nothing but room in its transport, and looks at that first: when
    there is some, one step takes the message to the transport.

    :param is_writable: says whether there is room.
    """

    def __init__(
        self,
        send: Callable[[Any], Awaitable[None]],
        is_writable: Callable[[], bool],
    ) -> None:
        self._send = cast(Callable[[Any], Coroutine[Any, Any, None]], send)
        self._is_writable = is_writable
        # The step runs where the writer task would have run it: with its context variables.
        self._context = contextvars.copy_context()

    def __call__(self, message: ASGIMessage) -> ASGIMessage | Rest | None:
        """Send *message*; return what is left to a task, None if nothing is."""
        if not self._is_writable():
            return message
        sending = self._send(message)
        try:
            waits_for = self._context.run(sending.send, None)
        except StopIteration:
            return None
        return _Suspended(sending, waits_for)


class _Suspended:
    """The rest of a ``send`` that had to wait after all."""

    def __init__(self, sending: Coroutine[Any, Any, None], waits_for: Any) -> None:
        self._sending = sending
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        waits_for = self._waits_for
        while True:
            try:
                try:
                    value = yield waits_for
                except BaseException as error:
                    waits_for = self._sending.throw(error)
                else:
                    waits_for = self._sending.send(value)
            except StopIteration:
                return

    def close(self) -> None:
        self._sending.close()


def inline_of(protocol: Any) -> InlineSend:
    """How the messages of a connection are sent without a task."""
    return InlineSend(protocol.send, protocol.writable.is_set)


def abort(protocol: Any) -> None:
    """Cut a connection or exchange now: what the peer did not take is dropped."""
    cast(asyncio.Transport, protocol.transport).abort()


class Watch:
    """Aborts transports that are closing and cannot, because their peer does not read.

    ``transport.close()`` flushes first, without limit; uvicorn calls it for a failed keepalive,
    at shutdown and ten seconds after our close frame. One timer looks at all of them.
    """

    def __init__(self, patience: float, on_abort: Callable[[], None]) -> None:
        self._patience = patience  # seconds that a closing transport gets
        self._on_abort = on_abort
        self._protocols: dict[Any, float | None] = {}  # loop only: when it was seen closing
        self._timer: asyncio.TimerHandle | None = None  # loop only

    def add(self, protocol: Any) -> None:
        """Watch a connection until its transport is gone."""
        limit_frames(protocol)
        self._protocols[protocol] = None
        if self._timer is None:
            self._schedule()

    def close(self) -> None:
        """Stop watching."""
        if self._timer is not None:
            self._timer.cancel()
        self._protocols.clear()

    def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(min(WATCH_INTERVAL, self._patience / 4), self._look)

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        for protocol, since in list(self._protocols.items()):
            if protocol not in protocol.connections:  # connection_lost takes it out
                del self._protocols[protocol]
            elif since is None:
                if protocol.transport.is_closing():
                    self._protocols[protocol] = now
            elif now - since >= self._patience:
                abort(protocol)
                self._on_abort()
                del self._protocols[protocol]
        self._timer = None
        if self._protocols:
            self._schedule()


class _LimitedHead(asyncio.Protocol):
    """Gives a client a limited time for each request head. Mixed into uvicorn's HTTP protocols.

    uvicorn limits the time between two requests only. The limit starts with the connection, and
    with the first byte of a later request; a WebSocket handshake counts until it is understood.
    """

    head_timeout: float
    # uvicorn's
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    cycle: Any

    _head_timer: asyncio.TimerHandle | None = None  # loop only
    _in_body = False  # loop only: a request's head is there, and its body not whole

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except UnicodeDecodeError:  # wsproto (1.3), for a subprotocol that is not ASCII
            self.transport.write(BAD_REQUEST)
            self.transport.close()
            return
        if self.transport.get_protocol() is not self:
            self._head_came()
            answer_refused_handshake(self.transport)
        elif self._reads_body() or (self.cycle is not None and not self.cycle.response_complete):
            self._head_came()
        elif self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        """Called by httptools."""
        cast(Any, super()).on_headers_complete()
        self._in_body = True

    def on_message_complete(self) -> None:
        """Called by httptools."""
        cast(Any, super()).on_message_complete()
        self._in_body = False

    def _reads_body(self) -> bool:
        """Whether the rest of a body comes, which a view may not have waited for."""
        conn = getattr(self, "conn", None)  # of h11
        return self._in_body or (conn is not None and conn.their_state is h11.SEND_BODY)

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout, self.transport.abort)

    def _head_came(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def limit_heads(kind: type[asyncio.Protocol], seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol class *kind*, with so many seconds for each request head."""
    return type(kind.__name__, (_LimitedHead, kind), {"head_timeout": seconds})


def answer_refused_handshake(transport: asyncio.Transport) -> None:
    """Send the answer to a handshake that the websockets library has refused while reading it.

    A header line over 8 kB or more than 128 headers: its answer lies there, and uvicorn (0.54)
    neither sends it nor closes the connection.
    """
    protocol: Any = transport.get_protocol()
    if getattr(protocol, "handshake_initiated", True) or not hasattr(protocol, "conn"):
        return
    for data in protocol.conn.data_to_send():
        transport.write(data)
    transport.close()


def exchange_of(method: Callable[..., Any], name: str) -> Any | None:
    """The uvicorn HTTP exchange whose own ``receive`` or ``send`` *method* is; None otherwise."""
    exchange = getattr(method, "__self__", None)
    kind = type(exchange)
    if (
        (kind.__module__, kind.__qualname__) in _KNOWN_EXCHANGES
        and getattr(method, "__func__", None) is getattr(kind, name, None)
        and isinstance(getattr(exchange, "message_event", None), asyncio.Event)
        and isinstance(getattr(exchange, "disconnected", None), bool)
        and isinstance(getattr(getattr(exchange, "flow", None), "write_paused", None), bool)
        and hasattr(getattr(exchange, "transport", None), "abort")
    ):
        return exchange
    return None


def is_send_of(exchange: Any | None, send: Callable[..., Any]) -> bool:
    """Whether *send* is a known exchange's own."""
    return (
        exchange is not None
        and getattr(send, "__self__", None) is exchange
        and getattr(send, "__func__", None) is getattr(type(exchange), "send", None)
    )


def has_received(exchange: Any | None) -> bool:
    """Whether ``receive`` returns at once. False where nobody knows."""
    return exchange is not None and cast(bool, exchange.message_event.is_set())


def is_writable(exchange: Any | None) -> bool:
    """Whether ``send`` returns at once. False where nobody knows."""
    return exchange is not None and not exchange.flow.write_paused


def has_ended(exchange: Any | None) -> bool:
    """Whether the client left, or uvicorn refused the request. False where nobody knows."""
    return exchange is not None and (exchange.disconnected or exchange.transport.is_closing())
