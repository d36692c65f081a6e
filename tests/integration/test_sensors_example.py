"""examples/sensors: many devices on no threads, and a page that reads slowly and stays fresh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from .conftest import ServerProcess

SENSORS = Path(__file__).parents[2] / "examples" / "sensors"
TOKEN = "the token of a test"
#: Seconds for one message to come.
TIMEOUT = 20.0
#: Seconds for what a page shows, beside many devices on a loaded machine.
PAGE_TIMEOUT = 40.0


@pytest.fixture
def server(start_example, monkeypatch) -> Iterator[ServerProcess]:
    monkeypatch.setenv("SENSORS_TOKEN", TOKEN)
    server = start_example("sensors")
    yield server
    server.kill()
    assert "Traceback" not in server.log()


def device(server: ServerProcess, number: int, token: str = TOKEN) -> ClientConnection:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = server.ws_url(f"/ingest/{number}")
    return connect(url, additional_headers=headers, compression=None, proxy=None)


def watch(server: ServerProcess, **options: Any) -> ClientConnection:
    return connect(server.ws_url("/watch"), compression=None, proxy=None, **options)


def read(connection: ClientConnection, kind: str) -> dict[str, Any]:
    """The next message that has this."""
    while kind not in (message := json.loads(connection.recv(timeout=TIMEOUT))):
        pass
    found: dict[str, Any] = message
    return found


@pytest.mark.parametrize(
    ("number", "token", "status"),
    [
        (0, "", 401),
        (0, "another", 401),
        (0, "ä".encode().decode("latin-1"), 401),
        (200, TOKEN, 404),
    ],
)
def test_who_does_not_get_in(server, number, token, status):
    """Nobody without the token, and no device above the number that there may be."""
    with pytest.raises(InvalidStatus) as refused, device(server, number, token):
        pass
    assert refused.value.response.status_code == status


def test_without_a_token_of_its_own(start_example, monkeypatch):
    """A server that was told no token lets nobody in."""
    monkeypatch.delenv("SENSORS_TOKEN", raising=False)
    server = start_example("sensors")
    with pytest.raises(InvalidStatus, match="401"), device(server, 0, ""):
        pass


#: No JSON, no object, no wave, none that a page could draw.
BAD = (
    *("{", "[]", '{"wave": 5}', '{"wave": []}', '{"wave": ["5"]}', '{"wave": [NaN]}'),
    *('{"wave": [1.5]}', '{"wave": [1001]}', json.dumps({"wave": [0] * 1001}), b"\xff"),
)


def test_bad_readings(server):
    """What is no reading gets an error and goes nowhere; the device goes on."""
    with watch(server) as page, device(server, 7) as sensor:
        while read(page, "online")["online"] < 1:
            pass
        for number, bad in enumerate(BAD):
            sensor.send(bad)
            assert read(sensor, "error")["error"] == 'Expected {"wave": 1 to 1000 integers}', bad
            sensor.send(json.dumps({"wave": [number]}))
            reading = read(page, "wave")
            assert (reading["device"], reading["wave"]) == (7, [number])


def test_devices_take_no_threads(server):
    """Two hundred devices, and the server has no more threads than with ten."""

    def threads() -> int:
        return len(os.listdir(f"/proc/{server.pid}/task"))

    def online(count: int) -> None:
        while read(page, "online")["online"] != count:
            pass

    with ExitStack() as stack:
        page = stack.enter_context(watch(server))
        for number in range(10):
            stack.enter_context(device(server, number))
        online(10)
        before = threads()
        for number in range(10, 200):
            stack.enter_context(device(server, number))
        online(200)
        # Each handshake has a thread of the pool for HTTP for a moment, of which there are forty.
        assert threads() - before <= 40


def test_a_slow_reader_gets_the_newest(server):
    """One that does not read skips readings, is told how many, and ends with the newest."""
    count, padding = 5000, [1000] * 990  # 25 MB in all: more than the buffers on the way hold
    # This client stops reading from its socket when one message waits.
    with watch(server, max_queue=1) as slow, device(server, 3) as sensor:
        assert read(slow, "online")["online"] == 1
        for number in range(count):
            sensor.send(json.dumps({"wave": [number // 1000, number % 1000, *padding]}))
        sensor.send("that was all")
        read(sensor, "error")
        seen: list[int] = []
        while not seen or seen[-1] != count - 1:
            thousands, ones, *_ = read(slow, "wave")["wave"]
            seen.append(1000 * thousands + ones)
        skipped = read(slow, "skipped")["skipped"]
    assert seen == sorted(seen)
    assert skipped > 0
    assert len(seen) + skipped == count


@pytest.fixture
def start_devices(monkeypatch) -> Iterator[Callable[[ServerProcess], None]]:
    """Run ``devices.py``. Its pauses before another try are short."""
    for name, seconds in {"INITIAL": 0.5, "MIN": 0.5, "MAX": 2}.items():
        monkeypatch.setenv(f"WEBSOCKETS_BACKOFF_{name}_DELAY", str(seconds))
    processes = []

    def start(server: ServerProcess) -> None:
        url = server.ws_url("").rstrip("/")
        processes.append(subprocess.Popen([sys.executable, str(SENSORS / "devices.py"), url]))

    yield start
    for process in processes:
        process.kill()
        process.wait(TIMEOUT)


def test_devices_without_the_token(server, monkeypatch):
    """The simulator says what is wrong, and ends."""
    monkeypatch.setenv("SENSORS_TOKEN", "another")
    url = server.ws_url("").rstrip("/")
    command = [sys.executable, str(SENSORS / "devices.py"), url, "--devices", "3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert ended.returncode == 1
    assert "HTTP 401; is SENSORS_TOKEN the server's?" in ended.stderr
    assert "Traceback" not in ended.stderr


def number(name: str) -> str:
    """The number on a page, as JavaScript."""
    return f"Number(document.getElementById('{name}').textContent)"


@pytest.mark.browser
def test_in_two_browsers(server, start_devices, browser, other_browser, photograph):
    """Both show all devices; one freezes, skips, and is fresh again; both come back."""
    start_devices(server)
    here, there = browser.open(server.url()), other_browser.open(server.url())
    for page in (here, there):
        page.wait_for("tiles.size === 50", PAGE_TIMEOUT)
        page.wait_for(f"{number('online')} === 50", PAGE_TIMEOUT)
        page.wait_for("document.querySelectorAll('.tile path[d^=M]').length === 50", PAGE_TIMEOUT)
    photograph(here, "sensors")
    here.run("document.getElementById('freeze').click()")
    here.wait_for("!document.getElementById('freeze').disabled", PAGE_TIMEOUT)
    here.wait_for(f"{number('age')} < 2000", PAGE_TIMEOUT)
    if not here.run(f"{number('skipped')} > 0"):
        # A loaded machine does not fill the buffers on the way in five seconds.
        here.run("freeze(20)")
    here.wait_for(f"{number('skipped')} > 0 && {number('age')} < 2000", PAGE_TIMEOUT)
    there.wait_for(f"{number('age')} < 2000", PAGE_TIMEOUT)
    assert here.errors == there.errors == []


@pytest.mark.browser
def test_it_comes_back(server, start_devices, start_example, browser):
    """After the server was killed and another one started, page and devices go on."""
    start_devices(server)
    page = browser.open(server.url())
    page.wait_for(f"{number('online')} === 50", PAGE_TIMEOUT)
    server.kill()
    page.wait_for("document.querySelector('output').dataset.state === 'lost'", PAGE_TIMEOUT)
    page.wait_for("document.querySelectorAll('.tile.silent').length === 50", PAGE_TIMEOUT)
    start_example("sensors", server.port)
    page.wait_for(f"{number('online')} === 50", PAGE_TIMEOUT)
    page.wait_for("document.querySelectorAll('.tile.silent').length === 0", PAGE_TIMEOUT)
