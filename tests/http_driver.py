"""An ASGI server of a few lines for HTTP, and a browser that keeps cookies."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from http.cookies import SimpleCookie
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes, urlencode

import anyio
import anyio.lowlevel

from .asgi_driver import TIMEOUT

Message = dict[str, Any]
ASGIApp = Callable[..., Awaitable[None]]
Headers = Iterable[tuple[str, str]]


class Answer(NamedTuple):
    """A whole response."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def all(self, name: str) -> list[str]:
        """Every value of a header, in order."""
        return [value for key, value in self.headers if key == name.lower()]

    def header(self, name: str) -> str | None:
        """A header that may come once at most."""
        values = self.all(name)
        assert len(values) < 2, f"{name} came {len(values)} times"
        return values[0] if values else None

    @property
    def text(self) -> str:
        return self.body.decode()


def http_scope(method: str, path: str, headers: Headers = (), **scope: Any) -> Message:
    """The scope that a server makes of a request line and headers."""
    raw_path, _, query = path.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote_to_bytes(raw_path).decode("utf-8", "replace"),
        "raw_path": raw_path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in [("host", "localhost"), *headers]
        ],
        "client": ("127.0.0.1", 50_000),
        "server": ("127.0.0.1", 80),
        **scope,
    }


class Exchange:
    """One request and its response: the server's side, and the client behind it.

    Checks what the application sends: one start, then the body, and nothing after its end.
    A client that has left is told nothing, and its sends are no errors, as with uvicorn.
    """

    def __init__(self, scope: Message, unread: float) -> None:
        self.scope = scope
        self._incoming: deque[Message] = deque()
        self._arrived = anyio.Event()
        self._to_client, self._from_app = anyio.create_memory_object_stream[Message](unread)
        self._left = False
        self._started = self._complete = False
        self.returned = anyio.Event()
        self._error: BaseException | None = None
        #: How often the application has asked for a message.
        self.reads = 0

    # -- the server's side ---------------------------------------------------------------------

    async def receive(self) -> Message:
        self.reads += 1
        while True:
            if self._incoming:
                return self._incoming.popleft()
            if self._left or self._complete:
                await anyio.lowlevel.checkpoint()
                return {"type": "http.disconnect"}
            self._arrived = anyio.Event()
            await self._arrived.wait()

    async def send(self, message: Message) -> None:
        assert not self._complete, f"{message['type']} after the end of the response"
        if message["type"] == "http.response.start":
            assert not self._started, "a second start"
            self._started = True
            assert type(message["status"]) is int
            for name, value in message.get("headers", ()):
                assert type(name) is bytes and type(value) is bytes and name == name.lower()
        else:
            assert message["type"] == "http.response.body", message["type"]
            assert self._started, "a body before the start"
        if self._left:
            await anyio.lowlevel.checkpoint()
        else:
            try:
                await self._to_client.send(message)
            except anyio.BrokenResourceError:
                pass  # the client left while it did not read
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = True  # from here on receive() says so
            self._arrived.set()

    async def run(self, app: ASGIApp) -> None:
        try:
            await app(self.scope, self.receive, self.send)
        except Exception as error:
            self._error = error
        finally:
            self.returned.set()
            self._to_client.close()
            self._arrived.set()

    # -- the client's side ---------------------------------------------------------------------

    def put_body(self, data: bytes, more: bool = False) -> None:
        """The client sends a piece of its body, the last one unless there is *more*."""
        self._incoming.append({"type": "http.request", "body": data, "more_body": more})
        self._arrived.set()

    def leave(self) -> None:
        """The client closes the connection: it reads nothing any more."""
        self._left = True
        self._from_app.close()
        self._arrived.set()

    async def get(self) -> Message:
        """The next message of the application."""
        with anyio.fail_after(TIMEOUT):
            return await self._from_app.receive()

    async def get_status(self) -> int:
        return (await self.get())["status"]

    async def read(self) -> bytes:
        """The next piece of the body that is not empty; nothing at the end."""
        while True:
            try:
                message = await self.get()
            except anyio.EndOfStream:
                if self._complete:  # the last piece said that it was
                    return b""
                raise
            if message.get("body") or not message.get("more_body"):
                return message.get("body", b"")

    async def answer(self) -> Answer:
        """Everything that comes, up to the return of the application."""
        with anyio.fail_after(TIMEOUT):
            messages = [message async for message in self._from_app]
            await self.returned.wait()
        self.check()
        assert messages, "the application returned without a response"
        assert self._complete, "the application returned without the end of its response"
        start, *bodies = messages
        headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in start.get("headers", ())]
        return Answer(start["status"], headers, b"".join(m.get("body", b"") for m in bodies))

    async def error(self) -> BaseException:
        """What the application raised; it must raise."""
        with anyio.fail_after(TIMEOUT):
            await self.returned.wait()
        error, self._error = self._error, None
        assert error is not None, "the application returned"
        return error

    def check(self) -> None:
        """Raise what the application raised, unless that was asked for."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        self._to_client.close()
        self._from_app.close()


@asynccontextmanager
async def exchange(
    app: ASGIApp,
    method: str = "GET",
    path: str = "/",
    headers: Headers = (),
    body: bytes | None = b"",
    *,
    unread: float = 1000,
    **scope: Any,
) -> AsyncIterator[Exchange]:
    """Begin a request to *app*; at the end the client leaves, and the app must return.

    :param body: the whole body; None for a client that sends it with ``put_body``.
    :param unread: messages that the server takes before the client has read them.
    """
    opened = Exchange(http_scope(method, path, headers, **scope), unread)
    if body is not None:
        opened.put_body(body)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(opened.run, app)
        try:
            yield opened
            opened.leave()
            with anyio.fail_after(TIMEOUT):
                await opened.returned.wait()
        finally:
            tasks.cancel_scope.cancel()
            opened.close()
    opened.check()


async def request(
    app: ASGIApp,
    method: str = "GET",
    path: str = "/",
    headers: Headers = (),
    body: bytes = b"",
    **scope: Any,
) -> Answer:
    """One whole request in the caller's own task, as a server with a task per connection."""
    opened = Exchange(http_scope(method, path, headers, **scope), 10_000)
    opened.put_body(body)
    try:
        with anyio.fail_after(TIMEOUT):
            await opened.run(app)
        return await opened.answer()
    finally:
        opened.close()


async def all_at_once(*calls: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Run coroutine functions side by side; their results in their order."""
    results: list[Any] = [None] * len(calls)

    async def run(number: int) -> None:
        results[number] = await calls[number]()

    async with anyio.create_task_group() as tasks:
        for number in range(len(calls)):
            tasks.start_soon(run, number)
    return results


class Browser:
    """Keeps the cookies of one user."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.cookies: dict[str, str] = {}

    async def get(self, path: str, headers: Headers = ()) -> Answer:
        return await self._request("GET", path, headers, b"")

    async def post(self, path: str, **form: str) -> Answer:
        body = urlencode(form).encode()
        headers = [
            ("content-type", "application/x-www-form-urlencoded"),
            ("content-length", str(len(body))),
        ]
        return await self._request("POST", path, headers, body)

    async def _request(self, method: str, path: str, headers: Headers, body: bytes) -> Answer:
        headers = list(headers)
        if self.cookies:
            headers.append(("cookie", "; ".join(f"{k}={v}" for k, v in self.cookies.items())))
        answer = await request(self._app, method, path, headers, body)
        for value in answer.all("set-cookie"):
            for name, morsel in SimpleCookie(value).items():
                if morsel["max-age"] == "0" or "1970" in morsel["expires"]:
                    self.cookies.pop(name, None)
                else:
                    self.cookies[name] = morsel.value
        return answer
