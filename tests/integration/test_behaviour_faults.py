"""The behaviour suite, faults: what clients, views and operators do to every server.

``tests/faults`` does all of it, and more, to uvicorn. What a server cannot do stands in
``known_servers.py``, and for each such case another one here sees that the server and its other
clients survive. The table "Faults" of docs/reference/servers is made of both.
"""

from __future__ import annotations

import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from . import behaviour_drivers, servers_page
from .behaviour_drivers import OverTheWire, Serving, children, chosen
from .conftest import ServerProcess, free_port
from .known_servers import FAULTS, KNOWN, SERVER_OF, SERVERS
from .serving import CLOSE, HANDSHAKE, TEXT, Peer, request_head, seconds_until_cut
from .waiting import wait_until

driver = behaviour_drivers.driver

#: What the application has set, in seconds; and how late a promise may be kept on a busy machine.
SEND_TIMEOUT = CLOSE_TIMEOUT = INBOX_TIMEOUT = 1.0
MARGIN = 2.0
MAX_CONNECTIONS = 12
INBOX_MESSAGES = 20

MIB = 1024 * 1024
#: Bytes that a flooding view sends if somebody takes them.
FLOOD = 96 * MIB
#: Bytes of memory for what is on its way, and for what a busy server needs beside it.
PIECES = 12 * MIB
#: Bytes that are sent to a view that does not receive.
SENT = 24 * MIB
#: Bytes that a bomb inflates to.
BOMB = 64 * MIB

#: What ``fault_options`` and ``ping_options`` of a server set, in seconds.
OPTION = 1.0

APP = f"""
    import dataclasses, threading, time
    from collections import defaultdict
    from contextlib import contextmanager
    from flask import Flask, request
    from flask_websockets import ConnectionClosed, WebSockets

    app = Flask(__name__)
    app.config.update(
        WEBSOCKETS_SEND_TIMEOUT={SEND_TIMEOUT}, WEBSOCKETS_CLOSE_TIMEOUT={CLOSE_TIMEOUT},
        WEBSOCKETS_INBOX_TIMEOUT={INBOX_TIMEOUT}, WEBSOCKETS_INBOX_MESSAGES={INBOX_MESSAGES},
        WEBSOCKETS_MAX_CONNECTIONS={MAX_CONNECTIONS},
        WEBSOCKETS_MAX_MESSAGE_BYTES=1_000_000_000,  # the server's own limit is what is tested
    )
    websockets = WebSockets(app)
    notes = defaultdict(list)
    released = defaultdict(threading.Event)

    @websockets.identify
    def who():
        return request.args.get("user")

    @contextmanager
    def noted():
        mine = notes[request.args["key"]]
        mine.append(["began", None])
        try:
            yield
        except ConnectionClosed as closed:
            mine.append(["closed", closed.code])
        except BaseException as error:
            mine.append(["raised", repr(error)])
            raise
        else:
            mine.append(["returned", None])

    @app.get("/notes/<key>")
    def show_notes(key):
        return notes[key]

    @app.get("/stats")
    def stats():
        pages = int(open("/proc/self/statm").read().split()[1])
        return dict(dataclasses.asdict(websockets.stats()), resident=pages * 4096)

    @app.get("/pid")
    def pid():
        import os
        return str(os.getpid())

    @app.get("/hello")
    def hello():
        return "hello"

    @app.get("/release/<key>")
    def release(key):
        released[key].set()
        return "released"

    @app.get("/disconnect/<user>")
    def disconnect(user):
        return str(websockets.disconnect(user=user))

    @app.get("/drain")
    def drain():
        websockets.drain(8)
        return "drained"

    @websockets.route("/sync/listen")
    def listen(ws):
        with noted(), websockets.subscribe(ws, request.args["key"]):
            ws.send("ready")
            while True:
                ws.receive()

    @websockets.route("/async/listen")
    async def async_listen(ws):
        with noted():
            async with websockets.subscribe(ws, request.args["key"]):
                await ws.send("ready")
                while True:
                    await ws.receive()

    @websockets.route("/sync/flood")
    def flood(ws):
        with noted():
            for _ in range({FLOOD // 65_536}):
                ws.send("x" * 65_536)

    @websockets.route("/async/flood")
    async def async_flood(ws):
        with noted():
            for _ in range({FLOOD // 65_536}):
                await ws.send("x" * 65_536)

    @websockets.route("/echo", max_message_bytes=1000)
    def echo(ws):
        with noted():
            ws.accept()
            while True:
                ws.send(ws.receive())

    @websockets.route("/busy")
    def busy(ws):
        with noted():
            ws.send("ready")
            assert released[request.args["key"]].wait(30)
            while True:
                ws.send(ws.receive())

    @websockets.route("/sleeps")
    def sleeps(ws):
        ws.send("ready")
        time.sleep(600)

    asgi = websockets.asgi_app()
"""

CONTINUATION, BINARY, PING = 0x0, 0x2, 0x9
FIN, RSV1, RSV2, RSV3 = 0x80, 0x40, 0x20, 0x10

KINDS = ["sync", "async"]

#: A view of a connection that was cut sees one of these.
CUT = {1005, 1006}


def frame(first, data=b"", *, length=None, mask=True):
    """A frame, with a mask of zeros; *length* is what it says of itself."""
    length = len(data) if length is None else length
    bit = 0x80 if mask else 0
    if length < 126:
        head = bytes((first, bit | length))
    elif length < 65_536:
        head = bytes((first, bit | 126)) + length.to_bytes(2, "big")
    else:
        head = bytes((first, bit | 127)) + length.to_bytes(8, "big")
    return head + (bytes(4) if mask else b"") + data


#: Frames that no client may send, and the codes that may be the answer. Where a server cuts the
#: connection instead, neither its view nor the client sees a code.
BAD = {
    "length of 2^63": (frame(FIN | BINARY, length=1 << 63), {1002, 1009}),
    "invalid UTF-8": (frame(FIN | TEXT, b"\xff\xfe"), {1007}),
    "opcode 3": (frame(FIN | 0x3), {1002}),
    "opcode 11": (frame(FIN | 0xB), {1002}),
    "RSV1": (frame(FIN | RSV1 | TEXT, b"x"), {1002}),
    "RSV2": (frame(FIN | RSV2 | TEXT, b"x"), {1002}),
    "RSV3": (frame(FIN | RSV3 | BINARY, b"x"), {1002}),
    "unmasked": (frame(FIN | TEXT, b"plain", mask=False), {1002}),
    "a long ping": (frame(FIN | PING, bytes(126)), {1002}),
    "a ping in fragments": (frame(PING, b"x"), {1002}),
    "a continuation of nothing": (frame(FIN | CONTINUATION, b"x"), {1002}),
    "close with one byte": (frame(FIN | CLOSE, b"x"), {1002}),
    "close with 1005": (frame(FIN | CLOSE, (1005).to_bytes(2, "big")), {1002, 1005}),
    "no frame": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4, {1002}),
}

#: Headers beside those of a handshake, and the statuses that may be the answer; 0 for none, where
#: the connection is cut instead.
ODD = {
    "2500 subprotocols": ({"Sec-WebSocket-Protocol": ", ".join(["x"] * 2500)}, {101, 400, 431}),
    "a bad key": ({"Sec-WebSocket-Key": "short"}, {101, 400}),
    "30,000 bytes": ({"X-Large": "x" * 30_000}, {101, 400, 431, 0}),
    "200 headers": ({f"X-Header-{number}": "x" for number in range(200)}, {101, 400, 431, 0}),
    "a huge header": ({"X-Huge": "x" * 1_000_000}, {400, 431, 0}),
}

HEAD = request_head("GET", "/echo?key=slow", HANDSHAKE)
#: What there is of a handshake that does not go on.
SLOW = {"nothing": b"", "half a line": HEAD[:20], "all but the end": HEAD[:-2]}


# --- Servers -------------------------------------------------------------------------------------


class Scene(OverTheWire):
    """A way to a server for clients that do what they should not."""

    def path(self, view, name="", **query):
        """The path of a view that notes what it sees under this name."""
        return f"/{view}?key={self.key}{name}" + "".join(f"&{k}={v}" for k, v in query.items())

    def peer(self, view, name="", **options):
        """A client that does nothing by itself, accepted by a view."""
        peer = Peer(self.port, self.path(view, name), **options)
        assert peer.status == 101
        return peer

    def noted(self, name=""):
        return self.get(f"/notes/{self.key}{name}").json()

    def ended(self, name="", timeout=MARGIN):
        """Wait for the end of a view: how it ended, and the code of its ConnectionClosed."""
        notes = wait_until(lambda: self.noted(name)[1:], timeout, f"the end of the view {name!r}")
        return tuple(notes[0])

    def how_it_ended(self, name, timeout):
        """Likewise; None if it did not."""
        with suppress(TimeoutError):
            return self.ended(name, timeout)
        return None

    def left(self, timeout):
        """The connections that are left when this time is over."""
        with suppress(TimeoutError):
            self.connections(0, timeout)
        return self.stats()["connections"]

    def stats(self):
        return self.get("/stats").json()

    def connections(self, count, timeout=MARGIN):
        """Wait until there are so many."""
        wait_until(lambda: self.stats()["connections"] == count, timeout, f"{count} connections")

    def answered(self, head, patience=1.0):
        """The status of the answer to a request; 0 if the connection was cut instead."""
        with socket.create_connection(("127.0.0.1", self.port), patience) as connection:
            try:
                connection.sendall(head)
                data = connection.recv(4096)
            except ConnectionError:
                data = b""
        return int(data.split()[1]) if data else 0


def pytest_generate_tests(metafunc):
    if "serving" in metafunc.fixturenames:
        servers = metafunc.config.getoption("--servers")
        names = [name for name in chosen(servers) if name in SERVER_OF]
        if servers == "all":  # one way to run each is enough
            names = [next(iter(server.variants)) for server in SERVERS]
        metafunc.parametrize("serving", names, indirect=True, scope="module")


def start(name, directory, *options):
    """Start a server of the matrix; who asks for it waits until it listens."""
    (directory / "served.py").write_text(textwrap.dedent(APP))
    server, port = SERVER_OF[name], free_port()
    # Not installed is a failure: whoever asks for a server wants it tested.
    version(server.distribution)
    *command, app = server.command(name, "served:asgi")
    command = [part.replace("{port}", str(port)) for part in command]
    interpreter = [sys.executable, "-W", "error", *server.interpreter_options, "-m"]
    log = directory / "log.txt"
    return ServerProcess([*interpreter, *command, *options, app], port, log, directory)


def end(process):
    """Kill a server, and what is left of its own processes; look through its log."""
    workers = children(process.pid)
    process.kill()
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # Servers trace back to themselves what such clients send; we have no part in it.
    blocks = re.findall(r"Traceback \(most recent.*\n(?:[ |+-].*\n)+.*", process.log())
    assert [block for block in blocks if "/flask_websockets/" in block] == []


@dataclass
class Served(Serving):
    """A server that runs several times, because not every test leaves it as it was."""

    #: As it comes, for most of the tests.
    plain: ServerProcess = None
    #: With its options that bound what a fault may cost.
    bounded: ServerProcess = None
    #: With these, and with pings that come often.
    pinging: ServerProcess = None
    #: As it comes, for what not every server survives.
    hostile: ServerProcess = None

    def scene(self, process):
        """A way to one of them, once it listens."""
        process.wait_until_listening()
        return Scene(process.port, SERVER_OF[self.name])


@pytest.fixture(scope="module")
def serving(request, tmp_path_factory):
    """The server, all of whose processes start at the same time."""
    served = Served(request.param, lambda: served.scene(served.plain))
    server = SERVER_OF[request.param]
    bounds = server.fault_options
    options = {
        "plain": (),
        "hostile": (),
        "bounded": bounds,
        "pinging": (*bounds, *server.ping_options),
    }
    with ExitStack() as stack:
        for name, some in options.items():
            process = start(request.param, tmp_path_factory.mktemp(name), *some)
            stack.callback(end, process)
            setattr(served, name, process)
        yield served


@pytest.fixture
def bounded(serving):
    return serving.scene(serving.bounded)


@pytest.fixture
def pinging(serving):
    return serving.scene(serving.pinging)


@pytest.fixture
def hostile(serving):
    return serving.scene(serving.hostile)


@pytest.fixture
def server(serving):
    """What is known of the server."""
    return SERVER_OF[serving.name]


@pytest.fixture
def scene(driver):
    """The server, and a bystander who must not notice anything."""
    with bystander(driver):
        yield driver


@contextmanager
def bystander(driver):
    """A client that did nothing wrong: it is served before, after, and over HTTP."""
    driver.connections(0, timeout=10)
    with bystander_of_others(driver):
        yield


@contextmanager
def bystander_of_others(driver):
    """Likewise, where others may be connected."""
    with driver.connect(driver.path("echo", "bystander")) as ws:
        ws.still_works()
        yield
        ws.still_works()
        assert driver.get("/hello").text == "hello"


@contextmanager
def peak_of(driver):
    """The highest resident memory of the server since the beginning, in bytes."""
    statm = Path(f"/proc/{driver.get('/pid').text}/statm")

    def resident():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    enough = threading.Event()
    seen = [resident()]

    def watch():
        while not enough.wait(0.005):
            seen.append(resident())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield lambda: max([*seen, resident()]) - seen[0]
    finally:
        enough.set()
        watching.join(10)


def is_held(driver, client):
    """Whether the server has the other end of a connection open.

    A socket that a process has closed, and the system still keeps, has no inode.
    """
    ours = client.socket.getsockname()[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        ports = [int(address.rpartition(":")[2], 16) for address in fields[1:3]]
        if ports == [driver.port, ours]:
            return fields[9] != "0"
    return False


def goodbye(peer, timeout=1.0):
    """The code of the server's close frame; 0 if it just cut the connection."""
    peer.socket.settimeout(timeout)
    try:
        while True:
            opcode, data = peer.frame()
            if opcode == CLOSE:
                return int.from_bytes(data[:2], "big")
    except (AssertionError, ConnectionError):
        return 0


def send_until_cut(peer, data, times):
    """Send again and again, until nobody takes it any more."""
    with suppress(ConnectionError, TimeoutError):
        for _ in range(times):
            peer.socket.sendall(data)


# --- Clients that do not take what is sent, or are gone ------------------------------------------


class TestVanishes:
    """A client is killed: its system says so."""

    @pytest.mark.parametrize("how", ["reset", "close"])
    def test_killed(self, scene, how):
        """The view is unblocked within a second, and its subscription is gone."""
        for kind in KINDS:
            client = scene.peer(f"{kind}/listen", kind)
            client.receive()
            assert scene.stats()["subscriptions"] == 1
            getattr(client, how)()
            outcome, code = scene.ended(kind, timeout=1)
            assert outcome == "closed"
            assert code in CUT
            wait_until(lambda: scene.stats()["subscriptions"] == 0, 1, "the subscription's end")
        scene.connections(1)


@pytest.fixture(scope="module")
def never_read(serving):
    """What became of two clients that never read, while a view sent to each at full speed."""
    driver, seen = serving.driver(), SimpleNamespace()
    with peak_of(driver) as peak, ExitStack() as stack:
        since = time.monotonic()
        peers = [
            stack.enter_context(driver.peer(f"{kind}/flood", kind, receive_buffer=4096))
            for kind in KINDS
        ]
        with bystander_of_others(driver):
            seen.ends = [driver.how_it_ended(kind, SEND_TIMEOUT + MARGIN) for kind in KINDS]
            seen.seconds = time.monotonic() - since
        seen.memory = peak()
        with suppress(TimeoutError):
            wait_until(lambda: not any(is_held(driver, peer) for peer in peers), 1)
        seen.held = sum(is_held(driver, peer) for peer in peers)
    seen.left = driver.left(MARGIN)
    return seen


class TestNeverReads:
    """A client takes nothing of what a view sends."""

    def test_unblocked(self, driver, never_read):
        """Its view gets ConnectionClosed when WEBSOCKETS_SEND_TIMEOUT is over."""
        assert [end and end[0] for end in never_read.ends] == ["closed"] * 2
        assert {code for _, code in never_read.ends} <= CUT
        assert never_read.seconds < SEND_TIMEOUT + MARGIN

    def test_memory(self, driver, never_read):
        """What waits for it is bounded by the outbox."""
        assert never_read.memory < PIECES, f"{never_read.memory / MIB:.0f} MiB"

    def test_descriptor(self, driver, never_read):
        """The server lets go of the connection within a second, though the client does not."""
        assert never_read.held == 0

    def test_hurts_nobody(self, driver, never_read):
        """Others were served meanwhile, and when the client goes nothing is left."""
        assert never_read.left == 0


# --- Views that do not take what comes -----------------------------------------------------------


@pytest.fixture(scope="module")
def deaf(serving):
    """What became of clients that send to a view which does not receive."""
    # Memory that a process had before, and has no use for now, would hide what it takes.
    driver, seen = serving.scene(serving.hostile), SimpleNamespace(code=None)
    before = driver.stats()["inbox_closed"]
    with (
        peak_of(driver) as peak,
        driver.peer("busy", "polite") as polite,
        driver.peer("busy", "rude") as rude,
        bystander_of_others(driver),
    ):
        polite.socket.sendall(frame(FIN | TEXT, bytes(100)) * 100)
        rude.socket.settimeout(INBOX_TIMEOUT + 0.5)
        send_until_cut(rude, frame(FIN | BINARY, bytes(65_536)), SENT // 65_536)
        seen.waiting = driver.stats()["inbox_messages"]
        with suppress(TimeoutError):
            seen.code = goodbye(polite, INBOX_TIMEOUT + MARGIN)
        with suppress(TimeoutError):
            wait_until(lambda: driver.stats()["inbox_closed"] - before == 2, MARGIN)
        seen.closed = driver.stats()["inbox_closed"] - before
        seen.memory = peak()
    for name in ("polite", "rude"):
        driver.get(f"/release/{driver.key}{name}")
    seen.ends = [driver.how_it_ended(name, MARGIN) for name in ("polite", "rude")]
    return seen


class TestDeafView:
    """A view that does not receive."""

    def test_closed(self, driver, deaf):
        """The inbox is bounded; the client is closed with 1013 after WEBSOCKETS_INBOX_TIMEOUT."""
        assert deaf.waiting <= 2 * INBOX_MESSAGES
        assert deaf.closed == 2
        assert deaf.code == driver.at_client(1013, "")[0]
        assert deaf.ends == [("closed", 1013)] * 2

    def test_memory(self, driver, deaf):
        """What a client sends meanwhile waits with it, not in the server's memory."""
        assert deaf.memory < PIECES, f"{deaf.memory / MIB:.0f} MiB"

    def test_busy(self, driver, server, pinging, slow):
        """One message that waits does not end the connection of a busy view."""
        with pinging.connect(pinging.path("busy")) as ws:
            assert ws.receive() == "ready"
            ws.send("waiting")
            with pytest.raises(TimeoutError):
                ws.receive(server.ping_seconds)  # the library answers pings meanwhile
            pinging.get(f"/release/{pinging.key}")
            assert ws.receive() == "waiting"
            ws.still_works()


# --- Messages and frames -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oversized(serving):
    """What became of a message without an end, and of one in fragments of one byte."""
    driver, seen = serving.scene(serving.bounded), SimpleNamespace(code=None)
    limit = SERVER_OF[serving.name].message_mib * MIB
    with peak_of(driver) as peak, bystander_of_others(driver):
        with (
            driver.peer("sync/listen", "endless") as endless,
            driver.peer("sync/listen", "tiny") as tiny,
        ):
            for client in (endless, tiny):
                client.receive()
                client.socket.settimeout(5)
                client.socket.sendall(frame(BINARY, b"x"))
            send_until_cut(tiny, frame(CONTINUATION, b"x") * 1000, 50)
            pieces = (limit + 32 * MIB) // 65_536
            send_until_cut(endless, frame(CONTINUATION, bytes(65_536)), pieces)
            with suppress(TimeoutError):
                seen.code = goodbye(endless, 5)
        seen.endless = driver.how_it_ended("endless", MARGIN)
        seen.tiny = driver.how_it_ended("tiny", MARGIN)
        seen.memory, seen.bound = peak(), limit + PIECES
    return seen


class TestMessages:
    """Messages that are too large, or that never end."""

    def test_too_large(self, scene):
        """At WEBSOCKETS_MAX_MESSAGE_BYTES it arrives; a byte above it ends in 1009."""
        with scene.connect(scene.path("echo", "large")) as ws:
            ws.send("x" * 1000)
            assert ws.receive() == "x" * 1000
            ws.send("x" * 1001)
            assert ws.closed()[0] == scene.at_client(1009, "")[0]
        assert scene.ended("large") == ("closed", 1009)

    def test_endless(self, driver, oversized):
        """Fragments without an end are cut at the server's limit, and the view is unblocked."""
        assert oversized.code in (0, 1009)
        assert oversized.endless is not None
        assert oversized.endless[0] == "closed"
        assert oversized.endless[1] in {1009, *CUT}

    def test_tiny_fragments(self, driver, oversized):
        """50,000 fragments of one byte are held or refused; the view is unblocked at the end."""
        assert oversized.tiny is not None
        assert oversized.tiny[0] == "closed"
        assert oversized.tiny[1] in {1002, 1009, *CUT}

    def test_memory(self, driver, oversized):
        """It is bounded by the server's limit of a message."""
        assert oversized.memory < oversized.bound, f"{oversized.memory / MIB:.0f} MiB"

    @pytest.mark.parametrize("length", [1 << 30, (1 << 63) - 1], ids=["1 GiB", "2^63 - 1"])
    def test_announced(self, scene, length):
        """A length that is announced, and nothing comes: nothing is held for it."""
        names = [f"much{number}" for number in range(5)]
        with peak_of(scene) as peak, ExitStack() as stack:
            for name in names:
                client = stack.enter_context(scene.peer("sync/listen", name))
                client.receive()
                client.socket.sendall(frame(FIN | BINARY, b"x", length=length))
            assert scene.get("/hello").text == "hello"
            stack.close()
            for name in names:
                outcome, code = scene.ended(name)
                assert outcome == "closed"
                assert code in {1002, 1009, *CUT}
            grown = peak()
        assert grown < PIECES, f"{grown / MIB:.0f} MiB"


@pytest.fixture(scope="module")
def bombed(serving):
    """What became of a message that inflates a thousandfold, where a client may send one."""
    driver, seen = serving.driver(), SimpleNamespace()
    offer = "permessage-deflate; client_max_window_bits"
    head = {**HANDSHAKE, "Sec-WebSocket-Extensions": offer}
    deflate = zlib.compressobj(9, zlib.DEFLATED, -12)
    packed = deflate.compress(bytes(BOMB)) + deflate.flush(zlib.Z_SYNC_FLUSH)
    message = frame(FIN | RSV1 | BINARY, packed.removesuffix(b"\0\0\xff\xff"))
    with (
        bystander_of_others(driver),
        socket.create_connection(("127.0.0.1", driver.port), 10) as connection,
    ):
        connection.sendall(request_head("GET", driver.path("sync/listen", "bomb"), head))
        wait_until(lambda: driver.noted("bomb"), 5, "the view's beginning")
        with peak_of(driver) as peak:
            with suppress(ConnectionError):
                connection.sendall(message)
            with suppress(TimeoutError):
                seconds_until_cut(connection, time.monotonic(), 1)
            seen.memory = peak()
    seen.end = driver.how_it_ended("bomb", MARGIN)
    seen.left = driver.left(MARGIN)
    return seen


class TestFrames:
    """Frames that no client may send."""

    @pytest.mark.parametrize("what", BAD)
    def test_bad(self, scene, what):
        """The connection ends, by a code or by a cut; the view sees ConnectionClosed alone."""
        data, codes = BAD[what]
        with scene.peer("sync/listen", "bad") as client:
            client.receive()
            client.socket.sendall(data)
            code = goodbye(client)
        outcome, seen = scene.ended("bad")
        assert outcome == "closed"
        assert code in {0, *codes}
        assert seen in codes | CUT

    def test_bomb(self, driver, server, bombed):
        """A bomb costs no more than twice the largest message."""
        bound = 2 * server.message_mib * MIB + PIECES / 2
        assert bombed.memory < bound, f"{bombed.memory / MIB:.0f} MiB"

    def test_bomb_hurts_nobody(self, driver, bombed):
        """Whatever it costs: its view is unblocked, and the others were served."""
        assert bombed.end is not None
        assert bombed.end[0] == "closed"
        assert bombed.end[1] in {1002, 1009, *CUT}
        assert bombed.left == 0


# --- Handshakes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(serving):
    """Handshakes that do not go on, all begun at the same time, and when that was."""
    bounded = serving.scene(serving.bounded)
    with ExitStack() as stack:
        connections = {}
        since = time.monotonic()
        for what, data in SLOW.items():
            connection = socket.create_connection(("127.0.0.1", bounded.port), 10)
            connections[what] = stack.enter_context(connection)
            connection.sendall(data)
        yield connections, since


class TestHandshakes:
    """Handshakes that are odd, slow, or too many."""

    @pytest.mark.parametrize("what", ODD)
    def test_odd(self, scene, what):
        """It is answered, or cut, at once."""
        headers, statuses = ODD[what]
        head = request_head("GET", scene.path("sync/listen", "odd"), {**HANDSHAKE, **headers})
        assert scene.answered(head) in statuses

    def test_odd_hurts_nobody(self, scene):
        """Whether they are answered or not: the others are served, and nothing is left."""
        for headers, _ in ODD.values():
            head = request_head("GET", scene.path("sync/listen", "odd"), {**HANDSHAKE, **headers})
            with suppress(TimeoutError):
                scene.answered(head, 0.1)
        scene.connections(1)

    @pytest.mark.parametrize("what", SLOW)
    def test_slow(self, driver, slow, what):
        """It is cut after the time that the server's option says."""
        connections, since = slow
        patience = max(OPTION + 1, time.monotonic() - since + 0.1)
        seconds_until_cut(connections[what], since, patience)

    def test_slow_hurts_nobody(self, scene):
        """60 of them take no thread and no place, and others are served."""
        before = scene.stats()
        with ExitStack() as stack:
            for data in [*SLOW.values()] * 20:
                connection = socket.create_connection(("127.0.0.1", scene.port), 10)
                stack.enter_context(connection)
                connection.sendall(data)
            now = scene.stats()
            scene.get("/hello")
        assert now["connections"] == before["connections"]
        assert now["view_threads"] == before["view_threads"]

    def test_above_the_limit(self, scene):
        """Above WEBSOCKETS_MAX_CONNECTIONS it is refused, and takes no thread."""
        with ExitStack() as stack:
            for number in range(MAX_CONNECTIONS - 1):
                peer = stack.enter_context(scene.peer("sync/listen", str(number)))
                peer.receive()
            before = scene.stats()
            assert before["connections"] == MAX_CONNECTIONS
            for _ in range(10):
                answer = scene.rejected(scene.path("sync/listen", "above"))
                assert answer.status == scene.status(503)
            now = scene.stats()
            assert now["refused_full"] - before["refused_full"] == 10
            assert now["view_threads"] == before["view_threads"]
            assert scene.get("/hello").text == "hello"
            assert scene.noted("above") == []

    def test_words_before_the_answer(self, driver, hostile):
        """A client that sends before it may, and goes: its view ends."""
        with bystander(hostile):
            head = request_head("GET", hostile.path("sync/listen", "early"), HANDSHAKE)
            with socket.create_connection(("127.0.0.1", hostile.port), 1) as connection:
                connection.sendall(head + frame(FIN | TEXT, b"early"))
                with suppress(TimeoutError, ConnectionError):
                    connection.recv(4096)
            hostile.connections(1)
            assert hostile.noted("early")[1:] in ([], *([["closed", code]] for code in CUT))

    def test_words_before_the_answer_hurt_nobody(self, driver, hostile):
        """The others are served."""
        head = request_head("GET", hostile.path("sync/listen", "early"), HANDSHAKE)
        with bystander_of_others(hostile), suppress(TimeoutError):
            hostile.answered(head + frame(FIN | TEXT, b"early"), 0.2)

    def test_no_ascii(self, driver, hostile):
        """Headers of the handshake with other bytes: answered or cut, and nobody else notices."""
        with bystander_of_others(hostile):
            for name in ("Connection", "Sec-WebSocket-Protocol", "Sec-WebSocket-Extensions"):
                headers = {**HANDSHAKE, name: f"{HANDSHAKE.get(name, 'x')}, k\xe4se"}
                head = request_head("GET", hostile.path("sync/listen", "odd"), headers)
                assert hostile.answered(head) in {101, 400, 500, 0}


# --- The end of rights, and of the server --------------------------------------------------------


class TestDisconnect:
    """``websockets.disconnect``."""

    def test_all_of_a_user(self, scene):
        """Each of his connections gets 4401, and nobody else's."""
        with ExitStack() as stack:
            his = []
            for number in range(4):
                path = scene.path(f"{KINDS[number % 2]}/listen", f"his{number}", user=7)
                his.append(stack.enter_context(scene.connect(path)))
                assert his[-1].receive() == "ready"
            other = stack.enter_context(scene.connect(scene.path("echo", "other", user=8)))
            other.still_works()
            assert scene.get("/disconnect/7").text == "4"
            assert {ws.closed()[0] for ws in his} == {4401}
            other.still_works()
        for number in range(4):
            assert scene.ended(f"his{number}") == ("closed", 4401)


class TestSigterm:
    """SIGTERM, with the option of the server that bounds what it waits for."""

    #: Seconds in which it has to end: the option's, and our own for a view and for a peer.
    BOUND = OPTION + CLOSE_TIMEOUT + SEND_TIMEOUT + MARGIN

    def test_a_view_that_sleeps(self, driver, serving, bounded, oversized):
        """It ends though a view does not."""
        bounded.connections(0, timeout=12)  # whatever was too large has left nothing either
        with bounded.connect(bounded.path("sleeps")) as ws:
            assert ws.receive() == "ready"
            self.ends(serving.bounded)

    def test_a_peer_that_never_reads(self, driver, serving, pinging):
        """It ends though two clients take nothing: one was given up, and one is sent to."""
        with ExitStack() as stack:
            stack.enter_context(pinging.peer("sync/flood", "given-up", receive_buffer=4096))
            pinging.ended("given-up", SEND_TIMEOUT + MARGIN)
            stack.enter_context(pinging.peer("sync/flood", "new", receive_buffer=4096))
            wait_until(
                lambda: pinging.stats()["outbox_bytes"] > 400_000 or pinging.noted("new")[1:],
                5,
                "a filled outbox, or the end of the flood",
            )
            self.ends(serving.pinging)

    def ends(self, process):
        process.process.send_signal(signal.SIGTERM)
        try:
            process.process.wait(self.BOUND)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"It did not end within {self.BOUND:g} s.") from None


class TestDrain:
    """``websockets.drain``, from an HTTP view. It comes last: no handshake is answered after it."""

    def test_drain(self, driver):
        """Everybody gets 1012, a busy view may finish; handshakes are refused, HTTP is served."""
        driver.connections(0, timeout=10)
        goodbye = driver.at_client(1012, "")[0]
        draining = threading.Thread(target=driver.get, args=["/drain"])
        with ExitStack() as stack:
            waiting = []
            for kind in KINDS:
                path = driver.path(f"{kind}/listen", kind)
                waiting.append(stack.enter_context(driver.connect(path)))
                assert waiting[-1].receive() == "ready"
            busy = stack.enter_context(driver.connect(driver.path("busy", "busy")))
            assert busy.receive() == "ready"
            busy.send("received before")
            wait_until(lambda: driver.stats()["inbox_messages"] == 1, 2, "the message")
            draining.start()
            assert {ws.closed()[0] for ws in waiting} == {goodbye}
            self.is_refused(driver)
            driver.get(f"/release/{driver.key}busy")
            assert busy.receive_all() == ["received before"]
            assert busy.close_code == goodbye
        draining.join(MARGIN)
        assert not draining.is_alive()
        self.is_refused(driver)
        for name in (*KINDS, "busy"):
            assert driver.ended(name) == ("closed", 1012)

    def is_refused(self, driver):
        path = driver.path("sync/listen", "late")
        assert driver.rejected(path).status == driver.status(503)
        assert driver.get("/hello").text == "hello"


class TestTheTable:
    """The table "Faults" of docs/reference/servers."""

    def test_names(self):
        """Each line names tests that there are, and what is known to fail stands in a line."""
        there = {
            f"{kind.__name__}.{name}"
            for kind in globals().values()
            if inspect.isclass(kind) and kind.__name__.startswith("Test")
            for name in vars(kind)
            if name.startswith("test_")
        }
        named = [name for fault in FAULTS for name in fault.tests]
        assert set(named) <= there
        assert len(named) == len(set(named))
        ours = {name.partition(".")[0] for name in there}
        for known in KNOWN:
            for test in servers_page.tests_of(known):
                if test.partition(".")[0] in ours:
                    assert test in named
                    assert known.helps
