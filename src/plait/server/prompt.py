"""What of a conversation a model is asked.

The models that Plait trains answer one question and remember nothing: of a chat they read the last message, which must
be the user's; the rest is counted, so that nobody thinks it was read. Other models read all of it, through their chat
template, and write the next message, whoever wrote the last. A user's text is never a template and never turns into
control ids: `plait.models` writes the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from plait.server.refusal import Refusal
from plait.server.schemas import ContentPart

_TEXTS = ("text", "input_text", "output_text")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""By OpenAI's names those that chat templates know."""
Conversation: TypeAlias = list[dict[str, str]]


class _Said(Protocol):
    @property
    def role(self) -> str | None: ...
    @property
    def content(self) -> str | list[ContentPart] | None: ...


def asked_of(
    messages: Sequence[_Said], param: str, *, plain: bool, instructions: str | None = None
) -> tuple[str | Conversation, str, int]:
    """What the model is given, the question that it comes to, and how many messages are not read.

    Args:
        messages: In order.
        param: The field that they came from.
        plain: Whether the model reads a whole conversation.
        instructions: What is said before it.

    Raises:
        Refusal: 400, a message is of a role that cannot be read there, or holds something other than text.
    """
    if not plain:
        question, unread = question_of(messages, param)
        return question, question, unread + (instructions is not None)
    # What a model thought earlier, as the Responses API gives it back, is for no template.
    read = [(number, one) for number, one in enumerate(messages) if getattr(one, "type", "") != "reasoning"]
    said: Conversation = [{"role": "system", "content": instructions}] if instructions else []
    for number, one in read:
        if one.role not in _ROLES:
            raise Refusal(
                f"a message of the role {one.role!r}; this model reads those of {', '.join(_ROLES)}",
                code="unsupported_content",
                param=f"{param}.{number}.role",
            )
        said.append({"role": _ROLES[one.role], "content": _text(one.content, f"{param}.{number}.content")})
    users = [one["content"] for one in said if one["role"] == "user"]
    return said, (users or [""])[-1], len(messages) - len(read)


def question_of(messages: Sequence[_Said], param: str) -> tuple[str, int]:
    """The last message, which must be the user's, and how many are before it.

    Raises:
        Refusal: 400, it is not, or holds something other than text.
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
