"""View side. ``WebSocket`` and ``AsyncWebSocket``: the verbs of a view's connection.

The same verbs: those of a ``WebSocket`` block, and may be called from any thread; those of an
``AsyncWebSocket`` are awaited, on the server's loop. Many may send, one at a time may receive.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from flask import json as flask_json

from .bridge import Handshake, Link
from .environ import WSGIEnviron
from .errors import ConnectionClosed, InvalidMessage, InvalidState
from .protocol import (
    Headers,
    Pairs,
    State,
    choose_subprotocol,
    encode_headers,
    message_bytes,
    validate_close,
    validate_headers,
    validate_token,
)

T = TypeVar("T")


class BaseWebSocket:
    """What a view's end of a connection knows, whether it blocks or is awaited."""

    #: The WSGI environ of the handshake, the one that ``request`` was made from.
    environ: WSGIEnviron

    def __init__(
        self,
        handshake: Handshake,
        environ: WSGIEnviron,
        supported: Sequence[str],
        accept_headers: Callable[[], Pairs],
    ) -> None:
        self.environ = environ
        self._handshake = handshake
        self._link = handshake.link
        self._offered = handshake.offered
        self._supported = supported
        self._accepted_subprotocol: str | None = None  # set at the accept
        self._accept_headers = accept_headers  # saves the session; called at the accept

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.environ.get('PATH_INFO', '?')} {self._link.state.value}>"
        )

    # -- state --------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether the connection is accepted and not over."""
        return self._link.state is State.OPEN

    @property
    def closed(self) -> bool:
        """Whether the connection is over, or was refused."""
        return self._link.state in (State.CLOSED, State.REFUSED)

    @property
    def close_code(self) -> int | None:
        """The close code, ours or the peer's, once the connection is over; None before.

        1005 and 1006 both mean that no close frame came: servers report either.
        """
        return self._link.code if self.closed else None

    @property
    def close_reason(self) -> str | None:
        """The close reason once the connection is over, ``""`` if none was given; None before."""
        return self._link.reason if self.closed else None

    @property
    def subprotocol(self) -> str | None:
        """The subprotocol in use: before the accept, the one that would be chosen."""
        if self._link.state is State.CONNECTING:
            return choose_subprotocol(self._offered, self._supported)
        return self._accepted_subprotocol

    # -- within the package ---------------------------------------------------------------------

    @property
    def link(self) -> Link:
        """For the extension: what lies between this view and its connection."""
        return self._link

    def _checked_accept(
        self, subprotocol: str | None, headers: Headers
    ) -> tuple[str | None, list[tuple[str, str]]]:
        """What the connection is accepted with, once all is as it should be."""
        if subprotocol is None:
            subprotocol = choose_subprotocol(self._offered, self._supported)
        elif validate_token("subprotocol", subprotocol) not in self._offered:
            raise ValueError(
                # Not which: some clients send a token for a subprotocol, and this may be logged.
                f"Subprotocol {subprotocol!r} was not offered: expected one of the client's "
                f"{len(self._offered)}, or None."
            )
        return subprotocol, validate_headers(headers)

    def _accept(self, subprotocol: str | None, pairs: list[tuple[str, str]]) -> None:
        """In the handshake's thread."""
        if self._link.state is State.CONNECTING:
            pairs = [*pairs, *self._accept_headers()]
        self._link.accept(
            {
                "type": "websocket.accept",
                "subprotocol": subprotocol,
                "headers": encode_headers(pairs),
            }
        )
        self._accepted_subprotocol = subprotocol


class WebSocket(BaseWebSocket):
    """A view's end of one connection.

    The connection is accepted by :meth:`accept`, or by itself at the first receive, send,
    iteration, subscribe or :meth:`wait_closed`. Once it is over, by whichever side, sending and
    receiving raise :exc:`ConnectionClosed`, and an iteration ends. What was received before is
    delivered first.

    While nobody receives, messages wait in the inbox; what happens when it is full, by default
    close 1013 after ``WEBSOCKETS_INBOX_TIMEOUT`` seconds, ``WEBSOCKETS_INBOX_FULL`` says. All
    methods may be called from any thread.

    A timeout is a number of seconds: 0 takes what is there already, None waits for as long as it
    takes, and a negative one raises :exc:`ValueError`.
    """

    # -- beginning and end ----------------------------------------------------------------------

    def accept(self, subprotocol: str | None = None, headers: Headers = ()) -> None:
        """Accept the connection now, before the first message would.

        :param subprotocol: one of those that the client offered. By default the first of the
            client's that the route supports; none if there is none in common.
        :param headers: more headers for the 101 response, as a mapping or as pairs. Some
            servers (daphne, granian) leave them out.
        :raises InvalidState: if it is accepted already.
        :raises ConnectionClosed: if the client has left, or the handshake has timed out.
        :raises ValueError: for a subprotocol that was not offered, or a header that may not be
            sent.
        :raises TypeError: for a subprotocol or a header that is no ``str``.
        """
        subprotocol, pairs = self._checked_accept(subprotocol, headers)
        self._accept(subprotocol, pairs)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Say goodbye, once what was sent before is on its way. Does not wait for the peer.

        Before the accept the handshake is answered 403. A second close does nothing.

        :param code: 1000, another code of RFC 6455 section 7.4 that may be sent, or 3000 to
            4999.
        :param reason: at most 123 bytes of UTF-8.
        :raises ValueError: for a code that may not be sent, or a reason that is too long.
        :raises TypeError: for a code that is no ``int``, or a reason that is no ``str``.
        """
        validate_close(code, reason)
        self._link.close(code, reason)

    def wait_closed(self, timeout: float | None = None) -> bool:
        """Wait until the connection is over, without receiving. Accepts it if need be.

        What the client sends meanwhile is not taken, and fills the inbox. Once that has been full
        for ``WEBSOCKETS_INBOX_TIMEOUT`` seconds, the connection is closed with 1013, unless
        ``WEBSOCKETS_INBOX_FULL`` says otherwise.

        :param timeout: seconds to wait at most; None for as long as it takes.
        :returns: True when it is over, False when the time has passed.
        """
        timeout = _checked_timeout(timeout)
        try:
            self._accept_if_connecting()
        except ConnectionClosed:
            return True  # the client left meanwhile
        return self._link.wait_closed(timeout)

    # -- receiving ------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None) -> str | bytes | None:
        """Wait for the next message: ``str`` for a text frame, ``bytes`` for a binary one.

        What was received before the client left is delivered first.

        :param timeout: seconds to wait at most; None for as long as it takes.
        :returns: the message, or None when the time has passed.
        :raises ConnectionClosed: when the connection is over.
        :raises ConcurrencyError: if another thread is receiving on this connection.
        """
        self._accept_if_connecting()
        return self._link.receive(_checked_timeout(timeout))

    def receive_json(self, timeout: float | None = None) -> Any:
        """Wait for the next message and parse it as JSON with the application's provider.

        :param timeout: seconds to wait at most; None for as long as it takes.
        :raises TimeoutError: when the time has passed: None is JSON.
        :raises InvalidMessage: if the message is not JSON; the connection stays open.
        :raises ConnectionClosed: when the connection is over.
        :raises ConcurrencyError: if another thread is receiving on this connection.
        """
        data = self.receive(timeout)
        if data is None:
            raise TimeoutError(f"No message came within {timeout:g} s.")
        return _parse_json(data)

    def iter_data(self) -> Iterator[str | bytes]:
        """Iterate over the messages as they come. Ends when the connection is over.

        Each step waits for as long as it takes, and gives ``str`` for a text frame, ``bytes`` for
        a binary one.

        :raises ConcurrencyError: if another thread is receiving on this connection.
        """
        try:
            while True:
                data = self.receive()
                assert data is not None  # only a timeout gives None
                yield data
        except ConnectionClosed:
            # Raised by our receive only: what the loop's body raises does not come by here.
            return

    def iter_text(self) -> Iterator[str]:
        """Iterate over the messages as text; a binary frame is decoded from UTF-8.

        See :meth:`iter_data`.

        :raises InvalidMessage: for a binary frame that is not UTF-8. It ends the loop; the
            connection stays open.
        """
        for data in self.iter_data():
            yield _as_text(data)

    def iter_bytes(self) -> Iterator[bytes]:
        """Iterate over the messages as bytes; a text frame is encoded as UTF-8.

        See :meth:`iter_data`.
        """
        for data in self.iter_data():
            yield _as_bytes(data)

    def iter_json(self) -> Iterator[Any]:
        """Iterate over the messages, parsed as JSON with the application's provider.

        See :meth:`iter_data`.

        :raises InvalidMessage: for a message that is not JSON. It ends the loop; the
            connection stays open.
        """
        for data in self.iter_data():
            yield _parse_json(data)

    # -- sending --------------------------------------------------------------------------------

    def send(self, data: str | bytes) -> None:
        """Send a message: ``str`` as a text frame, ``bytes`` as a binary one.

        Returns when the message is on its way to the server, which is not: received. While the
        outbox is full (``WEBSOCKETS_OUTBOX_MESSAGES``, ``WEBSOCKETS_OUTBOX_BYTES``) it waits, for
        ``WEBSOCKETS_SEND_TIMEOUT`` seconds at most. Nothing is ever dropped to make room for it.

        :param data: ``bytearray`` and ``memoryview`` are sent as ``bytes``.
        :raises ConnectionClosed: if the connection is over; also if the peer makes no room for
            the send timeout: then the connection is cut, with 1006.
        :raises TypeError: if *data* is neither.
        """
        message, size = _message(data)
        self._accept_if_connecting()
        self._link.send(message, size)

    def send_text(self, data: str) -> None:
        """Send a text frame. See :meth:`send`.

        :raises TypeError: if *data* is no ``str``.
        """
        self.send(_text(data))

    def send_bytes(self, data: str | bytes) -> None:
        """Send a binary frame; ``str`` is encoded as UTF-8. See :meth:`send`."""
        self.send(data.encode() if isinstance(data, str) else data)

    def send_json(self, data: Any) -> None:
        """Send *data* as JSON in a text frame, encoded by the application's provider.

        See :meth:`send`. Data that JSON cannot carry raises what the provider raises.
        """
        self.send(flask_json.dumps(data))

    def send_msgpack(self, data: Any) -> None:
        """Send *data* as MessagePack in a binary frame. See :meth:`send`.

        :raises ModuleNotFoundError: without the ``msgpack`` extra.
        """
        self.send(encode_msgpack(data))

    # -- within the package ---------------------------------------------------------------------

    def _accept_if_connecting(self) -> None:
        if self._link.state is State.CONNECTING:
            try:
                self.accept()
            except InvalidState:
                pass  # another thread was first: accepted is accepted


class AsyncWebSocket(BaseWebSocket):
    """An async view's end of one connection: the verbs of :class:`WebSocket`, awaited.

    For the tasks of the server's loop; on another thread each verb raises :exc:`WrongThread`.
    Many tasks may send, one at a time may receive. Cancelling a wait loses no message: a receive
    that is cancelled has taken none. Timeouts, errors and what happens to a full inbox are those
    of :class:`WebSocket`.
    """

    # -- beginning and end ----------------------------------------------------------------------

    async def accept(self, subprotocol: str | None = None, headers: Headers = ()) -> None:
        """Accept the connection now. See :meth:`WebSocket.accept`.

        The session is saved in the handshake's thread. Returns when Flask is done with the
        handshake, ``after_request`` functions included.
        """
        self._link.must_be_on_the_loop()
        checked = self._checked_accept(subprotocol, headers)
        await self._handshake.accept(partial(self._accept, *checked))

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Say goodbye; does not wait for the peer. See :meth:`WebSocket.close`."""
        validate_close(code, reason)
        self._link.must_be_on_the_loop()
        self._link.close(code, reason)
        self._link.catch_up()

    async def wait_closed(self, timeout: float | None = None) -> bool:
        """Wait until the connection is over. See :meth:`WebSocket.wait_closed`."""
        timeout = _checked_timeout(timeout)
        try:
            await self._accept_if_connecting()
        except ConnectionClosed:
            return True
        return await self._link.await_closed(timeout)

    # -- receiving ------------------------------------------------------------------------------

    async def receive(self, timeout: float | None = None) -> str | bytes | None:
        """Wait for the next message. See :meth:`WebSocket.receive`.

        :raises ConcurrencyError: if another task is receiving.
        """
        timeout = _checked_timeout(timeout)
        self._link.must_be_on_the_loop()
        if self._handshake.pending:
            await self._accept_if_connecting()
        return await self._link.areceive(timeout)

    async def receive_json(self, timeout: float | None = None) -> Any:
        """Wait for the next message and parse it. See :meth:`WebSocket.receive_json`."""
        data = await self.receive(timeout)
        if data is None:
            raise TimeoutError(f"No message came within {timeout:g} s.")
        return _parse_json(data)

    def iter_data(self) -> AsyncIterator[str | bytes]:
        """Iterate over the messages as they come. Ends when the connection is over."""
        return _Messages(self, lambda data: data)

    def iter_text(self) -> AsyncIterator[str]:
        """Iterate over the messages as text. See :meth:`WebSocket.iter_text`."""
        return _Messages(self, _as_text)

    def iter_bytes(self) -> AsyncIterator[bytes]:
        """Iterate over the messages as bytes. See :meth:`WebSocket.iter_bytes`."""
        return _Messages(self, _as_bytes)

    def iter_json(self) -> AsyncIterator[Any]:
        """Iterate over the messages, parsed as JSON. See :meth:`WebSocket.iter_json`."""
        return _Messages(self, _parse_json)

    # -- sending --------------------------------------------------------------------------------

    async def send(self, data: str | bytes) -> None:
        """Send a message: ``str`` as a text frame, ``bytes`` as a binary one.

        Returns when the server has the message, or the outbox. While the outbox is full it
        waits, for ``WEBSOCKETS_SEND_TIMEOUT`` seconds at most. See :meth:`WebSocket.send`.
        """
        message, size = _message(data)
        self._link.must_be_on_the_loop()
        if self._handshake.pending:
            await self._accept_if_connecting()
        await self._link.asend(message, size)

    async def send_text(self, data: str) -> None:
        """Send a text frame. See :meth:`send`."""
        await self.send(_text(data))

    async def send_bytes(self, data: str | bytes) -> None:
        """Send a binary frame; ``str`` is encoded as UTF-8. See :meth:`send`."""
        await self.send(data.encode() if isinstance(data, str) else data)

    async def send_json(self, data: Any) -> None:
        """Send *data* as JSON in a text frame. See :meth:`WebSocket.send_json`."""
        await self.send(flask_json.dumps(data))

    async def send_msgpack(self, data: Any) -> None:
        """Send *data* as MessagePack in a binary frame. See :meth:`WebSocket.send_msgpack`."""
        await self.send(encode_msgpack(data))

    # -- within the package ---------------------------------------------------------------------

    async def _accept_if_connecting(self) -> None:
        self._link.must_be_on_the_loop()
        if self._handshake.pending:
            try:
                await self.accept()
            except InvalidState:
                pass  # another task was first: accepted is accepted


class _Messages(AsyncIterator[T], Generic[T]):
    """An iteration over messages. No generator: left half-way, it leaves nothing to clean up."""

    def __init__(self, ws: AsyncWebSocket, convert: Callable[[str | bytes], T]) -> None:
        self._ws = ws
        self._convert = convert

    async def __anext__(self) -> T:
        try:
            data = await self._ws.receive()
        except ConnectionClosed:
            raise StopAsyncIteration from None
        assert data is not None  # only a timeout gives None
        return self._convert(data)


def _message(data: str | bytes) -> tuple[dict[str, Any], int]:
    """The ASGI message for *data*, and its size in bytes."""
    if isinstance(data, str):
        return {"type": "websocket.send", "text": data}, message_bytes(data)
    if isinstance(data, (bytes, bytearray, memoryview)):
        data = bytes(data)
        return {"type": "websocket.send", "bytes": data}, len(data)
    raise TypeError(
        f"A message is str or bytes; got {type(data).__name__}. "
        "send_json takes anything that JSON can carry."
    )


def _text(data: str) -> str:
    if not isinstance(data, str):
        raise TypeError(f"A text message is a str; got {type(data).__name__}.")
    return data


def _as_text(data: str | bytes) -> str:
    return data if isinstance(data, str) else _decode(data)


def _as_bytes(data: str | bytes) -> bytes:
    return data if isinstance(data, bytes) else data.encode()


def encode_msgpack(data: Any) -> bytes:
    """*data* as MessagePack.

    :raises ModuleNotFoundError: without the ``msgpack`` extra.
    """
    try:
        import msgpack
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "MessagePack needs the msgpack package: install flask-websockets[msgpack]."
        ) from error
    packed: bytes = msgpack.packb(data)
    return packed


def _checked_timeout(timeout: float | None) -> float | None:
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"A timeout is a number of seconds from 0 up, or None; got {timeout!r}.")
    return timeout


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidMessage(f"Expected UTF-8; got {len(data)} bytes: {error}") from error


def _parse_json(data: str | bytes) -> Any:
    text = data if isinstance(data, str) else _decode(data)
    try:
        return flask_json.loads(text)
    except (ValueError, RecursionError) as error:  # what no int() takes is no JSONDecodeError
        # Not the text: it may be logged.
        raise InvalidMessage(f"Expected JSON; got {len(text)} characters: {error}") from error
