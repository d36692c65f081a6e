"""What the older flask-websockets, for WSGI servers, promised in its published tests.

Its scenario: ``app.run`` in a child made by multiprocessing, two clients that echo, two that
subscribe, a publish over HTTP, and an end by ``terminate()`` while the views sleep for 1,000
seconds. And what it asserts of ``url_map``.

The older tests fork out of the test process. Other tests' threads may still run in this one, and
Python warns of a fork beside threads since 3.12, which is an error here. So the parent is a
program of its own, single-threaded, with ``-W error`` too; and since Python 3.14 no longer forks
by default, it starts its child in either way.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import urllib.parse
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest
from flask import Blueprint, Flask
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

import flask_websockets
from flask_websockets import WebSocket

from .waiting import wait_until

#: Seconds for one message or one answer, on a loaded machine.
PATIENCE = 10.0
#: Seconds in which a terminated server must be gone: SIGTERM ends it at once, whatever its views
#: do, and the rest is for the machine.
JOIN_SECONDS = 5.0

PROGRAM = """
    import json
    import multiprocessing
    import signal
    import time

    from flask import Flask, Response, make_response, request
    from flask_websockets import WebSocket, WebSockets

    app = Flask(__name__)
    websockets = WebSockets(app)

    @websockets.route("/echo")
    def echo(ws: WebSocket) -> None:
        for data in ws.iter_data():
            ws.send(data)

    @websockets.route("/subscribe")
    def subscribe(ws: WebSocket) -> None:
        channel = request.args.get("channel", default="", type=str)
        with websockets.subscribe(ws, [channel]):
            time.sleep(1000)

    @app.route("/publish")
    def publish() -> Response:
        data = request.args.get("data", default="", type=str)
        channel = request.args.get("channel", default="", type=str)
        websockets.publish(data, [channel])
        return make_response()

    @app.route("/stats")
    def stats():
        return {"subscriptions": websockets.stats().subscriptions}

    def serve() -> None:
        app.run(host="localhost", port={port})

    if __name__ == "__main__":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        server = multiprocessing.get_context("<method>").Process(target=serve)
        server.start()
        signal.sigwait([signal.SIGUSR1])  # the test has seen enough
        started = time.monotonic()
        server.terminate()
        server.join(<patience>)
        seconds = time.monotonic() - started
        report = {"alive": server.is_alive(), "exitcode": server.exitcode, "seconds": seconds}
        if server.is_alive():
            server.kill()
            server.join(<patience>)
        print("report:", json.dumps(report), flush=True)
"""


def get(server, path, **query):
    address = server.url(f"{path}?{urllib.parse.urlencode(query)}")
    with urllib.request.urlopen(address, timeout=PATIENCE) as response:
        assert response.status == 200
        return response.read()


@pytest.fixture
def program(start_server, implementation):
    """Start the program with one way of making its child, on one implementation."""
    # uvicorn takes the websockets library wherever it finds it, and wsproto otherwise.
    hidden = {"websockets.py": "raise ImportError"} if implementation == "wsproto" else {}

    servers = []

    def start(method):
        source = PROGRAM.replace("<method>", method).replace("<patience>", str(PATIENCE))
        command = [sys.executable, "-W", "error", "served.py"]
        servers.append(start_server(source, command, beside=hidden))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:  # the test has failed: its child must not stay
            children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
            for child in children.split():
                os.kill(int(child), signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_scenario(program, method):
    """Two clients echo, two subscribe, a publish over HTTP reaches both, and the server ends."""
    server = program(method)
    with connect(server.ws_url("/echo")) as one, connect(server.ws_url("/echo")) as two:
        # Twice: whoever got what the other one said finds it in the second round.
        for round_number in (1, 2):
            for client, data in ((one, f"from one {round_number}"), (two, b"from two\xff")):
                client.send(data)
                assert client.recv(timeout=PATIENCE) == data

    with ExitStack() as clients:
        one, two, other = (
            clients.enter_context(
                connect(server.ws_url(f"/subscribe?channel={name}"), close_timeout=PATIENCE)
            )
            for name in ("test", "test", "other")
        )
        # The connection is open before its view has subscribed it.
        wait_until(lambda: json.loads(get(server, "/stats"))["subscriptions"] == 3)
        get(server, "/publish", channel="test", data="hello from test")
        assert one.recv(timeout=PATIENCE) == "hello from test"
        assert two.recv(timeout=PATIENCE) == "hello from test"
        get(server, "/publish", channel="other", data="hello from other")
        assert other.recv(timeout=PATIENCE) == "hello from other"
    # The clients have left; three views still sleep.
    check_the_end(server)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_terminated_with_open_connections(program, method):
    """The server also ends while clients are connected; they see the end of the connection."""
    server = program(method)
    with connect(server.ws_url("/subscribe?channel=test"), close_timeout=PATIENCE) as client:
        wait_until(lambda: json.loads(get(server, "/stats"))["subscriptions"] == 1)
        check_the_end(server)
        with pytest.raises(ConnectionClosedError):
            client.recv(timeout=PATIENCE)


def check_the_end(server):
    """Let the parent terminate its child; the child is gone in time, the parent has no error."""
    code, _ = server.stop(signal.SIGUSR1, timeout=3 * PATIENCE)
    log = server.log()
    assert code == 0, log
    report = json.loads(log.rpartition("report: ")[2])
    assert not report["alive"]
    assert report["exitcode"] == -signal.SIGTERM
    assert report["seconds"] < JOIN_SECONDS
    assert "Traceback" not in log
    assert "Warning" not in log.replace("WARNING: This is a development server", "")


# -- the older package's url_map assertions ---------------------------------------------------


def test_created_directly():
    """WebSockets(app): the rule is there at once, and it is a WebSocket's."""
    app = Flask(__name__, static_folder=None)
    sock = flask_websockets.WebSockets(app)

    @sock.route("/ws")
    def ws(_ws: WebSocket) -> None:
        pass

    assert app.url_map._rules[0].rule == "/ws"
    assert app.url_map._rules[0].websocket is True
    assert len(app.url_map._rules) == 1


def test_created_indirectly():
    """A route made before init_app comes with it."""
    app = Flask(__name__, static_folder=None)
    sock = flask_websockets.WebSockets()

    @sock.route("/ws")
    def ws(_ws: WebSocket) -> None:
        pass

    assert app.url_map._rules == []
    sock.init_app(app)
    assert app.url_map._rules[0].rule == "/ws"
    assert app.url_map._rules[0].websocket is True
    assert len(app.url_map._rules) == 1


def test_created_on_a_blueprint():
    """A blueprint's route comes when the blueprint does, and those of the object stay its own."""
    app = Flask(__name__, static_folder=None)
    bp = Blueprint("bp", __name__)
    sock = flask_websockets.WebSockets()

    @sock.route("/ws", bp=bp)
    def ws(_ws: WebSocket) -> None:
        pass

    sock.init_app(app)
    assert app.url_map._rules == []
    app.register_blueprint(bp, url_prefix="/bp")

    @sock.route("/ws")
    def ws2(_ws: WebSocket) -> None:
        pass

    first, second = app.url_map._rules
    assert (first.rule, first.websocket) == ("/bp/ws", True)
    assert (second.rule, second.websocket) == ("/ws", True)
