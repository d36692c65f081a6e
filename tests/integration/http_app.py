"""What the HTTP suite serves: ``app`` as WSGI, and ``asgi``, the same through flask-websockets.

Views and applications record what happens to them under a key that the test chose, and another
request reads the records back. What Flask cannot express is a WSGI application of its own at
``/wsgi/NAME``, with the key as its query string.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from io import BytesIO
from typing import Any
from wsgiref.validate import validator

from flask import (
    Flask,
    Response,
    after_this_request,
    g,
    jsonify,
    redirect,
    request,
    send_file,
    session,
    stream_with_context,
)

from flask_websockets import WebSockets

#: Seconds after which a view stops waiting for a test that has failed.
PATIENCE = 20.0

#: One MiB of which no two places are alike.
DATA = b"".join(b"%015d\n" % number for number in range(65_536))

RECORDS: defaultdict[str, list[str]] = defaultdict(list)
GATES: defaultdict[str, threading.Event] = defaultdict(threading.Event)
BARRIERS: dict[str, threading.Barrier] = {}
BARRIERS_LOCK = threading.Lock()
SEEN: ContextVar[int] = ContextVar("SEEN", default=0)

app = Flask(__name__)
app.secret_key = "of the tests"
websockets = WebSockets(app)


class Deliberate(Exception):
    """An error that a test asked for."""


def record(key: str, what: str) -> None:
    RECORDS[key].append(what)


def wait_at_barrier(key: str, parties: int) -> None:
    with BARRIERS_LOCK:
        barrier = BARRIERS.setdefault(key, threading.Barrier(parties))
    barrier.wait(PATIENCE)


# --- What the tests steer by ---------------------------------------------------------------


@app.get("/")
def hello() -> str:
    return "hello"


@app.get("/records/<key>")
def records(key: str) -> Response:
    return jsonify(RECORDS[key])


@app.post("/release/<key>")
def release(key: str) -> str:
    GATES[key].set()
    return "released"


# --- Views that meet, wait or block ----------------------------------------------------------


@app.get("/barrier/<key>/<int:parties>")
def barrier(key: str, parties: int) -> str:
    wait_at_barrier(key, parties)
    return "passed"


@app.get("/gate/<key>")
def gate(key: str) -> str:
    record(key, "entered")
    return "released" if GATES[key].wait(PATIENCE) else "never released"


@app.get("/async-barrier/<key>/<int:parties>")
async def async_barrier(key: str, parties: int) -> str:
    await asyncio.to_thread(wait_at_barrier, key, parties)
    return "passed"


@app.get("/async-gate/<key>")
async def async_gate(key: str) -> str:
    """Block the loop that this view runs on."""
    record(key, "entered")
    return "released" if GATES[key].wait(PATIENCE) else "never released"


@app.get("/context-variable")
def context_variable() -> str:
    before = SEEN.get()
    SEEN.set(before + 1)
    return str(before)


# --- Views that read a body ------------------------------------------------------------------


def digest(data: bytes) -> dict[str, Any]:
    return {"length": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@app.route("/body", methods=["POST", "PUT", "PATCH", "DELETE"])
def body() -> Response:
    return jsonify(
        method=request.method,
        content_length=request.content_length,
        terminated=request.environ.get("wsgi.input_terminated"),
        **digest(request.get_data()),
    )


@app.post("/form")
def form() -> Response:
    files = {name: digest(file.read()) for name, file in request.files.items()}
    return jsonify(fields=request.form.to_dict(), files=files)


@app.post("/limited/<key>")
def limited(key: str) -> str:
    request.max_content_length = 1000
    # Werkzeug's get_data() stops at the limit of a chunked body, and does not refuse it.
    while request.stream.read(500):
        pass
    record(key, "read")
    return "read"


@app.post("/early/<key>")
def early(key: str) -> Response:
    record(key, "entered")
    return jsonify(digest(request.get_data()))


@app.post("/unread")
def unread() -> str:
    return "not read"


@app.post("/unread/<key>")
def unread_at_the_gate(key: str) -> Response:
    record(key, "entered")
    GATES[key].wait(PATIENCE)
    response = Response("not read")
    response.call_on_close(lambda: record(key, "closed"))
    return response


@app.post("/left-upload/<key>")
def left_upload(key: str) -> str:
    record(key, "entered")
    try:
        request.get_data()
        record(key, "read")
    except BaseException as error:
        record(key, type(error).__name__)
        raise
    finally:
        record(key, "over")
    return "read"


# --- Views that answer -----------------------------------------------------------------------


@app.route("/path/<path:rest>")
def path(rest: str) -> str:
    return rest


@app.get("/number/<int:number>")
def number(number: int) -> str:
    return str(number)


@app.get("/status/<code>")
def status(code: str) -> tuple[str, int]:
    return "", int(code)


@app.get("/url")
def url() -> Response:
    return jsonify(url=request.url, host=request.host, root=request.url_root)


@app.get("/query")
def query() -> Response:
    raw = request.environ["QUERY_STRING"]
    return jsonify(raw=raw, args=dict(request.args.items(multi=True)))


@app.get("/redirect")
def redirected() -> Any:
    return redirect("/elsewhere?a=b")


@app.get("/after")
def after() -> str:
    @after_this_request
    def mark(response: Response) -> Response:
        response.headers["X-After"] = "this request"
        return response

    return "after"


@app.get("/cookies")
def cookies() -> Response:
    return jsonify(request.cookies)


@app.get("/set-cookies")
def set_cookies() -> Response:
    response = Response("set")
    for name in ("zebra", "apple", "mango"):
        response.set_cookie(name, "1")
    return response


@app.get("/session")
def visits() -> str:
    session["visits"] = session.get("visits", 0) + 1
    return str(session["visits"])


@app.get("/latin-1")
def latin_1() -> Response:
    return Response("latin-1", headers={"X-Back": request.headers["X-Name"]})


@app.get("/large")
def large() -> bytes:
    return DATA * 5


@app.get("/large-stream")
def large_stream() -> Response:
    return Response(DATA[start : start + 10_007] for start in range(0, len(DATA), 10_007))


@app.get("/with-context")
def with_context() -> Response:
    @stream_with_context
    def chunks() -> Iterator[str]:
        for name in ("first", "second"):
            yield f"{name}={request.args[name]};"

    return Response(chunks())


@app.get("/file")
def file() -> Response:
    return send_file(
        BytesIO(DATA), mimetype="text/plain", etag="the-etag", conditional=True, max_age=60
    )


@app.get("/disk-file")
def disk_file() -> Response:
    if "path" not in disk:
        with tempfile.NamedTemporaryFile(dir=".", delete=False) as written:
            written.write(DATA)
        disk["path"] = written.name
    return send_file(disk["path"], mimetype="text/plain", conditional=True)


disk: dict[str, str] = {}


@app.get("/fails")
def fails() -> str:
    raise Deliberate("before the response")


@app.get("/fails-in-stream")
def fails_in_stream() -> Response:
    def chunks() -> Iterator[bytes]:
        yield b"the first chunk"
        raise Deliberate("in mid-stream")

    return Response(chunks())


# --- Responses whose close() is told ---------------------------------------------------------


class RecordingFile(BytesIO):
    def __init__(self, key: str) -> None:
        super().__init__(DATA)
        self.key = key

    def close(self) -> None:
        # Closed once more when it is collected: only the first time is the server's.
        if not self.closed:
            record(self.key, "file closed")
        super().close()


@app.teardown_request
def tell_teardown(error: BaseException | None) -> None:
    if "key" in g:
        record(g.key, "teardown")


@app.get("/closing/<kind>/<key>")
def closing(kind: str, key: str) -> Response:
    g.key = key

    def chunks() -> Iterator[bytes]:
        try:
            yield b"one"
            if kind == "error":
                raise Deliberate("in a chunk")
            yield b"two"
            record(key, "ran to its end")
        finally:
            record(key, "generator closed")

    if kind == "plain":
        response = Response("onetwo")
    elif kind == "file":
        response = send_file(RecordingFile(key), mimetype="text/plain")
    elif kind == "context":
        response = Response(stream_with_context(chunks()))
    else:
        response = Response(chunks())
    response.call_on_close(lambda: record(key, "closed"))
    return response


@app.get("/endless/<key>")
def endless(key: str) -> Response:
    """Stream for longer than any test waits: a client that leaves must end it."""

    def chunks() -> Iterator[bytes]:
        record(key, "started")
        try:
            for _ in range(int(PATIENCE * 100)):
                yield b"x" * 1000
                time.sleep(0.01)
            record(key, "ran to its end")
        finally:
            record(key, "generator closed")

    response = Response(chunks())
    response.call_on_close(lambda: record(key, "closed"))
    return response


@app.get("/flood/<key>")
def flood(key: str) -> Response:
    """Yield 32 MiB as fast as they are taken, and tell how many went."""

    def chunks() -> Iterator[bytes]:
        try:
            for number in range(512):
                RECORDS[key] = [str(number * 65_536)]
                yield b"x" * 65_536
        finally:
            record(key, "generator closed")

    return Response(chunks())


# --- WSGI applications -----------------------------------------------------------------------

WSGIApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
RAW: dict[str, WSGIApp] = {}


def raw(wsgi_app: WSGIApp) -> WSGIApp:
    RAW[wsgi_app.__name__] = wsgi_app
    return wsgi_app


def text_headers(*more: tuple[str, str]) -> list[tuple[str, str]]:
    return [("Content-Type", "text/plain"), *more]


@raw
def environ(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    texts = {name: value for name, value in environ.items() if isinstance(value, str)}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(texts).encode()]


@raw
def touch(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    key = environ["QUERY_STRING"]
    record(key, "called")
    start_response("200 OK", text_headers())
    return [environ.get("HTTP_X_MANY", "").encode("latin-1")]


@raw
def reading(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """Read the body with one method of ``wsgi.input``, which the query string names."""
    stream = environ["wsgi.input"]
    pieces: list[bytes]
    match environ["QUERY_STRING"]:
        case "read":
            pieces = [stream.read()]
        case "read-n":
            pieces = list(iter(lambda: stream.read(70_001), b""))
        case "readline":
            pieces = list(iter(stream.readline, b""))
        case "readline-n":
            pieces = list(iter(lambda: stream.readline(10), b""))
        case "readlines":
            pieces = stream.readlines()
        case "iteration":
            pieces = list(stream)
    after_the_end = stream.read(1)
    answer = {"pieces": len(pieces), "after": len(after_the_end), **digest(b"".join(pieces))}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]


class Closing:
    """An iterable that records its chunks, its close(), and whether a thread did it all."""

    def __init__(self, key: str, chunks: list[bytes | Exception]) -> None:
        self.key = key
        self.chunks = iter(chunks)
        self.thread = threading.get_ident()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        chunk = next(self.chunks)
        if isinstance(chunk, Exception):
            record(self.key, "error")
            raise chunk
        record(self.key, "chunk")
        return chunk

    def close(self) -> None:
        here = threading.get_ident() == self.thread
        record(self.key, "closed" if here else "closed by another thread")


def add_closing(name: str, chunks: list[bytes | Exception], *headers: tuple[str, str]) -> None:
    def closing(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", text_headers(*headers))
        return Closing(environ["QUERY_STRING"], chunks)

    RAW[f"closing-{name}"] = closing


add_closing("length", [b"abc", b"def"], ("Content-Length", "6"))
add_closing("chunked", [b"abc", b"def"])
add_closing("empty", [])
add_closing("long", [b"abc", b"defghi"], ("Content-Length", "6"))
add_closing("longer", [b"abc", b"def", b"ghi"], ("Content-Length", "6"))
add_closing("short", [b"abc"], ("Content-Length", "6"))
add_closing("error", [b"abc", Deliberate("in a chunk")])
add_closing("error-length", [b"abc", Deliberate("in a chunk")], ("Content-Length", "6"))
add_closing("error-first", [Deliberate("in the first chunk")])
add_closing("error-after-empty", [b"", Deliberate("after an empty chunk")])
add_closing("empty-chunk", [b"abc", b"", b"def"])
add_closing("hop-by-hop", [b"abc"], ("Connection", "close, X-Hop"), ("Keep-Alive", "timeout=99"))


@raw
def written(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    write = start_response("200 OK", text_headers())
    write(b"written, ")
    write(b"written again, ")
    return [b"returned"]


@raw
def only_written(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    write = start_response("200 OK", text_headers(("Content-Length", "7")))
    write(b"written")
    return []


@raw
def generator(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """A generator calls start_response when its first chunk is asked for."""
    start_response("200 OK", text_headers())
    yield b"generated"


@raw
def empty_generator(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", text_headers())
    yield from ()


@raw
def restart(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", text_headers(("X-Start", "first")))
    try:
        raise Deliberate("between the calls")
    except Deliberate:
        start_response("503 Sorry", text_headers(("X-Start", "second")), sys.exc_info())
    return [b"replaced"]


@raw
def late_restart(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", text_headers())
    yield b"the first byte"
    try:
        raise Deliberate("after the first byte")
    except Deliberate as error:
        try:
            start_response("503 Sorry", text_headers(), sys.exc_info())
        except Deliberate as raised:
            record(environ["QUERY_STRING"], "raised" if raised is error else "raised another")
            raise
    record(environ["QUERY_STRING"], "went on")
    yield b"the last byte"


@raw
def start_twice(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", text_headers())
    start_response("200 OK", text_headers())
    return [b"no error"]


@raw
def never_started(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    return [b"no start"]


@raw
def raises(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    raise Deliberate("before start_response")


def add_status(name: str, line: str, *chunks: bytes) -> None:
    def status(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response(line, text_headers())
        return list(chunks)

    RAW[f"status-{name}"] = status


add_status("no-phrase", "200", b"body")
add_status("empty-phrase", "299 ", b"body")
add_status("unknown", "299 Unheard Of", b"body")
add_status("204", "204 No Content", b"a body that must not go out")
add_status("304", "304 Not Modified", b"a body that must not go out")


@raw
def repeated(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    names = [("X-Other", "0"), ("X-Many", "1"), ("X-Other", "2"), ("X-Many", "3")]
    start_response("200 OK", text_headers(*names))
    return [b""]


@raw
def checked(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """Read the body and answer, as wsgiref lets an application do it."""
    data = environ["wsgi.input"].read(1000)
    environ["wsgi.errors"].write("")
    environ["wsgi.errors"].flush()
    start_response("200 OK", text_headers(("Content-Length", str(2 + len(data)))))
    return [b"ok", data]


RAW["validated"] = validator(checked)

flask_wsgi_app = app.wsgi_app


def by_prefix(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    _, first, *rest = environ["PATH_INFO"].split("/", 3)
    if first == "wsgi" and rest:
        return RAW[rest[0]](environ, start_response)
    return flask_wsgi_app(environ, start_response)


app.wsgi_app = by_prefix  # type: ignore[method-assign]
asgi = websockets.asgi_app()
