"""Transformers weights in this process: forks and merges by reference to blocks, weights that training may replace."""

from plait.engines.torch.engine import TorchEngine

__all__ = ["TorchEngine"]
