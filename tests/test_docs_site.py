"""The documentation as a site: it builds without a warning, and no link in it leads nowhere."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import flask_websockets
from flask_websockets import testing
from flask_websockets.cli import commands

from .integration.conftest import launch

pytest.importorskip("sphinx")

ROOT = Path(__file__).parent.parent
#: Seconds for the whole site; it takes ten.
TIMEOUT = 110
#: What is written for GitHub, and links to files.
MARKDOWN = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("benchmarks/*.md")]
)
#: Without an underscore, as the package's own modules use them: not for users.
INTERNAL = {"link", "served", "stop_testing"}


class Page(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name == "id" and value:
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with every warning an error; a page in no table of contents is one."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", "-b", "html"]
    built = subprocess.run(
        [*command, str(ROOT / "docs"), str(target)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert built.returncode == 0, built.stderr
    return target


def test_every_link_leads_somewhere(site):
    """Each internal link has its page, its anchor, its picture or its file."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 30
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path
            if parts.path:
                root = site if parts.path.startswith("/") else path.parent  # 404.html
                target = (root / unquote(parts.path).lstrip("/")).resolve()
            anchor = unquote(parts.fragment)
            known = pages[target].anchors if anchor and target in pages else {anchor}
            if not target.exists() or anchor not in known:
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files(path):
    """What README and its like link to, or show, is in the checkout."""
    text = path.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'\bsrc="([^"]+)"', text)
    for target in targets:
        if not urlsplit(target).scheme:
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.browser
def test_no_page_is_wider_than_its_window(site, tmp_path):
    """On a phone a table or a block of code scrolls in its box; the page does not."""
    with launch(tmp_path) as browser:
        page = browser.open("about:blank")
        wide = []
        for path in sorted(site.rglob("*.html")):
            page.go(path.as_uri())
            for width in (320, 1280):
                page.resize(width, 800)
                if page.run("document.documentElement.scrollWidth > innerWidth"):
                    wide.append(f"{path.relative_to(site)} at {width} px")
        assert wide == []


# -- the reference --------------------------------------------------------------------------------


def members(kind: type) -> set[str]:
    """The public methods, properties and attributes of a class, inherited ones included.

    Only those of this package: an exception's or a test client's others are documented elsewhere.
    """
    own = [base for base in kind.__mro__ if base.__module__.startswith("flask_websockets")]
    named = {name for base in own for name in [*vars(base), *inspect.get_annotations(base)]}
    return {name for name in named if not name.startswith("_")} - INTERNAL


PUBLIC = {
    f"flask_websockets.{name}": getattr(flask_websockets, name) for name in flask_websockets.__all__
}
#: They are made by test_client(), and need not be imported.
TESTING = {
    "flask_websockets.testing.WebSocketClient": {"websocket_connect"},
    "flask_websockets.testing.ClientConnection": members(testing.ClientConnection),
}


def test_every_public_member_is_in_the_reference(site):
    """Each class, method, attribute and signal can be linked to; and nothing else can."""
    expected = set(PUBLIC) | set(TESTING) | {"module-flask_websockets"}
    for name, value in PUBLIC.items():
        if inspect.isclass(value):
            expected |= {f"{name}.{member}" for member in members(value)}
    for name, documented in TESTING.items():
        expected |= {f"{name}.{member}" for member in documented}
    expected |= {f"flask_websockets.Subscription.{name}" for name in ("__enter__", "__aenter__")}
    anchors = Page(site / "reference" / "api.html").anchors
    assert {anchor for anchor in anchors if "flask_websockets" in anchor} == expected


@pytest.mark.parametrize(
    ("command", "option"),
    [(name, option) for name, command in commands.commands.items() for option in command.params],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_option_is_in_the_reference(site, command, option):
    """By each of its names, with its default; a choice with all that can be chosen."""
    anchors = Page(site / "reference" / "api.html").anchors
    for name in option.opts:
        assert f"cmdoption-flask-websockets-{command}-{name.lstrip('-').lower()}" in anchors
    text = (ROOT / "docs" / "reference" / "api.rst").read_text()
    section = text[text.index(f".. program:: flask websockets {command}") :]
    entry = section[section.index(f".. option:: {option.opts[0]}") :].split("\n.. ")[0]
    default = re.search(r"Default:\s+(?:``(.+?)``|(off|none))", entry)
    assert default is not None, "it says no default"
    value = commands.commands[command].make_context(command, []).params[option.name]
    shown = {None: "none", False: "off"}.get(value, str(value))
    assert (default[1] or default[2]) == shown
    for choice in getattr(option.type, "choices", ()):
        assert f"``{choice}``" in entry


def test_no_option_is_invented():
    """The reference lists as many options as there are."""
    text = (ROOT / "docs" / "reference" / "api.rst").read_text()
    listed = re.findall(r"^\.\. option:: (--[\w-]+)", text, re.MULTILINE)
    assert listed == [
        option.opts[0] for name in ("serve", "routes") for option in commands.commands[name].params
    ]
