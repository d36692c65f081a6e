"""The HTTP adapter: the request's task, where the other suites look at its answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from flask import Flask, request

from flask_websockets import WebSockets, wsgi

from .asgi_driver import TIMEOUT, wait_until
from .http_driver import exchange

Run = Callable[[Callable[..., Any]], Any]


@pytest.mark.parametrize("http_version", ["2", "3"])
def test_a_body_without_a_length(run: Run, app: Flask, http_version: str) -> None:
    """The view does not wait for a body that HTTP/2 and HTTP/3 announce with no header."""
    asgi = WebSockets(app).asgi_app()
    app.post("/")(lambda: request.headers.get("x-early") or request.get_data())

    async def main() -> None:
        early = [("x-early", "not read")]
        async with exchange(
            asgi, "POST", headers=early, body=None, http_version=http_version
        ) as it:
            assert await it.get_status() == 200
            assert await it.read() == b"not read"
        async with exchange(asgi, "POST", body=None, http_version=http_version) as it:
            it.put_body(b"all of ", more=True)
            it.put_body(b"it")
            assert (await it.answer()).body == b"all of it"

    run(main)


def test_a_silent_upload(run: Run, app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends nothing of its body gets 408, and is counted."""
    monkeypatch.setattr(wsgi, "BODY_TIMEOUT", 0.1)
    websockets = WebSockets(app)
    asgi = websockets.asgi_app()
    app.post("/")(lambda: request.get_data())

    async def main() -> None:
        async with exchange(asgi, "POST", "/", [("content-length", "9")], body=None) as it:
            it.put_body(b"some", more=True)
            assert await it.get_status() == 408
        assert websockets.stats().body_timeouts == 1

    run(main)


def test_a_call_whose_client_left_is_not_made(run: Run, app: Flask) -> None:
    """An upload that is given up while it waits for a thread does not reach the application."""
    app.config["WEBSOCKETS_HTTP_THREADS"] = 1
    asgi = WebSockets(app).asgi_app()
    entered, goes_on = threading.Event(), threading.Event()
    called = []

    @app.get("/slow")
    def slow() -> str:
        entered.set()
        assert goes_on.wait(TIMEOUT)
        return "slow"

    @app.post("/<name>")
    def upload(name: str) -> str:
        called.append(name)
        return name

    async def main() -> None:
        called.clear()
        entered.clear()
        goes_on.clear()
        async with exchange(asgi, "GET", "/slow") as blocking:
            await wait_until(entered.is_set)
            async with exchange(asgi, "POST", "/gone", [("content-length", "9")], body=None) as it:
                await wait_until(lambda: it.reads)
                it.leave()
                await it.returned.wait()
            goes_on.set()
            assert (await blocking.answer()).body == b"slow"
        async with exchange(asgi, "POST", "/next") as after:
            assert (await after.answer()).body == b"next"
        assert called == ["next"]

    run(main)


def test_what_receive_raises_is_raised_as_itself(run: Run, app: Flask) -> None:
    """An ASGI middleware that limits uploads gets its own exception back, not a group of it."""
    asgi = WebSockets(app).asgi_app()
    app.post("/")(lambda: request.get_data())

    class TooMuch(Exception):
        pass

    async def limited(scope: Any, receive: Any, send: Any) -> None:
        async def receive_limited() -> Any:
            if len((message := await receive())["body"]) > 3:
                raise TooMuch
            return message

        await asgi(scope, receive_limited, send)

    async def main() -> None:
        async with exchange(limited, "POST", "/", [("content-length", "9")], body=None) as it:
            it.put_body(b"much", more=True)
            assert isinstance(await it.error(), TooMuch)

    run(main)


def test_the_response_of_a_view_that_read_nothing_is_whole(run: Run, app: Flask) -> None:
    """A server that reports the end before its last send returns loses none of the response."""
    asgi = WebSockets(app).asgi_app()
    app.post("/")(lambda: "x" * 300_000)

    async def main() -> None:
        async with exchange(asgi, "POST", "/", [("content-length", "9")], body=None) as it:
            with anyio.fail_after(TIMEOUT):
                assert len((await it.answer()).body) == 300_000

    run(main)
