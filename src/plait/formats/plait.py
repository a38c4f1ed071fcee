"""Plait's own format: ThreadWeaver's grammar, and in it nested blocks, dependencies, races and conclusions.

    <Parallel>
    <Outlines>?
    <Outline>1: plan</Outline>
    <Outline>2(1): plan</Outline>
    </Outlines>
    <Thread>
    1: what thread 1 wrote
    <Conclusion>what its parent reads</Conclusion>
    </Thread><Thread>
    2: what thread 2 wrote
    </Thread>
    </Parallel>

A ThreadWeaver trajectory is one of this format and means the same. `2(1)` waits for thread 1 and reads its conclusion;
`?` marks a race (never together with `(1)`): the first thread that concludes ends the block. The specification, with
its reasons, is docs/formats.md. Every tag is one of ThreadWeaver's, so a vocabulary that has those has this format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from plait.formats.base import Block, BudgetLevels, ThreadOutcome, ids
from plait.formats.tagged import NUMBER
from plait.formats.threadweaver import ThreadWeaver
from plait.tokenizer import Tokenizer
from plait.types import Budget, JoinKind

_NUMBERED = re.compile(rf"\s*({NUMBER})\s*(?:\(([^()]*)\))?\s*:\s*(.*?)\s*$", re.DOTALL)
_RACE = "?"
_BUDGET = re.compile(r"!(\d+|-),([1-9]\d*|-)!")


class Plait(ThreadWeaver):
    """Nested blocks, dependencies, races, conclusions; concat join, of conclusions where there are some."""

    name: str = "plait"
    paper: str = "docs/formats.md"
    join_kind: JoinKind = "concat"
    returns: str = "Conclusion"
    nested: bool = True
    dependent: bool = True
    racing: bool = True

    def __init__(self, tokenizer: Tokenizer, *, levels: BudgetLevels | None = None) -> None:
        super().__init__(tokenizer)
        self.levels = levels
        self._return_open = self.control_id(tokenizer, "<Conclusion>")
        self._return_close = self.control_id(tokenizer, "</Conclusion>")
        self._lead = ids(tokenizer, self.lead)
        self._closer = ids(tokenizer, self.closer_text())

    def numbered(self, text: str) -> tuple[str, str, tuple[str, ...]] | None:
        match = _NUMBERED.match(text)
        if match is None:
            return None
        return match[1], match[3], tuple(name.strip() for name in (match[2] or "").split(",") if name.strip())

    def is_race(self, head: str) -> bool:
        return head.strip() == _RACE

    def outline_text(self, block: Block, i: int) -> str:
        needs = ",".join(str(n + 1) for n in block.needs[i]) if block.needs else ""
        return f"<Outline>{i + 1}{f'({needs})' if needs else ''}: {block.outlines[i]}</Outline>"

    def open_text(self, block: Block) -> str:
        text = super().open_text(block)
        return text.replace("<Outlines>", f"<Outlines>{_RACE}", 1) if block.race else text

    def end_text(self, returns: str | None, number: int = 1) -> str:
        told = "" if returns is None else f"\n<Conclusion>{returns}</Conclusion>"
        return f"{told}{self.closer_text()}"

    def closer_ids(self, outcome: ThreadOutcome) -> tuple[int, ...]:
        closer = super().closer_ids(outcome)
        for id in reversed(outcome.token_ids) if closer else ():
            if id == self._return_close:
                break
            if id == self._return_open:
                return (self._return_close, *closer)
        return closer

    def succeeded(self, outcome: ThreadOutcome) -> bool:
        """A thread of a race that ends with a conclusion has found what was searched."""
        told = self._returned(outcome)
        return told is not None and bool(self._tokenizer.decode(told).strip())

    def told(self, thread: ThreadOutcome) -> tuple[int, ...] | None:
        if thread.won is False:
            return self._closer
        told = self._returned(thread)
        return None if told is None else (*self._lead, *told, *self._closer)

    def _returned(self, thread: ThreadOutcome) -> tuple[int, ...] | None:
        """Its last conclusion, without tags; one that was not closed reaches to the thread's end."""
        told = thread.token_ids
        if self._return_open not in told:
            return None
        at = len(told) - told[::-1].index(self._return_open)
        ends = (self._return_close, self._thread_close, *self._eos)
        end = next((i for i in range(at, len(told)) if told[i] in ends), len(told))
        return told[at:end]

    def condition(self, prompt_ids: Sequence[int], budget: Budget) -> tuple[int, ...]:
        """Threads and tokens before the prompt, `!8,512!`: powers of two, so that a model meets few of them."""
        told = budget if self.levels is None else self.levels.within(budget)
        text = f"!{_level(told.max_threads)},{_level(told.max_tokens)}!"
        at = self._start(prompt_ids)
        return (*prompt_ids[:at], *self._tokenizer.encode(text), *prompt_ids[at:])

    def conditioned(self, prompt_ids: Sequence[int]) -> tuple[Budget, tuple[int, ...]]:
        at = self._start(prompt_ids)
        text = self._tokenizer.decode(prompt_ids[at:])
        match = _BUDGET.match(text)
        if match is None:
            return super().conditioned(prompt_ids)
        threads, tokens = (None if said == "-" else int(said) for said in match.groups())
        rest = prompt_ids[at + len(self._tokenizer.encode(match[0])) :]
        return Budget(max_threads=threads, max_tokens=tokens), (*prompt_ids[:at], *rest)

    def _start(self, prompt_ids: Sequence[int]) -> int:
        """Where the text of a prompt begins."""
        bos = self._tokenizer.bos_ids
        return len(bos) if tuple(prompt_ids[: len(bos)]) == bos else 0

    def _unspaced(self, text: str) -> str:
        return text


def _level(limit: int | None) -> str:
    """The largest power of two that a limit allows: a model is never promised more than there is."""
    if limit is None:
        return "-"
    return str(1 << (limit.bit_length() - 1)) if limit else "0"
