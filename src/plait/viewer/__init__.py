"""The page that shows runs: lanes, text, tokens, a table of runs, two runs as a race; and what other tools can open.

Plain HTML, CSS and JavaScript without a build step, joined into one document that loads nothing. Whatever a model wrote
reaches the page as data and is shown as text. Reads events and trees; knows nothing of engines and runs nothing.
"""

from __future__ import annotations

from plait.viewer.data import ViewData, describe_run, read_views
from plait.viewer.export import chrome_trace, otlp
from plait.viewer.inspect_log import inspect_log
from plait.viewer.page import Page, document

__all__ = [
    "CSP",
    "HEADERS",
    "Page",
    "ViewData",
    "chrome_trace",
    "describe_run",
    "document",
    "inspect_log",
    "otlp",
    "page",
    "read_views",
]

_LIVE = document(live=True)
CSP = _LIVE.policy
"""Policy of `page()`."""
HEADERS = _LIVE.headers
"""All headers of `page()`, the policy among them."""


def page() -> bytes:
    """The page of a server: it asks questions at `/plait/runs` and shows their runs as they come."""
    return _LIVE.html.encode()
