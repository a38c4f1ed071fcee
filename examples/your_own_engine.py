"""An engine of one's own: a table of n-grams as a language model, held to the contract that every engine keeps.

    python examples/your_own_engine.py

An engine continues token ids and knows nothing of threads. This one has read one trajectory of ThreadWeaver's, so it
asks for a fork like any model that was trained on such: the runtime makes the calls, the table says what comes next.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import AsyncGenerator

import anyio
import anyio.lowlevel

import plait
from plait.errors import ContextLengthError, EngineUnavailable, RequestError, UnsupportedJoin
from plait.formats import CharTokenizer, format_class
from plait.testing import check_engine
from plait.types import context_merges, context_positions

READ = """<Parallel>\n<Outlines>\n<Outline>1: rows</Outline>\n<Outline>2: bag</Outline>\n</Outlines>
<Thread>\n1: 12 * 3 = 36\n</Thread><Thread>\n2: 40 + 8 = 48\n</Thread>\n</Parallel>\nIn all 84."""
WEAVER = format_class("threadweaver")
TOKENIZER = CharTokenizer(WEAVER.tags())
VOCAB_SIZE = len(TOKENIZER.control) + 128
ORDER = 8


class NGrams(plait.Engine):
    """Says what followed the same characters in what it has read."""

    name, max_context, supports_merge = "ngrams", 1024, False

    def __init__(self) -> None:
        self.active = self.decoded = 0
        self.closed = False
        self.table: dict[tuple[int, ...], Counter[int]] = {}
        read = (*TOKENIZER.bos_ids, *TOKENIZER.encode(READ, special=True), *TOKENIZER.eos_ids)
        for at, id in enumerate(read):
            for n in range(min(ORDER, at) + 1):
                self.table.setdefault(read[at - n : at], Counter())[id] += 1

    async def generate(self, context: plait.Context, params: plait.SamplingParams) -> AsyncGenerator[plait.Chunk, None]:
        ids = [id for part in context if isinstance(part, tuple) for id in part]
        room = min(params.max_tokens, self.max_context - context_positions(context))
        if self.closed:
            raise EngineUnavailable("the n-gram engine is closed")
        if any(context_merges(context)):
            raise UnsupportedJoin("the n-gram engine has no keys and values to merge")
        if room < 1:
            raise ContextLengthError(f"at most {self.max_context - 1} ids fit")
        allowed = [id for id in range(VOCAB_SIZE) if id not in params.banned_ids]
        if not allowed:
            raise RequestError("all ids are banned; leave one")
        draws, stop = random.Random(params.seed), None
        self.active += 1
        try:
            while stop is None:
                await anyio.lowlevel.checkpoint()
                logprobs = self.logprobs(ids)
                # Gumbel's trick: at temperature 0 the likeliest id, else one drawn by its probability.
                gumbel = [-params.temperature * math.log(draws.expovariate(1)) for _ in allowed]
                _, id = max((logprobs[id] + noise, id) for id, noise in zip(allowed, gumbel, strict=True))
                ids.append(id)
                room -= 1
                self.decoded += 1
                stop = params.stop_at(id, full=not room)
                yield plait.Chunk(token_ids=(id,), logprobs=(logprobs[id],), stop=stop)
        finally:
            self.active -= 1

    def logprobs(self, ids: list[int]) -> list[float]:
        """Of every next id: by what followed the longest end of these that was read."""
        ends = (tuple(ids[at:]) for at in range(max(0, len(ids) - ORDER), len(ids) + 1))
        seen = next(self.table[end] for end in ends if end in self.table)
        total = seen.total() + 1e-3 * VOCAB_SIZE
        return [math.log((seen[id] + 1e-3) / total) for id in range(VOCAB_SIZE)]

    def stats(self) -> plait.EngineStats:
        return plait.EngineStats(active=self.active, decode_tokens=self.decoded)

    async def aclose(self) -> None:
        self.closed = True


async def main() -> None:
    print("the contract holds:", *await check_engine(NGrams, vocab_size=VOCAB_SIZE))
    async with NGrams() as engine:
        request = plait.Request(prompt_ids=TOKENIZER.bos_ids, budget=plait.Budget(max_tokens=400))
        tree = await plait.run(request, engine=engine, format=WEAVER(TOKENIZER))
    for segment in tree.segments.values():
        print(f"{segment.id} ({segment.join}): {TOKENIZER.decode(segment.sampled_ids)!r}")


if __name__ == "__main__":
    anyio.run(main)
