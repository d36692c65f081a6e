"""Twenty thousand connections die in every way there is, and leave nothing behind.

Two thousand do by default; ``--faults=all`` makes it all twenty.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ..integration.serving import HANDSHAKE, Served, Start, request_head, serving
from ..integration.waiting import wait_until

#: Every wait of a client, in seconds.
PATIENCE = 30.0
#: Deaths from one look at the server to the next; the first are the warm-up. By default, and
#: with --faults=all.
QUICK, ALL = (1_000, 500, 500), (2_000, *[1_000] * 20)
#: Clients at the same time; those that have to wait for a deadline have a number of their own.
CLIENTS, WAITING = 48, 200
#: By how much of itself resident memory may grow.
SHARE = 0.10

SETTINGS = {
    "CLOSE_TIMEOUT": 0.5,
    # Longer than it takes to fill the sockets' buffers at the pace of the views.
    "SEND_TIMEOUT": 1.5,
    # Nobody is to be refused because the machine is busy.
    "HANDSHAKE_TIMEOUT": 2.5,
    "MAX_HANDSHAKES": 1_000,
    "MAX_MESSAGE_BYTES": 65_536,
    "OUTBOX_BYTES": 65_536,
}

#: What ``stats`` says of nobody being there.
AT_REST = (
    *("connections", "view_threads", "view_tasks", "channels", "subscriptions", "pending"),
    *("inbox_messages", "inbox_bytes", "outbox_messages", "outbox_bytes"),
)

SERVED = """
    import asyncio
    import gc
    import time
    from collections import Counter
    from contextlib import AsyncExitStack, ExitStack
    from dataclasses import asdict

    from flask import Flask, abort, request
    from flask_websockets import WebSockets

    app = Flask(__name__)
    app.config.from_prefixed_env()
    app.logger.setLevel(100)  # views that fail on purpose: their tracebacks are no news
    websockets = WebSockets(app)
    KINDS = {
        "flask_websockets.bridge.link.Link",
        "flask_websockets.connection.Connection",
        "flask_websockets.websocket.WebSocket",
        "flask_websockets.websocket.AsyncWebSocket",
        "flask_websockets.running_view.RunningView",
        "flask_websockets.channels.Publication",
        "flask_websockets.subscription.Subscription",
    }

    class Trouble(Exception):
        pass

    @websockets.identify
    def user():
        return request.args.get("user")

    def channels():
        "A room that others are in, and one for itself; or none."
        return [f"room {int(user()) % 50}", user()] if "subscribed" in request.args else []

    @websockets.route("/ws")
    def view(ws):
        with ExitStack() as stack:
            if names := channels():
                stack.enter_context(websockets.subscribe(ws, names))
            ws.send("ready")
            if names:
                websockets.publish("somebody is here", names[0])
            for data in ws.iter_text():
                if data == "return":
                    return
                elif data == "raise":
                    raise Trouble
                elif data == "close":
                    ws.close(4000)
                elif data == "disconnect":
                    websockets.disconnect(user=user())
                elif data == "publish":
                    while True:
                        websockets.publish(bytes(32_768), names[1])
                        ws.receive(timeout=0.01)
                elif data == "send":
                    while True:
                        ws.send(bytes(32_768))

    @websockets.route("/async/ws")
    async def async_view(ws):
        async with AsyncExitStack() as stack:
            if names := channels():
                await stack.enter_async_context(websockets.subscribe(ws, names))
            await ws.send("ready")
            if names:
                await websockets.apublish("somebody is here", names[0])
            async for data in ws.iter_text():
                if data == "return":
                    return
                elif data == "raise":
                    raise Trouble
                elif data == "close":
                    await ws.close(4000)
                elif data == "disconnect":
                    await websockets.adisconnect(user=user())
                elif data == "publish":
                    while True:
                        await websockets.apublish(bytes(32_768), names[1])
                        await ws.receive(timeout=0.01)
                elif data == "send":
                    while True:
                        await ws.send(bytes(32_768))

    def refuse(how):
        if how == "abort":
            abort(418)
        elif how == "raise":
            raise Trouble
        return "no", 409

    @websockets.route("/refuse/<how>")
    def refuses(ws, how):
        return refuse(how)

    @websockets.route("/async/refuse/<how>")
    async def async_refuses(ws, how):
        return refuse(how)

    @websockets.route("/never")
    def never(ws):
        "Neither accepts nor refuses; every wait of the connection's would accept."
        while not ws.closed:
            time.sleep(0.1)

    @websockets.route("/async/never")
    async def async_never(ws):
        while not ws.closed:
            await asyncio.sleep(0.1)

    @app.get("/stats")
    def stats():
        return asdict(websockets.stats())

    @app.get("/alive")
    def alive():
        "How many objects of a connection or a publish still exist."
        gc.collect()
        kinds = Counter(type(thing) for thing in gc.get_objects())
        names = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in kinds}
        return {
            name: kinds[kind]
            for name, kind in names.items()
            if name in KINDS or name.startswith("uvicorn.protocols.websockets.")
        }

    asgi = websockets.asgi_app()
"""


# -- a client that can die -------------------------------------------------------------------------


class Client:
    """A WebSocket client that does what it is told, however wrong."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int, *, deaf: bool = False) -> Client:
        """:param deaf: with buffers so small that they are full soon."""
        sock = socket.socket()
        try:
            sock.setblocking(False)
            if deaf:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
            return cls(*await asyncio.open_connection(sock=sock))
        except BaseException:
            sock.close()
            raise

    def ask(self, path: str) -> None:
        """Send the head of the handshake."""
        self.writer.write(request_head("GET", path, HANDSHAKE))

    async def status(self) -> int:
        """The handshake's answer."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1])

    async def frame(self) -> tuple[int, bytes]:
        """The next frame: its opcode and its data."""
        first, length = await self.reader.readexactly(2)
        if length > 125:
            longer = await self.reader.readexactly(2 if length == 126 else 8)
            length = int.from_bytes(longer, "big")
        return first & 0xF, await self.reader.readexactly(length)

    async def ready(self) -> None:
        """Read up to the view's first word; a neighbour's may come before it."""
        while (await self.frame())[1] != b"ready":
            pass

    def send(self, data: bytes, opcode: int = 1) -> None:
        # A mask of zeros is a mask, and leaves the data as it is.
        length, longer = len(data), b""
        if length > 125:
            length, size = (126, 2) if length < 65_536 else (127, 8)
            longer = len(data).to_bytes(size, "big")
        head = bytes([0x80 | opcode, 0x80 | length]) + longer
        self.writer.write(head + bytes(4) + data)

    async def closed(self) -> int:
        """The code of the server's close; answer it, and wait for the end."""
        while (frame := await self.frame())[0] != 8:
            pass
        self.send(frame[1], opcode=8)
        await self.end()
        return int.from_bytes(frame[1][:2], "big")

    async def end(self) -> None:
        """Wait until the server hangs up; what comes before is thrown away."""
        with suppress(ConnectionError):
            while await self.reader.read(65_536):
                pass

    def hang_up(self) -> None:
        """FIN, without a close frame."""
        self.writer.close()

    def reset(self) -> None:
        """RST, also where everything is over already."""
        with suppress(OSError):
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class Death:
    """One connection and its end.

    :param variant: its number among those of its kind: sync and async, subscribed or not.
    """

    def __init__(self, port: int, user: int, variant: int, held: list[Client]) -> None:
        self._port = port
        self._user = user
        self._prefix = "/async" if variant % 2 else ""
        self._subscribed = variant // 2 % 2 == 1
        #: What stays open until the server is seen to have forgotten it.
        self._held = held
        self._client: Client | None = None

    async def client(self, *, deaf: bool = False) -> Client:
        self._client = await Client.connect(self._port, deaf=deaf)
        return self._client

    def path(self, path: str, *, subscribed: bool = False) -> str:
        word = "&subscribed" if subscribed or self._subscribed else ""
        return f"{self._prefix}{path}?user={self._user}{word}"

    async def asked(self, path: str) -> Client:
        client = await self.client()
        client.ask(self.path(path))
        return client

    async def opened(self, *, subscribed: bool = False, deaf: bool = False) -> Client:
        client = await self.client(deaf=deaf)
        client.ask(self.path("/ws", subscribed=subscribed))
        assert await client.status() == 101
        await client.ready()
        return client

    async def told(self, order: bytes) -> int:
        client = await self.opened()
        client.send(order)
        return await client.closed()

    def hold(self, client: Client) -> None:
        """Read nothing, and stay."""
        transport = client.writer.transport
        assert isinstance(transport, asyncio.ReadTransport)
        transport.pause_reading()
        self._held.append(client)
        self._client = None

    def over(self) -> None:
        """Leave nothing on this side."""
        if self._client is not None:
            self._client.reset()


# -- the deaths ------------------------------------------------------------------------------------


async def close_frame(death: Death) -> None:
    client = await death.opened()
    code = random.choice([1000, 1001, 3000, 4321])
    client.send(code.to_bytes(2, "big") + b"bye", opcode=8)
    assert await client.closed() == code


async def close_frame_without_code(death: Death) -> None:
    client = await death.opened()
    client.send(b"", opcode=8)
    await client.closed()


async def close_frame_and_gone(death: Death) -> None:
    client = await death.opened()
    client.send(struct.pack(">H", 1000), opcode=8)
    await client.writer.drain()
    client.reset()


async def fin(death: Death) -> None:
    (await death.opened()).hang_up()


async def half_closed(death: Death) -> None:
    client = await death.opened()
    client.writer.write_eof()
    await client.end()


async def rst(death: Death) -> None:
    (await death.opened()).reset()


async def in_half_a_handshake(death: Death) -> None:
    client = await death.client()
    client.writer.write(b"GET /ws HTTP/1.1\r\nHost: local")
    await client.writer.drain()
    random.choice([client.hang_up, client.reset])()


async def in_the_handshake(death: Death) -> None:
    client = await death.asked("/ws")
    await client.writer.drain()
    random.choice([client.hang_up, client.reset])()


async def while_the_view_thinks(death: Death) -> None:
    client = await death.asked("/never")
    await client.writer.drain()
    random.choice([client.hang_up, client.reset])()


async def mid_frame(death: Death) -> None:
    client = await death.opened()
    client.writer.write(bytes([0x81, 0xFE, 0x10, 0, 0, 0, 0, 0]) + b"the beginning")
    await client.writer.drain()
    random.choice([client.hang_up, client.reset])()


async def mid_message(death: Death) -> None:
    client = await death.opened()
    client.writer.write(bytes([0x01, 0x83, 0, 0, 0, 0]) + b"and")  # no FIN: more is to come
    await client.writer.drain()
    random.choice([client.hang_up, client.reset])()


async def view_returns(death: Death) -> None:
    assert await death.told(b"return") == 1000


async def view_raises(death: Death) -> None:
    assert await death.told(b"raise") == 1011


async def view_closes(death: Death) -> None:
    assert await death.told(b"close") == 4000


async def disconnected(death: Death) -> None:
    assert await death.told(b"disconnect") == 4401


async def view_closes_and_nobody_listens(death: Death) -> None:
    client = await death.opened()
    client.send(random.choice([b"return", b"raise", b"close", b"disconnect"]))
    await client.writer.drain()
    client.reset()


async def view_refuses(death: Death) -> None:
    how, status = random.choice([("abort", 418), ("return", 409)])
    client = await death.asked(f"/refuse/{how}")
    assert await client.status() == status


async def view_raises_before(death: Death) -> None:
    client = await death.asked("/refuse/raise")
    assert await client.status() == 500


async def oversized(death: Death) -> None:
    client = await death.opened()
    client.send(bytes(65_537), opcode=2)
    assert await client.closed() == 1009


async def protocol_error(death: Death) -> None:
    client = await death.opened()
    # No such opcode, bits that nobody asked for, the end of nothing, half a ping, no mask.
    wrong = random.choice([b"\x83\x80", b"\xf1\x80", b"\x80\x80", b"\x09\x80", b"\x81\x04"])
    client.writer.write(wrong + bytes(4))
    await client.end()  # with a close frame or without one: the server's own affair


async def slow_consumer(death: Death) -> None:
    client = await death.opened(subscribed=True, deaf=True)
    client.send(b"publish")
    await client.writer.drain()
    death.hold(client)


async def send_nobody_takes(death: Death) -> None:
    client = await death.opened(deaf=True)
    client.send(b"send")
    await client.writer.drain()
    death.hold(client)


async def never_accepted(death: Death) -> None:
    client = await death.asked("/never")
    assert await client.status() == 503


#: Every way to die, the one first that takes longest.
DEATHS: list[Callable[[Death], Awaitable[None]]] = [
    never_accepted,
    *(close_frame, close_frame_without_code, close_frame_and_gone, fin, half_closed, rst),
    *(in_half_a_handshake, in_the_handshake, while_the_view_thinks, mid_frame, mid_message),
    *(view_returns, view_raises, view_closes, disconnected, view_closes_and_nobody_listens),
    *(view_refuses, view_raises_before, oversized, protocol_error),
    *(slow_consumer, send_nobody_takes),
]


# -- the run ---------------------------------------------------------------------------------------


async def die(port: int, users: range, held: list[Client]) -> Counter[str]:
    """Have connections die, in all ways at the same time; how many did in each."""
    limits = {kind is never_accepted: asyncio.Semaphore(CLIENTS) for kind in DEATHS}
    limits[True] = asyncio.Semaphore(WAITING)
    died: Counter[str] = Counter()

    async def one(user: int) -> None:
        variant, number = divmod(user, len(DEATHS))
        kind = DEATHS[number]
        async with limits[kind is never_accepted]:
            death = Death(port, user, variant, held)
            try:
                async with asyncio.timeout(PATIENCE):
                    await kind(death)
            except Exception as error:
                raise AssertionError(f"{kind.__name__}, {death.path('')}: {error!r}") from error
            finally:
                death.over()
        died[kind.__name__] += 1

    async with asyncio.TaskGroup() as tasks:
        # What takes longest begins first.
        for user in sorted(users, key=lambda user: user % len(DEATHS) != 0):
            tasks.create_task(one(user))
    return died


def fetch(server: Served, path: str) -> Any:
    return json.loads(server.fetch(path).body)


def view_side_threads(server: Served) -> int:
    """Threads but for those of HTTP, which leave after ten idle seconds."""
    threads: int = server.threads() - fetch(server, "/stats")["http_threads"]
    return threads


class Rest:
    """A server that nobody uses, and what must be the same again when nobody does."""

    def __init__(self, server: Served) -> None:
        self._server = server
        fetch(server, "/stats")
        self.threads = settled(lambda: view_side_threads(server))
        self.descriptors = settled(server.descriptors)

    def wait(self) -> None:
        """Wait until everything is as it was."""
        try:
            wait_until(lambda: not self._left(), PATIENCE)
        except TimeoutError:
            raise AssertionError(f"Not as it was before: {self._left()}") from None

    def _left(self) -> dict[str, int]:
        stats = fetch(self._server, "/stats")
        left = {name: stats[name] for name in AT_REST if stats[name]}
        if not left:
            alive: dict[str, int] = fetch(self._server, "/alive")
            left = {name: count for name, count in alive.items() if count}
        if (descriptors := self._server.descriptors()) != self.descriptors:
            left["descriptors"] = descriptors - self.descriptors
        if (threads := view_side_threads(self._server)) != self.threads:
            left["threads"] = threads - self.threads
        return left


def settled(measure: Callable[[], int]) -> int:
    """What *measure* says once it has said the same for a while: nothing is under way any more."""
    seen: list[int] = []

    def steady() -> bool:
        seen.append(measure())
        return len(seen) > 20 and len(set(seen[-20:])) == 1

    wait_until(steady, PATIENCE, "a steady measure")
    return seen[-1]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Start]:
    with serving(tmp_path) as start:
        yield start


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["fast", "plain"], ids=["sansio", "wsproto"])
def test_deaths_leave_nothing_behind(
    serve: Start,
    kind: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Registry, threads, descriptors, objects and memory are what they were before."""
    everything = request.config.getoption("--faults", default="") == "all"
    server = serve(SERVED, kind=kind, settings=SETTINGS)
    rest = Rest(server)
    died: Counter[str] = Counter()
    resident: list[int] = []

    started = time.monotonic()
    for number in ALL if everything else QUICK:
        held: list[Client] = []

        async def chunk(users: range, held: list[Client] = held) -> Counter[str]:
            try:
                died = await die(server.port, users, held)
                # Those that read nothing are still there, and the server has forgotten them.
                await asyncio.to_thread(rest.wait)
                return died
            finally:
                for client in held:
                    client.reset()

        died += asyncio.run(chunk(range(died.total(), died.total() + number)))
        resident.append(server.resident_bytes())
    seconds = time.monotonic() - started

    before, growth = resident[0], resident[-1] - resident[0]
    stats = fetch(server, "/stats")
    with capsys.disabled():
        print(
            f"\n  {died.total()} deaths of {len(died)} kinds in {seconds:.1f} s; {rest.threads} "
            f"threads and {rest.descriptors} descriptors before and after; memory "
            f"{before / 2**20:.1f} MiB, then {growth / 2**20:+.1f} MiB ({growth / before:+.1%})"
        )
    assert died.total() >= 20_000 or not everything
    assert len(died) == len(DEATHS)
    assert growth < SHARE * before
    # Each died of what it was meant to.
    assert stats["disconnected"] >= died["disconnected"]
    assert stats["oversized"] in (0, died["oversized"])  # the server may be the first to see it
    # Which of several limits is the first to see that a peer reads nothing, is open: the kernel's
    # counts as well, and one that is sent to is published to by its neighbours.
    assert stats["closed_slow"] > 0
    assert stats["send_timeouts"] > 0
    assert stats["handshake_timeouts"] == died["never_accepted"]
    assert stats["stuck_views"] == 0
    refused = [name for name, number in stats.items() if name.startswith("refused") and number]
    assert refused == []
    if everything:
        wait_until(lambda: server.threads() == rest.threads, PATIENCE, "no thread of HTTP's")
    assert "Traceback" not in server.log()
