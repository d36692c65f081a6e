"""A whole response is given to uvicorn where it arrives; in every other case its task sends it."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
from flask import Flask
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from flask_websockets import WebSockets

from .test_servers_uvicorn import GET, Transport, finish

KINDS = [H11Protocol, HttpToolsProtocol]
TIMEOUT = 10.0


class Served:
    """One Flask application behind a protocol of uvicorn's, without a socket."""

    def __init__(self, kind, monkeypatch, body=b"hello", middleware=None, **settings):
        app = Flask(__name__)
        app.config.update(settings)
        self.websockets = WebSockets(app)
        self.go = threading.Event()
        self.tasks = []  # in which send was called; None outside of any
        self.fails = None
        self._kind = kind

        @app.get("/")
        def view():
            assert self.go.wait(TIMEOUT)
            return body

        served = self
        asgi = self.websockets.asgi_app(app)
        self.app = middleware(asgi) if middleware else asgi

        async def send(cycle, message, _send=self._cycle.send):
            try:
                served.tasks.append(asyncio.current_task())
            except RuntimeError:
                served.tasks.append(None)
            error, served.fails = served.fails, None
            if error is not None:
                raise error
            await _send(cycle, message)

        monkeypatch.setattr(self._cycle, "send", send)

    @property
    def _cycle(self):
        return __import__(self._kind.__module__, fromlist=["x"]).RequestResponseCycle

    async def ask(self, head=GET):
        config = Config(self.app, lifespan="off", log_config=None)
        config.load()
        self.protocol = self._kind(config=config, server_state=ServerState(), app_state={})
        self.transport = Transport()
        self.transport.lost = False
        self.protocol.connection_made(self.transport)
        self.protocol.data_received(head)
        await asyncio.sleep(0)  # the task begins, and waits for its thread

    async def answer(self):
        """All that was written, once the exchange is over."""

        async def over():
            while not self.protocol.cycle.response_complete:
                await asyncio.sleep(0.001)
            while self.protocol.tasks:
                await asyncio.sleep(0.001)

        await asyncio.wait_for(over(), TIMEOUT)
        return b"".join(self.transport.written)

    async def end(self):
        if not self.transport.lost:
            self.protocol.connection_lost(OSError("the end of the test"))
        if self.protocol.tasks:
            await finish(self.protocol)
        await self.websockets._stop()


@pytest.fixture
def run_served(monkeypatch):
    def run(kind, test, **options):
        async def main():
            served = Served(kind, monkeypatch, **options)
            try:
                await asyncio.wait_for(test(served), TIMEOUT)
            finally:
                await served.end()

        asyncio.run(main())

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fast", [True, False])
def test_a_whole_response(run_served, kind, fast):
    """The same bytes either way; only who sends them differs.

    With an access log: without one they go past ``send`` (test_servers_responses.py).
    """

    async def test(served):
        await served.ask()
        served.go.set()
        answer = await served.answer()
        assert answer.lower().startswith(b"http/1.1 200 ok\r\n")
        assert answer.endswith(b"\r\n\r\nhello")
        assert len(served.tasks) == 2
        assert (served.tasks == [None, None]) is fast

    run_served(kind, test, WEBSOCKETS_FAST_PATHS=fast)


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_takes_nothing(run_served, kind):
    """The response waits in its task, with the send timeout, until there is room."""

    async def test(served):
        await served.ask()
        served.protocol.pause_writing()
        served.go.set()
        while not served.tasks:  # its task has called send, which waits
            await asyncio.sleep(0.001)
        assert served.tasks[0] is not None
        assert not served.transport.written
        served.protocol.resume_writing()
        assert (await served.answer()).endswith(b"\r\n\r\nhello")

    run_served(kind, test)


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_stops_taking_in_between(run_served, kind):
    """With the head the transport fills: the body goes out when there is room, once."""

    async def test(served):
        await served.ask()
        write, head = served.transport.write, []

        def write_and_pause(data):
            write(data)
            if not head:
                head.append(data)
                served.protocol.pause_writing()

        served.transport.write = write_and_pause
        served.go.set()
        while len(served.tasks) < 2:
            await asyncio.sleep(0.001)
        assert served.transport.written == head
        served.protocol.resume_writing()
        answer = await served.answer()
        assert answer.startswith(head[0])
        assert answer.count(b"hello") == 1

    run_served(kind, test)


@pytest.mark.parametrize("kind", KINDS)
def test_what_send_raises(run_served, kind, caplog):
    """It comes out of the application's task, where the server logs it, once."""

    async def test(served):
        await served.ask()
        served.fails = RuntimeError("no such header")
        served.go.set()
        assert (await served.answer()).lower().startswith(b"http/1.1 500 ")  # uvicorn's own

    with caplog.at_level(logging.ERROR):
        run_served(kind, test)
    found = [record for record in caplog.records if "Exception in ASGI" in record.message]
    assert len(found) == 1
    assert str(found[0].exc_info[1]) == "no such header"


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_response(run_served, kind):
    """It goes in pieces, each with its deadline: its task sends it."""

    async def test(served):
        await served.ask()
        served.go.set()
        assert (await served.answer()).endswith(b"x" * 100_000)
        assert None not in served.tasks

    run_served(kind, test, body=b"x" * 100_000)


@pytest.mark.parametrize("kind", KINDS)
def test_a_middleware(run_served, kind):
    """Whose send is wrapped gets every message through its wrapper, in its task."""
    seen = []

    def middleware(app):
        async def wrapped(scope, receive, send):
            async def note(message):
                seen.append(message["type"])
                await send(message)

            await app(scope, receive, note)

        return wrapped

    async def test(served):
        await served.ask()
        served.go.set()
        assert (await served.answer()).endswith(b"hello")
        assert None not in served.tasks

    run_served(kind, test, middleware=middleware)
    assert seen == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_has_left(run_served, kind):
    """Nothing is sent for it, and nothing is logged as an error."""

    async def test(served):
        await served.ask()
        served.protocol.connection_lost(None)
        served.transport.closing = served.transport.lost = True
        served.go.set()
        while served.protocol.tasks:
            await asyncio.sleep(0.001)
        assert not served.transport.written

    run_served(kind, test)
