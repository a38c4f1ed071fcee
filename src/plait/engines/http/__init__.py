"""Servers that people already run, over HTTP: vLLM, SGLang, llama-server, and what speaks their routes."""

from importlib.util import find_spec

from plait.errors import needs

if find_spec("h11") is None:
    raise ImportError(needs("it", "http"))

from plait.engines.affinity import affinity
from plait.engines.http.client import Timeouts
from plait.engines.http.engine import HttpEngine
from plait.engines.http.probe import Server

__all__ = ["HttpEngine", "Server", "Timeouts", "affinity"]
