"""View side. A WebSocket view inside Flask: a WSGI call that has not returned yet (I3).

``answer`` runs in the view's thread and calls the WSGI application once. Flask routes, runs its
hooks and comes to the view function that ``view_function`` made; what Flask returns without
the view having accepted is the answer to the handshake.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

from flask import Response, current_app, request
from flask.globals import request_ctx
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import Forbidden, HTTPException

from .bridge import Link
from .environ import WEBSOCKET, WSGIEnviron, origin_allowed
from .errors import ConnectionClosed
from .protocol import MAX_REASON_BYTES, Pairs, State
from .websocket import WebSocket

logger = logging.getLogger("flask_websockets")

View = Callable[..., Any]

#: Close codes from here on are the application's own; 4404 is a 404 after the accept.
APPLICATION_CODES = 4000

#: A refusal is held in memory, here and by servers; an error page or a JSON body is far smaller.
MAX_REFUSAL_BYTES = 1024 * 1024


def answer(
    app: Callable[..., Iterable[bytes]], environ: WSGIEnviron, link: Link, offered: Sequence[str]
) -> BaseException | None:
    """View thread. Run one handshake, and the view behind it, through the WSGI application.

    :returns: what came out of the application: nothing, unless it propagates exceptions.
    """
    environ[WEBSOCKET] = WebSocket(link, environ, offered)
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
                        f"The answer to a handshake has at most {MAX_REFUSAL_BYTES} bytes."
                    )
        finally:
            if hasattr(chunks, "close"):
                chunks.close()
    except BaseException as raised:  # SystemExit as well: the thread ends here (I5)
        logger.error("Exception on WebSocket %s", environ.get("PATH_INFO"), exc_info=raised)
        error = raised
    _answer_for_the_view(link, error, *started, b"".join(body))
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
    code = int(status.split(" ", 1)[0])
    try:
        if error is None and code >= 300:
            return link.refuse(code, list(headers), body)
        if error is None:
            logger.error(
                "The handshake was answered with %s, which is no refusal; expected a status of "
                "3xx to 5xx, or None to accept. The client got 500",
                status,
            )
        link.refuse(500, [("Content-Type", "text/plain")], b"Internal Server Error\n")
    except ConnectionClosed:
        pass  # the client left, or the handshake timed out, while Flask was answering


def view_function(
    view: View, subprotocols: Sequence[str], origins: Sequence[str] | None
) -> Callable[..., ResponseReturnValue]:
    """The Flask view function for a WebSocket view.

    :param origins: origins allowed on this route beside the application's own; None for those
        of the configuration.
    """

    @wraps(view)
    def websocket_view(**arguments: Any) -> ResponseReturnValue:
        ws: WebSocket | None = request.environ.get(WEBSOCKET)
        if ws is None:
            return Response(
                "This is a WebSocket endpoint, and this server speaks WSGI only. Serve the "
                "application's asgi_app(), with uvicorn for example.\n",
                status=426,
                headers={"Upgrade": "websocket", "Connection": "Upgrade"},
                mimetype="text/plain",
            )
        _check_origin(origins)
        session = _Session()
        ws.prepare(subprotocols, session.save)
        try:
            returned = _run(view, ws, arguments)
        finally:
            if ws.link.state is not State.CONNECTING:
                session.seal()
        if ws.link.state is not State.REFUSED and session.saved:
            if returned is not None:
                logger.warning(
                    "The view of %s returned %s after its connection was accepted; nobody gets it",
                    request.path,
                    type(returned).__name__,
                )
            return Response()  # nobody gets this one either: after_request wants to see one
        response: ResponseReturnValue = returned if returned is not None else Response(status=403)
        return response

    # Flask looks at it to decide whether a view is async; the wrapper is not.
    return websocket_view


def _run(view: View, ws: WebSocket, arguments: dict[str, Any]) -> Any:
    """View thread. Call the view, and say goodbye in its name: 1000, 1011 or 4000 + status."""
    code, reason = 1011, ""
    try:
        returned = view(ws, **arguments)
        if returned is None and ws.link.state is State.CONNECTING:
            ws.accept()
        code = 1000
        return returned
    except ConnectionClosed:
        if not ws.closed:
            raise  # somebody else's connection: an error like any other
        return None  # the normal end of a view that does not ask
    except HTTPException as error:
        status = error.get_response().status_code if error.code is None else error.code
        code = APPLICATION_CODES + status
        reason = error.name.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
        raise
    finally:
        # In finally, not in except: SystemExit closes with 1011 as well (I5).
        if ws.connected:
            ws.close(code, reason)


def _check_origin(origins: Sequence[str] | None) -> None:
    origin = request.headers.get("Origin")
    allowed = current_app.extensions["websockets"].config.allowed_origins
    if origins is not None:
        allowed = origins
    if not origin_allowed(origin, request.host, allowed):
        logger.warning(
            "Refused a WebSocket from origin %r on %s: add it to WEBSOCKETS_ALLOWED_ORIGINS, or to "
            "the route's origins=, if its pages may connect; behind a proxy, ProxyFix tells the "
            "application its own host",
            origin,
            request.host,
        )
        raise Forbidden("This origin may not open a WebSocket here.")


class _Session:
    """View thread. Flask's session around an accept: saved there, and never again.

    A server-side session that is written when a connection ends, hours later, would overwrite
    newer data; a session cookie has no response to go out with.
    """

    def __init__(self) -> None:
        self._context = request_ctx._get_current_object()  # type: ignore[attr-defined]
        # Since Flask 3.1.3 the attribute of the context is a property that marks an access.
        self._attribute = "_session" if hasattr(self._context, "_session") else "session"
        self.saved = False

    def save(self) -> Pairs:
        """Save the session, and return the Set-Cookie headers for the 101 response."""
        app, session = self._context.app, getattr(self._context, self._attribute)
        response = app.response_class()
        if not app.session_interface.is_null_session(session):
            app.session_interface.save_session(app, session, response)
            session.modified = False
        self.saved = True
        return [("Set-Cookie", value) for value in response.headers.getlist("Set-Cookie")]

    def seal(self) -> None:
        """Keep Flask from saving the session once more; report what would be lost."""
        app, session = self._context.app, getattr(self._context, self._attribute)
        if not self.saved or app.session_interface.is_null_session(session):
            return
        if session.modified:
            logger.warning(
                "The session was changed after the WebSocket on %s was accepted, and is not "
                "saved: change it before the first receive, send or accept",
                request.path,
            )
        sealed = app.session_interface.make_null_session(app)
        dict.update(sealed, session)  # after_request may still read it
        setattr(self._context, self._attribute, sealed)
