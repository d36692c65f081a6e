"""What only a mutation showed to be untested: one line of the invariants each."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack

import anyio
import pytest
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from uvicorn import Config as UvicornConfig
from uvicorn.server import ServerState

from flask_websockets import ConnectionClosed
from flask_websockets.bridge import Door, Link
from flask_websockets.channels import Hub
from flask_websockets.config import Config
from flask_websockets.counters import Counters
from flask_websockets.environ import WEBSOCKET
from flask_websockets.servers.uvicorn import protocol_of

from .asgi_driver import TIMEOUT, connection, wait_until
from .test_asgi import get
from .test_link import Served
from .test_servers_uvicorn import CLASSES, HEAD, Transport, accepted, finish


def test_i2_no_thread_touches_a_stream(run, app, monkeypatch):
    """Whatever views do, the memory streams are used on the loop's thread alone."""
    served = Served(app)
    threads = set()

    def watch(kind, name):
        original = getattr(kind, name)

        def watched(self, *args):
            threads.add(threading.get_ident())
            return original(self, *args)

        monkeypatch.setattr(kind, name, watched)

    watch(MemoryObjectReceiveStream, "receive_nowait")
    watch(MemoryObjectSendStream, "send_nowait")

    @served.websockets.route("/ws")
    def view(ws):
        served.ws = ws
        with served.websockets.subscribe(ws, "a"):
            served.wait()
            for _ in range(10):
                ws.send(ws.receive())
                served.websockets.publish("published", "a")

    async def main():
        async with connection(served, "/ws") as peer:
            assert await peer.get_status() == 101
            for number in range(10):
                peer.send(str(number))
            await wait_until(lambda: served.used("inbound") == 10)
            served.go.set()
            for number in range(10):
                assert (await peer.get())["text"] == str(number)
                assert (await peer.get())["text"] == "published"
            assert (await peer.get())["code"] == 1000
        assert threads == {threading.get_ident()}

    run(main)


def test_i4_the_short_way_is_for_an_idle_writer_only(run, app):
    """While the writer sends, a message takes its place behind it, and nothing overtakes."""
    served = Served(app)
    taken = []

    @served.websockets.route("/ws")
    def view(ws):
        served.ws = ws
        ws.send("0")
        ws.send("1")
        ws.receive()

    async def main():
        async with connection(served, "/ws", socket_messages=1) as peer:
            await wait_until(lambda: served.ws and served.ws.link._outbox_messages == 2)
            link = served.ws.link
            link.inline = taken.append
            assert link.offer({"type": "websocket.send", "text": "2"}, 1)
            assert taken == []
            assert await peer.get_status() == 101
            for number in range(3):
                assert (await peer.get())["text"] == str(number)
            await wait_until(lambda: link._outbox_messages == 0)
            assert link.offer({"type": "websocket.send", "text": "3"}, 1)
            assert [message["text"] for message in taken] == ["3"]

    run(main)


@pytest.mark.parametrize("kind", CLASSES)
def test_i4_an_unknown_send_has_no_short_way(kind):
    """A subclass, another method of the protocol and another object's send are unknown."""

    class Other(kind):
        pass

    class Wrapper:
        async def send(self, message):
            pass

    async def main():
        protocol, send, _ = await accepted(kind)
        assert protocol_of(send) is protocol
        other = Other.__new__(Other)
        other.__dict__.update(vars(protocol))
        for unknown in (protocol.resume_writing, other.send, Wrapper().send, print, None):
            assert protocol_of(unknown) is None
        await finish(protocol)

    asyncio.run(main())


def test_i5_a_view_that_exits_closes_1011_behind_any_middleware(app, client, websockets):
    """A middleware that answers for SystemExit does not make a normal end of it."""
    inner = app.wsgi_app

    def middleware(environ, start_response):
        try:
            return inner(environ, start_response)
        except SystemExit:
            start_response("500 Internal Server Error", [])
            return [b""]

    app.wsgi_app = middleware

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        raise SystemExit(3)

    with client.websocket_connect("/ws") as ws:
        with pytest.raises(ConnectionClosed) as caught:
            ws.receive()
        assert caught.value.code == 1011


@pytest.mark.parametrize("end", ["leave", "close"])
def test_i5_a_blocked_send_ends_with_its_connection(run, app, end):
    """A send that waits for room raises when the connection ends, not when its time has passed."""
    served = Served(app, WEBSOCKETS_OUTBOX_MESSAGES=2, WEBSOCKETS_SEND_TIMEOUT=60)

    @served.websockets.route("/ws")
    def view(ws):
        served.ws = ws
        with pytest.raises(ConnectionClosed) as caught:
            while True:
                ws.send("x")
        served.log.append(caught.value.code)

    async def main():
        async with connection(served, "/ws", socket_messages=1) as peer:
            await wait_until(lambda: served.ws and len(served.ws.link._blocked) == 1)
            # The sender asks the loop to look once more before it waits. Let that pass: it would
            # wake the sender as well, and hide what this test is about. It cannot fail for it.
            await anyio.sleep(0.1)
            if end == "leave":
                peer.leave(4001)
            else:
                served.ws.close(4001)
            await wait_until(lambda: served.log == [4001])

    run(main)


@pytest.mark.parametrize("verb", ["publish", "subscribe"])
def test_i6_what_waits_at_the_door_is_bounded(run, app, verb):
    """While the loop takes nothing, the third of two publishes or subscribes waits, and raises."""
    served = Served(app, WEBSOCKETS_MAX_PENDING_PUBLISHES=2, WEBSOCKETS_SEND_TIMEOUT=0.05)
    done = threading.Event()

    @served.websockets.route("/ws")
    def view(ws):
        ws.accept()
        served.wait()
        try:
            with ExitStack() as blocks:
                for name in "abc":
                    if verb == "publish":
                        served.websockets.publish("x", name)
                    else:
                        blocks.enter_context(served.websockets.subscribe(ws, name))
                    served.log.append(name)
        except TimeoutError as error:
            served.log.append("WEBSOCKETS_MAX_PENDING_PUBLISHES" in str(error))
        finally:
            done.set()

    async def main():
        async with connection(served, "/ws") as peer:
            assert await peer.get_status() == 101
            served.go.set()
            assert done.wait(TIMEOUT)  # blocks the loop: nothing is taken
            assert served.log == ["a", "b", True]

    run(main)


def test_i7_a_subscribe_that_comes_too_late_leaves_nothing(run):
    """The hub looks before it changes: who is gone is not subscribed any more."""

    async def main():
        hub, link = Hub(Counters()), Link(Door(1), Config())
        link.lose(1006)
        hub.subscribe((link, ["a"]))
        assert (hub.channels, hub.subscriptions) == (0, 0)

    run(main)


def test_i9_view_and_http_threads_are_daemons(run, app):
    """No thread of ours keeps the process alive, whatever runs on it."""
    served = Served(app)
    app.add_url_rule("/", view_func=lambda: str(threading.current_thread().daemon))

    @served.websockets.route("/ws")
    def view(ws):
        ws.send(str(threading.current_thread().daemon))

    async def main():
        async with connection(served, "/ws") as peer:
            assert await peer.get_status() == 101
            assert (await peer.get())["text"] == "True"
        assert await get(served) == (200, b"True")

    run(main)


def test_i11_a_send_has_a_deadline_even_if_the_loop_hangs(run, app):
    """A view's send ends in its own thread: it needs no loop for it."""
    served = Served(app, WEBSOCKETS_OUTBOX_MESSAGES=5, WEBSOCKETS_SEND_TIMEOUT=0.1)
    done = threading.Event()

    @served.websockets.route("/ws")
    def view(ws):
        ws.accept()
        served.wait()
        with pytest.raises(ConnectionClosed) as caught:
            while True:
                ws.send("x")
        served.log.append(caught.value.code)
        done.set()

    async def main():
        async with connection(served, "/ws") as peer:
            assert await peer.get_status() == 101
            served.go.set()
            assert done.wait(TIMEOUT)  # blocks the loop: no room is made
            assert served.log == [1006]

    run(main)


async def opened(kind, served):
    """A connection through uvicorn's protocol class *kind*: the protocol and its transport."""
    config = UvicornConfig(served, lifespan="off", log_config=None, ws_ping_interval=None)
    config.load()
    protocol = kind(config=config, server_state=ServerState(), app_state={})
    transport = Transport()
    protocol.connection_made(transport)
    protocol.data_received(HEAD)
    await wait_until(lambda: transport.written and served.ws)
    return protocol, transport


@pytest.mark.parametrize("kind", CLASSES)
def test_i11_a_peer_that_takes_nothing_is_aborted(kind, app):
    """After the send timeout the transport is aborted, and not only closed."""
    served = Served(app, WEBSOCKETS_SEND_TIMEOUT=0.1, WEBSOCKETS_CLOSE_TIMEOUT=60)

    @served.websockets.route("/ws")
    def view(ws):
        ws.accept()
        served.ws = ws
        served.wait()
        ws.send("x")
        ws.receive()

    async def main():
        protocol, transport = await opened(kind, served)
        protocol.pause_writing()
        served.go.set()
        try:
            await wait_until(lambda: transport.aborted)
            assert served.websockets.stats().aborted == 1
        finally:
            protocol.connection_lost(None)
            await wait_until(lambda: not protocol.tasks)

    asyncio.run(main())


@pytest.mark.parametrize("kind", CLASSES)
def test_i11_a_transport_that_cannot_close_is_aborted(kind, app):
    """A transport that somebody closed, and that stays closing, is aborted and counted."""
    served = Served(app, WEBSOCKETS_CLOSE_TIMEOUT=0.2)

    @served.websockets.route("/ws")
    def view(ws):
        ws.accept()
        served.ws = ws
        ws.receive()

    async def main():
        protocol, transport = await opened(kind, served)
        transport.close()
        try:
            await wait_until(lambda: transport.aborted)
            assert served.websockets.stats().aborted == 1
        finally:
            protocol.connection_lost(None)
            await wait_until(lambda: not protocol.tasks)

    asyncio.run(main())


def test_i12_what_middleware_accepts_gets_its_goodbye(app, client, websockets):
    """A connection that was accepted, and came to no view, is closed with 1000."""

    def middleware(environ, start_response):
        environ[WEBSOCKET].link.accept({"type": "websocket.accept"})
        start_response("200 OK", [])
        return [b""]

    app.wsgi_app = middleware
    with client.websocket_connect("/ws") as ws:
        with pytest.raises(ConnectionClosed) as caught:
            ws.receive()
        assert (caught.value.code, caught.value.reason) == (1000, "")


def test_i11_an_async_send_has_a_deadline_of_its_own(run):
    """It does not wait for room for longer than the send timeout, whatever the writer does."""

    async def main():
        link = Link(Door(1), Config(outbox_messages=1, send_timeout=0.2))
        link.accept({"type": "websocket.accept"})
        link.catch_up()
        try:  # there is no writer: nobody takes what lies in the outbox
            with (
                anyio.fail_after(TIMEOUT),
                pytest.raises(ConnectionClosed, match="made no room"),
            ):
                for _ in range(3):
                    await link.asend({"type": "websocket.send", "text": "x"}, 1)
        finally:
            link.lose(1006)

    run(main)
