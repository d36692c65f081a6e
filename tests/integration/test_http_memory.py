"""Large bodies, slow peers and endless streams through real servers, in bounded memory and time."""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from .conftest import ServerProcess
from .waiting import wait_until

SERVED = """
    import hashlib
    import os
    import tempfile
    import threading
    import time

    from flask import Flask, Response, jsonify, request, send_file

    import flask_websockets.wsgi
    from flask_websockets import WebSockets

    assert flask_websockets.wsgi.BODY_TIMEOUT >= 10
    flask_websockets.wsgi.BODY_TIMEOUT = BODY_TIMEOUT_HERE

    app = Flask(__name__)
    app.config.update(SETTINGS_HERE)
    websockets = WebSockets(app)
    BASE = hashlib.shake_128(b"base").digest(65536 + 4096)
    seen = []  # what happened, in its order
    produced = 0
    stopped = threading.Event()
    together = threading.Barrier(2)

    def piece(number):
        "64 KiB, of which no two in a row are the same."
        start = number % 4096
        return BASE[start : start + 65536]

    @app.post("/up")
    def up():
        "Read slowly, and halfway not at all until the client says so."
        digest, count, pause = hashlib.blake2b(), 0, float(request.args["pause"])
        while data := request.stream.read(65536):
            digest.update(data)
            count += len(data)
            if "stop" in request.args and not stopped.is_set() and count > 50 << 20:
                seen.append("stopped")
                assert stopped.wait(20)
            if pause:
                time.sleep(pause)
        return jsonify(count=count, digest=digest.hexdigest())

    @app.post("/go")
    def go():
        stopped.set()
        return ""

    @app.get("/down/<int:pieces>")
    def down(pieces):
        def generate():
            global produced
            produced = 0
            for number in range(pieces):
                produced += 65536
                yield piece(number)
        return Response(generate(), mimetype="application/octet-stream")

    @app.get("/produced")
    def how_much():
        return jsonify(produced)

    @app.get("/endless")
    def endless():
        def generate():
            seen.append("start")
            try:
                while True:
                    yield bytes(65536)
            finally:
                seen.append("end")
        return Response(generate())

    LARGE = bytes(64 << 20)

    @app.get("/large")
    def large():
        response = Response(LARGE)
        seen.append("start")
        response.call_on_close(lambda: seen.append("end"))
        return response

    @app.get("/events")
    def events():
        def generate():
            seen.append("start")
            number = 0
            try:
                while True:
                    yield f"data: {number}\\n\\n"
                    number += 1
                    time.sleep(0.02)
            finally:
                seen.append("end")
        return Response(generate(), mimetype="text/event-stream")

    @app.get("/meet")
    def meet():
        together.wait(10)
        return "met"

    @app.post("/count")
    def count():
        return str(len(request.get_data()))

    @app.get("/seen")
    def what_was_seen():
        return jsonify(seen)

    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "large.bin")
    with open(path, "wb") as large_file:
        for number in range(320):
            large_file.write(piece(number))

    @app.get("/file")
    def file():
        return send_file(path, conditional=True)

    asgi = websockets.asgi_app()
"""

#: The same pieces as the server's.
BASE = hashlib.shake_128(b"base").digest(65536 + 4096)
PIECE = 65536
#: 100 MiB.
PIECES = 1600
FILE_PIECES = 320
#: Seconds that one read or write of a client may take.
PATIENCE = 20.0

#: Bytes by which the resident memory may grow on the way. What we hold is two windows of 64 KiB
#: and the server's own two; the rest is arenas and malloc's trim threshold, some MiB that do not
#: depend on the body. A body that is held whole is 100 MiB, a tenth above three times the margin.
MARGIN = 30 << 20

#: Bytes that may be on the way to a client that does not read: both sockets' buffers, which Linux
#: lets grow to 4 MiB and 6 MiB, and a few windows.
IN_FLIGHT = 16 << 20


def piece(number: int) -> bytes:
    start = number % 4096
    return BASE[start : start + PIECE]


@pytest.fixture
def serve(uvicorn_server: Callable[..., ServerProcess]) -> Callable[..., ServerProcess]:
    """Start the server with settings of its own."""

    def start(*, body_timeout: float = 60.0, **settings: Any) -> ServerProcess:
        source = SERVED.replace("SETTINGS_HERE", repr(settings))
        return uvicorn_server(source.replace("BODY_TIMEOUT_HERE", repr(body_timeout)))

    return start


def connect(server: ServerProcess, receive_buffer: int | None = None) -> http.client.HTTPConnection:
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    if receive_buffer is not None:
        client.sock = socket.socket()
        client.sock.settimeout(PATIENCE)
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.sock.connect(("127.0.0.1", server.port))
    return client


def fetch(
    server: ServerProcess,
    path: str,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    body: bytes | None = None,
) -> tuple[http.client.HTTPResponse, bytes]:
    client = connect(server)
    try:
        client.request(method, path, body, headers or {})
        response = client.getresponse()
        return response, response.read()
    finally:
        client.close()


def seen(server: ServerProcess) -> list[str]:
    what: list[str] = json.loads(fetch(server, "/seen")[1])
    return what


@contextmanager
def watched(server: ServerProcess) -> Iterator[list[int]]:
    """Look at the server's resident memory all the time; the list starts with that of before."""
    for _ in range(3):  # what the first requests need anyway is no news
        fetch(server, "/seen")
        fetch(server, "/count", "POST", body=bytes(1 << 20))
        fetch(server, "/down/16")
    sizes = [server.resident_bytes()]
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            sizes.append(server.resident_bytes())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield sizes
    finally:
        done.set()
        watcher.join(PATIENCE)


def check_memory(sizes: list[int]) -> None:
    assert len(sizes) > 20, "the transfer was over before anybody looked"
    growth = max(sizes) - sizes[0]
    assert growth < MARGIN, f"{growth / 2**20:.1f} MiB more than before"


def start_upload(server: ServerProcess, path: str) -> http.client.HTTPConnection:
    client = connect(server)
    client.putrequest("POST", path)
    client.putheader("Content-Length", str(PIECES * PIECE))
    client.endheaders()
    return client


def check_upload(client: http.client.HTTPConnection, digest: Any) -> None:
    response = client.getresponse()
    assert response.status == 200
    expected = {"count": PIECES * PIECE, "digest": digest.hexdigest()}
    assert json.loads(response.read()) == expected
    client.close()


def test_upload_to_a_slow_view(serve):
    """The view reads 100 MiB slowly and stops halfway: so does the client, and memory stays."""
    server = serve()
    digest = hashlib.blake2b()
    with watched(server) as sizes:
        client = start_upload(server, "/up?pause=0.0005&stop=1")
        sent, stalled = 0, False
        client.sock.settimeout(1)
        for number in range(PIECES):
            data = memoryview(piece(number))
            digest.update(data)
            while data:
                try:
                    count = client.sock.send(data)
                except TimeoutError:
                    # Nothing moves: the window, the server's buffers and both sockets are full.
                    assert "stopped" in seen(server)
                    assert not stalled, "the upload did not go on"
                    stalled = True
                    assert sent - (50 << 20) < IN_FLIGHT
                    fetch(server, "/go", "POST")
                    client.sock.settimeout(PATIENCE)
                    continue
                data = data[count:]
                sent += count
        assert stalled
        check_upload(client, digest)
    check_memory(sizes)


def test_upload_from_a_slow_client(serve):
    """A client that sends 100 MiB in bursts finds every byte read, and memory as it was."""
    server = serve()
    digest = hashlib.blake2b()
    with watched(server) as sizes:
        client = start_upload(server, "/up?pause=0")
        for number in range(PIECES):
            data = piece(number)
            digest.update(data)
            client.sock.sendall(data[: 1 + number % 50_000])
            if number % 4 == 0:
                time.sleep(0.001)
            client.sock.sendall(data[1 + number % 50_000 :])
        check_upload(client, digest)
    check_memory(sizes)


def test_download_to_a_slow_reader(serve):
    """The generator of 100 MiB waits for its reader, and memory stays."""
    server = serve()
    digest, expected = hashlib.blake2b(), hashlib.blake2b()
    with watched(server) as sizes:
        client = connect(server, receive_buffer=65536)
        client.request("GET", f"/down/{PIECES}")
        response = client.getresponse()
        count, stopped = 0, False
        while data := response.read(PIECE):
            digest.update(data)
            count += len(data)
            if count % (8 * PIECE) < PIECE:
                time.sleep(0.001)
            if not stopped and count > 50 << 20:
                stopped = True
                produced = wait_until_steady(lambda: json.loads(fetch(server, "/produced")[1]))
                assert 0 <= produced - count < IN_FLIGHT
        client.close()
    for number in range(PIECES):
        expected.update(piece(number))
    assert count == PIECES * PIECE
    assert digest.digest() == expected.digest()
    assert stopped
    check_memory(sizes)


def wait_until_steady(measure: Callable[[], int]) -> int:
    """What *measure* says once it has said the same ten times."""
    said: list[int] = []

    def steady() -> bool:
        said.append(measure())
        return len(said) >= 10 and len(set(said[-10:])) == 1

    wait_until(steady, PATIENCE, "a steady measure")
    return said[-1]


def test_server_sent_events(serve):
    """Events arrive as they are made; the generator ends with its client, and gives its thread."""
    server = serve(WEBSOCKETS_HTTP_THREADS=2)
    for turn in range(1, 7):  # three times as many as there are threads
        client = connect(server)
        client.request("GET", "/events")
        response = client.getresponse()
        assert response.headers["content-type"].startswith("text/event-stream")
        for number in range(3):
            assert response.readline() == f"data: {number}\n".encode()
            assert response.readline() == b"\n"
        response.close()
        client.close()
        wait_until(lambda turn=turn: seen(server) == ["start", "end"] * turn, what="the end")
    # Both threads are free: two views can meet.
    clients = [connect(server) for _ in range(2)]
    for client in clients:
        client.request("GET", "/meet")
    for client in clients:
        assert client.getresponse().read() == b"met"
        client.close()
    assert "Traceback" not in server.log()


def test_send_file_with_ranges(serve):
    """A large file: whole, by range, by suffix, by If-Range, not at all; and it is closed."""
    server = serve()
    content = b"".join(map(piece, range(FILE_PIECES)))
    size = len(content)
    before = wait_until_steady(server.descriptors)

    response, body = fetch(server, "/file")
    assert (response.status, body) == (200, content)
    assert response.headers["accept-ranges"] == "bytes"
    assert int(response.headers["content-length"]) == size
    etag = response.headers["etag"]

    for header, start, stop in [
        ("bytes=0-0", 0, 1),
        ("bytes=1000000-1999999", 1_000_000, 2_000_000),
        (f"bytes={size - 10}-", size - 10, size),
        (f"bytes=5-{size * 2}", 5, size),
        ("bytes=-70000", size - 70_000, size),
    ]:
        response, body = fetch(server, "/file", headers={"Range": header})
        assert (response.status, body) == (206, content[start:stop]), header
        assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
        assert int(response.headers["content-length"]) == stop - start

    response, _ = fetch(server, "/file", headers={"Range": f"bytes={size}-"})
    assert response.status == 416
    assert response.headers["content-range"] == f"bytes */{size}"

    some = {"Range": "bytes=10-19"}
    response, body = fetch(server, "/file", headers={**some, "If-Range": etag})
    assert (response.status, body) == (206, content[10:20])
    response, body = fetch(server, "/file", headers={**some, "If-Range": '"another"'})
    assert (response.status, body) == (200, content)

    response, body = fetch(server, "/file", headers={"If-None-Match": etag})
    assert (response.status, body) == (304, b"")
    response, body = fetch(server, "/file", "HEAD")
    assert (response.status, body) == (200, b"")
    assert int(response.headers["content-length"]) == size

    with closing(connect(server, receive_buffer=65536)) as client:  # one leaves in the middle
        client.request("GET", "/file")
        with closing(client.getresponse()) as response:
            assert response.read(100_000) == content[:100_000]
    wait_until(lambda: server.descriptors() <= before, what="the end of every file and socket")
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("path", ["/endless", "/large"])
def test_a_client_that_never_reads(serve, path):
    """It is cut after WEBSOCKETS_SEND_TIMEOUT (1 s, and 5 s for a busy machine)."""
    server = serve(WEBSOCKETS_HTTP_THREADS=1, WEBSOCKETS_SEND_TIMEOUT=1)
    before = wait_until_steady(server.descriptors)
    with closing(connect(server, receive_buffer=4096)) as client:
        started = time.monotonic()
        client.request("GET", path)
        # With one thread this is answered when that thread is free again: at once where all of
        # the response was handed over, and after the timeout where the generator waits.
        assert seen(server) == ["start", "end"]
        wait_until(lambda: server.descriptors() <= before, what="the end of the connection")
        # Sockets take some MiB at first: the second of patience begins with the last of them.
        assert 0.9 < time.monotonic() - started < 6
        # What it finds, if it reads in the end, is no whole response.
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            client.getresponse().read()
    assert "Traceback" not in server.log()


def test_clients_that_reset_as_the_response_begins(serve):
    """Sending stops with the connection, in the middle of one large chunk too; the log is silent.

    asyncio complains of every write after the fifth to a connection that is lost.
    """
    server = serve()
    chance = random.Random(20261122)
    for _ in range(80):
        client = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
        client.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        # Somewhere between the view's start and the first megabytes of its answer.
        time.sleep(chance.uniform(0, 0.015))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    wait_until(lambda: (what := seen(server)).count("start") == what.count("end"))
    log = server.log()
    for word in ("Traceback", "ERROR", "exception"):
        assert word not in log, log[-1000:]


@pytest.mark.parametrize("framing", ["Content-Length", "chunked"])
@pytest.mark.parametrize("begun", [b"", b"5\r\nbegun\r\n"], ids=["nothing", "some"])
def test_a_client_that_never_sends_its_body(serve, framing, begun):
    """A view that reads it answers 408 after the body timeout (1 s, and 5 s for a busy machine)."""
    server = serve(body_timeout=1.0, WEBSOCKETS_HTTP_THREADS=1)
    fetch(server, "/seen")
    client = connect(server)
    started = time.monotonic()
    client.putrequest("POST", "/count")
    if framing == "chunked":
        client.putheader("Transfer-Encoding", "chunked")
    else:
        client.putheader("Content-Length", "100")
    client.endheaders(begun)
    response = client.getresponse()
    assert response.status == 408
    assert b"Timeout" in response.read()
    assert 0.9 < time.monotonic() - started < 6
    client.close()
    assert fetch(server, "/count", "POST", body=b"123")[1] == b"3"
    assert "Traceback" not in server.log()
