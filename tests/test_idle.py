"""What a connection holds while nothing happens, and what is left of it: as little as can be."""

from __future__ import annotations

import asyncio
import gc
import weakref

import anyio
import pytest

from flask_websockets import WebSockets
from flask_websockets.bridge import Alarm, Door, Flag, Link
from flask_websockets.bridge.stream import Stream
from flask_websockets.config import Config
from flask_websockets.connection import Connection
from flask_websockets.counters import Counters

from .asgi_driver import TIMEOUT, connection, wait_until


class TestFlag:
    """An event, of which no more is made than it is used for."""

    def test_many_wait(self, run):
        """All that wait go on, as does who comes later."""

        async def main():
            flag, passed = Flag(), []

            async def wait():
                await flag.wait()
                passed.append(1)

            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                assert not flag.is_set()
                flag.set()
                flag.set()
            await wait()
            assert flag.is_set()
            assert len(passed) == 4

        run(main)

    def test_what_is_called(self, run):
        """A function is called once when it is set, and at once if it is."""

        async def main():
            flag, calls = Flag(), []
            flag.then(lambda: calls.append("then"))
            assert calls == []
            flag.set()
            flag.set()
            flag.then(lambda: calls.append("now"))
            assert calls == ["then", "now"]

        run(main)


async def later(seconds):
    """Wait for an alarm that rings after every one that was set before for no more seconds."""
    rung = anyio.Event()
    Alarm().set(seconds, rung.set)
    with anyio.fail_after(TIMEOUT):
        await rung.wait()


class TestAlarm:
    """One call that comes later."""

    def test_it_rings(self, run):
        """What is called is what was set last, and once."""

        async def main():
            alarm, calls, over = Alarm(), [], anyio.Event()
            alarm.set(0.001, lambda: calls.append("first"))
            alarm.set(0.01, lambda: (calls.append("second"), over.set()))
            with anyio.fail_after(TIMEOUT):
                await over.wait()
            await later(0.01)
            assert calls == ["second"]

        run(main)

    def test_it_is_taken_back(self, run):
        """After cancel nothing is called, however late that comes."""

        async def main():
            alarm, calls = Alarm(), []
            alarm.set(0, lambda: calls.append(1))
            alarm.cancel()
            alarm.set(0.001, lambda: calls.append(2))
            await anyio.wait_all_tasks_blocked()
            alarm.cancel()
            alarm.cancel()
            await later(0.01)
            assert calls == []

        run(main)

    def test_it_may_be_set_anew_from_its_call(self, run):
        """The call of one may be the start of the next."""

        async def main():
            alarm, over = Alarm(), anyio.Event()
            alarm.set(0, lambda: alarm.set(0, over.set))
            with anyio.fail_after(TIMEOUT):
                await over.wait()

        run(main)


@pytest.mark.parametrize("max_age", [None, 600.0])
def test_an_accept_that_fails_where_it_is_sent(run, max_age):
    """The goodbye keeps its time: a server that never tells of the end is not waited for."""

    async def main():
        link = Link(Door(1), Config())
        link.entry.max_age = max_age
        connection = Connection(link, Counters(), None, None, anyio.Semaphore(1))
        link.ending.then(connection._await_goodbye)
        link.settled.then(connection._settle)
        link.fail(0.01)
        link.settled.set()
        with anyio.fail_after(TIMEOUT):
            await link.over.wait()

    run(main)


def test_a_stream(run):
    """It gives in order what was put, whether or not it was made, and is closed once for all."""

    async def main():
        stream = Stream()
        assert stream.statistics().current_buffer_used == 0
        with pytest.raises(anyio.WouldBlock):
            stream.take()
        for number in range(3):
            stream.put(number)
        assert stream.statistics().current_buffer_used == 3
        assert [stream.take() for _ in range(3)] == [0, 1, 2]
        with pytest.raises(anyio.WouldBlock):
            stream.take()
        for closed in (stream, Stream()):
            closed.close()
            closed.close()
            with pytest.raises(anyio.ClosedResourceError):
                closed.put(3)
            with pytest.raises(anyio.ClosedResourceError):
                closed.take()

    run(main)


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_an_idle_connection_has_one_task(app, kind):
    """The one in which the server called, and the async view's own; no writer, no stream."""
    websockets, links = WebSockets(app), []
    asgi = websockets.asgi_app(app)

    @websockets.route("/plain")
    def plain(ws):
        links.append(ws.link)
        ws.send("ready")
        ws.receive()

    @websockets.route("/async")
    async def coroutine(ws):
        links.append(ws.link)
        await ws.send("ready")
        await ws.receive()

    async def main():
        before = asyncio.all_tasks()
        async with connection(asgi, f"/{kind}") as peer:
            assert await peer.get_status() == 101
            assert (await peer.get())["text"] == "ready"
            # One is the test's, which stands for the server and calls the application.
            tasks = 1 if kind == "plain" else 2
            await wait_until(lambda: len(asyncio.all_tasks() - before) == tasks)
            assert not links[0]._is_writing
            assert links[0]._inbound._inlet is None

    anyio.run(main)


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_connection_leaves_no_circle(run, app, kind):
    """What it was made of is gone when it is over, without the collector's help."""
    websockets, left = WebSockets(app), []
    asgi = websockets.asgi_app(app)

    @websockets.route("/plain")
    def plain(ws):
        left.append(weakref.ref(ws))
        for data in ws.iter_data():
            ws.send(data)

    @websockets.route("/async")
    async def coroutine(ws):
        left.append(weakref.ref(ws))
        async for data in ws.iter_data():
            await ws.send(data)

    async def main():
        async with connection(asgi, f"/{kind}") as peer:
            assert await peer.get_status() == 101
            peer.send("a")
            assert (await peer.get())["text"] == "a"
            left.extend(map(weakref.ref, websockets._runtime.connections))
            assert len(left) == 2
        await wait_until(lambda: [each() for each in left] == [None, None])

    gc.collect()
    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()
