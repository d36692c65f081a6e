"""A server that jobs publish through: ``flask --app app websockets serve``."""

import hmac
import os

from flask import Flask, abort, request

from flask_websockets import WebSocket, WebSockets

app = Flask(__name__)
websockets = WebSockets(app)
TOKEN = os.environ["PUBLISH_TOKEN"]
CHANNELS = {"jobs", "news"}


@app.post("/internal/publish/<channel>")
def publish(channel: str) -> tuple[str, int]:
    given = request.headers.get("Authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {TOKEN}".encode()):
        abort(401)
    if channel not in CHANNELS:
        abort(404)
    websockets.publish(request.get_data(as_text=True), channel)
    return "", 204


@websockets.route("/jobs")
def watch(ws: WebSocket) -> None:
    with websockets.subscribe(ws, "jobs"):
        ws.wait_closed()
