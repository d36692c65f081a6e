"""The ASGI application: scopes, lifespan, and the limits that need no thread."""

from __future__ import annotations

import asyncio
import threading

import anyio
import pytest
from flask import Flask, request

from flask_websockets import ConnectionClosed, NotRunning, UsageError, WebSockets

from .asgi_driver import TIMEOUT, connection, wait_until


def make(app, **settings):
    app.config.update(settings)
    websockets = WebSockets(app)
    return websockets, websockets.asgi_app(app)


async def lifespan(asgi, *kinds):
    """Send lifespan messages, and return what the application answers."""
    messages = [{"type": f"lifespan.{kind}"} for kind in kinds]
    answers = []

    async def receive():
        if messages:
            return messages.pop(0)
        await anyio.sleep_forever()

    async def send(message):
        answers.append(message)

    with anyio.move_on_after(0.1):
        await asgi({"type": "lifespan"}, receive, send)
    return answers


async def get(asgi, path="/", **scope):
    """One HTTP request; the status and the body of its answer."""
    full = {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": b"",
        "http_version": "1.1",
        "headers": [(b"host", b"localhost")],
        **scope,
    }
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    await asgi(full, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def test_an_unknown_scope(run, app):
    """A scope of another type is an error that names what was expected."""
    _, asgi = make(app)

    async def main():
        with pytest.raises(ValueError, match="http, websocket or lifespan; got 'ftp'"):
            await asgi({"type": "ftp"}, None, None)

    run(main)


def test_http_runs_in_parallel(run, app):
    """Requests run side by side, each with its own context."""
    barrier = threading.Barrier(20)

    @app.get("/<int:number>")
    def view(number):
        barrier.wait(TIMEOUT)
        return f"{number} {request.path}"

    _, asgi = make(app)

    async def main():
        answers = {}

        async def fetch(number):
            answers[number] = await get(asgi, f"/{number}")

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(fetch, number)
        assert answers == {n: (200, f"{n} /{n}".encode()) for n in range(20)}

    run(main)


def test_a_http_view_that_raises(run, app):
    """What Flask propagates comes out of the application, for the server to log."""
    app.testing = True

    @app.get("/")
    def view():
        raise KeyError("x")

    _, asgi = make(app)

    async def main():
        with pytest.raises(KeyError):
            await get(asgi)

    run(main)


def test_a_streamed_response_is_closed(run, app):
    """Chunks arrive in order, and close() is called in the end."""
    closed = threading.Event()

    @app.get("/")
    def view():
        response = app.response_class(str(number) for number in range(5))
        response.call_on_close(closed.set)
        return response

    _, asgi = make(app)

    async def main():
        assert await get(asgi) == (200, b"01234")
        await wait_until(closed.is_set)

    run(main)


def test_the_runtime_starts_without_lifespan(run, app):
    """A server without lifespan, or a mount, starts the runtime with its first scope."""
    websockets, asgi = make(app)

    @websockets.route("/ws")
    def view(ws):
        with websockets.subscribe(ws, "a"):
            websockets.publish("x", "a")
            ws.receive()

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert (await peer.get())["text"] == "x"

    run(main)


def test_after_the_server_has_stopped(run, app):
    """publish raises NotRunning after the shutdown, until a server comes up again."""
    websockets, asgi = make(app)

    async def main():
        assert await lifespan(asgi, "startup") == [{"type": "lifespan.startup.complete"}]
        websockets.stats()
        assert await lifespan(asgi, "shutdown") == [{"type": "lifespan.shutdown.complete"}]
        with pytest.raises(NotRunning, match="stopped"):
            websockets.publish("x", "a")
        with pytest.raises(NotRunning, match="stopped"):
            await websockets.apublish("x", "a")
        await lifespan(asgi, "startup")
        assert (await websockets.apublish("x", "a")).local == 0
        await lifespan(asgi, "shutdown")

    run(main)


def test_the_shutdown_ends_what_is_still_connected(run, app):
    """Views are unblocked with 1012 when the server stops around them."""
    websockets, asgi = make(app)
    seen = []

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        with pytest.raises(ConnectionClosed) as caught:
            ws.receive()
        seen.append(caught.value.code)

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            await lifespan(asgi, "shutdown")
            with anyio.fail_after(TIMEOUT):
                await peer.returned.wait()

    run(main)
    assert seen == [1012]


def test_a_second_loop_is_a_clear_error(app):
    """Two loops at once are refused, at lifespan startup and at a first scope."""
    _, asgi = make(app)
    answers = []

    async def second():
        answers.extend(await lifespan(asgi, "startup"))
        with pytest.raises(UsageError, match="another event loop"):
            await get(asgi)

    async def main():
        await lifespan(asgi, "startup")
        await asyncio.to_thread(asyncio.run, second())
        await lifespan(asgi, "shutdown")

    asyncio.run(main())
    assert answers[0]["type"] == "lifespan.startup.failed"
    assert "another event loop" in answers[0]["message"]


def test_a_loop_that_is_gone_is_no_hindrance(app):
    """After a server that ended without a goodbye another one may start."""
    _, asgi = make(app)
    app.add_url_rule("/", view_func=lambda: "here")
    for _ in range(2):
        assert asyncio.run(get(asgi)) == (200, b"here")


# -- limits -----------------------------------------------------------------------------------


def test_i3_above_the_limit_503_without_a_thread(run, app):
    """WEBSOCKETS_MAX_CONNECTIONS is settled on the loop: 503, Retry-After, no thread taken."""
    websockets, asgi = make(app, WEBSOCKETS_MAX_CONNECTIONS=2)
    started = []

    @websockets.route("/ws")
    def view(ws):
        started.append(threading.current_thread())
        ws.accept()
        ws.wait_closed()

    async def main():
        async with connection(asgi, "/ws") as first, connection(asgi, "/ws") as second:
            assert [await first.get_status(), await second.get_status()] == [101, 101]
            for _ in range(3):
                async with connection(asgi, "/ws") as third:
                    message = await third.get()
                    assert message["status"] == 503
                    assert dict(message["headers"])[b"retry-after"] == b"5"
            async with connection(asgi, "/ws", extensions={}) as fourth:
                assert await fourth.get_status() == 403  # a server that knows only that
            assert len(started) == 2
            assert websockets.stats().refused_full == 4
            first.leave()
            with anyio.fail_after(TIMEOUT):
                await first.returned.wait()
            async with connection(asgi, "/ws") as fifth:
                assert await fifth.get_status() == 101

    run(main)


def test_i9_a_stuck_view_is_reported_and_keeps_its_place(run, app, caplog):
    """A view that goes on after its connection is reported, and counts until it ends."""
    websockets, asgi = make(app, WEBSOCKETS_MAX_CONNECTIONS=1, WEBSOCKETS_CLOSE_TIMEOUT=0.05)
    go = threading.Event()

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        assert go.wait(TIMEOUT)

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            peer.leave()
            with anyio.fail_after(2):
                await peer.returned.wait()
        stats = websockets.stats()
        assert (stats.connections, stats.view_threads, stats.stuck_views) == (0, 1, 1)
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 503
        go.set()
        await wait_until(lambda: websockets.stats().view_threads == 0)
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101

    run(main)
    assert "The view of /ws (endpoint view, peer without an address) still runs" in caplog.text


def test_handshakes_queue_and_then_get_503(run, app):
    """Above WEBSOCKETS_MAX_HANDSHAKES they queue for WEBSOCKETS_HANDSHAKE_TIMEOUT."""
    websockets, asgi = make(app, WEBSOCKETS_MAX_HANDSHAKES=1, WEBSOCKETS_HANDSHAKE_TIMEOUT=TIMEOUT)
    go = [threading.Event() for _ in range(2)]
    running = []

    @websockets.route("/<int:number>")
    def view(ws, number):
        running.append(number)
        assert go[number].wait(TIMEOUT)
        ws.accept()
        ws.wait_closed()

    async def main():
        async with connection(asgi, "/0") as first:
            await wait_until(lambda: running)
            async with connection(asgi, "/1") as second:
                for _ in range(10):
                    await anyio.lowlevel.checkpoint()
                assert running == [0]
                go[0].set()
                assert await first.get_status() == 101  # the handshake is over, the view is not
                await wait_until(lambda: running == [0, 1])
                go[1].set()
                assert await second.get_status() == 101

    run(main)


def test_a_handshake_that_queues_too_long(run, app):
    """After the handshake timeout a queued handshake gets 503, and so does a silent view."""
    websockets, asgi = make(app, WEBSOCKETS_MAX_HANDSHAKES=1, WEBSOCKETS_HANDSHAKE_TIMEOUT=0.3)
    go = threading.Event()
    seen = []

    @websockets.route("/ws")
    def view(ws):
        assert go.wait(TIMEOUT)
        for use in (ws.accept, lambda: ws.send("x"), ws.receive):
            with pytest.raises(ConnectionClosed) as caught:
                use()
            seen.append(str(caught.value))

    async def main():
        async with connection(asgi, "/ws") as first:
            await wait_until(lambda: websockets.stats().view_threads)
            async with connection(asgi, "/ws") as second:
                # The second's time began after the first's: it may still get the slot, for a
                # view that is as silent.
                assert [await first.get_status(), await second.get_status()] == [503, 503]
                go.set()
            stats = websockets.stats()
            assert stats.handshake_timeouts + stats.refused_handshakes == 2

    run(main)
    assert "timed out" in seen[0]
    assert len(seen) % 3 == 0


def test_a_client_that_leaves_during_the_handshake(run, app):
    """The view finds out at its accept, and the slot is free at once."""
    websockets, asgi = make(app, WEBSOCKETS_MAX_HANDSHAKES=1)
    go, seen = threading.Event(), []

    @websockets.route("/ws")
    def view(ws):
        seen.append(ws)
        assert go.wait(TIMEOUT)
        with pytest.raises(ConnectionClosed):
            ws.accept()
        seen.append("closed")

    async def main():
        async with connection(asgi, "/ws") as peer:
            await wait_until(lambda: seen)
            peer.leave(1006)
            await wait_until(lambda: seen[0].closed)
            go.set()
            with anyio.fail_after(TIMEOUT):
                await peer.returned.wait()

    run(main)
    assert seen[1:] == ["closed"]


def test_a_client_that_left_before_the_handshake(run, app):
    """A disconnect as the first message takes no thread."""
    websockets, asgi = make(app)

    async def main():
        async def receive():
            return {"type": "websocket.disconnect", "code": 1006}

        await asgi({"type": "websocket", "path": "/", "headers": []}, receive, None)
        assert websockets.stats().view_threads == 0

    run(main)


def test_i6_a_message_above_the_limit_closes_1009(run, app):
    """The limit is in bytes of UTF-8; a message of just the limit passes."""
    websockets, asgi = make(app, WEBSOCKETS_MAX_MESSAGE_BYTES=100)
    seen = []

    @websockets.route("/ws")
    def view(ws):
        seen.extend(len(data) for data in ws.iter_data())
        seen.append(ws.close_code)

    async def main():
        async with connection(asgi, "/ws") as peer:
            peer.send("x")
            assert await peer.get_status() == 101
            peer.send("é" * 50)
            peer.send(b"x" * 100)
            peer.send("é" * 50 + "x")
            assert (await peer.get())["code"] == 1009
            assert websockets.stats().oversized == 1

    run(main)
    assert seen == [1, 50, 100, 1009]


def test_a_system_without_threads(run, app, monkeypatch):
    """Where no thread can be started a handshake and a request get 503, and nothing is kept."""
    websockets, asgi = make(app, WEBSOCKETS_MAX_HANDSHAKES=1)
    websockets.route("/ws")(lambda ws: None)

    def start(thread):
        raise RuntimeError("can't start new thread")

    async def main():
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            for _ in range(3):
                async with connection(asgi, "/ws") as peer:
                    assert await peer.get_status() == 503
            assert (await get(asgi))[0] == 503
        stats = websockets.stats()
        assert (stats.connections, stats.view_threads) == (0, 0)
        assert (stats.refused_threads, stats.http_refused) == (3, 1)
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
        assert (await get(asgi))[0] == 404

    run(main)


def test_i8_blocked_views_do_not_starve_http(run, app):
    """More sockets than HTTP threads, all blocked: HTTP answers."""
    websockets, asgi = make(app, WEBSOCKETS_HTTP_THREADS=2)
    app.add_url_rule("/", view_func=lambda: "here")

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        ws.receive()

    async def main():
        async with anyio.create_task_group() as tasks:
            leave = anyio.Event()
            opened = []

            async def hold():
                async with connection(asgi, "/ws") as peer:
                    opened.append(await peer.get_status())
                    await leave.wait()

            for _ in range(60):
                tasks.start_soon(hold)
            await wait_until(lambda: len(opened) == 60)
            assert await get(asgi) == (200, b"here")
            leave.set()
        assert set(opened) == {101}

    run(main)


def test_i8_http_requests_queue_and_then_get_503(run, app, monkeypatch):
    """Above threads and queue a request is answered 503, and the others come through."""
    monkeypatch.setattr("flask_websockets.bridge.threads.QUEUED_PER_THREAD", 2)
    websockets, asgi = make(app, WEBSOCKETS_HTTP_THREADS=1)
    go = threading.Event()

    @app.get("/")
    def view():
        assert go.wait(TIMEOUT)
        return "here"

    async def main():
        statuses = []

        async def fetch():
            statuses.append((await get(asgi))[0])

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(fetch)
            await wait_until(lambda: statuses == [503, 503])
            go.set()
        assert sorted(statuses) == [200, 200, 200, 503, 503]
        assert websockets.stats().http_refused == 2

    run(main)


def test_two_applications_share_the_channels_of_one_object(run, app):
    """Apps initialised with one object share its channels."""
    other = Flask("other")
    websockets, asgi = make(app)
    websockets.init_app(other)

    @websockets.route("/ws")
    def view(ws):
        with websockets.subscribe(ws, "a"):
            ws.send("subscribed")
            ws.receive()

    async def main():
        async with (
            connection(asgi, "/ws") as first,
            connection(websockets.asgi_app(other), "/ws") as second,
        ):
            for peer in (first, second):
                assert await peer.get_status() == 101
                assert (await peer.get())["text"] == "subscribed"
            assert (await websockets.apublish("x", "a")).local == 2

    run(main)


def test_i12_a_goodbye_that_crosses_the_peers(run, app):
    """A close that the server does not send, since the peer's was first, ends the connection."""
    app.config["WEBSOCKETS_SEND_TIMEOUT"] = 60
    websockets = WebSockets(app)

    @websockets.route("/ws")
    def view(ws):
        ws.accept()

    async def main():
        incoming = [{"type": "websocket.connect"}]

        async def receive():
            if not incoming:
                await anyio.sleep_forever()
            return incoming.pop()

        async def send(message):
            if message["type"] == "websocket.close":
                raise OSError("the peer has closed")

        scope = {"type": "websocket", "path": "/ws", "headers": [(b"host", b"localhost")]}
        with anyio.fail_after(TIMEOUT):
            await websockets.asgi_app()(scope, receive, send)

    run(main)
