"""What a training run depends on, as TOML. Knows nothing of torch's state: a config is plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from plait import tasks
from plait.errors import RequestError
from plait.formats import FORMATS
from plait.settings import build, one_of, read_toml
from plait.tasks.vocabulary import TOKENIZERS, tokenizer_for
from plait.train.data import BudgetConfig
from plait.train.metrics import SINKS
from plait.train.model import ModelConfig
from plait.train.pretrained.config import BaseConfig

Precision: TypeAlias = Literal["auto", "bf16", "fp32"]
NumberType: TypeAlias = Literal["F32", "F16", "Q8_0"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """Where problems come from, for either kind of training."""

    format: str
    """Name of the trajectory format; where a run goes on from a checkpoint, the one that was trained in."""
    mixture: dict[str, float] = field(default_factory=dict[str, float])
    """How often each family is drawn, in any unit."""
    path: str = ""
    """JSON lines in place of a mixture, for models of transformers: see `pretrained.records`."""
    held_out: float = 0.0
    """Share of those lines that is kept for evaluation."""
    knobs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """What the problems of a family are drawn from, where it is not what the embedded models know."""
    vocabulary: str = "compact"
    """Of the embedded models: `compact`; `wide` has letters for numbers of up to 24 digits. Tags of the format that it
    lacks are added to it. A base has its own."""

    def __post_init__(self) -> None:
        TOKENIZERS.require(self.vocabulary)
        FORMATS.require(self.format)
        for name, knobs in self.knobs.items():
            tasks.family(name, knobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(SourceConfig):
    traces: Literal["parallel", "serial", "either"] = "parallel"
    """`serial`: never forks, the twin's data; `either`: sometimes this, sometimes that."""
    buckets: tuple[tuple[int, int], ...] = ((42, 192), (16, 512))
    """Shapes of batches as [rows, length]; about as many slots each."""
    spans: int | None = None
    """Hidden spans a token may have; None: what the format's join needs without nesting."""
    budget: BudgetConfig | None = None
    """Prompts say a budget, and traces keep it; None: they do not."""

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        check_buckets(self.buckets)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserConfig:
    name: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the matrices of the layers and AdamW for the rest, about twice as fast by tokens here."""
    lr: float = 2.5e-3
    momentum: float = 0.95
    """Muon's."""
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.05
    clip: float = 1.0
    """Largest norm of a gradient."""

    def __post_init__(self) -> None:
        one_of(self.name, ("muon", "adamw"), "optimiser")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Length of a run in exactly one unit, all of them reproducible, and the shape of its learning rate."""

    tokens: int | None = None
    """Tokens of examples, prompts and headers counted, padding not."""
    steps: int | None = None
    problems: int | None = None
    warmup_steps: int = 100
    decay: float = 0.4
    """Share of the run, at its end, over which the learning rate falls on a line."""
    floor: float = 0.03
    """Where it falls to, as a share of `lr`."""

    def __post_init__(self) -> None:
        given = [n for n in ("tokens", "steps", "problems") if getattr(self, n) is not None]
        if len(given) != 1 or getattr(self, given[0]) < 1:
            raise RequestError("schedule needs exactly one of tokens, steps and problems, at least 1")
        if not 0 < self.decay <= 1:
            raise RequestError(f"schedule decay is {self.decay}; it must be above 0 and at most 1")

    def done(self, *, steps: int, tokens: int, problems: int) -> float:
        """Share of the run that is over."""
        for total, count in ((self.tokens, tokens), (self.steps, steps), (self.problems, problems)):
            if total is not None:
                return min(1.0, count / total)
        raise AssertionError("a schedule has a unit")

    def factor(self, done: float, step: int) -> float:
        """What the learning rate is multiplied with at a step."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm * min(1.0, max(self.floor, (1 - done) / self.decay))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    times: int = 10
    """Evaluations in a run, evenly spread; the last one is at its end."""
    problems: int = 64
    """Held-out problems of each family for the teacher-forced scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What runs of either kind depend on."""

    data: SourceConfig
    schedule: ScheduleConfig
    model: ModelConfig | None = None
    """Sizes of one of Plait's own models."""
    base: BaseConfig | None = None
    """A model of transformers, in its place."""
    optimiser: OptimiserConfig = OptimiserConfig()
    eval: EvalConfig = EvalConfig()
    seed: int = 0
    init: str = ""
    """Checkpoint whose weights the run starts from; empty: random ones."""
    precision: Precision = "auto"
    """Autocast; auto: bf16 where the machine multiplies it."""
    weights: NumberType = "Q8_0"
    """Number type of the exported `model.gguf`; eight bits lose nothing at these sizes and are the fastest to run."""
    compile: bool = True
    """False, or no C++ compiler: the same, slower."""
    threads: int = 1
    """Of the CPU; 0: as many as torch takes."""
    checkpoint_every_s: float = 120.0

    def __post_init__(self) -> None:
        one_of(self.precision, get_args(Precision), "precision")
        one_of(self.weights, get_args(NumberType), "number type of weights")
        data = self.data
        if self.base is not None and (self.model is not None or self.init):
            raise RequestError("a [base] is where a run starts: leave out [model] and init")
        if self.base is None and data.path:
            raise RequestError("data.path is text, for a model of transformers: name it in [base], or give a mixture")
        if data.path and data.mixture:
            raise RequestError("[data] has either a path to records or a mixture of tasks")
        if not data.path and not data.mixture:
            raise RequestError("the mixture is {}; it needs a family with a weight above 0")
        if not 0 <= data.held_out < 1:
            raise RequestError(f"held_out is {data.held_out}; it must be at least 0 and below 1")
        if data.path and self.eval.times and not data.held_out:
            raise RequestError(
                f"eval.times is {self.eval.times}, and no line is kept for it: set data.held_out, or eval.times to 0"
            )

    @property
    def origin(self) -> str:
        """Where the weights come from, in words."""
        return f"from {self.base.path}" if self.base is not None else f"from {self.init or 'random weights'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTConfig(RunConfig):
    """Everything that a run depends on."""

    data: DataConfig
    sinks: tuple[str, ...] = ()
    """Dashboards beside metrics.jsonl: tensorboard, wandb, trackio."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        check_sinks(self.sinks)
        if self.model is None and self.base is None:
            raise RequestError("a run needs a [model], sizes of one of Plait's own, or a [base] of transformers")
        longest = max(length for _, length in self.data.buckets)
        if self.model is not None and longest > self.model.max_positions:
            raise RequestError(f"rows of {longest} tokens are longer than max_positions, {self.model.max_positions}")


def check_sinks(names: Sequence[str]) -> None:
    """Refuse dashboards that are not known."""
    for name in names:
        SINKS.require(name)


def check_buckets(buckets: Sequence[tuple[int, int]]) -> None:
    """Refuse to pack into nothing."""
    if not buckets:
        raise RequestError("packing needs at least one bucket of rows")


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> SFTConfig:
    """Read a run's TOML file.

    Args:
        path: The file.
        overrides: Values by dotted name, `{"schedule.tokens": 1000}`; they win over the file.

    Raises:
        RequestError: The file is missing or not TOML, or a name or value is not one of `SFTConfig`'s.
    """
    return config_from(read_toml(path, overrides))


def config_from(data: Mapping[str, Any]) -> SFTConfig:
    """A config from plain values, as TOML and checkpoints hold them.

    Raises:
        RequestError: A name or value is not one of `SFTConfig`'s.
    """
    return build(SFTConfig, completed(data, base=_BASE))


_BASE: dict[str, Any] = {
    "threads": 0,
    "checkpoint_every_s": 600.0,
    "data": {"buckets": [[4, 2048], [2, 4096], [1, 8192]]},
    "optimiser": {"name": "adamw", "lr": 1e-5, "beta2": 0.95, "weight_decay": 0.0},
    "schedule": {"warmup_steps": 20, "decay": 1.0, "floor": 0.0},
    "eval": {"times": 0},
}
"""Defaults where a model of transformers is trained: other sizes, other habits."""


def completed(
    data: Mapping[str, Any], *, base: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Plain values of a config with what they leave open.

    Args:
        data: The values.
        base: What they leave open where a model of transformers is trained.
        defaults: And where sections are there whose defaults are others than their own.
    """
    parts = {name: value for name, value in data.items() if value is not None}
    for name, value in (base if "base" in parts else {}).items():
        parts[name] = _over(value, parts[name]) if name in parts else value
    for name, value in (defaults or {}).items():
        if name in parts:
            parts[name] = _over(value, parts[name])
    if "model" in parts:
        data = _over({"vocabulary": "compact", "format": "sequential"}, parts.get("data", {}))
        # What is not known is refused when the section is built.
        if isinstance(data, Mapping) and data["vocabulary"] in TOKENIZERS and data["format"] in FORMATS:
            size = len(tokenizer_for(data["vocabulary"], data["format"]).tokens)
            parts["model"] = _over({"vocab_size": size}, parts["model"])
    return parts


def _over(defaults: Any, given: Any) -> Any:
    """What is given, and of a section what it leaves open."""
    return {**defaults, **given} if isinstance(defaults, Mapping) and isinstance(given, Mapping) else given


def to_toml(config: Any) -> str:
    """A config with every default written out; reading it back gives an equal one."""
    head: list[str] = []
    tables: list[str] = []

    def write(name: str, values: Mapping[str, Any], lines: list[str]) -> None:
        inner: list[tuple[str, Mapping[str, Any]]] = []
        for key, value in values.items():
            if isinstance(value, Mapping):
                inner.append((f"{name}.{key}" if name else key, value))
            elif value is not None:
                # Lists, strings, numbers and booleans are written alike in JSON and TOML.
                lines.append(f"{key} = {json.dumps(value)}")
        for table, content in inner:
            tables.append(f"\n[{table}]")
            write(table, content, tables)

    write("", asdict(config), head)
    return "\n".join(head + tables) + "\n"


FREE = frozenset({"schedule", "eval", "checkpoint_every_s", "threads", "compile", "init", "weights", "sinks"})
"""What may change between a start and a resume."""


def identity(config: Mapping[str, Any], *, free: frozenset[str] = FREE) -> dict[str, Any]:
    """What must not change between a start and a resume, by dotted name."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        if name in free:
            continue
        if isinstance(value, Mapping):
            out |= {f"{name}.{k}": _lists(v) for k, v in value.items()}
        else:
            out[name] = value
    return out


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
