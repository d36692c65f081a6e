"""The contract with what uvicorn keeps for a connection: another release fails here."""

from __future__ import annotations

import asyncio

import pytest
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from flask_websockets.servers.lean import Events, forget_handshake, lighten

from .test_servers_uvicorn import CLASSES, accepted, finish, masked

TIMEOUT = 5.0


@pytest.mark.parametrize("kind", CLASSES)
def test_uvicorn_receives_through_a_smaller_queue(kind):
    """Messages and the end come as through uvicorn's own queue, and reading is not left paused."""

    async def main():
        protocol, _, transport = await accepted(kind)
        lighten(protocol)
        assert type(protocol.queue) is Events
        waiting = asyncio.create_task(protocol.receive())
        await asyncio.sleep(0)
        for text in (b"a", b"b"):
            protocol.data_received(masked(0x81, text))
        assert (await asyncio.wait_for(waiting, TIMEOUT))["text"] == "a"
        assert not transport.reading
        assert (await asyncio.wait_for(protocol.receive(), TIMEOUT))["text"] == "b"
        assert transport.reading
        protocol.connection_lost(None)
        message = await asyncio.wait_for(protocol.receive(), TIMEOUT)
        assert message["type"] == "websocket.disconnect"
        await finish(protocol)

    asyncio.run(main())


def test_what_waits_in_a_queue_stays_there():
    """A queue that holds something is left, as is one of another kind."""

    async def main():
        protocol, _, _ = await accepted(WebSocketsSansIOProtocol)
        protocol.queue.put_nowait({"type": "websocket.disconnect"})
        lighten(protocol)
        assert type(protocol.queue) is asyncio.Queue
        protocol.queue = queue = object()
        lighten(protocol)
        assert protocol.queue is queue
        lighten(object())
        await finish(protocol)

    asyncio.run(main())


def test_a_cancelled_wait_loses_nothing():
    """What comes to a task that is cancelled in that moment is there for the next."""

    async def main():
        events = Events()
        waiting = asyncio.create_task(events.get())
        await asyncio.sleep(0)
        events.put_nowait("a")
        waiting.cancel()
        await asyncio.wait([waiting], timeout=TIMEOUT)
        assert waiting.cancelled()
        events.put_nowait("b")
        assert [await events.get(), await events.get()] == ["a", "b"]
        assert events.empty()

    asyncio.run(main())


def test_the_headers_of_a_handshake_are_dropped():
    """websockets' objects have none any more, and the scope has those of the request."""

    async def main():
        protocol, _, _ = await accepted(WebSocketsSansIOProtocol)
        assert protocol.request.headers
        sent = list(protocol.scope["headers"])
        assert protocol.response.headers
        forget_handshake(protocol)
        assert not protocol.request.headers
        assert not protocol.response.headers
        assert len(sent) == 5
        assert protocol.scope["headers"] == sent
        await finish(protocol)

    asyncio.run(main())


@pytest.mark.parametrize("kind", CLASSES)
def test_other_headers_are_left_alone(kind):
    """Nothing is dropped, and nothing fails, where the objects are not as we know them."""

    async def main():
        protocol, _, _ = await accepted(kind)
        protocol.request = type("Request", (), {"headers": {"a": "b"}})
        protocol.response = None
        forget_handshake(protocol)
        assert protocol.request.headers == {"a": "b"}
        await finish(protocol)

    asyncio.run(main())
