"""Loop side. HTTP: Flask through asgiref's ``WsgiToAsgi``, in parallel.

asgiref runs every request on one thread, and its ``AsyncToSync`` leaves context variables in
the transport, from which the next request on the connection inherits a dead executor
(python/cpython#140947). Here a request runs on a thread of the HTTP pool, in a copy of its
task's context, and the two sides meet in a :class:`~.bridge.Pipe`.
"""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable
from functools import partial
from tempfile import SpooledTemporaryFile
from typing import IO, Any

from asgiref.wsgi import WsgiToAsgi, WsgiToAsgiInstance

from .bridge import ASGIMessage, Door, HttpPool, Pipe
from .environ import Scope, WSGIEnviron, build_environ
from .protocol import encode_headers, unavailable

#: Bodies up to here stay in memory; asgiref's own figure.
SPOOL_BYTES = 65_536

Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]


class HttpAdapter(WsgiToAsgi):
    """asgiref's adapter with threads of its own.

    :param door: where the threads of the request's loop find it.
    """

    def __init__(self, wsgi_app: Callable[..., Any], pool: HttpPool) -> None:
        super().__init__(wsgi_app)  # type: ignore[no-untyped-call]
        self._pool = pool

    async def serve(self, door: Door, scope: Scope, receive: Receive, send: Send) -> bool:
        """Serve one request of the loop that *door* leads to; False if there was no room."""
        request = _Request(self.wsgi_application, self._pool, door)
        await request(scope, receive, send)
        return not request.refused


class _Request(WsgiToAsgiInstance):
    def __init__(self, wsgi_app: Callable[..., Any], pool: HttpPool, door: Door) -> None:
        super().__init__(wsgi_app)  # type: ignore[no-untyped-call]
        self._pool = pool
        self._pipe = Pipe(door)
        self.refused = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with SpooledTemporaryFile(max_size=SPOOL_BYTES) as body:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body.write(message.get("body", b""))
                if not message.get("more_body"):
                    break
            body.seek(0)
            environ = self.build_environ(scope, body)
            run = partial(contextvars.copy_context().run, self._call_wsgi_app, environ)
            try:
                submitted = self._pool.submit(run)
            except RuntimeError:  # the system has no thread left
                submitted = False
            if not submitted:
                self.refused = True
                await _refuse(send)
                return
            await self._respond(send)

    def build_environ(self, scope: Scope, body: IO[bytes]) -> WSGIEnviron:
        return build_environ(scope, body)

    async def _respond(self, send: Send) -> None:
        """Loop. Pass on what the thread has for the client, in its order."""
        try:
            more = True
            while more:
                for message in await self._pipe.get():
                    await send(message)
                    more = message.get("more_body", True)
                self._pipe.taken()
        finally:
            self._pipe.close()

    def _call_wsgi_app(self, environ: WSGIEnviron) -> None:
        """HTTP thread. Call the application and pass on its response."""
        try:
            chunks = self.wsgi_application(environ, self.start_response)
            try:
                self._pass_on(chunks)
            finally:
                if hasattr(chunks, "close"):
                    chunks.close()
        except BrokenPipeError:
            pass  # the client left: the application was told through close()
        except BaseException as error:
            # The task raises it, and the server logs it and answers 500 where it still can.
            self._pipe.fail(error)

    def _pass_on(self, chunks: Any) -> None:
        """HTTP thread. The start crosses together with the first chunk."""
        sent = 0
        for chunk in chunks:
            allowed = self.response_content_length
            if allowed is not None:
                chunk = chunk[: allowed - sent]
            sent += len(chunk)
            last = sent == allowed
            self._pipe.put(self._messages(chunk, last), last=last)
            if last:
                return
        self._pipe.put(self._messages(b"", True), last=True)

    def _messages(self, chunk: bytes, last: bool) -> list[ASGIMessage]:
        start = [] if self.response_started else [self.response_start]
        self.response_started = True
        return [*start, {"type": "http.response.body", "body": chunk, "more_body": not last}]


async def _refuse(send: Send) -> None:
    status, headers, body = unavailable("The server is too busy.")
    await send(
        {"type": "http.response.start", "status": status, "headers": encode_headers(headers)}
    )
    await send({"type": "http.response.body", "body": body})
