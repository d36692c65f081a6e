"""Two thousand sync views, each blocked on a thread of its own, and HTTP beside them."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.request import urlopen

import pytest
from websockets.asyncio.client import ClientConnection, connect

from .conftest import ServerProcess
from .waiting import wait_until

VIEWS = 2_000
#: Descriptors and threads beside one for each view: files, pipes, the event loop's own.
SPARE = 200
#: Handshakes under way at the same time, below WEBSOCKETS_MAX_HANDSHAKES.
OPENING = 50
#: Threads beside those of the views: the HTTP pool's, for one request after the other.
SPARE_THREADS = 10
#: Every wait, in seconds.
PATIENCE = 20.0

SERVED = """
    import resource
    from dataclasses import asdict

    from flask import Flask
    from flask_websockets import WebSocket, WebSockets

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    app = Flask(__name__)
    websockets = WebSockets(app)

    @websockets.route("/echo")
    def echo(ws: WebSocket) -> None:
        for data in ws.iter_data():
            ws.send(data)

    @app.get("/stats")
    def stats():
        return asdict(websockets.stats())

    asgi = websockets.asgi_app()
"""


@pytest.fixture
def high_limits():
    """Raise the soft limit of open files for this process, for the length of a test."""
    for limit, what in ((resource.RLIMIT_NOFILE, "open files"), (resource.RLIMIT_NPROC, "threads")):
        needed, hard = VIEWS + SPARE, resource.getrlimit(limit)[1]
        if hard != resource.RLIM_INFINITY and hard < needed:
            pytest.skip(f"needs {needed} {what}, and the hard limit is {hard}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < VIEWS + SPARE:
        resource.setrlimit(resource.RLIMIT_NOFILE, (VIEWS + SPARE, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def fetch_stats(server: ServerProcess) -> dict[str, Any]:
    with urlopen(server.url("/stats"), timeout=PATIENCE) as response:
        stats: dict[str, Any] = json.loads(response.read())
        return stats


@asynccontextmanager
async def open_views(server: ServerProcess, count: int) -> AsyncIterator[list[ClientConnection]]:
    """*count* connections, closed together at the end."""
    opening = asyncio.Semaphore(OPENING)
    clients: list[ClientConnection] = []

    async def open_one() -> None:
        async with opening:
            clients.append(
                await connect(
                    server.ws_url("/echo"), compression=None, proxy=None, open_timeout=PATIENCE
                )
            )

    async with AsyncExitStack() as stack:
        stack.push_async_callback(lambda: asyncio.gather(*(one.close() for one in clients)))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(count):
                tasks.create_task(open_one())
        yield clients


async def echo(client: ClientConnection, text: str) -> None:
    await client.send(text)
    assert await asyncio.wait_for(client.recv(), PATIENCE) == text


@pytest.mark.slow
def test_two_thousand_views_at_once(uvicorn_server, high_limits, capsys):
    """2,000 views wait on 2,000 threads, HTTP answers meanwhile, and all of them can still echo."""
    server = uvicorn_server(SERVED)
    fetch_stats(server)
    threads, descriptors = server.threads(), server.descriptors()
    figures = {}

    async def run() -> None:
        started = time.monotonic()
        async with open_views(server, VIEWS) as clients:
            figures["opened in s"] = time.monotonic() - started
            for number in range(10):
                stats = await asyncio.to_thread(fetch_stats, server)
                assert stats["connections"] == stats["view_threads"] == VIEWS
                await echo(clients[number * VIEWS // 10], f"between requests {number}")
            assert VIEWS <= server.threads() - threads <= VIEWS + SPARE_THREADS
            figures["threads"] = server.threads()
            figures["MiB"] = server.resident_bytes() / 2**20
            # All views at once, and HTTP in the middle of it.
            started = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                for number, client in enumerate(clients):
                    tasks.create_task(echo(client, f"all together {number}"))
                for _ in range(10):
                    tasks.create_task(asyncio.to_thread(fetch_stats, server))
            figures["all echoed in s"] = time.monotonic() - started

    asyncio.run(run())
    wait_until(
        lambda: not any(fetch_stats(server)[name] for name in ("connections", "view_threads")),
        30,
        "the end of every view",
    )
    wait_until(lambda: server.descriptors() <= descriptors, 30, f"{descriptors} descriptors")
    # The HTTP pool's threads end after some seconds without a request; one was counted.
    wait_until(lambda: server.threads() <= threads, 30, f"the return to {threads} threads")
    with capsys.disabled():
        print("\n  " + ", ".join(f"{name}: {value:.4g}" for name, value in figures.items()))
    stats = fetch_stats(server)
    assert stats["connections_total"] == VIEWS
    assert stats["refused_full"] == stats["handshake_timeouts"] == stats["stuck_views"] == 0
    assert "Traceback" not in server.log()
