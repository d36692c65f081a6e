"""Pure. The ``WEBSOCKETS_*`` settings: defaults, units, validation.

Read once per application, from ``app.config`` only. The environment is never read: the
websockets library has variables with the same prefix.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cached_property
from types import FrameType
from typing import Any, Literal, Self, get_args

from .environ import parse_origin
from .errors import ConfigurationError

PREFIX = "WEBSOCKETS_"
#: FLASK_WEBSOCKETS_SERVE_PORT and its like are options of the command, by Flask's own rule; what
#: is left of them in a configuration is no setting.
SERVE_PREFIX = "WEBSOCKETS_SERVE_"
MEMORY_URL = "memory://"

InboxFull = Literal["pause", "close", "drop_newest"]
RateExceeded = Literal["close", "slow_down"]

#: Settings that are one of a few words.
_CHOICES: dict[str, tuple[str, ...]] = {
    "inbox_full": get_args(InboxFull),
    "rate_exceeded": get_args(RateExceeded),
}


@dataclass(frozen=True)
class Config:
    """The settings of one application.

    Above each field: in brackets its unit, then what happens above it. The reference's table is
    made of these lines.
    """

    #: [connections] The handshake is answered 503 with `Retry-After`. No thread is taken.
    max_connections: int = 10_000
    #: [connections] Connections of one `request.remote_addr`, so that `ProxyFix` counts: 429 with
    #: `Retry-After`. An IPv6 address counts as its network of 64 bits.
    max_connections_per_address: int | None = None
    #: [connections] Connections of one user, by :meth:`WebSockets.identify`: 429 with
    #: `Retry-After`.
    max_connections_per_user: int | None = None
    #: [at the same time] They wait for ``WEBSOCKETS_HANDSHAKE_TIMEOUT``, then 503 with
    #: `Retry-After`.
    max_handshakes: int = 100
    #: [seconds] A view that has neither accepted nor refused: 503. Its later use of the connection
    #: raises :exc:`ConnectionClosed`.
    handshake_timeout: float = 10.0
    #: [threads] Requests queue, at most 25 for each thread; then 503 with `Retry-After`.
    http_threads: int = 40
    #: [bytes] Close 1009. The default, 16 MiB, is uvicorn's own.
    max_message_bytes: int = 16 * 1024 * 1024
    #: [messages a second] Messages of one connection, a token bucket: one second's worth may come
    #: at once. Then what ``WEBSOCKETS_RATE_EXCEEDED`` says.
    max_messages_per_second: float | None = None
    #: [bytes a second] Their bytes. One larger message passes when nothing has come for a while;
    #: what follows waits for the debt.
    max_bytes_per_second: float | None = None
    #: ``"close"``: close 1008. ``"slow_down"``: reading pauses until the rate is kept again, and
    #: nothing is lost; where that would take longer than ``WEBSOCKETS_INBOX_TIMEOUT``, close 1008.
    rate_exceeded: RateExceeded = "close"
    #: [messages] What ``WEBSOCKETS_INBOX_FULL`` says.
    inbox_messages: int = 100
    #: [bytes] The same. One larger message passes when the inbox is empty.
    inbox_bytes: int = 1024 * 1024
    #: [seconds] Reading has been paused for so long: close 1013. Keep it below the server's ping
    #: timeout.
    inbox_timeout: float = 15.0
    #: ``"pause"``: nothing more is read until there is room. ``"close"``: close 1013 at once.
    #: ``"drop_newest"``: the new message is dropped and counted.
    inbox_full: InboxFull = "pause"
    #: [messages] The view's `send` waits until the outbox is half empty. For a published message:
    #: what the subscription's `on_slow` says, by default close 1013, "slow consumer".
    outbox_messages: int = 1_000
    #: [bytes] The same. One larger message passes when the outbox is empty.
    outbox_bytes: int = 1024 * 1024
    #: [seconds] A message that the client does not take, or a `send` that finds no room: the
    #: connection is cut, the view gets :exc:`ConnectionClosed` with 1006. So is the client of an
    #: HTTP response that takes none of it for so long. A `publish` that finds too many pending
    #: raises :exc:`TimeoutError`.
    send_timeout: float = 30.0
    #: [seconds] A view that still runs so long after its connection's end is reported and left to
    #: itself; an async view is cancelled first (:doc:`../how-to/async-views`). A slow consumer that
    #: has not taken its close frame is cut.
    close_timeout: float = 10.0
    #: [seconds] Of :meth:`WebSockets.drain`, :meth:`WebSockets.run` and `flask websockets serve`:
    #: whoever is left so long after the signal to stop is cut, and the process ends
    #: (:doc:`../how-to/run`). Other servers have a setting of their own.
    drain_timeout: float = 20.0
    #: [channels] `subscribe` raises :exc:`UsageError`; nothing is subscribed.
    max_channels_per_connection: int = 1_000
    #: [bytes of UTF-8] `subscribe` and `publish` raise :exc:`ValueError`; nothing is subscribed or
    #: published.
    max_channel_name_bytes: int = 255
    #: [bytes] `publish` raises :exc:`ValueError`. As much as an outbox holds by default.
    max_publish_bytes: int = 1024 * 1024
    #: [publishes and subscribes] `publish` and `subscribe` wait for ``WEBSOCKETS_SEND_TIMEOUT``,
    #: then raise :exc:`TimeoutError`.
    max_pending_publishes: int = 10_000
    #: Any other origin than these and the application's own: 403. One origin or a list of them:
    #: `https://app.example.com`, `https://*.example.com`, `null`, `*`. `None` is the same as an
    #: empty list.
    allowed_origins: tuple[str, ...] = ()
    #: No limit: whether messages and small HTTP responses take a shorter way where uvicorn's own
    #: classes are known to allow it. ``False``: the one way that every server has.
    fast_paths: bool = True
    #: No limit: whether kernel and interpreter are asked for what makes threads cheaper, at the
    #: start of a server; see :doc:`../explanation/performance`.
    tune_process: bool = True
    #: Where channels live: the process' own memory. Anything else raises :exc:`ConfigurationError`.
    backend_url: str = MEMORY_URL

    def passes(self, size: int) -> bool:
        """Whether a received message of *size* bytes passes, with nothing else to look at."""
        return size <= self.max_message_bytes and not self._limits_rate

    @cached_property
    def _limits_rate(self) -> bool:
        return self.max_messages_per_second is not None or self.max_bytes_per_second is not None

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Read the settings from an application's configuration.

        :raises ConfigurationError: for a value of the wrong type or out of range.
        """
        known = {PREFIX + field.name.upper(): field for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in settings_of(mapping).items():
            if warned_as_unknown(key):
                continue
            field = known[key]
            values[field.name] = _validated(key, field.type, value)
        return cls(**values)


def warned_as_unknown(key: str) -> bool:
    """Warn of a name that no setting has; False for those that one has."""
    name, known = key.removeprefix(PREFIX), [field.name.upper() for field in fields(Config)]
    if name in known:
        return False
    close = get_close_matches(name.upper(), known, 1)
    names = ", ".join(PREFIX + each for each in close or sorted(known))
    hint = f"did you mean {names}?" if close else f"known are {names}."
    warn_caller(f"{key} is not a setting of flask-websockets and has no effect; {hint}")
    return True


def warn_caller(message: str) -> None:
    """Warn of the line that called this package, however deep in it we are."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_ours(frame.f_back):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)


def _is_ours(frame: FrameType) -> bool:
    return f"{frame.f_globals.get('__name__')}.".startswith(f"{__package__}.")


def settings_of(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of this package, known or not."""
    return {
        key: value
        for key, value in mapping.items()
        if key.startswith(PREFIX) and not key.startswith(SERVE_PREFIX)
    }


#: What a route may set for itself: all that is looked at after its connection is accepted.
ROUTE_LIMITS = frozenset(
    {
        *("max_message_bytes", "inbox_messages", "inbox_bytes", "inbox_timeout", "inbox_full"),
        *("outbox_messages", "outbox_bytes", "send_timeout", "close_timeout"),
        *("max_messages_per_second", "max_bytes_per_second", "rate_exceeded"),
        "max_channels_per_connection",
    }
)


def validate_limits(limits: Mapping[str, Any]) -> dict[str, Any]:
    """Check the limits of one route, by the names of the fields of :class:`Config`.

    :raises ConfigurationError: for a value of the wrong type or out of range.
    """
    kinds = {field.name: field.type for field in fields(Config)}
    return {name: _validated(name, kinds[name], value) for name, value in limits.items()}


def validate_seconds(name: str, value: Any) -> float:
    """Check a number of seconds.

    :raises ConfigurationError: (a ``ValueError``) if it is none above 0.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e9:
        raise ConfigurationError(f"{name} must be a number of seconds above 0; got {value!r}.")
    return float(value)


def _validated(key: str, kind: Any, value: Any) -> Any:
    if key == PREFIX + "ALLOWED_ORIGINS":
        return _origins(key, value)
    if key == PREFIX + "BACKEND_URL":
        if value != MEMORY_URL:
            raise ConfigurationError(
                f"{key} must be {MEMORY_URL!r}, the only backend; got {value!r}."
            )
        return value
    choices = _CHOICES.get(key.removeprefix(PREFIX).lower())
    if choices is not None:
        if value not in choices:
            *others, last = (f'"{choice}"' for choice in choices)
            raise ConfigurationError(f"{key} must be {', '.join(others)} or {last}; got {value!r}.")
        return value
    if kind.endswith(" | None"):
        if value is None:
            return None
        kind = kind.removesuffix(" | None")
    if key.lower().endswith("_per_second"):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e12:
            raise ConfigurationError(
                f"{key} must be a number above 0, or None for no limit; got {value!r}."
            )
        return float(value)
    if kind == "bool":
        if not isinstance(value, bool):
            raise ConfigurationError(f"{key} must be True or False; got {value!r}.")
        return value
    if kind == "int":
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"{key} must be a whole number of at least 1; got {value!r}.")
        return value
    return validate_seconds(key, value)


def _origins(key: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    origins = (value,) if isinstance(value, str) else value
    if not isinstance(origins, (list, tuple, set, frozenset)):
        raise ConfigurationError(f"{key} must be a list of origins or None; got {value!r}.")
    return validate_origins(key, tuple(origins))


def validate_origins(key: str, origins: tuple[Any, ...]) -> tuple[str, ...]:
    """Check a list of allowed origins and bring it to lower case.

    :raises ConfigurationError: for what is not ``*``, ``null`` or ``scheme://host[:port]``.
    """
    for origin in origins:
        if not isinstance(origin, str) or (
            origin not in ("*", "null") and parse_origin(origin) is None
        ):
            raise ConfigurationError(
                f'{key}: an origin is "https://app.example.com", "https://*.example.com" or "*", '
                f"without a path; got {origin!r}."
            )
    return tuple(origin.lower() for origin in origins)
