"""llama.cpp in this process, through the `xllamacpp` wheel: forks copy no memory, merges compute nothing again."""

from plait.engines.llamacpp.engine import LlamaCppEngine

__all__ = ["LlamaCppEngine"]
