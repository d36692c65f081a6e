"""The benchmark runs, and it would notice a server that loses messages or answers wrongly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("picows", reason="the benchmark's client needs picows")
pytest.importorskip("uvloop", reason="the benchmark's client needs uvloop")

import benchmarks.bystanders as bystanders
import uvloop
from benchmarks.__main__ import leave_out_missing, main
from benchmarks.bystanders_app import LIMIT
from benchmarks.client import Fault, Mode, measure
from benchmarks.http_app import Observed
from benchmarks.http_client import (
    CLIENTS,
    HTTP_MODES,
    Client,
    HttpMeasurement,
    HttpMode,
    measure_http,
)
from benchmarks.http_report import http_summary, http_table
from benchmarks.http_servers import SERVERS, Server
from benchmarks.servers import serve

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("ws", ["auto", "wsproto"])
def test_prints_a_table_and_writes_json(ws: str, tmp_path: Path) -> None:
    """A short run ends with 0, a line with the mode's ratio, and the same ratio as JSON."""
    if ws == "auto":
        pytest.importorskip("websockets", reason="--ws auto needs the extra fast")
        pytest.importorskip("httptools", reason="--ws auto needs the extra fast")
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks", "--runs", "1", "--seconds", "0.2"]
    command += ["--modes", "echo-1", "--ws", ws, "--json", str(path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    pattern = r"^ours +[\d,]+ +(\d+\.\d\d) .* \d+\.\d\d ms +(\d+\.\d\d) ms +0 +\d+%$"
    line = re.search(pattern, ended.stdout, re.MULTILINE)
    assert line, ended.stdout
    report = json.loads(path.read_text())
    result = report["results"]["echo-1"]
    assert f"{result['ratio']['ours']:.2f}" == line[1]
    assert f"{result['p99']['ours'] * 1000:.2f}" == line[2]
    assert 0 < result["p50"]["ours"] <= result["p99"]["ours"]
    assert result["client_limits"][0] > 0
    assert set(result["medians"]) == {"raw", "ours", "ours_async"}
    assert min(result["medians"].values()) > 0
    assert report["options"]["ws"] == ws
    assert f"uvicorn {report['versions']['uvicorn']}" in ended.stdout


async def faulty(scope: Any, receive: Any, send: Any) -> None:
    """An echo that goes wrong once, at its seventh message, as the path says."""
    if scope["type"] != "websocket":
        return
    await receive()
    await send({"type": "websocket.accept"})
    texts = ["ready"]
    while True:
        for text in texts:
            await send({"type": "websocket.send", "text": text})
        event = await receive()
        if event["type"] == "websocket.disconnect":
            return
        texts = [event["text"]]
        if texts[0].endswith(":" + "7".zfill(55)):
            if scope["path"] == "/closed":
                return
            later = (await receive())["text"]
            wrong = {"/lost": [later], "/doubled": [*texts, *texts, later]}
            texts = wrong.get(scope["path"], [later, *texts])


@pytest.mark.parametrize(
    ("fault", "in_flight", "reason"),
    [
        ("lost", 10, "expected"),
        ("lost", 1, "silence"),
        ("doubled", 10, "expected"),
        ("reordered", 10, "expected"),
        ("closed", 1, "closed by the server"),
    ],
)
def test_notices_a_server_that_loses_messages(
    fault: str, in_flight: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message that is lost, doubled or reordered, or a connection that ends, is a fault."""
    monkeypatch.setattr("benchmarks.client.SILENCE", 1.0)
    with (
        serve("tests.test_benchmarks:faulty", "wsproto") as port,
        pytest.raises(Fault, match=reason),
    ):
        measure(Mode(f"/{fault}", in_flight=in_flight), port, 0.2)


def test_prints_an_http_table_and_writes_json(tmp_path: Path) -> None:
    """A short HTTP run of ours ends with 0, a line for the server, and the same rate as JSON."""
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks", "--modes", "http-small", "--runs", "1"]
    command += ["--seconds", "0.2", "--servers", "ours-h11", "--json", str(path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    pattern = (
        r"^ours-h11 +([\d,]+) +1\.00  1\.00 to 1\.00 +-( +\d+\.\d\d ms){2} +0 +\d+\.\d ms +\d+%"
    )
    line = re.search(pattern, ended.stdout, re.MULTILINE)
    assert line, ended.stdout
    report = json.loads(path.read_text())
    result = report["results"]["http-small"]["ours-h11"]
    assert f"{result['median']:,.0f}" == line[1]
    assert result["median"] > 0 and result["errors"] == 0 and result["longest_turn"] > 0
    assert 0 < result["p50"] <= result["p99"]
    assert f"gunicorn {report['versions']['gunicorn']}" in ended.stdout
    assert f"ours-h11: {report['servers']['ours-h11']}" in ended.stdout


def test_names_the_server_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server whose distribution is missing is left out, with a line that says so."""
    monkeypatch.setitem(SERVERS, "waitress", Server([], ("no-such-distribution",), ""))
    assert leave_out_missing(["ours-h11", "waitress"], SERVERS) == ["ours-h11"]
    expected = "waitress is left out: no-such-distribution is not installed.\n"
    assert capsys.readouterr().out == expected


def test_tells_errors_and_ratios_of_http_servers() -> None:
    """The medians, ours as a multiple of each, each of gunicorn's, and the errors beside them."""

    def measured(*rates: float, **changes: Any) -> list[HttpMeasurement]:
        fields = {"answers": 10, "errors": 0, "error": None, "longest_turn": None, **changes}
        return [HttpMeasurement(rate, 0.5, **fields) for rate in rates]

    runs = {
        "ours": measured(300, 400, 100, longest_turn=0.0021, p50=0.002, p99=0.0105),
        "asgiref": measured(0, 0, 0, errors=2, error="status 500\nmore"),
        "gunicorn": measured(100, 200, 200),
    }
    results = {"http-small": http_summary(runs)}

    def words(line: str) -> str:
        return " ".join(line.split())

    assert results["http-small"]["gunicorn"]["ours"] == {"ratio": 1.5, "ratios": [3, 2, 0.5]}
    lines = http_table(results).splitlines()
    assert words(lines[2]) == "ours 300 1.00 1.00 to 1.00 1.50 2.00 ms 10.50 ms 0 2.1 ms 50%"
    assert words(lines[3]) == "asgiref 0 - - 0.00 - - 6 - 50%"
    assert words(lines[4]) == "gunicorn 200 1.50 0.50 to 3.00 1.00 - - 0 - 50%"
    expected = "http-small, asgiref: 6 of 30 answers were wrong, the first: status 500"
    assert lines[-1] == expected


class Recorder:
    """Stands for a load and for the transport of its one client."""

    def __init__(self, body: bytes) -> None:
        self.mode = HttpMode("/{number}", lambda number: body)
        self.pending = self.delivered = 0
        self.timing = False
        self.errors: list[str] = []
        self.client = Client(self, 7)  # type: ignore[arg-type]
        self.client.connection_made(self)
        self.client.left = 1
        self.client.send()

    def write(self, data: bytes) -> None:
        assert data.startswith(b"GET /7 HTTP/1.1\r\n")

    def abort(self) -> None:
        pass

    def wrong(self, what: str) -> None:
        self.errors.append(what)

    def feed(self, data: bytes, size: int) -> None:
        for at in range(0, len(data), size):
            piece = data[at : at + size]
            self.client.get_buffer(-1)[: len(piece)] = piece
            self.client.buffer_updated(len(piece))
            if self.errors:
                break


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "answer",
    [
        b"Content-Length: 6\r\n\r\nabcdef",
        b"Date: now\r\ncontent-length:6\r\nConnection: close\r\n\r\nabcdef",
        b"Transfer-Encoding: chunked\r\n\r\n6\r\nabcdef\r\n0\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\n02;x=y\r\nab\r\n4\r\ncdef\r\n0\r\n\r\n",
    ],
)
def test_takes_a_right_answer_in_any_pieces(answer: bytes, size: int) -> None:
    """Content-Length or chunks, however the network cuts them."""
    recorder = Recorder(b"abcdef")
    recorder.feed(b"HTTP/1.1 200 OK\r\n" + answer, size)
    assert (recorder.errors, recorder.delivered, recorder.pending) == ([], 1, 0)


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"500 Oh\r\nContent-Length: 6\r\n\r\nabcdef", "status 500"),
        (b"200 OK\r\nContent-Length: 5\r\n\r\nabcde", "a body of 5 bytes"),
        (b"200 OK\r\nContent-Length: 6\r\n\r\nabcdeX", "another body"),
        (b"200 OK\r\nContent-Length: 6\r\n\r\nabcdefg", "bytes"),
        (b"200 OK\r\n\r\nabcdef", "neither one Content-Length nor"),
        (b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabX\r\n", "another body"),
        (b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "of 3 bytes"),
        (b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\nabcdefg\r\n", "another body"),
        (b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcdef\r\n", "longer than its size"),
        (b"nonsense\r\n\r\n", "got "),
    ],
)
def test_notices_an_answer_that_is_wrong(answer: bytes, reason: str, size: int) -> None:
    """Another status, another body, a wrong length, bad framing."""
    recorder = Recorder(b"abcdef")
    recorder.feed(b"HTTP/1.1 " + answer, size)
    assert len(recorder.errors) == 1 and reason in recorder.errors[0]
    assert recorder.pending == 0


requests = 0


async def wrong(scope: Any, receive: Any, send: Any) -> None:
    """Answers ``ok``, but for every 30th request what the path says."""
    global requests
    if scope["type"] != "http":
        return
    requests += 1
    status, body = 200, b"ok"
    if requests % 30 == 0:
        if scope["path"] == "/closed":
            return  # uvicorn answers 500 and closes
        if scope["path"] == "/silent":
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        if scope["path"] == "/blocking":
            time.sleep(0.2)
        status = 503 if scope["path"] == "/status" else 200
        body = b"ko" if scope["path"] == "/body" else b"ok"
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


_observed = Observed(wrong)


async def observed(scope: Any, receive: Any, send: Any) -> None:
    """As a function: uvicorn would take the object, whose call is no coroutine, for ASGI 2."""
    await _observed(scope, receive, send)


@pytest.fixture(scope="module")
def wrong_port() -> Iterator[int]:
    """The port of a server that is wrong at times."""
    with serve("tests.test_benchmarks:observed", "wsproto") as port:
        yield port


FAULTS = {"status": "status 503", "body": "another body", "closed": "status 500"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_answer_of_ours_is_a_fault(fault: str, wrong_port: int) -> None:
    """One answer with another status or body, or none, ends the measurement."""
    mode = HttpMode(f"/{fault}", lambda number: b"ok")
    with pytest.raises(Fault, match=FAULTS[fault]):
        measure_http(mode, wrong_port, 0.5, strict=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_answers_of_the_others_are_counted(fault: str, wrong_port: int) -> None:
    """They do not count as answers per second, and the load goes on."""
    mode = HttpMode(f"/{fault}", lambda number: b"ok")
    measurement = measure_http(mode, wrong_port, 0.3, strict=False)
    assert measurement.rate > 0
    assert measurement.errors > 0
    assert abs(measurement.errors - measurement.answers / 30) <= 2
    assert measurement.error and FAULTS[fault] in measurement.error


def test_an_answer_that_never_comes_is_wrong(
    wrong_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence is a fault of ours, and counted as the others' error."""
    monkeypatch.setattr("benchmarks.client.SILENCE", 0.5)
    mode = HttpMode("/silent", lambda number: b"ok")
    with pytest.raises(Fault, match="silence"):
        measure_http(mode, wrong_port, 0.2, strict=True)
    measurement = measure_http(mode, wrong_port, 0.2, strict=False)
    assert 0 < measurement.errors <= 2 * CLIENTS
    assert measurement.error and "silence" in measurement.error


def test_measures_the_longest_turn_of_the_loop(wrong_port: int) -> None:
    """A view that blocks the loop for 0.2 s shows."""
    mode = HttpMode("/blocking", lambda number: b"ok")
    measurement = measure_http(mode, wrong_port, 1.0, strict=True, observe=True)
    assert measurement.longest_turn is not None
    assert measurement.longest_turn > 0.19


def test_every_http_mode_is_answered_by_the_application() -> None:
    """What the client expects is what Flask itself answers."""
    from benchmarks.http_app import app

    client = app.test_client()
    for name, mode in HTTP_MODES.items():
        if name != "http-download":  # it needs the file that the benchmark makes
            method = "GET" if mode.upload is None else "POST"
            response = client.open(mode.path.format(number=3), method=method, data=mode.upload)
            assert (response.status_code, response.data) == (200, mode.answer(3)), name


@pytest.mark.parametrize("ws", ["auto", "wsproto"])
def test_refusals(ws: str, tmp_path: Path) -> None:
    """Every handshake above the limit is refused, and the page is answered meanwhile."""
    if ws == "auto":
        pytest.importorskip("websockets", reason="--ws auto needs the extra fast")
        pytest.importorskip("httptools", reason="--ws auto needs the extra fast")
    with (
        (tmp_path / "log").open("wb") as log,
        serve("benchmarks.bystanders_app:refusals", ws, None, log) as port,
    ):
        found = uvloop.run(bystanders.refusals(port, 0.2, handshakes=300))
    assert found["with"] > 0 and found["without"] > 0 and found["handshakes"] > 0


def test_slow_subscribers() -> None:
    """Those that read get everything, in order, while two that do not have full outboxes."""
    for slow in (False, True):
        with serve("benchmarks.bystanders_app:slow_subscribers", "wsproto") as port:
            found = uvloop.run(bystanders.slow_subscribers(port, 0.3, slow, subscribers=10))
        assert found["p99"] > 0
        assert found["grown"] is None or found["grown"] < 2 * (found["outbox"] + 2**20)


def test_prints_a_table_of_bystanders_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ratio of each run and their median, the handshakes, and what memory has grown by."""
    runs = iter([(0.002, 0.010), (0.002, 0.008), (0.004, 0.012)])

    def refusals(ws: str, core: int | None, seconds: float) -> dict[str, Any]:
        without, beside = next(runs)
        lags = {"lag_without": 0.001, "lag_with": 0.002}
        return {"without": without, "with": beside, "handshakes": 2000.0, **lags}

    def slow(ws: str, core: int | None, seconds: float) -> dict[str, Any]:
        grown = {"grown_without": 2**20, "grown_with": 3 * 2**20, "allowed": 4 * 2**20}
        return {"without": 0.02, "with": 0.03, "lag_without": 0.0, "lag_with": 0.0, **grown}

    path = tmp_path / "result.json"
    argv = ["benchmarks", "--modes", "refusals", "slow-subscribers", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setitem(bystanders.BYSTANDER_MODES, "refusals", refusals)
    monkeypatch.setitem(bystanders.BYSTANDER_MODES, "slow-subscribers", slow)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)  # pins nothing
    assert main() == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "refusals 4.00 3.00 to 5.00 2.00 ms 10.00 ms 1.00 ms 2.00 ms" in shown
    assert "slow-subscribers 1.50 1.50 to 1.50 20.00 ms 30.00 ms" in shown
    assert "10,000 handshakes were refused in each run, 2,000/s" in shown
    assert "grew by 3.00, 3.00, 3.00 MiB in the runs, of 4.00 allowed for the two; by 1.00" in shown
    result = json.loads(path.read_text())["results"]["refusals"]
    assert (result["ratio"], result["ratios"]) == (4.0, [5.0, 4.0, 3.0])


async def forgetful(scope: Any, receive: Any, send: Any) -> None:
    """Answers pages and handshakes, but for what FORGETFUL says."""
    fault = os.environ.get("FORGETFUL")
    if scope["type"] == "http":
        body = b"ko" if fault == "page" else b"ok"
        if scope["path"] == "/stats":
            stats = {"refused_full": 0, "connections": 1, "view_threads": 1}
            body = json.dumps(stats).encode()
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
    elif scope["type"] == "websocket":
        global requests
        requests += 1
        await receive()
        if requests > LIMIT and fault != "accepts":
            headers = [] if fault == "no-retry" else [(b"retry-after", b"1")]
            await send({"type": "websocket.http.response.start", "status": 503, "headers": headers})
            await send({"type": "websocket.http.response.body", "body": b""})
            return
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "ready"})
        while (await receive())["type"] != "websocket.disconnect":
            pass


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("page", "Expected 200 and ok"),
        ("accepts", "came: {'101': 200}"),
        ("no-retry", "came: {'503 alone': 200}"),
        ("miscounts", "Expected {'refused_full': 20"),
    ],
)
def test_notices_a_server_that_does_not_refuse(
    fault: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another page, a handshake that is let in, one without Retry-After, a wrong counter."""
    monkeypatch.setenv("FORGETFUL", fault)
    with (
        (tmp_path / "log").open("wb") as log,
        serve("tests.test_benchmarks:forgetful", "wsproto", None, log) as port,
        pytest.raises(Fault, match=re.escape(reason)),
    ):
        uvloop.run(bystanders.refusals(port, 0.1, handshakes=20))


async def unfair(scope: Any, receive: Any, send: Any) -> None:
    """A channel that loses or doubles one message, as UNFAIR says."""
    if scope["type"] == "http":
        body = json.dumps({"connections": len(members), "resident": None, "outbox_limit": 1})
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body.encode()})
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        if scope["path"] == "/everyone":
            members.append(send)
        await send({"type": "websocket.send", "text": "ready"})
        while (event := await receive())["type"] == "websocket.receive":
            copies = 1
            if int(event["text"]) == 5:
                copies = 0 if os.environ["UNFAIR"] == "lost" else 2
            for each in members:
                for _ in range(copies):
                    await each({"type": "websocket.send", "text": event["text"]})


members: list[Any] = []


@pytest.mark.parametrize(
    ("fault", "reason"), [("lost", "Expected message 5"), ("doubled", "Expected message 6")]
)
def test_notices_a_channel_that_loses_messages(
    fault: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is lost or doubled is a fault."""
    monkeypatch.setenv("UNFAIR", fault)
    with (
        serve("tests.test_benchmarks:unfair", "wsproto") as port,
        pytest.raises(Fault, match=reason),
    ):
        uvloop.run(bystanders.slow_subscribers(port, 0.5, False, subscribers=3))
