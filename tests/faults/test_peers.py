"""Peers that die, do not read, dribble or are cut off, and what is left of them (1, 3, 5, 6)."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from ..integration.serving import BINARY, TEXT
from ..integration.waiting import wait_until
from .conftest import (
    GONE,
    PATIENCE,
    SETTINGS,
    TIMEOUT,
    OpenScene,
    Scene,
    Starter,
    at_once,
    path,
    sync_and_async,
)
from .proxy import C2S, S2C, Proxy

SEND_TIMEOUT = SETTINGS["SEND_TIMEOUT"]

#: Bytes that stay resident when pieces of 8 MB have come and gone a few times: flat from then on.
LEFT_BY_THE_ALLOCATOR = 48_000_000

#: A client to be killed: opens the WebSockets that it is told, says so, and sleeps.
CLIENT = """
import socket, sys, time
port, *paths = sys.argv[1:]
opened = []
for path in paths:
    opened.append(socket.create_connection(("127.0.0.1", int(port))))
    opened[-1].sendall((
        f"GET {path} HTTP/1.1\\r\\nHost: 127.0.0.1:{port}\\r\\nConnection: Upgrade\\r\\n"
        "Upgrade: websocket\\r\\nSec-WebSocket-Version: 13\\r\\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\\r\\n\\r\\n"
    ).encode())
    head = b""
    while not head.endswith(b"ready"):
        head += opened[-1].recv(1)
print("open", flush=True)
time.sleep(60)
"""


def test_sigkill(scenes: list[Scene], key: Callable[[str], str]) -> None:
    """1: views of a killed client are unblocked within a second, of what it had not read too."""

    def check(scene: Scene) -> None:
        keys = [key(f"{number}") for number in range(3)]
        views = [*sync_and_async("listen"), "listen"]
        paths = [path(view, name) for view, name in zip(views, keys, strict=True)]
        arguments = [str(scene.server.port), *paths]
        with subprocess.Popen(
            [sys.executable, "-S", "-c", CLIENT, *arguments], stdout=subprocess.PIPE
        ) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"open\n"
            assert scene.stats()["subscriptions"] == 3
            # It does not read this: its kernel ends that connection with a reset.
            scene.post(f"/publish/{keys[2]}", b"news")
            since = time.monotonic()
            client.kill()
            for name in keys:
                assert scene.ended(name, since=since, within=0) in GONE
            wait_until(lambda: scene.stats()["subscriptions"] == 0, 1, "no subscription")

    at_once(check, scenes)


def test_a_reset(scene: Scene, key: Callable[[str], str]) -> None:
    """1: so are those of a connection that the network resets, or cuts in the middle of a frame."""
    proxy = scene.enter(Proxy(scene.server.port))
    for view in sync_and_async("listen"):
        scene.peer(view, key(f"reset {view}"), port=proxy.port)
    since = time.monotonic()
    proxy.reset()
    for view in sync_and_async("listen"):
        assert scene.ended(key(f"reset {view}"), since=since, within=0) in GONE
    peers = [scene.peer(view, key(view), port=proxy.port) for view in sync_and_async("listen")]
    proxy.cut_after(3, C2S)
    since = time.monotonic()
    for peer in peers:
        peer.send_text("cut in the middle of this")
    for view in sync_and_async("listen"):
        assert scene.ended(key(view), since=since, within=0) in GONE


def test_cut_while_it_is_sent_to(scene: Scene, key: Callable[[str], str]) -> None:
    """1: a view that sends finds out at its next word that its peer was cut off in a frame."""
    proxy = scene.enter(Proxy(scene.server.port))
    proxy.cut_after(300_000, S2C)
    since = time.monotonic()
    peers = [
        scene.peer(view, key(view), port=proxy.port, ready=False)
        for view in sync_and_async("flood")
    ]
    for peer in peers:
        with pytest.raises((AssertionError, ConnectionError)):
            while True:
                assert peer.frame()[0] == BINARY
    for view in sync_and_async("flood"):
        assert scene.ended(key(view), since=since, within=1) in GONE


def test_dribble_and_latency(scene: Scene, key: Callable[[str], str]) -> None:
    """A frame that comes byte by byte, and everything late: slow, and nothing else."""
    proxy = scene.enter(Proxy(scene.server.port))
    peer = scene.peer("echo", key("slow"), port=proxy.port)
    proxy.rate(40, C2S)
    peer.send_text("byte by byte")
    assert peer.frame() == (TEXT, b"byte by byte")
    proxy.latency(0.2)
    peer.send_text("late")
    assert peer.frame() == (TEXT, b"late")


def test_nobody_reads(scenes: list[Scene], key: Callable[[str], str]) -> None:
    """3: a view whose peer takes nothing is unblocked by the send timeout, with 1006."""

    def check(scene: Scene) -> None:
        views = sync_and_async("flood")
        since = time.monotonic()
        for view in views:
            scene.peer(view, key(view), ready=False, receive_buffer=4096)
        for view in views:
            assert scene.ended(key(view), since=since, within=SEND_TIMEOUT) == 1006
        wait_until(lambda: scene.grown("aborted") == len(views), PATIENCE, "cut connections")
        assert scene.grown("send_timeouts") == len(views)
        # The peers' sockets are open still; the server's are not (the scene's own check).
        wait_until(lambda: scene.stats()["connections"] == 1, PATIENCE, "the bystander alone")
        scene.kept += len(views) * (SETTINGS["OUTBOX_BYTES"] + 1024 * 1024)
        assert scene.descriptors_grown() <= 0

    at_once(check, scenes)


def test_nobody_reads_and_nobody_sends(scene: Scene, key: Callable[[str], str]) -> None:
    """3: what the server holds for such a peer is let go when the send timeout is over, too."""
    since = time.monotonic()
    scene.peer("some", key("some"), ready=False, receive_buffer=4096)
    scene.kept += LEFT_BY_THE_ALLOCATOR
    wait_until(lambda: scene.descriptors_grown() > 0, what="the connection")
    assert scene.ended(key("some"), since=since, within=SEND_TIMEOUT) in GONE
    wait_until(lambda: scene.descriptors_grown() <= 0, PATIENCE, "the descriptor's end")


def test_whoever_never_reads_hurts_nobody(scene: Scene, key: Callable[[str], str]) -> None:
    """3: while it is there others are served, and when it goes nothing stays."""
    peer = scene.peer("some", key("some"), ready=False, receive_buffer=4096)
    scene.kept += LEFT_BY_THE_ALLOCATOR
    assert scene.server.fetch("/hello").body == b"hello"
    since = time.monotonic()
    peer.reset()
    assert scene.ended(key("some"), since=since, within=0) in GONE


#: What makes a subscriber slow.
FAULTS: dict[str, Callable[[Proxy], None]] = {
    "stuck": lambda proxy: proxy.stall(S2C),
    "a byte a second": lambda proxy: proxy.rate(1, S2C),
}
#: Bytes by which resident memory may seem to grow without a reason.
MEASURED = 4 * 1024 * 1024


#: Longer than a loaded machine takes to fill an outbox: who is slow is not cut before that.
PATIENT = {**SETTINGS, "SEND_TIMEOUT": 10}


def test_slow_subscribers(
    starter: Starter, open_scene: OpenScene, way: str, key: Callable[[str], str]
) -> None:
    """5, 6: one that is stuck and one with a byte a second are closed with 1013; others get all."""
    scene = open_scene(starter.share(way, settings=PATIENT), way)
    healthy, published, size = 8, 200, 50_000
    channel = key("channel")
    for name, fault in FAULTS.items():
        proxy = scene.enter(Proxy(scene.server.port, buffer=4096))
        for view in sync_and_async("listen"):
            scene.client(view, key(f"{name} {view}"), port=proxy.port, channel=channel)
        fault(proxy)
    clients = [
        scene.client("listen", key(f"healthy {number}"), channel=channel)
        for number in range(healthy)
    ]
    assert scene.stats()["subscriptions"] == healthy + 4
    before = scene.stats()["resident"]
    got: dict[int, int] = {}

    def read(number: int) -> None:
        for expected in range(published):
            data = clients[number].recv(timeout=TIMEOUT)
            assert isinstance(data, bytes)
            assert data.startswith(b"%06d" % expected)
            got[number] = expected + 1

    def all_have(count: int) -> bool:
        return min(got.get(number, 0) for number in range(healthy)) >= count

    readers = [threading.Thread(target=read, args=(number,)) for number in range(healthy)]
    for reader in readers:
        reader.start()
    highest = 0
    for number in range(published):
        scene.post(f"/publish/{channel}", (b"%06d" % number).ljust(size, b"x"))
        if number % 10 == 0:
            # Publishing goes at the pace of those that read.
            wait_until(partial(all_have, number - 10), what="the healthy ones to read")
            highest = max(highest, scene.stats()["resident"])
    for reader in readers:
        reader.join(TIMEOUT)
    assert got == dict.fromkeys(range(healthy), published)
    for name in FAULTS:
        for view in sync_and_async("listen"):
            assert scene.note(key(f"{name} {view}"), "ended")["code"] == 1013
    assert scene.grown("closed_slow") == 4
    # What waits for one: its outbox and what the server and the kernel hold. All of what was
    # published would be 10 MB for each.
    bound = 4 * (SETTINGS["OUTBOX_BYTES"] + 1024 * 1024)
    assert highest - before <= bound + MEASURED, f"{(highest - before) / 1e6:.1f} MB"
