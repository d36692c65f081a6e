"""The WebSocket servers that are compared, and how a server is started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from flask import Flask

from flask_websockets import AsyncWebSocket, WebSocket, WebSockets

from .resident import resident

#: What the extra ``fast`` gives (named, so that a missing part is an error), and what the five
#: dependencies give.
IMPLEMENTATIONS = {
    "auto": ["--ws", "websockets-sansio", "--http", "httptools", "--loop", "uvloop"],
    "wsproto": ["--ws", "wsproto", "--http", "h11", "--loop", "asyncio"],
}

#: Threads of gunicorn beyond one for each connection.
MORE_THREADS = 20

app = Flask(__name__)
websockets = WebSockets(app)


@app.get("/resident")
def resident_view() -> dict[str, int | None]:
    return resident()


@websockets.route("/parked")
def parked(ws: WebSocket) -> None:
    """Waits in receive for as long as the benchmark takes."""
    ws.send("ready")
    ws.receive()


@websockets.route("/echo")
def echo(ws: WebSocket) -> None:
    ws.send("ready")
    for data in ws.iter_data():
        ws.send(data)


@websockets.route("/fan-out")
def fan_out(ws: WebSocket) -> None:
    with websockets.subscribe(ws, "everyone"):
        ws.send("ready")  # the client's handshake may end before the subscription stands
        for data in ws.iter_data():
            websockets.publish(data, "everyone")


ours = websockets.asgi_app()

async_app = Flask("async")
async_websockets = WebSockets(async_app)


async_app.get("/resident")(resident_view)


@async_websockets.route("/echo")
async def async_echo(ws: AsyncWebSocket) -> None:
    await ws.send("ready")
    async for data in ws.iter_data():
        await ws.send(data)


@async_websockets.route("/fan-out")
async def async_fan_out(ws: AsyncWebSocket) -> None:
    async with async_websockets.subscribe(ws, "everyone"):
        await ws.send("ready")
        async for data in ws.iter_data():
            await async_websockets.apublish(data, "everyone")


ours_async = async_websockets.asgi_app()

subscribers: list[Any] = []


async def raw(scope: Any, receive: Any, send: Any) -> None:
    """Give the same answers with no framework, no thread and no bound."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(resident()).encode()})
    if scope["type"] != "websocket":
        return
    await receive()
    await send({"type": "websocket.accept"})
    recipients = subscribers if scope["path"] == "/fan-out" else []
    recipients.append(send)
    await send({"type": "websocket.send", "text": "ready"})
    while (event := await receive())["type"] == "websocket.receive":
        message = {"type": "websocket.send", "text": event["text"]}
        for each in list(recipients):
            await each(message)
    recipients.remove(send)


@dataclass(frozen=True)
class WsServer:
    """One WebSocket server that is compared: an application and what runs it."""

    target: str  # module:app
    setting: str  # in words, for the report
    needs: tuple[str, ...] = ()  # distributions, as they are named on PyPI
    gunicorn: bool = False  # else uvicorn, with the settings that ours has
    socketio: bool = False  # Engine.IO and Socket.IO on top
    peer: bool = True  # another project: its faults are counted, those of ours end the run


_GTHREAD = f"gunicorn, gthread, 1 worker, {MORE_THREADS} threads more than connections"
_ON_UVICORN = "on uvicorn, as ours"
_CHANNELS = "benchmarks.peers.channels"

SERVERS = {
    "raw": WsServer("benchmarks.servers:raw", "an ASGI application of one coroutine", peer=False),
    "ours": WsServer("benchmarks.servers:ours", "plain views, a thread each", peer=False),
    "ours-async": WsServer("benchmarks.servers:ours_async", "the same as coroutines", peer=False),
    "flask-sock": WsServer(
        "benchmarks.peers.sock:app", _GTHREAD, ("flask-sock", "gunicorn"), gunicorn=True
    ),
    "socketio": WsServer(
        "benchmarks.peers.socketio:app",
        f"Flask-SocketIO, threading, {_GTHREAD}; WebSocket transport alone",
        ("flask-socketio", "simple-websocket", "gunicorn"),
        gunicorn=True,
        socketio=True,
    ),
    "quart": WsServer("benchmarks.peers.quart:app", f"Quart {_ON_UVICORN}", ("quart",)),
    "starlette": WsServer(
        "benchmarks.peers.starlette:app", f"Starlette {_ON_UVICORN}", ("starlette",)
    ),
    "channels": WsServer(
        f"{_CHANNELS}:asynchronous",
        f"Django Channels {_ON_UVICORN}, async consumers, in-memory layer",
        ("channels", "django"),
    ),
    "channels-sync": WsServer(
        f"{_CHANNELS}:synchronous",
        f"Django Channels {_ON_UVICORN}, sync consumers, in-memory layer",
        ("channels", "django"),
    ),
}
#: What is compared unless more is asked for.
USUAL = ("raw", "ours", "ours-async")


def missing(needs: Iterable[str]) -> list[str]:
    """Those distributions that are not installed."""
    absent = []
    for name in needs:
        try:
            version(name)
        except PackageNotFoundError:
            absent.append(name)
    return absent


def _uvicorn(target: str, ws: str, deflate: bool) -> list[str]:
    command = ["-m", "uvicorn", target, "--host", "127.0.0.1", "--port", "{port}"]
    command += ["--log-level", "warning", *IMPLEMENTATIONS[ws]]
    return command if deflate else [*command, "--ws-per-message-deflate", "false"]


def _gunicorn(target: str, connections: int) -> list[str]:
    command = ["-m", "gunicorn", "--worker-class", "gthread", "--workers", "1"]
    command += ["--threads", str(connections + MORE_THREADS), "--bind", "127.0.0.1:{port}"]
    command += ["--log-level", "warning", "--graceful-timeout", "2", "--no-control-socket"]
    return [*command, target]


@contextmanager
def serve(
    target: str,
    ws: str,
    core: int | None = None,
    log: IO[bytes] | None = None,
    deflate: bool = False,
) -> Iterator[int]:
    """Serve *target* (``module:app``) with uvicorn on a free port, which is yielded.

    :param log: gets all that the server prints.
    """
    with start(_uvicorn(target, ws, deflate), core, log=log) as port:
        yield port


@contextmanager
def serve_ws(
    server: WsServer, ws: str, core: int | None, connections: int, deflate: bool = False
) -> Iterator[int]:
    """Run *server* for so many connections. A peer's last words are shown if it goes wrong."""
    command = _uvicorn(server.target, ws, deflate)
    if server.gunicorn:
        command = _gunicorn(server.target, connections)
    with tempfile.TemporaryFile() as log:
        try:
            with start(command, core, log=log if server.peer else None) as port:
                yield port
        except BaseException:
            log.seek(0)
            print(log.read()[-2000:].decode(errors="replace"), end="", file=sys.stderr)
            raise


@contextmanager
def serve_floor(core: int | None) -> Iterator[int]:
    """Run the fastest server there is, which shows what the client can do."""
    with start(["-m", "benchmarks.floor", "{port}"], core) as port:
        yield port


@contextmanager
def start(
    command: list[str],
    core: int | None = None,
    environ: dict[str, str] | None = None,
    log: IO[bytes] | None = None,
) -> Iterator[int]:
    """Run Python with *command*, with ``{port}`` in it, until the block ends.

    :param log: gets all that the server prints.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, *(part.replace("{port}", str(port)) for part in command)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **(environ or {})},
        stdout=log,
        stderr=log,
        start_new_session=True,  # a group of its own, for the workers of some
    )
    try:
        if core is not None:
            os.sched_setaffinity(process.pid, {core})  # at once: threads and workers inherit it
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        else:
            raise RuntimeError(f"The server did not start: {' '.join(command)}")
        yield port
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(process.pid, signal.SIGKILL)  # what it left behind, or itself
        except (ProcessLookupError, PermissionError):
            pass  # nothing was left; macOS says it with the other error
        process.wait()
