"""No code block of the documentation goes unchecked: each language and program has its check here.

Python is run by ``test_docs.py`` and others; what a reader types is read by the program's own
parser; JavaScript is parsed by a browser; what is shown as output is the output. A block in
another language, or a command of another program, fails until it has a check.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import pytest
import uvicorn
import yaml
from flask.cli import FlaskGroup
from gunicorn.config import Config as GunicornConfig
from packaging.requirements import Requirement
from sphinx.cmd.build import get_parser as sphinx_parser

from flask_websockets.cli import commands as websockets_commands

from . import mutations, test_docs
from .faults import soak
from .integration.browser import Browser
from .integration.conftest import launch
from .test_readme import quotations

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "examples" / "deploy"
TESTS = Path(__file__).parent
#: Seconds for any wait of a test's own.
TIMEOUT = 60.0

RST = [*sorted((ROOT / "docs").rglob("*.rst")), *sorted(TESTS.rglob("*.rst"))]
MARKDOWN = [
    path for pattern in ("*.md", "*/*.md", "examples/*/*.md") for path in sorted(ROOT.glob(pattern))
]
#: What a page calls the reader's own program, application and checkout.
READERS = ("app", "myapp", "app.py")
CHECKOUT = "/path/to/the/checkout"
#: Output that a page shows, or a drawing, to the test that compares it.
TEXTS = {
    "docs/explanation/architecture.rst": "test_docs.py::test_the_states_are_those_of_the_code",
    "docs/how-to/routes.rst": "test_docs_blocks.py::test_the_routes_are_shown_so",
    "docs/reference/errors.rst": "test_errors_page.py::test_the_tree_is_the_modules",
}
#: Files that pages include, to the test that runs them. Those of examples are looked for.
INCLUDED = {
    "docs/how-to/jobs/": "test_jobs.py",
    "docs/how-to/moving/": "test_moving.py",
    "docs/tutorial/": "integration/test_tutorial.py",
    "examples/deploy/": "integration/test_deploy.py",
}
#: The tests that run an example, where it has none named after it.
EXAMPLES = {"chat": "integration/test_chat.py", "clock": "test_docs.py", "echo": "test_docs.py"}


#: Variables of the environment that an example or a deployment file names.
NAMED_BY_EXAMPLES = {
    name
    for path in [*ROOT.glob("examples/*/*.py"), *DEPLOY.iterdir()]
    for name in re.findall(r"\b[A-Z][A-Z_]+\b", path.read_text())
}
#: The programs whose commands are checked in the middle of a sentence as well.
INLINE_PROGRAMS = ("flask", "gunicorn", "pip", "pytest", "python", "serve", "tox", "uvicorn")


@dataclass(frozen=True)
class Block:
    """One block of a page; *line* is where it begins."""

    page: str
    line: int
    language: str
    text: str


def find_rst(path: Path) -> Iterator[Block]:
    """Every block of a page in reStructuredText, ``::`` included."""
    marks = re.compile(
        r"^(?P<indent> *)(?:\.\. (?P<kind>code-block|sourcecode|code|parsed-literal|prompt)::"
        r" *(?P<language>\S*)|(?! *\.\. ).*::)\n(?P<body>(?:(?P=indent) +\S.*\n|\s*\n)*)",
        re.MULTILINE,
    )
    text = path.read_text()
    for found in marks.finditer(text):
        body = textwrap.dedent(found["body"]).strip("\n")
        if body:
            options = re.compile(r"\A(?::[\w-]+:.*\n)+\n")
            language = found["language"] or found["kind"] or "::"
            yield Block(
                str(path.relative_to(ROOT)),
                text.count("\n", 0, found.start()) + 1,
                language,
                options.sub("", body + "\n"),
            )


def find_markdown(path: Path) -> Iterator[Block]:
    """Every block of a page in Markdown: those in fences, and indented ones, which are shell."""
    name, fence, start, lines = str(path.relative_to(ROOT)), None, 0, list[str]()
    before = ""
    for number, line in enumerate([*path.read_text().splitlines(), ""], 1):
        mark = re.match(r" *```+(.*)", line)
        if fence is None and mark is None and line.startswith("    ") and (lines or not before):
            start = start if lines else number
            lines.append(line)
            before = line
            continue
        if fence is None and lines and line:
            yield Block(name, start, "sh", textwrap.dedent("\n".join(lines)) + "\n")
            lines = []
        if fence is None and mark is not None:
            fence, start = mark[1].strip() or "a fence without a language", number
        elif fence is not None and mark is not None:
            yield Block(name, start, fence, textwrap.dedent("\n".join(lines)) + "\n")
            fence, lines = None, []
        elif fence is not None:
            lines.append(line)
        before = line
    assert fence is None, f"{name}:{start}: this fence is not closed"
    if lines:
        yield Block(name, start, "sh", textwrap.dedent("\n".join(lines)) + "\n")


BLOCKS = [
    *(block for path in RST for block in find_rst(path)),
    *(block for path in MARKDOWN for block in find_markdown(path)),
]


# -- commands -------------------------------------------------------------------------------------


def check_file(name: str) -> None:
    """It is in the checkout, or is what the page has the reader write."""
    name = name.removeprefix(CHECKOUT).lstrip("/")
    assert name in READERS or (ROOT / name).exists(), f"there is no {name} in the checkout"


def check_application(name: str) -> None:
    """``app`` and the like, or a file of the checkout without its ending."""
    assert name in READERS or (ROOT / f"{name}.py").is_file(), f"no application is called {name}"


def check_click(command: click.Command, args: list[str], name: str) -> None:
    """The options, their choices and numbers, and the subcommand are click's."""
    context = click.Context(command, info_name=name)
    try:
        given, rest, order = command.make_parser(context).parse_args(list(args))
        for parameter in order:
            if isinstance(parameter.type, (click.Choice, type(click.INT), type(click.FLOAT))):
                parameter.type_cast_value(context, given[parameter.name or ""])
    except click.UsageError as error:
        pytest.fail(f"{name}: {error.format_message()}")
    if isinstance(app := given.get("app"), str):
        check_application(app.partition(":")[0])
    if isinstance(command, click.Group):
        assert rest, f"{name} needs a subcommand"
        assert rest[0] in command.commands, f"{name} has no subcommand {rest[0]}"
        check_click(command.commands[rest[0]], rest[1:], f"{name} {rest[0]}")
    else:
        assert rest == [] or set(rest) <= {given.get("app")}, f"{name} takes no {rest}"


def check_flask(args: list[str]) -> None:
    group = FlaskGroup()
    group.add_command(websockets_commands)
    if args[0] == "--app":
        check_application(args[1].partition(":")[0])
        args = args[2:]
    check_click(group, args, "flask")


def check_argparse(parse: Callable[[], object], args: list[str]) -> None:
    """Have a program of ours read its command line."""
    before, sys.argv = sys.argv, ["program", *args]
    try:
        parse()
    except SystemExit as error:
        pytest.fail(f"{args}: {error}; see above for its usage")
    finally:
        sys.argv = before


def check_benchmarks(args: list[str]) -> None:
    for name in ("picows", "uvloop"):
        pytest.importorskip(name, reason=f"the benchmark's client needs {name}")
    from benchmarks.__main__ import parse

    check_argparse(parse, args)


def parse_soak() -> None:
    """The soak's own parser, which its ``main`` makes, and no more of that."""

    class Parsed(Exception):
        pass

    def parsed(*args: object) -> None:
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(soak, "soak", parsed)
        soak.main()


MODULES: dict[str, Callable[[list[str]], object]] = {
    "benchmarks": check_benchmarks,
    "tests.faults.soak": lambda args: check_argparse(parse_soak, args),
    "tests.mutations": lambda args: check_argparse(lambda: mutations.selected(args), args),
    "venv": lambda args: check_words(args, {".venv"}),
}


@cache
def help_options(*command: str) -> set[str]:
    """The options that a program's ``--help`` names."""
    helped = subprocess.run(
        [*command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert helped.returncode == 0, helped.stderr
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", helped.stdout))


def check_python(args: list[str]) -> None:
    if args[0] == "-m":
        assert args[1] in MODULES, f"add python -m {args[1]} to MODULES"
        MODULES[args[1]](args[2:])
    else:
        check_file(args[0])
        options = {arg.partition("=")[0] for arg in args[1:] if arg.startswith("-")}
        assert not options or options <= help_options(sys.executable, args[0]), args


def check_pip(args: list[str]) -> None:
    """Files exist, extras are ours, other names are requirements of the project's own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = [*TESTS.glob("*.txt"), *ROOT.glob("*/requirements.txt")]
    known = {
        Requirement(line.partition("#")[0]).name.lower()
        for line in "\n".join(path.read_text() for path in files).splitlines()
        if re.match(r"\w", line)
    } | {project["name"], "mypy", "ruff"}
    assert args.pop(0) == "install"
    while args:
        match args.pop(0):
            case "-q" | "-e":
                continue
            case "-r":
                assert (ROOT / args.pop(0)).is_file()
            case what:
                place, _, extras = what.removeprefix(CHECKOUT).rstrip("]").partition("[")
                assert place in ("", ".") or place.lower() in known, f"pip: what is {what}?"
                if extras:
                    assert set(extras.split(",")) <= set(project["optional-dependencies"]), what


def check_pytest(args: list[str]) -> None:
    """Options are known; paths exist, markers are registered."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {marker.partition(":")[0] for marker in settings["markers"]}
    values = {"-m": markers, "--dist": {"loadfile"}, "-n": {"2", "3"}}
    arguments = iter(args)
    for argument in arguments:
        if argument.startswith("-"):
            option, _, _ = argument.partition("=")
            assert option in help_options(sys.executable, "-m", "pytest", "tests/faults"), (
                f"pytest has no {option}"
            )
            if option in values and "=" not in argument:
                assert next(arguments) in values[option], argument
        else:
            assert (ROOT / argument.partition("::")[0]).exists(), argument


def check_tox(args: list[str]) -> None:
    """The environment is one of tox.ini; what follows ``--`` goes to what it runs."""
    if args == ["list"]:
        return
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    names = {name.strip() for name in tox["tox"]["env_list"].split(",")}
    names |= {section.removeprefix("testenv:") for section in tox.sections()}
    options, _, more = (" ".join(args)).partition(" -- ")
    assert re.fullmatch(r"-e \S+", options), options
    name = options.removeprefix("-e ")
    assert name in names, f"tox.ini has no {name}"
    if more:
        (command,) = tox[f"testenv:{name}"]["commands"].strip().splitlines()
        check_command(shlex.split(command.replace("{posargs}", more)))


def check_uvicorn(args: list[str]) -> None:
    check_click(uvicorn.main, args, "uvicorn")
    if "--ws" in args:  # to click a mere string
        assert args[args.index("--ws") + 1] in uvicorn.config.WS_PROTOCOLS


def check_gunicorn(args: list[str]) -> None:
    parsed: argparse.Namespace = GunicornConfig().parser().parse_args(args)
    for name in parsed.args:
        check_application(name.partition(":")[0])


def check_words(args: list[str], known: set[str]) -> None:
    """A command that no parser of ours reads: whatever it may be given is written out."""
    assert set(args) <= known, f"{set(args) - known}: see whether it is right, and add it"


def check_systemctl(args: list[str]) -> None:
    verb, *units = args
    assert verb in ("daemon-reload", "enable", "reload")
    for unit in units:
        assert unit in ("--now", "nginx") or (DEPLOY / f"{unit}.service").is_file(), unit


def check_containers(args: list[str]) -> None:
    """``podman`` and ``docker``: the file exists, the options are those that were tried."""
    if "-f" in args:
        check_file(args[args.index("-f") + 1])
    known = "build --format docker -t chat . run --read-only --tmpfs /tmp --cap-drop all "
    known += "--pids-limit 12000 --stop-timeout 30 -p 8000:8000 compose up --build --detach -f"
    check_words([arg for arg in args if not arg.startswith("examples/")], {*known.split()})


def check_copy(args: list[str]) -> None:
    *sources, target = [arg for arg in args if arg != "-r"]
    for source in sources:
        check_file(source)
    assert target in (".", "/etc/systemd/system/", "/etc/nginx/conf.d/chat.conf")


def check_sphinx(args: list[str]) -> None:
    parsed = sphinx_parser().parse_args(args)
    assert (ROOT / parsed.sourcedir / "conf.py").is_file()
    assert f"/{parsed.outputdir}/".startswith("/docs/_build/")  # in .gitignore


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    ".": lambda args: check_words(args, {".venv/bin/activate"}),
    "cd": lambda args: check_words(args, {"live-poll", "/opt/flask-websockets"}),
    "cp": check_copy,
    "docker": check_containers,
    "flask": check_flask,
    "gunicorn": check_gunicorn,
    "mkdir": lambda args: check_words(args, {"live-poll", "templates"}),
    "pip": check_pip,
    "podman": check_containers,
    "pytest": check_pytest,
    "python": check_python,
    "python3": check_python,
    "sphinx-build": check_sphinx,
    "serve": lambda args: check_flask(["websockets", "serve", *args]),  # short for it, in a text
    "systemctl": check_systemctl,
    "tox": check_tox,
    "uvicorn": check_uvicorn,
}


def check_command(words: list[str]) -> None:
    """One command: what is set for it, its program, its arguments."""
    while re.match(r"[A-Z_]+=", words[0]):
        name = words.pop(0).partition("=")[0]
        assert name in NAMED_BY_EXAMPLES, f"nothing below examples reads {name}"
    program = os.path.basename(words[0])
    assert program in PROGRAMS, (
        f"Nothing checks the program {program}. Add it to PROGRAMS in {Path(__file__).name}, with "
        "a function that has its arguments read by its own parser."
    )
    PROGRAMS[program](words[1:])


def check_shell(block: Block) -> None:
    """Each command of each line; comments are for the reader."""
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word not in ("&&", "||", ";", "|"):
                command.append(word)
            elif command:
                check_command(command)
                command = []


# -- the other languages --------------------------------------------------------------------------


def check_python_block(block: Block) -> None:
    """It is one of those that a test runs, or quotes from a file that runs."""
    path = ROOT / block.page
    if path.suffix == ".md":
        quoted = any(block.text == text for _, text in map(dedented, quotations()))
        assert quoted or block.page == "README.md", "quote a file, as CONTRIBUTING.md does"
    elif path in test_docs.PAGES:
        assert block.text.strip() in [code.strip() for code in test_docs.blocks(path)]
    else:
        assert block.page == "docs/quickstart.rst"  # integration/test_quickstart.py serves it
    ast.parse(block.text)


def dedented(quotation: tuple[str, str]) -> tuple[str, str]:
    name, text = quotation
    return name, textwrap.dedent(text)


def check_text(block: Block) -> None:
    """A test compares it."""
    assert block.page in TEXTS, f"say in TEXTS of {Path(__file__).name} which test compares it"
    assert_test_exists(TEXTS[block.page])


def check_quotation(block: Block) -> None:
    assert block.text in [text for _, text in quotations()]


def check_ini(block: Block) -> None:
    configparser.ConfigParser(interpolation=None, strict=False).read_string(block.text)


def check_scripts(block: Block) -> None:
    """The browser's turn is below; here it is seen that there is something for it."""
    assert any(script in SCRIPTS for script in scripts_of(block)), "no script was found in it"


LANGUAGES: dict[str, Callable[[Block], object]] = {
    "bash": check_shell,
    "html": check_scripts,
    "ini": check_ini,
    "javascript": check_scripts,
    "json": lambda block: json.loads(block.text),
    "md": check_quotation,
    "python": check_python_block,
    "sh": check_shell,
    "text": check_text,
    "toml": lambda block: tomllib.loads(block.text),
    "yaml": lambda block: yaml.safe_load(block.text),
}


def scripts_of(block: Block) -> list[str]:
    if block.language == "javascript":
        return [block.text]
    if block.language == "html":
        return re.findall(r"<script\b[^>]*>(.*?)</script>", block.text, re.DOTALL)
    return []


SCRIPTS = [script for block in BLOCKS for script in scripts_of(block)]


def assert_test_exists(name: str) -> None:
    file, _, function = name.partition("::")
    assert f"def {function}(" in (TESTS / file).read_text(), f"there is no test {name}"


def id_of(block: Block) -> str:
    return f"{block.page}:{block.line}-{block.language}"


# -- the tests ------------------------------------------------------------------------------------


def test_every_block_is_found():
    """As many blocks as there are marks of any; another count sees what the parsers do not."""
    for path in RST:
        marks = len(re.findall(r"\.\. (?:code-block|sourcecode|code)::", path.read_text()))
        found = [b for b in BLOCKS if b.page == str(path.relative_to(ROOT)) and b.language != "::"]
        assert len(found) == marks, path
    for path in MARKDOWN:
        fences = len(re.findall(r"^ *```", path.read_text(), re.MULTILINE))
        assert fences % 2 == 0, path
    assert {block.language for block in BLOCKS} >= {"python", "bash", "sh", "javascript", "text"}


@pytest.mark.parametrize("block", BLOCKS, ids=id_of)
def test_every_block_is_checked(block):
    """By what its language says; a language without a check fails."""
    assert block.language in LANGUAGES, (
        f"Nothing checks blocks in {block.language}. Name another language, include a file of "
        f"examples/deploy, all of which are run, or add a check to LANGUAGES in "
        f"{Path(__file__).name}."
    )
    LANGUAGES[block.language](block)


IN_SENTENCE = re.compile(rf"(?<!`)(`{{1,2}})((?:{'|'.join(INLINE_PROGRAMS)}) [^`]+?)\1(?!`)")
INLINE = [
    pytest.param(" ".join(command.split()), id=f"{path.relative_to(ROOT)}-{number}")
    for path in [*RST, *MARKDOWN]
    for number, (_, command) in enumerate(IN_SENTENCE.findall(path.read_text()))
]


def test_commands_in_sentences_are_found():
    """The list is not empty for want of a match."""
    assert len(INLINE) > 50


@pytest.mark.parametrize("command", INLINE)
def test_commands_in_sentences_are_checked(command):
    """As those in blocks are."""
    check_shell(Block("", 0, "sh", command + "\n"))


@pytest.mark.parametrize(
    "command",
    [
        "flask --app app websockets serv",
        "flask --app app websockets serve --prot 80",
        "flask --app app websockets serve --port eighty",
        "flask --app examples/caht/app websockets serve",
        "uvicorn --timeout-gracefull-shutdown 15 app:asgi",
        "uvicorn --ws websocket app:asgi",
        "gunicorn --thread 100 --wat myapp:app",
        "pip install '.[faster]'",
        "pip install -r requirments.txt",
        "pip install flask-websocket",
        "pytest --fault tests/faults",
        "pytest tests/fualts",
        "pytest -m browsers",
        "python -m benchmarks promise",
        "python -m tests.mutations no-such-mutation",
        "python apps.py",
        "python examples/sensors/devices.py --device-count 200",
        "sphinx-build -q doc docs/_build/html",
        "tox -e fault",
        "tox -e soak -- --hours 1",
        "systemctl reload caht",
        "podman build -f examples/deploy/Dockerfile .",
        "cp examples/deploy/chat.unit /etc/systemd/system/",
        "CHAT_STIE=x docker compose up",
        "curl http://127.0.0.1:8000",
    ],
)
def test_what_is_wrong_is_seen(command):
    """A slip in any word of a command fails: the checks above can."""
    with pytest.raises((AssertionError, SystemExit, pytest.fail.Exception)):
        check_shell(Block("page", 1, "bash", command + "\n"))


def test_blocks_are_found_in_any_shape(tmp_path, monkeypatch):
    """Fences and indented blocks in Markdown, directives and ``::`` in reStructuredText."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    markdown, rst = tmp_path / "a.md", tmp_path / "a.rst"
    markdown.write_text("Do\n\n    one\n\n    two\n\n```sh\nthree\n```\n\n- in a\n  list\n")
    assert [(b.line, b.language, b.text) for b in find_markdown(markdown)] == [
        (3, "sh", "one\ntwo\n"),
        (7, "sh", "three\n"),
    ]
    rst.write_text(
        "Do::\n\n    one\n\n.. code-block:: bash\n    :name: x\n\n    two\n\n    three\n"
    )
    assert [(b.line, b.language, b.text) for b in find_rst(rst)] == [
        (1, "::", "one\n"),
        (5, "bash", "two\n\nthree\n"),
    ]


@pytest.mark.browser
def test_scripts_are_javascript(tmp_path):
    """Chromium can parse every script that a page shows."""
    with launch(tmp_path) as browser:
        assert_parsed(browser, "const 1 = 2;", wrong=True)
        for script in SCRIPTS:
            assert_parsed(browser, script)


def assert_parsed(browser: Browser, script: str, *, wrong: bool = False) -> None:
    parse = "(script) => { try { new Function(script); return ''; } catch (e) { return `${e}`; } }"
    found = browser.open("about:blank").run(f"({parse})({json.dumps(script)})")
    assert bool(found) == wrong, f"{found}\n{script}"


def test_the_readmes_program(monkeypatch):
    """What the README begins with serves two rooms, each with its own messages."""
    (program,) = [b for b in BLOCKS if (b.page, b.language) == ("README.md", "python")]
    module = types.ModuleType("myapp")
    monkeypatch.setitem(sys.modules, "myapp", module)  # Flask asks where it is
    exec(compile(program.text, "README.md", "exec", dont_inherit=True), module.__dict__)
    client = module.websockets.test_client()
    with (
        client.websocket_connect("/ws/tea", timeout=TIMEOUT) as one,
        client.websocket_connect("/ws/tea", timeout=TIMEOUT) as two,
        client.websocket_connect("/ws/coffee", timeout=TIMEOUT) as other,
    ):
        one.send("hello")
        assert [one.receive(), two.receive()] == ["hello", "hello"]
        other.send("alone")
        assert other.receive() == "alone"


def test_the_routes_are_shown_so(app, websockets):
    """The table of docs/how-to/routes is printed for such routes."""
    (shown,) = [b for b in BLOCKS if (b.page, b.language) == ("docs/how-to/routes.rst", "text")]
    command, _, expected = shown.text.partition("\n")
    check_shell(Block(shown.page, shown.line, "bash", command.removeprefix("$ ")))

    async def cursor(ws):
        """Nobody connects."""

    websockets.route("/cursor", max_message_bytes=1024)(cursor)
    websockets.route("/members/ws/<room>", endpoint="members.talk", subprotocols=["v2", "v1"])(
        lambda ws, room: None
    )
    websockets.route("/public", endpoint="public", origins="*")(lambda ws: None)
    printed = app.test_cli_runner().invoke(args=["websockets", "routes"])
    assert printed.output.strip() == expected.strip()


INCLUDES = sorted(
    {
        str((path.parent / target).resolve().relative_to(ROOT))
        for path in RST
        for target in re.findall(r"\.\. (?:literal)?include:: (\S+)", path.read_text())
    }
)


def example_test(name: str) -> Path:
    """The file that tests an example: named after it, or in the table."""
    candidates = [f"integration/test_{name}_example.py", f"integration/test_{name}.py"]
    found = [TESTS / EXAMPLES.get(name, ""), *(TESTS / each for each in candidates)]
    (first, *_) = [path for path in found if path.is_file()] or [None]
    assert first is not None, f"examples/{name} has no test: expected tests/{candidates[0]}"
    return first


def test_includes_are_found():
    """The list is not empty for want of a match."""
    assert len(INCLUDES) > 20


@pytest.mark.parametrize("included", INCLUDES)
def test_every_included_file_is_run(included):
    """A test file is named here or after the example, and names the folder or the file."""
    assert (ROOT / included).is_file()
    folder = next((folder for folder in INCLUDED if included.startswith(folder)), None)
    if folder is not None:
        source, name = (TESTS / INCLUDED[folder]).read_text(), Path(folder).name
    else:
        kind, name, *_ = Path(included).parts
        assert kind == "examples", (
            f"Nothing runs {included}. Put it into an example, or name its test in INCLUDED."
        )
        source = example_test(name).read_text()
    assert f'"{name}"' in source or f"examples/{name}" in source, f"no test runs {included}"


SHOWN = sorted(path.parent for path in ROOT.glob("examples/*/templates"))


def test_the_examples_with_a_page():
    """Those that the documentation shows first are there."""
    assert {"chat", "dashboard", "mixed", "poll", "sensors"} <= {example.name for example in SHOWN}


@pytest.mark.parametrize("example", SHOWN, ids=lambda example: example.name)
def test_an_example_with_a_page_is_tested_in_a_browser(example):
    """It has a README that says how to start it, and a test that looks at its page."""
    readme = (example / "README.md").read_text()
    assert f"flask --app examples/{example.name}/app websockets serve" in readme
    assert 10 <= len(readme.splitlines()) <= 25
    source = example_test(example.name).read_text()
    assert "@pytest.mark.browser" in source
    assert re.search(rf'photograph\(\w+, "{example.name}"\)', source)
