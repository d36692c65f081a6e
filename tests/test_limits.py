"""Every limit of the configuration: at it, one above it, its counter, and what is said of it.

The tests of each, here and elsewhere; ``test_every_limit_has_its_tests`` compares this table with
the settings, and with the tests that there are.

.. limits

max_connections              test_asgi.py::test_i3_above_the_limit_503_without_a_thread
                             test_async_views.py::test_i3_above_the_limit_503
                             test_limits.py::test_a_refusal_is_clear_and_logged_once
                             test_limits.py::test_ten_thousand_handshakes_above_the_limit
                             test_limits.py::test_a_stuck_view_keeps_its_places
                             faults/test_limits_served.py::test_connections
max_connections_per_address  test_limits.py::test_connections_of_one_address
                             test_limits.py::test_what_counts_as_one_address
                             test_limits.py::test_the_address_behind_a_proxy
                             test_limits.py::test_places_come_back
                             faults/test_limits_served.py::test_addresses_behind_a_proxy
                             faults/test_limits_served.py::test_a_client_that_lies_about_its_address
max_connections_per_user     test_limits.py::test_connections_of_one_user
                             test_limits.py::test_places_come_back
                             test_limits.py::test_a_limit_on_users_whom_nobody_knows
                             faults/test_limits_served.py::test_many_at_once
max_handshakes               test_asgi.py::test_handshakes_queue_and_then_get_503
                             test_limits.py::test_handshakes_at_the_same_time
handshake_timeout            test_asgi.py::test_a_handshake_that_queues_too_long
                             test_limits.py::test_a_refusal_is_clear_and_logged_once
http_threads                 test_asgi.py::test_i8_http_requests_queue_and_then_get_503
max_message_bytes            test_asgi.py::test_i6_a_message_above_the_limit_closes_1009
                             test_route_limits.py::test_max_message_bytes
                             test_limits.py::test_a_refusal_is_clear_and_logged_once
                             faults/test_limits_served.py::test_messages
max_messages_per_second      test_rates.py::test_messages_a_second
                             faults/test_limits_served.py::test_rates
max_bytes_per_second         test_rates.py::test_bytes_a_second
                             faults/test_limits_served.py::test_rates
rate_exceeded                test_rates.py::test_messages_a_second
                             test_rates.py::test_slow_down_loses_nothing
                             test_rates.py::test_slow_down_for_too_long
inbox_messages               test_route_limits.py::test_inbox_pauses
                             test_route_limits.py::test_inbox_full
inbox_bytes                  test_link.py::test_i6_the_inbox_is_bounded_in_bytes
                             test_route_limits.py::test_inbox_pauses
inbox_timeout                test_route_limits.py::test_inbox_timeout
                             test_limits.py::test_a_refusal_is_clear_and_logged_once
                             test_limits.py::test_reading_pauses_for_the_inbox_timeout_at_most
inbox_full                   test_link.py::test_i10_a_full_inbox
                             test_route_limits.py::test_inbox_full
                             test_limits.py::test_a_refusal_is_clear_and_logged_once
outbox_messages              test_route_limits.py::test_outbox
                             test_route_limits.py::test_outbox_of_published_messages
                             test_limits.py::test_a_refusal_is_clear_and_logged_once
outbox_bytes                 test_link.py::test_i6_the_outbox_is_bounded_in_bytes
                             test_route_limits.py::test_outbox
                             test_slow_consumers.py::test_bytes_are_counted_as_utf_8
send_timeout                 test_link.py::test_i11_no_send_waits_for_ever
                             test_route_limits.py::test_send_timeout
                             test_limits.py::test_a_refusal_is_clear_and_logged_once
close_timeout                test_asgi.py::test_i9_a_stuck_view_is_reported_and_keeps_its_place
                             test_route_limits.py::test_close_timeout
                             test_limits.py::test_a_stuck_view_keeps_its_places
drain_timeout                integration/test_serve_drain.py::test_the_promise
                             faults/test_drain_served.py::test_stuck_views_are_named
max_channels_per_connection  test_channels.py::test_the_limit_of_channels
                             test_async_views.py::test_subscribe_above_the_limit
                             test_limits.py::test_channels_of_one_connection
                             faults/test_views.py::test_a_million_channels
max_channel_name_bytes       test_limits.py::test_a_channels_name
                             faults/test_views.py::test_a_million_channels
max_publish_bytes            test_limits.py::test_a_published_message
                             faults/test_views.py::test_publishing_what_may_not_be
max_pending_publishes        test_door.py::test_i6_pending_publishes_are_bounded
                             test_mutation_gaps.py::test_i6_what_waits_at_the_door_is_bounded
                             test_limits.py::test_pending_publishes_and_subscribes

.. end of limits
"""

from __future__ import annotations

import ast
import logging
import re
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import anyio
import pytest
from flask import Flask, abort, request
from werkzeug.middleware.proxy_fix import ProxyFix

from flask_websockets import AsyncWebSocket, Stats, UsageError, WebSockets
from flask_websockets.bridge import Link, registry
from flask_websockets.bridge.registry import Places, Registry, address_key
from flask_websockets.config import Config
from flask_websockets.protocol import State

from .asgi_driver import TIMEOUT, Peer, connection, wait_until

HERE = Path(__file__).parent

#: Settings that limit nothing.
NO_LIMITS = {"allowed_origins", "backend_url", "fast_paths", "tune_process"}

#: What no line of the log may have.
SECRET = "5ecret"


class House:
    """An application whose clients say who they are, with views of both kinds."""

    def __init__(self, app: Flask, **settings: Any) -> None:
        app.config.update({f"WEBSOCKETS_{name.upper()}": each for name, each in settings.items()})
        self.websockets = WebSockets(app)
        self.asgi = self.websockets.asgi_app(app)
        self.go = threading.Event()
        self.ago: Any = None  # made on the loop, for async views
        self.peers: list[Peer] = []
        self._stack = AsyncExitStack()
        _add_views(self, app)

    async def __aenter__(self) -> House:
        self.ago = anyio.Event()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()
        for peer in self.peers:  # all at once, or each would wait for a view
            if not peer.returned.is_set():
                peer.leave()
        await self._stack.aclose()

    def release(self) -> None:
        """Let the views that are stuck go on."""
        self.go.set()
        self.ago.set()

    async def open(
        self,
        path: str = "/echo",
        *,
        address: str = "192.0.2.1",
        user: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        **scope: Any,
    ) -> Peer:
        """A client, until the end; nobody has looked at the answer to its handshake."""
        own = [(b"host", b"localhost"), (b"cookie", f"session={SECRET}".encode()), *headers]
        if user is not None:
            own.append((b"x-user", user.encode()))
        scope.setdefault("query_string", f"token={SECRET}".encode())
        opened = connection(self.asgi, path, client=(address, 50000), headers=own, **scope)
        peer = await self._stack.enter_async_context(opened)
        self.peers.append(peer)
        return peer

    async def status(self, path: str = "/echo", **options: Any) -> int:
        """The answer to the handshake of one more client."""
        return await (await self.open(path, **options)).get_status()

    async def over(self, peer: Peer) -> None:
        """The client leaves, and its view has ended."""
        peer.leave()
        with anyio.fail_after(TIMEOUT):
            await peer.returned.wait()

    @property
    def places(self) -> tuple[int, int]:
        """Addresses and users that hold a place."""
        runtime = self.websockets._runtime
        if runtime is None:
            return 0, 0
        return len(runtime.registry.addresses), len(runtime.registry.users)

    def count(self, counter: str) -> int:
        value: int = getattr(self.websockets.stats(), counter)
        return value


def _add_views(house: House, app: Flask) -> None:
    websockets = house.websockets

    @websockets.identify
    def user() -> str | None:
        name = request.headers.get("X-User")
        if name == "nobody knows":
            raise LookupError(name)
        return name

    def both(name: str, view: Any, aview: Any) -> None:
        websockets.route(f"/{name}", endpoint=name)(view)
        websockets.route(f"/async/{name}", endpoint=f"async-{name}")(aview)

    def echo(ws: Any) -> None:
        ws.accept()
        for data in ws.iter_data():
            ws.send(data)

    async def aecho(ws: AsyncWebSocket) -> None:
        await ws.accept()
        async for data in ws.iter_data():
            await ws.send(data)

    def undecided(ws: Any) -> None:
        assert house.go.wait(TIMEOUT)
        ws.accept()
        for _ in ws.iter_data():
            pass

    async def aundecided(ws: AsyncWebSocket) -> None:
        await house.ago.wait()
        await ws.accept()
        async for _ in ws.iter_data():
            pass

    def deaf(ws: Any) -> None:
        ws.accept()
        assert house.go.wait(TIMEOUT)

    async def adeaf(ws: AsyncWebSocket) -> None:
        await ws.accept()
        while not house.ago.is_set():  # whoever cancels it
            try:
                await house.ago.wait()
            except anyio.get_cancelled_exc_class():
                if not house.go.is_set():
                    continue
                raise

    def listen(ws: Any) -> None:
        with websockets.subscribe(ws, "news"):
            ws.wait_closed()

    async def alisten(ws: AsyncWebSocket) -> None:
        async with websockets.subscribe(ws, "news"):
            await ws.wait_closed()

    def flood(ws: Any) -> None:
        while True:
            ws.send("x" * 10)

    async def aflood(ws: AsyncWebSocket) -> None:
        while True:
            await ws.send("x" * 10)

    def refuse(ws: Any) -> None:
        abort(403)

    async def arefuse(ws: AsyncWebSocket) -> None:
        abort(403)

    def close(ws: Any) -> None:
        ws.close()

    async def aclose(ws: AsyncWebSocket) -> None:
        await ws.close()

    def fail(ws: Any) -> None:
        raise RuntimeError("a bug")

    async def afail(ws: AsyncWebSocket) -> None:
        raise RuntimeError("a bug")

    def fail_late(ws: Any) -> None:
        ws.accept()
        raise RuntimeError("a bug")

    async def afail_late(ws: AsyncWebSocket) -> None:
        await ws.accept()
        raise RuntimeError("a bug")

    both("echo", echo, aecho)
    both("undecided", undecided, aundecided)
    both("deaf", deaf, adeaf)
    both("listen", listen, alisten)
    both("flood", flood, aflood)
    both("refuse", refuse, arefuse)
    both("close", close, aclose)
    both("fail", fail, afail)
    both("fail-late", fail_late, afail_late)


@pytest.fixture(params=["", "/async"], ids=["plain", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    """What the paths of either kind of view begin with."""
    prefix: str = request.param
    return prefix


async def closed(peer: Peer) -> tuple[int, str]:
    """The close of the application, behind whatever comes before it."""
    while (message := await peer.get())["type"] != "websocket.close":
        pass
    return message["code"], message["reason"]


# -- addresses and users --------------------------------------------------------------------------


def test_connections_of_one_address(run, app, kind):
    """Two may be open, a third is answered 429; another address and the next place are free."""

    async def main():
        async with House(app, max_connections_per_address=2) as house:
            echo = f"{kind}/echo"
            first = await house.open(echo)
            assert await first.get_status() == 101
            assert await house.status(echo) == 101
            assert house.count("refused_address") == 0
            third = await house.open(echo)
            message = await third.get()
            assert message["status"] == 429
            assert int(dict(message["headers"])[b"retry-after"]) > 0
            assert b"Too many connections of one address" in (await third.get())["body"]
            assert await house.status(echo, extensions={}) == 403  # all that such a server can say
            assert await house.status(echo, address="192.0.2.2") == 101
            assert house.count("refused_address") == 2
            await house.over(first)
            assert await house.status(echo) == 101
            assert await house.status(echo) == 429
            assert house.count("refused_address") == 3
            others = ("refused_full", "refused_user", "refused_handshakes", "handshake_timeouts")
            assert [house.count(name) for name in others] == [0, 0, 0, 0]
        assert house.places == (0, 0)

    run(main)


def test_connections_of_one_user(run, app, kind):
    """Two may be open, from wherever; a third is 429. Others, and those without a name, are not."""

    async def main():
        async with House(app, max_connections_per_user=2) as house:
            echo = f"{kind}/echo"
            first = await house.open(echo, user="ann", address="192.0.2.1")
            assert await first.get_status() == 101
            assert await house.status(echo, user="ann", address="192.0.2.2") == 101
            assert house.count("refused_user") == 0
            third = await house.open(echo, user="ann", address="192.0.2.3")
            message = await third.get()
            assert message["status"] == 429
            assert int(dict(message["headers"])[b"retry-after"]) > 0
            assert b"Too many connections of one user" in (await third.get())["body"]
            assert await house.status(echo, user="bob") == 101
            assert [await house.status(echo) for _ in range(4)] == [101] * 4
            assert house.count("refused_user") == 1
            await house.over(first)
            assert await house.status(echo, user="ann") == 101
            assert await house.status(echo, user="ann") == 429
            assert (house.count("refused_user"), house.count("refused_address")) == (2, 0)
        assert house.places == (0, 0)

    run(main)


@pytest.mark.parametrize("limit", ["address", "user"])
def test_a_handshake_counts(run, app, kind, limit):
    """Not only open connections hold a place: those that have no answer yet do as well."""

    async def main():
        async with House(app, **{f"max_connections_per_{limit}": 1}) as house:
            under_way = await house.open(f"{kind}/undecided", user="ann")
            await wait_until(lambda: sum(house.places))
            assert await house.status(f"{kind}/echo", user="ann") == 429
            house.release()
            assert await under_way.get_status() == 101
            assert await house.status(f"{kind}/echo", user="ann") == 429

    run(main)


@pytest.mark.parametrize("limit", ["address", "user"])
def test_error_handlers_answer(run, app, limit):
    """The 429 goes through Flask's error handlers, as every other error does."""

    @app.errorhandler(429)
    def handler(error: Any) -> Any:
        return {"again in": error.retry_after}, 429, {"X-Handler": "ours"}

    async def main():
        async with House(app, **{f"max_connections_per_{limit}": 1}) as house:
            assert await house.status(user="ann") == 101
            peer = await house.open(user="ann")
            message = await peer.get()
            assert message["status"] == 429
            assert dict(message["headers"])[b"x-handler"] == b"ours"
            assert b'"again in":5' in (await peer.get())["body"]

    run(main)


def test_a_limit_on_users_whom_nobody_knows(run, app, caplog):
    """Without an identify function the handshake is a 500, and the log says what to register."""
    app.config["WEBSOCKETS_MAX_CONNECTIONS_PER_USER"] = 1
    websockets = WebSockets(app)
    websockets.route("/ws")(lambda ws: ws.accept())

    async def main():
        async with connection(websockets.asgi_app(app), "/ws") as peer:
            assert await peer.get_status() == 500

    run(main)
    assert "ConfigurationError" in caplog.text
    assert "WEBSOCKETS_MAX_CONNECTIONS_PER_USER" in caplog.text
    assert "@websockets.identify" in caplog.text


def test_without_a_limit_nobody_is_counted(run, app):
    """Addresses are not held where there is no limit; users are, for disconnect."""

    async def main():
        async with House(app) as house:
            assert [await house.status(user="ann") for _ in range(5)] == [101] * 5
            assert house.places == (0, 1)

    run(main)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        # One customer has a network of 64 bits, and may choose any address in it.
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff:ffff:ffff:ffff", True),
        ("2001:db8:0:1::1", "2001:0db8:0000:0001:0000:0000:0000:0001", True),
        ("2001:DB8:0:1::A", "2001:db8:0:1::a", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("2001:db8:0:1:ffff:ffff:ffff:ffff", "2001:db8:0:2::", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        # A socket for both protocols has IPv4 mapped: these are no neighbours.
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:c000:0201", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("::1", "127.0.0.1", False),
        # What is no address is somebody's name for one.
        ("_hidden", "_hidden", True),
        ("_hidden", "_other", False),
        ("unknown", "192.0.2.1", False),
    ],
)
def test_what_counts_as_one_address(one, other, same):
    """An IPv4 address, mapped into IPv6 or not; a network of 64 bits of IPv6."""
    assert (address_key(one) == address_key(other)) is same


@pytest.mark.parametrize(
    ("told", "address"),
    [
        ("192.0.2.1:50001", "192.0.2.1"),
        ("[2001:db8:0:1::1]:50001", "2001:db8:0:1::1"),
        ("[2001:db8:0:1::1]", "2001:db8:0:1::1"),
    ],
)
def test_an_address_with_a_port(told, address):
    """Some proxies tell it with the port, another one each time: it is the same address."""
    assert address_key(told) == address_key(address)


def test_networks_of_ipv6(run, app):
    """The limit holds for the whole network, and not for its neighbour."""

    async def main():
        async with House(app, max_connections_per_address=2) as house:
            assert await house.status(address="2001:db8:0:1::1") == 101
            assert await house.status(address="2001:db8:0:1:a:b:c:d") == 101
            assert await house.status(address="2001:db8:0:1::3") == 429
            assert await house.status(address="2001:db8:0:2::1") == 101

    run(main)


def test_clients_without_an_address(run, app):
    """A unix socket's clients have none: they are not one address, and not counted."""

    async def main():
        async with House(app, max_connections_per_address=1) as house:
            for _ in range(2):
                async with connection(house.asgi, "/echo", client=None) as peer:
                    assert await peer.get_status() == 101
                    assert house.places == (0, 0)

    run(main)


@pytest.mark.parametrize("trusted", [1, 2])
def test_the_address_behind_a_proxy(run, app, trusted):
    """With ProxyFix the client's counts, as the proxies tell it; a lie in front of it does not."""
    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=trusted)  # type: ignore[method-assign]
    behind = ", 10.0.0.7" if trusted == 2 else ""

    async def main():
        async with House(app, max_connections_per_address=2) as house:

            async def status(forwarded: str) -> int:
                header = (b"x-forwarded-for", f"{forwarded}{behind}".encode())
                return await house.status(address="10.0.0.9", headers=(header,))

            assert await status("192.0.2.1") == 101
            assert await status("192.0.2.1") == 101
            assert await status("192.0.2.1") == 429
            assert await status("198.51.100.1, 192.0.2.1") == 429
            assert await status("10.0.0.9, 127.0.0.1, 192.0.2.1") == 429
            assert await status("::ffff:192.0.2.1") == 429
            assert await status("192.0.2.2") == 101
            assert house.count("refused_address") == 4

    run(main)


def test_the_proxys_own_address(run, app):
    """Without ProxyFix nobody believes the header: all who come through a proxy are one."""

    async def main():
        async with House(app, max_connections_per_address=2) as house:
            for number, status in enumerate((101, 101, 429)):
                header = (b"x-forwarded-for", f"192.0.2.{number}".encode())
                assert await house.status(address="10.0.0.9", headers=(header,)) == status

    run(main)


# -- places come back -----------------------------------------------------------------------------


async def _leaves(house: House, peer: Peer) -> None:
    assert await peer.get_status() == 101
    peer.leave()


async def _is_reset(house: House, peer: Peer) -> None:
    assert await peer.get_status() == 101
    peer.leave(1006)


async def _is_cancelled(house: House, peer: Peer) -> None:
    assert await peer.get_status() == 101
    peer.cancel()


async def _is_disconnected(house: House, peer: Peer) -> None:
    assert await peer.get_status() == 101
    assert await house.websockets.adisconnect(user="ann") == 1


async def _is_reset_in_the_handshake(house: House, peer: Peer) -> None:
    await wait_until(lambda: house.places == (2, 2))
    peer.leave(1006)
    house.release()


async def _times_out(house: House, peer: Peer) -> None:
    assert await peer.get_status() == 503
    house.release()


def _is_answered(status: int) -> Callable[[House, Peer], Awaitable[None]]:
    async def end(house: House, peer: Peer) -> None:
        assert await peer.get_status() == status

    return end


#: The view, the user, and how it ends.
ENDINGS: dict[str, tuple[str, str, Callable[[House, Peer], Awaitable[None]]]] = {
    "the client leaves": ("echo", "ann", _leaves),
    "the client is reset": ("echo", "ann", _is_reset),
    "the client is reset in the handshake": ("undecided", "ann", _is_reset_in_the_handshake),
    "the server cancels it": ("echo", "ann", _is_cancelled),
    "the user is disconnected": ("echo", "ann", _is_disconnected),
    "the view refuses": ("refuse", "ann", _is_answered(403)),
    "the view closes before the accept": ("close", "ann", _is_answered(403)),
    "the view raises": ("fail", "ann", _is_answered(500)),
    "the view raises after the accept": ("fail-late", "ann", _is_answered(101)),
    "the handshake times out": ("undecided", "ann", _times_out),
    "nobody knows who it is": ("echo", "nobody knows", _is_answered(500)),
    "the user has too many": ("echo", "bob", _is_answered(429)),
    "there is no such path": ("nowhere", "ann", _is_answered(404)),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_places_come_back(run, app, kind, ending):
    """Whatever ends a handshake, a connection or its view: then its places are free."""
    path, user, end = ENDINGS[ending]
    settings: dict[str, Any] = {"max_connections_per_address": 1, "max_connections_per_user": 1}
    if end is _times_out:
        settings["handshake_timeout"] = 0.1

    async def main():
        async with House(app, **settings) as house:
            # bob has all that he may have, from elsewhere.
            assert await house.status(user="bob", address="192.0.2.99") == 101
            peer = await house.open(f"{kind}/{path}", user=user)
            await end(house, peer)
            with anyio.fail_after(TIMEOUT):
                await wait_until(lambda: house.places == (1, 1))
            assert await house.status(user="ann") == 101
            assert house.places == (2, 2)
        assert house.places == (0, 0)
        assert house.count("connections") == 0

    run(main)


def test_a_stuck_view_keeps_its_places(run, app, kind):
    """A view that goes on after its connection holds all its places until it ends."""
    settings = {"max_connections": 1, "close_timeout": 0.05}
    others = {"max_connections_per_address": 1, "max_connections_per_user": 1}

    async def main():
        async with House(app, **settings, **others) as house:
            peer = await house.open(f"{kind}/deaf", user="ann")
            assert await peer.get_status() == 101
            await house.over(peer)
            stats = house.websockets.stats()
            assert (stats.connections, stats.stuck_views) == (0, 1)
            assert house.places == (1, 1)
            assert await house.status(user="ann") == 503
            assert house.count("refused_full") == 1
            house.release()
            await wait_until(lambda: house.places == (0, 0))
            assert await house.status(user="ann") == 101

    run(main)


@pytest.mark.parametrize("limit", ["address", "user"])
def test_a_stuck_view_keeps_the_place_of_its(run, app, kind, limit):
    """As long as it runs its address, or its user, has one connection less."""

    async def main():
        settings = {f"max_connections_per_{limit}": 1, "close_timeout": 0.05}
        async with House(app, **settings) as house:
            peer = await house.open(f"{kind}/deaf", user="ann")
            assert await peer.get_status() == 101
            await house.over(peer)
            assert await house.status(user="ann") == 429
            house.release()
            await wait_until(lambda: house.places == (0, 0))
            assert await house.status(user="ann") == 101

    run(main)


def test_takers_at_the_same_moment(run):
    """As many threads as there are take the last places: no more get one than there are."""
    limit, takers, rounds = 5, 16, 50

    async def main():
        for _ in range(rounds):
            places = Places()
            links = [_Link() for _ in range(takers)]
            barrier, took = threading.Barrier(takers), Counter[bool]()
            most: list[int] = []

            def take(link, barrier=barrier, places=places, took=took, most=most):
                barrier.wait(TIMEOUT)
                got = places.take("key", link, limit)
                most.append(len(places.evict("key")))
                took[got] += 1

            threads = [threading.Thread(target=take, args=(link,)) for link in links]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(TIMEOUT)
            assert took == {True: limit, False: takers - limit}
            for link in links:
                for held, key in link.entry.places:
                    held.give_back(key, link)
            assert len(places) == 0

    run(main)


class _Link:
    """As much of a link as a place needs."""

    def __init__(self) -> None:
        self.entry = registry.Entry()
        self.state = State.OPEN


def test_handshakes_at_the_same_moment(run, app, kind):
    """Twenty clients for three places, whose handshakes run at once: three come in."""

    async def main():
        async with House(app, max_connections_per_user=3) as house:
            peers = [await house.open(f"{kind}/echo", user="ann") for _ in range(20)]
            statuses = Counter([await peer.get_status() for peer in peers])
            assert statuses == {101: 3, 429: 17}
            assert house.count("refused_user") == 17

    run(main)


# -- clear refusals -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A limit, and how a client comes to hear of it."""

    counter: str
    #: What the log names.
    setting: str
    #: One client above the limit. It must be told as the case expects.
    refuse: Callable[[House], Awaitable[None]]
    settings: dict[str, Any] = field(default_factory=dict)
    #: Views on which somebody is connected from the beginning.
    held: tuple[str, ...] = ()
    #: The view that the log must name: its endpoint if Flask has been asked, else its path.
    place: str = "endpoint echo"


def _answered(status: int, path: str = "/echo", **options: Any) -> Any:
    async def refuse(house: House) -> None:
        peer = await house.open(path, user="ann", **options)
        message = await peer.get()
        assert message["status"] == status
        assert (b"retry-after" in dict(message["headers"])) is (status in (429, 503))

    return refuse


def _closed(path: str, close: tuple[int, str], *messages: str, **scope: Any) -> Any:
    async def refuse(house: House) -> None:
        peer = await house.open(path, user="ann", **scope)
        assert await peer.get_status() == 101
        for message in messages:
            peer.send(message)
        if path == "/listen":
            await wait_until(lambda: house.count("subscriptions") == 1)
            for _ in range(5):
                await house.websockets.apublish(SECRET, "news")
        if path == "/flood":
            with anyio.fail_after(TIMEOUT):
                await peer.returned.wait()  # it takes nothing, and is cut
            return
        assert await closed(peer) == close
        house.go.set()  # a view that does not receive ends
        with anyio.fail_after(TIMEOUT):
            await peer.returned.wait()
        house.go.clear()

    return refuse


def _foreign(house: House) -> Any:
    return _answered(403, headers=((b"origin", b"https://evil.example"),))(house)


async def _draining(house: House) -> None:
    await house.websockets.adrain(5)
    await _answered(503)(house)


BUSY, TOO_FAST = (1013, "the server is too busy"), (1008, "too much was sent in too short a time")

CASES = {
    "max_connections": Case(
        "refused_full",
        "WEBSOCKETS_MAX_CONNECTIONS",
        _answered(503),
        {"max_connections": 1},
        ("/echo",),
        place="/echo",
    ),
    "max_connections_per_address": Case(
        "refused_address",
        "WEBSOCKETS_MAX_CONNECTIONS_PER_ADDRESS",
        _answered(429),
        {"max_connections_per_address": 1},
        ("/echo",),
    ),
    "max_connections_per_user": Case(
        "refused_user",
        "WEBSOCKETS_MAX_CONNECTIONS_PER_USER",
        _answered(429),
        {"max_connections_per_user": 1},
        ("/echo",),
    ),
    "handshake_timeout": Case(
        "handshake_timeouts",
        "WEBSOCKETS_HANDSHAKE_TIMEOUT",
        _answered(503, "/undecided"),
        {"handshake_timeout": 0.05},
        place="endpoint undecided",
    ),
    "allowed_origins": Case("refused_origin", "WEBSOCKETS_ALLOWED_ORIGINS", _foreign),
    "drain": Case("refused_draining", "drains", _draining, held=("/echo",), place="/echo"),
    "max_message_bytes": Case(
        "oversized",
        "WEBSOCKETS_MAX_MESSAGE_BYTES",
        _closed("/echo", (1009, "a message may have 5 bytes"), SECRET),
        {"max_message_bytes": 5},
    ),
    "max_messages_per_second": Case(
        "rate_closed",
        "WEBSOCKETS_MAX_MESSAGES_PER_SECOND",
        _closed("/echo", TOO_FAST, SECRET, SECRET),
        {"max_messages_per_second": 1},
    ),
    "max_bytes_per_second": Case(
        "rate_closed",
        "WEBSOCKETS_MAX_BYTES_PER_SECOND",
        _closed("/echo", TOO_FAST, SECRET, SECRET),
        {"max_bytes_per_second": 7},
    ),
    "inbox_full": Case(
        "inbox_closed",
        "WEBSOCKETS_INBOX_MESSAGES",
        _closed("/deaf", BUSY, SECRET, SECRET),
        {"inbox_messages": 1, "inbox_full": "close"},
        place="endpoint deaf",
    ),
    "inbox_timeout": Case(
        "inbox_closed",
        "WEBSOCKETS_INBOX_MESSAGES, _BYTES, _TIMEOUT",
        _closed("/deaf", BUSY, SECRET, SECRET),
        {"inbox_bytes": 10, "inbox_timeout": 0.05},
        place="endpoint deaf",
    ),
    "outbox_messages": Case(
        "closed_slow",
        "WEBSOCKETS_OUTBOX_MESSAGES",
        _closed("/listen", (1013, "slow consumer"), socket_messages=0),
        {"outbox_messages": 2},
        place="endpoint listen",
    ),
    "send_timeout": Case(
        "send_timeouts",
        "WEBSOCKETS_SEND_TIMEOUT",
        _closed("/flood", (1006, ""), socket_messages=0),
        {"send_timeout": 0.1, "outbox_messages": 2},
        place="endpoint flood",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_refusal_is_clear_and_logged_once(run, app, caplog, name):
    """Each client is told and counted; the log has one line for all, with what one needs."""
    case = CASES[name]

    async def main():
        async with House(app, **case.settings) as house:
            for path in case.held:
                assert await house.status(path, user="ann") == 101
            assert house.count(case.counter) == 0
            for number in range(1, 5):
                await case.refuse(house)
                await wait_until(lambda n=number: house.count(case.counter) == n)

    with caplog.at_level(logging.WARNING, "flask_websockets"):
        run(main)
    lines = [
        record.getMessage()
        for record in caplog.records
        if record.name == "flask_websockets" and record.levelno == logging.WARNING
    ]
    about = [line for line in lines if case.setting in line]
    assert about, f"no line names {case.setting}: {lines}"
    assert case.place in about[0]
    assert "peer 192.0.2.1" in about[0]
    assert SECRET not in caplog.text
    assert len(about) == 1, f"{len(about)} lines for four of them"


@pytest.mark.parametrize("name", ["max_message_bytes", "max_messages_per_second", "inbox_full"])
def test_too_much_before_the_accept(run, app, kind, name):
    """What comes in the handshake's shade is no way around: refused, or closed after the accept."""
    case = CASES[name]

    async def main():
        async with House(app, **case.settings, max_connections_per_address=1) as house:
            peer = await house.open(f"{kind}/undecided")
            await wait_until(lambda: house.places[0] == 1)
            for _ in range(3):
                peer.send(SECRET)
            await wait_until(lambda: peer.reads > 1)
            for _ in range(50):
                await anyio.lowlevel.checkpoint()
            house.release()
            status = await peer.get_status()
            if status == 101:
                assert (await closed(peer))[0] in (1008, 1009, 1013)
            else:
                assert status in (400, 413, 429, 503)
            peer.leave()
            with anyio.fail_after(TIMEOUT):
                await peer.returned.wait()
            assert house.count(case.counter) == 1
            await wait_until(lambda: house.places == (0, 0))
            assert await house.status() == 101

    run(main)


def test_a_system_without_threads(run, app, caplog, monkeypatch):
    """The 503 of a handshake that has no thread is counted, and logged once with path and peer."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main():
        async with House(app) as house:
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", start)
                for _ in range(3):
                    await _answered(503)(house)
            assert house.count("refused_threads") == 3

    run(main)
    (line,) = [each.getMessage() for each in caplog.records if "no thread left" in each.msg]
    assert "/echo (peer 192.0.2.1)" in line
    assert SECRET not in caplog.text


def test_handshakes_at_the_same_time(run, app, caplog):
    """One is worked on, one waits; the next two wait in vain: 503, counted, and one line."""

    async def main():
        async with House(app, max_handshakes=1, handshake_timeout=1.5) as house:
            peers = [await house.open("/undecided")]
            await wait_until(lambda: house.count("view_threads") == 1)
            # The first comes to its end while the second still waits, and the second gets its
            # place. The others have waited for as long when it is half way through its own time.
            await anyio.sleep(0.1)
            for _ in range(3):
                peers.append(await house.open("/undecided"))
                await anyio.sleep(0.02)
            assert house.count("view_threads") == 1, "those that wait take no thread"
            messages = [await peer.get() for peer in peers]
            assert [message["status"] for message in messages] == [503] * 4
            assert all(b"retry-after" in dict(message["headers"]) for message in messages)
            assert house.count("refused_handshakes") == 2
            assert house.count("handshake_timeouts") == 2
            assert house.count("refused_full") == 0

    run(main)
    (line,) = [each.getMessage() for each in caplog.records if "MAX_HANDSHAKES" in each.msg]
    assert "WEBSOCKETS_MAX_HANDSHAKES, 1, for WEBSOCKETS_HANDSHAKE_TIMEOUT, 1.5 s" in line
    assert "/undecided (peer 192.0.2.1)" in line
    assert SECRET not in caplog.text


def test_a_minute_later_it_is_logged_again(caplog):
    """Each kind of refusal has a line a minute at most, with the number of those since."""
    now = 1000.0
    registry = Registry(clock=lambda: now)

    def lines() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    registry.refuse("refused_full", "full: %s", "a")
    registry.refuse("refused_user", "user: %s", "b")
    assert lines() == ["full: a", "user: b"]
    for _ in range(1000):
        registry.refuse("refused_full", "full: %s", "a")
    now = 1059.9
    registry.refuse("refused_full", "full: %s", "c")
    assert lines() == []
    now = 1060.0
    registry.refuse("refused_full", "full: %s", "d")
    registry.refuse("refused_user", "user: %s", "e")
    assert lines() == ["full: d (and 1001 more since the last such line)", "user: e"]
    now = 1120.0
    registry.refuse("refused_full", "full: %s", "f")
    assert lines() == ["full: f"]
    assert (registry.refused("refused_full"), registry.refused("refused_user")) == (1004, 2)


@pytest.mark.parametrize("name", ["max_connections", "max_connections_per_address"])
def test_a_path_is_no_line_of_the_log(run, app, caplog, name):
    """Who puts a line break into his path does not write lines of his own into the log."""

    async def main():
        async with House(app, **CASES[name].settings) as house:
            house.websockets.route("/free/<text>", endpoint="free")(lambda ws, text: ws.accept())
            assert await house.status() == 101
            forged = "/free/x\nINFO all is well\r\x1b[2J\u2028y"
            assert await house.status(forged) in (429, 503)

    with caplog.at_level(logging.WARNING, "flask_websockets"):
        run(main)
    (line,) = [each.getMessage() for each in caplog.records if each.name == "flask_websockets"]
    assert line.isprintable(), repr(line)


def test_ten_thousand_handshakes_above_the_limit(run, app, caplog, monkeypatch):
    """They take no thread, nothing of them stays, and the log has one line."""
    started: list[str] = []
    start = threading.Thread.start

    def count(thread: threading.Thread) -> None:
        started.append(thread.name)
        start(thread)

    async def main():
        async with House(app, max_connections=1) as house:
            assert await house.status() == 101
            monkeypatch.setattr(threading.Thread, "start", count)
            statuses = Counter[int]()
            connect: list[Any] = []

            async def receive() -> Any:
                connect.append(1)
                return {"type": "websocket.connect"}

            async def send(message: Any) -> None:
                if "status" in message:
                    statuses[message["status"]] += 1

            scope = {
                "type": "websocket",
                "path": "/echo",
                "headers": [(b"host", b"localhost")],
                "client": ("192.0.2.1", 50000),
                "extensions": {"websocket.http.response": {}},
            }
            for _ in range(10_000):
                await house.asgi(dict(scope), receive, send)
            assert statuses == {503: 10_000}
            stats = house.websockets.stats()
            assert stats.refused_full == 10_000
            assert (stats.connections, stats.view_threads) == (1, 1)
            assert started == []

    run(main)
    lines = [record for record in caplog.records if record.name == "flask_websockets"]
    assert len(lines) <= 2  # another one if it took more than a minute


# -- channels and publishes -----------------------------------------------------------------------


def raised_by(call: Callable[..., Any], *arguments: Any) -> str:
    """The type of what a call raises."""
    try:
        call(*arguments)
    except (ValueError, UsageError, TimeoutError) as error:
        return type(error).__name__
    return "nothing"


def test_channels_of_one_connection(run, app, kind):
    """The third of two raises UsageError, names the setting, and is counted; it is in none."""
    told: list[str] = []

    async def main():
        async with House(app, max_channels_per_connection=2) as house:
            websockets = house.websockets

            def view(ws):
                with websockets.subscribe(ws, ["a", "b"]):
                    try:
                        with websockets.subscribe(ws, ["b", "c"]):
                            told.append("subscribed")
                    except UsageError as error:
                        told.append(str(error))
                    ws.send("tried")
                    ws.wait_closed()

            async def aview(ws):
                async with websockets.subscribe(ws, ["a", "b"]):
                    try:
                        async with websockets.subscribe(ws, ["b", "c"]):
                            told.append("subscribed")
                    except UsageError as error:
                        told.append(str(error))
                    await ws.send("tried")
                    await ws.wait_closed()

            websockets.route("/few", endpoint="few")(view)
            websockets.route("/async/few", endpoint="afew")(aview)
            peer = await house.open(f"{kind}/few")
            assert await peer.get_status() == 101
            assert (await peer.get())["text"] == "tried"
            stats = websockets.stats()
            assert (stats.refused_subscribes, stats.subscriptions, stats.channels) == (1, 2, 2)
            assert (await websockets.apublish("x", "c")).local == 0
            assert (await websockets.apublish("x", "b")).local == 1

    run(main)
    assert len(told) == 1
    assert "WEBSOCKETS_MAX_CHANNELS_PER_CONNECTION" in told[0]


#: Names that just fit into 12 bytes of UTF-8, and names that do not.
FIT = ["x" * 12, "\N{SNOWMAN}" * 4, "\N{GRINNING FACE}" * 3, "é" * 6, "x"]
TOO_LONG = ["x" * 13, "\N{SNOWMAN}" * 4 + "x", "\N{GRINNING FACE}" * 4, "é" * 7, "x" * 1_000_000]


def test_a_channels_name(run, app, kind):
    """12 bytes of UTF-8 are a name, 13 a ValueError; of several names none is taken then."""
    told: list[Any] = []

    async def main():
        async with House(app, max_channel_name_bytes=12) as house:
            websockets = house.websockets

            def view(ws):
                with websockets.subscribe(ws, FIT):
                    for name in TOO_LONG:
                        told.append(raised_by(websockets.subscribe, ws, name))
                        told.append(raised_by(websockets.subscribe, ws, ["new", name]))
                        told.append(raised_by(websockets.unsubscribe, ws, [FIT[0], name]))
                        told.append(raised_by(websockets.publish, "x", [FIT[0], name]))
                    for name in FIT:
                        websockets.publish(name, name)
                    ws.wait_closed()

            async def aview(ws):
                async with websockets.subscribe(ws, FIT):
                    for name in TOO_LONG:
                        told.append(raised_by(websockets.subscribe, ws, name))
                        told.append(raised_by(websockets.subscribe, ws, ["new", name]))
                        for call in (
                            websockets.aunsubscribe(ws, [FIT[0], name]),
                            websockets.apublish("x", [FIT[0], name]),
                        ):
                            try:
                                await call
                            except ValueError:
                                told.append("ValueError")
                    for name in FIT:
                        assert (await websockets.apublish(name, name)).local == 1
                    await ws.wait_closed()

            websockets.route("/names", endpoint="names")(view)
            websockets.route("/async/names", endpoint="anames")(aview)
            peer = await house.open(f"{kind}/names")
            assert await peer.get_status() == 101
            assert [(await peer.get())["text"] for _ in FIT] == FIT
            stats = websockets.stats()
            assert (stats.subscriptions, stats.channels) == (len(FIT), len(FIT))
            assert stats.refused_publishes == len(TOO_LONG)
            assert stats.refused_subscribes == 2 * len(TOO_LONG)
            with pytest.raises(ValueError, match="WEBSOCKETS_MAX_CHANNEL_NAME_BYTES") as caught:
                await websockets.apublish("x", TOO_LONG[-1])
            assert len(str(caught.value)) < 300, "a name of a megabyte is in the error"

    run(main)
    assert told == ["ValueError"] * 4 * len(TOO_LONG)


def test_a_published_message(run, app):
    """10 bytes may be published, 11 are a ValueError, counted; nobody gets them, all the next."""
    fit = ["x" * 10, b"x" * 10, "é" * 5, ""]
    too_large = ["x" * 11, b"x" * 11, "é" * 5 + "x", bytearray(11), memoryview(bytes(11))]

    async def main():
        async with House(app, max_publish_bytes=10) as house:
            websockets = house.websockets
            raised: list[str] = []

            def publish(data):
                raised.append(raised_by(websockets.publish, data, "news"))

            peers = [await house.open(path) for path in ("/listen", "/async/listen")]
            for peer in peers:
                assert await peer.get_status() == 101
            await wait_until(lambda: house.count("subscriptions") == 2)
            for data in too_large:
                await anyio.to_thread.run_sync(publish, data)
                with pytest.raises(ValueError, match="WEBSOCKETS_MAX_PUBLISH_BYTES"):
                    await websockets.apublish(data, "news")
            with pytest.raises(ValueError, match="at most 10 bytes"):
                await websockets.apublish_json({"a": "1234"}, "news")
            assert raised == ["ValueError"] * len(too_large)
            stats = websockets.stats()
            assert stats.refused_publishes == 2 * len(too_large) + 1
            assert (stats.published, stats.delivered) == (0, 0)
            for data in fit:
                await anyio.to_thread.run_sync(publish, data)
                assert (await websockets.apublish(data, "news")).local == 2
            assert raised == ["ValueError"] * len(too_large) + ["nothing"] * len(fit)
            for peer in peers:
                for data in fit:
                    for _ in range(2):
                        key = "text" if isinstance(data, str) else "bytes"
                        assert (await peer.get())[key] == data
            assert house.count("refused_publishes") == 2 * len(too_large) + 1

    run(main)


def test_before_a_server_runs(app):
    """What may not be published raises all the same, as it will later; nothing counts yet."""
    app.config["WEBSOCKETS_MAX_PUBLISH_BYTES"] = 10
    websockets = WebSockets(app)
    websockets.publish("x" * 10, "x" * 255)
    for data, name in (("x" * 11, "a"), ("x", "x" * 256)):
        with pytest.raises(ValueError):
            websockets.publish(data, name)
    assert websockets.stats().refused_publishes == 0


def test_pending_publishes_and_subscribes(run, app):
    """Two wait while the loop takes nothing; a third raises TimeoutError, and is counted."""
    told: list[Any] = []

    async def main():
        settings = {"max_pending_publishes": 2, "send_timeout": 0.05}
        async with House(app, **settings) as house:
            websockets, done = house.websockets, threading.Event()

            def view(ws):
                ws.accept()
                assert house.go.wait(TIMEOUT)
                with ExitStack() as blocks:
                    blocks.enter_context(websockets.subscribe(ws, "a"))
                    websockets.publish("x", "a")
                    told.append(raised_by(websockets.publish, "y", "a"))
                    subscribe = websockets.subscribe(ws, "b")
                    told.append(raised_by(blocks.enter_context, subscribe))
                    told.append(raised_by(websockets.publish, "z", "a"))
                done.set()
                ws.wait_closed()

            websockets.route("/many", endpoint="many")(view)
            peer = await house.open("/many")
            assert await peer.get_status() == 101
            house.go.set()
            assert done.wait(TIMEOUT)  # blocks the loop: nothing is taken
            assert told == ["TimeoutError"] * 3
            stats = websockets.stats()
            assert (stats.refused_publishes, stats.refused_subscribes) == (2, 1)
            assert (await peer.get())["text"] == "x"

    run(main)


def test_reading_pauses_for_the_inbox_timeout_at_most(run, app):
    """Waiting for the rate and then for room is one pause: nobody reads the pong meanwhile."""
    timeout = 1.0

    async def main():
        settings = {"max_messages_per_second": 1.25, "rate_exceeded": "slow_down"}
        async with House(app, inbox_messages=1, inbox_timeout=timeout, **settings) as house:
            peer = await house.open("/deaf")
            assert await peer.get_status() == 101
            started = anyio.current_time()
            for _ in range(2):  # the second waits for the rate for 0.6 s, and finds no room then
                peer.send("x")
            assert await closed(peer) == BUSY
            assert anyio.current_time() - started < timeout + 0.4

    run(main)


# -- the table ------------------------------------------------------------------------------------


def rows() -> dict[str, list[str]]:
    """Setting to tests, as the docstring of this file has them."""
    table = (__doc__ or "").partition(".. limits\n")[2].partition(".. end of limits")[0]
    found: dict[str, list[str]] = {}
    for line in table.strip().splitlines():
        setting, test = re.fullmatch(r"(\w*) +(\S+\.py::\w+)", line).groups()  # type: ignore[union-attr]
        if setting:
            assert setting not in found
            tests = found[setting] = []
        tests.append(test)
    return found


def test_every_limit_has_its_tests():
    """The table has each setting that is a limit, and no other; a case of this file names one."""
    limits = {field.name for field in fields(Config)} - NO_LIMITS
    assert set(rows()) == limits
    assert set(CASES) - {"drain"} <= limits | NO_LIMITS


@pytest.mark.parametrize("test", sorted({test for tests in rows().values() for test in tests}))
def test_it_is_there(test):
    """A test that the table names exists."""
    file, _, name = test.partition("::")
    tree = ast.parse((HERE / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_how_to_has_all_limits():
    """Its table names each limit that there is with counters that there are, and each counter."""
    page = (HERE.parent / "docs" / "how-to" / "limits.rst").read_text()
    table = page.partition(".. limits\n")[2].partition(".. end of limits")[0]
    settings, counters = set(), set()
    for row in table.split("    * - ")[2:]:
        limit, _, counted = row.strip().split("\n      - ")
        settings |= set(re.findall(r"WEBSOCKETS_(\w+)", limit))
        counters |= set(re.findall(r"`(\w+)`", counted))
    in_table = {name.lower() for name in settings}
    others = {"inbox_timeout", "inbox_full", "rate_exceeded", "drain_timeout"}  # their policies
    others |= NO_LIMITS - {"allowed_origins"}
    assert in_table == {field.name for field in fields(Config)} - others
    here = {"connections", "view_threads", "view_tasks", "http_threads", "channels"}
    here |= {"subscriptions", "pending", "inbox_messages", "inbox_bytes", "outbox_messages"}
    totals = {field.name for field in fields(Stats)} - here - {"outbox_bytes", "connections_total"}
    assert counters == totals - {"published", "delivered", "body_timeouts"}


def test_a_link_can_be_in_places():
    """A place is held by a link, which can be a key: nobody compares two of them."""
    assert Link.__hash__ is object.__hash__
