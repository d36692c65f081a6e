"""The directive ``settings``: the table of settings, from the source of ``config.py``.

What a setting is for stands above its field there, as a comment that begins with ``#:`` and, in
brackets, with the unit. Its default is the field's, and a route's limits are ``ROUTE_LIMITS``.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from flask_websockets import config


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    name: str
    default: Any
    unit: str
    text: str
    for_routes: bool


def settings() -> list[Setting]:
    """All settings, in the order of ``Config``."""
    lines = Path(config.__file__).read_text().splitlines()
    (body,) = (
        node.body
        for node in ast.parse("\n".join(lines)).body
        if isinstance(node, ast.ClassDef) and node.name == "Config"
    )
    found = []
    defaults = {field.name: field.default for field in fields(config.Config)}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            unit, text = _comment_above(lines, node.lineno - 1)
            for_routes = name in config.ROUTE_LIMITS
            key = config.PREFIX + name.upper()
            found.append(Setting(key, defaults[name], unit, text, for_routes))
    return found


def _comment_above(lines: list[str], index: int) -> tuple[str, str]:
    """The unit and the text of the ``#:`` comment that ends above a line."""
    said: list[str] = []
    while lines[index - 1].strip().startswith("#:"):
        index -= 1
        said.insert(0, lines[index].strip().removeprefix("#:").strip())
    text = " ".join(said)
    if text.startswith("["):
        unit, _, text = text[1:].partition("] ")
        return unit, text
    return "", text


def literal(default: Any) -> str:
    """The default as a user would type it."""
    if isinstance(default, int) and not isinstance(default, bool):
        return f"{default:_}"
    return repr(default).replace("'", '"')


class SettingsTable(SphinxDirective):
    """``.. settings::``, without arguments."""

    def run(self) -> list[nodes.Node]:
        rows = [".. list-table::", "    :header-rows: 1", "    :widths: 38 18 44", ""]
        rows += ["    * - Setting", "      - Default, unit", "      - What happens above it"]
        for setting in settings():
            rows += [
                f"    * - ``{setting.name}``",
                f"      - ``{literal(setting.default)}`` {setting.unit}".rstrip(),
                f"      - {setting.text}{' A route may have its own.' * setting.for_routes}",
            ]
        return self.parse_text_to_nodes("\n".join(rows))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("settings", SettingsTable)
    return {"parallel_read_safe": True}
