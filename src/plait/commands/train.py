"""`plait train`: reads a config, trains, and scores the model by true decoding as it goes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from plait import tasks
from plait.commands.settings import overrides
from plait.errors import PlaitError, RequestError, needs
from plait.settings import read_toml


def train_sft(
    config: str,
    *,
    out: str | None = None,
    resume: bool = True,
    dry_run: bool = False,
    settings: Sequence[str] = (),
    decode: int = 8,
) -> int:
    """Train, or go on with a run that was interrupted.

    Args:
        config: A TOML file; one with a [base] trains a model of transformers.
        out: Run folder; default `runs/` and the config's name.
        dry_run: Print the resolved config and stop.
        settings: Overrides as `section.key=value`; values are TOML, or plain text.
        decode: Problems of each family that every evaluation decodes; 0 for none.

    Returns:
        The exit code: 0, or 130 where it was interrupted.

    Raises:
        RequestError: Torch is missing, or the config asks for what there is not.
        ModelError: The folder holds another run.
    """
    sft = _trainer("sft")
    _refuse_other(config, "sft")
    resolved = sft.load_config(config, overrides(settings))
    if dry_run:
        print(sft.to_toml(resolved), end="")
        return 0
    data = resolved.data
    families = [tasks.family(name, data.knobs.get(name)) for name, weight in data.mixture.items() if weight > 0]
    outcome = sft.train(
        resolved,
        out=_folder(config, out),
        resume=resume,
        on_eval=_scorer(families, decode) if decode and families else None,
    )
    return _ended(outcome)


def train_rl(
    config: str, *, out: str | None = None, resume: bool = True, dry_run: bool = False, settings: Sequence[str] = ()
) -> int:
    """Train by reward, or go on with a run that was interrupted.

    Args:
        config, out, dry_run, settings: As for `train_sft`.

    Returns:
        The exit code: 0, or 130 where it was interrupted.

    Raises:
        RequestError: Torch is missing, or the config asks for what there is not.
        ModelError: The folder holds another run, or the checkpoint to start from does not fit.
        EngineError: Every rollout of a step failed.
    """
    rl = _trainer("rl")
    _refuse_other(config, "rl")
    resolved = rl.load_rl_config(config, overrides(settings))
    if dry_run:
        print(rl.to_toml(resolved), end="")
        return 0
    return _ended(rl.train(resolved, out=_folder(config, out), resume=resume))


def _trainer(name: str) -> Any:
    try:
        return import_module(f"plait.train.{name}")
    except ImportError as exc:
        raise RequestError(f"{needs('training', 'train')} ({exc})") from exc


_ONLY_RL = ("reward", "rollout", "loss")


def _refuse_other(config: str, trainer: str) -> None:
    """Refuse a config that is plainly of the other trainer, which would be refused for one of its names."""
    values = read_toml(config)
    rewarded = [f"[{name}]" for name in _ONLY_RL if name in values]
    if trainer == "sft" and rewarded:
        raise RequestError(f"{config} has {', '.join(rewarded)}: it is for `plait train rl`")
    data = values.get("data")
    if trainer == "rl" and not rewarded and isinstance(data, dict) and "traces" in data:
        raise RequestError(f"{config} says which gold traces to learn (data.traces): it is for `plait train sft`")


def _folder(config: str, out: str | None) -> Path:
    return Path(out) if out else Path("runs") / Path(config).stem


def _ended(outcome: Any) -> int:
    print(f"{'finished' if outcome.finished else 'interrupted'}: {outcome.model}")
    return 0 if outcome.finished else 130


def _scorer(families: Sequence[tasks.Family], n: int) -> Any:
    def score(path: Path, step: int) -> Mapping[str, Any]:
        from plait.bench import evaluate_gguf

        try:
            return evaluate_gguf(path, families=families, n=n)
        except PlaitError as exc:
            # Scores are a service; hours of training do not end over one that failed.
            print(f"step {step}: not decoded: {exc}", file=sys.stderr)
            return {}

    return score
