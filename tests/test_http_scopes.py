"""HTTP scopes and messages as different servers give them, message by message."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import ClientDisconnected

from flask_websockets import WebSockets

from .asgi_driver import TIMEOUT, connection, wait_until

Message = dict[str, Any]

#: More calls of receive() than any request of this file needs: the application spins.
TOO_MANY_RECEIVES = 100_000


class Server:
    """The server's side of one request: what it says, and what the application says.

    :param messages: what ``receive`` gives, one after the other.
        Then it waits until the client leaves or the response is complete, and says so for ever.
    :param repeats: it gives the end of the body for ever instead, as some servers do.
    :param silent: it says nothing of a response that is complete.
    """

    def __init__(self, *messages: Message, repeats: bool = False, silent: bool = False) -> None:
        self._messages = deque(messages)
        self._repeats = repeats
        self._silent = silent
        self._news = anyio.Event()
        self._left = False
        self.receives = 0
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        self.receives += 1
        assert self.receives < TOO_MANY_RECEIVES, "the application spins"
        while not self._messages:
            if self._repeats:
                return {"type": "http.request", "body": b"", "more_body": False}
            if self._left or (self.complete and not self._silent):
                return {"type": "http.disconnect"}
            self._news = anyio.Event()
            await self._news.wait()
        return self._messages.popleft()

    async def send(self, message: Message) -> None:
        await anyio.lowlevel.checkpoint()
        if self._left:
            raise OSError("The client has left.")  # ASGI 2.4 asks for it
        self.sent.append(message)
        self._news.set()

    def put(self, message: Message) -> None:
        self._messages.append(message)
        self._news.set()

    def leave(self) -> None:
        """The client leaves; what it sent before is still there to be received."""
        self._left = True
        self._news.set()

    @property
    def status(self) -> int:
        assert self.sent, "no response"
        return self.sent[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def complete(self) -> bool:
        return len(self.sent) > 1 and not self.sent[-1].get("more_body", False)


def piece(body: bytes = b"", more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


DISCONNECT = {"type": "http.disconnect"}


class Site:
    """One Flask application that says what it saw."""

    def __init__(self, app: Flask, websockets: WebSockets) -> None:
        self.asgi = websockets.asgi_app()
        self.calls = 0
        self.raised: list[BaseException] = []
        self.closed = threading.Event()
        self.torn_down = threading.Event()
        self.go_on = threading.Event()
        app.teardown_request(lambda error: self.torn_down.set())

        @app.before_request
        def count() -> None:
            self.calls += 1

        @app.route("/", defaults={"rest": ""}, methods=["GET", "POST"])
        @app.route("/<path:rest>", methods=["GET", "POST"])
        def see(rest: str) -> Response:
            try:
                body = request.get_data()
            except Exception as error:
                self.raised.append(error)
                raise
            environ = request.environ
            return jsonify(
                environ={k: v for k, v in environ.items() if type(v) is str},
                path=request.path,
                script_root=request.script_root,
                url=request.url,
                host=request.host,
                remote_addr=request.remote_addr,
                # Werkzeug decodes a query string as UTF-8, and raises where it is none.
                args=request.args.to_dict() if b"\xff" not in request.query_string else None,
                cookies=request.cookies.to_dict(),
                headers=list(request.headers.items()),
                length=len(body),
                sha=hashlib.sha256(body).hexdigest(),
            )

        @app.get("/stream")
        def stream() -> Response:
            def generate() -> Iterator[bytes]:
                try:
                    yield b"first"
                    self.go_on.wait(TIMEOUT)
                    yield b"second"
                    yield b"third"
                finally:
                    self.closed.set()

            return Response(generate())

        @app.get("/endless")
        def endless() -> Response:
            def generate() -> Iterator[bytes]:
                try:
                    while True:
                        yield b"x" * 1000
                finally:
                    self.closed.set()

            return Response(generate())

        @websockets.route("/ws")
        def ws(ws: Any) -> None:
            self.calls += 1

    async def ask(self, server: Server, /, **scope: Any) -> None:
        """One request; the application must come back."""
        with anyio.fail_after(TIMEOUT):
            await self.asgi(bare(**scope), server.receive, server.send)

    async def see(self, **scope: Any) -> Any:
        """What the application saw of a request without a body."""
        server = Server(piece())
        await self.ask(server, **scope)
        assert server.status == 200, server.body
        assert server.complete
        return self.json(server)

    def json(self, server: Server) -> Any:
        return self.app.json.loads(server.body)

    app: Flask


@pytest.fixture
def site(app: Flask, websockets: WebSockets) -> Site:
    site = Site(app, websockets)
    site.app = app
    return site


@pytest.fixture(autouse=True)
def no_traceback(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing of this file is an error of the application's."""
    caplog.set_level(logging.INFO)
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno > 20] == []


def bare(**changes: Any) -> Message:
    """The least that ASGI allows."""
    return {"type": "http", "method": "GET", "path": "/", "headers": [], **changes}


class TestScopes:
    """What servers say differently, or not at all."""

    def test_only_what_is_required(self, run: Callable[..., Any], site: Site) -> None:
        """Without all optional keys: a request to localhost, from nobody."""

        async def main() -> None:
            seen = await site.see(path="/a/b")
            assert seen["path"] == "/a/b"
            assert seen["script_root"] == ""
            assert seen["url"] == "http://localhost/a/b"
            assert seen["remote_addr"] is None
            assert seen["args"] == {}
            assert seen["environ"]["SERVER_PROTOCOL"] == "HTTP/1.1"
            assert seen["environ"]["REQUEST_URI"] == "/a/b"

        run(main)

    @pytest.mark.parametrize(
        ("scope", "host", "addr"),
        [
            ({"server": None, "client": None}, "localhost", None),
            ({"server": None, "client": None, "scheme": "https"}, "localhost", None),
            ({"server": ("/run/app.sock", None), "client": None}, "localhost", None),
            (
                {"server": ["10.0.0.1", 8000], "client": ["10.0.0.2", 5]},
                "10.0.0.1:8000",
                "10.0.0.2",
            ),
            ({"server": ("::1", 8000), "client": ("::2", 5)}, "[::1]:8000", "::2"),
            ({"server": ("x.example", 443), "scheme": "https"}, "x.example", None),
        ],
    )
    def test_addresses(self, run: Any, site: Site, scope: Any, host: str, addr: Any) -> None:
        """Servers and clients without an address, without a port, and of IPv6."""

        async def main() -> None:
            seen = await site.see(**scope)
            assert seen["host"] == host
            assert seen["remote_addr"] == addr
            assert ("REMOTE_PORT" in seen["environ"]) == (addr is not None)
            # The Host header comes first, as always.
            seen = await site.see(**scope, headers=[(b"host", b"example.com")])
            assert seen["host"] == "example.com"

        run(main)

    @pytest.mark.parametrize(
        ("root_path", "path", "script_root", "seen_path"),
        [
            ("/api", "/api/a", "/api", "/a"),  # uvicorn, Starlette's Mount
            ("/api", "/a", "/api", "/a"),  # hypercorn, older Starlette
            ("/api/", "/api/a", "/api", "/a"),
            ("/api", "/api/", "/api", "/"),
            ("/api", "/apiary", "/api", "/apiary"),
            ("/a/b", "/a/b/c", "/a/b", "/c"),
            ("/a/b", "/a/c", "/a/b", "/a/c"),
            ("/kä se", "/kä se/x", "/kä se", "/x"),
            ("/", "/a", "", "/a"),
            ("", "/a", "", "/a"),
        ],
    )
    def test_mounts(
        self, run: Any, site: Site, root_path: str, path: str, script_root: str, seen_path: str
    ) -> None:
        """A root path comes off the path where it is in it, by whole segments."""

        async def main() -> None:
            seen = await site.see(root_path=root_path, path=path)
            assert (seen["script_root"], seen["path"]) == (script_root, seen_path)

        run(main)

    @pytest.mark.parametrize("path", ["/api", ""])
    def test_the_mounts_own_path(self, run: Any, site: Site, path: str) -> None:
        """Without its slash, the root of a mount is redirected to, as below any WSGI mount."""

        async def main() -> None:
            server = Server(piece())
            await site.ask(server, root_path="/api", path=path)
            assert server.status == 308
            assert (b"location", b"http://localhost/api/") in server.sent[0]["headers"]

        run(main)

    @pytest.mark.parametrize("root_path", ["", "/api"])
    @pytest.mark.parametrize("included", [True, False])
    def test_raw_bytes(self, run: Any, site: Site, root_path: str, included: bool) -> None:
        """Bytes that are no UTF-8 arrive in PATH_INFO, raw bytes in QUERY_STRING."""
        prefix = root_path if included else ""

        async def main() -> None:
            seen = await site.see(
                root_path=root_path,
                path=f"{prefix}/a\N{REPLACEMENT CHARACTER}b",
                raw_path=f"{prefix}/a%FFb".encode(),
                query_string=b"q=\xff&r=%FF&s=\xc3\xa4",
            )
            assert seen["environ"]["PATH_INFO"].encode("latin-1") == b"/a\xffb"
            assert seen["environ"]["QUERY_STRING"].encode("latin-1") == b"q=\xff&r=%FF&s=\xc3\xa4"
            assert seen["environ"]["REQUEST_URI"].startswith(f"{prefix}/a%FFb?q=")
            assert seen["path"] == "/a\N{REPLACEMENT CHARACTER}b"
            seen = await site.see(root_path=root_path, query_string=b"r=%C3%B6&s=\xc3\xa4")
            assert seen["args"] == {"r": "ö", "s": "ä"}

        run(main)

    @pytest.mark.parametrize("make", [list, tuple, iter], ids=lambda kind: kind.__name__)
    def test_headers_of_any_iterable(self, run: Any, site: Site, make: Any) -> None:
        """Headers are an iterable of pairs: a list of lists, a tuple, or one that reads once."""

        async def main() -> None:
            seen = await site.see(headers=make([[b"host", b"a.example"], [b"x-a", b"1"]]))
            assert seen["host"] == "a.example"
            assert ["X-A", "1"] in seen["headers"]

        run(main)

    def test_http2(self, run: Any, site: Site) -> None:
        """Pseudo-headers stay outside, :authority is the host, and split cookies join."""
        headers = [
            (b":method", b"GET"),
            (b":scheme", b"https"),
            (b":path", b"/a"),
            (b":authority", b"a.example"),
            (b"cookie", b"a=1"),
            (b"cookie", b"b=2; c=3"),
            (b"accept", b"text/html"),
            (b"accept", b"*/*"),
        ]

        async def main() -> None:
            seen = await site.see(http_version="2", scheme="https", headers=headers, path="/a")
            assert seen["url"] == "https://a.example/a"
            assert seen["cookies"] == {"a": "1", "b": "2", "c": "3"}
            assert dict(seen["headers"])["Accept"] == "text/html,*/*"
            assert not any(":" in name for name in seen["environ"])
            assert seen["environ"]["SERVER_PROTOCOL"] == "HTTP/2"
            # A host header comes first: a proxy may have put it there (RFC 9113 section 8.3.1).
            seen = await site.see(http_version="2", headers=[*headers, (b"host", b"b.example")])
            assert seen["host"] == "b.example"

        run(main)

    def test_copies_of_a_header(self, run: Any, site: Site) -> None:
        """A hundred copies join; one more is answered 400, and the application is not called."""

        async def main() -> None:
            seen = await site.see(headers=[(b"x-many", b"v")] * 100)
            assert dict(seen["headers"])["X-Many"] == ",".join("v" * 100)
            assert site.calls == 1
            server = Server(piece())
            await site.ask(server, headers=[(b"x-many", b"v")] * 101)
            assert server.status == 400
            assert server.complete
            assert site.calls == 1

        run(main)

    def test_copies_of_a_header_with_a_body(self, run: Any, site: Site) -> None:
        """A refusal does not wait for the body."""

        async def main() -> None:
            server = Server()
            headers = [(b"x-many", b"v")] * 101 + [(b"content-length", b"1000000")]
            await site.ask(server, method="POST", headers=headers)
            assert server.status == 400
            assert site.calls == 0

        run(main)

    @pytest.mark.parametrize(
        ("extensions", "status"), [({"websocket.http.response": {}}, 400), ({}, 403), (None, 403)]
    )
    def test_copies_of_a_handshakes_header(
        self, run: Any, site: Site, extensions: Any, status: int
    ) -> None:
        """So is a handshake: 400 where the server can say so, otherwise its own 403."""

        async def main() -> None:
            headers = [(b"host", b"localhost")] + [(b"x-many", b"v")] * 101
            async with connection(site.asgi, "/ws", headers=headers, extensions=extensions) as peer:
                assert await peer.get_status() == status
            headers.pop()
            async with connection(site.asgi, "/ws", headers=headers) as peer:
                assert await peer.get_status() == 101
            await wait_until(lambda: site.calls)
            # The view's own count, and before_request's.
            assert site.calls == 2

        run(main)


class TestMessages:
    """Bodies in pieces, clients that leave, servers with habits."""

    def test_the_client_left_before_anything(self, run: Any, site: Site) -> None:
        """A disconnect as the first message: nothing is called, sent or raised."""

        async def main() -> None:
            server = Server(DISCONNECT)
            await site.ask(server)
            assert site.calls == 0
            assert server.sent == []
            server = Server()
            server.leave()
            await site.ask(server)
            assert site.calls == 0
            assert server.sent == []

        run(main)

    @pytest.mark.parametrize(
        "headers", [[(b"content-length", b"9")], [(b"expect", b"100-continue")]]
    )
    def test_the_client_left_before_its_body(self, run: Any, site: Site, headers: Any) -> None:
        """A body that never comes: a view that has begun learns of it, nobody else does."""

        async def main() -> None:
            server = Server(DISCONNECT)
            server.leave()
            await site.ask(server, method="POST", headers=headers)
            await wait_until(lambda: site.torn_down.is_set() or not site.calls)
            assert server.sent == []
            assert all(isinstance(error, ClientDisconnected) for error in site.raised)
            assert len(site.raised) == site.calls

        run(main)

    @pytest.mark.parametrize(
        "headers", [[(b"content-length", b"9")], [(b"transfer-encoding", b"chunked")]]
    )
    def test_the_client_leaves_during_its_upload(self, run: Any, site: Site, headers: Any) -> None:
        """The view's read raises ClientDisconnected; the server sees no exception."""

        async def main() -> None:
            server = Server(piece(b"abc", more=True))
            async with anyio.create_task_group() as tasks:

                async def upload() -> None:
                    await site.ask(server, method="POST", headers=headers)

                tasks.start_soon(upload)
                await wait_until(lambda: site.calls)
                assert not site.raised
                server.leave()
            await wait_until(site.torn_down.is_set)
            assert [type(error) for error in site.raised] == [ClientDisconnected]
            assert server.sent == []

        run(main)

    def test_many_small_messages(self, run: Any, site: Site) -> None:
        """A body of five thousand pieces, every third of them empty, arrives whole."""
        pieces = [b"" if number % 3 == 2 else b"%d," % number for number in range(5000)]
        body = b"".join(pieces)

        async def main() -> None:
            server = Server(*(piece(part, more=True) for part in pieces), piece())
            await site.ask(server, method="POST", headers=[(b"transfer-encoding", b"chunked")])
            seen = site.json(server)
            assert seen["length"] == len(body)
            assert seen["sha"] == hashlib.sha256(body).hexdigest()

        run(main)

    @pytest.mark.parametrize(
        ("messages", "body"),
        [
            ([{"type": "http.request"}], b""),
            ([{"type": "http.request", "body": b"abc"}], b"abc"),
            ([{"type": "http.request", "more_body": True}, {"type": "http.request"}], b""),
            (
                [
                    {"type": "http.request", "more_body": True},
                    {"type": "http.request", "body": b"abc", "more_body": True},
                    {"type": "http.request", "body": b"def"},
                ],
                b"abcdef",
            ),
            ([piece(b"abc", more=True), piece(b"", more=True), piece(b"d")], b"abcd"),
        ],
    )
    @pytest.mark.parametrize("announced", ["length", "chunked", "nothing"])
    def test_messages_without_optional_keys(
        self, run: Any, site: Site, messages: Any, body: bytes, announced: str
    ) -> None:
        """``body`` and ``more_body`` have defaults, and an empty piece is no end."""
        headers = {
            "length": [(b"content-length", b"%d" % len(body))],
            "chunked": [(b"transfer-encoding", b"chunked")],
            "nothing": [],  # HTTP/2 and HTTP/3 need neither
        }[announced]

        async def main() -> None:
            server = Server(*messages)
            await site.ask(server, method="POST", headers=headers)
            assert server.status == 200
            seen = site.json(server)
            assert seen["length"] == len(body)
            assert seen["sha"] == hashlib.sha256(body).hexdigest()

        run(main)

    def test_send_raises(self, run: Any, site: Site) -> None:
        """The server's send raises once the client has left: the generator is closed, no more."""

        async def main() -> None:
            server = Server(piece())
            async with anyio.create_task_group() as tasks:

                async def read() -> None:
                    await site.ask(server, path="/endless")

                tasks.start_soon(read)
                await wait_until(lambda: len(server.sent) > 10)
                server.leave()
            await wait_until(site.closed.is_set)
            await wait_until(site.torn_down.is_set)
            assert not server.complete

        run(main)

    def test_only_send_tells_that_the_client_left(self, run: Any, site: Site) -> None:
        """A server whose receive never says it, but whose send raises, is enough."""

        async def main() -> None:
            server = Server(piece())
            sent = 0

            async def send(message: Message) -> None:
                nonlocal sent
                sent += 1
                if sent > 10:
                    raise BrokenPipeError
                await anyio.lowlevel.checkpoint()

            with anyio.fail_after(TIMEOUT):
                await site.asgi(bare(path="/endless"), server.receive, send)
            await wait_until(site.closed.is_set)
            assert sent == 11

        run(main)

    def test_only_receive_tells_that_the_client_left(self, run: Any, site: Site) -> None:
        """A server that swallows what is sent to nobody, but says http.disconnect, is enough."""

        async def main() -> None:
            server = Server(piece())
            sent = 0

            async def send(message: Message) -> None:
                nonlocal sent
                sent += 1
                if sent == 10:
                    server.leave()
                await anyio.lowlevel.checkpoint()

            with anyio.fail_after(TIMEOUT):
                await site.asgi(bare(path="/endless"), server.receive, send)
            await wait_until(site.closed.is_set)

        run(main)

    def test_the_client_leaves_while_nothing_is_sent(self, run: Any, site: Site) -> None:
        """A generator that waits for something else is closed when it goes on."""

        async def main() -> None:
            server = Server(piece())
            async with anyio.create_task_group() as tasks:

                async def read() -> None:
                    await site.ask(server, path="/stream")

                tasks.start_soon(read)
                await wait_until(lambda: len(server.sent) == 2)
                server.leave()
            # The server has its task back, while the generator still waits.
            assert not site.closed.is_set()
            site.go_on.set()
            await wait_until(site.closed.is_set)
            assert server.body == b"first"

        run(main)

    @pytest.mark.parametrize("headers", [[], [(b"content-length", b"3")]])
    def test_a_server_that_repeats_the_end(self, run: Any, site: Site, headers: Any) -> None:
        """A receive that gives the end of the body for ever is not called for ever."""

        async def main() -> None:
            server = Server(piece(b"abc"), repeats=True)
            async with anyio.create_task_group() as tasks:

                async def read() -> None:
                    await site.ask(server, path="/stream", headers=headers)

                tasks.start_soon(read)
                await wait_until(lambda: len(server.sent) == 2)
                for _ in range(100):
                    await anyio.sleep(0)
                assert server.receives < 20
                site.go_on.set()
            assert server.body == b"firstsecondthird"
            assert server.complete
            assert server.receives < 20

        run(main)

    def test_a_response_leaves_nothing_to_receive(self, run: Any, site: Site) -> None:
        """The application returns although the client stays and the server says nothing."""

        async def main() -> None:
            site.go_on.set()
            for path in ("/", "/stream"):
                server = Server(piece(), silent=True)
                await site.ask(server, path=path)
                assert server.complete

        run(main)

    def test_the_answer_does_not_wait_for_the_body(self, run: Any, site: Site) -> None:
        """A view that reads nothing answers, though its client is still sending."""

        async def main() -> None:
            site.go_on.set()
            server = Server()
            await site.ask(server, path="/stream", headers=[(b"content-length", b"1000000")])
            assert server.body == b"firstsecondthird"
            assert server.complete

        run(main)
