"""What kernel and interpreter are asked for: once a process, where they know it, or not at all."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading

import anyio
import pytest

from flask_websockets import WebSockets
from flask_websockets.bridge import tuning

from .asgi_driver import connection, wait_until

TIMEOUT = 60.0

#: Starts a server's lifespan twice and runs one view; prints what the process has then.
SERVED = """
import asyncio, ctypes, gc, json, os, sys
from flask import Flask
from flask_websockets import WebSockets

app = Flask(__name__)
app.config["WEBSOCKETS_TUNE_PROCESS"] = sys.argv[1] == "on"
websockets = WebSockets(app)
found = {}

@websockets.route("/ws")
def view(ws):
    found["policy"] = os.sched_getscheduler(0) if hasattr(os, "SCHED_BATCH") else None

asgi = websockets.asgi_app(app)

def slots():
    if sys.platform == "linux":
        return ctypes.CDLL(None).prctl(78, 2, 0, 0, 0)

async def lifespan():
    came = asyncio.Queue()
    told = asyncio.Queue()
    task = asyncio.create_task(asgi({"type": "lifespan"}, came.get, told.put))
    came.put_nowait({"type": "lifespan.startup"})
    await told.get()
    return came, told, task

async def stop(came, told, task):
    came.put_nowait({"type": "lifespan.shutdown"})
    await told.get()
    await task

async def main():
    running = await lifespan()
    found["frozen"], found["slots"] = gc.get_freeze_count(), slots()
    came = asyncio.Queue()
    came.put_nowait({"type": "websocket.connect"})
    told = asyncio.Queue()
    scope = {"type": "websocket", "path": "/ws", "headers": [(b"host", b"x")], "query_string": b""}
    await asgi(scope, came.get, told.put)
    await stop(*running)
    running = await lifespan()
    found["again"] = gc.get_freeze_count()
    await stop(*running)

asyncio.run(main())
print(json.dumps(found))
"""


def served(switch):
    run = subprocess.run(
        [sys.executable, "-c", SERVED, switch],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    return json.loads(run.stdout)


def test_a_server_tunes_its_process_once():
    """What was loaded is frozen, once; view threads yield; the kernel's table is large."""
    found = served("on")
    assert found["frozen"] > 10_000
    assert found["again"] <= found["frozen"]
    if found["slots"] is not None and found["slots"] >= 0:  # since Linux 6.16
        assert found["slots"] == tuning.FUTEX_SLOTS
    assert found["policy"] == (3 if found["policy"] is not None else None)  # SCHED_BATCH


def test_switched_off_nothing_is_asked_for():
    """WEBSOCKETS_TUNE_PROCESS = False leaves kernel and interpreter as they are."""
    found = served("off")
    assert found["frozen"] == found["again"] == 0
    assert found["slots"] != tuning.FUTEX_SLOTS
    assert found["policy"] in (0, None)  # SCHED_OTHER


def test_importing_tunes_nothing():
    """Who only imports the package, or tests with it, has the process as it was."""
    script = "import gc, flask_websockets; print(gc.get_freeze_count())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=TIMEOUT)
    assert run.stdout.strip() == b"0"


def test_a_kernel_that_refuses(monkeypatch):
    """An older kernel answers with an error, other systems are not asked: nothing is raised."""
    monkeypatch.setattr(tuning, "PR_FUTEX_HASH", 0x7FFFFFF0)  # no kernel knows it
    assert tuning.enlarge_futex_hash() is False
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tuning.enlarge_futex_hash() is False


@pytest.mark.skipif(not hasattr(tuning.os, "SCHED_BATCH"), reason="Linux has it")
def test_a_sandbox_that_refuses(monkeypatch):
    """A view runs where its thread may not change its policy."""

    def refuse(*_):
        raise PermissionError("no")

    monkeypatch.setattr("os.sched_setscheduler", refuse)
    tuning.yield_to_the_loop()


@pytest.fixture
def thresholds():
    """The collector's, as they are when a process starts."""
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def test_many_connections_are_looked_at_less_often(thresholds):
    """From a thousand on, until half of them are gone; nothing else in between changes it."""
    found = []
    for count in (1, 500, 999, 1000, 1001, 2000, 1000, 999, 501, 500, 499, 500, 1000, 500):
        tuning.spare_connections(count)
        found.append(gc.get_threshold())
    usual, many = (700, 10, 10), (700, 10, 100)
    assert found == [usual] * 3 + [many] * 6 + [usual] * 3 + [many, usual]


def test_thresholds_of_the_applications_own_stay(thresholds):
    """Who has set the collector's thresholds keeps them."""
    gc.set_threshold(5000, 20, 30)
    for count in (1000, 500):
        tuning.spare_connections(count)
        assert gc.get_threshold() == (5000, 20, 30)


@pytest.mark.parametrize("tunes", [True, False])
def test_each_connection_counts(app, thresholds, monkeypatch, tunes):
    """They are told when they come and when they go, where the setting says so."""
    monkeypatch.setattr(tuning, "MANY", 2)
    app.config["WEBSOCKETS_TUNE_PROCESS"] = tunes
    websockets = WebSockets(app)
    asgi = websockets.asgi_app(app)
    websockets.route("/ws")(lambda ws: ws.receive())

    async def main():
        async with connection(asgi, "/ws") as first:
            assert await first.get_status() == 101
            assert gc.get_threshold()[2] == 10
            async with connection(asgi, "/ws") as second:
                assert await second.get_status() == 101
                assert gc.get_threshold()[2] == (100 if tunes else 10)
            await wait_until(lambda: gc.get_threshold()[2] == 10)

    anyio.run(main)


def test_the_collector_still_collects():
    """What is made after the start is collected as ever."""
    script = (
        "import gc, weakref\n"
        "from flask_websockets.bridge import tuning\n"
        "tuning.spare_the_collector()\n"
        "class A: pass\n"
        "a = A(); a.a = a; gone = weakref.ref(a); del a; gc.collect()\n"
        "print(gone() is None)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=TIMEOUT)
    assert run.stdout.strip() == b"True"


@pytest.mark.skipif(not tuning.can_pin(), reason="only Linux pins")
def test_pinned_for_a_while():
    """This thread and those that it starts are on one core; afterwards it may go where it might."""
    allowed, found = os.sched_getaffinity(0), []
    for number in (0, 1, len(allowed)):
        with tuning.pinned(number):
            thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
            thread.start()
            thread.join(TIMEOUT)
        assert os.sched_getaffinity(0) == allowed
    assert [len(cores) for cores in found] == [1, 1, 1]
    assert found[0] == found[2] == {min(allowed)}
    assert (found[0] == found[1]) is (len(allowed) == 1)
