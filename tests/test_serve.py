"""``websockets.run()`` and ``flask websockets serve``: what they refuse before they serve."""

from __future__ import annotations

import inspect
import os
import socket
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from flask import Flask

from flask_websockets import ConfigurationError, UsageError, WebSockets

from .integration.serving import make_certificate

#: Arguments of ``run`` and options of ``serve``, with their defaults.
DEFAULTS = {
    "host": "127.0.0.1",
    "port": 8000,
    "workers": 1,
    "separate_channels": False,
    "cert": None,
    "key": None,
    "reload": False,
    "forwarded_allow_ips": None,
    "compression": False,
    "pin_workers": False,
}


@pytest.fixture
def serve(app, websockets):
    """Run ``flask websockets serve``, which is not expected to serve."""

    def run(*options: str):
        return app.test_cli_runner().invoke(args=["websockets", "serve", *options])

    return run


@pytest.fixture
def busy():
    """A port on which somebody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


# -- the two of them ------------------------------------------------------------------------------


def test_the_arguments_of_run():
    """All but the application by name only, with these defaults."""
    parameters = inspect.signature(WebSockets.run).parameters
    assert list(parameters) == ["self", "app", *DEFAULTS]
    assert parameters["app"].default is None
    for name, default in DEFAULTS.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == default
        assert type(parameters[name].default) is type(default)


def test_the_options_of_serve_have_the_same_names(serve):
    """--help shows each of them."""
    result = serve("--help")
    assert result.exit_code == 0
    for name in DEFAULTS:
        assert f"--{name.replace('_', '-')}" in result.output
    words = result.output.replace(",", " ").split()
    assert {"-h", "-p"} <= set(words)


def test_the_commands_are_listed(app, websockets):
    """`flask websockets` names serve beside routes."""
    result = app.test_cli_runner().invoke(args=["websockets", "--help"])
    assert "serve" in result.output
    assert "routes" in result.output


# -- workers --------------------------------------------------------------------------------------


def test_serve_refuses_workers_with_channels_in_memory(serve):
    """A usage error that says what each process would have of its own, and the way out."""
    result = serve("--workers", "2", "--port", "0")
    assert result.exit_code == 2
    assert "--separate-channels" in result.output
    for word in ("channels", "limits", "counters"):
        assert word in result.output.lower()


def test_run_refuses_workers_with_channels_in_memory(websockets):
    """ConfigurationError, with the same text; the application need not be looked for first."""
    with pytest.raises(ConfigurationError) as refused:
        websockets.run(workers=2, port=0)
    assert "separate_channels" in str(refused.value)
    for word in ("channels", "limits", "counters"):
        assert word in str(refused.value).lower()


def test_nothing_is_pinned_where_that_cannot_be(serve, websockets, monkeypatch):
    """A usage error that says where it can."""
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    result = serve("--pin-workers", "--port", "0")
    assert result.exit_code == 2
    assert "--pin-workers" in result.output
    assert "Linux" in result.output
    with pytest.raises(ConfigurationError, match="pin_workers"):
        websockets.run(pin_workers=True, port=0)


@pytest.mark.parametrize("options", [{"workers": 2, "separate_channels": True}, {"reload": True}])
def test_run_needs_an_application_that_can_be_imported(websockets, options):
    """One that a fixture has made is no module's global: it says to use the command."""
    with pytest.raises(UsageError) as refused:
        websockets.run(port=0, **options)
    assert not isinstance(refused.value, ConfigurationError)
    assert "websockets serve" in str(refused.value)


@pytest.mark.parametrize("count", [0, -1])
def test_no_workers(websockets, serve, count):
    """There is at least one."""
    with pytest.raises(ConfigurationError):
        websockets.run(workers=count, port=0)
    assert serve("--workers", str(count), "--port", "0").exit_code == 2


def test_the_reloader_has_one_worker(websockets, serve):
    """reload and workers exclude each other, separate channels or not."""
    result = serve("--workers", "2", "--separate-channels", "--reload", "--port", "0")
    assert result.exit_code == 2
    assert "reload" in result.output
    with pytest.raises(UsageError):
        websockets.run(workers=2, separate_channels=True, reload=True, port=0)


# -- where ----------------------------------------------------------------------------------------


def test_serve_on_a_port_in_use(serve, busy):
    """Exit code 1, and the port is named."""
    result = serve("--port", str(busy))
    assert result.exit_code == 1
    assert str(busy) in result.output
    assert "Traceback" not in result.output


def test_run_on_a_port_in_use(websockets, busy):
    """OSError, and the port is named."""
    with pytest.raises(OSError) as refused:
        websockets.run(port=busy)
    assert str(busy) in str(refused.value)


@pytest.mark.parametrize("port", ["x", "70000", "-1"])
def test_what_is_no_port(serve, port):
    """It is an error of whoever typed it, not a traceback."""
    result = serve("--port", port)
    assert result.exit_code in (1, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1"])
def test_a_host_that_is_not_this_machine(serve, host):
    """A name without an address, and another's address: it is in the error."""
    result = serve("--host", host, "--port", "0")
    assert result.exit_code == 1
    assert host in result.output
    assert isinstance(result.exception, SystemExit), "it is a traceback"


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no unix sockets here")
def test_unix_sockets_that_cannot_be(serve, websockets, tmp_path):
    """One in use, a file that is none, a directory, and a path that is not there or too long."""
    taken, file, here = tmp_path / "taken", tmp_path / "file", tmp_path / "directory"
    file.write_text("precious")
    here.mkdir()
    paths = [taken, file, here, tmp_path / "nowhere" / "socket", tmp_path / ("x" * 120)]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(taken))
        listener.listen()
        before = taken.stat()
        for path in paths:
            result = serve("--host", f"unix://{path}")
            assert result.exit_code == 1, path
            assert str(path) in result.output
            with pytest.raises(OSError) as refused:
                websockets.run(host=f"unix://{path}")
            assert str(path) in str(refused.value)
        assert taken.stat().st_ino == before.st_ino
        assert stat.S_ISSOCK(taken.stat().st_mode)
    assert file.read_text() == "precious"
    assert here.is_dir()


# -- TLS ------------------------------------------------------------------------------------------


def test_certificates_that_are_not_there(serve, websockets, tmp_path, busy):
    """The file is named, and that before the port is looked at."""
    missing = str(tmp_path / "missing.pem")
    result = serve("--cert", missing, "--key", missing, "--port", str(busy))
    assert result.exit_code in (1, 2)
    assert "missing.pem" in result.output
    assert isinstance(result.exception, SystemExit), "it is a traceback"
    with pytest.raises((UsageError, OSError)) as refused:
        websockets.run(cert=missing, key=missing, port=busy)
    assert "missing.pem" in str(refused.value)


def test_a_key_with_a_pass_phrase(serve, tmp_path, busy):
    """Nobody is asked for it; the error says that it is the reason."""
    certificate = make_certificate(tmp_path)
    key = serialization.load_pem_private_key(Path(certificate.key).read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    result = serve("--cert", certificate.cert, "--key", str(locked), "--port", str(busy))
    assert result.exit_code == 2
    assert "without a pass phrase" in " ".join(result.output.split())


def test_another_thread_than_the_main_one(websockets, busy):
    """No signal would ever reach it: it refuses, before it listens."""
    errors = []

    def run():
        try:
            websockets.run(port=busy)
        except UsageError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert "main thread" in errors[0]


def test_no_host(serve):
    """An empty host, as of a variable that is not set, is not every interface."""
    result = serve("--host", "")
    assert result.exit_code == 2
    assert "0.0.0.0" in result.output


def test_certificates_that_cannot_be_used(serve, websockets, tmp_path, busy):
    """A key that is another's and a file that is no certificate are errors that name the files."""
    first, second = make_certificate(tmp_path), make_certificate(tmp_path, "second")
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    for cert, key, wrong in ((first.cert, second.key, second.key), (empty, first.key, empty)):
        result = serve("--cert", str(cert), "--key", str(key), "--port", str(busy))
        assert result.exit_code in (1, 2)
        assert str(wrong) in result.output
        assert "wss://" not in result.output, "the banner says that it serves"
        with pytest.raises((UsageError, OSError)) as refused:
            websockets.run(cert=str(cert), key=str(key), port=busy)
        assert str(wrong) in str(refused.value)


def test_a_key_without_a_certificate(serve, websockets, tmp_path):
    """It would be served without TLS, which nobody who has a key means."""
    result = serve("--key", str(tmp_path / "key.pem"), "--port", "0")
    assert result.exit_code == 2
    assert "cert" in result.output
    with pytest.raises(UsageError):
        websockets.run(key=str(tmp_path / "key.pem"), port=0)


# -- which application ----------------------------------------------------------------------------


def test_run_of_an_application_that_is_not_set_up(app):
    """Before init_app there is nothing to serve; with two applications one has to be named."""
    websockets = WebSockets()
    with pytest.raises(UsageError):
        websockets.run(port=0)
    with pytest.raises(UsageError):
        websockets.run(app, port=0)
    websockets.init_app(app)
    websockets.init_app(Flask("another"))
    with pytest.raises(UsageError):
        websockets.run(port=0)
    with pytest.raises(UsageError):
        WebSockets().run(app, port=0)


def test_run_is_ignored_under_the_flask_command(websockets, busy, monkeypatch, capsys):
    """As app.run is: a warning, and the import goes on."""
    monkeypatch.setenv("FLASK_RUN_FROM_CLI", "true")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert websockets.run(port=busy) is None
    shown = capsys.readouterr()
    said = shown.out + shown.err + "".join(str(warning.message) for warning in caught)
    assert "run()" in said
    assert "__main__" in said


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, "20", None, True])
def test_a_drain_timeout_that_cannot_be(app, value):
    """A number of seconds above 0."""
    app.config["WEBSOCKETS_DRAIN_TIMEOUT"] = value
    with pytest.raises(ConfigurationError, match="WEBSOCKETS_DRAIN_TIMEOUT"):
        WebSockets(app)


def test_the_default_of_the_drain_timeout(app):
    """Twenty seconds, less than what supervisors wait before they kill."""
    WebSockets(app)
    assert app.extensions["websockets"].config.drain_timeout == 20


# -- what an import costs -------------------------------------------------------------------------


def test_an_import_changes_nothing(tmp_path: Path):
    """Importing the package starts no thread, no child, and sets no signal handler."""
    script = tmp_path / "imports.py"
    script.write_text(
        "import multiprocessing, signal, threading\n"
        "names = (signal.SIGINT, signal.SIGTERM)\n"
        "before = [signal.getsignal(name) for name in names]\n"
        "from flask import Flask\n"
        "from flask_websockets import WebSockets\n"
        "WebSockets(Flask('app'))\n"
        "assert before == [signal.getsignal(name) for name in names]\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert multiprocessing.active_children() == []\n"
        "assert multiprocessing.get_start_method(allow_none=True) is None\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        timeout=30,
        env={name: value for name, value in os.environ.items() if name != "FLASK_RUN_FROM_CLI"},
    )
    assert done.returncode == 0, done.stderr
