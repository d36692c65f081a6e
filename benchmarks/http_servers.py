"""The HTTP servers that are compared: one process each, the same application, 40 threads."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .http_app import FILE_VARIABLE, PAYLOAD
from .servers import start

_UVICORN = ["-m", "uvicorn", "--factory", "--interface", "asgi3", "--host", "127.0.0.1"]
_UVICORN += ["--port", "{port}", "--log-level", "warning", "--no-access-log"]
_FAST = ["--http", "httptools", "--loop", "uvloop"]
_SERVE = ["-m", "flask", "--app", "benchmarks.http_app:with_websockets()"]
_APP = "benchmarks.http_app:app"
_GUNICORN = ["-m", "gunicorn", "--worker-class", "gthread", "--workers", "1", "--threads", "40"]
_GUNICORN += ["--keep-alive", "60", "--bind", "127.0.0.1:{port}", "--log-level", "warning"]
_GUNICORN += ["--graceful-timeout", "2", "--no-control-socket"]
_WAITRESS = ["-m", "waitress", "--threads", "40", "--host", "127.0.0.1", "--port", "{port}"]
_GRANIAN = ["-m", "granian", "--interface", "wsgi", "--http", "1", "--workers", "1"]
_GRANIAN += ["--blocking-threads", "40", "--host", "127.0.0.1", "--port", "{port}"]
_GRANIAN += ["--log-level", "warning"]


@dataclass(frozen=True)
class Server:
    command: list[str]
    needs: tuple[str, ...]  # distributions, as they are named on PyPI
    setting: str  # in words, for the report
    asgi: bool = False  # it has a loop whose turns can be measured
    ours: bool = False  # a wrong answer is a fault


SERVERS = {
    "ours": Server(
        [*_UVICORN, *_FAST, "benchmarks.http_app:ours"],
        ("uvicorn", "httptools", "uvloop"),
        "uvicorn, httptools, uvloop; 40 threads, the default",
        asgi=True,
        ours=True,
    ),
    "ours-h11": Server(
        [*_UVICORN, "--http", "h11", "--loop", "asyncio", "benchmarks.http_app:ours"],
        ("uvicorn", "h11"),
        "uvicorn, h11, asyncio; 40 threads, the default",
        asgi=True,
        ours=True,
    ),
    "ours-serve": Server(
        [*_SERVE, "websockets", "serve", "--port", "{port}"],
        ("uvicorn", "httptools", "uvloop"),
        "flask websockets serve, with its access log; 40 threads, the default",
        ours=True,
    ),
    "asgiref": Server(
        [*_UVICORN, *_FAST, "benchmarks.http_app:stock_asgiref"],
        ("asgiref", "uvicorn", "httptools", "uvloop"),
        "WsgiToAsgi as it comes, on uvicorn, httptools, uvloop; 1 thread, it has no setting",
        asgi=True,
    ),
    # What its errors cost, a traceback and a new connection each, is no part of this one.
    "asgiref-reset": Server(
        [*_UVICORN, *_FAST, "--reset-contextvars", "benchmarks.http_app:stock_asgiref"],
        ("asgiref", "uvicorn", "httptools", "uvloop"),
        "the same with uvicorn's --reset-contextvars, which keeps its answers right",
        asgi=True,
    ),
    "a2wsgi": Server(
        [*_UVICORN, *_FAST, "benchmarks.http_app:a2wsgi"],
        ("a2wsgi", "uvicorn", "httptools", "uvloop"),
        "WSGIMiddleware on uvicorn, httptools, uvloop; 40 threads (default 10)",
        asgi=True,
    ),
    "gunicorn": Server(
        [*_GUNICORN, _APP], ("gunicorn",), "gthread, 1 worker, 40 threads, keep-alive 60 s"
    ),
    "waitress": Server([*_WAITRESS, _APP], ("waitress",), "40 threads (default 4)"),
    "granian": Server(
        [*_GRANIAN, _APP], ("granian",), "WSGI, 1 worker, 40 blocking threads (default 512)"
    ),
}


@contextmanager
def serve_http(server: Server, core: int | None) -> Iterator[int]:
    """Run *server* on a free port, which is yielded; show what it printed if that goes wrong."""
    with tempfile.NamedTemporaryFile() as file, tempfile.TemporaryFile() as log:
        file.write(PAYLOAD)
        file.flush()
        try:
            with start(server.command, core, {FILE_VARIABLE: file.name}, log) as port:
                yield port
        except BaseException:
            log.seek(0)
            print(log.read()[-4000:].decode(errors="replace"), file=sys.stderr)
            raise
