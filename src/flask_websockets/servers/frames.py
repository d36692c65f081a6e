"""Loop side. Messages past uvicorn's ``receive`` and ``send``, where it costs the most.

uvicorn's ``receive`` returns what a queue holds: for every message the transport is paused, the
task woken, and the transport resumed. Here a message is taken where its frame has been read.

uvicorn's ``send`` makes a frame for each connection, and compresses for each that negotiated
permessage-deflate (RFC 7692). What is in the frame is the same for all of them: here it is made
once for each way of compressing, and kept with the message.

``frame_writer_of`` decides whether a connection is what we know; where not, uvicorn's ``send``
does it. tests/test_servers_frames.py is the contract.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from ..bridge import ASGIMessage, Outbound
from ..protocol import SharedMessage

#: Sends a message; returns what is left to a task, None if nothing is.
Inline = Callable[[ASGIMessage], Outbound | None]


def takes_messages(kind: Any) -> Any:
    """One of uvicorn's WebSocket protocol classes, whose messages are taken where they come."""

    class TakesMessages(kind):  # type: ignore[misc]
        # uvicorn's, of websockets-sansio
        frames: list[bytes]
        #: Loop only. Takes a message past ``receive``; False if it has to go there.
        take: Callable[[str | bytes], bool] | None = None
        #: Loop only. What writes past ``send``, and has to know when it may not.
        frame_writer: FrameWriter | None = None

        def pause_writing(self) -> None:
            """Called by the transport. The peer does not take what is written."""
            super().pause_writing()
            if self.frame_writer is not None:
                self.frame_writer.is_paused = True

        def resume_writing(self) -> None:
            """Called by the transport."""
            super().resume_writing()
            if self.frame_writer is not None:
                self.frame_writer.is_paused = False

        def send_receive_event_to_app(self) -> None:
            """websockets-sansio. A message is whole."""
            if len(self.frames) == 1 and self._is_taken(self.frames[0], self.curr_msg_data_type):
                self.frames = []
            else:
                super().send_receive_event_to_app()

        def handle_message(self, event: Any) -> None:
            """wsproto. A message, or a part of one."""
            data, kind = event.data, "text" if isinstance(event.data, str) else "bytes"
            whole = event.message_finished and self.buffer.value is None
            size = len(data) * 4 if kind == "text" else len(data)  # in UTF-8, at most
            if not (whole and size <= self.config.ws_max_size and self._is_taken(data, kind)):
                super().handle_message(event)

        def _is_taken(self, data: Any, kind: str) -> bool:
            """Whether *data* went past ``receive``. Nothing may while anything waits there."""
            take = self.take
            if take is None or self.read_paused or self.close_sent or not self.queue.empty():
                return False
            if kind == "bytes":
                data = bytes(data)
            elif not isinstance(data, str):
                try:
                    data = data.decode()
                except UnicodeDecodeError:
                    return False  # uvicorn closes for it
            return take(data)

    return TakesMessages


TEXT, BINARY, FIN, COMPRESSED = 0x01, 0x02, 0x80, 0x40

#: What ends every compressed message, and is not sent (RFC 7692, section 7.2.1).
EMPTY_BLOCK = b"\x00\x00\xff\xff"


class FreshEncoder:
    """Stands for a connection's own compressor, which is made when it is needed.

    A message that was compressed for all is in the client's window, and not in that of the
    connection's own compressor: the two would disagree about what was there before. One that
    starts anew refers to nothing but what it has sent itself, and any client can follow it.
    """

    def __init__(self, window_bits: int, settings: Mapping[str, Any]) -> None:
        self._window_bits = window_bits
        self._settings = settings
        self._encoder: Any = None

    def forget(self) -> None:
        """Start anew with the next message."""
        self._encoder = None

    def compress(self, data: bytes) -> bytes:
        if self._encoder is None:
            self._encoder = zlib.compressobj(wbits=-self._window_bits, **self._settings)
        compressed: bytes = self._encoder.compress(data)
        return compressed

    def flush(self, mode: int) -> bytes:
        flushed: bytes = self._encoder.flush(mode)
        return flushed


@dataclass(frozen=True, eq=False)
class Deflate:
    """How connections compress what they send. There is one for each way: see ``deflate_of``."""

    window_bits: int
    settings: tuple[tuple[str, Any], ...]  # of ``zlib.compressobj``

    def frame(self, opcode: int, payload: bytes) -> bytes:
        """*payload* in a frame, compressed from a fresh start if that makes it smaller."""
        encoder = zlib.compressobj(wbits=-self.window_bits, **dict(self.settings))
        compressed = encoder.compress(payload) + encoder.flush(zlib.Z_SYNC_FLUSH)
        compressed = compressed.removesuffix(EMPTY_BLOCK)
        if len(compressed) >= len(payload):
            return frame(FIN | opcode, payload)
        return frame(FIN | COMPRESSED | opcode, compressed)


def frame(first: int, payload: bytes) -> bytes:
    """One whole frame of a server's (RFC 6455, section 5.2): it is not masked."""
    size = len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 65_536:
        return struct.pack("!BBH", first, 126, size) + payload
    return struct.pack("!BBQ", first, 127, size) + payload


def parts(message: ASGIMessage) -> tuple[int, bytes]:
    """Opcode and payload of a ``websocket.send``."""
    text = message.get("text")
    return (BINARY, message["bytes"]) if text is None else (TEXT, text.encode())


@lru_cache(maxsize=64)  # windows have 8 to 15 bits, and a server one or two settings
def deflate_of(window_bits: int, *settings: tuple[str, Any]) -> Deflate:
    """The one object for a way of compressing: messages look by it for their frame."""
    return Deflate(window_bits, settings)


class FrameWriter:
    """Writes the data frames of one connection.

    Each message to each subscriber comes by here, past objects that the processor last saw with the
    message before: so it looks at no more of them than it must. Whoever says goodbye for uvicorn
    closes the transport in the same turn (the contract), and who says it for us takes this away.

    :param deflate: how it compresses; None if it does not.
    :param forget: has its own compressor start anew, if it has one that goes on.
    :param rest: sends what is not written here.
    """

    __slots__ = ("_deflate", "_forget", "_rest", "_transport", "is_paused")

    def __init__(
        self,
        protocol: Any,
        deflate: Deflate | None,
        forget: Callable[[], object] | None,
        rest: Inline,
    ) -> None:
        self._transport = protocol.transport
        self._deflate = deflate
        self._forget = forget
        self._rest = rest
        #: Loop only. The peer does not take what is written.
        self.is_paused: bool = not protocol.writable.is_set()

    def send(self, message: ASGIMessage) -> Outbound | None:
        """Write *message*, or leave it to ``rest``; return what is left to a task."""
        if self.is_paused or self._transport.is_closing():
            return self._rest(message)
        if type(message) is SharedMessage:
            data = message.frames.get(self._deflate)
            if data is None:
                data = message.frames[self._deflate] = self._frame(message)
            if self._forget is not None:
                self._forget()
        elif self._deflate is None and message["type"] == "websocket.send":
            data = self._frame(message)
        else:
            return self._rest(message)
        self._transport.write(data)
        return None

    def _frame(self, message: ASGIMessage) -> bytes:
        opcode, payload = parts(message)
        if self._deflate is not None:
            return self._deflate.frame(opcode, payload)
        return frame(FIN | opcode, payload)


def frame_writer_of(protocol: Any, rest: Inline) -> FrameWriter | None:
    """What writes the frames of an accepted connection; None if it is not all as we know it.

    :param protocol: one of uvicorn's WebSocket protocols, of a class of ``takes_messages``.
    :param rest: sends what is not written there.
    """
    try:
        if protocol.conn.state.name != "OPEN" or protocol.disconnected:
            return None
        if not hasattr(type(protocol), "frame_writer"):
            return None  # nobody would say when it is paused
        module = type(protocol.conn).__module__
        if module == "websockets.server":
            protocol.frame_writer = _of_websockets(protocol, rest)
        elif module == "wsproto":
            protocol.frame_writer = _of_wsproto(protocol, rest)
        return cast("FrameWriter | None", protocol.frame_writer)
    except AttributeError:
        return None  # another release: uvicorn's own way


def _of_websockets(protocol: Any, rest: Inline) -> FrameWriter | None:
    if not protocol.conn.extensions:
        return FrameWriter(protocol, None, None, rest)
    [extension, *others] = protocol.conn.extensions
    if others or not _is(extension, "websockets.extensions.permessage_deflate"):
        return None
    bits, settings = extension.local_max_window_bits, extension.compress_settings
    deflate = deflate_of(bits, *sorted(settings.items()))
    if extension.local_no_context_takeover:
        return FrameWriter(protocol, deflate, None, rest)
    if not hasattr(extension, "encoder"):
        return None
    extension.encoder = encoder = FreshEncoder(bits, settings)
    return FrameWriter(protocol, deflate, encoder.forget, rest)


def _of_wsproto(protocol: Any, rest: Inline) -> FrameWriter | None:
    extensions = protocol.conn.connection._proto.extensions
    if not extensions:
        return FrameWriter(protocol, None, None, rest)
    [extension, *others] = extensions
    if others or not _is(extension, "wsproto.extensions") or extension._compressor is not None:
        return None
    deflate = deflate_of(extension.server_max_window_bits)

    def forget() -> None:
        extension._compressor = None  # it makes a new one when it needs one

    return FrameWriter(protocol, deflate, forget, rest)


def _is(extension: Any, module: str) -> bool:
    kind = type(extension)
    return (kind.__module__, kind.__qualname__) == (module, "PerMessageDeflate")
