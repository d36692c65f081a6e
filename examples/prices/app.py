"""Prices that move, on http://127.0.0.1:5000: ``uvicorn --port 5000 app:asgi``."""

import asyncio
from contextlib import suppress
from contextvars import Context
from random import uniform
from typing import Any

from flask import Flask

from flask_websockets import AsyncWebSocket, InvalidMessage, NotRunning, WebSockets

app = Flask(__name__)
websockets = WebSockets(app)
prices = {"ACME": 120.0, "GLOBEX": 80.0, "INITECH": 15.0}
market: asyncio.Task[None] | None = None


@app.get("/")
def page() -> str:
    return """<!doctype html><title>Prices</title><link rel="icon" href="data:,">
    <label><input type="checkbox" value="ACME" checked> ACME</label> <b></b><br>
    <label><input type="checkbox" value="GLOBEX" checked> GLOBEX</label> <b></b><br>
    <label><input type="checkbox" value="INITECH" checked> INITECH</label> <b></b>
    <script>
      const ws = new WebSocket(location.origin.replace("http", "ws") + "/ws");
      const boxes = [...document.querySelectorAll("input")];
      const choose = () => ws.send(JSON.stringify(boxes.filter(b => b.checked).map(b => b.value)));
      ws.onopen = () => boxes.forEach(box => box.onchange = choose);
      ws.onmessage = (event) => Object.entries(JSON.parse(event.data)).forEach(([name, price]) =>
        document.querySelector(`label:has([value=${name}]) + b`).textContent = price.toFixed(2));
    </script>"""


@websockets.route("/ws")
async def watch(ws: AsyncWebSocket) -> None:
    global market
    if market is None or market.done():  # it outlives this view, and gets nothing of its request
        market = asyncio.create_task(trade(), context=Context())
    chosen: Any = list(prices)
    with suppress(InvalidMessage):
        while isinstance(chosen, list):
            names = [name for name in prices if name in chosen]
            async with websockets.subscribe(ws, names, on_slow="latest"):
                await ws.send_json({name: prices[name] for name in names})
                chosen = await ws.receive_json()  # until then the hub sends what trade publishes
    await ws.close(1008, "Expected a list of names, as JSON")


async def trade() -> None:
    with suppress(NotRunning):  # the server has stopped
        while True:
            for name in prices:
                prices[name] *= uniform(0.99, 1.01)
                await websockets.apublish_json({name: prices[name]}, name)
            await asyncio.sleep(0.2)


asgi = websockets.asgi_app()
