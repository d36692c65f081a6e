"""View side. Who may connect, and for how long: by address, by user, by age of the login."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from flask import Flask, current_app, request
from werkzeug.exceptions import TooManyRequests, Unauthorized

from .bridge import Link, Registry, User, address_key, user_key
from .errors import ConfigurationError, UsageError
from .protocol import RETRY_AFTER

logger: logging.Logger = logging.getLogger("flask_websockets")

Identify = Callable[[], Any]
IdentifyType = TypeVar("IdentifyType", bound=Identify)
Recheck = Callable[[Any], object]
RecheckType = TypeVar("RecheckType", bound=Recheck)

#: What a handshake needs and does not have: somebody who says who a user is.
NO_IDENTITY = (
    "nothing says who a user is: register a function with @websockets.identify that returns the "
    "id of the user of the current request, or None"
)


class Rights:
    """Any thread. Who says who a user is, and whether he may stay."""

    def __init__(self) -> None:
        self._identify: Identify | None = None  # set once, before a server starts
        self._recheck: Recheck | None = None  # likewise
        #: Seconds from one round of rechecks to the next.
        self.every: float | None = None

    def set_identify(self, function: Identify) -> None:
        """Have *function* say who the user of a handshake is.

        :raises UsageError: if another one does.
        """
        if self._identify is not None:
            raise UsageError("There is one identify function for a WebSockets object; got another.")
        self._identify = function

    def set_recheck(self, function: Recheck, every: float) -> None:
        """Have *function* say of each user, again and again, whether he may stay.

        :raises UsageError: if another one does.
        """
        if self._recheck is not None:
            raise UsageError("There is one recheck function for a WebSockets object; got another.")
        self._recheck, self.every = function, every

    @property
    def knows_users(self) -> bool:
        """Whether somebody says who a user is."""
        return self._identify is not None

    def take_places(self, link: Link) -> None:
        """View thread. Count a handshake among those of its address and of its user.

        :raises Unauthorized: if the user was logged out meanwhile.
        :raises TooManyRequests: if one of them has as many connections as it may have.
        :raises ConfigurationError: for a limit on users without anybody who knows them.
        :raises TypeError: if what names the user is no ``str``, ``int`` or ``UUID``.
        """
        registry, config = link.entry.registry, link.config
        limit, address = config.max_connections_per_address, request.remote_addr
        if (
            limit is not None
            and address is not None
            and not registry.addresses.take(address_key(address), link, limit)
        ):
            self._refuse("address", limit, link)
        limit = config.max_connections_per_user
        if self._identify is None:
            if limit is not None:
                raise ConfigurationError(
                    f"WEBSOCKETS_MAX_CONNECTIONS_PER_USER is set, and {NO_IDENTITY}."
                )
            return
        with registry.users.asking() as evicted:
            user = current_app.ensure_sync(self._identify)()
            if user is None:
                return
            key, app = user_key(user), current_app._get_current_object()  # type: ignore[attr-defined]
            if not registry.users.take(key, link, limit, (user, app)):
                self._refuse("user", limit, link)
            if key in evicted:
                # Logged out while we asked; whoever logs out from here on finds the place.
                raise Unauthorized("This login holds no more.")

    def _refuse(self, kind: str, limit: int | None, link: Link) -> NoReturn:
        link.entry.registry.refuse(
            f"refused_{kind}",
            "A handshake on %s was answered 429: its %s has %d connections already "
            f"(WEBSOCKETS_MAX_CONNECTIONS_PER_{kind.upper()})",
            *(link.entry, kind, limit),
        )
        raise TooManyRequests(
            f"Too many connections of one {kind} at the same time.", retry_after=RETRY_AFTER
        )

    def revoked(self, registry: Registry) -> list[str]:
        """Thread of the rounds. The keys of those users who may not stay.

        Where nobody can say, because the database is away, they stay.
        """
        assert self._recheck is not None
        keys, failed = [], 0
        for user, app in registry.users.holders():
            try:
                may_stay = self._ask(app, user)
            except Exception:
                failed += 1
                if failed == 1:
                    logger.exception("A recheck failed; the user's connections stay open")
                continue
            if not may_stay:
                keys.append(user_key(user))
        if failed > 1:
            logger.error("%d more rechecks of that round failed", failed - 1)
        return keys

    def _ask(self, app: Flask, user: User) -> object:
        assert self._recheck is not None
        with app.app_context():
            return app.ensure_sync(self._recheck)(user)
