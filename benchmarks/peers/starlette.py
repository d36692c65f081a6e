"""Starlette (and with it FastAPI): a coroutine for each connection."""
# mypy: disable-error-code="import-not-found,no-any-unimported"

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocketDisconnect

subscribers: list[Any] = []


async def echo(ws: Any) -> None:
    await ws.accept()
    await ws.send_text("ready")
    try:
        while True:
            await ws.send_text(await ws.receive_text())
    except WebSocketDisconnect:
        pass  # the usual end


async def fan_out(ws: Any) -> None:
    """It has no channels: a loop over the connections, as in FastAPI's manual."""
    await ws.accept()
    subscribers.append(ws)
    await ws.send_text("ready")
    try:
        while True:
            data = await ws.receive_text()
            for each in list(subscribers):
                await each.send_text(data)
    except WebSocketDisconnect:
        pass  # the usual end
    finally:
        subscribers.remove(ws)


app = Starlette(routes=[WebSocketRoute("/echo", echo), WebSocketRoute("/fan-out", fan_out)])
