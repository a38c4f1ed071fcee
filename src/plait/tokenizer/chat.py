"""Chat templates: messages as one text, by the program that comes with a model. Needs jinja2.

The program is somebody else's and runs in a sandbox. It finds what templates find in transformers, with one exception:
a prompt should not depend on the day, so only a template that cannot do without is told the date.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, ClassVar

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


def render(template: str, messages: Sequence[Mapping[str, str]], named: Mapping[str, str]) -> str:
    """Messages as a text that ends where the assistant begins.

    Args:
        named: Texts of the tokens that a template may write by name, such as `bos_token`.

    Raises:
        Exception: Any, of the template's making.
    """
    return _compiled(template).render(
        messages=messages, add_generation_prompt=True, tools=None, documents=None, **named
    )


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _fail, "namespace": _Plain, "dict": lambda **values: dict(values)}
    if "strftime_now is defined" not in template:
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


class _Generation(Extension):
    """Reads the marks around what an assistant says, which trainers use; here they are nothing."""

    tags: ClassVar[set[str]] = {"generation"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Plain(Namespace):
    """A namespace of plain names: others could lead out of the sandbox."""

    def __init__(*args: Any, **values: Any) -> None:
        self, given = args[0], dict(*args[1:], **values)
        assert isinstance(self, _Plain)
        Namespace.__init__(self)
        for name, value in given.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a template cannot keep {name!r}: a name may not begin with an underscore")
        super().__setitem__(name, value)


def _fail(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    # Jinja's own writes for web pages, and would spell `<` as an escape.
    return json.dumps(value, **{"ensure_ascii": False, **options})
