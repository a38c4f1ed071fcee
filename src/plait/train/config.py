"""What a training run depends on, as TOML. Knows nothing of torch's state: a config is plain values."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from plait import tasks
from plait.errors import RequestError, nearest
from plait.tasks.vocabulary import TOKENIZERS
from plait.train.data import BudgetConfig
from plait.train.metrics import SINKS
from plait.train.model import ModelConfig
from plait.train.pretrained.config import BaseConfig

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    format: str
    """Name of the trajectory format."""
    traces: Literal["parallel", "serial", "either"] = "parallel"
    """`serial`: never forks, the twin's data; `either`: sometimes this, sometimes that."""
    mixture: dict[str, float] = field(default_factory=dict[str, float])
    """How often each family is drawn, in any unit."""
    path: str = ""
    """JSON lines in place of a mixture, for models of transformers: see `pretrained.records`."""
    held_out: float = 0.0
    """Share of those lines that is kept for evaluation."""
    knobs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """What the problems of a family are drawn from, where it is not what the embedded models know."""
    vocabulary: str = "compact"
    """Of the embedded models: `compact`; `wide` has letters for numbers of up to 24 digits. A base has its own."""
    buckets: tuple[tuple[int, int], ...] = ((42, 192), (16, 512))
    """Shapes of batches as [rows, length]; about as many slots each."""
    spans: int | None = None
    """Hidden spans a token may have; None: what the format's join needs without nesting."""
    budget: BudgetConfig | None = None
    """Prompts say a budget, and traces keep it; None: they do not."""

    def __post_init__(self) -> None:
        if self.vocabulary not in TOKENIZERS:
            raise nearest(self.vocabulary, list(TOKENIZERS), "vocabulary")
        if not self.buckets:
            raise RequestError("packing needs at least one bucket of rows")
        for name, knobs in self.knobs.items():
            tasks.family(name, knobs)


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
        if self.name not in ("muon", "adamw"):
            raise nearest(self.name, ["muon", "adamw"], "optimiser")


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
class SFTConfig:
    """Everything that a run depends on."""

    data: DataConfig
    schedule: ScheduleConfig
    model: ModelConfig | None = None
    """Sizes of one of Plait's own models, which this or `base` names."""
    base: BaseConfig | None = None
    """A model of transformers."""
    optimiser: OptimiserConfig = OptimiserConfig()
    eval: EvalConfig = EvalConfig()
    seed: int = 0
    init: str = ""
    """Checkpoint whose weights the run starts from; empty: random ones."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast; auto: bf16 where the machine multiplies it."""
    weights: Literal["F32", "F16", "Q8_0"] = "Q8_0"
    """Number type of the exported `model.gguf`; eight bits lose nothing at these sizes and are the fastest to run."""
    compile: bool = True
    """False, or no C++ compiler: the same, slower."""
    threads: int = 1
    """Of the CPU; 0: as many as torch takes."""
    checkpoint_every_s: float = 120.0
    sinks: tuple[str, ...] = ()
    """Dashboards beside metrics.jsonl: tensorboard, wandb, trackio."""

    def __post_init__(self) -> None:
        check_model(self.model, self.base, data=self.data, init=self.init, times=self.eval.times)
        if self.model is None and self.base is None:
            raise RequestError("a run needs a [model], sizes of one of Plait's own, or a [base] of transformers")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise nearest(self.precision, ["auto", "bf16", "fp32"], "precision")
        if self.weights not in ("F32", "F16", "Q8_0"):
            raise nearest(self.weights, ["F32", "F16", "Q8_0"], "number type of weights")
        for name in self.sinks:
            if name not in SINKS:
                raise nearest(name, list(SINKS), "dashboard")
        longest = max(length for _, length in self.data.buckets)
        if self.model is not None and longest > self.model.max_positions:
            raise RequestError(f"rows of {longest} tokens are longer than max_positions, {self.model.max_positions}")


class Data(Protocol):
    """What either kind of training says of its data."""

    @property
    def path(self) -> str: ...
    @property
    def mixture(self) -> Mapping[str, float]: ...
    @property
    def held_out(self) -> float: ...


def check_model(model: ModelConfig | None, base: BaseConfig | None, *, data: Data, init: str, times: int) -> None:
    """Refuse a config that names two models, or data that its model cannot read.

    Raises:
        RequestError: It does.
    """
    if base is not None and (model is not None or init):
        raise RequestError("a [base] is where a run starts: leave out [model] and init")
    if base is None and data.path:
        raise RequestError("data.path is text, for a model of transformers: name it in [base], or give a mixture")
    if data.path and data.mixture:
        raise RequestError("[data] has either a path to records or a mixture of tasks")
    if not data.path and not data.mixture:
        raise RequestError("the mixture is {}; it needs a family with a weight above 0")
    if not 0 <= data.held_out < 1:
        raise RequestError(f"held_out is {data.held_out}; it must be at least 0 and below 1")
    if data.path and times and not data.held_out:
        raise RequestError(f"eval.times is {times}, and no line is kept for it: set data.held_out, or eval.times to 0")


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> SFTConfig:
    """Read a run's TOML file.

    Args:
        path: The file.
        overrides: Values by dotted name, `{"schedule.tokens": 1000}`; they win over the file.

    Raises:
        RequestError: The file is missing or not TOML, or a name or value is not one of `SFTConfig`'s.
    """
    return config_from(read_toml(path, overrides))


def read_toml(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values of a TOML file, with overrides by dotted name.

    Raises:
        RequestError: The file is missing or not TOML, or an override goes through a value.
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise RequestError(f"cannot read the config {path}: {exc}") from exc
    for name, value in (overrides or {}).items():
        at = data
        *tables, last = name.split(".")
        for table in tables:
            at = at.setdefault(table, {})
            if not isinstance(at, dict):
                raise RequestError(f"cannot set {name}: {table} is a value, not a section")
        at[last] = value
    return data


def config_from(data: Mapping[str, Any]) -> SFTConfig:
    """A config from plain values, as TOML and checkpoints hold them.

    Raises:
        RequestError: A name or value is not one of `SFTConfig`'s.
    """
    parts = dict(data)
    if parts.get("base") is not None:
        parts = with_base(parts, _BASE)
    for name, cls in _SECTIONS.items():
        if parts.get(name) is None and name in ("model", "base"):
            parts.pop(name, None)
            continue
        section = dict(parts.get(name, {}))
        if name == "model":
            words = TOKENIZERS.get(parts.get("data", {}).get("vocabulary", "compact"))
            section.setdefault("vocab_size", len(words.tokens) if words else 0)
        if name == "data" and "buckets" in section:
            section["buckets"] = tuple((int(rows), int(length)) for rows, length in section["buckets"])
        if name == "data" and section.get("budget") is not None:
            levels = {key: tuple(v) if isinstance(v, list) else v for key, v in dict(section["budget"]).items()}
            section["budget"] = build(BudgetConfig, levels, "[data.budget]")
        parts[name] = build(cls, section, f"[{name}]")
    if "sinks" in parts:
        parts["sinks"] = tuple(parts["sinks"])
    return build(SFTConfig, parts, "the config")


_BASE: dict[str, Any] = {
    "threads": 0,
    "checkpoint_every_s": 600.0,
    "data": {"buckets": [[4, 2048], [2, 4096], [1, 8192]]},
    "optimiser": {"name": "adamw", "lr": 1e-5, "beta2": 0.95, "weight_decay": 0.0},
    "schedule": {"warmup_steps": 20, "decay": 1.0, "floor": 0.0},
    "eval": {"times": 0},
}
"""Defaults where a model of transformers is trained: other sizes, other habits."""


def with_base(parts: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of a config with a [base], with these defaults where it says nothing."""
    out = dict(parts)
    for name, value in defaults.items():
        out[name] = {**value, **out.get(name, {})} if isinstance(value, Mapping) else out.get(name, value)
    base = dict(out["base"])
    if "lora_targets" in base:
        base["lora_targets"] = tuple(base["lora_targets"])
    return {**out, "base": base}


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A config dataclass from plain values.

    Raises:
        RequestError: A name is unknown or missing, or a value is not allowed; says where.
    """
    known = [f.name for f in fields(cls)]  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in known:
            raise nearest(name, known, f"name in {where}")
    try:
        return cls(**values)
    except TypeError as exc:
        raise RequestError(f"{where}: {str(exc).partition('()')[2].strip() or exc}") from exc


_SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "base": BaseConfig,
    "data": DataConfig,
    "schedule": ScheduleConfig,
    "optimiser": OptimiserConfig,
    "eval": EvalConfig,
}


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
