"""Quart: a coroutine for each connection."""
# mypy: disable-error-code="import-not-found,untyped-decorator,no-any-unimported,misc"

from __future__ import annotations

from typing import Any

from quart import Quart, websocket

app = Quart(__name__)
subscribers: list[Any] = []


@app.websocket("/echo")
async def echo() -> None:
    await websocket.send("ready")
    while True:
        await websocket.send(await websocket.receive())


@app.websocket("/fan-out")
async def fan_out() -> None:
    """It has no channels: a loop over the connections, faster than a queue for each."""
    ws = websocket._get_current_object()  # type: ignore[attr-defined, unused-ignore]
    subscribers.append(ws)
    try:
        await ws.send("ready")
        while True:
            data = await ws.receive()
            for each in list(subscribers):
                await each.send(data)
    finally:
        subscribers.remove(ws)
