"""WebSockets for Flask: plain blocking views and channels, beside your HTTP views."""

from .channels import PublishResult
from .counters import Stats
from .errors import (
    ConcurrencyError,
    ConfigurationError,
    ConnectionClosed,
    ConnectionRejected,
    InvalidMessage,
    InvalidState,
    NotRunning,
    UsageError,
    WebSocketsError,
    WrongThread,
)
from .extension import WebSockets
from .websocket import WebSocket

__all__ = [
    "ConcurrencyError",
    "ConfigurationError",
    "ConnectionClosed",
    "ConnectionRejected",
    "InvalidMessage",
    "InvalidState",
    "NotRunning",
    "PublishResult",
    "Stats",
    "UsageError",
    "WebSocket",
    "WebSockets",
    "WebSocketsError",
    "WrongThread",
]
