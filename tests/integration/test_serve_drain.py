"""How ``flask websockets serve`` ends: a drain, a deadline that holds, and an exit code of 0."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from .conftest import START_TIMEOUT, free_port
from .serving import (
    HANDSHAKE,
    KINDS,
    MARGIN,
    TEXT,
    TIMEOUT,
    Peer,
    Served,
    Start,
    make_certificate,
    read_answer,
    request_head,
    serving,
)
from .waiting import wait_until

APP = """
    import asyncio
    import atexit
    import logging
    import threading
    import time
    from concurrent.futures import ThreadPoolExecutor

    from flask import Flask, Response
    from flask_websockets import ConnectionClosed, NotRunning, WebSockets

    app = Flask(__name__)
    app.config.from_prefixed_env()
    websockets = WebSockets(app)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    release = threading.Event()
    executor = ThreadPoolExecutor()
    seen = []
    sent = [0]

    atexit.register(print, "atexit ran")

    @app.get("/")
    def index():
        return "hello"

    @app.get("/seen")
    def show():
        return seen

    @app.get("/sent")
    def count():
        return sent

    @app.get("/release")
    def let_go():
        release.set()
        return "released"

    @websockets.route("/echo")
    def echo(ws):
        ws.send("ready")
        for data in ws.iter_data():
            ws.send(data)

    @websockets.route("/async-echo")
    async def async_echo(ws):
        await ws.send("ready")
        async for data in ws.iter_data():
            await ws.send(data)

    @websockets.route("/hold")
    def hold(ws):
        "Outlives its connection, until it is released."
        ws.send("ready")
        try:
            ws.receive()
        except ConnectionClosed as closed:
            print("the view saw", closed.code)
        release.wait(60)
        print("the view has ended")

    @websockets.route("/before-accept")
    def before_accept(ws):
        seen.append("before-accept")
        release.wait(60)
        try:
            ws.accept()
        except ConnectionClosed:
            print("accept raised ConnectionClosed")
            raise

    @app.get("/hold")
    def hold_http():
        seen.append("http")
        release.wait(60)
        return "at last"

    @websockets.route("/queue")
    def queue(ws):
        with websockets.subscribe(ws, "queue"):
            ws.send("ready")
            ws.receive()
            for number in range(40):
                ws.send(f"{number:04}" + "x" * 10_000)
            seen.append("queued")
            for _ in ws.iter_data():
                pass

    @app.get("/publish")
    def publish():
        for number in range(40, 50):
            websockets.publish(f"{number:04}" + "x" * 10_000, "queue")
        return "published"

    @websockets.route("/flood")
    def flood(ws):
        data = bytes(60_000)
        while True:
            ws.send(data)
            sent[0] += 1

    # -- what does not end ------------------------------------------------------------------------

    @websockets.route("/sleep")
    def sleep(ws):
        ws.send("ready")
        time.sleep(600)

    @websockets.route("/spin")
    def spin(ws):
        ws.send("ready")
        while True:
            try:
                ws.receive()
            except ConnectionClosed:
                pass

    @websockets.route("/swallow")
    async def swallow(ws):
        await ws.send("ready")
        while True:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                pass

    @websockets.route("/to-thread")
    async def to_thread(ws):
        await ws.send("ready")
        await asyncio.to_thread(time.sleep, 600)

    @websockets.route("/block")
    async def block(ws):
        "It blocks the event loop itself, once its connection is closed."
        await ws.send("ready")
        try:
            await ws.receive()
        except ConnectionClosed:
            time.sleep(600)

    @app.get("/sleep")
    def sleep_http():
        seen.append("http")
        time.sleep(600)

    @app.get("/async-sleep")
    async def async_sleep():
        seen.append("http")
        await asyncio.sleep(600)

    @app.get("/stream")
    def stream():
        def chunks():
            while True:
                yield b"x" * 1000
                time.sleep(0.01)
        return Response(chunks())

    @app.get("/stream-fast")
    def stream_fast():
        def chunks():
            while True:
                yield bytes(60_000)
        return Response(chunks())

    @app.get("/thread")
    def thread():
        # One that a thread of the HTTP pool starts would be a daemon as that is.
        threading.Thread(target=time.sleep, args=(600,), daemon=False).start()
        return "started"

    @app.get("/executor")
    def use_executor():
        executor.submit(time.sleep, 600)
        return "started"

    # -- what is written and published at the end -------------------------------------------------

    @websockets.route("/print")
    def print_much(ws):
        ws.send("ready")
        try:
            ws.receive()
        except ConnectionClosed:
            for number in range(2000):
                print(f"line {number:05} " + "x" * 50)
                app.logger.info("logged %05d", number)
        time.sleep(600)

    def publish_until_the_end():
        try:
            while True:
                websockets.publish("news", "news")
                time.sleep(0.001)
        except NotRunning:
            print("the publisher got NotRunning")

    @app.get("/publisher")
    def publisher():
        threading.Thread(target=publish_until_the_end, daemon=False).start()
        return "started"

    @websockets.route("/last-words")
    def last_words(ws):
        ws.send("ready")
        try:
            for _ in ws.iter_data():
                pass
        finally:
            try:
                websockets.publish("bye", "news")
                print("last words: published")
            except NotRunning:
                print("last words: NotRunning")

    @websockets.route("/async-last-words")
    async def async_last_words(ws):
        await ws.send("ready")
        try:
            async for _ in ws.iter_data():
                pass
        finally:
            try:
                await websockets.apublish("bye", "news")
                print("async last words: published")
            except NotRunning:
                print("async last words: NotRunning")

    @websockets.route("/news")
    def news(ws):
        with websockets.subscribe(ws, "news"):
            for _ in ws.iter_data():
                pass
"""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Start]:
    with serving(tmp_path) as start:
        yield start


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Without the websockets library, uvloop and httptools, and with them."""
    name: str = request.param
    return name


#: For what takes seconds and hardly differs.
ONE_KIND = pytest.mark.parametrize(
    "kind", [pytest.param("plain", marks=pytest.mark.slow), "fast"], indirect=True
)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what a test opens."""
    with ExitStack() as stack:
        yield stack


def opened(server: Served, stack: ExitStack, path: str, **options) -> Peer:
    """A peer whose view runs."""
    peer = stack.enter_context(Peer(server.port, path, **options))
    assert peer.frame() == (TEXT, b"ready")
    return peer


def asked(server: Served, stack: ExitStack, path: str) -> socket.socket:
    """A connection with a request on it that is not answered at once."""
    connection = stack.enter_context(server.open())
    connection.sendall(request_head("GET", path))
    return connection


def wait_until_seen(server: Served, what: str) -> None:
    wait_until(lambda: what in json.loads(server.fetch("/seen").body), what=what)


def fill_buffers(server: Served, stack: ExitStack) -> None:
    """A peer that never reads, and a view whose send waits for it."""
    stack.enter_context(Peer(server.port, "/flood", receive_buffer=4096))
    counts = [-1] * 5

    def stuck() -> bool:
        counts.append(json.loads(server.fetch("/sent").body)[0])
        return counts[-1] > 0 and len(set(counts[-5:])) == 1

    wait_until(stuck, what="a full buffer")


def stop(server: Served, number: int = signal.SIGTERM) -> float:
    """Signal the server; when."""
    started = time.monotonic()
    server.signal(number)
    return started


# -- a drain --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain(serve, kind, number, stack):
    """Everybody gets 1012, handshakes 503, requests their answers; then it ends at once, with 0."""
    server = serve(APP, kind=kind)
    held = opened(server, stack, "/hold")
    others = [opened(server, stack, path) for path in ("/echo", "/async-echo") * 3]
    idle = asked(server, stack, "/")
    assert read_answer(idle).body == b"hello"
    waiting = asked(server, stack, "/hold")
    wait_until_seen(server, "http")
    stack.enter_context(server.open())  # says nothing, and is nobody to wait for

    server.signal(number)
    assert {peer.goodbye() for peer in (held, *others)} == {1012}
    with pytest.raises(InvalidStatus) as refused:
        server.connect("/echo")
    assert refused.value.response.status_code == 503
    assert int(refused.value.response.headers["Retry-After"]) > 0
    assert server.fetch("/").body == b"hello"  # on a new connection
    idle.sendall(request_head("GET", "/"))
    assert read_answer(idle).body == b"hello"  # on one that was there before
    idle.sendall(request_head("GET", "/echo", HANDSHAKE))
    assert read_answer(idle).status == 503
    assert server.fetch("/release").body == b"released"
    assert read_answer(waiting).body == b"at last"

    assert server.wait(5) == 0, "the drain timeout is 20 s"
    log = server.log()
    assert "the view saw 1012" in log
    assert "the view has ended" in log
    assert "atexit ran" in log
    assert "Traceback" not in log


def test_nobody_to_wait_for(serve, kind, stack):
    """Idle, silent and half a request: none of them keeps a server."""
    server = serve(APP, kind=kind)
    idle = asked(server, stack, "/")
    assert read_answer(idle).body == b"hello"
    stack.enter_context(server.open())
    stack.enter_context(server.open()).sendall(request_head("GET", "/")[:-2])
    server.signal(signal.SIGTERM)
    assert server.wait(5) == 0
    assert "atexit ran" in server.log()
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("options", [(), ("--workers", "2", "--separate-channels")])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_as_soon_as_it_can_come(serve, number, options):
    """From the banner on, which says how to stop it, a signal is a normal end."""
    server = serve(APP, *options, wait=False)
    server.banner()
    server.signal(number)
    assert server.wait() == 0
    assert "Traceback" not in server.log()


def test_what_was_queued_comes_before_the_goodbye(serve, kind, stack):
    """Sent and published messages that the peer had not read yet, each once and in order."""
    server = serve(APP, kind=kind)
    witness = opened(server, stack, "/echo")
    slow = opened(server, stack, "/queue", receive_buffer=4096)
    slow.send_text("go")
    wait_until_seen(server, "queued")
    assert server.fetch("/publish").body == b"published"
    server.signal(signal.SIGTERM)
    assert witness.goodbye() == 1012
    messages, code = slow.messages_until_close()
    assert [int(message[:4]) for message in messages] == list(range(50))
    assert {len(message) for message in messages} == {10_004}
    assert code == 1012
    slow.close()
    assert server.wait(5) == 0


def test_a_handshake_under_way_is_refused(serve, kind, stack):
    """A view that has not accepted yet when the drain begins: 503, and its accept raises."""
    server = serve(APP, kind=kind)
    held = opened(server, stack, "/hold")
    connection = stack.enter_context(server.open())
    connection.sendall(request_head("GET", "/before-accept", HANDSHAKE))
    wait_until_seen(server, "before-accept")
    server.signal(signal.SIGTERM)
    assert read_answer(connection).status == 503
    assert held.goodbye() == 1012
    assert server.fetch("/release").status == 200
    assert server.wait(5) == 0
    assert "accept raised ConnectionClosed" in server.log()
    assert "Traceback" not in server.log()


def test_publishers_do_not_hang(serve, kind, stack):
    """What is published in a drain goes through or raises NotRunning, on threads and the loop."""
    server = serve(APP, kind=kind)
    stack.enter_context(Peer(server.port, "/news"))
    assert server.fetch("/publisher").body == b"started"
    peers = [opened(server, stack, path) for path in ("/last-words", "/async-last-words")]
    server.signal(signal.SIGTERM)
    assert {peer.goodbye() for peer in peers} == {1012}
    assert server.wait(15) == 0, "the drain timeout is 20 s"
    log = server.log()
    assert "the publisher got NotRunning" in log
    for words in ("last words: ", "async last words: "):
        lines = [line for line in log.splitlines() if line.startswith(words)]
        assert lines in ([words + "published"], [words + "NotRunning"])
    assert "Traceback" not in log


def test_tls_says_goodbye_too(serve, kind, stack, tmp_path):
    """Everybody has left, and an idle connection is nobody to wait for: it ends at once."""
    tls = make_certificate(tmp_path)
    options = ("--cert", tls.cert, "--key", tls.key)
    server = serve(APP, *options, kind=kind, tls=tls.context)
    client = stack.enter_context(server.connect("/echo"))
    assert client.recv(timeout=TIMEOUT) == "ready"
    idle = asked(server, stack, "/")
    assert read_answer(idle).body == b"hello"
    server.signal(signal.SIGTERM)
    with pytest.raises(ConnectionClosed):
        client.recv(timeout=TIMEOUT)
    assert client.close_code == 1012
    assert server.wait(5) == 0, "the drain timeout is 20 s"
    assert "Traceback" not in server.log()


# -- what does not end by itself ------------------------------------------------------------------


def test_the_promise(serve, kind, stack):
    """300 views, one in time.sleep(600), and one peer that never reads: over in time, with 0."""
    server = serve(APP, kind=kind, settings={"DRAIN_TIMEOUT": 3})
    peers = [opened(server, stack, "/echo") for _ in range(300)]
    peers.append(opened(server, stack, "/sleep"))
    fill_buffers(server, stack)
    started = stop(server)
    codes = [peer.goodbye() for peer in peers]
    code = server.wait()
    seconds = time.monotonic() - started
    assert set(codes) <= {1001, 1012}
    assert (code, seconds <= 3 + MARGIN) == (0, True), f"{code} after {seconds:.2f} s"


def view(path):
    def start(server, stack):
        peer = opened(server, stack, path)
        return lambda: peer.goodbye() == 1012

    return start


def request(path):
    def start(server, stack):
        asked(server, stack, path)
        wait_until_seen(server, "http")

    return start


def stream(path):
    def start(server, stack):
        connection = asked(server, stack, path)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"

    return start


def call(path):
    def start(server, stack):
        assert server.fetch(path).body == b"started"

    return start


def no_answer(server, stack):
    """A peer that reads and does not answer the close."""
    peer = opened(server, stack, "/echo")
    return lambda: peer.messages_until_close() == ([], 1012)


STUCK = {
    "view-sleeps": view("/sleep"),
    "view-spins": view("/spin"),
    "async-view-swallows": view("/swallow"),
    "async-view-in-thread": view("/to-thread"),
    "request-sleeps": request("/sleep"),
    "async-request-sleeps": request("/async-sleep"),
    "stream": stream("/stream"),
    "stream-unread": stream("/stream-fast"),
    "thread": call("/thread"),
    "executor": call("/executor"),
    "deaf-peer": fill_buffers,
    "peer-without-an-answer": no_answer,
}


#: What is not tried alone each time: test_everything_that_does_not_end has it too.
FREQUENT = ("view-sleeps", "request-sleeps", "deaf-peer")


@pytest.mark.parametrize(
    "what",
    [what if what in FREQUENT else pytest.param(what, marks=pytest.mark.slow) for what in STUCK],
)
def test_whatever_does_not_end_is_cut(serve, what, stack):
    """Within the drain timeout and a second it is over, with 0; the others had their 1012."""
    server = serve(APP, settings={"DRAIN_TIMEOUT": 1})
    other = opened(server, stack, "/echo")
    says_goodbye = STUCK[what](server, stack)
    started = stop(server)
    assert other.goodbye() == 1012
    assert says_goodbye is None or says_goodbye()
    code = server.wait()
    seconds = time.monotonic() - started
    assert (code, seconds <= 1 + MARGIN) == (0, True), f"{code} after {seconds:.2f} s"


@ONE_KIND
def test_everything_that_does_not_end(serve, kind, stack):
    """All of it at once is over in time as well."""
    server = serve(APP, kind=kind, settings={"DRAIN_TIMEOUT": 2})
    for start in STUCK.values():
        start(server, stack)
    started = stop(server)
    code = server.wait()
    seconds = time.monotonic() - started
    assert (code, seconds <= 2 + MARGIN) == (0, True), f"{code} after {seconds:.2f} s"


@pytest.mark.slow  # with all the others that wait for their end
def test_a_view_that_blocks_the_loop(serve, stack):
    """Nobody may hear anything then, but the process is gone in time."""
    server = serve(APP, settings={"DRAIN_TIMEOUT": 1})
    opened(server, stack, "/block")
    started = stop(server)
    code = server.wait()
    seconds = time.monotonic() - started
    assert (code, seconds <= 1 + MARGIN) == (0, True), f"{code} after {seconds:.2f} s"


@ONE_KIND
def test_a_deaf_peer_over_tls_is_cut(serve, kind, stack, tmp_path):
    """TLS has a goodbye of its own, which such a peer does not answer either."""
    tls = make_certificate(tmp_path)
    options = ("--cert", tls.cert, "--key", tls.key)
    server = serve(APP, *options, kind=kind, tls=tls.context, settings={"DRAIN_TIMEOUT": 1})
    deaf = stack.enter_context(server.open())
    deaf.sendall(request_head("GET", "/flood", HANDSHAKE))
    assert deaf.recv(12) == b"HTTP/1.1 101"
    for path in ("/echo", "/"):  # one that has heard, and one that is idle, without an answer
        quiet = asked(server, stack, path)
        assert quiet.recv(8) == b"HTTP/1.1"
    wait_until(lambda: json.loads(server.fetch("/sent").body)[0] > 10, what="the flood")
    started = stop(server)
    code = server.wait()
    seconds = time.monotonic() - started
    assert (code, seconds <= 1 + MARGIN) == (0, True), f"{code} after {seconds:.2f} s"


def test_what_was_written_stays_whole(serve, stack):
    """What views print and log before their process is cut is in the log, line by line."""
    server = serve(APP, settings={"DRAIN_TIMEOUT": 2})
    peer = opened(server, stack, "/print")
    started = stop(server)
    assert peer.goodbye() == 1012
    assert server.wait() == 0
    assert time.monotonic() - started <= 2 + MARGIN
    # Two streams into one file: where Python flushes the one, the other may have a line.
    logged = re.findall(r"logged (\d{5})\n", server.log())
    assert logged == [f"{number:05}" for number in range(2000)]
    others = re.compile(r"logged \d{5}\n|(?:The view|INFO|WARNING|ERROR).*\n")
    lines = others.sub("", server.log()).splitlines()
    printed = [line for line in lines if line.startswith("line ")]
    assert printed == [f"line {number:05} " + "x" * 50 for number in range(2000)]


def somebody_listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_a_log_that_nobody_reads(tmp_path, signals):
    """Log and output go to a pipe that is full: the process ends all the same."""
    source = """
    import sys
    from flask import Flask
    from flask_websockets import WebSockets

    app = Flask(__name__)
    app.config["WEBSOCKETS_DRAIN_TIMEOUT"] = 1
    WebSockets(app)

    @app.get("/")
    def index():
        open("asked", "w").close()
        sys.stderr.write("x" * 100_000)
        return "never"
    """
    (tmp_path / "served.py").write_text(textwrap.dedent(source))
    port, (reading, writing) = free_port(), os.pipe()
    command = [sys.executable, "-m", "flask", "--app", "served", "websockets", "serve"]
    with open(reading, "rb"), open(writing, "wb") as pipe:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=tmp_path, stdout=pipe, stderr=pipe
        )
        try:
            wait_until(lambda: somebody_listens(port), START_TIMEOUT, "the server")
            with socket.create_connection(("127.0.0.1", port), TIMEOUT) as client:
                client.sendall(request_head("GET", "/"))
                wait_until((tmp_path / "asked").exists, TIMEOUT, "the request")
                for _ in range(signals):
                    process.send_signal(signal.SIGTERM)
                assert process.wait(1 + MARGIN) in (0, signals - 1)
        finally:
            process.kill()
            process.wait(TIMEOUT)


# -- a second signal ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(serve, number, stack):
    """Whoever is still there is cut, a view that sleeps as well."""
    server = serve(APP, settings={"DRAIN_TIMEOUT": 30, "CLOSE_TIMEOUT": 30})
    opened(server, stack, "/sleep")  # it is busy: it would be told at half the time
    held = opened(server, stack, "/hold")
    server.signal(number)
    assert held.goodbye() == 1012  # it has heard the first one
    assert server.process.poll() is None
    server.signal(number)
    server.wait(5)
