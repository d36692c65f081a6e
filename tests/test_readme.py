"""What README and CONTRIBUTING quote stands where they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: A row of the promises' table in benchmarks/README.md, and what README.md says of it.
FIGURES = {
    ("sync echo, 50", "raw ASGI"): "{} of raw ASGI, ",
    ("sync echo, 50", "flask-sock"): "{} times flask-sock",
    ("async echo, 50", "raw ASGI"): "| {} of raw ASGI |",
    ("fan-out to 2000", "raw ASGI"): "to 2,000: {} times a loop over raw ASGI",
    ("fan-out to 2000, deflate", "raw ASGI"): "{} times with compression",
    ("fan-out to 1,000, one stuck", "without it"): "beside one that is stuck: {} |",
    ("HTTP small view", "gunicorn"): "{} times gunicorn's threads",
    ("HTTP small view", "asgiref"): "{} times plain asgiref",
}


def promises() -> dict[tuple[str, str], tuple[str, str]]:
    """Work and rival to the ratio that came, and the least that it should be."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    table = text[text.index("### Promises\n\n`python -m") : text.index("### With wsproto")]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (\S+) \| .+? \| (.+?) \| .+? \|$", table, re.M)
    return {(work, rival): (ratio, least) for work, rival, ratio, least in rows[1:]}


@pytest.mark.parametrize("row", FIGURES, ids=" ".join)
def test_the_readmes_figures_are_the_benchmarks(row):
    """Each ratio is the one that the benchmark printed, to the digits that are given."""
    before, after = FIGURES[row].split("{}")
    said = re.search(
        re.escape(before) + r"(\d+\.\d+)" + re.escape(after), (ROOT / "README.md").read_text()
    )
    assert said is not None, FIGURES[row]
    digits = len(said[1].partition(".")[2])
    assert said[1] == f"{float(promises()[row][0]):.{digits}f}"


def test_the_readme_says_how_many_rows_fall_short():
    """It neither hides a row of the table nor invents one."""
    found = promises()
    short = [
        row
        for row, (ratio, least) in found.items()
        if re.fullmatch(r"[\d.]+", least) and float(ratio) < float(least)
    ]
    assert f"which one of the {len(found)} falls short" in (ROOT / "README.md").read_text()
    assert len(short) == 1


def quotations() -> list[tuple[str, str]]:
    """What CONTRIBUTING.md shows, and from where."""
    return re.findall(
        r"^From \[(\S+)\]\(\S+\):\n\n```\w+\n(.+?)^```$",
        (ROOT / "CONTRIBUTING.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )


@pytest.mark.parametrize(("name", "text"), quotations(), ids=[name for name, _ in quotations()])
def test_what_contributing_shows_is_real(name, text):
    """The good test, the good docstring and the good entry are the project's own."""
    assert text in (ROOT / name).read_text()


def test_contributing_shows_three():
    """All three are found by the test above."""
    assert len(quotations()) == 3
