"""Without a library that it needs, an engine says what to install."""

from __future__ import annotations

import sys

import pytest

from plait.engines import open_engine
from plait.errors import EngineUnavailable


def test_a_missing_torch_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("plait.engines.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineUnavailable, match=r"pip install 'plait\[torch\]'"):
        open_engine("torch", path="model.gguf")


def test_a_missing_h11_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("plait.engines.http")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "h11", None)
    with pytest.raises(EngineUnavailable, match=r"pip install 'plait\[http\]'"):
        open_engine("http", url="http://127.0.0.1:9")
