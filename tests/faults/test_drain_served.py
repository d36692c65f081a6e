"""Drains on real servers: by SIGTERM under ``serve``, and by ``websockets.drain()`` anywhere."""

from __future__ import annotations

import json
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ..integration.conftest import IMPLEMENTATIONS, free_port
from ..integration.serving import (
    CLOSE,
    HANDSHAKE,
    KINDS,
    MARGIN,
    TEXT,
    TIMEOUT,
    Peer,
    Served,
    Start,
    read_answer,
    request_head,
    serving,
)
from ..integration.waiting import wait_until

APP = """
    import asyncio
    import logging
    import os
    import threading
    import time
    from dataclasses import asdict

    from flask import Flask, request
    from flask_websockets import ConnectionClosed, WebSockets, draining

    app = Flask(__name__)
    app.config.from_prefixed_env()
    websockets = WebSockets(app)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    release = threading.Event()
    seen = []
    sent = [0]

    @app.get("/")
    def index():
        return "hello"

    @app.get("/seen")
    def show():
        return seen

    @app.get("/sent")
    def count():
        return sent

    @app.get("/stats")
    def stats():
        return asdict(websockets.stats())

    @app.get("/release")
    def let_go():
        release.set()
        return "released"

    @app.get("/drain/<timeout>")
    def drain(timeout):
        websockets.drain(float(timeout))
        return "drained"

    @app.get("/drain-in-thread/<timeout>")
    def drain_in_thread(timeout):
        threading.Thread(target=websockets.drain, args=(float(timeout),), daemon=True).start()
        return "started"

    @draining.connect_via(app)
    def goodbye(app, **extra):
        if os.environ.get("RECEIVER") == "hangs":
            seen.append("receiver")
            time.sleep(600)
        websockets.publish("back soon", "everybody")

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

    @websockets.route("/everybody")
    def everybody(ws):
        with websockets.subscribe(ws, "everybody"):
            ws.send("ready")
            ws.wait_closed()

    @websockets.route("/busy")
    def busy(ws):
        ws.send("ready")
        try:
            while True:
                data = ws.receive()
                seen.append(data)
                release.wait(60)
                ws.send(f"re: {data}")
        except ConnectionClosed as closed:
            print("the busy view saw", closed.code, flush=True)

    @websockets.route("/async-busy")
    async def async_busy(ws):
        await ws.send("ready")
        try:
            while True:
                data = await ws.receive()
                seen.append(data)
                await asyncio.to_thread(release.wait, 60)
                await ws.send(f"re: {data}")
        except ConnectionClosed as closed:
            print("the busy view saw", closed.code, flush=True)

    @websockets.route("/sleep/<int:number>")
    def sleep(ws, number):
        ws.send("ready")
        time.sleep(600)  # here the sleepers stand

    @websockets.route("/other")
    def other(ws):
        ws.send("ready")
        threading.Event().wait(600)  # here the other stands

    @websockets.route("/swallow")
    async def swallow(ws):
        await ws.send("ready")
        while True:
            try:
                await asyncio.sleep(600)  # here the async view stands
            except asyncio.CancelledError:
                pass

    @websockets.route("/flood")
    def flood(ws):
        data = bytes(60_000)
        while True:
            ws.send(data)
            sent[0] += 1

    asgi = websockets.asgi_app()

    if __name__ == "__main__":
        app.run(port={port})
"""

#: Seconds in which something happens that is promised to happen at once.
AT_ONCE = 3.0


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
def stack() -> Iterator[ExitStack]:
    """Closes what a test opens."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=IMPLEMENTATIONS)
def bare(request: pytest.FixtureRequest, serve: Start) -> Callable[..., Served]:
    """Serve with uvicorn's own command, once with each implementation."""

    def start(**settings: Any) -> Served:
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", "--port", str(port), "--no-access-log"]
        command += [*IMPLEMENTATIONS[request.param], "served:asgi"]
        return serve(APP, command=command, port=port, settings=settings)

    return start


def opened(server: Served, stack: ExitStack, path: str, **options: Any) -> Peer:
    """A peer whose view runs."""
    peer = stack.enter_context(Peer(server.port, path, **options))
    assert peer.frame() == (TEXT, b"ready")
    return peer


def fetch(server: Served, path: str) -> Any:
    return json.loads(server.fetch(path).body)


def fill_buffers(server: Served, stack: ExitStack) -> Peer:
    """A peer that never reads, and a view whose send waits for it."""
    deaf = stack.enter_context(Peer(server.port, "/flood", receive_buffer=4096))
    counts = [-1] * 5

    def stuck() -> bool:
        counts.append(fetch(server, "/sent")[0])
        return counts[-1] > 0 and len(set(counts[-5:])) == 1

    wait_until(stuck, what="a full buffer")
    return deaf


def goodbyes(peers: list[Peer], patience: float) -> list[float]:
    """When each was closed, on the monotonic clock; each with 1012, which is answered."""
    moments = []
    with selectors.DefaultSelector() as selector:
        for peer in peers:
            selector.register(peer.socket, selectors.EVENT_READ, peer)
        deadline = time.monotonic() + patience
        while selector.get_map():
            ready = selector.select(deadline - time.monotonic())
            assert ready, f"{len(selector.get_map())} of {len(peers)} were not told in time"
            for key, _ in ready:
                moments.append(time.monotonic())
                assert key.data.goodbye() == 1012
                selector.unregister(key.fileobj)
    return moments


def refused(server: Served) -> None:
    """A handshake gets 503 and is told when to come back."""
    with server.open() as connection:
        connection.sendall(request_head("GET", "/echo", HANDSHAKE))
        answer = read_answer(connection)
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) > 0


def over_in_time(server: Served, started: float, timeout: float) -> None:
    """It ends with 0, within the drain timeout and a second."""
    code = server.wait()
    seconds = time.monotonic() - started
    assert (code, seconds <= timeout + MARGIN) == (0, True), f"{code} after {seconds:.2f} s"


def stop(server: Served) -> float:
    """Signal the server; when."""
    started = time.monotonic()
    server.signal(signal.SIGTERM)
    return started


# -- SIGTERM under serve --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_thousand_connections(serve, kind, stack):
    """All get 1012 before half the timeout, in batches, not all at once; then it ends."""
    timeout = 10
    server = serve(APP, kind=kind, settings={"DRAIN_TIMEOUT": timeout})
    peers = [
        opened(server, stack, "/async-echo" if number % 2 else "/echo") for number in range(1000)
    ]
    started = stop(server)
    moments = goodbyes(peers, timeout)
    assert moments[-1] - started <= timeout / 2 + MARGIN
    # A hundred each 0.1 s make 0.9 s from the first to the last.
    assert moments[-1] - moments[0] >= 0.4, "everybody would come back at the same moment"
    over_in_time(server, started, timeout)
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("path", ["/busy", "/async-busy"])
def test_a_busy_view_finishes(serve, kind, stack, path):
    """Its replies to what it had received arrive; then it is closed, and the server ends."""
    server = serve(APP, kind=kind)
    peer, witness = opened(server, stack, path), opened(server, stack, "/echo")
    for word in ("one", "two"):
        peer.send_text(word)
    wait_until(lambda: "one" in fetch(server, "/seen"), what="the busy view")
    wait_until(lambda: fetch(server, "/stats")["inbox_messages"] == 1, what="its inbox")
    started = stop(server)
    assert witness.goodbye() == 1012
    assert server.fetch("/release").body == b"released"
    for word in (b"one", b"two"):
        assert peer.frame() == (TEXT, b"re: " + word)
    assert peer.goodbye() == 1012
    over_in_time(server, started, 10)  # half of the drain timeout: nobody is waited for
    assert "the busy view saw 1012" in server.log()
    assert "Traceback" not in server.log()


def test_stuck_views_are_named(serve, kind, stack):
    """By endpoint, with the line where they stand; equal ones in one line with their number."""
    server = serve(APP, kind=kind, settings={"DRAIN_TIMEOUT": 1})
    paths = ["/sleep/1", "/sleep/2", "/sleep/3", "/other", "/swallow"]
    peers = [opened(server, stack, path) for path in paths]
    started = stop(server)
    for peer in peers:  # at half the time
        assert peer.goodbye() == 1012
    over_in_time(server, started, 1)
    log = server.log()
    for place in ("the sleepers stand", "the other stands", "the async view stands"):
        assert log.count(f"# here {place}") == 1, log
    lines = [line for line in log.splitlines() if "still run" in line]
    assert len(lines) == 3, log
    for endpoint, number in (("sleep", "3"), ("other", ""), ("swallow", "")):
        assert any(endpoint in line and number in line for line in lines), log


def test_peers_that_never_read(serve, kind, stack):
    """Three of them, whose buffers are full, beside others that hear everything."""
    server = serve(APP, kind=kind, settings={"DRAIN_TIMEOUT": 1.5})
    for _ in range(3):
        fill_buffers(server, stack)
    peers = [opened(server, stack, "/echo") for _ in range(10)]
    started = stop(server)
    goodbyes(peers, TIMEOUT)
    over_in_time(server, started, 1.5)


def test_the_goodbye_of_the_application(serve, kind, stack):
    """What a receiver of ``draining`` publishes comes before the 1012."""
    server = serve(APP, kind=kind)
    peers = [opened(server, stack, "/everybody") for _ in range(20)]
    started = stop(server)
    for peer in peers:
        assert peer.frame() == (TEXT, b"back soon")
    goodbyes(peers, TIMEOUT)
    over_in_time(server, started, 10)
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("signals", [1, 2])
def test_a_receiver_that_hangs(serve, stack, monkeypatch, signals):
    """It costs a quarter of the time and no more; a second SIGTERM ends it at once."""
    monkeypatch.setenv("RECEIVER", "hangs")
    timeout = 2 if signals == 1 else 30
    server = serve(APP, settings={"DRAIN_TIMEOUT": timeout})
    peers = [opened(server, stack, path) for path in ("/everybody", "/echo")]
    started = stop(server)
    wait_until(lambda: "receiver" in fetch(server, "/seen"), what="the receiver")
    refused(server)
    if signals == 1:
        moments = goodbyes(peers, TIMEOUT)
        assert moments[0] - started >= timeout / 4 - 0.1
        over_in_time(server, started, timeout)
    else:
        server.signal(signal.SIGTERM)
        server.wait(AT_ONCE)


def test_a_second_sigterm_in_the_middle_of_the_batches(serve, stack):
    """It ends at once, though not everybody was told."""
    server = serve(APP, settings={"DRAIN_TIMEOUT": 60})
    peers = [opened(server, stack, "/echo") for _ in range(300)]
    stop(server)
    with selectors.DefaultSelector() as selector:
        for peer in peers:
            selector.register(peer.socket, selectors.EVENT_READ)
        assert selector.select(TIMEOUT), "nobody was told"
    server.signal(signal.SIGTERM)
    server.wait(AT_ONCE)


@pytest.mark.parametrize("path", ["/drain/20", "/drain-in-thread/60"])
def test_a_drain_and_then_sigterm(serve, stack, path):
    """After a drain, or in the middle of a longer one: the server ends in its own time."""
    server = serve(APP, settings={"DRAIN_TIMEOUT": 1.5})
    peer = opened(server, stack, "/echo")
    if "thread" in path:
        opened(server, stack, "/sleep/1")
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.append(server.fetch(path).body))
    asking.start()
    assert peer.goodbye() == 1012
    asking.join(TIMEOUT)
    assert answers in ([b"drained"], [b"started"])
    refused(server)
    over_in_time(server, stop(server), 1.5)
    assert "Traceback" not in server.log()


# -- anywhere else --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/drain/60", "/drain-in-thread/60"])
def test_drain_on_bare_uvicorn(bare, stack, path):
    """Everybody is told, handshakes get 503, and the process lives on and answers HTTP."""
    server = bare()
    peers = [opened(server, stack, "/async-echo" if n % 2 else "/echo") for n in range(40)]
    busy = opened(server, stack, "/busy")
    busy.send_text("one")
    wait_until(lambda: "one" in fetch(server, "/seen"), what="the busy view")
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.append(server.fetch(path).body))
    asking.start()
    goodbyes(peers, TIMEOUT)
    refused(server)
    assert server.fetch("/release").body == b"released"
    assert busy.frame() == (TEXT, b"re: one")
    assert busy.goodbye() == 1012
    asking.join(TIMEOUT)
    assert answers in ([b"drained"], [b"started"])
    wait_until(lambda: not fetch(server, "/stats")["connections"], what="the last one's end")
    for _ in range(3):
        assert server.fetch("/").body == b"hello"
        refused(server)
    stats = fetch(server, "/stats")
    assert stats["connections"] == stats["view_threads"] == stats["view_tasks"] == 0
    assert stats["refused_draining"] == 4
    assert stats["stuck_views"] == 0
    assert server.process.poll() is None
    assert "Traceback" not in server.log()
    server.signal(signal.SIGTERM)
    server.wait(AT_ONCE)


def test_a_drain_on_bare_uvicorn_cuts_what_is_left(bare, stack):
    """A view that sleeps and a peer that never reads: gone at the timeout, and so is the socket."""
    server = bare()
    server.fetch("/")
    descriptors = server.descriptors()
    sleeper = opened(server, stack, "/sleep/1")
    fill_buffers(server, stack)
    started = time.monotonic()
    assert server.fetch("/drain/1").body == b"drained"
    assert time.monotonic() - started <= 1 + MARGIN
    assert sleeper.goodbye() == 1012
    assert fetch(server, "/stats")["connections"] == 0
    wait_until(lambda: server.descriptors() <= descriptors, what="the sockets' end")
    assert "# here the sleepers stand" in server.log()
    assert server.fetch("/").body == b"hello"


@pytest.mark.parametrize("path", ["/sleep/1", "/swallow"])
def test_sigterm_on_bare_uvicorn_is_bounded(bare, stack, path):
    """uvicorn tells everybody at once, and we bound the wait for the views."""
    server = bare(CLOSE_TIMEOUT=0.5)
    peers = [opened(server, stack, each) for each in ("/echo", "/async-echo", path)]
    stop(server)
    goodbyes(peers, TIMEOUT)
    server.wait(0.5 * 3 + AT_ONCE)
    assert "still runs" in server.log()


def test_drain_under_app_run(serve, stack):
    """The development server's connections leave, too, and it goes on."""
    port = free_port()
    server = serve(APP, command=[sys.executable, "served.py"], port=port)
    peer = opened(server, stack, "/everybody")
    assert server.fetch("/drain/60").body == b"drained"
    assert peer.frame() == (TEXT, b"back soon")
    opcode, data = peer.frame()
    assert (opcode, data) == (CLOSE, (1012).to_bytes(2, "big") + b"the server stops")
    refused(server)
    assert server.fetch("/").body == b"hello"
