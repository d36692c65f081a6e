"""A room whose members hear each other, with flask-sockets and gevent."""

import gevent
from flask import Blueprint, Flask, request
from flask_sockets import Sockets

app = Flask(__name__)
sockets = Sockets(app)
ws = Blueprint("ws", __name__)
members = {}  # room -> the connections in it


def tell(room, text):
    for client in list(members.get(room, ())):
        if not client.closed:
            gevent.spawn(client.send, text)


@ws.route("/ws/<room>")
def chat(ws, room):
    members.setdefault(room, set()).add(ws)
    try:
        ws.send("welcome")
        while not ws.closed:
            text = ws.receive()
            if text is not None:
                tell(room, text)
    finally:
        members[room].discard(ws)


@app.route("/say/<room>", methods=["POST"])
def say(room):
    tell(room, request.form["text"])
    return "", 204


sockets.register_blueprint(ws)
