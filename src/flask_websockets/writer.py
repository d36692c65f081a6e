"""Loop side. The writer of one connection: it alone calls ASGI ``send`` (I4).

It is a task while something waits to be sent, and none while nothing does.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import anyio.lowlevel

from .bridge import Alarm, ASGIMessage, FreeTask, Rest, Ticket
from .servers import uvicorn
from .servers.frames import frame_writer_of
from .servers.lean import forget_handshake, lighten

if TYPE_CHECKING:
    from .connection import Connection

logger: logging.Logger = logging.getLogger("flask_websockets")

Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]

#: After these nothing is said on a connection.
GOODBYES = frozenset({"websocket.close", "websocket.http.response.body"})

#: From here on close codes are not the protocol's own (RFC 6455, section 7.4.2).
PRIVATE_CODES = 3000


class Writer:
    """Gives the server what the link of one connection has for it."""

    def __init__(self, connection: Connection, send: Send) -> None:
        self._connection = connection
        self._send = send
        self._task: FreeTask | None = None  # the last one
        self._is_open = False  # the peer has its 101
        # What is sent is sent where the server called us: its middleware's variables are seen.
        self._context = contextvars.copy_context()
        protocol = connection.protocol
        self._inline = None if protocol is None else uvicorn.inline_of(protocol)

    def follow(self) -> None:
        """Send what the link has from here on."""
        link = self._connection.link
        link.start_writer = self._start
        if self._inline is not None and link.config.fast_paths:
            link.inline = self._accept_at_once
            lighten(self._connection.protocol)

    def leave(self) -> None:
        """Send nothing any more."""
        self._connection.link.start_writer = None
        if self._task is not None:
            self._task.cancel()

    def _start(self) -> None:
        self._task = FreeTask(self._write, self._context.copy())

    async def _write(self) -> None:
        """Give the server what lies in the outbox, one message at a time."""
        connection, deadline = self._connection, Alarm()
        link = connection.link
        while (item := link.next_outbound()) is not None:
            left, size = item
            if isinstance(left, Ticket):
                message = link.redeem(left)
                if message is None:
                    continue  # it was dropped
                left = message
            if not isinstance(left, dict):
                kind = "websocket.send" if self._is_open else "websocket.accept"
                sending: Awaitable[None] | Rest = left
            else:
                kind = left["type"]
                say = self._say_goodbye if kind == "websocket.close" else self._send
                sending = say(left)
            deadline.set(link.config.send_timeout, connection.time_out_send)
            try:
                await sending
            except Exception:  # each server has its own for a peer that is gone
                logger.debug("The server could not send", exc_info=True)
                link.fail()
                if kind in GOODBYES:
                    link.over.set()  # the peer's own was first; the reader does not listen
                return
            finally:
                deadline.cancel()
            link.written(size)
            if kind == "websocket.accept":
                self._accepted()
            elif kind in GOODBYES:
                if kind == "websocket.http.response.body":
                    uvicorn.note_refusal(connection.protocol)
                link.over.set()
                return

    async def _say_goodbye(self, message: ASGIMessage) -> None:
        """Send the close frame."""
        # A pending receive holds it back on granian.
        self._connection.reading.cancel()
        await anyio.lowlevel.checkpoint()
        try:
            await self._send(message)
        except Exception:
            if not 1000 < message["code"] < PRIVATE_CODES:
                raise
            # daphne sends 1000 and 3000 to 4999 only, and leaves the connection open else.
            await self._send({**message, "code": PRIVATE_CODES + message["code"]})

    def _accept_at_once(self, message: ASGIMessage) -> ASGIMessage | Rest | None:
        """Send the accept without a task, where that is safe; return what is left to one."""
        takes = message["type"] == "websocket.accept" and self._connection.link.config.fast_paths
        if self._inline is None or not takes:
            return message
        left = self._inline(message)
        if left is None:
            self._accepted()
        return left

    def _accepted(self) -> None:
        """The peer has its 101: from here on messages may take the short way."""
        connection, link = self._connection, self._connection.link
        connection.counters.connections += 1
        self._is_open = True
        link.inline = None
        if self._inline is None or link.deaf or not link.config.fast_paths:
            return
        frames = frame_writer_of(connection.protocol, self._inline)
        forget_handshake(connection.protocol)
        link.inline = self._inline if frames is None else frames.send
        uvicorn.take_from(connection.protocol, connection.take)
