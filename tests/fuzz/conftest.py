"""The profile of a longer run, and real servers for what needs one."""

from __future__ import annotations

from ..integration.conftest import implementation, interruptible, start_server, uvicorn_server
from ..models.profiles import register

__all__ = ["implementation", "interruptible", "start_server", "uvicorn_server"]

register()
