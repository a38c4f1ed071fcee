"""verifiers: a run as a trace of its message graph, and a harness that answers tasks with runs of threads.

A trace has a branch for each row of the rollout, so whoever trains its branches trains each sampled token once: what a
thread has before its own tokens is a node that nobody sampled. Facts: verifiers 0.4.0.

The harness samples from the run's model server by token ids, and writes the trace itself. verifiers' interception
speaks messages, and a thread's context is not one: it goes on in the middle of what its parent wrote.
"""

# verifiers is not among what the types are checked with.
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any
from uuid import uuid4

from plait.engines import open_engine
from plait.errors import EngineError, EngineUnavailable
from plait.formats import open_format
from plait.models import response_text
from plait.tokenizer import Tokenizer
from plait.tokenizer.fast import FastTokenizer
from plait.train.handoff.token_rows import TokenRow, check_rows, token_rows
from plait.train.pretrained.tokenizer import open_tokenizer
from plait.train.prompts import Prompt
from plait.train.rollouts import rollout_seed, sample
from plait.tree import Tree
from plait.types import Budget, Request, StopReason

try:
    from verifiers.v1.clients import ModelContext
    from verifiers.v1.configs.harness import HarnessConfig
    from verifiers.v1.graph import MessageNode
    from verifiers.v1.harness import Harness
    from verifiers.v1.runtimes import ProgramResult, Runtime
    from verifiers.v1.task import TaskData
    from verifiers.v1.trace import ModelCall, Trace
    from verifiers.v1.types import AssistantMessage, Usage, UserMessage
except ImportError as exc:
    raise EngineUnavailable(f"this needs verifiers, which cannot be imported: {exc}; pip install verifiers") from exc


def write_trace(tree: Tree, trace: Trace, *, tokenizer: Tokenizer, model: str | None = None) -> None:
    """Add a run to a trace: its nodes, a model call for each engine call, and the response as the root's reply.

    Args:
        tree: A finished run whose format does not merge.
        model: What the calls are recorded under.

    Raises:
        UnsupportedJoin: It holds a merge.
    """
    prompts: dict[tuple[int, ...], int] = {}
    for row in token_rows(tree):
        if row.prompt_ids not in prompts:
            prompts[row.prompt_ids] = _add(trace, None, row.prompt_ids, None, tokenizer)
        at = prompts[row.prompt_ids]
        calls = iter(row.segments)
        for ids, logprobs in _stretches(row, tree):
            before = at
            at = _add(trace, before, ids, logprobs, tokenizer)
            if logprobs is not None:
                segment = tree.segments[next(calls)]
                given = sum(len(part) for part in tree.context(segment.id) if isinstance(part, tuple))
                limited = segment.stop in (StopReason.LENGTH, StopReason.BUDGET)
                trace.calls.append(
                    ModelCall(
                        node=at,
                        model=model,
                        finish_reason="length" if limited else "stop",
                        usage=Usage(prompt_tokens=given, completion_tokens=len(ids)),
                    )
                )
    trace.root_reply = response_text(tree, tokenizer)


def _stretches(row: TokenRow, tree: Tree) -> list[tuple[tuple[int, ...], tuple[float, ...] | None]]:
    """The response in order: what was given (no log-probabilities), and what each engine call sampled."""
    out: list[tuple[tuple[int, ...], tuple[float, ...] | None]] = []
    at = 0
    for id in row.segments:
        start = row.mask.index(1, at)
        if start > at:
            out.append((row.response_ids[at:start], None))
        at = start + len(tree.segments[id].sampled_ids)
        out.append((row.response_ids[start:at], row.logprobs[start:at]))
    return out


def _add(
    trace: Trace, parent: int | None, ids: tuple[int, ...], logprobs: tuple[float, ...] | None, tokenizer: Tokenizer
) -> int:
    text = tokenizer.decode(ids)
    sampled = logprobs is not None
    trace.nodes.append(
        MessageNode(
            parent=parent,
            message=AssistantMessage(content=text) if sampled else UserMessage(content=text),
            sampled=sampled,
            token_ids=list(ids),
            mask=[sampled] * len(ids),
            logprobs=list(logprobs or ()),
        )
    )
    return len(trace.nodes) - 1


class PlaitHarnessConfig(HarnessConfig):
    """What a seat that answers with threads needs to know."""

    tokenizer: str = ""
    """Folder or name of the model's tokenizer; empty: that of the served model's name."""
    format: str = "threadweaver"
    """Trajectory format that the model was trained in."""
    max_tokens: int = 8192
    """Sampled tokens of a run, all threads together."""
    max_threads: int | None = 64
    seed: int = 0
    server: str | None = None
    """Address of an inference server that takes token ids; by default the one the seat's model is at."""


class PlaitHarness(Harness[PlaitHarnessConfig]):
    """Answers a task with one run."""

    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    def __init__(self, config: PlaitHarnessConfig) -> None:
        super().__init__(config)
        check_rows(config.format)
        self._tokenizer: FastTokenizer | None = None

    def open_tokenizer(self, model: str) -> FastTokenizer:
        """The model's tokenizer, read once."""
        if self._tokenizer is None:
            _, self._tokenizer = open_tokenizer(self.config.tokenizer or model)
        return self._tokenizer

    def open_engine(self, ctx: ModelContext) -> Any:
        """The engine to sample from, not yet open."""
        urls = self.config.server or str(ctx.client.base_url).removesuffix("/").removesuffix("/v1")
        return open_engine("http", urls=urls, model=ctx.model)

    async def launch(
        self,
        ctx: ModelContext,
        trace: Trace,
        runtime: Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: TaskData,
    ) -> ProgramResult:
        """Sample a run and write it into the trace; how long it was, for rewards, into its `info`.

        Raises:
            EngineError: The system failed in it.
        """
        tokenizer = self.open_tokenizer(ctx.model)
        system, given = self.resolve_prompt(data)
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else _plain(given or [])
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        sampling = getattr(ctx, "sampling", None)
        temperature = getattr(sampling, "temperature", None)
        prompt = Prompt(
            family=trace.task.type,
            question=messages[-1]["content"],
            prompt_ids=tokenizer.prompt_ids(messages),
            grade=lambda response: False,
        )
        request = Request(
            prompt_ids=prompt.prompt_ids,
            budget=Budget(max_tokens=self.config.max_tokens, max_threads=self.config.max_threads),
            temperature=1.0 if temperature is None else temperature,
            seed=rollout_seed(self.config.seed, data.idx or 0, uuid4().int & 0xFFFFFFFF),
        )
        format = open_format(self.config.format, tokenizer)
        async with self.open_engine(ctx) as engine:
            rollout = await sample(f"{data.idx or 0}/0", prompt, request, engine, format, lambda: 0)
        tree = rollout.tree
        write_trace(tree, trace, tokenizer=tokenizer, model=ctx.model)
        trace.info["plait"] = {
            "sampled_tokens": tree.num_sampled,
            "critical_path_tokens": tree.critical_path(),
            "response_tokens": tree.num_response(),
            "token_latency": tree.token_latency(),
        }
        if rollout.error:
            raise EngineError(f"the run failed: {rollout.error}")
        return ProgramResult(exit_code=0, stdout=trace.root_reply or "", stderr="")


def _plain(messages: Any) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content if isinstance(m.content, str) else ""} for m in messages]


__all__ = ["PlaitHarness", "PlaitHarnessConfig", "write_trace"]
