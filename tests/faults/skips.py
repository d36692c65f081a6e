"""What bare uvicorn cannot do, because only the server's settings can give it.

``flask websockets serve`` makes these settings, and passes. A case that stands here fails on the
ways that it names; one that starts to pass fails the suite. For each another test sees that there
the server, and all other clients, survive.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

BARE = r"bare-.*"


@dataclass(frozen=True)
class Skip:
    """One case."""

    #: The scenario's number in README.rst.
    scenario: int
    #: The test: its file and its name, with its parameters if only some of them fail.
    case: str
    #: A regular expression of the ways to serve on which it cannot pass.
    ways: str
    reason: str
    #: The option of uvicorn's that helps, or what else does.
    helps: str
    #: The test that sees that the server and the other clients survive.
    survives: str


SKIPS = [
    Skip(
        3,
        "test_peers.py::test_nobody_reads_and_nobody_sends",
        BARE,
        "uvicorn makes the listening socket, without TCP_USER_TIMEOUT: a peer that takes nothing "
        "while no view sends is noticed by the pings alone, after 20 s and 20 s for the answer",
        "--ws-ping-interval and --ws-ping-timeout",
        "test_peers.py::test_whoever_never_reads_hurts_nobody",
    ),
    Skip(
        12,
        "test_stop.py::test_a_deploy_at_noon",
        BARE,
        "uvicorn stops listening and sends 1012 to everybody before the application hears of it, "
        "and ends by the signal itself, so that its exit code is not 0",
        "--timeout-graceful-shutdown bounds the end; POST to a view that calls "
        "websockets.drain() before the signal",
        "test_stop.py::test_everybody_is_told",
    ),
    Skip(
        15,
        "test_stop.py::test_a_second_signal",
        BARE,
        "uvicorn ends at once at a second SIGINT only, and goes on waiting at a second SIGTERM",
        "--timeout-graceful-shutdown, or SIGINT twice",
        "test_stop.py::test_sigint_twice",
    ),
    Skip(
        27,
        "test_frames.py::test_a_bomb",
        "bare-wsproto",
        "wsproto inflates all of a message that has come before uvicorn looks at its size",
        "--ws-per-message-deflate false, or --ws websockets-sansio",
        "test_frames.py::test_a_bomb_hurts_nobody",
    ),
    Skip(
        29,
        "test_frames.py::test_slow_handshakes",
        BARE,
        "uvicorn has no limit of the time for a request's head",
        "none: a proxy in front, such as nginx with client_header_timeout",
        "test_frames.py::test_slow_handshakes_hurt_nobody",
    ),
]


def skips_of(case: str, way: str) -> Iterator[Skip]:
    """Why a test cannot pass on a way to serve, if it cannot."""
    for skip in SKIPS:
        if skip.case in (case, case.partition("[")[0]) and re.fullmatch(skip.ways, way):
            yield skip
