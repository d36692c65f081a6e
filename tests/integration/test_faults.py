"""What networks and clients do, on real sockets: who is unblocked, when, and what remains."""

from __future__ import annotations

import json
import signal
import time
import urllib.request

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from .raw_client import RawClient
from .waiting import wait_until

APP = """
    import dataclasses, threading, time
    from flask import Flask
    from flask_websockets import ConnectionClosed, WebSocket, WebSockets

    app = Flask(__name__)
    app.config.update(
        WEBSOCKETS_SEND_TIMEOUT=1, WEBSOCKETS_CLOSE_TIMEOUT=1, WEBSOCKETS_OUTBOX_MESSAGES=20,
        WEBSOCKETS_MAX_CONNECTIONS=20, WEBSOCKETS_OUTBOX_BYTES=100_000_000,
    )
    websockets = WebSockets(app)
    go = threading.Event()
    log = []
    open_now = []

    def watch(name, ws, run):
        open_now.append(ws)
        try:
            run()
        except ConnectionClosed as error:
            log.append([name, error.code])
            raise
        finally:
            open_now.remove(ws)

    @websockets.route("/flood")
    def flood(ws):
        def run():
            for number in range(100_000):
                ws.send(f"{number} ".ljust(65536, "x"))
        watch("flood", ws, run)

    @websockets.route("/some")
    def some(ws):
        def run():
            ws.send("x" * 20_000_000)  # more than the kernel takes: the rest lies in uvicorn
            while True:
                ws.receive()
        watch("some", ws, run)

    @websockets.route("/late")
    def late(ws):
        def run():
            for number in range(200):
                ws.send(f"{number} ".ljust(65536, "x"))
            ws.receive()
        watch("late", ws, run)

    @websockets.route("/listen")
    def listen(ws):
        watch("listen", ws, lambda: [ws.receive() for _ in range(10)])

    @websockets.route("/busy")
    def busy(ws):
        ws.send("busy")
        assert go.wait(30)
        for data in ws.iter_data():
            ws.send(data)

    @websockets.route("/stuck")
    def stuck(ws):
        ws.accept()
        time.sleep(600)

    @websockets.route("/subscribe")
    def subscribe(ws):
        def run():
            with websockets.subscribe(ws, "news"):
                ws.send("subscribed")
                for _ in ws.iter_data():
                    pass
                ws.receive()
        watch("subscribe", ws, run)

    @websockets.route("/raise")
    def raise_(ws):
        ws.accept()
        raise RuntimeError("the secret")

    @websockets.route("/return")
    def return_(ws):
        pass

    @app.get("/state")
    def state():
        outbound = [ws.link.statistics()["outbound"].current_buffer_used for ws in open_now]
        return {"log": log, "outbound": outbound, **dataclasses.asdict(websockets.stats())}

    @app.get("/go")
    def release():
        go.set()
        return "go"

    @app.get("/publish/<int:count>")
    def publish(count):
        for number in range(count):
            websockets.publish(f"{number} ".ljust(65536, "x"), "news")
        return "published"

    asgi = websockets.asgi_app()
"""


def fetch(server, path):
    with urllib.request.urlopen(server.url(path), timeout=10) as response:
        return response.read()


def state(server):
    return json.loads(fetch(server, "/state"))


@pytest.fixture
def server(uvicorn_server, request):
    return uvicorn_server(APP, *getattr(request, "param", ()))


def quick_pings(function):
    """Pings every 0.3 s; a pong must come within 0.3 s."""
    options = ("--ws-ping-interval", "0.3", "--ws-ping-timeout", "0.3")
    return pytest.mark.parametrize("server", [options], indirect=True)(function)


def test_i11_a_peer_that_never_reads_is_cut(server):
    """Its view is unblocked by the send timeout of 1 s; thread, place and descriptor are free."""
    fetch(server, "/state")
    threads, descriptors = server.threads(), server.descriptors()
    with RawClient(server.port, "/flood", receive_buffer=4096) as client:
        assert client.status == 101
        # What the server does not take lies in the outbound stream: between the low-water
        # mark of 10 and the bound of 20, one of which the writer holds.
        wait_until(lambda: sum(state(server)["outbound"]) >= 9, what="a filled outbox")
        assert state(server)["outbound"][0] <= 20
        started = time.monotonic()
        wait_until(lambda: state(server)["log"] == [["flood", 1006]], 5, "the view's end")
        assert time.monotonic() - started < 1 + 1.5
        wait_until(lambda: state(server)["connections"] == 0)
        wait_until(lambda: server.descriptors() <= descriptors, 5, "the descriptor's end")
        wait_until(lambda: server.threads() <= threads)
        assert state(server)["aborted"] >= 1
        assert state(server)["view_threads"] == 0


def test_what_a_slow_peer_reads_late_is_in_order(server):
    """When the peer reads again before the timeout, stream and view go on where they were."""
    with RawClient(server.port, "/late", receive_buffer=4096) as client:
        wait_until(lambda: sum(state(server)["outbound"]) > 0)
        for number in range(200):
            assert client.receive().split()[0] == str(number).encode()
        assert state(server)["outbound"] == [0]


@quick_pings
def test_a_silent_peer_with_a_full_buffer_is_cut(server):
    """uvicorn closes for the missing pong and waits to flush for ever; the watch aborts."""
    fetch(server, "/state")
    descriptors = server.descriptors()
    with RawClient(server.port, "/some", receive_buffer=4096) as client:
        assert client.status == 101
        wait_until(lambda: state(server)["log"], 6, "the view's end")
        assert state(server)["log"][0][1] in (1005, 1006, 1011)
        wait_until(lambda: server.descriptors() <= descriptors, 6, "the descriptor's end")
        wait_until(lambda: state(server)["connections"] == 0)


@quick_pings
def test_a_silent_peer_is_noticed(server):
    """A peer that answers no ping ends within ping interval, timeout and a second."""
    with RawClient(server.port, "/listen") as client:
        client.send_text("hello")
        started = time.monotonic()
        wait_until(lambda: state(server)["log"], 5, "the view's end")
        assert time.monotonic() - started < 0.6 + 1.5
        assert state(server)["connections"] == 0


def test_a_reset_is_noticed(server):
    """A client that vanishes with a reset ends its view within a second."""
    client = RawClient(server.port, "/listen")
    client.send_text("hello")
    wait_until(lambda: state(server)["connections"] == 1)
    client.reset()
    started = time.monotonic()
    wait_until(lambda: state(server)["log"], 5, "the view's end")
    assert time.monotonic() - started < 1
    assert state(server)["log"][0][1] in (1005, 1006)


@quick_pings
def test_i10_a_busy_view_with_a_message_waiting_keeps_its_client(server):
    """Ten pings pass while the view does not receive; then it gets what waited."""
    with connect(server.ws_url("/busy"), max_size=None) as client:
        assert client.recv(timeout=5) == "busy"
        client.send("waiting")
        pongs = 0
        started = time.monotonic()
        while time.monotonic() - started < 3:
            with pytest.raises(TimeoutError):
                client.recv(timeout=0.5)  # answers the server's pings meanwhile
            pongs += 1
        fetch(server, "/go")
        assert client.recv(timeout=5) == "waiting"


def test_i6_a_slow_subscriber_hurts_nobody(server):
    """The one that does not read is closed as slow, the other gets every message."""
    with (
        RawClient(server.port, "/subscribe", receive_buffer=4096) as slow,
        connect(server.ws_url("/subscribe"), max_size=None, max_queue=None) as quick,
    ):
        assert slow.status == 101
        assert quick.recv(timeout=5) == "subscribed"
        wait_until(lambda: state(server)["subscriptions"] == 2)
        for _ in range(30):
            fetch(server, "/publish/5")
            assert [quick.recv(timeout=5).split()[0] for _ in range(5)] == list("01234")
        wait_until(lambda: state(server)["log"], 6)
        assert state(server)["log"] == [["subscribe", 1013]]
        assert state(server)["closed_slow"] == 1


def test_i12_every_connection_gets_a_goodbye(server):
    """1000 for a view that returns, 1011 without the reason for one that raises."""
    for path, code in (("/return", 1000), ("/raise", 1011)):
        with connect(server.ws_url(path)) as client:
            with pytest.raises(ConnectionClosed) as caught:
                client.recv(timeout=5)
            assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (code, "")
    wait_until(lambda: "RuntimeError: the secret" in server.log())
    assert server.log().count("RuntimeError: the secret") == 1


def test_above_the_limit_the_wire_says_503(server):
    """The 21st of 20 connections gets 503 with Retry-After, and HTTP goes on."""
    clients = [RawClient(server.port, "/listen") for _ in range(20)]
    wait_until(lambda: state(server)["connections"] == 20)
    with pytest.raises(InvalidStatus) as caught:
        connect(server.ws_url("/listen"))
    assert caught.value.response.status_code == 503
    assert caught.value.response.headers["Retry-After"] == "5"
    assert state(server)["view_threads"] == 20
    for client in clients:
        client.close()
    wait_until(lambda: state(server)["connections"] == 0)


@pytest.mark.parametrize(
    ("path", "sig"),
    [
        ("/stuck", signal.SIGTERM),
        ("/stuck", signal.SIGINT),  # after which uvicorn leaves the ending to Python
        ("/flood", signal.SIGTERM),
        ("/some", signal.SIGTERM),
    ],
)
def test_i9_a_stuck_view_or_peer_does_not_keep_the_server(server, path, sig):
    """A signal ends uvicorn within the timeouts of 1 s each, whatever hangs."""
    with RawClient(server.port, path, receive_buffer=4096) as client:
        assert client.status == 101
        wait_until(lambda: state(server)["connections"] == 1)
        if path == "/flood":
            wait_until(lambda: sum(state(server)["outbound"]) > 0)
        code, seconds = server.stop(sig)
    assert code in (0, -sig)
    assert seconds < 1 + 1 + 1 + 2
    if path == "/stuck":
        assert "The view of /stuck (endpoint stuck, peer 127.0.0.1) still runs" in server.log()


def test_fifty_requests_on_one_connection(server):
    """Keep-alive requests all answer 200: nothing leaks from one into the next."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    for _ in range(50):
        connection.request("GET", "/state")
        response = connection.getresponse()
        response.read()
        assert response.status == 200
    connection.close()
