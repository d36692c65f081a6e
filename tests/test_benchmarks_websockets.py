"""The benchmark's WebSocket load notices what is wrong, compressed or not, of ours and of peers."""

from __future__ import annotations

import json
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("picows", reason="the benchmark's client needs picows")
pytest.importorskip("uvloop", reason="the benchmark's client needs uvloop")

import uvloop
from benchmarks import __main__ as command
from benchmarks import crowds, idle, machine
from benchmarks.client import Fault, Mode, WsMeasurement, measure, percentile
from benchmarks.floor import frame
from benchmarks.http_servers import SERVERS as HTTP_SERVERS
from benchmarks.plot import panels, plot
from benchmarks.promises import PROMISES, promises_table, rows
from benchmarks.report import idle_summary, summary, table
from benchmarks.servers import SERVERS, missing, serve, serve_floor, serve_ws
from benchmarks.speech import Declined, json_text, spoken

FAULTY = "tests.test_benchmarks:faulty"
PACED = Mode("/fan-out", 4, fan_out=True, paced=20)


def words(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two messages are checked before the clock: the seventh, which is wrong, comes after."""
    monkeypatch.setattr("benchmarks.client.CHECKED", 2)
    monkeypatch.setattr("benchmarks.client.SILENCE", 1.0)


# -- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["lost", "doubled", "reordered"])
@pytest.mark.usefixtures("soon")
def test_notices_what_is_wrong_with_compressed_messages(fault: str) -> None:
    """What is kept while the clock runs is compared when it has stopped."""
    how = {"connection": spoken(deflate=True, socketio=False)["connection"]}
    with serve(FAULTY, "wsproto", deflate=True) as port, pytest.raises(Fault, match="expected"):
        measure(Mode(f"/{fault}", in_flight=10), port, 0.2, **how)


def test_compression_must_be_agreed() -> None:
    """A server that declines the offer is not measured: its figures would be of something else."""
    with serve("benchmarks.servers:raw", "wsproto") as port, pytest.raises(Declined):
        measure(Mode("/echo"), port, 0.1, **spoken(deflate=True, socketio=False))


@pytest.mark.parametrize(
    ("fault", "errors"),
    [
        ("lost", {"lost": 1}),
        ("doubled", {"unexpected": 1}),
        ("reordered", {"out of order": 1}),
        ("closed", {"closed": 1}),
    ],
)
@pytest.mark.usefixtures("soon")
def test_faults_of_a_peer_are_counted(fault: str, errors: dict[str, int]) -> None:
    """Each by its kind, with the first one in words; the measurement goes on to its end."""
    with serve(FAULTY, "wsproto") as port:
        found = measure(Mode(f"/{fault}", in_flight=2), port, 0.3, strict=False)
    assert found.errors == errors
    assert found.error


def test_counts_messages_of_a_paced_load() -> None:
    """Ten publishes of four subscribers each, their latencies from the moment they were due."""
    with serve("benchmarks.servers:raw", "wsproto") as port:
        found = measure(PACED, port, 0.5)
    # "ready", the round before the clock, and those while it ran.
    assert found.deliveries == 4 * (1 + 5 + 10)
    assert found.p50 is not None and found.p99 is not None
    assert 0 < found.p50 <= found.p99 < 5


def test_percentiles() -> None:
    """The nearest rank: what so many do not exceed."""
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0
    assert percentile(range(1, 201), 0.99) == 198
    assert percentile([7.0], 0.99) == 7.0


def test_json_messages() -> None:
    """300 bytes each, right JSON, no two alike, and no more than numbers that change."""
    said = [json_text(number, sent) for number in (0, 7, 4_999) for sent in (1, 2, 99_999_999)]
    assert {len(each) for each in said} == {300}
    assert len(set(said)) == len(said)
    assert {tuple(json.loads(each)) for each in said} == {tuple(json.loads(said[0]))}


# -- ways to speak --------------------------------------------------------------------------------


@pytest.mark.parametrize("deflate", [False, True])
def test_the_floor_answers_every_load(deflate: bool) -> None:
    """The server that shows what the client can do loses nothing either."""
    with serve_floor(None) as port:
        for mode in (Mode("/echo", 3, in_flight=2), Mode("/fan-out", 3, 3, True)):
            found = measure(mode, port, 0.1, **spoken(deflate, socketio=False))
            assert found.rate > 0 and not found.errors


def test_a_shared_frame_suits_every_decoder() -> None:
    """A frame of the floor refers to nothing that came before it."""
    decoder = zlib.decompressobj(-12)
    for payload in (b"a" * 64, b"a" * 64, b"b" * 300):
        data = frame(payload, deflate=True)
        assert data[0] == 0xC1 and data[1] == len(data) - 2
        assert decoder.decompress(data[2:] + b"\x00\x00\xff\xff") == payload


@pytest.mark.parametrize("server", ["raw", "ours", "ours-async"])
def test_compressed_fan_out(server: str) -> None:
    """What browsers offer is agreed, and everybody inflates everything, before and after."""
    with serve_ws(SERVERS[server], "wsproto", None, 3, deflate=True) as port:
        found = measure(Mode("/fan-out", 3, 3, True), port, 0.1, **spoken(True, socketio=False))
    assert found.rate > 0


async def engine(scope: Any, receive: Any, send: Any) -> None:
    """Socket.IO as its servers speak it; it sends a ping after the second message, and goes
    when no pong comes."""
    if scope["type"] != "websocket":
        return

    async def say(text: str) -> None:
        await send({"type": "websocket.send", "text": text})

    await receive()
    assert scope["path"] == "/socket.io/" and scope["query_string"] == b"EIO=4&transport=websocket"
    await send({"type": "websocket.accept"})
    await say('0{"sid":"a","upgrades":[],"pingInterval":25000,"pingTimeout":20000}')
    assert (await receive())["text"] == "40/echo,"
    await say('40/echo,{"sid":"b"}')
    for number in range(1_000_000):
        if number == 2:
            await say("2")
            if (await receive())["text"] != "3":
                return
        event = await receive()
        if event["type"] != "websocket.receive":
            return
        assert event["text"].startswith('42/echo,["message","')
        await say(event["text"])


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.usefixtures("soon")
def test_socket_io(deflate: bool) -> None:
    """Open, namespace, messages and pings, compressed as well."""
    with serve("tests.test_benchmarks_websockets:engine", "wsproto", deflate=deflate) as port:
        found = measure(Mode("/echo"), port, 0.1, **spoken(deflate, socketio=True))
    assert found.deliveries > 3


@pytest.mark.parametrize("name", [name for name, each in SERVERS.items() if each.peer])
def test_peers(name: str) -> None:
    """Each that is installed starts, and gives everybody every message."""
    server = SERVERS[name]
    if absent := missing(server.needs):
        pytest.skip(f"{', '.join(absent)} is not installed")
    ws = "wsproto" if missing(["websockets", "httptools"]) else "auto"
    for mode in (Mode("/echo", 3), Mode("/fan-out", 3, fan_out=True)):
        with serve_ws(server, ws, None, mode.connections) as port:
            found = measure(
                mode, port, 0.1, strict=False, **spoken(deflate=False, socketio=server.socketio)
            )
        assert found.rate > 0 and not found.errors, found


# -- idle connections and crowds ------------------------------------------------------------------


@pytest.mark.parametrize(("server", "deflate"), [("raw", True), ("ours", False)])
def test_idle_connections(server: str, deflate: bool) -> None:
    """All are open at once, one in a hundred still answers, and so does HTTP."""
    with serve_ws(SERVERS[server], "wsproto", None, 120, deflate) as port:
        found = uvloop.run(idle.idle(port, 120, deflate))
    assert found.handshakes > 0 and found.answer > 0
    if sys.platform == "linux":
        assert found.resident is not None and found.resident > 1_000
    assert found.threads >= (120 if server == "ours" else 1)


async def shaky(scope: Any, receive: Any, send: Any) -> None:
    """Refuses, closes, says something else or falls silent, as the path says, at the fifth."""
    global opened
    if scope["type"] != "websocket":
        return
    opened += 1
    odd, path = opened == 5, scope["path"]
    await receive()
    if odd and path == "/refuses":
        await send({"type": "websocket.close"})
        return
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": "other" if odd and path == "/says" else "ready"})
    if odd and path == "/closes":
        return
    while (event := await receive())["type"] == "websocket.receive":
        if path != "/silent":
            await send({"type": "websocket.send", "text": event["text"]})


opened = 0


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/refuses", "was not let in"),
        ("/says", "expected b'ready'"),
        ("/closes", "closed by the server"),
        ("/silent", "do not answer"),
    ],
)
def test_notices_an_idle_connection_that_is_not_there(
    path: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is refused, or closed, or that nobody serves, is a fault."""
    monkeypatch.setattr("benchmarks.idle.ASKED", 1)
    monkeypatch.setattr("benchmarks.client.SILENCE", 1.0)

    async def crowd(port: int) -> None:
        some = idle.Crowd(port, path)
        try:
            await some.open(10)
            await some.ask()
            await some.pause(1)
        finally:
            some.close()

    with (
        serve("tests.test_benchmarks_websockets:shaky", "wsproto") as port,
        pytest.raises(Fault, match=reason),
    ):
        uvloop.run(crowd(port))


def test_echo_beside_parked_views() -> None:
    """Those that wait in receive stay open while others echo."""
    with serve("benchmarks.servers:ours", "wsproto") as port:
        found = uvloop.run(crowds.beside_parked(port, 0.1, 20, Mode("/echo", 2)))
    assert found.rate > 0


@pytest.mark.parametrize("stuck", [False, True])
def test_fan_out_beside_a_stuck_subscriber(stuck: bool) -> None:
    """The others get everything; for the stuck one each message drops another."""
    with serve("benchmarks.bystanders_app:slow_subscribers", "wsproto") as port:
        found = uvloop.run(crowds.beside_stuck(port, 0.2, stuck, others=5))
    assert found.rate > 0


def test_says_when_the_stuck_one_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subscriber whose outbox has room would be no test."""

    async def nothing(*_: Any) -> None:
        """Stands for what fills the outbox."""

    monkeypatch.setattr(crowds, "fill", nothing)
    with (
        serve("benchmarks.bystanders_app:slow_subscribers", "wsproto") as port,
        pytest.raises(Fault, match="0 were dropped for the stuck one"),
    ):
        uvloop.run(crowds.beside_stuck(port, 0.1, True, others=2))


# -- what is told ---------------------------------------------------------------------------------


def measured(*rates: float, **changes: Any) -> list[WsMeasurement]:
    return [WsMeasurement(rate, 0.5, **changes) for rate in rates]


@pytest.fixture
def results() -> dict[str, Any]:
    """What three runs of some modes may give."""
    wrong = {"errors": Counter({"out of order": 2}), "error": "It expected 1.", "deliveries": 1_000}
    echo = {
        "raw": measured(100, 200, 400, p50=0.001, p99=0.004),
        "ours": measured(100, 150, 300, p50=0.002, p99=0.006),
        "ours-async": measured(90, 180, 360),
        "flask-sock": measured(50, 75, 0, **wrong),
    }
    paced = {"raw": measured(10, 10, p99=0.01), "ours": measured(10, 10, p99=0.02)}
    connections = {
        name: [idle.IdleMeasurement(each * size, 1_000.0, 5, 0.001, 0.2) for each in (1, 2, 3)]
        for name, size in (("raw", 20_000), ("ours", 50_000))
    }
    return {
        "echo-50": {**summary(echo), "client_limits": [400.0, 500.0, 600.0]},
        "fan-out-paced-2000": {**summary(paced, paced=True), "client_limits": [1.0, 1.0]},
        "idle-2000": idle_summary(connections),
        "idle-10000": idle_summary({"ours": connections["ours"]}),
        "http-small": {
            "ours": {"rates": [220.0], "ours": None, "gunicorn": {"ratio": 2.2, "ratios": [2.2]}},
            "gunicorn": {"rates": [100.0], "ours": None, "gunicorn": None},
        },
    }


def test_tells_ratios_latencies_and_errors(results: dict[str, Any]) -> None:
    """What each is of raw, ours of it, the p99s, and a peer's errors by their kind."""
    lines = words(table({mode: results[mode] for mode in ("echo-50", "fan-out-paced-2000")}))
    assert lines[2] == "raw 200 - - 0.75 0.75 to 1.00 1.00 ms 4.00 ms 0 50%"
    assert lines[3] == "ours 150 0.75 0.75 to 1.00 - - 2.00 ms 6.00 ms 0 50%"
    assert lines[5] == "flask-sock 50 0.25 0.00 to 0.50 3.00 2.00 to 2.00 - - 6 50%"
    assert lines[6].endswith("500/s with the least of servers, 2.50 times the fastest here")
    expected = "echo-50, flask-sock: 6 out of order, of 3,000 deliveries; the first: It expected 1."
    assert lines[7] == expected
    assert lines[9].endswith("less is better)")
    assert lines[12].startswith("ours 10 2.00 2.00 to 2.00")
    assert set(results["echo-50"]["ratio"]) == {"ours", "ours_async", "flask_sock"}


def test_says_when_the_client_is_near_its_limit() -> None:
    """A busy client that was hardly faster with the least of servers is what was measured."""
    for cpu, limit, near in ((0.95, 105.0, True), (0.95, 150.0, False), (0.5, 105.0, False)):
        found = {**summary({"raw": [WsMeasurement(100.0, cpu)]}), "client_limits": [limit]}
        assert ("it is near its limit" in table({"echo-50": found})) is near


def test_tells_what_is_promised(results: dict[str, Any]) -> None:
    """A row for each promise, with its ratio, or a dash where it was not measured."""
    told = rows(results)
    lines = words(promises_table(told))
    assert len(lines) == 1 + len(PROMISES) and len(told) == len(PROMISES)
    assert "sync echo, 50 raw ASGI 0.75 0.75 to 1.00 0.65 0.80" in lines
    assert "sync echo, 50 flask-sock 3.00 2.00 to 2.00 1.4 1.6" in lines
    assert "async echo, 50 raw ASGI 0.90 0.90 to 0.90 0.80 0.90" in lines
    assert "idle memory, sync view raw ASGI 2.50 2.50 to 2.50 at most 2.6 2.2" in lines
    assert "10,000 sync views handshakes/s 1,000 1,000 to 1,000 works 1,500" in lines
    assert "HTTP small view gunicorn 2.20 2.20 to 2.20 1.8 2.3" in lines
    assert "fan-out to 500, deflate raw ASGI - - 1.8 3" in lines


def test_draws_the_ratios(results: dict[str, Any], tmp_path: Path) -> None:
    """A panel for each kind, a bar for each server, raw and gunicorn being the measure."""
    drawn = dict(panels(results))
    [rates, memory, http] = drawn.values()
    assert rates["echo-50"]["ours"] == (0.75, 0.75, 1.0)
    assert "raw" not in rates["echo-50"]
    assert rates["fan-out-paced-2000 (p99, less is better)"] == {"ours": (2.0, 2.0, 2.0)}
    assert memory == {"idle-2000": {"ours": (2.5, 2.5, 2.5)}}
    assert http == {"http-small": {"ours": (2.2, 2.2, 2.2)}}
    pytest.importorskip("matplotlib", reason="--plot needs it")
    plot(results, tmp_path / "ratios.svg")
    assert "</svg>" in (tmp_path / "ratios.svg").read_text()


# -- the command ----------------------------------------------------------------------------------


def options_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    return command.parse()


def test_servers_are_chosen_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual ones, all, or those that are named; HTTP has its own."""
    some = options_of(monkeypatch, "--modes", "echo-1", "http-small")
    assert some.ws_servers == ["raw", "ours", "ours-async"]
    assert some.http_servers == list(HTTP_SERVERS)
    every = options_of(monkeypatch, "--servers", "all")
    assert every.ws_servers == list(SERVERS)
    both = options_of(
        monkeypatch, "--modes", "echo-1", "http-small", "--servers", "ours", "granian"
    )
    assert (both.ws_servers, both.http_servers) == (["ours"], ["ours", "granian"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--modes", "echo-1", "--servers", "granian"],
        ["--modes", "idle-2000", "--servers", "quart"],
        ["http", "--servers", "flask-sock"],
        ["promises", "--free"],
        ["idle", "--modes", "echo-1"],
    ],
)
def test_refuses_what_makes_no_sense(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Servers that a kind does not know, and options that contradict each other."""
    with pytest.raises(SystemExit) as raised:
        options_of(monkeypatch, *arguments)
    assert raised.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_peers_take_part_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with thousands of connections."""
    monkeypatch.setattr(command, "missing", lambda _: [])
    chosen = ["--modes", "fan-out-500", "fan-out-2000", "idle-2000", "--servers", "all"]
    plans = command.plan(options_of(monkeypatch, *chosen))
    small, large = plans["websockets"]
    assert small.servers == tuple(SERVERS)
    assert large.servers == plans["idle"][0].servers == ("raw", "ours", "ours-async")


def test_promises_leave_out_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They run five times, and without a server that is not installed."""
    assert options_of(monkeypatch, "promises").runs == 5
    assert options_of(monkeypatch, "promises", "--runs", "2").runs == 2
    monkeypatch.setattr(command, "missing", lambda needs: [each for each in needs if "-" in each])
    plans = command.promised()
    assert {"raw", "ours", "ours-async"} == {
        name for work in plans["websockets"] for name in work.servers
    }
    assert "flask-sock is left out: flask-sock is not installed." in capsys.readouterr().out
    assert len({work.name for work in plans["websockets"]}) == len(plans["websockets"])


def test_says_when_too_few_files_may_be_open(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit is raised as far as it goes; what does not suffice is no reason for a traceback."""
    limits = [(1_024, 4_096)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _, new: limits.append(new))
    assert machine.allow_files(500) == 500 and len(limits) == 1
    assert machine.allow_files(2_000) == 2_000
    assert limits[-1] == (2_000, 4_096)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "idle"])
    assert command.main() == 2
    said = capsys.readouterr().err
    assert "This needs 10,200 open files; the system allows 4,096." in said
    assert "ulimit -n 10200" in said


def test_a_fault_is_no_failure_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 1 for what was wrong, 2 for what could not be run."""

    def ended_by(error: Exception) -> int:
        def compare(*_: Any) -> dict[str, Any]:
            raise error

        monkeypatch.setattr(command, "compare", compare)
        return command.main()

    monkeypatch.setattr(sys, "argv", ["benchmarks", "--modes", "echo-1"])
    assert ended_by(Fault("run 1 of 3: lost")) == 1
    assert "run 1 of 3: lost" in capsys.readouterr().err
    assert ended_by(RuntimeError("The server did not start")) == 2


def test_free_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the server has the first core and the client the second, but where a row is free."""
    placed: list[set[int]] = []
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(
        "os.sched_setaffinity", lambda _, cores: placed.append(set(cores)), raising=False
    )
    cores = machine.Cores.found()
    assert (cores.place(), cores.place(free=True), cores.place()) == (0, None, 0)
    assert placed == [{1}, {0, 1, 2}, {1}]
    assert machine.Cores.found(free=True).place() is None
    assert len(placed) == 3
