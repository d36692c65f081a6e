"""View side. What a handshake is answered with, by whomever: the WSGI call that asks Flask.

``answer`` runs in the view's thread and calls the WSGI application once. Flask routes, runs its
hooks and comes to a view function of ``views.py``; what Flask returns without the view having
accepted is the answer to the handshake.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flask import current_app, request
from werkzeug.exceptions import Forbidden, HTTPException, MethodNotAllowed
from werkzeug.routing import WebsocketMismatch

from .bridge import Handshake, Link
from .environ import WEBSOCKET, WSGIEnviron, origin_allowed
from .errors import ConnectionClosed
from .protocol import Pairs, State, checked_refusal
from .wsgi import own_context

logger: logging.Logger = logging.getLogger("flask_websockets")

#: A refusal is held in memory, here and by servers; an error page or a JSON body is far smaller.
MAX_REFUSAL_BYTES = 1024 * 1024

#: What Werkzeug's 400 says to a handshake where only HTTP is spoken.
NO_WEBSOCKET_VIEW = (
    "There is an HTTP view here, and no WebSocket view: @websockets.route(...) makes one."
)

#: WSGI servers that raise where an application sends a header of the connection (PEP 3333).
_NO_UPGRADE_HEADER = ("waitress", "WSGIServer")


def answer(
    app: Callable[..., Iterable[bytes]], environ: WSGIEnviron, link: Link, offered: list[str]
) -> BaseException | None:
    """View thread. Run one handshake, and the view behind it, through the WSGI application.

    :returns: what came out of the application: nothing, unless it propagates exceptions.
    """
    context = own_context()
    handshake = Handshake(link, offered, context)
    environ[WEBSOCKET] = handshake
    try:
        return context.run(_call, app, environ, handshake)
    finally:
        handshake.end_call()


def _call(
    app: Callable[..., Iterable[bytes]], environ: WSGIEnviron, handshake: Handshake
) -> BaseException | None:
    started: tuple[str, Pairs] = ("500 Internal Server Error", ())

    def start_response(status: str, headers: Pairs, exc_info: Any = None) -> Callable[..., Any]:
        nonlocal started
        started = status, headers
        return body.append

    body: list[bytes] = []
    error: BaseException | None = None
    try:
        chunks = app(environ, start_response)
        try:
            size = 0
            for chunk in chunks:
                body.append(chunk)
                size += len(chunk)
                if size > MAX_REFUSAL_BYTES:
                    raise ValueError(
                        f"The answer to a handshake has at most {MAX_REFUSAL_BYTES} bytes, "
                        "because servers hold it in memory; got more. Refuse with a short one."
                    )
        finally:
            if hasattr(chunks, "close"):
                chunks.close()
    except BaseException as raised:  # SystemExit as well: the thread ends here (I5)
        logger.error("Exception on WebSocket %s", handshake.link.entry, exc_info=raised)
        error = raised
    if error is not None or not handshake.goes_on:
        _answer_for_the_view(handshake.link, error, *started, b"".join(body))
    return error


def _answer_for_the_view(
    link: Link, error: BaseException | None, status: str, headers: Pairs, body: bytes
) -> None:
    """View thread. Say what the view did not say: every connection gets its goodbye (I12)."""
    if link.state is State.OPEN:
        # Something between us and the view has swallowed or replaced what it did.
        link.close(1011 if error else 1000, "")
    if link.state is not State.CONNECTING:
        return
    try:
        if error is None:
            try:
                return link.refuse(*checked_refusal(status, headers, body), body)
            except (TypeError, ValueError) as wrong:
                logger.error(
                    "The handshake on %s was answered with what is no refusal, and the client got "
                    "500; expected a status of 3xx to 5xx and headers that may be sent, or None to "
                    "accept: %s",
                    *(link.entry, wrong),
                )
        link.refuse(500, [("Content-Type", "text/plain")], b"Internal Server Error\n")
    except ConnectionClosed:
        pass  # the client left, or the handshake timed out, while Flask was answering


def check_origin(origins: Sequence[str] | None, link: Link) -> None:
    """View thread. Refuse a page that may not open a WebSocket here.

    :raises Forbidden: if it may not.
    """
    origin = request.headers.get("Origin")
    allowed = current_app.extensions["websockets"].config.allowed_origins
    if origins is not None:
        allowed = origins
    if not origin_allowed(origin, request.host, allowed):
        link.entry.registry.refuse(
            "refused_origin",
            "Refused a WebSocket from origin %r on %s, on %s: add it to "
            "WEBSOCKETS_ALLOWED_ORIGINS, or to the route's origins=, if its pages may connect; "
            "behind a proxy, ProxyFix tells the application its own host",
            *(origin, request.host, link.entry),
        )
        raise Forbidden("This origin may not open a WebSocket here.")


class UpgradeRequired(HTTPException):
    """426: the resource is a WebSocket (RFC 9110, section 15.5.22)."""

    code: int | None = 426
    description: str | None = (
        "This is a WebSocket endpoint; open it with new WebSocket(...), or another client of "
        "that protocol."
    )

    def get_headers(self, environ: Any = None, scope: Any = None) -> list[tuple[str, str]]:
        """The headers, with the ``Upgrade`` that belongs to a 426."""
        headers = super().get_headers(environ, scope)
        if not (environ or {}).get("SERVER_SOFTWARE", "").startswith(_NO_UPGRADE_HEADER):
            headers.append(("Upgrade", "websocket"))
        return headers


def require_upgrade(endpoint: str | None, arguments: dict[str, Any] | None) -> None:
    """URL value preprocessor: plain HTTP to a path that only a WebSocket view has is a 426.

    And a handshake to one that only an HTTP view has says so. Flask raises either when its hooks
    have run, and has the application's error handlers answer.
    """
    error = request.routing_exception
    if not isinstance(error, (WebsocketMismatch, MethodNotAllowed)):
        return
    adapter = current_app.create_url_adapter(request)
    if adapter is None or adapter.websocket:
        if isinstance(error, WebsocketMismatch) and WEBSOCKET in request.environ:
            error.description = NO_WEBSOCKET_VIEW
            if current_app.debug:
                entry = request.environ[WEBSOCKET].link.entry
                logger.warning("A handshake came to %s. %s", entry, NO_WEBSOCKET_VIEW)
        return
    try:
        # Another method than a handshake's is no reason to look for another method.
        adapter.match(method="GET", websocket=False)
    except WebsocketMismatch:
        request.routing_exception = UpgradeRequired()
    except HTTPException:
        pass  # an HTTP view that does not take this method


def with_context(method: Callable[..., Any], context: Any, error: Any) -> Any:
    """Call a method of Flask's, which from version 3.2 on wants the context first."""
    if len(inspect.signature(method).parameters) == 2:
        return method(context, error)
    return method(error)
