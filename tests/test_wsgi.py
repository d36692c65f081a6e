"""One call of a WSGI application, in its thread: what it may do, and what becomes of it."""

from __future__ import annotations

import asyncio
import io
import sys
from collections import deque

import pytest
from werkzeug.exceptions import ClientDisconnected, RequestTimeout

from flask_websockets import wsgi
from flask_websockets.bridge import Pipe
from flask_websockets.wsgi import Call, FileWrapper, RequestBody, open_body


class FakePipe:
    """Keeps what the thread gives, and gives what the test has put in.

    :param pieces: of the body; an exception among them is raised.
    :param leaves_after: chunks that the client takes before it has left.
    """

    def __init__(self, *pieces, leaves_after=None):
        self._pieces = deque(pieces)
        self._leaves_after = leaves_after
        self.reads = 0
        self.timeouts = set()
        self.chunks = []
        self.lasts = []
        self.errors = []
        self.broken = self.closed = False

    def read(self, timeout):
        self.reads += 1
        self.timeouts.add(timeout)
        piece = self._pieces.popleft() if self._pieces else b""
        if isinstance(piece, Exception):
            self.broken = isinstance(piece, BrokenPipeError)
            raise piece
        return piece

    def put(self, chunk, *, last):
        assert not any(self.lasts), "a chunk behind the last"
        if self._leaves_after is not None and len(self.chunks) >= self._leaves_after:
            self.broken = True
            raise BrokenPipeError("Nobody reads the response any more.")
        self.chunks.append(chunk)
        self.lasts.append(last)

    def fail(self, error):
        self.errors.append(error)

    def answer(self, body):
        self.put(body, last=True)

    @property
    def body(self):
        return b"".join(self.chunks)

    @property
    def complete(self):
        return self.lasts[-1:] == [True]


class Chunks:
    """A response's iterable that keeps a record of what is done with it."""

    def __init__(self, *chunks, fails_in_close=None):
        self._chunks = iter(chunks)
        self._fails_in_close = fails_in_close
        self.asked = self.closed = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.asked += 1
        chunk = next(self._chunks)
        if isinstance(chunk, BaseException):
            raise chunk
        return chunk

    def close(self):
        self.closed += 1
        if self._fails_in_close is not None:
            raise self._fails_in_close


def run(app, *, method="GET", pipe=None):
    """Call *app*; the pipe and the call afterwards."""
    pipe = pipe or FakePipe()
    call = Call(app, pipe, method)
    call.run_wsgi_app({"REQUEST_METHOD": method})
    return pipe, call


def respond(*chunks, status="200 OK", headers=(), method="GET", pipe=None, **extras):
    """Run an application that gives these chunks; the pipe, the call and the iterable."""
    iterable = Chunks(*chunks, **extras)

    def app(environ, start_response):
        start_response(status, list(headers))
        return iterable

    return *run(app, method=method, pipe=pipe), iterable


def length(count):
    return [("Content-Length", str(count))]


def failure(pipe, kind):
    """The one error of a call, which is of this kind."""
    (error,) = pipe.errors
    assert type(error) is kind, repr(error)
    assert not pipe.complete
    return error


class TestCall:
    """The response as the application makes it."""

    def test_chunks_are_passed_on_one_by_one(self):
        """Each when it is there, nothing for an empty one, and an end of its own."""
        pipe, call, chunks = respond(b"a", b"", b"bc", headers=[("X-One", "1")])
        assert pipe.chunks == [b"a", b"bc", b""]
        assert pipe.lasts == [False, False, True]
        assert call.response_start == {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"x-one", b"1")],
        }
        assert chunks.closed == 1
        assert pipe.errors == []

    def test_any_iterable(self):
        """A list and a generator have no close, or one that is called; both are whole."""

        def with_list(environ, start_response):
            start_response("200 OK", [])
            return [b"a", b"b"]

        def lazy(environ, start_response):
            start_response("200 OK", [])
            yield b"a"
            yield b"b"

        for app in (with_list, lazy):
            pipe, _ = run(app)
            assert (pipe.body, pipe.complete, pipe.errors) == (b"ab", True, [])

    def test_the_start_comes_before_every_chunk(self):
        """PEP 3333: before the first one, even if that is empty."""

        def app(environ, start_response):
            yield b""
            start_response("200 OK", [])
            yield b"a"

        pipe, _ = run(app)
        assert "before it called start_response" in str(failure(pipe, RuntimeError))

    def test_an_empty_response(self):
        """No chunk at all is a whole response."""
        pipe, _, chunks = respond()
        assert (pipe.chunks, pipe.lasts, chunks.closed) == ([b""], [True], 1)

    def test_write(self):
        """What start_response returns takes chunks, ahead of those of the iterable."""

        def app(environ, start_response):
            write = start_response("200 OK", [])
            write(b"a")
            write(b"")
            write(b"b")
            return [b"c"]

        pipe, _ = run(app)
        assert pipe.chunks == [b"a", b"b", b"c", b""]
        assert pipe.complete

    def test_write_gives_the_whole_response(self):
        """With the length reached by write, the iterable is asked all the same, and closed."""
        chunks = Chunks()

        def app(environ, start_response):
            start_response("200 OK", length(2))(b"ab")
            return chunks

        pipe, _ = run(app)
        assert (pipe.chunks, pipe.lasts) == ([b"ab"], [True])
        assert (chunks.asked, chunks.closed) == (1, 1)
        assert pipe.errors == []

    def test_no_start_response(self):
        """A response without one is an error, with a body and without."""
        for body in ([b"a"], []):
            pipe, _ = run(lambda environ, start_response, body=body: body)
            assert "start_response" in str(failure(pipe, RuntimeError))
            assert pipe.chunks == []

    def test_write_before_start_response(self):
        """The instance's own write is no way around it."""
        pipe = FakePipe()
        call = Call(lambda *_: [], pipe, "GET")
        with pytest.raises(RuntimeError, match="before it called start_response"):
            call.write(b"a")
        assert pipe.chunks == []

    @pytest.mark.parametrize("chunk", ["text", 1, None, bytearray(b"a"), memoryview(b"a"), ""])
    def test_a_chunk_of_another_type(self, chunk):
        """A response is made of bytes, the empty chunks as well."""
        pipe, _, chunks = respond(b"a", chunk)
        assert f"bytes; got {type(chunk).__name__}" in str(failure(pipe, TypeError))
        assert pipe.chunks == [b"a"]
        assert chunks.closed == 1

    @pytest.mark.parametrize(
        ("status", "headers", "kind"),
        [
            ("OK", [], ValueError),
            (200, [], TypeError),
            ("200 OK", [("X", "a\r\nb")], ValueError),
            ("200 OK", [("X", b"a")], TypeError),
            ("200 OK", [("Content-Length", "two")], ValueError),
        ],
    )
    def test_a_start_that_may_not_be_sent(self, status, headers, kind):
        """The application sees the error in its own call."""
        seen = []

        def app(environ, start_response):
            try:
                start_response(status, headers)
            except Exception as error:
                seen.append(error)
                raise
            return [b"a"]

        pipe, call = run(app)
        assert failure(pipe, kind) is seen[0]
        assert not hasattr(call, "response_start")

    def test_an_application_that_is_not_called(self):
        """A request whose client left in the queue costs nothing."""
        pipe = FakePipe()
        pipe.closed = True
        run(lambda environ, start_response: pytest.fail("called"), pipe=pipe)
        assert (pipe.chunks, pipe.errors) == ([], [])

    def test_an_answer_in_its_stead(self):
        """The loop answers for it, by the same way."""
        pipe = FakePipe()
        call = Call(lambda *_: pytest.fail("called"), pipe, "GET")
        call.answer((503, [("Retry-After", "5")], b"no\n"))
        assert call.response_start == {
            "type": "http.response.start",
            "status": 503,
            "headers": [(b"retry-after", b"5")],
        }
        assert (pipe.chunks, pipe.lasts) == ([b"no\n"], [True])


class TestExcInfo:
    """A second start_response (PEP 3333)."""

    def test_without_exc_info(self):
        """It is an error, whether or not the response has begun."""

        def app(environ, start_response):
            start_response("200 OK", [])
            start_response("201 Created", [])
            return [b"a"]

        pipe, _ = run(app)
        assert "second time" in str(failure(pipe, RuntimeError))

    def test_before_the_response_has_begun(self):
        """The second replaces the first, its length included."""

        def app(environ, start_response):
            start_response("200 OK", length(100))
            try:
                raise ValueError("of the application")
            except ValueError:
                start_response("500 Oops", [("X-Two", "2")], sys.exc_info())
            return [b"error"]

        pipe, call = run(app)
        assert call.response_start["status"] == 500
        assert call.response_start["headers"] == [(b"x-two", b"2")]
        assert (pipe.body, pipe.complete, pipe.errors) == (b"error", True, [])

    def test_as_the_first(self):
        """A call with exc_info may be the first."""

        def app(environ, start_response):
            try:
                raise ValueError
            except ValueError:
                start_response("500 Oops", [], sys.exc_info())
            return [b"error"]

        pipe, call = run(app)
        assert call.response_start["status"] == 500
        assert pipe.complete

    def test_after_the_response_has_begun(self):
        """The error is raised again, with its traceback, and nothing is added to the response."""
        error = ValueError("of the application")

        def app(environ, start_response):
            start_response("200 OK", [])
            yield b"a"
            try:
                raise error
            except ValueError:
                start_response("500 Oops", [], sys.exc_info())
            yield b"b"

        pipe, call = run(app)
        assert failure(pipe, ValueError) is error
        assert error.__traceback__.tb_next is not None
        assert pipe.chunks == [b"a"]
        assert call.response_start["status"] == 200


class TestLength:
    """Content-Length, and responses that have no body."""

    def test_code_behind_the_last_yield_runs(self):
        """The client has everything before the generator goes on, and it goes on to its end."""
        pipe, seen = FakePipe(), []

        def app(environ, start_response):
            start_response("200 OK", length(2))
            yield b"ab"
            seen.append(pipe.complete)

        run(app, pipe=pipe)
        assert seen == [True]
        assert pipe.chunks == [b"ab"]

    def test_code_behind_the_last_yield_raises(self):
        """The error is told, though the response is complete."""
        error = ValueError("of the application")
        pipe, _, chunks = respond(b"ab", error, headers=length(2))
        assert pipe.complete
        assert pipe.errors == [error]
        assert chunks.closed == 1

    @pytest.mark.parametrize(
        "chunks", [(b"abcdef",), (b"ab", b"cdef"), (b"abc", b"def"), (b"a", b"", b"bcd", b"e")]
    )
    def test_a_body_that_is_longer_is_cut(self, chunks):
        """No byte more than was announced, and one look behind it."""
        pipe, _, iterable = respond(*chunks, headers=length(3))
        assert pipe.body == b"abc"
        assert pipe.complete
        assert pipe.errors == []
        assert iterable.closed == 1

    def test_write_is_cut(self):
        """So is what is written; behind the end it goes nowhere."""

        def app(environ, start_response):
            write = start_response("200 OK", length(3))
            write(b"abcd")
            write(b"e")
            return [b"f"]

        pipe, _ = run(app)
        assert (pipe.chunks, pipe.lasts) == ([b"abc"], [True])
        assert pipe.errors == []

    @pytest.mark.parametrize("chunks", [(), (b"ab",), (b"a", b"", b"b")])
    def test_a_body_that_is_shorter_is_an_error(self, chunks):
        """The response has no end: the client must see that something is missing."""
        pipe, _, iterable = respond(*chunks, headers=length(3))
        expected = f"announced 3 bytes of body (Content-Length) and gave {2 if chunks else 0}."
        assert expected in str(failure(pipe, RuntimeError))
        assert iterable.closed == 1

    def test_a_length_of_nothing(self):
        """Content-Length: 0 is complete without a chunk, and with too many."""
        for chunks in ((), (b"",), (b"a", b"b")):
            pipe, _, iterable = respond(*chunks, headers=length(0))
            assert (pipe.body, pipe.complete, pipe.errors) == (b"", True, [])
            assert iterable.closed == 1

    @pytest.mark.parametrize(
        ("method", "status"), [("HEAD", "200 OK"), ("GET", "204 No Content"), ("GET", "304 X")]
    )
    @pytest.mark.parametrize("chunks", [(), (b"ab",), (b"a", b"b", b"c")])
    def test_responses_without_a_body(self, method, status, chunks):
        """The application may give one: it goes nowhere, and a missing one is no error."""
        headers = length(2)
        pipe, call, iterable = respond(*chunks, status=status, headers=headers, method=method)
        assert (pipe.body, pipe.complete, pipe.errors) == (b"", True, [])
        assert iterable.closed == 1
        # Only a HEAD says what a GET would have given.
        expected = [(b"content-length", b"2")] if method == "HEAD" else []
        assert call.response_start["headers"] == expected

    def test_a_head_of_an_endless_response(self):
        """It is not iterated for the sake of a body that nobody gets."""

        def app(environ, start_response):
            start_response("200 OK", [])
            while True:
                yield b"x"

        pipe, _ = run(app, method="HEAD")
        assert (pipe.body, pipe.complete) == (b"", True)


class TestErrors:
    """Nothing comes out of the thread; what the application raises gets to the pipe."""

    def test_the_call_raises(self):
        """What the application raises arrives as it is."""
        error = ValueError("of the application")

        def app(environ, start_response):
            raise error

        pipe, _ = run(app)
        assert failure(pipe, ValueError) is error

    def test_the_iterable_raises(self):
        """In mid-response too; the iterable is closed."""
        error = ValueError("of the application")
        pipe, _, chunks = respond(b"a", error)
        assert failure(pipe, ValueError) is error
        assert pipe.chunks == [b"a"]
        assert chunks.closed == 1

    def test_close_raises(self):
        """The response is complete, and the error is told."""
        error = ValueError("of the application")
        pipe, _, _ = respond(b"a", fails_in_close=error)
        assert pipe.complete
        assert pipe.errors == [error]

    def test_the_iterable_and_its_close_raise(self):
        """The second error has the first as its context; neither is lost."""
        first, second = ValueError("first"), KeyError("second")
        pipe, _, _ = respond(first, fails_in_close=second)
        assert failure(pipe, KeyError) is second
        assert second.__context__ is first

    @pytest.mark.parametrize(
        "fatal", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]
    )
    @pytest.mark.parametrize("where", ["call", "iterable", "close"])
    def test_what_ends_a_thread_is_wrapped(self, fatal, where):
        """In the server's task SystemExit would end the server, CancelledError the task."""

        def app(environ, start_response):
            if where == "call":
                raise fatal
            start_response("200 OK", [])
            if where == "close":
                return Chunks(b"a", fails_in_close=fatal)
            return Chunks(b"a", fatal)

        pipe, _ = run(app)
        (error,) = pipe.errors
        assert type(error) is RuntimeError
        assert str(error) == f"The application raised {type(fatal).__name__}."
        assert error.__cause__ is fatal

    def test_the_client_leaves(self):
        """The iterable is closed at its next chunk, and nobody reports an error."""
        pipe, _, chunks = respond(b"a", b"b", b"c", b"d", pipe=FakePipe(leaves_after=2))
        assert pipe.chunks == [b"a", b"b"]
        assert (chunks.asked, chunks.closed) == (3, 1)
        assert pipe.errors == []

    def test_the_client_leaves_before_it_has_sent_its_body(self):
        """ClientDisconnected of an application without a framework is no error either."""
        pipe = FakePipe(b"a", BrokenPipeError("The client left."))

        def app(environ, start_response):
            RequestBody(pipe).readall()

        run(app, pipe=pipe)
        assert (pipe.chunks, pipe.errors) == ([], [])

    def test_close_raises_for_a_client_that_left(self):
        """An error of the application's own is told even then."""
        error = ValueError("of the application")
        pipe, _, _ = respond(b"a", pipe=FakePipe(leaves_after=0), fails_in_close=error)
        assert pipe.errors == [error]

    @pytest.mark.parametrize("kind", [BrokenPipeError, ClientDisconnected])
    def test_the_same_errors_of_the_applications_own(self, kind):
        """With the client there it is the application's trouble, with another server say."""
        error = kind("of the application")
        pipe, _, chunks = respond(b"a", error)
        assert failure(pipe, kind) is error
        assert chunks.closed == 1


class TestRequestBody:
    """A body that is still coming."""

    def test_read_gives_the_rest(self):
        """All pieces, up to the end, and then nothing."""
        body = RequestBody(FakePipe(b"ab", b"c", b"def"))
        assert body.readall() == b"abcdef"
        assert body.readall() == b""

    def test_readinto_gives_what_is_there(self):
        """One piece is not waited for while another is left, and pieces do not mix."""
        pipe = FakePipe(b"abc", b"d")
        body, buffer = RequestBody(pipe), bytearray(2)
        assert (body.readinto(buffer), bytes(buffer)) == (2, b"ab")
        assert pipe.reads == 1
        assert (body.readinto(buffer), bytes(buffer)) == (1, b"cb")
        assert pipe.reads == 1
        assert (body.readinto(buffer), bytes(buffer)) == (1, b"db")
        assert body.readinto(buffer) == 0

    def test_readall_begins_with_what_is_left(self):
        """What an earlier read left of its piece comes first, once."""
        body = RequestBody(FakePipe(b"abc", b"d"))
        body.readinto(bytearray(1))
        assert body.readall() == b"bcd"
        assert body.readall() == b""

    def test_it_is_for_reading(self):
        """It says what it can do, as files do."""
        body = RequestBody(FakePipe())
        assert body.readable()
        assert not body.writable()
        assert not body.seekable()

    @pytest.mark.parametrize("read", [RequestBody.readall, lambda body: body.read(1)])
    @pytest.mark.parametrize(
        ("error", "kind", "code"),
        [
            (BrokenPipeError("left"), ClientDisconnected, 400),
            (TimeoutError("s"), RequestTimeout, 408),
        ],
    )
    def test_errors_are_werkzeugs(self, read, error, kind, code):
        """Flask answers for them; the text is in the description."""
        with pytest.raises(kind) as caught:
            read(RequestBody(FakePipe(error)))
        assert (caught.value.code, caught.value.description) == (code, str(error))

    def test_the_timeout_is_looked_up(self, monkeypatch):
        """BODY_TIMEOUT is what each read waits at most."""
        pipe = FakePipe(b"a")
        monkeypatch.setattr(wsgi, "BODY_TIMEOUT", 12.5)
        RequestBody(pipe).readall()
        assert pipe.timeouts == {12.5}


class TestOpenBody:
    """wsgi.input."""

    @pytest.mark.parametrize("message", [{}, {"body": b""}, {"more_body": False}])
    def test_no_body(self, message):
        """Without a body it is empty, and the pipe is not asked."""
        pipe = FakePipe()
        assert open_body(pipe, message).read() == b""
        assert pipe.reads == 0

    def test_a_body_that_is_here(self):
        """It is a file in memory."""
        pipe = FakePipe()
        body = open_body(pipe, {"body": b"a\nb", "more_body": False})
        assert (body.readline(), body.read(), pipe.reads) == (b"a\n", b"b", 0)

    def test_a_body_that_comes(self):
        """It is read when the view reads, and not before."""
        pipe = FakePipe(b"ab\nc", b"d\n", b"e")
        body = open_body(pipe, {"body": b"", "more_body": True})
        assert isinstance(body, io.BufferedIOBase)
        assert pipe.reads == 0
        assert body.readline() == b"ab\n"
        assert pipe.reads == 1
        assert list(body) == [b"cd\n", b"e"]
        assert body.read() == b""

    @pytest.mark.parametrize("sizes", [(1, 1, 1, 9), (4, -1), (100,), (0, 3, 100), (2, None)])
    def test_reads_of_any_size(self, sizes):
        """read(n) gives n bytes unless the body ends; read() gives the rest."""
        body = open_body(FakePipe(b"ab", b"cd", b"ef"), {"more_body": True})
        whole = io.BytesIO(b"abcdef")
        for size in sizes:
            assert body.read(size) == whole.read(size)

    def test_readinto_and_readlines(self):
        """The other ways that PEP 3333 and parsers use."""
        body = open_body(FakePipe(b"ab", b"c\nd", b"\n"), {"more_body": True})
        buffer = bytearray(3)
        assert (body.readinto(buffer), bytes(buffer)) == (3, b"abc")
        assert body.readlines() == [b"\n", b"d\n"]

    def test_read1_does_not_wait_for_more(self):
        """What is there is given, though more was asked for: a proxy passes it on at once."""
        pipe = FakePipe(b"ab", b"cd")
        body = open_body(pipe, {"more_body": True})
        assert body.read1(100) == b"ab"
        assert pipe.reads == 1

    def test_a_large_piece(self):
        """A piece larger than the buffer is no trouble."""
        large = bytes(range(256)) * 2000
        body = open_body(FakePipe(large, large), {"more_body": True})
        assert body.read(len(large) + 10) == large + large[:10]
        assert body.read() == large[10:]


class TestFileWrapper:
    """wsgi.file_wrapper."""

    def test_it_reads_a_piece_at_a_time(self):
        """Werkzeug asks for 8 KiB at a time: each would cross to the loop on its own."""
        sizes = []

        class File(io.BytesIO):
            def read(self, size=-1):
                sizes.append(size)
                return super().read(size)

        file = File(b"x" * (Pipe.PIECE_BYTES + 10))
        chunks = list(FileWrapper(file, 8192))
        assert [len(chunk) for chunk in chunks] == [Pipe.PIECE_BYTES, 10]
        assert set(sizes) == {Pipe.PIECE_BYTES}

    def test_its_defaults(self):
        """A larger buffer stays as it is; without one it is a piece."""
        assert FileWrapper(io.BytesIO()).buffer_size == Pipe.PIECE_BYTES
        assert FileWrapper(io.BytesIO(), 10**6).buffer_size == 10**6

    def test_it_is_closed_with_the_response(self):
        """The file is closed, whether or not all of it was read."""
        for headers in ([], length(10)):
            file = io.BytesIO(b"x" * 100)

            def app(environ, start_response, file=file, headers=headers):
                start_response("200 OK", headers)
                return FileWrapper(file)

            pipe, _ = run(app)
            assert pipe.complete
            assert file.closed
