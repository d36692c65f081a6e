"""Slow consumers on real sockets: one that does not read for each policy, others that do."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from .raw_client import RawClient
from .waiting import wait_until

POLICIES = ("close", "drop_oldest", "drop_newest", "latest")
#: Bytes of a message: large enough that a few dozen are more than the kernel's buffers hold.
SIZE = 128 * 1024
#: Messages in an outbox, the one that the server is sending among them.
OUTBOX = 8
#: So many are published while nobody slow reads: 50 MiB, many times what may be held for them.
PUBLISHED = 400

APP = """
    import dataclasses
    from flask import Flask, request
    from flask_websockets import AsyncWebSocket, WebSocket, WebSockets

    app = Flask(__name__)
    app.config.update(
        WEBSOCKETS_OUTBOX_MESSAGES=%(outbox)d, WEBSOCKETS_OUTBOX_BYTES=100_000_000,
        WEBSOCKETS_SEND_TIMEOUT=60, WEBSOCKETS_CLOSE_TIMEOUT=30,
    )
    websockets = WebSockets(app)
    subscriptions = {}
    ended = {}

    def sync_view(ws: WebSocket, name: str, on_slow: str) -> None:
        try:
            with websockets.subscribe(ws, ["a", "b"], on_slow=on_slow) as subscription:
                subscriptions[name] = subscription
                ws.send("subscribed")
                for data in ws.iter_data():
                    ws.send(data)
        finally:
            ended[name] = [ws.close_code, ws.close_reason]

    async def async_view(ws: AsyncWebSocket, name: str, on_slow: str) -> None:
        try:
            async with websockets.subscribe(ws, ["a", "b"], on_slow=on_slow) as subscription:
                subscriptions[name] = subscription
                await ws.send("subscribed")
                async for data in ws.iter_data():
                    await ws.send(data)
        finally:
            ended[name] = [ws.close_code, ws.close_reason]

    websockets.route("/<name>/<on_slow>", endpoint="view")(%(kind)s_view)

    @app.get("/state")
    def state():
        dropped = {name: one.dropped for name, one in subscriptions.items()}
        return {"dropped": dropped, "ended": ended, **dataclasses.asdict(websockets.stats())}

    @app.post("/publish/<int:first>/<int:end>")
    def publish(first, end):
        for number in range(first, end):
            websockets.publish(f"{number} ".ljust(%(size)d, "x"), "ab"[number %% 2])
        return "published"

    asgi = websockets.asgi_app()
"""


class Slow(RawClient):
    """A client that does not read until the test says so, and then frame by frame."""

    def frame(self) -> tuple[int, bytes]:
        """The next frame's opcode and data; the server's pings are passed over."""
        while True:
            head = self._read(2)
            length = head[1]
            if length > 125:
                length = int.from_bytes(self._read(2 if length == 126 else 8), "big")
            data = self._read_long(length)
            if head[0] & 0x0F != 0x9:
                assert head[0] & 0x80, "a fragment"
                return head[0] & 0x0F, data

    def numbers(self, mark: bytes) -> list[int]:
        """The numbers of what comes before *mark*."""
        found: list[int] = []
        while (frame := self.frame())[1] != mark:
            assert frame[0] == 0x1, frame
            found.append(_number(frame[1]))
        return found

    def _read_long(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self.socket.recv(min(count - len(data), 1 << 16))
            assert part, "the server closed the connection"
            data += part
        return bytes(data)


def _number(data: bytes | str) -> int:
    number, _, rest = (data if isinstance(data, str) else data.decode()).partition(" ")
    assert len(number) + 1 + len(rest) == SIZE
    assert rest.strip("x") == ""
    return int(number)


def fetch(server: Any, path: str, method: str = "GET") -> bytes:
    request = urllib.request.Request(server.url(path), method=method)
    with urllib.request.urlopen(request, timeout=20) as response:
        body: bytes = response.read()
        return body


def state(server: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(fetch(server, "/state"))
    return found


@pytest.fixture(params=["sync", "async"])
def server(uvicorn_server, request):
    """The application, with views of either kind."""
    return uvicorn_server(APP % {"kind": request.param, "outbox": OUTBOX, "size": SIZE})


class Healthy:
    """A subscriber that reads everything, and lets the publisher go on when it has."""

    def __init__(self, ws: ClientConnection) -> None:
        self.received: list[int] = []
        self._ws = ws
        assert ws.recv(timeout=10) == "subscribed"

    def read(self, count: int) -> None:
        for _ in range(count):
            self.received.append(_number(self._ws.recv(timeout=10)))

    def end(self) -> None:
        """Nothing else waits: the echo is the next message."""
        self._ws.send("end")
        assert self._ws.recv(timeout=10) == "end"
        self._ws.close()


@pytest.fixture
def healthy(server) -> Iterator[list[Healthy]]:
    """One healthy subscriber for each policy."""
    options: dict[str, Any] = {"max_size": None, "compression": None, "proxy": None}
    with ExitStack() as stack:
        yield [
            Healthy(
                stack.enter_context(
                    connect(server.ws_url(f"/healthy-{policy}/{policy}"), **options)
                )
            )
            for policy in POLICIES
        ]


def publish(server: Any, healthy: list[Healthy], first: int, end: int) -> None:
    """Publish one message for each channel, so that none takes the place of a ``latest`` one that
    the loop had no time for yet; the healthy have read them before the next two."""
    for start in range(first, end, 2):
        stop = min(start + 2, end)
        fetch(server, f"/publish/{start}/{stop}", "POST")
        readers = [threading.Thread(target=client.read, args=(stop - start,)) for client in healthy]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(30)
            assert not reader.is_alive()


def subscribe(server: Any, name: str, on_slow: str) -> Slow:
    client = Slow(server.port, f"/{name}/{on_slow}", receive_buffer=4096)
    assert client.status == 101
    assert client.frame() == (0x1, b"subscribed")
    return client


def test_i6_slow_consumers_of_every_policy(server, healthy):
    """While four do not read, four others miss nothing; then each gets what its policy keeps."""
    publish(server, healthy, 0, 8)  # the buffers that a process makes once are there now
    before = server.resident_bytes()
    with ExitStack() as stack:
        slow = {
            policy: stack.enter_context(subscribe(server, policy, policy)) for policy in POLICIES
        }
        publish(server, healthy, 8, PUBLISHED)
        wait_until(lambda: "close" in state(server)["ended"], what="the close of the slow one")
        # Three outboxes, what uvicorn holds of three messages, and what Python keeps for itself.
        grown = server.resident_bytes() - before
        assert grown < 3 * (OUTBOX + 2) * SIZE + 8 * 1024 * 1024

        seen = state(server)
        assert seen["ended"] == {"close": [1013, "slow consumer"]}
        assert seen["closed_slow"] == 1
        assert seen["published"] == PUBLISHED
        assert seen["outbox_messages"] <= 3 * OUTBOX
        dropped = seen["dropped"]
        for policy in POLICIES:
            assert dropped[f"healthy-{policy}"] == 0
            if policy != "close":
                assert seen[f"dropped_{policy.removeprefix('drop_')}"] == dropped[policy] > 0

        # It gets its close frame, now that it reads, behind what the sockets held.
        received = []
        while (frame := slow["close"].frame())[0] == 0x1:
            received.append(_number(frame[1]))
        assert frame == (0x8, (1013).to_bytes(2, "big") + b"slow consumer")
        assert received == list(range(8, 8 + len(received)))

        # The view's own answer is behind everything that waits, and ends the reading.
        found = {}
        for policy in POLICIES[1:]:
            slow[policy].send_text("mark")
            found[policy] = slow[policy].numbers(b"mark")
            assert len(found[policy]) == PUBLISHED - 8 - dropped[policy]
            assert found[policy] == sorted(set(found[policy]))
            assert found[policy][0] == 8

        newest = found["drop_newest"]
        assert newest == list(range(8, 8 + len(newest)))
        oldest = found["drop_oldest"]
        assert oldest[-(OUTBOX - 1) :] == list(range(PUBLISHED - OUTBOX + 1, PUBLISHED))
        latest = found["latest"]
        assert latest[-2:] == [PUBLISHED - 2, PUBLISHED - 1]
        # What waited was two; the others had left before, and had been given to the sockets.
        assert latest[:-2] == list(range(8, 8 + len(latest) - 2))

        # Everybody who is still there is as healthy as the others now.
        publish(server, healthy, PUBLISHED, PUBLISHED + 4)
        for policy in POLICIES[1:]:
            slow[policy].send_text("mark")
            expected = list(range(PUBLISHED, PUBLISHED + 4))
            if policy != "latest":
                assert slow[policy].numbers(b"mark") == expected
            else:
                assert slow[policy].numbers(b"mark")[-2:] == expected[-2:]
    for client in healthy:
        client.end()
        assert client.received == list(range(PUBLISHED + 4))
    wait_until(lambda: state(server)["connections"] == 0)
    final = state(server)
    assert (final["outbox_messages"], final["subscriptions"], final["channels"]) == (0, 0, 0)
    assert final["view_threads"] == final["view_tasks"] == 0
    assert final["send_timeouts"] == 0


def test_the_views_own_send_waits_behind_dropping(server):
    """An echo in a full outbox of droppable messages is late, never lost, and in its place."""
    with ExitStack() as stack:
        slow = {
            policy: stack.enter_context(subscribe(server, policy, policy))
            for policy in POLICIES[1:]
        }

        def stalled() -> bool:
            fetch(server, "/publish/0/8", "POST")
            return all(state(server)["dropped"][policy] > 20 for policy in slow)

        wait_until(stalled, 30, "drops for everybody")
        for client in slow.values():
            client.send_text("echo")
        # Long enough for the view to have received; it cannot have sent.
        fetch(server, "/publish/0/8", "POST")
        counted = state(server)["dropped"]
        for policy, client in slow.items():
            found = client.numbers(b"echo")
            assert len(found) > OUTBOX // 2
            client.send_text("mark")
            client.numbers(b"mark")
            assert state(server)["dropped"][policy] == counted[policy]
        assert state(server)["ended"] == {}


def test_a_slow_consumer_that_vanishes(server):
    """A reset while messages wait frees everything, under every policy."""
    fetch(server, "/state")
    descriptors = server.descriptors()
    clients = [subscribe(server, policy, policy) for policy in POLICIES[1:]]

    def stalled() -> bool:
        fetch(server, "/publish/0/8", "POST")
        return all(state(server)["dropped"][policy] > 0 for policy in POLICIES[1:])

    wait_until(stalled, 30, "drops for everybody")
    for client in clients:
        client.reset()
    wait_until(lambda: state(server)["connections"] == 0)
    seen = state(server)
    assert {tuple(end) for end in seen["ended"].values()} <= {(1005, ""), (1006, "")}
    assert (seen["outbox_messages"], seen["outbox_bytes"], seen["subscriptions"]) == (0, 0, 0)
    wait_until(lambda: server.descriptors() <= descriptors, 5, "the descriptors' end")
