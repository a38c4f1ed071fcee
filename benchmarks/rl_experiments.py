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

Every run is a run folder and goes on where it was; so does this command. The table is of greedy decoding of held-out
problems: at the start, at the end, mean and range over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FAMILIES = ("long_multiplication", "product", "expression", "bundle", "control")
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
SHOWN = ("correct", "parallel", "critical_path_tokens", "sampled_tokens", "speedup", "valid")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", required=True, help="checkpoint of the adaptive model, in the multiverse format")
    parser.add_argument("--out", default="runs/rl", help="folder of all runs")
    parser.add_argument("--arms", default=",".join(ARMS), help="some of the arms, in order")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="of each run of reinforcement learning")
    parser.add_argument("--sft-tokens", type=int, default=6_000_000, help="of each of the two stages before")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    arms = args.arms.split(",")
    if unknown := set(arms) - set(ARMS):
        parser.error(f"no arm is called {min(unknown)}; there are {', '.join(ARMS)}")
    out = Path(args.out)
    for traces in ("either", "never"):
        if traces == "either" or "never" in arms:
            _sft(out / "sft" / traces, traces, Path(args.init), args.sft_tokens)
    results = {arm: [_rl(out, arm, seed, args.steps) for seed in range(1, args.seeds + 1)] for arm in arms}
    print(json.dumps(results, indent=1) if args.json else _table(results))
    return 0


def _sft(out: Path, traces: str, init: Path, tokens: int) -> None:
    from plait.train.config import config_from, read_toml
    from plait.train.sft import train

    data = read_toml(ROOT / "configs" / "sft_either.toml")
    data["init"], data["schedule"]["tokens"] = str(init), tokens
    data["data"]["traces"] = "either" if traces == "either" else "serial"
    if not train(config_from(data), out=out).finished:
        raise SystemExit(130)


def _rl(out: Path, arm: str, seed: int, steps: int) -> Mapping[str, Any]:
    """The scores of a run at its start and end."""
    from plait.train.config import read_toml
    from plait.train.rl import rl_config_from, train

    changes = dict(ARMS[arm])
    start = changes.pop("from", "either")
    init = out / "sft" / start if start in ("either", "never") else out / f"{start}-{seed}"
    data = read_toml(ROOT / "configs" / "rl_pgrpo.toml")
    data |= {"seed": seed, "init": str(init / "checkpoint.pt")}
    data["data"]["mixture"] = dict.fromkeys(FAMILIES, 1.0)
    data["schedule"]["steps"] = steps
    for name, value in changes.items():
        data[name] = value if name == "reward" else data[name] | value
    result = train(rl_config_from(data), out=out / f"{arm}-{seed}")
    if not result.finished:
        raise SystemExit(130)
    scores = result.scores
    return {
        "seed": seed,
        "seconds": round(result.progress.seconds),
        "start": scores["start"]["all"],
        "end": scores["all"],
        "families": scores["families"],
    }


def _table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    head = ["arm", "when", *SHOWN]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * len(SHOWN)]
    for arm, runs in results.items():
        for when in ("start", "end"):
            cells = [_cell([run[when][name] for run in runs]) for name in SHOWN]
            lines.append("| " + " | ".join([arm, when, *cells]) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    sys.exit(main())
