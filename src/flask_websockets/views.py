"""View side. A WebSocket view inside Flask: a WSGI call that has not returned yet (I3).

``answers.py`` makes the call; Flask routes, runs its hooks and comes to the view function that
``view_function`` made.

An async view goes on after that call: its request context is pushed once more than the call
pops, and popped by ``_finish``, in a thread, when the view has ended.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from traceback import format_exception_only
from typing import Any

from flask import Flask, Response, current_app, has_request_context, request
from flask.globals import request_ctx
from flask.signals import got_request_exception
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException

from .answers import UpgradeRequired, check_origin, with_context
from .bridge import Handshake, Link
from .config import Config
from .environ import WEBSOCKET
from .errors import ConnectionClosed
from .protocol import MAX_REASON_BYTES, State
from .session import HandshakeSession
from .websocket import AsyncWebSocket, WebSocket

logger: logging.Logger = logging.getLogger("flask_websockets")

View = Callable[..., Any]

#: Close codes from here on are the application's own; 4404 is a 404 after the accept.
APPLICATION_CODES = 4000


@dataclass(frozen=True)
class Route:
    """What :meth:`WebSockets.route` was told. ``view_function.websocket_route`` has it."""

    #: The user's view.
    view: View
    #: Subprotocols that it speaks.
    subprotocols: tuple[str, ...] = ()
    #: Origins allowed beside the application's own; None for those of the configuration.
    origins: tuple[str, ...] | None = None
    #: Settings of its own, by the names of ``Config``'s fields.
    limits: Mapping[str, Any] = field(default_factory=dict)
    #: Seconds after which its connections are closed with 4401.
    max_age: float | None = None

    @property
    def is_async(self) -> bool:
        """Whether the view is awaited, below whatever decorators."""
        return any(map(inspect.iscoroutinefunction, (self.view, inspect.unwrap(self.view))))

    def caller(self) -> View:
        """What to call with the connection and the rule's variables.

        Flask calls a view with keywords, so a decorator may take nothing else, as the one in
        Flask's tutorial does: that one gets the connection as a keyword too, by the name that
        the view has for it.
        """
        outer = inspect.signature(self.view, follow_wrapped=False).parameters.values()
        if [parameter.kind for parameter in outer] != [inspect.Parameter.VAR_KEYWORD]:
            return self.view
        named = [
            name
            for name, parameter in inspect.signature(self.view).parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        name = named[0] if named else "ws"  # without functools.wraps nobody knows
        return lambda ws, **arguments: self.view(**{name: ws}, **arguments)


def view_function(route: Route) -> Callable[..., ResponseReturnValue]:
    """The Flask view function for a WebSocket view."""
    is_async, view = route.is_async, route.caller()  # decided once

    # Flask looks at the wrapper to decide whether a view is async; it is not.
    @wraps(route.view)
    def websocket_view(**arguments: Any) -> ResponseReturnValue:
        handshake: Handshake | None = request.environ.get(WEBSOCKET)
        if handshake is None:
            raise UpgradeRequired(
                "This is a WebSocket endpoint, and this server speaks WSGI only. Serve the "
                "application's asgi_app(), with uvicorn for example."
            )
        link, session = handshake.link, HandshakeSession()
        link.entry.endpoint = request.endpoint or ""
        link.entry.peer = request.remote_addr or link.entry.peer
        check_origin(route.origins, link)
        if route.limits:
            link.configure(replace(link.config, **route.limits))
        link.entry.max_age = route.max_age
        state = current_app.extensions["websockets"]
        state.rights.take_places(link)
        handshake.before_save = session.seal
        common = handshake, request.environ, route.subprotocols, session.save
        if is_async:
            ws = AsyncWebSocket(*common)
            handshake.function = inspect.unwrap(route.view)
            returned = _begin(partial(view, ws, **arguments), ws, handshake, session)
        else:
            try:
                returned = _run(view, WebSocket(*common), arguments)
            finally:
                session.report()
        if link.state is not State.REFUSED and session.saved:
            if returned is not None:
                _warn_of_returned(returned)
            return Response()  # nobody gets this one either: after_request wants to see one
        response: ResponseReturnValue = returned if returned is not None else Response(status=403)
        return response

    websocket_view.websocket_route = route  # type: ignore[attr-defined]
    return websocket_view


def largest_message(app: Flask, config: Config) -> int:
    """Bytes of the largest message that any view of *app* takes: a server has one limit."""
    largest = config.max_message_bytes
    for view in app.view_functions.values():
        route: Route | None = getattr(view, "websocket_route", None)
        if route is not None:
            largest = max(largest, route.limits.get("max_message_bytes", 0))
    return largest


def _warn_of_returned(returned: object) -> None:
    logger.warning(
        "The view of %s returned %s after its connection was accepted; nobody gets it",
        request.environ[WEBSOCKET].link.entry,
        type(returned).__name__,
    )


class _Goodbye:
    """Says goodbye in the name of a view that runs inside: 1000, 1011 or 4000 + status."""

    __slots__ = ("_link",)

    def __init__(self, link: Link) -> None:
        self._link = link

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, raised: BaseException | None, traceback: object) -> bool:
        link, code, reason = self._link, 1011, ""
        try:
            if raised is None:
                code = 1000
                return False
            error = _unwrap(raised, over=link.state in (State.CLOSED, State.REFUSED))
            if isinstance(error, HTTPException):
                status = error.get_response().status_code if error.code is None else error.code
                code = APPLICATION_CODES + status
                reason = _cut(error.name)
            elif error is not None and current_app.debug:
                reason = _cut("".join(format_exception_only(error)).strip())
            if error is not None and error is not raised:
                raise error from None
            return error is None
        finally:
            # In finally: SystemExit closes with 1011 as well (I5).
            if link.state is State.OPEN:
                link.close(code, reason)


def _cut(reason: str) -> str:
    """As much of a close reason as a frame can carry."""
    return reason.encode(errors="replace")[:MAX_REASON_BYTES].decode(errors="ignore")


def _unwrap(error: BaseException, *, over: bool) -> BaseException | None:
    """What a view failed with, out of the groups of its tasks; None if that is its normal end.

    :param over: whether the view's connection is over. A ``ConnectionClosed`` while it is not
        is somebody else's, and an error like any other.
    """
    rest: BaseException | None = error
    if over and isinstance(error, BaseExceptionGroup):
        _, rest = error.split(ConnectionClosed)
    elif over and isinstance(error, ConnectionClosed):
        return None
    while isinstance(rest, BaseExceptionGroup) and len(rest.exceptions) == 1:
        rest = rest.exceptions[0]
    return rest


def _run(view: View, ws: WebSocket, arguments: dict[str, Any]) -> Any:
    """View thread. Call a plain view."""
    with _Goodbye(ws.link):
        returned = view(ws, **arguments)
        if returned is None and ws.link.state is State.CONNECTING:
            ws.accept()
        return returned
    return None


# -- async views ----------------------------------------------------------------------------


def _begin(
    view: Callable[[], Any], ws: AsyncWebSocket, handshake: Handshake, session: HandshakeSession
) -> Any:
    """View thread. Start an async view, and wait until it has accepted or has ended.

    Its decorators run here, where they may block.
    """
    coroutine = view()
    if not inspect.iscoroutine(coroutine):
        coroutine = _return(coroutine)  # a decorator has answered
    try:
        handshake.start(partial(_await, coroutine, ws))
    except BaseException:
        coroutine.close()
        raise
    ended = handshake.serve()
    if ended is not None:
        returned, error = ended
        if error is not None:
            raise error
        return returned
    context = request_ctx._get_current_object()  # type: ignore[attr-defined]
    arguments = request.view_args
    context.push()  # it stays when the WSGI call pops it
    request.view_args = arguments  # the push has matched the URL once more
    handshake.on_call_end = session.unseal
    handshake.finish = partial(_finish, context, session)
    return None


async def _return(value: Any) -> Any:
    return value


async def _await(coroutine: Coroutine[Any, Any, Any], ws: AsyncWebSocket) -> Any:
    """Loop. Await an async view."""
    with _Goodbye(ws.link):
        returned = await coroutine
        if returned is None and ws.link.state is State.CONNECTING:
            await ws.accept()
        return returned
    return None


def _finish(
    context: Any, session: HandshakeSession, returned: Any, error: BaseException | None
) -> BaseException | None:
    """Thread. Do what Flask does at the end of a request, for an async view that was accepted.

    :returns: what comes out of the application: nothing, unless it propagates exceptions.
    """
    unexpected: BaseException | None = None
    try:
        session.report()
        if error is not None:
            error = _tell_flask(context, error)
        elif returned is not None:
            _warn_of_returned(returned)
    except BaseException as raised:
        error = unexpected = raised
    try:
        context.pop(error)
    except BaseException as raised:
        unexpected = raised
    if unexpected is not None:
        entry = context.request.environ[WEBSOCKET].link.entry
        logger.error("Exception on WebSocket %s", entry, exc_info=unexpected)
    return unexpected


def _tell_flask(context: Any, error: BaseException) -> BaseException | None:
    """What ``Flask.wsgi_app`` does with an exception, but for a response that nobody gets.

    :returns: the exception for teardown functions; None if an error handler dealt with it.
    :raises Exception: if the application propagates exceptions, as in tests.
    """
    if not isinstance(error, Exception):
        raise error
    app: Flask = context.app
    try:
        try:
            raise error  # Flask looks at what is being handled
        except Exception as raised:
            with_context(app.handle_user_exception, context, raised)
    except Exception as unhandled:
        got_request_exception.send(app, _async_wrapper=app.ensure_sync, exception=unhandled)
        propagate = app.config["PROPAGATE_EXCEPTIONS"]
        if propagate or (propagate is None and (app.testing or app.debug)):
            raise
        with_context(app.log_exception, context, sys.exc_info())
        return unhandled
    return None


def spare_async_views(app: Flask) -> None:
    """Keep decorators that call ``app.ensure_sync`` from running async views elsewhere.

    Such a decorator, Flask-Login's for one, means to call a view whose kind it does not know.
    ``ensure_sync`` would run an async view on a loop of the thread's own; the view gets its
    coroutine instead, and it is awaited on the server's loop, where its connection is.
    """
    convert = app.async_to_sync

    @wraps(convert)
    def spared(function: Callable[..., Any]) -> Callable[..., Any]:
        if has_request_context():
            handshake: Handshake | None = request.environ.get(WEBSOCKET)
            if handshake is not None and inspect.unwrap(function) is handshake.function:
                return function
        converted: Callable[..., Any] = convert(function)
        return converted

    app.async_to_sync = spared  # type: ignore[method-assign, assignment]
