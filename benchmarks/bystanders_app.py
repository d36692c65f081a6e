"""The application of the bystanders' modes: one page, few connections, one channel."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from flask import Flask

from flask_websockets import WebSocket, WebSockets

from .resident import resident

#: Open connections of ``refusals``; what comes above it is refused.
LIMIT = 100
#: Bytes of each message to those that read too slowly: some thirty fill an outbox.
FILLER = 32 * 1024
#: Small messages that fill an outbox to the last of them: more than it holds.
SMALL = 2_000
#: The channels of those that read too slowly, one each, so that they share no message.
SLOW = ("stuck", "trickle")


def make(**settings: Any) -> Any:
    app = Flask(__name__)
    app.config.update({f"WEBSOCKETS_{name}": value for name, value in settings.items()})
    websockets = WebSockets(app)

    @app.get("/small")
    def small() -> str:
        return "ok"

    @app.get("/stats")
    def stats() -> dict[str, Any]:
        config = app.extensions["websockets"].config
        return {
            **asdict(websockets.stats()),
            **resident(),
            "outbox_limit": config.outbox_bytes,
        }

    @websockets.route("/wait")
    def wait(ws: WebSocket) -> None:
        ws.send("ready")
        ws.wait_closed()

    def listen(ws: WebSocket, *channels: str) -> None:
        with websockets.subscribe(ws, ["everyone", *channels], on_slow="drop_oldest"):
            ws.send("ready")
            ws.wait_closed()

    @websockets.route("/everyone")
    def everyone(ws: WebSocket) -> None:
        listen(ws)

    @websockets.route("/fan-out")
    def fan_out(ws: WebSocket) -> None:
        """One of those that read, and whose messages everyone gets."""
        with websockets.subscribe(ws, "everyone", on_slow="drop_oldest"):
            ws.send("ready")
            for data in ws.iter_data():
                websockets.publish(data, "everyone")

    @websockets.route("/slow/<channel>")
    def slow(ws: WebSocket, channel: str) -> None:
        listen(ws, channel)

    @websockets.route("/publish")
    def publish(ws: WebSocket) -> None:
        """Publish each message to everyone; to the slow, whether there are any or not, more."""
        ws.send("ready")
        for data in ws.iter_text():
            if data not in ("fill", "small"):
                websockets.publish(data, "everyone")
            for channel in SLOW:
                for _ in range(SMALL if data == "small" else 1):
                    websockets.publish(os.urandom(64 if data == "small" else FILLER), channel)
            if data == "small":
                ws.send("ready")  # all of them are on their way

    return websockets.asgi_app()


refusals = make(MAX_CONNECTIONS=LIMIT)
#: The timeout is out of the way: the two would be cut in the middle of a measurement.
slow_subscribers = make(SEND_TIMEOUT=600)
