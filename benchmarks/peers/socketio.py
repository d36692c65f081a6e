"""Flask-SocketIO in its threading mode, a namespace for each kind of load.

The client takes the namespace's answer for ready: the handler of ``connect`` has run by then.
"""
# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-any-unimported"

from __future__ import annotations

from flask import Flask
from flask_socketio import SocketIO, join_room, send

app = Flask(__name__)
socketio = SocketIO(app, async_mode="threading")


@socketio.on("message", namespace="/echo")
def echo(data: str) -> None:
    send(data)


@socketio.on("connect", namespace="/fan-out")
def connect() -> None:
    join_room("everyone")


@socketio.on("message", namespace="/fan-out")
def fan_out(data: str) -> None:
    send(data, to="everyone")
