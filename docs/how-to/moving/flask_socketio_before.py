"""Rooms, private messages and news, with Flask-SocketIO."""

from flask import Flask, redirect, render_template, request, session
from flask_socketio import SocketIO, emit, join_room

app = Flask(__name__)
app.secret_key = "not a secret"
socketio = SocketIO(app, async_mode="threading")
sids = {}  # name -> the id of its last connection


@app.get("/")
def page():
    return render_template("socketio_before.html")


@app.post("/login")
def login():
    session["name"] = request.form["name"]
    return redirect("/")


@socketio.on("connect")
def connect(auth):
    if "name" not in session:
        return False
    sids[session["name"]] = request.sid


@socketio.on("join")
def join(data):
    join_room(data["room"])
    emit("joined", {"name": session["name"]}, to=data["room"])


@socketio.on("say")
def say(data):
    emit("said", {"name": session["name"], "text": data["text"]}, to=data["room"])
    return "said"  # the acknowledgement


@socketio.on("whisper")
def whisper(data):
    emit("whispered", {"name": session["name"], "text": data["text"]}, to=sids[data["to"]])


@socketio.on("disconnect")
def disconnect(reason):
    sids.pop(session["name"], None)


def tell_news():
    number = 0
    while True:
        socketio.sleep(1)
        number += 1
        socketio.emit("news", {"number": number})


socketio.start_background_task(tell_news)

if __name__ == "__main__":
    socketio.run(app)
