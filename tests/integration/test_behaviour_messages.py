"""The behaviour suite, messages: receive, send, iteration, the end, and mistakes in a view."""

from __future__ import annotations

import msgpack
import pytest

from . import behaviour_drivers
from .behaviour_app import EACH, MISTAKES, SENDERS, VERBS
from .waiting import wait_until

pytest_generate_tests = behaviour_drivers.pytest_generate_tests
serving = behaviour_drivers.serving
driver = behaviour_drivers.driver
kind = behaviour_drivers.kind

#: What a connection says of itself when it is over.
OVER = {"connected": False, "closed": True, "subprotocol": None}


class TestReceive:
    """``receive`` and ``receive_json``."""

    def test_echo(self, driver, kind):
        """Text comes as str, binary as bytes, in order, of any size."""
        with driver.connect(f"/{kind}/echo") as ws:
            for data in ("text", b"binary", "ü€😀", "x" * 300_000, b"x" * 300_000):
                ws.send(data)
                assert ws.receive() == data

    @pytest.mark.parametrize("data", ["", b""], ids=["text", "binary"])
    def test_empty(self, driver, kind, data):
        """A message without content is a message."""
        with driver.connect(f"/{kind}/echo") as ws:
            ws.send(data)
            ws.send("the next")
            assert ws.receive() == data
            assert ws.receive() == "the next"

    def test_timeouts(self, driver, kind):
        """When the time passes receive returns None, and receive_json raises TimeoutError."""
        with driver.connect(f"/{kind}/receive-in-time") as ws:
            assert ws.receive_json() == [None, "TimeoutError"]

    def test_after_a_timeout(self, driver, kind):
        """What comes after a timeout is not lost, and a message ends the wait."""
        with driver.connect(f"/{kind}/receive-in-time") as ws:
            ws.receive_json()
            ws.send("late")
            assert ws.receive_json() == "late"

    @pytest.mark.parametrize("sent", ["null", b"null"])
    def test_none_is_json(self, driver, kind, sent):
        """receive_json returns None for null, of a text or a binary frame."""
        with driver.connect(f"/{kind}/receive-in-time") as ws:
            ws.receive_json()
            ws.send("late")
            ws.receive_json()
            ws.send(sent)
            assert ws.receive_json() is None

    @pytest.mark.parametrize("sent", ["{", "", "NaN,", b"\xff"])
    def test_no_json(self, driver, kind, sent):
        """What is no JSON raises InvalidMessage, a ValueError, and the connection lives on."""
        with driver.connect(f"/{kind}/receive-in-time") as ws:
            ws.receive_json()
            ws.send("late")
            ws.receive_json()
            ws.send("1")
            ws.receive_json()
            ws.send(sent)
            error = ws.receive_json()
            assert error["type"] == "InvalidMessage"
            assert {"ValueError", "WebSocketsError"} <= set(error["kinds"])
            assert "got" in error["message"]
            ws.still_works()


class TestIteration:
    """``iter_data``, ``iter_text``, ``iter_bytes``, ``iter_json``."""

    @pytest.mark.parametrize(
        ("how", "came"),
        [
            ("data", ["'ü'", r"b'\xc3\xa4'", "'1'"]),
            ("text", ["'ü'", "'ä'", "'1'"]),
            ("bytes", [r"b'\xc3\xbc'", r"b'\xc3\xa4'", "b'1'"]),
        ],
    )
    def test_types(self, driver, kind, how, came):
        """Each gives what its name says, whatever the frames were; it ends with the client."""
        with driver.connect(f"/{kind}/iterate/{how}") as ws:
            for data in ("ü", "ä".encode(), "1"):
                ws.send(data)
        note = driver.note("iterated")
        assert note["came"] == came
        code, reason = driver.at_view(1000, "")
        assert note["state"] == {**OVER, "close_code": code, "close_reason": reason}

    def test_json(self, driver, kind):
        """iter_json parses text and binary frames."""
        with driver.connect(f"/{kind}/iterate/json") as ws:
            for data in ('{"ü": [1, null]}', b"[2]", "null"):
                ws.send(data)
        assert driver.note("iterated")["came"] == [{"ü": [1, None]}, [2], None]

    @pytest.mark.parametrize(("how", "sent"), [("text", b"\xff"), ("json", "{"), ("json", b"\xff")])
    def test_invalid(self, driver, kind, how, sent):
        """What cannot be parsed raises InvalidMessage, and the connection lives on."""
        with driver.connect(f"/{kind}/iterate/{how}") as ws:
            ws.send("1")
            ws.send(sent)
            first, error = ws.receive_json()
            assert first in ("1", 1)
            assert error["type"] == "InvalidMessage"
            ws.still_works()

    def test_what_was_received_is_delivered(self, driver, kind):
        """The iteration ends when the client leaves, after all that it had sent."""
        with driver.connect(f"/{kind}/iterate/data") as ws:
            for number in range(100):
                ws.send(str(number))
        assert driver.note("iterated")["came"] == [repr(str(number)) for number in range(100)]


class TestSend:
    """``send`` and its relatives."""

    def test_types(self, driver, kind):
        """str goes as text, bytes as binary, JSON as text, MessagePack as binary."""
        with driver.connect(f"/{kind}/send-everything") as ws:
            *came, null, packed = ws.receive_all()
        assert came[:8] == [
            "täxt",
            b"bytes",
            b"array",
            b"view",
            "",
            "täxt",
            b"bytes",
            "täxt".encode(),
        ]
        # A UUID is what Flask's provider can encode, and json cannot.
        assert came[8:] == ['{"id": "00000000-0000-0000-0000-000000000007", "\\u00e4": [1, null]}']
        assert null == "null"
        assert msgpack.unpackb(packed) == {"ä": [1, None, b"x"]}

    def test_many_senders(self, driver, kind):
        """Many threads, or tasks, may send at once: all arrives, each sender's in order."""
        with driver.connect(f"/{kind}/many-senders") as ws:
            came = [ws.receive_json() for _ in range(SENDERS * EACH)]
            assert ws.closed() == (1000, "")
        for sender in range(SENDERS):
            mine = [number for each, number in came if each == sender]
            assert mine == list(range(EACH))

    def test_larger_than_the_buffers(self, driver, kind):
        """One message larger than the inbox and the outbox passes when they are empty."""
        with driver.connect(f"/{kind}/small-buffers") as ws:
            for data in ("x" * 100_000, b"y" * 100_000):
                ws.send(data)
                assert ws.receive() == data

    def test_larger_than_allowed(self, driver, kind):
        """A message above the route's max_message_bytes is closed with 1009."""
        with driver.connect(f"/{kind}/small-messages") as ws:
            ws.send("x" * 1000)
            assert ws.receive() == "x" * 1000
            ws.send("x" * 1001)
            assert ws.closed()[0] == driver.at_client(1009, "")[0]


class TestReceivers:
    """One receives at a time."""

    def test_two(self, driver, kind):
        """The second gets a ConcurrencyError, the first its message."""
        with driver.connect(f"/{kind}/two-receivers") as ws:
            error = ws.receive_json()
            assert error["type"] == "ConcurrencyError"
            assert "UsageError" in error["kinds"]
            ws.send("a message")
            assert ws.receive() == "the first got a message"
            assert ws.closed() == (1000, "")


class TestClose:
    """The end, by whichever side."""

    def test_default(self, driver, kind):
        """close() says 1000 without a reason, after all that was sent before."""
        with driver.connect(f"/{kind}/close") as ws:
            assert ws.receive_all() == [str(number) for number in range(20)]
            assert (ws.close_code, ws.close_reason) == (1000, "")
        state = driver.note("closed")["state"]
        assert state == {**OVER, "close_code": 1000, "close_reason": ""}

    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            (1000, "bye"),
            (1001, ""),
            (1008, "policy"),
            (1011, "broken"),
            (1012, "restart"),
            (1013, "later"),
            (3000, "registered"),
            (4999, "ü" * 61),
            (4000, "x" * 123),
        ],
    )
    def test_code_and_reason(self, driver, kind, code, reason):
        """The client gets what the first close said; the second does nothing."""
        with driver.connect(f"/{kind}/close?code={code}&reason={reason}") as ws:
            assert ws.receive_all() == [str(number) for number in range(20)]
            assert (ws.close_code, ws.close_reason) == driver.at_client(code, reason)
        state = driver.note("closed")["state"]
        assert state == {**OVER, "close_code": code, "close_reason": reason}
        assert driver.warnings() == []

    def test_states(self, driver, kind):
        """connected, closed, close_code and close_reason tell where a connection stands."""
        with driver.connect(f"/{kind}/states") as ws:
            connecting, connected = ws.receive_json()
            ws.close(4001, "büe")
        nothing = {"close_code": None, "close_reason": None, "subprotocol": None}
        assert connecting == {"connected": False, "closed": False, **nothing}
        assert connected == {"connected": True, "closed": False, **nothing}
        note = driver.note("closed")
        code, reason = driver.at_view(4001, "büe")
        assert (note["code"], note["reason"]) == (code, reason)
        assert note["state"] == {**OVER, "close_code": code, "close_reason": reason}

    def test_a_client_that_just_leaves(self, driver, kind):
        """No code of a client's is an error."""
        with driver.connect(f"/{kind}/echo") as ws:
            ws.still_works()
            ws.close(4999, "x" * 123)
        assert driver.warnings() == []
        assert driver.note("teardown_request")["error"] is None

    def test_both_at_once(self, driver, kind):
        """Goodbyes that cross end a connection at once, as any others do."""
        for _ in range(25):
            with driver.connect(f"/{kind}/close") as ws:
                ws.receive_many(20)
        driver.after_teardown(count=25)
        wait_until(lambda: driver.get("/stats").json()["connections"] == 0, what="the end")
        assert driver.warnings() == []

    def test_wait_closed(self, driver, kind):
        """wait_closed says False when the time passes, and True when the client has left."""
        with driver.connect(f"/{kind}/wait-closed") as ws:
            assert ws.receive_json() is False
        note = driver.note("waited")
        assert note["over"] is note["again"] is True

    @pytest.mark.parametrize(
        ("side", "code", "reason"), [("view", 4001, "ours"), ("client", 4002, "theirs")]
    )
    def test_after_the_end(self, driver, kind, side, code, reason):
        """Everything raises ConnectionClosed with what is known; a second close does nothing."""
        with driver.connect(f"/{kind}/after-the-end/{side}") as ws:
            if side == "client":
                ws.close(code, reason)
                code, reason = driver.at_view(code, reason)
            else:
                assert ws.closed() == driver.at_client(code, reason)
        note = driver.note("tried")
        expected = {verb: ["ConnectionClosed", code, reason] for verb in VERBS}
        assert note["outcomes"] == {
            **expected,
            "close": ["returned", None],
            "wait_closed": ["returned", True],
            "subscribe": ["ConnectionClosed", code, reason],
            "iter_data": [],
        }
        assert note["state"] == {**OVER, "close_code": code, "close_reason": reason}
        assert driver.warnings() == []

    def test_an_async_view_that_awaits_something_else(self, driver):
        """It has its close timeout after the client has left; then its finally may await."""
        with driver.connect("/async/for-ever"):
            assert driver.notes("finally") == []
        driver.note("finally")
        driver.after_teardown()
        assert driver.notes("got_request_exception") == []


#: What each mistake is told: the type of the error, and words that its message has.
TOLD = {
    "send(1)": ("TypeError", "int"),
    "send(None)": ("TypeError", "NoneType"),
    "send_text(bytes)": ("TypeError", "bytes"),
    "send_bytes(list)": ("TypeError", "list"),
    "send_json(object)": ("TypeError", "object"),
    "send_msgpack(object)": ("TypeError", "object"),
    "send(surrogate)": ("ValueError", "surrogate"),
    "receive('1')": ("TypeError", ""),
    "receive(-1)": ("ValueError", "-1"),
    "receive(nan)": ("ValueError", "nan"),
    "receive_json(-1)": ("ValueError", "-1"),
    "wait_closed('1')": ("TypeError", ""),
    "wait_closed(-1)": ("ValueError", "-1"),
    "close('1000')": ("TypeError", "str"),
    "close(True)": ("TypeError", "bool"),
    "close(None)": ("TypeError", "NoneType"),
    "close(bytes reason)": ("TypeError", "bytes"),
    **{
        f"close({code})": ("ValueError", str(code))
        for code in (-1, 0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65536)
    },
    "close(124 bytes)": ("ValueError", "124"),
    "close(62 umlauts)": ("ValueError", "124"),
    "accept(1)": ("TypeError", "int"),
    "accept(not offered)": ("ValueError", "v3"),
    "accept(no token)": ("ValueError", "v 1"),
    "accept(empty)": ("ValueError", ""),
    "accept(header of bytes)": ("TypeError", "X-A"),
    "accept(header of int)": ("TypeError", "X-A"),
    "accept(headers=1)": ("TypeError", ""),
    "accept(LF in a value)": ("ValueError", "X-A"),
    "accept(CRLF in a value)": ("ValueError", "X-A"),
    "accept(NUL in a value)": ("ValueError", "X-A"),
    "accept(CRLF in a name)": ("ValueError", "X-Evil"),
    "accept(space in a name)": ("ValueError", "X A"),
    "accept(not Latin-1)": ("ValueError", "X-A"),
    "accept(the server's header)": ("ValueError", "Upgrade"),
}


class TestMistakes:
    """A wrong argument is an error in the view, before the server sees it."""

    @pytest.mark.parametrize("name", MISTAKES)
    def test_mistake(self, driver, kind, name):
        """A wrong type is a TypeError, a bad value a ValueError; the connection lives on."""
        error_type, words = TOLD[name]
        with driver.connect(f"/{kind}/mistakes/{name}", subprotocols=["v1", "v2"]) as ws:
            error = ws.receive_json()
            assert error_type in error["kinds"], error
            assert words in error["message"]
            assert ws.headers.all("X-A") == ws.headers.all("X-Evil") == []
            ws.still_works()
        assert driver.warnings() == []
