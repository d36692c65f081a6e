"""A hundred thousand cycles of subscribe, unsubscribe and disconnect leave nothing behind."""

from __future__ import annotations

import base64
import itertools
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import urlopen

import pytest

from .conftest import ServerProcess
from .waiting import wait_until

SERVED = """
    import gc
    import threading
    from collections import Counter
    from dataclasses import asdict

    from flask import Flask
    from flask_websockets import ConnectionClosed, WebSocket, WebSockets

    app = Flask(__name__)
    app.logger.disabled = True  # views that fail on purpose: their tracebacks are no news
    websockets = WebSockets(app)
    KINDS = (
        "flask_websockets.bridge.link.Link",
        "flask_websockets.connection.Connection",
        "flask_websockets.websocket.WebSocket",
        "flask_websockets.channels.Publication",
        "uvicorn.protocols.websockets.wsproto_impl.WSProtocol",
        "uvicorn.protocols.websockets.websockets_sansio_impl.WebSocketsSansIOProtocol",
    )
    entered = Counter()  # guarded by counting
    counting = threading.Lock()

    class Trouble(Exception):
        pass

    def cycles(ws: WebSocket, number: int) -> int:
        "Enter and leave subscriptions in every way there is; return how many were entered."
        one, two, three = (f"channel {number * step % 97}" for step in (1, 2, 3))
        with websockets.subscribe(ws, one):
            pass
        with websockets.subscribe(ws, [one, two]):
            with websockets.subscribe(ws, [two, three]):
                with websockets.subscribe(ws, (name for name in (one, three))):
                    pass
        try:
            with websockets.subscribe(ws, [one, two]):
                with websockets.subscribe(ws, three):
                    raise Trouble
        except Trouble:
            pass
        with websockets.subscribe(ws, [one, three]):
            websockets.unsubscribe(ws, [one, two])
        with websockets.subscribe(ws, one):
            with websockets.subscribe(ws, one):
                websockets.unsubscribe(ws, one)
            with websockets.subscribe(ws, one):
                pass
        for name in (one, two):
            with websockets.subscribe(ws, name):
                break
        return 11

    @websockets.route("/cycles")
    def many_cycles(ws: WebSocket) -> None:
        for data in ws.iter_text():
            ws.send(str(sum(cycles(ws, number) for number in range(int(data)))))

    @websockets.route("/listen/<room>")
    def listen(ws: WebSocket, room: str) -> None:
        with websockets.subscribe(ws, [room, "everybody"]):
            ws.send("subscribed")
            with counting:
                entered[room] += 1
            websockets.publish(room, "everybody")  # also to those that are just leaving
            for data in ws.iter_text():
                if data == "return":
                    return
                if data == "raise":
                    raise Trouble
                if data == "close":
                    ws.close(4000)
                if data == "cycle":
                    number = 0
                    while True:  # until the connection ends in the middle of it
                        number += 1
                        cycles(ws, number)

    @app.get("/stats")
    def stats():
        return asdict(websockets.stats())

    @app.get("/entered")
    def subscriptions_entered():
        return str(entered.total())

    @app.get("/alive")
    def alive():
        "How many objects of a connection or a publish still exist."
        gc.collect()
        kinds = Counter(type(thing) for thing in gc.get_objects())
        names = Counter()
        for kind, count in kinds.items():
            names[f"{kind.__module__}.{kind.__qualname__}"] += count
        return {name: names[name] for name in KINDS}

    asgi = websockets.asgi_app()
"""

#: Every wait of a client, in seconds.
PATIENCE = 20.0
#: Clients at the same time.
CLIENTS = 4


# -- a client that can misbehave -------------------------------------------------------------------


class RawClient:
    """A WebSocket client on a bare socket: it can leave in ways that a library does not offer."""

    def __init__(self, server: ServerProcess, path: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
        self._received = b""
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {key}\r\n\r\n".encode()
        )

    def wait_until_open(self) -> None:
        while b"\r\n\r\n" not in self._received:
            self._fill()
        head, self._received = self._received.split(b"\r\n\r\n", 1)
        assert head.startswith(b"HTTP/1.1 101 "), head

    def receive(self) -> tuple[int, bytes]:
        """The next frame: opcode and payload. The messages of this test are short."""
        while len(self._received) < 2 or len(self._received) < 2 + self._received[1]:
            self._fill()
        assert self._received[1] < 126
        opcode, end = self._received[0] & 0x0F, 2 + self._received[1]
        payload, self._received = self._received[2:end], self._received[end:]
        return opcode, payload

    def send(self, payload: bytes, opcode: int = 1) -> None:
        # A mask of zeros is a mask, and leaves the payload as it is.
        self._socket.sendall(bytes([0x80 | opcode, 0x80 | len(payload), 0, 0, 0, 0]) + payload)

    def wait_for_close(self) -> int:
        """Receive up to the close frame, answer it, wait for the end; return its code."""
        while (frame := self.receive())[0] != 8:
            pass
        self.send(frame[1], opcode=8)
        self.wait_for_end()
        return int.from_bytes(frame[1][:2], "big")

    def wait_for_end(self) -> None:
        while self._socket.recv(4096):
            pass
        self._socket.close()

    def hang_up(self) -> None:
        """Close the socket without a close frame."""
        self._socket.close()

    def reset(self) -> None:
        """Have the kernel send RST instead of FIN, and forget what is on its way."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def _fill(self) -> None:
        data = self._socket.recv(4096)
        assert data, "the server hung up"
        self._received += data


def subscribed(server: ServerProcess, number: int) -> RawClient:
    client = RawClient(server, f"/listen/room{number % 50}")
    client.wait_until_open()
    while client.receive() != (1, b"subscribed"):  # a neighbour's message may come before it
        pass
    return client


def clean(server: ServerProcess, number: int) -> None:
    client = subscribed(server, number)
    client.send(struct.pack(">H", 1000), opcode=8)
    while client.receive()[0] != 8:
        pass
    client.wait_for_end()


def by_the_view(order: bytes, code: int) -> Callable[[ServerProcess, int], None]:
    def leave(server: ServerProcess, number: int) -> None:
        client = subscribed(server, number)
        client.send(order)
        assert client.wait_for_close() == code

    leave.__name__ = order.decode()
    return leave


def reset(server: ServerProcess, number: int) -> None:
    subscribed(server, number).reset()


def hang_up(server: ServerProcess, number: int) -> None:
    subscribed(server, number).hang_up()


def in_the_handshake(server: ServerProcess, number: int) -> None:
    RawClient(server, f"/listen/room{number % 50}").reset()


def while_subscribing(server: ServerProcess, number: int) -> None:
    client = subscribed(server, number)
    client.send(b"cycle")
    client.reset()


#: Every way to end a connection, one after the other.
ENDINGS = [
    clean,
    reset,
    by_the_view(b"return", 1000),
    hang_up,
    by_the_view(b"raise", 1011),
    in_the_handshake,
    by_the_view(b"close", 4000),
    while_subscribing,
]


# -- the runs --------------------------------------------------------------------------------------


def fetch(server: ServerProcess, path: str) -> Any:
    with urlopen(server.url(path), timeout=PATIENCE) as response:
        return json.loads(response.read())


def run_cycles(server: ServerProcess, connections: int, inside: int) -> int:
    """Open and end *connections*; run at least *inside* cycles in open ones; count them all."""
    before = fetch(server, "/entered")
    numbers = itertools.count()

    def come_and_go() -> None:
        while (number := next(numbers)) < connections:
            ENDINGS[number % len(ENDINGS)](server, number)

    def stay(client: RawClient) -> int:
        client.wait_until_open()
        count = 0
        while count < inside // CLIENTS:
            client.send(b"100")
            opcode, payload = client.receive()
            assert opcode == 1
            count += int(payload)
        return count

    clients = [RawClient(server, "/cycles") for _ in range(CLIENTS)]
    with ThreadPoolExecutor(2 * CLIENTS) as pool:
        going = [pool.submit(come_and_go) for _ in range(CLIENTS)]
        staying = [pool.submit(stay, client) for client in clients]
        cycles = sum(future.result() for future in staying)
        for future in going:
            future.result()
    # Those that stayed have left every subscription, not only lost it with their connection.
    wait_until_nothing(server, ["channels", "subscriptions", "pending"])
    wait_until(lambda: fetch(server, "/stats")["connections"] == CLIENTS, 30, "only those are left")
    for client in clients:
        client.reset()
    wait_until_nothing(
        server, ["connections", "view_threads", "channels", "subscriptions", "pending"]
    )
    wait_until(
        lambda: not any(fetch(server, "/alive").values()), 30, "the end of every link and message"
    )
    # Of the connections only those count whose view has entered its subscription.
    return cycles + int(fetch(server, "/entered")) - int(before)


def wait_until_nothing(server: ServerProcess, names: list[str]) -> None:
    def nothing() -> bool:
        stats = fetch(server, "/stats")
        return not any(stats[name] for name in names)

    wait_until(nothing, 30, f"nothing left of {', '.join(names)}")


def settled(measure: Callable[[], int]) -> int:
    """What *measure* says once it has said the same for a while: nothing is under way any more."""
    seen: list[int] = []

    def steady() -> bool:
        seen.append(measure())
        return len(seen) > 20 and len(set(seen[-20:])) == 1

    wait_until(steady, 20, "a steady measure")
    return seen[-1]


#: Bytes by which the resident memory may grow after the warm-up. The allocator keeps some MiB
#: more or less, by how many threads met; a link of 8 kB left behind by each of 8,000 connections
#: would be 60 MiB, and 160 bytes left by each cycle reach the bound.
MEMORY_BOUND = 16 * 1024 * 1024

#: Per implementation: connections that come and go, and cycles inside open ones.
RUNS = {"sansio": (8_000, 100_000), "wsproto": (2_000, 20_000)}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_cycles_leave_nothing_behind(uvicorn_server, implementation, capsys):
    """After all cycles registry, threads, descriptors and memory are what they were before."""
    connections, inside = RUNS[implementation]
    # Clients that wait for the others do not read, and answer no ping: let there be none.
    server = uvicorn_server(SERVED, "--ws-ping-interval", "3600")
    threads = settled(server.threads)
    descriptors = settled(server.descriptors)
    run_cycles(server, connections // 10, inside // 10)  # warm-up: caches, arenas, the HTTP pool
    resident = server.resident_bytes()

    started = time.monotonic()
    cycles = run_cycles(server, connections, inside)
    seconds = time.monotonic() - started
    growth = server.resident_bytes() - resident
    stats = fetch(server, "/stats")
    wait_until(lambda: server.descriptors() == descriptors, 30, f"{descriptors} descriptors")
    # The last to end are the threads of the HTTP pool, after some seconds without a request.
    wait_until(lambda: server.threads() == threads, 30, f"the return to {threads} threads")
    with capsys.disabled():
        print(
            f"\n  {cycles} cycles, {connections} of them connections, in {seconds:.1f} s; "
            f"{threads} threads and {descriptors} descriptors before and after; "
            f"memory {resident / 2**20:.1f} MiB, then {growth / 2**20:+.1f} MiB"
        )
    # One ending in eight comes before the subscribe, and may be no cycle.
    assert cycles >= inside + connections * 7 // 8
    if implementation == "sansio":
        assert cycles >= 100_000
    assert growth < MEMORY_BOUND
    assert stats["stuck_views"] == stats["closed_slow"] == stats["refused_full"] == 0
    assert "Traceback" not in server.log()
