"""Random trajectory trees for the training tests: nested forks, all joins, declined forks, forced closings."""

from __future__ import annotations

import random

from plait.tree import Segment, Tree
from plait.types import Context, JoinKind, Merge, StopReason

VOCAB = 23


def random_tree(seed: int, *, joins: tuple[JoinKind, ...] = ("concat", "merge"), depth: int = 3) -> Tree:
    """A finished run; every join draws its kind."""
    rng = random.Random(seed)
    tree = Tree()

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.randint(low, high))]

    def segment(id: str, parent: str | None, forced: list[int], sampled: list[int], **more: object) -> str:
        tree.segments[id] = Segment(
            id=id,
            parent=parent,
            forced_ids=tuple(forced),
            sampled_ids=sampled,
            logprobs=[-0.5] * len(sampled),
            stop=StopReason.STOP if sampled else StopReason.FORCED,
            **more,  # pyright: ignore[reportArgumentType]
        )
        return id

    def thread(name: str, parent: str | None, forced: list[int], depth: int, **more: object) -> str:
        last = segment(f"{name}:0", parent, forced, ids(0, 3), **more)
        for k in range(rng.randint(0, 2) if depth else 0):
            if rng.random() < 0.2:
                last = segment(f"{name}:{k + 1}", last, [], ids(0, 2))
                continue
            join = rng.choice(joins)
            fresh = {"keep": 0} if join == "message" else {}
            branches = [
                thread(f"{name}/{k}.{i}", last, ids(1, 2), depth - 1, **fresh) for i in range(rng.randint(1, 3))
            ]
            keep = {}
            if join == "message" and not any(s.join == "merge" for s in tree.path(last)):
                length = sum(map(len, tree.context(last))) + len(tree.segments[last].sampled_ids)
                keep = {"keep": rng.randint(1, length)}
            last = segment(f"{name}:{k + 1}", last, ids(1, 3), ids(0, 3), joins=tuple(branches), join=join, **keep)
        if rng.random() < 0.3:
            at = int(last.rpartition(":")[2]) + 1
            last = segment(f"{name}:{at}", last, ids(1, 2), [])
        return last

    thread("0", None, ids(1, 4), depth)
    return tree


def expand(context: Context) -> tuple[list[int], list[int], list[set[int]]]:
    """Ids, positions and what each token sees, straight from what a context means."""
    ids: list[int] = []
    positions: list[int] = []
    sees: list[set[int]] = []

    def walk(context: Context, position: int, seen: set[int]) -> tuple[int, set[int]]:
        for part in context:
            if isinstance(part, Merge):
                ends = [walk(branch, position, set(seen)) for branch in part.branches]
                position = max([position, *(end for end, _ in ends)])
                seen = seen.union(*(after for _, after in ends))
                continue
            for token in part:
                seen = seen | {len(ids)}
                ids.append(token)
                positions.append(position)
                sees.append(seen)
                position += 1
        return position, seen

    walk(context, 0, set())
    return ids, positions, sees
