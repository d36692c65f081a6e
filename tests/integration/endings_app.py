"""What the endings are tried on: more views for ``behaviour_app``, beside which this is served."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from behaviour_app import PATIENCE, app, asgi, note, twins
from flask import g, jsonify, request

from flask_websockets import AsyncWebSocket, ConnectionClosed

#: Bytes.
LARGE = 65_536

#: What the server told of itself.
LIFESPAN: list[str] = []


@app.before_request
def key_of_a_raw_client() -> None:
    """A client made of a socket has its key in the query."""
    g.key = g.key or request.args.get("key", "")


@app.get("/lifespan")
def lifespan() -> Any:
    return jsonify(LIFESPAN)


@app.get("/pid")
def pid() -> str:
    return str(os.getpid())


@twins("/waits")
async def waits(ws: AsyncWebSocket) -> None:
    """Receives until the end, and then again: how each receive ended."""
    await ws.send("ready")
    ends: list[Any] = []
    for timeout in (None, None, PATIENCE, 0):
        try:
            while await ws.receive(timeout=timeout) is not None:
                pass
            ends.append("returned")
        except ConnectionClosed as error:
            ends.append([error.code, error.reason])
    note("ended", ends=ends)


@twins("/talks")
async def talks(ws: AsyncWebSocket) -> None:
    """Sends until it cannot, and then once more."""
    ends: list[Any] = []
    while len(ends) < 2:
        try:
            await ws.send("x" * 1000)
            await ws.wait_closed(timeout=0.01)
        except ConnectionClosed as error:
            ends.append([error.code, error.reason])
    note("ended", ends=ends)


@twins("/floods/<int:count>", outbox_bytes=1_000 * LARGE)
async def floods(ws: AsyncWebSocket, count: int) -> None:
    """Returns while much of what it sent waits for a client that does not read yet."""
    for number in range(count):
        await ws.send(str(number).ljust(LARGE))
    note("returns")


@twins("/until-the-end")
async def until_the_end(ws: AsyncWebSocket) -> None:
    """Leaves word in a file, for when the server is gone."""
    await ws.send("ready")
    code = None
    try:
        await ws.receive()
    except ConnectionClosed as error:
        code = error.code
    Path(f"{request.args['key']}.end").write_text(str(code))


_serve: Callable[..., Awaitable[None]] = asgi


async def asgi_with_lifespan(scope: Any, receive: Any, send: Any) -> None:
    """The application; what the server tells of itself is noted."""

    async def noted() -> Any:
        message = await receive()
        LIFESPAN.append(message["type"])
        return message

    await _serve(scope, noted if scope["type"] == "lifespan" else receive, send)
