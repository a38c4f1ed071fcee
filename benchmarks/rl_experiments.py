#!/usr/bin/env python3
"""Reinforcement learning of speed, in arms with seeds: what each reward and advantage does to a model that can fork.

    python benchmarks/rl_experiments.py --init runs/multiverse/checkpoint.pt --out runs/rl
    python benchmarks/rl_experiments.py --init ... --out runs/rl --arms pgrpo,std --seeds 1 --steps 60

First two SFT stages go on from the checkpoint: `either` (configs/sft_either.toml), where all arms but one start, and
`never`, the same in one line always. Then for each seed:

    pgrpo         configs/rl_pgrpo.toml: correctness + latency + format, advantages centred on the mean
    std           the same, divided by the group's standard deviation
    paper, code, readme    an acceleration term in place of latency
    never         pgrpo from the model that never forks
    unrewarded    on from the end of pgrpo, without any reward for speed

Every run is a run folder and goes on where it was; so does this command. The first table is of greedy decoding of
held-out problems, the same ones before and after; the second of the steps of training, sampled at temperature 1. Means
and ranges over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from curves import Curve, draw

ROOT = Path(__file__).parent.parent
PLAIN: dict[str, dict[str, Any]] = {"correctness": {}, "format_validity": {"penalty": 0.5}}


def _accelerated(variant: str) -> dict[str, Any]:
    return {"reward": PLAIN | {"acceleration": {"variant": variant}}}


ARMS: dict[str, dict[str, Any]] = {
    "pgrpo": {},
    "std": {"loss": {"advantage": "group_std"}},
    "paper": _accelerated("paper"),
    "code": _accelerated("code"),
    "readme": _accelerated("readme"),
    "never": {"from": "never"},
    "unrewarded": {"reward": PLAIN, "from": "pgrpo"},
}
SCORES = ("accuracy", "forked", "fork_right", "total_tokens", "critical_path_tokens")
CONCURRENCY = 4
"""More cost more a token: llama.cpp looks at the cells of all sequences for each of them."""
STEPS = ("correct", "parallel", "saved", "entropy")
"""Of the metrics of training; `saved` is 1 - C/S over the right answers."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", required=True, help="checkpoint of the adaptive model, in the multiverse format")
    parser.add_argument("--out", default="runs/rl", help="folder of all runs")
    parser.add_argument("--arms", default=",".join(ARMS), help="some of the arms, in order")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each run of reinforcement learning; default: the config's")
    parser.add_argument("--sft-tokens", type=int, help="of each of the two stages before; default: the config's")
    parser.add_argument("-n", type=int, default=500, help="held-out problems for the scores, of a family of weight 1")
    parser.add_argument("--svg", type=Path, help="draw the curves into this file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(argv)
    arms = args.arms.split(",")
    if unknown := set(arms) - set(ARMS):
        parser.error(f"no arm is called {min(unknown)}; there are {', '.join(ARMS)}")
    if "unrewarded" in arms and "pgrpo" not in arms[: arms.index("unrewarded")]:
        parser.error("unrewarded goes on from pgrpo: name that before it")
    out = Path(args.out)
    for traces in {ARMS[arm].get("from", "either") for arm in arms} & {"either", "never"}:
        _sft(out / "sft" / traces, traces, Path(args.init), args.sft_tokens)
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    # Seed by seed, so that a command that is cut short has whole seeds.
    for seed in range(1, args.seeds + 1):
        for arm in arms:
            results[arm].append(_rl(out, arm, seed, args.steps, args.n))
    if args.svg:
        args.svg.write_text(_drawn(results), encoding="utf-8")
    print(json.dumps(results, indent=1) if args.json else f"{_scores_table(results)}\n\n{_steps_table(results)}")
    return 0


def _sft(out: Path, traces: str, init: Path, tokens: int | None) -> None:
    from plait.train.config import config_from, read_toml
    from plait.train.sft import train

    data = read_toml(ROOT / "configs" / "sft_either.toml", {"init": str(init)})
    data["data"]["traces"] = "either" if traces == "either" else "serial"
    if tokens is not None:
        data["schedule"]["tokens"] = tokens
    if not train(config_from(data), out=out).finished:
        raise SystemExit(130)


def _rl(out: Path, arm: str, seed: int, steps: int | None, n: int) -> dict[str, Any]:
    """A run: its scores before and after, and its steps."""
    from plait.train.config import read_toml
    from plait.train.rl import rl_config_from, train

    changes = dict(ARMS[arm])
    start = changes.pop("from", "either")
    init = out / "sft" / start if start in ("either", "never") else out / f"{start}-{seed}"
    folder = out / f"{arm}-{seed}"
    data = read_toml(ROOT / "configs" / "rl_pgrpo.toml", {"init": str(init / "checkpoint.pt"), "eval.times": 0})
    # A run that goes on from another one asks other problems.
    data["seed"] = seed + 100 * (init.parent == out)
    if steps is not None:
        data["schedule"]["steps"] = steps
    for name, value in changes.items():
        data[name] = value if name == "reward" else data[name] | value
    config = rl_config_from(data)
    result = train(config, out=folder)
    if not result.finished:
        raise SystemExit(130)
    return {
        "seed": seed,
        "seconds": round(result.progress.seconds),
        "start": _scored(init, config, n),
        "end": _scored(folder, config, n),
        "steps": list(_steps(folder)),
    }


def _scored(folder: Path, config: Any, n: int) -> dict[str, Any]:
    """Scores of a run's `model.gguf` on held-out problems, decoded greedily; kept beside it."""
    import anyio

    from plait import tasks
    from plait.bench.metrics import by_family, summary
    from plait.bench.runner import engine_options, evaluate, problems
    from plait.models import load_model

    path = folder / f"scores_{n}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    model, mixture = load_model(str(folder / "model.gguf")), config.data.mixture
    asked = [
        problem
        for name, weight in mixture.items()
        for problem in problems([tasks.family(name, config.data.knobs.get(name))], round(n * weight))
    ]

    async def main() -> Any:
        async with model.open_engine(**engine_options(model.engine, CONCURRENCY)) as engine:
            return await evaluate(
                asked,
                engine=engine,
                format=model.format,
                tokenizer=model.tokenizer,
                budget=config.rollout.budget,
                concurrency=CONCURRENCY,
            )

    records = anyio.run(main)
    groups = by_family(records) | {"all": summary(records)}
    scores = {name: {"n": s.n} | {key: round(getattr(s, key), 4) for key in SCORES} for name, s in groups.items()}
    path.write_text(json.dumps(scores), encoding="utf-8")
    return scores


def _steps(folder: Path) -> Iterator[dict[str, float]]:
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        numbers = json.loads(line)
        if "reward" in numbers:
            saved = 1 - 1 / numbers["speedup"] if numbers["speedup"] else 0.0
            yield {"step": numbers["step"], "saved": saved} | {k: numbers[k] for k in STEPS if k != "saved"}


def _scores_table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    head = ["arm", "seeds", "", "right", "forks", "fork right", "tokens", "critical path", "against start"]
    lines = ["| " + " | ".join(head) + " |", "|---|---:|---|" + "---:|" * 6]
    for arm, runs in results.items():
        for when in ("start", "end"):
            ends = [run[when]["all"] for run in runs]
            shares = [_cell([100 * end[name] for end in ends], 1, " %") for name in SCORES[:3]]
            tokens = [_cell([end[name] for end in ends], 0, "") for name in SCORES[3:]]
            changes = [100 * (r[when]["all"][SCORES[4]] / r["start"]["all"][SCORES[4]] - 1) for r in runs]
            against = _cell(changes, 1, " %") if when == "end" else ""
            lines.append("| " + " | ".join([arm, str(len(runs)), when, *shares, *tokens, against]) + " |")
    return "\n".join(lines)


def _steps_table(results: Mapping[str, Sequence[Mapping[str, Any]]], every: int = 10) -> str:
    """Windows of so many steps."""
    lines = ["| arm | steps | right | forks | saved | entropy |", "|---|---|---:|---:|---:|---:|"]
    for arm, runs in results.items():
        for first in range(0, max(len(run["steps"]) for run in runs), every):
            windows = [run["steps"][first : first + every] for run in runs]
            means = {k: [sum(s[k] for s in window) / len(window) for window in windows if window] for k in STEPS}
            cells = [_cell([100 * v for v in means[k]], 1, " %") for k in STEPS[:3]] + [_cell(means["entropy"], 4, "")]
            lines.append("| " + " | ".join([arm, f"{first + 1} to {first + every}", *cells]) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int, unit: str) -> str:
    mean, low, high = (f"{v:.{digits}f}" for v in (sum(values) / len(values), min(values), max(values)))
    return f"{mean}{unit}" if low == high else f"{mean}{unit} ({low} to {high})"


def _drawn(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    panels = {"parallel": "share that forks", "saved": "critical path saved", "correct": "right"}
    return draw(
        {
            title: [
                Curve(name=arm, runs=[[s[key] for s in run["steps"]] for run in runs]) for arm, runs in results.items()
            ]
            for key, title in panels.items()
        },
        xlabel="steps",
    )


if __name__ == "__main__":
    sys.exit(main())
