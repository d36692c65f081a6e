"""Pure. The ``WEBSOCKETS_*`` settings: defaults, units, validation.

Read once per application, from ``app.config`` only. The environment is never read: the
websockets library has variables with the same prefix.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
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
    """The settings of one application. Durations are in seconds, sizes in bytes or messages."""

    #: Open connections; above it a handshake is answered 503 with Retry-After.
    max_connections: int = 10_000
    #: Those of one address, handshakes included; above it 429. None: no limit. An IPv6 address
    #: counts as its network of 64 bits, which is what one customer gets.
    max_connections_per_address: int | None = None
    #: Those of one user, whom ``identify`` names; above it 429. None: no limit.
    max_connections_per_user: int | None = None
    #: Handshakes at the same time; above it they queue for ``handshake_timeout``, then 503.
    max_handshakes: int = 100
    #: Seconds in which a view must accept or refuse; then 503.
    handshake_timeout: float = 10.0
    #: Threads that run HTTP requests; above it requests queue.
    http_threads: int = 40
    #: Bytes of one incoming message; above it close 1009. uvicorn's own default.
    max_message_bytes: int = 16 * 1024 * 1024
    #: Messages that one connection may send in a second, on average: so many may come at once.
    #: None: no limit but the view's own pace, which the inbox hands on to the peer.
    max_messages_per_second: float | None = None
    #: Their bytes. One larger message passes when nothing came for long enough.
    max_bytes_per_second: float | None = None
    #: What exceeding either does: close 1008, or pause reading until the rate is kept again.
    rate_exceeded: RateExceeded = "close"
    #: Received messages that the view has not taken.
    inbox_messages: int = 100
    #: Their bytes. One larger message passes when the inbox is empty.
    inbox_bytes: int = 1024 * 1024
    #: Seconds for which a full inbox pauses reading, then close 1013. Below the 20 s in which
    #: uvicorn wants a pong that nobody reads meanwhile.
    inbox_timeout: float = 15.0
    #: What a full inbox does: pause reading, close 1013 at once, or drop the new message.
    inbox_full: InboxFull = "pause"
    #: Messages that the server has not taken; above it the view's send waits.
    outbox_messages: int = 1_000
    #: Their bytes. One larger message passes when the outbox is empty.
    outbox_bytes: int = 1024 * 1024
    #: Seconds that one send may wait for the peer; then the connection is gone.
    send_timeout: float = 30.0
    #: Seconds that a view has to finish once its connection is over; then it is reported.
    close_timeout: float = 10.0
    #: Seconds that everybody has to leave when the server stops; what is left is cut.
    drain_timeout: float = 20.0
    #: Channels one connection may be subscribed to; above it ``subscribe`` raises.
    max_channels_per_connection: int = 1_000
    #: Bytes of a channel's name in UTF-8; above it ``subscribe`` and ``publish`` raise.
    max_channel_name_bytes: int = 255
    #: Bytes of one published message; above it ``publish`` raises.
    max_publish_bytes: int = 1024 * 1024
    #: Publishes and subscribes that the loop has not taken; above it both wait, then raise.
    max_pending_publishes: int = 10_000
    #: Origins allowed beside the application's own.
    allowed_origins: tuple[str, ...] = ()
    #: Whether messages take ways of their own where the server's classes are known to allow it.
    #: Off, everything goes the one way that every server has, which is slower.
    fast_paths: bool = True
    #: Whether kernel and interpreter are asked for what makes threads cheaper, which changes
    #: nothing else: see :doc:`/explanation/performance`.
    tune_process: bool = True
    #: Where channels live. Only the process's own memory so far.
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
        for key, value in mapping.items():
            if not key.startswith(PREFIX) or key.startswith(SERVE_PREFIX):
                continue
            if key not in known:
                warnings.warn(
                    f"{key} is not a setting of flask-websockets and has no effect; "
                    f"known are {', '.join(sorted(known))}.",
                    stacklevel=2,
                )
                continue
            field = known[key]
            values[field.name] = _validated(key, field.type, value)
        return cls(**values)


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
