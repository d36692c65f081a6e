"""What kernel and interpreter are asked for: once a process, where they know it, or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from flask_websockets.bridge import tuning

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
    found["thresholds"] = gc.get_threshold()
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
    found, before = served("on"), served("off")["thresholds"]
    assert found["frozen"] > 10_000
    old = tuning.OLD_THRESHOLD if before[2] == tuning.USUAL_THRESHOLD else before[2]
    assert found["thresholds"] == [*before[:2], old]
    assert found["again"] <= found["frozen"]
    if found["slots"] is not None and found["slots"] >= 0:  # since Linux 6.16
        assert found["slots"] == tuning.FUTEX_SLOTS
    assert found["policy"] == (3 if found["policy"] is not None else None)  # SCHED_BATCH


def test_switched_off_nothing_is_asked_for():
    """WEBSOCKETS_TUNE_PROCESS = False leaves kernel and interpreter as they are."""
    found = served("off")
    assert found["frozen"] == found["again"] == 0
    assert found["thresholds"][2] != tuning.OLD_THRESHOLD
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


def test_thresholds_of_the_applications_own_stay():
    """Who has set the collector's thresholds keeps them."""
    script = (
        "import gc\n"
        "from flask_websockets.bridge import tuning\n"
        "gc.set_threshold(5000, 20, 30)\n"
        "tuning.spare_the_collector()\n"
        "print(gc.get_threshold()[2])\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=TIMEOUT)
    assert run.stdout.strip() == b"30"


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
