"""Supervised fine-tuning of a model of transformers on packed trees.

    plait train sft configs/hf_sft.toml --out runs/qwen3
    torchrun --nproc-per-node 8 -m plait train sft configs/hf_sft.toml --out runs/qwen3

The run folder holds `config.toml`, `checkpoint.pt`, `metrics.jsonl` and `model/`, a folder that transformers and the
torch engine read. Starting the same command again goes on from the checkpoint. With several processes each takes every
n-th batch, and weights, gradients and optimiser are sharded over them (FSDP2).
Source: trie-based SFT with loss on sampled tokens only, ThreadWeaver (arXiv:2512.07843).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from plait import tasks
from plait.errors import ModelError, RequestError
from plait.formats import format_class, open_format
from plait.train import checkpoint, machine
from plait.train.config import OptimiserConfig, ScheduleConfig, build, identity, read_toml, to_toml
from plait.train.data import Source, Stream, gold_source
from plait.train.display import Display, Say, open_display
from plait.train.metrics import SINKS, MetricsFile, open_sinks
from plait.train.optimiser import optimisers
from plait.train.packing import Bucket, PackedBatch, Packer
from plait.train.pretrained.model import BaseConfig, Pretrained, load
from plait.train.pretrained.records import Records
from plait.train.tensors import inputs, spans
from plait.tree import Tree

_DEFAULTS: dict[str, dict[str, Any]] = {
    "optimiser": {"name": "adamw", "lr": 1e-5, "beta2": 0.95, "weight_decay": 0.0},
    "schedule": {"warmup_steps": 20, "decay": 1.0, "floor": 0.0},
}
FREE = frozenset({"schedule", "checkpoint_every_s", "sinks"})
"""What may change between a start and a resume."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """What is learned: the lines of a file, or gold traces of `plait.tasks`."""

    format: str
    path: str = ""
    """JSON lines, see `records`; empty for gold traces."""
    mixture: dict[str, float] = field(default_factory=dict[str, float])
    """How often each family of tasks is drawn."""
    knobs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    traces: Literal["parallel", "serial"] = "parallel"
    buckets: tuple[tuple[int, int], ...] = ((4, 2048), (2, 4096), (1, 8192))
    """Shapes of batches as [rows, length]."""
    spans: int | None = None
    """Hidden spans a token may have; None: what the format's join needs without nesting."""

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.mixture):
            raise RequestError("[data] needs either a path to records or a mixture of tasks")
        for name in self.mixture:
            tasks.family(name, self.knobs.get(name))


@dataclass(frozen=True, slots=True, kw_only=True)
class HFConfig:
    """Everything that a run depends on."""

    base: BaseConfig
    data: TextConfig
    schedule: ScheduleConfig
    optimiser: OptimiserConfig
    seed: int = 0
    sinks: tuple[str, ...] = ()
    """Dashboards beside metrics.jsonl: tensorboard, wandb, trackio."""
    checkpoint_every_s: float = 600.0

    def __post_init__(self) -> None:
        if unknown := set(self.sinks) - set(SINKS):
            raise RequestError(f"no dashboard is called {min(unknown)!r}; there are {', '.join(SINKS)}")


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> HFConfig:
    """Read a run's TOML file.

    Raises:
        RequestError: The file is missing or not TOML, or a name or value is not one of `HFConfig`'s.
    """
    return config_from(read_toml(path, overrides))


def config_from(data: Mapping[str, Any]) -> HFConfig:
    """A config from plain values.

    Raises:
        RequestError: A name or value is not one of `HFConfig`'s.
    """
    parts = dict(data)
    sections = {"base": BaseConfig, "data": TextConfig, "schedule": ScheduleConfig, "optimiser": OptimiserConfig}
    for name, cls in sections.items():
        section = {**_DEFAULTS.get(name, {}), **parts.get(name, {})}
        for listed in ("lora_targets", "buckets"):
            if listed in section:
                section[listed] = tuple(tuple(v) if isinstance(v, list) else v for v in section[listed])
        parts[name] = build(cls, section, f"[{name}]")
    if "sinks" in parts:
        parts["sinks"] = tuple(parts["sinks"])
    return build(HFConfig, parts, "the config")


@dataclass(slots=True)
class Progress:
    """How far a run is; part of its checkpoint."""

    step: int = 0
    tokens: int = 0
    problems: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a call of `train` ended."""

    finished: bool
    progress: Progress
    checkpoint: Path
    gguf: Path
    """The folder of the model, in the place that other trainers have a file."""


def train(
    config: HFConfig,
    *,
    out: str | Path,
    resume: bool = True,
    say: Say | None = None,
    source: Source | None = None,
    stop_after_steps: int | None = None,
) -> Outcome:
    """Train a model, or go on with a run that was interrupted.

    Args:
        config: The run. On resuming, its schedule, checkpoint times and dashboards may differ from the first start's.
        out: Run folder, created where missing.
        resume: False starts over, and refuses a folder that holds a checkpoint.
        source: Draws examples in the model's own tokens; default: what `[data]` says.
        stop_after_steps: Leave as if interrupted once this many steps of the run are done.

    Raises:
        RequestError: The config asks for what there is not.
        ModelError: The model cannot be read, or the folder holds a checkpoint of another run.
    """
    ranks = Ranks()
    with ranks, open_display(say if ranks.first else _silent) as display:
        run = _Run(config, Path(out), resume, source, display, ranks)
        try:
            return run.go(stop_after_steps)
        finally:
            for sink in run.sinks:
                sink.close()


class Ranks:
    """The processes that train together; one where there is no torchrun."""

    def __init__(self) -> None:
        self.count, self.number = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.first = self.number == 0
        self._opened = False

    def __enter__(self) -> Ranks:
        if "RANK" in os.environ and not dist.is_initialized():
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl" if cuda else "gloo")
            self._opened = True
        return self

    def __exit__(self, *exc: object) -> None:
        if self._opened:
            dist.destroy_process_group()

    def shard(self, model: Pretrained) -> None:
        """Spread the weights over the processes, a layer at a time."""
        if dist.is_initialized():
            from torch.distributed.fsdp import fully_shard

            for layer in model.layers:
                fully_shard(layer)
            fully_shard(model)

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self, config: HFConfig, out: Path, resume: bool, source: Source | None, display: Display, ranks: Ranks
    ) -> None:
        self.config, self.out, self.display, self.say, self.ranks = config, out, display, display.say, ranks
        self.path, self.folder = out / "checkpoint.pt", out / "model"
        self.progress = Progress()
        out.mkdir(parents=True, exist_ok=True)
        saved = self._saved(resume)
        torch.manual_seed(config.seed)
        self.model = load(config.base, tags=format_class(config.data.format).tags())
        if saved is not None:
            self.model.load_trained(saved["model"])
            self.progress = Progress(**saved["progress"])
        ranks.shard(self.model)
        self.optimisers = optimisers(self.model, config.optimiser)
        if saved is not None:
            for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
                set_optimizer_state_dict(self.model, optimiser, state, options=_WHOLE)
        self.source = source or self._source()
        self.stream = Stream(
            self.source,
            weights=config.data.mixture or {"records": 1.0},
            packer=self._packer(),
            seed=config.seed,
            state=saved["stream"] if saved is not None else None,
        )
        self.sinks = []
        if ranks.first:
            (out / "config.toml").write_text(to_toml(config), encoding="utf-8")
            self.metrics = MetricsFile(out / "metrics.jsonl", size=checkpoint.metrics_size(saved))
            self.sinks = open_sinks(config.sinks, out=out, config=asdict(config))

    def go(self, stop_after_steps: int | None) -> Outcome:
        start = "from the start" if not self.progress.step else f"on from step {self.progress.step}"
        self.say(f"training {self.model.num_parameters:,} parameters in {self.config.data.format} {start}")
        last_save = time.monotonic()
        with machine.interrupt() as interrupted:
            while self._done() < 1:
                if interrupted.is_set() or (stop_after_steps is not None and self.progress.step >= stop_after_steps):
                    self._save()
                    self.say(f"stopped at step {self.progress.step}; the same command goes on from here")
                    return self._outcome(finished=False)
                self._step()
                if self.ranks.count == 1 and time.monotonic() - last_save > self.config.checkpoint_every_s:
                    self._save()
                    last_save = time.monotonic()
                elif self.ranks.count > 1 and self.progress.step % 100 == 0:
                    # Processes save together, and their clocks differ.
                    self._save()
        self._save()
        self.say(f"finished: {self.progress.step} steps, {self.progress.tokens:,} tokens")
        return self._outcome(finished=True)

    def _step(self) -> None:
        progress, knobs = self.progress, self.config.optimiser
        began = time.perf_counter()
        # Every process draws all batches, so that each knows how many tokens the step trains.
        batches = [next(self.stream) for _ in range(self.ranks.count)]
        rate = knobs.lr * self.config.schedule.factor(self._done(), progress.step)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        trained = sum(batch.num_trained for batch in batches)
        # Gradients are averaged over processes.
        loss = self._losses(batches[self.ranks.number]).sum() * self.ranks.count / trained
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], knobs.clip)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += sum(batch.num_tokens for batch in batches)
        progress.problems += sum(batch.num_examples for batch in batches)
        took = time.perf_counter() - began
        progress.seconds += took
        value = _whole(loss.detach())
        numbers = {
            "tokens": progress.tokens,
            "problems": progress.problems,
            "loss": round(float(value), 5),
            "lr": rate,
            "norm": round(float(_whole(norm)), 4),
            "step_s": round(took, 4),
        }
        if self.ranks.first:
            self.metrics.write({"step": progress.step, **numbers})
            for sink in self.sinks:
                sink.write(progress.step, numbers)
        self.display.progress(
            self._done(), lambda: f"step {progress.step}  loss {numbers['loss']:.4f}  {numbers['step_s']:.2f} s a step"
        )

    def _losses(self, batch: PackedBatch) -> torch.Tensor:
        ids, positions, labels, prev = inputs(batch)
        return self.model(ids, positions, labels, prev, self.model.biases(*spans(batch)))

    def _done(self) -> float:
        p = self.progress
        return self.config.schedule.done(steps=p.step, tokens=p.tokens, problems=p.problems)

    def _source(self) -> Source:
        data, tokenizer = self.config.data, self.model.tokenizer
        if not data.path:
            words: Any = tokenizer
            return gold_source(data.format, traces=data.traces, tokenizer=words, knobs=data.knobs)
        records = Records(data.path)
        format = open_format(data.format, tokenizer)

        def draw(family: str, rng: random.Random, split: Literal["train", "held_out"]) -> Tree:
            return records.trace(rng.choice(records.split(split)), format=format, tokenizer=tokenizer)

        return draw

    def _packer(self) -> Packer:
        data = self.config.data
        merges = int(format_class(data.format).join_kind == "merge")
        buckets = [Bucket(rows=rows, length=length) for rows, length in data.buckets]
        return Packer(buckets, num_spans=merges if data.spans is None else data.spans)

    def _save(self) -> None:
        """Every process takes part; the first one writes."""
        model = {name: _whole(t).cpu() for name, t in self.model.trained_state().items()}
        states = [get_optimizer_state_dict(self.model, o, options=_WHOLE) for o in self.optimisers]
        if self.ranks.first:
            checkpoint.save(
                self.path,
                {
                    "config": asdict(self.config),
                    "model": model,
                    "optimisers": states,
                    "stream": self.stream.state(),
                    "progress": asdict(self.progress),
                    "metrics": self.metrics.size,
                },
            )
        self.ranks.barrier()

    def _outcome(self, *, finished: bool) -> Outcome:
        if self.ranks.count > 1:
            # Whole weights exist on no process: they are read from the checkpoint, without shards.
            whole = load(replace(self.config.base, device="cpu"), tags=format_class(self.config.data.format).tags())
            whole.load_trained(checkpoint.load(self.path)["model"])
        else:
            whole = self.model
        if self.ranks.first:
            whole.save(self.folder)
        self.ranks.barrier()
        return Outcome(finished=finished, progress=self.progress, checkpoint=self.path, gguf=self.folder)

    def _saved(self, resume: bool) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        if not resume:
            raise RequestError(f"{self.out} holds a run already; resume it, or choose another folder")
        saved = checkpoint.load(self.path, format=self.config.data.format)
        ours, theirs = identity(asdict(self.config), free=FREE), identity(saved["config"], free=FREE)
        if differing := sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n)):
            name = differing[0]
            raise ModelError(
                f"{self.path} is of another run: {name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
            )
        return saved


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all its shards."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def _silent(line: str) -> None:
    """What processes other than the first one say."""


__all__ = ["HFConfig", "Outcome", "Progress", "config_from", "load_config", "to_toml", "train"]
