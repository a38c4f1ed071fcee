"""The processes that train together, as torchrun and `accelerate launch` start them; one where neither did.

Knows nothing of models, data and losses.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """A context manager; all processes leave it together."""

    def __init__(self) -> None:
        self.count, self.number = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.first = self.number == 0
        """The one that writes files and talks."""
        self._opened = False

    def __enter__(self) -> Ranks:
        if self.count > 1 and not dist.is_initialized():
            self.use_device()
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            self._opened = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._opened:
            return
        if kind is None:
            dist.barrier()  # none goes while another still talks to it; that once aborted a process at its end
        dist.destroy_process_group()

    def use_device(self) -> None:
        """Compute on this process's own GPU, where there are any; each thread that computes has to say so."""
        if self.count > 1 and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """Every n-th item: this process's share."""
        return items[self.number :: self.count]

    def any(self, asked: bool) -> bool:
        """Whether one process at least says so: clocks and signals differ, and steps are taken together."""
        return any(self.gather(asked)) if self.count > 1 else asked

    def gather(self, value: T) -> list[T]:
        """What every process says, in their order; plain values."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every process has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue]
