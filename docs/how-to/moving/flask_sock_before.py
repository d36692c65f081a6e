"""A room whose members hear each other, with flask-sock."""

import json
from threading import Lock

from flask import Flask, request
from flask_sock import Sock
from simple_websocket import ConnectionClosed

app = Flask(__name__)
app.config["SOCK_SERVER_OPTIONS"] = {"ping_interval": 25, "max_message_size": 65536}
sock = Sock(app)
members = {}  # room -> the connections in it
lock = Lock()


def tell(room, message):
    with lock:
        clients = list(members.get(room, ()))
    for client in clients:
        try:
            client.send(json.dumps(message))
        except ConnectionClosed:
            pass


@sock.route("/ws/<room>")
def chat(ws, room):
    name = request.args.get("name", "guest")
    with lock:
        members.setdefault(room, set()).add(ws)
    try:
        ws.send(json.dumps({"welcome": name}))
        while True:
            tell(room, {"name": name, "text": ws.receive()})
    finally:
        with lock:
            members[room].discard(ws)


@app.post("/say/<room>")
def say(room):
    tell(room, {"name": "the house", "text": request.form["text"]})
    return "", 204


if __name__ == "__main__":
    app.run()
