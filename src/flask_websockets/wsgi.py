"""Both sides. One call of the WSGI application (PEP 3333), in its thread.

asgiref's ``WsgiToAsgiInstance``, of which the state of a response is left: what it collects, this
passes on through a :class:`~.bridge.Pipe`, as the application makes it.
"""

from __future__ import annotations

import contextvars
import io
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import IO, Any

import werkzeug.wsgi
from asgiref.wsgi import WsgiToAsgiInstance
from flask import has_app_context
from werkzeug.exceptions import ClientDisconnected, RequestTimeout

from .bridge import ASGIMessage, Pipe
from .environ import WSGIEnviron
from .protocol import (
    Pairs,
    PlainResponse,
    encode_headers,
    encode_response_headers,
    parse_status,
)

#: Seconds in which a client must send the next piece of its body. nginx's figure for the same
#: (client_body_timeout).
BODY_TIMEOUT = 60.0

WSGIApp = Callable[..., Iterable[bytes]]
ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


def own_context() -> contextvars.Context:
    """Loop or thread. A context for one call: the server's variables are seen in it, and nothing
    that is set in it is seen elsewhere.

    A server that was started within an application context has that in its own: its ``g`` would
    be everybody's.
    """
    return contextvars.Context() if has_app_context() else contextvars.copy_context()


class RequestBody(io.RawIOBase):
    """Thread. A body that is still coming; it is read from the client as the view reads it."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill *buffer* with what is there, at least one byte; 0 at the end of the body.

        :raises ClientDisconnected: (400) if the client left before the end.
        :raises RequestTimeout: (408) if it sent nothing for ``BODY_TIMEOUT`` seconds.
        """
        if not self._piece:
            self._piece = memoryview(self._next())
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    def readall(self) -> bytes:
        """The rest of the body."""
        pieces = [bytes(self._piece), *iter(self._next, b"")]
        self._piece = memoryview(b"")
        return b"".join(pieces)

    def _next(self) -> bytes:
        try:
            return self._pipe.read(BODY_TIMEOUT)
        except TimeoutError as error:
            raise RequestTimeout(str(error)) from None
        except BrokenPipeError as error:
            raise ClientDisconnected(str(error)) from None


class FileWrapper(werkzeug.wsgi.FileWrapper):
    """Thread. ``wsgi.file_wrapper`` (PEP 3333): Werkzeug's own, which asks for 8 KiB at a time."""

    def __init__(self, file: IO[bytes], buffer_size: int = Pipe.PIECE_BYTES) -> None:
        super().__init__(file, max(buffer_size, Pipe.PIECE_BYTES))


def open_body(pipe: Pipe, message: ASGIMessage) -> io.BufferedIOBase:
    """The ``wsgi.input`` of a request.

    :param message: the first of its body's, which may be all.
    """
    if message.get("more_body"):
        return io.BufferedReader(RequestBody(pipe), Pipe.PIECE_BYTES)
    return io.BytesIO(message.get("body", b""))


class Call(WsgiToAsgiInstance):
    """Thread. Calls the application and passes its response on.

    :param method: the request's; a HEAD is answered without a body.
    """

    #: The loop reads it once the first chunk has come.
    response_start: ASGIMessage
    #: Bytes of the body as the application announced them; None if it did not.
    response_content_length: int | None

    def __init__(self, wsgi_app: WSGIApp, pipe: Pipe, method: str) -> None:
        super().__init__(wsgi_app)  # type: ignore[no-untyped-call]
        self._pipe = pipe
        self._is_head = method == "HEAD"
        self._given = 0  # bytes of body
        self._complete = False

    def answer(self, response: PlainResponse) -> None:
        """Loop. Answer in the application's stead, which is not called."""
        status, headers, body = response
        self.response_start = {
            "type": "http.response.start",
            "status": status,
            "headers": encode_headers(headers),
        }
        self._pipe.answer(body)

    # A plain function, where the base class has a coroutine of its one thread.
    def run_wsgi_app(self, environ: WSGIEnviron) -> None:  # type: ignore[override]
        """Call the application, iterate its response, close it; nothing comes out of here."""
        if self._pipe.closed:
            return  # the client left while this was in the queue
        try:
            chunks = self.wsgi_application(environ, self.start_response)
            try:
                self._pass_on(chunks)
            finally:
                if hasattr(chunks, "close"):
                    chunks.close()
        except (BrokenPipeError, ClientDisconnected) as error:
            # The client left: the application was told, by close() or where it read the body.
            if not self._pipe.broken:
                self._pipe.fail(error)
        except Exception as error:
            self._pipe.fail(error)
        except BaseException as error:
            # SystemExit or CancelledError would end the server's loop, or its task in silence.
            wrapped = RuntimeError(f"The application raised {type(error).__name__}.")
            wrapped.__cause__ = error
            self._pipe.fail(wrapped)

    def start_response(
        self, status: str, response_headers: Pairs, exc_info: ExcInfo | None = None
    ) -> Callable[[bytes], None]:
        """PEP 3333's ``start_response``; what it returns is its ``write``.

        :raises RuntimeError: if the application calls it twice without *exc_info*.
        :raises ValueError: for a status or a header that may not be sent.
        """
        if exc_info is not None:
            try:
                if self.response_started:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # its traceback refers to this frame
        elif hasattr(self, "response_start"):
            raise RuntimeError(
                "start_response was called a second time, which it may only with exc_info."
            )
        code = parse_status(status)
        headers, length = encode_response_headers(code, response_headers)
        # RFC 9110 section 6.4.1: these have no body, whatever the application gives.
        self.response_content_length = 0 if self._is_head or code in (204, 304) else length
        self.response_start = {"type": "http.response.start", "status": code, "headers": headers}
        return self.write

    def write(self, chunk: bytes) -> None:
        """Give a chunk to the server; wait if it is a window behind.

        :raises BrokenPipeError: if the client has left.
        """
        if not hasattr(self, "response_start"):
            raise RuntimeError("The application gave body before it called start_response.")
        if not isinstance(chunk, bytes):
            raise TypeError(f"A response is made of bytes; got {type(chunk).__name__}.")
        if self._complete or not chunk:
            return
        if self.response_content_length is not None:
            chunk = chunk[: self.response_content_length - self._given]
        self._give(chunk)

    def _pass_on(self, chunks: Iterable[bytes]) -> None:
        iterator = iter(chunks)
        for chunk in iterator:
            self.write(chunk)
            if self._complete:
                # The client has all of it, but there may be code behind the last yield.
                next(iterator, None)
                return
        if self._complete:
            return
        if not hasattr(self, "response_start"):
            raise RuntimeError("The application did not call start_response.")
        promised = self.response_content_length
        if promised is not None and self._given < promised:
            raise RuntimeError(
                f"The application announced {promised} bytes of body (Content-Length) and gave "
                f"{self._given}."
            )
        self._complete = True
        self._give(b"")

    def _give(self, chunk: bytes) -> None:
        self.response_started = True
        self._given += len(chunk)
        self._complete = self._complete or self._given == self.response_content_length
        self._pipe.put(chunk, last=self._complete)
