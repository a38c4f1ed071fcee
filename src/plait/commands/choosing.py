"""Which model, engine and twin a command means."""

from __future__ import annotations

from dataclasses import dataclass

from plait import tasks
from plait.engines import ENGINES, Engine, is_address
from plait.errors import RequestError, nearest
from plait.models import DEFAULT, Model, gold_model, load_model, twin_name
from plait.models.gold import NAME as GOLD
from plait.tasks import Problem

ELSEWHERE = """To ask other weights: `--model PATH.gguf` runs what `plait train sft` wrote on questions of these kinds.
`--engine URL` and `--engine torch` run such models elsewhere; general language models are not connected to `solve`."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A model and the engine that runs it."""

    model: Model
    engine: str

    def open_engine(self) -> Engine:
        return self.model.open_engine(self.engine)


def choose(model: str | None, *, engine: str | None = None, format: str | None = None) -> Choice:
    """The model and engine that the options name.

    Raises:
        RequestError: There is none of this name, or they do not fit each other.
        ModelError: The weights are missing or corrupt.
    """
    if engine == "http":
        raise RequestError("say which server: --engine http://HOST:PORT")
    if engine is not None and engine not in ENGINES and not is_address(engine):
        raise nearest(engine, list(ENGINES), "engine")
    if engine == "scripted" or model == GOLD:
        if model not in (None, GOLD):
            raise RequestError(f"the scripted engine has no weights and cannot run {model}; leave out the model")
        return Choice(gold_model(format), engine or "scripted")
    found = load_model(model or DEFAULT, format=format)
    return Choice(found, engine or found.engine)


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
        return Choice(load_model(twin or twin_name(of.model)), of.engine)
    except RequestError as exc:
        if twin is not None:
            raise
        raise RequestError(f"{of.model.name} has no twin to compare with; name one with --twin") from exc


def understand(question: str) -> Problem:
    """The problem that a question asks.

    Raises:
        RequestError: It is none; the message says what is known, and how to ask another model.
    """
    try:
        return tasks.parse(question)
    except RequestError as exc:
        raise RequestError(f"{exc}\n\n{ELSEWHERE}") from exc
