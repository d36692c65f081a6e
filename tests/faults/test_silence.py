"""Peers that are silent and views that do not listen, while uvicorn pings (2, 4, 7, 8)."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
from websockets.exceptions import ConnectionClosed

from ..integration.waiting import wait_until
from .conftest import GONE, TIMEOUT, OpenScene, Scene, Starter, at_once, sync_and_async
from .proxy import C2S, S2C, Proxy

#: Seconds between uvicorn's pings, and for the answer.
PING = 1.0
SERVED = {"pings": PING}

#: What makes a peer silent.
FAULTS: dict[str, Callable[[Proxy], None]] = {
    "blackhole": lambda proxy: proxy.blackhole(),
    "half-open-c2s": lambda proxy: proxy.half_open(C2S),
    "half-open-s2c": lambda proxy: proxy.half_open(S2C),
}


def only_a_bystander(scene: Scene) -> bool:
    stats = scene.stats()
    return (stats["connections"], stats["subscriptions"]) == (1, 0)


def check_silence(scenes: list[Scene], key: Callable[[str], str], ping: float) -> None:
    """Idle views of both kinds are unblocked within both times of a ping, behind any fault."""
    expected = []
    for scene in scenes:
        for name, fault in FAULTS.items():
            proxy = scene.enter(Proxy(scene.server.port))
            for view in sync_and_async("listen"):
                expected.append((scene, key(f"{name}-{view.replace('/', '-')}")))
                scene.client(view, expected[-1][1], port=proxy.port)
            fault(proxy)
    for scene in scenes:
        assert scene.stats()["subscriptions"] == 2 * len(FAULTS)
    since = time.monotonic()
    for scene, name in expected:
        assert scene.ended(name, since=since, within=2 * ping) in (*GONE, 1011)
    for scene in scenes:
        # The proxies still hold their ends: it is the server that has let go.
        wait_until(partial(only_a_bystander, scene), what="the end of all but the bystander")


def test_a_silent_peer(scenes: list[Scene], key: Callable[[str], str]) -> None:
    """2, 4: whoever vanishes without a word, either way, is noticed by the ping."""
    check_silence(scenes, key, PING)


@pytest.mark.long
@pytest.mark.timeout(180)
def test_a_silent_peer_and_the_real_pings(
    starter: Starter, open_scene: OpenScene, key: Callable[[str], str]
) -> None:
    """2, 4: the same under ``serve`` as it comes: a ping each 20 s, and 20 s for the answer."""
    ways = ("serve-sansio", "serve-wsproto")
    check_silence([open_scene(starter.share(way), way) for way in ways], key, 20.0)


def test_a_busy_view(scenes: list[Scene], key: Callable[[str], str]) -> None:
    """8: a view that is busy while a message waits keeps its client, whatever is pinged."""

    def check(scene: Scene) -> None:
        scene.later(f"/release/{key('busy')}")
        client = scene.client("deaf", key("busy"))
        client.send("waiting")
        started = time.monotonic()
        while time.monotonic() - started < 4 * PING:  # it answers pings meanwhile
            with pytest.raises(TimeoutError):
                client.recv(timeout=PING / 2)
        scene.post(f"/release/{key('busy')}")
        assert client.recv(timeout=10) == "waiting"

    at_once(check, scenes)


def test_a_deaf_view(scenes: list[Scene], key: Callable[[str], str]) -> None:
    """7: a view that never receives costs what its inbox holds; then its client gets 1013."""

    def check(scene: Scene) -> None:
        scene.later(f"/release/{key('deaf')}")
        client = scene.client("deaf", key("deaf"))
        since = time.monotonic()
        with pytest.raises(ConnectionClosed):
            while time.monotonic() - since < TIMEOUT:
                client.send(bytes(100_000))
        # What the client had on its way is thrown away, and so may be the goodbye with it.
        assert client.close_code in (1013, 1006)
        assert scene.stats()["inbox_bytes"] <= 1024 * 1024
        assert scene.grown("inbox_closed") == 1
        scene.post(f"/release/{key('deaf')}")
        assert scene.note(key("deaf"), "ended")["code"] == 1013

    at_once(check, scenes)


def test_a_deaf_view_whose_client_is_patient(
    scenes: list[Scene], key: Callable[[str], str]
) -> None:
    """7: a client that sends more than the inbox holds, and then waits, gets the goodbye."""

    def check(scene: Scene) -> None:
        scene.later(f"/release/{key('deaf')}")
        client = scene.client("deaf", key("deaf"))
        for _ in range(12):
            client.send(bytes(100_000))
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=TIMEOUT)
        assert client.close_code == 1013
        scene.post(f"/release/{key('deaf')}")
        assert scene.note(key("deaf"), "ended")["code"] == 1013

    at_once(check, scenes)
