"""Which question a conversation asks. The models that Plait trains answer one question and remember nothing: of a chat
they read the last message, which must be the user's; the rest is counted, so that nobody thinks it was read.

A user's text is never a template and never turns into control ids: `plait.models` writes the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from plait.server.refusal import Refusal
from plait.server.schemas import ContentPart

_TEXTS = ("text", "input_text", "output_text")


class _Said(Protocol):
    @property
    def role(self) -> str | None: ...
    @property
    def content(self) -> str | list[ContentPart] | None: ...


def question_of(messages: Sequence[_Said], param: str) -> tuple[str, int]:
    """The question, and how many messages are not read.

    Args:
        messages: In order.
        param: The field that they came from.

    Raises:
        Refusal: 400, the last message is not the user's, or holds something other than text.
    """
    last = messages[-1]
    if last.role != "user":
        raise Refusal(
            f"the last message is of the role {last.role!r}; it must be the user's question",
            code="no_question",
            param=f"{param}.{len(messages) - 1}.role",
        )
    return _text(last.content, f"{param}.{len(messages) - 1}.content"), len(messages) - 1


def _text(content: str | list[ContentPart] | None, param: str) -> str:
    if isinstance(content, str):
        return content
    for number, part in enumerate(content or []):
        if part.type not in _TEXTS or part.text is None:
            raise Refusal(
                f"a message part of type {part.type[:50]!r}; this model reads text only",
                code="unsupported_content",
                param=f"{param}.{number}",
            )
    return "".join(part.text or "" for part in content or [])
