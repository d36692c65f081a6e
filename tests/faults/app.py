"""The application under test: views that listen, flood, sleep, raise and lie.

``served.py`` beside each server is a copy of this file. Every view takes a key from its query and
notes under it what it saw of its connection's end, with the time: the clock is the system's, so a
test may compare it with its own.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partialmethod
from typing import Any

import uvicorn
from flask import Flask, Response, request

from flask_websockets import AsyncWebSocket, ConnectionClosed, WebSocket, WebSockets

if seconds := os.environ.get("SHORT_PINGS"):
    # ``serve`` has no option for uvicorn's pings: 20 s, and 20 s for the answer. What is tested
    # is what follows a missing answer; the long half of the suite waits for the real ones.
    pings = {"ws_ping_interval": float(seconds), "ws_ping_timeout": float(seconds)}
    uvicorn.Config.__init__ = partialmethod(uvicorn.Config.__init__, **pings)  # type: ignore[method-assign, assignment]

app = Flask(__name__)
app.config.from_prefixed_env()
websockets = WebSockets(app)

#: What views noted, by the key of their connection.
notes: dict[str, list[dict[str, Any]]] = defaultdict(list)
#: Set by ``/release/<key>``.
released: dict[str, threading.Event] = defaultdict(threading.Event)


def note(what: str, **details: Any) -> None:
    notes[request.args["key"]].append({"what": what, "at": time.monotonic(), **details})


@contextmanager
def noted() -> Iterator[None]:
    """Note how a view ends: the code of its ConnectionClosed, or the name of another exception."""
    note("began")
    try:
        yield
    except ConnectionClosed as closed:
        note("ended", code=closed.code, reason=closed.reason)
    except BaseException as error:
        note("raised", error=type(error).__name__)
        raise
    else:
        note("returned")


def wait_for_release() -> None:
    assert released[request.args["key"]].wait(60), "nobody released it"


# -- what a test asks ------------------------------------------------------------------------------


@app.get("/stats")
def stats() -> dict[str, Any]:
    status = open("/proc/self/status").read()  # noqa: SIM115
    resident = int(status.partition("VmRSS:")[2].split()[0]) * 1024
    return {
        **asdict(websockets.stats()),
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "resident": resident,
    }


@app.get("/notes/<key>")
def show_notes(key: str) -> list[dict[str, Any]]:
    return notes[key]


@app.post("/release/<key>")
def release(key: str) -> str:
    released[key].set()
    return "released"


@app.post("/publish/<channel>")
def publish(channel: str) -> str:
    data = request.get_data()
    for _ in range(int(request.args.get("times", "1"))):
        websockets.publish(data, channel)
    return "published"


@app.get("/hello")
def hello() -> str:
    return "hello"


# -- views that behave -----------------------------------------------------------------------------


@websockets.route("/echo")
def echo(ws: WebSocket) -> None:
    ws.send("ready")
    for data in ws.iter_data():
        ws.send(data)


@websockets.route("/listen")
def listen(ws: WebSocket) -> None:
    """Receives until the end, subscribed to a channel that is named after its key."""
    with noted(), websockets.subscribe(ws, request.args.get("channel", request.args["key"])):
        ws.send("ready")
        while True:
            ws.receive()


@websockets.route("/async/listen")
async def async_listen(ws: AsyncWebSocket) -> None:
    with noted():
        key = request.args.get("channel", request.args["key"])
        async with websockets.subscribe(ws, key):
            await ws.send("ready")
            while True:
                await ws.receive()


@websockets.route("/return")
def returns(ws: WebSocket) -> None:
    with noted():
        ws.accept()


@websockets.route("/async/return")
async def async_returns(ws: AsyncWebSocket) -> None:
    with noted():
        await ws.accept()


# -- views that send much --------------------------------------------------------------------------


@websockets.route("/flood")
def flood(ws: WebSocket) -> None:
    """Sends without an end."""
    with noted():
        while True:
            ws.send(bytes(65_536))


@websockets.route("/async/flood")
async def async_flood(ws: AsyncWebSocket) -> None:
    with noted():
        while True:
            await ws.send(bytes(65_536))


@websockets.route("/some")
def some(ws: WebSocket) -> None:
    """Sends more than sockets hold, in one piece that the server takes, and waits."""
    with noted():
        ws.send(bytes(8_000_000))
        while True:
            ws.receive()


# -- views that do not receive ---------------------------------------------------------------------


@websockets.route("/deaf")
def deaf(ws: WebSocket) -> None:
    """Receives nothing until it is released; then everything."""
    with noted():
        ws.send("ready")
        wait_for_release()
        while True:
            ws.send(ws.receive() or "")


@websockets.route("/sleep")
def sleep(ws: WebSocket) -> None:
    ws.send("ready")
    time.sleep(600)


@app.get("/sleep")
def sleep_http() -> str:
    note("began")
    time.sleep(600)
    return "at last"


# -- views that raise ------------------------------------------------------------------------------


@websockets.route("/raise/<when>")
def raises(ws: WebSocket, when: str) -> None:
    if when == "after":
        ws.accept()
    raise RuntimeError("the secret of the view")


@websockets.route("/async/raise/<when>")
async def async_raises(ws: AsyncWebSocket, when: str) -> None:
    if when == "after":
        await ws.accept()
    raise RuntimeError("the secret of the view")


def outcome(function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """What came of a call."""
    try:
        result = function(*arguments, **options)
    except ConnectionClosed as closed:
        return ["ConnectionClosed", closed.code]
    except Exception as error:
        return [type(error).__name__]
    return ["returned", result]


@websockets.route("/after-the-end")
def after_the_end(ws: WebSocket) -> None:
    """Waits for the end, or makes it, and then says every word there is."""
    ws.send("ready")
    if ws.receive() == "close":
        ws.close(4001, "ours")
    ws.wait_closed()
    note(
        "tried",
        outcomes=[
            outcome(ws.send, "late"),
            outcome(ws.send_json, {}),
            outcome(ws.receive),
            outcome(ws.receive, timeout=0.1),
            outcome(ws.close),
            outcome(ws.close, 4002),
            outcome(ws.wait_closed),
        ],
    )


# -- views that pass on what they should not -------------------------------------------------------

BAD_HEADERS = [
    ("X-One", "1\r\nX-Evil: 1"),
    ("X-One", "1\nX-Evil: 1"),
    ("X-One\r\nX-Evil", "1"),
    ("X One", "1"),
    ("X-One", "1\0"),
    ("", "1"),
    ("X-One", "\N{SNOWMAN}"),
]

BAD_SUBPROTOCOLS = ["a\r\nX-Evil: 1", "a b", "", "k\N{LATIN SMALL LETTER A WITH DIAERESIS}se", "z"]


@websockets.route("/headers", subprotocols=["a", "b"])
def headers(ws: WebSocket) -> None:
    """Tries to accept with every header and subprotocol that may not be, and then does it."""
    tried = [outcome(ws.accept, headers=[pair]) for pair in BAD_HEADERS]
    tried += [outcome(ws.accept, subprotocol=name) for name in BAD_SUBPROTOCOLS]
    note("tried", outcomes=tried)
    ws.accept(headers={"X-One": "1"})
    ws.send_json(ws.subprotocol)


@websockets.route("/deny")
def deny(ws: WebSocket) -> Response:
    """Refuses with a header that may not be."""
    response = Response("no", 403)
    response.headers["X-One"] = "1\r\nX-Evil: 1"
    return response


@app.post("/publish-wrong/<channel>")
def publish_wrong(channel: str) -> list[Any]:
    """Tries to publish what may not be, and then a word that may."""
    too_much = int(request.args["too_much"])
    tried = [
        outcome(websockets.publish, object(), channel),
        outcome(websockets.publish, None, channel),
        outcome(websockets.publish, {"a": 1}, channel),
        outcome(websockets.publish, "\ud800", channel),
        outcome(websockets.publish, "x" * too_much, channel),
        outcome(websockets.publish, bytes(too_much), channel),
        outcome(websockets.publish_json, object(), channel),
        outcome(websockets.publish_json, {1, 2}, channel),
        outcome(websockets.publish, object(), channel, encode_json=True),
        outcome(websockets.publish, "word", [channel, 5]),
    ]
    websockets.publish("a word", channel)
    return tried


@app.post("/publish-nan/<channel>")
def publish_nan(channel: str) -> list[Any]:
    """NaN is no JSON (RFC 8259, section 6), but is what json.dumps makes of it."""
    return outcome(websockets.publish_json, float("nan"), channel)


@websockets.route("/subscribe-many")
def subscribe_many(ws: WebSocket) -> None:
    """Subscribes to what its client says, as often as its client says."""
    for data in ws.iter_json():
        tried = 0
        with ExitStack() as stack:
            try:
                for tried in range(data["times"]):
                    stack.enter_context(websockets.subscribe(ws, data["name"] + str(tried)))
            except Exception as error:
                ws.send_json([tried, type(error).__name__])
            else:
                ws.send_json([data["times"], "subscribed"])


# -- the end ---------------------------------------------------------------------------------------


@app.post("/publisher")
def publisher() -> str:
    """Starts a thread that publishes until it is told that nobody serves any more."""

    def run() -> None:
        slowest = 0.0
        while True:
            started = time.monotonic()
            try:
                websockets.publish("news", "news")
            except Exception as error:
                took = time.monotonic() - started
                print(f"publish raised {type(error).__name__}", flush=True)
                print(f"the slowest took {max(slowest, took):.3f} s", flush=True)
                return
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.001)

    threading.Thread(target=run, daemon=False).start()
    return "started"


@app.post("/raise-signal/<int:number>")
def raise_signal(number: int) -> str:
    os.kill(os.getpid(), signal.Signals(number))
    return "raised"


asgi = websockets.asgi_app()
