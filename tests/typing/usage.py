"""A program that only needs to type-check: the API as a user types it (``tox -e types``)."""

from collections.abc import Awaitable, Callable, Iterator
from typing import assert_type

from flask import Blueprint, Flask

from flask_websockets import (
    AsyncWebSocket,
    ConnectionClosed,
    PublishResult,
    Stats,
    Subscription,
    WebSocket,
    WebSockets,
)

app = Flask(__name__)
websockets = WebSockets(app)
blueprint = Blueprint("rooms", __name__)


@websockets.route("/ws/<room>", blueprint=blueprint, subprotocols=["v1"], origins=["null"])
def chat(ws: WebSocket, room: str) -> None:
    with websockets.subscribe(ws, (name for name in [room]), on_slow="latest") as subscription:
        assert_type(subscription, Subscription)
        assert_type(subscription.dropped, int)
        for data in ws.iter_data():
            assert_type(data, str | bytes)
            websockets.publish(data, room, exclude=ws)
    try:
        assert_type(ws.receive(timeout=1), str | bytes | None)
    except ConnectionClosed as error:
        assert_type((error.code, error.reason), tuple[int, str])


# The decorator keeps the function's type.
kept: Callable[[WebSocket, str], None] = chat


@websockets.route("/async/<int:number>", max_message_bytes=65536)
async def stream(ws: AsyncWebSocket, number: int) -> None:
    await ws.accept(headers={"X-Number": str(number)})
    async with websockets.subscribe(ws, "news") as subscription:
        assert_type(subscription, Subscription)
        async for data in ws.iter_data():
            assert_type(data, str | bytes)
            await ws.send(data)
        async for text in ws.iter_text():
            assert_type(text, str)
        async for binary in ws.iter_bytes():
            assert_type(binary, bytes)
    assert_type(await ws.receive(timeout=1), str | bytes | None)
    assert_type(await ws.wait_closed(), bool)
    assert_type(ws.close_code, int | None)


kept_async: Callable[[AsyncWebSocket, int], Awaitable[None]] = stream


def texts(ws: WebSocket) -> Iterator[str]:
    yield from ws.iter_text()


async def task() -> PublishResult:
    return await websockets.apublish("x", ["a", "b"], exclude=[])


assert_type(websockets.stats(), Stats)

with websockets.test_client().websocket_connect("/ws/a", timeout=1) as client:
    client.send_json({"a": 1})
    assert_type(client.receive(), str | bytes)
    assert_type(client.close_code, int | None)
