"""Loop side. A whole HTTP response in one piece, past uvicorn's ``send``.

``send`` is called once for the head and once for the body. It looks at each header with two
regular expressions, makes lower case of names that are, and writes twice. Here both are joined,
and what ``send`` notes down is noted down. Whatever is not the plain case is left to it.
tests/test_servers_responses.py is the contract.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ..bridge import ASGIMessage

#: Of uvicorn (0.54), whose h11 has to hear of everything itself.
_KNOWN = ("uvicorn.protocols.http.httptools_impl", "RequestResponseCycle")

#: A response that has one of these is uvicorn's: it decides what becomes of the connection.
_OF_THE_CONNECTION = {b"connection", b"transfer-encoding"}

#: What uvicorn lets into no value: control characters, apart from the tab.
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


@lru_cache(maxsize=8)
def _status_lines(kind: Any) -> Mapping[int, bytes]:
    """uvicorn's lines of a class of exchanges; none where it is not one that we know."""
    if (kind.__module__, kind.__qualname__) != _KNOWN:
        return {}
    lines: Mapping[int, bytes] = getattr(sys.modules[kind.__module__], "STATUS_LINE", {})
    return lines


def write_whole(exchange: Any, start: ASGIMessage, body: bytes) -> bool:
    """Write a response; False if it is left to uvicorn's ``send``.

    :param exchange: one of uvicorn's HTTP exchanges.
    :param start: its ``http.response.start``, with names in lower case and checked values.
    :param body: all of it.
    """
    kind: Any = type(exchange)
    line = _status_lines(kind).get(start["status"])
    try:
        if (
            line is None
            or not exchange.keep_alive
            or exchange.access_log
            or exchange.response_started
            or exchange.disconnected
            or exchange.flow.write_paused
            or exchange.scope["method"] == "HEAD"
        ):
            return False
        defaults = exchange.default_headers
    except AttributeError:
        return False  # another release
    pieces, length = [line], None
    for name, value in (*defaults, *start["headers"]):
        if name == b"content-length" and length is None:
            length = value
        elif name in _OF_THE_CONNECTION or name == b"content-length":
            return False
        if _CONTROL.search(value):
            return False
        pieces += (name, b": ", value, b"\r\n")
    if length != b"%d" % len(body):
        return False
    pieces += (b"\r\n", body)
    exchange.response_started = exchange.response_complete = True
    exchange.waiting_for_100_continue = False
    exchange.transport.write(b"".join(pieces))
    exchange.message_event.set()
    exchange.on_response()
    return True
