"""The runtime's drain: who is told what, in which order, and what is cut at its end."""

from __future__ import annotations

import math
import re
import threading

import anyio
import pytest

from flask_websockets import ConnectionClosed, WebSockets
from flask_websockets.protocol import State
from flask_websockets.running_view import report

from .asgi_driver import TIMEOUT, connection, wait_until

#: Seconds that a drain may take beyond its timeout.
MARGIN = 2.0


def make(app, **settings):
    app.config.update(settings)
    websockets = WebSockets(app)
    return websockets, websockets.asgi_app(), websockets.adrain


async def closed(peer):
    """How the application closed the connection."""
    message = await peer.get()
    assert message["type"] == "websocket.close", message
    return message["code"], message["reason"]


@pytest.mark.parametrize("waits", ["for a message", "for the end"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_i9_a_drain_closes_after_what_was_sent(run, app, kind, waits):
    """1012 comes behind what the view has sent; the view learns of it; nobody is waited for."""
    websockets, asgi, drain = make(app)
    seen, sent, links = [], threading.Event(), []

    @websockets.route("/sync")
    def sync_view(ws):
        for number in range(20):
            ws.send(str(number))
        links.append(ws.link)
        sent.set()
        if waits == "for the end":
            assert ws.wait_closed(TIMEOUT)
        with pytest.raises(ConnectionClosed) as caught:
            ws.receive()
        seen.append((caught.value.code, caught.value.reason))

    @websockets.route("/async")
    async def async_view(ws):
        for number in range(20):
            await ws.send(str(number))
        links.append(ws.link)
        sent.set()
        if waits == "for the end":
            assert await ws.wait_closed(TIMEOUT)
        with pytest.raises(ConnectionClosed) as caught:
            await ws.receive()
        seen.append((caught.value.code, caught.value.reason))

    async def main():
        async with connection(asgi, f"/{kind}", socket_messages=0) as peer:
            assert await peer.get_status() == 101
            await wait_until(sent.is_set)
            async with anyio.create_task_group() as tasks:
                # The first has come; the others wait for a peer that takes one at a time.
                assert (await peer.get())["text"] == "0"
                tasks.start_soon(drain, 60)
                await wait_until(lambda: links[0].state is State.CLOSED)  # and they still wait
                assert [(await peer.get())["text"] for _ in range(19)] == [
                    str(number) for number in range(1, 20)
                ]
                assert await closed(peer) == (1012, "the server stops")
                peer.leave(1012)
        assert websockets.stats().connections == 0

    run(main)
    assert seen == [(1012, "the server stops")]


def test_i9_a_drain_refuses_handshakes_and_serves_http(run, app):
    """503 with Retry-After for those who come, without a thread, and for those who wait."""
    websockets, asgi, drain = make(app, WEBSOCKETS_MAX_HANDSHAKES=1)
    inside, go_on, seen = threading.Event(), threading.Event(), []

    @websockets.route("/ws")
    def view(ws):
        inside.set()
        assert go_on.wait(TIMEOUT)
        with pytest.raises(ConnectionClosed) as caught:
            ws.accept()
        seen.append(caught.value.reason)

    async def main():
        async with (
            connection(asgi, "/ws") as waiting,
            connection(asgi, "/ws") as queued,
            anyio.create_task_group() as tasks,
        ):
            await wait_until(inside.is_set)
            assert websockets.stats().view_threads == 1  # the other has no place yet
            tasks.start_soon(drain, 60)
            for peer in (waiting, queued):
                message = await peer.get()
                assert message["status"] == 503
                assert b"retry-after" in dict(message["headers"])
            async with connection(asgi, "/ws") as late:
                assert await late.get_status() == 503
            assert websockets.stats().view_threads == 1
            go_on.set()

    run(main)
    assert seen == ["the server stops"]


def test_i9_a_drain_has_an_end(run, app, caplog):
    """A view that stays and a peer that takes nothing are cut; the stop does not wait again."""
    websockets, asgi, drain = make(app)
    release = threading.Event()

    @websockets.route("/stuck")
    def stuck(ws):
        ws.accept()
        release.wait(TIMEOUT)

    @websockets.route("/deaf")
    def deaf(ws):
        ws.send("x")
        ws.receive()

    async def main():
        async with (
            connection(asgi, "/stuck") as peer,
            connection(asgi, "/deaf", socket_messages=0) as silent,
        ):
            assert await peer.get_status() == await silent.get_status() == 101
            with anyio.fail_after(0.5 + MARGIN):
                await drain(0.5)
                await peer.returned.wait()
                await silent.returned.wait()
                await websockets._stop()
            assert await closed(peer) == (1012, "the server stops")
        release.set()

    try:
        run(main)
    finally:
        release.set()
    assert caplog.text.count("at the end of the drain (WEBSOCKETS_DRAIN_TIMEOUT)") == 1
    assert re.search(r"The view of /stuck \(.*\) still runs at the end of the drain", caplog.text)


def test_i9_an_async_view_is_cancelled_at_the_end_of_a_drain(run, app, caplog):
    """Its ``finally`` runs, though the close timeout has not come."""
    websockets, asgi, drain = make(app)
    seen = []

    @websockets.route("/ws")
    async def view(ws):
        await ws.accept()
        try:
            await anyio.sleep(math.inf)
        finally:
            seen.append("finally")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            with anyio.fail_after(0.2 + MARGIN):
                await drain(0.2)
                await peer.returned.wait()
            assert seen == ["finally"]
            await wait_until(lambda: websockets.stats().view_tasks == 0)

    run(main)
    assert "still runs" not in caplog.text


def test_a_view_that_is_over_is_not_reported(run, app, caplog):
    """Nor is one twice: a report says what still runs, and no more."""
    websockets, asgi, _ = make(app)
    release = threading.Event()

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        release.wait(TIMEOUT)

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            [running] = [each.view for each in websockets._runtime.connections]
            report([running], "in this test")
            report([running], "in this test")
            assert websockets.stats().stuck_views == 1
            release.set()
            await wait_until(lambda: not running.running)
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            [running] = [each.view for each in websockets._runtime.connections]
            await wait_until(lambda: not running.running)
            report([running], "in this test")
            assert websockets.stats().stuck_views == 1

    try:
        run(main)
    finally:
        release.set()
    assert caplog.text.count("still runs") == 1


def test_a_drain_of_what_never_ran(run, app):
    """Nobody has come yet: there is nothing to do."""
    _, _, drain = make(app)
    run(lambda: drain(60))
