"""The Flask application that every HTTP server serves, and what puts it on an ASGI server."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from flask import Flask, jsonify, request, send_file

#: What is streamed, uploaded and downloaded: 1 MiB in which no piece is like another.
PAYLOAD = random.Random(1).randbytes(1 << 20)
CHUNKS = [PAYLOAD[at : at + 65_536] for at in range(0, len(PAYLOAD), 65_536)]
SLEEP = 0.1
#: Names the file that holds PAYLOAD.
FILE_VARIABLE = "BENCHMARK_FILE"

app = Flask(__name__)


@app.get("/small")
def small() -> str:
    return "ok"


def record(number: int) -> dict[str, Any]:
    """Differs for each client, so that an answer that went to another one is noticed."""
    tags = [f"tag {tag}" for tag in range(5)]
    return {"id": number, "name": f"client {number}", "tags": tags, "active": True, "share": 0.5}


@app.get("/json/<int:number>")
def as_json(number: int) -> Any:
    return jsonify(record(number))


@app.get("/sleep")
def sleep() -> str:
    time.sleep(SLEEP)
    return "ok"


@app.get("/stream")
def stream() -> Iterator[bytes]:
    yield from CHUNKS


@app.post("/upload")
def upload() -> str:
    data = request.get_data(cache=False)
    return str(len(data)) if data == PAYLOAD else "other bytes"


@app.get("/download")
def download() -> Any:
    return send_file(os.environ[FILE_VARIABLE], mimetype="application/octet-stream")


# For ASGI servers. Each is a factory: the others serve the application as it is above.

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]
#: Seconds between two heartbeats. uvloop's timers count in whole milliseconds.
HEARTBEAT = 0.002
HEARTBEAT_START = "/-/heartbeat/start"
HEARTBEAT_STOP = "/-/heartbeat/stop"


class Observed:
    """An ASGI application, and a heartbeat that says how long its loop came to nothing else.

    The heart stands still while the rate is measured: it costs one comparison of a string then.
    """

    def __init__(self, application: ASGIApp) -> None:
        self.application = application
        self.timer: asyncio.TimerHandle | None = None
        self.due = 0.0
        self.longest = 0.0
        self.beats = 0

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        if scope["type"] == "http" and scope["path"].startswith("/-/"):
            return self.answer(scope["path"], send)
        return self.application(scope, receive, send)

    def beat(self) -> None:
        self.late()
        self.beats += 1
        self.due = time.perf_counter() + HEARTBEAT
        self.timer = asyncio.get_running_loop().call_later(HEARTBEAT, self.beat)

    def late(self) -> None:
        self.longest = max(self.longest, time.perf_counter() - self.due)

    async def answer(self, path: str, send: Any) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.late()  # or a loop that never came back to the heart would look quick
            self.timer = None
        body = json.dumps({"longest": self.longest, "beats": self.beats}).encode()
        if path == HEARTBEAT_START:
            self.due = time.perf_counter()
            self.beat()
            self.longest, self.beats = 0.0, 0
        headers = [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def ours() -> ASGIApp:
    from flask_websockets import WebSockets

    return Observed(WebSockets(app).asgi_app())


def with_websockets() -> Flask:
    """The same for ``flask websockets serve``, which wants the application itself."""
    from flask_websockets import WebSockets

    WebSockets(app)
    return app


def stock_asgiref() -> ASGIApp:
    from asgiref.wsgi import WsgiToAsgi

    return Observed(WsgiToAsgi(app))


def a2wsgi() -> ASGIApp:
    from a2wsgi import WSGIMiddleware

    return Observed(WSGIMiddleware(app, workers=40))
