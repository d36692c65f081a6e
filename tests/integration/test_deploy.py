"""The deployment files work: each is run as it stands, or read by the program that it is for.

nginx and Caddy run unprivileged, with files, ports and a certificate authority of their own, and
include our configuration. What a test replaces in it stands here, and has to be in the file.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from werkzeug.serving import make_ssl_devcert

from flask_websockets.config import Config

from .conftest import START_TIMEOUT, ServerProcess, free_port
from .waiting import wait_until

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"
CHAT = ROOT / "examples" / "chat"
SCRIPTS = sysconfig.get_path("scripts")
TIMEOUT = 20.0
#: Where the files say that things are.
CHECKOUT, SOCKET = "/opt/flask-websockets", "/run/chat/chat.sock"
NAME = "chat.example.com"
CERTIFICATE = f"/etc/letsencrypt/live/{NAME}"
#: Another address of this machine, so that a test sees whose address the application sees.
CLIENT = "127.0.0.2"
PING = uvicorn.Config("").ws_ping_interval
#: The user and the group of those who may do nothing, on Linux.
NOBODY = 65534
#: Debian has nginx where only root looks.
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

SOURCE = """
    from threading import Event

    from flask import Flask, Response, abort, request, url_for
    from flask_websockets import WebSockets

    app = Flask(__name__)
    websockets = WebSockets(app)
    asgi = websockets.asgi_app()
    seen = Event()


    def facts():
        return {
            "address": request.remote_addr,
            "secure": request.is_secure,
            "host": request.host,
            "protocol": request.environ["SERVER_PROTOCOL"],
            "upgrade": request.headers.get("Upgrade"),
            "forwarded_host": request.headers.getlist("X-Forwarded-Host"),
            "page": url_for("page", _external=True),
            "socket": url_for("echo"),
        }


    @app.get("/facts")
    def page():
        return facts()


    @websockets.route("/facts", endpoint="socket_facts")
    def socket_facts(ws):
        ws.send_json(facts())


    @websockets.route("/echo")
    def echo(ws):
        for data in ws.iter_data():
            ws.send(data)


    @websockets.route("/members")
    def members(ws):
        abort(401, "Log in.")


    @app.post("/upload")
    def upload():
        return {"bytes": len(request.get_data())}


    @app.get("/stream")
    def stream():
        def events():
            yield "data: first\\n\\n"
            yield f"data: {seen.wait(15)}\\n\\n"

        headers = {"X-Accel-Buffering": "no"}
        return Response(events(), mimetype="text/event-stream", headers=headers)


    @app.post("/seen")
    def saw():
        seen.set()
        return ""
"""


def program(name: str) -> str:
    """The path of a program that may not be installed."""
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def accepts(path: Path) -> bool:
    """Whether somebody listens on a unix socket."""
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.settimeout(TIMEOUT)
        return client.connect_ex(str(path)) == 0


class Place:
    """A directory that other users may enter, with a path that is short enough for sockets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._exit = ExitStack()
        self._count = 0

    def run(self, command: list[str], cwd: Path, port: int = 0) -> ServerProcess:
        """Start a program; it is stopped at the end."""
        self._count += 1
        log = self.path / f"log{self._count}.txt"
        started = ServerProcess(command, port, log, cwd)
        self._exit.callback(self._end, started)
        return started

    def serve(self, name: str = "app.sock", *options: str) -> ServerProcess:
        """Serve the test's application on a unix socket, as the unit does the chat."""
        path = self.path / name
        (self.path / "served.py").write_text(textwrap.dedent(SOURCE))
        command = [f"{SCRIPTS}/flask", "--app", "served", "websockets", "serve"]
        if options:  # of uvicorn's own, for what is fixed in the command
            command = [sys.executable, "-m", "uvicorn", "served:asgi", "--forwarded-allow-ips=*"]
            command += ["--uds", str(path), *options]
        else:
            command += ["--host", f"unix://{path}"]
        server = self.run(command, self.path)
        wait_until_it_is(lambda: accepts(path), server)
        return server

    def close(self) -> None:
        self._exit.close()

    @staticmethod
    def _end(server: ServerProcess) -> None:
        try:
            server.stop(timeout=5)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_until_it_is(ready: Callable[[], bool], server: ServerProcess) -> None:
    def started() -> bool:
        if server.process.poll() is not None:
            raise RuntimeError(f"It ended with {server.process.poll()}:\n{server.log()}")
        return ready()

    wait_until(started, START_TIMEOUT, "the server's start")


@contextmanager
def a_place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="deploy") as path:
        os.chmod(path, 0o755)
        place = Place(Path(path))
        try:
            yield place
        finally:
            place.close()


@pytest.fixture
def place() -> Iterator[Place]:
    """A place for one test."""
    with a_place() as place:
        yield place


class Proxy:
    """A proxy in front of the application, and a client who comes through it."""

    def __init__(self, place: Place, sock: str) -> None:
        self.place = place
        self.sock = sock
        self.plain, self.port = free_port(), free_port()
        self.files = place.path / type(self).__name__.lower()
        self.files.mkdir()

    def start(self, command: list[str]) -> None:
        """Run it, as a user who may do nothing if this one may do everything."""
        if os.geteuid() == 0:
            for path in (self.files, *self.files.iterdir()):
                shutil.chown(path, NOBODY, NOBODY)
            drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
            command = [*drop, *command]
        self.server = self.place.run(command, self.files, self.port)
        self.server.wait_until_listening()

    def authority(self) -> Path:
        """The certificate that a client has to trust."""
        raise NotImplementedError

    def tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.authority())
        # The client reads in one thread and writes in another. Before Python 3.13 OpenSSL has no
        # lock between them, and the tickets that follow a handshake of TLS 1.3 make it hang.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        return context

    @property
    def origin(self) -> str:
        return f"https://{NAME}:{self.port}"

    def dial(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), TIMEOUT, (CLIENT, 0))

    def connect(self, path: str, **options: Any) -> ClientConnection:
        """Open a WebSocket through it."""
        options = {"open_timeout": TIMEOUT, "ssl": self.tls(), "proxy": None, **options}
        return connect(f"wss://{NAME}:{self.port}{path}", sock=self.dial(), **options)

    @contextmanager
    def ask(self, method: str, path: str, **options: Any) -> Iterator[http.client.HTTPResponse]:
        """Send a request through it."""
        client = http.client.HTTPSConnection(NAME, self.port, timeout=TIMEOUT)
        with closing(client):
            client.sock = self.tls().wrap_socket(self.dial(), server_hostname=NAME)
            client.request(method, path, **options)
            yield client.getresponse()

    def status(self, method: str, path: str, **options: Any) -> int:
        with self.ask(method, path, **options) as answer:
            return answer.status


class Nginx(Proxy):
    """Debian's nginx, with our file included in an ``http`` block."""

    def __init__(self, place: Place, sock: str = "app.sock", **changed: str) -> None:
        found = program("nginx")
        pytest.importorskip("cryptography")
        super().__init__(place, sock)
        self.cert, self.key = make_ssl_devcert(str(self.files / "cert"), host=NAME)
        self.write(**changed)
        (self.files / "nginx.conf").write_text(
            "daemon off; pid nginx.pid; error_log error.log notice;"
            "events { worker_connections 128; }"
            "http { access_log off; client_body_temp_path body; proxy_temp_path proxy;"
            "fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;"
            "include chat.conf; }"
        )
        files = str(self.files)
        self.start([found, "-p", files, "-c", f"{files}/nginx.conf", "-e", f"{files}/error.log"])

    def write(self, **changed: str) -> None:
        """Write our file for this place: its socket, ports, certificate, and what is given."""
        text = (DEPLOY / "nginx.conf").read_text()
        replaced = {
            SOCKET: str(self.place.path / self.sock),
            "listen 80;": f"listen 127.0.0.1:{self.plain};",
            "listen 443 ssl http2;": f"listen 127.0.0.1:{self.port} ssl http2;",
            # Where IPv6 is turned off nobody can listen on it.
            "listen [::]:80;": "",
            "listen [::]:443 ssl http2;": "",
            f"{CERTIFICATE}/fullchain.pem": self.cert,
            f"{CERTIFICATE}/privkey.pem": self.key,
            **{f"{name} 60s;": f"{name} {value};" for name, value in changed.items()},
        }
        for ours, theirs in replaced.items():
            assert ours in text
            text = text.replace(ours, theirs)
        (self.files / "chat.conf").write_text(text)

    def log(self) -> str:
        return (self.files / "error.log").read_text()

    def reload(self, sock: str) -> None:
        """Lead to another socket, and have nginx read that, as ``systemctl reload nginx`` does."""
        self.sock = sock
        self.write()
        # Until its old worker has said this it accepts connections beside the new one.
        done = "gracefully shutting down"
        before = self.log().count(done)
        self.server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.log().count(done) > before, TIMEOUT, "the reload")

    def authority(self) -> Path:
        return Path(self.cert)


class Caddy(Proxy):
    """Debian's Caddy, with our file imported as it stands, and a certificate authority in it."""

    def __init__(self, place: Place, sock: str = "app.sock") -> None:
        found = program("caddy")
        super().__init__(place, sock)
        (self.files / "Caddyfile").write_text(
            "{\n admin off\n local_certs\n skip_install_trust\n default_bind 127.0.0.1\n"
            f" http_port {self.plain}\n https_port {self.port}\n"
            f" storage file_system {self.files}/data\n}}\nimport {self.files}/ours\n"
        )
        shutil.copy(DEPLOY / "Caddyfile", self.files / "ours")
        environ = [f"CHAT_UPSTREAM=unix/{place.path / sock}", f"HOME={self.files}"]
        config = str(self.files / "Caddyfile")
        self.start(["env", *environ, found, "run", "--adapter", "caddyfile", "--config", config])
        # Certificates are made after the port is open.
        made = "certificate obtained successfully"
        wait_until_it_is(lambda: made in self.server.log(), self.server)

    def authority(self) -> Path:
        return self.files / "data/pki/authorities/local/root.crt"


@pytest.fixture(scope="module", params=[Nginx, Caddy], ids=["nginx", "caddy"])
def proxy(request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """Each proxy in front of one application, for the tests that end neither."""
    with a_place() as place:
        started = request.param(place)
        place.serve()
        yield started


def echoes(ws: ClientConnection) -> bool:
    ws.send("still here")
    return ws.recv(timeout=TIMEOUT) == "still here"


def close_code(ws: ClientConnection) -> int | None:
    """Wait for the connection's end."""
    with pytest.raises(ConnectionClosed):
        ws.recv(timeout=TIMEOUT)
    return ws.close_code


# ---------------------------------------------------------------- behind a proxy


def test_messages_pass(proxy):
    """An upgrade goes through, and messages of any size in both directions."""
    with proxy.connect("/echo", max_size=None) as ws:
        for data in ("text", b"binary", "x" * 300_000):
            ws.send(data)
            assert ws.recv(timeout=TIMEOUT) == data


def facts(proxy: Proxy, headers: dict[str, str]) -> list[dict[str, Any]]:
    """What an HTTP view and a WebSocket view see of a client."""
    with proxy.ask("GET", "/facts", headers=headers) as answer:
        page = json.loads(answer.read())
    with proxy.connect("/facts", additional_headers=headers) as ws:
        return [page, json.loads(ws.recv(timeout=TIMEOUT))]


def test_views_see_the_client(proxy):
    """Address, scheme and host are the client's and the site's, in both kinds of view."""
    for seen in facts(proxy, {}):
        assert seen["address"] == CLIENT
        assert seen["secure"] is True
        assert seen["protocol"] == "HTTP/1.1"
        assert seen["host"] == f"{NAME}:{proxy.port}"
        assert seen["forwarded_host"] == [f"{NAME}:{proxy.port}"]
        assert seen["page"] == f"{proxy.origin}/facts"
        assert seen["socket"] == f"wss://{NAME}:{proxy.port}/echo"


def test_a_client_cannot_pose_as_another(proxy):
    """What the client says about itself in the proxy's headers is not believed."""
    forged = {
        "X-Forwarded-For": "6.6.6.6",
        "X-Forwarded-Proto": "http",
        "X-Forwarded-Host": "evil.example",
        "Forwarded": "for=6.6.6.6;proto=http;host=evil.example",
    }
    assert facts(proxy, forged) == facts(proxy, {})


def test_the_origin_is_checked(proxy):
    """A page of the site may connect though TLS ends at the proxy; one of another may not."""
    with proxy.connect("/echo", origin=proxy.origin) as ws:
        assert echoes(ws)
    for origin in ("https://evil.example", f"https://{NAME}"):
        with pytest.raises(InvalidStatus) as refused, proxy.connect("/echo", origin=origin):
            pass
        assert refused.value.response.status_code == 403


def test_refusals_pass(proxy):
    """The answer to a refused handshake, and to one that is none, is the application's."""
    with pytest.raises(InvalidStatus) as refused, proxy.connect("/members"):
        pass
    assert refused.value.response.status_code == 401
    assert b"Log in." in refused.value.response.body
    assert proxy.status("GET", "/echo") == 426


def test_a_stream_is_not_held_back(proxy):
    """The first event of a stream arrives before there is a second."""
    with proxy.ask("GET", "/stream") as answer:
        assert answer.readline() == b"data: first\n"
        assert proxy.status("POST", "/seen") == 200
        assert answer.read() == b"\ndata: True\n\n"


def test_a_body_has_a_limit(proxy):
    """A body of the largest size arrives whole; a larger one is refused."""
    largest = 16_000_000  # Caddy's MB; nginx's m is larger, by less than a MB
    with proxy.ask("POST", "/upload", body=bytes(largest)) as answer:
        assert json.loads(answer.read()) == {"bytes": largest}
    with proxy.ask("POST", "/upload", body=iter([bytes(largest), bytes(1_000_000)])) as answer:
        assert answer.status == 413


def test_http_leads_to_https(proxy):
    """A request to port 80 is sent on, with its path."""
    client = http.client.HTTPConnection("127.0.0.1", proxy.plain, timeout=TIMEOUT)
    with closing(client):
        client.request("GET", "/room/tea?x=1", headers={"Host": NAME})
        answer = client.getresponse()
        assert answer.status == 308
        assert answer.headers["Location"].startswith(f"https://{NAME}")
        assert answer.headers["Location"].endswith("/room/tea?x=1")


@pytest.mark.parametrize("kind", [Nginx, Caddy], ids=["nginx", "caddy"])
def test_a_proxy_survives_the_application(place, kind):
    """SIGTERM closes a client behind the proxy with 1012; a new process is served at once."""
    proxy = kind(place)
    server = place.serve()
    with proxy.connect("/echo") as ws:
        assert echoes(ws)
        server.process.send_signal(signal.SIGTERM)
        assert close_code(ws) == 1012
    assert server.process.wait(TIMEOUT) == 0
    assert proxy.status("GET", "/facts") == 502
    place.serve()
    assert proxy.status("GET", "/facts") == 200
    with proxy.connect("/echo") as ws:
        assert echoes(ws)


@pytest.mark.parametrize("kind", [Nginx, Caddy], ids=["nginx", "caddy"])
def test_pings_keep_a_quiet_connection(place, kind):
    """Nobody says anything for longer than the proxy waits, and the connection stays."""
    short = {"proxy_read_timeout": "2s", "proxy_send_timeout": "2s"} if kind is Nginx else {}
    proxy = kind(place, **short)
    place.serve("app.sock", "--ws-ping-interval", "0.5")
    with proxy.connect("/echo", ping_interval=None) as ws:
        with pytest.raises(TimeoutError):
            ws.recv(timeout=3.5)
        assert echoes(ws)


def test_nginx_cuts_who_is_not_pinged(place):
    """With pings further apart than nginx waits, it cuts a quiet connection."""
    proxy = Nginx(place, proxy_read_timeout="1s")
    place.serve("app.sock", "--ws-ping-interval", "20")
    with proxy.connect("/echo", ping_interval=None) as ws:
        assert close_code(ws) == 1006


def test_nginx_passes_no_other_upgrade(place):
    """HTTP/2 in plain text is not asked for at the application past the proxy."""
    proxy = Nginx(place)
    place.serve()
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": ""}
    with proxy.ask("GET", "/facts", headers=headers) as answer:
        assert json.loads(answer.read())["upgrade"] is None


def test_nginx_reloads(place):
    """Open connections outlive a reload; a changed file leads new ones to a new process."""
    proxy = Nginx(place)
    old = place.serve()
    with proxy.connect("/echo") as before:
        assert echoes(before)
        proxy.reload("app.sock")
        assert echoes(before)
        place.serve("green.sock")
        proxy.reload("green.sock")
        assert echoes(before)
        with proxy.connect("/echo") as after:
            old.process.send_signal(signal.SIGTERM)
            assert close_code(before) == 1012
            assert old.process.wait(TIMEOUT) == 0
            assert echoes(after)
            assert proxy.status("GET", "/facts") == 200


# ---------------------------------------------------------------- the other files


def setting(name: str, file: str) -> str:
    """The value of the one line ``name=value``, ``name: value`` or ``name value;`` of a file."""
    found = re.findall(rf"^\s*{name}[ =:]\s*(.*?);?$", (DEPLOY / file).read_text(), re.MULTILINE)
    assert len(found) == 1, f"{name} stands {len(found)} times in {file}"
    return str(found[0])


def seconds(name: str, file: str) -> int:
    return int(setting(name, file).removesuffix("s"))


def installed(text: str) -> str:
    """A line of a file, with this checkout and this environment instead of the server's."""
    return text.replace(f"{CHECKOUT}/.venv/bin", SCRIPTS).replace(CHECKOUT, str(ROOT))


def page_of(sock: Path) -> str:
    """The chat's page for one room, through a unix socket."""
    client = http.client.HTTPConnection("localhost", timeout=TIMEOUT)
    with closing(client), closing(socket.socket(socket.AF_UNIX)) as connected:
        connected.settimeout(TIMEOUT)
        connected.connect(str(sock))
        client.sock = connected
        client.request("GET", "/room/tea")
        return client.getresponse().read().decode()


def instructions() -> list[tuple[str, str]]:
    """The lines of the Containerfile, continued ones joined."""
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def commands() -> dict[str, list[str]]:
    """What each file starts, as words."""
    return {
        "chat.service": shlex.split(setting("ExecStart", "chat.service")),
        "Containerfile": json.loads(dict(instructions())["CMD"]),
        "compose.yaml": re.findall(r"^ {6}- (\S+)$", (DEPLOY / "compose.yaml").read_text(), re.M)[
            :7
        ],
        # With "exec" the shell that reads the line does not stay between it and a signal.
        "Procfile": shlex.split(setting("web", "Procfile").removeprefix("exec ")),
    }


@pytest.mark.parametrize("file", commands())
def test_one_worker(file):
    """Every file that starts the application starts one worker of it, and says why."""
    words = " ".join(commands()[file]).replace("=", " ").split()
    assert words[1] == "--app"
    assert words[3:5] == ["websockets", "serve"]
    assert not {"--workers", "--separate-channels"} & set(words)
    text = (DEPLOY / file).read_text()
    assert "channels, limits and counters are per process" in re.sub(r"\s+(# )?", " ", text)
    assert not re.search("replicas|scale|WEB_CONCURRENCY", text)


def test_timeouts_belong_together():
    """Ping < the proxy's patience; close <= drain < whoever kills. Limits have room for all."""
    config = Config()
    for name in ("proxy_read_timeout", "proxy_send_timeout"):
        assert seconds(name, "nginx.conf") > PING
    assert config.close_timeout <= config.drain_timeout
    for name, file in (("TimeoutStopSec", "chat.service"), ("stop_grace_period", "compose.yaml")):
        assert config.drain_timeout + 1 < seconds(name, file)
    needed = config.max_connections + config.max_handshakes + config.http_threads
    for name, file in (
        ("LimitNOFILE", "chat.service"),
        ("TasksMax", "chat.service"),
        ("pids_limit", "compose.yaml"),
        ("nofile", "compose.yaml"),
    ):
        assert needed < seconds(name, file), name


def test_systemd_reads_the_unit(place):
    """systemd finds nothing wrong with the unit, and little that it may do."""
    analyze = program("systemd-analyze")
    unit = place.path / "chat.service"
    unit.write_text(installed((DEPLOY / "chat.service").read_text()))
    for command in (
        ["verify", "--man=no", "--recursive-errors=no", str(unit)],
        ["security", "--offline=true", "--threshold=20", "--no-pager", str(unit)],
    ):
        answer = subprocess.run(
            [analyze, *command], capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        # Other units of the machine are read as well; what it says of them is not about ours.
        assert "chat.service" not in answer.stderr


def test_the_unit_lets_views_have_threads():
    """What the unit forbids leaves the scheduling class that the threads of views ask for."""
    analyze = program("systemd-analyze")
    unit = (DEPLOY / "chat.service").read_text()
    forbidden = re.findall(r"^SystemCallFilter=~(.+)$", unit, re.MULTILINE)
    assert forbidden
    sets = " ".join(forbidden).split()
    listed = subprocess.run(
        [analyze, "syscall-filter", "--no-pager", *sets],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    ).stdout
    assert "setuid" in listed
    assert "sched_setscheduler" not in listed
    # And what is forbidden after all is an error in the view, not the end of the process.
    assert "SystemCallErrorNumber=EPERM" in unit.splitlines()


def test_the_units_command_serves(place):
    """The unit's command serves the chat on its socket, and ends with 0 at its signal."""
    path = place.path / "chat.sock"
    command = installed(setting("ExecStart", "chat.service")).replace(SOCKET, str(path))
    assert str(path) in command
    directory = Path(installed(setting("WorkingDirectory", "chat.service")))
    server = place.run(shlex.split(command), directory)
    wait_until_it_is(lambda: accepts(path), server)
    assert "<title>#tea " in page_of(path)
    code, _ = server.stop(signal.Signals[setting("KillSignal", "chat.service")])
    assert code == 0
    assert not path.exists()


@contextmanager
def chat(port: int) -> Iterator[ClientConnection]:
    """Enter the chat, and wait until one is in."""
    url = f"ws://127.0.0.1:{port}/ws/tea?name=ann"
    with connect(url, open_timeout=TIMEOUT, proxy=None) as ws:
        assert json.loads(ws.recv(timeout=TIMEOUT))["type"] == "welcome"
        yield ws


def leaves_with_1012(ws: ClientConnection) -> bool:
    """Read what is left of the chat, to its end."""
    with pytest.raises(ConnectionClosed):
        while True:
            ws.recv(timeout=TIMEOUT)
    return ws.close_code == 1012


def test_the_procfile_runs(place):
    """honcho starts the Procfile's one process on its port; SIGTERM closes with 1012, ends it."""
    pytest.importorskip("honcho")
    port = free_port()
    # As platforms have it: a port, and a number of workers that they think right.
    environ = ["env", f"PATH={SCRIPTS}:{PATH}", "WEB_CONCURRENCY=4"]
    honcho = [sys.executable, "-m", "honcho", "-f", str(DEPLOY / "Procfile"), "start"]
    server = place.run([*environ, *honcho, "--port", str(port)], ROOT, port)
    server.wait_until_listening()
    with chat(port) as ws:
        server.process.send_signal(signal.SIGTERM)
        assert leaves_with_1012(ws)
    server.process.wait(TIMEOUT)
    assert "rc=0" in server.log()
    assert "One worker" in server.log()


def test_compose_agrees():
    """The compose file names what is there, and its command is the image's, with a proxy."""
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    image = {name: value for name, value in instructions() if name in ("CMD", "EXPOSE")}
    service, caddy = services["chat"], services["caddy"]
    context = (DEPLOY / service["build"]["context"]).resolve()
    assert (context / service["build"]["dockerfile"]).samefile(DEPLOY / "Containerfile")
    assert service["command"] == commands()["compose.yaml"]
    command = " ".join(service["command"]).replace("=", " ")
    assert command.startswith(" ".join(commands()["Containerfile"]))
    assert "ports" not in service
    assert caddy["environment"]["CHAT_UPSTREAM"] == f"chat:{image['EXPOSE']}"
    for variable in caddy["environment"]:
        assert "{$" + variable + ":" in (DEPLOY / "Caddyfile").read_text()
    mounted = caddy["volumes"][0].split(":")
    assert (DEPLOY / mounted[0]).samefile(DEPLOY / "Caddyfile")


@pytest.mark.slow
def test_the_containerfile_builds_and_runs(place):
    """Its steps, one by one, in a directory instead of a container: install, serve, ask, stop."""
    image = place.path / "image"
    environ = {**os.environ, "PYTHONWARNINGS": "default"}
    port = free_port()
    directory = image
    health: list[str] = []
    server = None

    def inside(text: str) -> str:
        """With the image's directories in this one, and the port that is free."""
        return re.sub(r"(?<![\w./])/(venv|src|app)\b", rf"{image}/\1", text).replace(
            "8000", str(port)
        )

    steps = instructions()
    for name, rest in steps:
        if name == "WORKDIR":
            directory = Path(inside(rest))
            directory.mkdir(parents=True)
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, directory / target, dirs_exist_ok=True)
                else:
                    shutil.copy(ROOT / source, directory / target)
        elif name == "ENV":
            for word in rest.split():
                variable, _, value = inside(word).partition("=")
                environ[variable] = value.replace("$PATH", environ["PATH"])
        elif name == "RUN":
            subprocess.run(inside(rest), shell=True, cwd=directory, check=True, timeout=110)
        elif name == "HEALTHCHECK":
            health = json.loads(inside(rest[rest.index("[") :]))
        elif name == "USER":
            assert rest.split(":")[0] not in ("0", "root")
        elif name == "CMD":
            command = json.loads(inside(rest))
            words = [f"{key}={environ[key]}" for key in ("PATH", "PYTHONUNBUFFERED")]
            server = place.run(["env", *words, *command], directory, port)
    assert server is not None
    server.wait_until_listening()
    subprocess.run(health, env=environ, check=True, timeout=TIMEOUT)
    started = time.monotonic()
    with chat(port) as ws:
        server.process.send_signal(signal.Signals[dict(steps)["STOPSIGNAL"]])
        assert leaves_with_1012(ws)
    assert server.process.wait(TIMEOUT) == 0
    assert time.monotonic() - started < Config().drain_timeout
    assert subprocess.run(health, env=environ, capture_output=True, timeout=TIMEOUT).returncode


def test_every_file_is_documented():
    """docs/how-to/deploy includes each of the files."""
    page = (ROOT / "docs" / "how-to" / "deploy.rst").read_text()
    for path in DEPLOY.iterdir():
        assert f":: ../../examples/deploy/{path.name}\n" in page
