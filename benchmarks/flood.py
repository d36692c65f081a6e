"""Handshakes as fast as they are refused, from a process of its own.

    python -m benchmarks.flood PORT COUNT AT_ONCE

Prints ``started`` when the first is about to go, and what came as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from typing import Any

import uvloop

HANDSHAKE = (
    b"GET /wait HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
#: Seconds in which a handshake must be answered.
PATIENCE = 30.0


class Handshake(asyncio.Protocol):
    """One connection, until its answer's head is there."""

    def __init__(self) -> None:
        self.head = b""
        self.answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(HANDSHAKE)

    def data_received(self, data: bytes) -> None:
        self.head += data
        if b"\r\n\r\n" in self.head:
            self.answer(self._what_came())

    def connection_lost(self, error: Exception | None) -> None:
        self.answer("closed without an answer")

    def answer(self, what: str) -> None:
        if not self.answered.done():
            self.answered.set_result(what)

    def _what_came(self) -> str:
        status, _, headers = self.head.lower().partition(b"\r\n")
        code = status.split(b" ")[1].decode()
        return code if code != "503" or b"\r\nretry-after:" in b"\r\n" + headers else "503 alone"


async def flood(port: int, count: int, at_once: int) -> dict[str, Any]:
    """Shake hands *count* times, *at_once* at the same time; what the answers were."""
    loop, came, left = asyncio.get_running_loop(), Counter[str](), iter(range(count))

    async def one_after_another() -> None:
        for _ in left:
            transport, handshake = await loop.create_connection(Handshake, "127.0.0.1", port)
            try:
                came[await asyncio.wait_for(handshake.answered, PATIENCE)] += 1
            except TimeoutError:
                came["no answer"] += 1
            finally:
                transport.close()

    started = time.perf_counter()
    await asyncio.gather(*(one_after_another() for _ in range(at_once)))
    return {"came": came, "seconds": time.perf_counter() - started}


def main() -> None:
    if hasattr(os, "SCHED_IDLE"):
        # It shares its core with the client that takes the times, which must not wait for it.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    port, count, at_once = map(int, sys.argv[1:])
    print("started", flush=True)
    print(json.dumps(uvloop.run(flood(port, count, at_once))), flush=True)


if __name__ == "__main__":
    main()
