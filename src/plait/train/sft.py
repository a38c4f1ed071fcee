"""Supervised fine-tuning on gold traces: one loop on one core, resumable to the bit.

    plait train sft configs/sft_multiverse.toml --out runs/multiverse

The run folder holds `config.toml` (everything resolved), `checkpoint.pt`, `metrics.jsonl` and `model.gguf`. Starting
the same command again goes on from the checkpoint. Knows nothing of engines: true decoding is a function it is given.
Source: trie-based SFT with loss on sampled tokens only, ThreadWeaver (arXiv:2512.07843).
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from plait.errors import ModelError, RequestError
from plait.formats import format_class
from plait.tasks.vocabulary import TOKENIZERS
from plait.train import checkpoint, machine
from plait.train.config import ScheduleConfig, SFTConfig, config_from, identity, load_config, to_toml
from plait.train.data import Source, Stream, gold_source, num_problems
from plait.train.display import Display, Say, open_display
from plait.train.metrics import MetricsFile, open_sinks
from plait.train.model import Decoder
from plait.train.optimiser import optimisers
from plait.train.packing import Bucket, PackedBatch, Packer
from plait.train.tensors import inputs, spans
from plait.train.trie import TrieBatch, pieces

OnEval: TypeAlias = Callable[[Path, int], Mapping[str, Any]]
"""Scores a GGUF file by true parallel decoding: path and step in, scores out."""


@dataclass(slots=True)
class Progress:
    """How far a run is; part of its checkpoint."""

    step: int = 0
    tokens: int = 0
    problems: int = 0
    seconds: float = 0.0
    """Time spent in training steps, data included, evaluation and checkpoints not."""
    evals: int = 0
    loss: float = field(default=float("nan"))
    """Running mean over about the last fifty steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a call of `train` ended."""

    finished: bool
    """False: interrupted; the same command goes on from the checkpoint."""
    progress: Progress
    scores: dict[str, Any]
    checkpoint: Path
    gguf: Path


def train(
    config: SFTConfig,
    *,
    out: str | Path,
    resume: bool = True,
    on_eval: OnEval | None = None,
    source: Source | None = None,
    say: Say | None = None,
    stop_after_steps: int | None = None,
) -> Outcome:
    """Train a model, or go on with a run that was interrupted.

    Args:
        config: The run. On resuming, its schedule, evaluation and checkpoint times may differ from the first
            start's; all else must be the same.
        out: Run folder, created where missing.
        resume: False starts over, and refuses a folder that holds a checkpoint.
        on_eval: Scores the exported model by true decoding at every evaluation.
        source: Draws examples; default: gold traces of `plait.tasks`.
        say: Takes lines of progress; default: a bar or lines on standard error.
        stop_after_steps: Leave as if interrupted once this many steps of the run are done.

    Raises:
        RequestError: The config asks for what there is not.
        ModelError: The folder holds a checkpoint of another run.
    """
    with open_display(say) as display:
        run = _Run(config, Path(out), resume, on_eval, source, display)
        try:
            return run.go(stop_after_steps)
        finally:
            for sink in run.sinks:
                sink.close()


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self,
        config: SFTConfig,
        out: Path,
        resume: bool,
        on_eval: OnEval | None,
        source: Source | None,
        display: Display,
    ) -> None:
        machine.keep_memory()
        torch.set_num_threads(config.threads)
        self.config = config = replace(config, precision=machine.precision(config.precision))
        self.out, self.on_eval, self.display, self.say = out, on_eval, display, display.say
        data = config.data
        self.source = source or gold_source(
            data.format, traces=data.traces, tokenizer=data.tokenizer, knobs=data.knobs, budget=data.budget
        )
        self.path, self.gguf = out / "checkpoint.pt", out / "model.gguf"
        self.progress, self.scores = Progress(), dict[str, Any]()
        out.mkdir(parents=True, exist_ok=True)
        saved = self._saved(resume)

        torch.manual_seed(config.seed)
        self.model = Decoder(config.model)
        if saved is None and config.init:
            self._start_from(Path(config.init))
        self.optimisers = optimisers(self.model, config.optimiser)
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(state)
            self.progress, self.scores = Progress(**saved["progress"]), saved["scores"]
        self.stream = Stream(
            self.source,
            weights=config.data.mixture,
            packer=self._packer(),
            seed=config.seed,
            state=saved["stream"] if saved is not None else None,
        )
        self._compile()
        self.held_out = {name: self._held_out(name) for name in config.data.mixture}
        (out / "config.toml").write_text(to_toml(config), encoding="utf-8")
        self.metrics = MetricsFile(out / "metrics.jsonl", size=checkpoint.metrics_size(saved))
        self.sinks = open_sinks(config.sinks, out=out, config=asdict(config))

    def go(self, stop_after_steps: int | None) -> Outcome:
        config, progress = self.config, self.progress
        start = "from the start" if not progress.step else f"on from step {progress.step}"
        self.say(f"training {self.model.num_parameters:,} parameters in {config.data.format} {start}")
        speed = _Speed()
        last_save = time.monotonic()
        with machine.interrupt() as interrupted:
            while (done := self._done()) < 1:
                if interrupted.is_set() or (stop_after_steps is not None and progress.step >= stop_after_steps):
                    self._save()
                    self.say(f"stopped at step {progress.step}; the same command goes on from here")
                    return self._outcome(finished=False)
                self._step(done, speed)
                if int(self._done() * config.eval.times + 1e-9) > progress.evals:
                    self._evaluate()
                    last_save = time.monotonic()
                self.display.progress(self._done(), lambda: self._line(speed))
                if time.monotonic() - last_save > config.checkpoint_every_s:
                    self._save()
                    last_save = time.monotonic()
        self._save()
        self.say(f"finished: {progress.step} steps, {progress.tokens:,} tokens, {progress.seconds:.0f} s of training")
        return self._outcome(finished=True)

    def _step(self, done: float, speed: _Speed) -> None:
        progress, knobs = self.progress, self.config.optimiser
        began = time.perf_counter()
        batch = next(self.stream)
        drawn = time.perf_counter()
        lr = knobs.lr * self.config.schedule.factor(done, progress.step)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr
        loss = self._loss(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), knobs.clip)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        value = float(loss.detach())
        progress.step += 1
        progress.tokens += batch.num_tokens
        progress.problems += num_problems(batch)
        progress.loss = value if progress.loss != progress.loss else 0.98 * progress.loss + 0.02 * value
        took = time.perf_counter() - began
        # The first batch of each shape compiles: its time says nothing about the speed.
        fresh = speed.add(batch, took, drawn - began)
        progress.seconds += took if not fresh else 0.0
        numbers = {
            "tokens": progress.tokens,
            "problems": progress.problems,
            "loss": round(value, 5),
            "lr": lr,
            "norm": round(float(norm), 4),
            "fill": round(batch.fill, 4),
            "step_s": round(took, 4),
            "data_s": round(drawn - began, 4),
        }
        self.metrics.write({"step": progress.step, **numbers, "shape": list(batch.token_ids.shape)})
        for sink in self.sinks:
            sink.write(progress.step, numbers)

    def _done(self) -> float:
        p = self.progress
        return self.config.schedule.done(steps=p.step, tokens=p.tokens, problems=p.problems)

    def _line(self, speed: _Speed) -> str:
        p, done = self.progress, self._done()
        left = speed.seconds_left(done, self.config.schedule, p)
        longer = f"  {self.stream.seen['longer']} left out" if self.stream.seen["longer"] else ""
        return (
            f"step {p.step}  loss {p.loss:.4f}  {speed.tokens_per_s:,.0f} tokens/s  fill {speed.fill:.0%}"
            f"  data {speed.data_share:.0%}  {p.tokens / 1e6:.2f}M tokens  {p.problems:,} problems"
            f"  left {left / 60:.1f} min{longer}"
        )

    def _evaluate(self) -> None:
        """Teacher-forced scores, then true decoding by whoever asked for it."""
        began, p = time.monotonic(), self.progress
        p.evals = int(self._done() * self.config.eval.times + 1e-9)
        forced = {name: self._forced_scores(batches) for name, batches in self.held_out.items()}
        self.scores = {"step": p.step, "tokens": p.tokens, "problems": p.problems, "forced": forced}
        self._export()
        if self.on_eval is not None:
            self.scores["decoded"] = dict(self.on_eval(self.gguf, p.step))
            self._export()
        self.metrics.write({"eval": self.scores, "step": p.step, "eval_s": round(time.monotonic() - began, 2)})
        self._save()
        shown = "  ".join(f"{n} {s['exact']:.1%} ({s['token']:.2%})" for n, s in forced.items())
        self.say(f"step {p.step}  held out, exact traces (tokens): {shown}  [{time.monotonic() - began:.0f} s]")
        if "decoded" in self.scores:
            self.say(f"step {p.step}  decoded: {json.dumps(self.scores['decoded'])}")

    def _forced_scores(self, examples: list[list[TrieBatch]]) -> dict[str, float]:
        """Loss, share of tokens and share of whole traces that greedy sampling would write as the gold trace does."""
        nats, right, tokens, exact = 0.0, 0, 0, 0
        # Every example has another length: compiling for each would take longer than the run.
        with torch.no_grad(), self._autocast(), torch.compiler.set_stance("force_eager"):
            for parts in examples:
                before = tokens - right
                for batch in map(self._alone, parts):
                    ids, positions, labels, prev = inputs(batch)
                    logits = self.model(ids, positions, self.model.biases(*spans(batch))).float()[0]
                    trained = labels[0] >= 0
                    logits, labels = logits[prev[0]][trained], labels[0][trained]
                    nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                    tokens += len(labels)
                    right += int((logits.argmax(-1) == labels).sum())
                exact += tokens - right == before
        return {"loss": nats / tokens, "token": right / tokens, "exact": exact / len(examples)}

    def _alone(self, example: TrieBatch) -> PackedBatch:
        packer = Packer([Bucket(rows=1, length=len(example))], num_spans=self._spans)
        packer.add(example)
        return packer.flush()[0]

    def _held_out(self, family: str) -> list[list[TrieBatch]]:
        count = self.config.eval.problems if self.config.eval.times else 0
        return [pieces(self.source(family, random.Random(f"held_out/{family}/{n}"), "held_out")) for n in range(count)]

    def _save(self) -> None:
        checkpoint.save(
            self.path,
            {
                "config": asdict(self.config),
                "model": self.model.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
                "stream": self.stream.state(),
                "progress": asdict(self.progress),
                "scores": self.scores,
                "metrics": self.metrics.size,
            },
        )

    def _export(self) -> None:
        about = checkpoint.description(asdict(self.config), scores=self.scores, tokenizer=self.config.data.tokenizer)
        checkpoint.export_gguf(self.gguf, self.model, about=about, dtype=self.config.weights)

    def _outcome(self, *, finished: bool) -> Outcome:
        self._export()
        return Outcome(
            finished=finished, progress=self.progress, scores=self.scores, checkpoint=self.path, gguf=self.gguf
        )

    def _saved(self, resume: bool) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        if not resume:
            raise RequestError(f"{self.out} holds a run already; resume it, or choose another folder")
        saved = checkpoint.load(self.path, format=self.config.data.format)
        ours, theirs = identity(asdict(self.config)), identity(saved["config"])
        differing = sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))
        if differing:
            name = differing[0]
            raise ModelError(
                f"{self.path} is of another run: {name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
            )
        return saved

    def _start_from(self, path: Path) -> None:
        """Take the weights of another run. Tokens that its vocabulary had not keep their random embeddings."""
        given = checkpoint.load(path)
        had, have = TOKENIZERS[given["config"]["data"]["vocabulary"]].tokens, self.config.data.tokenizer.tokens
        if have[: len(had)] != had:
            raise ModelError(
                f"{path} was trained with the vocabulary {given['config']['data']['vocabulary']!r}, whose ids mean"
                f" something else in {self.config.data.vocabulary!r}"
            )
        weights = checkpoint.model_of(given).state_dict()
        try:
            embed = self.model.embed.weight.detach().clone()
            embed[: len(had)] = weights["embed.weight"][: len(had)]
            self.model.load_state_dict(weights | {"embed.weight": embed})
        except RuntimeError as exc:
            raise ModelError(f"the weights of {path} do not fit [model]: {exc}") from exc

    @property
    def _spans(self) -> int:
        if self.config.data.spans is not None:
            return self.config.data.spans
        return 1 if format_class(self.config.data.format).join_kind == "merge" else 0

    def _packer(self) -> Packer:
        buckets = [Bucket(rows=rows, length=length) for rows, length in self.config.data.buckets]
        return Packer(buckets, num_spans=self._spans, pad_id=self.config.data.tokenizer.control_id("<pad>") or 0)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def _loss(self, batch: PackedBatch) -> Tensor:
        """Mean over the trained tokens of a batch."""
        with self._autocast():
            ids, positions, labels, prev = inputs(batch)
            losses = self.model.losses(ids, positions, labels, prev, self.model.biases(*spans(batch)))
        return losses.sum() / batch.num_trained

    def _compile(self) -> None:
        if not self.config.compile:
            return
        if not machine.has_compiler():
            self.say("no C++ compiler: training without torch.compile, at about 0.6 of the speed")
            return
        self.model.compile_parts()


class _Speed:
    """Rates over the last fifty steps."""

    def __init__(self) -> None:
        self._shapes: set[tuple[int, ...]] = set()
        self._recent: list[tuple[int, int, float, float]] = []

    def add(self, batch: PackedBatch, took: float, data: float) -> bool:
        """Count a step; True if it was the first of its shape."""
        shape = batch.token_ids.shape
        if shape not in self._shapes:
            self._shapes.add(shape)
            return True
        self._recent = [*self._recent[-49:], (batch.num_tokens, batch.token_ids.size, took, data)]
        return False

    def _sum(self, at: int) -> float:
        return sum(r[at] for r in self._recent)

    @property
    def tokens_per_s(self) -> float:
        return self._sum(0) / max(1e-9, self._sum(2))

    @property
    def fill(self) -> float:
        return self._sum(0) / max(1.0, self._sum(1))

    @property
    def data_share(self) -> float:
        """Share of the time that drawing and packing took."""
        return self._sum(3) / max(1e-9, self._sum(2))

    def seconds_left(self, done: float, schedule: ScheduleConfig, progress: Progress) -> float:
        if not done or not self._recent:
            return float("nan")
        return progress.tokens / done * (1 - done) / max(1e-9, self.tokens_per_s)


__all__ = ["OnEval", "Outcome", "Progress", "SFTConfig", "config_from", "load_config", "to_toml", "train"]

if __name__ == "__main__":
    train(load_config(sys.argv[1]), out=sys.argv[2])
