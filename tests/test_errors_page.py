"""The page of errors: its tree is the code's, its messages are those that users read."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import anyio
import pytest
from flask import Flask

from flask_websockets import ConnectionClosed, ConnectionRejected, WebSockets, errors
from flask_websockets.bridge import Door

from .asgi_driver import TIMEOUT

PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "errors.rst").read_text()
#: Error to the message that the page gives as an example.
MESSAGES: dict[str, str] = dict(
    re.findall(r"^    \* - :exc:`(\w+)`\n      - ``(.+)``$", PAGE, re.MULTILINE)
)


def test_the_tree_is_the_modules():
    """The page draws the tree as the module's docstring does."""
    tree = (errors.__doc__ or "").partition("::\n\n")[2].rstrip()
    assert tree in PAGE


def test_every_error_has_its_row():
    """All of them, except the base that nobody raises."""
    assert set(MESSAGES) == set(errors.__all__) - {"WebSocketsError"}


def said(error: Exception) -> None:
    """Compare what was raised with the page."""
    assert str(error) == MESSAGES[type(error).__name__]


def test_what_a_view_reads(app, websockets, client):
    """ConnectionClosed, InvalidState, ConcurrencyError and InvalidMessage."""
    caught = []
    receiving = threading.Event()

    @websockets.route("/ws")
    def view(ws):
        def expect(*call):
            try:
                call[0](*call[1:])
            except errors.WebSocketsError as error:
                caught.append(error)

        ws.accept()
        expect(ws.accept)
        expect(ws.receive_json)

        def receive():
            receiving.set()
            expect(ws.receive)

        other = threading.Thread(target=receive)
        with ws._link._receiving:  # as somebody who waits for a message has it
            expect(ws.receive)
        other.start()
        assert receiving.wait(TIMEOUT)
        ws.close(4000, "bye")
        other.join(TIMEOUT)

    with client.websocket_connect("/ws") as ws:
        ws.send("{oops")
        with pytest.raises(ConnectionClosed) as closed:
            ws.receive()
    said(closed.value)
    kinds = ["InvalidState", "InvalidMessage", "ConcurrencyError", "ConnectionClosed"]
    assert [type(error).__name__ for error in caught] == kinds
    for error in caught:
        said(error)


def test_what_async_code_reads(websockets, client):
    """WrongThread, for a publish on the loop."""
    caught = []

    @websockets.route("/ws")
    async def view(ws):
        with pytest.raises(errors.WrongThread) as raised:
            websockets.publish("x", "news")
        caught.append(raised.value)
        await ws.send("done")

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "done"
    said(caught[0])


def test_what_a_test_reads(websockets, client):
    """ConnectionRejected, for a handshake from another site."""
    websockets.route("/ws", endpoint="view")(lambda ws: None)
    with (
        pytest.raises(ConnectionRejected) as rejected,
        client.websocket_connect("/ws", headers={"Origin": "https://evil.example"}),
    ):
        pass
    said(rejected.value)


def test_what_is_read_at_the_start():
    """ConfigurationError and UsageError."""
    app = Flask("app")
    app.config["WEBSOCKETS_MAX_CONNECTIONS"] = 0
    with pytest.raises(errors.ConfigurationError) as wrong:
        WebSockets(app)
    said(wrong.value)
    app = Flask("other")
    WebSockets(app)
    with pytest.raises(errors.UsageError) as twice:
        WebSockets(app)
    said(twice.value)


def test_what_is_read_after_the_end():
    """NotRunning, at a door that was closed."""

    async def main():
        door = Door(1)
        door.close()
        with pytest.raises(errors.NotRunning) as late:
            door.post(print, None)
        said(late.value)

    anyio.run(main)
