"""The one document: static parts and data joined, with a policy that lets nothing else in.

Styles and script stand in the page and are named by their hashes; data is JSON that no browser executes. Scripts may
not turn strings into markup (Trusted Types), so what a model wrote can only become text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

STYLES = ("viewer.css",)
PARTS = ("model", "dom", "plane", "lanes", "hands", "reading", "trace", "table", "race", "live", "app")
SCRIPTS = tuple(f"{part}.js" for part in PARTS)
"""In order; they share one scope."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A document and the policy to send with it."""

    html: str
    policy: str
    """Value of the `Content-Security-Policy` header; the document says the same, as far as a document can."""

    @property
    def headers(self) -> dict[str, str]:
        """All headers that a server sends with the page."""
        return {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": self.policy,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cache-Control": "no-store",
        }


def document(data: dict[str, Any] | None = None, *, live: bool = False, title: str = "Plait") -> Page:
    """The viewer as one HTML document.

    Args:
        data: `ViewData.values()`: runs to open with.
        live: Whether the page is served by `plait serve`: it then has a line to ask questions on; see `live.js`.
        title: Of the browser's tab.
    """
    style, script = _static(STYLES), f"(() => {{\n'use strict';\n{_static(SCRIPTS)}\n}})();\n"
    rules = [
        "default-src 'none'",
        f"script-src '{_hash(script)}'",
        f"style-src '{_hash(style)}'",
        "img-src data:",
        "connect-src 'self'" if live else "connect-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    inside = "; ".join(rules)
    parts = {
        "policy": inside,
        "title": _escaped(title),
        "style": style,
        "data": _json({"data": data, "live": live}),
        "script": script,
    }
    # One pass: what stands in the data is never read as a place for something else.
    html = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _static(("index.html",)))
    return Page(html=html, policy=f"{inside}; frame-ancestors 'none'")


@cache
def _static(names: tuple[str, ...]) -> str:
    folder = files("plait.viewer") / "static"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def _json(value: Any) -> str:
    """JSON inside a script element: no `<` that could end it, no lone surrogate that could not be written."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
