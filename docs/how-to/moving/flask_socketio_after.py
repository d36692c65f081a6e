"""Rooms, private messages and news, with flask-websockets."""

from contextlib import suppress
from threading import Thread
from time import sleep

from flask import Flask, abort, redirect, render_template, request, session
from werkzeug import Response

from flask_websockets import NotRunning, WebSocket, WebSockets

app = Flask(__name__)
app.secret_key = "not a secret"
websockets = WebSockets(app)


@app.get("/")
def page() -> str:
    return render_template("socketio_after.html")


@app.post("/login")
def login() -> Response:
    session["name"] = request.form["name"]
    return redirect("/")


@websockets.route("/ws/<room>")
def chat(ws: WebSocket, room: str) -> None:
    name = session.get("name") or abort(401)
    with websockets.subscribe(ws, [f"room:{room}", f"name:{name}", "everybody"]):
        tell("joined", {"name": name}, f"room:{room}")
        for message in ws.iter_json():
            match message:
                case {"event": "say", "text": str(text), "id": int(number)}:
                    tell("said", {"name": name, "text": text}, f"room:{room}")
                    ws.send_json({"event": "ack", "data": number})
                case {"event": "whisper", "to": str(to), "text": str(text)}:
                    tell("whispered", {"name": name, "text": text}, f"name:{to}")
                case _:
                    ws.close(1008, "unknown event")


def tell(event: str, data: object, channel: str) -> None:
    websockets.publish_json({"event": event, "data": data}, channel)


def tell_news() -> None:
    number = 0
    with suppress(NotRunning):  # the server has stopped
        while True:
            sleep(1)
            number += 1
            tell("news", {"number": number}, "everybody")


Thread(target=tell_news, daemon=True).start()

if __name__ == "__main__":
    app.run()
