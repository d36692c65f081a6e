"""Tens of thousands of mixed requests: every answer is right, and nothing is left behind."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from urllib.request import urlopen

import pytest

from .conftest import ServerProcess
from .waiting import wait_until

#: Threads of the server, and clients: with more of these, requests queue.
HTTP_THREADS = 8
CLIENTS = 16

SERVED = """
    import hashlib
    import threading
    from collections import Counter

    from flask import Flask, Response, abort, jsonify, redirect, request

    import flask_websockets.bridge.threads
    from flask_websockets import WebSockets

    # Short, so that the test need not wait long for the threads to end.
    assert flask_websockets.bridge.threads.IDLE_SECONDS == 10
    flask_websockets.bridge.threads.IDLE_SECONDS = 2.0

    app = Flask(__name__)
    app.config.update(WEBSOCKETS_HTTP_THREADS=HTTP_THREADS_HERE)
    websockets = WebSockets(app)
    BASE = hashlib.shake_128(b"base").digest(300_000)
    calls, teardowns = Counter(), Counter()  # guarded by counting
    counting = threading.Lock()

    @app.before_request
    def count_call():
        with counting:
            calls[str(request.endpoint)] += 1

    @app.teardown_request
    def count_teardown(error):
        with counting:
            teardowns[str(request.endpoint)] += 1

    @app.get("/hello/<name>")
    def hello(name):
        return f"Hello, {name}, {request.args.get('q')}!"

    @app.post("/json")
    def sum_up():
        return jsonify(sum=sum(request.json["numbers"]), echo=request.json["text"])

    @app.post("/digest")
    def digest():
        return hashlib.sha256(request.get_data()).hexdigest()

    @app.get("/stream/<int:start>/<int:pieces>")
    def stream(start, pieces):
        return Response(BASE[start + n : start + n + 3000] for n in range(pieces))

    @app.get("/sized/<int:size>")
    def sized(size):
        return BASE[:size]

    @app.get("/from")
    def moved():
        return redirect(f"/hello/{request.args['to']}")

    @app.get("/made")
    def made():
        abort(503, "by the application")

    @app.post("/swallow")
    def swallow():
        return str(len(request.get_data()))

    @app.get("/long")
    def long():
        def generate():
            with counting:
                calls["generators"] += 1
            try:
                while True:
                    yield BASE[:20_000]
            finally:
                with counting:
                    teardowns["generators"] += 1
        return Response(generate())

    @app.get("/counted")
    def counted():
        with counting:
            return jsonify(
                calls=calls, teardowns=teardowns, refused=websockets.stats().http_refused
            )

    asgi = websockets.asgi_app()
"""

BASE = hashlib.shake_128(b"base").digest(300_000)

#: Requests by implementation: 60,000 in all, of which the slower one gets its share.
REQUESTS = {"sansio": 50_000, "wsproto": 10_000}

SEED = 20261122

#: Bytes by which the resident memory may grow after the first 40 % of the requests. The allocator
#: keeps some MiB more or less, by how many uploads met; 300 bytes left behind by each of the last
#: 30,000 requests reach the bound, and so does one body in a hundred.
MEMORY_BOUND = 8 << 20

#: Seconds that one turn of a client may take.
PATIENCE = 30.0


class Connection:
    """A keep-alive connection to the server, which reads answers one by one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 20))

    async def answer(self, *, head: bool = False) -> tuple[int, dict[str, str], bytes]:
        """The next response."""
        start, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {}
        for line in lines[:-2]:
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        if head:
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = await self._chunked()
        else:
            body = await self.reader.readexactly(int(headers["content-length"]))
        return int(start.split(" ", 2)[1]), headers, body

    async def _chunked(self) -> bytes:
        pieces = []
        while size := int(await self.reader.readline(), 16):
            pieces.append(await self.reader.readexactly(size))
            assert await self.reader.readexactly(2) == b"\r\n"
        assert await self.reader.readexactly(2) == b"\r\n"
        return b"".join(pieces)

    def reset(self) -> None:
        """Have the kernel send RST instead of FIN."""
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()


def request(method: str, target: str, *lines: str, body: bytes | None = None) -> bytes:
    head = [f"{method} {target} HTTP/1.1", "Host: localhost", *lines]
    if body is not None:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode() + (body or b"")


class Client:
    """One user: turns of all sorts, chosen by a random number generator of its own."""

    def __init__(self, port: int, name: str, requests: int) -> None:
        self._port = port
        self._random = random.Random(f"{SEED} {name}")
        self._left = requests
        self._connection: Connection | None = None
        #: Requests by endpoint, of those that were answered.
        self.answered: Counter[str] = Counter()
        self.aborted: Counter[str] = Counter()

    async def run(self) -> None:
        names, weights = zip(*TURNS.items(), strict=True)
        try:
            while self._left > 0:
                turn = self._random.choices(names, weights)[0]
                if self._connection is None:
                    self._connection = await Connection.open(self._port)
                try:
                    async with asyncio.timeout(PATIENCE):
                        self._left -= await turn(self, self._connection)
                except BaseException as error:
                    error.add_note(f"in {turn.__name__}")
                    raise
        finally:
            await self._drop()

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    def _hello(self) -> tuple[str, bytes]:
        name, q = self._random.randrange(10**9), self._random.randrange(10**9)
        return f"/hello/{name}?q={q}", f"Hello, {name}, {q}!".encode()

    def _data(self, most: int) -> bytes:
        size = self._random.randrange(most)
        start = self._random.randrange(len(BASE) - size)
        return BASE[start : start + size]

    async def get(self, connection: Connection) -> int:
        target, expected = self._hello()
        connection.writer.write(request("GET", target))
        status, _, body = await connection.answer()
        assert (status, body) == (200, expected)
        self.answered["hello"] += 1
        return 1

    async def get_and_close(self, connection: Connection) -> int:
        target, expected = self._hello()
        connection.writer.write(request("GET", target, "Connection: close"))
        status, _, body = await connection.answer()
        assert (status, body) == (200, expected)
        assert await connection.reader.read() == b""
        await self._drop()
        self.answered["hello"] += 1
        return 1

    async def head(self, connection: Connection) -> int:
        target, expected = self._hello()
        connection.writer.write(request("HEAD", target))
        status, headers, _ = await connection.answer(head=True)
        assert (status, headers["content-length"]) == (200, str(len(expected)))
        self.answered["hello"] += 1
        return 1

    async def pipelined(self, connection: Connection) -> int:
        burst = [self._hello() for _ in range(self._random.randrange(2, 12))]
        connection.writer.write(b"".join(request("GET", target) for target, _ in burst))
        for _, expected in burst:
            status, _, body = await connection.answer()
            assert (status, body) == (200, expected)
        self.answered["hello"] += len(burst)
        return len(burst)

    async def post_json(self, connection: Connection) -> int:
        numbers = [self._random.randrange(1000) for _ in range(self._random.randrange(30))]
        text = "é" * self._random.randrange(100)
        body = json.dumps({"numbers": numbers, "text": text}).encode()
        connection.writer.write(
            request("POST", "/json", "Content-Type: application/json", body=body)
        )
        status, _, body = await connection.answer()
        assert status == 200
        assert json.loads(body) == {"sum": sum(numbers), "echo": text}
        self.answered["sum_up"] += 1
        return 1

    async def upload(self, connection: Connection) -> int:
        data = self._data(200_000)
        connection.writer.write(request("POST", "/digest", body=data))
        return await self._check_digest(connection, data)

    async def chunked_upload(self, connection: Connection) -> int:
        data = self._data(100_000)
        connection.writer.write(request("POST", "/digest", "Transfer-Encoding: chunked"))
        start = 0
        while start < len(data):
            chunk = data[start : start + self._random.randrange(1, 40_000)]
            start += len(chunk)
            connection.writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            if self._random.random() < 0.5:
                await connection.writer.drain()
                await asyncio.sleep(0)
        connection.writer.write(b"0\r\n\r\n")
        return await self._check_digest(connection, data)

    async def _check_digest(self, connection: Connection, data: bytes) -> int:
        status, _, body = await connection.answer()
        assert (status, body.decode()) == (200, hashlib.sha256(data).hexdigest())
        self.answered["digest"] += 1
        return 1

    async def stream(self, connection: Connection) -> int:
        start, pieces = self._random.randrange(250_000), self._random.randrange(30)
        connection.writer.write(request("GET", f"/stream/{start}/{pieces}"))
        status, headers, body = await connection.answer()
        assert status == 200
        assert "content-length" not in headers
        assert body == b"".join(BASE[start + n : start + n + 3000] for n in range(pieces))
        self.answered["stream"] += 1
        return 1

    async def sized(self, connection: Connection) -> int:
        size = self._random.randrange(len(BASE))
        connection.writer.write(request("GET", f"/sized/{size}"))
        status, _, body = await connection.answer()
        assert (status, body) == (200, BASE[:size])
        self.answered["sized"] += 1
        return 1

    async def not_found(self, connection: Connection) -> int:
        connection.writer.write(request("GET", "/nowhere"))
        status, _, body = await connection.answer()
        assert status == 404
        assert b"Not Found" in body
        self.answered["None"] += 1
        return 1

    async def redirected(self, connection: Connection) -> int:
        name = self._random.randrange(10**9)
        connection.writer.write(request("GET", f"/from?to={name}"))
        status, headers, _ = await connection.answer()
        assert (status, headers["location"]) == (302, f"/hello/{name}")
        connection.writer.write(request("GET", headers["location"]))
        status, _, body = await connection.answer()
        assert (status, body) == (200, f"Hello, {name}, None!".encode())
        self.answered["moved"] += 1
        self.answered["hello"] += 1
        return 2

    async def made_by_the_application(self, connection: Connection) -> int:
        connection.writer.write(request("GET", "/made"))
        status, _, body = await connection.answer()
        assert status == 503
        assert b"by the application" in body
        self.answered["made"] += 1
        return 1

    async def aborted_upload(self, connection: Connection) -> int:
        if self._random.random() < 0.5:
            head = request("POST", "/swallow", "Content-Length: 200000")
            data = self._data(150_000)
        else:
            head = request("POST", "/swallow", "Transfer-Encoding: chunked")
            data = b"10000\r\n" + self._data(65_000)
        connection.writer.write(head + data)
        if self._random.random() < 0.8:
            await connection.writer.drain()
        await self._leave(connection)
        self.aborted["swallow"] += 1
        return 1

    async def aborted_download(self, connection: Connection) -> int:
        connection.writer.write(request("GET", "/long"))
        if self._random.random() < 0.8:
            assert (await connection.reader.readline()).startswith(b"HTTP/1.1 200")
            await connection.reader.readexactly(self._random.randrange(60_000))
        await self._leave(connection)
        self.aborted["long"] += 1
        return 1

    async def _leave(self, connection: Connection) -> None:
        if self._random.random() < 0.5:
            connection.reset()
        await self._drop()


#: How often each comes.
TURNS: dict[Callable[[Client, Connection], Awaitable[int]], int] = {
    Client.get: 40,
    Client.get_and_close: 3,
    Client.head: 6,
    Client.pipelined: 5,
    Client.post_json: 15,
    Client.upload: 3,
    Client.chunked_upload: 4,
    Client.stream: 5,
    Client.sized: 3,
    Client.not_found: 6,
    Client.redirected: 4,
    Client.made_by_the_application: 1,
    Client.aborted_upload: 3,
    Client.aborted_download: 3,
}


async def run_clients(
    server: ServerProcess, phase: str, requests: int, threads: list[int]
) -> list[Client]:
    """Have all clients make *requests* together; note how many threads the server has."""
    clients = [
        Client(server.port, f"{phase} {number}", requests // CLIENTS) for number in range(CLIENTS)
    ]

    async def watch() -> None:
        while True:
            threads.append(server.threads())
            await asyncio.sleep(0.1)

    watcher = asyncio.create_task(watch())
    try:
        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(client.run())
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
    return clients


def counted(server: ServerProcess) -> dict[str, Counter[str]]:
    with urlopen(server.url("/counted"), timeout=PATIENCE) as response:
        said = json.loads(response.read())
    refused = said.pop("refused")
    assert refused == 0
    return {name: Counter(count) for name, count in said.items()}


def wait_until_quiet(server: ServerProcess) -> dict[str, Counter[str]]:
    """Wait until every call of a view has been torn down, and every generator has ended."""

    def quiet() -> dict[str, Counter[str]] | None:
        count = counted(server)
        count["calls"]["counted"] -= 1  # this one
        return count if count["calls"] == count["teardowns"] else None

    return wait_until(quiet, PATIENCE, "the end of every view and generator")


def settled(measure: Callable[[], int]) -> int:
    """What *measure* says once it has said the same for a while."""
    seen: list[int] = []

    def steady() -> bool:
        seen.append(measure())
        return len(seen) > 20 and len(set(seen[-20:])) == 1

    wait_until(steady, 20, "a steady measure")
    return seen[-1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mixed_requests_leave_nothing_behind(uvicorn_server, implementation, capsys):
    """Right answers only, a clean log; threads, descriptors and memory are as they were."""
    requests = REQUESTS[implementation]
    server = uvicorn_server(SERVED.replace("HTTP_THREADS_HERE", str(HTTP_THREADS)))
    base, descriptors = settled(server.threads), settled(server.descriptors)
    threads: list[int] = []
    clients: list[Client] = []
    started = time.monotonic()

    clients += asyncio.run(run_clients(server, "warm-up", requests * 4 // 10, threads))
    wait_until_quiet(server)
    warm = server.resident_bytes()
    clients += asyncio.run(run_clients(server, "soak", requests * 6 // 10, threads))
    count = wait_until_quiet(server)
    growth = server.resident_bytes() - warm
    seconds = time.monotonic() - started

    answered = sum((client.answered for client in clients), Counter())
    aborted = sum((client.aborted for client in clients), Counter())
    with capsys.disabled():
        print(
            f"\n  {requests} requests in {seconds:.1f} s, {aborted.total()} of them aborted; "
            f"{base} threads, at most {max(threads)}; {descriptors} descriptors; "
            f"memory {warm / 2**20:.1f} MiB, then {growth / 2**20:+.1f} MiB"
        )
    # Every answer was made by one call of its view, and no call was made for nothing.
    assert {name: count["calls"][name] for name in answered} == answered
    for name in aborted:
        assert count["calls"][name] <= aborted[name]
    assert base < max(threads) <= base + HTTP_THREADS
    assert growth < MEMORY_BOUND
    wait_until(lambda: server.threads() <= base, PATIENCE, f"the return to {base} threads")
    wait_until(lambda: server.descriptors() == descriptors, PATIENCE, f"{descriptors} descriptors")
    log = server.log()
    for word in ("Traceback", "ERROR", "CRITICAL", "WARNING", "exception", "Exception"):
        assert word not in log, log[-5000:]
