"""Limits of one route: ``@websockets.route(..., max_message_bytes=...)`` and the others."""

from __future__ import annotations

import threading
from dataclasses import fields
from typing import Any

import anyio
import pytest
from flask import Blueprint, Flask

from flask_websockets import (
    AsyncWebSocket,
    ConfigurationError,
    ConnectionClosed,
    UsageError,
    WebSockets,
)
from flask_websockets.config import Config

from .asgi_driver import TIMEOUT, connection, wait_until

#: Every limit that a route may have, with a value that it takes.
LIMITS: dict[str, Any] = {
    "max_message_bytes": 100,
    "inbox_messages": 3,
    "inbox_bytes": 100,
    "inbox_timeout": 0.25,
    "inbox_full": "close",
    "outbox_messages": 3,
    "outbox_bytes": 100,
    "send_timeout": 0.25,
    "close_timeout": 0.25,
    "max_channels_per_connection": 2,
    "max_messages_per_second": 1_000_000.0,
    "max_bytes_per_second": 1_000_000.0,
    "rate_exceeded": "slow_down",
}
#: Settings that are the application's alone.
OTHERS = sorted({field.name for field in fields(Config)} - set(LIMITS))


class House:
    """The same view twice: once with limits of its own, once without."""

    def __init__(self, app: Flask, kind: str, **limits: Any) -> None:
        self.websockets = WebSockets(app)
        self.asgi = self.websockets.asgi_app(app)
        self.go = threading.Event()
        self.ago: Any = None  # made on the loop, for async views
        self.sockets: dict[str, Any] = {}
        self.seen: dict[str, list[Any]] = {"/limited": [], "/free": []}
        self._kind = kind
        self._add("/limited", **limits)
        self._add("/free")

    def _add(self, path: str, **limits: Any) -> None:
        if self._kind == "sync":

            @self.websockets.route(path, endpoint=path[1:], **limits)
            def view(ws: Any) -> None:
                self.sockets[path] = ws
                ws.accept()
                assert self.go.wait(TIMEOUT)
                for data in ws.iter_data():
                    self.seen[path].append(data)

        else:

            @self.websockets.route(path, endpoint=path[1:], **limits)
            async def aview(ws: AsyncWebSocket) -> None:
                self.sockets[path] = ws
                await ws.accept()
                await self.ago.wait()
                async for data in ws.iter_data():
                    self.seen[path].append(data)

    def open(self, path: str, **options: Any) -> Any:
        if self.ago is None:
            self.ago = anyio.Event()
        return connection(self.asgi, path, **options)

    def release(self) -> None:
        """Let the views receive."""
        self.go.set()
        self.ago.set()

    async def settle(self) -> None:
        """Let the loop do what it has to do."""
        for _ in range(50):
            await anyio.lowlevel.checkpoint()


@pytest.fixture(params=["sync", "async"])
def house(request, app):
    """Two routes, of either kind of view, the first with these limits."""

    def make(**limits: Any) -> House:
        return House(app, request.param, **limits)

    return make


async def expect_close(peer: Any, code: int) -> None:
    message = await peer.get()
    assert (message["type"], message.get("code")) == ("websocket.close", code)


# --- What each limit does, at it and one above


def test_max_message_bytes(run, house):
    """A message of the limit passes, a byte more is closed with 1009; the other route takes it."""
    house = house(max_message_bytes=100)

    async def main():
        async with house.open("/limited") as limited, house.open("/free") as free:
            assert [await limited.get_status(), await free.get_status()] == [101, 101]
            house.release()
            for peer in (limited, free):
                peer.send("x" * 100)
                peer.send("€" * 33 + "x")  # 100 bytes
            await wait_until(lambda: list(map(len, house.seen["/limited"])) == [100, 34])
            for peer in (limited, free):
                peer.send("€" * 34)  # 102 bytes in 34 characters
            await expect_close(limited, 1009)
            await wait_until(lambda: len(house.seen["/free"]) == 3)
            assert house.websockets.stats().oversized == 1
            assert house.sockets["/limited"].close_code == 1009
            assert house.sockets["/free"].connected
        assert len(house.seen["/limited"]) == 2

    run(main)


@pytest.mark.parametrize(
    ("limits", "held"),
    [({"inbox_messages": 3}, 3), ({"inbox_bytes": 10}, 2)],
    ids=["count", "bytes"],
)
def test_inbox_pauses(run, house, limits, held):
    """The route's inbox holds so much and the reader one more; the other route's takes all."""
    house = house(inbox_timeout=TIMEOUT, **limits)

    async def main():
        async with house.open("/limited") as limited, house.open("/free") as free:
            assert [await limited.get_status(), await free.get_status()] == [101, 101]
            for number in range(10):
                for peer in (limited, free):
                    peer.send(f"{number:05}")
            # The connect, what the inbox holds, and the one that finds no room.
            await wait_until(lambda: limited.reads == 1 + held + 1)
            await wait_until(lambda: free.reads == 1 + 10 + 1)  # it waits for the eleventh
            await house.settle()
            assert limited.reads == 1 + held + 1
            assert house.websockets.stats().inbox_messages == held + 10
            house.release()
            for path in ("/limited", "/free"):
                await wait_until(lambda path=path: len(house.seen[path]) == 10)
        expected = [f"{number:05}" for number in range(10)]
        assert house.seen == {"/limited": expected, "/free": expected}
        assert house.websockets.stats().inbox_closed == 0

    run(main)


def test_inbox_timeout(run, house):
    """The route's own timeout closes it with 1013, while another with a full inbox waits on."""
    house = house(inbox_messages=2, inbox_timeout=0.2)
    house.websockets.route("/patient", inbox_messages=2)(sleeper(house))

    async def main():
        async with house.open("/limited") as limited, house.open("/patient") as patient:
            assert [await limited.get_status(), await patient.get_status()] == [101, 101]
            for number in range(5):
                for peer in (limited, patient):
                    peer.send(str(number))
            with anyio.fail_after(0.2 + 2):
                await expect_close(limited, 1013)
            assert house.websockets.stats().inbox_closed == 1
            assert house.sockets["/patient"].connected
            house.release()
            await wait_until(lambda: house.seen["/limited"] == ["0", "1"])

    run(main)


def sleeper(house: House) -> Any:
    def patient(ws: Any) -> None:
        house.sockets["/patient"] = ws
        ws.accept()
        assert house.go.wait(TIMEOUT)

    return patient


@pytest.mark.parametrize("policy", ["close", "drop_newest"])
def test_inbox_full(run, house, policy):
    """What a full inbox does is the route's choice; the application's is to pause."""
    house = house(inbox_messages=2, inbox_full=policy)

    async def main():
        async with house.open("/limited") as limited, house.open("/free") as free:
            assert [await limited.get_status(), await free.get_status()] == [101, 101]
            for peer in (limited, free):
                peer.send("0")
                peer.send("1")
            await wait_until(lambda: house.websockets.stats().inbox_messages == 4)
            stats = house.websockets.stats()
            assert (stats.inbox_closed, stats.inbox_dropped) == (0, 0)
            for peer in (limited, free):
                peer.send("2")
            if policy == "close":
                await expect_close(limited, 1013)
                assert house.websockets.stats().inbox_closed == 1
            else:
                await wait_until(lambda: house.websockets.stats().inbox_dropped == 1)
            house.release()
            await wait_until(lambda: house.seen["/free"] == ["0", "1", "2"])
            await wait_until(lambda: house.seen["/limited"] == ["0", "1"])
            assert house.sockets["/free"].connected
            assert house.sockets["/limited"].connected is (policy == "drop_newest")

    run(main)


@pytest.fixture(params=["sync", "async"])
def flooding(request, app):
    """A view that sends messages of ten bytes when asked to, with these limits.

    The second value is what it has got rid of.
    """

    def make(**limits: Any) -> tuple[WebSockets, list[Any]]:
        websockets = WebSockets(app)
        sent: list[Any] = []

        if request.param == "sync":

            @websockets.route("/ws", **limits)
            def view(ws: Any) -> None:
                ws.receive()  # the accept has left the outbox
                try:
                    for number in range(30):
                        ws.send(f"{number:010}")
                        sent.append(number)
                except ConnectionClosed as error:
                    sent.append(error)

        else:

            @websockets.route("/ws", **limits)
            async def aview(ws: AsyncWebSocket) -> None:
                await ws.receive()
                try:
                    for number in range(30):
                        await ws.send(f"{number:010}")
                        sent.append(number)
                except ConnectionClosed as error:
                    sent.append(error)

        return websockets, sent

    return make


@pytest.mark.parametrize(
    ("limits", "held"),
    [({"outbox_messages": 3}, 3), ({"outbox_bytes": 40}, 4)],
    ids=["count", "bytes"],
)
def test_outbox(run, app, flooding, limits, held):
    """The view's send waits at the route's bound, and goes on when the peer reads."""
    websockets, sent = flooding(send_timeout=TIMEOUT, **limits)

    async def main():
        asgi = websockets.asgi_app(app)
        async with connection(asgi, "/ws", socket_messages=0) as peer:
            assert await peer.get_status() == 101
            peer.send("go")
            await wait_until(lambda: websockets.stats().outbox_messages == held)
            await wait_until(lambda: len(sent) == held)
            for number in range(30):
                assert (await peer.get())["text"] == f"{number:010}"
                # The goodbye comes behind the last ones, whether there is room or not.
                assert websockets.stats().outbox_messages <= held + (number >= 20)
            await expect_close(peer, 1000)
        assert sent == list(range(30))

    run(main)


def test_outbox_of_published_messages(run, house):
    """A published message above the route's bound closes 1013; the other route takes it."""
    house = house(outbox_messages=3)
    ready: list[str] = []

    def subscribe(path: str) -> Any:
        def view(ws: Any) -> None:
            with house.websockets.subscribe(ws, "a"):
                ready.append(path)
                ws.wait_closed()

        return view

    house.websockets.route("/few", outbox_messages=3, endpoint="few")(subscribe("/few"))
    house.websockets.route("/many", endpoint="many")(subscribe("/many"))

    async def main():
        async with (
            house.open("/few", socket_messages=0) as few,
            house.open("/many", socket_messages=0) as many,
        ):
            assert [await few.get_status(), await many.get_status()] == [101, 101]
            await wait_until(lambda: len(ready) == 2)
            await wait_until(lambda: house.websockets.stats().outbox_messages == 0)
            publish = house.websockets.apublish
            assert [(await publish(str(n), "a")).local for n in range(5)] == [2, 2, 2, 1, 1]
            assert house.websockets.stats().closed_slow == 1
            assert [(await many.get())["text"] for _ in range(5)] == list("01234")

    run(main)


def test_send_timeout(run, app, flooding):
    """A peer that takes nothing is given up after the route's own send timeout."""
    websockets, sent = flooding(outbox_messages=2, send_timeout=0.3)

    async def main():
        asgi = websockets.asgi_app(app)
        async with connection(asgi, "/ws", socket_messages=0) as peer:
            assert await peer.get_status() == 101
            peer.send("go")
            with anyio.fail_after(0.3 + 2):
                while not sent or isinstance(sent[-1], int):
                    await anyio.sleep(0.005)
            assert sent[:-1] == [0, 1]
            assert sent[-1].code == 1006
            await wait_until(lambda: websockets.stats().send_timeouts == 1)

    run(main)


def test_close_timeout(run, house, caplog):
    """A view that goes on after its connection is reported after the route's own time."""
    house = house(close_timeout=0.2)

    async def main():
        async with house.open("/limited") as limited, house.open("/free") as free:
            assert [await limited.get_status(), await free.get_status()] == [101, 101]
            free.leave()
            limited.leave()
            with anyio.fail_after(0.2 + 0.2 + 1):  # an async view is cancelled, and may finish
                await limited.returned.wait()
            # The application's own is 2 s.
            assert not free.returned.is_set()
            house.release()
            with anyio.fail_after(TIMEOUT):
                await free.returned.wait()

    run(main)


def test_max_channels_per_connection(run, app):
    """One channel above the route's limit nothing is subscribed; the other route subscribes."""
    websockets = WebSockets(app)
    seen: list[Any] = []

    def subscribe(ws: Any) -> None:
        try:
            with websockets.subscribe(ws, ["a", "b"]):
                seen.append(websockets.stats().pending >= 0)
                with websockets.subscribe(ws, ["b", "c"]):
                    seen.append("three")
        except UsageError as error:
            seen.append(str(error))
        websockets.publish("left", ["a", "b", "c"])
        ws.send("end")

    websockets.route("/limited", max_channels_per_connection=2, endpoint="limited")(subscribe)
    websockets.route("/free", endpoint="free")(subscribe)

    async def main():
        asgi = websockets.asgi_app(app)
        for path, expected in (("/limited", "2 channels"), ("/free", "three")):
            seen.clear()
            async with connection(asgi, path) as peer:
                assert await peer.get_status() == 101
                assert (await peer.get())["text"] == "end"
            assert seen[0] is True
            assert expected in seen[1]

    run(main)


# --- Registration


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name, good in LIMITS.items()
        for value in (
            (0, -1, True, "1", 1.5)
            if isinstance(good, int)
            else (0, -1.0, True, "1", float("inf"), float("nan"))
            if isinstance(good, float)
            else ("drop_oldest", "", 1, True)
        )
    ],
)
def test_a_limit_that_cannot_be_right(websockets, app, name, value):
    """It is a ConfigurationError when the route is made, which names the limit and the value."""
    with pytest.raises(ConfigurationError) as caught:
        websockets.route("/ws", **{name: value})(lambda ws: None)
    assert name in str(caught.value).lower()
    assert repr(value) in str(caught.value)
    assert [rule for rule in app.url_map.iter_rules() if rule.websocket] == []


@pytest.mark.parametrize("name", OTHERS)
def test_the_applications_settings_are_no_limits_of_a_route(websockets, app, name):
    """What counts for the whole application cannot be set for one route."""
    with pytest.raises((TypeError, ConfigurationError)):
        websockets.route("/ws", **{name: Config.__dataclass_fields__[name].default})(
            lambda ws: None
        )
    assert [rule for rule in app.url_map.iter_rules() if rule.websocket] == []


def test_a_routes_limits_are_told(app, websockets):
    """``websocket_route.limits`` has what was given, and nothing of the application's."""

    @websockets.route("/all", **LIMITS)
    def every(ws: Any) -> None:
        pass

    @websockets.route("/none")
    async def none(ws: AsyncWebSocket) -> None:
        pass

    assert app.view_functions["every"].websocket_route.limits == LIMITS
    assert app.view_functions["none"].websocket_route.limits == {}


def test_a_whole_number_of_seconds(app, websockets):
    """A duration may be a whole number, as in the application's settings."""

    @websockets.route("/ws", send_timeout=2, inbox_timeout=3)
    def view(ws: Any) -> None:
        pass

    assert app.view_functions["view"].websocket_route.limits == {
        "send_timeout": 2.0,
        "inbox_timeout": 3.0,
    }


def test_limits_of_a_blueprint_and_of_a_factory(run):
    """A route made before init_app, on a blueprint or not, has its limits in each application."""
    websockets = WebSockets()
    blueprint = Blueprint("chat", __name__, url_prefix="/chat")

    @websockets.route("/ws", max_message_bytes=5)
    def plain(ws: Any) -> None:
        for data in ws.iter_data():
            ws.send(data)

    @websockets.route("/ws", blueprint=blueprint, max_message_bytes=6, endpoint="ws")
    def nested(ws: Any) -> None:
        for data in ws.iter_data():
            ws.send(data)

    apps = []
    for limit in (4, 100):
        app = Flask(f"app{limit}")
        app.config["WEBSOCKETS_MAX_MESSAGE_BYTES"] = limit
        app.register_blueprint(blueprint)
        websockets.init_app(app)
        apps.append(app)

    async def main():
        for app in apps:
            asgi = websockets.asgi_app(app)
            for path, limit in (("/ws", 5), ("/chat/ws", 6)):
                async with connection(asgi, path) as peer:
                    assert await peer.get_status() == 101
                    peer.send("x" * limit)
                    assert (await peer.get())["text"] == "x" * limit
                    peer.send("x" * (limit + 1))
                    await expect_close(peer, 1009)

    run(main)


def test_url_rule_options_are_still_werkzeugs(websockets, app):
    """Limits beside defaults= and strict_slashes= reach Flask as before."""

    @websockets.route(
        "/ws/", endpoint="hall", defaults={"room": "hall"}, strict_slashes=False, inbox_messages=5
    )
    @websockets.route("/ws/<room>", outbox_messages=5)
    def view(ws: Any, room: str) -> None:
        ws.send(room)

    client = websockets.test_client(app)
    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "hall"
    with client.websocket_connect("/ws/attic") as ws:
        assert ws.receive() == "attic"
