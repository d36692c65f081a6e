"""The contract with uvicorn's HTTP send: a whole response past it is what it would have been."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from flask_websockets.servers.responses import write_whole

from .test_servers_uvicorn import GET, Transport, finish

LENGTH = (b"content-length", b"5")
HELLO = b"hello"


class Asked:
    """One exchange of uvicorn's that waits for its response."""

    def __init__(self, kind=HttpToolsProtocol, head=GET, behind=b"", **settings):
        self.calls = asyncio.Queue()

        async def app(scope, receive, send):
            self.calls.put_nowait(send)
            await asyncio.Event().wait()

        settings = {"access_log": False, **settings}
        config = Config(app, lifespan="off", log_config=None, **settings)
        config.load()
        state = ServerState()
        state.default_headers = [
            (b"date", b"now"),
            (b"server", b"uvicorn"),
            *config.encoded_headers,
        ]
        self.protocol = kind(config=config, server_state=state, app_state={})
        self.transport = Transport()
        self.protocol.connection_made(self.transport)
        self.protocol.data_received(head)
        self.cycle = self.protocol.cycle
        if behind:
            self.protocol.data_received(behind)

    def write(self, status=200, headers=(LENGTH,), body=HELLO):
        return write_whole(self.cycle, start(status, headers), body)

    async def send(self, status=200, headers=(LENGTH,), body=HELLO):
        send = await asyncio.wait_for(self.calls.get(), 5)
        await send(start(status, headers))
        await send({"type": "http.response.body", "body": body})

    def state(self):
        """What came of it, for the client, the connection and the exchange."""
        return {
            "written": b"".join(self.transport.written),
            "is_closed": self.transport.closing,
            "keep_alive": self.protocol.timeout_keep_alive_task is not None,
            "requests": self.protocol.server_state.total_requests,
            "told": self.cycle.message_event.is_set(),
            **{
                name: getattr(self.cycle, name)
                for name in (
                    *("response_started", "response_complete", "waiting_for_100_continue"),
                    *("expected_content_length", "disconnected", "more_body"),
                )
            },
        }

    async def end(self):
        self.protocol._unset_keepalive_if_required()
        self.protocol.connection_lost(OSError("the end of the test"))
        await finish(self.protocol)


def start(status, headers):
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def with_exchange(test):
    """Run a test with a loop."""

    def run(**arguments):
        asyncio.run(test(**arguments))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.__signature__ = __import__("inspect").signature(test)
    return run


RESPONSES = {
    "small": {},
    "empty": {"headers": [(b"content-length", b"0")], "body": b""},
    "an error": {
        "status": 404,
        "headers": [(b"content-type", b"text/html; charset=utf-8"), LENGTH],
    },
    "no phrase": {"status": 299},
    "cookies": {"headers": [(b"set-cookie", b"a=1"), LENGTH, (b"set-cookie", b"b=\xfc\t")]},
    "large": {"headers": [(b"content-length", b"65536")], "body": bytes(65536)},
}
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n"
#: What is asked, and what comes behind it before there is an answer.
REQUESTS = {
    "GET": (GET, b""),
    "POST": (POST + b"\r\nabc", b""),
    "a body to come": (POST + b"\r\na", b""),
    "expects 100": (POST + b"Expect: 100-continue\r\n\r\n", b""),
    "pipelined": (GET, GET),
    "pipelined behind a body": (POST + b"\r\nabc", GET),
}


@pytest.mark.parametrize(("head", "behind"), REQUESTS.values(), ids=REQUESTS.keys())
@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES.keys())
@with_exchange
async def test_the_same_bytes_and_the_same_state(head, behind, response):
    """Byte for byte, flag for flag what uvicorn's own send leaves behind."""
    settings = {"headers": [("X-Frame-Options", "DENY")], "behind": behind}
    ours, theirs = Asked(head=head, **settings), Asked(head=head, **settings)
    assert ours.write(**response)
    await theirs.send(**response)
    assert ours.state() == theirs.state()
    assert len(ours.transport.written) == 1
    for asked in (ours, theirs):
        await asked.end()


LEFT = {
    "HEAD": ({"head": GET.replace(b"GET", b"HEAD", 1)}, {}),
    "the last": ({"head": GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")}, {}),
    "HTTP/1.0": ({"head": b"GET / HTTP/1.0\r\nHost: a\r\n\r\n"}, {}),
    "access log": ({"access_log": True}, {}),
    "h11": ({"kind": H11Protocol}, {}),
    "a chunked default": ({"headers": [("Transfer-Encoding", "chunked")]}, {}),
    "no length": ({}, {"headers": []}),
    "too long": ({}, {"headers": [(b"content-length", b"4")]}),
    "too short": ({}, {"headers": [(b"content-length", b"6")]}),
    "two lengths": ({}, {"headers": [LENGTH, LENGTH]}),
    "closes": ({}, {"headers": [LENGTH, (b"connection", b"close")]}),
    "control character": ({}, {"headers": [LENGTH, (b"x-a", b"a\x00b")]}),
    "no status": ({}, {"status": 777}),
    "no body": ({}, {"status": 204, "headers": [], "body": b""}),
}


@pytest.mark.parametrize(("asked", "response"), LEFT.values(), ids=LEFT.keys())
@with_exchange
async def test_left_to_uvicorn(asked, response):
    """Whatever is not the plain case changes nothing, and send is there for it."""
    exchange = Asked(**asked)
    before = exchange.state() if exchange.protocol.__class__ is HttpToolsProtocol else None
    assert not exchange.write(**response)
    assert not exchange.transport.written
    if before is not None:
        assert exchange.state() == before
        await exchange.end()
    else:
        exchange.protocol.connection_lost(OSError("the end of the test"))
        await finish(exchange.protocol)


@with_exchange
async def test_not_twice_and_to_nobody():
    """A response that began, a client that left, a transport that is full: send knows."""
    for spoil in (
        lambda cycle: setattr(cycle, "response_started", True),
        lambda cycle: setattr(cycle, "disconnected", True),
        lambda cycle: cycle.flow.pause_writing(),
    ):
        exchange = Asked()
        spoil(exchange.cycle)
        assert not exchange.write()
        assert not exchange.transport.written
        await exchange.end()


@with_exchange
async def test_another_release():
    """An exchange that is not as we know it is left to its own send."""
    exchange = Asked()
    for lacks in ("keep_alive", "access_log", "default_headers", "flow"):
        kept = exchange.cycle.__dict__.pop(lacks)
        assert not exchange.write()
        setattr(exchange.cycle, lacks, kept)
    assert not write_whole(SimpleNamespace(), start(200, [LENGTH]), HELLO)
    assert exchange.write()
    await exchange.end()
