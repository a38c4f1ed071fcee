"""The architecture diagram: imports point down this list, and heavy packages stay in their own files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "plait"

LAYERS = (
    ("errors",),
    ("settings", "registry"),
    ("types",),
    ("events",),
    ("tree",),
    ("tokenizer",),
    ("log", "formats", "engines", "spelling"),
    ("budget", "channel"),
    ("session",),
    ("testing",),
    ("tasks",),
    ("models",),
    ("inspect_provider",),
    ("bench",),
    ("train",),
    ("terminal",),
    ("viewer",),
    ("server",),
    ("commands",),
    ("cli",),
)
"""Lower first; modules of one layer do not import each other."""

HEAVY = {
    "torch": ("train", "engines/torch"),
    "transformers": ("train/pretrained",),
    "peft": ("train/pretrained",),
    "accelerate": ("train/pretrained",),
    "verl": ("train/handoff/verl.py",),
    "trl": ("train/handoff/trl.py",),
    "verifiers": ("train/handoff/verifiers.py",),
    "gguf": ("train/gguf.py", "engines/torch/checkpoint.py"),
    "safetensors": ("engines/torch/checkpoint.py",),
    "tokenizers": ("tokenizer/fast.py", "tokenizer/parts.py"),
    "jinja2": ("tokenizer/chat.py",),
    "numpy": ("engines/llamacpp", "engines/torch", "engines/inprocess", "train"),
    "rich": ("terminal", "commands", "cli.py", "train/display.py"),
    "fastapi": ("server",),
    "starlette": ("server",),
    "uvicorn": ("server",),
    "pydantic": ("server",),
    "prometheus_client": ("server/__init__.py", "server/metrics.py"),
    "click": ("commands", "cli.py"),
    "hypothesis": ("testing/strategies.py",),
    "pytest": ("testing/pytest.py",),
    "selenium": (),
    "h11": ("engines/http/chunked.py", "engines/http/wire.py", "server/connection.py"),
    "httpx2": ("bench/load.py", "inspect_provider.py", "server/spans.py"),
    "inspect_ai": ("inspect_provider.py",),
    # An engine that is woken from its own thread has to ask the running loop how.
    "trio": ("testing/clock.py", "engines/llamacpp/engine.py"),
}
"""Where a package may be imported at all."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


@cache
def imports() -> dict[Path, list[str]]:
    """What every module imports, by its path."""
    return {path.relative_to(SRC): list(imported(path)) for path in sorted(SRC.rglob("*.py"))}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def test_imports_point_down() -> None:
    for path, names in imports().items():
        here = layer_of(path)
        if here.startswith("__"):
            continue
        assert here in LEVEL, f"{path} is in no layer: add {here} to LAYERS"
        for name in names:
            package, _, rest = name.partition(".")
            there = rest.split(".")[0]
            if package == "plait" and there in LEVEL and there != here:
                assert LEVEL[there] < LEVEL[here], f"{path} imports {name}, which is not below it"


@pytest.mark.parametrize("package", sorted(HEAVY))
def test_heavy_packages_stay_in_their_files(package: str) -> None:
    for path, names in imports().items():
        if any(name.split(".")[0] == package for name in names):
            assert path.as_posix().startswith(HEAVY[package]), f"{path} imports {package}"


def test_importing_plait_brings_in_no_heavy_package() -> None:
    script = "import sys; from plait import *; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "plait.session" in loaded
    assert not {"torch", "numpy", "rich", "click", "xllamacpp", "trio", "hypothesis"} & set(loaded)
