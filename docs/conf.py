"""Sphinx: ``python -m sphinx -n -W -b html docs docs/_build/html``, without a network."""

import sys
from pathlib import Path

from docutils import nodes
from pallets_sphinx_themes import get_version

sys.path.append(str(Path(__file__).parent / "_ext"))

project = "flask-websockets"
author = "The flask-websockets maintainers"
copyright = f"2026, {author}"
release, version = get_version("flask-websockets")

extensions = ["pallets_sphinx_themes", "settings", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "_ext"]
default_role = "code"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autoclass_content = "class"
toc_object_entries_show_parents = "hide"

# No intersphinx: the build must not depend on other sites. These are theirs, or internal.
nitpick_ignore_regex = [
    ("py:exc", r"TypeError|ValueError|TimeoutError|ModuleNotFoundError|LookupError|asyncio\..*"),
    ("py:class", r"Flask|TestResponse|(flask|werkzeug|collections|typing|contextlib)\..*"),
    ("py:class", "OnSlow|uuid\\.UUID"),
]

html_theme = "flask"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"flask-websockets {version}"
html_show_sourcelink = False
html_sidebars = {
    "index": ["localtoc.html", "searchbox.html"],
    "**": ["localtoc.html", "relations.html", "searchbox.html"],
}


def let_tables_scroll(app, doctree, docname):
    """Put each table into a box, so that one that is wider than the page scrolls in it."""
    for table in list(doctree.findall(nodes.table)):
        box = nodes.container(classes=["scrolls"])
        table.parent.replace(table, box)
        box += table


def setup(app):
    app.connect("doctree-resolved", let_tables_scroll)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
