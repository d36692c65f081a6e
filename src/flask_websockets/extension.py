"""Any side. ``WebSockets``: the extension. The only place that knows both sides and joins them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, get_args
from weakref import WeakSet

from flask import Flask, has_app_context
from flask import json as flask_json
from flask.sansio.scaffold import Scaffold

from .answers import answer, require_upgrade
from .asgi import Application
from .bridge import Link, Rounds, User, run_on_the_loop, user_key
from .channels import Dropping, OnSlow, Publication, PublishResult
from .cli import commands
from .config import (
    ROUTE_LIMITS,
    Config,
    settings_of,
    validate_limits,
    validate_origins,
    validate_seconds,
    warn_caller,
    warned_as_unknown,
)
from .counters import Stats
from .errors import (
    ConnectionClosed,
    NotRunning,
    UsageError,
    WrongThread,
)
from .protocol import LOGIN_OVER, SharedMessage, message_bytes, validate_close, validate_token
from .rights import NO_IDENTITY, IdentifyType, RecheckType, Rights
from .runtime import DRAIN_GRACE, Runtime
from .servers.serve import Options, Served, serve
from .servers.werkzeug import DevelopmentLoop, DevelopmentServer
from .session import seal_session
from .signals import draining
from .subscription import Subscription
from .views import Route, View, largest_message, spare_async_views, view_function
from .websocket import AsyncWebSocket, BaseWebSocket, WebSocket, encode_msgpack

if TYPE_CHECKING:
    from .testing import WebSocketClient

logger: logging.Logger = logging.getLogger("flask_websockets")

ViewType = TypeVar("ViewType", bound=View)
Channels = str | Iterable[str]
AnyWebSocket = WebSocket | AsyncWebSocket
Exclude = AnyWebSocket | Iterable[AnyWebSocket]

#: The close reason for those who may not stay, by what a recheck says.
REVOKED = "the login is no longer valid"

#: Every object of this process, for the child of a fork.
_all: WeakSet[WebSockets] = WeakSet()


@dataclass
class AppState:
    """What one Flask application has: ``app.extensions["websockets"]``."""

    websockets: WebSockets
    config: Config
    rights: Rights
    #: What the configuration said when the settings were read.
    read: dict[str, Any]

    def warn_of_changes(self, app: Flask) -> None:
        """Warn once of each setting that was made or changed after they were read."""
        for key, value in settings_of(app.config).items():
            if key in self.read and self.read[key] == value:
                continue
            self.read[key] = value
            if not warned_as_unknown(key):
                warn_caller(
                    f"{key} was set after WebSockets(app) or init_app(app) had read the settings, "
                    "and has no effect: set it before."
                )


@dataclass(frozen=True)
class _Rule:
    rule: str
    endpoint: str
    view: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)

    def add_to(self, target: Scaffold) -> None:
        target.add_url_rule(self.rule, self.endpoint, self.view, websocket=True, **self.options)  # type: ignore[no-untyped-call, unused-ignore]


class WebSockets:
    """WebSocket routes and channels for Flask applications.

    Applications initialised with one object share its channels; two objects are separate.

    :param app: the application, if it is there already; else call :meth:`init_app`.
    """

    def __init__(self, app: Flask | None = None) -> None:
        self._rules: list[_Rule] = []
        self._view_functions: dict[Hashable, Callable[..., Any]] = {}
        self._apps: list[Flask] = []
        self._development_servers: list[DevelopmentServer] = []
        self._development_loop = DevelopmentLoop(self._drain)
        self._runtime: Runtime | None = None  # set on the loop; threads read it
        self._inherited: Runtime | None = None  # of a parent process; never used again
        self._stopped: str | None = None  # why publish raises NotRunning
        self._starting = threading.Lock()  # two loops must not start a runtime at once
        self._rights = Rights()
        self._rounds: Rounds | None = None  # of rechecks, while a server runs
        _all.add(self)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Set up *app*: read its ``WEBSOCKETS_*`` settings, add the routes made so far.

        ``app.wsgi_app`` is wrapped once, so that ``app.run`` can serve WebSockets too; and
        ``app.async_to_sync``, so that decorators that call views themselves leave an async
        WebSocket view to the server's loop. Plain HTTP to a WebSocket view is answered 426.

        :raises ConfigurationError: for a setting that cannot be right.
        :raises UsageError: if the application was set up before.
        """
        if "websockets" in app.extensions:
            raise UsageError(
                "This application has a WebSockets object already. Create one, call init_app "
                "once, and import that object where you need it."
            )
        config = Config.from_mapping(app.config)
        read = settings_of(app.config)
        app.extensions["websockets"] = AppState(self, config, self._rights, read)
        self._apps.append(app)
        for rule in self._rules:
            rule.add_to(app)
        server = DevelopmentServer(
            app.wsgi_app,
            lambda: self.asgi_app(app),
            lambda: largest_message(app, config),
            config.send_timeout,
            self._development_loop,
        )
        self._development_servers.append(server)
        app.wsgi_app = server  # type: ignore[method-assign]
        spare_async_views(app)
        app.url_value_preprocessors.setdefault(None, []).append(require_upgrade)
        # Flask calls them from the last to the first: this one right before it saves the session.
        app.after_request_funcs.setdefault(None, []).insert(0, seal_session)
        app.cli.add_command(commands)

    def route(
        self,
        rule: str,
        *,
        endpoint: str | None = None,
        blueprint: Scaffold | None = None,
        bp: Scaffold | None = None,
        subprotocols: Sequence[str] = (),
        origins: Sequence[str] | None = None,
        max_age: float | None = None,
        **options: Any,
    ) -> Callable[[ViewType], ViewType]:
        """Register a WebSocket view. The decorator returns the function it was given.

        The view is called with a :class:`WebSocket` and the rule's variables, on a thread of
        its own, inside a request context. An ``async def`` view gets an
        :class:`AsyncWebSocket` and runs on the server's event loop, inside that context too.

        :param rule: the URL rule, as for ``Flask.route``; the path may have an HTTP view too.
        :param endpoint: the endpoint's name; by default the function's.
        :param blueprint: the blueprint to register it on.
        :param bp: the older name of *blueprint*.
        :param subprotocols: what the view speaks; the first of the client's is chosen.
        :param origins: origins allowed on this route, instead of
            ``WEBSOCKETS_ALLOWED_ORIGINS``; the application's own always is.
        :param max_age: seconds for which the login holds that the handshake was checked with.
            Then the connection is closed with 4401, and the client's next handshake is checked
            anew. By default it holds as long as the connection.
        :param options: limits of this route, instead of the setting ``WEBSOCKETS_`` and the
            same name in capitals: ``max_message_bytes``, ``inbox_messages``, ``inbox_bytes``,
            ``inbox_timeout``, ``inbox_full``, ``outbox_messages``, ``outbox_bytes``,
            ``send_timeout``, ``close_timeout``, ``max_channels_per_connection``,
            ``max_messages_per_second``, ``max_bytes_per_second``, ``rate_exceeded``. And
            options for Werkzeug's ``Rule``: ``defaults``, ``host``, ``subdomain``,
            ``strict_slashes``.
        :raises ConfigurationError: for origins, limits or a *max_age* that cannot be right.
        :raises ValueError: for a subprotocol that is no token.
        :raises TypeError: for subprotocols that are one string, and for an option that there is
            not.
        :raises UsageError: for both *blueprint* and *bp*.
        """
        if blueprint is not None and bp is not None:
            raise UsageError("blueprint= and bp= are the same; give one.")
        if isinstance(subprotocols, str):
            raise TypeError(f"subprotocols is a list of names; got the string {subprotocols!r}.")
        supported = tuple(validate_token("subprotocol", name) for name in subprotocols)
        allowed = None
        if origins is not None:
            if isinstance(origins, str):
                origins = (origins,)
            allowed = validate_origins("origins", tuple(origins))
        if max_age is not None:
            max_age = validate_seconds("max_age", max_age)

        limits = validate_limits(
            {name: options.pop(name) for name in ROUTE_LIMITS & options.keys()}
        )

        def register(view: ViewType) -> ViewType:
            name = endpoint or view.__name__
            function = self._function_of(Route(view, supported, allowed, limits, max_age))
            made = _Rule(rule, name, function, options)
            target = blueprint or bp
            if target is not None:
                made.add_to(target)
                return view
            for app in self._apps:
                made.add_to(app)
            self._rules.append(made)
            return view

        return register

    # -- channels -------------------------------------------------------------------------------

    def subscribe(
        self, ws: AnyWebSocket, channels: Channels, *, on_slow: OnSlow = "close"
    ) -> Subscription:
        """Subscribe a connection to channels for the length of a ``with`` block.

        ``async with`` in an async view. Accepts the connection if need be. Nothing published
        after the block was entered is missed; nothing published after it was left is
        delivered, and what was queued before goes out. Blocks may be nested, for the same
        channels too: the outermost one's options hold. Whatever the block raises, nothing is
        left behind.

        A published message never waits for a subscriber. Where the subscriber's outbox is full
        (``WEBSOCKETS_OUTBOX_MESSAGES``, ``WEBSOCKETS_OUTBOX_BYTES``), *on_slow* decides; only
        the subscription's own messages are ever dropped.

        :param ws: the connection.
        :param channels: names of channels; a plain string is one name.
        :param on_slow: ``"close"`` closes the connection with 1013; ``"drop_oldest"`` drops
            what has waited longest, ``"drop_newest"`` the new message; with ``"latest"`` only
            the newest message of each channel ever waits.
        :returns: the subscription, which is what to enter; it counts what is dropped. Entering
            it raises what :meth:`Subscription.__enter__` says.
        :raises ValueError: for another *on_slow*, and for a name that is longer than
            ``WEBSOCKETS_MAX_CHANNEL_NAME_BYTES``.
        :raises TypeError: for a connection or channels of the wrong type.
        """
        policies = ("close", *get_args(Dropping))
        if on_slow not in policies:
            raise ValueError(f"on_slow must be one of {', '.join(policies)}; got {on_slow!r}.")
        if not isinstance(ws, BaseWebSocket):
            raise TypeError(
                f"subscribe takes the connection first, and then channels; got {type(ws).__name__}."
            )
        try:
            names = _names(channels, ws.link.config.max_channel_name_bytes)
        except ValueError:
            ws.link.entry.registry.count("refused_subscribes")
            raise
        return Subscription(ws, names, on_slow, self._runtime_of)

    def unsubscribe(self, ws: AnyWebSocket, channels: Channels) -> None:
        """Unsubscribe a connection from channels, whatever the number of nested subscribes.

        Channels that it is not subscribed to are no error, and neither is a connection that is
        over. What was queued before goes out.

        :param ws: the connection.
        :param channels: names of channels; a plain string is one name.
        :raises UsageError: for a connection of another :class:`WebSockets` object.
        :raises ValueError: for a name that is longer than ``WEBSOCKETS_MAX_CHANNEL_NAME_BYTES``.
        :raises TypeError: for channels of the wrong type.
        """
        names = _names(channels, ws.link.config.max_channel_name_bytes)
        if not ws.closed:
            ws.link.leave(names, self._runtime_of(ws).hub.unsubscribe, entirely=True)

    async def aunsubscribe(self, ws: AnyWebSocket, channels: Channels) -> None:
        """Unsubscribe a connection, in async code. See :meth:`unsubscribe`."""
        self.unsubscribe(ws, channels)
        if not ws.closed:
            ws.link.catch_up()

    def publish(
        self,
        data: Any,
        channels: Channels,
        encode_json: bool = False,
        encode_msgpack: bool = False,
        exclude: Exclude = (),
    ) -> None:
        """Send a message to every subscriber of the channels, from any thread.

        Never waits for a subscriber. Returns when the loop has been given the message: what one
        thread publishes and sends arrives in that order. Every subscriber of a channel gets its
        messages in the same order, each at most once; one that is subscribed to two of the
        named channels gets the message once.

        Before a server has started there are no subscribers, and nothing happens.

        :param data: ``str`` for text frames, ``bytes`` for binary ones.
        :param channels: names of channels; a plain string is one name.
        :param encode_json: encode *data* as JSON first, into text frames.
        :param encode_msgpack: encode *data* as MessagePack first, into binary frames.
        :param exclude: one connection or several that do not get it.
        :raises NotRunning: if the server has stopped, or this is a forked child of its process.
        :raises WrongThread: on the event loop's own thread; await :meth:`apublish` there.
        :raises TimeoutError: if the loop does not take it within ``WEBSOCKETS_SEND_TIMEOUT``:
            ``WEBSOCKETS_MAX_PENDING_PUBLISHES`` are waiting already.
        :raises ValueError: for more than ``WEBSOCKETS_MAX_PUBLISH_BYTES`` of data, and for a name
            that is longer than ``WEBSOCKETS_MAX_CHANNEL_NAME_BYTES``.
        :raises TypeError: for data, channels or *exclude* of the wrong type.
        :raises UsageError: for both *encode_json* and *encode_msgpack*.
        :raises ModuleNotFoundError: for *encode_msgpack* without the ``msgpack`` extra.
        """
        publication = self._publication(data, channels, encode_json, encode_msgpack, exclude)
        runtime = self._running()
        if runtime is None:
            return
        _not_on_the_loop(runtime, "publish", "apublish")
        try:
            runtime.door.take_slot(runtime.config.send_timeout)
            runtime.door.post_in_slot(runtime.hub.publish, publication)
        except TimeoutError:
            runtime.registry.count("refused_publishes")
            raise
        except NotRunning:
            # The test client's last connection may have closed just now: that is no stop.
            if self._stopped is not None:
                raise

    def publish_json(self, data: Any, channels: Channels, exclude: Exclude = ()) -> None:
        """Publish *data* as JSON. See :meth:`publish`."""
        self.publish(data, channels, encode_json=True, exclude=exclude)

    async def apublish(
        self,
        data: Any,
        channels: Channels,
        encode_json: bool = False,
        encode_msgpack: bool = False,
        exclude: Exclude = (),
    ) -> PublishResult:
        """Publish from async code on the server's loop. See :meth:`publish`.

        What threads published before comes first.

        :raises WrongThread: on another loop than the server's.
        """
        publication = self._publication(data, channels, encode_json, encode_msgpack, exclude)
        runtime = self._running()
        if runtime is None:
            return PublishResult(local=0)
        _on_the_loop(runtime, "apublish", "publish")
        runtime.door.drain()
        return runtime.hub.publish(publication)

    async def apublish_json(
        self, data: Any, channels: Channels, exclude: Exclude = ()
    ) -> PublishResult:
        """Publish *data* as JSON from async code. See :meth:`apublish`."""
        return await self.apublish(data, channels, encode_json=True, exclude=exclude)

    def stats(self) -> Stats:
        """What is connected, subscribed and pending, and what was counted since the start.

        From any thread. All zeros while no server runs.
        """
        runtime = self._runtime
        if runtime is None:
            return Stats(**{field.name: 0 for field in fields(Stats)})
        return runtime.stats()

    # -- rights over time ---------------------------------------------------------------------

    def identify(self, function: IdentifyType) -> IdentifyType:
        """Register the function that says who a user is. A decorator; it returns the function.

        Called without arguments in the request context of each handshake, after the Origin
        was checked and before the view and its decorators. It returns the user's id, a ``str``,
        ``int`` or ``uuid.UUID``, or None for a client without a user; 5 and ``"5"`` are the same
        user. :meth:`disconnect`, :meth:`recheck` and ``WEBSOCKETS_MAX_CONNECTIONS_PER_USER``
        need it.

        :raises UsageError: if one is registered already.
        """
        self._rights.set_identify(function)
        return function

    def recheck(self, *, every: float) -> Callable[[RecheckType], RecheckType]:
        """Register a function that says of each user, again and again, whether he may stay.

        It is called with what :meth:`identify` returned, once a round for each user that is
        connected, in a thread that all users share, inside an application context. For a user
        of whom it returns something false, every connection is closed with 4401. Where it
        raises, that is logged and the connections stay. Clients without a user are not asked.

        Takes effect when a server starts.

        :param every: seconds between the end of one round and the next.
        :raises UsageError: if one is registered already.
        :raises ConfigurationError: for seconds that cannot be right.
        """
        seconds = validate_seconds("every", every)

        def register(function: RecheckType) -> RecheckType:
            self._rights.set_recheck(function, seconds)
            return function

        return register

    def disconnect(self, *, user: User, code: int = LOGIN_OVER, reason: str = "") -> int:
        """End every connection of a user, on logout for example. From any thread.

        What waits for them is dropped, and nothing that is published after it reaches them. A
        handshake that has no answer yet is answered 401. Whoever may still log in may connect
        again: make an end to the login first.

        :param user: as :meth:`identify` returns it.
        :param code: the close code; 4401, as a 401 is to a request, tells a page to log in.
        :param reason: at most 123 bytes of UTF-8.
        :returns: how many connections there were, in this process.
        :raises UsageError: if nothing says who a user is.
        :raises WrongThread: on the event loop's own thread; await :meth:`adisconnect` there.
        :raises NotRunning: if the server has stopped.
        :raises ValueError: for a code that may not be sent, or a reason that is too long.
        :raises TypeError: if *user* is no ``str``, ``int`` or ``UUID``.
        """
        validate_close(code, reason)
        key, runtime = self._known(user), self._running()
        if runtime is None:
            return 0
        _not_on_the_loop(runtime, "disconnect", "adisconnect")
        links = runtime.registry.users.evict(key)
        if links:
            runtime.door.post(runtime.expel, (links, code, reason))
        return len(links)

    async def adisconnect(self, *, user: User, code: int = LOGIN_OVER, reason: str = "") -> int:
        """End every connection of a user, in async code on the loop. See :meth:`disconnect`."""
        validate_close(code, reason)
        key, runtime = self._known(user), self._running()
        if runtime is None:
            return 0
        _on_the_loop(runtime, "adisconnect", "disconnect")
        links = runtime.registry.users.evict(key)
        runtime.door.drain()
        runtime.expel((links, code, reason))
        return len(links)

    def _known(self, user: User) -> str:
        if not self._rights.knows_users:
            raise UsageError(f"No user can be disconnected: {NO_IDENTITY}.")
        return user_key(user)

    # -- draining -----------------------------------------------------------------------------

    def drain(self, timeout: float | None = None) -> None:
        """Have everybody leave, before this process is taken away. From any thread.

        From the first moment handshakes are answered 503. Applications that listen to
        :data:`draining` may say goodbye. Then connections are closed with 1012, in batches, so
        that their clients do not all come back in the same moment; a view that is busy may
        finish what it has received, and still send. At half the timeout the last of them is
        closed; at its end what is left is cut, and views that did not return are logged with
        their stack.

        Blocks until all that is done, which is soon where everybody leaves. After it the
        process goes on answering HTTP, and handshakes with 503, until a server starts anew.
        ``flask websockets serve`` drains by itself, on SIGTERM.

        :param timeout: seconds; None for ``WEBSOCKETS_DRAIN_TIMEOUT``.
        :raises WrongThread: on the event loop's own thread; await :meth:`adrain` there.
        :raises ValueError: for a timeout that is no number above 0.
        """
        timeout = self._drain_timeout(timeout)
        runtime = self._runtime
        if runtime is None or runtime.door.shut:
            return
        _not_on_the_loop(runtime, "drain", "adrain")
        with suppress(NotRunning):  # everybody has left
            run_on_the_loop(runtime.door, partial(self._drain, timeout), timeout + DRAIN_GRACE)

    async def adrain(self, timeout: float | None = None) -> None:
        """Have everybody leave, in async code on the loop. See :meth:`drain`."""
        timeout = self._drain_timeout(timeout)
        runtime = self._runtime
        if runtime is not None and not runtime.door.shut:
            _on_the_loop(runtime, "adrain", "drain")
            await self._drain(timeout)

    def _drain_timeout(self, timeout: float | None) -> float:
        if timeout is None:
            return self._config().drain_timeout
        return validate_seconds("timeout", timeout)

    # -- serving --------------------------------------------------------------------------------

    def asgi_app(self, app: Flask | None = None) -> Application:
        """The ASGI application that serves a Flask application, HTTP and WebSockets.

        :param app: the Flask application; may be left out while there is only one.
        :raises UsageError: if it was not set up, or if there are several and none is named.
        """
        found = self._only_app() if app is None else app
        state = self._state_of(found)
        return Application(
            lambda environ, start_response: found.wsgi_app(environ, start_response),
            state.config,
            runtime=self._runtime_here,
            restart=self._start_runtime,
            stop=self._stop,
            answer=answer,
        )

    def run(
        self,
        app: Flask | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        workers: int = 1,
        separate_channels: bool = False,
        cert: str | None = None,
        key: str | None = None,
        reload: bool = False,
        forwarded_allow_ips: str | None = None,
        compression: bool = False,
        pin_workers: bool = False,
    ) -> None:
        """Serve a Flask application for production, HTTP and WebSockets, with uvicorn.

        Returns after SIGTERM or SIGINT, when everybody was asked to leave: new handshakes get
        503, open connections are closed with 1012, and what is left after
        ``WEBSOCKETS_DRAIN_TIMEOUT`` is cut. If even that does not end it, the process ends.
        ``flask websockets serve`` does the same, with options of the same names. Under the
        ``flask`` command a call is ignored, as one of ``app.run`` is.

        :param app: the Flask application; may be left out while there is only one.
        :param host: a name or address to listen at; ``unix://`` and a path for a unix socket.
        :param port: 0 for any that is free.
        :param workers: processes. The application must be a global variable of its module.
        :param separate_channels: allow several workers, though each has channels, limits and
            counters of its own: a message published in one reaches nobody in another.
        :param cert: path of a PEM file with the certificate and its chain, for HTTPS and wss.
        :param key: path of the PEM file with its key, if that is another file.
        :param reload: start again when a Python file below the current directory has changed.
        :param forwarded_allow_ips: addresses and networks of proxies, separated by commas,
            whose ``X-Forwarded-For`` and ``X-Forwarded-Proto`` are believed; ``*`` for all. By
            default this machine, and whoever connects to a unix socket.
        :param compression: offer permessage-deflate (RFC 7692). It costs some 40 KiB a
            connection, and a small message can unpack to a very large one.
        :param pin_workers: keep each worker on one of the cores that the process may use, in turn
            (Linux). Plain views are faster, as the interpreter is handed over on one core; code
            that computes outside the interpreter in several threads has no other core.
        :raises ConfigurationError: for options that cannot be, several workers without
            *separate_channels* among them.
        :raises UsageError: if workers or the reloader could not find the application.
        :raises OSError: if it cannot listen there.
        """
        if os.environ.get("FLASK_RUN_FROM_CLI") == "true":
            warn_caller(
                "websockets.run() is ignored under the flask command. Use "
                '"flask websockets serve", or put the call behind if __name__ == "__main__".'
            )
            return
        app = self._only_app() if app is None else app
        options = Options(
            host=host,
            port=port,
            workers=workers,
            separate_channels=separate_channels,
            cert=cert,
            key=key,
            reload=reload,
            forwarded_allow_ips=forwarded_allow_ips,
            compression=compression,
            pin_workers=pin_workers,
        )
        code = serve(self.served(app), options)
        if code:
            raise SystemExit(code)

    def test_client(self, app: Flask | None = None, **options: Any) -> WebSocketClient:
        """A test client that speaks WebSocket too, in process, without a server.

        It is a subclass of the application's own client class, and shares its cookies.

        :param app: the Flask application; may be left out while there is only one.
        :param options: what the application's client class takes.
        :raises UsageError: if it was not set up, or if there are several and none is named; and
            for a ``test_client_class`` that is no ``FlaskClient``.
        """
        from .testing import make_client

        app = self._only_app() if app is None else app
        self._state_of(app)
        return make_client(self, app, options)

    # -- within the package -----------------------------------------------------------------------

    def served(self, app: Flask) -> Served:
        """Any thread. What a server needs to know of an application."""
        asgi = self.asgi_app(app)
        rules = [rule.rule for rule in app.url_map.iter_rules() if rule.websocket]
        config = app.extensions["websockets"].config
        return Served(asgi, app, config, self._drain, rules, largest_message(app, config))

    async def _drain(self, timeout: float) -> None:
        """Loop. Have everybody leave, because the server is about to stop."""
        runtime = self._runtime
        if runtime is not None:
            await runtime.drain(timeout, self._announce if draining.receivers else None)

    def _announce(self) -> None:
        """Thread. Let applications say goodbye."""
        for app in self._apps:
            for receiver in draining.receivers_for(app):
                try:
                    with app.app_context():
                        app.ensure_sync(receiver)(app)
                except Exception:
                    logger.exception("A receiver of the draining signal failed")

    async def stop_testing(self) -> None:
        """Loop. For the test client: its last connection is gone, and another may follow."""
        await self._stop(restartable=True)

    def _function_of(self, route: Route) -> Callable[..., Any]:
        # A view of several rules is one function to Flask, as where it is routed itself.
        limits = tuple(sorted(route.limits.items()))
        key = (route.view, route.subprotocols, route.origins, limits, route.max_age)
        function = self._view_functions.get(key)
        if function is None:
            function = self._view_functions[key] = view_function(route)
        return function

    def _state_of(self, app: Flask) -> AppState:
        """What this object has made of an application that is about to be served or tested."""
        state = app.extensions.get("websockets")
        if not isinstance(state, AppState) or state.websockets is not self:
            raise UsageError(
                "Call websockets.init_app(app) before this application is served or tested."
            )
        state.warn_of_changes(app)
        return state

    def _only_app(self) -> Flask:
        if len(self._apps) != 1:
            raise UsageError(
                f"Name the application: this object has {len(self._apps)}, not one. Give it to "
                "WebSockets(app) or init_app(app) first, or as an argument here."
            )
        return self._apps[0]

    def _runtime_here(self, config: Config) -> Runtime:
        """Loop. The running loop's runtime; started if no server said that it has come up."""
        runtime = self._runtime
        if runtime is not None and runtime.door.leads_here:
            return runtime
        return self._start_runtime(config)

    def _start_runtime(self, config: Config) -> Runtime:
        """Loop. A runtime for a server that comes up here.

        :raises UsageError: while another loop's is running.
        """
        with self._starting:
            runtime = self._runtime
            if runtime is not None and not runtime.door.shut:
                if runtime.door.leads_here:
                    return runtime
                raise UsageError(
                    "This WebSockets object is being served by another event loop of this "
                    "process. One object serves one loop: stop that server first, or use two "
                    "objects, whose channels are separate."
                )
            self._runtime = runtime = Runtime(config)
            self._stopped = None
            if self._rights.every is not None:
                if not self._rights.knows_users:
                    logger.error("No recheck will ever be made: %s", NO_IDENTITY)
                self._rounds = Rounds(self._rights.every, partial(self._recheck, runtime))
            return runtime

    def _recheck(self, runtime: Runtime) -> bool:
        """Thread of the rounds. Close the connections of those who may not stay."""
        for key in self._rights.revoked(runtime.registry):
            links = runtime.registry.users.evict(key)
            try:
                runtime.door.post(runtime.expel, (links, LOGIN_OVER, REVOKED))
            except NotRunning:
                return False
        return not runtime.door.shut

    async def _stop(self, *, restartable: bool = False) -> None:
        """Loop. The server goes down; *restartable* where publish should not mind."""
        runtime = self._runtime
        if runtime is not None:
            if not restartable:
                self._stopped = "The server has stopped; nothing can be published any more."
            if self._rounds is not None:
                self._rounds.stop()
            await runtime.stop()
            self._runtime = None

    def _forked(self) -> None:
        """The child of a fork. Its parent's loop takes callbacks here, and never runs them."""
        self._starting = threading.Lock()
        self._rounds = None  # its thread is the parent's
        self._development_loop.forget()
        for server in self._development_servers:
            server.forget()
        if self._runtime is not None:
            self._inherited, self._runtime = self._runtime, None  # its streams are the parent's
            self._stopped = (
                "This process was forked from one whose server was running; a server must "
                "start here before anything can be published."
            )

    def _running(self) -> Runtime | None:
        """Any thread. The runtime, None before there is one.

        :raises NotRunning: after it.
        """
        if self._stopped is not None:
            raise NotRunning(self._stopped)
        runtime = self._runtime
        if not threading.main_thread().is_alive() and not (runtime and runtime.draining):
            # While it drains, views say their last words; threads that are no daemons have ended.
            raise NotRunning("The main thread has ended, and the server with it.")
        return runtime

    def _runtime_of(self, ws: AnyWebSocket) -> Runtime:
        runtime = self._runtime
        if runtime is not None and ws.link.belongs_to(runtime.door):
            return runtime
        if ws.closed:
            raise ConnectionClosed(ws.link.code, ws.link.reason)
        raise UsageError(
            "This connection belongs to another WebSockets object; channels are not shared "
            "between two."
        )

    def _publication(
        self,
        data: Any,
        channels: Channels,
        encode_json: bool,
        encode_msgpack_: bool,
        exclude: Exclude,
    ) -> Publication:
        if encode_json and encode_msgpack_:
            raise UsageError("encode_json and encode_msgpack exclude each other.")
        if encode_json:
            data = self._dumps(data)
        elif encode_msgpack_:
            data = encode_msgpack(data)
        if isinstance(data, str):
            key = "text"
        elif isinstance(data, (bytes, bytearray, memoryview)):
            key, data = "bytes", bytes(data)
        else:
            raise TypeError(
                f"A message is str or bytes; got {type(data).__name__}. "
                "publish_json takes anything that JSON can carry."
            )
        size, config = message_bytes(data), self._config()
        try:
            _check_size(size, config.max_publish_bytes)
            names = _names(channels, config.max_channel_name_bytes)
        except ValueError:
            runtime = self._runtime  # the loop may take it away at any moment
            if runtime is not None:
                runtime.registry.count("refused_publishes")
            raise
        return Publication(SharedMessage(key, data), size, names, _links(exclude))

    def _config(self) -> Config:
        """Any thread. The settings that hold for what belongs to no connection."""
        runtime = self._runtime  # the loop may take it away at any moment
        if runtime is not None:
            return runtime.config
        if self._apps:
            config: Config = self._apps[0].extensions["websockets"].config
            return config
        return Config()

    def _dumps(self, data: Any) -> str:
        # Publisher threads have no application context; the provider is the application's.
        if has_app_context() or not self._apps:
            return flask_json.dumps(data)
        return self._apps[0].json.dumps(data)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(
            f"A published message has at most {limit} bytes (WEBSOCKETS_MAX_PUBLISH_BYTES); got "
            f"{size}. It would wait in the outbox of every subscriber."
        )


def _names(channels: Channels, limit: int) -> tuple[str, ...]:
    names = (channels,) if isinstance(channels, str) else tuple(dict.fromkeys(channels))
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"A channel's name is a str; got {type(name).__name__}.")
        if len(name) * 4 > limit and (size := message_bytes(name)) > limit:
            raise ValueError(
                f"A channel's name has at most {limit} bytes of UTF-8 "
                f"(WEBSOCKETS_MAX_CHANNEL_NAME_BYTES); got {size}: {name[:40]!r}..."
            )
    return names


def _not_on_the_loop(runtime: Runtime, name: str, twin: str) -> None:
    if threading.get_ident() == runtime.door.thread and not runtime.door.shut:
        raise WrongThread(
            f"{name} was called on the event loop's own thread, where it might wait for "
            f"itself. In async code: await websockets.{twin}(...). In a signal handler: "
            f"asyncio.create_task(websockets.{twin}(...))."
        )


def _on_the_loop(runtime: Runtime, name: str, twin: str) -> None:
    if threading.get_ident() != runtime.door.thread:
        raise WrongThread(
            f"{name} was awaited on another thread than the server's loop. Call {twin} there."
        )


def _links(exclude: Exclude) -> Collection[Link]:
    excluded = (exclude,) if isinstance(exclude, BaseWebSocket) else tuple(exclude)
    for ws in excluded:
        if not isinstance(ws, BaseWebSocket):
            raise TypeError(
                f"exclude is a WebSocket or AsyncWebSocket, or several; got {type(ws).__name__}."
            )
    return [ws.link for ws in excluded]


def _after_fork() -> None:
    for websockets in tuple(_all):
        websockets._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
