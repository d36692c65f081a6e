"""Pure. Every error a user can meet; the tree answers whose fault it is.

::

    WebSocketsError
    ├── ConnectionClosed(code, reason)          the conversation is over
    ├── ConnectionRejected(response)            the server said no (seen by the test client)
    ├── InvalidMessage (ValueError)             the peer sent what does not parse
    └── UsageError                              our caller's fault
        ├── InvalidState                        a second accept
        ├── ConcurrencyError                    two threads receiving on one connection
        ├── WrongThread                         a blocking call on the event loop's thread
        ├── NotRunning                          the server has stopped
        └── ConfigurationError (ValueError)     a setting that cannot be right
"""

from __future__ import annotations

import re
from html import unescape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from werkzeug.test import TestResponse

__all__ = [
    "ConcurrencyError",
    "ConfigurationError",
    "ConnectionClosed",
    "ConnectionRejected",
    "InvalidMessage",
    "InvalidState",
    "NotRunning",
    "UsageError",
    "WebSocketsError",
    "WrongThread",
]

#: Of a refusal's body, in the error that the test client raises.
SHOWN_CHARACTERS = 200


class WebSocketsError(Exception):
    """The base of every error that flask-websockets raises of its own."""


class ConnectionClosed(WebSocketsError):
    """The conversation is over, by whichever side.

    A view need not catch it: uncaught, it is a normal end.
    """

    #: The close code (RFC 6455, section 7.4). 1005 and 1006 both mean that no close frame
    #: came: servers differ in which of the two they report.
    code: int
    #: The close reason, ``""`` when none was given.
    reason: str

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"The connection is closed: {code}{f' ({reason})' if reason else ''}.")
        self.code = code
        self.reason = reason

    def __reduce__(self) -> tuple[type[ConnectionClosed], tuple[int, str]]:
        return type(self), (self.code, self.reason)


class ConnectionRejected(WebSocketsError):
    """The server answered the handshake with an HTTP response. Raised by the test client."""

    #: The response as Flask's own test client would have returned it.
    response: TestResponse

    def __init__(self, response: TestResponse) -> None:
        said = f" to {response.location}" if response.location else _text_of(response)
        super().__init__(f"The handshake was answered with {response.status}{said}")
        self.response = response


def _text_of(response: TestResponse) -> str:
    """What an error page says, or any other body, without its tags and titles."""
    text = re.sub(r"(?s)<(title|h1)>.*?</\1>|<[^>]*>", " ", response.get_data(as_text=True))
    text = " ".join(unescape(text).split())
    return f": {text[:SHOWN_CHARACTERS]}" if text else "."


class InvalidMessage(WebSocketsError, ValueError):
    """The peer sent a message that does not parse as what was asked for."""


class UsageError(WebSocketsError):
    """The caller's mistake: the message says what was expected, what came and what to do."""


class InvalidState(UsageError):
    """A call that makes no sense in the connection's present state."""


class ConcurrencyError(UsageError):
    """Two threads receive on one connection. Many may send, one may receive."""


class WrongThread(UsageError):
    """A call that may block was made on the event loop's own thread."""


class NotRunning(UsageError):
    """The server that the channels belonged to has stopped."""


class ConfigurationError(UsageError, ValueError):
    """A setting or an argument that cannot be right."""
