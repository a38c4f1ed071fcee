"""`plait models`, `plait formats` and `plait tasks`: what there is."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from plait import tasks
from plait.commands.choosing import GOLD
from plait.commands.settings import with_knobs
from plait.errors import ModelError
from plait.formats import FORMATS, format_class, open_format, render
from plait.models import DEFAULT, NAMES, Model, load_model, prompt_ids
from plait.tasks.vocabulary import WIDE
from plait.terminal.plain import plain_lines
from plait.terminal.reading import Reader


def models(name: str | None = None, *, as_json: bool = False) -> int:
    """List the embedded models, or say all about one.

    Raises:
        RequestError: No model has this name.
        ModelError: Its weights are missing or corrupt.
    """
    if name is not None:
        model = load_model(name)
        data = about(model) | {"train": dict(model.train), "scores": dict(model.scores)}
        print(json.dumps(data, indent=None if as_json else 2))
        return 0
    rows: list[dict[str, Any]] = []
    for known in NAMES:
        try:
            rows.append(about(load_model(known)))
        except ModelError as exc:
            rows.append({"name": known, "error": str(exc)})
    if as_json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        default = " (default)" if row["name"] == DEFAULT else ""
        print(f"{row['name']}{default}")
        if "error" in row:
            print(f"  {row['error']}")
            continue
        print(f"  {row['weights'] / 1e6:.2f} M weights, {row['dtype']}, contexts of {row['max_context']} tokens")
        join = "no join" if row["join"] == "none" else f"{row['join']} join"
        print(f"  {row['format']} format, {join}; {', '.join(row['families'])}")
    print(f"{GOLD}\n  gold traces in place of a model, on the scripted engine: the ceiling of every measure")
    print("\nA GGUF file that `plait train sft` wrote is named by its path. `plait models NAME` says all about one.")
    return 0


def about(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "id": model.id,
        "path": str(model.path),
        "format": model.format_name,
        "join": model.join,
        "weights": model.num_weights,
        "dtype": model.dtype,
        "max_context": model.max_context,
        "families": list(model.families),
    }


def formats(*, as_json: bool = False) -> int:
    """List the trajectory formats."""
    rows: list[dict[str, Any]] = []
    for name in FORMATS:
        cls = format_class(name)
        engine = "merge" if cls.join_kind == "merge" else "any"
        rows.append(
            {"name": name, "join": cls.join_kind, "paper": cls.paper, "engine": engine, "tags": list(cls.tags())}
        )
    if as_json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        doc = (format_class(row["name"]).__doc__ or "").strip().split("\n")[0]
        print(f"{row['name']:13} {row['join']:7} {row['paper']:17} {doc}")
    print("\nA merge join needs an engine that merges: llamacpp, torch, scripted. The others take any engine.")
    print("Every tag must be one control token of the vocabulary: `plait formats --json` lists them.")
    return 0


def families(
    *,
    as_json: bool = False,
    sample: int = 0,
    seed: int = 0,
    family: str | None = None,
    settings: Sequence[str] = (),
) -> int:
    """List the problem families; for one of them its knobs, for each examples and their gold traces on request.

    Raises:
        RequestError: No family has this name, or it has not such a knob.
    """
    chosen = with_knobs([family] if family else list(tasks.FAMILIES), settings)
    drawn = {f.name: list(itertools.islice(tasks.problems(f, seed=seed, split="held_out"), sample)) for f in chosen}
    if as_json:
        rows = [
            {"name": f.name, "about": f.about, "knobs": _knobs(f), "sample": [_plain(p) for p in drawn[f.name]]}
            for f in chosen
        ]
        print(json.dumps(rows))
        return 0
    for f in chosen:
        print(f"{f.name}\n  {f.about}")
        if family:
            for knob, value in _knobs(f).items():
                print(f"  --set {f.name}.{knob}={json.dumps(value)}")
        for problem in drawn[f.name]:
            print()
            for line in _example(problem):
                print(f"  {line}")
        if sample:
            print()
    return 0


def _knobs(family: tasks.Family) -> dict[str, Any]:
    """What its problems are drawn from."""
    return {f.name: getattr(family, f.name) for f in fields(family)}


def _plain(problem: tasks.Problem) -> dict[str, Any]:
    return {
        "prompt": problem.prompt,
        "question": problem.question,
        "answer": problem.answer,
        "forks": problem.forks,
        "shape": problem.shape,
    }


def _example(problem: tasks.Problem) -> list[str]:
    format = open_format("multiverse", WIDE)
    ids = prompt_ids(WIDE, problem.prompt)
    tree = render(tasks.gold(problem, parallel=True), format=format, tokenizer=WIDE, prompt_ids=ids)
    return [problem.question, *(f"  {line}" for line in plain_lines(tree, Reader(WIDE, format)))]
