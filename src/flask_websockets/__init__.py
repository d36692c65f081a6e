"""WebSockets for Flask: plain or async views and channels, beside your HTTP views."""

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
from .signals import draining
from .subscription import Subscription
from .websocket import AsyncWebSocket, WebSocket

__all__ = [
    "AsyncWebSocket",
    "ConcurrencyError",
    "ConfigurationError",
    "ConnectionClosed",
    "ConnectionRejected",
    "InvalidMessage",
    "InvalidState",
    "NotRunning",
    "PublishResult",
    "Stats",
    "Subscription",
    "UsageError",
    "WebSocket",
    "WebSockets",
    "WebSocketsError",
    "WrongThread",
    "draining",
]
