"""How a connection speaks: with permessage-deflate, or with Socket.IO on top."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

from picows import WSMsgType

from .client import Connection, Load

#: What browsers offer (Chromium and Firefox alike).
OFFER = "permessage-deflate; client_max_window_bits"
TAIL = b"\x00\x00\xff\xff"
#: Of the client's encoders: fast, and small enough for 500 of them.
LEVEL, MEMORY = 1, 5


class Declined(RuntimeError):
    """The server does not compress, though it was asked to."""


def json_text(number: int, sent: int) -> bytes:
    """300 bytes of JSON as a feed sends them: the same names, and a few numbers that change."""
    seed = (number * 7_919 + sent * 104_729 + 12_345) * 2_654_435_761 % 2**32
    bid, moves = 100_000 + seed % 9_993, seed >> 12
    return (
        b'{"type":"quote","feed":"benchmark feed","number":%d,"sent":%d,"symbol":"ABCD-%04d",'
        b'"venue":"another place","currency":"EUR","status":"open","bid":%d.%02d,"ask":%d.%02d,'
        b'"bid_size":%d,"ask_size":%d,"volume":%d,"change":"%+06d","day":"2026-11-02",'
        b'"time":"09:%02d:%02d.%06d"}'
    ) % (
        *(10_000_000 + number, 1_000_000_000 + sent, seed % 9_973),
        *(bid // 100, bid % 100, (bid + 7) // 100, (bid + 7) % 100),
        *(100_000 + moves % 99_991, 100_000 + seed % 99_989, 1_000_000_000 + seed),
        *(moves % 2_000 - 1_000, sent // 60 % 60, sent % 60, seed % 1_000_000),
    )


class Deflated(Connection):
    """Compresses what it sends, as browsers do.

    What comes while the clock runs is kept as it is, and inflated and compared when the clock has
    stopped: inflating it at once would make the client the slower side. That each is a single
    complete compressed text frame is looked at in time.
    """

    def __init__(self, load: Load, number: int) -> None:
        super().__init__(load, number)
        self.kept: list[bytes] = []
        self.kept_expected: list[bytes] = []

    def headers(self) -> dict[str, str]:
        return {"Sec-WebSocket-Extensions": OFFER}

    def on_ws_connected(self, transport: Any) -> None:
        super().on_ws_connected(transport)
        answer = transport.response.headers.get("Sec-WebSocket-Extensions", "")
        name, *parameters = [part.strip() for part in answer.split(";")]
        agreed = dict(part.partition("=")[::2] for part in parameters)
        if name != "permessage-deflate":
            if not self.load.failed.done():
                self.load.failed.set_exception(Declined("The server declined to compress."))
            return
        self.fresh_in = "server_no_context_takeover" in agreed
        self.fresh_out = "client_no_context_takeover" in agreed
        self.bits_in = int(agreed.get("server_max_window_bits", 15))
        self.bits_out = int(agreed.get("client_max_window_bits", 15))
        self.decoder = zlib.decompressobj(-self.bits_in)
        self.encoder = zlib.compressobj(LEVEL, wbits=-self.bits_out, memLevel=MEMORY)

    def send(self, payload: bytes) -> None:
        if self.fresh_out:
            self.encoder = zlib.compressobj(LEVEL, wbits=-self.bits_out, memLevel=MEMORY)
        data = self.encoder.compress(payload) + self.encoder.flush(zlib.Z_SYNC_FLUSH)
        self.transport.send(WSMsgType.TEXT, data[: -len(TAIL)], True, True)

    def inflated(self, data: bytes) -> bytes:
        if self.fresh_in:
            self.decoder = zlib.decompressobj(-self.bits_in)
        try:
            return self.decoder.decompress(data + TAIL)
        except zlib.error as error:
            self.load.wrong("not inflated", f"Connection {self.number}, {data!r}: {error}")
            return b""

    def on_ws_frame(self, transport: Any, frame: Any) -> None:
        kind = frame.msg_type
        if kind == WSMsgType.TEXT and frame.rsv1 and frame.fin:
            if self.load.unread:
                self.keep(frame.get_payload_as_bytes())
            else:
                self.text(self.inflated(frame.get_payload_as_bytes()))
        elif kind in (WSMsgType.TEXT, WSMsgType.BINARY, WSMsgType.CONTINUATION):
            reason = f"Connection {self.number} got {frame}, not one compressed frame of text."
            self.load.wrong("not compressed", reason)

    def keep(self, data: bytes) -> None:
        if not self.expected:
            self.load.wrong("unexpected", f"Connection {self.number} expected nothing, got more.")
            return
        payload = self.expected[0].payload
        self.kept.append(data)
        self.kept_expected.append(payload)
        self.load.arrived(self, payload)

    def reveal(self) -> None:
        for data, expected in zip(self.kept, self.kept_expected, strict=True):
            if (got := self.inflated(data)) != expected:
                reason = f"Connection {self.number} expected {expected!r}, got {got!r}."
                self.load.wrong("unexpected", reason)
        self.kept, self.kept_expected = [], []


class SocketIO(Connection):
    """Engine.IO 4 and Socket.IO 5, the WebSocket transport alone; the path is the namespace."""

    def url(self, port: int) -> str:
        return f"ws://127.0.0.1:{port}/socket.io/?EIO=4&transport=websocket"

    def wrapped(self, payload: bytes) -> bytes:
        data = json.dumps(payload.decode()).encode()
        return b'42%s,["message",%s]' % (self.load.mode.path.encode(), data)

    def on_ws_frame(self, transport: Any, frame: Any) -> None:
        if frame.msg_type == WSMsgType.TEXT:
            self.text(frame.get_payload_as_bytes())

    def text(self, payload: bytes) -> None:
        namespace = self.load.mode.path.encode()
        if payload.startswith(b"0"):  # opened; now the namespace
            self.send(b"40" + namespace + b",")
        elif payload == b"2":  # ping
            self.send(b"3")
        elif payload.startswith(b"40" + namespace):
            self.load.arrived(self, self.wrapped(b"ready"))
        else:
            self.load.arrived(self, payload)


class DeflatedSocketIO(Deflated, SocketIO):
    """Both. Each message is inflated at once: some are Engine.IO's own."""

    def keep(self, data: bytes) -> None:
        self.text(self.inflated(data))


def spoken(deflate: bool, socketio: bool) -> dict[str, Any]:
    """What :class:`~benchmarks.client.Load` has to be told."""
    ways: dict[tuple[bool, bool], Callable[[Load, int], Connection]] = {
        (False, False): Connection,
        (True, False): Deflated,
        (False, True): SocketIO,
        (True, True): DeflatedSocketIO,
    }
    told: dict[str, Any] = {"connection": ways[deflate, socketio]}
    return {**told, "payload": json_text} if deflate else told
