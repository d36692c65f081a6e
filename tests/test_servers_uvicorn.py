"""The contract with uvicorn's protocol classes: a new release that breaks it fails here."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from types import SimpleNamespace

import pytest
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol
from uvicorn.server import ServerState

from flask_websockets.servers.uvicorn import (
    InlineSend,
    Watch,
    abort,
    exchange_of,
    has_ended,
    has_received,
    is_writable,
    limit_frames,
    protocol_of,
)

CLASSES = [WSProtocol, WebSocketsSansIOProtocol]

HEAD = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class Transport(asyncio.Transport):
    """Keeps what is written to it."""

    def __init__(self):
        super().__init__()
        self.written = []
        self.closing = self.aborted = False
        self.reading = True

    def write(self, data):
        self.written.append(data)

    def is_closing(self):
        return self.closing

    def close(self):
        self.closing = True

    def abort(self):
        self.aborted = self.closing = True

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True


async def accepted(kind):
    """A protocol object of *kind* whose handshake is done, its send, and its transport."""
    calls = asyncio.Queue()

    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        calls.put_nowait(send)
        await asyncio.Event().wait()

    config = Config(app, lifespan="off", log_config=None, ws_ping_interval=None)
    config.load()
    protocol = kind(config=config, server_state=ServerState(), app_state={})
    transport = Transport()
    protocol.connection_made(transport)
    protocol.data_received(HEAD)
    send = await asyncio.wait_for(calls.get(), 5)
    transport.written.clear()
    return protocol, send, transport


async def finish(protocol):
    tasks = tuple(protocol.tasks)
    for task in tasks:
        task.cancel()
    _, pending = await asyncio.wait(tasks, timeout=5)
    assert not pending


@pytest.mark.parametrize("kind", CLASSES)
def test_uvicorns_own_send_is_known(kind):
    """The default proxy middleware included, the application gets uvicorn's own send."""

    async def main():
        protocol, send, _ = await accepted(kind)
        assert protocol_of(send) is protocol

        async def wrapped(message):
            await send(message)

        assert protocol_of(wrapped) is None
        await finish(protocol)

    asyncio.run(main())


def masked(first, data=b""):
    """A frame of a client, with a mask of zeros."""
    return bytes((first, 0x80 | len(data))) + b"\0\0\0\0" + data


@pytest.mark.parametrize("kind", CLASSES)
def test_a_limited_protocol_is_still_known(kind):
    """Its class has the name of uvicorn's, and what it sends is uvicorn's own."""

    async def main():
        protocol, send, transport = await accepted(kind)
        limit_frames(protocol)
        limited = type(protocol)
        limit_frames(protocol)
        assert type(protocol) is limited is not kind
        assert protocol_of(send) is protocol
        protocol.data_received(masked(0x89, b"hi"))
        assert b"".join(transport.written) == b"\x8a\x02hi"
        assert transport.reading
        await finish(protocol)

    asyncio.run(main())


@pytest.mark.parametrize("kind", CLASSES)
def test_who_does_not_take_pongs_is_not_read(kind):
    """Reading pauses while pongs wait, and goes on when they are taken."""

    async def main():
        protocol, _, transport = await accepted(kind)
        limit_frames(protocol)
        protocol.pause_writing()
        protocol.data_received(masked(0x89, b"hi"))
        assert not transport.reading
        protocol.resume_writing()
        assert transport.reading
        await finish(protocol)

    asyncio.run(main())


def test_fragments_are_limited():
    """A message in countless empty fragments is closed with 1009, and what follows is nothing."""

    async def main():
        protocol, _, transport = await accepted(WebSocketsSansIOProtocol)
        limit_frames(protocol)
        protocol.data_received(masked(0x02))
        for _ in range(20):
            protocol.data_received(masked(0x00) * 1000)
        assert len(protocol.frames) <= 16 * 1024
        assert transport.closing
        assert b"".join(transport.written).startswith(b"\x88")
        assert int.from_bytes(b"".join(transport.written)[2:4], "big") == 1009
        await finish(protocol)

    asyncio.run(main())


@pytest.mark.parametrize("kind", CLASSES)
def test_send_takes_one_step_while_the_transport_is_writable(kind):
    """One step writes the frame; nothing is left to the writer."""

    async def main():
        protocol, send, transport = await accepted(kind)
        inline = InlineSend(send, protocol.writable.is_set)
        assert inline({"type": "websocket.send", "text": "hello"}) is None
        assert b"".join(transport.written) == b"\x81\x05hello"
        await finish(protocol)

    asyncio.run(main())


@pytest.mark.parametrize("kind", CLASSES)
def test_a_paused_transport_gets_nothing(kind):
    """While the transport is above its mark the message goes to the writer untouched."""

    async def main():
        protocol, send, transport = await accepted(kind)
        inline = InlineSend(send, protocol.writable.is_set)
        protocol.pause_writing()
        message = {"type": "websocket.send", "text": "hello"}
        assert inline(message) is message
        assert not transport.written
        protocol.resume_writing()
        assert inline(message) is None
        await finish(protocol)

    asyncio.run(main())


@pytest.mark.parametrize("kind", CLASSES)
def test_send_looks_at_writable_first(kind):
    """The source says so: what it waits for is writable, and nothing comes before it."""
    source = inspect.getsource(kind.send)
    assert source.count("await ") == 1
    body = source.split(":\n", 1)[1].strip()
    assert body.startswith("await self.writable.wait()")


@pytest.mark.parametrize("kind", CLASSES)
def test_a_lost_connection_is_taken_out_of_the_servers(kind):
    """From connection_made to connection_lost the protocol is one of server_state.connections."""

    async def main():
        protocol, _, _ = await accepted(kind)
        assert protocol in protocol.connections
        protocol.connection_lost(None)
        assert protocol not in protocol.connections
        await finish(protocol)

    asyncio.run(main())


def test_a_send_that_waits_after_all_goes_on_in_the_writer():
    """What suspends in its first step is finished by whoever awaits the rest."""
    seen = []
    variable = contextvars.ContextVar("variable", default="unset")

    async def main():
        gate = asyncio.Event()

        async def send(message):
            seen.append((message, variable.get()))
            await gate.wait()
            seen.append("after")
            await asyncio.sleep(0)
            if message == "fail":
                raise OSError("gone")

        writable = asyncio.Event()
        writable.set()
        variable.set("the writer's")
        inline = InlineSend(send, writable.is_set)
        variable.set("another's")
        rest = inline("message")
        assert seen == [("message", "the writer's")]

        async def finish(rest):
            await rest

        task = asyncio.create_task(finish(rest))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.wait_for(task, 5)
        assert seen[1:] == ["after"]

        gate.clear()
        failing = asyncio.create_task(finish(inline("fail")))
        await asyncio.sleep(0)
        gate.set()
        with pytest.raises(OSError, match="gone"):
            await asyncio.wait_for(failing, 5)

        gate.clear()
        cancelled = asyncio.create_task(finish(inline("cancelled")))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled

        inline("dropped").close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", CLASSES)
def test_the_watch_aborts_what_cannot_close(kind):
    """A transport that stays closing is aborted after its patience; others are let go."""

    async def main():
        stuck, _, stuck_transport = await accepted(kind)
        gone, _, gone_transport = await accepted(kind)
        well, _, well_transport = await accepted(kind)
        aborted = []
        watch = Watch(0.05, lambda: aborted.append(1))
        for protocol in (stuck, gone, well):
            watch.add(protocol)
        stuck_transport.close()
        gone.connection_lost(None)

        async def until():
            while not aborted:
                await asyncio.sleep(0.01)

        await asyncio.wait_for(until(), 5)
        assert stuck_transport.aborted
        assert not gone_transport.aborted
        assert not well_transport.aborted
        watch.close()
        for protocol in (stuck, gone, well):
            await finish(protocol)

    asyncio.run(main())


def test_abort_aborts():
    """abort reaches the transport."""
    transport = Transport()
    abort(SimpleNamespace(transport=transport))
    assert transport.aborted


# -- the HTTP exchange ----------------------------------------------------------------------------

HTTP_CLASSES = [H11Protocol, HttpToolsProtocol]

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
EXPECT = POST[:-2] + b"Expect: 100-continue\r\n\r\n"

START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-length", b"4")],
}
HALF = {"type": "http.response.body", "body": b"ab", "more_body": True}
END = {"type": "http.response.body", "body": b"cd", "more_body": False}
DISCONNECT = {"type": "http.disconnect"}


def piece(body, more):
    return {"type": "http.request", "body": body, "more_body": more}


#: What ``step`` returns of a call that waits.
WAITS = object()


def step(call):
    """One step of a coroutine: what it returned, WAITS if it waits; it goes no further."""
    try:
        call.send(None)
    except StopIteration as stop:
        return stop.value
    call.close()
    return WAITS


async def called(kind, head):
    """A protocol object of *kind* that has called its application for *head*."""
    calls = asyncio.Queue()

    async def app(scope, receive, send):
        calls.put_nowait((receive, send))
        await asyncio.Event().wait()

    config = Config(app, lifespan="off", log_config=None)
    config.load()
    protocol = kind(config=config, server_state=ServerState(), app_state={})
    transport = Transport()
    protocol.connection_made(transport)
    protocol.data_received(head)
    receive, send = await asyncio.wait_for(calls.get(), 5)
    return protocol, receive, send, transport


def exchanges(head):
    """Run a test for both kinds, in the application's place."""

    def decorate(test):
        @pytest.mark.parametrize("kind", HTTP_CLASSES)
        def run(kind):
            async def main():
                protocol, receive, send, transport = await called(kind, head)
                exchange = exchange_of(receive, "receive")
                assert exchange is not None, f"look at {kind.__module__}.RequestResponseCycle"
                await test(protocol, receive, send, transport, exchange)
                protocol.connection_lost(OSError("the end of the test"))
                await finish(protocol)

            asyncio.run(main())

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


@exchanges(GET)
async def test_uvicorns_own_exchange_is_known(protocol, receive, send, transport, exchange):
    """Its receive and its send, each by its own name, behind the default proxy middleware."""
    assert exchange_of(send, "send") is exchange
    assert exchange is protocol.cycle
    assert exchange.transport is transport


@exchanges(GET)
async def test_another_exchange_is_unknown(protocol, receive, send, transport, exchange):
    """What a middleware has wrapped, a subclass, and the one method for the other."""

    class Other(type(exchange)):
        pass

    class Wrapper:
        async def receive(self):
            pass

        async def send(self, message):
            pass

    async def wrapped(*args):
        pass

    other = Other.__new__(Other)
    other.__dict__.update(vars(exchange))
    for stranger in (other, Wrapper()):
        assert exchange_of(stranger.receive, "receive") is None
        assert exchange_of(stranger.send, "send") is None
    for name in ("receive", "send"):
        assert exchange_of(wrapped, name) is None
        assert exchange_of(print, name) is None
    assert exchange_of(receive, "send") is None
    assert exchange_of(send, "receive") is None


@pytest.mark.parametrize(
    "lacks", ["message_event", "disconnected", "flow", "transport", "write_paused"]
)
def test_an_exchange_of_another_release_is_unknown(lacks):
    """Without what we look at, everything works, only slower."""

    async def main():
        protocol, receive, send, _ = await called(H11Protocol, GET)
        exchange = exchange_of(receive, "receive")
        if lacks == "write_paused":
            exchange.flow, kept = SimpleNamespace(), exchange.flow
        else:
            kept = vars(exchange).pop(lacks)
        assert exchange_of(receive, "receive") is None
        assert exchange_of(send, "send") is None
        setattr(exchange, "flow" if lacks == "write_paused" else lacks, kept)
        protocol.connection_lost(OSError("the end of the test"))
        await finish(protocol)

    asyncio.run(main())


def test_of_an_unknown_exchange_nothing_is_known():
    """Not that a call would return at once, nor that it is over."""
    assert not has_received(None)
    assert not is_writable(None)
    assert not has_ended(None)


def expect_receive(exchange, receive, message):
    """has_received says so exactly if receive returns at once, and this is what it returns."""
    assert has_received(exchange) is (message is not WAITS)
    received = step(receive())
    assert received is message or received == message


@exchanges(GET)
async def test_receive_of_a_request_without_a_body(protocol, receive, send, transport, exchange):
    """It returns at once, then it waits, and returns again when the client has left."""
    expect_receive(exchange, receive, piece(b"", False))
    expect_receive(exchange, receive, WAITS)
    protocol.connection_lost(OSError("gone"))
    for _ in range(3):
        expect_receive(exchange, receive, DISCONNECT)


@exchanges(POST)
async def test_receive_of_a_body(protocol, receive, send, transport, exchange):
    """It waits for each piece, and returns once when there is one."""
    expect_receive(exchange, receive, WAITS)
    protocol.data_received(b"abc")
    expect_receive(exchange, receive, piece(b"abc", True))
    expect_receive(exchange, receive, WAITS)
    protocol.data_received(b"d")
    protocol.data_received(b"ef")
    expect_receive(exchange, receive, piece(b"def", False))
    expect_receive(exchange, receive, WAITS)


@exchanges(CHUNKED)
async def test_receive_of_a_chunked_body(protocol, receive, send, transport, exchange):
    """So it is without a Content-Length."""
    expect_receive(exchange, receive, WAITS)
    protocol.data_received(b"3\r\nabc\r\n")
    expect_receive(exchange, receive, piece(b"abc", True))
    protocol.data_received(b"0\r\n\r\n")
    expect_receive(exchange, receive, piece(b"", False))


@exchanges(POST + b"abcdef")
async def test_receive_of_a_body_that_came_with_its_head(
    protocol, receive, send, transport, exchange
):
    """The whole body is there when the application is called."""
    expect_receive(exchange, receive, piece(b"abcdef", False))


@exchanges(EXPECT)
async def test_receive_asks_for_the_body(protocol, receive, send, transport, exchange):
    """100 goes out with the first receive, and not before: has_received asks for nothing."""
    assert not has_received(exchange)
    assert transport.written == []
    assert step(receive()) is WAITS
    assert b"".join(transport.written).startswith(b"HTTP/1.1 100 ")


@exchanges(GET)
async def test_receive_behind_the_response(protocol, receive, send, transport, exchange):
    """It returns at once, for ever."""
    expect_receive(exchange, receive, piece(b"", False))
    for message in (START, HALF, END):
        expect_receive(exchange, receive, WAITS)
        assert step(send(message)) is None
    for _ in range(3):
        expect_receive(exchange, receive, DISCONNECT)


@exchanges(GET)
async def test_send_does_not_wait_while_writing_is_not_paused(
    protocol, receive, send, transport, exchange
):
    """One step takes each message to the transport."""
    for message in (START, HALF, END):
        assert is_writable(exchange)
        transport.written.clear()
        assert step(send(message)) is None
        assert transport.written
    assert b"".join(transport.written).startswith(b"cd")


@exchanges(GET)
async def test_send_waits_while_writing_is_paused(protocol, receive, send, transport, exchange):
    """Above the transport's mark it waits until that is below it again."""
    assert step(send(START)) is None
    protocol.pause_writing()
    assert not is_writable(exchange)
    transport.written.clear()
    waiting = asyncio.create_task(send(HALF))
    await asyncio.sleep(0)
    assert transport.written == []
    protocol.resume_writing()
    assert is_writable(exchange)
    await asyncio.wait_for(waiting, 5)
    assert transport.written == [b"ab"]


@exchanges(GET)
async def test_send_does_not_wait_for_a_client_that_has_left(
    protocol, receive, send, transport, exchange
):
    """A connection that is lost while writing is paused lets everybody go."""
    assert step(send(START)) is None
    protocol.pause_writing()
    waiting = asyncio.create_task(send(HALF))
    await asyncio.sleep(0)
    protocol.connection_lost(OSError("gone"))
    assert is_writable(exchange)
    await asyncio.wait_for(waiting, 5)
    assert step(send(END)) is None


@pytest.mark.parametrize("kind", HTTP_CLASSES)
def test_send_waits_for_nothing_but_the_transport(kind):
    """The source says so: with is_writable true, there is nothing else to wait for."""
    source = inspect.getsource(inspect.getmodule(kind).RequestResponseCycle.send)
    assert source.count("await ") == 1
    assert "await self.flow.drain()" in source


@exchanges(POST)
async def test_a_client_that_has_left(protocol, receive, send, transport, exchange):
    """has_ended knows it from the moment in which the connection is lost."""
    assert not has_ended(exchange)
    assert exchange.disconnected is False
    protocol.connection_lost(OSError("gone"))
    assert has_ended(exchange)
    assert exchange.disconnected is True


@exchanges(CHUNKED)
async def test_a_request_that_uvicorn_refuses(protocol, receive, send, transport, exchange):
    """It answers 400 itself, behind a head for which it has called the application."""
    assert not has_ended(exchange)
    protocol.data_received(b"no chunk\r\n")
    assert transport.is_closing()
    assert has_ended(exchange)
    assert b"".join(transport.written).startswith(b"HTTP/1.1 400 ")


@exchanges(GET)
async def test_abort_cuts_an_exchange(protocol, receive, send, transport, exchange):
    """The transport is aborted, and the exchange has ended."""
    assert step(send(START)) is None
    assert not has_ended(exchange)
    abort(exchange)
    assert transport.aborted
    assert has_ended(exchange)
