"""View side. ``HandshakeSession``: Flask's session, saved once, at the accept."""

from __future__ import annotations

import logging
from typing import Any

from flask import Flask, Response, request
from flask.globals import request_ctx

from .bridge import Handshake
from .environ import WEBSOCKET
from .protocol import Pairs

logger: logging.Logger = logging.getLogger("flask_websockets")


class HandshakeSession:
    """View thread. Flask's session around an accept: saved there, and never again.

    A server-side session that is written when a connection ends, hours later, would overwrite
    newer data; a session cookie has no response to go out with.
    """

    def __init__(self) -> None:
        self._context = request_ctx._get_current_object()  # type: ignore[attr-defined]
        # Since Flask 3.1.3 the attribute of the context is a property that marks an access.
        self._attribute = "_session" if hasattr(self._context, "_session") else "session"
        self._app: Flask = self._context.app
        self._sealed: Any = None  # the session that a null session stands for
        self.saved = False

    def save(self) -> Pairs:
        """Save the session, and return the Set-Cookie headers for the 101 response."""
        session, response = self._get(), self._app.response_class()
        if not self._is_null(session):
            self._app.session_interface.save_session(self._app, session, response)
            session.modified = False
        self.saved = True
        return [("Set-Cookie", value) for value in response.headers.getlist("Set-Cookie")]

    def report(self) -> None:
        """Say so if a change after the accept is lost."""
        session = self._get()
        if self.saved and session.modified and not self._is_null(session):
            logger.warning(
                "The session was changed after the WebSocket on %s was accepted, and is not "
                "saved: change it before the first receive, send or accept",
                self._context.request.environ[WEBSOCKET].link.entry,
            )

    def seal(self) -> None:
        """Keep Flask from saving the session once more: this is the moment before it would."""
        session = self._get()
        if self.saved and not self._is_null(session):
            self._sealed = session
            null = self._app.session_interface.make_null_session(self._app)
            dict.update(null, session)  # teardown functions may still read it
            setattr(self._context, self._attribute, null)

    def unseal(self) -> None:
        """Give an async view its session back: the WSGI call has ended without saving it."""
        if self._sealed is not None:
            setattr(self._context, self._attribute, self._sealed)

    def _get(self) -> Any:
        return getattr(self._context, self._attribute)

    def _is_null(self, session: Any) -> bool:
        return self._app.session_interface.is_null_session(session)


def seal_session(response: Response) -> Response:
    """``after_request``: the last function before Flask saves the session."""
    handshake: Handshake | None = request.environ.get(WEBSOCKET)
    if handshake is not None and handshake.before_save is not None:
        handshake.before_save()
    return response
