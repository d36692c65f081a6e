"""Channels: subscribe, publish, order, counters."""

from __future__ import annotations

import asyncio
import threading
import warnings

import pytest

from flask_websockets import (
    ConnectionClosed,
    ConnectionRejected,
    PublishResult,
    UsageError,
    WebSockets,
    WrongThread,
)

from .integration.waiting import wait_until

TIMEOUT = 5


@pytest.fixture
def subscribed(websockets):
    """A view that subscribes to the channels in its path and says when it has."""

    @websockets.route("/sub/<path:names>")
    def view(ws, names):
        with websockets.subscribe(ws, names.split("/")):
            ws.send("subscribed")
            for _ in ws.iter_data():
                pass

    return view


def test_publish_reaches_the_subscribers_of_a_channel_only(websockets, client, subscribed):
    """Subscribers of the channel get the message as it was published, others nothing."""
    with (
        client.websocket_connect("/sub/a") as a,
        client.websocket_connect("/sub/a/b") as ab,
        client.websocket_connect("/sub/c") as c,
    ):
        for ws in (a, ab, c):
            assert ws.receive() == "subscribed"
        websockets.publish("text", ["a"])
        websockets.publish(b"bytes", "b")
        websockets.publish_json({"n": 1}, ["a"])
        websockets.publish("last", ["a", "c"])
        assert [a.receive() for _ in range(3)] == ["text", '{"n": 1}', "last"]
        assert [ab.receive() for _ in range(4)] == ["text", b"bytes", '{"n": 1}', "last"]
        assert c.receive() == "last"


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_subscription_that_nobody_enters_is_told_of(websockets, client, kind):
    """``subscribe`` alone subscribes nothing: a warning names the channels and the view's line."""

    @websockets.route("/sync")
    def sync_view(ws):
        websockets.subscribe(ws, ["kitchen", "hall"])
        ws.send("done")

    @websockets.route("/async")
    async def async_view(ws):
        websockets.subscribe(ws, ["kitchen", "hall"])
        await ws.send("done")

    with (
        pytest.warns(RuntimeWarning, match="'kitchen', 'hall' was never entered") as caught,
        client.websocket_connect(f"/{kind}") as ws,
    ):
        assert ws.receive() == "done"
    assert [warning.filename for warning in caught] == [__file__]


def test_subscribe_takes_the_connection_first(websockets, client):
    """Who gives the channel first is told the order."""

    @websockets.route("/ws")
    def view(ws):
        with pytest.raises(TypeError, match="connection first, and then channels; got str"):
            websockets.subscribe("kitchen", ws)
        ws.send("told")

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "told"


def test_a_subscription_that_cannot_be_entered_says_so_once(websockets, client):
    """Who entered it has been told why it failed."""

    @websockets.route("/ws")
    def view(ws):
        ws.close()
        with pytest.raises(ConnectionClosed), websockets.subscribe(ws, "kitchen"):
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConnectionRejected), client.websocket_connect("/ws"):
            pass


def test_a_subscriber_of_two_named_channels_gets_the_message_once(websockets, client, subscribed):
    """One publish is one message for each subscriber."""
    with client.websocket_connect("/sub/a/b") as ws:
        assert ws.receive() == "subscribed"
        websockets.publish("once", ["a", "b", "a"])
        websockets.publish("end", ["a"])
        assert [ws.receive(), ws.receive()] == ["once", "end"]


def test_channels_may_be_a_generator_or_a_string(websockets, client):
    """A generator is used up once, a string is one name and not its letters."""

    @websockets.route("/ws")
    def view(ws):
        with websockets.subscribe(ws, (name for name in ["one", "two"])):
            assert websockets.stats().subscriptions <= 2
            websockets.publish("generated", (name for name in ["two"]))
            with websockets.subscribe(ws, "three"):
                websockets.publish("letters", list("three"))
                websockets.publish("string", "three")
        websockets.publish("left", ["one", "two", "three"])
        ws.send("end")

    with client.websocket_connect("/ws") as ws:
        assert [ws.receive() for _ in range(3)] == ["generated", "string", "end"]
    with pytest.raises(TypeError, match="name is a str"):
        websockets.publish("x", [1])


def test_exclude_takes_one_connection_or_several(websockets, client):
    """exclude= leaves out whom it names."""
    connections = []

    @websockets.route("/ws")
    def view(ws):
        with websockets.subscribe(ws, "a"):
            connections.append(ws)
            ws.send("subscribed")
            for _ in ws.iter_data():
                pass

    with client.websocket_connect("/ws") as first:
        assert first.receive() == "subscribed"
        with client.websocket_connect("/ws") as second:
            assert second.receive() == "subscribed"
            websockets.publish("not first", "a", exclude=connections[0])
            websockets.publish("nobody", "a", exclude=connections)
            websockets.publish("both", "a", exclude=[])
            assert first.receive() == "both"
            assert [second.receive(), second.receive()] == ["not first", "both"]


def test_subscribe_is_reentrant(websockets, client):
    """The inner block's end does not end the outer one's subscription."""

    @websockets.route("/ws")
    def view(ws):
        with websockets.subscribe(ws, ["a"]):
            with websockets.subscribe(ws, ["a", "b"]):
                websockets.publish("1", ["a", "b"])
            websockets.publish("2", ["a"])
            websockets.publish("no", ["b"])
        websockets.publish("no", ["a"])
        ws.send("end")

    with client.websocket_connect("/ws") as ws:
        assert [ws.receive() for _ in range(3)] == ["1", "2", "end"]


def test_unsubscribe_removes_all_levels(websockets, client):
    """unsubscribe ends every nested subscribe, and is no error where there is none."""

    @websockets.route("/ws")
    def view(ws):
        with websockets.subscribe(ws, "a"), websockets.subscribe(ws, "a"):
            websockets.unsubscribe(ws, ["a", "never"])
            websockets.publish("no", "a")
        ws.send("end")

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "end"
        wait_until(lambda: websockets.stats().subscriptions == 0)


class Surprise(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, Surprise, SystemExit, GeneratorExit])
def test_nothing_is_left_behind_whatever_the_body_raises(app, websockets, client, error):
    """The subscription ends with the block, and the view goes on."""

    @websockets.route("/ws")
    def view(ws):
        with pytest.raises(error), websockets.subscribe(ws, ["a", "b"]):
            raise error
        websockets.publish("no", ["a", "b"])
        ws.send_json(websockets.stats().subscriptions)
        ws.receive()

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() in ("0", "2")  # the end of the block may still be at the door
        wait_until(lambda: websockets.stats().subscriptions == 0)
        ws.send("end")


def test_a_view_that_never_unsubscribes_leaves_nothing(websockets, client):
    """The end of a connection is the end of its subscriptions."""
    kept = []

    @websockets.route("/ws")
    def view(ws):
        block = websockets.subscribe(ws, ["a"])
        block.__enter__()
        kept.append(block)
        ws.send("subscribed")
        ws.receive()

    @websockets.route("/other")
    def other(ws):
        ws.send("here")
        ws.receive()

    with client.websocket_connect("/other") as ws:
        assert ws.receive() == "here"
        with client.websocket_connect("/ws") as leaving:
            assert leaving.receive() == "subscribed"
            assert websockets.stats().subscriptions == 1
        wait_until(lambda: websockets.stats().subscriptions == 0)
        assert websockets.stats().channels == 0


def test_a_view_that_is_stuck_in_its_block_is_forgotten(client_with):
    """The subscription ends with the connection, not with the view that does not notice."""
    websockets, client = client_with(WEBSOCKETS_CLOSE_TIMEOUT=0.05)
    go = threading.Event()

    @websockets.route("/ws")
    def view(ws):
        with websockets.subscribe(ws, "a"):
            ws.send("subscribed")
            assert go.wait(TIMEOUT)

    with client.websocket_connect("/ws") as keeps_the_loop:
        assert keeps_the_loop.receive() == "subscribed"
        with client.websocket_connect("/ws") as leaving:
            assert leaving.receive() == "subscribed"
        stats = websockets.stats()
        assert (stats.subscriptions, stats.view_threads, stats.stuck_views) == (1, 2, 1)
        go.set()
        wait_until(lambda: websockets.stats().view_threads <= 1)


def test_i6_pending_subscribes_are_bounded(client_with):
    """A view that subscribes in a tight loop waits for the loop, like a publisher."""
    websockets, client = client_with(WEBSOCKETS_MAX_PENDING_PUBLISHES=5)
    most = []

    @websockets.route("/ws")
    def view(ws):
        for _ in range(2000):
            with websockets.subscribe(ws, "a"), websockets.subscribe(ws, ["a", "b"]):
                most.append(websockets.stats().pending)
        ws.send("done")

    with client.websocket_connect("/ws") as ws:
        assert ws.receive(timeout=20) == "done"
    assert max(most) <= 5 + 5 + 2  # the joins, a leave for each, the accept and the send


def test_subscribe_on_a_closed_connection(websockets, client):
    """subscribe raises ConnectionClosed, and subscribes nothing."""
    seen = []

    @websockets.route("/ws")
    def view(ws):
        ws.accept()
        assert ws.wait_closed(TIMEOUT)
        with pytest.raises(ConnectionClosed), websockets.subscribe(ws, "a"):
            pass
        websockets.unsubscribe(ws, "a")
        seen.append(websockets.stats().subscriptions)

    with client.websocket_connect("/ws"):
        pass
    assert seen == [0]


def test_the_limit_of_channels(app, client_with):
    """Above WEBSOCKETS_MAX_CHANNELS_PER_CONNECTION subscribe raises and subscribes nothing."""
    websockets, client = client_with(WEBSOCKETS_MAX_CHANNELS_PER_CONNECTION=3)

    @websockets.route("/ws")
    def view(ws):
        with websockets.subscribe(ws, "abc"), websockets.subscribe(ws, ["d", "e"]):
            with websockets.subscribe(ws, ["d", "e"]):
                pass  # no new channel
            with (
                pytest.raises(UsageError, match="3 channels"),
                websockets.subscribe(ws, ["f"]),
            ):
                pass
            websockets.publish("no", "f")
            websockets.publish("yes", "e")
        ws.receive()

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "yes"
        ws.send("end")


@pytest.fixture
def client_with(app):
    """A WebSockets object with these settings, and its client."""

    def make(**settings):
        app.config.update(settings)
        websockets = WebSockets(app)
        return websockets, websockets.test_client()

    return make


def test_on_slow_takes_close_only(websockets, client):
    """Other policies are an error that says so."""

    @websockets.route("/ws")
    def view(ws):
        with pytest.raises(ValueError, match="close"), websockets.subscribe(ws, "a", on_slow="x"):
            pass
        ws.send("end")

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "end"


def test_a_connection_of_another_object(app, websockets, client):
    """Channels of two objects are separate; mixing them up is an error."""
    other = WebSockets()

    @websockets.route("/ws")
    def view(ws):
        with pytest.raises(UsageError, match="another WebSockets object"), other.subscribe(ws, "a"):
            pass
        ws.send("end")

    with client.websocket_connect("/ws") as ws:
        assert ws.receive() == "end"


def test_i7_one_order_for_all_and_each_publishers_own(websockets, client, subscribed):
    """Two publishers: every subscriber sees the same order, and each publisher's own."""
    with client.websocket_connect("/sub/a") as first, client.websocket_connect("/sub/a") as second:
        assert first.receive() == second.receive() == "subscribed"

        def publish(name):
            for number in range(200):
                websockets.publish(f"{name} {number}", "a")

        publishers = [threading.Thread(target=publish, args=(name,)) for name in "xy"]
        for thread in publishers:
            thread.start()
        for thread in publishers:
            thread.join(TIMEOUT)
        logs = [[ws.receive() for _ in range(400)] for ws in (first, second)]
    assert logs[0] == logs[1]
    for name in "xy":
        own = [message for message in logs[0] if message.startswith(name)]
        assert own == [f"{name} {number}" for number in range(200)]


def test_sends_and_publishes_of_one_thread_keep_their_order(websockets, client):
    """send, publish, send by one thread arrive in that order, whichever comes first."""

    @websockets.route("/ws")
    def view(ws):
        with websockets.subscribe(ws, "a"):
            for number in range(0, 300, 3):
                ws.send(str(number))
                websockets.publish(str(number + 1), "a")
                ws.send(str(number + 2))
            ws.receive()

    with client.websocket_connect("/ws") as ws:
        assert [int(ws.receive()) for _ in range(300)] == list(range(300))
        ws.send("end")


def test_apublish(websockets, client, subscribed):
    """On the loop apublish says how many it queued; elsewhere it says to call publish."""
    with client.websocket_connect("/sub/a") as first, client.websocket_connect("/sub/a/b") as ws:
        assert first.receive() == ws.receive() == "subscribed"

        async def publish():
            return await websockets.apublish("x", ["a"]), await websockets.apublish("y", ["none"])

        assert first._server.call(publish(), TIMEOUT) == (PublishResult(2), PublishResult(0))
        assert [first.receive(), ws.receive()] == ["x", "x"]
        with pytest.raises(WrongThread, match="Call publish"):
            asyncio.run(websockets.apublish("x", "a"))


def test_apublish_comes_after_what_threads_published(websockets, client, subscribed):
    """What was posted at the door is answered before."""
    with client.websocket_connect("/sub/a") as ws:
        assert ws.receive() == "subscribed"

        async def publish():
            # The loop is busy here: the thread's message waits at the door meanwhile.
            thread = threading.Thread(target=websockets.publish, args=("thread", "a"))
            thread.start()
            thread.join(TIMEOUT)
            return await websockets.apublish("loop", "a")

        assert ws._server.call(publish(), TIMEOUT) == PublishResult(1)
        assert [ws.receive(), ws.receive()] == ["thread", "loop"]


def test_publish_on_the_loops_thread(websockets, client, subscribed):
    """publish on the loop raises WrongThread, naming what to do, and never deadlocks."""
    with client.websocket_connect("/sub/a") as ws:
        assert ws.receive() == "subscribed"

        async def publish():
            websockets.publish("x", "a")

        with pytest.raises(WrongThread, match=r"asyncio\.create_task\(websockets\.apublish"):
            ws._server.call(publish(), TIMEOUT)


@pytest.mark.parametrize(
    ("data", "options", "error"),
    [
        (1, {}, TypeError),
        (None, {}, TypeError),
        ({"a": 1}, {}, TypeError),
        ("\ud800", {}, ValueError),
        (object(), {"encode_json": True}, TypeError),
        ("x", {"encode_json": True, "encode_msgpack": True}, UsageError),
    ],
)
def test_bad_data_raises_in_the_publisher(websockets, client, subscribed, data, options, error):
    """What cannot be sent raises before anything is sent, with and without a server."""
    with pytest.raises(error):
        websockets.publish(data, "a", **options)
    with client.websocket_connect("/sub/a") as ws:
        assert ws.receive() == "subscribed"
        with pytest.raises(error):
            websockets.publish(data, "a", **options)
        websockets.publish("good", "a")
        assert ws.receive() == "good"


def test_encodings(websockets, client, subscribed):
    """encode_json makes text, encode_msgpack binary."""
    import msgpack

    with client.websocket_connect("/sub/a") as ws:
        assert ws.receive() == "subscribed"
        websockets.publish([1], "a", encode_json=True)
        websockets.publish([1], "a", encode_msgpack=True)
        assert ws.receive() == "[1]"
        assert msgpack.unpackb(ws.receive()) == [1]


def test_publish_before_a_server_has_started(websockets):
    """There are no subscribers, and nothing happens."""
    websockets.publish("x", "a")
    assert asyncio.run(websockets.apublish("x", "a")) == PublishResult(0)
    assert websockets.stats().published == 0


def test_i6_a_slow_subscriber_is_closed_and_counted(client_with):
    """on_slow="close": 1013 for the one that does not read, nothing lost for the other."""
    websockets, client = client_with(
        WEBSOCKETS_OUTBOX_MESSAGES=10, WEBSOCKETS_CLOSE_TIMEOUT=1, WEBSOCKETS_SEND_TIMEOUT=5
    )
    ended = []

    @websockets.route("/<name>")
    def view(ws, name):
        try:
            with websockets.subscribe(ws, "a"):
                ws.send("subscribed")
                for _ in ws.iter_data():
                    pass
        finally:
            ended.append((name, ws.close_code, ws.close_reason))

    with client.websocket_connect("/slow") as slow, client.websocket_connect("/quick") as quick:
        assert slow.receive() == quick.receive() == "subscribed"
        for number in range(60):
            websockets.publish(str(number), "a")
            assert quick.receive() == str(number)
        wait_until(lambda: ended)
        assert ended == [("slow", 1013, "slow consumer")]
        stats = websockets.stats()
        assert (stats.closed_slow, stats.published) == (1, 60)
        assert 60 + 16 <= stats.delivered <= 60 + 16 + 12
        received = []
        with pytest.raises(ConnectionClosed) as caught:
            while True:
                received.append(int(slow.receive()))
        # What the client's side had taken already it can read; the rest was dropped.
        assert received == list(range(len(received)))
        assert caught.value.code in (1013, 1006)
    assert ended[1][:2] == ("quick", 1000)
