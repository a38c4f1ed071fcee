"""Plait as a Ray Serve application: `serve run deploy.ray_serve:application`.

Settings are those of `plait serve`: PLAIT_* variables, and the file that PLAIT_CONFIG names. Every replica opens its
own engines, or asks the servers that `engine` names; set PLAIT_CACHE_SECRET, so that a tenant's cache is found from
all of them. Ray drains a replica before it stops it, so `drain_s` has nothing to do here.
"""

from __future__ import annotations

import os

from ray import serve
from starlette.types import ASGIApp

from plait.commands.serve import served
from plait.server import create_app, resolve


def build() -> ASGIApp:
    """The server of one replica; made there, for open engines do not travel."""
    config = resolve({}, os.environ, os.environ.get("PLAIT_CONFIG"))
    app, _ = create_app(config, served(config))
    return app


@serve.deployment(num_replicas=2, max_ongoing_requests=256, graceful_shutdown_timeout_s=45, health_check_period_s=10)
@serve.ingress(build)
class Plait:
    """A replica."""


application = Plait.bind()
