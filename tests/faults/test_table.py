"""The table of scenarios in README.rst, and skips.py, speak of tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from .conftest import WAYS
from .skips import SKIPS, Skip

HERE = Path(__file__).parent
TESTS = HERE.parent

#: The scenarios that need no broker and are not benchmarks.
SCENARIOS = {*range(1, 14), 15, 16, 18, *range(26, 30), *range(31, 35), 36, 37, 38, 39, 40, 41, 42}

ROW = re.compile(r"^(\d+) .* (4|serve|bare|other) +(\S+\.py::\S+)$")


def rows() -> list[tuple[int, str, str]]:
    """The scenario, the ways to serve, and the test, of each line."""
    text = (HERE / "README.rst").read_text()
    table = text.partition(".. scenarios\n")[2].partition(".. end of scenarios")[0]
    found = []
    for line in table.strip().splitlines():
        if not line.startswith("=="):
            row = ROW.match(line)
            assert row is not None, line
            found.append((int(row[1]), row[2], row[3]))
    return found


def functions_of(file: Path) -> dict[str, ast.FunctionDef]:
    """A file's tests, by their names as in a node id."""
    found = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    found[f"{node.name}::{method.name}"] = method
    return found


def test_every_scenario_has_a_row() -> None:
    """No scenario is forgotten, and none is made up."""
    assert {scenario for scenario, _, _ in rows()} == SCENARIOS


@pytest.mark.parametrize("test", sorted({test for _, _, test in rows()}))
def test_it_is_there(test: str) -> None:
    """A test that proves a scenario exists."""
    file, _, name = test.partition("::")
    assert name in functions_of(TESTS / file)


@pytest.mark.parametrize("row", [row for row in rows() if row[2].startswith("faults/")])
def test_it_runs_where_the_row_says(row: tuple[int, str, str]) -> None:
    """A test of this directory runs on all four ways; where bare cannot pass, skips.py says so."""
    _, ways, test = row
    file, _, name = test.partition("::")
    function = functions_of(TESTS / file)[name]
    on_all = {"way", "scene", "scenes", "server"} & {each.arg for each in function.args.args}
    skipped = {skip.case for skip in SKIPS if skip.ways == "bare-.*"}
    if ways == "4":
        assert on_all
        assert test.removeprefix("faults/") not in skipped
    elif ways != "other":  # a server of the test's own
        assert ways == "serve"
        assert not on_all or test.removeprefix("faults/") in skipped


@pytest.mark.parametrize("skip", SKIPS, ids=lambda skip: str(skip.scenario))
def test_skips(skip: Skip) -> None:
    """Each names a test of its scenario, some of the ways, and a test that looks at the rest."""
    ways = [way for way in WAYS if re.fullmatch(skip.ways, way)]
    assert ways
    assert all(way.startswith("bare") for way in ways)
    tests = {
        test.removeprefix("faults/") for scenario, _, test in rows() if scenario == skip.scenario
    }
    assert {skip.case.partition("[")[0], skip.survives} <= tests
    assert skip.reason
    assert skip.helps
