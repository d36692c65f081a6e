"""Chat rooms. Run ``python app.py``, or ``flask --app examples/chat/app websockets serve``."""

import os
from secrets import token_hex
from threading import Lock
from time import time

from flask import Flask, render_template, request

from flask_websockets import WebSocket, WebSockets

app = Flask(__name__)
app.config["WEBSOCKETS_MAX_MESSAGE_BYTES"] = 16 * 1024  # MAX_TEXT emoji, escaped, have 12 KB
websockets = WebSockets(app)
asgi = websockets.asgi_app()
MAX_NAME, MAX_TEXT = 24, 1000
people: dict[str, tuple[str, str]] = {}  # id -> name and room; changed under lock
lock = Lock()  # held until a join or leave is published: the last list of people is the newest


@app.get("/", defaults={"room": None})
@app.get("/room/<string(maxlength=32):room>")
def page(room: str | None) -> str:
    busy = [there for _, there in people.copy().values()]
    return render_template("chat.html", room=room, busy=busy, name=MAX_NAME, text=MAX_TEXT)


def announce(kind: str, who: dict[str, str], room: str, **more: object) -> None:
    if kind != "message":
        more["people"] = [[id, name] for id, (name, there) in people.items() if there == room]
    websockets.publish_json({"type": kind, "who": who, "time": time(), **more}, [f"chat:{room}"])


@websockets.route("/ws/<string(maxlength=32):room>")
def chat(ws: WebSocket, room: str) -> None:
    name = "".join(filter(str.isprintable, request.args.get("name", "")))[:MAX_NAME].strip()
    me = {"id": token_hex(4), "name": name or "Guest"}
    with websockets.subscribe(ws, [f"chat:{room}"]):
        ws.send_json({"type": "welcome", "who": me})
        with lock:
            people[me["id"]] = me["name"], room
            announce("join", me, room)
        try:
            while ws.connected:
                try:
                    for message in ws.iter_json():
                        text = message.get("text") if isinstance(message, dict) else None
                        if not isinstance(text, str) or not 0 < len(text.strip()) <= MAX_TEXT:
                            raise ValueError(f'Expected {{"text": "1 to {MAX_TEXT} characters"}}')
                        announce("message", me, room, text=text.strip())
                except ValueError as error:  # bad JSON: iter_json's InvalidMessage is one, too
                    ws.send_json({"type": "error", "text": str(error)})
        finally:
            with lock:
                del people[me["id"]]
                announce("leave", me, room)


if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "5000")))
