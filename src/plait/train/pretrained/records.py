r"""Data in files: a JSON object a line, for models that speak text.

    {"prompt": "What is 3*4?", "response": "<Parallel>...", "answer": "12", "baseline_tokens": 40}

`prompt` is text or a list of messages. For SFT `response` is a trace as the format writes it, threads in their places
(`plait convert` and `plait validate` make and check such texts). For RL `answer` is what the grader is given, and
`baseline_tokens`, where it is there, the sampled tokens of a sequential solution. Knows nothing of models.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from plait.errors import ModelError, RequestError
from plait.formats import open_format, render
from plait.formats.base import TrajectoryFormat
from plait.tokenizer.fast import FastTokenizer
from plait.train.data import Source
from plait.train.prompts import Prompt
from plait.tree import Tree


class Records:
    """The lines of a file, those of the held-out share apart.

    Args:
        path: The file.
        held_out: Share of the lines that are never trained, chosen by a hash of their number.

    Raises:
        RequestError: It cannot be read, a line is no object with a prompt, or there is nothing to train.
    """

    def __init__(self, path: str | Path, *, held_out: float = 0.0) -> None:
        self.path = Path(path)
        if not 0 <= held_out < 1:
            raise RequestError(f"held_out is {held_out}; it must be at least 0 and below 1")
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError as exc:
            raise RequestError(f"cannot read the data {path}: {exc.strerror}") from exc
        self._lines = {"train": list[dict[str, Any]](), "held_out": list[dict[str, Any]]()}
        for number, line in enumerate(lines, 1):
            if line.strip():
                kept = random.Random(f"split/{number}").random() >= held_out
                self._lines["train" if kept else "held_out"].append(self._record(number, line))
        if not self._lines["train"]:
            raise RequestError(f"{path} holds no line to train on")

    def _record(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as exc:
            raise RequestError(f"{self.path}, line {number} is not JSON: {exc}") from exc
        prompt = record.get("prompt") if isinstance(record, dict) else None
        messages = isinstance(prompt, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
        )
        if not prompt or not (isinstance(prompt, str) or messages):
            raise RequestError(f"{self.path}, line {number} has no `prompt`: a text, or messages of role and content")
        return {**record, "line": number}

    def split(self, name: Literal["train", "held_out"]) -> Sequence[dict[str, Any]]:
        """Its records, in the order of the file."""
        return self._lines[name]

    def at(self, number: int, *, seed: int) -> dict[str, Any]:
        """Record number n of an endless stream that shuffles all of them once a pass."""
        records = self._lines["train"]
        turn, place = divmod(number, len(records))
        order = list(range(len(records)))
        random.Random(f"order/{seed}/{turn}").shuffle(order)
        return records[order[place]]

    def trace(self, record: dict[str, Any], *, format: TrajectoryFormat, tokenizer: FastTokenizer) -> Tree:
        """A record's response as a tree, read strictly.

        Raises:
            RequestError: It has none, the format does not read it, or the vocabulary cannot write it; says the line.
        """
        response = record.get("response")
        if not isinstance(response, str):
            raise RequestError(f"{self.path}, line {record['line']} has no `response` to learn from")
        with self._line(record):
            ids = tokenizer.prompt_ids(record["prompt"])
            return render(format.read(response), format=format, tokenizer=tokenizer, prompt_ids=ids)

    @contextmanager
    def _line(self, record: dict[str, Any]) -> Iterator[None]:
        """Says of what fails in it which line it is about."""
        try:
            yield
        except (ValueError, ModelError) as exc:
            raise RequestError(f"{self.path}, line {record['line']}: {exc}") from exc

    def source(self, format: str, tokenizer: Any) -> Source:
        """Draws traces as a stream of batches asks for them; there is one family, and its name does not matter."""
        opened = open_format(format, tokenizer)

        def draw(family: str, rng: random.Random, split: Literal["train", "held_out"]) -> Tree:
            records = self.split(split)
            if not records:
                raise RequestError(f"no line of {self.path} fell into the held-out share; make it larger")
            return self.trace(rng.choice(records), format=opened, tokenizer=tokenizer)

        return draw

    def questions(self, tokenizer: Any, *, grade: Callable[[str, Any], bool], seed: int) -> RecordQuestions:
        """Its records as prompts for reinforcement learning."""
        return RecordQuestions(self, tokenizer, grade, seed)

    def prompt(self, record: dict[str, Any], *, tokenizer: FastTokenizer, grade: Callable[[str, Any], bool]) -> Prompt:
        """A record as a question.

        Raises:
            RequestError: It has no answer, or its prompt cannot be written; says the line.
        """
        if "answer" not in record:
            raise RequestError(f"{self.path}, line {record['line']} has no `answer` to grade by")
        given, answer = record["prompt"], record["answer"]
        with self._line(record):
            prompt_ids = tokenizer.prompt_ids(given)
        return Prompt(
            family=str(record.get("family", self.path.stem)),
            question=given if isinstance(given, str) else given[-1]["content"],
            prompt_ids=prompt_ids,
            grade=lambda response: bool(grade(response, answer)),
            baseline_tokens=record.get("baseline_tokens"),
        )


class RecordQuestions:
    """The lines of a file as prompts: all of them once a pass, in an order of the seed's."""

    def __init__(self, records: Records, tokenizer: Any, grade: Callable[[str, Any], bool], seed: int) -> None:
        self._records, self._tokenizer, self._grade, self._seed = records, tokenizer, grade, seed

    def __getitem__(self, number: int) -> Prompt:
        return self._prompt(self._records.at(number, seed=self._seed))

    def held_out(self, count: int) -> list[tuple[int, Prompt]]:
        return [(n, self._prompt(r)) for n, r in enumerate(self._records.split("held_out")[:count])]

    def _prompt(self, record: dict[str, Any]) -> Prompt:
        return self._records.prompt(record, tokenizer=self._tokenizer, grade=self._grade)
