"""examples/upload through real servers: as it comes, with a live bar, in bounded memory."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Callable
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest
from websockets.sync.client import connect

from .conftest import IMPLEMENTATIONS, ServerProcess

UPLOAD = Path(__file__).parents[2] / "examples" / "upload"
TIMEOUT = 20.0
MIB = 1024 * 1024


@pytest.fixture
def server(start_server: Callable[..., ServerProcess], implementation: str) -> ServerProcess:
    """The example as its first line says, once with each implementation."""
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(UPLOAD), "app:asgi"]
    return start_server("", [*command, "--port", "{port}", *IMPLEMENTATIONS[implementation]])


def ask(server: ServerProcess) -> closing[http.client.HTTPConnection]:
    return closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT))


def test_the_bar_moves_while_the_file_comes(server):
    """The page hears of the first half before the second half is sent."""
    first, second = b"a" * MIB, b"b" * MIB
    with ask(server) as client, connect(server.ws_url("/progress/one"), proxy=None) as ws:
        assert json.loads(ws.recv(timeout=TIMEOUT)) == {"received": 0}
        client.putrequest("POST", "/files/one")
        client.putheader("Content-Length", str(2 * MIB))
        client.endheaders(first)
        assert json.loads(ws.recv(timeout=TIMEOUT)) == {"received": MIB}
        client.send(second)
        assert json.loads(ws.recv(timeout=TIMEOUT)) == {"received": 2 * MIB}
        answer = json.loads(client.getresponse().read())
    assert answer == {"bytes": 2 * MIB, "sha256": sha256(first + second).hexdigest()}


def test_the_download_is_whole(server):
    """A million lines arrive, each in its place."""
    with ask(server) as client:
        client.request("GET", "/numbers.csv")
        lines = client.getresponse().read().decode().splitlines()
    assert len(lines) == 1_000_000
    assert all(line == f"{n},{n * n}" for n, line in enumerate(lines))


@pytest.mark.browser
def test_in_a_browser(browser, server):
    """Who chooses a file sees the bar fill and the file's sum."""
    page = browser.open(server.url("/"))
    page.run(
        """
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(5 * 1024 * 1024).fill(97)], "a.bin"));
        const input = document.querySelector("input");
        input.files = files.files;
        input.dispatchEvent(new Event("change"));
        """
    )
    page.wait_for("document.querySelector('progress').value === 1", TIMEOUT)
    total = sha256(b"a" * 5 * MIB).hexdigest()
    page.wait_for(f"document.querySelector('pre').textContent.includes('{total}')", TIMEOUT)
    assert page.errors == []
