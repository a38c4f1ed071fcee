"""Without a library that it needs, an engine says what to install."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from plait.engines import open_engine
from plait.errors import EngineUnavailable


def test_a_missing_torch_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("plait.engines.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineUnavailable, match=r"pip install '\.\[torch\]' in a clone"):
        open_engine("torch", path="model.gguf")


def test_a_missing_h11_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("plait.engines.http")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "h11", None)
    with pytest.raises(EngineUnavailable, match=r"pip install '\.\[http\]' in a clone"):
        open_engine("http", url="http://127.0.0.1:9")


def test_how_an_extra_is_installed_is_said_in_one_place_and_all_extras_are_there() -> None:
    root = Path(__file__).parent.parent
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    sources = {path.name: path.read_text(encoding="utf-8") for path in (root / "src" / "plait").rglob("*.py")}
    assert [name for name, text in sources.items() if re.search(r"pip install '(plait|\.)\[(?!NAME)", text)] == [
        "errors.py"
    ]
    named = re.findall(r"\bneeds\([^,\n]+, ['\"](\w+)['\"]\)|the extra `(\w+)`", "\n".join(sources.values()))
    assert len(named) > 10
    assert {"".join(pair) for pair in named} <= set(extras)
