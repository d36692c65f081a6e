"""Pure. What a connection may do when, as a table; and what may be said on the wire.

The law: no other module decides whether an action is allowed. An action that is not in the
table raises and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any

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
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"A header is a pair of str; got {name!r}: {value!r}.")
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"{name!r} is no header name: expected a token (RFC 7230).")
        if not _HEADER_VALUE.fullmatch(value):
            raise ValueError(
                f"The value of header {name} has a character that may not be sent: {value!r}."
            )
        if name.lower() in _HANDSHAKE_HEADERS:
            raise ValueError(f"Header {name} belongs to the handshake; the server writes it.")
    return pairs


def encode_headers(pairs: Pairs) -> list[tuple[bytes, bytes]]:
    """Headers as ASGI wants them: lower case names, Latin-1 bytes.

    What Latin-1 cannot carry goes out as UTF-8, as browsers read it.
    """
    return [(name.lower().encode("latin-1"), _header_bytes(value)) for name, value in pairs]


def _header_bytes(value: str) -> bytes:
    try:
        return value.encode("latin-1")
    except UnicodeEncodeError:
        return value.encode()


#: Seconds after which a client that was refused for want of room may try again.
RETRY_AFTER = 5

Refusal = tuple[int, list[tuple[str, str]], bytes]


def unavailable(reason: str) -> Refusal:
    """The response to a handshake for which there is no room: 503 with Retry-After."""
    body = f"{reason}\n".encode()
    headers = [
        ("Content-Type", "text/plain; charset=utf-8"),
        ("Content-Length", str(len(body))),
        ("Retry-After", str(RETRY_AFTER)),
    ]
    return 503, headers, body


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


def message_bytes(data: str | bytes) -> int:
    """The size of a message on the wire, before compression.

    :raises UnicodeEncodeError: (a ``ValueError``) for text with lone surrogates, which UTF-8
        cannot carry.
    """
    # isascii() is a flag on the object: no walk over the text, no copy.
    if isinstance(data, bytes) or data.isascii():
        return len(data)
    return len(data.encode())
