"""Signals: a deploy at noon, a view that sleeps, a second one, publishers at the end (12 to 16)."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from ..integration.serving import (
    HANDSHAKE,
    MARGIN,
    TIMEOUT,
    Peer,
    Served,
    is_running,
    read_answer,
    request_head,
)
from ..integration.waiting import wait_until
from .conftest import SETTINGS, Starter, path

KEY = Callable[[str], str]

#: Seconds.
DRAIN_TIMEOUT, CLOSE_TIMEOUT = 3, 1
#: Seconds that "at once" may take.
AT_ONCE = 2
STOP = {
    **SETTINGS,
    "DRAIN_TIMEOUT": DRAIN_TIMEOUT,
    "CLOSE_TIMEOUT": CLOSE_TIMEOUT,
    "MAX_CONNECTIONS": 2000,
}


@pytest.fixture
def server(way: str, starter: Starter) -> Iterator[Served]:
    server = starter.start(way, settings=STOP)
    yield server
    server.kill()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what a test opens."""
    with ExitStack() as stack:
        yield stack


def opened(server: Served, stack: ExitStack, view: str, key: str, count: int = 1) -> list[Peer]:
    """Peers whose views run."""
    peers = []
    for _ in range(count):
        peers.append(Peer(server.port, path(view, key)))
        stack.callback(peers[-1].close)
    for peer in peers:
        assert peer.frame()[1] == b"ready"
    return peers


def goodbyes(peers: list[Peer]) -> list[int]:
    """Their codes, all at once."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(Peer.goodbye, peers))


def test_a_deploy_at_noon(server: Served, stack: ExitStack, key: KEY) -> None:
    """12: at SIGTERM handshakes get 503, everybody gets 1012, and it ends in time, with 0."""
    peers = opened(server, stack, "echo", key("many"), 200)
    stack.enter_context(Peer(server.port, path("flood", key("flood")), receive_buffer=4096))
    waiting = stack.enter_context(server.open())
    waiting.sendall(request_head("GET", "/hello"))
    assert read_answer(waiting).body == b"hello"
    since = time.monotonic()
    server.signal(signal.SIGTERM)
    codes = [peers[0].goodbye()]
    try:
        waiting.sendall(request_head("GET", path("echo", key("late")), HANDSHAKE))
        status = read_answer(waiting).status
    except (OSError, ValueError) as error:
        raise AssertionError(f"A late handshake had no answer: {error!r}") from error
    codes += goodbyes(peers[1:])
    code = server.wait(TIMEOUT)
    seconds = time.monotonic() - since
    assert (status, set(codes), code) == (503, {1012}, 0)
    assert seconds <= DRAIN_TIMEOUT + MARGIN


@pytest.mark.long
def test_everybody_is_told(server: Served, stack: ExitStack, key: KEY) -> None:
    """12: at SIGTERM each of 1000 gets 1012, and the process ends within its timeouts."""
    peers = opened(server, stack, "echo", key("many"), 1000)
    since = time.monotonic()
    server.signal(signal.SIGTERM)
    codes = goodbyes(peers)
    code = server.wait(TIMEOUT)
    seconds = time.monotonic() - since
    assert set(codes) == {1012}
    assert code in (0, -signal.SIGTERM)
    assert seconds <= DRAIN_TIMEOUT + MARGIN


def test_a_view_that_sleeps(server: Served, stack: ExitStack, key: KEY) -> None:
    """13: it keeps the process no longer than the timeouts, and the log names it."""
    peers = [
        *opened(server, stack, "sleep", key("sleep")),
        *opened(server, stack, "echo", key("other"), 3),
    ]
    since = time.monotonic()
    server.signal(signal.SIGTERM)
    assert set(goodbyes(peers)) == {1012}
    code = server.wait(TIMEOUT)
    seconds = time.monotonic() - since
    assert code in (0, -signal.SIGTERM)
    assert seconds <= DRAIN_TIMEOUT + CLOSE_TIMEOUT + MARGIN
    assert re.search(r"view of /?sleep", server.log())


def stubborn(way: str, starter: Starter, stack: ExitStack, key: KEY) -> tuple[Served, list[Peer]]:
    """A server that one signal does not end for a minute: a view sleeps, a request does too."""
    server = starter.start(way, settings={**STOP, "DRAIN_TIMEOUT": 60, "CLOSE_TIMEOUT": 60})
    peers = [
        *opened(server, stack, "echo", key("other")),
        *opened(server, stack, "sleep", key("sleep")),
    ]
    request = stack.enter_context(server.open())
    request.sendall(request_head("GET", path("sleep", key("http"))))
    wait_until(lambda: b"began" in server.fetch(f"/notes/{key('http')}").body, what="the request")
    return server, peers


def test_a_second_signal(way: str, starter: Starter, stack: ExitStack, key: KEY) -> None:
    """15: SIGTERM twice: the second ends it at once."""
    server, peers = stubborn(way, starter, stack, key)
    try:
        server.signal(signal.SIGTERM)
        assert peers[0].goodbye() == 1012  # it has heard the first one
        assert is_running(server.pid)
        server.signal(signal.SIGTERM)
        server.wait(AT_ONCE)
    finally:
        server.kill()


def test_sigint_twice(way: str, starter: Starter, stack: ExitStack, key: KEY) -> None:
    """15: SIGINT twice as well, on each way to serve."""
    server, peers = stubborn(way, starter, stack, key)
    try:
        server.signal(signal.SIGINT)
        assert peers[0].goodbye() == 1012
        assert is_running(server.pid)
        server.signal(signal.SIGINT)
        server.wait(AT_ONCE)
    finally:
        server.kill()


def test_a_publisher_at_the_end(server: Served, stack: ExitStack, key: KEY) -> None:
    """16: a thread that publishes meanwhile never hangs, is told, and keeps nobody from ending."""
    opened(server, stack, "listen", key("news"), 3)
    assert server.fetch("/publisher", method="POST").body == b"started"
    since = time.monotonic()
    server.signal(signal.SIGTERM)
    code = server.wait(TIMEOUT)
    seconds = time.monotonic() - since
    assert code in (0, -signal.SIGTERM)
    assert seconds <= DRAIN_TIMEOUT + CLOSE_TIMEOUT + MARGIN
    if code == 0:  # bare uvicorn ends by the signal itself, with whatever still runs
        assert "publish raised NotRunning" in server.log()
