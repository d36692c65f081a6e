"""A Flask application behind a server of a few lines, which gives it any scope."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
from anyio.from_thread import start_blocking_portal
from flask import Flask

from flask_websockets import WebSockets

from ..asgi_driver import Message

#: Seconds that anything may take for which nothing is promised.
TIMEOUT = 10.0

DENIAL: dict[str, dict[str, Any]] = {"websocket.http.response": {}}


class Errors(logging.Handler):
    """What anybody logs as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


class Front:
    """The loop that applications are served on, one after the other or many."""

    def __init__(self) -> None:
        self._context = start_blocking_portal("asyncio")
        self.portal = self._context.__enter__()
        self.errors = Errors()
        logging.getLogger().addHandler(self.errors)

    def ask(self, asgi: Any, scope: Message, *messages: Message) -> list[Message]:
        """Everything that the application says; then, or once it has accepted, the client leaves.

        :param messages: what the client sends before that.
        """
        said: list[Message] = []

        async def call() -> None:
            queue = list(messages)
            news = anyio.Event()

            async def receive() -> Message:
                if queue:
                    return queue.pop(0)
                await news.wait()
                if scope["type"] == "websocket":
                    return {"type": "websocket.disconnect", "code": 1001}
                return {"type": "http.disconnect"}

            async def send(message: Message) -> None:
                said.append(message)
                if scope["type"] == "websocket" or not (
                    message["type"].endswith("start") or message.get("more_body")
                ):
                    news.set()  # all that the client waits for is there

            with anyio.fail_after(TIMEOUT):
                await asgi(scope, receive, send)

        self.portal.call(call)
        return said

    def handshake(self, asgi: Any, scope: Message) -> list[Message]:
        return self.ask(asgi, scope, {"type": "websocket.connect"})

    def stop(self, asgi: Any) -> None:
        """The server of an application goes down."""
        self.ask(asgi, {"type": "lifespan"}, {"type": "lifespan.shutdown"})

    def close(self) -> None:
        logging.getLogger().removeHandler(self.errors)
        self._context.__exit__(*sys.exc_info())


@contextmanager
def front() -> Iterator[Front]:
    """A front for the length of a ``with`` block."""
    made = Front()
    try:
        yield made
    finally:
        made.close()


def make_app(name: str = "fuzz", **settings: Any) -> tuple[Flask, WebSockets]:
    app = Flask(name)
    app.config.update(
        {
            "WEBSOCKETS_HANDSHAKE_TIMEOUT": TIMEOUT / 2,
            "PROPAGATE_EXCEPTIONS": False,
            **settings,
        }
    )
    return app, WebSockets(app)


def status_of(said: list[Message]) -> int:
    """What a handshake was answered with, in ASGI as it should be: 101, or a refusal's."""
    first, *rest = said
    match first["type"]:
        case "websocket.accept":
            # The client leaves by itself; the application may have been quicker.
            assert [message["type"] for message in rest] in ([], ["websocket.close"]), said
            return 101
        case "websocket.close":
            assert rest == []
            return 403
    assert [message["type"] for message in said] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ], said
    assert not rest[0].get("more_body")
    assert type(rest[0]["body"]) is bytes
    status: int = first["status"]
    assert type(status) is int and 300 <= status < 600
    return status
