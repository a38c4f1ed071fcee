"""Runs as an eval log of inspect-ai: a sample for each run, a span for each thread, a model event for each engine call.

`inspect view` shows threads as lanes of the transcript. Unlike the other exports it holds the text of the runs: that is
what such a log is for. Reads the values of `describe_run`; knows nothing of inspect-ai's code.

Source: inspect-ai 0.3, `EvalLog` version 2, JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

_STOPS = {"eos": "stop", "stop": "stop", "length": "model_length", "budget": "max_tokens"}


def inspect_log(runs: Sequence[dict[str, Any]], *, epochs: Sequence[float]) -> dict[str, Any]:
    """The log of an evaluation whose samples are these runs.

    Args:
        runs: As `describe_run` says them.
        epochs: When each run started, in seconds of Unix time.
    """
    samples = [_sample(number, run, epoch) for number, (run, epoch) in enumerate(zip(runs, epochs, strict=True), 1)]
    models = list(dict.fromkeys(_model(run) for run in runs))
    families = list(dict.fromkeys(str(run["meta"].get("family") or "") for run in runs))
    ends = [epoch + run["wall_s"] for run, epoch in zip(runs, epochs, strict=True)]
    usage: dict[str, dict[str, int]] = {}
    for run in runs:
        total = usage.setdefault(_model(run), dict.fromkeys(_usage(run), 0))
        for key, value in _usage(run).items():
            total[key] += value
    return {
        "version": 2,
        "status": "success",
        "eval": {
            "created": _iso(min(epochs, default=0.0)),
            "task": ", ".join(filter(None, families)) or "plait",
            "dataset": {"name": "plait", "samples": len(runs), "sample_ids": [s["id"] for s in samples]},
            "model": models[0] if len(models) == 1 else ", ".join(models) or "unknown",
            "config": {},
        },
        "plan": {"name": "plait", "steps": [], "config": {}},
        "results": _results(runs),
        "stats": {
            "started_at": _iso(min(epochs, default=0.0)),
            "completed_at": _iso(max(ends, default=0.0)),
            "model_usage": usage,
        },
        "samples": samples,
    }


def _results(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    graded = [run["right"] for run in runs if run["right"] is not None]
    totals = {"total_samples": len(runs), "completed_samples": sum(run["stop"] is not None for run in runs)}
    if not graded:
        return {**totals, "scores": []}
    metric = {"name": "accuracy", "value": sum(graded) / len(graded), "options": {}}
    return {**totals, "scores": [{"name": "right", "scorer": "right", "params": {}, "metrics": {"accuracy": metric}}]}


def _sample(number: int, run: dict[str, Any], epoch: float) -> dict[str, Any]:
    question = str(run["meta"].get("question") or run["name"] or f"run {number}")
    last = next((s for s in reversed(run["segments"]) if s["sampled"]), None)
    said = _text(run, last["sampled"], tags=False).strip() if last else ""
    scores = {} if run["right"] is None else {"right": {"value": "C" if run["right"] else "I", "answer": run["answer"]}}
    return {
        "id": number,
        "epoch": 1,
        "input": question,
        "target": "",
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": said, "source": "generate"},
        ],
        "output": _output(run, said, run["stop"], _usage(run)),
        "scores": scores,
        "metadata": {
            "plait": {**run["usage"], "acceleration": run["acceleration"], "stop": run["stop"], "note": run["note"]},
            **{key: str(run["meta"][key]) for key in ("format", "engine", "family") if run["meta"].get(key)},
        },
        "events": [event for _, _, event in sorted(_events(run, epoch), key=lambda timed: timed[:2])],
        "model_usage": {_model(run): _usage(run)},
        "started_at": _iso(epoch),
        "completed_at": _iso(epoch + run["wall_s"]),
        "total_time": run["wall_s"],
        "working_time": run["wall_s"],
    }


def _events(run: dict[str, Any], epoch: float) -> Iterator[tuple[float, int, dict[str, Any]]]:
    """Events with their time and, of those at one time, their order: what begins outside comes first."""

    def event(kind: str, t: float, span: str, **more: Any) -> dict[str, Any]:
        at = {"uuid": f"{kind}-{more.get('id', span)}-{t}", "span_id": span}
        return {"event": kind, **at, "timestamp": _iso(epoch + t), "working_start": t, **more}

    own: dict[str, list[dict[str, Any]]] = {}
    for s in run["segments"]:
        own.setdefault(s["id"].rpartition(":")[0], []).append(s)
    ends: dict[str, float] = {}
    # A span ends no sooner than those in it, so children come before their parents.
    for name in sorted(own, key=lambda name: name.count("/"), reverse=True):
        inside = [t for other, t in ends.items() if other.rpartition("/")[0] == name]
        ends[name] = max(own[name][-1]["t"][1], *inside) if inside else own[name][-1]["t"][1]
    for thread in run["threads"]:
        name, depth = thread["name"], thread["name"].count("/")
        above = name.rpartition("/")[0] or None
        start = own[name][0]["t"][0]
        title = f"thread {name} {thread['label']}".strip() if above else "root"
        begin = event("span_begin", start, name, id=name, parent_id=above, type="agent", name=title)
        yield start, depth, begin
        yield ends[name], 1000 - depth, event("span_end", ends[name], name, id=name)
        for s in own[name]:
            said = _text(run, s["sampled"])
            about = {key: s[key] for key in ("critical", "steps", "positions", "joins", "join", "stop", "note")}
            call = event(
                "model",
                s["t"][0],
                name,
                model=_model(run),
                input=[{"role": "user", "content": _text(run, s["forced"])}],
                tools=[],
                tool_choice="none",
                config={},
                output=_output(run, said, s["stop"], None),
                completed=_iso(epoch + s["t"][1]),
                working_time=s["t"][1] - s["t"][0],
                metadata={"segment": s["id"], **about},
            )
            yield s["t"][0], 500 + depth, {**call, "uuid": s["id"]}


def _output(run: dict[str, Any], said: str, stop: str | None, usage: dict[str, int] | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": said, "source": "generate", "model": _model(run)}
    choice = {"message": message, "stop_reason": _STOPS.get(stop or "", "unknown")}
    return {"model": _model(run), "choices": [choice], "completion": said, **({"usage": usage} if usage else {})}


def _usage(run: dict[str, Any]) -> dict[str, int]:
    tokens = {"input_tokens": run["usage"]["prompt_tokens"], "output_tokens": run["usage"]["sampled_tokens"]}
    return {**tokens, "total_tokens": sum(tokens.values())}


def _text(run: dict[str, Any], ids: Sequence[int], *, tags: bool = True) -> str:
    if run["pieces"] is None:
        return " ".join(map(str, ids))
    control = () if tags else run["pieces"]["control"]
    return "".join(run["pieces"]["texts"].get(str(id), "") for id in ids if id not in control)


def _model(run: dict[str, Any]) -> str:
    return str(run["meta"].get("model") or "unknown model").partition("@")[0]


def _iso(t: float) -> str:
    return datetime.fromtimestamp(t, UTC).isoformat()
