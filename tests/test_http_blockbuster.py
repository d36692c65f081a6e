"""Nothing on the loop's thread blocks: no sleep, no file, no lock, no queue.

blockbuster replaces the functions that may block. While a loop runs in the calling thread they
raise; the application's threads have no loop, and may block as they like.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import queue
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import anyio
import pytest
from flask import Flask, Response, redirect, request, send_file

from flask_websockets import WebSockets

from .asgi_driver import TIMEOUT, connection, wait_until
from .http_driver import all_at_once, exchange
from .http_driver import request as fetch

pytest.importorskip("blockbuster")
blockbuster = importlib.import_module("blockbuster.blockbuster")

MIB = 1 << 20
PIECES = [hashlib.shake_128(bytes([number])).digest(65536) for number in range(16)]


@contextmanager
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Have what blocks the loop raise, and note it: something may swallow the exception.

    Waiting on a SimpleQueue is guarded as well, by which our threads wait for the loop.
    """
    found: list[str] = []

    class Noted(blockbuster.BlockingError):
        def __init__(self, what: str) -> None:
            super().__init__(what)
            found.append(what)

    def returns_at_once(waited: Any, block: bool = True, timeout: float | None = None) -> bool:
        return not block or timeout == 0 or not waited.empty()

    guard = blockbuster.BlockBuster()
    guard.functions["queue.SimpleQueue.get"] = blockbuster.BlockBusterFunction(
        queue.SimpleQueue, "get", can_block_predicate=returns_at_once
    )
    with monkeypatch.context() as patch:
        patch.setattr(blockbuster, "BlockingError", Noted)
        guard.activate()
        try:
            yield found
        finally:
            guard.deactivate()


@pytest.fixture
def asgi(app: Flask, tmp_path: Any) -> Any:
    """An application whose views block as they like, and everything that a request can be."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"".join(PIECES))
    app.config.update(WEBSOCKETS_HTTP_THREADS=2)
    websockets = WebSockets(app)
    app.blocked = threading.Event()  # type: ignore[attr-defined]
    app.go = threading.Event()  # type: ignore[attr-defined]

    @app.get("/")
    def index() -> str:
        time.sleep(0.001)
        return path.read_bytes()[:5].hex()

    @app.get("/async")
    async def async_view() -> str:
        await asyncio.sleep(0.001)
        return "async"

    @app.post("/digest")
    def digest() -> str:
        return hashlib.sha256(request.get_data()).hexdigest()

    @app.post("/form")
    def form() -> str:
        return hashlib.sha256(request.files["file"].read()).hexdigest()

    @app.get("/stream")
    def stream() -> Response:
        def generate() -> Iterator[bytes]:
            for piece in PIECES:
                time.sleep(0.0005)
                yield piece

        return Response(generate())

    @app.get("/file")
    def file() -> Response:
        return send_file(path)

    @app.get("/redirect")
    def elsewhere() -> Any:
        return redirect("/")

    @app.get("/blocked")
    def blocked() -> str:
        app.blocked.set()  # type: ignore[attr-defined]
        assert app.go.wait(TIMEOUT)  # type: ignore[attr-defined]
        return "at last"

    @websockets.route("/ws")
    def echo(ws: Any) -> None:
        for data in ws.iter_data():
            time.sleep(0.0005)
            ws.send(data)

    return websockets.asgi_app(app)


WHOLE = b"".join(PIECES)
DIGEST = hashlib.sha256(WHOLE).hexdigest()


async def get(asgi: Any) -> None:
    answer = await fetch(asgi)
    assert (answer.status, answer.text) == (200, PIECES[0][:5].hex())


async def head(asgi: Any) -> None:
    answer = await fetch(asgi, "HEAD")
    assert (answer.status, answer.body) == (200, b"")


async def not_found(asgi: Any) -> None:
    assert (await fetch(asgi, path="/nowhere")).status == 404


async def moved(asgi: Any) -> None:
    assert (await fetch(asgi, path="/redirect")).header("location") == "/"


async def async_view(asgi: Any) -> None:
    assert (await fetch(asgi, path="/async")).text == "async"


async def upload(asgi: Any) -> None:
    """1 MiB in 16 pieces."""
    headers = [("content-length", str(MIB))]
    async with exchange(asgi, "POST", "/digest", headers, body=None) as peer:
        for number, piece in enumerate(PIECES):
            peer.put_body(piece, more=number < 15)
            await anyio.sleep(0.001)
        assert (await peer.answer()).text == DIGEST


async def upload_at_once(asgi: Any) -> None:
    """1 MiB in one message."""
    answer = await fetch(asgi, "POST", "/digest", [("content-length", str(MIB))], WHOLE)
    assert answer.text == DIGEST


async def form(asgi: Any) -> None:
    """A file in a form, so large that Werkzeug puts it on the disk."""
    body = (
        b"--x\r\nContent-Disposition: form-data; name=file; filename=a\r\n\r\n"
        + WHOLE
        + b"\r\n--x--\r\n"
    )
    headers = [
        ("content-type", "multipart/form-data; boundary=x"),
        ("content-length", str(len(body))),
    ]
    async with exchange(asgi, "POST", "/form", headers, body=None) as peer:
        for start in range(0, len(body), 65536):
            peer.put_body(body[start : start + 65536], more=start + 65536 < len(body))
        assert (await peer.answer()).text == DIGEST


async def aborted_upload(asgi: Any) -> None:
    headers = [("content-length", str(MIB))]
    async with exchange(asgi, "POST", "/digest", headers, body=None) as peer:
        for piece in PIECES[:4]:
            peer.put_body(piece, more=True)
        await anyio.sleep(0.01)
        peer.leave()


async def read_slowly(asgi: Any, path: str) -> None:
    """Take a response of 1 MiB message by message."""
    async with exchange(asgi, path=path, unread=0) as peer:
        assert await peer.get_status() == 200
        received = b""
        while data := await peer.read():
            received += data
            await anyio.sleep(0.0005)
        assert received == WHOLE


async def stream(asgi: Any) -> None:
    await read_slowly(asgi, "/stream")


async def file(asgi: Any) -> None:
    await read_slowly(asgi, "/file")


async def aborted_stream(asgi: Any) -> None:
    async with exchange(asgi, path="/stream", unread=0) as peer:
        assert await peer.get_status() == 200
        assert await peer.read() == PIECES[0]


async def websocket(asgi: Any) -> None:
    async with connection(asgi, "/ws") as peer:
        for number in range(50):
            peer.send(str(number))
            if number == 0:
                assert await peer.get_status() == 101
            assert (await peer.get())["text"] == str(number)


async def everything(asgi: Any) -> None:
    """All of it at once, on two threads: threads and loop get in each other's way."""
    alone = [get, head, not_found, async_view, upload, form, aborted_upload, stream, file]
    await all_at_once(*(partial(one, asgi) for one in [*alone, websocket, aborted_stream] * 3))


@pytest.mark.parametrize(
    "exercise",
    [
        get,
        head,
        not_found,
        moved,
        async_view,
        upload,
        upload_at_once,
        form,
        aborted_upload,
        stream,
        file,
        aborted_stream,
        websocket,
        everything,
    ],
    ids=lambda exercise: exercise.__name__,
)
def test_the_loop_is_never_blocked(asgi, monkeypatch, caplog, exercise):
    """Whatever the request, the first or a later one: nothing blocks on the loop's thread."""

    async def main():
        with anyio.fail_after(2 * TIMEOUT):
            for _ in range(3):
                await exercise(asgi)

    with guarded(monkeypatch) as found:
        asyncio.run(main())
    assert found == []
    assert caplog.records == []


def test_a_refusal_does_not_block(app, asgi, monkeypatch):
    """With both threads and the queue full, 503 comes without waiting for anybody."""
    monkeypatch.setattr("flask_websockets.bridge.threads.QUEUED_PER_THREAD", 1)

    async def main():
        statuses: list[int] = []

        async def status():
            statuses.append((await fetch(asgi, path="/blocked")).status)

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(status)
            await wait_until(lambda: len(statuses) == 6)
            assert set(statuses) == {503}
            app.go.set()
        assert sorted(statuses) == [200] * 4 + [503] * 6

    with guarded(monkeypatch) as found:
        asyncio.run(main())
    assert found == []


def sleep() -> None:
    time.sleep(0)


def read_a_file() -> None:
    with open(__file__, "rb") as source:
        source.read(1)


def spool_to_the_disk() -> None:
    with tempfile.SpooledTemporaryFile(max_size=1) as spool:
        spool.write(b"too long")


def take_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=0.001)


def wait_for_an_event() -> None:
    threading.Event().wait(0.001)


def wait_on_a_queue() -> None:
    try:
        queue.SimpleQueue().get(timeout=0.001)
    except queue.Empty:
        pass


@pytest.mark.parametrize(
    "block",
    [sleep, read_a_file, spool_to_the_disk, take_a_lock, wait_for_an_event, wait_on_a_queue],
    ids=lambda block: block.__name__,
)
def test_the_guard_sees_what_blocks(asgi, monkeypatch, block):
    """A middleware that blocks on the loop is caught, and the same thing in a view is not."""
    caught = []

    async def blocking(scope, receive, send):
        try:
            block()
        except blockbuster.BlockingError as error:
            caught.append(error)
        await asgi(scope, receive, send)

    with guarded(monkeypatch) as found:
        asyncio.run(fetch(blocking))
        assert len(found) == len(caught) == 1
        in_a_thread = threading.Thread(target=block, daemon=True)
        in_a_thread.start()
        in_a_thread.join(TIMEOUT)
        assert len(found) == 1
    block()  # and afterwards it is what it was
