"""Measures models on problems: run them (`runner`) by some `methods`, keep `records`, take figures (`metrics`), show
them (`report`)."""

from __future__ import annotations

from plait.bench.methods import GREEDY, METHODS, Method, combined, method, vote
from plait.bench.metrics import by_family, decision_curve, decisions, difference, result, speedup, summary, wilson
from plait.bench.records import Record, RecordFile, read_records
from plait.bench.runner import compare, evaluate, evaluate_gguf, problems

__all__ = [
    "GREEDY",
    "METHODS",
    "Method",
    "Record",
    "RecordFile",
    "by_family",
    "combined",
    "compare",
    "decision_curve",
    "decisions",
    "difference",
    "evaluate",
    "evaluate_gguf",
    "method",
    "problems",
    "read_records",
    "result",
    "speedup",
    "summary",
    "vote",
    "wilson",
]
