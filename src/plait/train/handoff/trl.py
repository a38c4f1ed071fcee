"""TRL: a rollout worker for `AsyncGRPOTrainer` that samples groups of runs from an inference server.

    worker = PlaitRolloutWorker(prompts, engine=HttpEngine(url), format="threadweaver", tokenizer=tokenizer)
    AsyncGRPOTrainer(model, args=args, rollout_worker=worker, train_dataset=dataset)

The worker rewards, compares within groups, and gives the trainer a row for each thread with the advantage of its
rollout: TRL's loss is a mean over all trained tokens, so this is P-GRPO. The weights reach the server by TRL's own
transfer. Facts: TRL 1.16. Knows nothing of models.
"""

# TRL is not among what the types are checked with.
# pyright: reportMissingImports=false

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import anyio
import numpy as np

from plait.engines.base import Engine
from plait.errors import EngineError, EngineUnavailable, RequestError
from plait.formats import open_format
from plait.tokenizer import Tokenizer
from plait.train.advantages import advantages
from plait.train.handoff.token_rows import TokenRow, check_rows, token_rows
from plait.train.prompts import Prompt
from plait.train.rewards import Group, Outcome, Reward
from plait.train.rollouts import Rollout, collect, outcome_of
from plait.types import Budget

try:
    from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
except ImportError as exc:
    raise EngineUnavailable(f"this needs TRL, which cannot be imported: {exc}; pip install trl") from exc

_PAUSE_S = 0.05


class PlaitRolloutWorker:
    """Samples in a thread of this process until it is stopped; implements `RolloutWorkerProtocol`.

    Args:
        prompts: Prompt number n, for n from 0 on; the same number is always the same prompt.
        engine: Makes an engine that is not open yet; called once, in the worker's thread.
        format: Trajectory format that the model was trained in.
        tokenizer: The model's, as `FastTokenizer`.
        group_size: Rollouts of a prompt.
        groups: Prompts that are sampled at once.
        reward: Terms of `[reward]`.
        advantage: `mean` is P-GRPO's.
        waiting: Rows that may wait for the trainer; sampling pauses where there are more.
        first: Number of the first prompt, to go on with a run.

    Raises:
        RequestError: A name or option is not known.
        UnsupportedJoin: The format merges, which rows cannot express.
    """

    def __init__(
        self,
        prompts: Callable[[int], Prompt],
        *,
        engine: Callable[[], Engine],
        format: str,
        tokenizer: Tokenizer,
        group_size: int = 8,
        groups: int = 16,
        budget: Budget | None = None,
        reward: Mapping[str, Mapping[str, Any]] | None = None,
        advantage: str = "mean",
        temperature: float = 1.0,
        waiting: int = 4096,
        seed: int = 0,
        first: int = 0,
    ) -> None:
        if group_size < 2 or groups < 1:
            raise RequestError(f"group_size is {group_size} and groups {groups}; they must be at least 2 and 1")
        check_rows(format)
        self._prompts, self._engine, self._tokenizer = prompts, engine, tokenizer
        self._format = open_format(format, tokenizer)
        self._reward = Reward(reward or {"correctness": {}, "latency": {}, "format_validity": {}})
        advantages(advantage, {})
        self._advantage, self._temperature = advantage, temperature
        self._group_size, self._groups, self._budget = group_size, groups, budget or Budget()
        self._seed, self._next = seed, first
        self.rollout_buffer: queue.Queue[RolloutSample] = queue.Queue(maxsize=waiting)
        self.metrics_queue: queue.Queue[dict[str, Any]] = queue.Queue()
        self._version = 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._alive_at = time.monotonic()

    def start(self) -> None:
        """Begin to sample."""
        if self._thread is not None:
            raise RequestError("a rollout worker is started once; make another one")
        self._alive_at = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="plait-rollouts")
        self._thread.start()

    def stop(self) -> None:
        """Cancel what is being sampled and wait until the engine is closed."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def update_model_version(self, model_version: int) -> None:
        """Calls that begin from now on are sampled from these weights."""
        self._version = model_version

    def check_health(self, stale_after_s: float) -> None:
        """Raise what ended the worker, or that nothing has come for so long.

        Raises:
            EngineError: It failed, or its engine is stuck.
        """
        if self._failure is not None:
            raise EngineError(f"the rollout worker failed: {self._failure!r}") from self._failure
        silent = time.monotonic() - self._alive_at
        if silent > stale_after_s:
            raise EngineError(f"the rollout worker has finished no group for {silent:.0f} s")

    def _work(self) -> None:
        try:
            anyio.run(self._sample)
        except BaseException as exc:
            # The boundary of the thread: the trainer asks for it in `check_health`.
            self._failure = exc

    async def _sample(self) -> None:
        async with self._engine() as engine, anyio.create_task_group() as tasks:
            for _ in range(self._groups):
                tasks.start_soon(self._keep_sampling, engine)
            # The event is set by another thread: nothing of this loop could wake it.
            while not self._stopped.is_set():  # noqa: ASYNC110
                await anyio.sleep(_PAUSE_S)
            tasks.cancel_scope.cancel()

    async def _keep_sampling(self, engine: Engine) -> None:
        while True:
            number, self._next = self._next, self._next + 1
            (group,) = await collect(
                [(number, self._prompts(number))],
                engine=engine,
                format=self._format,
                group_size=self._group_size,
                budget=self._budget,
                concurrency=self._group_size,
                version=lambda: self._version,
                seed=self._seed,
                temperature=self._temperature,
            )
            for row in self._samples(number, group):
                while not self._put(row):
                    self._alive_at = time.monotonic()
                    await anyio.sleep(_PAUSE_S)
            self._alive_at = time.monotonic()

    def _put(self, row: RolloutSample) -> bool:
        try:
            self.rollout_buffer.put_nowait(replace(row, enqueued_at=time.time()))
        except queue.Full:
            return False
        return True

    def _samples(self, number: int, group: list[Rollout]) -> list[RolloutSample]:
        """Rows of a group; what the system failed is left out, and a group that it failed altogether is told."""
        ran = [rollout for rollout in group if not rollout.error]
        if not ran:
            raise EngineError(f"every rollout of prompt {number} failed; the first: {group[0].error}")
        outcomes = [outcome_of(rollout, format=self._format, tokenizer=self._tokenizer) for rollout in ran]
        siblings = Group(outcomes=outcomes, step=self._version, done=0.0)
        parts = [self._reward.parts(outcome, siblings) for outcome in outcomes]
        rewards = {r.id: sum(p.values()) for r, p in zip(ran, parts, strict=True)}
        worth = advantages(self._advantage, {str(number): rewards})
        spread = float(np.std(list(rewards.values())))
        self.metrics_queue.put({"rollout/failed_total": float(len(group) - len(ran))})
        samples: list[RolloutSample] = []
        for rollout, outcome, terms in zip(ran, outcomes, parts, strict=True):
            numbers = _numbers(outcome, terms, rewards[rollout.id], spread)
            samples += [self._row(row, rollout, worth[rollout.id], number, numbers) for row in token_rows(rollout.tree)]
        return samples

    def _row(
        self, row: TokenRow, rollout: Rollout, advantage: float, number: int, numbers: dict[str, float]
    ) -> RolloutSample:
        before = [0] * len(row.prompt_ids)
        return RolloutSample(
            prompt=[{"role": "user", "content": rollout.prompt.question}],
            completion=[{"role": "assistant", "content": self._tokenizer.decode(row.response_ids)}],
            input_ids=np.array((*row.prompt_ids, *row.response_ids), np.int64),
            completion_mask=np.array((*before, *row.mask), np.int64),
            old_log_probs=np.array((*before, *row.logprobs), np.float32),
            advantage=advantage,
            # The oldest weights that sampled a token of the row, for the trainer's limit on staleness.
            model_version=min(rollout.versions[id] for id in row.segments),
            group_id=number,
            metrics=numbers,
        )


def _numbers(outcome: Outcome, terms: Mapping[str, float], reward: float, spread: float) -> dict[str, float]:
    return {
        "reward": reward,
        "reward_std": spread,
        **{f"rewards/{name}": value for name, value in terms.items()},
        "rollout/correct": float(outcome.correct),
        "rollout/valid": float(outcome.valid),
        "rollout/parallel": float(outcome.forks > 0),
        "rollout/threads": float(outcome.threads),
        "rollout/critical_path_tokens": float(outcome.critical_path_tokens),
    }
