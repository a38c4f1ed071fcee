"""Reinforcement learning of parallel reasoning: sample groups, reward, compare, update; resumable.

    plait train rl configs/rl_pgrpo.toml --out runs/pgrpo
    torchrun --nproc-per-node 8 -m plait train rl configs/hf_rl.toml --out runs/qwen3

One step: sample a group of rollouts for each of some prompts (`rollouts`), say what each was worth (`rewards`), compare
within groups (`advantages`), train each tree as one packed sequence (`experience`, `losses`). The run folder holds
`config.toml` (everything resolved), `checkpoint.pt`, `metrics.jsonl`, `samples/` (logs for `plait trace show`) and the
model: `model.gguf`, or a folder `model/`. Starting the same command again goes on from the checkpoint. With several
processes each samples every n-th prompt and trains every n-th batch. Knows nothing of what engines are made of.
Source: P-GRPO, ThreadWeaver (Lian et al. 2025, arXiv:2512.07843).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import anyio
import anyio.to_thread
import torch
from torch import Tensor

from plait.errors import EngineError, Failures
from plait.events import RunStarted
from plait.formats import format_class, open_format
from plait.log import write_log
from plait.spelling import Spelling, describe
from plait.train import checkpoint, machine
from plait.train.config import to_toml
from plait.train.display import Say
from plait.train.experience import Experience, PolicyBatch, idle, pack
from plait.train.figures import scores, shown_scores, summary
from plait.train.learners import Learner, open_learner
from plait.train.loop import Loop, RunResult
from plait.train.model import Decoder
from plait.train.packing import Bucket
from plait.train.policy import Judged, Tally, experiences, policy_loss
from plait.train.prompts import Prompt, Prompts, PromptSource, Questions, task_source
from plait.train.rewards import Group, Reward
from plait.train.rl_config import RL_FREE, RLConfig, load_rl_config, rl_config_from
from plait.train.rollouts import Rollout, collect, outcome_of
from plait.train.serving import SERVINGS, Served, Serving
from plait.train.watch import Watch

T = TypeVar("T")
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
        source: Draws prompts of a mixture; default: problems of `plait.tasks`.
        serving: Gives engines over the weights; default: what `config.rollout.engine` names.
        say: Takes lines of progress; default: a bar or lines on standard error.
        stop_after_steps: Leave as if interrupted once this many steps of the run are done.

    Raises:
        RequestError: The config asks for what there is not.
        ModelError: The folder holds a checkpoint of another run, or `init` has another format.
        EngineError: Every rollout of a step failed in the engine. The checkpoint is of the step before.
    """
    with Loop(Path(out), resume=resume, say=say, stop_after_steps=stop_after_steps) as loop:
        return anyio.run(_Run(config, loop, source, serving).go)


class _Run:
    """The state of one call of `train`."""

    def __init__(self, config: RLConfig, loop: Loop, source: PromptSource | None, serving: Serving | None) -> None:
        config = replace(config, precision=machine.precision(config.precision, config.base))
        self.loop, self.ranks = loop, loop.ranks
        self.progress, self.scores, self.watch = Progress(), dict[str, Any](), Watch()
        self.pending: Groups | None = None
        saved = loop.find(config, read=rl_config_from, free=RL_FREE)
        self.learner = open_learner(
            config, fresh=lambda: _fresh(config), ranks=loop.ranks, saved=saved, start=bool(config.loss.kl)
        )
        if isinstance(self.learner.model, Decoder):
            config = replace(config, model=self.learner.model.config)
        self.config = config
        self.tokenizer = self.learner.tokenizer
        self.format = open_format(config.data.format, self.tokenizer)
        self.reward = Reward(config.reward)
        self.prompts = _prompts(config, self.learner, source)
        self.serving = serving or SERVINGS[config.rollout.engine](
            concurrency=config.rollout.concurrency, threads=config.threads, cells=config.rollout.cells
        )
        if saved is not None:
            self._restore(saved)
        if config.compile:
            self.learner.compile()
        loop.open(config, sinks=config.log.sinks, saved=saved)

    async def go(self) -> RunResult:
        loop, progress = self.loop, self.progress
        start = f"on from step {progress.step}" if progress.step else self.config.origin
        loop.say(f"training {self.learner.num_parameters:,} parameters in {self.config.data.format} {start}")
        with Failures().unwrapped():
            async with self.serving:
                if self._eval_is_due():
                    await self._evaluate()
                for _ in loop.steps(self):
                    await self._step()
                    if self._eval_is_due():
                        await self._evaluate()
        if loop.finished:
            loop.say(f"finished: {progress.step} steps, {progress.rollouts:,} rollouts, {progress.seconds:.0f} s")
        return loop.result(self, self._export())

    def done(self) -> float:
        return self.config.schedule.done(steps=self.progress.step, tokens=0, problems=0)

    def state(self) -> dict[str, Any]:
        pending = [[r.state() for r in group] for group in self.pending] if self.pending else None
        return {**self.learner.state(), "watch": self.watch.state(), "pending": pending}

    def _restore(self, saved: Mapping[str, Any]) -> None:
        self.progress, self.scores = Progress(**saved["progress"]), saved["scores"]
        self.watch = Watch(**saved["watch"])
        if saved["pending"]:
            self.pending = [_rollouts(group, self.prompts) for group in saved["pending"]]

    def _export(self) -> Path:
        return self.learner.export(self.loop.out, config=asdict(self.config), scores=self.scores)

    # One step

    async def _step(self) -> None:
        began = time.perf_counter()
        progress, steps = self.progress, self.config.schedule.steps or 0
        groups, self.pending = self.pending, None
        waited = began
        if groups is None:
            async with self.serving.at(self.learner, progress.step) as served:
                groups = self._together(await self._collect(served))
            waited = time.perf_counter()
        if self.config.rollout.mode == "one_step_off" and progress.step + 1 < steps:
            async with self.serving.at(self.learner, progress.step) as served:
                numbers = await self._learn_while_collecting(served, groups)
        else:
            numbers = self._learn(groups)
        progress.step += 1
        took = time.perf_counter() - began
        progress.seconds += took
        self._tell(numbers | {"rollout_s": waited - began, "step_s": took})

    async def _learn_while_collecting(self, served: Served, now: Groups) -> dict[str, float]:
        """Update on these groups while the next ones are sampled from the weights before the update."""
        numbers, groups = dict[str, float](), Groups()

        async def learn() -> None:
            numbers.update(await anyio.to_thread.run_sync(self._learn, now))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(learn)
            groups = await self._collect(served)
        self.pending = self._together(groups)
        return numbers

    async def _collect(self, served: Served) -> Groups:
        """This process's groups of the next prompts that were not drawn yet."""
        rollout, first = self.config.rollout, self.progress.prompts
        self.progress.prompts += rollout.prompts
        return await collect(
            [(number, self.prompts[number]) for number in self.ranks.own(range(first, first + rollout.prompts))],
            engine=served.engine,
            format=self.format,
            group_size=rollout.group_size,
            budget=rollout.budget,
            concurrency=rollout.concurrency,
            version=served.version,
            seed=self.config.seed,
        )

    def _together(self, groups: Groups) -> Groups:
        """The groups of all processes, in the order of their prompts."""
        last = self.progress.prompts
        groups = self._gathered(groups, range(last - self.config.rollout.prompts, last), self.prompts.__getitem__)
        errors = [r.error for group in groups for r in group if r.error]
        if len(errors) == sum(map(len, groups)):
            raise EngineError(f"every rollout of step {self.progress.step + 1} failed; the first: {errors[0]}")
        return groups

    def _gathered(self, own: Groups, keys: Sequence[T], prompt: Callable[[T], Prompt]) -> Groups:
        """The groups of all processes; each has sampled its share of these keys, in order."""
        if self.ranks.count == 1:
            return own
        shares = self.ranks.gather([[r.state() for r in group] for group in own])
        turns = [iter(share) for share in shares]
        return [
            [Rollout.from_state(state, prompt(key)) for state in next(turns[at % self.ranks.count])]
            for at, key in enumerate(keys)
        ]

    def _learn(self, groups: Groups) -> dict[str, float]:
        """Reward, compare, update; what there is to say of it."""
        # In one_step_off this is another thread, and OpenMP keeps its number of threads for each.
        machine.use_threads(self.config.threads)
        self.ranks.use_device()
        judged = [self._judge(group) for group in groups]
        factor = self.config.schedule.factor(self.done(), self.progress.step)
        self._log_samples(judged)
        numbers = summary([j for group in judged for j in group], self.progress.step)
        self.progress.rollouts += sum(map(len, judged))
        self.progress.tokens += int(numbers["sampled_tokens"])
        numbers |= self._update(experiences(judged, self.config), factor)
        return numbers | {"lr": self.config.optimiser.lr * factor}

    def _judge(self, group: Sequence[Rollout]) -> list[Judged]:
        """Rewards of a group; rollouts that the system failed do not count among their siblings, if so configured."""
        outcomes = [outcome_of(rollout, format=self.format, tokenizer=self.tokenizer) for rollout in group]
        counted = [o for o in outcomes if not o.error or self.config.rollout.errors == "wrong"]
        siblings = Group(outcomes=counted or outcomes, step=self.progress.step, done=self.done())
        return [
            Judged(rollout=rollout, outcome=outcome, parts=self.reward.parts(outcome, siblings))
            for rollout, outcome in zip(group, outcomes, strict=True)
        ]

    def _update(self, minibatches: Sequence[Sequence[Experience]], factor: float) -> dict[str, float]:
        """One optimiser step for each minibatch, at this share of the learning rate."""
        packed = [self._pack(minibatch) for minibatch in minibatches]
        several = len(packed) > 1
        proximal = [[self._logprobs(b) if several else None for b in batches] for batches in packed]
        tally, norms = Tally(), list[float]()
        for batches, olds in zip(packed, proximal, strict=True):
            for batch, old in zip(batches, olds, strict=True):
                self._backward(batch, old, tally)
            if batches:
                norms.append(self.learner.update(factor))
        tally = Tally.of(self.ranks.gather(tally.counts()))
        return tally.numbers() | {"norm": sum(norms) / max(1, len(norms))}

    def _pack(self, experiences: Sequence[Experience]) -> list[PolicyBatch]:
        """This process's batches: as many as any other's, for all of them run the model together."""
        buckets = [Bucket(rows=rows, length=length) for rows, length in self.config.buckets]
        merges = format_class(self.config.data.format).join_kind == "merge"
        batches = pack(experiences, buckets, num_spans=int(merges), pad_id=self.learner.pad_id)
        short = -len(batches) % self.ranks.count
        return list(self.ranks.own(batches + [idle(batch) for batch in batches[:1] * short]))

    def _logprobs(self, batch: PolicyBatch) -> Tensor:
        """Natural logs [R, T] under the weights as they are, without gradient."""
        with torch.no_grad():
            return -self.learner.losses(batch.packed, odd=batch.odd)

    def _backward(self, batch: PolicyBatch, proximal: Tensor | None, tally: Tally) -> None:
        reference = -self.learner.start_losses(batch.packed, odd=batch.odd) if self.config.loss.kl else None
        new = -self.learner.losses(batch.packed, odd=batch.odd)
        loss = policy_loss(new, batch, self.config.loss, proximal=proximal, reference=reference, tally=tally)
        # Gradients of several processes are averaged, and this one has its part of a sum.
        (loss * self.ranks.count).backward()

    # What is told

    def _tell(self, numbers: Mapping[str, float]) -> None:
        progress = self.progress
        warnings = self.watch.add(numbers)
        for warning in warnings:
            self.loop.say(f"step {progress.step}  warning: {warning}")
        record = {"step": progress.step, **{name: round(value, 6) for name, value in numbers.items()}}
        if warnings:
            record["warnings"] = warnings
        self.loop.write(record, numbers)
        self.loop.display.progress(self.done(), lambda: self._line(numbers))

    def _line(self, numbers: Mapping[str, float]) -> str:
        left = (1 / max(1e-9, self.done()) - 1) * self.progress.seconds
        return (
            f"step {self.progress.step}  reward {numbers['reward']:.3f}  right {numbers['correct']:.1%}"
            f"  forks {numbers['parallel']:.1%}  critical path {numbers['critical_path_tokens']:.0f}"
            f"  entropy {numbers['entropy']:.3f}  {numbers['step_s']:.1f} s a step  left {left / 60:.1f} min"
        )

    def _log_samples(self, judged: Sequence[Sequence[Judged]]) -> None:
        """Write some rollouts as logs of runs."""
        every, step = self.config.log.samples_every, self.progress.step
        if not every or step % every or not self.ranks.first:
            return
        folder = self.loop.out / "samples"
        folder.mkdir(exist_ok=True)
        for group in judged[: self.config.log.samples]:
            chosen, spelling = group[0], Spelling(self.tokenizer)
            started, *rest = chosen.rollout.events or (None,)
            if not isinstance(started, RunStarted):
                continue
            meta = {
                **started.meta,
                "model": f"{self.loop.out.name} at step {step}",
                "reward": chosen.reward,
                "parts": chosen.parts,
                "versions": chosen.rollout.versions,
                "tokenizer": describe(self.tokenizer, self.format.tags()),
            }
            name = chosen.rollout.id.replace("/", "_")
            spelled = map(spelling.spell, [replace(started, meta=meta), *rest])
            write_log(spelled, folder / f"step{step:06d}_{name}.jsonl")

    # Evaluation

    def _eval_is_due(self) -> bool:
        """Before the first step, and evenly spread; the last one is at the end."""
        times = self.config.eval.times
        return bool(times) and int(self.done() * times + 1e-9) >= self.progress.evals

    async def _evaluate(self) -> None:
        """Greedy decoding of held-out prompts of every family."""
        began, progress, rollout = time.monotonic(), self.progress, self.config.rollout
        prompts = self.prompts.held_out(self.config.eval.problems)
        async with self.serving.at(self.learner, progress.step) as served:
            groups = await collect(
                self.ranks.own(prompts),
                engine=served.engine,
                format=self.format,
                group_size=1,
                budget=rollout.budget,
                concurrency=rollout.concurrency,
                version=served.version,
                seed=0,
                temperature=0.0,
            )
        groups = self._gathered(groups, prompts, lambda numbered: numbered[1])
        runs = [(r, outcome_of(r, format=self.format, tokenizer=self.tokenizer)) for (r,) in groups]
        families = {
            family: scores([(r, o) for r, o in runs if r.prompt.family == family])
            for family in dict.fromkeys(prompt.family for _, prompt in prompts)
        }
        found = {"step": progress.step, "families": families, "all": scores(runs)}
        self.scores = {"start": self.scores.get("start", found), **found}
        progress.evals = int(self.done() * self.config.eval.times + 1e-9) + 1
        self._export()
        took = round(time.monotonic() - began, 2)
        shown = {f"eval/{name}": value for name, value in found["all"].items()}
        self.loop.write({"step": progress.step, "eval": found, "eval_s": took}, shown)
        self.loop.save(self)
        self.loop.say(f"step {progress.step}  held out, greedy: {shown_scores(found['all'])}")


def _fresh(config: RLConfig) -> Decoder:
    """The weights of `init`, or random ones."""
    if config.init:
        return checkpoint.load_model(Path(config.init), format=config.data.format)
    assert config.model is not None, "RLConfig holds sizes where there is no init"
    return Decoder(config.model)


def _prompts(config: RLConfig, learner: Learner, source: PromptSource | None) -> Questions:
    """What is asked: the lines of a file, or problems of a mixture."""
    data = config.data
    if data.path:
        from plait.train.handoff.scoring import named
        from plait.train.pretrained.records import Records

        records = Records(data.path, held_out=data.held_out)
        return records.questions(learner.tokenizer, grade=named(data.grader), seed=config.seed)
    source = source or task_source(data.format, tokenizer=learner.tokenizer, knobs=data.knobs)
    return Prompts(source, weights=data.mixture, seed=config.seed)


def _rollouts(states: Sequence[dict[str, Any]], prompts: Questions) -> list[Rollout]:
    """A group as it was saved or sent."""
    return [Rollout.from_state(state, prompts[int(state["id"].partition("/")[0])]) for state in states]


__all__ = ["Progress", "RLConfig", "RunResult", "load_rl_config", "rl_config_from", "to_toml", "train"]
