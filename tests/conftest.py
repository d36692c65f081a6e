"""An application, its extension, and a client that speaks WebSocket to it in process."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio

# Its pytest plugin imports it at the end of a run if nobody else has, and it asks the collector who
# refers to trio's random numbers: of what a server has frozen meanwhile the collector says nothing.
import hypothesis  # noqa: F401
import pytest
from flask import Flask

from flask_websockets import WebSockets
from flask_websockets.testing import WebSocketClient


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--servers",
        default="",
        metavar="all|NAME,NAME",
        help="run the behaviour suite and the endings on these servers, all of them installed",
    )
    parser.addoption(
        "--screenshots",
        action="store_true",
        help="write the documentation's pictures of the examples anew",
    )


@pytest.fixture
def app() -> Flask:
    app = Flask("tests")
    app.secret_key = "not a secret"
    app.config.update(WEBSOCKETS_CLOSE_TIMEOUT=2, WEBSOCKETS_SEND_TIMEOUT=5)
    return app


@pytest.fixture
def websockets(app: Flask) -> WebSockets:
    return WebSockets(app)


@pytest.fixture
def client(websockets: WebSockets) -> WebSocketClient:
    return websockets.test_client()


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[Any]]], Any]:
    """Run a coroutine function on a loop, once of each kind, at most 20 seconds."""

    def run(main: Callable[[], Awaitable[Any]]) -> Any:
        async def bounded() -> Any:
            with anyio.fail_after(20):
                return await main()

        return anyio.run(bounded, backend=request.param)

    return run


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """No view and no loop outlives its test (I9)."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("flask-websockets") and "http" not in thread.name:
            thread.join(5)
            assert not thread.is_alive(), f"{thread.name} is still running"
