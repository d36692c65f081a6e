"""An ASGI server of a few lines: tests speak to the application message by message."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio

TIMEOUT = 8.0

Message = dict[str, Any]


class Peer:
    """The server's side of one connection, and the client behind it."""

    def __init__(self, scope: Message, socket_messages: float) -> None:
        self.scope = scope
        self._to_app, self._from_peer = anyio.create_memory_object_stream[Message](1000)
        self._to_peer, self._from_app = anyio.create_memory_object_stream[Message](socket_messages)
        self._running = anyio.CancelScope()
        self.returned = anyio.Event()
        self.reads = 0

    async def _receive(self) -> Message:
        self.reads += 1
        return await self._from_peer.receive()

    async def run(self, app: Callable[..., Awaitable[None]]) -> None:
        try:
            with self._running:
                await app(self.scope, self._receive, self._to_peer.send)
        finally:
            self.returned.set()
            self._to_peer.close()

    def cancel(self) -> None:
        """The server cancels the task in which it called the application."""
        self._running.cancel()

    def put(self, message: Message) -> None:
        """The client does something."""
        self._to_app.send_nowait(message)

    def send(self, data: str | bytes) -> None:
        self.put({"type": "websocket.receive", "text" if isinstance(data, str) else "bytes": data})

    def leave(self, code: int = 1000) -> None:
        self.put({"type": "websocket.disconnect", "code": code})

    async def get(self) -> Message:
        """The next message of the application."""
        with anyio.fail_after(TIMEOUT):
            return await self._from_app.receive()

    async def get_status(self) -> int:
        """The status that the handshake is answered with: 101, or a refusal's."""
        message = await self.get()
        if message["type"] == "websocket.accept":
            return 101
        if message["type"] == "websocket.close":
            return 403
        await self.get()
        return message["status"]

    def close(self) -> None:
        for stream in (self._to_app, self._from_peer, self._to_peer, self._from_app):
            stream.close()


@asynccontextmanager
async def connection(
    app: Callable[..., Awaitable[None]],
    path: str,
    *,
    socket_messages: float = 1000,
    **scope: Any,
) -> AsyncIterator[Peer]:
    """Open a connection to *app*; at the end the client leaves, and the app must return."""
    full: Message = {
        "type": "websocket",
        "path": path,
        "headers": [(b"host", b"localhost")],
        "extensions": {"websocket.http.response": {}},
        **scope,
    }
    peer = Peer(full, socket_messages)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(peer.run, app)
        peer.put({"type": "websocket.connect"})
        try:
            yield peer
            if not peer.returned.is_set():
                peer.leave()
            with anyio.fail_after(TIMEOUT):
                with suppress(anyio.EndOfStream):
                    while True:  # what the application still says goes nowhere
                        await peer._from_app.receive()
                await peer.returned.wait()
        finally:
            tasks.cancel_scope.cancel()
            peer.close()


async def wait_until(condition: Callable[[], Any]) -> Any:
    """Let the loop run until *condition* is true; fail after TIMEOUT seconds."""
    with anyio.fail_after(TIMEOUT):
        while not (value := condition()):
            await anyio.sleep(0.002)
        return value
