"""Sensors, and a page that keeps up: ``flask --app app websockets serve``; see README.md."""

from hmac import compare_digest
from os import environ
from secrets import token_hex
from time import time

from flask import Flask, abort, render_template, request

from flask_websockets import AsyncWebSocket, InvalidMessage, WebSockets

app = Flask(__name__)
websockets = WebSockets(app)
asgi = websockets.asgi_app()
TOKEN = environ.get("SENSORS_TOKEN") or token_hex()  # what nobody knows lets nobody in
MAX_DEVICES, MAX_WAVE = 200, 1000  # a number of samples, each from -1000 to 1000
CHANNELS = [f"device:{number}" for number in range(MAX_DEVICES)]
online: set[AsyncWebSocket] = set()


@app.get("/")
def page() -> str:
    return render_template("sensors.html")


def is_wave(wave: list[object]) -> bool:
    return all(type(sample) is int and abs(sample) <= 1000 for sample in wave)


@websockets.route(f"/ingest/<int(max={MAX_DEVICES - 1}):device>", max_message_bytes=16 * 1024)
async def ingest(ws: AsyncWebSocket, device: int) -> None:
    given = request.headers.get("Authorization", "")
    if not compare_digest(given.encode(), f"Bearer {TOKEN}".encode()):
        abort(401)
    online.add(ws)
    try:
        while True:
            try:
                reading = await ws.receive_json()
            except InvalidMessage:
                reading = None
            match reading:
                case {"wave": [_, *_] as wave} if len(wave) <= MAX_WAVE and is_wave(wave):
                    message = {"device": device, "time": time(), "wave": wave}
                    await websockets.apublish_json(message, CHANNELS[device])
                case _:
                    await ws.send_json({"error": f'Expected {{"wave": 1 to {MAX_WAVE} integers}}'})
    finally:
        online.remove(ws)


@websockets.route("/watch")
async def watch(ws: AsyncWebSocket) -> None:
    async with websockets.subscribe(ws, CHANNELS, on_slow="latest") as subscription:
        while not await ws.wait_closed(timeout=1):
            await ws.send_json({"online": len(online), "skipped": subscription.dropped})


if __name__ == "__main__":
    app.run()
