"""Plait's models in inspect-ai: `inspect eval task.py --model plait/plait-tiny`. Needs the extra `inspect`.

Inspect finds it by its entry point. Without an address the model runs in this process; with one (`--model-base-url
http://localhost:8000/v1`) a `plait serve` answers. Either way an output has one reasoning part for each thread, and its
metadata say what the run cost: threads, critical path, acceleration. It knows nothing of tasks and scores.

Model arguments (`-M NAME=VALUE`) are the limits of `plait.types.Budget`; in this process also `engine` and
`engine_options`, a mapping.
"""

# inspect-ai is not among what the types are checked with.
# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, fields
from typing import Any, Literal, cast

import anyio

from plait.engines.base import Engine
from plait.errors import EngineError, EngineUnavailable, RequestError, nearest, needs
from plait.models import Model, load_model
from plait.session import run
from plait.tree import Tree
from plait.types import Budget, StopReason

try:
    import httpx2
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessage,
        ChatMessageAssistant,
        ContentReasoning,
        ContentText,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        modelapi,
    )
    from inspect_ai.tool import ToolChoice, ToolInfo
except ImportError as exc:
    raise EngineUnavailable(f"{needs('the inspect-ai provider', 'inspect')} ({exc})") from exc

KEY_VARIABLE, ADDRESS_VARIABLE = "PLAIT_API_KEY", "PLAIT_BASE_URL"
LIMITS = tuple(field.name for field in fields(Budget))
_STOPS: dict[str, Literal["stop", "max_tokens"]] = {"eos": "stop", "stop": "stop"}
_STOPS |= {"length": "max_tokens", "budget": "max_tokens"}
_ANSWER = "Answer: "


@modelapi(name="plait")
def plait() -> type[ModelAPI]:
    return PlaitAPI


class PlaitAPI(ModelAPI):
    """A model of Plait's, as inspect asks it.

    Args:
        model_name: As of `plait solve --model`: a name or a file; of a server, a model that it serves.
        base_url: Of a `plait serve`; by default what the variable PLAIT_BASE_URL holds. None: in this process.
        api_key: For that server; by default what PLAIT_API_KEY holds.
        model_args: Limits of the run, `engine`, `engine_options`.

    Raises:
        RequestError: A model argument or the model is not known.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - as inspect's own providers
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url or os.environ.get(ADDRESS_VARIABLE), api_key, [KEY_VARIABLE], config)
        self.api_key = self.api_key or os.environ.get(KEY_VARIABLE)
        here = () if self.base_url else ("engine", "engine_options")
        for name in model_args:
            if name not in (*LIMITS, *here):
                raise nearest(name, [*LIMITS, *here], "model argument")
        self._limits = {name: model_args[name] for name in LIMITS if name in model_args}
        self._engine_name: str | None = model_args.get("engine")
        self._options: Mapping[str, Any] = model_args.get("engine_options") or {}
        self._model = None if self.base_url else load_model(model_name)
        self._budget = Budget(**self._limits)
        self._engine: Engine | None = None
        self._users = 0

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer the last message.

        Raises:
            RequestError: There are tools; the last message is not the user's; the model does not know such questions.
            EngineError: The engine or the server failed.
        """
        if tools:
            raise RequestError("Plait's models call no tools; leave them out of the task")
        question = _question(input)
        if self._model is not None:
            return await self._run(self._model, question, config)
        return await self._ask(question, config)

    def should_retry(self, ex: Exception) -> bool:
        return isinstance(ex, EngineError) and ex.retryable

    def connection_key(self) -> str:
        return f"{self.base_url or 'here'} {self.model_name}"

    # In this process

    async def _run(self, model: Model, question: str, config: GenerateConfig) -> ModelOutput:
        limits = self._limits
        if config.max_tokens is not None:
            limits = limits | {"max_tokens": min(config.max_tokens, self._budget.max_tokens or config.max_tokens)}
        request = model.request(
            question,
            budget=Budget(**limits),
            temperature=config.temperature or 0.0,
            top_p=config.top_p or 1.0,
            top_k=config.top_k or 0,
            seed=config.seed or 0,
            logprobs=False,
        )
        async with self._opened(model) as engine:
            tree = await run(request, engine=engine, format=model.format)
        usage = tree.usage()
        threads = [_reasoning(*of) for of in _threads(tree, model)]
        costs = {**asdict(usage), "acceleration": round(tree.acceleration(), 4)}
        about = {"stop": str(tree.stop or StopReason.STOP), "note": tree.note, "model": model.id}
        return _output(
            model.name,
            [part for part in threads if part.reasoning],
            _root(tree, model).partition(_ANSWER)[2],
            stop=str(tree.stop),
            usage=ModelUsage(
                input_tokens=usage.prompt_tokens,
                output_tokens=usage.sampled_tokens,
                total_tokens=usage.prompt_tokens + usage.sampled_tokens,
            ),
            plait={**costs, **about},
        )

    @asynccontextmanager
    async def _opened(self, model: Model) -> AsyncGenerator[Engine, None]:
        """The engine, open as long as anybody uses it: inspect never says when it has done with a model."""
        lock = self._lock()
        async with lock:
            if self._engine is None:
                engine = model.open_engine(self._engine_name, **self._options)
                self._engine = await engine.__aenter__()
            self._users += 1
        try:
            yield self._engine
        finally:
            self._users -= 1
            with anyio.CancelScope(shield=True):
                async with lock:
                    if not self._users and self._engine is not None:
                        engine, self._engine = self._engine, None
                        await engine.__aexit__(None, None, None)

    def _lock(self) -> anyio.Lock:
        """One for each event loop: inspect keeps a model from one evaluation to the next."""
        token = anyio.lowlevel.current_token()
        if getattr(self, "_token", None) != token:
            self._token, self._own_lock = token, anyio.Lock()
        return self._own_lock

    # Of a server

    async def _ask(self, question: str, config: GenerateConfig) -> ModelOutput:
        body: dict[str, Any] = {
            "model": self.model_name,
            "input": question,
            "max_output_tokens": config.max_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "seed": config.seed,
            "plait": self._limits,
        }
        key = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        url = f"{str(self.base_url).rstrip('/')}/responses"
        try:
            async with httpx2.AsyncClient(timeout=600, trust_env=False) as client:
                reply = await client.post(
                    url, json={name: value for name, value in body.items() if value is not None}, headers=key
                )
        except httpx2.HTTPError as exc:
            raise EngineUnavailable(f"{url} does not answer: {exc!r}") from exc
        if reply.status_code != 200:
            text = f"{url} answered {reply.status_code}: {reply.text[:1000]}"
            again = reply.status_code == 429 or reply.status_code >= 500
            raise EngineUnavailable(text) if again else RequestError(text)
        data = reply.json()
        usage = data["usage"]
        items = data["output"]
        threads = [
            _reasoning(_text(item), item["plait"]["thread"], item["plait"]["outline"])
            for item in items
            if item["type"] == "reasoning"
        ]
        answer = "".join(_text(item) for item in items if item["type"] == "message")
        return _output(
            data["model"],
            [part for part in threads if part.reasoning],
            answer,
            stop=data["plait"]["stop"],
            usage=ModelUsage(
                input_tokens=usage["input_tokens"],
                output_tokens=usage["output_tokens"],
                total_tokens=usage["total_tokens"],
                reasoning_tokens=usage["output_tokens_details"]["reasoning_tokens"],
            ),
            plait={**usage["plait"], **data["plait"]},
        )


def _question(input: Sequence[ChatMessage]) -> str:
    if not input or input[-1].role != "user":
        raise RequestError("the last message must be the user's question")
    return input[-1].text


def _threads(tree: Tree, model: Model) -> list[tuple[str, str, str]]:
    """Text, name and outline of every thread; the root's up to its answer."""
    out: list[tuple[str, str, str]] = []
    for info in tree.threads():
        own = [tree.segments[id] for id in info.segments]
        if own[0].parent is None:
            out.append((_root(tree, model).partition(_ANSWER)[0], info.name, info.label))
        else:
            ids = (*own[0].forced_ids, *(id for segment in own for id in segment.sampled_ids))
            out.append((model.tokenizer.decode(ids), info.name, info.label))
    return out


def _root(tree: Tree, model: Model) -> str:
    """What the root thread sampled, without end-of-sequence."""
    own = (id for segment in tree.segments.values() if segment.thread == "0" for id in segment.sampled_ids)
    return model.tokenizer.decode([id for id in own if id not in model.tokenizer.eos_ids])


def _text(item: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in item["content"])


def _reasoning(text: str, thread: str, outline: str) -> ContentReasoning:
    return ContentReasoning(reasoning=text, internal={"thread": thread, "outline": outline})


def _output(
    model: str,
    threads: Sequence[ContentReasoning],
    answer: str,
    *,
    stop: str,
    usage: ModelUsage,
    plait: Mapping[str, Any],
) -> ModelOutput:
    content = cast(Any, [*threads, ContentText(text=answer)])
    message = ChatMessageAssistant(content=content, model=model, source="generate")
    choice = ChatCompletionChoice(message=message, stop_reason=_STOPS.get(stop, "unknown"))
    return ModelOutput(model=model, choices=[choice], usage=usage, metadata={"plait": dict(plait)})
