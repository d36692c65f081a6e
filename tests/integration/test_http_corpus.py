"""The same requests to gunicorn and to ours, byte for byte: the same answers.

gunicorn serves the Flask application itself; ours is the same application behind ASGI servers.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from collections.abc import Callable
from itertools import chain, combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .conftest import ServerProcess, free_port
from .corpus import GENERATED, Request, corpus
from .http_client import Answer, Client

REFERENCE = "gunicorn"

COMMANDS = {
    REFERENCE: "gunicorn -b 127.0.0.1:{port} -k gthread --threads 8 --graceful-timeout 3"
    " --no-control-socket corpus_app:app",
    # uvicorn believes a proxy on this machine by itself, and gunicorn does not.
    "uvicorn-httptools": "uvicorn --port {port} --no-proxy-headers --http httptools"
    " corpus_app:asgi",
    "uvicorn-h11": "uvicorn --port {port} --no-proxy-headers --http h11 corpus_app:asgi",
    "hypercorn-asyncio": "hypercorn -w 0 -b 127.0.0.1:{port} -k asyncio corpus_app:asgi",
    "hypercorn-trio": "hypercorn -w 0 -b 127.0.0.1:{port} -k trio corpus_app:asgi",
}
HTTPTOOLS = ["uvicorn-httptools"]
H11 = ["uvicorn-h11", "hypercorn-asyncio", "hypercorn-trio"]
OURS = [*HTTPTOOLS, *H11]

#: Each server's own.
LEFT_OUT = {"date", "server", "connection", "keep-alive", "transfer-encoding", "x-application"}

REQUESTS = corpus()

Seen = dict[str, Any]


# --- What cannot be the same


class Known(NamedTuple):
    """Something that the application sees otherwise, whatever we do; it must still be so."""

    servers: list[str]
    #: The server whose doing it is.
    version: str
    reason: str
    #: What ours sees, made of what the reference sees.
    change: Callable[[Request, Seen], Seen]


def without_question_mark(request: Request, seen: Seen) -> Seen:
    return seen | {"RAW_URI": seen["RAW_URI"].removesuffix("?")}


def without_fragment(request: Request, seen: Seen) -> Seen:
    return seen | {"RAW_URI": re.sub(r"\??#.*", "", seen["RAW_URI"], count=1)}


def without_authority(request: Request, seen: Seen) -> Seen:
    return seen | {"RAW_URI": re.sub(r"^[a-zA-Z]+://[^/?#]*", "", seen["RAW_URI"])}


def with_trailers(request: Request, seen: Seen) -> Seen:
    end = re.search(rb"\r\n0[^\r\n]*\r\n((?:[^\r\n]+\r\n)+)\r\n\Z", request.raw)
    if end is None:
        return seen
    trailers = [line.split(": ") for line in end[1].decode().splitlines()]
    return seen | {"headers": sorted([*seen["headers"], *trailers])}


def small_coding(request: Request, seen: Seen) -> Seen:
    changed = [
        [name, value.lower() if name == "Transfer-Encoding" else value]
        for name, value in seen["headers"]
    ]
    return seen | {"headers": changed}


def cookies_as_cookies(request: Request, seen: Seen) -> Seen:
    if request.raw.count(b"\r\nCookie: ") < 2:
        return seen
    joined = "; ".join(re.findall(r"\nCookie: (.*)\r", request.raw.decode("latin-1")))
    headers = [[k, joined if k == "Cookie" else v] for k, v in seen["headers"]]
    return seen | {"headers": headers, "cookies": [c.split("=") for c in joined.split("; ")]}


KNOWN = [
    Known(
        OURS, "ASGI 3", "The ? of an empty query has no place in a scope.", without_question_mark
    ),
    Known(
        HTTPTOOLS,
        "uvicorn 0.54",
        "raw_path is made of the parsed URL, which has no fragment any more.",
        without_fragment,
    ),
    Known(
        HTTPTOOLS,
        "uvicorn 0.54",
        "raw_path is made of the parsed URL: scheme and host of an absolute one are gone.",
        without_authority,
    ),
    Known(
        HTTPTOOLS,
        "uvicorn 0.54",
        "Trailers that came with the head are appended to the scope's headers.",
        with_trailers,
    ),
    Known(H11, "h11 0.16", "The value of Transfer-Encoding is made lower case.", small_coding),
    Known(
        OURS,
        "gunicorn 27",
        "It joins cookies with a comma, which parts none of them; RFC 6265 section 4.2.1.",
        cookies_as_cookies,
    ),
]


# --- The servers


class Outcome(NamedTuple):
    """What a client got for one request."""

    #: None if the connection was closed without a word.
    answer: Answer | None
    #: The calls of the application, as it counts them.
    calls: list[str]

    @property
    def let_through(self) -> bool:
        """Whether the application answered, and not a parser."""
        return self.answer is not None and self.answer.header("X-Application") == "yes"

    def __str__(self) -> str:
        if self.answer is None:
            return f"closed, calls: {self.calls}"
        return f"{self.answer.status} {self.answer.body[:80]!r}, calls: {self.calls}"


class Run:
    """A server, and what became of each request of the corpus."""

    def __init__(self, name: str, directory: Path) -> None:
        shutil.copy(Path(__file__).with_name("corpus_app.py"), directory)
        self._port = free_port()
        command = [sys.executable, "-m", *COMMANDS[name].format(port=self._port).split()]
        process = ServerProcess(command, self._port, directory / "log.txt", directory)
        try:
            process.wait_until_listening()
            self.outcomes = [self._outcome(request) for request in REQUESTS]
            self.late_calls = self._calls()
            process.stop()
        finally:
            process.kill()
        self.log = process.log()

    def _outcome(self, request: Request) -> Outcome:
        with Client(self._port) as client:
            try:
                client.send(request.raw)
                if request.ends:
                    client.socket.shutdown(socket.SHUT_WR)
                answer: Answer | None = client.answer(request.method)
            except ConnectionError:
                answer = None
        return Outcome(answer, self._calls())

    def _calls(self) -> list[str]:
        with Client(self._port) as client:
            calls: list[str] = client.ask("GET", "/-/calls").json()
        return calls

    def view(self, answer: Answer) -> tuple[int, list[tuple[str, str]], bytes, bool]:
        """What must be the same: an answer without what is the server's own, its port included."""
        port = f":{self._port}"
        headers = [
            (name.lower(), value.replace(port, ":port"))
            for name, value in answer.headers
            if name.lower() not in LEFT_OUT
        ]
        body = answer.body.replace(port.encode(), b":port")
        # Of different names the order is free.
        return answer.status, sorted(headers, key=lambda pair: pair[0]), body, answer.clean


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run of a server by its name, each once."""
    runs: dict[str, Run] = {}

    def run_of(name: str) -> Run:
        if name not in runs:
            runs[name] = Run(name, tmp_path_factory.mktemp(name))
        return runs[name]

    return run_of


def shown(answer: tuple[Any, ...]) -> str:
    status, headers, body, clean = answer
    return f"{status} {headers} {body[:80]!r}" + ("" if clean else " and is cut")


def differences(
    server: str, request: Request, reference: tuple[Any, ...], ours: tuple[Any, ...]
) -> tuple[list[str], list[Known]]:
    """What differs, beyond what is known; and the entries that it took to explain the rest."""
    if reference == ours:
        return [], []
    try:
        expected, seen = json.loads(reference[2]), json.loads(ours[2])
        assert "RAW_URI" in expected and "RAW_URI" in seen
    except (ValueError, TypeError, AssertionError):
        return [f"{request.name}: {shown(reference)} != {shown(ours)}"], []

    def rest(answer: tuple[Any, ...]) -> Any:
        status, headers, _body, clean = answer
        return status, [pair for pair in headers if pair[0] != "content-length"], clean

    possible = [known for known in KNOWN if server in known.servers]
    subsets = chain.from_iterable(combinations(possible, n) for n in range(1, len(possible) + 1))
    if rest(reference) == rest(ours):
        for subset in subsets:
            changed = expected
            for known in subset:
                changed = known.change(request, changed)
            if changed == seen:
                return [], list(subset)
    found = [
        f"{k}: {expected[k]!r} != {seen.get(k)!r}" for k in expected if expected[k] != seen.get(k)
    ]
    if rest(reference) != rest(ours):
        found.append(f"{rest(reference)} != {rest(ours)}")
    return [f"{request.name}: {line}" for line in found], []


# --- The tests


@pytest.mark.parametrize("server", OURS)
def test_the_same_answers(run_of: Callable[[str], Run], server: str) -> None:
    """Status, body and headers are gunicorn's, for all that both let through."""
    reference, ours = run_of(REFERENCE), run_of(server)
    found: list[str] = []
    needed: list[Known] = []
    for request, theirs, outcome in zip(REQUESTS, reference.outcomes, ours.outcomes, strict=True):
        if theirs.let_through and outcome.let_through and not request.broken:
            assert theirs.answer and outcome.answer
            views = reference.view(theirs.answer), ours.view(outcome.answer)
            more, known = differences(server, request, *views)
            found += more
            needed += known
    assert not found, "\n" + "\n".join(found)
    possible = [known for known in KNOWN if server in known.servers]
    assert [known.reason for known in possible if known not in needed] == []


@pytest.mark.parametrize("server", COMMANDS)
def test_what_a_parser_refuses(run_of: Callable[[str], Run], server: str) -> None:
    """A 4xx, a closed connection, or 501 and 505; and the application is not called."""
    wrong = [
        f"{request.name}: {outcome}"
        for request, outcome in zip(REQUESTS, run_of(server).outcomes, strict=True)
        if not outcome.let_through
        and (
            (outcome.calls and not request.late)
            # 501: an unknown transfer coding (RFC 9112 section 6.1). 505: an unknown version.
            or (
                outcome.answer is not None
                and outcome.answer.status not in {*range(400, 500), 501, 505}
            )
        )
    ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("server", COMMANDS)
def test_one_request_is_one_call(run_of: Callable[[str], Run], server: str) -> None:
    """Nothing is called twice, nor by what follows a request."""
    run = run_of(server)
    wrong = [
        f"{request.name}: {outcome}"
        for request, outcome in zip(REQUESTS, run.outcomes, strict=True)
        if len(outcome.calls) > 1 or (outcome.let_through and not outcome.calls)
    ]
    assert not wrong, "\n" + "\n".join(wrong)
    assert run.late_calls == []


@pytest.mark.parametrize("server", OURS)
def test_a_broken_body_is_no_body(run_of: Callable[[str], Run], server: str) -> None:
    """A view that reads a body that is not whole gets an error, never the part that came."""
    wrong = [
        f"{request.name}: {outcome}"
        for request, outcome in zip(REQUESTS, run_of(server).outcomes, strict=True)
        if request.broken and outcome.answer is not None and outcome.answer.status < 400
    ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("server", OURS)
def test_most_get_through(run_of: Callable[[str], Run], server: str) -> None:
    """Both parsers let most of the generated requests through, or the corpus says nothing."""
    pairs = zip(run_of(REFERENCE).outcomes, run_of(server).outcomes, strict=True)
    through = [theirs.let_through and outcome.let_through for theirs, outcome in pairs]
    assert GENERATED == 200
    assert sum(through[-GENERATED:]) >= 120


@pytest.mark.parametrize("server", OURS)
def test_nothing_is_logged_as_an_error(run_of: Callable[[str], Run], server: str) -> None:
    """No request, however odd, makes a traceback."""
    assert "Traceback" not in run_of(server).log


def test_the_answers_are_of_many_kinds(run_of: Callable[[str], Run]) -> None:
    """The application is asked for all that it can do, and fails only where it is told to."""
    outcomes = [outcome for outcome in run_of(REFERENCE).outcomes if outcome.answer]
    statuses = {outcome.answer.status for outcome in outcomes if outcome.let_through}
    assert statuses >= {200, 204, 206, 302, 303, 304, 307, 308, 400, 404, 405, 412, 415, 416, 500}
    for request, outcome in zip(REQUESTS, run_of(REFERENCE).outcomes, strict=True):
        if outcome.let_through and outcome.answer.status == 500:
            assert "/error" in request.name or request.broken, request.name
