"""How fast a peer may send: the token bucket alone, and what a connection makes of it."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import pytest
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st

from flask_websockets import AsyncWebSocket, ConnectionClosed, WebSockets
from flask_websockets.rate import RateLimit, TokenBucket

from .asgi_driver import TIMEOUT, Peer, connection, wait_until

TOO_FAST = (1008, "too much was sent in too short a time")

#: Seconds beyond a promised time.
MARGIN = 1.5


# -- the bucket -----------------------------------------------------------------------------------


def test_a_bucket_holds_a_second():
    """Eight of eight a second may come at once; the ninth an eighth of a second later."""
    bucket = TokenBucket(8, 100.0)
    assert [bucket.wait(1, 100.0) for _ in range(8)] == [0.0] * 8
    assert bucket.wait(1, 100.0) == 0.125
    assert bucket.wait(1, 100.0625) == 0.0625
    assert bucket.wait(1, 100.125) == 0.0
    assert bucket.wait(1, 100.125) == 0.125


def test_a_bucket_holds_no_more_than_a_second():
    """Whoever was silent for a day may send one second's worth, and no day's."""
    bucket = TokenBucket(10, 0.0)
    assert [bucket.wait(1, 86_400.0) for _ in range(10)] == [0.0] * 10
    assert bucket.wait(1, 86_400.0) > 0


def test_a_refusal_takes_nothing():
    """Asking again and again while one waits makes nobody wait for longer."""
    bucket = TokenBucket(2, 0.0)
    assert bucket.wait(2, 0.0) == 0.0
    assert [bucket.wait(1, 0.0) for _ in range(100)] == [pytest.approx(0.5)] * 100
    assert bucket.wait(1, 0.5) == 0.0


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
def test_less_than_one_a_second(rate):
    """The bucket holds one, however long it takes to fill: else nothing would ever pass."""
    bucket = TokenBucket(rate, 0.0)
    assert bucket.wait(1, 0.0) == 0.0
    assert bucket.wait(1, 0.0) == pytest.approx(1 / rate)
    assert bucket.wait(1, 1 / rate + 1e-9) == 0.0


def test_more_than_the_bucket_holds():
    """It passes when the bucket is full, and leaves a debt: the rate holds on average."""
    bucket = TokenBucket(100, 0.0)
    assert bucket.wait(1000, 0.0) == 0.0
    assert bucket.wait(1, 0.0) == pytest.approx(9.01)
    assert bucket.wait(1, 9.0) == pytest.approx(0.01)
    assert bucket.wait(1, 9.02) == 0.0
    # Another one has to wait until the bucket is full.
    assert bucket.wait(1000, 9.02) == pytest.approx(0.99)
    assert bucket.wait(1000, 10.5) == 0.0


def test_nothing_costs_nothing():
    """An empty message takes no bytes, and waits for a debt all the same."""
    bucket = TokenBucket(10, 0.0)
    assert [bucket.wait(0, 0.0) for _ in range(1000)] == [0.0] * 1000
    assert bucket.wait(10, 0.0) == 0.0
    assert bucket.wait(0, 0.0) == 0.0
    assert bucket.wait(20, 1.0) == 0.0
    assert bucket.wait(0, 1.0) == pytest.approx(1.0)


@given(
    rate=st.floats(0.01, 1e9),
    costs=st.lists(st.floats(0, 1e7), max_size=30),
    start=st.floats(0, 1e9),
)
def test_who_waits_as_long_as_he_is_told_gets_through(rate, costs, start):
    """Waiting so long is enough, in one or two turns; no more than rate and bucket came through."""
    bucket, now, passed = TokenBucket(rate, start), start, 0.0
    largest = max(1.0, rate, *costs, 0)
    for cost in costs:
        for _ in range(64):
            seconds = bucket.wait(cost, now)
            if not seconds:
                break
            assert seconds > 0
            assert now + seconds > now, "a wait of no time at all would never end"
            now += seconds
        else:
            raise AssertionError("it waits for ever")
        passed += cost
        assert passed <= (max(1.0, rate) + (now - start) * rate + largest) * (1 + 1e-6)


def test_both_limits_hold():
    """A message passes when it may by its number and by its bytes; what waits has paid once."""
    limit = RateLimit(2, 100, 0.0)
    assert limit.wait(100, 0.0) == 0.0
    assert limit.wait(50, 0.0) == pytest.approx(0.5)
    assert limit.wait(50, 0.25) == pytest.approx(0.25)
    assert limit.wait(50, 0.5) == 0.0  # at 0.5 s the second message had paid, and one token came
    assert limit.wait(0, 0.5) == 0.0
    assert limit.wait(0, 0.5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("messages", "size"), [(None, None), (None, 1e9), (1e9, None)], ids=["none", "bytes", "count"]
)
def test_none_is_no_limit(messages, size):
    """A limit that is not set lets everything pass."""
    limit = RateLimit(messages, size, 0.0)
    assert [limit.wait(1000, 0.0) for _ in range(1000)] == [0.0] * 1000


# -- a connection ---------------------------------------------------------------------------------


class House:
    """An application with a view that keeps what it receives, and how it ended."""

    def __init__(self, app: Flask, kind: str, **settings: Any) -> None:
        app.config.update({f"WEBSOCKETS_{name.upper()}": each for name, each in settings.items()})
        self.websockets = WebSockets(app)
        self.asgi = self.websockets.asgi_app(app)
        self.kind = kind
        self.seen: list[str | bytes] = []
        self.ended: list[tuple[int, str]] = []
        self.route("/ws")

    def route(self, path: str, **limits: Any) -> None:
        """One more such view, with limits of its own."""
        seen, ended = self.seen, self.ended
        if self.kind == "plain":

            @self.websockets.route(path, endpoint=path, **limits)
            def view(ws: Any) -> None:
                ws.accept()
                try:
                    while True:
                        seen.append(ws.receive())
                except ConnectionClosed as error:
                    ended.append((error.code, error.reason))

        else:

            @self.websockets.route(path, endpoint=path, **limits)
            async def aview(ws: AsyncWebSocket) -> None:
                await ws.accept()
                try:
                    while True:
                        seen.append(await ws.receive())  # type: ignore[arg-type]
                except ConnectionClosed as error:
                    ended.append((error.code, error.reason))

    def counts(self) -> tuple[int, int]:
        stats = self.websockets.stats()
        return stats.rate_closed, stats.rate_slowed


MakeHouse = Callable[..., House]


@pytest.fixture(params=["plain", "async"])
def house(request: pytest.FixtureRequest, app: Flask) -> MakeHouse:
    """An application with these settings, whose view is plain or async."""

    def make(**settings: Any) -> House:
        return House(app, request.param, **settings)

    return make


async def closed(peer: Peer) -> tuple[int, str]:
    """The close of the application, which must be what comes next."""
    message = await peer.get()
    assert message["type"] == "websocket.close", message
    return message["code"], message["reason"]


async def settle() -> None:
    """Let the loop do what it has to do."""
    for _ in range(50):
        await anyio.lowlevel.checkpoint()


def test_messages_a_second(run, house):
    """As many as may come in one second may come at once; one more is closed with 1008."""
    house = house(max_messages_per_second=5)

    async def main():
        async with connection(house.asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            sent = [str(number) for number in range(5)]
            for data in sent:
                peer.send(data)
            await wait_until(lambda: house.seen == sent)
            assert house.counts() == (0, 0)
            for data in ("a", "b", "c"):  # a token comes each 0.2 s: not for all three
                peer.send(data)
            assert await closed(peer) == TOO_FAST
            await wait_until(lambda: house.ended)
            assert house.counts() == (1, 0)
        assert house.seen[5:] in ([], ["a"], ["a", "b"])
        assert house.ended == [TOO_FAST]

    run(main)


def test_bytes_a_second(run, house):
    """Bytes are those of UTF-8 and of binary messages together; empty messages cost none."""
    house = house(max_bytes_per_second=0.001 + 30)

    async def main():
        async with connection(house.asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            sent: Sequence[str | bytes] = ["é" * 5, b"x" * 10, "", b"", "x" * 10]
            for data in sent:
                peer.send(data)
            await wait_until(lambda: house.seen == sent)
            assert house.counts() == (0, 0)
            peer.send("x" * 25)
            assert await closed(peer) == TOO_FAST
            await wait_until(lambda: house.ended)
            assert house.counts() == (1, 0)
        assert house.seen == sent
        assert house.ended == [TOO_FAST]

    run(main)


def test_one_message_above_the_bytes_of_a_second(run, house):
    """It passes when nothing came for long enough; what follows has to wait for its debt."""
    house = house(max_bytes_per_second=100)

    async def main():
        async with connection(house.asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            peer.send("x" * 10_000)
            await wait_until(lambda: len(house.seen) == 1)
            assert house.counts() == (0, 0)
            peer.send("x")
            assert await closed(peer) == TOO_FAST
            assert house.counts() == (1, 0)

    run(main)


def test_each_connection_has_its_own_bucket(run, house):
    """One that sends too much takes nothing from another."""
    house = house(max_messages_per_second=2)

    async def main():
        async with connection(house.asgi, "/ws") as one, connection(house.asgi, "/ws") as other:
            assert [await peer.get_status() for peer in (one, other)] == [101, 101]
            for _ in range(10):
                one.send("one")
            assert await closed(one) == TOO_FAST
            for _ in range(2):
                other.send("other")
            await wait_until(lambda: house.seen.count("other") == 2)
            assert house.counts() == (1, 0)

    run(main)


def test_nothing_more_is_read_of_whoever_is_closed(run, house):
    """A peer that goes on flooding is not read: neither its messages nor their memory come in."""
    house = house(max_messages_per_second=3)

    async def main():
        async with connection(house.asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            for number in range(500):
                peer.send(str(number))
            assert await closed(peer) == TOO_FAST
            await settle()
            assert peer.reads <= 1 + 3 + 1 + 2  # the connect, three, the one, and a token or two
            assert house.counts() == (1, 0)
            await wait_until(lambda: house.ended)
            assert len(house.seen) <= 5

    run(main)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_messages_per_second": 40},
        {"max_bytes_per_second": 160},
        {"max_messages_per_second": 1000, "max_bytes_per_second": 160},
        {"max_messages_per_second": 40, "max_bytes_per_second": 1_000_000},
    ],
    ids=["messages", "bytes", "bytes first", "messages first"],
)
def test_slow_down_loses_nothing(run, house, limits):
    """All messages arrive, in their order, no faster than they may; those that waited count."""
    house = house(rate_exceeded="slow_down", **limits)

    async def main():
        async with connection(house.asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            sent = [f"{number:04}" for number in range(60)]  # 40 at once, and 20 in half a second
            started = anyio.current_time()
            for data in sent:
                peer.send(data)
            await wait_until(lambda: len(house.seen) == 60)
            seconds = anyio.current_time() - started
            assert house.seen == sent
            assert seconds > 0.45  # that is no speed: it may not be faster
            refused, slowed = house.counts()
            assert refused == 0
            assert 1 <= slowed <= 20
            peer.send("x" * 4)
            await wait_until(lambda: len(house.seen) == 61)
            peer.leave(4001)
            await wait_until(lambda: house.ended)
        assert house.ended[0][0] == 4001

    run(main)


def test_each_message_that_waits_is_counted_once(run, house):
    """The first passes, the next three wait: three, however often each looks again."""
    house = house(rate_exceeded="slow_down", max_messages_per_second=10, max_bytes_per_second=100)

    async def main():
        async with connection(house.asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            for size in (100, 10, 10, 10):  # all bytes of a second, and three times a tenth
                peer.send("x" * size)
            with anyio.fail_after(0.3 + MARGIN):
                await wait_until(lambda: len(house.seen) == 4)
            assert house.counts() == (0, 3)

    run(main)


def test_slow_down_holds_back_the_peer(run, house):
    """While one message waits nothing more is read, so that TCP slows down whoever sends."""
    house = house(rate_exceeded="slow_down", max_messages_per_second=1, inbox_timeout=60)

    async def main():
        async with connection(house.asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            for number in range(50):
                peer.send(str(number))
            await wait_until(lambda: house.counts() == (0, 1))
            await wait_until(lambda: house.seen)
            await settle()
            assert house.seen == ["0"]
            assert peer.reads == 3  # the connect, the first, and the one that waits
            assert house.websockets.stats().inbox_messages == 0
            peer.cancel()  # the server's own end: the peer's is behind what waits

    run(main)


def test_slow_down_for_too_long(run, house):
    """A message that would have to wait for longer than the inbox timeout is closed with 1008."""
    house = house(rate_exceeded="slow_down", max_bytes_per_second=100, inbox_timeout=0.5)

    async def main():
        async with connection(house.asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            peer.send("x" * 1000)  # a debt of nine seconds
            peer.send("x")
            with anyio.fail_after(0.5 + MARGIN):
                assert await closed(peer) == TOO_FAST
            await wait_until(lambda: house.ended)
            assert house.counts()[0] == 1
        assert house.seen == ["x" * 1000]
        assert house.ended == [TOO_FAST]

    run(main)


@pytest.mark.parametrize("end", ["view", "peer", "disconnect"])
def test_an_end_while_a_message_waits(run, app, end):
    """Whoever ends the connection meanwhile, it is over at once, and not when the wait is."""
    app.config.update(
        WEBSOCKETS_MAX_MESSAGES_PER_SECOND=0.01,
        WEBSOCKETS_RATE_EXCEEDED="slow_down",
        WEBSOCKETS_INBOX_TIMEOUT=1000,
    )
    websockets, go = WebSockets(app), threading.Event()
    websockets.identify(lambda: "ann")

    @websockets.route("/ws")
    def view(ws):
        assert ws.receive() == "one"
        if end == "view":
            assert go.wait(TIMEOUT)
            ws.close(4002)
        ws.wait_closed()

    async def main():
        async with connection(websockets.asgi_app(app), "/ws") as peer:
            peer.send("one")
            peer.send("two")
            assert await peer.get_status() == 101
            await wait_until(lambda: websockets.stats().rate_slowed == 1)
            if end == "peer":
                peer.cancel()  # the server knows that it is gone, and nothing is read
            elif end == "view":
                go.set()
                assert (await peer.get())["code"] == 4002
            else:
                assert await websockets.adisconnect(user="ann") == 1
                assert (await peer.get())["code"] == 4401
            with anyio.fail_after(MARGIN):
                await peer.returned.wait()

    run(main)


def test_a_view_sends_while_its_peers_message_waits(run, house):
    """The limit is of what comes: what goes out does not wait for it."""
    house = house(rate_exceeded="slow_down", max_messages_per_second=0.01, inbox_timeout=1000)

    @house.websockets.route("/news")
    def news(ws):
        with house.websockets.subscribe(ws, "news"):
            ws.wait_closed()

    async def main():
        async with connection(house.asgi, "/news") as peer:
            assert await peer.get_status() == 101
            peer.send("one")
            peer.send("two")
            await wait_until(lambda: house.counts() == (0, 1))
            await wait_until(lambda: house.websockets.stats().subscriptions == 1)
            for number in range(20):
                await house.websockets.apublish(str(number), "news")
                assert (await peer.get())["text"] == str(number)
            peer.cancel()

    run(main)


def test_a_routes_own_rates(run, house):
    """A route may have its own rates and its own policy; others have the application's."""
    house = house(max_messages_per_second=2)
    house.route("/patient", rate_exceeded="slow_down", max_messages_per_second=20)
    house.route("/free", max_messages_per_second=1_000_000)

    async def main():
        async with (
            connection(house.asgi, "/ws") as strict,
            connection(house.asgi, "/patient") as patient,
            connection(house.asgi, "/free") as free,
        ):
            peers = {"strict": strict, "patient": patient, "free": free}
            for peer in peers.values():
                assert await peer.get_status() == 101
            for (name, peer), _ in itertools.product(peers.items(), range(25)):
                peer.send(name)
            assert await closed(strict) == TOO_FAST
            await wait_until(lambda: house.seen.count("free") == 25)
            await wait_until(lambda: house.seen.count("patient") == 25)
            refused, slowed = house.counts()
            assert (refused, slowed > 0) == (1, True)

    run(main)


def test_by_default_there_is_no_rate(run, house):
    """Ten thousand messages as fast as they come, and nobody minds."""
    house = house()

    async def main():
        async with connection(house.asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            for _ in range(10):
                for _ in range(1000):
                    peer.send("x")
                await wait_until(lambda: peer._from_peer.statistics().current_buffer_used == 0)
            await wait_until(lambda: len(house.seen) == 10_000)
            assert house.counts() == (0, 0)

    run(main)


def test_a_wait_is_never_none():
    """A loop whose clock is large still goes on: a wait that is lost in rounding would not end."""
    bucket = TokenBucket(1e12, 1e9)
    assert bucket.wait(1e12, 1e9) == 0.0
    seconds = bucket.wait(1, 1e9)
    assert seconds >= math.ulp(1e9)
    assert 1e9 + seconds > 1e9
