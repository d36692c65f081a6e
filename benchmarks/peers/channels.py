"""Django Channels with its in-memory layer: async consumers, and sync ones."""
# mypy: disable-error-code="import-not-found,import-untyped,no-any-unimported,misc"

from __future__ import annotations

from typing import Any

import django
from django.conf import settings

settings.configure(
    ALLOWED_HOSTS=["*"],
    CHANNEL_LAYERS={"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}},
    INSTALLED_APPS=["channels"],
    SECRET_KEY="none",
)
django.setup()

from asgiref.sync import async_to_sync  # noqa: E402
from channels.generic.websocket import AsyncWebsocketConsumer, WebsocketConsumer  # noqa: E402
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402
from django.urls import path  # noqa: E402


class Echo(AsyncWebsocketConsumer):
    async def connect(self) -> None:
        await self.accept()
        await self.send("ready")

    async def receive(self, text_data: str) -> None:
        await self.send(text_data)


class FanOut(AsyncWebsocketConsumer):
    async def connect(self) -> None:
        await self.channel_layer.group_add("everyone", self.channel_name)
        await self.accept()
        await self.send("ready")

    async def disconnect(self, code: int) -> None:
        await self.channel_layer.group_discard("everyone", self.channel_name)

    async def receive(self, text_data: str) -> None:
        await self.channel_layer.group_send("everyone", {"type": "publish", "data": text_data})

    async def publish(self, event: dict[str, Any]) -> None:
        await self.send(event["data"])


class SyncEcho(WebsocketConsumer):
    def connect(self) -> None:
        self.accept()
        self.send("ready")

    def receive(self, text_data: str) -> None:
        self.send(text_data)


class SyncFanOut(WebsocketConsumer):
    def connect(self) -> None:
        async_to_sync(self.channel_layer.group_add)("everyone", self.channel_name)
        self.accept()
        self.send("ready")

    def disconnect(self, code: int) -> None:
        async_to_sync(self.channel_layer.group_discard)("everyone", self.channel_name)

    def receive(self, text_data: str) -> None:
        event = {"type": "publish", "data": text_data}
        async_to_sync(self.channel_layer.group_send)("everyone", event)

    def publish(self, event: dict[str, Any]) -> None:
        self.send(event["data"])


def _application(echo: Any, fan_out: Any) -> Any:
    routes = [path("echo", echo.as_asgi()), path("fan-out", fan_out.as_asgi())]
    return ProtocolTypeRouter({"websocket": URLRouter(routes)})


asynchronous = _application(Echo, FanOut)
synchronous = _application(SyncEcho, SyncFanOut)
