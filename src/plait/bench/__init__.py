"""Measures models on problems: run them (`runner`), take figures (`metrics`), show them (`report`)."""

from __future__ import annotations

from plait.bench.metrics import by_family, decision_curve, decisions, result, speedup, summary, wilson
from plait.bench.runner import Record, RecordFile, compare, evaluate, evaluate_gguf, problems, read_records

__all__ = [
    "Record",
    "RecordFile",
    "by_family",
    "compare",
    "decision_curve",
    "decisions",
    "evaluate",
    "evaluate_gguf",
    "problems",
    "read_records",
    "result",
    "speedup",
    "summary",
    "wilson",
]
