"""The least that a server can do: C parses what comes, and frames are built once for all.

    python -m benchmarks.floor PORT

It shows how fast the client could go. It keeps no rule of the protocol beyond what its client
needs, and is no server for anything else.
"""

from __future__ import annotations

import asyncio
import sys
import zlib
from typing import Any

import uvloop
from picows import (
    WSListener,
    WSMsgType,
    WSUpgradeRequest,
    WSUpgradeResponse,
    WSUpgradeResponseWithListener,
    ws_create_server,
)

#: What is agreed where compression is offered: the windows of websockets' own default.
BITS = 12
AGREED = f"permessage-deflate; server_max_window_bits={BITS}; client_max_window_bits={BITS}"
TAIL = b"\x00\x00\xff\xff"

subscribers: list[Any] = []


def frame(payload: bytes, deflate: bool) -> bytes:
    """One text frame. Compressed, it refers to nothing before it, so that it suits everybody."""
    if deflate:
        encoder = zlib.compressobj(wbits=-BITS, memLevel=5)
        payload = (encoder.compress(payload) + encoder.flush(zlib.Z_SYNC_FLUSH))[: -len(TAIL)]
    first = b"\xc1" if deflate else b"\x81"
    size = len(payload)
    return first + (bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")) + payload


class Peer(WSListener):
    def __init__(self, path: bytes, deflate: bool) -> None:
        self.fan_out = path == b"/fan-out"
        self.deflate = deflate
        self.decoder = zlib.decompressobj(-BITS)

    def on_ws_connected(self, transport: Any) -> None:
        if self.fan_out:
            subscribers.append(transport.underlying_transport)
        transport.underlying_transport.write(frame(b"ready", self.deflate))

    def on_ws_frame(self, transport: Any, message: Any) -> None:
        if message.msg_type != WSMsgType.TEXT:
            if message.msg_type == WSMsgType.CLOSE:
                transport.send_close()
                transport.disconnect()
            return
        payload = message.get_payload_as_bytes()
        if message.rsv1:
            payload = self.decoder.decompress(payload + TAIL)
        data = frame(payload, self.deflate)
        if not self.fan_out:
            transport.underlying_transport.write(data)
            return
        for each in subscribers:
            each.write(data)

    def on_ws_disconnected(self, transport: Any) -> None:
        if self.fan_out:
            subscribers.remove(transport.underlying_transport)


def accept(request: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
    deflate = "Sec-WebSocket-Extensions" in request.headers
    headers = {"Sec-WebSocket-Extensions": AGREED} if deflate else {}
    response = WSUpgradeResponse.create_101_response(extra_headers=headers)
    return WSUpgradeResponseWithListener(response, Peer(request.path, deflate))


async def serve(port: int) -> None:
    server = await ws_create_server(accept, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    try:
        uvloop.run(serve(int(sys.argv[1])))
    except (KeyboardInterrupt, asyncio.CancelledError):
        pass  # it was told to stop
