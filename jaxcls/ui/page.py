"""One HTML page, whole in itself: the ES modules of `static/` joined, with the data that they show."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STATIC = Path(__file__).parent / "static"

_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w.]+)";\n', re.MULTILINE)

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<div id="page"><noscript>This page needs JavaScript; all of it is in the page itself.</noscript></div>
{blocks}
<script type="module">{script}</script>
</body>
</html>
"""


def join_modules(entry: str) -> str:
    """A module of `static/` and all that it imports, as one module that imports nothing.

    The modules are written for it: an import is `import { a, b } from "./other.js";`, at the beginning of
    lines, and no two of them have a top-level name in common. Only the entry's exports stay exports.
    """
    joined: dict[str, str] = {}

    def add(name: str) -> None:
        text = (STATIC / name).read_text(encoding="utf-8")
        for imported in _IMPORT.findall(text):
            if imported not in joined:
                add(imported)
        text = _IMPORT.sub("", text)
        joined[name] = text if name == entry else re.sub("^export ", "", text, flags=re.MULTILINE)

    add(entry)
    return "\n".join(joined.values())


def make_page(
    title: str,
    data: Mapping[str, Any],
    *,
    entry: str = "page.js",
    styles: Sequence[str] = ("page.css",),
    sources: Mapping[str, str],
) -> bytes:
    """The HTML, in UTF-8, of a page that runs no script, style or request but its own.

    Args:
        title: of the window.
        data: id -> plain values, which the script finds in the page by this id.
        entry: the module of `static/` that shows it.
        styles: the style sheets of `static/`, in order.
        sources: what may be loaded besides, as directives of a Content-Security-Policy: {"img-src": "data:"}.
    """
    script = join_modules(entry)
    style = "".join((STATIC / name).read_text(encoding="utf-8") for name in styles)
    allowed = "".join(f" {directive} {source};" for directive, source in sources.items())
    policy = (
        f"default-src 'none';{allowed} script-src {_hash(script)}; style-src {_hash(style)};"
        " base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    blocks = "\n".join(
        f'<script type="application/json" id="{name}">{_as_json(values)}</script>'
        for name, values in data.items()
    )
    page = PAGE.format(policy=policy, title=html.escape(title), style=style, blocks=blocks, script=script)
    return page.encode(errors="replace")  # a folder's name may hold bytes that are not UTF-8


def _as_json(values: Any) -> str:
    """ASCII that no name in it can end the element of."""
    return json.dumps(values, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
