"""``websockets.stats()``: every gauge exact in a situation made for it, and zero again after it."""

from __future__ import annotations

import threading
from contextlib import AsyncExitStack
from dataclasses import FrozenInstanceError, asdict, fields
from typing import Any

import anyio
import pytest
from flask import Flask

from flask_websockets import AsyncWebSocket, Stats, WebSockets
from flask_websockets.bridge import threads

from .asgi_driver import TIMEOUT, connection, wait_until
from .http_driver import http_scope

GAUGES = (
    *("connections", "view_threads", "view_tasks", "http_threads", "channels", "subscriptions"),
    *("pending", "inbox_messages", "inbox_bytes", "outbox_messages", "outbox_bytes"),
)
NOTHING = dict.fromkeys(GAUGES, 0)


def gauges(websockets: WebSockets) -> dict[str, int]:
    stats = websockets.stats()
    return {name: getattr(stats, name) for name in GAUGES}


class House:
    """An application with views that wait for the test's word, and HTTP ones too."""

    def __init__(self, app: Flask, **settings: Any) -> None:
        app.config.update(settings)
        self.websockets = websockets = WebSockets(app)
        self.asgi = websockets.asgi_app(app)
        self.sockets: list[Any] = []
        self.go = threading.Event()  # sync views and HTTP views
        self.take = threading.Semaphore(0)  # the sync view of a/b: receive one message
        self.taken: list[Any] = []
        self.ago: Any = None  # async views; made on the loop

        @websockets.route("/sync/<path:names>")
        def view(ws, names):
            with websockets.subscribe(ws, names.split("/"), on_slow="drop_newest"):
                self.sockets.append(ws)
                if names == "a/b" and self.take.acquire(timeout=TIMEOUT):
                    self.taken.append(ws.receive())
                assert self.go.wait(TIMEOUT)

        @websockets.route("/async/<path:names>")
        async def aview(ws: AsyncWebSocket, names: str) -> None:
            async with websockets.subscribe(ws, names.split("/"), on_slow="latest"):
                self.sockets.append(ws)
                await self.ago.wait()

        @app.get("/http")
        def http():
            assert self.go.wait(TIMEOUT)
            return "done"

    async def request(self) -> None:
        """One HTTP request, from beginning to end."""
        to_app, from_peer = anyio.create_memory_object_stream[Any](2)
        body: list[bytes] = []

        async def send(message: dict[str, Any]) -> None:
            body.append(message.get("body", b""))

        with to_app, from_peer:
            to_app.send_nowait({"type": "http.request", "body": b"", "more_body": False})
            await self.asgi(http_scope("GET", "/http"), from_peer.receive, send)
        assert b"".join(body) == b"done"


@pytest.fixture(autouse=True)
def http_threads_do_not_linger(monkeypatch):
    """An idle HTTP thread ends at once, so that its gauge comes back to zero."""
    monkeypatch.setattr(threads, "IDLE_SECONDS", 0.05)


def test_before_a_server_has_started(websockets):
    """Everything is zero, and every field is there."""
    stats = websockets.stats()
    assert isinstance(stats, Stats)
    assert set(asdict(stats).values()) == {0}
    assert set(GAUGES) <= {field.name for field in fields(stats)}
    assert {"dropped_oldest", "dropped_newest", "dropped_latest"} <= set(asdict(stats))


def test_a_picture_does_not_change(websockets):
    """What stats() returned is one moment's, and nobody's to change."""
    with pytest.raises(FrozenInstanceError):
        websockets.stats().connections = 1


def test_every_gauge(run, app):
    """Two sync views, one async view and two HTTP requests, with messages waiting both ways."""
    house = House(app)
    websockets = house.websockets

    async def main():
        house.ago = anyio.Event()
        assert gauges(websockets) == NOTHING
        async with AsyncExitStack() as stack:
            requests = await stack.enter_async_context(anyio.create_task_group())
            try:
                peers = [
                    await stack.enter_async_context(connection(house.asgi, path, socket_messages=0))
                    for path in ("/sync/a/b", "/sync/a", "/async/a/c")
                ]
                for peer in peers:
                    assert await peer.get_status() == 101
                await wait_until(lambda: len(house.sockets) == 3)
                await wait_until(lambda: websockets.stats().subscriptions == 5)
                expected = {**NOTHING, "connections": 3, "view_threads": 2, "view_tasks": 1}
                expected |= {"channels": 3, "subscriptions": 5}
                await wait_until(lambda: websockets.stats().outbox_messages == 0)
                # The threads in which the async view's handshake ran go home.
                await wait_until(lambda: websockets.stats().http_threads == 0)
                assert gauges(websockets) == expected

                for _ in range(2):
                    requests.start_soon(house.request)
                await wait_until(lambda: websockets.stats().http_threads == 2)

                for size in (10, 20, 30):
                    peers[0].send("x" * size)
                peers[2].send(b"y" * 5)
                peers[2].send("€")
                await wait_until(lambda: websockets.stats().inbox_messages == 5)

                assert (await websockets.apublish("x" * 7, "a")).local == 3
                assert (await websockets.apublish("€", "b")).local == 1
                expected |= {
                    "http_threads": 2,
                    "inbox_messages": 5,
                    "inbox_bytes": 60 + 5 + 3,
                    "outbox_messages": 4,
                    "outbox_bytes": 3 * 7 + 3,
                }
                assert gauges(websockets) == expected

                # The view has received one: what it was handed with it has not been taken.
                house.take.release()
                await wait_until(lambda: house.taken)
                expected |= {"inbox_messages": 4, "inbox_bytes": 50 + 5 + 3}
                assert gauges(websockets) == expected

                assert (await peers[1].get())["text"] == "x" * 7
                expected |= {"outbox_messages": 3, "outbox_bytes": 2 * 7 + 3}
                await wait_until(lambda: gauges(websockets) == expected)

                # While the loop does something else, what threads say waits at the door.
                thread = threading.Thread(
                    target=lambda: [websockets.publish(str(n), "nobody's") for n in range(4)]
                )
                thread.start()
                thread.join(TIMEOUT)
                assert gauges(websockets) == {**expected, "pending": 4}
                await wait_until(lambda: gauges(websockets) == expected)
            finally:
                house.take.release()
                house.go.set()
                house.ago.set()
        await wait_until(lambda: gauges(websockets) == NOTHING)
        counted = asdict(websockets.stats())
        assert counted["connections_total"] == 3
        assert counted["published"] == 6
        assert counted["delivered"] == 4
        others = set(counted) - set(GAUGES) - {"connections_total", "published", "delivered"}
        assert {counted[name] for name in others} == {0}

    run(main)


def test_a_failing_view_leaves_no_gauge_behind(run, app, caplog):
    """Views that raise, before or after the accept, are counted out like others."""
    websockets = WebSockets(app)

    @websockets.route("/sync/<when>")
    def view(ws, when):
        if when == "after":
            with websockets.subscribe(ws, "a", on_slow="latest"):
                ws.send("x")
                raise RuntimeError(when)
        raise RuntimeError(when)

    @websockets.route("/async/<when>")
    async def aview(ws: AsyncWebSocket, when: str) -> None:
        if when == "after":
            async with websockets.subscribe(ws, "a", on_slow="latest"):
                await ws.send("x")
                raise RuntimeError(when)
        raise RuntimeError(when)

    async def main():
        asgi = websockets.asgi_app(app)
        for kind in ("sync", "async"):
            for when, status in (("before", 500), ("after", 101)):
                async with connection(asgi, f"/{kind}/{when}") as peer:
                    assert await peer.get_status() == status
                    peer.send("never received")
                await wait_until(lambda: gauges(websockets) == NOTHING)
        assert websockets.stats().connections_total == 2

    run(main)


def test_a_connection_that_is_cut_leaves_no_gauge_behind(run, app):
    """A server that cancels the connection's task, with messages waiting both ways."""
    house = House(app)

    async def main():
        house.ago = anyio.Event()
        for path in ("/sync/a", "/async/a"):
            house.sockets.clear()
            async with connection(house.asgi, path, socket_messages=0) as peer:
                assert await peer.get_status() == 101
                await wait_until(lambda: house.websockets.stats().subscriptions == 1)
                peer.send("waiting")
                await wait_until(lambda: house.websockets.stats().inbox_messages == 1)
                await house.websockets.apublish("waiting", "a")
                assert house.websockets.stats().outbox_messages == 1
                peer.cancel()
                house.go.set()
                house.ago.set()
                await wait_until(lambda: gauges(house.websockets) == NOTHING)
            house.go.clear()
            house.ago = anyio.Event()

    run(main)


def test_an_async_view_that_is_still_finishing_counts(run, app):
    """A view's task counts until the coroutine has ended, not until the connection has."""
    websockets = WebSockets(app)
    finishing: list[Any] = []

    @websockets.route("/ws")
    async def view(ws: AsyncWebSocket) -> None:
        try:
            await ws.accept()
            await ws.receive()
        finally:
            finishing.append(ws)
            await go.wait()

    go: Any = None

    async def main():
        nonlocal go
        go = anyio.Event()
        async with connection(websockets.asgi_app(app), "/ws") as peer:
            assert await peer.get_status() == 101
            peer.leave()
            await wait_until(lambda: finishing)
            assert websockets.stats().view_tasks == 1
            go.set()
            await wait_until(lambda: gauges(websockets) == NOTHING)

    run(main)


def test_dropping_an_inbox_message_keeps_the_gauge(run, app):
    """A message dropped by WEBSOCKETS_INBOX_FULL is counted, and does not lie in the inbox."""
    house = House(app, WEBSOCKETS_INBOX_MESSAGES=2, WEBSOCKETS_INBOX_FULL="drop_newest")

    async def main():
        house.ago = anyio.Event()
        async with connection(house.asgi, "/sync/a") as peer:
            assert await peer.get_status() == 101
            await wait_until(lambda: house.sockets)
            for _ in range(5):
                peer.send("12345")
            await wait_until(lambda: house.websockets.stats().inbox_dropped == 3)
            found = gauges(house.websockets)
            assert (found["inbox_messages"], found["inbox_bytes"]) == (2, 10)
            house.go.set()
        await wait_until(lambda: gauges(house.websockets) == NOTHING)

    run(main)
