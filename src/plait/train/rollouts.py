"""Samples groups of rollouts over any engine, and says what each of them was.

A bad rollout is data: an engine that failed, tags that cannot be read and a budget that ran out are all outcomes with
a reward, and none ends the training. Nothing is ever sampled again in a simpler way to hide a failure. Knows nothing of
rewards, models and torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

import anyio

from plait.engines.base import Engine
from plait.events import Event, SegmentStarted, decode, encode
from plait.formats.base import Fork, TrajectoryFormat
from plait.models import response_text
from plait.session import open_run
from plait.tokenizer import Tokenizer
from plait.train.prompts import Prompt
from plait.train.rewards import Outcome
from plait.tree import Tree
from plait.types import Budget, Request, StopReason


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One run of one prompt, as the events it said."""

    id: str
    """`PROMPT/SAMPLE`, both counted from 0."""
    prompt: Prompt
    events: tuple[Event, ...]
    versions: dict[str, int] = field(default_factory=dict[str, int])
    """By segment: how many updates the weights had seen when it began to sample."""
    error: str = ""
    """What failed in the system, not in the model."""

    @cached_property
    def tree(self) -> Tree:
        return Tree.from_events(self.events)

    def state(self) -> dict[str, object]:
        """Plain values for a checkpoint; the prompt is drawn again by its number."""
        return {
            "id": self.id,
            "events": [encode(event) for event in self.events],
            "versions": dict(self.versions),
            "error": self.error,
        }

    @classmethod
    def from_state(cls, state: dict[str, object], prompt: Prompt) -> Rollout:
        """The inverse of `state`."""
        fields = dict(state)
        events = tuple(decode(str(line)) for line in fields.pop("events"))  # pyright: ignore[reportGeneralTypeIssues]
        return cls(prompt=prompt, events=events, **fields)  # pyright: ignore[reportArgumentType]


async def collect(
    prompts: Sequence[tuple[int, Prompt]],
    *,
    engine: Engine,
    format: TrajectoryFormat,
    group_size: int,
    budget: Budget,
    concurrency: int,
    version: Callable[[], int],
    seed: int,
    temperature: float = 1.0,
) -> list[list[Rollout]]:
    """Sample a group of rollouts for each prompt.

    Args:
        prompts: Each with its number, which with the seed decides what is sampled.
        engine: Open.
        concurrency: Rollouts at the same time.
        version: Of the weights that the engine has now; asked as each segment starts.
        temperature: 1 samples from the policy itself, which is what its log-probabilities are of; 0 is for evaluation.

    Returns:
        Groups in the order of the prompts; rollouts in the order of their numbers, whatever order they end in.
    """
    asked = iter([(at, number, k) for at, (number, _) in enumerate(prompts) for k in range(group_size)])
    done: dict[tuple[int, int], Rollout] = {}

    async def work() -> None:
        for at, number, k in asked:
            prompt = prompts[at][1]
            request = Request(
                prompt_ids=prompt.prompt_ids,
                budget=budget,
                temperature=temperature,
                seed=rollout_seed(seed, number, k),
            )
            done[at, k] = await sample(f"{number}/{k}", prompt, request, engine, format, version)

    async with anyio.create_task_group() as workers:
        for _ in range(concurrency):
            workers.start_soon(work)
    return [[done[at, k] for k in range(group_size)] for at in range(len(prompts))]


def rollout_seed(seed: int, number: int, sample: int) -> int:
    """The seed of one rollout, 63 bits."""
    return int.from_bytes(blake2b(f"{seed} {number} {sample}".encode(), digest_size=8).digest(), "little") >> 1


async def sample(
    id: str, prompt: Prompt, request: Request, engine: Engine, format: TrajectoryFormat, version: Callable[[], int]
) -> Rollout:
    """One rollout; whatever fails in it is noted with what there was by then.

    Args:
        id: `PROMPT/SAMPLE`, both numbers.
        version: Of the weights that the engine has now; asked as each segment starts.
    """
    events: list[Event] = []
    versions: dict[str, int] = {}
    error, run = "", None
    meta = {"question": prompt.question, "family": prompt.family, "rollout": id}
    try:
        async with open_run(request, engine=engine, format=format, meta=meta) as run:
            async for event in run:
                events.append(event)
                if isinstance(event, SegmentStarted):
                    versions[event.id] = version()
    except Exception as exc:
        # The boundary of the rollout worker: a failure is recorded here, and judged by whoever trains.
        error = f"{type(exc).__name__}: {exc}"
        events += run.pending() if run is not None else []
    return Rollout(id=id, prompt=prompt, events=tuple(events), versions=versions, error=error)


def outcome_of(rollout: Rollout, *, format: TrajectoryFormat, tokenizer: Tokenizer) -> Outcome:
    """What rewards may know of a rollout. Grades what the root thread sampled, and nothing else.

    Args:
        format, tokenizer: The ones it was sampled with.
    """
    tree = rollout.tree
    segments = list(tree.segments.values())
    ended = tree.stop is StopReason.EOS and not rollout.error
    infos = [thread for thread in tree.threads() if thread.name != "0"] if segments else []
    return Outcome(
        correct=ended and rollout.prompt.grade(response_text(tree, tokenizer)),
        forks=tree.num_forks,
        threads=tree.num_threads,
        closed_threads=sum(thread.stop is StopReason.STOP for thread in infos),
        faults=faults(tree, format),
        limited=sum(s.stop in (StopReason.BUDGET, StopReason.LENGTH) for s in segments),
        segments=max(1, len(segments)),
        response_tokens=tree.num_response(),
        token_latency=tree.token_latency(),
        sampled_tokens=tree.num_sampled,
        critical_path_tokens=tree.critical_path(),
        baseline_tokens=rollout.prompt.baseline_tokens,
        error=rollout.error,
    )


def faults(tree: Tree, format: TrajectoryFormat) -> tuple[str, ...]:
    """Where a run did not keep its format, in plain words. Being cut off by a limit is no fault of format.

    A block that cannot be read or had to be repaired, a thread that ended without its closing tag, and tags of a block
    where no block was opened. What a limit or the winner of a race cut off is none.
    """
    found: list[str] = []
    stray: dict[str, bool] = {}
    cut = (StopReason.MALFORMED, StopReason.BUDGET, StopReason.LENGTH, StopReason.CANCELLED)
    for segment in tree.segments.values():
        depth = segment.thread.count("/")
        tags = Counter(id for id in segment.sampled_ids if id in format.fork_ids)
        if segment.stop is StopReason.MALFORMED:
            found.append(f"{segment.id}: {segment.note}")
        elif segment.stop is StopReason.EOS and depth and format.end_text(None):
            found.append(f"{segment.id}: a thread that ended without its closing tag")
        fork = format.parse(segment.sampled_ids, depth) if segment.stop is StopReason.STOP else None
        if isinstance(fork, Fork):
            if fork.note:
                found.append(f"{segment.id}: {fork.note}")
            # A tag of the block, or of each thread; a thread that is not waited for has tags of its own number only.
            right = (1, len(fork.branches)) if fork.waits else (0, 1)
            wrong = any(tags[id] not in right for id in format.fork_ids)
        else:
            wrong = bool(tags) and segment.stop not in cut
        stray[segment.thread] = stray.get(segment.thread, False) or wrong
    found += [f"thread {thread}: tags of a block where none was opened" for thread, wrong in stray.items() if wrong]
    return tuple(found)
