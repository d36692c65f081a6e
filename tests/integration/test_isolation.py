"""Nothing of one connection is ever seen by another: g, session, request, context variables."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from flask import Flask
from flask.sessions import SecureCookieSessionInterface

from . import isolation_app
from .conftest import IMPLEMENTATIONS, ServerProcess
from .waiting import wait_until

SOURCE = Path(isolation_app.__file__).read_text()
#: Connections and requests at the same time.
PARALLEL = 75
#: Every wait of a client, in seconds.
PATIENCE = 20.0

CLOSE = 8
TEXT = 1


# -- what clients do -------------------------------------------------------------------------------


class Unexpected(Exception):
    """The server did something else than the view of this kind does."""


def expect(what: str, seen: object, expected: object) -> None:
    if seen != expected:
        raise Unexpected(f"{what}: {seen!r}, not {expected!r}")


signer = Flask("signer")
signer.secret_key = isolation_app.SECRET
sessions = SecureCookieSessionInterface().get_signing_serializer(signer)
assert sessions is not None


class Client:
    """One connection with a token of its own, which is all that it ever says."""

    def __init__(self, port: int, path: str, token: str) -> None:
        self.token = token
        self._port = port
        self._path = path

    async def open(self, *, upgrade: bool = True) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        fields = [
            f"GET {self._path}?token={self.token} HTTP/1.1",
            f"Host: 127.0.0.1:{self._port}",
            f"X-Token: {self.token}",
            f"Cookie: session={sessions.dumps({'token': self.token})}",
        ]
        if upgrade:
            fields += [
                "Connection: Upgrade",
                "Upgrade: websocket",
                "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            ]
        else:
            fields.append("Connection: close")
        self._writer.write("\r\n".join([*fields, "", ""]).encode())
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lines = head.split("\r\n")
        self.status = int(lines[0].split(" ")[1])
        self.headers = {
            name.lower(): value
            for name, _, value in (line.partition(": ") for line in lines[1:] if line)
        }

    async def accepted(self) -> None:
        await self.open()
        expect("status", self.status, 101)

    async def refused(self, status: int, body: str | None = None) -> None:
        await self.open()
        expect("status", self.status, status)
        if body is not None:
            expect("body", await self.read_body(), body)

    async def read_body(self) -> str:
        length = int(self.headers["content-length"])
        return (await self._reader.readexactly(length)).decode()

    async def receive(self) -> tuple[int, bytes]:
        """The next frame; those of this test are short."""
        first, length = await self._reader.readexactly(2)
        if length > 125:
            raise Unexpected(f"a frame of more than 125 bytes: {length}")
        return first & 0x0F, await self._reader.readexactly(length)

    async def receive_token(self) -> None:
        expect("message", await self.receive(), (TEXT, self.token.encode()))

    def send(self, data: bytes, opcode: int = TEXT) -> None:
        # A mask of zeros is a mask, and leaves the data as it is.
        self._writer.write(bytes((0x80 | opcode, 0x80 | len(data), 0, 0, 0, 0)) + data)

    def send_token(self) -> None:
        self.send(self.token.encode())

    async def receive_close(self, code: int) -> None:
        opcode, data = await self.receive()
        expect("frame", (opcode, int.from_bytes(data[:2], "big")), (CLOSE, code))
        self.send(data[:2], CLOSE)

    async def say_goodbye(self) -> None:
        self.send((1000).to_bytes(2, "big"), CLOSE)
        await self.receive_close(1000)

    def vanish(self, *, reset: bool) -> None:
        if reset:
            transport_socket = self._writer.get_extra_info("socket")
            linger = struct.pack("ii", 1, 0)
            transport_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()

    def leave(self) -> None:
        if hasattr(self, "_writer"):
            self._writer.transport.abort()


async def echo(client: Client, chance: random.Random) -> None:
    await client.accepted()
    await client.receive_token()
    for _ in range(chance.randint(1, 3)):
        client.send_token()
        await client.receive_token()
    await client.say_goodbye()


async def early(client: Client, chance: random.Random) -> None:
    await client.refused(500, client.token)


async def late(client: Client, chance: random.Random) -> None:
    await client.accepted()
    await client.receive_token()
    client.send_token()
    await client.receive_close(1011)


async def abort(client: Client, chance: random.Random) -> None:
    await client.refused(418)


async def abort_late(client: Client, chance: random.Random) -> None:
    await client.accepted()
    await client.receive_token()
    await client.receive_close(4409)


async def response(client: Client, chance: random.Random) -> None:
    await client.refused(402, client.token)


async def leave(client: Client, chance: random.Random) -> None:
    await client.accepted()
    await client.receive_token()
    client.vanish(reset=chance.random() < 0.5)


async def state(client: Client, chance: random.Random) -> None:
    await client.accepted()
    cookie = client.headers["set-cookie"].partition(";")[0].removeprefix("session=")
    saved = sessions.loads(cookie)
    expect("the saved session", (saved["token"], saved["note"]), (client.token, client.token))
    await client.receive_token()
    for _ in range(chance.randint(1, 2)):
        client.send_token()
        await client.receive_token()
    await client.say_goodbye()


async def spawn(client: Client, chance: random.Random) -> None:
    await client.accepted()
    for _ in range(3):
        await client.receive_token()
    client.send_token()
    await client.receive_close(1000)


async def http(client: Client, chance: random.Random) -> None:
    await client.open(upgrade=False)
    expect("status", client.status, 200)
    expect("body", await client.read_body(), client.token)


async def http_early(client: Client, chance: random.Random) -> None:
    await client.open(upgrade=False)
    expect("status", client.status, 500)
    expect("body", await client.read_body(), client.token)


Act = Callable[[Client, random.Random], Awaitable[None]]

WEBSOCKET_KINDS: dict[str, Act] = {
    act.__name__: act
    for act in (echo, early, late, abort, abort_late, response, leave, state, spawn)
}
#: What is at which path: each kind with a sync and with an async view, and requests among them.
KINDS: dict[str, Act] = {
    **{
        f"{flavour} {name}": act
        for flavour in ("sync", "async")
        for name, act in WEBSOCKET_KINDS.items()
    },
    "http sync": http,
    "http async": http,
    "http early": http_early,
}


async def run_clients(
    port: int, kinds: list[str], chance: random.Random, parallel: int = PARALLEL
) -> list[str]:
    """One connection of each of *kinds*, *parallel* at a time; return what was unexpected."""
    unexpected: list[str] = []
    numbers = iter(range(len(kinds)))

    async def work() -> None:
        for number in numbers:
            kind = kinds[number]
            client = Client(port, "/" + kind.replace(" ", "/"), f"t{number}")
            try:
                async with asyncio.timeout(PATIENCE):
                    await KINDS[kind](client, chance)
            except (Unexpected, OSError, EOFError, TimeoutError, KeyError) as error:
                unexpected.append(f"{kind} {client.token}: {error!r}")
            finally:
                client.leave()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(parallel):
            tasks.create_task(work())
    return unexpected


# -- what the server has seen ----------------------------------------------------------------------


def results(server: ServerProcess) -> dict[str, Any]:
    with urlopen(server.url("/results"), timeout=PATIENCE) as answer:
        report: dict[str, Any] = json.loads(answer.read())
        return report


def results_at_the_end(server: ServerProcess) -> dict[str, Any]:
    """Wait until no connection and no view is left, and report."""

    def ended() -> dict[str, Any] | None:
        report = results(server)
        entered = sum(
            count for name, count in report["counts"].items() if name.startswith("entered ")
        )
        over = report["counts"].get("torn down", 0) == entered
        return report if over and report["stats"]["connections"] == 0 else None

    report: dict[str, Any] = wait_until(ended, 30, "the teardown of every view")
    return report


@pytest.fixture
def serve(start_server: Callable[..., ServerProcess]) -> Callable[..., ServerProcess]:
    """Serve a factory of ``isolation_app`` with uvicorn."""

    def serve(factory: str, *options: str) -> ServerProcess:
        command = [sys.executable, "-m", "uvicorn", "--port", "{port}", "--no-access-log"]
        return start_server(SOURCE, [*command, *options, "--factory", f"served:{factory}"])

    return serve


def check_isolation(server: ServerProcess, connections: int, seed: int) -> dict[str, Any]:
    """Many connections of random kinds, side by side: nobody sees anything of anybody else."""
    chance = random.Random(seed)
    kinds = chance.choices(list(KINDS), k=connections)
    unexpected = asyncio.run(run_clients(server.port, kinds, chance))
    report = results_at_the_end(server)
    assert report["leaks"] == []
    assert unexpected == []
    counts = report["counts"]
    entered = {kind: counts.get(f"entered {kind}", 0) for kind in KINDS}
    assert entered == dict(Counter(kinds))
    assert min(entered.values()) > 0
    assert "Traceback" not in server.log()
    return report


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ten_thousand_connections_see_only_themselves(serve, capsys):
    """10,000 connections on uvicorn as it comes: failing views, leaving clients, threads, tasks."""
    server = serve("serve")
    started = time.monotonic()
    report = check_isolation(server, 10_000, seed=10_000)
    seconds = time.monotonic() - started
    with capsys.disabled():
        print(f"\n  10,000 connections, {sum(report['checks'].values())} checks, {seconds:.1f} s")


def test_five_hundred_connections_on_wsproto(serve):
    """The same with what the five dependencies give."""
    check_isolation(serve("serve", *IMPLEMENTATIONS["wsproto"]), 500, seed=500)


# -- the checks can see a leak ---------------------------------------------------------------------

LEAKS = {
    "leak_context": ("variable", "before_request"),
    "leak_g": ("g", "before_request"),
    "leak_session": ("session", "before_request"),
    "leak_request": ("headers", "the view's beginning"),
    "leak_between": ("request", "a sync view, after a receive"),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_seen(serve, leak):
    """An application that leaks on purpose is found out, by what it leaks and where."""
    server = serve(leak)
    chance = random.Random(leak)
    asyncio.run(run_clients(server.port, ["sync echo"] * 5, chance, parallel=1))
    report = results_at_the_end(server)
    what, where = LEAKS[leak]
    assert (what, where) in {(found["what"], found["where"]) for found in report["leaks"]}
    assert report["counts"][f"leaks of {what}"] >= 4  # the first has nobody to see


def test_a_leak_of_an_async_view_is_seen(serve):
    """A task that finds itself in another connection's context is found out."""
    server = serve("leak_between")
    asyncio.run(run_clients(server.port, ["async echo"] * 5, random.Random(1), parallel=1))
    report = results_at_the_end(server)
    found = {(leak["what"], leak["where"]) for leak in report["leaks"]}
    assert ("request", "an async view, after a receive") in found
    assert ("variable", "an async view, after a sleep") in found
