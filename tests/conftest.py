"""Few examples by default, so that the fast lane stays fast; `--hypothesis-profile=thorough` for more."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Threads of a step wait for each other busily: beside anything else that runs, one is many times as fast.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["plait.testing.pytest", "pytester"]

settings.register_profile("fast", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("fast")


@pytest.fixture(scope="session", autouse=True)
def one_core() -> Iterator[None]:
    """The same for llama.cpp."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plait.engines.llamacpp.engine._cores", lambda: 1)
        yield
