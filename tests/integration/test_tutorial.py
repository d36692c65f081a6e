"""The tutorial, followed as a reader follows it: from an empty folder to a served, tested poll."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from websockets.sync.client import ClientConnection, connect

from .browser import Browser, Page
from .conftest import ROOT, START_TIMEOUT, ServerProcess, free_port
from .waiting import wait_until

TUTORIAL = ROOT / "docs" / "tutorial"
PAGE = TUTORIAL / "index.rst"
POLL = ROOT / "examples" / "poll"
#: What a reader replaces by their own path.
CHECKOUT = "/path/to/the/checkout"
#: Seconds for one message or answer.
TIMEOUT = 10.0
#: Seconds for a command that is no server; making an environment takes most of it.
COMMAND_TIMEOUT = 90.0
#: Seconds for what a page shows.
PAGE_TIMEOUT = 20.0


# -- the page ------------------------------------------------------------------------------------


@dataclass
class Shell:
    """A block of commands."""

    section: str
    commands: list[str]


@dataclass
class File:
    """A file to save."""

    section: str
    source: str
    options: dict[str, str]


def parts() -> list[Shell | File]:
    """What the page has its reader do, in order, each with the title that it stands under."""
    found: list[Shell | File] = []
    section = ""
    lines = PAGE.read_text().splitlines()
    for number, line in enumerate(lines):
        if line and set(line) in ({"="}, {"-"}):
            section = lines[number - 1]
        directive = re.fullmatch(r"\.\. (code-block|literalinclude):: (\S+)", line)
        if directive is None:
            continue
        body = []
        for following in lines[number + 1 :]:
            if following and not following.startswith(" "):
                break
            body.append(following)
        text = textwrap.dedent("\n".join(body)).strip()
        if directive[1] == "literalinclude":
            options = dict(re.findall(r"^:([\w-]+): (.*)$", text, re.MULTILINE))
            found.append(File(section, directive[2], options))
        elif directive[2] == "bash":
            # What stands behind a # is for Windows.
            commands = [command.partition("  #")[0].strip() for command in text.splitlines()]
            found.append(Shell(section, commands))
        else:
            raise AssertionError(f"Nobody follows a block of {directive[2]}.")
    return found


# -- the reader ----------------------------------------------------------------------------------


class Reader:
    """Somebody with a terminal for commands, one for a server, and an editor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder  # where the poll's own folder is made
        self._log_path = folder / "server.log"
        self._environ = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
        }
        # "python3" is the interpreter that runs this.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.port = free_port()
        self._environ |= {
            "PATH": path,
            "PYTHONUNBUFFERED": "1",
            "FLASK_RUN_PORT": str(self.port),  # so that two runs of this test can be at once
            "FLASK_WEBSOCKETS_SERVE_PORT": str(self.port),
        }
        self._setup = ""  # what every new shell has to be told: folder and environment
        self.server: subprocess.Popen[bytes] | None = None
        self.output = ""  # of the last command

    @property
    def poll(self) -> Path:
        return self._folder / "live-poll"

    def do(self, part: Shell | File) -> None:
        if isinstance(part, File):
            self._save(part)
            return
        for command in part.commands:
            self._type(command)

    def _save(self, file: File) -> None:
        before = self.starts()
        target = self.poll / file.options["caption"]
        changed = not target.exists() or target.read_text() != (TUTORIAL / file.source).read_text()
        shutil.copy(TUTORIAL / file.source, target)
        if target.name == "app.py" and self.server is not None and changed:
            wait_until(lambda: self.starts() > before, START_TIMEOUT, "the reload")

    def _type(self, command: str) -> None:
        if command.startswith("pip install "):
            self._install(shlex.split(command)[2:])
        elif re.match(r"(flask|uvicorn) ", command):
            self.stop_server()
            self._start(command)
        else:
            command = command.replace(CHECKOUT, shlex.quote(str(ROOT)))
            self._run(command)
            if re.match(r"(cd|\.) ", command):
                self._setup += command + "\n"

    def _run(self, command: str) -> None:
        done = subprocess.run(
            ["bash", "-ec", self._setup + command],
            cwd=self._folder,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_TIMEOUT,
        )
        self.output = done.stdout
        assert done.returncode == 0, f"$ {command}\n{done.stdout}"

    def _install(self, requirements: list[str]) -> None:
        """Have the reader's environment see what is installed here: nothing is downloaded."""
        for requirement in requirements:
            path, extra = re.fullmatch(r"([^\[]+)(?:\[(\w+)\])?", requirement).groups()
            if path == CHECKOUT:
                project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
                assert extra is None or extra in project["optional-dependencies"]
                names = ["flask", "uvicorn"]
            else:
                names = [path]
            self._run("python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))'")
            link = Path(self.output.strip()) / "installed.pth"
            assert self.poll in link.parents, "the environment is not active"
            # Not the paths themselves: what is installed in place has such files of its own.
            folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
            lines = [f"import site; site.addsitedir({folder!r})" for folder in folders]
            # The tests have another reloader installed, which the reader has not.
            lines.append("import sys; sys.modules['watchdog'] = None")
            link.write_text("\n".join(lines))
            for name in names:
                self._add_command(name)

    def _add_command(self, name: str) -> None:
        script = self.poll / ".venv" / "bin" / name
        script.write_text(
            f"#!{script.with_name('python')}\n"
            "import sys\n"
            "from importlib.metadata import entry_points\n"
            f"(command,) = entry_points(group='console_scripts', name={name!r})\n"
            "sys.exit(command.load()())\n"
        )
        script.chmod(0o755)

    # -- the server's terminal --------------------------------------------------------------------

    def _start(self, command: str) -> None:
        command = command.replace("--port 8000", f"--port {self.port}")
        with self._log_path.open("wb") as log:
            self.server = subprocess.Popen(
                ["bash", "-ec", f"{self._setup}exec {command}"],
                cwd=self._folder,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # CTRL+C goes to the reloader's child as well
            )

    def log(self) -> str:
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def starts(self) -> int:
        """How often the development server has started so far."""
        return self.log().count("Debugger is active")

    def stop_server(self) -> None:
        """Press CTRL+C."""
        if self.server is None:
            return
        os.killpg(self.server.pid, signal.SIGINT)
        self.server.wait(30)
        self.server = None
        assert "Traceback" not in self.log(), self.log()

    def close(self) -> None:
        if self.server is not None:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait(10)

    # -- the browser ------------------------------------------------------------------------------

    def fetch(self, path: str = "/", data: dict[str, str] | None = None) -> str:
        """Get a page, or post a form and follow the redirect; wait for the server if need be."""
        url = f"http://127.0.0.1:{self.port}{path}"

        def answer() -> str | None:
            assert self.server is not None and self.server.poll() is None, self.log()
            try:
                with urlopen(url, data and urlencode(data).encode(), timeout=TIMEOUT) as response:
                    text: str = response.read().decode()
                    return text
            except ConnectionError:
                return None
            except OSError as error:
                if isinstance(getattr(error, "reason", None), ConnectionError):
                    return None
                raise

        found: str = wait_until(answer, START_TIMEOUT, "the server's answer")
        return found

    def vote(self, choice: str) -> str:
        return self.fetch("/vote", {"choice": choice})

    def connect(self) -> ClientConnection:
        return connect(f"ws://127.0.0.1:{self.port}/ws", proxy=None, open_timeout=TIMEOUT)


@pytest.fixture
def reader(tmp_path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    yield reader
    reader.close()


def receive_until(ws: ClientConnection, expected: Any) -> None:
    """Receive until this message comes."""
    while json.loads(ws.recv(timeout=TIMEOUT)) != expected:
        pass


# -- what the reader sees, section by section ----------------------------------------------------


def look_at_the_form(reader: Reader) -> None:
    """A vote comes back as a page with a longer bar; style and icon are there."""
    assert 'value="Tea" style="--count: 0"' in reader.fetch()
    page = reader.vote("Tea")
    assert 'value="Tea" style="--count: 1"' in page
    assert "--total: 1" in page
    assert "<script" not in page
    for path in re.findall(r'href="(/static/.*?)"', page):
        assert reader.fetch(path)


def look_at_the_websocket(reader: Reader) -> None:
    """The votes come again and again, and with them what was voted meanwhile."""
    assert '"/static/poll.js"' in reader.fetch()
    with reader.connect() as ws:
        assert json.loads(ws.recv(timeout=TIMEOUT)) == {}
        assert json.loads(ws.recv(timeout=TIMEOUT)) == {}
        reader.vote("Tea")
        receive_until(ws, {"Tea": 1})


def look_at_the_channel(reader: Reader) -> None:
    """A vote reaches everybody at once, one message each."""
    reader.fetch()
    with reader.connect() as one:
        assert json.loads(one.recv(timeout=TIMEOUT)) == {}
        reader.vote("Tea")
        assert json.loads(one.recv(timeout=TIMEOUT)) == {"Tea": 1}
        with reader.connect() as other:
            for ws in (one, other):
                assert json.loads(ws.recv(timeout=TIMEOUT)) == {"Tea": 1}
            reader.vote("Water")
            for ws in (one, other):
                assert json.loads(ws.recv(timeout=TIMEOUT)) == {"Tea": 1, "Water": 1}


def look_at_the_whole(reader: Reader) -> None:
    """Everybody is told who watches, and a server that was stopped can be started again."""
    for _ in range(2):
        reader.fetch()
        with reader.connect() as one, reader.connect() as other:
            for ws in (one, other):
                assert json.loads(ws.recv(timeout=TIMEOUT)) == {"mine": None}
            reader.vote("Water")
            for ws in (one, other):
                receive_until(ws, {"votes": {"Water": 1}, "watching": 2})
        reader.do(Shell("", ["flask run --debug"]))


def look_at_the_test(reader: Reader) -> None:
    """The reader's test passes."""
    tests = (TUTORIAL / "step4" / "test_app.py").read_text().count("\ndef test_")
    assert re.search(rf"\b{tests} passed\b", reader.output), reader.output
    assert "failed" not in reader.output


def look_at_production(reader: Reader) -> None:
    """Page and WebSocket are served."""
    assert "What are you drinking?" in reader.fetch()
    with reader.connect() as ws:
        assert json.loads(ws.recv(timeout=TIMEOUT)) == {"mine": None}


#: Title of a section to what is looked at after each of its servers, or at its end.
LOOKS: dict[str, Callable[[Reader], None]] = {
    "Step 1: a form": look_at_the_form,
    "Step 2: a WebSocket": look_at_the_websocket,
    "Step 3: a channel": look_at_the_channel,
    "Step 4: ready for others": look_at_the_whole,
    "Test it": look_at_the_test,
    "Serve it": look_at_production,
}


def test_a_reader_gets_a_tested_live_poll(reader):
    """Every command works, every file is saved, and each section shows what it promises."""
    page = parts()
    looked = []
    for number, part in enumerate(page):
        reader.do(part)
        following = page[number + 1].section if number + 1 < len(page) else ""
        if part.section in LOOKS and (following != part.section or part.section == "Serve it"):
            LOOKS[part.section](reader)
            looked.append(part.section)
    reader.stop_server()
    assert looked == [*LOOKS, "Serve it"]  # by two servers
    assert {part.section for part in page} == {"Install", *LOOKS}


# -- in a browser --------------------------------------------------------------------------------


def open_twice(browser: Browser, server: ServerProcess) -> tuple[Page, Page]:
    return browser.open(server.url()), browser.open(server.url())


def wait_for_tea(page: Page, votes: int) -> None:
    """Wait until the page shows these votes, all for tea, and a bar as long as they are."""
    tea = 'document.querySelector("button[value=Tea]")'
    page.wait_for(
        f"{tea}.textContent.trim().endsWith(' {votes}')"
        f" && document.querySelector('#total').textContent === '{votes}'"
        f" && Math.abs(parseFloat(getComputedStyle({tea}, '::before').width)"
        f" - {tea}.clientWidth * {min(votes, 1)}) < 1",
        PAGE_TIMEOUT,
    )


def vote_for_tea(page: Page) -> None:
    page.run("window.__kept = true")
    page.run('document.querySelector("button[value=Tea]").focus()')
    page.press("Enter", "\r")


@pytest.fixture
def start_step(start_server, tmp_path) -> Callable[[int], ServerProcess]:
    """Serve one step as the page does, with the files that its reader has by then."""

    def start(number: int) -> ServerProcess:
        folder = tmp_path / f"step{number}"
        shutil.copytree(TUTORIAL / f"step{number}", folder)
        shutil.copytree(TUTORIAL / "static", folder / "static", dirs_exist_ok=True)
        command = [sys.executable, "-m", "flask", "--app", str(folder / "app"), "run"]
        return start_server("", [*command, "--port", "{port}"])

    return start


@pytest.mark.browser
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_steps_in_a_browser(number, start_step, browser):
    """What moves by itself, and which pages are loaded anew, is what each step says."""
    here, there = open_twice(browser, start_step(number))
    for page in (here, there):
        wait_for_tea(page, 0)
    vote_for_tea(here)
    wait_for_tea(here, 1)
    kept = here.run("window.__kept === true")
    assert kept == (number == 3), "the page was loaded anew" if number == 3 else "it was not"
    if number == 1:
        there.go(there.run("location.href"))
    wait_for_tea(there, 1)
    vote_for_tea(there)
    if number > 1:
        wait_for_tea(here, 2)
    wait_for_tea(there, 2)
    for page in (here, there):
        assert page.errors == []


# -- the files -----------------------------------------------------------------------------------


def test_the_example_is_the_last_step():
    """examples/poll is what the reader has at the end, file by file."""
    step = TUTORIAL / "step4"
    files = {
        **{path.relative_to(step): path for path in step.rglob("*")},
        **{path.relative_to(TUTORIAL): path for path in (TUTORIAL / "static").rglob("*")},
    }
    example = {path.relative_to(POLL): path for path in POLL.rglob("*") if path.is_file()}
    expected = {
        name: path.read_text()
        for name, path in files.items()
        if path.is_file() and "__pycache__" not in name.parts and name.name != "test_app.py"
    }
    found = {
        name: path.read_text()
        for name, path in example.items()
        if "__pycache__" not in name.parts and name.name != "README.md"
    }
    assert found == expected


def test_every_file_of_a_step_is_on_the_page():
    """What a step has and the step before has not, is saved in it; and under its own path."""
    saved = {part.source: part for part in parts() if isinstance(part, File)}
    for number in range(1, 5):
        step = TUTORIAL / f"step{number}"
        for path in step.rglob("*"):
            if not path.is_file() or "__pycache__" in path.parts:
                continue
            name = str(path.relative_to(step))
            before = TUTORIAL / f"step{number - 1}" / name
            source = f"step{number}/{name}"
            if before.is_file() and before.read_text() == path.read_text():
                assert source not in saved, f"{source} is as it was"
            else:
                assert saved.pop(source).options["caption"] == name
    assert saved == {}


def numbers(ranges: str) -> set[int]:
    """``"1-3,7"`` as numbers."""
    found = set()
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


@pytest.mark.parametrize(
    "file",
    [part for part in parts() if isinstance(part, File)],
    ids=lambda file: file.source,
)
def test_new_lines_are_marked(file):
    """The lines that stand out are those that the step before does not have, blank ones aside."""
    new = (TUTORIAL / file.source).read_text().splitlines()
    number = int(file.source[len("step")])
    old = TUTORIAL / f"step{number - 1}" / file.options["caption"]
    if not old.exists():
        assert "emphasize-lines" not in file.options
        return
    matcher = difflib.SequenceMatcher(None, old.read_text().splitlines(), new, autojunk=False)
    changed = {
        line
        for kind, _, _, start, end in matcher.get_opcodes()
        if kind in ("insert", "replace")
        for line in range(start + 1, end + 1)
        if new[line - 1].strip()
    }
    marked = {line for line in numbers(file.options["emphasize-lines"]) if new[line - 1].strip()}
    assert marked == changed


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_step_is_short(number):
    """Nobody has to read more than 60 lines of Python at once."""
    assert len((TUTORIAL / f"step{number}" / "app.py").read_text().splitlines()) <= 60
