"""``flask websockets serve`` and ``websockets.run()``: what they serve, where, and to whom."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import stat
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from .conftest import free_port
from .serving import (
    CLOSE,
    FLASK,
    HANDSHAKE,
    KINDS,
    TEXT,
    TIMEOUT,
    Peer,
    Start,
    is_there,
    make_certificate,
    read_answer,
    request_head,
    run_flask,
    seconds_until_cut,
    serving,
)
from .waiting import wait_until

APP = """
    import asyncio
    import os
    import socket
    import time

    from flask import Flask, request, url_for
    from flask_websockets import WebSockets

    app = Flask(__name__)
    app.config.from_prefixed_env()
    websockets = WebSockets(app)

    def seen():
        return {
            "address": request.remote_addr,
            "secure": request.is_secure,
            "echo": url_for("echo"),
        }

    @app.get("/")
    def index():
        return "hello"

    @app.post("/length")
    def length():
        return str(len(request.get_data()))

    @app.post("/unread")
    def unread():
        return "unread"

    @app.get("/later")
    def later():
        time.sleep(float(request.args["seconds"]))
        return "later"

    @app.get("/seen")
    def seen_by_http():
        return seen()

    @websockets.route("/echo")
    def echo(ws):
        for data in ws.iter_data():
            ws.send(data)

    @websockets.route("/seen/<name>")
    def seen_by_websocket(ws, name):
        ws.send_json(seen())

    @websockets.route("/implementation")
    async def implementation(ws):
        await ws.accept()
        (connection,) = websockets._runtime.connections
        loop = type(asyncio.get_running_loop())
        await ws.send_json([type(connection.protocol).__name__, loop.__module__.split(".")[0]])

    @app.get("/options")
    def options():
        "TCP_USER_TIMEOUT and SO_KEEPALIVE of every connection that was accepted."
        found = []
        for name in os.listdir("/proc/self/fd"):
            try:
                with socket.socket(fileno=os.dup(int(name))) as each:
                    each.getpeername()
                    found.append([
                        each.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
                        each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    ])
            except OSError:
                pass  # it is no socket, or not connected, or not TCP
        return found
"""

#: Seconds of WEBSOCKETS_HANDSHAKE_TIMEOUT where something is to be cut, and what a loaded
#: machine may need beside them.
HEAD_TIMEOUT = 1.0
LATE = 2.0


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Start]:
    with serving(tmp_path) as start:
        yield start


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Without the websockets library, uvloop and httptools, and with them."""
    name: str = request.param
    return name


@pytest.fixture
def open_sockets() -> Iterator[contextlib.ExitStack]:
    """Closes what a test opens."""
    with contextlib.ExitStack() as stack:
        yield stack


def origin_of(server) -> str:
    return f"127.0.0.1:{server.port}"


# -- what it serves -------------------------------------------------------------------------------


def test_websockets_http_and_a_banner(serve, kind):
    """Text, bytes and large messages come back, HTTP is answered, and the banner says it all."""
    server = serve(APP, kind=kind)
    with server.connect("/echo") as client:
        assert "Sec-WebSocket-Extensions" not in client.response.headers
        for data in ("text", b"binary", "x" * 1_000_000):
            client.send(data)
            assert client.recv(timeout=TIMEOUT) == data
    assert server.fetch("/").body == b"hello"
    assert server.fetch("/length", method="POST", body=b"x" * 100_000).body == b"100000"
    assert server.fetch("/nowhere").status == 404
    assert server.fetch("/echo").status == 426
    with pytest.raises(InvalidStatus) as refused:
        server.connect("/nowhere")
    assert refused.value.response.status_code == 404
    with server.connect("/implementation") as client:
        protocol, loop = json.loads(client.recv(timeout=TIMEOUT))
    assert protocol == ("WSProtocol" if kind == "plain" else "WebSocketsSansIOProtocol")
    if kind == "plain" or is_there("uvloop"):
        assert loop == ("asyncio" if kind == "plain" else "uvloop")
    log = server.banner()
    for part in ("http://", "ws://"):
        assert part + origin_of(server) in log
    for rule in ("/echo", "/seen/<name>", "/implementation"):
        assert rule in log
    assert server.stop(signal.SIGTERM)[0] == 0
    assert "Traceback" not in server.log()


def test_any_free_port(serve):
    """--port 0 takes one, and the banner names it."""
    server = serve(APP, "--port", "0", port=0, wait=False)
    server.port = server.port_of_banner()
    assert server.port > 0
    assert f"ws://{origin_of(server)}" in server.banner()
    server.wait_until_listening()
    with server.connect("/echo") as client:
        client.send("hello")
        assert client.recv(timeout=TIMEOUT) == "hello"


@pytest.fixture
def ipv6():
    """A machine that has it; socket.has_ipv6 says what Python was built with."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no ::1")


def test_an_address_of_ipv6(serve, ipv6):
    """--host ::1 listens there, and the banner's URLs have it in brackets."""
    server = serve(APP, "--host", "::1", "--port", "0", port=0, wait=False)
    port = server.port_of_banner()
    assert f"ws://[::1]:{port}" in server.banner()

    def echoes():
        try:
            with connect(f"ws://[::1]:{port}/echo") as client:
                client.send("hello")
                return client.recv(timeout=TIMEOUT) == "hello"
        except ConnectionRefusedError:
            return False

    wait_until(echoes)


def test_a_port_in_use(serve, tmp_path):
    """A second server says which port it could not have, and the first one does not notice."""
    first = serve(APP)
    second = serve(APP, "--port", str(first.port), port=first.port, wait=False)
    assert second.wait() == 1
    assert str(first.port) in second.log()
    assert "Traceback" not in second.log()
    assert first.fetch("/").body == b"hello"


def test_the_port_is_free_at_once_after_a_stop(serve):
    """A server that closed its connections itself, as a drain does, can be started again."""
    first = serve(APP)
    with Peer(first.port, "/echo") as peer:
        first.signal(signal.SIGTERM)
        assert peer.goodbye() == 1012
        assert first.wait() == 0
        second = serve(APP, "--port", str(first.port), port=first.port)
        assert second.fetch("/").body == b"hello"


# -- TLS ------------------------------------------------------------------------------------------


def test_tls(serve, kind, tmp_path):
    """https and wss, which the application and the banner know of, and a drain as without."""
    tls = make_certificate(tmp_path)
    server = serve(APP, "--cert", tls.cert, "--key", tls.key, kind=kind, tls=tls.context)
    for part in ("https://", "wss://"):
        assert part + origin_of(server) in server.banner()
    found = json.loads(server.fetch("/seen").body)
    assert (found["secure"], found["echo"]) == (True, "wss://localhost/echo")
    with server.connect("/seen/x") as client:
        assert json.loads(client.recv(timeout=TIMEOUT))["secure"] is True
    with server.connect("/echo", origin=f"https://{origin_of(server)}") as client:
        for data in ("text", "x" * 1_000_000):
            client.send(data)
            assert client.recv(timeout=TIMEOUT) == data
        server.signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=TIMEOUT)
        assert client.close_code == 1012
    assert server.wait() == 0


# -- unix sockets ---------------------------------------------------------------------------------


@pytest.fixture
def unix(tmp_path) -> Path:
    path = tmp_path / "app.sock"
    assert len(str(path)) < 100, "the kernel takes 107 bytes"
    return path


def stale_socket(path: Path) -> None:
    """Leave what a server leaves that was killed."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    assert stat.S_ISSOCK(path.stat().st_mode)


def test_a_unix_socket(serve, kind, unix):
    """Everybody may connect; a stale file is replaced, and at the end none is left."""
    stale_socket(unix)
    server = serve(APP, "--host", f"unix://{unix}", kind=kind, unix=unix)
    assert stat.S_IMODE(unix.stat().st_mode) == 0o666
    assert str(unix) in server.banner()
    assert "/seen/<name>" in server.banner()
    assert server.fetch("/").body == b"hello"
    with server.connect("/echo") as client:
        client.send("hello")
        assert client.recv(timeout=TIMEOUT) == "hello"
        server.signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=TIMEOUT)
        assert client.close_code == 1012
    assert server.wait() == 0
    assert not unix.exists()


def test_whoever_connects_to_a_unix_socket_is_a_proxy(serve, kind, unix):
    """X-Forwarded-For and -Proto count there, for HTTP and WebSockets; so does the Origin."""
    server = serve(APP, "--host", f"unix://{unix}", kind=kind, unix=unix)
    forwarded = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    expected = {"address": "203.0.113.9", "secure": True, "echo": "wss://localhost/echo"}
    assert json.loads(server.fetch("/seen", headers=forwarded).body) == expected
    with server.connect("/seen/x", additional_headers=forwarded) as client:
        assert json.loads(client.recv(timeout=TIMEOUT)) == expected
    for headers, origin in ((forwarded, "https://localhost"), ({}, "http://localhost")):
        with server.connect("/echo", origin=origin, additional_headers=headers) as client:
            client.send("hello")
            assert client.recv(timeout=TIMEOUT) == "hello"
    with pytest.raises(InvalidStatus) as refused:
        server.connect("/echo", origin="https://evil.example", additional_headers=forwarded)
    assert refused.value.response.status_code == 403
    made_up = {**forwarded, "X-Forwarded-For": "192.0.2.7, 203.0.113.9"}
    assert json.loads(server.fetch("/seen", headers=made_up).body) == expected
    assert json.loads(server.fetch("/seen").body)["address"] == "127.0.0.1"


def test_a_unix_socket_that_is_in_use(serve, unix):
    """A second server is an error, and the first keeps its file."""
    first = serve(APP, "--host", f"unix://{unix}", unix=unix)
    second = serve(APP, "--host", f"unix://{unix}", unix=unix, wait=False)
    assert second.wait() == 1
    assert str(unix) in second.log()
    assert "Traceback" not in second.log()
    assert first.fetch("/").body == b"hello"


def test_a_file_that_is_no_socket_is_left_alone(serve, unix):
    """What lies at the socket's path and is none is somebody's data."""
    unix.write_text("precious")
    server = serve(APP, "--host", f"unix://{unix}", unix=unix, wait=False)
    assert server.wait() == 1
    assert str(unix) in server.log()
    assert unix.read_text() == "precious"


# -- proxies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "trusted"),
    [((), True), (("--forwarded-allow-ips", "192.0.2.1"), False), (("-h", "0.0.0.0"), True)]
    + [(("--forwarded-allow-ips", value), True) for value in ("*", "192.0.2.1,127.0.0.1")],
    ids=["default", "another", "any-interface", "all", "list"],
)
def test_the_headers_of_proxies(serve, options, trusted):
    """They count from the same machine by default, else from those that are named."""
    server = serve(APP, *options)
    forwarded = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    expected = {
        "address": "203.0.113.9" if trusted else "127.0.0.1",
        "secure": trusted,
        "echo": "wss://localhost/echo" if trusted else "ws://localhost/echo",
    }
    assert json.loads(server.fetch("/seen", headers=forwarded).body) == expected
    headers = {"Host": "localhost", **forwarded}
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as proxy:
        proxy.sendall(request_head("GET", "/seen/x", {**HANDSHAKE, **headers}))
        data = b""
        while b"/echo" not in data:
            part = proxy.recv(4096)
            assert part, data
            data += part
    assert data.startswith(b"HTTP/1.1 101")
    assert expected["echo"].encode() in data
    assert expected["address"].encode() in data


# -- limits ---------------------------------------------------------------------------------------


def test_messages_above_the_limit(serve, kind):
    """WEBSOCKETS_MAX_MESSAGE_BYTES closes 1009, and not only once the bytes are there."""
    server = serve(APP, kind=kind, settings={"MAX_MESSAGE_BYTES": 1000})
    with server.connect("/echo") as client:
        client.send("x" * 1000)
        assert client.recv(timeout=TIMEOUT) == "x" * 1000
        client.send("x" * 1001)
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=TIMEOUT)
        assert client.close_code == 1009
    with Peer(server.port, "/echo") as peer:
        # A gigabyte is announced. wsproto hands a frame on as its bytes come in, so that it
        # takes some of them to see it; of the gigabyte no more than the limit is ever held.
        peer.socket.sendall(b"\x82\xff" + (2**30).to_bytes(8, "big") + bytes(4))
        if kind == "plain":
            peer.socket.sendall(bytes(1001))
        opcode, data = peer.frame()
        assert (opcode, int.from_bytes(data[:2], "big")) == (CLOSE, 1009)
    with Peer(server.port, "/echo") as peer:
        # In fragments, each below the limit, without an end.
        fragment = b"\xfe\x01\xf4" + bytes(4) + bytes(500)
        peer.socket.sendall(b"\x02" + fragment + (b"\x00" + fragment) * 2)
        opcode, data = peer.frame()
        assert (opcode, int.from_bytes(data[:2], "big")) == (CLOSE, 1009)


def test_compression_is_not_for_wsproto(serve):
    """It would unpack a bomb before anybody looks at its size: the command says what to install."""
    server = serve(APP, "--compression", kind="plain", wait=False)
    assert server.wait() == 2
    assert "flask-websockets[fast]" in server.log()


def test_compression_is_an_option(serve):
    """--compression agrees to permessage-deflate; a bomb meets the limit all the same."""
    server = serve(APP, "--compression", kind="fast", settings={"MAX_MESSAGE_BYTES": 2_000_000})
    with server.connect("/echo", compression="deflate", max_size=None) as client:
        extensions = client.response.headers["Sec-WebSocket-Extensions"]
        assert extensions.startswith("permessage-deflate")
        client.send("x" * 1_000_000)
        assert client.recv(timeout=TIMEOUT) == "x" * 1_000_000
        client.send("x" * 20_000_000)
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=TIMEOUT)
        assert client.close_code == 1009


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_USER_TIMEOUT and /proc are Linux's")
def test_dead_peers_are_noticed_by_the_kernel(serve, kind):
    """Accepted sockets carry TCP_USER_TIMEOUT = WEBSOCKETS_SEND_TIMEOUT, and SO_KEEPALIVE."""
    server = serve(APP, kind=kind, settings={"SEND_TIMEOUT": 7})
    with Peer(server.port, "/echo") as peer:
        peer.send_text("accepted")
        assert peer.frame() == (TEXT, b"accepted")
        assert json.loads(server.fetch("/options").body) == [[7000, 1], [7000, 1]]


# -- slow request heads ---------------------------------------------------------------------------


def trickle(connection: socket.socket, data: bytes, interval: float) -> None:
    """Send one byte after the other until the connection is gone."""
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
        except OSError:
            return
        time.sleep(interval)


@contextlib.contextmanager
def trickling(connection: socket.socket, data: bytes, interval: float) -> Iterator[None]:
    thread = threading.Thread(target=trickle, args=(connection, data, interval))
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the server has cut it
            connection.shutdown(socket.SHUT_RDWR)
        thread.join(TIMEOUT)  # its next send fails


def opened(server, stack: contextlib.ExitStack) -> socket.socket:
    return stack.enter_context(socket.create_connection(("127.0.0.1", server.port), TIMEOUT))


def silent(server, stack):
    """No byte at all."""
    return opened(server, stack), b""


def unfinished(server, stack):
    """All but the end."""
    connection = opened(server, stack)
    connection.sendall(request_head("GET", "/")[:-2])
    return connection, b""


def byte_by_byte(server, stack):
    """A byte each 0.2 s, so that it is never quiet."""
    return opened(server, stack), request_head("GET", "/", {"X-Slow": "x" * 100})


def handshake_byte_by_byte(server, stack):
    return opened(server, stack), request_head("GET", "/echo", {"X-Slow": "x" * 99, **HANDSHAKE})


def second_on_a_connection(server, stack):
    """The first request is answered; the clock runs from the first byte of the next one."""
    connection = opened(server, stack)
    connection.sendall(request_head("GET", "/"))
    assert read_answer(connection).body == b"hello"
    return connection, request_head("GET", "/", {"X-Slow": "x" * 100})


def second_in_one_packet(server, stack):
    """Its first bytes come together with the first request: uvicorn's keep-alive ends it."""
    connection = opened(server, stack)
    connection.sendall(request_head("GET", "/") + request_head("GET", "/")[:-2])
    assert read_answer(connection).body == b"hello"
    return connection, b""


def after_a_body(server, stack):
    connection = opened(server, stack)
    connection.sendall(request_head("POST", "/length", body=b"four") + b"four")
    assert read_answer(connection).body == b"4"
    return connection, request_head("GET", "/", {"X-Slow": "x" * 100})


def endless_lines(server, stack):
    """Blank lines before a request are skipped, and are no request."""
    return opened(server, stack), b"\r\n" * 100


#: Seconds that uvicorn leaves an idle connection.
KEEP_ALIVE = 5.0

SLOW = [
    *(silent, unfinished, byte_by_byte, handshake_byte_by_byte),
    *(second_on_a_connection, second_in_one_packet, after_a_body, endless_lines),
]


def test_slow_request_heads_are_cut(serve, kind):
    """Each way to be slow with a head ends after WEBSOCKETS_HANDSHAKE_TIMEOUT."""
    server = serve(APP, kind=kind, settings={"HANDSHAKE_TIMEOUT": HEAD_TIMEOUT})

    def check(make) -> str | None:
        with contextlib.ExitStack() as stack:
            started = time.monotonic()
            connection, rest = make(server, stack)
            with trickling(connection, rest, 0.2):
                try:
                    timeout = KEEP_ALIVE if make is second_in_one_packet else HEAD_TIMEOUT
                    seconds_until_cut(connection, started, timeout + LATE)
                except TimeoutError as error:
                    return f"{make.__name__}: {error}"
        return None

    with ThreadPoolExecutor(len(SLOW)) as pool:
        assert [wrong for wrong in pool.map(check, SLOW) if wrong] == []
    assert server.fetch("/").body == b"hello"
    assert "Traceback" not in server.log()


def test_what_is_slow_without_a_fault_is_not_cut(serve, kind, open_sockets):
    """A slow body, a slow view, an idle connection and an open WebSocket outlive the timeout."""
    server = serve(APP, kind=kind, settings={"HANDSHAKE_TIMEOUT": HEAD_TIMEOUT})
    websocket = open_sockets.enter_context(Peer(server.port, "/echo"))
    quiet = open_sockets.enter_context(Peer(server.port, "/echo"))
    idle = opened(server, open_sockets)
    idle.sendall(request_head("GET", "/"))
    assert read_answer(idle).body == b"hello"
    seconds = 2 * HEAD_TIMEOUT
    view = opened(server, open_sockets)
    view.sendall(request_head("GET", f"/later?seconds={seconds}"))
    # The whole head of the next request is there; that it is not its turn yet is no fault.
    pipelined = opened(server, open_sockets)
    pipelined.sendall(
        request_head("GET", f"/later?seconds={seconds}") + request_head("GET", "/", close=True)
    )
    slow = opened(server, open_sockets)
    head = request_head("POST", "/length", {"Content-Length": "10"})
    slow.sendall(head[:20])
    websocket.send_text("between")
    assert websocket.frame() == (TEXT, b"between")
    slow.sendall(head[20:])
    unread = opened(server, open_sockets)
    unread.sendall(request_head("POST", "/unread", {"Content-Length": "10"}))
    with trickling(unread, b"x" * 10, seconds / 10):
        trickle(slow, b"x" * 10, seconds / 10)
        assert read_answer(slow).body == b"10"
        # It is answered before its body is there, which is no reason to cut it either.
        assert read_answer(unread).body == b"unread"
    assert read_answer(view).body == b"later"
    answers = b""
    while part := pipelined.recv(4096):
        answers += part
    assert answers.count(b"HTTP/1.1 200") == 2
    assert answers.endswith(b"hello")
    idle.sendall(request_head("GET", "/"))
    assert read_answer(idle).body == b"hello"
    for each in (websocket, quiet):
        each.send_text("still there")
        assert each.frame() == (TEXT, b"still there")


def test_the_rest_of_a_body_is_no_head(serve, kind, open_sockets):
    """A view answers before the body is there: that comes as slowly as it likes."""
    server = serve(APP, kind=kind, settings={"HANDSHAKE_TIMEOUT": HEAD_TIMEOUT})
    client = opened(server, open_sockets)
    client.sendall(request_head("POST", "/unread", {"Content-Length": "10"}))
    assert read_answer(client).body == b"unread"
    trickle(client, b"x" * 10, 2 * HEAD_TIMEOUT / 10)
    client.sendall(request_head("GET", "/"))
    assert read_answer(client).body == b"hello"


def test_ipv4_clients_of_an_ipv6_socket(serve, ipv6):
    """They have their own address, and a proxy on this machine is believed as such."""
    server = serve(APP, "--host", "::")
    assert json.loads(server.fetch("/seen").body)["address"] == "127.0.0.1"
    forwarded = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    seen = json.loads(server.fetch("/seen", headers=forwarded).body)
    assert (seen["address"], seen["secure"]) == ("203.0.113.9", True)


def test_slow_clients_of_tls_are_cut(serve, kind, tmp_path, open_sockets):
    """No hello, half a hello, and a handshake with nothing after it: all end in time."""
    tls = make_certificate(tmp_path)
    options = ("--cert", tls.cert, "--key", tls.key)
    settings = {"HANDSHAKE_TIMEOUT": HEAD_TIMEOUT}
    server = serve(APP, *options, kind=kind, tls=tls.context, settings=settings)
    started = time.monotonic()
    none = opened(server, open_sockets)
    half = opened(server, open_sockets)
    hello, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = tls.context.wrap_bio(hello, outgoing, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    half.sendall(outgoing.read()[:100])
    done = open_sockets.enter_context(server.open())
    head = open_sockets.enter_context(server.open())
    head.sendall(request_head("GET", "/")[:-2])
    for connection in (none, half, done, head):
        seconds_until_cut(connection, started, HEAD_TIMEOUT + LATE)
    assert server.fetch("/").body == b"hello"


OVERSIZED = {
    "cookie": {"Cookie": "session=" + "x" * 9000},
    "headers": {f"X-Header-{number}": "x" for number in range(200)},
    "content-length": {"Content-Length": "5"},
    "huge": {"Cookie": "session=" + "x" * 100_000},
}


def test_oversized_handshakes_do_not_hang(serve, kind):
    """What the WebSocket library does not take is answered or cut within the timeout."""
    server = serve(APP, kind=kind, settings={"HANDSHAKE_TIMEOUT": HEAD_TIMEOUT})
    for what, headers in OVERSIZED.items():
        with socket.create_connection(("127.0.0.1", server.port), HEAD_TIMEOUT + LATE) as client:
            client.sendall(request_head("GET", "/echo", {**HANDSHAKE, **headers}))
            try:
                data = client.recv(4096)
            except ConnectionError:
                data = b""
            except TimeoutError:
                pytest.fail(f"{what}: neither answered nor cut")
        assert not data or data.split()[1] in (b"101", b"400", b"431"), (what, data)
    with server.connect("/echo") as other:
        other.send("still here")
        assert other.recv(timeout=TIMEOUT) == "still here"
    assert server.stop()[0] == 0
    assert "Traceback" not in server.log()


# -- from Python ----------------------------------------------------------------------------------

SCRIPT = """

    if __name__ == "__main__":
        websockets.run(port={port})
"""


def test_run_in_a_script(serve, kind):
    """websockets.run() serves as the command does, banner and drain included."""
    server = serve(APP + SCRIPT, kind=kind, command=[sys.executable, "served.py"])
    assert server.fetch("/").body == b"hello"
    assert f"ws://{origin_of(server)}" in server.banner()
    with server.connect("/echo") as client:
        client.send("hello")
        assert client.recv(timeout=TIMEOUT) == "hello"
        server.signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=TIMEOUT)
        assert client.close_code == 1012
    assert server.wait() == 0


def test_run_with_an_app_that_is_made_in_a_function(serve, tmp_path):
    """One worker needs no module to import the application from; the options are arguments."""
    tls = make_certificate(tmp_path)
    source = f"""
    from flask import Flask
    from flask_websockets import WebSockets

    websockets = WebSockets()

    @websockets.route("/echo")
    def echo(ws):
        for data in ws.iter_data():
            ws.send(data)

    def main():
        app = Flask(__name__)
        app.get("/")(lambda: "hello")
        websockets.init_app(app)
        websockets.run(
            app, host="127.0.0.1", port={{port}}, cert={tls.cert!r}, key={tls.key!r},
            compression=True, forwarded_allow_ips="*",
        )

    main()
    """
    server = serve(source, command=[sys.executable, "served.py"], tls=tls.context)
    assert server.fetch("/").body == b"hello"
    with server.connect("/echo") as client:
        assert "Sec-WebSocket-Extensions" in client.response.headers
        client.send("hello")
        assert client.recv(timeout=TIMEOUT) == "hello"
    assert server.stop(signal.SIGINT)[0] == 0


def test_run_takes_over_no_port_in_use(serve):
    """run() raises OSError, which names the port."""
    first = serve(APP)
    source = (
        APP
        + """
    try:
        websockets.run(port={port})
    except OSError as error:
        print("refused:", error)
    """
    )
    second = serve(source, command=[sys.executable, "served.py"], port=first.port, wait=False)
    assert second.wait() == 0
    assert "refused:" in second.log()
    assert str(first.port) in second.log()


UNGUARDED = """

    websockets.run(port={port})
    print("imported")
"""


@pytest.mark.parametrize("command", [("run",), ("websockets", "serve")], ids=["run", "serve"])
def test_the_flask_command_ignores_run(serve, command):
    """A module that calls websockets.run() unguarded is imported with a warning, and served."""
    port = free_port()
    server = serve(
        APP + UNGUARDED.replace("{port}", str(free_port())),
        command=[FLASK, "--app", "served", *command, "--port", str(port)],
        port=port,
    )
    assert server.fetch("/").body == b"hello"
    with server.connect("/echo") as client:
        client.send("hello")
        assert client.recv(timeout=TIMEOUT) == "hello"
    assert "run()" in server.log()
    server.stop()
    assert "Traceback" not in server.log()


def test_a_command_of_the_applications_own(serve):
    """A script made of FlaskGroup(create_app=...) has the command too."""
    source = """
    import click
    from flask import Flask
    from flask.cli import FlaskGroup
    from flask_websockets import WebSockets

    websockets = WebSockets()

    @websockets.route("/echo")
    def echo(ws):
        for data in ws.iter_data():
            ws.send(data)

    def create_app():
        app = Flask(__name__)
        websockets.init_app(app)
        return app

    if __name__ == "__main__":
        FlaskGroup(create_app=create_app)()
    """
    port = free_port()
    command = [sys.executable, "served.py", "websockets", "serve", "--port", str(port)]
    server = serve(source, command=command, port=port)
    with server.connect("/echo") as client:
        client.send("hello")
        assert client.recv(timeout=TIMEOUT) == "hello"
    assert server.stop()[0] == 0


# -- what is refused before anything is served ----------------------------------------------------


def test_an_application_that_cannot_be_imported(tmp_path):
    """Its error is shown, and the command fails as Flask's own do."""
    done = run_flask(
        tmp_path, APP + "\n    raise RuntimeError('no database')\n", "websockets", "serve"
    )
    assert done.returncode != 0
    assert "no database" in done.stderr


def test_the_environment_names_options_too(serve):
    """As for every command of Flask, FLASK_ and the option's path is its default."""
    port = free_port()
    name = "FLASK_WEBSOCKETS_SERVE_PORT"
    source = APP.replace("app.config.from_prefixed_env()", "")
    command = ["env", f"{name}={port}", FLASK, "--app", "served", "websockets", "serve"]
    server = serve(source, command=command, port=port)
    assert server.fetch("/").body == b"hello"
    assert os.environ.get(name) is None
