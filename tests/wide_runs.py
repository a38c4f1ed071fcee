"""Synthetic runs of many segments, for what has to be fast or harmless: forks, joins, threads that were ended."""

from __future__ import annotations

import random
from collections.abc import Sequence

from plait.events import Event, RunEnded, RunStarted, SegmentEnded, SegmentStarted, ThreadForked, TokensSampled
from plait.types import JoinKind, StopReason

HOSTILE = (
    "<script>window.hit = 1</script>",
    "<img src=x onerror=window.hit=1>",
    "</script><script>window.hit = 1</script>",
    "{{script}}",
    "<!--",
    "\u202e\u0000\ud800",
    "javascript:window.hit=1",
    '"><svg onload=window.hit=1>',
)
WORDS = ("the ", " so", " a", "12", "7", "=", "+", "Sum: ", "<Path>", "</Path>", *HOSTILE)


def wide_run(num_segments: int, *, seed: int = 0, question: str = "A run of many threads") -> list[Event]:
    """A finished run of at least so many segments, whose tokens are now and then hostile."""
    return _Writer(seed, question).run(num_segments)


class _Writer:
    def __init__(self, seed: int, question: str) -> None:
        self.rng = random.Random(seed)
        tokenizer = {"tokens": list(WORDS), "control": ["<Path>", "</Path>"], "bos": "<Path>", "eos": "</Path>"}
        self.events: list[Event] = [RunStarted(meta={"question": question, "model": "wide", "tokenizer": tokenizer})]
        self.num_segments = 0

    def run(self, num_segments: int) -> list[Event]:
        t, block, parent, joins = 0.0, 0, None, ()
        while self.num_segments < num_segments:
            id = f"0:{block}"
            t = self.segment(id, parent, t, 12, joins)
            names = tuple(f"0/{block}.{i}" for i in range(self.rng.randint(2, 9)))
            labels = tuple(HOSTILE[i % len(HOSTILE)] for i in range(len(names)))
            self.events.append(ThreadForked(segment=id, threads=names, labels=labels))
            ends = [self.thread(name, id, t) for name in names]
            t, parent, joins, block = max(t for _, t in ends), id, tuple(last for last, _ in ends), block + 1
        t = self.segment(f"0:{block}", parent, t, 6, joins, StopReason.EOS)
        self.events.append(RunEnded(stop=StopReason.EOS, t=t))
        return self.events

    def thread(self, name: str, parent: str, t: float) -> tuple[str, float]:
        stop = self.rng.choices([StopReason.STOP, StopReason.CANCELLED, StopReason.BUDGET], [90, 3, 7])[0]
        t = self.segment(f"{name}:0", parent, t, self.rng.randint(4, 60), (), stop)
        if stop is not StopReason.BUDGET:
            return f"{name}:0", t
        return f"{name}:1", self.segment(f"{name}:1", f"{name}:0", t, 0, (), StopReason.FORCED)

    def segment(
        self,
        id: str,
        parent: str | None,
        t: float,
        num_sampled: int,
        joins: Sequence[str] = (),
        stop: StopReason = StopReason.STOP,
    ) -> float:
        join: JoinKind = "merge" if joins else "none"
        start = SegmentStarted(id=id, parent=parent, forced_ids=(8, 0), joins=tuple(joins), join=join, t=t)
        self.events.append(start)
        self.num_segments += 1
        for _ in range(0, num_sampled, 6):
            t += 0.006 * self.rng.uniform(0.8, 1.3)
            ids = tuple(self.rng.choices(range(len(WORDS)), [8] * 8 + [1] * (len(WORDS) - 8), k=6))
            logprobs = tuple(-self.rng.expovariate(4) for _ in ids)
            self.events.append(TokensSampled(id=id, token_ids=ids, logprobs=logprobs, t=t))
        note = "" if stop in (StopReason.STOP, StopReason.EOS) else HOSTILE[1]
        self.events.append(SegmentEnded(id=id, stop=stop, note=note, t=t))
        return t
