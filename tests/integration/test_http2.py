"""HTTP/2 through hypercorn, and HTTP through a unix socket: scopes that are made otherwise."""

from __future__ import annotations

import http.client
import json
import socket
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest

from .conftest import IMPLEMENTATIONS, ServerProcess
from .waiting import wait_until

TIMEOUT = 10.0

SERVED = """
    import threading
    from flask import Flask, Response, jsonify, request
    from flask_websockets import WebSockets

    app = Flask(__name__)
    asgi = WebSockets(app).asgi_app()
    left = threading.Event()

    @app.route("/see", methods=["GET", "POST"])
    def see():
        names = [name for name in request.environ if name.startswith("HTTP_")]
        return jsonify(
            names=sorted(names), cookies=request.cookies, host=request.host, url=request.url,
            body=request.get_data(as_text=True), version=request.environ["SERVER_PROTOCOL"],
            address=request.remote_addr, path=request.path,
        )

    @app.post("/early")
    def early():
        return "too large", 413

    @app.get("/news")
    def news():
        def stream():
            try:
                for number in range(1_000_000):
                    yield f"{number}\\n" * 1000
            finally:
                left.set()
        return Response(stream())

    @app.get("/left")
    def has_left():
        return str(left.wait(10))
"""


class Http2Client:
    """One connection with prior knowledge (RFC 9113 section 3.3)."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def request(self, method: str, path: str, *headers: tuple[str, str], end: bool = True) -> int:
        stream = self.h2.get_next_available_stream_id()
        pseudo = [(":method", method), (":scheme", "http"), (":path", path)]
        self.h2.send_headers(
            stream, [*pseudo, (":authority", "two.example"), *headers], end_stream=end
        )
        self.flush()
        return stream

    def events(self) -> Iterator[Any]:
        while True:
            data = self.socket.recv(65_536)
            assert data, "the server closed the connection"
            yield from self.h2.receive_data(data)
            self.flush()

    def answers(self, *streams: int) -> list[tuple[int, bytes]]:
        """The status and body of each stream, in whichever order they come."""
        statuses: dict[int, int] = {}
        bodies = {stream: b"" for stream in streams}
        missing = set(streams)
        for event in self.events():
            if isinstance(event, h2.events.ResponseReceived):
                statuses[event.stream_id] = int(dict(event.headers)[":status"])
            elif isinstance(event, h2.events.DataReceived) and event.stream_id in bodies:
                bodies[event.stream_id] += event.data
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                self.flush()
            elif isinstance(event, h2.events.StreamEnded):
                missing.discard(event.stream_id)
            if not missing:
                return [(statuses[stream], bodies[stream]) for stream in streams]
        raise AssertionError("the server said nothing more")

    def send(self, stream: int, data: bytes, end: bool = False) -> None:
        self.h2.send_data(stream, data, end_stream=end)
        self.flush()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Http2Client]:
    client = Http2Client(server.port)
    yield client
    client.socket.close()


@pytest.fixture(params=["asyncio", "trio"])
def server(request: Any, start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """hypercorn, on each kind of loop."""
    command = ["-m", "hypercorn", "-k", request.param, "--bind", "127.0.0.1:{port}", "served:asgi"]
    return start_server(SERVED, [sys.executable, *command])


def test_requests_side_by_side(client):
    """Each stream gets its own answer; pseudo-headers and split cookies become what Flask reads."""
    streams = [
        client.request("GET", f"/see?n={number}", ("cookie", "a=1"), ("cookie", f"b={number}"))
        for number in range(5)
    ]
    for number, (status, body) in enumerate(client.answers(*streams)):
        seen = json.loads(body)
        assert status == 200
        assert seen["cookies"] == {"a": "1", "b": str(number)}
        assert (seen["version"], seen["path"]) == ("HTTP/2", "/see")
        assert seen["url"] == f"http://two.example/see?n={number}"
        assert seen["names"] == ["HTTP_COOKIE", "HTTP_HOST"]


def test_a_body_without_a_length(client):
    """The end of the stream is the end of the body; a view may answer before it."""
    early = client.request("POST", "/early", end=False)
    assert client.answers(early) == [(413, b"too large")]
    stream = client.request("POST", "/see", end=False)
    client.send(stream, b"as it ")
    client.send(stream, b"comes", end=True)
    [(status, body)] = client.answers(stream)
    assert status == 200
    assert json.loads(body)["body"] == "as it comes"


def test_a_stream_that_is_reset(client, server):
    """The generator behind it ends; the connection's other streams go on."""
    stream = client.request("GET", "/news")
    for event in client.events():
        if isinstance(event, h2.events.DataReceived):
            break
    client.h2.reset_stream(stream)
    client.flush()
    assert client.answers(client.request("GET", "/left")) == [(200, b"True")]
    assert "Traceback" not in server.log()


class UnixConnection(http.client.HTTPConnection):
    """HTTP through a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self._path)


def test_unix_socket(implementation, tmp_path):
    """There is no address, and the name of the server is the client's Host."""
    (tmp_path / "served.py").write_text(textwrap.dedent(SERVED))
    path = tmp_path / "socket"
    command = [sys.executable, "-m", "uvicorn", "--uds", str(path), "served:asgi"]
    command += IMPLEMENTATIONS[implementation]
    server = ServerProcess(command, 0, tmp_path / "log.txt", tmp_path)
    try:
        wait_until(lambda: "running on" in server.log(), 30.0, "the socket")
        connection = UnixConnection(path)
        connection.request("GET", "/see", headers={"Host": "unix.example"})
        seen = json.loads(connection.getresponse().read())
        assert (seen["address"], seen["host"]) == (None, "unix.example")
        assert seen["url"] == "http://unix.example/see"
        connection.close()
    finally:
        server.kill()
