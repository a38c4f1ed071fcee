"""Bodies of requests. What is not supported and would change the answer is refused; what only other servers need is
ignored.

The `plait` field is ours: there every unknown name is refused.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from plait.types import Budget

Finite = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
MAX_STOPS = 16
MAX_PROMPTS = 64


def _few(stops: str | list[str] | None) -> str | list[str] | None:
    if isinstance(stops, list) and len(stops) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop strings")
    return stops


Stop = Annotated[str | list[str] | None, AfterValidator(_few)]


def _only(kind: type[Any]) -> BeforeValidator:
    def check(value: Any) -> Any:
        # A literal compares by value, and in Python 0 is False.
        if value is not None and type(value) is not kind:
            raise ValueError(f"it is {value!r:.50}, which is no {kind.__name__}")
        return value

    return BeforeValidator(check)


No = Annotated[Literal[False], _only(bool)]
One = Annotated[Literal[1], _only(int)]
Zero = Annotated[Literal[0], _only(int)]


class _Body(BaseModel):
    # Strict: a number in quotes, or a 1 for true, is a mistake of the caller's. A string that is too long is told so
    # before its body is too large, however it is escaped.
    model_config = ConfigDict(extra="ignore", str_max_length=1 << 16, strict=True)


class PlaitOptions(BaseModel):
    """The `plait` field of a request: how it may fork, and what is said of it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: str | None = None
    """Refuse a model of another trajectory format."""
    max_threads: Annotated[int, Field(ge=0)] | None = None
    max_threads_per_fork: Annotated[int, Field(ge=0)] | None = Budget().max_threads_per_fork
    """As many as the run may have, if it asks for them or says null."""
    max_concurrent_threads: Annotated[int, Field(ge=1)] | None = None
    max_depth: Annotated[int, Field(ge=0)] | None = None
    max_thread_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    conditioned: bool | None = None
    """Whether the prompt says the budget; by default as the weights were trained."""
    join: Literal["all"] = "all"
    """A join waits for all threads of its block; those that a limit ends are joined with what they have."""
    stream: Literal["ordered", "interleaved", "final"] = "ordered"
    """Chat: the finished text's order, order of arrival with every delta naming its thread, or the answer alone."""
    trace: bool = False
    """Keep the run's events, for `/plait/runs/{id}/events`."""

    def within(self, most: Budget, *, max_tokens: int | None = None) -> Budget:
        """These limits, none above the server's."""
        limits: dict[str, Any] = {}
        for field in fields(most):
            asked = (self.max_tokens, max_tokens) if field.name == "max_tokens" else (getattr(self, field.name),)
            given = (n for n in (getattr(most, field.name), *asked) if n is not None)
            limits[field.name] = min(given, default=None)
        return Budget(**limits)


def _some(value: Any) -> Any:
    return PlaitOptions() if value is None else value


_Options = Annotated[PlaitOptions, BeforeValidator(_some, json_schema_input_type=PlaitOptions | None)]


class SampledRequest(_Body):
    """What all requests may say of sampling."""

    model: Annotated[str, Field(max_length=500)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 20)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    user: str | None = None
    plait: _Options = PlaitOptions()


class StreamOptions(_Body):
    include_usage: bool | None = None


class ContentPart(_Body):
    type: str
    text: str | None = None


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None


_QUESTION = "What is 347 * 526?"
_ASKED = {"role": "user", "content": _QUESTION}
"""In the schema, as examples: a question that the embedded model knows."""


class ChatRequest(SampledRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000, examples=[[_ASKED]])]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop = None
    stream_options: StreamOptions | None = None
    include_reasoning: bool = True
    n: One | None = None
    logprobs: No | None = None
    top_logprobs: Zero | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: _TextFormat | None = None


class _TextFormat(_Body):
    type: Literal["text"]


Ids: TypeAlias = list[Annotated[int, Field(ge=0)]]


class CompletionRequest(SampledRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[
        str
        | Annotated[Ids, Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[Ids, Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)],
        Field(examples=[_QUESTION, [_QUESTION, "What is 12 + 34?"]]),
    ]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: Stop = None
    stream_options: StreamOptions | None = None
    n: One | None = None
    best_of: One | None = None
    echo: bool | None = None
    """With `max_tokens` 0 or 1: the prompt comes back, and `logprobs` says how likely each of its tokens is."""
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _scores_or_continues(self) -> CompletionRequest:
        if self.echo and self.max_tokens not in (0, 1):
            raise ValueError("echo goes with max_tokens 0 or 1: it is for scoring a given text")
        if not self.echo and self.logprobs:
            raise ValueError("logprobs go with echo: they are of a given text, not of threads")
        if not self.echo and self.max_tokens == 0:
            raise ValueError("max_tokens is 0; it must be at least 1, or echo must be true")
        return self


class TokenizeRequest(_Body):
    """`POST /tokenize`."""

    model: Annotated[str, Field(max_length=500)] | None = None
    prompt: Annotated[str, Field(examples=["347*526"])]
    add_special_tokens: bool = True


class DetokenizeRequest(_Body):
    """`POST /detokenize`."""

    model: Annotated[str, Field(max_length=500)] | None = None
    tokens: Annotated[Ids, Field(max_length=200_000)]


class InputItem(_Body):
    type: str = "message"
    role: str | None = None
    content: str | list[ContentPart] | None = None


class _TextConfig(_Body):
    format: _TextFormat | None = None


class ResponsesRequest(SampledRequest):
    """`POST /v1/responses`."""

    input: Annotated[
        str | Annotated[list[InputItem], Field(min_length=1, max_length=1000)], Field(examples=[_QUESTION, [_ASKED]])
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    text: _TextConfig | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    background: No | None = None
    previous_response_id: None = None
    conversation: None = None


class RunRequest(SampledRequest):
    """`POST /plait/runs`: a question for the viewer."""

    question: Annotated[str, Field(max_length=20_000, examples=[_QUESTION])]


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """What every refusal says."""

    error: Error
