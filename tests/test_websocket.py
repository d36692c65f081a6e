"""The verbs of a view's connection, through the test client and the real bridge."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from queue import SimpleQueue

import pytest
from flask.json.provider import DefaultJSONProvider

from flask_websockets import (
    ConcurrencyError,
    ConnectionClosed,
    ConnectionRejected,
    InvalidMessage,
    InvalidState,
    WebSocket,
)

TIMEOUT = 5


def test_send_chooses_the_frame_by_type(websockets, client):
    """str is a text frame, bytes-like is binary."""

    @websockets.route("/ws")
    def view(ws):
        for data in ("text", b"bytes", bytearray(b"array"), memoryview(b"view"), ""):
            ws.send(data)

    with client.websocket_connect("/ws") as ws:
        assert [ws.receive() for _ in range(5)] == ["text", b"bytes", b"array", b"view", ""]


def test_the_other_sends(app, websockets, client):
    """send_text, send_bytes, send_json and send_msgpack say which frame they make."""
    import msgpack

    class Provider(DefaultJSONProvider):
        def dumps(self, obj, **kwargs):
            return json.dumps({"wrapped": obj})

    app.json = Provider(app)

    @websockets.route("/ws")
    def view(ws):
        ws.send_text("é")
        ws.send_bytes(b"\x00")
        ws.send_bytes("é")
        ws.send_json([1])
        ws.send_msgpack({"a": [1]})

    with client.websocket_connect("/ws") as ws:
        assert [ws.receive() for _ in range(3)] == ["é", b"\x00", "é".encode()]
        assert ws.receive() == '{"wrapped": [1]}'
        assert msgpack.unpackb(ws.receive()) == {"a": [1]}


def test_what_json_would_carry_is_told_where_to_go(websockets, client):
    """A dict given to ``send`` is the commonest slip: the error names the verb for it."""

    @websockets.route("/ws")
    def view(ws):
        with pytest.raises(TypeError, match=r"str or bytes; got dict\. send_json takes"):
            ws.send({"a": 1})
        ws.send("still open")

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "still open"


def test_wrong_data_raises_in_the_view_and_nothing_is_sent(websockets, client):
    """Wrong types are TypeError, text that UTF-8 cannot carry is ValueError."""

    @websockets.route("/ws")
    def view(ws):
        for call, data in (
            (ws.send, 1),
            (ws.send, None),
            (ws.send, ["x"]),
            (ws.send_text, b"x"),
            (ws.send_bytes, 1),
            (ws.send_json, object()),
        ):
            with pytest.raises(TypeError):
                call(data)
        with pytest.raises(ValueError):
            ws.send("\ud800")
        ws.send("still here")

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "still here"


def test_a_client_whose_messages_nobody_takes(websockets, client):
    """The test client's send says why it does not go on."""
    enough = threading.Event()

    @websockets.route("/ws", inbox_messages=2, inbox_timeout=60)
    def view(ws):
        ws.accept()
        enough.wait(TIMEOUT)

    with client.websocket_connect("/ws", timeout=1) as ws:
        with pytest.raises(TimeoutError, match="took nothing for 1 s, and its inbox is full"):
            for _ in range(100):
                ws.send("x")
        enough.set()


def test_receive_timeout(websockets, client):
    """receive gives None when the time has passed, receive_json raises TimeoutError."""

    @websockets.route("/ws")
    def view(ws):
        assert ws.receive(timeout=0.01) is None
        assert ws.receive(timeout=0) is None
        with pytest.raises(TimeoutError, match=r"0\.01 s"):
            ws.receive_json(timeout=0.01)
        for bad in (-1, float("nan")):
            with pytest.raises(ValueError):
                ws.receive(timeout=bad)
        ws.send("now")
        assert ws.receive(timeout=TIMEOUT) == "after all"
        ws.send("done")

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "now"
        ws.send("after all")
        assert ws.receive() == "done"


def test_receive_json(websockets, client):
    """Text and binary JSON parse; what does not is InvalidMessage and no end."""

    @websockets.route("/ws")
    def view(ws):
        assert ws.receive_json() == {"a": None}
        assert ws.receive_json() == [1]
        for _ in range(4):
            with pytest.raises(InvalidMessage, match="Expected"):
                ws.receive_json()
        assert ws.receive_json() is None
        ws.send("fine")

    with client.websocket_connect("/ws") as ws:
        for data in ('{"a": null}', b"[1]", "{", b"\xff", "[" * 100_000, "9" * 10_000, "null"):
            ws.send(data)
        assert ws.receive() == "fine"


def test_iteration(websockets, client):
    """The four iterators convert what comes, and end when the client leaves."""
    seen = []

    def route(name):
        @websockets.route(f"/{name}", endpoint=name)
        def view(ws):
            seen.extend(getattr(ws, f"iter_{name}")())

    for name in ("data", "text", "bytes", "json"):
        route(name)
    for name, expected in (
        ("data", ["1", b"2"]),
        ("text", ["1", "2"]),
        ("bytes", [b"1", b"2"]),
        ("json", [1, 2]),
    ):
        seen.clear()
        with client.websocket_connect(f"/{name}") as ws:
            ws.send("1")
            ws.send(b"2")
        assert seen == expected


def test_what_was_received_is_delivered_before_the_end(websockets, client):
    """Messages that came before the disconnect are delivered, then the iteration ends."""
    go, seen = threading.Event(), []

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        assert go.wait(TIMEOUT)
        assert ws.wait_closed(TIMEOUT)
        seen.extend(ws.iter_data())
        with pytest.raises(ConnectionClosed) as caught:
            ws.receive()
        seen.append((caught.value.code, caught.value.reason))

    with client.websocket_connect("/ws") as ws:
        for number in range(5):
            ws.send(str(number))
        ws.close(4321, "bye")
        go.set()
    assert seen == ["0", "1", "2", "3", "4", (4321, "bye")]


def test_after_the_end_everything_raises_and_close_does_nothing(websockets, client):
    """send and receive raise with what is known; a second close is silent."""
    seen = []

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        assert (ws.connected, ws.closed, ws.close_code, ws.close_reason) == (
            True,
            False,
            None,
            None,
        )
        assert ws.wait_closed(TIMEOUT)
        for call in (lambda: ws.send("x"), ws.receive, ws.accept):
            with pytest.raises(ConnectionClosed) as caught:
                call()
            seen.append((caught.value.code, caught.value.reason))
        ws.close(4000)
        seen.append((ws.connected, ws.closed, ws.close_code, ws.close_reason))

    with client.websocket_connect("/ws") as ws:
        ws.close(4001, "gone")
    assert seen == [*[(4001, "gone")] * 3, (False, True, 4001, "gone")]


def test_own_close(websockets, client):
    """After our close receive and send raise at once, with our code."""
    seen = []
    both_sent = threading.Event()

    @websockets.route("/ws")
    def view(ws):
        assert ws.receive() == "a"
        assert both_sent.wait(10)
        ws.send("before")
        ws.close(4002, "enough")
        for call in (lambda: ws.send("x"), ws.receive):
            with pytest.raises(ConnectionClosed) as caught:
                call()
            seen.append((caught.value.code, caught.value.reason))
        assert ws.wait_closed(0)

    with client.websocket_connect("/ws") as ws:
        ws.send("a")
        ws.send("b")
        both_sent.set()
        assert ws.receive() == "before"
        with pytest.raises(ConnectionClosed) as caught:
            ws.receive()
        assert (caught.value.code, caught.value.reason) == (4002, "enough")
    assert seen == [(4002, "enough")] * 2


@pytest.mark.parametrize(
    ("code", "reason", "error"),
    [
        (1005, "", ValueError),
        (999, "", ValueError),
        (1000, "é" * 62, ValueError),
        ("1000", "", TypeError),
    ],
)
def test_bad_close_arguments_leave_the_connection_open(websockets, client, code, reason, error):
    """A close that may not be sent raises in the view."""

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        with pytest.raises(error):
            ws.close(code, reason)
        ws.send("open")

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "open"


def test_close_before_the_accept_refuses(websockets, client):
    """A close instead of an accept is a 403."""

    @websockets.route("/ws")
    def view(ws):
        ws.close()
        assert ws.closed and not ws.connected
        with pytest.raises(ConnectionClosed):
            ws.send("x")

    with pytest.raises(ConnectionRejected) as caught, client.websocket_connect("/ws"):
        pass
    assert caught.value.response.status_code == 403


def test_accept_twice(websockets, client):
    """A second accept is InvalidState, and the connection goes on."""

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        with pytest.raises(InvalidState, match="open"):
            ws.accept()
        ws.send("open")

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "open"


def test_wait_closed(websockets, client):
    """wait_closed says False when the time has passed, True when the connection is over."""
    seen = []

    @websockets.route("/ws")
    def view(ws):
        seen.append(ws.wait_closed(0.01))
        ws.send("ready")
        seen.append(ws.wait_closed(TIMEOUT))

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "ready"
    assert seen == [False, True]


def test_many_threads_send_one_receives(websockets, client):
    """Many threads may send at once; a second receiver gets ConcurrencyError."""
    errors: SimpleQueue[Exception] = SimpleQueue()

    @websockets.route("/ws")
    def view(ws: WebSocket):
        ws.accept()

        def receive():
            try:
                ws.receive(TIMEOUT)
            except Exception as error:
                errors.put(error)

        def send(name):
            for number in range(200):
                ws.send(f"{name} {number}")

        senders = [threading.Thread(target=send, args=(name,)) for name in "abcd"]
        for thread in senders:
            thread.start()
        for thread in senders:
            thread.join(TIMEOUT)
        # Two receivers: whichever is second is told so, and the first gets the message.
        receivers = [threading.Thread(target=receive) for _ in range(2)]
        for thread in receivers:
            thread.start()
        assert isinstance(errors.get(timeout=TIMEOUT), ConcurrencyError)
        ws.send("go")
        for thread in receivers:
            thread.join(TIMEOUT)
        assert errors.empty()

    with client.websocket_connect("/ws") as ws:
        received: dict[str, list[int]] = {name: [] for name in "abcd"}
        for _ in range(800):
            name, number = ws.receive().split()
            received[name].append(int(number))
        assert received == {name: list(range(200)) for name in "abcd"}
        assert ws.receive() == "go"
        ws.send("one")


def test_a_receive_is_woken_by_a_close_in_another_thread(websockets, client):
    """ws.close() from a helper thread ends the view's receive."""
    seen = []

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        helper = threading.Thread(target=lambda: ws.close(4005))
        helper.start()
        with pytest.raises(ConnectionClosed) as caught:
            ws.receive(TIMEOUT)
        seen.append(caught.value.code)
        helper.join(TIMEOUT)

    with client.websocket_connect("/ws") as ws, pytest.raises(ConnectionClosed):
        ws.receive()
    assert seen == [4005]


def test_send_json_uses_the_providers_types(websockets, client):
    """send_json carries what Flask's JSON carries."""

    @websockets.route("/ws")
    def view(ws):
        ws.send_json({"at": datetime(2026, 1, 1, tzinfo=UTC)})

    with client.websocket_connect("/ws") as ws:
        assert ws.receive_json() == {"at": "Thu, 01 Jan 2026 00:00:00 GMT"}


def test_repr_says_where_and_what(websockets, client):
    """repr shows the path and the state."""

    @websockets.route("/ws")
    def view(ws):
        first = repr(ws)
        ws.send(first + repr(ws))

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "<WebSocket /ws connecting><WebSocket /ws connecting>"
