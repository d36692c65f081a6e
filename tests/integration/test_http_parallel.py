"""HTTP requests beside each other, and clients that leave: through real servers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from . import http_servers
from .http_app import DATA
from .http_client import Client, chunked, request
from .http_servers import Server, settled

server = http_servers.server
key = http_servers.key
known_failures = http_servers.known_failures

MIB = 1024 * 1024
CHUNKED = ("Transfer-Encoding", "chunked")


def connections(stack: contextlib.ExitStack, server: Server, count: int) -> list[Client]:
    return [stack.enter_context(server.connect()) for _ in range(count)]


class TestParallel:
    """No request waits for another."""

    @pytest.mark.parametrize("kind", ["barrier", "async-barrier"])
    def test_views(self, server, key, kind):
        """Ten views, sync or async, that wait for each other all go on."""
        with contextlib.ExitStack() as stack:
            clients = connections(stack, server, 10)
            for client in clients:
                client.send(request("GET", f"/{kind}/{key}/10"))
            assert [client.answer().body for client in clients] == [b"passed"] * 10

    @pytest.mark.parametrize("kind", ["gate", "async-gate"])
    def test_blocked_view(self, server, key, kind):
        """Views that block, async ones too, do not keep others waiting."""
        with contextlib.ExitStack() as stack:
            blocked = connections(stack, server, 10)
            for client in blocked:
                client.send(request("GET", f"/{kind}/{key}"))
            http_servers.wait_until(lambda: server.records(key).count("entered") == 10)
            assert server.get("/").body == b"hello"
            assert server.get(f"/async-barrier/{key}-other/1").body == b"passed"
            server.release(key)
            assert [client.answer().body for client in blocked] == [b"released"] * 10

    @pytest.mark.parametrize("framing", ["length", "chunked"])
    def test_slow_upload(self, server, key, framing):
        """Uploads that stand still do not keep others waiting, and then go on."""
        if framing == "length":
            first = request("POST", f"/early/{key}", [("Content-Length", "10")], b"12345")
            rest = b"67890"
        else:
            first = request("POST", f"/early/{key}", [CHUNKED], b"5\r\n12345\r\n")
            rest = chunked(b"67890")
        with contextlib.ExitStack() as stack:
            slow = connections(stack, server, 10)
            for client in slow:
                client.send(first)
            http_servers.wait_until(lambda: server.records(key).count("entered") == 10)
            assert server.get("/").body == b"hello"
            assert server.ask("POST", "/body", body=DATA).json()["length"] == len(DATA)
            for client in slow:
                client.send(rest)
            assert [client.answer().json()["length"] for client in slow] == [10] * 10

    def test_slow_head(self, server):
        """A head that stands still does not keep others waiting."""
        with server.connect() as slow:
            slow.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
            assert server.get("/").body == b"hello"
            slow.send(b"\r\n")
            assert slow.answer().body == b"hello"


class TestSlowReader:
    """A client that does not read pauses the application."""

    def test_paused(self, server, key):
        """Far less is generated than there is, and all of it arrives in the end."""

        def generated() -> int:
            return int((server.records(key) or ["0"])[-1])

        with server.connect(receive_buffer=65_536) as client:
            client.send(request("GET", f"/flood/{key}"))
            answer = client.head()
            # What the system's own socket buffers take counts, some 4 MiB.
            assert settled(generated) < 8 * MIB
            assert sum(len(piece) for piece in client.pieces(answer)) == 32 * MIB
            assert answer.clean

    def test_leaves(self, server, key):
        """A client that leaves without reading ends the application."""
        with server.connect(receive_buffer=65_536) as client:
            client.send(request("GET", f"/flood/{key}"))
            client.head()
        server.wait_for(key, "generator closed")
        generated = int(server.records(key)[0])
        assert generated < 16 * MIB

    def test_others_go_on(self, server, key):
        """Clients that do not read do not keep others waiting."""
        with contextlib.ExitStack() as stack:
            for number in range(5):
                client = stack.enter_context(server.connect(receive_buffer=65_536))
                client.send(request("GET", f"/flood/{key}-{number}"))
                client.head()
            assert server.get("/").body == b"hello"
            assert server.get("/large").body == DATA * 5


@contextlib.contextmanager
def no_traceback(server: Server) -> Iterator[None]:
    """The server logs none, from here until it has served other requests."""
    before = len(server.process.log())
    yield
    for _ in range(3):
        assert server.get("/").body == b"hello"
    assert "Traceback" not in server.process.log()[before:]


@pytest.mark.parametrize("how", ["leave", "reset"])
class TestLeaving:
    """A client that leaves ends its request, and the log holds no traceback of it."""

    @pytest.mark.parametrize("seen", ["seen", "unseen"])
    def test_stream(self, server, key, how, seen):
        """A response stops: generator and response are closed, once.

        Whether the client has read the start of the response or not.
        """
        with no_traceback(server):
            with server.connect() as client:
                client.send(request("GET", f"/endless/{key}"))
                server.wait_for(key, "started")
                if seen == "seen":
                    assert next(client.pieces(client.head()))
                getattr(client, how)()
            server.wait_for(key, "closed")
            assert server.records(key) == ["started", "generator closed", "closed"]

    def test_view(self, server, key, how):
        """A view whose client left runs to its end, and nobody misses its answer."""
        with no_traceback(server):
            with server.connect() as client:
                client.send(request("GET", f"/gate/{key}"))
                server.wait_for(key, "entered")
                getattr(client, how)()
            server.release(key)

    def test_upload(self, server, key, how):
        """A view that reads goes on when its client leaves."""
        with no_traceback(server):
            self.leave_upload(server, key, how, ("Content-Length", "1000000"), DATA[:300_000])
            server.wait_for(key, "over")

    def test_cut_upload_is_not_whole(self, server, key, how):
        """What arrived is not taken for the body: Werkzeug's ClientDisconnected is raised."""
        self.leave_upload(server, key, how, ("Content-Length", "1000000"), DATA[:300_000])
        server.wait_for(key, "over")
        assert server.records(key) == ["entered", "ClientDisconnected", "over"]

    def test_chunked_upload(self, server, key, how):
        """The same for a chunked body without its last chunk."""
        with no_traceback(server):
            self.leave_upload(server, key, how, CHUNKED, b"5\r\n12345\r\n")
            server.wait_for(key, "over")
            assert server.records(key) == ["entered", "ClientDisconnected", "over"]

    def leave_upload(
        self, server: Server, key: str, how: str, framing: tuple[str, str], start: bytes
    ) -> None:
        with server.connect() as client:
            client.send(request("POST", f"/left-upload/{key}", [framing], start))
            server.wait_for(key, "entered")
            getattr(client, how)()

    def test_connection(self, server, how):
        """Clients that leave inside a head, or say nothing at all."""
        with no_traceback(server):
            for start in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\n"):
                with server.connect() as client:
                    client.send(start)
                    getattr(client, how)()
