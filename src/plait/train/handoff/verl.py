"""verl: an agent loop that answers each prompt with a run of threads and gives back a row for each.

    actor_rollout_ref.rollout.agent.default_agent_loop=plait
    actor_rollout_ref.rollout.agent.agent_loop_config_path=configs/verl/agent_loop.yaml

For the V1 trainer, which takes `list[AgentLoopOutput]`: it scores the last output, copies the score to the others, and
compares with `algorithm.adv_estimator=grpo` one output a rollout, so rollouts with many threads do not dominate their
group. Facts: verl 0.9.1. Knows nothing of which server runs behind `LLMServerClient`.
"""

# verl is not among what the types are checked with.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from time import monotonic
from typing import Any
from uuid import uuid4

from plait.engines.base import EngineStats
from plait.errors import ContextLengthError, EngineError, EngineProtocolError, EngineUnavailable, UnsupportedJoin
from plait.formats import open_format
from plait.tokenizer.fast import FastTokenizer
from plait.train.handoff.scoring import LoneReward, named
from plait.train.handoff.token_rows import TokenRow, check_rows, token_rows
from plait.train.prompts import Prompt
from plait.train.rollouts import Rollout, rollout_seed, sample
from plait.types import Budget, Chunk, Context, Merge, Request, SamplingParams, StopReason

try:
    from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput
except ImportError as exc:
    raise EngineUnavailable(f"this needs verl, which cannot be imported: {exc}; pip install verl") from exc


class VerlEngine:
    """verl's servers as an engine: each call is one request, and its tokens come all at once.

    Args:
        client: verl's `LLMServerClient`.
        server: `vllm` or `sglang`, which name a few settings otherwise.
        max_context: Positions of one call, prompt and completion.
    """

    name = "verl"
    supports_merge = False

    def __init__(self, client: Any, *, server: str, max_context: int) -> None:
        self._client, self._server, self.max_context = client, server, max_context
        # One for all calls of a run: verl keeps them on one replica, where their prefix is.
        self._session = uuid4().hex
        self._active = self._given = self._sampled = 0
        self.versions: list[int] = []
        """Of the weights that its calls were answered with, as verl counts steps; empty where it does not say."""

    async def __aenter__(self) -> VerlEngine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def aclose(self) -> None:
        """Nothing to free: the servers are verl's."""

    def stats(self) -> EngineStats:
        return EngineStats(active=self._active, prefill_tokens=self._given, decode_tokens=self._sampled)

    async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        ids = _flat(context)
        room = self.max_context - len(ids)
        if room < 1:
            raise ContextLengthError(f"the context has {len(ids)} tokens; a call may have {self.max_context} in all")
        limit = min(params.max_tokens, room)
        self._active += 1
        try:
            output = await self._client.generate(
                request_id=self._session, prompt_ids=ids, sampling_params=self._settings(params, limit)
            )
        finally:
            self._active -= 1
        self._given += len(ids)
        yield self._chunk(output, params, limit)

    def _settings(self, params: SamplingParams, limit: int) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "max_tokens": limit,
            "logprobs": True,
            "stop_token_ids": [*params.stop_ids, *params.eos_ids],
            "skip_special_tokens": False,
        }
        if self._server == "sglang":
            # Its `ignore_eos` would turn the stop ids off too.
            settings["no_stop_trim"] = True
        else:
            settings |= {"ignore_eos": True, "seed": params.seed & (2**63 - 1)}
        if params.banned_ids:
            keys = map(str, params.banned_ids) if self._server == "sglang" else params.banned_ids
            settings["logit_bias"] = dict.fromkeys(keys, -100.0)
        return settings

    def _chunk(self, output: Any, params: SamplingParams, limit: int) -> Chunk:
        ids = [int(id) for id in output.token_ids]
        if output.stop_reason == "aborted":
            raise EngineError(f"verl's server aborted a call after {len(ids)} tokens")
        if output.log_probs is None or len(output.log_probs) != len(ids):
            raise EngineProtocolError(
                "verl's server gave no log-probability for each token; set "
                "actor_rollout_ref.rollout.calculate_log_probs=true"
            )
        version = output.extra_fields.get("global_steps")
        if version is not None:
            self.versions.append(int(version))
        last = ids[-1] if ids else None
        if last in params.stop_ids:
            stop = StopReason.STOP
        elif last in params.eos_ids:
            stop = StopReason.EOS
        elif len(ids) == limit:
            stop = StopReason.LENGTH
        else:
            raise EngineProtocolError(
                f"verl's server ended a call after {len(ids)} of {limit} tokens on id {last}, which neither is a stop "
                "id nor ends a sequence; the stop id must be part of what it returns"
            )
        self._sampled += len(ids)
        return Chunk(token_ids=tuple(ids), logprobs=tuple(min(0.0, float(p)) for p in output.log_probs), stop=stop)


class PlaitAgentLoop(AgentLoopBase):
    """One run a prompt.

    Args:
        format: Trajectory format that the model was trained in; its tags must be tokens of the model.
        budget: Fields of `plait.Budget`.
        reward: Terms of `[reward]`; None leaves the reward to verl, which looks at the last row.
        grader: `module:function`, called with the response and the ground truth of the data set.
        options: Of the format.

    Raises:
        RequestError: A name or an option is not known, or the vocabulary lacks a tag.
        UnsupportedJoin: The format merges, which rows cannot express.
    """

    def __init__(
        self,
        *args: Any,
        format: str,
        budget: Mapping[str, Any] | None = None,
        reward: Mapping[str, Mapping[str, Any]] | None = None,
        grader: str = "plait.train.handoff.scoring:exact",
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_rows(format)
        self._words = FastTokenizer.of_fast(self.tokenizer)
        self._format = open_format(format, self._words, **dict(options or {}))
        length = int(self.rollout_config.response_length)
        self._budget = Budget(**({"max_tokens": length} | dict(budget or {})))
        self._reward = LoneReward(reward) if reward else None
        self._grade = named(grader)

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> list[AgentLoopOutput]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Sample a run and return a row for each of its threads, the root's last.

        Raises:
            EngineError: The system failed; verl then leaves out the prompt's whole group.
        """
        prompt_ids = await self.ct_build_initial_tokens(list(kwargs["raw_prompt"]))
        engine = VerlEngine(
            self.server_manager,
            server=str(self.rollout_config.name),
            max_context=len(prompt_ids) + int(self.rollout_config.response_length),
        )
        truth = (kwargs.get("reward_model") or {}).get("ground_truth")
        prompt = Prompt(
            family=str(kwargs.get("data_source", "")),
            question=str(kwargs["raw_prompt"][-1].get("content", "")),
            prompt_ids=tuple(prompt_ids),
            grade=lambda response: bool(self._grade(response, truth)),
        )
        number, session = int(kwargs.get("index", 0)), int(kwargs.get("session_id", 0))
        request = Request(
            prompt_ids=prompt.prompt_ids,
            budget=self._budget,
            temperature=float(sampling_params["temperature"]),
            top_p=float(sampling_params.get("top_p", 1.0)),
            top_k=max(0, int(sampling_params.get("top_k", 0))),
            seed=rollout_seed(int(kwargs.get("global_steps", 0)), number, session),
        )
        began = monotonic()
        rollout = await sample(f"{number}/{session}", prompt, request, engine, self._format, lambda: 0)
        if rollout.error:
            raise EngineError(f"the run of prompt {number} failed: {rollout.error}")
        return self._outputs(rollout, engine, monotonic() - began)

    def _outputs(self, rollout: Rollout, engine: VerlEngine, seconds: float) -> list[AgentLoopOutput]:
        numbers: dict[str, float] = {}
        if self._reward is not None:
            numbers = self._reward(rollout, format=self._format, tokenizer=self._words)
        rows = token_rows(rollout.tree)
        versions = engine.versions or [None]
        outputs: list[AgentLoopOutput] = []
        for row in rows:
            fields = {
                "turn_scores": [],
                "tool_rewards": [],
                "min_global_steps": min(versions, key=lambda v: v or 0),
                "max_global_steps": max(versions, key=lambda v: v or 0),
                "reward_extra_info": numbers,
            }
            outputs.append(_output(row, numbers.get("reward"), seconds, len(rollout.tree.segments), fields))
        return outputs


def _output(row: TokenRow, reward: float | None, seconds: float, turns: int, fields: dict[str, Any]) -> AgentLoopOutput:
    return AgentLoopOutput(
        prompt_ids=list(row.prompt_ids),
        response_ids=list(row.response_ids),
        response_mask=list(row.mask),
        response_logprobs=list(row.logprobs),
        reward_score=reward,
        num_turns=turns,
        metrics=AgentLoopMetrics(generate_sequences=seconds),
        extra_fields=fields,
    )


def _flat(context: Context) -> list[int]:
    ids: list[int] = []
    for part in context:
        if isinstance(part, Merge):
            raise UnsupportedJoin("verl's servers take plain sequences; this context holds a merge")
        ids += part
    return ids
