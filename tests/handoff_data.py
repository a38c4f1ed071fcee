"""What the tests of hand-offs share: a tokenizer of transformers over the embedded vocabulary, questions, a grader."""

from __future__ import annotations

import random
from typing import Any

from plait import tasks
from plait.models import gold_model
from plait.tasks.vocabulary import TOKENIZER

FORMAT = "threadweaver"
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def pretrained_tokenizer() -> Any:
    """A fast tokenizer whose chat template is the beginning of a prompt and nothing else."""
    from transformers import PreTrainedTokenizerFast

    from hf_weights import _tokenizer

    tokens = TOKENIZER.tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(TOKENIZER),
        bos_token=tokens[TOKENIZER.bos_ids[0]],
        eos_token=tokens[TOKENIZER.eos_ids[0]],
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


def question(seed: int, family: str = "long_multiplication") -> tuple[str, str]:
    """A prompt as text, and its answer."""
    problem = tasks.sample(tasks.family(family, None), random.Random(seed), "train")
    return tasks.spelled(problem.prompt), str(problem.answer)


def grade(response: str, truth: str) -> bool:
    return tasks.answer_of(response) == truth


def gold_engine() -> Any:
    """Says the gold trace of every question."""
    return gold_model(FORMAT).open_engine()
