"""Few examples by default, so that the fast lane stays fast; `--hypothesis-profile=thorough` for more."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

pytest_plugins = ["plait.testing.pytest", "pytester"]

settings.register_profile("fast", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("fast")
