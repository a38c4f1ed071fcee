"""What a run of reinforcement learning depends on, as TOML. Plain values; what is shared with SFT is in `config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from plait.errors import RequestError
from plait.settings import build, one_of, read_toml
from plait.train.advantages import ADVANTAGES
from plait.train.config import (
    FREE,
    EvalConfig,
    OptimiserConfig,
    Precision,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    check_buckets,
    check_sinks,
    completed,
)
from plait.train.losses import AGGREGATES, Aggregate
from plait.train.rewards import Reward
from plait.train.serving import SERVINGS
from plait.types import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsConfig(SourceConfig):
    grader: str = "plait.train.handoff.scoring:exact"
    """Of the lines of `path`, as `package.module:function`: is given a response and the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How rollouts are sampled. Their temperature is 1: it is the policy itself that is trained."""

    prompts: int = 16
    """Groups of a step."""
    group_size: int = 8
    """Rollouts of a prompt."""
    concurrency: int = 32
    """Rollouts that sample at the same time."""
    mode: Literal["sync", "one_step_off"] = "sync"
    """one_step_off: the next step's rollouts are sampled, with the weights before this step, while this one trains."""
    engine: str = "torch"
    """torch: live weights; llamacpp: a GGUF written at each step, faster where few rollouts run at a time."""
    cells: int | None = None
    """Tokens that the engine's cache holds, shared prefixes once; None: 1024 for each of `concurrency`."""
    max_tokens: int = 1536
    """Sampled tokens of one rollout, all threads together."""
    max_thread_tokens: int | None = None
    max_threads: int | None = 64
    errors: Literal["leave_out", "wrong"] = "leave_out"
    """A rollout in which the system failed: not compared and not trained, or a wrong answer like any other."""

    def __post_init__(self) -> None:
        for name in ("prompts", "group_size", "concurrency"):
            if getattr(self, name) < 1:
                raise RequestError(f"rollout {name} is {getattr(self, name)}; it must be at least 1")
        for name, allowed in (("mode", ["sync", "one_step_off"]), ("errors", ["leave_out", "wrong"])):
            one_of(getattr(self, name), allowed, f"rollout {name}")
        one_of(self.engine, SERVINGS, "engine for rollouts")
        if self.cells is not None and self.cells < 1:
            raise RequestError(f"rollout cells is {self.cells}; it must be at least 1")
        _ = self.budget

    @property
    def budget(self) -> Budget:
        return Budget(
            max_tokens=self.max_tokens, max_thread_tokens=self.max_thread_tokens, max_threads=self.max_threads
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """From rewards to a gradient. P-GRPO: mean and token_mean; GRPO: group_std and rollout_mean; Dr. GRPO: mean and
    constant."""

    advantage: str = "mean"
    aggregate: Aggregate = "token_mean"
    clip_low: float = 0.2
    clip_high: float = 0.28
    minibatches: int = 1
    """Updates from one step's rollouts; with one, and on current weights, nothing is ever clipped."""
    correction: Literal["truncated", "none"] = "truncated"
    """For tokens sampled by another implementation or older weights; none: the clip's ratio is against the engine's
    log-probabilities as they are."""
    cap: float = 2.0
    """Largest importance weight of a token."""
    kl: float = 0.0
    """Weight of the divergence from the weights that the run started with."""

    def __post_init__(self) -> None:
        ADVANTAGES.require(self.advantage)
        one_of(self.aggregate, AGGREGATES, "aggregate")
        one_of(self.correction, ("truncated", "none"), "correction")
        if not 0 < self.clip_low < 1 or not self.clip_high > 0:
            raise RequestError(
                f"clip_low is {self.clip_low} and clip_high {self.clip_high}; they must be in (0, 1) and above 0"
            )
        if self.minibatches < 1 or not self.cap > 0 or not self.kl >= 0:
            raise RequestError(
                f"loss minibatches={self.minibatches}, cap={self.cap}, kl={self.kl}; they must be at least 1, above 0,"
                " and not below 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    sinks: tuple[str, ...] = ()
    """Dashboards beside metrics.jsonl: tensorboard, wandb, trackio."""
    samples_every: int = 20
    """Steps between two logs of sample trees, for `plait trace show`; 0 writes none."""
    samples: int = 2

    def __post_init__(self) -> None:
        check_sinks(self.sinks)


_DEFAULTS: dict[str, dict[str, Any]] = {
    "optimiser": {"name": "muon", "lr": 2e-4, "weight_decay": 0.0},
    "schedule": {"warmup_steps": 5, "decay": 0.5, "floor": 0.1},
    "eval": {"times": 5, "problems": 32},
}
"""Where a section's defaults are not those of SFT."""
_OPTIMISER = OptimiserConfig(**_DEFAULTS["optimiser"])
_EVAL = EvalConfig(**_DEFAULTS["eval"])


@dataclass(frozen=True, slots=True, kw_only=True)
class RLConfig(RunConfig):
    """Everything that a run depends on. It starts from `init`, from the sizes of a model, or from a base."""

    data: PromptsConfig
    schedule: ScheduleConfig
    """In steps."""
    reward: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"correctness": {}, "latency": {}, "format_validity": {}}
    )
    """Terms by name, each with its options; see `plait.train.rewards`."""
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    optimiser: OptimiserConfig = _OPTIMISER
    eval: EvalConfig = _EVAL
    log: LogConfig = LogConfig()
    buckets: tuple[tuple[int, int], ...] = ((6, 320), (4, 512), (3, 640), (2, 1088))
    """Shapes of packed batches as [rows, length]."""
    precision: Precision = "fp32"
    """fp32 keeps the trainer's log-probabilities close to the engine's."""

    def __post_init__(self) -> None:
        if self.schedule.steps is None:
            raise RequestError("reinforcement learning is counted in steps: set schedule.steps")
        if self.model is None and self.base is None and not self.init:
            raise RequestError("a run needs `init`, a checkpoint to start from, the sizes of a [model], or a [base]")
        RunConfig.__post_init__(self)
        if self.base is not None and self.rollout.engine != "torch":
            raise RequestError(
                f"rollout engine is {self.rollout.engine!r}; a model of transformers is sampled by 'torch'"
            )
        check_buckets(self.buckets)
        Reward(self.reward)


def load_rl_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RLConfig:
    """Read a run's TOML file.

    Args:
        path: The file.
        overrides: Values by dotted name, `{"rollout.group_size": 4}`; they win over the file.

    Raises:
        RequestError: The file is missing or not TOML, or a name or value is not one of `RLConfig`'s.
    """
    return rl_config_from(read_toml(path, overrides))


def rl_config_from(data: Mapping[str, Any]) -> RLConfig:
    """A config from plain values, as TOML and checkpoints hold them.

    Raises:
        RequestError: A name or value is not one of `RLConfig`'s.
    """
    return build(RLConfig, completed(data, base=_BASE, defaults=_DEFAULTS))


_BASE: dict[str, Any] = {
    "threads": 0,
    "checkpoint_every_s": 600.0,
    "buckets": [[4, 2048], [2, 4096], [1, 8192]],
    "optimiser": {"name": "adamw", "lr": 1e-6, "beta2": 0.95, "weight_decay": 0.0},
    "schedule": {"warmup_steps": 5, "decay": 1.0, "floor": 1.0},
    "eval": {"times": 0},
}
"""Defaults where a model of transformers is trained."""

RL_FREE = FREE | {"log", "model"}
"""What may change between a start and a resume. The model's sizes come with its weights."""
