"""Starts an installed SGLang on a CPU without any of its kernels: run by SGLang's interpreter, with SGLang's arguments.

Its HTTP layer, tokenizer manager, scheduler, prefix cache, sampler and model code are as they were installed. Three
things are not there: the packages of its CUDA kernels, in whose place are empty modules; the hash by which a seed
draws, which has other values here; and batch-invariant kernels, so that deterministic inference is promised by float32
alone. Facts: SGLang 0.5.23. It starts processes that import this file again.
"""

from __future__ import annotations

import importlib.abc
import runpy
import sys
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

_ABSENT = ("sgl_kernel", "torchvision")
_BACKEND = "torch_native"


class _Absent(type):
    """A name out of a package that is not here: its names are absent too, and a call says so."""

    def __getattr__(cls, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(name, (), {"__doc__": f"{cls.__doc__}.{name}"})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{cls.__doc__} is not on this machine")


class _Module(types.ModuleType):
    __version__ = "99"

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(name, (), {"__doc__": f"{self.__name__}.{name}"})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in _ABSENT:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _hash() -> Any:
    """The operator that turns (seed, position, token id) into 32 bits on a CPU, as long as what is returned is kept."""
    import torch

    def mixed(hash_NM: Any) -> Any:
        # The finalizer of MurmurHash3, in 64 bits of which 32 count.
        hash_NM = hash_NM & 0xFFFFFFFF
        hash_NM = ((hash_NM ^ (hash_NM >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        hash_NM = ((hash_NM ^ (hash_NM >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        return hash_NM ^ (hash_NM >> 16)

    def hashed(seed_N: Any, positions_N: Any, columns_M: Any) -> Any:
        seed_N1 = seed_N.to(torch.int64)[:, None]
        rows_N1 = mixed(mixed(mixed(seed_N1) + (seed_N1 >> 32)) + positions_N.to(torch.int64)[:, None] * 0x9E3779B1)
        return mixed(rows_N1 + (columns_M.to(torch.int64)[None, :] + 1) * 0x9E3779B1).to(torch.uint32)

    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
    library.impl("murmur_hash32_cpu", hashed, "CPU")
    return library


def _prepare() -> Any:
    sys.meta_path.append(_Finder())
    from sglang.srt import batch_invariant_ops  # pyright: ignore[reportMissingImports]
    from sglang.srt.arg_groups import choices  # pyright: ignore[reportMissingImports]

    choices.add_deterministic_attention_backend_choices([_BACKEND])
    choices.add_radix_supported_deterministic_attention_backend_choices([_BACKEND])
    batch_invariant_ops.enable_batch_invariant_mode = lambda: None
    return _hash()


_KEPT = _prepare()
if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
