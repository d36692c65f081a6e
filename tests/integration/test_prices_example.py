"""examples/prices through real servers: everybody gets what they chose, the newest of it."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from .conftest import IMPLEMENTATIONS, ServerProcess

PRICES = Path(__file__).parents[2] / "examples" / "prices"
TIMEOUT = 10.0
NAMES = {"ACME", "GLOBEX", "INITECH"}


@pytest.fixture
def server(start_server: Callable[..., ServerProcess], implementation: str) -> ServerProcess:
    """The example as its first line says, once with each implementation."""
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(PRICES), "app:asgi"]
    return start_server("", [*command, "--port", "{port}", *IMPLEMENTATIONS[implementation]])


def receive(ws: ClientConnection) -> dict[str, float]:
    message: dict[str, float] = json.loads(ws.recv(timeout=TIMEOUT))
    return message


def choose(ws: ClientConnection, *names: object) -> set[str]:
    """Choose two prices, or none: the answer is the only message that has as many."""
    ws.send(json.dumps(names))
    known = NAMES.intersection(names)
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if set(receive(ws)) == known:
            return known
    raise TimeoutError(f"the prices of {known} did not come")


def test_prices_move(server):
    """Everything comes first as it stands, then each price as it moves, to everybody the same."""
    with (
        connect(server.ws_url("/ws"), max_queue=None) as one,
        connect(server.ws_url("/ws"), max_queue=None) as two,
    ):
        known = receive(one)
        assert set(known) == NAMES
        assert set(receive(two)) == NAMES
        moved: dict[str, set[float]] = {name: set() for name in NAMES}
        while min(map(len, moved.values())) < 2:
            [(name, price)] = receive(two).items()
            moved[name].add(price)
        seen: dict[str, set[float]] = {name: set() for name in NAMES}
        while not all(moved[name] <= seen[name] for name in NAMES):
            [(name, price)] = receive(one).items()
            assert price > 0
            seen[name].add(price)


def test_a_message_chooses(server):
    """After a choice the chosen ones come, and no others; another client's stay as they are."""
    with (
        connect(server.ws_url("/ws"), max_queue=None) as one,
        connect(server.ws_url("/ws"), max_queue=None) as two,
    ):
        receive(one)
        receive(two)
        choose(one, "ACME", "GLOBEX")
        came = [next(iter(receive(one))) for _ in range(8)]
        assert set(came) == {"ACME", "GLOBEX"}
        choose(one, "GLOBEX", "INITECH")
        came = [next(iter(receive(one))) for _ in range(8)]
        assert set(came) == {"GLOBEX", "INITECH"}
        assert {next(iter(receive(two))) for _ in range(9)} == NAMES


def test_choose_none(server):
    """Whoever chose nothing gets nothing until the next choice."""
    with connect(server.ws_url("/ws"), max_queue=None) as ws:
        receive(ws)
        choose(ws)
        with pytest.raises(TimeoutError):
            ws.recv(timeout=0.6)  # three rounds of the market
        assert choose(ws, "ACME", "GLOBEX", "UNKNOWN", 7, None) == {"ACME", "GLOBEX"}


@pytest.mark.parametrize("bad", ["no JSON", "{}", "1", b"\xff"])
def test_what_is_no_choice(server, bad):
    """Anything else closes with 1008, and is no error of the server's."""
    with connect(server.ws_url("/ws"), max_queue=None) as ws:
        receive(ws)
        ws.send(bad)
        with pytest.raises(ConnectionClosed) as caught:
            while True:
                ws.recv(timeout=TIMEOUT)
        assert caught.value.rcvd.code == 1008
        assert "list of names" in caught.value.rcvd.reason
    with connect(server.ws_url("/ws"), max_queue=None) as ws:
        assert set(receive(ws)) == NAMES
    assert "Traceback" not in server.log()


def test_it_stops(server):
    """With its market open and somebody watching the server ends in time, and says nothing."""
    with connect(server.ws_url("/ws"), max_queue=None) as ws:
        receive(ws)
        code, seconds = server.stop()
    assert code in (0, -15)
    assert seconds < 10
    assert "Traceback" not in server.log()
    assert "was destroyed" not in server.log()


def test_the_page(server):
    """The page opens a WebSocket."""
    with urllib.request.urlopen(server.url("/"), timeout=TIMEOUT) as response:
        assert b"new WebSocket" in response.read()


@pytest.mark.browser
def test_in_a_browser(browser, server):
    """Prices move in the page; one that is no longer chosen stands still."""
    page = browser.open(server.url("/"))
    shown = "[...document.querySelectorAll('b')].map(b => b.textContent)"
    page.wait_for(f"{shown}.every(text => text)", TIMEOUT)
    page.run(f"window.before = {shown}")
    page.wait_for(f"{shown}.every((text, n) => text !== before[n])", TIMEOUT)
    page.run("document.querySelector('input[value=ACME]').click()")
    for _ in range(10):  # what was on its way may still come
        page.run(f"window.before = {shown}")
        page.wait_for(f"{shown}.slice(1).every((text, n) => text !== before[n + 1])", TIMEOUT)
        if page.run(f"{shown}[0] === before[0]"):
            break
    else:
        raise AssertionError("a price that is not chosen moves on")
    assert page.errors == []
