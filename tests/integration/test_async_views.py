"""Async views beside sync ones and HTTP, on every server that runs them: asyncio and trio."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from .conftest import IMPLEMENTATIONS, ServerProcess, free_port
from .http_servers import HYPERCORN
from .raw_client import RawClient
from .waiting import wait_until

TIMEOUT = 10.0
#: Seconds of async_app.py: WEBSOCKETS_CLOSE_TIMEOUT, WEBSOCKETS_SEND_TIMEOUT.
CLOSE, SEND = 0.5, 1.0
#: Seconds that a loaded machine may be late.
MARGIN = 4.0

UVICORN = ["uvicorn", "--port", "{port}", "--no-access-log", "--timeout-graceful-shutdown", "5"]
SERVERS = {
    **{
        f"uvicorn-{name}": ["-m", *UVICORN, *options, "async_app:asgi"]
        for name, options in IMPLEMENTATIONS.items()
    },
    **{f"app.run-{name}": ["served.py"] for name in IMPLEMENTATIONS},
    "hypercorn-asyncio": ["-m", *HYPERCORN, "-k", "asyncio", "async_app:asgi"],
    "hypercorn-trio": ["-m", *HYPERCORN, "-k", "trio", "async_app:asgi"],
}
#: Without workers hypercorn 0.18.0 leaves SIGTERM alone under trio, and the process dies of it.
WORKER = ["-w", "1", "-k", "trio"]
#: Without ASGI there is no ASGI middleware.
DEVELOPMENT = [name for name in SERVERS if name.startswith("app.run")]


class Server:
    """One of the servers, and the questions that a test asks it."""

    def __init__(self, name: str, directory: Path, *, worker: bool = False) -> None:
        self.name = name
        port = free_port()
        shutil.copy(Path(__file__).with_name("async_app.py"), directory)
        if name in DEVELOPMENT:
            text = f"from async_app import app\napp.run(port={port}, threaded=True)\n"
            (directory / "served.py").write_text(text)
            if name.endswith("wsproto"):
                # uvicorn takes the websockets library wherever it finds it.
                (directory / "websockets.py").write_text("raise ImportError")
        parts = SERVERS[name]
        if worker:
            # The last of several options counts.
            parts = [*parts[:-1], *WORKER, parts[-1]]
        command = [part.replace("{port}", str(port)) for part in parts]
        self.process = ServerProcess(
            [sys.executable, *command], port, directory / "log.txt", directory
        )

    def connect(self, view: str, key: str, **options):
        return connect(self.process.ws_url(f"/ws/{view}/{key}"), **options)

    def ask(self, path: str, data: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.process.url(path), data)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return response.read()

    def stats(self) -> dict[str, int]:
        return json.loads(self.ask("/stats"))

    def records(self, key: str) -> list[str]:
        return json.loads(self.ask(f"/records/{key}"))

    def wait_for(self, key: str, what: str) -> list[str]:
        """Wait for a record, and return all that came until then."""

        def recorded():
            came = self.records(key)
            return came if what in came else None

        return wait_until(recorded, TIMEOUT, f"the record {what!r}")

    def kill(self) -> None:
        """End what still runs of it, a worker of its own first."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            workers = [int(pid) for pid in children.read_text().split()]
        except OSError:  # it has ended
            workers = []
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()

    def check_echo(self) -> None:
        """The server lives, and serves views of both kinds."""
        for view in ("echo", "sync-echo"):
            with self.connect(view, "check") as client:
                for data in ("text", b"binary"):
                    client.send(data)
                    assert client.recv(timeout=TIMEOUT) == data


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory):
    """Each server once for the module: its cases share it, and tell their records by keys."""
    server = Server(request.param, tmp_path_factory.mktemp(request.param))
    try:
        server.process.wait_until_listening()
        yield server
    finally:
        server.kill()


@pytest.fixture(params=SERVERS)
def fresh_server(request, tmp_path):
    """A server of the test's own, to end it."""
    server = Server(request.param, tmp_path, worker=request.param == "hypercorn-trio")
    try:
        server.process.wait_until_listening()
        yield server
    finally:
        server.kill()


@pytest.fixture
def key():
    """The key of a test's records."""
    return uuid.uuid4().hex


def how_closed(client):
    """The code and reason of the server's close frame."""
    with pytest.raises(ConnectionClosed) as caught:
        client.recv(timeout=TIMEOUT)
    return caught.value.rcvd.code, caught.value.rcvd.reason


# -- views of both kinds ----------------------------------------------------------------------


@pytest.mark.parametrize("view", ["echo", "sync-echo"])
def test_echo(server, key, view):
    """Text, binary and long messages come back, in their order."""
    with server.connect(view, key, max_size=None) as client:
        for data in ("text", b"binary", "x" * 200_000, "", b"\x00" * 70_000):
            client.send(data)
            assert client.recv(timeout=TIMEOUT) == data
        for number in range(50):
            client.send(str(number))
        assert [client.recv(timeout=TIMEOUT) for _ in range(50)] == [str(n) for n in range(50)]


@pytest.mark.parametrize("view", ["context", "sync-context"])
def test_i3_contexts(server, view):
    """Ten at once: each sees its own request, g, session and variables, before and after awaits."""
    keys = [uuid.uuid4().hex for _ in range(10)]
    with ExitStack() as stack:
        clients = {
            key: stack.enter_context(server.connect(view, f"{key}?user={key}")) for key in keys
        }
        for client in clients.values():
            assert "session=" in client.response.headers["Set-Cookie"]
            client.send("go")
        for key, client in clients.items():
            seen = json.loads(client.recv(timeout=TIMEOUT))
            path = f"/ws/{view}/{key}"
            first = seen[0]
            assert first[:4] == [path, key, key, "async_app"]
            assert first[4].endswith("/ws/echo/k")
            assert first[5] == ("unset" if server.name in DEVELOPMENT else path)
            assert seen == [first] * (6 if view == "context" else 3)


def test_channels(server, key):
    """What a sync view, an async view and an HTTP view publish reaches both kinds of view."""
    with server.connect("room", key) as one, server.connect("sync-room", key) as two:
        for client in (one, two):
            assert client.recv(timeout=TIMEOUT) == "subscribed"
        one.send("hello")
        assert two.recv(timeout=TIMEOUT) == "async: hello"
        two.send("hello")
        assert one.recv(timeout=TIMEOUT) == "sync: hello"
        server.ask(f"/publish/{key}", b"hello")
        for client in (one, two):  # and nothing that it said itself came before
            assert client.recv(timeout=TIMEOUT) == "HTTP: hello"
    wait_until(lambda: server.stats()["subscriptions"] == 0)


def test_order(server, key):
    """What one view sends, publishes, and publishes in a thread it awaits, keeps its order."""
    with server.connect("order", key) as client:
        for number in range(100):
            for verb in ("sent", "published", "threaded"):
                assert client.recv(timeout=TIMEOUT) == f"{verb} {number}"


def test_a_task_group_inside(server, key):
    """A view that sends and receives at the same time."""
    with server.connect("ticks", key) as client:
        assert [client.recv(timeout=TIMEOUT) for _ in range(3)] == ["tick 0", "tick 1", "tick 2"]
        client.send("stop")
        while client.recv(timeout=TIMEOUT) != "stopped":
            pass
        assert how_closed(client) == (1000, "")


def test_i8_http_beside_views(server, key):
    """While views of both kinds are open, ten requests meet: HTTP runs in parallel."""
    with ExitStack() as stack:
        for number in range(10):
            for view in ("receive", "sync-echo"):
                stack.enter_context(server.connect(view, f"{key}{number}"))
        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(server.ask, ["/meet"] * 10))
        assert set(answers) == {b"unset" if server.name in DEVELOPMENT else b"/meet"}


def test_i3_a_blocking_hook_does_not_stop_the_loop(server, key):
    """While before_request blocks for one connection, others echo; then it is accepted."""
    codes = []

    def visit():
        with server.connect("blocked", key) as client:
            codes.append(how_closed(client)[0])

    visitor = threading.Thread(target=visit)
    visitor.start()
    try:
        # The handshake timeout of 3 s is longer than an echo, and shorter than the wait.
        server.wait_for(key, "blocks")
        with server.connect("echo", "beside") as client:
            client.send("x")
            assert client.recv(timeout=TIMEOUT) == "x"
    finally:
        server.ask(f"/release/{key}", b"")
        visitor.join(TIMEOUT)
    assert codes == [1000]


def test_open_async_views_take_no_thread(server, key):
    """A hundred are open: the process has hardly more threads than before, and HTTP answers."""
    if server.name in DEVELOPMENT:
        pytest.skip("Werkzeug's server keeps a thread of its own for each connection")
    wait_until(lambda: server.stats()["view_threads"] == 0)
    before = server.process.threads()
    with ExitStack() as stack:
        clients = [
            stack.enter_context(server.connect("receive", f"{key}{number}"))
            for number in range(100)
        ]
        for client in clients:
            assert client.recv(timeout=TIMEOUT) == "waits"
        wait_until(lambda: server.stats()["view_threads"] == 0)
        assert server.stats()["view_tasks"] == 100
        wait_until(lambda: server.process.threads() <= before + 20)
    wait_until(lambda: server.stats()["view_tasks"] == 0)


# -- ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected", "told"),
    [
        ("return", (1000, ""), "nothing"),
        ("close", (4001, "enough"), "nothing"),
        ("abort", (4404, "Not Found"), None),
        ("error", (1011, ""), "RuntimeError"),
        ("exit", (1011, ""), "SystemExit"),
        ("interrupt", (1011, ""), "KeyboardInterrupt"),
        ("stop", (1011, ""), "Stop"),
    ],
)
def test_i12_every_connection_gets_a_goodbye(server, key, how, expected, told):
    """Each end has its code; teardown is told, in a thread; the error is logged once."""
    before = server.process.log().count("RuntimeError: the secret")
    with server.connect(f"end/{how}", key) as client:
        assert how_closed(client) == expected
    came = wait_until(lambda: server.records(key), TIMEOUT, "the teardown")
    assert len(came) == 1
    assert "on the loop" not in came[0]
    if told is not None:
        assert came == [f"teardown: {told}"]
    server.check_echo()
    assert server.process.log().count("RuntimeError: the secret") - before == (how == "error")


def test_a_refusal(server, key):
    """abort before the accept is the HTTP response."""
    with pytest.raises(InvalidStatus) as caught:
        server.connect("refuse", key)
    assert caught.value.response.status_code == 401
    server.wait_for(key, "teardown: nothing")


def test_a_view_that_neither_accepts_nor_refuses(server, key):
    """503 after the handshake timeout; the view learns it at its accept."""
    with pytest.raises(InvalidStatus) as caught:
        server.connect("silent", key, open_timeout=TIMEOUT)
    assert caught.value.response.status_code == 503
    server.ask(f"/release/{key}", b"")
    # The view may have been cancelled meanwhile: its close timeout runs since the 503.
    wait_until(lambda: any("teardown" in what for what in server.records(key)))
    assert len([what for what in server.records(key) if "teardown" in what]) == 1


@pytest.mark.parametrize("goodbye", [True, False])
def test_i5_a_view_that_sleeps_is_cancelled(server, key, goodbye):
    """When its client has said goodbye or vanished: its finally runs, awaits, then teardown."""
    client = RawClient(server.process.port, f"/ws/sleep/{key}")
    assert client.receive() == b"sleeps"
    if goodbye:
        # A close frame of 1000, masked with zeros (RFC 6455, section 5.5.1).
        client.socket.sendall(bytes((0x88, 0x82, 0, 0, 0, 0, 0x03, 0xE8)))
    else:
        client.reset()
    came = server.wait_for(key, "finally")
    assert came[:2] == ["cancelled", "finally"]
    came = wait_until(lambda: len(got := server.records(key)) > 2 and got)
    assert came[2].startswith("teardown: ")
    assert "on the loop" not in came[2]
    client.close()


def test_i5_a_view_that_receives_is_not_cancelled(server, key):
    """What came before the client left is delivered, and then ConnectionClosed is."""
    with server.connect("receive", key) as client:
        assert client.recv(timeout=TIMEOUT) == "waits"
        client.send("1")
        client.send("2")
    came = server.wait_for(key, "teardown: nothing")
    assert came == ["got 1", "got 2", "ConnectionClosed", "teardown: nothing"]


def test_i9_a_view_that_swallows_its_cancellation(fresh_server, key):
    """It is reported and counted, and the server serves on."""
    stuck = fresh_server.stats()["stuck_views"]
    with fresh_server.connect("swallow", key) as client:
        assert client.recv(timeout=TIMEOUT) == "sleeps"
    wait_until(lambda: fresh_server.stats()["stuck_views"] == stuck + 1)
    wait_until(lambda: fresh_server.stats()["connections"] == 0)
    stuck_view = f"/ws/swallow/{key} (endpoint swallow, peer 127.0.0.1)"
    assert f"The view of {stuck_view} still runs" in fresh_server.process.log()
    fresh_server.check_echo()


def test_a_loop_that_takes_no_answer(server, key):
    """``except Exception: continue`` around receive neither freezes the server nor stays."""
    with server.connect("stubborn", key) as client:
        assert client.recv(timeout=TIMEOUT) == "loops"
    server.check_echo()
    server.wait_for(key, "ended")


def test_i11_a_peer_that_never_reads(server, key):
    """The view's send raises ConnectionClosed after the send timeout."""
    with RawClient(server.process.port, f"/ws/flood/{key}", receive_buffer=4096) as client:
        assert client.status == 101
        server.wait_for(key, "ConnectionClosed 1006")
        server.check_echo()
    wait_until(lambda: server.stats()["connections"] == 0)


# -- the server's end -------------------------------------------------------------------------


def check_end(server, key, view, sig):
    """Open *view*, signal the server, and see how it and the view end."""
    if view == "flood" and server.name.startswith("hypercorn"):
        pytest.skip("hypercorn 0.18.0 waits without end for a peer that takes nothing")
    if server.name == "hypercorn-asyncio" and sys.version_info >= (3, 12):
        pytest.skip("hypercorn 0.18.0 waits without end for any open connection from 3.12 on")
    if view == "swallow" and server.name == "hypercorn-trio":
        pytest.skip("trio ends when all of its tasks have ended, whatever they do")
    with RawClient(server.process.port, f"/ws/{view}/{key}", receive_buffer=4096) as client:
        assert client.status == 101
        if view == "flood":
            wait_until(lambda: server.stats()["outbox_messages"] > 0)
        else:
            client.receive()
        code, seconds = server.process.stop(sig)
    assert code in (0, 130, -sig)
    # hypercorn waits 3 s for its connections, then cancels; uvicorn 5 s; then the lifespan.
    graceful = 3 if server.name.startswith("hypercorn") else 5
    assert seconds < graceful + 2 * CLOSE + SEND + MARGIN
    log = server.process.log()
    if server.name in DEVELOPMENT:
        return  # Werkzeug's server dies of the signal
    if view == "sleep":
        assert log.index(f"{key}: cancelled") < log.index(f"{key}: finally")
    if view == "receive":
        assert f"{key}: ConnectionClosed" in log


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize("view", ["sleep", "receive", "swallow", "flood", "sync-sleep", "room"])
def test_i9_the_server_ends(fresh_server, key, view):
    """A signal ends it within its own graceful time and ours, whatever a view does."""
    check_end(fresh_server, key, view, signal.SIGTERM)


@pytest.mark.parametrize("view", ["sleep", "swallow"])
@pytest.mark.parametrize("fresh_server", ["uvicorn-wsproto", "uvicorn-sansio"], indirect=True)
def test_i9_the_server_ends_by_sigint(fresh_server, key, view):
    """SIGINT, after which uvicorn leaves the ending to asyncio, does as well."""
    check_end(fresh_server, key, view, signal.SIGINT)
