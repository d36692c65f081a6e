"""``drain``, ``adrain`` and the signal ``draining``: who is told what, when, and what is logged."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise

import anyio
import anyio.to_thread
import pytest
from flask import Flask, current_app

import flask_websockets
from flask_websockets import ConnectionClosed, WebSockets, WrongThread, draining
from flask_websockets.config import Config
from flask_websockets.runtime import Runtime

from .asgi_driver import TIMEOUT, connection, wait_until

#: Seconds beyond a promised time.
MARGIN = 2.0

GOODBYE = (1012, "the server stops")

#: Connections in one batch, and the seconds between two.
BATCH, APART = 100, 0.1


@pytest.fixture
def asgi(websockets):
    return websockets.asgi_app()


@pytest.fixture
def release():
    """What a view that is busy waits for."""
    event = threading.Event()
    yield event
    event.set()


async def closed(peer):
    """How the application closed the connection; that has to be what comes next."""
    message = await peer.get()
    assert message["type"] == "websocket.close", message
    return message["code"], message["reason"]


async def status_of_a_handshake(asgi, path="/ws"):
    async with connection(asgi, path) as peer:
        return await peer.get_status()


@asynccontextmanager
async def running(drain, *arguments):
    """Run a drain beside the block, which does not end before it."""
    with anyio.fail_after(TIMEOUT + MARGIN):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drain, *arguments)
            yield


async def drained(websockets):
    """Wait until the drain is under way, as far as anybody outside can see it."""
    await wait_until(lambda: websockets._runtime.draining)


def in_a_thread(websockets):
    """The blocking twin of ``adrain``, awaited."""

    async def drain(timeout=None):
        await anyio.to_thread.run_sync(websockets.drain, timeout)

    return drain


@pytest.fixture(params=["drain", "adrain"])
def drain(request, websockets):
    """Both ways to drain."""
    return websockets.adrain if request.param == "adrain" else in_a_thread(websockets)


# -- handshakes -----------------------------------------------------------------------------------


def test_handshakes_are_refused_from_the_first_moment(run, app, release):
    """503 with Retry-After: for those who come, and who wait for a place or for their view."""
    app.config["WEBSOCKETS_MAX_HANDSHAKES"] = 1
    websockets = WebSockets(app)
    asgi = websockets.asgi_app()
    inside, told, seen = threading.Event(), threading.Event(), []

    @websockets.route("/ws")
    def view(ws):
        inside.set()
        assert release.wait(TIMEOUT)
        with pytest.raises(ConnectionClosed) as caught:
            ws.accept()
        seen.append(caught.value.reason)

    def before_anybody_is_told(sender, **_):
        told.set()
        release.wait(TIMEOUT)

    async def main():
        async with (
            connection(asgi, "/ws") as under_way,
            connection(asgi, "/ws") as queued,
        ):
            await wait_until(inside.is_set)
            assert websockets.stats().view_threads == 1  # the other has no place yet
            async with running(websockets.adrain, 40):
                await wait_until(told.is_set)  # the receiver hangs for up to ten seconds
                async with connection(asgi, "/ws") as late:
                    message = await late.get()
                    assert message["status"] == 503
                    assert int(dict(message["headers"])[b"retry-after"]) > 0
                for peer in (queued, under_way):
                    message = await peer.get()
                    assert message["status"] == 503
                    assert int(dict(message["headers"])[b"retry-after"]) > 0
                assert not release.is_set()
                assert websockets.stats().view_threads == 1, "the refused take no thread"
                release.set()
        assert websockets.stats().refused_draining == 3
        assert websockets.stats().refused_full == 0

    with draining.connected_to(before_anybody_is_told, app):
        run(main)
    assert seen == ["the server stops"]


# -- views that wait ------------------------------------------------------------------------------


def receive(ws):
    ws.receive()


def receive_with_timeout(ws):
    while True:
        ws.receive(timeout=60)


def iterate(ws):
    for _ in ws.iter_data():
        pass
    ws.receive()


def wait_closed(ws):
    assert ws.wait_closed()
    ws.receive()


def wait_closed_with_timeout(ws):
    assert ws.wait_closed(timeout=60)
    ws.receive()


async def areceive(ws):
    await ws.receive()


async def areceive_with_timeout(ws):
    while True:
        await ws.receive(timeout=60)


async def aiterate(ws):
    async for _ in ws.iter_data():
        pass
    await ws.receive()


async def await_closed(ws):
    assert await ws.wait_closed()
    await ws.receive()


async def await_closed_with_timeout(ws):
    assert await ws.wait_closed(timeout=60)
    await ws.receive()


WAITS = [receive, receive_with_timeout, iterate, wait_closed, wait_closed_with_timeout]
AWAITS = [areceive, areceive_with_timeout, aiterate, await_closed, await_closed_with_timeout]


def route_waits(websockets, seen):
    """One route for each kind of wait; *seen* gets the code and reason that each view gets."""

    def route(wait):
        @websockets.route(f"/{wait.__name__}", endpoint=wait.__name__)
        def view(ws):
            ws.accept()
            try:
                wait(ws)
            except ConnectionClosed as error:
                seen.append((error.code, error.reason))

    def aroute(wait):
        @websockets.route(f"/{wait.__name__}", endpoint=wait.__name__)
        async def view(ws):
            await ws.accept()
            try:
                await wait(ws)
            except ConnectionClosed as error:
                seen.append((error.code, error.reason))

    for wait in WAITS:
        route(wait)
    for wait in AWAITS:
        aroute(wait)
    return [f"/{wait.__name__}" for wait in (*WAITS, *AWAITS)]


def test_views_that_wait_are_closed_at_once(run, websockets, asgi, drain):
    """Whatever they wait for: 1012, the same for the view, and the drain ends with the last."""
    seen = []
    paths = route_waits(websockets, seen)

    async def main():
        async with AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(connection(asgi, path)) for path in paths]
            for peer in peers:
                assert await peer.get_status() == 101
            await anyio.sleep(0.05)  # so that most wait already; the others are about to
            # Those that are not told at once would be told after ten minutes.
            with anyio.fail_after(TIMEOUT):
                async with running(drain, 1200):
                    for peer in peers:
                        assert await closed(peer) == GOODBYE
            assert websockets.stats().connections == 0

    run(main)
    assert seen == [GOODBYE] * len(paths)


# -- views that are busy --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_busy_view_may_finish(run, websockets, asgi, drain, release, kind):
    """It gets what was received before the drain, and nothing after; its replies arrive."""
    inside, got, ends = threading.Event(), [], []

    @websockets.route("/plain")
    def plain(ws):
        try:
            while True:
                data = ws.receive()
                got.append(data)
                inside.set()
                release.wait(TIMEOUT)
                ws.send(f"re: {data}")
        except ConnectionClosed as error:
            ends.append((error.code, error.reason))

    @websockets.route("/async")
    async def async_(ws):
        try:
            while True:
                data = await ws.receive()
                got.append(data)
                inside.set()
                await wait_until(release.is_set)
                await ws.send(f"re: {data}")
        except ConnectionClosed as error:
            ends.append((error.code, error.reason))

    @websockets.route("/idle")
    def idle(ws):
        ws.accept()
        ws.receive()

    async def main():
        async with connection(asgi, f"/{kind}") as peer, connection(asgi, "/idle") as witness:
            assert await peer.get_status() == await witness.get_status() == 101
            for word in ("one", "two", "three"):
                peer.send(word)
            await wait_until(inside.is_set)
            await wait_until(lambda: peer.reads == 5)  # all three are in its inbox
            async with running(drain, 60):
                assert await closed(witness) == GOODBYE
                await anyio.sleep(0.05)  # they are of one batch
                peer.send("too late")
                await wait_until(lambda: peer.reads == 6)
                release.set()
                for word in ("one", "two", "three"):
                    assert await peer.get() == {"type": "websocket.send", "text": f"re: {word}"}
                assert await closed(peer) == GOODBYE
            assert websockets.stats().connections == 0

    run(main)
    assert got == ["one", "two", "three"]
    assert ends == [GOODBYE]


def wait_in_vain(ws):
    assert ws.receive(timeout=0.01) is None


def wait_in_vain_for_the_end(ws):
    assert not ws.wait_closed(timeout=0.01)


async def await_in_vain(ws):
    assert await ws.receive(timeout=0.01) is None


async def await_in_vain_for_the_end(ws):
    assert not await ws.wait_closed(timeout=0.01)


VAIN = [wait_in_vain, wait_in_vain_for_the_end, await_in_vain, await_in_vain_for_the_end]


@pytest.mark.parametrize("before", VAIN)
def test_a_wait_that_is_over_is_none(run, websockets, asgi, release, before):
    """A view whose timeout has passed is busy until it waits again: what it sends arrives."""
    inside = threading.Event()

    @websockets.route("/plain")
    def plain(ws):
        before(ws)
        inside.set()
        release.wait(TIMEOUT)
        ws.send("done")
        ws.receive()

    @websockets.route("/async")
    async def async_(ws):
        await before(ws)
        inside.set()
        await wait_until(release.is_set)
        await ws.send("done")
        await ws.receive()

    @websockets.route("/idle")
    def idle(ws):
        ws.accept()
        ws.receive()

    async def main():
        path = "/async" if before.__name__.startswith("await") else "/plain"
        async with connection(asgi, path) as peer, connection(asgi, "/idle") as witness:
            assert await peer.get_status() == await witness.get_status() == 101
            await wait_until(inside.is_set)
            async with running(websockets.adrain, 60):
                assert await closed(witness) == GOODBYE
                await anyio.sleep(0.05)  # they are of one batch
                release.set()
                assert await peer.get() == {"type": "websocket.send", "text": "done"}
                assert await closed(peer) == GOODBYE

    run(main)


@pytest.mark.parametrize("last", [*WAITS, *AWAITS], ids=lambda wait: wait.__name__)
def test_the_next_wait_ends_a_busy_view(run, websockets, asgi, release, last):
    """Whatever it waits for, and at once."""
    seen, inside = [], threading.Event()

    @websockets.route("/plain")
    def plain(ws):
        ws.accept()
        inside.set()
        release.wait(TIMEOUT)
        try:
            last(ws)
        except ConnectionClosed as error:
            seen.append((error.code, error.reason))

    @websockets.route("/async")
    async def async_(ws):
        await ws.accept()
        inside.set()
        await wait_until(release.is_set)
        try:
            await last(ws)
        except ConnectionClosed as error:
            seen.append((error.code, error.reason))

    @websockets.route("/idle")
    def idle(ws):
        ws.accept()
        ws.receive()

    async def main():
        path = "/async" if last in AWAITS else "/plain"
        async with connection(asgi, path) as peer, connection(asgi, "/idle") as witness:
            assert await peer.get_status() == await witness.get_status() == 101
            await wait_until(inside.is_set)
            async with running(websockets.adrain, 60):
                assert await closed(witness) == GOODBYE
                await anyio.sleep(0.05)  # they are of one batch
                release.set()
                assert await closed(peer) == GOODBYE

    run(main)
    assert seen == [GOODBYE]


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_busy_view_is_not_closed_before_half_the_time(run, websockets, asgi, release, kind):
    """One that never waits hears it at half the timeout, in its send; till then it may send."""
    ends, timeout = [], 1.6

    @websockets.route("/plain")
    def plain(ws):
        try:
            while not release.wait(0.01):
                ws.send("tick")
        except ConnectionClosed as error:
            ends.append((error.code, error.reason))

    @websockets.route("/async")
    async def async_(ws):
        try:
            while not release.is_set():
                await ws.send("tick")
                await anyio.sleep(0.01)
        except ConnectionClosed as error:
            ends.append((error.code, error.reason))

    async def main():
        async with connection(asgi, f"/{kind}") as peer:
            assert await peer.get_status() == 101
            assert (await peer.get())["text"] == "tick"
            started = time.monotonic()
            async with running(websockets.adrain, timeout):
                while (message := await peer.get())["type"] == "websocket.send":
                    pass
                told = time.monotonic() - started
            assert (message["type"], message["code"]) == ("websocket.close", 1012)
            assert timeout / 2 - 0.1 <= told <= timeout / 2 + MARGIN

    run(main)
    assert ends == [GOODBYE]


def test_what_is_left_at_the_end_is_cut(run, app, release):
    """A view that stays, and a peer that takes nothing: over at the timeout."""
    app.config.update(WEBSOCKETS_CLOSE_TIMEOUT=60, WEBSOCKETS_SEND_TIMEOUT=60)
    websockets = WebSockets(app)
    asgi = websockets.asgi_app()

    @websockets.route("/stays")
    def stays(ws):
        ws.accept()
        release.wait(TIMEOUT)

    @websockets.route("/deaf")
    def deaf(ws):
        ws.send("x")
        ws.receive()

    async def main():
        async with (
            connection(asgi, "/stays") as staying,
            connection(asgi, "/deaf", socket_messages=0) as silent,
        ):
            assert await staying.get_status() == await silent.get_status() == 101
            started = time.monotonic()
            with anyio.fail_after(0.6 + MARGIN):
                await websockets.adrain(0.6)
                assert time.monotonic() - started >= 0.5
                await staying.returned.wait()
                await silent.returned.wait()
        assert websockets.stats().connections == 0
        assert websockets.stats().stuck_views == 1

    run(main)


# -- batches --------------------------------------------------------------------------------------


class Fakes:
    """Connections of nothing but their scope, and the moment at which each was closed."""

    def __init__(self, asgi):
        self.asgi = asgi
        self.accepted = 0
        self.told = []  # (seconds, number)

    async def open(self, tasks, count):
        for number in range(count):
            tasks.start_soon(self._run, number)
        await wait_until(lambda: self.accepted == count)

    async def _run(self, number):
        events = [{"type": "websocket.connect"}]

        async def receive():
            if events:
                return events.pop()
            return await anyio.sleep(math.inf)

        async def send(message):
            if message["type"] == "websocket.accept":
                self.accepted += 1
            else:
                assert (message["type"], message["code"]) == ("websocket.close", 1012), message
                self.told.append((time.monotonic(), number))

        scope = {"type": "websocket", "path": "/ws", "headers": [(b"host", b"localhost")]}
        await self.asgi(scope, receive, send)


@pytest.mark.parametrize(("count", "timeout"), [(400, 20), (300, 4)])
def test_everybody_is_told_by_half_the_time(run, websockets, asgi, count, timeout):
    """In batches, not all at once; and the drain ends as soon as all are gone."""

    @websockets.route("/ws")
    async def view(ws):
        await ws.receive()

    async def main():
        fakes = Fakes(asgi)
        async with anyio.create_task_group() as tasks:
            await fakes.open(tasks, count)
            started = time.monotonic()
            await websockets.adrain(timeout)
            over = time.monotonic() - started
        assert sorted(number for _, number in fakes.told) == list(range(count))
        seconds = [moment - started for moment, _ in fakes.told]
        assert seconds[-1] <= timeout / 2 + 1
        assert seconds[-1] - seconds[0] >= 0.1
        assert over - seconds[-1] <= MARGIN

    run(main)


class Clock:
    """anyio, as the runtime has it, with a time that passes only where it sleeps."""

    def __init__(self):
        self.now = 1000.0

    def __getattr__(self, name):
        return getattr(anyio, name)

    def current_time(self):
        return self.now

    async def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds


class InOrder(dict):
    """A set that keeps the order of what is in it."""

    def discard(self, member):
        self.pop(member, None)


class Leaving:
    """A connection that is gone as soon as it is told to leave."""

    def __init__(self, number, runtime, told, clock):
        self.link = self
        self.settled = anyio.Event()
        self.settled.set()
        self._leave = lambda: (runtime.connections.discard(self), told.append((clock.now, number)))

    def let_finish(self, code, reason, refusal):
        assert (code, reason) == GOODBYE
        self._leave()


@pytest.mark.parametrize("timeout", [20, 1, 0.4])
def test_the_batches(run, monkeypatch, timeout):
    """About 100 each 0.1 s, more only where half the timeout asks for it; in random order."""
    count, told, clock = 1000, [], Clock()
    monkeypatch.setattr("flask_websockets.runtime.anyio", clock)

    async def main():
        runtime = Runtime(Config())
        leaving = [Leaving(number, runtime, told, clock) for number in range(count)]
        runtime.connections = InOrder.fromkeys(leaving)
        await runtime.drain(timeout)
        runtime.door.close()

    run(main)
    assert sorted(number for _, number in told) == list(range(count))
    # In order, or backwards, each would follow its neighbour.
    assert sum(abs(a - b) < 10 for (_, a), (_, b) in pairwise(told)) < count / 10
    batches = Counter(moment - 1000 for moment, _ in told)
    moments = sorted(batches)
    assert moments[0] == 0
    assert moments[-1] <= timeout / 2
    needed = max(BATCH, count * APART / (timeout / 2))
    # Where the jitter has cost time, the last ones are more.
    assert max(batches.values()) <= (BATCH if timeout == 20 else needed * 2)
    gaps = [b - a for a, b in pairwise(moments)]
    if timeout == 20:
        assert all(APART / 2 <= gap <= APART * 1.5 for gap in gaps)
        assert len({round(gap, 6) for gap in gaps}) > 1, "they are jittered"
    assert len(batches) >= count / needed / 2


# -- who may call it, and when --------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, -1, -0.5, math.nan, math.inf])
def test_a_timeout_that_cannot_be(run, websockets, asgi, timeout):
    """ValueError with the value in it, whether a server runs or not; nobody is drained."""

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        ws.receive()

    with pytest.raises(ValueError, match=str(timeout)):
        websockets.drain(timeout)

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            for drain in (websockets.adrain, in_a_thread(websockets)):
                with pytest.raises(ValueError, match=str(timeout)):
                    await drain(timeout)
            assert await status_of_a_handshake(asgi) == 101

    run(main)


def test_the_default_timeout_is_the_setting(run, app, release):
    """WEBSOCKETS_DRAIN_TIMEOUT, where none is given."""
    app.config["WEBSOCKETS_DRAIN_TIMEOUT"] = 0.5
    websockets = WebSockets(app)
    asgi = websockets.asgi_app()

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        release.wait(TIMEOUT)

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            started = time.monotonic()
            await websockets.adrain()
            assert 0.4 <= time.monotonic() - started <= 0.5 + MARGIN

    run(main)


def test_before_a_server_has_started_nothing_happens(run, websockets, asgi):
    """No wait, no signal, and whoever starts later serves as ever."""
    calls = []

    @websockets.route("/ws")
    def view(ws):
        ws.accept()

    def receiver(sender, **_):
        calls.append(sender)

    async def main():
        await websockets.adrain(60)
        assert await status_of_a_handshake(asgi) == 101

    with draining.connected_to(receiver):
        websockets.drain(60)
        run(main)
    assert calls == []


def test_after_the_stop_nothing_happens(run, websockets, asgi):
    """Both twins return at once; and a server that starts anew lets everybody in."""

    @websockets.route("/ws")
    def view(ws):
        ws.accept()

    async def main():
        assert await status_of_a_handshake(asgi) == 101
        await websockets._stop()
        await websockets.adrain(60)
        await anyio.to_thread.run_sync(websockets.drain, 60)

    run(main)
    websockets.drain(60)
    run(lambda: status_of_a_handshake(asgi))


def test_it_stays_drained_until_a_server_starts_anew(run, websockets, asgi, drain):
    """Handshakes get 503 for as long as this one runs, also after a second drain; HTTP is served.

    The next server of the same object takes connections.
    """

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        ws.receive()

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            async with running(drain, 60):
                assert await closed(peer) == GOODBYE
        for _ in range(2):
            assert await status_of_a_handshake(asgi) == 503
            await drain(60)
        assert websockets.stats().refused_draining == 2
        await websockets._stop()

    async def anew():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            peer.send("here")

    run(main)
    run(anew)


def test_two_threads_drain_at_the_same_time(run, app, websockets, asgi):
    """Both return when it is over; everybody is told once, and so are the receivers."""
    calls, over = [], []

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        ws.receive()

    def receiver(sender, **_):
        calls.append(sender)

    async def drain():
        await in_a_thread(websockets)(60)
        over.append(websockets.stats().connections)

    async def main():
        async with AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(connection(asgi, "/ws")) for _ in range(5)]
            for peer in peers:
                assert await peer.get_status() == 101
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(drain)
                for peer in peers:
                    assert await closed(peer) == GOODBYE
            for peer in peers:
                await peer.returned.wait()
                with pytest.raises(anyio.EndOfStream):
                    await peer.get()

    with draining.connected_to(receiver, app):
        run(main)
    assert over == [0, 0, 0]
    assert calls == [app]


def test_a_second_drain_has_its_own_time(run, websockets, asgi, release):
    """With less patience than the first it is over at its own timeout, as SIGTERM's must be."""

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        release.wait(TIMEOUT)

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            async with running(websockets.adrain, 60):
                await drained(websockets)
                with anyio.fail_after(0.5 + MARGIN):
                    await websockets.adrain(0.5)
                release.set()

    run(main)


def test_drain_on_the_loop_raises(run, websockets, asgi):
    """It would wait for itself; the error says what to await instead."""

    @websockets.route("/ws")
    async def view(ws):
        with pytest.raises(WrongThread, match="adrain"):
            websockets.drain(1)
        await ws.send("open still")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert (await peer.get())["text"] == "open still"
        with pytest.raises(WrongThread, match="adrain"):
            websockets.drain(1)

    run(main)


def test_adrain_on_another_loop_raises(run, websockets, asgi):
    """It would touch the connections from a thread that is not theirs."""

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        ws.receive()

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            with pytest.raises(WrongThread, match="drain"):
                await anyio.to_thread.run_sync(anyio.run, websockets.adrain, 1)

    run(main)


def test_from_a_view_it_is_over_in_time(run, websockets, asgi):
    """The view is what it waits for, so it ends at its timeout, and the view then goes on."""
    seen = []

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        started = time.monotonic()
        websockets.drain(0.6)
        seen.append(time.monotonic() - started)
        with pytest.raises(ConnectionClosed):
            ws.receive()

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            assert await closed(peer) == GOODBYE
            await wait_until(lambda: seen)

    run(main)
    assert 0.5 <= seen[0] <= 0.6 + MARGIN


def test_the_test_client_can_be_drained(websockets, client):
    """A test of an application sees what its clients would; the next connection is a new server."""

    @websockets.route("/ws")
    def view(ws):
        ws.send("ready")
        ws.receive()

    for _ in range(2):
        with client.websocket_connect("/ws") as ws:
            assert ws.receive() == "ready"
            websockets.drain(5)
            with pytest.raises(ConnectionClosed) as caught:
                ws.receive()
            assert (caught.value.code, caught.value.reason) == GOODBYE


# -- what did not end is in the log ---------------------------------------------------------------


def reports(caplog):
    """What was logged about views that did not return."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "flask_websockets" and record.levelname == "WARNING"
    ]


def test_stuck_views_are_logged_with_their_stacks(run, websockets, asgi, release, caplog):
    """Once each, by endpoint; those that stand at the same place in one line with their number."""

    @websockets.route("/sleepers/<int:number>")
    def sleepers(ws, number):
        ws.accept()
        release.wait(TIMEOUT)  # here the sleepers stand

    @websockets.route("/other")
    def other(ws):
        ws.accept()
        while not release.is_set():
            time.sleep(0.01)  # here the other stands

    @websockets.route("/swallow")
    async def swallow(ws):
        await ws.accept()
        while not release.is_set():
            try:
                await anyio.sleep(60)  # here the async view stands
            except BaseException:
                await anyio.sleep(0)  # trio cancels as often as something is awaited
                raise

    @websockets.route("/fine")
    def fine(ws):
        ws.accept()
        ws.receive()

    paths = ["/sleepers/1", "/sleepers/2", "/sleepers/3", "/other", "/fine", "/swallow"]

    async def main():
        async with AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(connection(asgi, path)) for path in paths]
            for peer in peers:
                assert await peer.get_status() == 101
            await websockets.adrain(0.4)
            for peer in peers:
                await peer.returned.wait()
            await websockets.adrain(0.4)  # nobody is reported twice
            release.set()
            await wait_until(lambda: not websockets.stats().view_threads)

    run(main)
    found = reports(caplog)
    assert len(found) == 2, found
    [first] = [text for text in found if "sleepers" in text.splitlines()[0]]
    [second] = [text for text in found if "other" in text.splitlines()[0]]
    assert "3" in first.splitlines()[0]
    assert "here the sleepers stand" in first
    assert "here the other stands" not in first
    assert "here the other stands" in second
    for text in found:
        assert __file__ in text
        assert "fine" not in text
    assert websockets.stats().stuck_views == 4


def test_a_stuck_async_view_is_logged_with_its_stack(run, websockets, asgi, release, caplog):
    """One that is cancelled and goes on: the stack shows what it awaits."""

    @websockets.route("/ws")
    async def swallow(ws):
        await ws.accept()
        with anyio.CancelScope(shield=True):
            while not release.is_set():
                try:
                    await anyio.sleep(0.05)  # here the async view stands
                except BaseException:
                    pass

    async def main():
        async with connection(asgi, "/ws") as peer, connection(asgi, "/ws") as other:
            assert await peer.get_status() == await other.get_status() == 101
            await websockets.adrain(0.4)
            await peer.returned.wait()
            await other.returned.wait()
            release.set()
            await wait_until(lambda: not websockets.stats().view_tasks)

    run(main)
    text = "\n".join(reports(caplog))
    assert text.count("swallow") >= 1
    assert "here the async view stands" in text
    assert __file__ in text
    assert websockets.stats().stuck_views == 2


def test_no_payload_and_no_query_is_logged(run, websockets, asgi, release, caplog):
    """The stack has lines of code, never what is in the variables, and the path no query."""

    @websockets.route("/ws")
    def view(ws):
        secret = ws.receive()
        release.wait(TIMEOUT)
        return str(secret)

    async def main():
        async with connection(asgi, "/ws", query_string=b"token=hush") as peer:
            peer.send("a secret word")
            assert await peer.get_status() == 101
            await wait_until(lambda: websockets.stats().inbox_messages == 0)
            await websockets.adrain(0.2)
            await peer.returned.wait()
            release.set()

    run(main)
    assert reports(caplog)
    assert "a secret word" not in caplog.text
    assert "hush" not in caplog.text


# -- the signal -----------------------------------------------------------------------------------


def test_the_signal_is_exported():
    """As a name of the package."""
    assert "draining" in flask_websockets.__all__


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_receiver_may_say_goodbye(run, app, websockets, asgi, drain, kind):
    """In an application context, on no loop; what it publishes comes before everybody's 1012."""
    seen = []

    @websockets.route("/plain")
    def plain(ws):
        with websockets.subscribe(ws, "everybody"):
            ws.send("ready")
            ws.receive()

    @websockets.route("/async")
    async def async_(ws):
        async with websockets.subscribe(ws, "everybody"):
            await ws.send("ready")
            await ws.receive()

    @draining.connect_via(app)
    def goodbye(sender, **extra):
        seen.append((sender, current_app._get_current_object(), threading.current_thread()))
        for number in range(3):
            websockets.publish(f"goodbye {number}", "everybody")

    async def main():
        async with AsyncExitStack() as stack:
            peers = [
                await stack.enter_async_context(connection(asgi, f"/{kind}")) for _ in range(20)
            ]
            for peer in peers:
                assert await peer.get_status() == 101
                assert (await peer.get())["text"] == "ready"
            async with running(drain, 60):
                for peer in peers:
                    for number in range(3):
                        assert (await peer.get())["text"] == f"goodbye {number}"
                    assert await closed(peer) == GOODBYE

    run(main)
    [(sender, current, thread)] = seen
    assert sender is current is app
    assert thread is not threading.main_thread()


def test_a_receiver_that_raises_is_logged(run, app, websockets, asgi, caplog):
    """With its traceback; the other receivers are called, and everybody is told."""
    calls = []

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        ws.receive()

    def broken(sender, **_):
        calls.append("broken")
        raise LookupError("the receiver's own fault")

    def second(sender, **_):
        calls.append("second")
        raise LookupError("the second one's fault")

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            async with running(websockets.adrain, 60):
                assert await closed(peer) == GOODBYE

    with draining.connected_to(broken, app), draining.connected_to(second, app):
        run(main)
    assert sorted(calls) == ["broken", "second"]
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert errors and all(record.exc_info for record in errors)
    assert caplog.text.count("LookupError: the receiver's own fault") == 1
    assert caplog.text.count("LookupError: the second one's fault") == 1


def test_a_receiver_that_hangs_delays_by_a_quarter(run, app, websockets, asgi, release):
    """Then everybody is told all the same, and the drain ends in time."""
    timeout = 6.0

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        ws.receive()

    def hangs(sender, **_):
        release.wait(TIMEOUT)

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            started = time.monotonic()
            async with running(websockets.adrain, timeout):
                assert await closed(peer) == GOODBYE
                told = time.monotonic() - started
            assert timeout / 4 - 0.1 <= told <= timeout / 4 + MARGIN
            assert time.monotonic() - started <= timeout + MARGIN
            assert not release.is_set()

    with draining.connected_to(hangs, app):
        run(main)


def test_every_application_of_an_object_hears_it(run, app, websockets):
    """One call for each, in its own context; those of other objects hear nothing."""
    second, stranger = Flask("second"), Flask("stranger")
    websockets.init_app(second)
    WebSockets(stranger)
    asgi, calls = websockets.asgi_app(app), []

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        ws.receive()

    def receiver(sender, **_):
        calls.append((sender.name, current_app.name))

    async def main():
        async with connection(asgi, "/ws") as peer:
            assert await peer.get_status() == 101
            async with running(websockets.adrain, 60):
                assert await closed(peer) == GOODBYE

    with draining.connected_to(receiver):
        run(main)
    assert sorted(calls) == [("second", "second"), ("tests", "tests")]
