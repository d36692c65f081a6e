"""The transition table, and what may be said on the wire."""

from __future__ import annotations

import copy
import itertools
from enum import IntEnum

import pytest

from flask_websockets.errors import ConnectionClosed, InvalidState
from flask_websockets.protocol import (
    TRANSITIONS,
    Action,
    State,
    choose_subprotocol,
    encode_headers,
    encode_response_headers,
    message_bytes,
    parse_status,
    plain_response,
    refusal_messages,
    transition,
    unavailable,
    validate_close,
    validate_headers,
    validate_token,
)

C, O, R, X = State.CONNECTING, State.OPEN, State.REFUSED, State.CLOSED  # noqa: E741

#: What becomes of each state by each action; an error where the action is illegal. To be read
#: beside the table in protocol.py: the two are written independently of each other.
EXPECTED = {
    #           CONNECTING     OPEN           REFUSED            CLOSED
    "ACCEPT": (O, InvalidState, ConnectionClosed, ConnectionClosed),
    "REFUSE": (R, InvalidState, ConnectionClosed, ConnectionClosed),
    "SEND": (InvalidState, O, ConnectionClosed, ConnectionClosed),
    "CLOSE": (R, X, R, X),
    "LOSE": (X, X, R, X),
}
CASES = [
    pytest.param(state, Action[name], result, id=f"{state.name}-{name}")
    for name, row in EXPECTED.items()
    for state, result in zip((C, O, R, X), row, strict=True)
]
LEGAL = [case for case in CASES if isinstance(case.values[2], State)]
ILLEGAL = [case for case in CASES if not isinstance(case.values[2], State)]


class TestTransitions:
    """One table, every state with every action."""

    def test_every_case_is_here(self):
        """The cases of this file are all there are."""
        cases = {case.values[:2] for case in CASES}
        assert cases == set(itertools.product(State, Action))

    @pytest.mark.parametrize(("state", "action", "expected"), LEGAL)
    def test_legal(self, state, action, expected):
        """A legal action leads to the expected state."""
        assert transition(state, action) is expected

    @pytest.mark.parametrize(("state", "action", "expected"), ILLEGAL)
    def test_illegal(self, state, action, expected):
        """An illegal action raises, and changes nothing."""
        before = copy.deepcopy(dict(TRANSITIONS))
        with pytest.raises(expected) as caught:
            transition(state, action)
        assert type(caught.value) is expected
        assert dict(TRANSITIONS) == before

    def test_table_is_read_only(self):
        """Nobody adds a state at run time."""
        with pytest.raises(TypeError):
            TRANSITIONS[State.OPEN] = {}  # type: ignore[index]

    def test_every_state_is_in_the_table(self):
        """Each state has a row, in the order of the enumeration."""
        assert list(TRANSITIONS) == list(State)

    def test_the_end_is_the_end(self):
        """No action leads out of REFUSED or CLOSED."""
        for state in (State.REFUSED, State.CLOSED):
            assert set(TRANSITIONS[state].values()) == {state}

    def test_closed_error_carries_code_and_reason(self):
        """What is known about the end is in the error."""
        with pytest.raises(ConnectionClosed) as caught:
            transition(State.CLOSED, Action.SEND, 4001, "over")
        assert (caught.value.code, caught.value.reason) == (4001, "over")

    def test_closed_error_by_default(self):
        """When nothing is known the code is 1006."""
        with pytest.raises(ConnectionClosed) as caught:
            transition(State.REFUSED, Action.ACCEPT)
        assert (caught.value.code, caught.value.reason) == (1006, "")

    def test_invalid_state_says_what_was_expected(self):
        """The message names the state, what is allowed and what came."""
        with pytest.raises(InvalidState) as caught:
            transition(State.OPEN, Action.ACCEPT)
        assert str(caught.value) == (
            "The connection is open: expected one of send, close, lose; got accept."
        )


class Code(IntEnum):
    BYE = 4000


class TestClose:
    """Close codes and reasons."""

    @pytest.mark.parametrize(
        "code",
        [1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 3999, 4000, 4999, Code.BYE],
    )
    def test_sendable(self, code):
        """Codes of the registry, of libraries and of applications pass."""
        validate_close(code, "")

    @pytest.mark.parametrize(
        "code", [-1, 0, 999, 1004, 1005, 1006, 1015, 1016, 1999, 2000, 2999, 5000, 65536]
    )
    def test_not_sendable(self, code):
        """Reserved codes and those outside the ranges are bad values, named in the message."""
        with pytest.raises(ValueError, match=rf"Close code {code} may not be sent"):
            validate_close(code, "")

    @pytest.mark.parametrize("code", ["1000", 1000.0, None, True, b"1000"])
    def test_code_of_wrong_type(self, code):
        """A code that is no int is a TypeError; bool is none."""
        with pytest.raises(TypeError, match="close code is an int"):
            validate_close(code, "")

    @pytest.mark.parametrize("reason", [b"bye", None, 1])
    def test_reason_of_wrong_type(self, reason):
        """A reason that is no str is a TypeError."""
        with pytest.raises(TypeError, match="close reason is a str"):
            validate_close(1000, reason)

    @pytest.mark.parametrize(
        "reason", ["", "x" * 123, "é" * 61 + "x", "€" * 41, "😀" * 30 + "xyz"], ids=len
    )
    def test_reason_fits(self, reason):
        """A reason may have 123 bytes of UTF-8."""
        validate_close(1000, reason)

    @pytest.mark.parametrize("reason", ["x" * 124, "é" * 62, "€" * 42, "😀" * 31], ids=len)
    def test_reason_is_counted_in_bytes(self, reason):
        """A reason of more bytes is a bad value, however few its characters."""
        with pytest.raises(ValueError, match="at most 123 bytes of UTF-8; got 12"):
            validate_close(1000, reason)

    def test_reason_with_lone_surrogate(self):
        """A reason that UTF-8 cannot carry is a bad value."""
        with pytest.raises(ValueError):
            validate_close(1000, "\ud800")


class TestHeaders:
    """Headers of the handshake's response."""

    @pytest.mark.parametrize(
        "headers",
        [
            {"X-One": "1", "X-Two": "2"},
            [("X-One", "1"), ("X-Two", "2")],
            (("X-One", "1"), ("X-Two", "2")),
            iter([("X-One", "1"), ("X-Two", "2")]),
        ],
        ids=["mapping", "list", "tuple", "iterator"],
    )
    def test_mapping_or_pairs(self, headers):
        """A mapping or pairs, any iterable of them, become a list of pairs in the same order."""
        assert validate_headers(headers) == [("X-One", "1"), ("X-Two", "2")]

    def test_repeated_names_stay(self):
        """Two Set-Cookie headers stay two."""
        pairs = [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]
        assert validate_headers(pairs) == pairs

    @pytest.mark.parametrize("value", ["", "plain", "tab\there", "caf\xe9", "\xff"])
    def test_values(self, value):
        """Visible characters, space, tab and Latin-1 may be sent."""
        assert validate_headers({"X-Value": value}) == [("X-Value", value)]

    @pytest.mark.parametrize(
        "value",
        ["a\r\nSet-Cookie: b=c", "a\rb", "a\nb", "a\n", "nul\0", "\x1b", "\x7f", "€", "\ud800"],
    )
    def test_bad_values(self, value):
        """CR, LF, other controls and what is not Latin-1 are bad values; the header is named."""
        with pytest.raises(ValueError, match="header X-Value has a character"):
            validate_headers({"X-Value": value})

    @pytest.mark.parametrize(
        "name", ["", "X Value", "X:Value", "X-Value\r\n", "X\n", "X-Valeur-é", "X(1)", "\0"]
    )
    def test_bad_names(self, name):
        """A name that is no token is a bad value."""
        with pytest.raises(ValueError, match="is no header name"):
            validate_headers({name: "value"})

    @pytest.mark.parametrize(
        ("name", "value"), [(b"X-Value", "v"), ("X-Value", b"v"), ("X-Value", 1), (None, "v")]
    )
    def test_wrong_types(self, name, value):
        """Names and values are str."""
        with pytest.raises(TypeError, match="pair of str"):
            validate_headers([(name, value)])

    @pytest.mark.parametrize(
        "name",
        [
            "Connection",
            "UPGRADE",
            "Sec-WebSocket-Accept",
            "sec-websocket-extensions",
            "Sec-Websocket-Protocol",
            "Transfer-Encoding",
            "Content-Length",
        ],
    )
    def test_handshake_headers(self, name):
        """What the server writes itself may not be given, in whatever case."""
        with pytest.raises(ValueError, match=f"Header {name} belongs to the handshake"):
            validate_headers({name: "value"})

    def test_one_bad_header_spoils_all(self):
        """Every header is looked at, not only the first."""
        with pytest.raises(ValueError, match="X-Bad"):
            validate_headers([("X-Good", "1"), ("X-Bad", "\n")])

    def test_encode(self):
        """ASGI wants lower case names and bytes."""
        pairs = [("X-Name", "Caf\xe9"), ("Set-Cookie", "A=B")]
        assert encode_headers(pairs) == [(b"x-name", b"Caf\xe9"), (b"set-cookie", b"A=B")]


class TestStatus:
    """The status line of a WSGI response."""

    @pytest.mark.parametrize(
        ("status", "code"),
        [
            ("200 OK", 200),
            ("404 Not Found", 404),
            ("200", 200),
            ("200 ", 200),
            ("299  Two  Spaces", 299),
            ("500 caf\xe9", 500),
            ("599 ", 599),
        ],
    )
    def test_statuses(self, status, code):
        """The code counts; the phrase may be anything, or missing."""
        assert parse_status(status) == code

    @pytest.mark.parametrize(
        "status",
        [
            *("", " ", "OK", "OK 200", " 200 OK", "20 OK", "2000 OK", "-200 X", "+20 X", "2_0 X"),
            *("200\tOK", "200OK", "\u0662\u0660\u0660 OK", "200\r\nX: y", "0x1 X", "2e2 X"),
        ],
    )
    def test_no_statuses(self, status):
        """Anything but three ASCII digits is a bad value, and named."""
        with pytest.raises(ValueError, match="Expected a status from 200 to 599") as caught:
            parse_status(status)
        assert repr(status) in str(caught.value)

    @pytest.mark.parametrize("status", ["100 Continue", "101 Switching", "103 Hints", "600 X"])
    def test_no_final_statuses(self, status):
        """An interim response would leave the client waiting for another."""
        with pytest.raises(ValueError, match="Expected a status from 200 to 599"):
            parse_status(status)

    @pytest.mark.parametrize("status", [200, b"200 OK", None])
    def test_wrong_type(self, status):
        """A status is a str."""
        with pytest.raises(TypeError, match=f"got {type(status).__name__}"):
            parse_status(status)


class TestResponseHeaders:
    """Headers of a HTTP response."""

    @pytest.mark.parametrize("make", [list, tuple, iter], ids=lambda kind: kind.__name__)
    def test_encode(self, make):
        """Lower case names and Latin-1 bytes, in the same order, repeated ones included."""
        pairs = [("Set-Cookie", "a=1"), ("X-Name", "Caf\xe9"), ("set-cookie", "b=2"), ("X", "")]
        assert encode_response_headers(200, make(pairs)) == (
            [
                (b"set-cookie", b"a=1"),
                (b"x-name", b"Caf\xe9"),
                (b"set-cookie", b"b=2"),
                (b"x", b""),
            ],
            None,
        )

    def test_white_space_around_a_value(self):
        """It is no part of the value (RFC 9110 section 5.5), and h11 refuses it."""
        headers, length = encode_response_headers(
            200, [("X", " \ta b\t "), ("Content-Length", " 3")]
        )
        assert headers == [(b"x", b"a b"), (b"content-length", b"3")]
        assert length == 3

    @pytest.mark.parametrize(
        "name",
        [
            *("Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "TE"),
            *("Trailers", "Transfer-Encoding", "UPGRADE", "transfer-encoding"),
        ],
    )
    def test_headers_of_the_connection(self, name):
        """They are the server's: the application's are left out, and the others stay."""
        pairs = [("X-One", "1"), (name, "chunked"), ("X-Two", "2")]
        assert encode_response_headers(200, pairs)[0] == [(b"x-one", b"1"), (b"x-two", b"2")]

    @pytest.mark.parametrize("value", ["websocket", "WebSocket", " websocket "])
    def test_upgrade_of_a_426(self, value):
        """A 426 must say what to upgrade to (RFC 9110 section 15.5.22)."""
        pairs = [("Upgrade", value), ("Connection", "Upgrade")]
        headers, _ = encode_response_headers(426, pairs)
        assert headers == [(b"upgrade", value.strip().encode())]

    @pytest.mark.parametrize(("text", "length"), [("0", 0), ("12", 12), ("007", 7)])
    def test_content_length(self, text, length):
        """The length is sent as it is, and returned."""
        pairs = [("content-LENGTH", text)]
        expected = ([(b"content-length", text.encode())], length)
        assert encode_response_headers(200, pairs) == expected

    @pytest.mark.parametrize("text", ["", "x", "1.5", "1 2", "1,1", "0x10"])
    def test_no_content_length(self, text):
        """What is no number is a bad value."""
        with pytest.raises(ValueError):
            encode_response_headers(200, [("Content-Length", text)])

    @pytest.mark.parametrize("text", ["-1", "+1", "1_000"])
    def test_a_number_that_is_no_content_length(self, text):
        """Digits only: a server passes on what a client takes for something else, or refuses."""
        with pytest.raises(ValueError):
            encode_response_headers(200, [("Content-Length", text)])

    @pytest.mark.parametrize("status", [204, 304])
    def test_statuses_without_a_length(self, status):
        """A 204 has none (RFC 9110 section 8.6), and servers wait for the body of a 304's."""
        pairs = [("Content-Length", "5"), ("ETag", '"x"')]
        assert encode_response_headers(status, pairs) == ([(b"etag", b'"x"')], None)

    @pytest.mark.parametrize("value", ["a\r\nSet-Cookie: b=c", "a\rb", "a\n", "nul\0", "\x7f", "€"])
    @pytest.mark.parametrize("name", ["X-Value", "Connection", "Content-Length"])
    def test_bad_values(self, name, value):
        """CR, LF, other controls and what is not Latin-1 are bad, in what is left out as well."""
        with pytest.raises(ValueError, match=f"header {name} has a character"):
            encode_response_headers(200, [("X-Good", "1"), (name, value)])

    @pytest.mark.parametrize("name", ["", "X Value", "X:Value", "X-Value\r\n", "X-Valeur-é"])
    def test_bad_names(self, name):
        """A name that is no token is a bad value."""
        with pytest.raises(ValueError, match="is no header name"):
            encode_response_headers(200, [(name, "value")])

    @pytest.mark.parametrize(
        ("name", "value"),
        [(b"X-Value", "v"), ("X-Value", b"v"), ("Content-Length", 1), (None, "v")],
    )
    def test_wrong_types(self, name, value):
        """Names and values are str."""
        with pytest.raises(TypeError, match="pair of str"):
            encode_response_headers(200, [(name, value)])

    def test_plain_response(self):
        """One line of text, with its length in bytes."""
        status, headers, body = plain_response(400, "caf\xe9")
        assert (status, body) == (400, b"caf\xc3\xa9\n")
        assert dict(headers) == {
            "Content-Type": "text/plain; charset=utf-8",
            "Content-Length": "6",
        }


class TestTokens:
    """Names of subprotocols."""

    @pytest.mark.parametrize("value", ["chat", "v1.chat", "graphql-ws", "!#$%&'*+-.^_`|~0aZ"])
    def test_tokens(self, value):
        """A token is returned as it is."""
        assert validate_token("subprotocol", value) is value

    @pytest.mark.parametrize("value", ["", " ", "a b", "a,b", "a/b", "a\n", 'a"b', "é", "a;b"])
    def test_no_tokens(self, value):
        """What is no token is a bad value, and the message says of what kind."""
        with pytest.raises(ValueError, match="is no subprotocol: expected a token"):
            validate_token("subprotocol", value)

    @pytest.mark.parametrize("value", [None, b"chat", 1])
    def test_wrong_type(self, value):
        """What is no str is a TypeError."""
        with pytest.raises(TypeError, match="subprotocol is a str"):
            validate_token("subprotocol", value)


class TestChooseSubprotocol:
    """Which subprotocol a connection speaks."""

    @pytest.mark.parametrize(
        ("offered", "supported", "chosen"),
        [
            (["a", "b"], ["b", "a"], "a"),
            (["x", "b", "a"], ("a", "b"), "b"),
            (["a"], ["a"], "a"),
            (["A"], ["a"], None),
            (["x"], ["a"], None),
            ([], ["a"], None),
            (["a"], [], None),
            ([], [], None),
        ],
    )
    def test_choice(self, offered, supported, chosen):
        """The first of the client's that the route supports; none in common, none chosen."""
        assert choose_subprotocol(offered, supported) == chosen


class TestMessageBytes:
    """The size of a message on the wire."""

    @pytest.mark.parametrize(
        ("data", "size"),
        [("", 0), ("abc", 3), ("é", 2), ("€uro", 6), ("😀", 4), (b"", 0), (b"\xff\x00", 2)],
    )
    def test_size(self, data, size):
        """Text counts in bytes of UTF-8, binary as it is."""
        assert message_bytes(data) == size

    @pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "\ude00\ud83d"])
    def test_lone_surrogates(self, text):
        """Text that UTF-8 cannot carry is a bad value, in the view."""
        with pytest.raises(UnicodeEncodeError) as caught:
            message_bytes(text)
        assert isinstance(caught.value, ValueError)


class TestRefusal:
    """How a handshake is answered with an HTTP response."""

    def test_with_the_denial_extension(self):
        """The server can say it: status, headers and body go out."""
        messages = refusal_messages(
            {"websocket.http.response": {}}, 401, [("WWW-Authenticate", "Basic")], b"no"
        )
        assert messages == [
            {
                "type": "websocket.http.response.start",
                "status": 401,
                "headers": [(b"www-authenticate", b"Basic")],
            },
            {"type": "websocket.http.response.body", "body": b"no", "more_body": False},
        ]

    @pytest.mark.parametrize("extensions", [None, {}, {"tls": {}}])
    def test_without_the_denial_extension(self, extensions):
        """The server knows only 403: a close before the accept."""
        assert refusal_messages(extensions, 401, [("X", "y")], b"no") == [
            {"type": "websocket.close", "code": 1000, "reason": ""}
        ]

    def test_unavailable(self):
        """No room is 503, with the reason as text and a Retry-After in whole seconds."""
        status, headers, body = unavailable("All connections are taken.")
        found = dict(headers)
        assert status == 503
        assert body == b"All connections are taken.\n"
        assert int(found["Retry-After"]) > 0
        assert found["Content-Length"] == str(len(body))
        assert found["Content-Type"] == "text/plain; charset=utf-8"

    def test_unavailable_counts_bytes(self):
        """The length is that of the bytes."""
        _, headers, body = unavailable("é")
        assert dict(headers)["Content-Length"] == str(len(body)) == "3"

    def test_unavailable_as_refusal(self):
        """Its parts are what refusal_messages takes."""
        start, body = refusal_messages({"websocket.http.response": {}}, *unavailable("full"))
        assert start["status"] == 503
        assert (b"retry-after", b"5") in start["headers"]
        assert body["body"] == b"full\n"
