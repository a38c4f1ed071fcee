"""Tools to test engines, formats and programs on Plait; part of the product."""

from __future__ import annotations

from plait.testing.conformance import CLAUSES, MERGE_CLAUSES, Case, check_clause, check_engine
from plait.testing.formats import FORMAT_CLAUSES, check_format

__all__ = ["CLAUSES", "FORMAT_CLAUSES", "MERGE_CLAUSES", "Case", "check_clause", "check_engine", "check_format"]
