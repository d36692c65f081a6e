"""Views with bugs, clients that ask for too much: who hears what (9 to 11, 31 to 34, 36 to 39)."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from ..integration.serving import HANDSHAKE, read_answer, request_head
from ..integration.waiting import wait_until
from .conftest import SETTINGS, TIMEOUT, Scene, path, sync_and_async

KEY = Callable[[str], str]


def goodbye(client: object) -> tuple[int, str]:
    """The server's close, which must be what comes next."""
    with pytest.raises(ConnectionClosed) as caught:
        client.recv(timeout=TIMEOUT)  # type: ignore[attr-defined]
    received = caught.value.rcvd
    assert received is not None
    return received.code, received.reason


def refused(scene: Scene, view: str, key: str, **headers: str) -> tuple[int, str]:
    """The answer to a handshake: its status and its body."""
    url = scene.server.ws_url(path(view, key))
    with pytest.raises(InvalidStatus) as caught, connect(url, additional_headers=headers):
        pass
    response = caught.value.response
    return response.status_code, response.body.decode()


def test_a_view_that_raises(scene: Scene, key: KEY) -> None:
    """9: 500 before the accept and 1011 after it, one traceback each, and no word of the error."""
    scene.tracebacks = 4
    for view in sync_and_async("raise"):
        status, body = refused(scene, f"{view}/before", key("before"))
        assert (status, "secret" in body) == (500, False)
        client = scene.client(f"{view}/after", key("after"), ready=False)
        assert goodbye(client) == (1011, "")
    wait_until(lambda: scene.log().count("RuntimeError: the secret of the view") == 4)


def test_a_view_that_returns(scene: Scene, key: KEY) -> None:
    """10: 1000."""
    for view in sync_and_async("return"):
        assert goodbye(scene.client(view, key(view), ready=False)) == (1000, "")


def test_words_after_the_end(scene: Scene, key: KEY) -> None:
    """11: whoever ends it, each late word raises ConnectionClosed with the same code."""
    client = scene.client("after-the-end", key("server"))
    client.send("close")
    assert goodbye(client) == (4001, "ours")
    client = scene.client("after-the-end", key("client"))
    client.send("nothing")
    client.close(4321, "theirs")
    for name, code in (("server", 4001), ("client", 4321)):
        *words, second, third, waited = scene.note(key(name), "tried")["outcomes"]
        assert words == [["ConnectionClosed", code]] * 4
        assert second == third == ["returned", None]
        assert waited == ["returned", True]


def test_views_that_take_every_place(scene: Scene, key: KEY) -> None:
    """31: 100 views that block: HTTP is answered, the next handshake is 503, and a place opens."""
    places = int(SETTINGS["MAX_CONNECTIONS"]) - 1  # one is the bystander's
    scene.later(f"/release/{key('deaf')}")
    peers = [scene.peer("deaf", key("deaf")) for _ in range(places)]
    for _ in range(5):
        assert refused(scene, "echo", key("late"))[0] == 503
    assert scene.grown("refused_full") == 5
    assert scene.stats()["view_threads"] == places + 1
    assert scene.server.fetch("/hello").body == b"hello"
    peers[0].reset()
    scene.post(f"/release/{key('deaf')}")
    wait_until(lambda: scene.stats()["connections"] <= places, what="a place")
    scene.peer("echo", key("at last"))


def test_foreign_pages(scene: Scene, key: KEY) -> None:
    """32: a page of another origin is refused with 403, one of ours is let in."""
    host = f"127.0.0.1:{scene.server.port}"
    foreign = [
        *("https://evil.example", f"http://{host}.evil.example", f"http://evil.example/{host}"),
        *("null", "http://127.0.0.1", f"http://127.0.0.1:{scene.server.port + 1}"),
        *(f"http://{host}@evil.example", "file://", "HTTPS://EVIL.EXAMPLE", "nonsense"),
    ]
    for origin in foreign:
        assert refused(scene, "echo", key("foreign"), Origin=origin)[0] == 403, origin
    for headers in ({}, {"Origin": f"http://{host}"}, {"Origin": f"HTTP://{host.upper()}"}):
        url = scene.server.ws_url(path("echo", key("ours")))
        with connect(url, additional_headers=headers) as client:
            assert client.recv(timeout=TIMEOUT) == "ready"


def test_values_that_may_not_be(scene: Scene, key: KEY) -> None:
    """33, 34: they raise ValueError in the view; nothing of them is sent, and it may go on."""
    head = request_head(
        "GET", path("headers", key("headers")), {**HANDSHAKE, "Sec-WebSocket-Protocol": "x, b, a"}
    )
    with scene.server.open() as connection:
        connection.sendall(head)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 101")
    assert b"evil" not in answer.lower()
    lines = answer.lower().partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert b"x-one: 1" in lines
    assert b"sec-websocket-protocol: b" in lines
    outcomes = scene.note(key("headers"), "tried")["outcomes"]
    assert outcomes == [["ValueError"]] * 12


def test_a_refusal_that_may_not_be(scene: Scene, key: KEY) -> None:
    """34: a header of a response cannot carry another one: it is a 500, by Werkzeug."""
    scene.tracebacks = 1
    status, body = refused(scene, "deny", key("deny"))
    assert (status, "evil" in body.lower()) == (500, False)


def test_the_wrong_protocol(scene: Scene, key: KEY) -> None:
    """36: a handshake for a page is 400, for nothing 404; a page of a WebSocket is 426."""
    assert refused(scene, "hello", key("page"))[0] == 400
    assert refused(scene, "nowhere", key("nowhere"))[0] == 404
    answer = scene.server.fetch(path("echo", key("plain")))
    assert answer.status == 426
    assert answer.headers["Upgrade"] == "websocket"
    with scene.server.open() as connection:
        connection.sendall(
            request_head("POST", path("echo", key("post")), HANDSHAKE, b"", close=True)
        )
        assert read_answer(connection).status in (400, 405, 426)


def test_a_million_channels(scene: Scene, key: KEY) -> None:
    """37: a client that may choose channels has its thousand, and short names; then it raises."""
    client = scene.client("subscribe-many", key("many"), ready=False)

    def subscribed(times: int, name: str) -> list[object]:
        client.send(json.dumps({"times": times, "name": name}))
        answer: list[object] = json.loads(client.recv(timeout=TIMEOUT))
        return answer

    assert subscribed(1000, "channel ") == [1000, "subscribed"]
    assert subscribed(1_000_000, "channel ") == [1000, "UsageError"]
    assert subscribed(1, "x" * 254) == [1, "subscribed"]
    assert subscribed(1, "x" * 255) == [0, "ValueError"]
    assert subscribed(1, "x" * 1_000_000) == [0, "ValueError"]
    assert subscribed(1, "\N{SNOWMAN}" * 85) == [0, "ValueError"]
    assert scene.stats()["subscriptions"] == 0
    assert scene.grown("refused_subscribes") == 4


def test_publishing_what_may_not_be(scene: Scene, key: KEY) -> None:
    """39: it raises where it is published; no subscriber hears of it, and all get what follows."""
    channel = key("channel")
    clients = [
        scene.client(view, key(f"{number} {view}"), channel=channel)
        for number in range(3)
        for view in sync_and_async("listen")
    ]
    too_much = int(SETTINGS["MAX_PUBLISH_BYTES"]) + 1
    answer = scene.post(f"/publish-wrong/{channel}?too_much={too_much}")
    assert json.loads(answer) == [
        *(["TypeError"], ["TypeError"], ["TypeError"], ["UnicodeEncodeError"]),
        *(["ValueError"], ["ValueError"], ["TypeError"], ["TypeError"], ["TypeError"]),
        ["TypeError"],
    ]
    for client in clients:
        assert client.recv(timeout=TIMEOUT) == "a word"
    (outcome, *_) = json.loads(scene.post(f"/publish-nan/{channel}"))
    scene.post(f"/publish/{channel}", b"the end")
    for client in clients:
        if outcome == "returned":  # what Flask's own provider makes of it
            assert client.recv(timeout=TIMEOUT) == "NaN"
        assert client.recv(timeout=TIMEOUT) == b"the end"
