"""The contract with what is below uvicorn's send and receive: another release fails here."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import threading
import time
from types import SimpleNamespace

import pytest
from flask import Flask
from uvicorn import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol
from uvicorn.server import ServerState
from websockets.client import ClientProtocol
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Opcode
from websockets.uri import parse_uri

from flask_websockets import WebSockets
from flask_websockets.protocol import SharedMessage
from flask_websockets.servers.frames import frame_writer_of
from flask_websockets.servers.uvicorn import inline_of, limit_frames, take_from

from .test_servers_uvicorn import Transport, finish

CLASSES = [WSProtocol, WebSocketsSansIOProtocol]


def sender(protocol, rest=None):
    """What sends on *protocol* without a task: frames, and by *rest* what is left of it."""
    return frame_writer_of(protocol, inline_of(protocol) if rest is None else rest).send


def never(message):
    """Stands for the rest where there must be none."""
    raise AssertionError(message)


#: What clients offer: nothing; what browsers do; each side without a window; a small window.
OFFERS = {
    "none": None,
    "browser": {"client_max_window_bits": True},
    "fresh-server": {"server_no_context_takeover": True, "client_max_window_bits": True},
    "fresh-client": {"client_no_context_takeover": True},
    "small": {"server_max_window_bits": 10, "client_max_window_bits": True},
}
TIMEOUT = 10.0
SIZES = [0, 1, 125, 126, 127, 1000, 65_535, 65_536, 200_000]


class Client:
    """A client that speaks to one of uvicorn's protocol objects, without a socket."""

    def __init__(self, offer=None):
        extensions = offer and [ClientPerMessageDeflateFactory(**offer)]
        self.conn = ClientProtocol(
            parse_uri("ws://example.com/ws"), extensions=extensions, max_size=None
        )
        self.messages = []

    def open(self, kind, app, **settings):
        """Send the handshake to a new protocol object of *kind*."""
        config = Config(app, lifespan="off", log_config=None, ws_ping_interval=None, **settings)
        config.load()
        self.protocol = kind(config=config, server_state=ServerState(), app_state={})
        self.transport = Transport()
        self.protocol.connection_made(self.transport)
        self.conn.send_request(self.conn.connect())
        self.write()

    async def connect(self, kind, **settings):
        """Shake hands with an application that accepts, and does nothing."""
        calls = asyncio.Queue()

        async def app(scope, receive, send):
            await receive()
            await send({"type": "websocket.accept"})
            calls.put_nowait((receive, send))
            await asyncio.Event().wait()

        self.open(kind, app, **settings)
        self.receive, self.send = await asyncio.wait_for(calls.get(), 5)
        limit_frames(self.protocol)
        self.read()
        assert self.conn.handshake_exc is None
        return self

    def write(self):
        """Have the server read what the client has to say."""
        for data in self.conn.data_to_send():
            if data:
                self.protocol.data_received(data)

    def read(self):
        """Have the client read what the server has written; the messages since."""
        for data in self.transport.written:
            self.conn.receive_data(data)
        self.transport.written.clear()
        assert self.conn.parser_exc is None, self.conn.parser_exc
        found = []
        for event in self.conn.events_received():
            opcode = getattr(event, "opcode", None)
            if opcode in (Opcode.TEXT, Opcode.BINARY):
                data = bytes(event.data)
                found.append(data.decode() if opcode is Opcode.TEXT else data)
        return found

    async def end(self):
        await finish(self.protocol)


def connected(*offers, **settings):
    """Run a test with a client of each offer, on both kinds of protocol objects."""

    def decorate(test):
        @pytest.mark.parametrize("kind", CLASSES)
        def run(kind):
            async def main():
                clients = [await Client(OFFERS[name]).connect(kind, **settings) for name in offers]
                await test(*clients)
                for client in clients:
                    await client.end()

            asyncio.run(main())

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


# -- out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("data", ["text", "bytes"])
def test_the_same_bytes(kind, size, data):
    """A plain frame is byte for byte what uvicorn's own send writes."""

    async def main():
        ours, theirs = await Client().connect(kind), await Client().connect(kind)
        value = "x" * size if data == "text" else os.urandom(size)
        message = {"type": "websocket.send", data: value}
        assert sender(ours.protocol, never)(SharedMessage(data, value)) is None
        assert sender(ours.protocol, never)(message) is None
        await theirs.send(message)
        await theirs.send(message)
        written = [b"".join(client.transport.written) for client in (ours, theirs)]
        assert written[0] == written[1]
        for client in (ours, theirs):
            await client.end()

    asyncio.run(main())


@connected("none", "browser", "browser", "fresh-server", "small")
async def test_made_once(*clients):
    """Whoever compresses in the same way gets the very same object."""
    message = SharedMessage("text", "a feed of numbers, " * 20)
    for client in clients:
        assert sender(client.protocol, never)(message) is None
    written = [client.transport.written[0] for client in clients]
    assert written[1] is written[2] is written[3]
    assert len({id(data) for data in written}) == len(message.frames) == 3
    for client in clients:
        assert client.read() == ["a feed of numbers, " * 20]


@connected(*OFFERS)
async def test_every_client_can_read_it(*clients):
    """Shared and own messages, as they come: with a window that goes on, and with none."""
    inline = [sender(client.protocol) for client in clients]
    chance = random.Random(7)
    expected = [[] for _ in clients]
    for number in range(300):
        text = f"{number} " + "".join(chance.choice(["tick ", "tock ", "42 "]) for _ in range(40))
        data, value = chance.choice([("text", text), ("bytes", text.encode())])
        if chance.random() < 0.5:
            message = SharedMessage(data, value)
            chosen = range(len(clients))
        else:
            message = {"type": "websocket.send", data: value}
            chosen = [chance.randrange(len(clients))]
        for each in chosen:
            assert inline[each](message) is None
            expected[each].append(value)
    assert [client.read() for client in clients] == expected


@connected("browser", "fresh-server", "small")
async def test_what_does_not_compress_goes_as_it_is(*clients):
    """A message that would only grow is not compressed (RFC 7692, section 6)."""
    noise = os.urandom(300)
    for client in clients:
        assert sender(client.protocol, never)(SharedMessage("bytes", noise)) is None
        assert not client.transport.written[0][0] & 0x40
        assert client.read() == [noise]


@connected("none", "browser")
async def test_pings_in_between(*clients):
    """A pong that uvicorn sends lies between the messages, in its place."""
    for client in clients:
        write = sender(client.protocol, never)
        for number in range(3):
            assert write(SharedMessage("text", str(number))) is None
            client.conn.send_ping(b"")
            client.write()
        opcodes = [data[0] & 0x0F for data in client.transport.written]
        assert opcodes == [1, 10] * 3
        assert client.read() == ["0", "1", "2"]


@connected("none", "browser")
async def test_left_to_uvicorn(*clients):
    """Who is paused, has said goodbye, or is gone gets nothing past uvicorn's send."""
    for client in clients:
        left, message = [], SharedMessage("text", "late")
        send = sender(client.protocol, left.append)
        client.protocol.pause_writing()
        send(message)
        assert inline_of(client.protocol)(message) is message
        paused = sender(client.protocol, left.append)
        paused(message)
        assert left == [message, message]
        client.protocol.resume_writing()
        assert paused(message) is None
        assert client.read() == ["late"]
        client.conn.send_close(1000)
        client.write()
        client.transport.written.clear()
        send(message)
        assert left == [message, message, message]
        with pytest.raises(Exception):  # noqa: B017 - each server's own
            inline_of(client.protocol)(message)
        assert not client.transport.written


def says_goodbye(client, how):
    """Have uvicorn end the connection by itself, in one of its ways."""
    protocol = client.protocol
    if how == "shutdown":
        protocol.shutdown()
    elif how == "keepalive":
        protocol.keepalive_timeout()
    elif how == "too-large":
        client.conn.send_binary(bytes(2000))
    elif how == "not-utf-8":
        client.conn.send_text(b"\xff")
    elif how == "no-frame":
        protocol.data_received(b"\xf0\x80\0\0\0\0")
    elif how == "peer":
        client.conn.send_close(1000)
    client.write()


@pytest.mark.parametrize(
    "how", ["shutdown", "keepalive", "too-large", "not-utf-8", "no-frame", "peer"]
)
@pytest.mark.parametrize("kind", CLASSES)
def test_uvicorns_goodbyes_close_the_transport(kind, how):
    """Each of them does so in the same turn: nothing of ours comes behind a close frame."""

    async def main():
        client = await Client().connect(kind, ws_max_size=1000)
        left, message = [], SharedMessage("text", "late")
        send = sender(client.protocol, left.append)
        says_goodbye(client, how)
        # wsproto's says nothing where what came was no frame.
        assert [data[0] for data in client.transport.written] in ([0x88], [])
        assert client.transport.closing
        client.transport.written.clear()
        send(message)
        assert left == [message]
        assert not client.transport.written
        await client.end()

    asyncio.run(main())


@connected("none", "browser")
async def test_a_lost_connection(*clients):
    """Nothing is written to a transport that is gone; uvicorn's send says so."""
    for client in clients:
        inline = sender(client.protocol)
        client.protocol.connection_lost(None)
        with pytest.raises(OSError):
            inline(SharedMessage("text", "late"))
        assert not client.transport.written


@connected("browser")
async def test_only_data_goes_past_send(client):
    """A close frame is uvicorn's own: it waits for the answer to it."""
    inline = sender(client.protocol)
    close = {"type": "websocket.close", "code": 1000, "reason": ""}
    assert inline(close) is None
    assert client.protocol.close_sent
    assert client.transport.written[0][0] == 0x88


@pytest.mark.parametrize("kind", CLASSES)
def test_another_release(kind):
    """Where anything is not as we know it there is no writer, and uvicorn's send does it."""

    async def main():
        client = await Client(OFFERS["browser"]).connect(kind)
        protocol = client.protocol
        if kind is WSProtocol:
            extensions = protocol.conn.connection._proto.extensions
        else:
            extensions = protocol.conn.extensions
        [extension] = extensions
        for others in ([extension, extension], [SimpleNamespace()]):
            extensions[:] = others
            assert frame_writer_of(protocol, never) is None
        extensions[:] = [extension]
        lacks = "_compressor" if kind is WSProtocol else "local_max_window_bits"
        kept = extension.__dict__.pop(lacks)
        assert frame_writer_of(protocol, never) is None
        setattr(extension, lacks, kept)
        conn, protocol.conn = protocol.conn, SimpleNamespace()
        assert frame_writer_of(protocol, never) is None
        protocol.conn = conn
        assert frame_writer_of(protocol, never) is not None
        protocol.__class__ = kind  # which does not say when it is paused
        assert frame_writer_of(protocol, never) is None
        # Without one, the same message takes uvicorn's way.
        assert inline_of(protocol)(SharedMessage("text", "hello")) is None
        assert client.read() == ["hello"]
        await client.end()

    asyncio.run(main())


def test_no_compressor_while_nothing_of_its_own_is_sent():
    """Messages for all need no memory of the connection's own."""

    async def main():
        client = await Client(OFFERS["browser"]).connect(WebSocketsSansIOProtocol)
        inline = sender(client.protocol)
        [extension] = client.protocol.conn.extensions
        assert extension.encoder._encoder is None
        assert inline({"type": "websocket.send", "text": "own " * 9}) is None
        assert extension.encoder._encoder is not None
        assert inline(SharedMessage("text", "all " * 9)) is None
        assert extension.encoder._encoder is None
        assert client.read() == ["own " * 9, "all " * 9]
        await client.end()

    asyncio.run(main())


# -- in -------------------------------------------------------------------------------------------


def say(client, *messages):
    """Have all of *messages* arrive in one piece."""
    for message in messages:
        if isinstance(message, str):
            client.conn.send_text(message.encode())
        else:
            client.conn.send_binary(message)
    client.protocol.data_received(b"".join(client.conn.data_to_send()))


async def queued(client):
    """What lies in uvicorn's queue."""
    found = []
    while not client.protocol.queue.empty():
        message = await client.receive()
        assert message["type"] == "websocket.receive", message
        found.append(message.get("text", message.get("bytes")))
    return found


@connected("none", "browser")
async def test_taken_where_it_comes(*clients):
    """Messages come as str and bytes, in order; the queue is not touched, reading goes on."""
    for client in clients:
        taken = []
        take_from(client.protocol, lambda data, taken=taken: taken.append(data) or True)
        say(client, "a", b"b", "", b"", "ü" * 1000)
        assert taken == ["a", b"b", "", b"", "ü" * 1000]
        assert [type(data) for data in taken] == [str, bytes, str, bytes, str]
        assert client.protocol.queue.empty()
        assert client.transport.reading


@connected("none", "browser")
async def test_what_is_not_taken_is_received(*clients):
    """From the first that is not taken all go through receive, until there is none; then again."""
    for client in clients:
        taken, room = [], iter([True, True, False, True])
        take_from(client.protocol, lambda data, r=room, t=taken: next(r) and not t.append(data))
        say(client, "1", "2", "3", "4", "5")
        assert taken == ["1", "2"]
        assert not client.transport.reading
        assert await queued(client) == ["3", "4", "5"]
        assert client.transport.reading
        say(client, "6")
        assert taken == ["1", "2", "6"]


@connected("none")
async def test_nothing_is_taken_before_and_after(client):
    """Without somebody to take, all goes through receive."""
    say(client, "1")
    assert await queued(client) == ["1"]
    take_from(client.protocol, lambda data: True)
    say(client, "2")
    take_from(client.protocol, None)
    say(client, "3")
    assert await queued(client) == ["3"]


@connected("none")
async def test_fragments(client):
    """A message in fragments goes through receive, whole."""
    taken = []
    take_from(client.protocol, lambda data: taken.append(data) or True)
    client.conn.send_text(b"one ", fin=False)
    client.conn.send_continuation(b"two", fin=True)
    client.write()
    assert taken + await queued(client) == ["one two"]


@connected("none", ws_max_size=1000)
async def test_the_servers_own_limit(client):
    """A message above uvicorn's limit is closed with 1009 as ever."""
    taken = []
    take_from(client.protocol, lambda data: taken.append(data) or True)
    say(client, "x" * 250, "ü" * 400)
    say(client, "x" * 1001)
    taken += [data async for data in until_disconnect(client)]
    assert taken == ["x" * 250, "ü" * 400]
    assert client.protocol.close_sent


async def until_disconnect(client):
    for _ in itertools.count():
        message = await asyncio.wait_for(client.receive(), 5)
        if message["type"] == "websocket.disconnect":
            assert message["code"] == 1009
            return
        yield message["text"]


@connected("none")
async def test_no_utf_8(client):
    """Text that is none is not taken, and closes the connection."""
    taken = []
    take_from(client.protocol, lambda data: taken.append(data) or True)
    client.conn.send_text(b"\xff\xfe")
    client.write()
    assert taken == []
    assert client.transport.closing


def test_only_what_we_know_is_taken_from():
    """A protocol that was not limited is left as it is."""
    stranger = SimpleNamespace()
    take_from(stranger, lambda data: True)
    assert vars(stranger) == {}


# -- both, with an application of ours ------------------------------------------------------------


async def until(condition):
    async def wait():
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), TIMEOUT)


def echoing(fast, **settings):
    """An application whose view echoes, each message when it may."""
    app = Flask(__name__)
    app.config.update(settings, WEBSOCKETS_FAST_PATHS=fast)
    websockets = WebSockets(app)
    served = SimpleNamespace(
        websockets=websockets, asgi=websockets.asgi_app(app), may=threading.Semaphore(0), ws=None
    )

    @websockets.route("/ws")
    def view(ws):
        served.ws = ws
        ws.send("ready")
        while served.may.acquire(timeout=TIMEOUT):
            ws.send(ws.receive())

    return served


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("fast", [True, False])
def test_switched(kind, fast):
    """The same echo either way; only with the fast paths anything goes past uvicorn's own."""

    async def main():
        served, client, heard = echoing(fast), Client(), []
        client.open(kind, served.asgi)
        await until(lambda: heard.extend(client.read()) or heard == ["ready"])
        assert (served.ws.link.inline is not None) is fast
        assert (getattr(client.protocol, "take", None) is not None) is fast
        for number in range(10):
            served.may.release()
            say(client, str(number))
        await until(lambda: heard.extend(client.read()) or len(heard) == 11)
        assert heard[1:] == [str(number) for number in range(10)]
        client.conn.send_close(1000)
        client.write()
        served.may.release()
        await until(lambda: not client.protocol.tasks)
        assert getattr(client.protocol, "take", None) is None
        await served.websockets._stop()

    asyncio.run(main())


@pytest.mark.parametrize("kind", CLASSES)
def test_nothing_overtakes_what_the_reader_holds(kind):
    """While a message waits for room in the reader's hands, the next one does not pass it."""

    async def main():
        served, client, heard = echoing(True, WEBSOCKETS_INBOX_MESSAGES=2), Client(), []
        client.open(kind, served.asgi)
        await until(lambda: heard.extend(client.read()) or heard == ["ready"])
        link = served.ws.link
        say(client, "1", "2", "3")
        served.may.release()  # its thread is handed the first two, and takes one
        await until(lambda: heard.extend(client.read()) or len(heard) == 2)
        await until(lambda: link._room is None)
        say(client, "4")
        await until(lambda: link._room is not None)  # the reader holds it
        assert client.transport.reading
        served.may.release()
        deadline = time.monotonic() + TIMEOUT
        while link.depths[0] == 2:  # the loop stands still: it does not learn of the room yet
            assert time.monotonic() < deadline
        say(client, "5")
        for _ in range(3):
            served.may.release()
        await until(lambda: heard.extend(client.read()) or len(heard) == 6)
        assert heard == ["ready", "1", "2", "3", "4", "5"]
        client.conn.send_close(1000)
        client.write()
        served.may.release()
        await until(lambda: not client.protocol.tasks)
        await served.websockets._stop()

    asyncio.run(main())
