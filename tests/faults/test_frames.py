"""Clients that lie: frames, handshakes and headers that nobody sane sends (26 to 29, 33)."""

from __future__ import annotations

import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ..integration.serving import (
    CLOSE,
    HANDSHAKE,
    TEXT,
    Peer,
    Served,
    request_head,
    seconds_until_cut,
)
from ..integration.waiting import wait_until
from .conftest import MARGIN, SETTINGS, TIMEOUT, OpenScene, Scene, Starter, at_once, path

HANDSHAKE_TIMEOUT = SETTINGS["HANDSHAKE_TIMEOUT"]

#: uvicorn's and our own limit of a message.
MAX_MESSAGE = 16 * 1024 * 1024

CONTINUATION, BINARY, PING = 0x0, 0x2, 0x9
FIN, RSV1, RSV2, RSV3 = 0x80, 0x40, 0x20, 0x10


def frame(first: int, data: bytes = b"", *, length: int | None = None, mask: bool = True) -> bytes:
    """A frame, with a mask of zeros; *length* is what it says of itself."""
    length = len(data) if length is None else length
    bit = 0x80 if mask else 0
    if length < 126:
        head = bytes((first, bit | length))
    elif length < 65536:
        head = bytes((first, bit | 126)) + length.to_bytes(2, "big")
    else:
        head = bytes((first, bit | 127)) + length.to_bytes(8, "big")
    return head + (bytes(4) if mask else b"") + data


#: Bytes of memory for what is on its way, and for what a busy server needs beside it.
PIECES = 8 * 1024 * 1024

#: What no client may send, and the codes that may be the answer. A view sees them, or that the
#: connection was cut (1005, 1006); the client may see nothing but the cut.
BAD: dict[str, tuple[bytes, set[int]]] = {
    "invalid UTF-8": (frame(FIN | TEXT, b"\xff\xfe"), {1007}),
    "half a character": (frame(FIN | TEXT, "\N{SNOWMAN}".encode()[:2]), {1007}),
    "a surrogate": (frame(FIN | TEXT, b"\xed\xa0\x80"), {1007}),
    "invalid in fragments": (frame(TEXT, b"\xe2\x98") + frame(FIN | CONTINUATION, b"x"), {1007}),
    "opcode 3": (frame(FIN | 0x3), {1002}),
    "opcode 7": (frame(FIN | 0x7, b"x"), {1002}),
    "opcode 11": (frame(FIN | 0xB), {1002}),
    "RSV1": (frame(FIN | RSV1 | TEXT, b"x"), {1002}),
    "RSV2": (frame(FIN | RSV2 | TEXT, b"x"), {1002}),
    "RSV3": (frame(FIN | RSV3 | BINARY, b"x"), {1002}),
    "unmasked": (frame(FIN | TEXT, b"plain", mask=False), {1002}),
    "length of 2^63": (frame(FIN | BINARY, length=1 << 63), {1002, 1009}),
    "length of 2^64 - 1": (frame(FIN | TEXT, length=(1 << 64) - 1), {1002, 1009}),
    "a long ping": (frame(FIN | PING, bytes(126)), {1002}),
    "a ping in fragments": (frame(PING, b"x"), {1002}),
    "a continuation of nothing": (frame(FIN | CONTINUATION, b"x"), {1002}),
    "a text in a text": (frame(TEXT, b"x") + frame(FIN | TEXT, b"y"), {1002}),
    "close with one byte": (frame(FIN | CLOSE, b"x"), {1002}),
    "close with 999": (frame(FIN | CLOSE, (999).to_bytes(2, "big")), {1002}),
    "close with 1005": (frame(FIN | CLOSE, (1005).to_bytes(2, "big")), {1002}),
    "close with bad words": (frame(FIN | CLOSE, b"\x03\xe8\xff"), {1002, 1007}),
    "a long close": (frame(FIN | CLOSE, b"\x03\xe8" + bytes(124)), {1002}),
    "no frame": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4, {1002}),
}

#: A view of a connection that was cut sees one of these.
CUT = {1005, 1006}


def the_end(peer: Peer) -> int | None:
    """The code of the server's close frame; None if it just cut the connection."""
    try:
        while True:
            opcode, data = peer.frame()
            if opcode == CLOSE:
                return int.from_bytes(data[:2], "big")
    except (AssertionError, ConnectionError):
        return None


def test_bad_frames(scenes: list[Scene], key: Callable[[str], str]) -> None:
    """28: each is answered with 1002 or 1007 or cut; the view sees ConnectionClosed alone."""

    def check(scene: Scene) -> None:
        for what, (data, codes) in BAD.items():
            peer = scene.peer("listen", key(what))
            since = time.monotonic()
            peer.socket.sendall(data)
            code = the_end(peer)
            assert code is None or code in codes, (what, code)
            seen = scene.ended(key(what), since=since, within=1)
            assert seen in codes | CUT, (what, seen)
        # uvicorn logs text that is no UTF-8 with a traceback of its own.
        scene.tracebacks = scene.log().count("Invalid UTF-8 sequence received from client.")

    at_once(check, scenes)


@pytest.mark.parametrize("length", [1 << 30, (1 << 63) - 1], ids=["1 GiB", "2^63 - 1"])
def test_much_is_announced(scenes: list[Scene], key: Callable[[str], str], length: int) -> None:
    """26: and nothing of it comes: it is closed with 1009, or nothing is held for it."""

    def check(scene: Scene) -> None:
        resident = scene.stats()["resident"]
        for number in range(10):
            peer = scene.peer("listen", key(f"much {number}"))
            peer.socket.sendall(frame(FIN | BINARY, b"x", length=length))
            if scene.way.endswith("sansio"):
                # wsproto hands on what is there, and never says how much is to come.
                assert the_end(peer) == 1009
        assert scene.stats()["resident"] - resident < PIECES

    at_once(check, scenes)


@contextmanager
def peak_of(server: Served) -> Iterator[Callable[[], int]]:
    """The highest resident memory since the beginning, in bytes."""
    enough = threading.Event()
    seen = [server.resident_bytes()]

    def watch() -> None:
        while not enough.wait(0.002):
            seen.append(server.resident_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield lambda: max(seen) - seen[0]
    finally:
        enough.set()
        watching.join(TIMEOUT)


def send_until_cut(peer: Peer, data: bytes, times: int) -> None:
    """Send again and again, until the server does not take it any more."""
    try:
        for _ in range(times):
            peer.socket.sendall(data)
    except ConnectionError:
        pass


def test_endless_fragments(scene: Scene, key: Callable[[str], str]) -> None:
    """26: a message that never ends is closed with 1009 at its limit; memory is bounded by it."""
    peer = scene.peer("listen", key("endless"))
    piece = frame(CONTINUATION, bytes(65_536))
    with peak_of(scene.server) as peak:
        send_until_cut(peer, frame(BINARY, b"x") + piece, 1)
        send_until_cut(peer, piece, 2 * MAX_MESSAGE // 65_536)
        assert scene.note(key("endless"), "ended")["code"] in {1009, *CUT}
        grown = peak()
    scene.kept += MAX_MESSAGE
    assert the_end(peer) in (1009, None)
    assert grown <= 2 * MAX_MESSAGE + PIECES, f"{grown / 1e6:.1f} MB"


SMALL = 50_000
SMALL_SETTINGS = {**SETTINGS, "MAX_MESSAGE_BYTES": SMALL}


@pytest.mark.long
@pytest.mark.parametrize("piece", [b"x", b""], ids=["one byte", "empty"])
def test_tiny_fragments(
    way: str,
    starter: Starter,
    open_scene: OpenScene,
    key: Callable[[str], str],
    piece: bytes,
) -> None:
    """26: fragments of one byte or of none, without an end: memory is bounded all the same."""
    options = ("--ws-max-size", str(SMALL)) if way.startswith("bare") else ()
    scene = open_scene(starter.share(way, options=options, settings=SMALL_SETTINGS), way)
    peer = scene.peer("listen", key("tiny"))
    with peak_of(scene.server) as peak:
        send_until_cut(peer, frame(BINARY, piece), 1)
        send_until_cut(peer, frame(CONTINUATION, piece) * 10_000, 200)
        if piece:
            assert the_end(peer) in (1009, None)
            assert scene.note(key("tiny"), "ended")["code"] in {1009, *CUT}
        assert scene.server.fetch("/hello").body == b"hello"  # it has come to the end of them
        grown = peak()
    assert grown <= PIECES, f"{grown / 1e6:.1f} MB"


def test_pings_without_an_end(scene: Scene, key: Callable[[str], str]) -> None:
    """26, 3: a peer that pings and never reads the answers: what waits for it is bounded."""
    peer = scene.peer("listen", key("pings"), receive_buffer=4096)
    peer.socket.settimeout(1)
    with peak_of(scene.server) as peak:
        try:
            for _ in range(500):
                peer.socket.sendall(frame(FIN | PING, bytes(125)) * 500)
        except (ConnectionError, TimeoutError):
            pass  # nobody takes it any more
        grown = peak()
    assert grown <= PIECES, f"{grown / 1e6:.1f} MB"


def bomb(inflated: int) -> bytes:
    """A compressed message, of a thousandth of its size."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -12)
    packed = deflate.compress(bytes(inflated)) + deflate.flush(zlib.Z_SYNC_FLUSH)
    return frame(FIN | RSV1 | BINARY, packed.removesuffix(b"\0\0\xff\xff"))


BOMB = bomb(256 * 1024 * 1024)

DEFLATE = {**HANDSHAKE, "Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"}


#: The message itself, and its copy while it grows; and what the allocator rounds up.
INFLATED = 2 * MAX_MESSAGE + 4 * 1024 * 1024
#: As much of freed memory glibc may keep: the free end of a heap is given back from twice the
#: largest block that was freed on, which counts to 32 MiB (mallopt(3), M_MMAP_THRESHOLD).
LEFT_BY_GLIBC = 64 * 1024 * 1024


def throw(scene: Scene, name: str) -> int:
    """Throw the bomb at a view, which is unblocked; by how much memory grew meanwhile."""
    connection = scene.enter(socket.create_connection(("127.0.0.1", scene.server.port), TIMEOUT))
    connection.sendall(request_head("GET", path("listen", name), DEFLATE))
    scene.note(name, "began")
    with peak_of(scene.server) as peak:
        try:
            connection.sendall(BOMB)
        except ConnectionError:
            pass  # it was not interested
        assert scene.note(name, "ended", timeout=30)["code"] in {1002, 1009, *CUT}
        wait_until(lambda: scene.stats()["connections"] == 1, what="the bystander alone")
        grown = peak()
    scene.kept += min(grown, LEFT_BY_GLIBC)
    return grown


def test_a_bomb(scene: Scene, key: Callable[[str], str]) -> None:
    """27: 250 kB that inflate to 256 MiB end in 1009 or 1002, for twice a message's memory."""
    grown = throw(scene, key("bomb"))
    assert grown <= INFLATED, f"{grown / 1e6:.1f} MB"


def test_a_bomb_hurts_nobody(scene: Scene, key: Callable[[str], str]) -> None:
    """27: whatever it costs, the server survives it, and the others are served."""
    throw(scene, key("bomb"))
    assert scene.server.fetch("/hello").body == b"hello"


def test_a_bomb_for_serve_with_compression(
    starter: Starter, open_scene: OpenScene, key: Callable[[str], str]
) -> None:
    """27: where compression was asked for as well, which wsproto is never given."""
    way = "serve-sansio"
    scene = open_scene(starter.start(way, options=["--compression"]), way)
    grown = throw(scene, key("bomb"))
    assert grown <= INFLATED, f"{grown / 1e6:.1f} MB"


# -- handshakes -----------------------------------------------------------------------------------


def slow_handshakes(scene: Scene) -> list[socket.socket]:
    """Connections whose handshakes do not end: nothing, half of one, and all but the end."""
    head = request_head("GET", "/echo", HANDSHAKE)
    connections = []
    for data in (b"", head[:20], head[:-2]):
        connection = socket.create_connection(("127.0.0.1", scene.server.port), TIMEOUT)
        scene.enter(connection)
        connection.sendall(data)
        connections.append(connection)
    return connections


def test_slow_handshakes(scene: Scene) -> None:
    """29: a handshake that does not end is cut when WEBSOCKETS_HANDSHAKE_TIMEOUT is over."""
    since = time.monotonic()
    for connection in slow_handshakes(scene):
        seconds_until_cut(connection, since, HANDSHAKE_TIMEOUT + MARGIN)


def test_slow_handshakes_hurt_nobody(scene: Scene) -> None:
    """29: they take no thread and no place, and nothing stays when they go."""
    before = scene.stats()
    for _ in range(30):
        slow_handshakes(scene)
    now = scene.stats()
    assert now["connections"] == before["connections"]
    assert now["view_threads"] == before["view_threads"]
    assert scene.server.fetch("/hello").body == b"hello"


#: Headers beside those of a handshake, and the statuses that may be the answer; 0 for none, where
#: the connection is cut instead.
ODD: dict[str, tuple[dict[str, str], set[int]]] = {
    "2500 subprotocols": ({"Sec-WebSocket-Protocol": ", ".join(["x"] * 2500)}, {101, 400}),
    "2500 commas": ({"Sec-WebSocket-Protocol": "," * 2500}, {101, 400}),
    "30,000 spaces": ({"Sec-WebSocket-Protocol": "a" + " " * 30_000 + "b"}, {101, 400, 431, 0}),
    "60,000 bytes": ({"Sec-WebSocket-Protocol": "a" * 60_000}, {101, 400, 431, 0}),
    "no ASCII": ({"Sec-WebSocket-Protocol": "k\xe4se, \xff"}, {101, 400, 0}),
    "no token": ({"Sec-WebSocket-Protocol": 'a b, "c", (d), \x7f'}, {101, 400}),
    "empty": ({"Sec-WebSocket-Protocol": ""}, {101, 400}),
    "a bad key": ({"Sec-WebSocket-Key": "short"}, {101, 400}),
    "an old version": ({"Sec-WebSocket-Version": "7"}, {400, 426}),
    "no version": ({"Sec-WebSocket-Version": "thirteen"}, {400, 426}),
    "extensions": ({"Sec-WebSocket-Extensions": "x;" * 2000}, {101, 400}),
    "a body": ({"Content-Length": "5"}, {101, 400, 0}),
    "a large cookie": ({"Cookie": "session=" + "x" * 9000}, {101, 400, 431, 0}),
    "200 headers": ({f"X-Header-{number}": "x" for number in range(200)}, {101, 400, 431, 0}),
    "a huge header": ({"X-Huge": "x" * 1_000_000}, {400, 431, 0}),
}


def answered(server: Served, head: bytes) -> int:
    """The status of the answer; 0 if the connection was cut instead."""
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as connection:
        try:
            connection.sendall(head)
            data = connection.recv(4096)
        except ConnectionError:
            data = b""
    return int(data.split()[1]) if data else 0


def hang_on(way: str) -> set[str]:
    """What bare uvicorn answers only when the connection ends (docs/reference/servers)."""
    if way != "bare-sansio":
        return set()
    return {
        *("30,000 spaces", "60,000 bytes", "a body", "a large cookie", "200 headers"),
        "a huge header",
    }


def test_odd_handshakes(scene: Scene, way: str) -> None:
    """33: each is answered, or cut, at once; and no view is ever called with less than it needs."""
    for what, (headers, statuses) in ODD.items():
        head = request_head("GET", "/echo", {**HANDSHAKE, **headers})
        if what in hang_on(way):
            with pytest.raises(TimeoutError):
                wait_for_answer(scene.server, head)
            continue
        status = answered(scene.server, head)
        assert status in statuses, (what, status)
    if way == "bare-wsproto":
        scene.tracebacks = 1  # wsproto's, which decodes subprotocols as ASCII and does not ask


def wait_for_answer(server: Served, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 0.3) as connection:
        connection.sendall(head)
        connection.recv(1)
