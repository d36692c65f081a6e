"""Chat rooms: ``flask --app examples/chat/app websockets serve``, or ``run``."""

from collections import deque
from secrets import token_hex
from threading import Lock
from time import time

from flask import Flask, render_template, request, session

from flask_websockets import WebSocket, WebSockets

app = Flask(__name__)
app.config.update(SECRET_KEY=token_hex(), SESSION_COOKIE_SAMESITE="Lax")
app.config.from_prefixed_env()  # with FLASK_SECRET_KEY set, sessions outlast a restart
websockets = WebSockets(app)
asgi = websockets.asgi_app()
MAX_NAME, MAX_TEXT = 24, 1000  # characters
people: dict[WebSocket, tuple[str, dict[str, str]]] = {}  # their rooms, and who they are
said: deque[tuple[str, dict[str, object]]] = deque(maxlen=200)  # in which room, and the message
lock = Lock()  # held while something is kept and published: who comes gets it once


@app.route("/", defaults={"room": None})
@app.route("/room/<string(maxlength=32):room>", methods=["GET", "POST"])
def page(room: str | None) -> str:
    if name := request.form.get("name"):
        session["name"] = "".join(filter(str.isprintable, name)).strip()[:MAX_NAME] or "Guest"
    return render_template("chat.html", room=room, people=people.copy(), max=(MAX_NAME, MAX_TEXT))


def publish(room: str, kind: str, who: dict[str, str], text: str = "") -> None:
    with lock:
        message: dict[str, object] = {"type": kind, "who": who, "text": text, "time": time()}
        if kind == "message":
            said.append((room, message))
        elif kind == "people":
            message["people"] = [each for there, each in people.copy().values() if there == room]
        websockets.publish_json(message, f"chat:{room}")


@websockets.route("/ws/<string(maxlength=32):room>")
def chat(ws: WebSocket, room: str) -> None:
    me = {"id": session.setdefault("id", token_hex(4)), "name": session.get("name", "Guest")}
    with websockets.subscribe(ws, f"chat:{room}"):
        with lock:  # what came since subscribe() is in it: a page begins with the welcome
            ws.send_json({"type": "welcome", "who": me, "said": [m for r, m in said if r == room]})
        people[ws] = room, me
        publish(room, "people", me)
        try:
            while True:
                match ws.receive():
                    case "":  # is sent while somebody types
                        publish(room, "typing", me)
                    case str(text) if 0 < len(text.strip()) <= MAX_TEXT:
                        publish(room, "message", me, text.strip())
                    case _:
                        ws.send_json({"type": "error", "text": f"Write 1 to {MAX_TEXT} characters"})
        finally:
            del people[ws]
            publish(room, "people", me)
