"""The proxy itself: each of its faults is the fault that it says it is."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ..integration.waiting import wait_until
from .proxy import C2S, CHUNK, S2C, Direction, Proxy

TIMEOUT = 10.0
#: Seconds in which nothing must come.
SILENCE = 0.3


class Ends:
    """Both ends of connections through a proxy; every wait has a timeout."""

    def __init__(self, proxy: Proxy, listener: socket.socket) -> None:
        self.proxy = proxy
        self._listener = listener
        self.opened: list[socket.socket] = []

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """A client's socket, and the server's of the same connection."""
        client = socket.create_connection(("127.0.0.1", self.proxy.port), TIMEOUT)
        self.opened.append(client)
        server, _ = self._listener.accept()
        self.opened.append(server)
        server.settimeout(TIMEOUT)
        return client, server


@pytest.fixture
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT)
        buffer = getattr(request, "param", None)
        with Proxy(listener.getsockname()[1], buffer=buffer) as proxy:
            ends = Ends(proxy, listener)
            yield ends
            for each in ends.opened:
                each.close()


def received(end: socket.socket, count: int) -> bytes:
    """So many bytes."""
    data = b""
    while len(data) < count:
        part = end.recv(count - len(data))
        assert part, f"the end after {len(data)} of {count} bytes"
        data += part
    return data


def nothing_comes(end: socket.socket) -> bool:
    end.settimeout(SILENCE)
    try:
        return end.recv(1) == b"impossible"
    except TimeoutError:
        return True
    finally:
        end.settimeout(TIMEOUT)


def filled(end: socket.socket) -> int:
    """Send until nobody takes it any more; the bytes that were taken."""
    end.settimeout(SILENCE)
    taken = 0
    try:
        while True:
            taken += end.send(bytes(CHUNK))
    except TimeoutError:
        return taken
    finally:
        end.settimeout(TIMEOUT)


def test_it_passes_everything(ends: Ends) -> None:
    """Bytes of both directions in their order, and the end of each by itself."""
    client, server = ends.connect()
    data = bytes(range(256)) * 20_000
    sender = threading.Thread(target=client.sendall, args=(data,))
    sender.start()
    assert received(server, len(data)) == data
    sender.join(TIMEOUT)
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""
    server.sendall(b"an answer all the same")
    assert received(client, 22) == b"an answer all the same"
    server.close()
    assert client.recv(1) == b""
    wait_until(lambda: ends.proxy.connections == 0, what="the connection's end")


def test_a_black_hole(ends: Ends) -> None:
    """Bytes and the end of a stream vanish, both ways, and what comes after it passes again."""
    client, server = ends.connect()
    other, gone = ends.connect()
    ends.proxy.blackhole()
    for end in (client, server):
        end.sendall(b"x" * CHUNK * 40)  # it is taken: no window closes
        assert nothing_comes(end)
    other.close()
    assert nothing_comes(gone)
    assert ends.proxy.connections == 2
    ends.proxy.pass_all()
    assert gone.recv(1) == b""
    client.sendall(b"here")
    assert received(server, 4) == b"here"


@pytest.mark.parametrize("lost", [C2S, S2C])
def test_half_open(ends: Ends, lost: Direction) -> None:
    """One way is lost, also the reset of a peer that is gone, and the other way goes on."""
    client, server = ends.connect()
    silent, heard = (client, server) if lost == C2S else (server, client)
    ends.proxy.half_open(lost)
    silent.sendall(b"lost")
    heard.sendall(b"found")
    assert received(silent, 5) == b"found"
    assert nothing_comes(heard)
    silent.close()
    for _ in range(3):
        heard.sendall(b"to somebody who is not there")
        assert nothing_comes(heard)


@pytest.mark.parametrize("ends", [4096], indirect=True)
def test_stall(ends: Ends) -> None:
    """What is sent stays with the sender, and arrives whole when it goes on."""
    client, server = ends.connect()
    ends.proxy.stall(C2S)
    server.sendall(b"the other way")
    assert received(client, 13) == b"the other way"
    taken = filled(client)
    assert nothing_comes(server)
    ends.proxy.pass_all()
    client.close()
    rest = 0
    while part := server.recv(CHUNK):
        rest += len(part)
    assert rest == taken


@pytest.mark.parametrize("ends", [4096], indirect=True)
def test_its_buffers_are_bounded(ends: Ends) -> None:
    """Nobody reads: no more is taken than the kernel's buffers and one piece."""
    client, _ = ends.connect()
    assert filled(client) < 8 * 1024 * 1024


def test_rate(ends: Ends) -> None:
    """Five bytes at ten a second take half a second; without the fault the rest comes at once."""
    client, server = ends.connect()
    ends.proxy.rate(10, S2C)
    client.sendall(b"y" * CHUNK)
    received(server, CHUNK)
    started = time.monotonic()
    server.sendall(b"x" * CHUNK)
    assert received(client, 5) == b"x" * 5
    assert time.monotonic() - started >= 0.4
    ends.proxy.pass_all()
    received(client, CHUNK - 5)


def test_latency(ends: Ends) -> None:
    """Each piece is late."""
    client, server = ends.connect()
    ends.proxy.latency(0.2)
    started = time.monotonic()
    client.sendall(b"ask")
    received(server, 3)
    server.sendall(b"answer")
    received(client, 6)
    assert time.monotonic() - started >= 0.4


@pytest.mark.parametrize("direction", [C2S, S2C])
def test_cut(ends: Ends, direction: Direction) -> None:
    """Exactly so many bytes of each connection arrive, in however many pieces; then it is cut."""
    pairs = [ends.connect() for _ in range(2)]
    ends.proxy.cut_after(1000, direction)
    for client, server in pairs:
        source, sink = (client, server) if direction == C2S else (server, client)
        source.sendall(b"x" * 400)
        assert received(sink, 400) == b"x" * 400
        source.sendall(b"x" * 5000)
        assert received(sink, 600) == b"x" * 600
        assert sink.recv(1) == b""
    wait_until(lambda: ends.proxy.connections == 0, what="the end of both")


def test_reset(ends: Ends) -> None:
    """Both sides see a reset."""
    pair = ends.connect()
    ends.proxy.reset()
    for end in pair:
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    assert ends.proxy.connections == 0


def test_a_reset_of_one_side_is_passed_on(ends: Ends) -> None:
    """Without a fault the other side sees it too."""
    client, server = ends.connect()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    with pytest.raises(ConnectionResetError):
        server.recv(1)


def test_down_and_up(ends: Ends) -> None:
    """Connections are reset and refused; later they are taken at the same port."""
    client, _ = ends.connect()
    ends.proxy.down()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with socket.socket() as refused:
        assert refused.connect_ex(("127.0.0.1", ends.proxy.port)) == errno.ECONNREFUSED
    ends.proxy.up()
    client, server = ends.connect()
    client.sendall(b"again")
    assert received(server, 5) == b"again"


def test_a_server_that_is_not_there() -> None:
    """The client sees a reset, as behind any proxy."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (
        Proxy(port) as proxy,
        pytest.raises(ConnectionResetError),
        socket.create_connection(("127.0.0.1", proxy.port), TIMEOUT) as client,
    ):
        client.recv(1)


def test_a_fault_ends_a_wait(ends: Ends) -> None:
    """Each switch is heard by connections in the middle of any other fault."""
    switches: list[Callable[[], None]] = [
        lambda: ends.proxy.rate(0.01),
        lambda: ends.proxy.latency(60),
        ends.proxy.stall,
    ]
    for switch in switches:
        client, server = ends.connect()
        switch()
        client.sendall(b"ab")
        assert nothing_comes(server)
        ends.proxy.pass_all()
        assert received(server, 2) == b"ab"
