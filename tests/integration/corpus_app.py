"""The application of the corpus: it answers with what it saw. Copied beside its server."""

from __future__ import annotations

import datetime
import hashlib
import io
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flask import Flask, Response, jsonify, redirect, request, send_file
from werkzeug.exceptions import abort

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE", "PROPFIND"]
LETTERS = b"abcdefghijklmnopqrstuvwxyz" * 40
MODIFIED = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)

app = Flask(__name__)
app.secret_key = "not a secret"
app.json.sort_keys = True  # type: ignore[attr-defined]
# /error is answered 500 on purpose; any other traceback in the log is somebody's mistake.
app.logger.disabled = True


class Recorder:
    """Counts the calls of the application, and marks its answers."""

    def __init__(self, wsgi_app: Callable[..., Iterable[bytes]]) -> None:
        self._wsgi_app = wsgi_app
        self._lock = threading.Lock()
        self._calls: list[str] = []

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        def marked(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            return start_response(status, [*headers, ("X-Application", "yes")], *exc_info)

        if environ["PATH_INFO"] != "/-/calls":
            with self._lock:
                self._calls.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        return self._wsgi_app(environ, marked)

    def take(self) -> list[str]:
        with self._lock:
            calls, self._calls = self._calls, []
        return calls


recorder = Recorder(app.wsgi_app)
app.wsgi_app = recorder  # type: ignore[method-assign]


@app.get("/-/calls")
def calls() -> Response:
    """The calls since the last time."""
    return jsonify(recorder.take())


@app.after_request
def sort_allow(response: Response) -> Response:
    # It comes from a set, whose order is another in each process.
    if allow := response.headers.get("Allow"):
        response.headers["Allow"] = ", ".join(sorted(allow.split(", ")))
    return response


def seen(body: bytes) -> dict[str, Any]:
    environ = request.environ
    return {
        "method": request.method,
        "path": request.path,
        "PATH_INFO": environ["PATH_INFO"],
        "SCRIPT_NAME": environ["SCRIPT_NAME"],
        "QUERY_STRING": environ["QUERY_STRING"],
        "RAW_URI": environ.get("RAW_URI"),
        "SERVER_PROTOCOL": environ["SERVER_PROTOCOL"],
        "REMOTE_ADDR": environ.get("REMOTE_ADDR"),
        "SERVER_NAME": environ["SERVER_NAME"],
        "input_terminated": environ.get("wsgi.input_terminated"),
        "script_root": request.script_root,
        "full_path": request.full_path,
        "url": request.url,
        "base_url": request.base_url,
        "host": request.host,
        "scheme": request.scheme,
        "remote_addr": request.remote_addr,
        "access_route": list(request.access_route),
        "args": list(request.args.items(multi=True)),
        "headers": sorted(request.headers.items()),
        "cookies": list(request.cookies.items(multi=True)),
        "authorization": str(request.authorization),
        "languages": list(request.accept_languages.values()),
        "content_type": request.content_type,
        "content_length": request.content_length,
        "is_json": request.is_json,
        "length": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
    }


@app.route("/see", methods=METHODS)
@app.route("/see/", methods=METHODS)
@app.route("/see/<path:rest>", methods=METHODS)
def see(rest: str = "") -> Response:
    return jsonify(seen(request.get_data()) | {"rest": rest})


@app.route("/", methods=METHODS)
def index() -> Response:
    return jsonify(seen(request.get_data()))


@app.post("/form")
def form() -> Response:
    files = [
        [key, file.filename, file.content_type, hashlib.sha256(file.read()).hexdigest()]
        for key, file in request.files.items(multi=True)
    ]
    return jsonify(seen(b"") | {"form": list(request.form.items(multi=True)), "files": files})


@app.post("/json")
def json() -> Response:
    return jsonify(json=request.get_json(), length=request.content_length)


@app.post("/lines")
def lines() -> Response:
    """The body, line by line."""
    return jsonify([line.decode("latin-1") for line in request.stream])


@app.post("/early")
def early() -> tuple[str, int]:
    """Answers without a look at the body."""
    return "too early", 413


@app.get("/directory/")
def directory() -> str:
    return "directory"


@app.route("/redirect", methods=["GET", "POST"])
def go() -> Any:
    return redirect(request.args.get("to", "/see"), int(request.args.get("code", "302")))


@app.route("/status/<int:code>")
def status(code: int) -> Response:
    return Response("body", code, {"X-Status": str(code)})


@app.get("/abort/<int:code>")
def stop(code: int) -> Any:
    abort(code)


@app.get("/error")
def error() -> Any:
    return 1 // 0


@app.get("/resource")
def resource() -> Response:
    response = Response(LETTERS, mimetype="text/plain")
    response.set_etag("letters")
    response.last_modified = MODIFIED
    return response.make_conditional(request, accept_ranges=True, complete_length=len(LETTERS))


@app.get("/download")
def download() -> Response:
    return send_file(
        io.BytesIO(LETTERS),
        mimetype="application/x-letters",
        as_attachment=True,
        download_name="lëtters.bin",
        etag="letters",
        last_modified=MODIFIED,
    )


@app.get("/cookies")
def cookies() -> Response:
    response = Response("cookies")
    response.set_cookie("first", "1", httponly=True, samesite="Lax")
    response.set_cookie("second", "ä;2", secure=True)
    response.delete_cookie("third")
    response.headers.add("X-Twice", "b")
    response.headers.add("X-Twice", "a")
    response.headers.add("x-twice", "c")
    return response


@app.get("/latin")
def latin() -> Response:
    return Response("latin", headers={"X-Latin": "Käse ÿ", "X-Empty": "", "X-Tab": "a\tb"})


@app.get("/stream")
def stream() -> Response:
    pieces = int(request.args.get("pieces", "5"))

    def generate() -> Iterator[bytes]:
        for number in range(pieces):
            yield b"" if number == 2 else b"piece %d\n" % number

    return Response(generate(), mimetype="text/plain")


@app.get("/stream/length")
def stream_length() -> Response:
    """Announces a length that is right, and gives more where *more* is asked for."""
    more = int(request.args.get("more", "0"))
    return Response(iter([b"abc", b"def" + b"!" * more]), headers={"Content-Length": "6"})


try:
    from flask_websockets import WebSockets
except ImportError:  # gunicorn serves the application itself, and needs no more
    pass
else:
    asgi = WebSockets(app).asgi_app()
