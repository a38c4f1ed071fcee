"""What every trainer needs of the machine it runs on: memory, number formats, the compiler, Ctrl-C.

Knows nothing of models' shapes, data and losses.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

import torch

from plait.train.pretrained.config import BaseConfig


def precision(name: Literal["auto", "bf16", "fp32"], base: BaseConfig | None = None) -> Literal["bf16", "fp32"]:
    """`auto` resolved: bf16 where the machine multiplies it, else fp32.

    Args:
        base: The model of transformers that is trained, which may be elsewhere than on the CPU.
    """
    if name != "auto":
        return name
    if base is not None and device(base.device).startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    has_bf16 = torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
    return "bf16" if has_bf16 else "fp32"


def device(name: str) -> str:
    """`auto` resolved: the GPU where there is one, else the CPU."""
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def use_threads(count: int) -> None:
    """Compute with so many threads of the CPU; 0: as many as torch takes. Each thread that computes has to say so."""
    if count:
        torch.set_num_threads(count)


def has_compiler() -> bool:
    """Whether `torch.compile` can work here."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def keep_memory() -> None:
    """Let the allocator keep and reuse what a step frees; measured: 15 % faster, it was page faults.

    glibc otherwise returns every large array to the system and gets it back page by page in the next step.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            mallopt(option, 2**31 - 1)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_ASKED = b"\nstopping after this step or evaluation; once more stops at once, and the last checkpoint stays\n"


@contextmanager
def interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C and a polite kill set; a second Ctrl-C ends the process at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        # Not by print, which the handler may have interrupted.
        os.write(2, _ASKED)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
