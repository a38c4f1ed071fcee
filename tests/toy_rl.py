"""Toys for the tests of reinforcement learning: a model that knows the form of an answer, and tasks to learn by reward.

Prompts are one digit from 0 to 3. In the copy task the right response is that digit. In the fork task the work may be
done in one line or by two threads, and is so short that opening threads takes longer: only the critical path differs.
"""

from __future__ import annotations

import random
from pathlib import Path

from plait.formats import open_format, render
from plait.formats.base import Block, Trajectory
from plait.models import response_text
from plait.tasks.vocabulary import TOKENIZER
from plait.train.prompts import Prompt
from plait.tree import Tree

MODEL = {"width": 32, "layers": 1, "heads": 1, "ff": 32, "max_positions": 128}
FORMAT = open_format("multiverse", TOKENIZER)
SERIAL = "".join("1+1=2," for _ in range(4))


def prompt_ids(digit: int) -> tuple[int, ...]:
    return (*TOKENIZER.bos_ids, digit)


BLOCK = Block(outlines=("1", "2"), threads=((SERIAL[:12],), (SERIAL[12:],)), conclusion="2")


def written(trajectory: Trajectory, digit: int) -> Tree:
    return render(trajectory, format=FORMAT, tokenizer=TOKENIZER, prompt_ids=prompt_ids(digit))


def guess(family: str, rng: random.Random, split: str) -> Tree:
    """The copy task, right a little more often than not."""
    digit = rng.randrange(4)
    return written((str(digit if rng.random() < 0.4 else rng.randrange(4)),), digit)


def either(family: str, rng: random.Random, split: str) -> Tree:
    """As often in one line as with two threads of half the work each."""
    return written((SERIAL,) if rng.random() < 0.5 else (BLOCK,), rng.randrange(4))


def copies(family: str, rng: random.Random, split: str) -> Prompt:
    digit = rng.randrange(4)
    return Prompt(
        family=family,
        question=f"copy {digit}",
        prompt_ids=prompt_ids(digit),
        grade=lambda text: text == str(digit),
        baseline_tokens=2.0,
    )


def finishes(family: str, rng: random.Random, split: str) -> Prompt:
    digit = rng.randrange(4)
    right = {response_text(written(trace, digit), TOKENIZER) for trace in ((SERIAL,), (BLOCK,))}
    return Prompt(
        family=family,
        question=f"finish {digit}",
        prompt_ids=prompt_ids(digit),
        grade=lambda text: text in right,
        baseline_tokens=float(len(SERIAL) + 1),
        forks=False,
    )


def sft(out: Path, source: object, *, steps: int, bucket: tuple[int, int]) -> Path:
    """A checkpoint that writes what the source writes."""
    from plait.train.sft import config_from, train

    config = config_from(
        {
            "seed": 3,
            "precision": "fp32",
            "compile": False,
            "model": MODEL,
            "data": {"format": "multiverse", "mixture": {"toy": 1}, "buckets": [bucket]},
            "schedule": {"steps": steps, "warmup_steps": 3},
            "optimiser": {"lr": 0.02},
            "eval": {"times": 0},
        }
    )
    return train(config, out=out, say=lambda line: None, source=source).checkpoint  # pyright: ignore[reportArgumentType]
