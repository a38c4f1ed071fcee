"""Rewards as small functions that add up: each looks at one outcome and the group it is in, and gives a number.

They see what a run was (`Outcome`), never its prompt: a right answer that stands only in the prompt earns nothing, and
tokens are those of the response. Knows nothing of engines, formats and torch.

Some functions are the whole reward of a paper and stand alone (`parallel_r1`, `npr`); the others add up. Recommended:
`correctness` + `latency` + `format_validity`. Of the terms for speed only `latency` cannot be gamed with side threads
that do nothing: it compares the critical path with a number that the policy does not influence.

Symbols: c is 1 for a right answer, else 0; T tokens of the response, L those on its longest chain, both as ThreadWeaver
counts them; C sampled tokens on the critical path; S sampled tokens of a sequential solution of the same problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

from plait.errors import RequestError
from plait.registry import Registry
from plait.settings import of_type, one_of, parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What rewards may know of one rollout."""

    correct: bool
    """Graded on what the root thread sampled."""
    forks: int = 0
    """Blocks of threads that were opened."""
    threads: int = 0
    """Forked threads."""
    closed_threads: int = 0
    """Forked threads that ended themselves."""
    faults: tuple[str, ...] = ()
    """Where the format was not kept, in plain words."""
    limited: int = 0
    """Segments that a limit of tokens, threads, time or context ended."""
    segments: int = 1
    response_tokens: int = 0
    """T: sampled and inserted, the prompt not counted, each thread once."""
    token_latency: int = 0
    """L: T without what lies beside the longest thread of each block."""
    sampled_tokens: int = 0
    critical_path_tokens: int = 0
    """C: sampled tokens on the longest dependent chain."""
    baseline_tokens: float | None = None
    """S: sampled tokens of a sequential solution of the same problem; None where nobody said."""
    error: str = ""
    """What failed in the system, not in the model; empty where nothing did."""

    @property
    def acceleration(self) -> float:
        """eta = 1 - L/T, from 0 to below 1; not a speedup."""
        return 1 - self.token_latency / self.response_tokens if self.response_tokens else 0.0

    @property
    def valid(self) -> bool:
        """Whether the format was kept throughout."""
        return not self.faults and not self.error


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All rollouts of one prompt, and when in the training they were sampled."""

    outcomes: Sequence[Outcome]
    step: int = 0
    done: float = 0.0
    """Share of the training that is over."""


Term: TypeAlias = Callable[[Outcome, Group], float]


def correctness(outcome: Outcome, group: Group, *, right: float = 1.0, wrong: float = 0.0) -> float:
    """R = right where c, else wrong.

    ThreadWeaver's paper and README use 1 and 0; its released code 1 and -1, which with mean-centred advantages doubles
    the weight of being right against being fast. Source: ThreadWeaver (arXiv:2512.07843) section 4.
    """
    return right if outcome.correct else wrong


def acceleration(
    outcome: Outcome,
    group: Group,
    *,
    variant: Literal["paper", "code", "readme"] = "paper",
    rho: float = 0.5,
    clip: float = 0.2,
) -> float:
    """ThreadWeaver's bonus for parallel tokens, in the three forms that were published, 0 where the answer is wrong.

        paper    c * min(rho * eta, clip)           up to 0.2, reached at eta = 0.4
        code     c * rho * min(eta, clip)           up to 0.1, reached at eta = 0.2
        readme   c * rho * min(T/L - 1, clip)       up to 0.1, reached at T/L = 1.2

    All three rise when threads that do nothing are added beside a long one, for that raises T and not L: see `latency`.
    T and L leave out the prompt, which the released code counts in. The README says sequential over parallel cost; T/L
    of the same run is our reading of that. Source: arXiv:2512.07843 eq. 7, and its repository's reward function and
    README.
    """
    if not outcome.correct:
        return 0.0
    eta = outcome.acceleration
    if variant == "paper":
        return min(rho * eta, clip)
    if variant == "code":
        return rho * min(eta, clip)
    return rho * min(1 / (1 - eta) - 1, clip)


def latency(outcome: Outcome, group: Group, *, weight: float = 0.5, floor: float = -1.0) -> float:
    """Time saved against a sequential solution: c * weight * max(floor, 1 - C/S).

    S does not depend on the policy, so a thread that does nothing earns nothing: it cannot shorten C, and the outline
    that opened it lengthens C. Slower than the baseline is negative, but with `weight * -floor` below what a right
    answer earns, no wrong answer is worth more than a right one.

    Source: the sequential-baseline latency of APR evaluations (arXiv:2504.15466; speedup as in ThreadWeaver's table 1)
    as a reward; ours.
    """
    if not outcome.correct or not outcome.baseline_tokens:
        return 0.0
    return weight * max(floor, 1 - outcome.critical_path_tokens / outcome.baseline_tokens)


def format_validity(outcome: Outcome, group: Group, *, penalty: float = 0.5) -> float:
    """-penalty where the format was not kept, else 0. ThreadWeaver's released reward has no such term."""
    return 0.0 if outcome.valid else -penalty


def budget_adherence(outcome: Outcome, group: Group, *, penalty: float = 0.5) -> float:
    """-penalty * share of the run's segments that a limit ended. A right answer cut off elsewhere still costs."""
    return -penalty * min(1.0, outcome.limited / max(1, outcome.segments))


def length_penalty(
    outcome: Outcome,
    group: Group,
    *,
    beta: float = 0.2,
    tau: float = 0.8,
    scale: float = 10_000.0,
    measure: Literal["token_latency", "critical_path_tokens", "sampled_tokens"] = "token_latency",
) -> float:
    """Longer than the shortest right rollout of the group costs, as far as the group is right already.

        acc    = share of the group that is right
        alpha  = 0 if acc < tau, else beta * (acc - tau + eps) / (1 - tau + eps)
        R      = -alpha * clip((length - shortest right length) / scale, 0, 1)

    Source: the group-wise length penalty of ThreadWeaver's released code (off by default there), where `scale` is
    10,000 tokens: set it to the length of your own responses.
    """
    right = [getattr(o, measure) for o in group.outcomes if o.correct]
    share = len(right) / len(group.outcomes)
    if not right or share < tau:
        return 0.0
    alpha = beta * (share - tau + _EPS) / (1 - tau + _EPS)
    return -alpha * min(1.0, max(0.0, (getattr(outcome, measure) - min(right)) / scale))


def parallel_r1(
    outcome: Outcome,
    group: Group,
    *,
    schedule: Literal["S1", "S2"] = "S2",
    period: int = 10,
    parallel_steps: int = 2,
    bonus: float = 0.2,
) -> float:
    """Parallel-R1's whole reward, by the step of the training.

        S1, and S2 in the first `period - parallel_steps` steps of every period:    1 if c else -1
        S2 in the others:    1 + bonus if c with well-formed threads, 1 if c without, else -1

    Source: Parallel-R1 (Zheng et al. 2025, arXiv:2509.07980): 8 of every 10 steps pay for accuracy alone.
    """
    if not outcome.correct:
        return -1.0
    pays = schedule == "S2" and group.step % period >= period - parallel_steps
    return 1.0 + bonus if pays and outcome.forks and outcome.valid else 1.0


def npr(outcome: Outcome, group: Group, *, stage: Literal[1, 3] = 1, severity: float = 2.0) -> float:
    """NPR's whole reward.

        stage 1    c and valid: 1;  c alone: -f;  valid alone: -1;  neither: -1 - f;  f = severity * share of faults
        stage 3    1 if c else -1, with advantages normalised over the batch ("batch_std")

    f is in (0, severity]: the ranges are the paper's, the share of segments at fault is ours (the paper does not say
    how it grades a malformed trace). Source: Native Parallel Reasoner (Wu et al. 2025, arXiv:2512.07461).
    """
    if stage == 3 or outcome.valid:
        return 1.0 if outcome.correct else -1.0
    fault = severity * min(1.0, max(1, len(outcome.faults)) / max(1, outcome.segments))
    return -fault if outcome.correct else -1.0 - fault


def kimi(outcome: Outcome, group: Group, *, parallel: float = 0.2, finish: float = 0.2, anneal: float = 0.5) -> float:
    """Auxiliary rewards for using threads at all and for finishing them, fading out; add `correctness`.

        R = a * (parallel * [forked] + finish * closed threads / threads),    a = max(0, 1 - done / anneal)

    Pays for structure whatever the answer is, so it must fade: `anneal` is the share of the training after which it is
    gone. Against serial collapse (never forking) and spurious parallelism (threads that are left unfinished).
    Source: PARL of Kimi K2.5 (Moonshot 2026): l1 * r_parallel + l2 * r_finish + r_perf with l1, l2 annealed to zero;
    how its two terms are measured is not published, this is the plainest reading.
    """
    fade = max(0.0, 1 - group.done / anneal) if anneal > 0 else 0.0
    finished = outcome.closed_threads / outcome.threads if outcome.threads else 0.0
    return fade * (parallel * (outcome.forks > 0) + finish * finished)


_EPS = 1e-6

TERMS: Registry[Callable[..., float]] = Registry(
    "plait.rewards",
    "reward term",
    {
        f.__name__: f
        for f in (
            correctness,
            acceleration,
            latency,
            format_validity,
            budget_adherence,
            length_penalty,
            parallel_r1,
            npr,
            kimi,
        )
    },
    of=Callable,
)
"""Functions of an outcome and its group; what can be set of one are its keyword-only parameters."""


@dataclass(frozen=True, slots=True)
class Reward:
    """A sum of terms.

    Args:
        options: For each term by name, its options: `{"correctness": {}, "latency": {"weight": 0.5}}`.

    Raises:
        RequestError: No term has this name, or it has no such option.
    """

    options: Mapping[str, Mapping[str, Any]]
    terms: Mapping[str, Term] = field(init=False)

    def __post_init__(self) -> None:
        if not self.options:
            raise RequestError(f"the reward has no term; known: {', '.join(sorted(TERMS))}")
        object.__setattr__(self, "terms", {name: _term(name, given) for name, given in self.options.items()})

    def parts(self, outcome: Outcome, group: Group) -> dict[str, float]:
        """What each term gives; the reward is their sum."""
        return {name: float(term(outcome, group)) for name, term in self.terms.items()}

    def __call__(self, outcome: Outcome, group: Group) -> float:
        return sum(self.parts(outcome, group).values())


def _term(name: str, options: Mapping[str, Any]) -> Term:
    known = {p.name: p for p in parameters(TERMS[name]).values() if p.kind is p.KEYWORD_ONLY}
    for option, value in options.items():
        one_of(option, known, f"option of the reward term {name}")
        of_type(known[option].annotation, value, name=f"{option} of the reward term {name}")
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise RequestError(f"the reward term {name} needs {option}")
    return partial(TERMS[name], **options)
