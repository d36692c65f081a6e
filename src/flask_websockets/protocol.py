"""Pure. What a connection may do when, as a table; and what may be said on the wire.

The law: no other module decides whether an action is allowed. An action that is not in the
table raises and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from functools import lru_cache
from types import MappingProxyType
from typing import Any
from wsgiref.util import is_hop_by_hop

from .errors import ConnectionClosed, InvalidState


class State(Enum):
    """Where a connection stands, seen from the view."""

    CONNECTING = "connecting"  #: the handshake has no answer yet
    OPEN = "open"  #: accepted; messages may flow
    REFUSED = "refused"  #: the handshake was answered with an HTTP response
    CLOSED = "closed"  #: over, by whichever side


class Action(Enum):
    """What happens to a connection."""

    ACCEPT = "accept"  #: the view takes the connection
    REFUSE = "refuse"  #: the application answers with an HTTP response
    SEND = "send"  #: the view sends a message
    CLOSE = "close"  #: our side says goodbye
    LOSE = "lose"  #: the peer left, or cannot be reached any more


TRANSITIONS: Mapping[State, Mapping[Action, State]] = MappingProxyType(
    {
        State.CONNECTING: {
            Action.ACCEPT: State.OPEN,
            Action.REFUSE: State.REFUSED,
            Action.CLOSE: State.REFUSED,
            Action.LOSE: State.CLOSED,
        },
        State.OPEN: {
            Action.SEND: State.OPEN,
            Action.CLOSE: State.CLOSED,
            Action.LOSE: State.CLOSED,
        },
        State.REFUSED: {Action.CLOSE: State.REFUSED, Action.LOSE: State.REFUSED},
        State.CLOSED: {Action.CLOSE: State.CLOSED, Action.LOSE: State.CLOSED},
    }
)


def transition(state: State, action: Action, code: int = 1006, reason: str = "") -> State:
    """The state after *action*.

    :param code: the close code to report when the connection is over.
    :param reason: the close reason to report when the connection is over.
    :raises ConnectionClosed: if the connection is over.
    :raises InvalidState: if the action makes no sense here.
    """
    try:
        return TRANSITIONS[state][action]
    except KeyError:
        pass
    if state in (State.REFUSED, State.CLOSED):
        raise ConnectionClosed(code, reason)
    allowed = ", ".join(known.value for known in TRANSITIONS[state])
    raise InvalidState(
        f"The connection is {state.value}: expected one of {allowed}; got {action.value}."
    )


# -- validation: in the view, before a server sees it ---------------------------------------

#: RFC 7230 section 3.2.6; subprotocols and header names are tokens.
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
#: RFC 7230 section 3.2: visible characters, obs-text, space and tab; no CR, LF or NUL.
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
#: RFC 6455 section 7.4.1, and the IANA registry for 1012 to 1014. 1004, 1005, 1006 and 1015
#: must not be sent; 1002 to 1010 are sent by protocol code as well as by applications.
_SENDABLE_CODES = frozenset(
    {1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014}
)
#: RFC 6455 section 5.5: a control frame carries 125 bytes, two of which are the code.
MAX_REASON_BYTES = 123

#: What a page gets whose login does not hold any more, as an HTTP request gets a 401.
LOGIN_OVER = 4401

#: The server writes these itself; a second copy would break the handshake.
_HANDSHAKE_HEADERS = frozenset(
    {
        "connection",
        "sec-websocket-accept",
        "sec-websocket-extensions",
        "sec-websocket-protocol",
        "transfer-encoding",
        "upgrade",
        "content-length",
    }
)

Pairs = Iterable[tuple[str, str]]
Headers = Mapping[str, str] | Pairs


def validate_close(code: int, reason: str) -> None:
    """Check a close code and reason (RFC 6455, sections 5.5 and 7.4).

    :raises TypeError: for wrong types.
    :raises ValueError: for a code that may not be sent or a reason over 123 bytes of UTF-8.
    """
    if not isinstance(code, int) or isinstance(code, bool):
        raise TypeError(f"A close code is an int; got {type(code).__name__}.")
    if not isinstance(reason, str):
        raise TypeError(f"A close reason is a str; got {type(reason).__name__}.")
    if code not in _SENDABLE_CODES and not 3000 <= code <= 4999:
        raise ValueError(
            f"Close code {code} may not be sent: expected 1000 to 1014 without 1004, 1005 and "
            "1006, or 3000 to 4999 (4000 and above are for applications)."
        )
    size = len(reason.encode())
    if size > MAX_REASON_BYTES:
        raise ValueError(
            f"A close reason has at most {MAX_REASON_BYTES} bytes of UTF-8; got {size}."
        )


def validate_headers(headers: Headers) -> list[tuple[str, str]]:
    """Check response headers for the handshake and return them as pairs.

    :raises TypeError: if names or values are not ``str``.
    :raises ValueError: for CR, LF, characters outside Latin-1, names that are no token, and
        headers that the server writes itself.
    """
    pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
    for name, value in pairs:
        _validate_header(name, value)
        if name.lower() in _HANDSHAKE_HEADERS:
            raise ValueError(f"Header {name} belongs to the handshake; the server writes it.")
    return pairs


def _validate_header(name: str, value: str) -> None:
    if not isinstance(name, str) or not isinstance(value, str):
        kinds = f"{type(name).__name__} and {type(value).__name__}"
        raise TypeError(f"A header is a pair of str; got {kinds} for {name!r}.")
    _checked_name(name)
    if not _HEADER_VALUE.fullmatch(value):
        found = next(character for character in value if not _HEADER_VALUE.fullmatch(character))
        # Not the value: it may be a cookie, and this may be logged.
        raise ValueError(
            f"The value of header {name} has a character that may not be sent: {found!r} at "
            f"position {value.index(found)}."
        )


@lru_cache(maxsize=512)
def _checked_name(name: str) -> tuple[str, bytes, bool]:
    """A header's name in lower case, the same in bytes, and whether it is for the connection."""
    if not _TOKEN.fullmatch(name):
        raise ValueError(f"{name!r} is no header name: expected a token (RFC 7230).")
    lower = name.lower()
    return lower, lower.encode("latin-1"), is_hop_by_hop(lower)


def encode_headers(pairs: Pairs) -> list[tuple[bytes, bytes]]:
    """Headers as ASGI wants them: lower case names, Latin-1 bytes without space around them.

    What Latin-1 cannot carry goes out as UTF-8, as browsers read it. Space around a value is no
    part of it (RFC 9110 section 5.5), and some servers raise where they meet it.
    """
    return [
        (name.lower().encode("latin-1"), _header_bytes(value.strip(" \t"))) for name, value in pairs
    ]


def _header_bytes(value: str) -> bytes:
    try:
        return value.encode("latin-1")
    except UnicodeEncodeError:
        return value.encode()


def parse_status(status: str) -> int:
    """The code of a WSGI status such as ``200 OK``. The phrase cannot cross ASGI.

    :raises TypeError: if it is no ``str``.
    :raises ValueError: if it is not the code of a final response.
    """
    if not isinstance(status, str):
        raise TypeError(f"A status is a str; got {type(status).__name__}.")
    return _parse_status(status)


@lru_cache(maxsize=512)
def _parse_status(status: str) -> int:
    code = status.split(" ", 1)[0]
    if not re.fullmatch("[2-5][0-9][0-9]", code):
        raise ValueError(f"Expected a status from 200 to 599, such as '200 OK'; got {status!r}.")
    return int(code)


def encode_response_headers(
    status: int, pairs: Pairs
) -> tuple[list[tuple[bytes, bytes]], int | None]:
    """Headers of a WSGI response as ASGI wants them, and the Content-Length among them.

    Those that speak of the connection are the server's (PEP 3333), but for the ``Upgrade``
    that belongs to a 426. A 204 has no length (RFC 9110 section 8.6), and servers wait for the
    body that a 304 announces.

    :raises TypeError: if names or values are not ``str``.
    :raises ValueError: for CR, LF, characters outside Latin-1, names that are no token and a
        Content-Length that is no number.
    """
    encoded: list[tuple[bytes, bytes]] = []
    length: int | None = None
    for name, value in pairs:
        _validate_header(name, value)
        lower, raw_name, is_for_connection = _checked_name(name)
        value = value.strip(" \t")
        if lower == "content-length":
            if status in (204, 304):
                continue
            if not re.fullmatch("[0-9]+", value):
                raise ValueError(f"A Content-Length is a number of bytes; got {value!r}.")
            length = int(value)
        elif is_for_connection and (lower, value.lower()) != ("upgrade", "websocket"):
            continue
        encoded.append((raw_name, value.encode("latin-1")))
    return encoded, length


def checked_refusal(status: str, pairs: Pairs, body: bytes) -> tuple[int, list[tuple[str, str]]]:
    """Check the WSGI response that is to answer a handshake: its code, and headers to send.

    The connection's own headers are the server's, and the length is that of *body*: it is whole.

    :raises TypeError: if the status, names or values are not ``str``.
    :raises ValueError: for a status that is none, or no refusal, and for a header that may not be
        sent.
    """
    code = parse_status(status)
    if code < 300:
        raise ValueError(f"{status!r} is no refusal.")
    headers = []
    for name, value in pairs:
        _validate_header(name, value)
        if name.lower() not in _HANDSHAKE_HEADERS and not is_hop_by_hop(name):
            headers.append((name, value))
    if code != 304:
        headers.append(("Content-Length", str(len(body))))
    return code, headers


#: Seconds after which a client that was refused for want of room may try again.
RETRY_AFTER = 5

#: Status, headers and body.
PlainResponse = tuple[int, list[tuple[str, str]], bytes]


def plain_response(status: int, reason: str) -> PlainResponse:
    """A response that no view makes: one line of text."""
    body = f"{reason}\n".encode()
    headers = [
        ("Content-Type", "text/plain; charset=utf-8"),
        ("Content-Length", str(len(body))),
    ]
    return status, headers, body


def unavailable(reason: str) -> PlainResponse:
    """The response to a request for which there is no room: 503 with Retry-After."""
    status, headers, body = plain_response(503, reason)
    return status, [*headers, ("Retry-After", str(RETRY_AFTER))], body


def refusal_messages(
    extensions: Mapping[str, Any] | None, status: int, headers: Pairs, body: bytes
) -> list[dict[str, Any]]:
    """The ASGI messages that answer a handshake with an HTTP response.

    A server without the denial extension (ASGI, "Websocket Denial Response") knows only 403.
    """
    if "websocket.http.response" not in (extensions or ()):
        return [{"type": "websocket.close", "code": 1000, "reason": ""}]
    return [
        {
            "type": "websocket.http.response.start",
            "status": status,
            "headers": encode_headers(headers),
        },
        {"type": "websocket.http.response.body", "body": body, "more_body": False},
    ]


def validate_token(kind: str, value: str) -> str:
    """Check that *value* is a token (RFC 7230), as a subprotocol must be.

    :raises TypeError: if it is no ``str``.
    :raises ValueError: if it is no token.
    """
    if not isinstance(value, str):
        raise TypeError(f"A {kind} is a str; got {type(value).__name__}.")
    if not _TOKEN.fullmatch(value):
        raise ValueError(f"{value!r} is no {kind}: expected a token (RFC 7230).")
    return value


def choose_subprotocol(offered: Sequence[str], supported: Sequence[str]) -> str | None:
    """The first of the client's subprotocols that the route supports, or None."""
    return next((name for name in offered if name in supported), None)


class SharedMessage(dict[str, Any]):
    """One ``websocket.send`` for many connections, with the frames that were made of it."""

    __slots__ = ("frames",)

    def __init__(self, kind: str, data: str | bytes) -> None:
        super().__init__({"type": "websocket.send", kind: data})
        #: By the way of compressing.
        self.frames: dict[Any, bytes] = {}


def message_bytes(data: str | bytes) -> int:
    """The size of a message on the wire, before compression.

    :raises UnicodeEncodeError: (a ``ValueError``) for text with lone surrogates, which UTF-8
        cannot carry.
    """
    # isascii() is a flag on the object: no walk over the text, no copy.
    if isinstance(data, bytes) or data.isascii():
        return len(data)
    return len(data.encode())
