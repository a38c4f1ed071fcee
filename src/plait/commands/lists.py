"""`plait models`, `plait formats`, `plait engines` and `plait tasks`: what there is, and which package has it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from inspect import Parameter
from typing import Any

from plait import tasks
from plait.commands.choosing import GOLD
from plait.commands.settings import with_knobs
from plait.engines import ENGINES, options_of
from plait.errors import ModelError
from plait.formats import FORMATS, CharTokenizer, format_class, render
from plait.models import DEFAULT, NAMES, Model, load_model, prompt_ids
from plait.registry import Registry
from plait.settings import in_words
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
    for row, cls in _rows(FORMATS):
        if cls is not None:
            engine = "merge" if cls.join_kind == "merge" else "any"
            row |= {"join": cls.join_kind, "paper": cls.paper, "engine": engine, "tags": list(cls.tags())}
        rows.append(row)
    if as_json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print(f"{row['name']:13} {row.get('join', ''):7} {row.get('paper', ''):17} {_said(row)}")
    print("\nA merge join needs an engine that merges: llamacpp, torch, scripted. The others take any engine.")
    print("Every tag must be one control token of the vocabulary: `plait formats --json` lists them.")
    return 0


def engines(name: str | None = None, *, as_json: bool = False) -> int:
    """List the engines, or the options of one.

    Raises:
        RequestError: No engine has this name, or the package that brings it is broken.
        EngineUnavailable: A library it needs is not installed.
    """
    if name is not None:
        options = {
            "NAME" if parameter.kind is parameter.VAR_KEYWORD else option: _option(parameter)
            for option, parameter in options_of(name).items()
        }
        if as_json:
            print(json.dumps({"name": name, "options": options}))
            return 0
        for option, about in options.items():
            default = f"={about['default']}" if "default" in about else ""
            print(f"--engine-option {option + default:24} {about['takes']}")
        return 0
    rows = [row for row, _ in _rows(ENGINES)]
    if as_json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print(f"{row['name']:13} {_said(row)}")
    print(
        "\n`plait engines NAME` lists what `--engine-option` sets. A server is named by its address, http://HOST:PORT."
    )
    return 0


def _option(parameter: Parameter) -> dict[str, str]:
    about, default = {"takes": in_words(parameter.annotation)}, parameter.default
    if default not in (parameter.empty, None):
        about["default"] = str(default).lower() if isinstance(default, bool) else str(default)
    return about


def _rows(registry: Registry[Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Of every name a row that says where it comes from and what it is, and the thing; None where that is broken."""
    for name, source, found in registry.listed():
        broken = isinstance(found, Exception)
        about = {"error": str(found)} if broken else {"about": (found.__doc__ or "").strip().split("\n")[0]}
        yield {"name": name, "source": source or "plait", **about}, None if broken else found


def _said(row: dict[str, Any]) -> str:
    about = row["about"] if "about" in row else f"cannot be used: {row['error']}"
    return about if row["source"] == "plait" else f"{about} [{row['source']}]"


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
    others = [] if family else [row for row, _ in _rows(tasks.TASKS) if row["source"] != "plait"]
    broken = [row for row in others if "error" in row]
    source = {row["name"]: row["source"] for row in others if row not in broken}
    chosen = with_knobs([family] if family else [*tasks.FAMILIES, *source], settings)
    drawn = {f.name: list(itertools.islice(tasks.problems(f, seed=seed, split="held_out"), sample)) for f in chosen}
    if as_json:
        rows = [
            {"name": f.name, "about": f.about, "knobs": _knobs(f), "sample": [_plain(p) for p in drawn[f.name]]}
            | ({} if family else {"source": source.get(f.name, "plait")})
            for f in chosen
        ]
        print(json.dumps(rows + broken))
        return 0
    for f in chosen:
        print(f"{f.name}\n  {f.about}" + (f" [{source[f.name]}]" if f.name in source else ""))
        if family:
            for knob, value in _knobs(f).items():
                print(f"  --set {f.name}.{knob}={json.dumps(value)}")
        for problem in drawn[f.name]:
            print()
            for line in _example(problem):
                print(f"  {line}")
        if sample:
            print()
    for row in broken:
        print(f"{row['name']}\n  {_said(row)}")
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
    cls = format_class("multiverse")
    # Every text can be shown, whatever a model's vocabulary has.
    tokenizer = CharTokenizer(cls.tags())
    format, ids = cls(tokenizer), prompt_ids(tokenizer, problem.prompt)
    tree = render(tasks.gold(problem, parallel=True), format=format, tokenizer=tokenizer, prompt_ids=ids)
    return [problem.question, *(f"  {line}" for line in plain_lines(tree, Reader(tokenizer, format)))]
