"""examples/sensors: many devices on no threads, and a page that reads slowly and stays fresh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import choices
from typing import Any
from urllib.request import urlopen

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from .conftest import ServerProcess
from .waiting import wait_until

SENSORS = Path(__file__).parents[2] / "examples" / "sensors"
TOKEN = "the token of a test"
#: Seconds for one message to come.
TIMEOUT = 20.0
#: Seconds for what a page shows, beside many devices on a loaded machine.
PAGE_TIMEOUT = 40.0

#: The example, and beside it what ``websockets.stats()`` says.
COUNTED = f"""
import sys
from dataclasses import asdict

sys.path.insert(0, {str(SENSORS)!r})
from app import app, websockets


@app.get("/stats")
def stats():
    return asdict(websockets.stats())
"""


@pytest.fixture
def server(start_example, monkeypatch) -> Iterator[ServerProcess]:
    monkeypatch.setenv("SENSORS_TOKEN", TOKEN)
    server = start_example("sensors")
    yield server
    server.kill()
    assert "Traceback" not in server.log()


@pytest.fixture
def counted(start_server, monkeypatch) -> Iterator[ServerProcess]:
    monkeypatch.setenv("SENSORS_TOKEN", TOKEN)
    command = [sys.executable, "-m", "flask", "--app", "served", "websockets", "serve"]
    server = start_server(COUNTED, [*command, "--port", "{port}"])
    yield server
    server.kill()
    assert "Traceback" not in server.log()


def stats(server: ServerProcess) -> dict[str, int]:
    with urlopen(server.url("/stats"), timeout=TIMEOUT) as answer:
        counts: dict[str, int] = json.load(answer)
    return counts


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


#: A device's number, its token, and what it is answered.
REFUSED = (
    (0, "", 401),
    (0, "another", 401),
    (0, "ä".encode().decode("latin-1"), 401),
    (200, TOKEN, 404),
)


def test_who_does_not_get_in(server):
    """Nobody without the token, and no device above the number that there may be."""
    for number, token, status in REFUSED:
        with pytest.raises(InvalidStatus) as refused, device(server, number, token):
            pass
        assert refused.value.response.status_code == status


@pytest.mark.parametrize("setting", [None, ""])
def test_without_a_token_of_its_own(start_example, monkeypatch, setting):
    """A server that was told no token, or an empty one, lets nobody in."""
    if setting is None:
        monkeypatch.delenv("SENSORS_TOKEN", raising=False)
    else:
        monkeypatch.setenv("SENSORS_TOKEN", setting)
    url = start_example("sensors").ws_url("/ingest/0")
    for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "}):
        with (
            pytest.raises(InvalidStatus) as refused,
            connect(url, additional_headers=headers, proxy=None),
        ):
            pass
        assert refused.value.response.status_code == 401


#: No JSON, no object, no wave, none that a page could draw.
BAD = (
    *("{", "[]", '{"wave": 5}', '{"wave": []}', '{"wave": ["5"]}', '{"wave": [NaN]}'),
    *(
        '{"wave": [true]}',
        '{"wave": [1.5]}',
        '{"wave": [1001]}',
        json.dumps({"wave": [0] * 1001}),
        b"\xff",
    ),
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


def test_too_large_a_reading(server):
    """A device that sends one is closed with 1009; another one goes on."""
    with watch(server) as page, device(server, 1) as large, device(server, 2) as sensor:
        while read(page, "online")["online"] < 2:
            pass
        large.send(json.dumps({"wave": [0] * 8000}))
        with pytest.raises(ConnectionClosed) as closed:
            large.recv(timeout=TIMEOUT)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
        sensor.send(json.dumps({"wave": [5]}))
        assert read(page, "wave")["device"] == 2


def test_devices_take_no_threads(counted):
    """Two hundred devices are two hundred tasks, and no thread runs a view for them."""

    def threads() -> int:
        return len(os.listdir(f"/proc/{counted.pid}/task"))

    def online(count: int) -> None:
        while read(page, "online")["online"] != count:
            pass

    def settled() -> bool:  # a handshake has a thread until Flask is done with it
        return stats(counted)["view_threads"] == 0

    with ExitStack() as stack:
        page = stack.enter_context(watch(counted))
        for number in range(10):
            stack.enter_context(device(counted, number))
        online(10)
        before = threads()
        for number in range(10, 200):
            stack.enter_context(device(counted, number))
        online(200)
        wait_until(settled, TIMEOUT, "the end of the handshakes")
        assert stats(counted)["view_tasks"] == 201
        # Each handshake has a thread of the pool for HTTP for a moment, of which there are forty.
        assert threads() - before <= 40


def test_a_slow_reader_gets_the_newest(counted):
    """One that does not read skips readings, is told how many, and ends with the newest.

    Beside it, one that reads gets every reading.
    """
    count, padding = 3000, [1000] * 990  # 15 MB in all: more than the buffers on the way hold
    # This client stops reading from its socket when one message waits.
    with (
        watch(counted, max_queue=1) as slow,
        watch(counted) as quick,
        device(counted, 3) as sensor,
    ):
        assert read(slow, "online")["online"] == 1
        for number in range(count):
            sensor.send(json.dumps({"wave": [number // 1000, number % 1000, *padding]}))
            thousands, ones, *_ = read(quick, "wave")["wave"]
            assert 1000 * thousands + ones == number
        dropped = stats(counted)["dropped_latest"]
        assert dropped > 0
        seen: list[int] = []
        while not seen or seen[-1] != count - 1:
            thousands, ones, *_ = read(slow, "wave")["wave"]
            seen.append(1000 * thousands + ones)
        skipped = read(slow, "skipped")["skipped"]
        while read(quick, "skipped")["skipped"] != 0:
            pass
    assert seen == sorted(seen)
    assert skipped == dropped == stats(counted)["dropped_latest"]
    assert len(seen) + skipped == count


@pytest.fixture
def start_devices(monkeypatch) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Run ``devices.py``. Its pauses before another try are short."""
    for name, seconds in {"INITIAL": 0.5, "MIN": 0.5, "MAX": 2}.items():
        monkeypatch.setenv(f"WEBSOCKETS_BACKOFF_{name}_DELAY", str(seconds))
    processes = []

    def start(server: ServerProcess, *options: str) -> subprocess.Popen[bytes]:
        url = server.ws_url("").rstrip("/")
        command = [sys.executable, str(SENSORS / "devices.py"), url, *options]
        processes.append(process := subprocess.Popen(command))
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait(TIMEOUT)


@pytest.mark.parametrize(
    ("token", "count", "said"),
    [
        ("another", "3", "HTTP 401 (401: is SENSORS_TOKEN the server's?"),
        (TOKEN, "201", "HTTP 404 (401: is SENSORS_TOKEN the server's? 404: it takes 200 devices)"),
    ],
)
def test_devices_that_are_refused(server, monkeypatch, token, count, said):
    """The simulator says what is wrong, and ends."""
    monkeypatch.setenv("SENSORS_TOKEN", token)
    url = server.ws_url("").rstrip("/")
    command = [sys.executable, str(SENSORS / "devices.py"), url, "--devices", count]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert ended.returncode == 1
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def number(name: str) -> str:
    """The number on a page, as JavaScript."""
    return f"Number(document.getElementById('{name}').textContent.replaceAll(',', ''))"


@pytest.mark.browser
def test_in_two_browsers(server, start_devices, browser, other_browser, photograph):
    """Both show all devices, and the same of each."""
    devices = start_devices(server, "--rate", "4")
    here, there = browser.open(server.url()), other_browser.open(server.url())
    for page in (here, there):
        page.wait_for(f"tiles.size === 50 && {number('online')} === 50", PAGE_TIMEOUT)
        page.wait_for("document.querySelectorAll('.tile path[d^=M]').length === 50", PAGE_TIMEOUT)
        page.wait_for(f"{number('rate')} > 0 && {number('sent')} > 0", PAGE_TIMEOUT)
    photograph(here, "sensors")
    devices.kill()
    for page in (here, there):
        page.wait_for(f"{number('online')} === 0 && fresh.size === 0", PAGE_TIMEOUT)
    shown = """[...document.querySelectorAll('.tile')].map(
        (tile) => [tile.textContent, tile.querySelector('path').getAttribute('d')]
    )"""
    values = here.run(shown)
    assert len(values) == 50
    assert there.run(shown) == values
    assert here.errors == there.errors == []


@pytest.mark.browser
def test_a_frozen_page(counted, browser, other_browser):
    """It skips, says how many, and goes on with the newest, as the page beside it did all along."""
    here, there = browser.open(counted.url()), other_browser.open(counted.url())
    for page in (here, there):
        page.wait_for("document.querySelector('output').dataset.state === 'live'", PAGE_TIMEOUT)
    with device(counted, 3) as sensor:
        here.run("document.getElementById('freeze').click()")
        sent, thawed = 0, time.monotonic() + 5
        while stats(counted)["dropped_latest"] == 0:
            if time.monotonic() > thawed:  # too loaded a machine to fill the buffers meanwhile
                assert here.run("typeof again") == "undefined", f"nothing skipped of {sent}"
                here.run("window.again = true; freeze(20)")
                thawed += 25
            for _ in range(50):  # compressed they are large, too
                sensor.send(json.dumps({"wave": choices(range(-900, 900), k=1000)}))
            sent += 50
        sensor.send(json.dumps({"wave": [-987]}))
        sent += 1
        value = "Number(document.querySelector('.tile b')?.textContent)"
        for page in (there, here):
            page.wait_for(f"{value} === 987", PAGE_TIMEOUT)
            page.wait_for(f"{number('sent')} === {sent}", PAGE_TIMEOUT)
    skipped = here.run(number("skipped"))
    assert skipped > 0
    assert skipped + there.run(number("skipped")) == stats(counted)["dropped_latest"]
    here.wait_for("!document.getElementById('freeze').disabled", PAGE_TIMEOUT)
    assert here.errors == there.errors == []


@pytest.mark.browser
def test_it_comes_back(server, start_devices, start_example, browser):
    """After the server was killed and another one started, page and devices go on."""
    start_devices(server, "--devices", "20")
    page = browser.open(server.url())
    page.wait_for(f"{number('online')} === 20 && tiles.size === 20", PAGE_TIMEOUT)
    server.kill()
    page.wait_for("document.querySelector('output').dataset.state === 'lost'", PAGE_TIMEOUT)
    page.wait_for("document.querySelectorAll('.tile.silent').length === 20", PAGE_TIMEOUT)
    start_example("sensors", server.port)
    page.wait_for("document.querySelector('output').dataset.state === 'live'", PAGE_TIMEOUT)
    page.wait_for(f"{number('online')} === 20", PAGE_TIMEOUT)
    page.wait_for("document.querySelectorAll('.tile.silent').length === 0", PAGE_TIMEOUT)
    assert page.run("document.querySelectorAll('.tile').length") == 20
