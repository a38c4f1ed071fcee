"""Which model, engine and twin a command means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plait import tasks
from plait.engines import ENGINES, Engine, is_address
from plait.errors import RequestError
from plait.models import DEFAULT, Model, gold_model, load_model, twin_name
from plait.models.gold import NAME as GOLD
from plait.tasks import Problem

ELSEWHERE = """To ask other weights: `--model PATH.gguf` runs what `plait train sft` wrote on questions of these kinds.
`--engine URL` and `--engine torch` run such models elsewhere. A general language model answers any question:
`--engine llamacpp:FILE.gguf --format sequential`, or torch:FOLDER with a transformers checkpoint."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A model and the engine that runs it."""

    model: Model
    engine: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of the engine."""

    def open_engine(self) -> Engine:
        return self.model.open_engine(self.engine, **self.options)


def choose(
    model: str | None,
    *,
    engine: str | None = None,
    format: str | None = None,
    options: Mapping[str, Any] | None = None,
    plain: bool = False,
) -> Choice:
    """The model and engine that the options name.

    Args:
        engine: `NAME`, `NAME:PATH` (the engine and the weights that it runs), or addresses.
        options: Of the engine.
        plain: Whether weights will do that Plait's trainer did not make.

    Raises:
        RequestError: There is none of this name, or they do not fit each other.
        ModelError: The weights are missing or corrupt.
    """
    if engine == "http":
        raise RequestError("say which server: --engine http://HOST:PORT")
    if engine is not None and not is_address(engine):
        given, (engine, colon, path) = engine, engine.partition(":")
        if engine not in ENGINES and path.isdecimal():
            raise RequestError(f"{given!r} is no engine; if it is a server: --engine http://{given}")
        ENGINES.require(engine)
        if colon and model is not None:
            raise RequestError(f"--engine {engine}:{path} names the weights, and so does --model: leave out one")
        model = path if colon else model
    if engine == "scripted" or model == GOLD:
        if model not in (None, GOLD):
            raise RequestError(f"the scripted engine has no weights and cannot run {model}; leave out the model")
        return Choice(gold_model(format), engine or "scripted", options or {})
    found = load_model(model or DEFAULT, format=format)
    if found.plain and not plain:
        raise RequestError(
            f"{found.path} was not trained by Plait (its config.json has no plait entry), so questions in its notation"
            " mean nothing to it; `plait solve` and `plait serve` ask it in plain words"
        )
    return Choice(found, engine or found.engine, options or {})


def choose_twin(of: Choice, twin: str | None = None) -> Choice:
    """The sequential twin: the one that is named, else the one that belongs to the model by its name.

    Raises:
        RequestError: There is none, or the engine is a server.
        ModelError: Its weights are missing or corrupt.
    """
    if is_address(of.engine):
        raise RequestError("a server runs one model, a comparison needs two: leave out --compare, or --engine")
    if of.model.script is not None:
        return Choice(gold_model(traces="serial"), of.engine)
    try:
        return Choice(load_model(twin or twin_name(of.model)), of.engine, of.options)
    except RequestError as exc:
        if twin is not None:
            raise
        raise RequestError(f"{of.model.name} has no twin to compare with; name one with --twin") from exc


def understand(question: str, model: Model) -> Problem:
    """The problem that a question asks; of plain words, one without a known answer.

    Raises:
        RequestError: It is none; the message says what is known, and how to ask another model.
    """
    if model.plain:
        return Problem(family="text", prompt=question, question=question, answer="", forks=False)
    try:
        return tasks.parse(question, model.families)
    except RequestError as exc:
        raise RequestError(f"{exc}\n\n{ELSEWHERE}") from exc
