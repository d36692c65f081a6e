"""Rights over time: ``identify``, ``disconnect``, ``max_age`` and ``recheck``."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import types
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial, wraps
from typing import Any

import anyio
import anyio.to_thread
import flask_login
import pytest
from flask import Flask, abort, current_app, g, has_request_context, request, session

from flask_websockets import (
    AsyncWebSocket,
    ConfigurationError,
    ConnectionClosed,
    ConnectionRejected,
    NotRunning,
    UsageError,
    WebSockets,
    WrongThread,
    running_view,
)

from .asgi_driver import TIMEOUT, Peer, connection, wait_until
from .test_docs import DOCS, blocks

#: Seconds beyond a promised time.
MARGIN = 1.5

TOO_OLD = (4401, "the login is too old")
NO_LONGER_VALID = (4401, "the login is no longer valid")
LOGGED_OUT = (4401, "")

ROUNDS = "flask-websockets-rounds"


def user_of_the_request() -> Any:
    """Whoever the client says it is; with a number before a colon, that type of it."""
    name = request.headers.get("X-User")
    if name is None:
        return None
    kind, _, value = name.rpartition(":")
    return {"int": int, "uuid": uuid.UUID}.get(kind, str)(value)


class House:
    """An application, or several on one object, whose views keep what they see."""

    def __init__(self, *apps: Flask, identify: Callable[[], Any] | None = user_of_the_request):
        self.websockets = websockets = WebSockets()
        for app in apps:
            websockets.init_app(app)
        self.asgi = websockets.asgi_app(apps[0])
        if identify is not None:
            websockets.identify(identify)
        self.go = threading.Event()
        self.ago: Any = None  # made on the loop
        self.seen: list[Any] = []
        self._stack = AsyncExitStack()
        self._peers: list[Peer] = []
        self._add_views()

    def _add_views(self) -> None:
        websockets, seen = self.websockets, self.seen

        @websockets.route("/ws")
        def view(ws: Any) -> None:
            with websockets.subscribe(ws, "news"):
                try:
                    while True:
                        seen.append(ws.receive())
                except ConnectionClosed as error:
                    seen.append((error.code, error.reason))

        @websockets.route("/async/ws")
        async def aview(ws: AsyncWebSocket) -> None:
            async with websockets.subscribe(ws, "news"):
                try:
                    while True:
                        seen.append(await ws.receive())
                except ConnectionClosed as error:
                    seen.append((error.code, error.reason))

        @websockets.route("/undecided")
        def undecided(ws: Any) -> None:
            assert self.go.wait(TIMEOUT)
            try:
                ws.accept()
            except ConnectionClosed as error:
                seen.append(error.reason)
                raise
            ws.wait_closed()

        @websockets.route("/async/undecided")
        async def aundecided(ws: AsyncWebSocket) -> None:
            await self.ago.wait()
            try:
                await ws.accept()
            except ConnectionClosed as error:
                seen.append(error.reason)
                raise
            await ws.wait_closed()

        @websockets.route("/busy")
        def busy(ws: Any) -> None:
            ws.accept()
            assert self.go.wait(TIMEOUT)
            try:
                ws.send("late")
            except ConnectionClosed as error:
                seen.append((error.code, error.reason))

        @websockets.route("/async/busy")
        async def abusy(ws: AsyncWebSocket) -> None:
            await ws.accept()
            await self.ago.wait()
            try:
                await ws.send("late")
            except ConnectionClosed as error:
                seen.append((error.code, error.reason))

    async def __aenter__(self) -> House:
        self.ago = anyio.Event()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()
        for peer in self._peers:  # all at once
            if not peer.returned.is_set():
                peer.leave()
        await self._stack.aclose()

    def release(self) -> None:
        """Let the views that wait for the test go on."""
        self.go.set()
        self.ago.set()

    async def begin(self, user: Any = None, path: str = "/ws", **scope: Any) -> Peer:
        """A handshake; nobody has looked at its answer."""
        headers = [(b"host", b"localhost"), *scope.pop("headers", ())]
        if user is not None:
            headers.append((b"x-user", str(user).encode()))
        asgi = scope.pop("asgi", self.asgi)
        peer = await self._stack.enter_async_context(
            connection(asgi, path, headers=headers, **scope)
        )
        self._peers.append(peer)
        return peer

    async def open(self, user: Any = None, path: str = "/ws", **scope: Any) -> Peer:
        """A connection, whose view waits; subscribed, if it is one that subscribes."""
        before = self.count("subscriptions")
        peer = await self.begin(user, path, **scope)
        assert await peer.get_status() == 101
        if path.endswith("/ws"):
            await wait_until(lambda: self.count("subscriptions") > before)
        return peer

    @property
    def users(self) -> int:
        """How many have a connection, or a handshake."""
        runtime = self.websockets._runtime
        return 0 if runtime is None else len(runtime.registry.users)

    def count(self, counter: str) -> int:
        value: int = getattr(self.websockets.stats(), counter)
        return value

    async def is_open(self, *peers: Peer) -> None:
        """They are connected: what is published reaches them next."""
        word = uuid.uuid4().hex
        await self.websockets.apublish(word, "news")
        for peer in peers:
            assert (await peer.get()).get("text") == word


@pytest.fixture
def house(app: Flask) -> House:
    return House(app)


@pytest.fixture(params=["", "/async"], ids=["plain", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    """What the paths of either kind of view begin with."""
    prefix: str = request.param
    return prefix


@pytest.fixture(params=["thread", "loop"])
def disconnect(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """``disconnect`` in a thread, or ``adisconnect``, awaited."""

    async def disconnect(websockets: WebSockets, **arguments: Any) -> int:
        if request.param == "loop":
            return await websockets.adisconnect(**arguments)
        return await anyio.to_thread.run_sync(partial(websockets.disconnect, **arguments))

    return disconnect


async def closed(peer: Peer) -> tuple[int, str]:
    """The close of the application, which must be what comes next."""
    message = await peer.get()
    assert message["type"] == "websocket.close", message
    return message["code"], message["reason"]


def round_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == ROUNDS]


# -- identify -------------------------------------------------------------------------------------


def test_when_it_is_asked(run, app, kind):
    """In the handshake's request context: behind before_request and Origin, before decorators."""
    order: list[str] = []

    def identify():
        order.append(f"identify {request.path} {g.mark} {request.headers.get('X-User')}")
        return "ann"

    @app.before_request
    def before():
        g.mark = "marked"
        order.append("before_request")

    def decorator(function):
        @wraps(function)
        def decorated(*arguments, **named):
            order.append("decorator")
            return function(*arguments, **named)

        return decorated

    house = House(app, identify=identify)

    @house.websockets.route("/decorated", endpoint="/decorated")
    @decorator
    def view(ws):
        order.append("view")
        ws.accept()

    @house.websockets.route("/async/decorated", endpoint="/async/decorated")
    @decorator
    async def aview(ws):
        order.append("view")
        await ws.accept()

    async def main():
        async with house:
            path = f"{kind}/decorated"
            peer = await house.begin("someone", path)
            assert await peer.get_status() == 101
            asked = f"identify {path} marked someone"
            assert order == ["before_request", asked, "decorator", "view"]
            order.clear()
            foreign = ((b"origin", b"https://evil.example"),)
            peer = await house.begin("someone", path, headers=foreign)
            assert await peer.get_status() == 403
            assert order == ["before_request"]

    run(main)


def test_it_is_asked_in_handshakes_only(app):
    """HTTP requests have nobody to identify, those to a WebSocket's path included."""
    asked: list[str] = []
    websockets = WebSockets(app)
    app.add_url_rule("/", view_func=lambda: "here")

    @websockets.identify
    def identify():
        asked.append(request.path)

    websockets.route("/ws", endpoint="ws")(lambda ws: ws.accept())
    client = websockets.test_client()
    with client.get("/") as page, client.get("/ws") as upgrade, client.get("/none") as none:
        assert [page.status_code, upgrade.status_code, none.status_code] == [200, 426, 404]
    assert asked == []
    with client.websocket_connect("/ws"):
        pass
    assert asked == ["/ws"]


def test_an_async_identify(run, app):
    """It may be an ``async def``, as every other function of Flask's."""

    async def identify():
        await asyncio.sleep(0)
        return "ann"

    house = House(app, identify=identify)

    async def main():
        async with house:
            peer = await house.open()
            assert await house.websockets.adisconnect(user="ann") == 1
            assert await closed(peer) == LOGGED_OUT

    run(main)


def test_identify_returns_its_function(websockets):
    """The decorator leaves the name to the function, for its own use."""

    def identify():
        return None

    assert websockets.identify(identify) is identify


def test_one_identify_is_enough(websockets):
    """A second one is an error: only one of two can be right."""
    websockets.identify(lambda: None)
    with pytest.raises(UsageError, match="identify"):
        websockets.identify(lambda: None)


@pytest.mark.parametrize(
    "user", [True, 5.0, b"ann", ["ann"], object(), ("ann", 5)], ids=lambda user: type(user).__name__
)
def test_what_names_nobody(run, app, caplog, user):
    """A user is a str, an int or a UUID; anything else is a TypeError, and the handshake a 500."""
    house = House(app, identify=lambda: user)

    async def main():
        async with house:
            peer = await house.begin()
            assert await peer.get_status() == 500

    run(main)
    assert "TypeError" in caplog.text
    assert type(user).__name__ in caplog.text


@pytest.mark.parametrize("status", [401, 403, 503])
def test_identify_may_refuse(run, app, status):
    """``abort`` in it answers the handshake, as in any function of a request."""
    house = House(app, identify=lambda: abort(status))

    async def main():
        async with house:
            peer = await house.begin()
            assert await peer.get_status() == status
            assert house.seen == []

    run(main)


# -- disconnect -----------------------------------------------------------------------------------


def test_all_connections_of_a_user_and_no_other(run, house, disconnect, kind):
    """ann's three are closed with 4401, told to their views and counted; everybody else stays."""

    async def main():
        async with house:
            anns = [await house.open("ann", path) for path in ("/ws", "/async/ws", f"{kind}/ws")]
            others = [await house.open(user, f"{kind}/ws") for user in ("bob", None, "ann2")]
            assert await disconnect(house.websockets, user="ann") == 3
            for peer in anns:
                assert await closed(peer) == LOGGED_OUT
            with anyio.fail_after(TIMEOUT):
                for peer in anns:
                    await peer.returned.wait()
            assert house.seen == [LOGGED_OUT] * 3
            assert house.count("disconnected") == 3
            await house.is_open(*others)
            assert house.count("subscriptions") == 3

    run(main)


def test_code_and_reason(run, house, disconnect, kind):
    """Both are the caller's, for the client and for the view."""

    async def main():
        async with house:
            peer = await house.open("ann", f"{kind}/ws")
            goodbye = {"code": 4000, "reason": "éxpelled"}
            assert await disconnect(house.websockets, user="ann", **goodbye) == 1
            assert await closed(peer) == (4000, "éxpelled")
            await wait_until(lambda: house.seen == [(4000, "éxpelled")])

    run(main)


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("int:5", 5),
        ("int:5", "5"),
        ("5", 5),
        ("int:-5", "-5"),
        ("uuid:12345678123456781234567812345678", uuid.UUID("12345678" * 4)),
        ("uuid:12345678123456781234567812345678", "12345678-1234-5678-1234-567812345678"),
        ("12345678-1234-5678-1234-567812345678", uuid.UUID("12345678" * 4)),
    ],
)
def test_numbers_and_their_strings(run, house, disconnect, named, told):
    """5 and "5" are one user, and so are a UUID and its string."""

    async def main():
        async with house:
            peer, other = await house.open(named), await house.open("int:55")
            assert await disconnect(house.websockets, user=told) == 1
            assert await closed(peer) == LOGGED_OUT
            await house.is_open(other)

    run(main)


def test_nobody_of_that_name(run, house, disconnect):
    """0 for whoever is not there, and never was."""

    async def main():
        async with house:
            peer, anonymous = await house.open("ann"), await house.open()
            for user in ("bob", "", 0, "None", uuid.uuid4()):
                assert await disconnect(house.websockets, user=user) == 0
            await house.is_open(peer, anonymous)
            assert house.count("disconnected") == 0

    run(main)


@pytest.mark.parametrize("user", [None, True, 5.0, b"ann", ["ann"]])
def test_wrong_users(run, house, disconnect, user):
    """What names nobody is a TypeError where it is said; the anonymous cannot be meant."""

    async def main():
        async with house:
            anonymous = await house.open()
            with pytest.raises(TypeError, match="str, an int or a UUID"):
                await disconnect(house.websockets, user=user)
            await house.is_open(anonymous)

    run(main)


@pytest.mark.parametrize(
    "goodbye",
    [{"code": 1005}, {"code": 1006}, {"code": 999}, {"code": 5000}, {"reason": "x" * 124}],
    ids=str,
)
def test_wrong_goodbyes(run, house, disconnect, goodbye):
    """A code that may not be sent, or a reason that does not fit, is a ValueError; all stay."""

    async def main():
        async with house:
            peer = await house.open("ann")
            with pytest.raises(ValueError):
                await disconnect(house.websockets, user="ann", **goodbye)
            await house.is_open(peer)

    run(main)


def test_without_identify(run, app, disconnect):
    """Nobody knows who a user is: a UsageError that says what to register."""
    house = House(app, identify=None)

    async def main():
        async with house:
            await house.open("ann")
            with pytest.raises(UsageError, match=r"@websockets\.identify"):
                await disconnect(house.websockets, user="ann")

    run(main)


def test_the_wrong_thread(run, house):
    """disconnect on the loop, adisconnect elsewhere: WrongThread, which names the other."""

    async def main():
        async with house:
            peer = await house.open("ann")
            with pytest.raises(WrongThread, match="adisconnect"):
                house.websockets.disconnect(user="ann")

            def elsewhere():
                with pytest.raises(WrongThread, match="disconnect"):
                    asyncio.run(house.websockets.adisconnect(user="ann"))

            await anyio.to_thread.run_sync(elsewhere)
            await house.is_open(peer)

    run(main)


def test_before_and_after_a_server(run, app):
    """Before one has started nobody is there; after it has stopped that is NotRunning."""
    house = House(app)
    assert house.websockets.disconnect(user="ann") == 0

    async def main():
        messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

        async def receive():
            return messages.pop(0)

        async def send(message):
            assert message["type"].endswith("complete")

        await house.asgi({"type": "lifespan"}, receive, send)
        with pytest.raises(NotRunning):
            await house.websockets.adisconnect(user="ann")

    run(main)
    with pytest.raises(NotRunning):
        house.websockets.disconnect(user="ann")


def test_a_handshake_is_answered_401(run, house, disconnect, kind):
    """Who is not let in yet is not let in any more; the view learns of it at its accept."""

    async def main():
        async with house:
            under_way = await house.begin("ann", f"{kind}/undecided")
            other = await house.begin("bob", f"{kind}/undecided")
            await wait_until(lambda: house.users == 2)
            assert await disconnect(house.websockets, user="ann", reason="logged out") == 1
            assert await under_way.get_status() == 401
            house.release()
            assert await other.get_status() == 101
            await wait_until(lambda: house.seen == ["logged out"])
            assert house.count("disconnected") == 1

    run(main)


def test_a_handshake_that_is_about_to_be_identified(run, app, disconnect):
    """A logout while identify asks: the user of before it must not come in after it."""
    asked, answer = threading.Event(), threading.Event()

    def identify():
        asked.set()  # "ann" is logged in, says the database
        assert answer.wait(TIMEOUT)
        return "ann"

    house = House(app, identify=identify)

    async def main():
        async with house:
            peer = await house.begin()
            await wait_until(asked.is_set)
            # Logged out meanwhile: who says so expects that no connection of hers stays open.
            await disconnect(house.websockets, user="ann")
            answer.set()
            assert await peer.get_status() == 401

    run(main)


def test_what_waits_is_dropped(run, house, disconnect, kind):
    """Of what lies in the outbox nothing is sent any more, but for what the server has."""

    async def main():
        async with house:
            peer = await house.open("ann", f"{kind}/ws", socket_messages=0)
            for number in range(50):
                await house.websockets.apublish(str(number), "news")
            assert house.count("outbox_messages") == 50
            assert await disconnect(house.websockets, user="ann") == 1
            message = await peer.get()
            if message["type"] == "websocket.send":  # it was on its way
                assert message["text"] == "0"
                message = await peer.get()
            assert (message["type"], message["code"]) == ("websocket.close", 4401)
            await wait_until(lambda: house.count("outbox_messages") == 0)

    run(main)


def test_nothing_comes_after_it(run, house, kind):
    """What any thread or task publishes after disconnect has returned reaches its user no more."""
    gone, ended = threading.Event(), threading.Event()

    def publish():
        while not ended.is_set():
            word = "late" if gone.is_set() else "early"  # before it publishes
            house.websockets.publish(word, "news")
            time.sleep(0.001)  # bob is no slow consumer

    async def apublish():
        while not ended.is_set():
            word = "late" if gone.is_set() else "early"
            await house.websockets.apublish(word, "news")
            await anyio.sleep(0.001)

    async def main():
        async with house:
            peer = await house.open("ann", f"{kind}/ws", socket_messages=10_000)
            bob = await house.open("bob", f"{kind}/ws", socket_messages=100_000)
            publishers = [threading.Thread(target=publish) for _ in range(3)]
            try:
                async with anyio.create_task_group() as tasks:
                    for thread in publishers:
                        thread.start()
                    tasks.start_soon(apublish)
                    for _ in range(20):
                        assert (await peer.get())["text"] == "early"

                    def log_out():
                        assert house.websockets.disconnect(user="ann") == 1
                        gone.set()

                    await anyio.to_thread.run_sync(log_out)
                    while (await bob.get())["text"] != "late":
                        pass
                    ended.set()
            finally:
                ended.set()
                for thread in publishers:
                    thread.join(TIMEOUT)
            words = []
            while (message := await peer.get())["type"] != "websocket.close":
                words.append(message["text"])
            assert set(words) <= {"early"}

    run(main)


def test_who_comes_back_at_once(run, house, disconnect):
    """It ends the connections that there are: whoever may still log in may come back."""

    async def main():
        async with house:
            first = await house.open("ann")
            assert await disconnect(house.websockets, user="ann") == 1
            second = await house.open("ann")
            assert await closed(first) == LOGGED_OUT
            await house.is_open(second)
            assert await disconnect(house.websockets, user="ann") == 1
            assert await closed(second) == LOGGED_OUT
            assert house.count("disconnected") == 2

    run(main)


def test_connections_that_are_over_do_not_count(run, app, disconnect, kind):
    """A view that goes on behind its connection is none that could be closed: 0."""
    app.config["WEBSOCKETS_CLOSE_TIMEOUT"] = 0.2
    house = House(app)

    async def main():
        async with house:
            peer = await house.open("ann", f"{kind}/busy")
            assert await disconnect(house.websockets, user="ann") == 1
            assert await closed(peer) == LOGGED_OUT
            assert await disconnect(house.websockets, user="ann") == 0
            assert house.count("disconnected") == 1
            house.release()
            if not kind:  # an async one may have been cancelled
                await wait_until(lambda: house.seen == [LOGGED_OUT])

    run(main)


def test_a_peer_that_does_not_read(run, app, disconnect, kind):
    """Nobody waits for it: it is cut after the close timeout, and its view told at once."""
    app.config["WEBSOCKETS_CLOSE_TIMEOUT"] = 0.3
    house = House(app)

    async def main():
        async with house:
            peer = await house.open("ann", f"{kind}/ws", socket_messages=0)
            for number in range(10):
                await house.websockets.apublish(str(number), "news")
            with anyio.fail_after(0.3 + MARGIN):
                assert await disconnect(house.websockets, user="ann") == 1
                await wait_until(lambda: house.seen == [LOGGED_OUT])
                await peer.returned.wait()

    run(main)


def test_what_was_received_before(run, house, disconnect, kind):
    """A view still gets what had come, and its words to the client are ConnectionClosed."""
    words: list[Any] = []

    @house.websockets.route("/words", endpoint="/words")
    def view(ws):
        ws.accept()
        assert house.go.wait(TIMEOUT)
        words.extend(ws.iter_data())
        try:
            ws.send("late")
        except ConnectionClosed as error:
            words.append((error.code, error.reason))
        words.append(ws.wait_closed(TIMEOUT))
        words.append((ws.close_code, ws.close_reason, ws.closed))

    @house.websockets.route("/async/words", endpoint="/async/words")
    async def aview(ws):
        await ws.accept()
        await house.ago.wait()
        words.extend([data async for data in ws.iter_data()])
        try:
            await ws.send("late")
        except ConnectionClosed as error:
            words.append((error.code, error.reason))
        words.append(await ws.wait_closed(TIMEOUT))
        words.append((ws.close_code, ws.close_reason, ws.closed))

    async def main():
        async with house:
            peer = await house.open("ann", f"{kind}/words")
            for word in ("one", "two"):
                peer.send(word)
            await wait_until(lambda: house.count("inbox_messages") == 2)
            assert await disconnect(house.websockets, user="ann") == 1
            assert await closed(peer) == LOGGED_OUT
            house.release()
            await wait_until(lambda: len(words) == 5)
        assert words == ["one", "two", LOGGED_OUT, True, (*LOGGED_OUT, True)]

    run(main)


def test_a_view_that_disconnects_its_own_user(run, app, kind):
    """It is closed like the others, from a thread or on the loop."""
    house = House(app)
    websockets = house.websockets

    @websockets.route("/leave", endpoint="/leave")
    def view(ws):
        ws.receive()
        house.seen.append(websockets.disconnect(user=user_of_the_request(), reason="bye"))
        ws.wait_closed()

    @websockets.route("/async/leave", endpoint="/async/leave")
    async def aview(ws):
        await ws.receive()
        house.seen.append(await websockets.adisconnect(user=user_of_the_request(), reason="bye"))
        await ws.wait_closed()

    async def main():
        async with house:
            other = await house.open("ann")
            peer = await house.begin("ann", f"{kind}/leave")
            peer.send("leave")
            assert await peer.get_status() == 101
            assert await closed(peer) == (4401, "bye")
            assert await closed(other) == (4401, "bye")
            await wait_until(lambda: len(house.seen) == 2)
            assert 2 in house.seen

    run(main)


def test_an_accept_that_is_not_sent_yet(run, house, monkeypatch):
    """Who is let in and ended in one turn of the loop gets one answer of both: 401, or 4401."""
    done, start = threading.Event(), running_view.start_view_thread

    def start_and_wait(*arguments, **how):
        ident = start(*arguments, **how)
        assert done.wait(TIMEOUT)  # blocks the loop: its writer is not there yet
        return ident

    @house.websockets.route("/quick", endpoint="quick")
    def view(ws):
        ws.accept()
        house.seen.append(house.websockets.disconnect(user="ann"))
        done.set()
        ws.wait_closed()

    async def main():
        async with house:
            monkeypatch.setattr(running_view, "start_view_thread", start_and_wait)
            peer = await house.begin("ann", "/quick")
            status = await peer.get_status()
            assert status in (101, 401)
            if status == 101:
                assert await closed(peer) == LOGGED_OUT
            assert house.seen == [1]

    run(main)


def test_several_applications(run):
    """A user of one object is one in all its applications; another object's is another."""
    house = House(Flask("one"), Flask("two"))
    other = House(Flask("three"))
    second = house.websockets.asgi_app(house.websockets._apps[1])

    async def main():
        async with house, other:
            peers = [await house.open("ann"), await house.open("ann", asgi=second)]
            elsewhere = await other.open("ann")
            assert await house.websockets.adisconnect(user="ann") == 2
            for peer in peers:
                assert await closed(peer) == LOGGED_OUT
            await other.is_open(elsewhere)

    run(main)


def test_logout_in_an_http_view(app, websockets):
    """The HTTP view that ends the login ends its connections, and knows how many there were."""

    @websockets.identify
    def identify():
        return session.get("user")

    @app.post("/login/<name>")
    def log_in(name):
        session["user"] = name
        return "in"

    @app.post("/logout")
    def log_out():
        count = websockets.disconnect(user=session.pop("user"), reason="logged out")
        return str(count)

    @websockets.route("/ws")
    def view(ws):
        if "user" not in session:
            abort(401)
        for data in ws.iter_data():
            ws.send(data)

    ann, bob = websockets.test_client(), websockets.test_client()
    for client, name in ((ann, "ann"), (bob, "bob")):
        client.post(f"/login/{name}").close()
    with (
        ann.websocket_connect("/ws") as one,
        ann.websocket_connect("/ws") as two,
        bob.websocket_connect("/ws") as other,
    ):
        with ann.post("/logout") as answer:
            assert answer.text == "2"
        for ws in (one, two):
            with pytest.raises(ConnectionClosed) as caught:
                ws.receive()
            assert (caught.value.code, caught.value.reason) == (4401, "logged out")
        other.send("still here")
        assert other.receive() == "still here"


def test_flask_login(app, websockets):
    """identify is ``current_user.get_id``; the logout disconnects, login_required refuses."""
    manager = flask_login.LoginManager(app)

    @manager.user_loader
    class User(flask_login.UserMixin):
        def __init__(self, name):
            self.id = name

    websockets.identify(lambda: flask_login.current_user.get_id())

    @app.post("/login/<name>")
    def log_in(name):
        flask_login.login_user(User(name))
        return "in"

    @app.post("/logout")
    @flask_login.login_required
    def log_out():
        user = flask_login.current_user.get_id()
        flask_login.logout_user()
        return str(websockets.disconnect(user=user))

    @websockets.route("/ws")
    @flask_login.login_required
    def view(ws):
        ws.send(flask_login.current_user.id)
        ws.wait_closed()

    @websockets.route("/async/ws")
    @flask_login.login_required
    async def aview(ws):
        await ws.send(flask_login.current_user.id)
        await ws.wait_closed()

    client, stranger = websockets.test_client(), websockets.test_client()
    client.post("/login/ann").close()
    stranger.post("/login/eve").close()
    with (
        client.websocket_connect("/ws") as plain,
        client.websocket_connect("/async/ws") as other,
        stranger.websocket_connect("/ws") as eve,
    ):
        assert [ws.receive() for ws in (plain, other, eve)] == ["ann", "ann", "eve"]
        with client.post("/logout") as answer:
            assert answer.text == "2"
        for ws in (plain, other):
            with pytest.raises(ConnectionClosed, match="4401"):
                ws.receive()
        with stranger.post("/logout") as answer:
            assert answer.text == "1"


# -- max_age --------------------------------------------------------------------------------------


def test_max_age(run, house, kind):
    """So many seconds after its handshake: 4401; the next handshake is a new one."""
    websockets, ended = house.websockets, []

    def view(ws):
        ws.accept()
        with pytest.raises(ConnectionClosed) as caught:
            ws.receive()
        ended.append((caught.value.code, caught.value.reason))

    async def aview(ws):
        await ws.accept()
        with pytest.raises(ConnectionClosed) as caught:
            await ws.receive()
        ended.append((caught.value.code, caught.value.reason))

    websockets.route("/short", max_age=0.3, endpoint="short")(view)
    websockets.route("/async/short", max_age=0.3, endpoint="ashort")(aview)
    websockets.route("/long", max_age=60, endpoint="long")(view)
    websockets.route("/async/long", max_age=60, endpoint="along")(aview)

    async def main():
        async with house:
            without, long = await house.open(), await house.open(path=f"{kind}/long")
            for number in (1, 2):
                peer = await house.open("ann", f"{kind}/short")
                started = anyio.current_time()
                assert await closed(peer) == TOO_OLD
                assert 0.3 - 0.05 <= anyio.current_time() - started <= 0.3 + MARGIN
                with anyio.fail_after(TIMEOUT):
                    await peer.returned.wait()
                assert ended == [TOO_OLD] * number
                assert house.count("expired") == number
            await house.is_open(without)
            assert not long.returned.is_set()
            assert house.count("disconnected") == 0

    run(main)


def test_max_age_begins_with_the_end_of_the_handshake(run, house, kind):
    """A view that thinks before it accepts does not spend the age of its connection."""
    websockets = house.websockets

    @websockets.route("/slow", max_age=0.2, endpoint="/slow")
    def view(ws):
        assert house.go.wait(TIMEOUT)
        ws.accept()
        ws.wait_closed()

    @websockets.route("/async/slow", max_age=0.2, endpoint="/async/slow")
    async def aview(ws):
        await house.ago.wait()
        await ws.accept()
        await ws.wait_closed()

    async def main():
        async with house:
            peer = await house.begin("ann", f"{kind}/slow")
            await anyio.sleep(0.4)
            assert house.count("expired") == 0
            started = anyio.current_time()
            house.release()
            assert await peer.get_status() == 101
            assert await closed(peer) == TOO_OLD
            assert anyio.current_time() - started >= 0.2 - 0.05
            assert house.count("expired") == 1

    run(main)


def test_an_end_before_the_age(run, house, kind):
    """Who leaves, or is closed, before that has not expired."""
    websockets = house.websockets

    @websockets.route("/age", max_age=0.2, endpoint="/age")
    def view(ws):
        ws.accept()
        ws.receive()

    @websockets.route("/async/age", max_age=0.2, endpoint="/async/age")
    async def aview(ws):
        await ws.accept()
        await ws.receive()

    async def main():
        async with house:
            leaving = await house.open("ann", f"{kind}/age")
            returning = await house.open("ann", f"{kind}/age")
            leaving.leave()
            returning.send("now")
            assert await closed(returning) == (1000, "")
            await anyio.sleep(0.3)
            assert house.count("expired") == 0

    run(main)


def test_max_age_of_a_busy_view_and_of_a_deaf_peer(run, app, kind):
    """Neither keeps the connection: what waits is dropped, and it is cut if need be."""
    app.config["WEBSOCKETS_CLOSE_TIMEOUT"] = 0.3
    house = House(app)
    websockets = house.websockets

    @websockets.route("/age", max_age=0.2, endpoint="/age")
    def view(ws):
        with websockets.subscribe(ws, "news"):
            assert house.go.wait(TIMEOUT)

    @websockets.route("/async/age", max_age=0.2, endpoint="/async/age")
    async def aview(ws):
        async with websockets.subscribe(ws, "news"):
            await house.ago.wait()

    async def main():
        async with house:
            peer = await house.open("ann", f"{kind}/age", socket_messages=1000)
            deaf = await house.open("ann", f"{kind}/age", socket_messages=0)
            await wait_until(lambda: house.count("subscriptions") == 2)
            for number in range(10):
                await house.websockets.apublish(str(number), "news")
            for number in range(10):
                assert (await peer.get())["text"] == str(number)
            assert await closed(peer) == TOO_OLD
            with anyio.fail_after(0.3 + MARGIN):
                # A view that goes on is reported after the close timeout, an async one cancelled.
                await deaf.returned.wait()
            assert house.count("expired") == 2
            assert house.count("outbox_messages") == 0

    run(main)


def test_two_routes_of_one_view(run, house):
    """Each route has its own age."""

    def view(ws):
        ws.accept()
        ws.wait_closed()

    house.websockets.route("/young", max_age=0.1, endpoint="young")(view)
    house.websockets.route("/old", endpoint="old")(view)

    async def main():
        async with house:
            old, young = await house.open(path="/old"), await house.open(path="/young")
            assert await closed(young) == TOO_OLD
            assert not old.returned.is_set()

    run(main)


@pytest.mark.parametrize("age", [0, -1, True, "60", float("inf"), float("nan"), 1e9])
def test_no_age(websockets, app, age):
    """It is a number of seconds above 0; anything else stops the route, and says its name."""
    with pytest.raises(ConfigurationError, match="max_age"):
        websockets.route("/ws", max_age=age)(lambda ws: None)
    assert not [rule for rule in app.url_map.iter_rules() if rule.websocket]


def test_max_age_needs_no_identify(run, app):
    """It asks nobody who anybody is."""
    house = House(app, identify=None)

    @house.websockets.route("/age", max_age=0.1, endpoint="age")
    def view(ws):
        ws.accept()
        ws.wait_closed()

    async def main():
        async with house:
            assert await closed(await house.open(path="/age")) == TOO_OLD

    run(main)


# -- recheck --------------------------------------------------------------------------------------


class Checks:
    """A recheck function of which a test says what it answers."""

    def __init__(self, house: House, every: float = 0.05) -> None:
        self.asked: list[Any] = []
        self.answers: dict[Any, Any] = {}
        self.threads: set[threading.Thread] = set()
        self.contexts: set[tuple[str, bool]] = set()
        house.websockets.recheck(every=every)(self.ask)

    def ask(self, user: Any) -> Any:
        self.threads.add(threading.current_thread())
        self.contexts.add((current_app.name, has_request_context()))
        self.asked.append(user)
        answer = self.answers.get(user, True)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def rounds(self, number: int, user: Any) -> None:
        """Let so many more rounds pass: they ask for *user*, whom nobody ends meanwhile."""
        seen = self.asked.count(user)
        await wait_until(lambda: self.asked.count(user) >= seen + number)


def test_who_may_not_stay(run, house, kind):
    """All connections of that user are closed with 4401; of nobody else."""
    checks = Checks(house)

    async def main():
        async with house:
            anns = [await house.open("ann", f"{kind}/ws") for _ in range(2)]
            bob, anonymous = await house.open("bob", f"{kind}/ws"), await house.open()
            await checks.rounds(2, "bob")
            await house.is_open(*anns, bob, anonymous)
            checks.answers["ann"] = False
            for peer in anns:
                assert await closed(peer) == NO_LONGER_VALID
            await checks.rounds(2, "bob")
            await house.is_open(bob, anonymous)
            assert house.count("disconnected") == 2
            assert house.seen == [NO_LONGER_VALID] * 2

    run(main)


def test_each_user_once_a_round(run, house, kind):
    """However many connections: once, with what identify returned; the anonymous never."""
    checks = Checks(house)

    async def main():
        async with house:
            for _ in range(5):
                await house.open("int:5", f"{kind}/ws")
                await house.open("bob", f"{kind}/ws")
                await house.open(None, f"{kind}/ws")
            await checks.rounds(1, 5)
            checks.asked.clear()
            await checks.rounds(4, 5)
            asked = Counter(checks.asked[: 2 * 3])
            assert asked in ({5: 3, "bob": 3},)
            assert all(type(user) in (int, str) for user in checks.asked)
            assert set(checks.asked) == {5, "bob"}

    run(main)


def test_where_it_runs(run, app, house):
    """In one thread of its own, which is nobody's view, inside an application context."""
    checks = Checks(house)

    async def main():
        async with house:
            await house.open("ann")
            await house.open("bob")
            await checks.rounds(3, "ann")
            (thread,) = checks.threads
            assert thread.name == ROUNDS
            assert thread.daemon
            assert checks.contexts == {(app.name, False)}

    run(main)


def test_the_application_of_the_user(run):
    """Of several applications the context is that of the user's own."""
    house = House(Flask("one"), Flask("two"))
    second = house.websockets.asgi_app(house.websockets._apps[1])
    where: dict[str, str] = {}

    @house.websockets.recheck(every=0.05)
    def recheck(user):
        where[user] = current_app.name
        return True

    async def main():
        async with house:
            await house.open("ann")
            await house.open("bob", asgi=second)
            await wait_until(lambda: len(where) == 2)
            assert where == {"ann": "one", "bob": "two"}

    run(main)


def test_an_async_recheck(run, house):
    """It may be an ``async def``."""

    @house.websockets.recheck(every=0.05)
    async def recheck(user):
        await asyncio.sleep(0)
        return user != "ann"

    async def main():
        async with house:
            bob = await house.open("bob")
            peer = await house.begin("ann")
            assert await peer.get_status() == 101
            assert await closed(peer) == NO_LONGER_VALID
            await house.is_open(bob)

    run(main)


def test_it_may_not_be_known(run, house, caplog):
    """Where it raises, the connections stay, it is logged, the others are asked; it goes on."""
    checks = Checks(house)
    checks.answers["ann"] = LookupError("the database is away")

    async def main():
        async with house:
            ann, eve = await house.open("ann"), await house.begin("eve")
            bob = await house.open("bob")
            assert await eve.get_status() == 101
            await checks.rounds(2, "bob")
            await house.is_open(ann)
            checks.answers["eve"] = False
            while (message := await eve.get())["type"] == "websocket.send":
                pass
            assert (message["code"], message["reason"]) == NO_LONGER_VALID
            checks.answers["ann"] = False
            assert await closed(ann) == NO_LONGER_VALID
            await checks.rounds(1, "bob")
            assert bob is not None

    run(main)
    assert "the database is away" in caplog.text
    assert "Traceback" in caplog.text or any(record.exc_info for record in caplog.records)


def test_a_database_that_is_away(run, house, caplog):
    """A round in which it raises for everybody is a traceback and a number, no flood of them."""
    checks = Checks(house, every=0.3)

    async def main():
        async with house:
            users = [f"user {number}" for number in range(20)]
            checks.answers = {user: LookupError("away") for user in users}
            for user in users:
                await house.open(user)
            await checks.rounds(1, users[0])
            caplog.clear()
            await checks.rounds(1, users[-1])
            await anyio.sleep(0.05)
            tracebacks = [record for record in caplog.records if record.exc_info]
            assert len(tracebacks) <= 2
            assert len(caplog.records) <= 4
            assert house.count("disconnected") == 0

    run(main)


def test_a_handshake_is_rechecked_too(run, house, kind):
    """A user who may not stay is answered 401 where he has no answer yet."""
    checks = Checks(house)
    checks.answers["ann"] = False

    async def main():
        async with house:
            peer = await house.begin("ann", f"{kind}/undecided")
            assert await peer.get_status() == 401
            house.release()

    run(main)


@pytest.mark.parametrize("answer", [None, 0, "", []])
def test_something_false(run, house, answer):
    """What is false ends it, and what is true does not: a forgotten return is on the safe side."""
    checks = Checks(house)
    checks.answers = {"ann": answer, "bob": "yes"}

    async def main():
        async with house:
            bob, ann = await house.open("bob"), await house.begin("ann")
            assert await ann.get_status() == 101
            assert await closed(ann) == NO_LONGER_VALID
            await checks.rounds(2, "bob")
            await house.is_open(bob)

    run(main)


def test_it_ends_with_the_server(run, app):
    """Its thread ends when the server stops, and comes with the next; before it there is none."""
    house = House(app)
    checks = Checks(house)
    assert round_threads() == []

    async def lifespan(*kinds):
        messages = [{"type": f"lifespan.{kind}"} for kind in kinds]

        async def receive():
            return messages.pop(0)

        async def send(message):
            assert message["type"].endswith("complete")

        with anyio.fail_after(TIMEOUT):
            await house.asgi({"type": "lifespan"}, receive, send)

    async def main():
        to_app, messages = anyio.create_memory_object_stream[Any](2)
        from_app, answers = anyio.create_memory_object_stream[Any](2)
        for _ in range(2):
            with to_app.clone() as put, messages.clone() as receive:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(
                        house.asgi, {"type": "lifespan"}, receive.receive, from_app.send
                    )
                    await put.send({"type": "lifespan.startup"})
                    assert (await answers.receive())["type"] == "lifespan.startup.complete"
                    assert len(round_threads()) == 1
                    house.ago = anyio.Event()
                    async with connection(
                        house.asgi, "/ws", headers=[(b"host", b"x"), (b"x-user", b"ann")]
                    ) as peer:
                        assert await peer.get_status() == 101
                        await checks.rounds(2, "ann")
                    await put.send({"type": "lifespan.shutdown"})
                    assert (await answers.receive())["type"] == "lifespan.shutdown.complete"
            await wait_until(lambda: round_threads() == [])
            asked = len(checks.asked)
            await anyio.sleep(0.15)
            assert len(checks.asked) == asked
        for stream in (to_app, messages, from_app, answers):
            stream.close()

    run(main)


def test_it_does_not_end_with_the_next_round_only(run, app):
    """An hour may lie between two rounds: the thread ends with its server all the same."""
    house = House(app)
    Checks(house, every=3600)

    async def main():
        async with house:
            await house.open("ann")
            assert len(round_threads()) == 1
        await house.websockets._stop()
        await wait_until(lambda: round_threads() == [])

    run(main)


def test_a_round_that_hangs_does_not_keep_the_server(run, app):
    """The database hangs while the server stops: it stops all the same, and nobody is closed."""
    house, inside, away = House(app), threading.Event(), threading.Event()

    @house.websockets.recheck(every=0.05)
    def recheck(user):
        inside.set()
        away.wait(TIMEOUT)
        return False

    async def main():
        async with house:
            await house.open("ann")
            await wait_until(inside.is_set)
            with anyio.fail_after(MARGIN):
                await house.websockets.stop_testing()
        away.set()
        await wait_until(lambda: round_threads() == [])

    run(main)


def test_without_recheck_there_is_no_thread(run, house):
    """Who does not use it does not pay for it."""

    async def main():
        async with house:
            await house.open("ann")
            assert round_threads() == []

    run(main)


def test_a_recheck_whose_users_nobody_knows(run, app, caplog):
    """Without identify nobody would ever be asked: that is said, at once or in the log."""
    house = House(app, identify=None)
    try:
        Checks(house)
    except UsageError as error:
        assert "identify" in str(error)
        return

    async def main():
        async with house:
            await house.open("ann")
            await wait_until(lambda: "identify" in caplog.text)

    with caplog.at_level(logging.WARNING):
        run(main)


def test_recheck_returns_its_function_and_comes_once(websockets):
    """The decorator leaves the function as it is; a second one is an error."""
    websockets.identify(lambda: None)

    def recheck(user):
        return True

    assert websockets.recheck(every=60)(recheck) is recheck
    with pytest.raises(UsageError, match="recheck"):
        websockets.recheck(every=60)(recheck)


def test_the_order_of_registration(app):
    """recheck may come before identify, as functions stand in a module."""
    websockets = WebSockets(app)
    websockets.recheck(every=60)(lambda user: True)
    websockets.identify(lambda: None)


@pytest.mark.parametrize("every", [0, -1, True, "60", None, float("nan")])
def test_no_time_between_rounds(websockets, every):
    """It is a number of seconds above 0."""
    with pytest.raises(ConfigurationError, match="every"):
        websockets.recheck(every=every)


# -- what the documentation says ------------------------------------------------------------------


@pytest.fixture
def documented(app: Flask, websockets: WebSockets, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run one block of a page, beside the module ``app`` that it imports from; its names."""
    module = types.ModuleType("app")
    module.app, module.websockets = app, websockets  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "app", module)

    @app.post("/login")
    def login():
        session["user"] = request.form["name"]
        return "in"

    @websockets.route("/ws")
    def view(ws):
        ws.send(f"hello, {session['user']}")
        ws.wait_closed()

    def run_block(page: str, word: str) -> dict[str, Any]:
        (block,) = [block for block in blocks(DOCS / page) if word in block]
        namespace: dict[str, Any] = {"__name__": "block"}
        exec(compile(block, page, "exec", dont_inherit=True), namespace)
        return namespace

    return run_block


def test_the_documented_test(documented):
    """The test that the how-to shows passes."""
    documented("how-to/logout.rst", "def test_logout")["test_logout"]()


def test_the_documented_max_age(documented, client):
    """Who has not logged in is refused; whoever has is answered, for a quarter of an hour."""
    names = documented("how-to/logout.rst", "max_age=")
    with pytest.raises(ConnectionRejected, match="401"), client.websocket_connect("/account"):
        pass
    client.post("/login", data={"name": "ann"}).close()
    with client.websocket_connect("/account") as ws:
        ws.send("why")
        assert ws.receive() == "ann asks why"
    view = current_view(client, "account")
    assert view.max_age == 15 * 60
    assert names["account"] is view.view


def current_view(client: Any, endpoint: str) -> Any:
    return client.application.view_functions[endpoint].websocket_route


def test_the_documented_recheck(documented, client, monkeypatch):
    """Who is locked is closed at the next round: here there are more of them."""
    recheck = WebSockets.recheck
    monkeypatch.setattr(WebSockets, "recheck", lambda self, every: recheck(self, every=every / 600))
    names = documented("how-to/logout.rst", "recheck(")
    client.post("/login", data={"name": "ann"}).close()
    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "hello, ann"
        names["locked"].add("ann")
        with pytest.raises(ConnectionClosed, match="no longer valid"):
            ws.receive()


def test_the_documented_first_message(documented, client):
    """A token lets in; another one, or an old one, is closed with 4401."""
    names = documented("explanation/security.rst", "/first-message")
    token = names["tokens"].dumps("ann")
    with client.websocket_connect("/first-message") as ws:
        ws.send(token)
        assert ws.receive() == "hello, ann"
    for wrong in (token[:-1], "", "nonsense"):
        with client.websocket_connect("/first-message") as ws:
            ws.send(wrong)
            with pytest.raises(ConnectionClosed, match="4401"):
                ws.receive()


def test_the_documented_subprotocol(documented, client):
    """A token lets in and is not sent back; without one, or with a wrong one, it is 401."""
    names = documented("explanation/security.rst", "/subprotocol")
    token = "token." + names["tokens"].dumps("ann")
    offered = ["v1.chat", token]
    with client.websocket_connect("/subprotocol", subprotocols=offered) as ws:
        assert ws.receive() == "hello, ann"
        assert ws.accepted_subprotocol == "v1.chat"
    for wrong in ([], ["v1.chat"], ["v1.chat", token[:-1]]):
        with (
            pytest.raises(ConnectionRejected, match="401"),
            client.websocket_connect("/subprotocol", subprotocols=wrong),
        ):
            pass


def test_the_documented_hosts(documented, app):
    """A name that is not ours is refused, though its Origin agrees with it."""
    trusted = documented("explanation/security.rst", "TRUSTED_HOSTS")["app"].config["TRUSTED_HOSTS"]
    app.config["TRUSTED_HOSTS"] = trusted
    websockets = app.extensions["websockets"].websockets
    websockets.route("/open", endpoint="open")(lambda ws: ws.send("in"))
    client = websockets.test_client()
    for host, may in (("chat.example.com", True), ("a.example.org", True), ("evil.test", False)):
        url = f"http://{host}"
        connecting = client.websocket_connect("/open", base_url=url, headers={"Origin": url})
        if may:
            with connecting as ws:
                assert ws.receive() == "in"
        else:
            with pytest.raises(ConnectionRejected, match="400"), connecting:
                pass
