"""Async views: the same verbs with ``await``, on asyncio and on trio; and a view's own threads."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import re
import sys
import textwrap
import threading
import types
from collections import defaultdict
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path

import anyio
import anyio.to_thread
import msgpack
import pytest
from flask import (
    Response,
    abort,
    copy_current_request_context,
    current_app,
    g,
    got_request_exception,
    request,
    session,
    url_for,
)

from flask_websockets import (
    AsyncWebSocket,
    ConcurrencyError,
    ConnectionClosed,
    ConnectionRejected,
    InvalidMessage,
    InvalidState,
    UsageError,
    WebSocket,
    WebSockets,
    WrongThread,
)
from flask_websockets.bridge import Alarm

from .asgi_driver import TIMEOUT, connection, wait_until

#: A close timeout that a test waits for, in seconds.
CLOSE = 0.3
#: Seconds that a loaded machine may be late.
MARGIN = 2.0


def make(app, **settings):
    app.config.update(settings)
    websockets = WebSockets(app)
    return websockets, websockets.asgi_app()


def data_of(message):
    """What a message carries."""
    assert message["type"] == "websocket.send", message
    text = message.get("text")
    return message["bytes"] if text is None else text


async def closed(peer):
    """How the application closed the connection."""
    message = await peer.get()
    assert message["type"] == "websocket.close", message
    return message["code"], message.get("reason") or ""


async def returned(peer):
    """Wait until the application is done with a connection."""
    with anyio.fail_after(TIMEOUT):
        await peer.returned.wait()


async def turns(number=30):
    """Let everybody else run, often enough for whatever is ready."""
    for _ in range(number):
        await anyio.lowlevel.checkpoint()


def add_echo(websockets):
    @websockets.route("/echo")
    async def echo(ws):
        async for data in ws.iter_data():
            await ws.send(data)


async def check_echo(asgi):
    """The loop runs, and serves another connection."""
    async with connection(asgi, "/echo") as peer:
        assert await peer.get_status() == 101
        for data in ("text", b"binary"):
            peer.send(data)
            assert data_of(await peer.get()) == data


@pytest.fixture
def run_asyncio():
    """Run a coroutine function on asyncio, at most 20 seconds."""

    def run(main):
        async def bounded():
            with anyio.fail_after(20):
                return await main()

        return anyio.run(bounded, backend="asyncio")

    return run


# -- the verbs --------------------------------------------------------------------------------


def test_send_chooses_the_frame_by_type(run, app):
    """str is a text frame, bytes-like is binary."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        for data in ("text", b"bytes", bytearray(b"array"), memoryview(b"view"), ""):
            await ws.send(data)

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            came = [data_of(await peer.get()) for _ in range(5)]
            assert came == ["text", b"bytes", b"array", b"view", ""]
            assert await closed(peer) == (1000, "")

    run(main)


def test_the_other_sends(run, app):
    """send_text, send_bytes, send_json and send_msgpack say which frame they make."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        await ws.send_text("é")
        await ws.send_bytes(b"\x00")
        await ws.send_bytes("é")
        await ws.send_json([1, None])
        await ws.send_msgpack({"a": [1]})

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            came = [data_of(await peer.get()) for _ in range(5)]
            assert came[:3] == ["é", b"\x00", "é".encode()]
            assert app.json.loads(came[3]) == [1, None]
            assert msgpack.unpackb(came[4]) == {"a": [1]}

    run(main)


def test_wrong_data_raises_in_the_view_and_nothing_is_sent(run, app):
    """Wrong types are TypeError, text that UTF-8 cannot carry is ValueError."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        for verb, data in (
            ("send", 1),
            ("send", None),
            ("send", ["x"]),
            ("send_text", b"x"),
            ("send_bytes", 1),
            ("send_json", object()),
        ):
            with pytest.raises(TypeError):
                await getattr(ws, verb)(data)
        with pytest.raises(ValueError):
            await ws.send("\ud800")
        await ws.send("still here")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert data_of(await peer.get()) == "still here"

    run(main)


def test_receive_with_a_timeout(run, app):
    """receive gives None when the time has passed, receive_json raises TimeoutError."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        assert await ws.receive(timeout=0.01) is None
        assert await ws.receive(timeout=0) is None
        with pytest.raises(TimeoutError, match=r"0\.01 s"):
            await ws.receive_json(timeout=0.01)
        for bad in (-1, float("nan")):
            with pytest.raises(ValueError):
                await ws.receive(timeout=bad)
        await ws.send("now")
        assert await ws.receive(timeout=TIMEOUT) == "after all"
        await ws.send("done")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert data_of(await peer.get()) == "now"
            peer.send("after all")
            assert data_of(await peer.get()) == "done"

    run(main)


def test_receive_json(run, app):
    """Text and binary JSON parse; what does not is InvalidMessage and no end."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        assert await ws.receive_json() == {"a": None}
        assert await ws.receive_json(timeout=TIMEOUT) == [1]
        for _ in range(2):
            with pytest.raises(InvalidMessage, match="Expected"):
                await ws.receive_json()
        assert await ws.receive_json() is None
        await ws.send("fine")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            for data in ('{"a": null}', b"[1]", "{", b"\xff", "null"):
                peer.send(data)
            assert data_of(await peer.get()) == "fine"

    run(main)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("data", ["1", b"2"]),
        ("text", ["1", "2"]),
        ("bytes", [b"1", b"2"]),
        ("json", [1, 2]),
    ],
)
def test_iteration(run, app, name, expected):
    """The four iterators convert what comes, and end when the client leaves."""
    websockets, asgi = make(app)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        async for item in getattr(ws, f"iter_{name}")():
            seen.append(item)
        seen.append(ws.closed)

    async def main():
        async with connection(asgi, "/ws") as peer:
            peer.send("1")
            peer.send(b"2")
            assert await peer.get_status() == 101
            peer.leave()
            await returned(peer)
        assert seen == [*expected, True]

    run(main)


def test_an_iteration_that_is_left_loses_nothing(run, app):
    """After a break the next iteration goes on with the next message."""
    websockets, asgi = make(app)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        for iterate in (ws.iter_data, ws.iter_text, ws.iter_json):
            async for item in iterate():
                seen.append(item)
                break
            gc.collect()  # a generator that complains of its end does it here
        await ws.send("done")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            for data in ("1", b"2", "3"):
                peer.send(data)
            assert data_of(await peer.get()) == "done"
        assert seen == ["1", "2", 3]

    run(main)


def test_accept(run, app):
    """accept chooses the subprotocol, sends headers, and checks both; a second one is an error."""
    websockets, asgi = make(app)
    seen = []

    @websockets.route("/ws", subprotocols=["a", "b"])
    async def view(ws):
        seen.append((ws.connected, ws.closed, ws.close_code, ws.close_reason, ws.subprotocol))
        for bad in (
            {"subprotocol": "c"},
            {"headers": {"X-Bad": "1\r\nX-Injected: 2"}},
        ):
            with pytest.raises(ValueError):
                await ws.accept(**bad)
        await ws.accept(headers={"X-One": "1"})
        seen.append((ws.connected, ws.closed, ws.close_code, ws.close_reason, ws.subprotocol))
        with pytest.raises(InvalidState):
            await ws.accept()
        seen.append(ws.environ["PATH_INFO"])
        await ws.send("done")

    @websockets.route("/named", subprotocols=["a", "b"])
    async def named(ws):
        await ws.accept(subprotocol="x")
        seen.append(ws.subprotocol)

    async def main():
        async with connection(asgi, "/ws", subprotocols=["x", "b"]) as peer:
            message = await peer.get()
            assert (message["type"], message["subprotocol"]) == ("websocket.accept", "b")
            assert (b"x-one", b"1") in [(name.lower(), value) for name, value in message["headers"]]
            assert data_of(await peer.get()) == "done"
            assert await closed(peer) == (1000, "")
        async with connection(asgi, "/named", subprotocols=["x", "b"]) as peer:
            assert (await peer.get())["subprotocol"] == "x"
            assert await closed(peer) == (1000, "")
        assert seen == [
            (False, False, None, None, "b"),
            (True, False, None, None, "b"),
            "/ws",
            "x",
        ]

    run(main)


@pytest.mark.parametrize("verb", ["receive", "send", "iter_data", "wait_closed", "subscribe"])
def test_the_first_use_accepts(run, app, verb):
    """A receive, a send, an iteration, a wait and a subscribe accept by themselves."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        assert not ws.connected
        if verb == "iter_data":
            async for _ in ws.iter_data():
                pass
        elif verb == "subscribe":
            async with websockets.subscribe(ws, "a"):
                assert ws.connected
        elif verb == "send":
            await ws.send("x")
        else:
            await getattr(ws, verb)(timeout=0)

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101

    run(main)


def test_close(run, app):
    """close says goodbye once; afterwards sends and receives raise what was said."""
    websockets, asgi = make(app)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        for code, reason in ((1005, ""), (999, ""), (5000, ""), (1000, "é" * 62)):
            with pytest.raises(ValueError):
                await ws.close(code, reason)
        assert ws.connected
        await ws.send("last words")
        await ws.close(4001, "enough")
        await ws.close(4002, "twice")
        seen.append((ws.connected, ws.closed, ws.close_code, ws.close_reason))
        for use in (lambda: ws.send("x"), ws.receive, lambda: ws.send_json(1), ws.receive_json):
            with pytest.raises(ConnectionClosed) as caught:
                await use()
            seen.append((caught.value.code, caught.value.reason))
        async for _ in ws.iter_data():
            seen.append("never")
        seen.append(await ws.wait_closed(timeout=TIMEOUT))

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert data_of(await peer.get()) == "last words"
            assert await closed(peer) == (4001, "enough")
            peer.leave(4001)
            await returned(peer)
        assert seen == [(False, True, 4001, "enough"), *[(4001, "enough")] * 4, True]

    run(main)


def test_close_before_the_accept_refuses(run, app):
    """A close instead of an accept answers the handshake 403."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        await ws.close()
        assert ws.closed

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 403

    run(main)


def test_wait_closed(run, app):
    """wait_closed says False when the time passes, and True when the client has left."""
    websockets, asgi = make(app)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        seen.append(await ws.wait_closed(timeout=0))
        seen.append(await ws.wait_closed(timeout=0.01))
        with pytest.raises(ValueError):
            await ws.wait_closed(timeout=-1)
        await ws.send("waiting")
        async with anyio.create_task_group() as tasks:

            async def wait():
                seen.append(await ws.wait_closed(timeout=TIMEOUT))

            tasks.start_soon(wait)
            seen.append(await ws.wait_closed())
        seen.append(await ws.wait_closed())

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert data_of(await peer.get()) == "waiting"
            await turns()
            assert seen == [False, False]
            peer.leave()
            await returned(peer)
        assert seen == [False, False, True, True, True]

    run(main)


def test_a_view_that_does_nothing(run, app):
    """A view that returns without touching its connection accepts and closes 1000."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        pass

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert await closed(peer) == (1000, "")

    run(main)


def test_route_returns_the_function(app):
    """The decorator gives back the coroutine function it was given."""
    websockets, _ = make(app)

    async def view(ws: AsyncWebSocket) -> None:
        pass

    assert websockets.route("/ws")(view) is view


def test_what_a_view_is_given(run, app):
    """An async view gets an AsyncWebSocket and the rule's variables; a sync one a WebSocket."""
    websockets, asgi = make(app)

    @websockets.route("/async/<room>/<int:number>")
    async def async_view(ws, room, number):
        assert isinstance(ws, AsyncWebSocket)
        assert not isinstance(ws, WebSocket)
        await ws.send_json([room, number])

    @websockets.route("/sync/<room>/<int:number>")
    def sync_view(ws, room, number):
        assert isinstance(ws, WebSocket)
        ws.send_json([room, number])

    async def main():
        for kind in ("async", "sync"):
            async with connection(asgi, f"/{kind}/blue/7") as peer:
                assert await peer.get_status() == 101
                assert app.json.loads(data_of(await peer.get())) == ["blue", 7]

    run(main)


def test_what_was_received_is_delivered_before_the_end(run, app):
    """Messages that came before the client left are delivered, then the end is."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=TIMEOUT)
    go, seen = [], []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        await go[0].wait()
        try:
            while True:
                seen.append(await ws.receive())
        except ConnectionClosed as error:
            seen.append(error.code)

    async def main():
        go.append(anyio.Event())
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            for data in ("1", b"2", "3"):
                peer.send(data)
            peer.leave(1001)
            await turns()
            go[0].set()
            await returned(peer)
        assert seen == ["1", b"2", "3", 1001]

    run(main)


# -- contexts ---------------------------------------------------------------------------------


def picture():
    """What a view sees of Flask."""
    return (
        request.path,
        request.args["q"],
        session["user"],
        g.user,
        current_app.name,
        url_for("view", name="other"),
    )


def test_i3_contexts_hold_wherever_a_view_goes(run, app):
    """Flask's contexts are there before and after awaits, in child tasks, in threads, at the end.

    And those of connections that are open at the same time never mix.
    """
    websockets, asgi = make(app)
    seen = defaultdict(list)

    @app.before_request
    def before():
        g.user = session["user"] = request.args["q"]
        seen[request.path].append(picture())

    @app.teardown_request
    def teardown(error):
        seen[request.path].append(picture())

    @websockets.route("/ws/<name>")
    async def view(ws, name):
        path = f"/ws/{name}"
        seen[path].append(picture())
        await anyio.sleep(0)
        seen[path].append(picture())
        await ws.accept()
        seen[path].append(picture())
        await ws.receive()
        seen[path].append(picture())

        async def child():
            await anyio.sleep(0.001)
            seen[path].append(picture())
            await ws.send("from a child")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
        seen[path].append(await anyio.to_thread.run_sync(picture))
        try:
            await ws.receive()
        finally:
            seen[path].append(picture())

    async def main():
        start = anyio.Event()

        async def visit(name):
            async with connection(asgi, f"/ws/{name}", query_string=b"q=" + name.encode()) as peer:
                assert await peer.get_status() == 101
                await start.wait()
                peer.send("go")
                assert data_of(await peer.get()) == "from a child"

        async with anyio.create_task_group() as tasks:
            names = [str(number) for number in range(20)]
            for name in names:
                tasks.start_soon(visit, name)
            await wait_until(lambda: websockets.stats().view_tasks == 20)
            start.set()
        for name in names:
            path = f"/ws/{name}"
            await wait_until(lambda path=path: len(seen[path]) == 9)
            first = seen[path][0]
            assert first[:5] == (path, name, name, name, "tests")
            assert first[5].endswith("/ws/other")
            assert seen[path] == [first] * 9

    run(main)


def test_i3_a_handshake_has_one_view(app, websockets, client):
    """A middleware that calls the application twice gets an error, and no second view runs."""
    inner, seen = app.wsgi_app, []

    def twice(environ, start_response):
        inner(environ, start_response)
        return inner(environ, start_response)

    app.wsgi_app = twice

    @websockets.route("/ws")
    async def view(ws):
        seen.append(await ws.receive())

    app.testing = True
    with (
        pytest.raises(InvalidState, match="runs only once"),
        client.websocket_connect("/ws") as ws,
    ):
        with pytest.raises(ConnectionClosed) as caught:
            ws.receive()
        assert caught.value.code == 1011
    assert seen == []  # its connection was closed before it went on


def test_the_session(run, app, caplog):
    """Changes before the accept are in its Set-Cookie; later ones are reported; reads go on."""
    websockets, asgi = make(app)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        session["early"] = "yes"
        await ws.accept()
        seen.append(session["early"])
        await ws.receive()
        session["late"] = "yes"
        seen.append(session["early"])

    async def main():
        async with connection(asgi, "/ws") as peer:
            message = await peer.get()
            cookies = [value for name, value in message["headers"] if name.lower() == b"set-cookie"]
            assert len(cookies) == 1
            cookie = cookies[0].decode().partition(";")[0].partition("=")[2]
            serializer = app.session_interface.get_signing_serializer(app)
            assert serializer.loads(cookie) == {"early": "yes"}
            assert "The session was changed after" not in caplog.text
            peer.send("go")
            assert await closed(peer) == (1000, "")
        assert seen == ["yes", "yes"]

    run(main)
    assert "The session was changed after" in caplog.text


variable: ContextVar[str] = ContextVar("variable", default="unset")
hooked: ContextVar[str] = ContextVar("hooked", default="unset")


def test_i3_context_variables_of_the_server(run, app):
    """What ASGI middleware sets is seen in views, and what a view sets nowhere else."""
    websockets, asgi = make(app)
    seen = defaultdict(list)

    async def middleware(scope, receive, send):
        variable.set(scope["path"])
        await asgi(scope, receive, send)
        seen[scope["path"]].append(variable.get())

    @app.before_request
    def before():
        seen[request.path].append(variable.get())
        hooked.set(request.path)

    @websockets.route("/async/<name>")
    async def async_view(ws, name):
        path = request.path
        seen[path] += [variable.get(), hooked.get()]
        await ws.accept()
        seen[path] += [variable.get(), hooked.get()]

        async def child():
            await anyio.sleep(0)
            seen[path].append(variable.get())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
        seen[path].append(await anyio.to_thread.run_sync(variable.get))
        variable.set("changed")
        await ws.receive()
        assert variable.get() == "changed"

    @websockets.route("/sync/<name>")
    def sync_view(ws, name):
        path = request.path
        seen[path] += [variable.get(), hooked.get()]
        ws.accept()
        variable.set("changed")
        ws.receive()

    async def main():
        for kind, number in (("async", 8), ("sync", 4)):
            paths = [f"/{kind}/1", f"/{kind}/2"]
            async with connection(middleware, paths[0]) as one:
                assert await one.get_status() == 101
                async with connection(middleware, paths[1]) as two:
                    assert await two.get_status() == 101
                    for peer in (one, two):
                        peer.send("go")
                        assert await closed(peer) == (1000, "")
            for path in paths:
                assert seen[path] == [path] * number
        assert (variable.get(), hooked.get()) == ("unset", "unset")

    run(main)


# -- hooks ------------------------------------------------------------------------------------


def test_i3_hooks_run_once_and_never_on_the_loop(run, app):
    """Hooks run in threads and once: after_request at the accept, teardown when the view ended."""
    websockets, asgi = make(app)
    seen = []

    def note(name):
        seen.append((name, threading.get_ident()))

    app.before_request(lambda: note("before"))
    app.teardown_request(lambda error: note(f"teardown request {error}"))
    app.teardown_appcontext(lambda error: note(f"teardown app {error}"))

    @app.after_request
    def after(response):
        note("after")
        return response

    @websockets.route("/ws")
    async def view(ws):
        note("view")
        await ws.accept()
        await ws.receive()
        await anyio.sleep(0.001)
        note("end")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            await wait_until(lambda: len(seen) >= 3)
            await turns()
            assert [name for name, _ in seen] == ["before", "view", "after"]
            peer.send("go")
            assert await closed(peer) == (1000, "")
        await wait_until(lambda: len(seen) >= 6)
        await wait_until(lambda: websockets.stats().view_tasks == 0)
        names = [name for name, _ in seen]
        assert names == [
            *("before", "view", "after"),
            *("end", "teardown request None", "teardown app None"),
        ]
        loop = threading.get_ident()
        assert [name for name, thread in seen if thread == loop] == ["view", "end"]

    run(main)


def test_i3_a_view_goes_on_when_its_handshake_has_ended(run, app):
    """Its code and Flask's never run at the same time: after_request is done before it."""
    websockets, asgi = make(app)
    went_on, seen = threading.Event(), []

    @app.after_request
    def after(response):
        seen.append(went_on.wait(0.3))
        return response

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        went_on.set()

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert await closed(peer) == (1000, "")

    run(main)
    assert seen == [False]


def test_i5_a_view_that_is_cancelled_while_it_is_accepted(run, app):
    """However often: its thread learns how it ended, and neither is left behind."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=0.1)
    go, seen = threading.Event(), []
    app.teardown_request(lambda error: seen.append("teardown"))

    class Slow(type(app.session_interface)):
        def save_session(self, *args):
            seen.append("saves")
            go.wait(TIMEOUT)

    app.session_interface = Slow()

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()

    async def main():
        async with connection(asgi, "/ws") as peer:
            await wait_until(lambda: seen)
            peer.leave()
            await wait_until(lambda: websockets.stats().stuck_views)  # it was cancelled twice
            go.set()
            await wait_until(lambda: websockets.stats().view_threads == 0)
        assert websockets.stats().view_tasks == 0
        assert seen[-1] == "teardown"

    run(main)


def test_a_teardown_without_a_thread(run, app, monkeypatch, caplog):
    """Where the system has no thread left at the end of a view, its teardown runs all the same."""
    websockets, asgi = make(app)
    seen = []
    app.teardown_request(lambda error: seen.append(("teardown", error)))

    @websockets.route("/ws")
    async def view(ws):
        await ws.receive()

    def start(thread):
        raise RuntimeError("can't start new thread")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            # The handshake's thread may still be at its end, and needs no start.
            await wait_until(lambda: websockets.stats().view_threads == 0)
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", start)
                peer.send("end")
                assert await closed(peer) == (1000, "")
                await returned(peer)
        assert seen == [("teardown", None)]
        assert websockets.stats().view_tasks == websockets.stats().view_threads == 0

    run(main)
    assert "runs on the event loop: can't start new thread" in caplog.text


@pytest.mark.parametrize("hook", ["before_request", "after_request", "teardown_request"])
def test_i3_a_blocking_hook_does_not_stop_the_loop(run, app, hook):
    """While a hook of one connection blocks its thread, another connection echoes."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=TIMEOUT)
    entered, go = threading.Event(), threading.Event()
    add_echo(websockets)

    def block(argument=None):
        if request.path == "/ws":
            entered.set()
            assert go.wait(TIMEOUT)
        return argument

    if hook == "before_request":
        app.before_request(block)
    elif hook == "after_request":
        app.after_request(block)
    else:
        app.teardown_request(block)

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()

    async def main():
        async with connection(asgi, "/ws") as peer:
            await wait_until(entered.is_set)
            await check_echo(asgi)
            go.set()
            assert await peer.get_status() == 101
            assert await closed(peer) == (1000, "")

    run(main)


def test_async_hooks(run, app):
    """Hooks may be coroutine functions: Flask runs them, on a loop of their own thread."""
    websockets, asgi = make(app)

    @app.before_request
    async def before():
        await asyncio.sleep(0)
        g.seen = "before"

    @websockets.route("/ws")
    async def view(ws):
        await ws.send(g.seen)

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert data_of(await peer.get()) == "before"

    run(main)


def test_decorators(run, app):
    """A plain decorator between route and view may look at the request, answer, or go on."""
    websockets, asgi = make(app)
    seen = []

    def members_only(view):
        @wraps(view)
        def decorated(*args, **kwargs):
            seen.append(threading.get_ident())
            if "name" not in request.args:
                return "members only", 401
            return view(*args, **kwargs)

        return decorated

    @websockets.route("/ws")
    @members_only
    async def view(ws):
        await ws.send(f"hello, {request.args['name']}")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 401
        async with connection(asgi, "/ws", query_string=b"name=ann") as peer:
            assert await peer.get_status() == 101
            assert data_of(await peer.get()) == "hello, ann"
        assert len(seen) == 2
        assert threading.get_ident() not in seen

    run(main)


# -- errors -----------------------------------------------------------------------------------


@contextmanager
def watched(app):
    """What teardown and got_request_exception are told."""
    seen = []

    def on_exception(sender, exception, **extra):
        seen.append(("signal", exception, threading.get_ident()))

    app.teardown_request(lambda e: seen.append(("request", e, threading.get_ident())))
    app.teardown_appcontext(lambda e: seen.append(("app", e, threading.get_ident())))
    with got_request_exception.connected_to(on_exception, app):
        yield seen


def test_i12_an_exception_after_the_accept(run, app, caplog):
    """1011 without a reason; logged once, signalled once, and the teardown is told."""
    websockets, asgi = make(app)
    add_echo(websockets)
    raised = KeyError("the secret")

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        await ws.receive()
        raise raised

    async def main():
        with watched(app) as seen:
            async with connection(asgi, "/ws") as peer:
                assert await peer.get_status() == 101
                peer.send("go")
                assert await closed(peer) == (1011, "")
            await wait_until(lambda: len(seen) >= 3)
            await wait_until(lambda: websockets.stats().view_tasks == 0)
            assert [(name, error) for name, error, _ in seen] == [
                ("signal", raised),
                ("request", raised),
                ("app", raised),
            ]
            assert threading.get_ident() not in [thread for _, _, thread in seen]
        await check_echo(asgi)

    run(main)
    logged = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.exc_info[1] for record in logged] == [raised]
    assert logged[0].name == app.logger.name


def test_an_http_exception_after_the_accept(run, app, caplog):
    """abort(404) closes 4404 with the error's name, and is no error of the server's."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        abort(404)

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert await closed(peer) == (4404, "Not Found")

    run(main)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


class Stop(BaseException):
    """No Exception, as KeyboardInterrupt is none."""


@pytest.mark.parametrize("accept", [True, False])
@pytest.mark.parametrize("kind", [SystemExit, Stop, GeneratorExit])
def test_i5_a_base_exception_ends_one_connection_alone(run, app, kind, accept):
    """SystemExit and its like close 1011, or answer 500; the server lives, teardown runs."""
    websockets, asgi = make(app)
    add_echo(websockets)

    @websockets.route("/ws")
    async def view(ws):
        if accept:
            await ws.accept()
            await ws.receive()
        raise kind(3)

    async def main():
        with watched(app) as seen:
            async with connection(asgi, "/echo") as other:
                assert await other.get_status() == 101
                async with connection(asgi, "/ws") as peer:
                    peer.send("go")
                    if accept:
                        assert await peer.get_status() == 101
                        assert await closed(peer) == (1011, "")
                    else:
                        assert await peer.get_status() == 500
                other.send("x")
                assert data_of(await other.get()) == "x"
                await check_echo(asgi)
            await wait_until(lambda: websockets.stats().view_tasks == 0)
            names = [name for name, error, _ in seen if isinstance(error, kind)]
            assert [name for name in names if name != "signal"] == ["request", "app"]

    run(main)


def test_a_cancelled_task_of_the_view_is_an_error_of_the_view(run_asyncio, app):
    """A CancelledError that nobody asked for ends the view with 1011, and nothing else."""
    websockets, asgi = make(app)
    add_echo(websockets)

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        task = asyncio.create_task(asyncio.sleep(3600))
        await asyncio.sleep(0)
        task.cancel()
        await task

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert await closed(peer) == (1011, "")
        await check_echo(asgi)
        await wait_until(lambda: websockets.stats().view_tasks == 0)

    run_asyncio(main)


def test_an_uncaught_connection_closed_is_a_normal_end(run, app, caplog):
    """A view need not catch ConnectionClosed, not even out of a task group."""
    websockets, asgi = make(app)

    @websockets.route("/plain")
    async def plain(ws):
        while True:
            await ws.receive()

    @websockets.route("/group")
    async def group(ws):
        async def wait():
            while True:
                await ws.receive()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await ws.wait_closed()
            await ws.send("x")

    async def main():
        with watched(app) as seen:
            for path in ("/plain", "/group"):
                async with connection(asgi, path) as peer:
                    assert await peer.get_status() == 101
                    peer.leave()
                    await returned(peer)
                await wait_until(lambda: websockets.stats().view_tasks == 0)
                assert [(name, error) for name, error, _ in seen] == [
                    ("request", None),
                    ("app", None),
                ]
                seen.clear()

    run(main)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_handshake_may_be_answered_otherwise(run, app, caplog):
    """abort, a response, an error handler, before_request, an exception: each before the accept."""
    websockets, asgi = make(app)
    ran = []
    app.register_error_handler(KeyError, lambda error: ("no such key", 409))

    @app.before_request
    def before():
        return ("log in first", 401) if request.path == "/hook" else None

    @app.after_request
    def after(response):
        response.headers["X-After"] = "seen"
        return response

    def add(path, answer):
        @websockets.route(path, endpoint=path[1:])
        async def view(ws):
            ran.append(path)
            await anyio.sleep(0)
            return answer()

    def raise_(error):
        raise error

    add("/hook", lambda: None)
    add("/abort", lambda: abort(418))
    add("/response", lambda: Response("later", status=429, headers={"Retry-After": "7"}))
    add("/tuple", lambda: ("gone", 410))
    add("/handled", lambda: raise_(KeyError("x")))
    add("/unhandled", lambda: raise_(RuntimeError("broken")))
    add("/success", lambda: "hello")

    async def main():
        for path, status in (
            ("/hook", 401),
            ("/abort", 418),
            ("/response", 429),
            ("/tuple", 410),
            ("/handled", 409),
            ("/unhandled", 500),
            ("/success", 500),
        ):
            async with connection(asgi, path) as peer:
                message = await peer.get()
                assert (message["type"], message["status"]) == (
                    "websocket.http.response.start",
                    status,
                )
                headers = {name.lower(): value for name, value in message["headers"]}
                if path != "/success":
                    assert headers[b"x-after"] == b"seen"
                body = (await peer.get())["body"]
                if path == "/response":
                    assert (headers[b"retry-after"], body) == (b"7", b"later")
            # A server without the extension.
            async with connection(asgi, path, extensions={}) as peer:
                assert await peer.get_status() == 403
        await wait_until(lambda: websockets.stats().view_tasks == 0)

    run(main)
    assert "/hook" not in ran
    assert "expected a status of 3xx to 5xx" in caplog.text
    assert [record.message for record in caplog.records if record.exc_info] == [
        "Exception on /unhandled [GET]"
    ] * 2


def test_a_value_after_the_accept_is_reported(run, app, caplog):
    """What a view returns after the accept nobody gets: a warning, and a normal end."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        return "too late"

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert await closed(peer) == (1000, "")

    run(main)
    assert "returned str after its connection was accepted" in caplog.text


# -- the handshake's limits -------------------------------------------------------------------


def test_a_view_that_neither_accepts_nor_refuses(run, app, caplog):
    """503 after the handshake timeout; the view's accept raises ConnectionClosed, and it ends."""
    websockets, asgi = make(app, WEBSOCKETS_HANDSHAKE_TIMEOUT=0.3, WEBSOCKETS_CLOSE_TIMEOUT=TIMEOUT)
    go, seen = [], []

    @websockets.route("/ws")
    async def view(ws):
        await go[0].wait()
        for use in (ws.accept, lambda: ws.send("x"), ws.receive):
            with pytest.raises(ConnectionClosed) as caught:
                await use()
            seen.append(str(caught.value))

    async def main():
        go.append(anyio.Event())
        with watched(app) as told:
            async with connection(asgi, "/ws") as peer:
                assert await peer.get_status() == 503
                await turns()
                assert told == []
                go[0].set()
                await returned(peer)
            await wait_until(lambda: len(told) == 2)
        assert len(seen) == 3
        assert "timed out" in seen[0]
        assert websockets.stats().handshake_timeouts == 1

    run(main)
    assert "neither accepted nor refused" in caplog.text


def test_a_client_that_leaves_during_the_handshake(run, app):
    """The view finds out at its accept; one that never comes to it is cancelled."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=CLOSE)
    go, seen = [], []

    @websockets.route("/accept")
    async def accept(ws):
        seen.append(ws)
        await go[0].wait()
        with pytest.raises(ConnectionClosed):
            await ws.accept()
        seen.append("closed")

    @websockets.route("/sleep")
    async def sleep(ws):
        seen.append(ws)
        try:
            await anyio.sleep(3600)
        finally:
            seen.append("cancelled")

    async def main():
        go.append(anyio.Event())
        with watched(app) as told:
            for path, end in (("/accept", "closed"), ("/sleep", "cancelled")):
                async with connection(asgi, path) as peer:
                    await wait_until(lambda: seen)
                    peer.leave(1006)
                    await wait_until(lambda: seen[0].closed)
                    if path == "/accept":
                        go[0].set()
                    await returned(peer)
                assert seen[1:] == [end]
                await wait_until(lambda: len(told) >= 2)
                assert [name for name, _, _ in told if name != "signal"] == ["request", "app"]
                seen.clear()
                told.clear()
        await wait_until(lambda: websockets.stats().view_tasks == 0)
        assert websockets.stats().stuck_views == 0

    run(main)


def test_i3_above_the_limit_503(run, app):
    """An async view's connection counts towards WEBSOCKETS_MAX_CONNECTIONS until it ends."""
    websockets, asgi = make(app, WEBSOCKETS_MAX_CONNECTIONS=1)
    add_echo(websockets)

    async def main():
        async with connection(asgi, "/echo") as first:
            assert await first.get_status() == 101
            async with connection(asgi, "/echo") as second:
                assert await second.get_status() == 503
        await check_echo(asgi)

    run(main)


def test_a_slow_accept_holds_its_handshake(run, app):
    """Above WEBSOCKETS_MAX_HANDSHAKES they queue until a view has accepted."""
    websockets, asgi = make(app, WEBSOCKETS_MAX_HANDSHAKES=1, WEBSOCKETS_HANDSHAKE_TIMEOUT=TIMEOUT)
    go, running = {}, []

    @websockets.route("/<int:number>")
    async def view(ws, number):
        running.append(number)
        await go[number].wait()
        await ws.accept()
        await ws.wait_closed()

    async def main():
        go.update({number: anyio.Event() for number in range(2)})
        async with connection(asgi, "/0") as first:
            await wait_until(lambda: running)
            async with connection(asgi, "/1") as second:
                await turns()
                assert running == [0]
                go[0].set()
                assert await first.get_status() == 101
                await wait_until(lambda: running == [0, 1])
                go[1].set()
                assert await second.get_status() == 101

    run(main)


# -- the end ----------------------------------------------------------------------------------


def test_i5_a_view_that_waits_for_something_else_is_cancelled(run, app, caplog):
    """After WEBSOCKETS_CLOSE_TIMEOUT, and not before; its finally runs, and then teardown."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=CLOSE)
    seen = []
    app.teardown_request(lambda error: seen.append("teardown"))

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        seen.append("sleeps")
        try:
            await anyio.sleep(3600)
        except anyio.get_cancelled_exc_class():
            seen.append("cancelled")
            raise
        finally:
            seen.append(("finally", request.path))

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            await wait_until(lambda: seen)
            peer.leave()
            started = anyio.current_time()
            await wait_until(lambda: len(seen) > 1)
            assert CLOSE * 0.9 < anyio.current_time() - started < CLOSE + MARGIN
            await returned(peer)
        await wait_until(lambda: websockets.stats().view_tasks == 0)
        await wait_until(lambda: "teardown" in seen)
        assert seen == ["sleeps", "cancelled", ("finally", "/ws"), "teardown"]
        assert websockets.stats().stuck_views == 0

    run(main)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_i5_on_asyncio_finally_may_await(run_asyncio, app):
    """It was cancelled once: what its finally awaits is waited for, and teardown comes after."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=CLOSE)
    seen = []
    app.teardown_request(lambda error: seen.append("teardown"))

    @websockets.route("/listen")
    async def listen(ws):
        async with websockets.subscribe(ws, "news"):
            await ws.send("subscribed")
            await ws.wait_closed()

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        try:
            seen.append("sleeps")
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.01)
            await websockets.apublish("left", "news")
            await asyncio.to_thread(seen.append, "thread")
            async with asyncio.timeout(TIMEOUT):
                await asyncio.sleep(0.01)
            seen.append("finally")

    async def main():
        async with connection(asgi, "/listen") as listener:
            assert await listener.get_status() == 101
            assert data_of(await listener.get()) == "subscribed"
            async with connection(asgi, "/ws") as peer:
                assert await peer.get_status() == 101
                await wait_until(lambda: seen)
                peer.leave()
                await returned(peer)
            assert data_of(await listener.get()) == "left"
            await wait_until(lambda: "teardown" in seen)
            assert seen == ["sleeps", "thread", "finally", "teardown"]

    run_asyncio(main)


def test_i5_finally_may_await_in_a_shield(run, app):
    """On either loop a shielded scope, with an end of its own, lets a finally await."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=CLOSE)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        try:
            seen.append("sleeps")
            await anyio.sleep(3600)
        finally:
            with anyio.move_on_after(TIMEOUT, shield=True):
                await anyio.sleep(0.01)
                await websockets.apublish("left", "news")
                seen.append("finally")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            await wait_until(lambda: seen)
            peer.leave()
            await returned(peer)
        assert seen == ["sleeps", "finally"]
        await wait_until(lambda: websockets.stats().view_tasks == 0)

    run(main)


def test_i5_a_task_group_is_cancelled_with_its_view(run, app):
    """Child tasks of a cancelled view end with it, each with its own finally."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=CLOSE)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()

        async def child(name):
            seen.append(name)
            try:
                await anyio.sleep(3600)
            finally:
                seen.append(f"{name} ended")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child, "one")
            tasks.start_soon(child, "two")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            await wait_until(lambda: len(seen) == 2)
            peer.leave()
            await returned(peer)
        assert sorted(seen) == ["one", "one ended", "two", "two ended"]
        await wait_until(lambda: websockets.stats().view_tasks == 0)

    run(main)


@pytest.mark.parametrize("verb", ["receive", "iter_data", "wait_closed", "send"])
def test_i5_a_view_that_waits_for_its_connection_is_not_cancelled(run, app, verb):
    """It ends by ConnectionClosed, or by the iteration's end, long before the close timeout."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=3600, WEBSOCKETS_OUTBOX_MESSAGES=2)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        try:
            if verb == "iter_data":
                async for _ in ws.iter_data():
                    pass
            elif verb == "send":
                while True:
                    await ws.send("x")
            else:
                await getattr(ws, verb)()
            seen.append("returned")
        except ConnectionClosed as error:
            seen.append(error.code)
        await anyio.sleep(0.001)  # it has its time: nothing was cancelled
        seen.append("end")

    async def main():
        async with connection(asgi, "/ws", socket_messages=0) as peer:
            assert await peer.get_status() == 101
            await turns(100)
            peer.leave(4000)
            await returned(peer)
        assert seen == [4000 if verb in ("receive", "send") else "returned", "end"]

    run(main)


def test_i5_a_view_may_finish_within_the_close_timeout(run, app):
    """A view that is busy when its client leaves is left alone until the timeout."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=TIMEOUT)
    go, seen = [], []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        seen.append(ws)
        await go[0].wait()
        seen.append(ws.closed)

    async def main():
        go.append(anyio.Event())
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            await wait_until(lambda: seen)
            peer.leave()
            await wait_until(lambda: seen[0].closed)
            assert websockets.stats().view_tasks == 1
            go[0].set()
            await returned(peer)
        assert seen[1:] == [True]

    run(main)


def test_i5_a_swallowed_cancellation_is_repeated(run, app):
    """A view that goes on after its cancellation is cancelled again after the same time."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=CLOSE)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        for _ in range(2):
            seen.append("sleeps")
            try:
                await anyio.sleep(3600)
            except anyio.get_cancelled_exc_class():
                seen.append("cancelled")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            await wait_until(lambda: seen)
            peer.leave()
            started = anyio.current_time()
            await wait_until(lambda: len(seen) == 4)
            assert anyio.current_time() - started < 2 * CLOSE + MARGIN
            await returned(peer)
        assert seen == ["sleeps", "cancelled"] * 2
        await wait_until(lambda: websockets.stats().view_tasks == 0)

    run(main)


def test_i9_a_view_that_never_ends_is_reported(run, app, caplog):
    """It is counted as stuck, its connection is over, and the loop serves the others."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=CLOSE)
    add_echo(websockets)
    stop, seen = [], []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        seen.append("sleeps")
        while not stop:
            try:
                await anyio.sleep(0.01)
            except anyio.get_cancelled_exc_class():
                pass
        seen.append("ended")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            await wait_until(lambda: seen)
            peer.leave()
            started = anyio.current_time()
            await returned(peer)
            assert anyio.current_time() - started < 2 * CLOSE + MARGIN
        stats = websockets.stats()
        assert (stats.connections, stats.view_tasks, stats.stuck_views) == (0, 1, 1)
        await check_echo(asgi)
        assert seen == ["sleeps"]
        stop.append(True)
        await wait_until(lambda: websockets.stats().view_tasks == 0)
        assert seen == ["sleeps", "ended"]

    run(main)
    assert caplog.text.count("The view of /ws (endpoint ") == 1


@pytest.mark.parametrize("verb", ["receive", "send", "poll", "wait_closed"])
def test_a_loop_that_takes_no_answer_does_not_freeze_the_server(run, app, verb):
    """``except Exception: continue`` around a verb, for ever: the others are served, it ends."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=CLOSE)
    add_echo(websockets)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        seen.append("loops")
        try:
            while True:
                try:
                    if verb == "poll":
                        await ws.receive(timeout=0)
                    elif verb == "send":
                        await ws.send("x")
                    else:
                        await getattr(ws, verb)()
                except Exception:
                    continue
        finally:
            seen.append("ended")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            await wait_until(lambda: seen)
            if verb in ("poll", "send"):
                await check_echo(asgi)
            peer.leave()
            await check_echo(asgi)
            await returned(peer)
        await wait_until(lambda: len(seen) == 2)

    run(main)


@pytest.mark.parametrize("verb", ["receive", "sleep"])
def test_i5_the_server_cancels_the_connection(run, app, verb):
    """When the server cancels its task the view ends all the same, and teardown runs."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=CLOSE)
    seen = []
    app.teardown_request(lambda error: seen.append("teardown"))

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        seen.append("waits")
        try:
            await (ws.receive() if verb == "receive" else anyio.sleep(3600))
        except ConnectionClosed:
            seen.append("closed")
        except anyio.get_cancelled_exc_class():
            seen.append("cancelled")
            raise

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            await wait_until(lambda: seen)
            peer.cancel()
            await returned(peer)
            await wait_until(lambda: "teardown" in seen)
        await wait_until(lambda: websockets.stats().view_tasks == 0)
        assert seen == ["waits", "closed" if verb == "receive" else "cancelled", "teardown"]

    run(main)


@pytest.mark.parametrize("verb", ["receive", "sleep"])
def test_i9_the_shutdown_ends_async_views(run, app, verb):
    """A view learns 1012 when the server stops, or is cancelled; the shutdown waits for it."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=CLOSE)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        seen.append("waits")
        try:
            await (ws.receive() if verb == "receive" else anyio.sleep(3600))
        except ConnectionClosed as error:
            seen.append(error.code)
        except anyio.get_cancelled_exc_class():
            seen.append("cancelled")
            raise

    async def main():
        messages = [{"type": "lifespan.startup"}]
        answers = []

        async def receive():
            await wait_until(lambda: messages)
            return messages.pop()

        async def send(message):
            answers.append(message["type"])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(asgi, {"type": "lifespan"}, receive, send)
            await wait_until(lambda: answers)
            async with connection(asgi, "/ws") as peer:
                assert await peer.get_status() == 101
                await wait_until(lambda: seen)
                messages.append({"type": "lifespan.shutdown"})
                await wait_until(lambda: len(answers) == 2)
                assert seen == ["waits", 1012 if verb == "receive" else "cancelled"]
                await returned(peer)
        assert answers == ["lifespan.startup.complete", "lifespan.shutdown.complete"]

    run(main)


@pytest.mark.timeout(40)  # a task that never ends keeps the loop's runner
def test_i9_a_shutdown_after_the_server_cancelled(run, app):
    """A server that cancels its connections and then stops waits for their views' teardown."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=CLOSE)
    seen = []
    app.teardown_request(lambda error: seen.append("teardown"))

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        seen.append("waits")
        try:
            await anyio.sleep(3600)
        finally:
            with anyio.move_on_after(TIMEOUT, shield=True):
                await anyio.sleep(0.05)
                seen.append("finally")

    async def main():
        messages = [{"type": "lifespan.startup"}]
        answers = []

        async def receive():
            await wait_until(lambda: messages)
            return messages.pop()

        async def send(message):
            answers.append(message["type"])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(asgi, {"type": "lifespan"}, receive, send)
            await wait_until(lambda: answers)
            async with connection(asgi, "/ws") as peer:
                assert await peer.get_status() == 101
                await wait_until(lambda: seen)
                peer.cancel()
                await returned(peer)
            messages.append({"type": "lifespan.shutdown"})
            await wait_until(lambda: len(answers) == 2)
            assert seen == ["waits", "finally", "teardown"]

    run(main)


def test_nothing_is_left(run, app):
    """After views of every ending there is no connection, task, thread or subscription."""
    websockets, asgi = make(app, WEBSOCKETS_CLOSE_TIMEOUT=CLOSE)

    @websockets.route("/<end>")
    async def view(ws, end):
        async with websockets.subscribe(ws, ["a", "b"]):
            await ws.send("subscribed")
            if end == "raise":
                raise RuntimeError("broken")
            if end == "sleep":
                await anyio.sleep(3600)
            if end == "close":
                await ws.close()
            if end != "return":
                await ws.receive()

    async def main():
        for end in ("return", "raise", "sleep", "close", "leave"):
            async with connection(asgi, f"/{end}") as peer:
                assert await peer.get_status() == 101
                assert data_of(await peer.get()) == "subscribed"
        await wait_until(lambda: websockets.stats().view_tasks == 0)
        await wait_until(lambda: websockets.stats().view_threads == 0)
        stats = websockets.stats()
        assert (stats.connections, stats.channels, stats.subscriptions) == (0, 0, 0)
        assert (stats.inbox_messages, stats.outbox_messages) == (0, 0)

    run(main)


# -- many senders, one receiver ---------------------------------------------------------------


@pytest.mark.parametrize("verb", ["accept", "receive", "send", "close", "wait_closed", "subscribe"])
def test_on_another_threads_loop(run, app, verb):
    """Each verb says where it belongs, and the connection is as it was."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        async def use():
            with pytest.raises(WrongThread, match=r"anyio\.from_thread\.run"):
                if verb == "subscribe":
                    async with websockets.subscribe(ws, "a"):
                        pass
                else:
                    await getattr(ws, verb)(*["x"] * (verb == "send"))

        if verb != "accept":
            await ws.accept()
        await anyio.to_thread.run_sync(asyncio.run, use())
        await ws.send("still here")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert data_of(await peer.get()) == "still here"
            assert await closed(peer) == (1000, "")

    run(main)


def test_two_receivers_are_an_error(run, app):
    """The second gets ConcurrencyError; the first goes on, and so may others after it."""
    websockets, asgi = make(app)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()

        async def first():
            seen.append(await ws.receive())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first)
            await turns()
            for use in (ws.receive, ws.receive_json, lambda: ws.receive(timeout=1)):
                with pytest.raises(ConcurrencyError):
                    await use()
            with pytest.raises(ConcurrencyError):
                async for _ in ws.iter_data():
                    pass
            await ws.send("now")
        seen.append(await ws.receive())
        await ws.send("done")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert data_of(await peer.get()) == "now"
            peer.send("1")
            peer.send("2")
            assert data_of(await peer.get()) == "done"
        assert seen == ["1", "2"]

    run(main)


def test_many_tasks_send(run, app):
    """Every task's messages arrive, in its order, each once; a small outbox makes them wait."""
    websockets, asgi = make(app, WEBSOCKETS_OUTBOX_MESSAGES=10)

    @websockets.route("/ws")
    async def view(ws):
        async def send(name):
            for number in range(50):
                await ws.send_json([name, number])

        async with anyio.create_task_group() as tasks:
            for name in range(20):
                tasks.start_soon(send, name)

    async def main():
        async with connection(asgi, "/ws", socket_messages=0) as peer:
            assert await peer.get_status() == 101
            came = defaultdict(list)
            for _ in range(20 * 50):
                name, number = app.json.loads(data_of(await peer.get()))
                came[name].append(number)
            assert came == {name: list(range(50)) for name in range(20)}
            assert await closed(peer) == (1000, "")

    run(main)


def test_i6_send_waits_while_the_outbox_is_full(run, app):
    """It goes on when the peer reads, and nothing is lost or out of order."""
    websockets, asgi = make(app, WEBSOCKETS_OUTBOX_MESSAGES=5)
    sent = []

    @websockets.route("/ws")
    async def view(ws):
        await ws.receive()  # the accept has left the outbox
        for number in range(100):
            await ws.send(str(number))
            sent.append(number)

    async def main():
        async with connection(asgi, "/ws", socket_messages=0) as peer:
            assert await peer.get_status() == 101
            peer.send("go")
            await wait_until(lambda: len(sent) >= 5)
            await turns(100)
            # One more than the outbox holds may be with the writer.
            assert len(sent) <= 6
            assert websockets.stats().outbox_messages >= 4
            assert [data_of(await peer.get()) for _ in range(100)] == [str(n) for n in range(100)]

    run(main)


@pytest.mark.parametrize("socket_messages", [0, 1])
def test_i11_a_peer_that_does_not_read_is_given_up(run, app, socket_messages):
    """send raises ConnectionClosed 1006 after WEBSOCKETS_SEND_TIMEOUT, in every task that waits."""
    websockets, asgi = make(app, WEBSOCKETS_OUTBOX_MESSAGES=5, WEBSOCKETS_SEND_TIMEOUT=0.5)
    seen, sent = [], []

    @websockets.route("/ws")
    async def view(ws):
        async def send():
            try:
                while True:
                    await ws.send("x")
                    sent.append("x")
            except ConnectionClosed as error:
                seen.append(error.code)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(send)
        seen.append(ws.close_code)

    async def main():
        async with connection(asgi, "/ws", socket_messages=socket_messages) as peer:
            assert await peer.get_status() == 101
            started = anyio.current_time()
            await wait_until(lambda: len(seen) == 4)
            assert 0.4 < anyio.current_time() - started < 0.5 + MARGIN
            assert seen == [1006] * 4
            assert len(sent) <= 5 + 1 + socket_messages
            await returned(peer)
        assert websockets.stats().send_timeouts == 1

    run(main)


@pytest.mark.parametrize("plain", [True, False])
def test_i11_who_gives_up_finds_the_connection_over(run, app, monkeypatch, plain):
    """Also where a view's wait for room ends before the writer's for the peer does."""
    websockets, asgi = make(app, WEBSOCKETS_OUTBOX_MESSAGES=5, WEBSOCKETS_SEND_TIMEOUT=0.2)
    set_alarm, seen = Alarm.set, []
    monkeypatch.setattr(
        Alarm, "set", lambda self, seconds, call: set_alarm(self, seconds and seconds + 60, call)
    )

    async def view(ws):
        with pytest.raises(ConnectionClosed, match="made no room") as closed:
            while True:
                await ws.send("x")
        seen.append((closed.value.code, ws.close_code))

    def plain_view(ws):
        with pytest.raises(ConnectionClosed, match="made no room") as closed:
            while True:
                ws.send("x")
        seen.append((closed.value.code, ws.close_code))

    websockets.route("/ws")(plain_view if plain else view)

    async def main():
        async with connection(asgi, "/ws", socket_messages=0) as peer:
            assert await peer.get_status() == 101
            await wait_until(lambda: seen)
            await returned(peer)
        assert seen == [(1006, 1006)]

    run(main)


def test_a_cancelled_send_is_sent_once_or_not_at_all(run, app):
    """A send that its own timeout cut leaves the connection as it was, and the order too."""
    websockets, asgi = make(app, WEBSOCKETS_OUTBOX_MESSAGES=5)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        for number in range(30):
            with anyio.move_on_after(0.01) as scope:
                await ws.send(str(number))
            seen.append(scope.cancelled_caught)
        await ws.send("end")

    async def main():
        async with connection(asgi, "/ws", socket_messages=0) as peer:
            assert await peer.get_status() == 101
            await wait_until(lambda: len(seen) == 30)
            came = []
            while "end" not in came:
                came.append(data_of(await peer.get()))
            numbers = [int(text) for text in came[:-1]]
            assert numbers == sorted(set(numbers))
            assert {n for n, was_cut in enumerate(seen) if not was_cut} <= set(numbers)
            assert any(seen)

    run(main)


# -- timeouts, task groups, threads -----------------------------------------------------------


def test_a_cancelled_receive_loses_nothing(run, app):
    """In whichever turn of the loop a waiting receive is cancelled, its message is delivered."""
    websockets, asgi = make(app)
    scopes, seen = [], []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        while "end" not in seen:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                seen.append(await ws.receive())

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            await wait_until(lambda: scopes)
            for number in range(20):
                await turns()  # the view waits in its newest scope
                scope, count = scopes[-1], len(scopes)
                peer.send(str(number))
                await turns(number)
                scope.cancel()
                await wait_until(lambda count=count: len(scopes) > count)
            peer.send("end")
            await wait_until(lambda: "end" in seen)
        assert seen == [*map(str, range(20)), "end"]

    run(main)


def test_a_task_that_receives_is_cancelled(run_asyncio, app):
    """The same for a task that asyncio itself cancels, the turn after its message came too."""
    websockets, asgi = make(app)
    tasks, seen = [], []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        while "end" not in seen:
            tasks.append(asyncio.create_task(ws.receive()))
            try:
                seen.append(await tasks[-1])
            except asyncio.CancelledError:
                assert tasks[-1].cancelled()

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            await wait_until(lambda: tasks)
            for number in range(20):
                await turns()  # the newest task waits
                task, count = tasks[-1], len(tasks)
                peer.send(str(number))
                await turns(number)
                task.cancel()
                await wait_until(lambda count=count: len(tasks) > count)
            peer.send("end")
            await wait_until(lambda: "end" in seen)
        assert seen == [*map(str, range(20)), "end"]

    run_asyncio(main)


@pytest.mark.parametrize("way", ["asyncio.timeout", "wait_for", "move_on_after", "own"])
def test_timeouts_around_receive_lose_nothing(run_asyncio, app, way):
    """Messages that come just when a timeout strikes are delivered by the next receive."""
    websockets, asgi = make(app)
    generator = random.Random(way)
    seen, cut = [], []

    async def receive(ws, timeout):
        if way == "asyncio.timeout":
            async with asyncio.timeout(timeout):
                return await ws.receive()
        if way == "wait_for":
            return await asyncio.wait_for(ws.receive(), timeout)
        if way == "move_on_after":
            with anyio.move_on_after(timeout):
                return await ws.receive()
            return None
        return await ws.receive(timeout)

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        while "end" not in seen:
            try:
                data = await receive(ws, generator.choice([0, 0.001, 0.002]))
            except TimeoutError:
                data = None
            (seen if data is not None else cut).append(data)

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            for number in range(300):
                peer.send(str(number))
                await anyio.sleep(generator.choice([0, 0.001, 0.002]))
            peer.send("end")
            await wait_until(lambda: "end" in seen)
        assert seen == [*map(str, range(300)), "end"]
        assert cut

    run_asyncio(main)


def test_timeouts_on_trio(app):
    """The same with anyio on trio, where a cancelled wait ends otherwise."""
    websockets, asgi = make(app)
    generator = random.Random(1)
    seen, cut = [], []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        while "end" not in seen:
            with anyio.move_on_after(generator.choice([0, 0.001, 0.002])) as scope:
                seen.append(await ws.receive())
            cut.append(scope.cancelled_caught)

    async def main():
        with anyio.fail_after(20):
            async with connection(asgi, "/ws") as peer:
                assert await peer.get_status() == 101
                for number in range(300):
                    peer.send(str(number))
                    await anyio.sleep(generator.choice([0, 0.001, 0.002]))
                peer.send("end")
                await wait_until(lambda: "end" in seen)
            assert seen == [*map(str, range(300)), "end"]
            assert any(cut)

    anyio.run(main, backend="trio")


def test_a_task_group_inside(run, app):
    """One task sends while another receives; leaving the group's scope ends the first."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        async def tick():
            number = 0
            while True:
                await ws.send(f"tick {number}")
                number += 1
                await anyio.sleep(0.001)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tick)
            while await ws.receive() != "stop":
                pass
            tasks.cancel_scope.cancel()
        await ws.send("stopped")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert [data_of(await peer.get()) for _ in range(3)] == ["tick 0", "tick 1", "tick 2"]
            peer.send("go on")
            peer.send("stop")
            while data_of(await peer.get()) != "stopped":
                pass
            assert await closed(peer) == (1000, "")

    run(main)


def test_asyncio_itself_inside(run_asyncio, app):
    """asyncio's own TaskGroup, gather, Queue and to_thread work in a view."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        queue = asyncio.Queue()

        async def receive():
            async for data in ws.iter_text():
                await queue.put(data)
            await queue.put(None)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(receive())
            while (data := await queue.get()) is not None:
                upper, path = await asyncio.gather(
                    asyncio.to_thread(data.upper), asyncio.to_thread(lambda: request.path)
                )
                await ws.send(upper + path)

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            for data in ("one", "two"):
                peer.send(data)
                assert data_of(await peer.get()) == f"{data.upper()}/ws"

    run_asyncio(main)


def test_a_task_that_outlives_its_view(run_asyncio, app):
    """Its sends raise ConnectionClosed; it keeps neither view nor connection."""
    websockets, asgi = make(app)
    seen, tasks = [], []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()

        async def later():
            await ws.wait_closed()
            with pytest.raises(ConnectionClosed):
                await ws.send("x")
            seen.append("closed")

        tasks.append(asyncio.create_task(later()))

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert await closed(peer) == (1000, "")
        await asyncio.wait_for(tasks[0], TIMEOUT)
        assert seen == ["closed"]

    run_asyncio(main)


# -- channels ---------------------------------------------------------------------------------


def test_channels_between_sync_and_async_views(run, app):
    """What either kind publishes reaches both kinds, HTTP views' messages included."""
    websockets, asgi = make(app)

    @websockets.route("/async")
    async def async_view(ws):
        async with websockets.subscribe(ws, "room"):
            await ws.send("subscribed")
            async for data in ws.iter_text():
                result = await websockets.apublish(data, "room")
                assert result.local == 2

    @websockets.route("/sync")
    def sync_view(ws):
        with websockets.subscribe(ws, "room"):
            ws.send("subscribed")
            for data in ws.iter_text():
                websockets.publish(data, "room")

    async def main():
        async with connection(asgi, "/async") as one, connection(asgi, "/sync") as two:
            for peer in (one, two):
                assert await peer.get_status() == 101
                assert data_of(await peer.get()) == "subscribed"
            for sender in (one, two):
                sender.send("hello")
                for peer in (one, two):
                    assert data_of(await peer.get()) == "hello"
            await anyio.to_thread.run_sync(websockets.publish, "from a thread", "room")
            for peer in (one, two):
                assert data_of(await peer.get()) == "from a thread"

    run(main)


def test_the_async_twins(run, app):
    """apublish_json encodes, exclude= leaves out, aunsubscribe ends all levels at once."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        async with (
            websockets.subscribe(ws, ["a", "b"]),
            websockets.subscribe(ws, "a"),
        ):
            assert (await websockets.apublish_json({"n": 1}, ["a", "b"])).local == 1
            assert (await websockets.apublish("never", "a", exclude=ws)).local == 0
            assert (await websockets.apublish_json("never", "a", exclude=[ws])).local == 0
            await websockets.aunsubscribe(ws, "a")
            assert (await websockets.apublish("never", "a")).local == 0
            assert (await websockets.apublish("b", "b")).local == 1
            await websockets.aunsubscribe(ws, ["a", "b", "unknown"])
        assert websockets.stats().subscriptions == 0
        await ws.send("done")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert app.json.loads(data_of(await peer.get())) == {"n": 1}
            assert data_of(await peer.get()) == "b"
            assert data_of(await peer.get()) == "done"

    run(main)


def test_subscribe_leaves_nothing_behind(run, app):
    """Nested, left by an exception or by a cancellation: the subscriptions are gone."""
    websockets, asgi = make(app)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        with pytest.raises(KeyError):
            async with websockets.subscribe(ws, ["a", "b"]):
                async with websockets.subscribe(ws, ["b", "c"]):
                    seen.append(websockets.stats().subscriptions)
                seen.append(websockets.stats().subscriptions)
                raise KeyError("x")
        seen.append(websockets.stats().subscriptions)
        with anyio.CancelScope() as scope:
            async with websockets.subscribe(ws, "a"):
                seen.append(websockets.stats().subscriptions)
                scope.cancel()
                await anyio.sleep(3600)
        seen.append(websockets.stats().subscriptions)
        await ws.send("done")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert data_of(await peer.get()) == "done"
        assert seen == [3, 2, 0, 1, 0]

    run(main)


def test_subscribe_above_the_limit(run, app):
    """Above WEBSOCKETS_MAX_CHANNELS_PER_CONNECTION it raises, and nothing is subscribed."""
    websockets, asgi = make(app, WEBSOCKETS_MAX_CHANNELS_PER_CONNECTION=2)

    @websockets.route("/ws")
    async def view(ws):
        with pytest.raises(UsageError, match="2 channels"):
            async with websockets.subscribe(ws, ["a", "b", "c"]):
                pass
        assert websockets.stats().subscriptions == 0
        async with websockets.subscribe(ws, ["a", "b"]):
            await ws.send("subscribed")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert data_of(await peer.get()) == "subscribed"

    run(main)


def test_subscribe_after_the_end(run, app):
    """On a connection that is over it raises ConnectionClosed."""
    websockets, asgi = make(app)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        await ws.wait_closed()
        with pytest.raises(ConnectionClosed):
            async with websockets.subscribe(ws, "a"):
                seen.append("never")
        seen.append(websockets.stats().subscriptions)

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            peer.leave()
            await returned(peer)
        assert seen == [0]

    run(main)


def test_order_of_one_task(run, app):
    """What one task sends and publishes arrives in that order, however slowly the peer reads."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        async with websockets.subscribe(ws, "a"):
            for number in range(100):
                await ws.send(f"sent {number}")
                await websockets.apublish(f"published {number}", "a")

    async def main():
        async with connection(asgi, "/ws", socket_messages=0) as peer:
            assert await peer.get_status() == 101
            for number in range(100):
                assert data_of(await peer.get()) == f"sent {number}"
                assert data_of(await peer.get()) == f"published {number}"

    run(main)


def test_i7_what_a_thread_has_published_comes_first(run, app):
    """Also where the loop has not turned since: the view's send finds it at the door."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        async with websockets.subscribe(ws, "a"):
            thread = threading.Thread(target=websockets.publish, args=("published", "a"))
            thread.start()
            thread.join(TIMEOUT)  # the loop stands still meanwhile
            await ws.send("sent")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert [data_of(await peer.get()) for _ in range(2)] == ["published", "sent"]

    run(main)


def test_order_through_a_thread(run, app):
    """A publish in a thread that was awaited comes before what the view sends next."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        async with websockets.subscribe(ws, "a"):
            for number in range(50):
                await anyio.to_thread.run_sync(websockets.publish, f"published {number}", "a")
                await ws.send(f"sent {number}")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            for number in range(50):
                assert data_of(await peer.get()) == f"published {number}"
                assert data_of(await peer.get()) == f"sent {number}"

    run(main)


def test_order_through_asyncio_to_thread(run_asyncio, app):
    """The same with asyncio.to_thread."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        async with websockets.subscribe(ws, "a"):
            for number in range(50):
                await asyncio.to_thread(websockets.publish, f"published {number}", "a")
                await ws.send(f"sent {number}")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            for number in range(50):
                assert data_of(await peer.get()) == f"published {number}"
                assert data_of(await peer.get()) == f"sent {number}"

    run_asyncio(main)


def test_the_wrong_kind_of_with(run, app):
    """``with`` on the loop and ``async with`` in a thread raise WrongThread, and say what to do."""
    websockets, asgi = make(app)

    @websockets.route("/async")
    async def async_view(ws):
        with (
            pytest.raises(WrongThread, match="async with"),
            websockets.subscribe(ws, "a"),
        ):
            pass
        assert websockets.stats().subscriptions == 0
        await ws.send("still here")

    @websockets.route("/sync")
    def sync_view(ws):
        async def subscribe():
            with pytest.raises(WrongThread, match="with"):
                async with websockets.subscribe(ws, "a"):
                    pass

        asyncio.run(subscribe())
        assert websockets.stats().subscriptions == 0
        ws.send("still here")

    async def main():
        for path in ("/async", "/sync"):
            async with connection(asgi, path) as peer:
                assert await peer.get_status() == 101
                assert data_of(await peer.get()) == "still here"

    run(main)


def test_publish_on_the_loop(run, app):
    """publish in an async view raises WrongThread, which names apublish."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    async def view(ws):
        for publish in (websockets.publish, websockets.publish_json):
            with pytest.raises(WrongThread, match="apublish"):
                publish("x", "a")
        await ws.send("still here")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert data_of(await peer.get()) == "still here"

    run(main)


# -- scale ------------------------------------------------------------------------------------


def test_open_async_views_take_no_thread(run, app):
    """300 are open: no view thread is left of their handshakes, and none after their end."""
    websockets, asgi = make(app)
    app.add_url_rule("/", view_func=lambda: "here")
    add_echo(websockets)

    async def main():
        before = threading.active_count()
        leave, open_now = anyio.Event(), []

        async def hold():
            async with connection(asgi, "/echo") as peer:
                open_now.append(await peer.get_status())
                await leave.wait()
                peer.send("still here")
                assert data_of(await peer.get()) == "still here"

        async with anyio.create_task_group() as tasks:
            for _ in range(300):
                tasks.start_soon(hold)
            await wait_until(lambda: len(open_now) == 300)
            assert set(open_now) == {101}
            await wait_until(lambda: websockets.stats().view_threads == 0)
            stats = websockets.stats()
            assert (stats.connections, stats.view_tasks) == (300, 300)
            await wait_until(lambda: threading.active_count() <= before + 10)
            leave.set()
        await wait_until(lambda: websockets.stats().view_tasks == 0)
        await wait_until(lambda: websockets.stats().view_threads == 0)

    run(main)


# -- the test client --------------------------------------------------------------------------


def test_the_test_client(app, websockets, client):
    """It speaks to async views as it does to sync ones."""

    @websockets.route("/ws")
    async def view(ws):
        async for data in ws.iter_data():
            await ws.send(data)

    @websockets.route("/refused")
    async def refused(ws):
        abort(401)

    with client.websocket_connect("/ws") as ws:
        for data in ("text", b"binary"):
            ws.send(data)
            assert ws.receive() == data
    with pytest.raises(ConnectionRejected) as caught, client.websocket_connect("/refused"):
        pass
    assert caught.value.response.status_code == 401


@pytest.mark.parametrize("accept", [True, False])
def test_the_test_client_raises_what_the_view_raised(app, websockets, client, accept):
    """With ``testing`` an exception of the view comes out in the test, as for a sync view."""
    app.testing = True

    @websockets.route("/ws")
    async def view(ws):
        if accept:
            await ws.accept()
        raise KeyError("x")

    with pytest.raises(KeyError), client.websocket_connect("/ws"):
        pass


# -- threads of a sync view -------------------------------------------------------------------


def test_threads_of_a_sync_view_send(websockets, client):
    """Many threads may send: each one's messages arrive in its order, each once."""

    @websockets.route("/ws")
    def view(ws):
        def send(name):
            for number in range(50):
                ws.send_json([name, number])

        threads = [threading.Thread(target=send, args=(name,)) for name in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with client.websocket_connect("/ws") as ws:
        came = defaultdict(list)
        for _ in range(5 * 50):
            name, number = ws.receive_json()
            came[name].append(number)
    assert came == {name: list(range(50)) for name in range(5)}


def test_one_thread_of_a_sync_view_receives(websockets, client):
    """A thread may receive while the view does something else; a second one is an error."""
    seen = []

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        waiting = threading.Event()

        def receive():
            waiting.set()
            for data in ws.iter_data():
                seen.append(data)
                ws.send(f"got {data}")

        thread = threading.Thread(target=receive)
        thread.start()
        assert waiting.wait(TIMEOUT)
        try:
            while True:  # until the thread has come to its receive
                assert ws.receive(timeout=0) is None
        except ConcurrencyError:
            ws.send("one is enough")
        seen.append(ws.wait_closed(timeout=TIMEOUT))
        thread.join(TIMEOUT)

    with client.websocket_connect("/ws", timeout=TIMEOUT) as ws:
        assert ws.receive() == "one is enough"
        ws.send("1")
        assert ws.receive() == "got 1"
    assert sorted(map(str, seen)) == ["1", "True"]


def test_a_thread_that_outlives_its_view(websockets, client):
    """Its wait_closed says True, and its sends raise ConnectionClosed."""
    seen, threads = [], []

    @websockets.route("/ws")
    def view(ws):
        ws.accept()

        def later():
            seen.append(ws.wait_closed(timeout=TIMEOUT))
            try:
                ws.send("x")
            except ConnectionClosed as error:
                seen.append(error.code)

        threads.append(threading.Thread(target=later))
        threads[0].start()

    with client.websocket_connect("/ws") as ws, pytest.raises(ConnectionClosed):
        ws.receive()
    threads[0].join(TIMEOUT)
    assert seen == [True, 1000]


def test_copy_current_request_context(app, websockets, client):
    """A thread with a copy sees the view's request and session; the view keeps its own context."""

    @websockets.route("/ws/<room>")
    def view(ws, room):
        g.own = "the view's"
        session["user"] = "ann"
        ws.accept()

        @copy_current_request_context
        def work():
            ws.send_json([request.path, request.args["q"], session["user"]])

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(TIMEOUT)
        ws.send_json([request.path, request.args["q"], session["user"], g.own])

    with client.websocket_connect("/ws/blue?q=x") as ws:
        assert ws.receive_json() == ["/ws/blue", "x", "ann"]
        assert ws.receive_json() == ["/ws/blue", "x", "ann", "the view's"]


def test_copy_current_request_context_in_an_async_view(run, app):
    """The same for a thread of an async view; anyio's threads need no copy."""
    websockets, asgi = make(app)
    came = []

    @websockets.route("/ws/<room>")
    async def view(ws, room):
        await ws.accept()

        @copy_current_request_context
        def work():
            came.append(request.path)

        thread = threading.Thread(target=work)
        thread.start()
        await anyio.to_thread.run_sync(thread.join, TIMEOUT)
        came.append(request.path)
        await ws.send("done")

    async def main():
        async with connection(asgi, "/ws/blue") as peer:
            assert await peer.get_status() == 101
            assert data_of(await peer.get()) == "done"
        assert came == ["/ws/blue"] * 2

    run(main)


# -- the how-to -------------------------------------------------------------------------------


@pytest.fixture
def how_to(websockets, monkeypatch):
    """The views of docs/how-to/async-views, in an application whose module they import."""
    module = types.ModuleType("app")
    module.websockets = websockets
    monkeypatch.setitem(sys.modules, "app", module)
    page = Path(__file__).parent.parent / "docs" / "how-to" / "async-views.rst"
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?: .*\n|\n)+)", page.read_text(), re.M)
    for block in blocks:
        exec(compile(textwrap.dedent(block), page.name, "exec"), {"__name__": "block"})


def test_the_how_to_echoes_and_thinks(how_to, client):
    """Its greeting and its thread see the request."""
    with client.websocket_connect("/greetings?greeting=Ahoy") as ws:
        ws.send("Ann")
        assert ws.receive() == "Ahoy, Ann"
    with client.websocket_connect("/think") as ws:
        ws.send("go")
        assert ws.receive() == "thought about /think"


def test_the_how_to_counts(how_to, client):
    """Its view with a task sends until it is told to stop, or until the client leaves."""
    with client.websocket_connect("/count") as ws:
        assert [ws.receive_json() for _ in range(2)] == [0, 1]
        ws.send("stop")
        with pytest.raises(ConnectionClosed) as caught:
            while True:
                ws.receive()
        assert caught.value.code == 4000
    with client.websocket_connect("/count") as ws:
        assert ws.receive_json() == 0
    with client.websocket_connect("/countdown") as ws:
        assert [ws.receive_json() for _ in range(3)] == [3, 2, 1]
        with pytest.raises(ConnectionClosed) as caught:
            ws.receive()
        assert caught.value.code == 1000


def test_the_how_to_asks(how_to, client):
    """Its quiz takes an answer in time, and closes when the time has passed."""
    for answers, code in ((["41", "42"], 1000), (["41"], 4008)):
        with client.websocket_connect("/quiz") as ws:
            assert "What" in ws.receive()
            for answer in answers:
                ws.send(answer)
                assert ws.receive() == ("Yes." if answer == "42" else "No.")
            with pytest.raises(ConnectionClosed) as caught:
                ws.receive()
            assert caught.value.code == code


def test_the_how_to_says_goodbye(app, websockets, how_to, client):
    """Its napping view publishes what its finally says, when it was cancelled."""
    with client.websocket_connect("/rooms/blue") as listener:
        listener.send("I am here")
        assert listener.receive() == "I am here"
        with client.websocket_connect("/naps/blue") as ws:
            assert ws.receive() == "sleep well"
        assert listener.receive() == "somebody has gone"
