"""The WebSocket servers that are compared, and how a server is started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from flask import Flask

from flask_websockets import AsyncWebSocket, WebSocket, WebSockets

#: What the extra ``fast`` gives (named, so that a missing part is an error), and what the five
#: dependencies give.
IMPLEMENTATIONS = {
    "auto": ["--ws", "websockets-sansio", "--http", "httptools", "--loop", "uvloop"],
    "wsproto": ["--ws", "wsproto", "--http", "h11", "--loop", "asyncio"],
}

app = Flask(__name__)
websockets = WebSockets(app)


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


@contextmanager
def serve(
    target: str, ws: str, core: int | None = None, log: IO[bytes] | None = None
) -> Iterator[int]:
    """Serve *target* (``module:app``) with uvicorn on a free port, which is yielded.

    :param log: gets all that the server prints.
    """
    command = ["-m", "uvicorn", target, "--host", "127.0.0.1", "--port", "{port}"]
    command += ["--log-level", "warning", "--ws-per-message-deflate", "false"]
    with start([*command, *IMPLEMENTATIONS[ws]], core, log=log) as port:
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
