"""Reinforcement learning of parallel reasoning: sample groups, reward, compare, update; resumable.

    plait train rl configs/rl_pgrpo.toml --out runs/pgrpo

One step: sample a group of rollouts for each of some prompts (`rollouts`), say what each was worth (`rewards`), compare
within groups (`advantages`), train each tree as one packed sequence (`experience`, `losses`). The run folder holds
`config.toml` (everything resolved), `checkpoint.pt`, `metrics.jsonl`, `samples/` (logs for `plait trace show`) and
`model.gguf`. Starting the same command again goes on from the checkpoint. Knows nothing of what engines are made of.
Source: P-GRPO, ThreadWeaver (Lian et al. 2025, arXiv:2512.07843).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import anyio.to_thread
import torch
from torch import Tensor

from plait.errors import EngineError, ModelError, RequestError
from plait.events import RunStarted
from plait.formats import format_class, open_format
from plait.log import write_log
from plait.train import checkpoint, machine
from plait.train.advantages import advantages
from plait.train.config import identity, to_toml
from plait.train.display import Display, Say, open_display
from plait.train.experience import Experience, PolicyBatch, pack
from plait.train.losses import importance, k3, surrogate, token_weights
from plait.train.metrics import MetricsFile, open_sinks
from plait.train.model import Decoder
from plait.train.optimiser import optimisers
from plait.train.packing import IGNORED, Bucket
from plait.train.prompts import Prompts, PromptSource, task_source
from plait.train.rewards import Group, Outcome, Reward
from plait.train.rl_config import RL_FREE, LossConfig, RLConfig, load_rl_config, rl_config_from
from plait.train.rollouts import Rollout, collect, outcome_of
from plait.train.serving import SERVINGS, Served, Serving
from plait.train.tensors import inputs, spans
from plait.train.trie import flatten
from plait.train.watch import Watch

Groups: TypeAlias = list[list[Rollout]]


@dataclass(slots=True)
class Progress:
    """How far a run is; part of its checkpoint."""

    step: int = 0
    prompts: int = 0
    """Prompts that were drawn."""
    rollouts: int = 0
    tokens: int = 0
    """Sampled tokens that were trained on or compared with."""
    seconds: float = 0.0
    """Time spent in steps, evaluation and checkpoints not."""
    evals: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a call of `train` ended."""

    finished: bool
    """False: interrupted; the same command goes on from the checkpoint."""
    progress: Progress
    scores: dict[str, Any]
    checkpoint: Path
    gguf: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A rollout and what it was worth."""

    rollout: Rollout
    outcome: Outcome
    parts: dict[str, float]
    """By reward term."""

    @property
    def reward(self) -> float:
        return sum(self.parts.values())


def train(
    config: RLConfig,
    *,
    out: str | Path,
    resume: bool = True,
    source: PromptSource | None = None,
    serving: Serving | None = None,
    say: Say | None = None,
    stop_after_steps: int | None = None,
) -> RunResult:
    """Train a policy, or go on with a run that was interrupted.

    Args:
        config: The run. On resuming, its schedule, evaluation, logs and checkpoint times may differ from the first
            start's; all else must be the same.
        out: Run folder, created where missing.
        resume: False starts over, and refuses a folder that holds a checkpoint.
        source: Draws prompts; default: problems of `plait.tasks`.
        serving: Gives engines over the weights; default: what `config.rollout.engine` names.
        say: Takes lines of progress; default: a bar or lines on standard error.
        stop_after_steps: Leave as if interrupted once this many steps of the run are done.

    Raises:
        RequestError: The config asks for what there is not.
        ModelError: The folder holds a checkpoint of another run, or `init` has another format.
        EngineError: Every rollout of a step failed in the engine. The checkpoint is of the step before.
    """
    with open_display(say) as display:
        run = _Run(config, Path(out), resume, source, serving, display)
        try:
            return anyio.run(run.go, stop_after_steps)
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            for sink in run.sinks:
                sink.close()


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self,
        config: RLConfig,
        out: Path,
        resume: bool,
        source: PromptSource | None,
        serving: Serving | None,
        display: Display,
    ) -> None:
        machine.keep_memory()
        torch.set_num_threads(config.threads)
        self.out, self.display, self.say = out, display, display.say
        self.path, self.gguf = out / "checkpoint.pt", out / "model.gguf"
        self.progress, self.scores, self.watch = Progress(), dict[str, Any](), Watch()
        self.pending: Groups | None = None
        out.mkdir(parents=True, exist_ok=True)

        saved = self._saved(config, resume)
        torch.manual_seed(config.seed)
        self.model = _model(config, saved)
        self.config = config = replace(config, model=self.model.config, precision=machine.precision(config.precision))
        self.optimisers = optimisers(self.model, config.optimiser)
        self.reference = _frozen(self.model) if config.loss.kl else None
        self.tokenizer = config.data.tokenizer
        self.format = open_format(config.data.format, self.tokenizer)
        self.reward = Reward(config.reward)
        data = config.data
        self.source = source or task_source(data.format, tokenizer=data.tokenizer, knobs=data.knobs)
        self.prompts = Prompts(self.source, weights=config.data.mixture, seed=config.seed)
        self.serving = serving or SERVINGS[config.rollout.engine](
            concurrency=config.rollout.concurrency, threads=config.threads
        )
        if saved is not None:
            self._restore(saved)
        if config.compile and machine.has_compiler():
            self.model.compile_parts()
        (out / "config.toml").write_text(to_toml(config), encoding="utf-8")
        self.metrics = MetricsFile(out / "metrics.jsonl", size=checkpoint.metrics_size(saved))
        self.sinks = open_sinks(config.log.sinks, out=out, config=asdict(config))

    async def go(self, stop_after_steps: int | None) -> RunResult:
        progress = self.progress
        start = "from the start" if not progress.step else f"on from step {progress.step}"
        self.say(f"training {self.model.num_parameters:,} parameters in {self.config.data.format} {start}")
        last_save = time.monotonic()
        with machine.interrupt() as interrupted:
            async with self.serving:
                while True:
                    if self._eval_is_due():
                        await self._evaluate()
                        last_save = time.monotonic()
                    if self._done() >= 1:
                        break
                    if interrupted.is_set() or (stop_after_steps is not None and progress.step >= stop_after_steps):
                        self._save()
                        self.say(f"stopped at step {progress.step}; the same command goes on from here")
                        return self._result(finished=False)
                    await self._step()
                    if time.monotonic() - last_save > self.config.checkpoint_every_s:
                        self._save()
                        last_save = time.monotonic()
        self._save()
        self.say(f"finished: {progress.step} steps, {progress.rollouts:,} rollouts, {progress.seconds:.0f} s")
        return self._result(finished=True)

    def _done(self) -> float:
        return self.config.schedule.done(steps=self.progress.step, tokens=0, problems=0)

    # One step

    async def _step(self) -> None:
        began = time.perf_counter()
        progress, steps = self.progress, self.config.schedule.steps or 0
        groups, self.pending = self.pending, None
        waited = began
        if groups is None:
            async with self.serving.at(self.model, progress.step) as served:
                groups = await self._collect(served)
            waited = time.perf_counter()
        if self.config.rollout.mode == "one_step_off" and progress.step + 1 < steps:
            async with self.serving.at(self.model, progress.step) as served:
                numbers = await self._learn_while_collecting(served, groups)
        else:
            numbers = self._learn(groups)
        progress.step += 1
        took = time.perf_counter() - began
        progress.seconds += took
        self._tell(numbers | {"rollout_s": waited - began, "step_s": took})

    async def _learn_while_collecting(self, served: Served, groups: Groups) -> dict[str, float]:
        """Update on these groups while the next ones are sampled from the weights before the update."""
        numbers: dict[str, float] = {}

        async def learn() -> None:
            numbers.update(await anyio.to_thread.run_sync(self._learn, groups))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(learn)
            self.pending = await self._collect(served)
        return numbers

    async def _collect(self, served: Served) -> Groups:
        """Groups for the next prompts that were not drawn yet."""
        rollout, first = self.config.rollout, self.progress.prompts
        self.progress.prompts += rollout.prompts
        groups = await collect(
            [(number, self.prompts[number]) for number in range(first, first + rollout.prompts)],
            engine=served.engine,
            format=self.format,
            group_size=rollout.group_size,
            budget=rollout.budget,
            concurrency=rollout.concurrency,
            version=served.version,
            seed=self.config.seed,
        )
        errors = [r.error for group in groups for r in group if r.error]
        if len(errors) == rollout.prompts * rollout.group_size:
            raise EngineError(f"every rollout of step {self.progress.step + 1} failed; the first: {errors[0]}")
        return groups

    def _learn(self, groups: Groups) -> dict[str, float]:
        """Reward, compare, update; what there is to say of it."""
        # In one_step_off this is another thread, and OpenMP keeps its number of threads for each.
        torch.set_num_threads(self.config.threads)
        judged = [self._judge(group) for group in groups]
        rate = self.config.optimiser.lr * self.config.schedule.factor(self._done(), self.progress.step)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        self._log_samples(judged)
        numbers = _summary([j for group in judged for j in group], self.progress.step)
        self.progress.rollouts += sum(map(len, judged))
        self.progress.tokens += int(numbers["sampled_tokens"])
        numbers |= self._update(experiences(judged, self.config))
        return numbers | {"lr": rate}

    def _judge(self, group: Sequence[Rollout]) -> list[Judged]:
        """Rewards of a group; rollouts that the system failed do not count among their siblings, if so configured."""
        outcomes = [outcome_of(rollout, format=self.format, tokenizer=self.tokenizer) for rollout in group]
        counted = [o for o in outcomes if not o.error or self.config.rollout.errors == "wrong"]
        siblings = Group(outcomes=counted or outcomes, step=self.progress.step, done=self._done())
        return [
            Judged(rollout=rollout, outcome=outcome, parts=self.reward.parts(outcome, siblings))
            for rollout, outcome in zip(group, outcomes, strict=True)
        ]

    def _update(self, minibatches: Sequence[Sequence[Experience]]) -> dict[str, float]:
        """One optimiser step for each minibatch."""
        packed = [self._pack(minibatch) for minibatch in minibatches]
        several = len(packed) > 1
        proximal = [[self._logprobs(b).detach() if several else None for b in batches] for batches in packed]
        tally = _Tally()
        norms: list[float] = []
        for batches, olds in zip(packed, proximal, strict=True):
            for batch, old in zip(batches, olds, strict=True):
                self._backward(batch, old, tally)
            if not batches:
                continue
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimiser.clip)))
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
        return tally.numbers() | {"norm": sum(norms) / max(1, len(norms))}

    def _pack(self, experiences: Sequence[Experience]) -> list[PolicyBatch]:
        buckets = [Bucket(rows=rows, length=length) for rows, length in self.config.buckets]
        merges = format_class(self.config.data.format).join_kind == "merge"
        return pack(experiences, buckets, num_spans=int(merges), pad_id=self.tokenizer.control_id("<pad>") or 0)

    def _logprobs(self, batch: PolicyBatch, model: Decoder | None = None) -> Tensor:
        """Natural logs [R, T] under a model's weights as they are, without gradient."""
        with torch.no_grad(), self._running(batch):
            return logprobs(model or self.model, batch)

    def _backward(self, batch: PolicyBatch, proximal: Tensor | None, tally: _Tally) -> None:
        reference = self._logprobs(batch, self.reference) if self.reference is not None else None
        with self._running(batch):
            new = logprobs(self.model, batch)
        loss = policy_loss(new, batch, self.config.loss, proximal=proximal, reference=reference, tally=tally)
        loss.backward()

    def _running(self, batch: PolicyBatch) -> _Stack:
        return _Stack(bf16=self.config.precision == "bf16", eager=batch.odd)

    # What is told

    def _tell(self, numbers: Mapping[str, float]) -> None:
        progress = self.progress
        warnings = self.watch.add(numbers)
        for warning in warnings:
            self.say(f"step {progress.step}  warning: {warning}")
        record = {"step": progress.step, **{name: round(value, 6) for name, value in numbers.items()}}
        if warnings:
            record["warnings"] = warnings
        self.metrics.write(record)
        for sink in self.sinks:
            sink.write(progress.step, numbers)
        self.display.progress(self._done(), lambda: self._line(numbers))

    def _line(self, numbers: Mapping[str, float]) -> str:
        left = (1 / max(1e-9, self._done()) - 1) * self.progress.seconds
        return (
            f"step {self.progress.step}  reward {numbers['reward']:.3f}  right {numbers['correct']:.1%}"
            f"  forks {numbers['parallel']:.1%}  critical path {numbers['critical_path_tokens']:.0f}"
            f"  entropy {numbers['entropy']:.3f}  {numbers['step_s']:.1f} s a step  left {left / 60:.1f} min"
        )

    def _log_samples(self, judged: Sequence[Sequence[Judged]]) -> None:
        """Write some rollouts as logs of runs."""
        every, step = self.config.log.samples_every, self.progress.step
        if not every or step % every:
            return
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        about = checkpoint.description(asdict(self.config), scores={}, tokenizer=self.tokenizer)
        for group in judged[: self.config.log.samples]:
            chosen = group[0]
            started, *rest = chosen.rollout.events or (None,)
            if not isinstance(started, RunStarted):
                continue
            meta = {
                **started.meta,
                "model": f"{self.out.name} at step {step}",
                "reward": chosen.reward,
                "parts": chosen.parts,
                "versions": chosen.rollout.versions,
                "tokenizer": about["tokenizer"],
            }
            name = chosen.rollout.id.replace("/", "_")
            write_log([replace(started, meta=meta), *rest], folder / f"step{step:06d}_{name}.jsonl")

    # Evaluation

    def _eval_is_due(self) -> bool:
        """Before the first step, and evenly spread; the last one is at the end."""
        times = self.config.eval.times
        return bool(times) and int(self._done() * times + 1e-9) >= self.progress.evals

    async def _evaluate(self) -> None:
        """Greedy decoding of held-out prompts of every family."""
        began, progress, rollout = time.monotonic(), self.progress, self.config.rollout
        prompts = [
            (n, self.source(family, random.Random(f"held_out/{family}/{n}"), "held_out"))
            for family in self.config.data.mixture
            for n in range(self.config.eval.problems)
        ]
        async with self.serving.at(self.model, progress.step) as served:
            groups = await collect(
                prompts,
                engine=served.engine,
                format=self.format,
                group_size=1,
                budget=rollout.budget,
                concurrency=rollout.concurrency,
                version=served.version,
                seed=0,
                temperature=0.0,
            )
        runs = [(r, outcome_of(r, format=self.format, tokenizer=self.tokenizer)) for (r,) in groups]
        families = {
            family: _scores([(r, o) for r, o in runs if r.prompt.family == family])
            for family in self.config.data.mixture
        }
        scores = {"step": progress.step, "families": families, "all": _scores(runs)}
        self.scores = {"start": self.scores.get("start", scores), **scores}
        progress.evals = int(self._done() * self.config.eval.times + 1e-9) + 1
        self._export()
        self.metrics.write({"step": progress.step, "eval": scores, "eval_s": round(time.monotonic() - began, 2)})
        self._save()
        self.say(f"step {progress.step}  held out, greedy: {json.dumps(scores['all'])}")
        for sink in self.sinks:
            sink.write(progress.step, {f"eval/{name}": value for name, value in scores["all"].items()})

    # On disk

    def _save(self) -> None:
        checkpoint.save(
            self.path,
            {
                "config": asdict(self.config),
                "model": self.model.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
                "reference": self.reference.state_dict() if self.reference is not None else None,
                "progress": asdict(self.progress),
                "scores": self.scores,
                "metrics": self.metrics.size,
                "watch": self.watch.state(),
                "pending": [[r.state() for r in group] for group in self.pending] if self.pending else None,
            },
        )

    def _saved(self, config: RLConfig, resume: bool) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        if not resume:
            raise RequestError(f"{self.out} holds a run already; resume it, or choose another folder")
        saved = checkpoint.load(self.path, format=config.data.format)
        resolved = replace(config, precision=machine.precision(config.precision))
        ours, theirs = identity(asdict(resolved), free=RL_FREE), identity(saved["config"], free=RL_FREE)
        differing = sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))
        if differing:
            name = differing[0]
            raise ModelError(
                f"{self.path} is of another run: {name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
            )
        return saved

    def _restore(self, saved: Mapping[str, Any]) -> None:
        for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        if self.reference is not None:
            self.reference.load_state_dict(saved["reference"])
        self.progress, self.scores = Progress(**saved["progress"]), saved["scores"]
        self.watch = Watch(**saved["watch"])
        if saved["pending"]:
            self.pending = [
                [Rollout.from_state(state, self.prompts[int(state["id"].partition("/")[0])]) for state in group]
                for group in saved["pending"]
            ]

    def _export(self) -> None:
        about = checkpoint.description(asdict(self.config), scores=self.scores, tokenizer=self.tokenizer)
        checkpoint.export_gguf(self.gguf, self.model, about=about, dtype=self.config.weights)

    def _result(self, *, finished: bool) -> RunResult:
        self._export()
        return RunResult(
            finished=finished, progress=self.progress, scores=self.scores, checkpoint=self.path, gguf=self.gguf
        )


def experiences(judged: Sequence[Sequence[Judged]], config: RLConfig) -> list[list[Experience]]:
    """What the rollouts of a step are trained as, in minibatches.

    An advantage is of a rollout and goes to every token that it sampled, in whichever segment. Rollouts that the
    system failed are left out, if so configured. Those whose advantage is 0 are not computed, for they have no
    gradient, but they count where tokens are weighed.
    """
    loss, counted = (
        config.loss,
        [[j for j in group if not j.outcome.error or config.rollout.errors == "wrong"] for group in judged],
    )
    worth = advantages(
        loss.advantage, {str(i): {j.rollout.id: j.reward for j in group} for i, group in enumerate(counted)}
    )
    sampled = [j.rollout for group in counted for j in group if j.rollout.tree.num_sampled]
    random.Random(f"{config.seed}/{sampled[0].id if sampled else ''}").shuffle(sampled)
    out: list[list[Experience]] = []
    for part in (sampled[i :: loss.minibatches] for i in range(loss.minibatches)):
        weights = token_weights(
            loss.aggregate, {r.id: r.tree.num_sampled for r in part}, constant=config.rollout.max_tokens
        )
        out.append(
            [
                Experience(trie=flatten(r.tree), advantage=worth[r.id], weight=weights[r.id])
                for r in part
                if worth[r.id] or loss.kl
            ]
        )
    return out


def logprobs(model: Decoder, batch: PolicyBatch) -> Tensor:
    """Natural log [R, T] of the probability of every trained token, 0 elsewhere."""
    ids, positions, labels, prev = inputs(batch.packed)
    return -model.losses(ids, positions, labels, prev, model.biases(*spans(batch.packed)))


def policy_loss(
    new: Tensor,
    batch: PolicyBatch,
    config: LossConfig,
    *,
    proximal: Tensor | None = None,
    reference: Tensor | None = None,
    tally: _Tally | None = None,
) -> Tensor:
    """The part of the loss that this batch is; the parts of a minibatch add up to its loss.

    Args:
        new: `logprobs` of the policy, with gradient.
        proximal: The same at the start of the step; None where nothing was updated since.
        reference: `logprobs` of the weights the run started with, for the divergence.
        tally: Counts what there is to say.
    """
    behaviour = torch.from_numpy(batch.behaviour).to(new.dtype)
    credit = torch.from_numpy(batch.advantages).to(new.dtype)
    weights = torch.from_numpy(batch.weights).to(new.dtype)
    start = new.detach() if proximal is None else proximal
    old = start if config.correction == "truncated" else behaviour
    losses, clipped = surrogate(new, old, credit, clip_low=config.clip_low, clip_high=config.clip_high)
    if config.correction == "truncated":
        losses = losses * importance(start, behaviour, cap=config.cap)
    if reference is not None:
        losses = losses + config.kl * k3(new, reference)
    loss = (losses * weights).sum()
    if tally is not None:
        trained = torch.from_numpy(batch.packed.labels) != IGNORED
        tally.add(loss, (start - behaviour)[trained], clipped[trained], config.cap)
    return loss


class _Tally:
    """Counts over the trained tokens of a step."""

    def __init__(self) -> None:
        self.loss, self.tokens, self.apart, self.drift, self.clipped, self.capped = 0.0, 0, 0.0, 0.0, 0, 0

    def add(self, loss: Tensor, log_ratio: Tensor, clipped: Tensor, cap: float) -> None:
        self.loss += float(loss.detach())
        self.tokens += len(log_ratio)
        self.apart += float(log_ratio.abs().sum())
        self.drift -= float(log_ratio.sum())
        self.clipped += int(clipped.sum())
        self.capped += int((log_ratio.exp() > cap).sum())

    def numbers(self) -> dict[str, float]:
        """`mismatch`: mean distance of trainer and engine in nats; `mismatch_kl`: engine against trainer."""
        n = max(1, self.tokens)
        return {
            "loss": self.loss,
            "trained_tokens": float(self.tokens),
            "mismatch": self.apart / n,
            "mismatch_kl": self.drift / n,
            "clipped": self.clipped / n,
            "capped": self.capped / n,
        }


class _Stack:
    """Autocast, and no compiling for odd shapes, as one context."""

    def __init__(self, *, bf16: bool, eager: bool) -> None:
        self._autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
        self._eager = torch.compiler.set_stance("force_eager") if eager else None

    def __enter__(self) -> None:
        self._autocast.__enter__()
        if self._eager is not None:
            self._eager.__enter__()

    def __exit__(self, *exc: Any) -> None:
        if self._eager is not None:
            self._eager.__exit__(*exc)
        self._autocast.__exit__(*exc)


def _summary(judged: Sequence[Judged], step: int) -> dict[str, float]:
    """Means over the rollouts of a step, those that the system failed left out but for their share."""
    counted = [j for j in judged if not j.outcome.error] or list(judged)
    n = len(counted)
    outcomes = [j.outcome for j in counted]
    logs = [p for j in counted for s in j.rollout.tree.segments.values() for p in s.logprobs]
    ages = [step - version for j in counted for version in j.rollout.versions.values()]
    terms = {f"reward/{name}": sum(j.parts[name] for j in counted) / n for name in counted[0].parts}
    return {
        "reward": sum(j.reward for j in counted) / n,
        **terms,
        "correct": sum(o.correct for o in outcomes) / n,
        "parallel": sum(o.forks > 0 for o in outcomes) / n,
        "valid": sum(o.valid for o in outcomes) / n,
        "limited": sum(o.limited > 0 for o in outcomes) / n,
        "errors": sum(bool(j.outcome.error) for j in judged) / len(judged),
        "threads": sum(o.threads for o in outcomes) / n,
        "critical_path_tokens": sum(o.critical_path_tokens for o in outcomes) / n,
        "sampled_tokens": float(sum(o.sampled_tokens for o in outcomes)),
        "speedup": _speedup(outcomes),
        # Unbiased where the tokens were sampled from the policy at temperature 1, and free.
        "entropy": -sum(logs) / max(1, len(logs)),
        "age": sum(ages) / max(1, len(ages)),
    }


def _scores(runs: Sequence[tuple[Rollout, Outcome]]) -> dict[str, float]:
    n = max(1, len(runs))
    outcomes = [outcome for _, outcome in runs]
    known = [(r.prompt.forks, o.forks > 0) for r, o in runs if r.prompt.forks is not None]
    scores = {
        "n": float(len(runs)),
        "correct": sum(o.correct for o in outcomes) / n,
        "parallel": sum(o.forks > 0 for o in outcomes) / n,
        "valid": sum(o.valid for o in outcomes) / n,
        "critical_path_tokens": sum(o.critical_path_tokens for o in outcomes) / n,
        "sampled_tokens": sum(o.sampled_tokens for o in outcomes) / n,
        "speedup": _speedup(outcomes),
    }
    if known:
        scores["fork_right"] = sum(should == did for should, did in known) / len(known)
    return {name: round(value, 4) for name, value in scores.items()}


def _speedup(outcomes: Sequence[Outcome]) -> float:
    """Sequential baseline over critical path, both summed, over right answers; 0 where there is none."""
    pairs = [(o.baseline_tokens, o.critical_path_tokens) for o in outcomes if o.correct and o.baseline_tokens]
    return sum(b for b, _ in pairs) / max(1, sum(c for _, c in pairs))


def _model(config: RLConfig, saved: Mapping[str, Any] | None) -> Decoder:
    """The weights to go on with: of the run, of `init`, or random."""
    if saved is not None:
        return checkpoint.model_of(saved)
    if config.init:
        return checkpoint.load_model(Path(config.init), format=config.data.format)
    assert config.model is not None, "RLConfig holds sizes where there is no init"
    return Decoder(config.model)


def _frozen(model: Decoder) -> Decoder:
    copy = Decoder(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.requires_grad_(False)


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure of a group; what else failed with it was cancelled by it."""
    return next(_leaves(group))


__all__ = ["Progress", "RLConfig", "RunResult", "load_rl_config", "rl_config_from", "to_toml", "train"]
