"""The engine contract as tests: run `check_engine` on every engine, ours or yours, scripted or with real weights.

Knows engines only by their protocol. Each clause is its own function and fails with an `EngineProtocolError` that
starts with the clause's name. Greedy outputs of real weights may part where two tokens are equally likely up to
rounding: a difference whose two log-probabilities are within `tolerance` counts as a tie and ends the comparison.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import anyio
import anyio.lowlevel

from plait.engines.base import Engine
from plait.errors import (
    ContextLengthError,
    EngineError,
    EngineProtocolError,
    EngineUnavailable,
    RequestError,
    UnsupportedJoin,
)
from plait.settings import one_of, within
from plait.types import Chunk, Context, Merge, SamplingParams, StopReason, context_positions

Reference: TypeAlias = Callable[[Context], Sequence[float]]
"""Log-probabilities of the next token over the vocabulary, computed by other means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What the clauses ask the engine."""

    prompts: tuple[tuple[int, ...], ...]
    """At least three, of different lengths, none shorter than 4 ids."""
    vocab_size: int
    """Ids below this may be sent."""
    max_tokens: int = 12
    tolerance: float = 1e-4
    """Largest difference of two log-probabilities of the same token that counts as rounding."""
    reference: Reference | None = None
    """For C6 and M1; without it C6 scores each token again by the engine itself, and M1 is left out."""
    variants: tuple[Callable[[], Engine], ...] = ()
    """The same engine with other chunk sizes or timings, for C5."""
    timeout_s: float = 300.0
    """Seconds that a clause may take."""

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens)

    @property
    def context(self) -> Context:
        return (self.prompts[0],)


@dataclass(slots=True)
class Output:
    """The joined chunks of a call."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    stop: StopReason | None = None


_LOOKS, _LONG = 5, 1024
_FILLED = 4096
"""An engine with a longer context is not asked to fill it: that takes long where prefill is slow."""
_EXACT = 1e-3
"""A tolerance up to which two batches draw alike, but for a draw that falls right between two tokens."""
Clause: TypeAlias = Callable[[Engine, Case], Awaitable[None]]


async def check_engine(
    make_engine: Callable[[], Engine],
    *,
    vocab_size: int,
    prompts: Sequence[Sequence[int]] | None = None,
    max_tokens: int = 12,
    tolerance: float = 1e-4,
    reference: Reference | None = None,
    variants: Sequence[Callable[[], Engine]] = (),
    skip: Sequence[str] = (),
    clauses: Sequence[str] | None = None,
    timeout_s: float = 300.0,
) -> list[str]:
    """Hold an engine to its contract.

    Args:
        make_engine: Makes it, not started; it is opened once for all clauses.
        vocab_size: Ids below this may be sent.
        prompts: What to continue, at least three of at least 4 ids; by default short pseudo-random ones.
        max_tokens: Length of an ordinary call, at least 2.
        tolerance: Largest difference of log-probabilities, in nats, that is rounding.
        reference: Log-probabilities by other means, for C6 and M1.
        variants: The same engine with other chunk sizes or timing, for C5.
        skip: Clauses to leave out, by name, such as `"C7"`; state the reason beside the call.
        clauses: Check no others; by default all that apply to the engine.
        timeout_s: Seconds that a clause, opening and closing may take each; what takes longer does not hold. An engine
            that blocks the event loop cannot be interrupted.

    Returns:
        Names of the clauses that were checked, in order.

    Raises:
        RequestError: What it is to be asked makes no sense.
        EngineProtocolError: A clause does not hold; the message starts with its name.
    """
    for name in (*skip, *(clauses or ())):
        one_of(name, CLAUSES | REFUSAL | MERGE_CLAUSES, "clause")
    within("vocab_size", vocab_size, 2, whole=True, or_none=False)
    within("max_tokens", max_tokens, 2, whole=True, or_none=False)
    within("tolerance", tolerance, 0, or_none=False)
    within("timeout_s", timeout_s, 0, above=True, or_none=False)
    case = Case(
        vocab_size=vocab_size,
        prompts=_prompts(vocab_size) if prompts is None else tuple(map(tuple, prompts)),
        max_tokens=max_tokens,
        tolerance=tolerance,
        reference=reference,
        variants=tuple(variants),
        timeout_s=timeout_s,
    )
    if len(case.prompts) < 3 or any(len(prompt) < 4 for prompt in case.prompts):
        raise RequestError(f"the prompts have {[*map(len, case.prompts)]} ids; give at least three, of 4 or more each")
    for id in {id for prompt in case.prompts for id in prompt if not 0 <= id < vocab_size}:
        raise RequestError(
            f"a prompt holds the id {id}; with vocab_size={vocab_size} they go from 0 to {vocab_size - 1}"
        )
    checked: list[str] = []
    async with _opened(make_engine, timeout_s) as engine:
        longest = sum(map(len, case.prompts[:3])) if engine.supports_merge else max(map(len, case.prompts))
        if longest + max_tokens > engine.max_context:
            raise RequestError(
                f"the engine's max_context is {engine.max_context}; with these prompts and max_tokens={max_tokens} the"
                f" clauses ask for {longest + max_tokens} positions"
            )
        apply = dict(CLAUSES)
        if engine.supports_merge:
            apply |= MERGE_CLAUSES
            if reference is None:
                del apply["M1"]
        else:
            apply |= REFUSAL
        apply["C10"] = apply.pop("C10")  # last, for it closes the engine
        for name in apply:
            if name not in skip and (clauses is None or name in clauses):
                await check_clause(name, engine, case)
                checked.append(name)
    return checked


async def check_clause(name: str, engine: Engine, case: Case) -> None:
    """Check one clause of an engine that is open.

    Raises:
        EngineProtocolError: It does not hold, or the engine failed while it was checked.
    """
    clause = (CLAUSES | REFUSAL | MERGE_CLAUSES)[name]
    label = f"{name} ({clause.__name__.replace('_', ' ')})"
    try:
        with _limited(label, case.timeout_s):
            await clause(engine, case)
    except EngineProtocolError as exc:
        if str(exc).startswith(label):
            raise
        raise EngineProtocolError(f"{label}: {type(exc).__name__}: {exc}") from exc
    except _Broken as exc:
        raise EngineProtocolError(f"{label}: {exc}") from None
    except Exception as exc:
        raise EngineProtocolError(f"{label}: {type(exc).__name__}: {exc}") from exc


@asynccontextmanager
async def _opened(make_engine: Callable[[], Engine], timeout_s: float) -> AsyncGenerator[Engine, None]:
    """An engine that is opened, and closed, within a limit each."""
    made = make_engine()
    with _limited("opening the engine", timeout_s):
        engine = await made.__aenter__()
    try:
        yield engine
    except BaseException:
        with suppress(Exception), _limited("closing the engine", timeout_s):
            await engine.aclose()
        raise  # what came first
    with _limited("closing the engine", timeout_s):
        try:
            await engine.aclose()
        except Exception as exc:
            raise EngineProtocolError(f"closing the engine: {type(exc).__name__}: {exc}") from exc


@contextmanager
def _limited(what: str, seconds: float) -> Iterator[None]:
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise EngineProtocolError(f"{what}: it hangs; it was not over in {seconds:g} s")


async def greedy_repeats_and_seeds_are_honoured(engine: Engine, case: Case) -> None:
    """C1."""
    for prompt in case.prompts:
        first = await _call(engine, (prompt,), case.params)
        again = await _call(engine, (prompt,), case.params)
        _same(first, again, case, "a second greedy call")
        other = await _call(engine, (prompt,), replace(case.params, seed=1))
        _same(first, other, case, "greedy with another seed")
    hot = replace(case.params, temperature=1.0, seed=7)
    first, again = [await _call(engine, case.context, hot) for _ in range(2)]
    _same(first, again, case, "a second call with the same seed")
    seeds = [await _call(engine, case.context, replace(hot, seed=seed)) for seed in range(8)]
    if all(output.token_ids == seeds[0].token_ids for output in seeds):
        raise _Broken("eight seeds at temperature 1 gave the same output")
    for seed in (-1, 2**63):  # seeds are hashes: any whole number is one
        await _call(engine, case.context, replace(hot, seed=seed, max_tokens=1))


async def greedy_goes_on_where_it_was_cut(engine: Engine, case: Case) -> None:
    """C2: the continuation of context + out[:k] is out[k:], however its runs are cut."""
    for prompt in case.prompts:
        whole = await _call(engine, (prompt,), case.params)
        for k in (1, case.max_tokens // 2, case.max_tokens - 1):
            said = whole.token_ids[:k]
            context: Context = ((*prompt, *said),) if k > 1 else (prompt, said)
            rest = await _call(engine, context, replace(case.params, max_tokens=case.max_tokens - k))
            _same(Output(whole.token_ids[k:], whole.logprobs[k:], whole.stop), rest, case, f"cut after {k}")


async def max_tokens_is_exact(engine: Engine, case: Case) -> None:
    """C3."""
    for n in (1, 2, case.max_tokens):
        output = await _call(engine, case.context, replace(case.params, max_tokens=n))
        if len(output.token_ids) != n or output.stop is not StopReason.LENGTH:
            raise _Broken(f"max_tokens={n} gave {len(output.token_ids)} tokens and {output.stop!r}")


async def a_stop_id_ends_is_included_and_named(engine: Engine, case: Case) -> None:
    """C4: eos ids too, also as the last token there is room for. Banned ids are never sampled, and not all may be."""
    plain = await _call(engine, case.context, case.params)
    id = plain.token_ids[len(plain.token_ids) // 2]
    cut = plain.token_ids[: plain.token_ids.index(id) + 1]
    # Ids of the prompt that are not sampled end nothing, wherever they stand.
    others = tuple({other for prompt in case.prompts for other in prompt} - set(plain.token_ids))[:2]
    for stop, params in (
        (StopReason.STOP, replace(case.params, stop_ids=(*others, id))),
        (StopReason.STOP, replace(case.params, stop_ids=(id,), eos_ids=others)),
        (StopReason.EOS, replace(case.params, stop_ids=others, eos_ids=(id,))),
        (StopReason.STOP, replace(case.params, stop_ids=(id,), max_tokens=len(cut))),
    ):
        output = await _call(engine, case.context, params)
        if output.token_ids != cut or output.stop is not stop:
            raise _Broken(f"{stop} on {id}: got {output.token_ids} and {output.stop!r}, expected {cut} ({params})")
    known = {*plain.token_ids, *others}
    banned = (*others[:1], id, *dict.fromkeys(plain.token_ids))[: max(1, len(known) // 2)]
    for banned_ids in (banned, banned[::-1]):
        output = await _call(engine, case.context, replace(case.params, banned_ids=banned_ids))
        if sampled := set(banned).intersection(output.token_ids):
            raise _Broken(f"of the banned ids {banned_ids}, {sorted(sampled)} were sampled: {output.token_ids}")
    before = engine.stats().decode_tokens
    try:
        output = await _call(engine, case.context, replace(case.params, banned_ids=tuple(range(case.vocab_size))))
    except (RequestError, EngineError):  # the latter by an engine that does not know all ids of its server
        if engine.stats().decode_tokens != before:
            raise _Broken("tokens were sampled before a call was refused that bans all ids") from None
        return
    # The model may have more ids than those that may be sent.
    if min(output.token_ids) < case.vocab_size:
        raise _Broken(f"all ids up to {case.vocab_size} are banned; sampled were {output.token_ids}")


async def chunks_are_whole_whatever_their_size(engine: Engine, case: Case) -> None:
    """C5: the joined output does not depend on chunk sizes or on how fast it is read."""
    fast = await _call(engine, case.context, case.params)
    slow = await _call(engine, case.context, case.params, pause=3)
    _same(fast, slow, case, "read slowly")
    for make in case.variants:
        async with make() as other:
            _same(fast, await _call(other, case.context, case.params), case, "in a variant")


async def logprobs_are_true(engine: Engine, case: Case) -> None:
    """C6: one for each token, at most 0, equal to a re-score within the tolerance; not asked for, any up to 0."""
    for prompt in case.prompts:
        output = await _call(engine, (prompt,), case.params)
        for k, (id, logprob) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            if not logprob <= 0:
                raise _Broken(f"token {k} has log-probability {logprob}")
            context: Context = ((*prompt, *output.token_ids[:k]),)
            if case.reference is not None:
                expected = case.reference(context)[id]
            else:
                again = await _call(engine, context, replace(case.params, max_tokens=1))
                _same(Output((id,), (logprob,), again.stop), again, case, f"token {k} scored again")
                expected = again.logprobs[0]
            if abs(logprob - expected) > case.tolerance:
                raise _Broken(f"token {k} has log-probability {logprob}, a re-score gives {expected}")
    output = await _call(engine, case.context, case.params)
    silent = await _call(engine, case.context, replace(case.params, logprobs=False))
    if not all(logprob <= 0 for logprob in silent.logprobs):
        raise _Broken(f"log-probabilities that were not asked for are {silent.logprobs}")
    _same(output, replace(silent, logprobs=output.logprobs), case, "without log-probabilities")


async def concurrent_calls_equal_serial_ones(engine: Engine, case: Case) -> None:
    """C7: greedy; and where kernels are exact, sampled ones too."""
    contexts: list[Context] = [(prompt[:end],) for prompt in case.prompts for end in (len(prompt), len(prompt) - 1)]
    serial = [await _call(engine, context, case.params) for context in contexts]
    concurrent = [Output() for _ in contexts]

    async def one(i: int) -> None:
        concurrent[i] = await _call(engine, contexts[i], case.params, pause=i % 3)

    async with anyio.create_task_group() as calls:
        for i in range(len(contexts)):
            calls.start_soon(one, i)
    for a, b in zip(serial, concurrent, strict=True):
        _same(a, b, case, "beside others")
    if case.tolerance > _EXACT:
        return
    contexts, params = [case.context] * 4, [replace(case.params, temperature=1.0, seed=seed) for seed in range(4)]
    serial = [await _call(engine, case.context, p) for p in params]
    concurrent = [Output() for _ in contexts]

    async def hot(i: int) -> None:
        concurrent[i] = await _call(engine, contexts[i], params[i])

    async with anyio.create_task_group() as calls:
        for i in range(len(contexts)):
            calls.start_soon(hot, i)
    others = sum(a.token_ids != b.token_ids for a, b in zip(serial, concurrent, strict=True))
    if others > (len(contexts) // 2 if case.tolerance else 0):
        raise _Broken(f"{others} of {len(contexts)} calls with seeds sample other tokens beside each other than alone")


async def a_closed_stream_is_freed(engine: Engine, case: Case) -> None:
    """C8: within a second, whether closed by hand, by an error, or by cancellation before or after the first chunk.

    What is freed is seen in `stats().active`, so that has to show a call which runs.
    """
    params = replace(case.params, max_tokens=max(case.max_tokens, 64))
    room = engine.max_context - context_positions(case.context)
    long = replace(params, max_tokens=max(1, min(_LONG, room)))
    for _ in range(_LOOKS):  # a call may be over before anybody looks
        if await _shows(engine, case.context, long):
            break
    else:
        raise _Broken("stats().active was 0 all the time while calls ran")
    async with aclosing(engine.generate(case.context, params)) as chunks:
        await anext(chunks)
    await _idle(engine, "after aclose()")
    try:
        async with aclosing(engine.generate(case.context, params)) as chunks:
            await anext(chunks)
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    await _idle(engine, "after an error in the reader")
    for seconds in (0.0, 0.005):
        with anyio.move_on_after(seconds):
            await _call(engine, case.context, params, pause=50)
        await _idle(engine, f"after a cancellation at {seconds} s")
    alike = await _call(engine, case.context, case.params)
    if not alike.token_ids:
        raise _Broken("no output after cancelled calls")


async def an_overlong_prompt_is_refused(engine: Engine, case: Case) -> None:
    """C9: before sampling, as `stats().decode_tokens` shows."""
    before = engine.stats().decode_tokens
    await _call(engine, case.context, case.params)
    await _idle(engine, "after a call")
    with anyio.move_on_after(1):
        while engine.stats().decode_tokens == before:  # noqa: ASYNC110 - an engine has no event to wait for
            await anyio.sleep(0.005)
    if engine.stats().decode_tokens == before:
        raise _Broken(f"stats().decode_tokens is still {before} a second after a call that sampled")
    before = engine.stats().decode_tokens
    room = engine.max_context
    ids = (case.prompts[0] * (room // len(case.prompts[0]) + 1))[: room + 1]
    for size in (room + 1, room):
        try:
            await _call(engine, (ids[:size],), case.params)
        except ContextLengthError:
            if engine.stats().decode_tokens != before:
                raise _Broken("tokens were sampled before it was refused") from None
        else:
            raise _Broken(f"a prompt of {size} ids was accepted; max_context is {room}, with one to sample")
    await _idle(engine, "after an overlong prompt")
    if room <= _FILLED:
        output = await _call(engine, (ids[: room - 1],), case.params)
        if len(output.token_ids) != 1 or output.stop is not StopReason.LENGTH:
            raise _Broken(f"a prompt that leaves one position gave {output.token_ids} and {output.stop!r}")


async def closing_twice_is_fine_and_use_after_it_fails(engine: Engine, case: Case) -> None:
    """C10: and a call that runs meanwhile ends, with an `EngineError` if not by itself."""
    room = engine.max_context - context_positions(case.context)
    long = replace(case.params, max_tokens=max(1, min(_LONG, room)))
    async with aclosing(engine.generate(case.context, long)) as chunks:
        await anext(chunks)
        await engine.aclose()
        await engine.aclose()
        with suppress(EngineError):
            async for _ in chunks:
                pass
    try:
        await _call(engine, case.context, case.params)
    except EngineUnavailable:
        return
    raise _Broken("generate() still works after aclose()")


async def merge_matches_the_reference(engine: Engine, case: Case) -> None:
    """M1: log-probabilities after a merge equal a reference forward with explicit mask and positions."""
    assert case.reference is not None, "M1 needs a reference"
    for context in _merges(case):
        output = await _call(engine, context, case.params)
        for k, (id, logprob) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            tail = context[-1]
            assert not isinstance(tail, Merge)
            expected = case.reference((*context[:-1], (*tail, *output.token_ids[:k])))
            if abs(logprob - expected[id]) > case.tolerance:
                raise _Broken(f"token {k} has log-probability {logprob}, the reference gives {expected[id]}")
            if max(expected) - expected[id] > case.tolerance:
                raise _Broken(f"token {k} is {id}; the reference prefers another by {max(expected) - expected[id]}")


async def merge_of_one_branch_is_the_branch(engine: Engine, case: Case) -> None:
    """M2."""
    a, b, c = case.prompts[:3]
    plain = await _call(engine, ((*a, *b, *c),), case.params)
    _same(plain, await _call(engine, (a, Merge(((b,),)), c), case.params), case, "as a merge")
    try:
        await _call(engine, (a, Merge(((b,), (c,)))), case.params)
    except RequestError:
        return
    raise _Broken("a context that ends with a merge was accepted; no logits follow one")


async def order_of_branches_does_not_matter(engine: Engine, case: Case) -> None:
    """M3: beyond rounding."""
    for context in _merges(case):
        one = await _call(engine, context, case.params)
        _same(one, await _call(engine, _turned(context), case.params), case, "with the branches turned round")


async def merge_is_refused(engine: Engine, case: Case) -> None:
    """M0: by an engine without `supports_merge`, before sampling."""
    before = engine.stats().decode_tokens
    try:
        await _call(engine, _merges(case)[0], case.params)
    except UnsupportedJoin:
        if engine.stats().decode_tokens != before:
            raise _Broken("tokens were sampled before it was refused") from None
        return
    raise _Broken("a context with a merge was accepted, but supports_merge is False")


CLAUSES: dict[str, Clause] = {
    "C1": greedy_repeats_and_seeds_are_honoured,
    "C2": greedy_goes_on_where_it_was_cut,
    "C3": max_tokens_is_exact,
    "C4": a_stop_id_ends_is_included_and_named,
    "C5": chunks_are_whole_whatever_their_size,
    "C6": logprobs_are_true,
    "C7": concurrent_calls_equal_serial_ones,
    "C8": a_closed_stream_is_freed,
    "C9": an_overlong_prompt_is_refused,
    "C10": closing_twice_is_fine_and_use_after_it_fails,
}
REFUSAL: dict[str, Clause] = {"M0": merge_is_refused}
"""Where an engine does not merge."""
MERGE_CLAUSES: dict[str, Clause] = {
    "M1": merge_matches_the_reference,
    "M2": merge_of_one_branch_is_the_branch,
    "M3": order_of_branches_does_not_matter,
}


class _Broken(Exception):
    """A clause does not hold."""


async def _call(engine: Engine, context: Context, params: SamplingParams, *, pause: int = 0) -> Output:
    """Read a call to its end, with `pause` checkpoints after each chunk, and hold each chunk to its shape."""
    chunks: list[Chunk] = []
    async with aclosing(engine.generate(context, params)) as stream:
        async for chunk in stream:
            chunks.append(chunk)
            for _ in range(pause):
                await anyio.lowlevel.checkpoint()
    for chunk, following in pairwise(chunks):
        if chunk.stop is not None:
            raise _Broken(f"a chunk with stop={chunk.stop!r} is followed by {following}")
    if not chunks or chunks[-1].stop is None:
        raise _Broken("the stream ended without a stop reason in its last chunk")
    if any(len(chunk.token_ids) != len(chunk.logprobs) for chunk in chunks):
        raise _Broken("a chunk has not one log-probability for each token")
    return Output(
        tuple(id for chunk in chunks for id in chunk.token_ids),
        tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        chunks[-1].stop,
    )


def _same(a: Output, b: Output, case: Case, what: str) -> None:
    """Equal tokens and stop, log-probabilities within the tolerance; a tie between two tokens ends the comparison."""
    for k, (id_a, id_b) in enumerate(zip(a.token_ids, b.token_ids, strict=False)):
        apart = abs(a.logprobs[k] - b.logprobs[k])
        if id_a != id_b and apart <= case.tolerance and case.tolerance > 0:
            return
        if id_a != id_b:
            raise _Broken(f"{what}: token {k} is {id_b}, before it was {id_a} (of {a.token_ids})")
        if apart > case.tolerance or math.isnan(apart):
            raise _Broken(f"{what}: log-probability of token {k} is {b.logprobs[k]}, before it was {a.logprobs[k]}")
    if len(a.token_ids) != len(b.token_ids) or a.stop is not b.stop:
        raise _Broken(f"{what}: {len(b.token_ids)} tokens and {b.stop!r}, before {len(a.token_ids)} and {a.stop!r}")


async def _shows(engine: Engine, context: Context, params: SamplingParams) -> bool:
    """Whether `active` is seen above 0 during a call."""
    seen = over = False

    async def look() -> None:
        nonlocal seen
        while not (seen or over):
            seen = engine.stats().active > 0
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look)
        try:
            await _call(engine, context, params, pause=2)
        finally:
            over = True
    return seen


async def _idle(engine: Engine, when: str) -> None:
    with anyio.move_on_after(1):
        while engine.stats().active:  # noqa: ASYNC110 - an engine has no event to wait for
            await anyio.sleep(0.005)
    if engine.stats().active:
        raise _Broken(f"{engine.stats().active} calls still active a second {when}")


def _turned(context: Context) -> Context:
    """With the branches of every merge in reverse order."""
    return tuple(
        Merge(tuple(_turned(branch) for branch in part.branches[::-1])) if isinstance(part, Merge) else part
        for part in context
    )


def _merges(case: Case) -> list[Context]:
    """Two branches of unequal length; three; one inside another; two that are alike, and nothing before them."""
    a, b, c = case.prompts[:3]
    pair = Merge(((b,), (c,)))
    return [
        (a, pair, b[:2]),
        (a, Merge(((c[:3],), (b,), (c,))), c[:1]),
        (a, Merge(((b, pair, c[:1]), (c,))), a[:2]),
        (Merge(((a,), (b,), (b,))), c[:2]),
    ]


def _prompts(vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Three pseudo-random prompts of different lengths."""
    return tuple(tuple((i * i * 7 + i * n * 5 + n) % vocab_size for i in range(n)) for n in (9, 5, 7))
