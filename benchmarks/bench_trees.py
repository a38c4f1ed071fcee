"""What training on packed trees saves against a row for each engine call, and what it costs against plain sequences.

    python benchmarks/bench_trees.py [--family product] [--format multiverse] [--trees 24] [--runs 5] [--json]

Forward and backward over the gold traces of some problems, three ways: each tree as one packed sequence; each engine
call as a row with its whole context; and the packed rows once more as plain causal sequences of the same shape, whose
visibility is that of one line. Useful tokens are the sampled ones, the same in trees and rows. Eager, float32, one
thread; medians over the runs with their range; the three ways alternate. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import numpy as np
import torch

from plait import tasks
from plait.formats import open_format, render
from plait.models import prompt_ids
from plait.tasks.vocabulary import TOKENIZER
from plait.train.experience import Experience, PolicyBatch, pack
from plait.train.learners import nll
from plait.train.model import Decoder, ModelConfig
from plait.train.packing import Bucket
from plait.train.policy import policy_loss
from plait.train.rl_config import LossConfig
from plait.train.rows import rows
from plait.train.trie import flatten
from plait.tree import Tree

BUCKETS = [
    Bucket(rows=6, length=320),
    Bucket(rows=4, length=512),
    Bucket(rows=3, length=640),
    Bucket(rows=2, length=1088),
]


def gold_trees(family: str, format: str, count: int) -> list[Tree]:
    opened = open_format(format, TOKENIZER)
    trees: list[Tree] = []
    for seed in range(count):
        problem = tasks.sample(family, random.Random(seed), "train")
        ids = prompt_ids(TOKENIZER, problem.prompt)
        trees.append(render(tasks.gold(problem, parallel=True), format=opened, tokenizer=TOKENIZER, prompt_ids=ids))
    return trees


def batches(parts: Sequence[Experience]) -> list[PolicyBatch]:
    return pack(parts, BUCKETS, num_spans=1, pad_id=0)


def causal(batch: PolicyBatch) -> PolicyBatch:
    """The same tokens as one line a row."""
    packed = batch.packed
    slots = packed.token_ids.shape[1]
    line = np.broadcast_to(np.arange(slots), packed.token_ids.shape)
    nothing = np.full_like(packed.hide_lo, slots)
    plain = replace(
        packed,
        position_ids=line.copy(),
        end=np.full_like(packed.end, slots),
        hide_lo=nothing,
        hide_hi=nothing.copy(),
    )
    return replace(batch, packed=plain)


def seconds(model: Decoder, work: Sequence[PolicyBatch]) -> float:
    began = perf_counter()
    for batch in work:
        policy_loss(-nll(model, batch.packed), batch, LossConfig()).backward()
        model.zero_grad(set_to_none=True)
    return perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="product")
    parser.add_argument("--format", default="multiverse")
    parser.add_argument("--trees", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=len(TOKENIZER.tokens), width=128, layers=4, heads=2, ff=384))
    trees = gold_trees(options.family, options.format, options.trees)
    packed = batches([Experience(trie=flatten(tree), advantage=1.0, weight=1.0) for tree in trees])
    ways = {
        "packed trees": packed,
        "a row a call": batches([Experience(trie=row, advantage=1.0, weight=1.0) for t in trees for row in rows(t)]),
        "plain causal": [causal(batch) for batch in packed],
    }
    useful = sum(tree.num_sampled for tree in trees)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for name, work in ways.items():
        seconds(model, work[:1])
        assert name == "plain causal" or sum(b.packed.num_trained for b in work) == useful
    for _ in range(options.runs):
        for name, work in ways.items():
            times[name].append(seconds(model, work))
    report(ways, times, useful, as_json=options.json)


def report(ways: dict[str, list[PolicyBatch]], times: dict[str, list[float]], useful: int, *, as_json: bool) -> None:
    def rate(name: str) -> float:
        return useful / statistics.median(times[name])

    found = {
        name: {
            "computed_tokens": sum(b.packed.num_tokens for b in work),
            "useful_tokens_per_s": round(rate(name), 1),
            "lowest": round(useful / max(times[name]), 1),
            "highest": round(useful / min(times[name]), 1),
        }
        for name, work in ways.items()
    }
    if as_json:
        print(json.dumps({"useful_tokens": useful, **found}))
        return
    print("| | computed tokens | useful tokens/s, median (range) | against packed trees |\n|---|---|---|---|")
    for name, row in found.items():
        print(
            f"| {name} | {row['computed_tokens']:,} | {row['useful_tokens_per_s']:,.0f}"
            f" ({row['lowest']:,.0f} to {row['highest']:,.0f}) | {rate(name) / rate('packed trees'):.2f}x |"
        )


if __name__ == "__main__":
    main()
