"""The engine contract as a pytest plugin: one test for each clause, for engines of ours and of others.

    pytest_plugins = ["plait.testing.pytest"]                       # conftest.py

    @pytest.mark.anyio
    async def test_my_engine(engine_clause):                        # any test file
        await engine_clause.check(MyEngine, vocab_size=32_000)

What a clause asks for is in `plait.testing.conformance`; this file knows only how pytest runs tests. A deviation that
is known stands beside the test, and is noticed when it is gone:

    @pytest.mark.engine_deviates(C7="kernels round differently in a batch")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from plait.engines.base import Engine
from plait.errors import EngineProtocolError, nearest
from plait.testing.conformance import CLAUSES, MERGE_CLAUSES, REFUSAL, check_engine

_MARK = "engine_deviates"
_NAMES = tuple(CLAUSES | REFUSAL | MERGE_CLAUSES)
_APART = {
    "M0": "the engine merges: it has nothing to refuse",
    "M1": "there is no merge, or no reference to compare it with",
    "M2": "the engine does not merge",
    "M3": "the engine does not merge",
}


class EngineClause:
    """One clause of the contract.

    Args:
        name: Such as `C4`.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    async def check(self, make_engine: Callable[[], Engine], **options: Any) -> None:
        """Hold an engine to this clause; skips the test if the clause does not apply to it.

        Args:
            make_engine: Makes it, not started.
            options: As of `check_engine`: `vocab_size` and what else is known.

        Raises:
            EngineProtocolError: The clause does not hold.
        """
        if not await check_engine(make_engine, clauses=(self.name,), **options):
            pytest.skip(_APART[self.name])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"{_MARK}(C1='why', ...): clauses that this engine is known to break; the test then must fail there"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine_clause" not in metafunc.fixturenames:
        return
    known: dict[str, str] = {}
    for mark in metafunc.definition.iter_markers(_MARK):
        known |= mark.kwargs
    for name in known:
        if name not in _NAMES:
            raise pytest.UsageError(f"{metafunc.definition.nodeid}: {nearest(name, list(_NAMES), 'clause')}")
    clauses: list[Any] = []
    for name in _NAMES:
        marks = pytest.mark.xfail(strict=True, raises=EngineProtocolError, reason=known[name]) if name in known else ()
        clauses.append(pytest.param(EngineClause(name), id=name, marks=marks))
    metafunc.parametrize("engine_clause", clauses)
