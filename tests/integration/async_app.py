"""Async and sync views side by side: what tests/integration/test_async_views.py serves.

Nothing here is asyncio's alone, so that it runs on trio as well. Views note what becomes of them
under the key in their path, and ``/records/<key>`` tells it.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from contextvars import ContextVar

import anyio
import anyio.to_thread
from flask import Flask, abort, current_app, g, request, session, url_for

from flask_websockets import ConnectionClosed, WebSockets

app = Flask(__name__)
app.secret_key = "not a secret"
app.config.update(
    WEBSOCKETS_CLOSE_TIMEOUT=0.5,
    WEBSOCKETS_SEND_TIMEOUT=1,
    WEBSOCKETS_HANDSHAKE_TIMEOUT=3,
    WEBSOCKETS_OUTBOX_MESSAGES=20,
    WEBSOCKETS_OUTBOX_BYTES=100_000_000,
)
websockets = WebSockets(app)
variable: ContextVar[str] = ContextVar("variable", default="unset")
records: dict[str, list[str]] = {}
released: dict[str, threading.Event] = {}
meeting = threading.Barrier(10)


def note(key, what):
    records.setdefault(key, []).append(what)
    print(f"{key}: {what}", flush=True)


@app.before_request
def before():
    g.user = request.args.get("user", "nobody")
    if request.path.startswith("/ws/context"):
        session["user"] = g.user
    if request.path.startswith("/ws/blocked"):
        key = request.path.rpartition("/")[2]
        note(key, "blocks")
        assert released.setdefault(key, threading.Event()).wait(10)


@app.teardown_request
def teardown(error):
    if request.path.startswith("/ws/"):
        on_loop = threading.current_thread() is loop_thread
        told = "nothing" if error is None else type(error).__name__
        note(request.path.rpartition("/")[2], f"teardown: {told}{' on the loop' * on_loop}")


# -- views ------------------------------------------------------------------------------------


@websockets.route("/ws/echo/<key>")
async def echo(ws, key):
    async for data in ws.iter_data():
        await ws.send(data)


@websockets.route("/ws/sync-echo/<key>")
def sync_echo(ws, key):
    for data in ws.iter_data():
        ws.send(data)


def picture():
    return [
        request.path,
        g.user,
        session["user"],
        current_app.name,
        url_for("echo", key="k"),
        variable.get(),
    ]


@websockets.route("/ws/context/<key>", endpoint="context")
async def context(ws, key):
    seen = [picture()]
    await anyio.sleep(0.001)
    seen.append(picture())
    await ws.accept()
    seen.append(picture())
    await ws.receive()
    seen.append(picture())

    async def child():
        await anyio.sleep(0.001)
        seen.append(picture())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child)
    seen.append(await anyio.to_thread.run_sync(picture))
    await ws.send_json(seen)


@websockets.route("/ws/sync-context/<key>")
def sync_context(ws, key):
    session["user"] = g.user
    seen = [picture()]
    ws.accept()
    seen.append(picture())
    ws.receive()
    seen.append(picture())
    ws.send_json(seen)


@websockets.route("/ws/room/<key>")
async def room(ws, key):
    async with websockets.subscribe(ws, key):
        await ws.send("subscribed")
        async for data in ws.iter_text():
            await websockets.apublish(f"async: {data}", key, exclude=ws)


@websockets.route("/ws/sync-room/<key>")
def sync_room(ws, key):
    with websockets.subscribe(ws, key):
        ws.send("subscribed")
        for data in ws.iter_text():
            websockets.publish(f"sync: {data}", key, exclude=ws)


@websockets.route("/ws/order/<key>", outbox_messages=1000)
async def order(ws, key):
    async with websockets.subscribe(ws, key):
        for number in range(100):
            await ws.send(f"sent {number}")
            await websockets.apublish(f"published {number}", key)
            await anyio.to_thread.run_sync(websockets.publish, f"threaded {number}", key)


@websockets.route("/ws/ticks/<key>")
async def ticks(ws, key):
    async def tick():
        number = 0
        while True:
            await ws.send(f"tick {number}")
            number += 1
            await anyio.sleep(0.01)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        await ws.receive()
        tasks.cancel_scope.cancel()
    await ws.send("stopped")


class Stop(BaseException):
    """No Exception, as KeyboardInterrupt is none."""


ERRORS = {
    "error": RuntimeError("the secret"),
    "exit": SystemExit(3),
    "interrupt": KeyboardInterrupt(),
    "stop": Stop(),
}


@websockets.route("/ws/end/<how>/<key>")
async def end(ws, how, key):
    await ws.accept()
    if how == "abort":
        abort(404)
    if how == "close":
        await ws.close(4001, "enough")
    if how in ERRORS:
        raise ERRORS[how]


@websockets.route("/ws/refuse/<key>")
async def refuse(ws, key):
    await anyio.sleep(0.001)
    abort(401)


@websockets.route("/ws/silent/<key>")
async def silent(ws, key):
    try:
        await anyio.to_thread.run_sync(released.setdefault(key, threading.Event()).wait, 10)
        await ws.accept()
    except ConnectionClosed:
        note(key, "ConnectionClosed")


@websockets.route("/ws/blocked/<key>")
async def blocked(ws, key):
    await ws.accept()


@websockets.route("/ws/sleep/<key>")
async def sleep(ws, key):
    await ws.send("sleeps")
    try:
        await anyio.sleep(3600)
    except anyio.get_cancelled_exc_class():
        note(key, "cancelled")
        raise
    finally:
        with anyio.move_on_after(10, shield=True):
            await anyio.sleep(0.001)
            note(key, "finally")


@websockets.route("/ws/swallow/<key>")
async def swallow(ws, key):
    await ws.send("sleeps")
    while True:
        try:
            await anyio.sleep(3600)
        except anyio.get_cancelled_exc_class():
            pass


@websockets.route("/ws/receive/<key>")
async def receive(ws, key):
    await ws.send("waits")
    try:
        while True:
            note(key, f"got {await ws.receive()}")
    except ConnectionClosed:
        note(key, "ConnectionClosed")
        raise


@websockets.route("/ws/stubborn/<key>")
async def stubborn(ws, key):
    await ws.send("loops")
    try:
        while True:
            try:
                await ws.receive()
            except Exception:
                continue
    finally:
        note(key, "ended")


@websockets.route("/ws/flood/<key>")
async def flood(ws, key):
    try:
        for number in range(100_000):
            await ws.send(f"{number} ".ljust(65_536, "x"))
    except ConnectionClosed as error:
        note(key, f"ConnectionClosed {error.code}")
        raise


@websockets.route("/ws/sync-sleep/<key>")
def sync_sleep(ws, key):
    ws.send("sleeps")
    time.sleep(3600)


# -- HTTP -------------------------------------------------------------------------------------


@app.get("/stats")
def stats():
    return dataclasses.asdict(websockets.stats())


@app.get("/records/<key>")
def told(key):
    return records.get(key, [])


@app.post("/release/<key>")
def release(key):
    released.setdefault(key, threading.Event()).set()
    return "released"


@app.get("/meet")
def meet():
    meeting.wait(10)
    return variable.get()


@app.post("/publish/<key>")
def publish(key):
    websockets.publish(f"HTTP: {request.get_data(as_text=True)}", key)
    return "published"


loop_thread: threading.Thread | None = None
inner = websockets.asgi_app()


async def asgi(scope, receive, send):
    """ASGI middleware: a variable of the connection's own task."""
    global loop_thread
    loop_thread = threading.current_thread()
    variable.set(scope.get("path", ""))
    await inner(scope, receive, send)
