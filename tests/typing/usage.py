"""A program that only needs to type-check: the API as a user types it (``tox -e types``)."""

from collections.abc import Callable, Iterator
from typing import assert_type

from flask import Blueprint, Flask

from flask_websockets import (
    ConnectionClosed,
    PublishResult,
    Stats,
    WebSocket,
    WebSockets,
)

app = Flask(__name__)
websockets = WebSockets(app)
blueprint = Blueprint("rooms", __name__)


@websockets.route("/ws/<room>", blueprint=blueprint, subprotocols=["v1"], origins=["null"])
def chat(ws: WebSocket, room: str) -> None:
    with websockets.subscribe(ws, (name for name in [room])):
        for data in ws.iter_data():
            assert_type(data, str | bytes)
            websockets.publish(data, room, exclude=ws)
    try:
        assert_type(ws.receive(timeout=1), str | bytes | None)
    except ConnectionClosed as error:
        assert_type((error.code, error.reason), tuple[int, str])


# The decorator keeps the function's type.
kept: Callable[[WebSocket, str], None] = chat


def texts(ws: WebSocket) -> Iterator[str]:
    yield from ws.iter_text()


async def task() -> PublishResult:
    return await websockets.apublish("x", ["a", "b"], exclude=[])


assert_type(websockets.stats(), Stats)

with websockets.test_client().websocket_connect("/ws/a", timeout=1) as client:
    client.send_json({"a": 1})
    assert_type(client.receive(), str | bytes)
    assert_type(client.close_code, int | None)
