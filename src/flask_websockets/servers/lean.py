"""Loop side. What uvicorn's WebSocket protocols (0.54) hold for a connection, and need not.

Both functions leave alone what is not as we know it. tests/test_servers_lean.py is the contract.
"""

from __future__ import annotations

import asyncio
from typing import Any


class Events:
    """Stands for the queue of what ``receive`` returns. One task may wait for it.

    An ``asyncio.Queue`` has three deques and an event, 3 kB in all.
    """

    __slots__ = ("_events", "_waiter")

    def __init__(self) -> None:
        self._events: list[Any] = []
        self._waiter: asyncio.Future[None] | None = None

    def put_nowait(self, event: Any) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def empty(self) -> bool:
        return not self._events

    async def get(self) -> Any:
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._events.pop(0)


def lighten(protocol: Any) -> None:
    """Give a protocol a smaller queue. Before anybody waits for what comes."""
    queue = getattr(protocol, "queue", None)
    if type(queue) is asyncio.Queue and queue.empty():
        protocol.queue = Events()


def forget_handshake(protocol: Any) -> None:
    """Drop the headers of a handshake that was answered; the scope has those of the request."""
    for name in ("request", "response"):  # of websockets-sansio
        headers: Any = getattr(getattr(protocol, name, None), "headers", None)
        if type(headers).__module__ == "websockets.datastructures":
            headers.clear()
