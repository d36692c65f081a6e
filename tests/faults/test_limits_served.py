"""Limits, and rights over time, on real servers: who is refused or closed, and in which words."""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from ..integration.conftest import IMPLEMENTATIONS, free_port
from ..integration.serving import HANDSHAKE, Peer, Served, Start, request_head, serving
from ..integration.waiting import wait_until
from .conftest import KIND_OF, MARGIN, TIMEOUT

APP = """
    import logging
    import threading
    import time
    from dataclasses import asdict

    from flask import Flask, request
    from werkzeug.middleware.proxy_fix import ProxyFix
    from flask_websockets import WebSockets

    app = Flask(__name__)
    app.config.from_prefixed_env()
    websockets = WebSockets(app)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    go = threading.Event()
    locked = set()
    ended = []

    @websockets.identify
    def user():
        return request.headers.get("X-User")

    @websockets.recheck(every=0.1)
    def may_stay(user):
        return user not in locked

    @app.get("/stats")
    def stats():
        return asdict(websockets.stats())

    @app.get("/ended")
    def show():
        return ended

    @app.post("/go")
    def release():
        go.set()
        return "released"

    @app.post("/hold")
    def hold():
        go.clear()
        return "held"

    @app.post("/logout/<user>")
    def log_out(user):
        return str(websockets.disconnect(user=user, reason="logged out"))

    @app.post("/lock/<user>")
    def lock(user):
        locked.add(user)
        return "locked"

    @websockets.route("/echo")
    def echo(ws):
        ws.send("ready")
        for data in ws.iter_data():
            ws.send(data)

    @websockets.route("/async/echo")
    async def async_echo(ws):
        await ws.send("ready")
        async for data in ws.iter_data():
            await ws.send(data)

    websockets.route("/few", endpoint="few", max_messages_per_second=5)(echo)
    websockets.route("/small", endpoint="small", max_bytes_per_second=100)(echo)
    websockets.route("/young", endpoint="young", max_age=0.5)(echo)
    websockets.route(
        "/slow", endpoint="slow", max_messages_per_second=40, rate_exceeded="slow_down"
    )(echo)
    websockets.route("/async/few", endpoint="afew", max_messages_per_second=5)(async_echo)
    websockets.route("/async/small", endpoint="asmall", max_bytes_per_second=100)(async_echo)
    websockets.route("/async/young", endpoint="ayoung", max_age=0.5)(async_echo)
    websockets.route(
        "/async/slow", endpoint="aslow", max_messages_per_second=40, rate_exceeded="slow_down"
    )(async_echo)

    @websockets.route("/undecided")
    def undecided(ws):
        go.wait(30)
        ws.accept()
        for data in ws.iter_data():
            pass

    @websockets.route("/stuck")
    def stuck(ws):
        ws.send("ready")
        go.wait(30)

    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=PROXIES)
    asgi = websockets.asgi_app()
"""

#: What ``MAX_CONNECTIONS`` and ``MAX_CONNECTIONS_PER_USER`` are.
PLACES, PLACES_OF_A_USER = 30, 5

SETTINGS = {
    "MAX_CONNECTIONS": PLACES,
    "MAX_CONNECTIONS_PER_USER": PLACES_OF_A_USER,
    "MAX_MESSAGE_BYTES": 1000,
    "HANDSHAKE_TIMEOUT": 5,
    "CLOSE_TIMEOUT": 0.5,
}

StartApp = Callable[..., Served]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with serving(tmp_path_factory.mktemp("limits")) as start:
        yield start


@pytest.fixture(scope="module")
def start_app(way: str, start: Start) -> StartApp:
    """Serve the application in this way, with these settings."""

    def start_app(*options: str, proxies: int = 0, **settings: Any) -> Served:
        how, _, implementation = way.partition("-")
        source = APP.replace("PROXIES", str(proxies))
        if how == "serve":
            return start(source, *options, kind=KIND_OF[implementation], settings=settings)
        port = free_port()
        command = ["uvicorn", "--port", str(port), "--no-access-log"]
        command = [sys.executable, "-m", *command, *IMPLEMENTATIONS[implementation], *options]
        return start(source, command=[*command, "served:asgi"], port=port, settings=settings)

    return start_app


@pytest.fixture(scope="module")
def shared(start_app: StartApp) -> Served:
    return start_app(**SETTINGS)


@pytest.fixture
def server(shared: Served) -> Iterator[Served]:
    """The server that most tests share: nobody is there before a test, and after it."""
    wait_until(lambda: at_rest(shared), what="a quiet server")
    shared.fetch("/hold", method="POST")
    yield shared
    shared.fetch("/go", method="POST")
    wait_until(lambda: at_rest(shared), what="a server as quiet as before")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what a test opens."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=["", "/async"], ids=["plain", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    """What the paths of either kind of view begin with."""
    prefix: str = request.param
    return prefix


def stats(server: Served) -> dict[str, int]:
    found: dict[str, int] = json.loads(server.fetch("/stats").body)
    return found


def at_rest(server: Served) -> bool:
    now = stats(server)
    return not any(now[name] for name in ("connections", "view_threads", "view_tasks"))


class Grown:
    """By how much the counters have grown since it was made."""

    def __init__(self, server: Served) -> None:
        self._server = server
        self._before = stats(server)

    def __getitem__(self, counter: str) -> int:
        return stats(self._server)[counter] - self._before[counter]


class Answered:
    """The answer to a handshake, and the connection, which stays as it is until it is closed."""

    def __init__(self, server: Served, stack: ExitStack, path: str, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.socket = stack.enter_context(server.open())
        self.socket.sendall(request_head("GET", path, {**HANDSHAKE, **named}))
        response = http.client.HTTPResponse(self.socket)
        response.begin()
        self.status = response.status
        self.headers = response.headers
        self.body = b"" if self.status == 101 else response.read()
        response.close()


def entered(server: Served, stack: ExitStack, path: str, **headers: str) -> ClientConnection:
    """A client whose view runs."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    client: ClientConnection = stack.enter_context(
        server.connect(path, additional_headers=named, close_timeout=1, compression=None)
    )
    assert client.recv(timeout=TIMEOUT) == "ready"
    return client


def goodbye(client: ClientConnection) -> tuple[int, str]:
    """The server's close, behind whatever comes before it."""
    with pytest.raises(ConnectionClosed) as caught:
        while True:
            client.recv(timeout=TIMEOUT)
    received = caught.value.rcvd
    assert received is not None
    return received.code, received.reason


# -- connections ----------------------------------------------------------------------------------


def test_connections(server: Served, stack: ExitStack, kind: str) -> None:
    """The last place is one; above it 503 without a thread, one line for hundreds, HTTP lives."""
    grown, log = Grown(server), len(server.log())
    peers = [Peer(server.port, f"{kind}/echo") for _ in range(PLACES)]
    for peer in peers:
        stack.callback(peer.close)
        assert peer.status == 101
    threads, refused = stats(server)["view_threads"], 300
    for _ in range(refused):
        with ExitStack() as brief:
            answer = Answered(server, brief, f"{kind}/echo?token=5ecret")
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) > 0
    assert grown["refused_full"] == refused
    assert stats(server)["view_threads"] == threads
    lines = [line for line in server.log()[log:].splitlines() if "MAX_CONNECTIONS," in line]
    assert len(lines) <= 1  # none, if the other kind was refused within this minute
    assert "5ecret" not in "".join(lines)
    whole = [line for line in server.log().splitlines() if "MAX_CONNECTIONS," in line]
    assert f"(WEBSOCKETS_MAX_CONNECTIONS, {PLACES})" in whole[0]
    assert "/echo (peer 127.0.0.1)" in whole[0]
    peers[0].reset()
    wait_until(lambda: stats(server)["connections"] == PLACES - 1, what="a place")
    assert Answered(server, stack, f"{kind}/echo").status == 101


def test_many_at_once(server: Served, stack: ExitStack, kind: str) -> None:
    """As many as there are threads come at the same moment: a user's places, and no more."""
    comers = 24

    def wave(number: int) -> None:
        grown, barrier = Grown(server), threading.Barrier(comers)
        statuses = Counter[int]()
        with ExitStack() as brief:
            lock = threading.Lock()

            def come() -> None:
                barrier.wait(TIMEOUT)
                with ExitStack() as own:
                    answer = Answered(server, own, f"{kind}/echo", X_User="ann")
                    with lock:
                        statuses[answer.status] += 1
                        brief.push(own.pop_all())

            threads = [threading.Thread(target=come) for _ in range(comers)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(TIMEOUT)
            assert statuses == {101: PLACES_OF_A_USER, 429: comers - PLACES_OF_A_USER}, number
            assert grown["refused_user"] == comers - PLACES_OF_A_USER
            assert Answered(server, brief, f"{kind}/echo", X_User="bob").status == 101
        wait_until(lambda: at_rest(server), what="the end of all of them")

    for number in range(3):
        wave(number)


def test_a_refused_user_is_told(server: Served, stack: ExitStack) -> None:
    """429, when to come back, and why; one line with the setting, the endpoint and the peer."""
    for _ in range(PLACES_OF_A_USER):
        assert Answered(server, stack, "/echo", X_User="ann").status == 101
    for _ in range(20):
        answer = Answered(server, stack, "/echo?token=5ecret", X_User="ann", Cookie="5ecret=1")
        assert answer.status == 429
        assert int(answer.headers["Retry-After"]) > 0
        assert b"Too many connections of one user" in answer.body
    (line,) = [line for line in server.log().splitlines() if "PER_USER" in line]
    assert "/echo (endpoint " in line
    assert "peer 127.0.0.1" in line
    assert "5ecret" not in line


@pytest.mark.parametrize("end", ["reset", "close", "stuck"])
def test_places_come_back(server: Served, stack: ExitStack, end: str) -> None:
    """A reset, a goodbye, or a view that was stuck and has ended: then the user may come again."""
    path = "/stuck" if end == "stuck" else "/echo"
    clients = [entered(server, stack, path, X_User="ann") for _ in range(PLACES_OF_A_USER)]
    assert Answered(server, stack, "/echo", X_User="ann").status == 429
    for client in clients:
        if end == "reset":
            client.socket.close()
        else:
            client.close()
    if end == "stuck":
        wait_until(lambda: not stats(server)["connections"], what="the end of the connections")
        assert Answered(server, stack, "/echo", X_User="ann").status == 429
        server.fetch("/go", method="POST")
    wait_until(lambda: at_rest(server), what="the end of the views")
    for _ in range(PLACES_OF_A_USER):
        assert Answered(server, stack, "/echo", X_User="ann").status == 101


# -- addresses ------------------------------------------------------------------------------------


def forwarded(server: Served, stack: ExitStack, address: str) -> int:
    """The answer to a handshake that a proxy has forwarded."""
    return Answered(server, stack, "/echo", X_Forwarded_For=address).status


@pytest.mark.parametrize("who", ["server", "application"])
def test_addresses_behind_a_proxy(start_app: StartApp, stack: ExitStack, who: str) -> None:
    """Whether server or ProxyFix believes the proxy: the client's own address counts, no lie's."""
    if who == "server":
        server = start_app("--forwarded-allow-ips", "127.0.0.1", MAX_CONNECTIONS_PER_ADDRESS=2)
    else:
        server = start_app(
            "--forwarded-allow-ips", "192.0.2.254", MAX_CONNECTIONS_PER_ADDRESS=2, proxies=1
        )
    # What comes first is what the client said; the proxy appends whom it has seen.
    for address, statuses in (
        ("192.0.2.1", [101, 101, 429]),
        ("198.51.100.7, 192.0.2.1", [429]),
        ("127.0.0.1, 192.0.2.1", [429]),
        ("192.0.2.2", [101]),
        ("192.0.2.1, 192.0.2.2", [101, 429]),
        # A customer's network, and its neighbour.
        ("2001:db8:0:1::1", [101]),
        ("2001:db8:0:1:ffff::2", [101]),
        ("2001:db8:0:1::3", [429]),
        ("2001:db8:0:2::1", [101]),
        ("::ffff:192.0.2.1", [429]),
    ):
        assert [forwarded(server, stack, address) for _ in statuses] == statuses, address
    assert stats(server)["refused_address"] == 6
    (line,) = [line for line in server.log().splitlines() if "PER_ADDRESS" in line]
    assert "endpoint echo, peer 192.0.2.1" in line


def test_a_client_that_lies_about_its_address(start_app: StartApp, stack: ExitStack) -> None:
    """Where nobody is a proxy nobody believes the header: it does not get around the limit."""
    server = start_app("--forwarded-allow-ips", "192.0.2.254", MAX_CONNECTIONS_PER_ADDRESS=2)
    statuses = [forwarded(server, stack, f"198.51.100.{number}") for number in range(6)]
    assert statuses == [101, 101, 429, 429, 429, 429]
    for name in ("X_Real_IP", "Forwarded", "X_Client_IP", "True_Client_IP"):
        assert Answered(server, stack, "/echo", **{name: "for=198.51.100.9"}).status == 429
    (line,) = [line for line in server.log().splitlines() if "PER_ADDRESS" in line]
    assert "peer 127.0.0.1" in line


# -- messages -------------------------------------------------------------------------------------


def test_messages(server: Served, stack: ExitStack, kind: str) -> None:
    """A message of the limit passes; a byte more is 1009, whoever of us looks first."""
    grown = Grown(server)
    client = entered(server, stack, f"{kind}/echo")
    for data in ("x" * 1000, "é" * 500, b"x" * 1000):
        client.send(data)
        assert client.recv(timeout=TIMEOUT) == data
    client.send("é" * 500 + "x")
    code, reason = goodbye(client)
    assert (code, "1000 bytes" in reason) == (1009, True)
    wait_until(lambda: grown["oversized"] == 1, 3, "the counter")


def test_rates(server: Served, stack: ExitStack, kind: str) -> None:
    """One second's worth passes; more is 1008, for messages and for bytes."""
    grown = Grown(server)
    for path, data, times in ((f"{kind}/few", "x", 5), (f"{kind}/small", "x" * 25, 4)):
        client = entered(server, stack, path)
        for _ in range(times):
            client.send(data)
        for _ in range(times):
            assert client.recv(timeout=TIMEOUT) == data
        try:
            for _ in range(20):
                client.send(data)
        except ConnectionClosed:
            pass  # the goodbye was quicker
        assert goodbye(client) == (1008, "too much was sent in too short a time")
    assert grown["rate_closed"] == 2


def test_slow_down(server: Served, stack: ExitStack, kind: str) -> None:
    """Nothing is lost, all in order; pings are answered meanwhile, and others are served."""
    grown = Grown(server)
    client = stack.enter_context(
        # Its pings want an answer within a second: the connection would be closed with 1011.
        server.connect(f"{kind}/slow", ping_interval=0.2, ping_timeout=1 + MARGIN, compression=None)
    )
    assert client.recv(timeout=TIMEOUT) == "ready"
    sent = [str(number) for number in range(80)]  # 40 at once, and 40 a second
    started = time.monotonic()
    for data in sent:
        client.send(data)
    other = entered(server, stack, f"{kind}/echo")
    other.send("meanwhile")
    assert other.recv(timeout=TIMEOUT) == "meanwhile"
    assert [client.recv(timeout=TIMEOUT) for _ in sent] == sent
    assert time.monotonic() - started > 0.9, "that is no speed: it may not be faster"
    assert grown["rate_slowed"] > 10
    assert grown["rate_closed"] == 0
    assert client.ping().wait(TIMEOUT)


@pytest.mark.parametrize("what", ["large", "many"])
def test_too_much_before_the_accept(start_app: StartApp, stack: ExitStack, what: str) -> None:
    """What a client sends in the handshake's shade takes no thread for ever, and no place."""
    server = start_app(MAX_MESSAGE_BYTES=1000, INBOX_MESSAGES=50, INBOX_FULL="close")
    connection = stack.enter_context(server.open())
    connection.sendall(request_head("GET", "/undecided", HANDSHAKE))
    wait_until(lambda: stats(server)["view_threads"], what="the view")
    count, size = (1, 2000) if what == "large" else (300, 130)
    head = bytes((0x82, 0x80 | 126)) + size.to_bytes(2, "big") + bytes(4)
    connection.sendall((head + bytes(size)) * count)
    time.sleep(0.2)  # there is nothing to wait for: a server may read it now, or never
    server.fetch("/go", method="POST")
    connection.settimeout(0.5)
    try:
        while connection.recv(4096):
            pass
    except (TimeoutError, ConnectionError):
        pass
    connection.close()
    wait_until(lambda: at_rest(server), 3 + MARGIN, "the end of the view")


# -- rights ---------------------------------------------------------------------------------------


def test_a_logout(server: Served, stack: ExitStack, kind: str) -> None:
    """All of the user's connections hear 4401 and why; a handshake 401; nobody else anything."""
    grown = Grown(server)
    clients = [entered(server, stack, f"{kind}/echo", X_User="ann") for _ in range(3)]
    others = [entered(server, stack, f"{kind}/echo", **who) for who in ({}, {"X_User": "bob"})]
    assert server.fetch("/logout/ann", method="POST").body == b"3"
    for client in clients:
        assert goodbye(client) == (4401, "logged out")
    for client in others:
        client.send("still here")
        assert client.recv(timeout=TIMEOUT) == "still here"
    assert grown["disconnected"] == 3


def test_a_logout_during_the_handshake(start_app: StartApp, stack: ExitStack) -> None:
    """401, before the view has made up its mind."""
    server = start_app(**SETTINGS)
    answers: list[Answered] = []
    asking = threading.Thread(
        target=lambda: answers.append(Answered(server, stack, "/undecided", X_User="eve"))
    )
    asking.start()
    wait_until(lambda: stats(server)["view_threads"], what="the view")
    wait_until(lambda: server.fetch("/logout/eve", method="POST").body != b"0", what="its user")
    asking.join(TIMEOUT)
    assert answers[0].status == 401
    assert b"logged out" in answers[0].body
    server.fetch("/go", method="POST")


def test_an_old_login(server: Served, stack: ExitStack, kind: str) -> None:
    """4401 at the route's max_age, and not before; the client comes back as a new one."""
    grown = Grown(server)
    for number in (1, 2):
        client = entered(server, stack, f"{kind}/young")
        started = time.monotonic()
        client.send("x")
        assert client.recv(timeout=TIMEOUT) == "x"
        assert goodbye(client) == (4401, "the login is too old")
        assert 0.4 < time.monotonic() - started < 0.5 + MARGIN
        assert grown["expired"] == number


def test_a_user_who_is_locked(server: Served, stack: ExitStack, kind: str) -> None:
    """The next round of rechecks closes his connections with 4401."""
    grown, name = Grown(server), f"mallory{kind.replace('/', '-')}"
    clients = [entered(server, stack, f"{kind}/echo", X_User=name) for _ in range(2)]
    bob = entered(server, stack, f"{kind}/echo", X_User="bob")
    server.fetch(f"/lock/{name}", method="POST")
    for client in clients:
        assert goodbye(client) == (4401, "the login is no longer valid")
    assert grown["disconnected"] == 2
    bob.send("still here")
    assert bob.recv(timeout=TIMEOUT) == "still here"
