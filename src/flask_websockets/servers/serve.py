"""Both sides. ``websockets.run()`` and ``flask websockets serve``: uvicorn for production.

What uvicorn leaves to whoever runs it is settled here: a listening socket that notices dead
peers, a limit for request heads, a drain at the end, and an end that comes (I9). One worker
serves in this process; several, and those of the reloader, are processes of their own, which
load the application anew.
"""

from __future__ import annotations

import contextvars
import multiprocessing
import os
import signal
import ssl
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import click
import uvicorn
from flask import Flask
from uvicorn.supervisors import ChangeReload
from uvicorn.supervisors.statreload import StatReload

from ..bridge import can_pin, pinned
from ..config import MEMORY_URL, Config
from ..errors import ConfigurationError, UsageError
from .draining import DrainingServer
from .listen import Listener, listen
from .uvicorn import limit_heads
from .watchdog import Watchdog
from .workers import Workers

#: Seconds beyond the drain timeout after which the process ends, whatever still runs in it.
#: The server has its own bound below it; this is for threads that are no daemons.
EXIT_GRACE = 0.6
#: Seconds beyond the drain timeout after which workers are killed.
WORKERS_GRACE = 0.7
#: Seconds that their parent has after them.
PARENT_GRACE = 0.1
#: Seconds that a worker of the reloader has for its drain: somebody waits for the new code.
RELOAD_DRAIN = 1.0
#: What stands for whoever connects to a unix socket.
LOCAL_ADDRESS = "127.0.0.1"
#: WebSocket routes that the banner names; ``flask websockets routes`` shows them all.
ROUTES_SHOWN = 10


@dataclass(frozen=True)
class Options:
    """How to serve. :meth:`WebSockets.run` says what each means."""

    host: str
    port: int
    workers: int
    separate_channels: bool
    cert: str | None
    key: str | None
    reload: bool
    forwarded_allow_ips: str | None
    compression: bool
    pin_workers: bool


@dataclass(frozen=True)
class Served:
    """What is to be served. The extension makes it."""

    #: The ASGI application.
    app: Callable[..., Awaitable[None]]
    flask: Flask
    config: Config
    #: Has everybody leave within so many seconds.
    drain: Callable[[float], Awaitable[None]]
    #: The rules of its WebSocket routes.
    rules: list[str]
    #: The largest message that any of them takes.
    max_message_bytes: int


#: Finds the application again in a new process; can be pickled.
Loader = Callable[[], Flask]


@dataclass(frozen=True)
class _Global:
    """Finds an application that is a global variable, in another process."""

    module: str
    name: str

    def __call__(self) -> Flask:
        found: Flask = getattr(import_module(self.module), self.name)
        return found


def global_of(app: Flask) -> Loader:
    """How a new process finds *app*: in the module that it is named after.

    :raises UsageError: if it is not there.
    """
    # What multiprocessing itself goes by, when such a process tries to start another.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UsageError(
            "This is a new process that imports the main module, to become a worker of another. "
            'Put websockets.run() behind if __name__ == "__main__".'
        )
    module = sys.modules.get(app.import_name)
    for name, value in vars(module or object).items():
        if value is app:
            # multiprocessing imports the main module anew, under both names.
            return _Global(app.import_name, name)
    raise UsageError(
        f"Workers and the reloader load the application in new processes, and {app!r} is no "
        f"global variable of the module {app.import_name!r} that it is named after. Make it one, "
        "or use the command, which takes application factories as well: "
        "flask --app 'module:create_app()' websockets serve."
    )


def serve(
    served: Served, options: Options, *, load: Loader | None = None, for_good: bool = False
) -> int:
    """Serve until a signal comes.

    :param load: for workers and the reloader; else they look for a global variable.
    :param for_good: the process is there for this alone, and ends soon after it.
    :returns: the exit code.
    :raises ConfigurationError: for options that cannot be.
    :raises UsageError: if workers or the reloader could not find the application.
    :raises OSError: if it cannot listen.
    """
    _validate(served, options)
    here = options.workers == 1 and not options.reload
    if load is None and not here:
        load = global_of(served.flask)
    timeout = served.config.drain_timeout
    listener = listen(options.host, options.port, served.config.send_timeout)
    try:
        # From the banner on, which says how to stop it, a signal is a normal end.
        banner = partial(_print_banner, served, options, listener)
        if load is None or here:
            watchdog = Watchdog(timeout + EXIT_GRACE, on_exit=listener.close)
            try:
                return _serve_here(served, options, listener, watchdog, on_started=banner)
            finally:
                if not for_good:
                    watchdog.call_off()
        work = _Work(load, options, listener)
        config = uvicorn.Config("", reload=options.reload)  # sets up the log, too
        if options.reload:
            reloader = ChangeReload(config, target=work.reload, sockets=[listener.socket])
            if isinstance(reloader, StatReload):
                # Or it would look for the first time a moment after the start, and never see
                # what was saved before that.
                reloader.should_restart()
            banner()
            reloader.run()
            code, ends = 0, time.monotonic() + RELOAD_DRAIN
        else:
            workers = Workers(options.workers, work.run, timeout + WORKERS_GRACE)
            code = workers.run(banner)
            ends = workers.told_at + timeout + WORKERS_GRACE + PARENT_GRACE
        if for_good:
            Watchdog(max(PARENT_GRACE, ends - time.monotonic()), code).tell()
        return code
    finally:
        listener.close()


def _validate(served: Served, options: Options) -> None:
    if not 0 <= options.port <= 65535:
        raise ConfigurationError(f"port is a number from 0 to 65535; got {options.port}.")
    if not options.host:
        raise ConfigurationError(
            'host is a name or address, or unix:// and a path; got "". 0.0.0.0 is every IPv4 '
            "address of this machine."
        )
    if threading.current_thread() is not threading.main_thread():
        raise UsageError(
            "websockets.run() serves in the main thread, where signals are heard. In another one "
            "run an ASGI server of your own with websockets.asgi_app()."
        )
    if options.workers < 1:
        raise ConfigurationError(f"workers is a number of at least 1; got {options.workers}.")
    if options.reload and options.workers > 1:
        raise ConfigurationError("reload is for one worker; leave out one of the two.")
    in_memory = served.config.backend_url == MEMORY_URL
    if options.workers > 1 and in_memory and not options.separate_channels:
        raise ConfigurationError(
            f"{options.workers} workers would not share their channels: those live in each "
            "process's own memory, and a message published in one worker never reaches the "
            "connections of another. Limits and counters are per process as well. Serve with "
            "one worker, or say separate_channels (--separate-channels) if the application can "
            "do with that."
        )
    if options.compression and not _has_websockets():
        raise ConfigurationError(
            "compression (--compression) needs the websockets package, which comes with "
            "flask-websockets[fast]. Without it uvicorn takes wsproto, which unpacks a message "
            "of some kilobytes to hundreds of megabytes before it looks at "
            "WEBSOCKETS_MAX_MESSAGE_BYTES."
        )
    if options.pin_workers and not can_pin():
        raise ConfigurationError("pin_workers (--pin-workers) needs Linux; leave it out here.")
    _validate_tls(options)


def _has_websockets() -> bool:
    """Whether uvicorn finds the package, by the way that uvicorn looks for it."""
    try:
        import websockets  # noqa: F401
    except ImportError:
        return False
    return True


def _validate_tls(options: Options) -> None:
    if options.key is not None and options.cert is None:
        raise ConfigurationError("key (--key) is of no use without cert (--cert).")
    if options.cert is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # A password, so that nobody is asked for one.
            context.load_cert_chain(options.cert, options.key, password="")
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(
                f"Cannot serve TLS with cert={options.cert!r}, key={options.key!r}: {error}. "
                "Expected PEM files of a certificate, its chain and its key, without a pass "
                "phrase."
            ) from None


@dataclass(frozen=True)
class _Work:
    """What a worker does. It is pickled on its way to the new process."""

    load: Loader
    options: Options
    listener: Listener
    number: int = 0

    def run(self, number: int, on_started: Callable[[], None]) -> None:
        """Serve in this process, until the parent says stop."""
        replace(self, number=number)._run(on_started, None)

    def reload(self, sockets: Any) -> None:
        """The same under uvicorn's reloader."""
        self._run(lambda: None, RELOAD_DRAIN)

    def _run(self, on_started: Callable[[], None], drain_timeout: float | None) -> None:
        # A terminal's SIGINT goes to every process: the parent passes on what counts.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        parent = os.getppid()
        app = self.load()
        served: Served = app.extensions["websockets"].websockets.served(app)
        if drain_timeout is not None:
            served = replace(served, config=replace(served.config, drain_timeout=drain_timeout))
        watchdog = Watchdog(served.config.drain_timeout + EXIT_GRACE)
        where = (self.listener, watchdog, parent, self.number)
        sys.exit(_serve_here(served, self.options, *where, on_started=on_started))


def _serve_here(
    served: Served,
    options: Options,
    listener: Listener,
    watchdog: Watchdog,
    parent: int | None = None,
    number: int = 0,
    on_started: Callable[[], None] = lambda: None,
) -> int:
    """Serve in this process, which may be a worker of another."""
    config = uvicorn.Config(
        served.app,
        ws_max_size=served.max_message_bytes,
        ws_per_message_deflate=options.compression,
        forwarded_allow_ips=options.forwarded_allow_ips,
        ssl_certfile=options.cert,
        ssl_keyfile=options.key,
    )
    config.load()
    if listener.is_unix or ":" in listener.host:
        config.loaded_app = _with_plain_addresses(config.loaded_app)
    config.http_protocol_class = limit_heads(
        config.http_protocol_class, served.config.handshake_timeout
    )
    server = DrainingServer(config, served.config, served.drain, watchdog, parent, on_started)
    try:
        # The flask command has pushed an application context, whose g would be everybody's.
        with pinned(number) if options.pin_workers else nullcontext():
            contextvars.Context().run(server.run, [listener.socket])
    except SystemExit as error:  # the application's startup failed, and uvicorn has logged it
        return error.code if isinstance(error.code, int) else 1
    return 0


def _with_plain_addresses(app: Any) -> Any:
    """Give clients an address that uvicorn's trust in proxies knows.

    Those of a unix socket have none. To trust everybody there instead would be to believe the
    first address in X-Forwarded-For, which a client may have written; so it is the last that is
    not trusted. Those of IPv4 have an IPv6 address where a socket takes both (RFC 4291, section
    2.5.5.2).
    """

    async def addressed(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            host, port = scope.get("client") or (LOCAL_ADDRESS, 0)
            scope["client"] = (host.removeprefix("::ffff:") if "." in host else host, port)
        await app(scope, receive, send)

    return addressed


def _print_banner(served: Served, options: Options, listener: Listener) -> None:
    secure = "s" if options.cert is not None else ""
    lines = [
        f"Serving Flask app {served.flask.import_name!r} with flask-websockets "
        f"{version('flask-websockets')} and uvicorn {uvicorn.__version__}",
        f"HTTP on {listener.url('http' + secure)}",
        f"WebSockets on {listener.url('ws' + secure)}",
        *(f"  {rule}" for rule in served.rules[:ROUTES_SHOWN]),
    ]
    if len(served.rules) > ROUTES_SHOWN:
        rest = len(served.rules) - ROUTES_SHOWN
        lines.append(f"  and {rest} more: flask websockets routes")
    if not served.rules:
        lines.append("  none: no view has @websockets.route")
    if options.workers > 1:
        lines.append(
            f"{options.workers} workers, each with channels, limits and counters of its own"
        )
    else:
        lines.append("One worker; channels live in its memory")
    lines.append("Press CTRL+C to quit")
    for line in lines:
        click.echo(f" * {line}", err=True)
