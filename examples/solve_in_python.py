"""Watch one run from Python: every fork, thread and join as it happens, then the tree and what it cost.

    python examples/solve_in_python.py ["What is 347 * 52, 88 + 977 and 612 * 34?"]

Uses the model that ships: no download, no GPU. Leaving the loop early, by a break or an error, cancels every thread.
"""

from __future__ import annotations

import sys

import anyio

import plait
from plait.events import SegmentEnded, SegmentStarted, ThreadForked, TokensSampled


def told(event: plait.Event, model: plait.Model) -> str:
    """One line for an event; tokens as the text that they are."""
    match event:
        case ThreadForked(segment=segment, threads=threads, labels=labels):
            return f"{segment} forks {', '.join(f'{t} ({label})' for t, label in zip(threads, labels, strict=True))}"
        case SegmentStarted(id=id, joins=joins, join=join):
            return f"{id} starts" + (f" after a {join} of {len(joins)} threads" if joins else "")
        case TokensSampled(id=id, token_ids=ids):
            return f"{id} samples {model.tokenizer.decode(ids)!r}"
        case SegmentEnded(id=id, stop=stop, note=note):
            return f"{id} ends: {stop}{f' ({note})' if note else ''}"
        case _:
            return type(event).__name__


async def main(question: str = "What is 347 * 52, 88 + 977 and 612 * 34?") -> None:
    model = plait.load_model()
    request = model.request(question, budget=plait.Budget(max_threads=8, max_tokens=1500, deadline_s=30))
    async with (
        model.open_engine() as engine,
        plait.open_run(request, engine=engine, format=model.format) as run,
    ):
        async for event in run:
            print(told(event, model))
    print()
    for thread in run.tree.threads():
        sampled = [id for name in thread.segments for id in run.tree.segments[name].sampled_ids]
        depth = "  " * thread.name.count("/")
        print(f"{depth}thread {thread.name}: {thread.num_sampled} tokens, {model.tokenizer.decode(sampled)!r}")
    usage = run.tree.usage()
    print(f"\n{question} {model.answer(run.tree)}")
    print(f"{usage.sampled_tokens} tokens, {usage.critical_path_tokens} of them on the critical path")


if __name__ == "__main__":
    anyio.run(lambda: main(*sys.argv[1:]))
