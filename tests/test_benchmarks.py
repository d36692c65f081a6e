"""The benchmark runs, and it would notice a server that loses messages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("picows", reason="the benchmark's client needs picows")
pytest.importorskip("uvloop", reason="the benchmark's client needs uvloop")

from benchmarks.client import Fault, Mode, measure
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
    line = re.search(r"^echo-1 +(\d+\.\d\d) .* +\d+% +\d+%", ended.stdout, re.MULTILINE)
    assert line, ended.stdout
    report = json.loads(path.read_text())
    result = report["results"]["echo-1"]
    assert f"{result['ratio']:.2f}" == line[1]
    assert result["medians"]["raw"] > 0 and result["medians"]["ours"] > 0
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
