"""Tools to test engines, formats and programs on Plait; part of the product."""

from __future__ import annotations

from plait.testing.conformance import CLAUSES, MERGE_CLAUSES, Case, check_clause, check_engine

__all__ = ["CLAUSES", "MERGE_CLAUSES", "Case", "check_clause", "check_engine"]
