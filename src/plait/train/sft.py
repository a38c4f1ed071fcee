"""Supervised fine-tuning on gold traces, resumable to the bit: Plait's own models, and those of transformers.

    plait train sft configs/sft_multiverse.toml --out runs/multiverse
    torchrun --nproc-per-node 8 -m plait train sft configs/hf_sft.toml --out runs/qwen3

The run folder holds `config.toml` (everything resolved), `checkpoint.pt`, `metrics.jsonl` and the model: `model.gguf`,
or a folder `model/`. Starting the same command again goes on from the checkpoint. With several processes each takes
every n-th batch. Knows nothing of engines: true decoding is a function it is given.
Source: trie-based SFT with loss on sampled tokens only, ThreadWeaver (arXiv:2512.07843).
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from plait.formats import format_class
from plait.train import machine
from plait.train.config import FREE, ScheduleConfig, SFTConfig, config_from, load_config, to_toml
from plait.train.data import Source, Stream, gold_source, num_problems
from plait.train.display import Say
from plait.train.learners import Learner, open_learner, start_from
from plait.train.loop import Loop, RunResult
from plait.train.model import Decoder
from plait.train.packing import Bucket, PackedBatch, Packer, alone
from plait.train.trie import TrieBatch, pieces

OnEval: TypeAlias = Callable[[Path, int], Mapping[str, Any]]
"""Scores exported weights by true parallel decoding: path and step in, scores out."""


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


def train(
    config: SFTConfig,
    *,
    out: str | Path,
    resume: bool = True,
    on_eval: OnEval | None = None,
    source: Source | None = None,
    say: Say | None = None,
    stop_after_steps: int | None = None,
) -> RunResult:
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
    with Loop(Path(out), resume=resume, say=say, stop_after_steps=stop_after_steps) as loop:
        return _Run(config, loop, on_eval, source).go()


class _Run:
    """The state of one call of `train`."""

    def __init__(self, config: SFTConfig, loop: Loop, on_eval: OnEval | None, source: Source | None) -> None:
        self.config = config = replace(config, precision=machine.precision(config.precision, config.base))
        self.loop, self.on_eval = loop, on_eval
        self.progress, self.scores = Progress(), dict[str, Any]()
        saved = loop.find(config, read=config_from, free=FREE)
        self.learner = open_learner(config, fresh=lambda: _fresh(config), ranks=loop.ranks, saved=saved)
        if saved is not None:
            self.progress, self.scores = Progress(**saved["progress"]), saved.get("scores", {})
        self.source = source or _source(config, self.learner)
        self.stream = Stream(
            self.source,
            weights=config.data.mixture or {"records": 1.0},
            packer=self._packer(),
            seed=config.seed,
            state=saved["stream"] if saved is not None else None,
        )
        if config.compile and not self.learner.compile():
            loop.say("no C++ compiler: training without torch.compile, at about 0.6 of the speed")
        self.held_out = {name: self._held_out(name) for name in config.data.mixture or ("records",)}
        loop.open(config, sinks=config.sinks, saved=saved)

    def go(self) -> RunResult:
        loop, progress = self.loop, self.progress
        start = f"on from step {progress.step}" if progress.step else self.config.origin
        loop.say(f"training {self.learner.num_parameters:,} parameters in {self.config.data.format} {start}")
        speed = _Speed()
        for _ in loop.steps(self):
            self._step(speed)
            if int(self.done() * self.config.eval.times + 1e-9) > progress.evals:
                self._evaluate()
            loop.display.progress(self.done(), lambda: self._line(speed))
        if loop.finished:
            seconds = f"{progress.seconds:.0f} s of training"
            loop.say(f"finished: {progress.step} steps, {progress.tokens:,} tokens, {seconds}")
        return loop.result(self, self._export())

    def done(self) -> float:
        p = self.progress
        return self.config.schedule.done(steps=p.step, tokens=p.tokens, problems=p.problems)

    def state(self) -> dict[str, Any]:
        return {**self.learner.state(), "stream": self.stream.state()}

    def _step(self, speed: _Speed) -> None:
        progress, ranks = self.progress, self.loop.ranks
        began = time.perf_counter()
        # Every process draws all batches, so that each knows how many tokens the step trains.
        batches = [next(self.stream) for _ in range(ranks.count)]
        drawn = time.perf_counter()
        factor = self.config.schedule.factor(self.done(), progress.step)
        # A mean over the trained tokens of all batches; what processes have of it is averaged, not added.
        share = ranks.count / sum(batch.num_trained for batch in batches)
        loss = self.learner.losses(batches[ranks.number]).sum() * share
        loss.backward()
        norm = self.learner.update(factor)
        value = sum(ranks.gather(float(loss.detach()))) / ranks.count
        progress.step += 1
        progress.tokens += sum(batch.num_tokens for batch in batches)
        progress.problems += sum(map(num_problems, batches))
        progress.loss = value if progress.loss != progress.loss else 0.98 * progress.loss + 0.02 * value
        took = time.perf_counter() - began
        # The first batch of each shape compiles: its time says nothing about the speed.
        fresh = speed.add(batches, took, drawn - began)
        progress.seconds += took if not fresh else 0.0
        numbers = {
            "tokens": progress.tokens,
            "problems": progress.problems,
            "loss": round(value, 5),
            "lr": self.config.optimiser.lr * factor,
            "norm": round(norm, 4),
            "fill": round(sum(batch.fill for batch in batches) / len(batches), 4),
            "step_s": round(took, 4),
            "data_s": round(drawn - began, 4),
        }
        shape = list(batches[0].token_ids.shape)
        self.loop.write({"step": progress.step, **numbers, "shape": shape}, numbers)

    def _line(self, speed: _Speed) -> str:
        p, done = self.progress, self.done()
        seconds = speed.seconds_left(done, self.config.schedule, p)
        left = f"  left {seconds / 60:.1f} min" if seconds == seconds else ""
        longer = f"  {self.stream.seen['longer']} left out" if self.stream.seen["longer"] else ""
        told = f"{p.tokens / 1e6:.2f}M tokens  {p.problems:,} problems"
        return f"step {p.step}  loss {p.loss:.4f}{speed}  {told}{left}{longer}"

    def _evaluate(self) -> None:
        """Teacher-forced scores, then true decoding by whoever asked for it."""
        began, p = time.monotonic(), self.progress
        p.evals = int(self.done() * self.config.eval.times + 1e-9)
        forced = {name: self._forced_scores(examples) for name, examples in self.held_out.items()}
        self.scores = {"step": p.step, "tokens": p.tokens, "problems": p.problems, "forced": forced}
        model = self._export()
        if self.on_eval is not None:
            decoded = dict(self.on_eval(model, p.step)) if self.loop.ranks.first else {}
            self.scores["decoded"] = self.loop.ranks.gather(decoded)[0]
            self._export()
        took = round(time.monotonic() - began, 2)
        self.loop.write({"eval": self.scores, "step": p.step, "eval_s": took}, {})
        self.loop.save(self)
        shown = "  ".join(f"{n} {s['exact']:.1%} ({s['token']:.2%})" for n, s in forced.items())
        self.loop.say(f"step {p.step}  held out, exact traces (tokens): {shown}  [{took:.0f} s]")
        if "decoded" in self.scores:
            self.loop.say(f"step {p.step}  held out, solved: {_solved(self.scores['decoded'])}")

    def _forced_scores(self, examples: list[list[TrieBatch]]) -> dict[str, float]:
        """Loss, share of tokens and share of whole traces that greedy sampling would write as the gold trace does."""
        nats, right, tokens, exact = 0.0, 0, 0, 0
        for parts in examples:
            before = tokens - right
            for example in parts:
                loss, hits = self.learner.forced(alone(example, num_spans=self._spans))
                nats += loss
                tokens += len(hits)
                right += int(hits.sum())
            exact += tokens - right == before
        return {"loss": nats / tokens, "token": right / tokens, "exact": exact / len(examples)}

    def _held_out(self, family: str) -> list[list[TrieBatch]]:
        count = self.config.eval.problems if self.config.eval.times else 0
        return [pieces(self.source(family, random.Random(f"held_out/{family}/{n}"), "held_out")) for n in range(count)]

    def _export(self) -> Path:
        return self.learner.export(self.loop.out, config=asdict(self.config), scores=self.scores)

    @property
    def _spans(self) -> int:
        if self.config.data.spans is not None:
            return self.config.data.spans
        return 1 if format_class(self.config.data.format).join_kind == "merge" else 0

    def _packer(self) -> Packer:
        buckets = [Bucket(rows=rows, length=length) for rows, length in self.config.data.buckets]
        return Packer(buckets, num_spans=self._spans, pad_id=self.learner.pad_id)


def _solved(decoded: Mapping[str, Any]) -> str:
    """What `OnEval` gave, in a line: of `plait.bench`'s scores the two that say how learning goes."""
    said: list[str] = []
    for name, score in decoded.items():
        if isinstance(score, Mapping) and {"accuracy", "fork_right"} <= score.keys():
            score = f"{score['accuracy']:.1%} (fork decisions {score['fork_right']:.0%})"
        said.append(f"{name} {score}")
    return "  ".join(said)


def _fresh(config: SFTConfig) -> Decoder:
    """Random weights, or those of another run."""
    assert config.model is not None, "a config has a model or a base"
    model = Decoder(config.model)
    if config.init:
        start_from(model, Path(config.init), config.data)
    return model


def _source(config: SFTConfig, learner: Learner) -> Source:
    """Where examples come from: a file, or gold traces of `plait.tasks`."""
    data, tokenizer = config.data, learner.tokenizer
    if data.path:
        from plait.train.pretrained.records import Records

        return Records(data.path, held_out=data.held_out).source(data.format, tokenizer)
    return gold_source(data.format, traces=data.traces, tokenizer=tokenizer, knobs=data.knobs, budget=data.budget)


class _Speed:
    """Rates over the last fifty steps; as text nothing while there is none."""

    def __init__(self) -> None:
        self._shapes: set[tuple[int, ...]] = set()
        self._recent: list[tuple[int, int, float, float]] = []

    def add(self, batches: list[PackedBatch], took: float, data: float) -> bool:
        """Count a step; True if it was the first of its shape."""
        shape = batches[0].token_ids.shape
        if shape not in self._shapes:
            self._shapes.add(shape)
            return True
        tokens, slots = (sum(n) for n in zip(*((b.num_tokens, b.token_ids.size) for b in batches), strict=True))
        self._recent = [*self._recent[-49:], (tokens, slots, took, data)]
        return False

    def __str__(self) -> str:
        if not self._recent:
            return ""
        return f"  {self.tokens_per_s:,.0f} tokens/s  fill {self.fill:.0%}  data {self.data_share:.0%}"

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


__all__ = ["OnEval", "Progress", "SFTConfig", "config_from", "load_config", "to_toml", "train"]

if __name__ == "__main__":
    train(load_config(sys.argv[1]), out=sys.argv[2])
