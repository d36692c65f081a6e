"""The behaviour suite, channels: subscribe, publish, unsubscribe, and who may call what where."""

from __future__ import annotations

import msgpack
import pytest

from . import behaviour_drivers
from .behaviour_app import PUBLISH_MISTAKES, SUBSCRIBE_MISTAKES
from .waiting import wait_until

pytest_generate_tests = behaviour_drivers.pytest_generate_tests
serving = behaviour_drivers.serving
driver = behaviour_drivers.driver
kind = behaviour_drivers.kind

POLICIES = ["close", "drop_oldest", "drop_newest", "latest"]


@pytest.fixture
def room(driver):
    """A channel of the test's own."""
    return driver.key


@pytest.fixture
def publish(driver):
    """Publish from an HTTP view; returns what ``publish`` returned."""

    def publish(data, channels, where="view", **asked):
        answer = driver.post(
            f"/publish/{where}", json={"data": data, "channels": channels, **asked}
        )
        assert answer.status == 200, answer.text
        return answer.json()["returned"]

    return publish


@pytest.fixture
def join(driver, kind):
    """Open a subscriber; entered, it has subscribed."""

    def join(name, *channels):
        return Member(driver.connect(f"/{kind}/member/{name}/{'/'.join(channels)}"))

    return join


class Member:
    """A connection whose view has told that it is subscribed."""

    def __init__(self, connection):
        self._connection = connection

    def __enter__(self):
        ws = self._connection.__enter__()
        assert ws.receive() == "subscribed"
        return ws

    def __exit__(self, *error):
        return self._connection.__exit__(*error)


class TestPublish:
    """``publish`` from HTTP views and threads."""

    @pytest.mark.parametrize("where", ["view", "async-view", "thread"])
    def test_from_anywhere(self, join, publish, room, where):
        """An HTTP view, an async one and a plain thread publish alike; publish returns None."""
        with join("ann", room) as ann, join("bob", room) as bob:
            assert publish({"n": 1}, [room], where, options={"encode_json": True}) == "None"
            assert ann.receive_json() == bob.receive_json() == {"n": 1}

    def test_text_and_binary(self, join, publish, room):
        """str arrives as text, bytes as binary."""
        with join("ann", room) as ann:
            publish("täxt", [room])
            publish("bytes", [room], binary=True)
            assert ann.receive_many(2) == ["täxt", b"bytes"]

    def test_encodings(self, join, publish, room):
        """encode_json makes a text frame, encode_msgpack a binary one."""
        with join("ann", room) as ann:
            publish({"ä": [1]}, [room], options={"encode_json": True})
            publish({"ä": [1]}, [room], options={"encode_msgpack": True})
            assert ann.receive_json() == {"ä": [1]}
            packed = ann.receive()
            assert isinstance(packed, bytes)
            assert msgpack.unpackb(packed) == {"ä": [1]}

    def test_subscribers_only(self, join, publish, room):
        """Only the channel's subscribers get a message."""
        with join("ann", f"{room}-a") as ann, join("bob", f"{room}-b") as bob:
            publish("for a", [f"{room}-a"])
            publish("for b", [f"{room}-b"])
            assert (ann.receive(), bob.receive()) == ("for a", "for b")
            ann.still_works()
            bob.still_works()

    def test_nobody(self, publish, room):
        """A channel without subscribers is no error."""
        assert publish("x", [room]) == "None"

    def test_a_string_is_one_channel(self, join, publish, room):
        """A plain string names one channel, not its letters."""
        with join("ann", *"abc") as letters, join("bob", "abc") as word:
            publish("word", "abc")
            assert word.receive() == "word"
            letters.still_works()

    def test_once_for_a_socket(self, join, publish, room):
        """A socket subscribed to two of the named channels gets a message once."""
        with join("ann", f"{room}-a", f"{room}-b") as ann:
            publish("once", [f"{room}-a", f"{room}-b", f"{room}-a"])
            assert ann.receive() == "once"
            ann.still_works()

    def test_exclude_one(self, join, publish, room):
        """exclude= takes one WebSocket."""
        with join("ann", room) as ann, join("bob", room) as bob:
            publish("not ann", [room], options={"exclude": "ann"})
            assert bob.receive() == "not ann"
            ann.still_works()

    def test_exclude_several(self, join, publish, room):
        """exclude= takes several, or none."""
        with join("ann", room) as ann, join("bob", room) as bob, join("cat", room) as cat:
            publish("cat only", [room], options={"exclude": ["ann", "bob"]})
            publish("all", [room], options={"exclude": []})
            assert cat.receive_many(2) == ["cat only", "all"]
            assert (ann.receive(), bob.receive()) == ("all", "all")

    def test_one_order(self, driver, join, room):
        """Every subscriber gets a channel's messages in one order, each publisher's in its own."""
        publishers, count = 3, 60
        with join("ann", room) as ann, join("bob", room) as bob:
            asked = {"publishers": publishers, "count": count, "channels": [room]}
            assert driver.post("/publish/burst", json=asked).status == 204
            came = [ann.receive_json() for _ in range(publishers * count)]
            assert came == [bob.receive_json() for _ in range(publishers * count)]
            ann.still_works()
            bob.still_works()
        for publisher in range(publishers):
            assert [number for each, number in came if each == publisher] == list(range(count))


class TestPublishInViews:
    """``publish`` in a sync view, ``await apublish`` in an async one."""

    def test_everything(self, driver, kind, join, room):
        """Text, bytes, JSON, MessagePack and excludes; apublish tells how many were reached."""
        channels = (f"{room}-a", f"{room}-b")
        with join("ann", channels[0]) as ann, join("bob", *channels) as bob:
            with driver.connect(f"/{kind}/publish-here/{'/'.join(channels)}") as ws:
                results = ws.receive_json()
            for member in (ann, bob):
                assert member.receive_many(2) == ["text", b"bytes"]
                assert member.receive_json() == {"n": 1}
                assert msgpack.unpackb(member.receive()) == {"n": 1}
                assert member.receive_json() == [1]
                member.still_works()
        if kind == "sync":
            assert results == [None] * 7
        else:
            assert results == [["PublishResult", reached] for reached in [2, 2, 2, 2, 2, 0, 0]]

    @pytest.mark.parametrize("on_slow", POLICIES)
    def test_send_then_publish(self, driver, kind, room, on_slow):
        """What a view sends and then publishes arrives in that order, under each policy."""
        with driver.connect(f"/{kind}/policy/{on_slow}/{room}") as ws:
            assert ws.receive() == "0"
            for number in range(20):
                ws.send(str(number))
                assert ws.receive_many(2) == [f"sent {number}", f"published {number}"]

    @pytest.mark.parametrize("name", PUBLISH_MISTAKES)
    def test_mistake(self, driver, kind, name):
        """Wrong arguments and data that cannot be encoded raise; nobody gets anything."""
        error_type, words = PUBLISH_TOLD[name]
        with driver.connect(f"/{kind}/publish-mistakes/{name}") as ws:
            error = ws.receive_json()
            assert error_type in error["kinds"], error
            assert words in error["message"]
            ws.still_works()

    @pytest.mark.parametrize("what", ["publish", "publish_json"])
    def test_on_the_loop(self, driver, what):
        """publish on the loop raises WrongThread, which names apublish and create_task."""
        with driver.connect(f"/async/wrong-thread/{what}") as ws:
            error = ws.receive_json()
        assert error["type"] == "WrongThread"
        assert "UsageError" in error["kinds"]
        assert "await websockets.apublish" in error["message"]
        assert "asyncio.create_task(websockets.apublish(" in error["message"]

    @pytest.mark.parametrize("what", ["publish", "publish_json"])
    def test_on_another_loop(self, driver, what):
        """apublish on another loop than the server's raises WrongThread, which names publish."""
        with driver.connect(f"/sync/wrong-thread/{what}") as ws:
            error = ws.receive_json()
        assert error["type"] == "WrongThread"
        assert "publish" in error["message"]


PUBLISH_TOLD = {
    "data of int": ("TypeError", "int"),
    "data of None": ("TypeError", "NoneType"),
    "surrogate": ("ValueError", "surrogate"),
    "channels of int": ("TypeError", "int"),
    "a channel of int": ("TypeError", "int"),
    "a channel of bytes": ("TypeError", "bytes"),
    "channels of None": ("TypeError", "NoneType"),
    "exclude of int": ("TypeError", "int"),
    "exclude of a name": ("TypeError", "str"),
    "no JSON": ("TypeError", "object"),
    "no MessagePack": ("TypeError", "object"),
    "two encodings": ("UsageError", "encode_msgpack"),
}


class TestSubscribe:
    """``with websockets.subscribe`` in sync views, ``async with`` in async ones."""

    def test_levels(self, driver, kind):
        """Blocks may be nested; a channel ends with its outermost block."""
        with driver.connect(f"/{kind}/levels") as ws:
            assert ws.receive_all() == ["1", "2", "3", "end"]

    def test_nothing_is_missed(self, driver, kind):
        """What is published after the block was entered arrives, and all before its end."""
        with driver.connect(f"/{kind}/at-once/200") as ws:
            assert ws.receive_all() == [*map(str, range(200)), "end"]

    def test_unsubscribe(self, driver, kind):
        """It removes all levels at once, of that channel; what was queued before goes out."""
        with driver.connect(f"/{kind}/unsubscribe") as ws:
            assert ws.receive_all() == ["1", "2", "3", "end"]

    def test_whatever_happens_inside(self, driver, kind):
        """An error that leaves the block ends the subscription, and is the view's to catch."""
        with driver.connect(f"/{kind}/body-raises") as ws:
            assert ws.receive_all() == [
                "Deliberate",
                "ConnectionClosed",
                "GeneratorExit",
                "KeyboardInterrupt",
                "end",
            ]

    def test_nothing_is_left_behind(self, driver, serving, kind, join, room):
        """A subscriber that left is forgotten, and publishing goes on."""

        def counted(*expected):
            stats = driver.get("/stats").json()
            return (stats["channels"], stats["subscriptions"]) == expected

        with serving.driver().connect(f"/{kind}/echo") as ws:
            with join("ann", f"{room}-a", f"{room}-b"), join("bob", f"{room}-a"):
                wait_until(lambda: counted(2, 3), what="the count of two subscribers")
            wait_until(lambda: counted(0, 0), what="the end of the subscriptions")
            ws.still_works()

    @pytest.mark.parametrize("on_slow", POLICIES)
    def test_a_client_that_reads_gets_everything(
        self, driver, serving, kind, publish, room, on_slow
    ):
        """Nothing is dropped for a client that reads, whatever the policy is."""
        with driver.connect(f"/{kind}/policy/{on_slow}/{room}") as ws:
            assert ws.receive() == "0"
            for number in range(20):
                publish(str(number), [room])
                assert ws.receive() == str(number)
            if on_slow != "latest":  # of a burst, latest keeps what its name says
                asked = {"publishers": 1, "count": 200, "channels": [room]}
                assert driver.post("/publish/burst", json=asked).status == 204
                assert [ws.receive_json()[1] for _ in range(200)] == list(range(200))
        assert driver.note("dropped")["count"] == 0

    @pytest.mark.parametrize("name", SUBSCRIBE_MISTAKES)
    def test_mistake(self, driver, kind, name):
        """Wrong arguments, and too many channels, raise; nothing is subscribed."""
        error_type, words = SUBSCRIBE_TOLD[name]
        with driver.connect(f"/{kind}/subscribe-mistakes/{name}") as ws:
            error = ws.receive_json()
            assert error_type in error["kinds"], error
            assert words in error["message"]
            ws.still_works()

    def test_with_on_the_loop(self, driver):
        """A plain with in an async view raises WrongThread, which says async with."""
        with driver.connect("/async/wrong-thread/subscribe") as ws:
            error = ws.receive_json()
        assert error["type"] == "WrongThread"
        assert "async with" in error["message"]

    def test_async_with_in_a_thread(self, driver):
        """An async with elsewhere than on the server's loop raises WrongThread."""
        with driver.connect("/sync/wrong-thread/subscribe") as ws:
            error = ws.receive_json()
        assert error["type"] == "WrongThread"
        assert "with" in error["message"]


SUBSCRIBE_TOLD = {
    "channels of int": ("TypeError", "int"),
    "channels of None": ("TypeError", "NoneType"),
    "a channel of int": ("TypeError", "int"),
    "a channel of bytes": ("TypeError", "bytes"),
    "on_slow of another name": ("ValueError", "wait"),
    "on_slow of None": ("ValueError", "None"),
    "too many channels": ("UsageError", "2"),
}
