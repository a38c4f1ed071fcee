"""What whole replies hold, for the schema. The routes write plain values; a test holds them to this."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class PlaitUsage(BaseModel):
    critical_path_tokens: int
    threads: int
    forks: int
    max_concurrency: int
    acceleration: float
    longest_context_tokens: int
    forced_tokens: int
    reread_tokens: int


class PlaitReply(BaseModel):
    """How the run ended, where OpenAI's words are too few."""

    stop: str
    note: str = ""
    forks_declined: str = ""
    answered_by: str = ""
    run_id: str = ""
    unread_messages: int = 0


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: dict[str, int] = {}


class RunUsage(Usage):
    plait: PlaitUsage


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None
    reasoning: str = ""
    reasoning_content: str = ""


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: None
    finish_reason: Literal["stop", "length"]


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: RunUsage
    plait: PlaitReply


class Logprobs(BaseModel):
    """Of a scored prompt; nothing is known of the first token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class OutputItem(BaseModel):
    id: str
    type: Literal["reasoning", "message"]
    status: Literal["completed", "in_progress"]
    content: list[dict[str, Any]]


class ResponsesUsage(BaseModel):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens_details: dict[str, int]
    plait: PlaitUsage


class ResponsesReply(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[OutputItem]
    error: None
    usage: ResponsesUsage
    plait: PlaitReply
