"""The contract with uvicorn's protocol classes: a new release that breaks it fails here."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from types import SimpleNamespace

import pytest
from uvicorn import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol
from uvicorn.server import ServerState

from flask_websockets.servers.uvicorn import InlineSend, Watch, abort, protocol_of

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

    def write(self, data):
        self.written.append(data)

    def is_closing(self):
        return self.closing

    def close(self):
        self.closing = True

    def abort(self):
        self.aborted = self.closing = True

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


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


@pytest.mark.parametrize("kind", CLASSES)
def test_send_takes_one_step_while_the_transport_is_writable(kind):
    """One step writes the frame; nothing is left to the writer."""

    async def main():
        protocol, send, transport = await accepted(kind)
        inline = InlineSend(send, protocol)
        assert inline({"type": "websocket.send", "text": "hello"}) is None
        assert b"".join(transport.written) == b"\x81\x05hello"
        await finish(protocol)

    asyncio.run(main())


@pytest.mark.parametrize("kind", CLASSES)
def test_a_paused_transport_gets_nothing(kind):
    """While the transport is above its mark the message goes to the writer untouched."""

    async def main():
        protocol, send, transport = await accepted(kind)
        inline = InlineSend(send, protocol)
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
        inline = InlineSend(send, SimpleNamespace(writable=writable))
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
