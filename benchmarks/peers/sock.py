"""flask-sock: a thread for each view and one more for each connection's socket."""
# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-any-unimported"

from __future__ import annotations

from typing import Any

from flask import Flask
from flask_sock import Sock

app = Flask(__name__)
sock = Sock(app)
subscribers: list[Any] = []


@sock.route("/echo")
def echo(ws: Any) -> None:
    ws.send("ready")
    while True:
        ws.send(ws.receive())


@sock.route("/fan-out")
def fan_out(ws: Any) -> None:
    """It has no channels: a loop over the connections."""
    subscribers.append(ws)
    try:
        ws.send("ready")
        while True:
            data = ws.receive()
            for each in list(subscribers):
                each.send(data)
    finally:
        subscribers.remove(ws)
