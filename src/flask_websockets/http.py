"""Loop side. HTTP: Flask through asgiref's ``WsgiToAsgi``, in parallel.

asgiref runs every request on one thread, and its ``AsyncToSync`` leaves context variables in
the transport, from which the next request on the connection inherits a dead executor
(python/cpython#140947). Here a request runs on a thread of the HTTP pool, in a copy of its
task's context, and the two sides meet in a :class:`~.bridge.Pipe`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
from asgiref.wsgi import WsgiToAsgi

from .bridge import ASGIMessage, Door, HttpPool, Pipe, Rest
from .config import Config
from .counters import Counters
from .environ import Scope, WSGIEnviron, build_environ
from .protocol import plain_response, unavailable
from .servers import uvicorn
from .servers.responses import write_whole
from .wsgi import Call, FileWrapper, WSGIApp, open_body, own_context

#: Seconds that a server gets to tell us of an end that we have caused.
END_TIMEOUT = 1.0

Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]


class HttpAdapter(WsgiToAsgi):
    """asgiref's adapter with threads of its own: an ASGI application for ``http`` scopes.

    :param door: of the one loop that it serves.
    """

    def __init__(
        self,
        wsgi_app: WSGIApp,
        pool: HttpPool,
        door: Door,
        counters: Counters,
        config: Config,
    ) -> None:
        super().__init__(wsgi_app)  # type: ignore[no-untyped-call]
        self._pool = pool
        self._door = door
        self._counters = counters
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        pipe, counters = Pipe(self._door), self._counters
        call = Call(self.wsgi_application, pipe, scope.get("method", "GET"))
        exchange = uvicorn.exchange_of(receive, "receive")
        body: ASGIMessage = {"more_body": True}
        try:
            environ = build_environ(scope)
        except ValueError as error:
            call.answer(plain_response(400, str(error)))
        else:
            # A body that is not here yet is not waited for: the view may answer without it.
            if uvicorn.has_ended(exchange):
                # The server called us for the head, and has refused the rest meanwhile.
                return await _until_left(receive)
            if uvicorn.has_received(exchange) or not _announces_body(environ):
                body = await receive()
                if body["type"] != "http.request":
                    return  # the client left before we came to it
            if environ.get("HTTP_EXPECT", "").lower() == "100-continue":
                pipe.hold()  # the server sends 100 when we receive (RFC 9110 section 10.1.1)
            environ["wsgi.input"] = open_body(pipe, body)
            environ["wsgi.file_wrapper"] = FileWrapper
            context = own_context()
            if not self._pool.submit(partial(context.run, call.run_wsgi_app, environ)):
                counters.http_refused += 1
                call.answer(unavailable("The server is too busy."))
        if not uvicorn.is_send_of(exchange, send):  # a middleware may have wrapped either
            exchange = uvicorn.exchange_of(send, "send")
        response = _Exchange(call, pipe, receive, send, exchange, self._config)
        try:
            try:
                await response.run(body)
            finally:
                pipe.close()  # the thread learns of it at once
                counters.body_timeouts += pipe.silent
        except _Left:
            await response.end()
        except _Stuck:
            counters.send_timeouts += 1
            await response.cut()


class _Stuck(Exception):
    """The client did not take what was sent for the send timeout."""


class _Left(Exception):
    """The server says that the client has left."""


class _Exchange:
    """One request and its response, while the application works on them."""

    def __init__(
        self,
        call: Call,
        pipe: Pipe,
        receive: Receive,
        send: Send,
        exchange: Any | None,
        config: Config,
    ) -> None:
        self._call = call
        self._pipe = pipe
        self._receive = receive
        self._server_send = send
        self._uvicorn = exchange
        self._send_timeout = config.send_timeout
        self._fast = config.fast_paths and self._uvicorn is not None
        self._started = False
        self._error: Exception | None = None
        self._body_missing = False
        self._finishing = False  # the last chunk is being sent
        # What is left of a response that was given to the server where it arrived.
        self._unsent: list[ASGIMessage | Rest] | None = None

    async def run(self, body: ASGIMessage) -> None:
        """Pass the response on until it is complete, or the client has left.

        :param body: the first message of the request's body.
        :raises _Stuck: if the client does not take the response.
        :raises Exception: what the application raised.
        """
        chunk, last = b"", False
        if not body.get("more_body"):
            if self._fast:
                self._pipe.on_whole = self._answer
            chunk, last = await self._pipe.get()
            if self._error is not None:
                raise self._error
            if self._unsent is not None:
                for message in self._unsent:
                    await self._send(message)
                return
            if last:  # a small response takes no task but the server's
                return await self._pass_on(chunk, last)
            self._pipe.on_whole = None
        self._body_missing = body.get("more_body", False)
        self._read_over = anyio.Event()
        async with anyio.create_task_group() as both:
            both.start_soon(self._until_over, body, both.cancel_scope)
            try:
                await self._write(chunk)
            except Exception as error:
                self._error = error  # raised as itself, not in a group
            both.cancel_scope.cancel()
        if self._error is not None:
            raise self._error

    def _answer(self, chunk: bytes) -> None:
        """Give a whole response to the server where it arrives.

        The task would be woken for it, and send one turn of the loop later: while the loop is
        busy, a turn is long.
        """
        if len(chunk) > Pipe.PIECE_BYTES:
            return
        unsent: list[ASGIMessage | Rest] = []
        self._unsent = unsent
        try:
            if write_whole(self._uvicorn, self._call.response_start, chunk):
                return
            is_writable = partial(uvicorn.is_writable, self._uvicorn)
            inline = uvicorn.InlineSend(self._server_send, is_writable)
            body: ASGIMessage = {"type": "http.response.body", "body": chunk}
            for message in (self._call.response_start, body):
                rest = message if unsent else inline(message)
                if rest is not None:
                    unsent.append(rest)
        except Exception as error:
            self._error = error

    async def _until_over(self, body: ASGIMessage, both: anyio.CancelScope) -> None:
        try:
            await self._read(body)
        except Exception as error:
            self._error = error
        self._read_over.set()
        # hypercorn closes a connection within the last send, and tells us before it has done so.
        if not self._finishing:
            both.cancel()

    async def _read(self, message: ASGIMessage) -> None:
        """Bring in the body; then wait for the news that the client has left."""
        more = self._body_missing
        if more:
            self._pipe.feed(message.get("body", b""))
        while True:
            if more:
                await self._pipe.wanted()
            message = await self._receive()
            if message["type"] != "http.request":
                return
            if not more:
                # This server repeats itself instead of waiting: do not ask it again.
                await anyio.sleep_forever()
            self._pipe.feed(message.get("body", b""))
            self._body_missing = more = message.get("more_body", False)
            if not more:
                self._pipe.end()

    async def _write(self, chunk: bytes) -> None:
        """Pass the response on, of which *chunk* has come already."""
        last = False
        if chunk:
            await self._pass_on(chunk, last)
        while not last:
            chunk, last = await self._pipe.get()
            if last:
                self._finishing = True
                # hypercorn puts the end of the exchange behind the body in one bounded queue,
                # and this send waits until it has a place there.
                self._pipe.discard()
            await self._pass_on(chunk, last)
        if self._body_missing:
            with anyio.move_on_after(END_TIMEOUT):
                await self._read_over.wait()

    async def _pass_on(self, chunk: bytes, last: bool) -> None:
        if not self._started:
            self._started = True
            await self._send(self._call.response_start)
        for begin in range(0, len(chunk) or 1, Pipe.PIECE_BYTES):
            piece = chunk[begin : begin + Pipe.PIECE_BYTES]
            more = not last or begin + Pipe.PIECE_BYTES < len(chunk)
            await self._send({"type": "http.response.body", "body": piece, "more_body": more})
            if more and uvicorn.has_ended(self._uvicorn):
                raise _Left
        if not last:
            # From here on we must see the client leave, even if the view reads no body.
            self._pipe.read_ahead()
            self._pipe.taken(len(chunk))

    async def _send(self, message: ASGIMessage | Rest) -> None:
        sending = self._server_send(message) if isinstance(message, dict) else message
        try:
            if uvicorn.is_writable(self._uvicorn):
                await sending  # which does not wait
                return
            with anyio.move_on_after(self._send_timeout) as deadline:
                await sending
        except OSError:
            raise _Left from None  # ASGI: what send raises when the client has left
        if deadline.cancelled_caught:
            raise _Stuck

    async def cut(self) -> None:
        """End the connection of a client that does not read."""
        if self._uvicorn is not None:
            uvicorn.abort(self._uvicorn)
        await self.end()

    async def end(self) -> None:
        """Return to the server when it knows that the client is gone."""
        if self._uvicorn is not None:
            await _until_left(self._receive)


async def _until_left(receive: Receive) -> None:
    """Wait until uvicorn knows that the client is gone; before, it would miss a response."""
    with anyio.move_on_after(END_TIMEOUT):
        while (await receive())["type"] == "http.request":
            await anyio.lowlevel.checkpoint()


def _announces_body(environ: WSGIEnviron) -> bool:
    if environ.get("CONTENT_LENGTH", "0") != "0" or "HTTP_TRANSFER_ENCODING" in environ:
        return True
    # HTTP/2 and later frame a body without saying so in a header.
    is_http_1 = environ["SERVER_PROTOCOL"].startswith("HTTP/1")
    return not is_http_1 and environ["REQUEST_METHOD"] not in ("GET", "HEAD", "OPTIONS")
