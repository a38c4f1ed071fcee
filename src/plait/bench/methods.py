"""Ways to answer a problem that are compared: one greedy run, or several sampled ones of which one answer is taken.

A method says what runs and what becomes of the answers; it runs nothing and knows nothing of engines. Majority is
self-consistency (Wang et al. 2022, arXiv:2203.11171). Best of n takes an answer that a verifier accepts (Cobbe et al.
2021, arXiv:2110.14168); ours is the family's own checker without the expected answer, so it is there for few families.
pass@n (Chen et al. 2021, arXiv:2107.03374) is told which answer is right: what n samples could give at best.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Literal

from plait import tasks
from plait.bench.records import Record
from plait.errors import RequestError, nearest
from plait.formats.base import Block, Fork, TrajectoryFormat
from plait.models import Model
from plait.tasks import Problem
from plait.tokenizer import Tokenizer
from plait.types import Budget, StopReason

TEMPERATURE = 0.7
"""Of sampled methods where none is said, as in self-consistency."""
MAX_SAMPLES = 64

Forking = Literal["as it likes", "never", "always"]
Take = Callable[[Problem, Sequence["str | None"]], "str | None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to answer a problem with a model."""

    name: str = "greedy"
    of: Literal["model", "twin"] = "model"
    """Whose runs: of the adaptive model or of its sequential twin."""
    forking: Forking = "as it likes"
    samples: int = 1
    """Runs at the same time."""
    temperature: float = 0.0
    take: Take | None = None
    """Which of their answers; None: that of the only run."""

    @property
    def runs(self) -> tuple[Forking, int, float]:
        """What is run: methods that differ only in the answer they take share their runs."""
        return self.forking, self.samples, self.temperature

    def budget(self, budget: Budget) -> Budget:
        return replace(budget, max_threads=0) if self.forking == "never" else budget


GREEDY = Method()


def vote(answers: Iterable[str | None], *, lot: str = "") -> str | None:
    """The answer that most gave, in whatever order they came; None where nobody gave one.

    Args:
        answers: None abstains.
        lot: Of answers with equally many votes a hash of this text and the answer decides: neither the first sample
            nor the smaller number is preferred.
    """
    votes = Counter(answer for answer in answers if answer is not None)

    def rank(answer: str) -> tuple[int, bytes]:
        return votes[answer], blake2b(f"{lot}\n{answer}".encode(), digest_size=8).digest()

    return max(votes, key=rank, default=None)


def majority(problem: Problem, answers: Sequence[str | None]) -> str | None:
    return vote(answers, lot=problem.prompt)


def best(problem: Problem, answers: Sequence[str | None]) -> str | None:
    """An answer that can be seen to be right, else what most gave."""
    seen = [answer for answer in answers if answer is not None and verified(problem, answer)]
    return majority(problem, seen or answers)


def passed(problem: Problem, answers: Sequence[str | None]) -> str | None:
    """A right answer if any is, by the grader that knows it."""
    right = [answer for answer in answers if answer is not None and _graded(problem, answer)]
    return majority(problem, right or answers)


def verified(problem: Problem, answer: str) -> bool:
    """Whether an answer is right as far as that shows without knowing the expected one, which the grader is not told.

    Equations of Countdown can be computed. That there is no solution cannot be seen, and no product either.
    """
    # No answer has a line break, so none is taken for the expected one.
    return _graded(replace(problem, answer="\n"), answer)


def verifies(family: str) -> bool:
    """Whether answers of a family can be verified at all: some of its right ones are."""
    drawn = (tasks.sample(family, random.Random(seed), "train") for seed in range(8))
    return any(verified(problem, problem.answer) for problem in drawn)


def _graded(problem: Problem, answer: str) -> bool:
    return tasks.family(problem.family).grade(problem, answer)


_SINGLE = {
    "sequential": Method(of="twin"),
    "forced-sequential": Method(name="forced-sequential", forking="never"),
    "always-fork": Method(name="always-fork", forking="always"),
}
_SAMPLED: dict[str, Take] = {"majority": majority, "best": best, "pass": passed}
METHODS = {
    "sequential": "the twin, greedy",
    "forced-sequential": "the model with every fork declined",
    "always-fork": "the model with a block forced at the start",
    "majority@N": "N samples of the twin vote (self-consistency)",
    "best@N": "of N samples of the twin one that a checker accepts",
    "pass@N": "whether any of N samples of the twin is right: an oracle",
}
"""What can be compared with, and what it is."""


def method(name: str, *, temperature: float = TEMPERATURE) -> Method:
    """A method by name.

    Args:
        name: One of `METHODS`, `N` a number: `majority@8`.
        temperature: Of sampled ones.

    Raises:
        RequestError: There is none of this name, or not with so many samples or this temperature.
    """
    if name in _SINGLE:
        return _SINGLE[name]
    kind, at, number = name.partition("@")
    if kind not in _SAMPLED or not at:
        raise nearest(f"{kind}@N" if at else name, list(METHODS), "method")
    samples = int(number) if number.isascii() and number.isdecimal() else 0
    if not 1 < samples <= MAX_SAMPLES:
        raise RequestError(f"{name} takes {number or 'no'} samples; a number from 2 to {MAX_SAMPLES}, as in {kind}@8")
    if not temperature > 0:
        raise RequestError(f"temperature is {temperature}; {name} needs samples that differ: above 0")
    return Method(name=name, of="twin", samples=samples, temperature=temperature, take=_SAMPLED[kind])


def refuse_misfits(method: Method, model: Model, families: Iterable[str]) -> None:
    """Say why a method cannot be run on these problems.

    Raises:
        RequestError: It cannot.
    """
    if method.take is best and (blind := [name for name in families if not verifies(name)]):
        known = [name for name in tasks.FAMILIES | tasks.RESEARCH if verifies(name)]
        raise RequestError(
            f"{method.name} needs answers that can be checked without knowing the right one; those of "
            f"{', '.join(blind)} cannot (those of {', '.join(known)} can). pass@{method.samples} is told the right one"
        )
    if method.forking != "as it likes" and not model.forks:
        raise RequestError(f"{method.name} is a way to run a model that forks; {model.name} does not")
    if method.forking == "always":
        forced_ids(model.format, model.tokenizer)


def forced_ids(format: TrajectoryFormat, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What is written at the start of a response so that it begins with a block: the first id of every block.

    Raises:
        RequestError: The format has no blocks, or reads them from ids that have to be sampled.
    """
    try:
        ids = tuple(tokenizer.encode(format.open_text(_BLOCK), special=True))
    except RequestError:
        ids = ()
    if ids and ids[0] in format.fork_ids and _branches(format, ids[1:]) == _branches(format, ids) != ():
        return ids[:1]
    raise RequestError(
        f"no fork can be forced in the {format.name} format: it has no block that is read without its first token"
    )


_BLOCK = Block(outlines=("1*2", "3*4"), threads=((), ()))


def _branches(format: TrajectoryFormat, ids: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    fork = format.parse(ids, 0)
    return tuple(branch.header_ids for branch in fork.branches) if isinstance(fork, Fork) else ()


_ADDED = ("threads", "num_forks", "total_tokens", "reread_tokens")
_LONGEST = ("critical_path_tokens", "token_latency", "longest_context_tokens")


def combined(samples: Sequence[Record], method: Method, problem: Problem, *, wall_s: float | None = None) -> Record:
    """One record of runs of a problem that ran at the same time.

    What they sampled adds up; the critical path and the longest context are those of the longest run. A run that did
    not end by itself gives no answer.

    Args:
        samples: At least one.
        wall_s: From the first start to the last end; None: as if each had run at its own pace, the longest.
    """
    answers = [s.answer if s.stop == StopReason.EOS else None for s in samples]
    answer = answers[0] if method.take is None else method.take(problem, answers)
    forked = any(s.forked for s in samples)
    return replace(
        samples[0],
        method=method.name,
        samples=len(samples),
        temperature=method.temperature,
        answer=answer,
        right=answer is not None and _graded(problem, answer),
        forked=forked,
        decision_right=forked == problem.forks,
        **{name: sum(getattr(s, name) for s in samples) for name in _ADDED},
        **{name: max(getattr(s, name) for s in samples) for name in _LONGEST},
        wall_s=max(s.wall_s for s in samples) if wall_s is None else round(wall_s, 6),
        stop=str(StopReason.EOS) if any(a is not None for a in answers) else samples[0].stop,
    )
