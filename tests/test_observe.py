"""The page about what to look at in production: its numbers, its view and its log lines."""

from __future__ import annotations

import re
import sys
import textwrap
import types
from dataclasses import fields
from pathlib import Path

import pytest
from flask import Flask

from flask_websockets import Stats, WebSockets

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "how-to" / "observe.rst").read_text()


def test_every_number_answers_a_question():
    """The table has each field of Stats once, and nothing else."""
    table = PAGE[PAGE.index(".. list-table::") : PAGE.index("Prometheus\n---")]
    looked_at = re.findall(r"^      - (`\w+`(?:,\s+`\w+`)*)$", table, re.MULTILINE)
    named = [name for cell in looked_at for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(field.name for field in fields(Stats))


def test_prometheus_reads_it(monkeypatch):
    """What the view answers is what Prometheus' own parser takes, number by number."""
    parser = pytest.importorskip("prometheus_client.parser")
    module = types.ModuleType("app")
    app = module.app = Flask("app")
    websockets = module.websockets = WebSockets(app)
    monkeypatch.setitem(sys.modules, "app", module)
    (code,) = re.findall(r"^\.\. code-block:: python\n((?:[ ]+.*\n|\n)+)", PAGE, re.MULTILINE)
    exec(compile(textwrap.dedent(code), "observe", "exec", dont_inherit=True), {"__name__": "x"})

    @websockets.route("/ws")
    def view(ws):
        ws.send("hello")
        ws.wait_closed()

    client = websockets.test_client()
    with client.websocket_connect("/ws") as ws:
        ws.receive()
        with client.get("/metrics") as answer:
            found = {
                sample.name: sample.value
                for family in parser.text_string_to_metric_families(answer.text)
                for sample in family.samples
            }
    assert set(found) == {f"websockets_{field.name}" for field in fields(Stats)}
    assert found["websockets_connections"] == found["websockets_view_threads"] == 1


def test_the_log_lines_are_ours():
    """Each line that the page quotes is one that the source writes."""
    quoted = re.findall(r"^`(.+)`\n    ", PAGE[PAGE.index("The log\n---") :], re.MULTILINE)
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    assert len(quoted) >= 5
    for line in quoted:
        assert line in joined, line
