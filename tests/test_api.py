"""What `import plait` promises."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import plait


def test_every_exported_name_is_there_and_documented() -> None:
    assert sorted(plait.__all__) == list(plait.__all__)
    for name in plait.__all__:
        exported = getattr(plait, name)
        assert getattr(exported, "__doc__", None) or name in ("Context", "Event"), f"{name} has no docstring"


def test_each_name_is_where_type_checkers_are_told_it_is() -> None:
    module = ast.parse(Path(plait.__file__).read_text(encoding="utf-8"))
    told: dict[str, str] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("plait."):
            told |= {alias.name: f"{node.module}" for alias in node.names}
    assert sorted(told) == plait.__all__
    for name, home in told.items():
        assert getattr(plait, name) is getattr(import_module(home), name)
    assert set(plait.__all__) < set(dir(plait))
    assert not hasattr(plait, "no_such_name")


def test_modules_of_what_is_exported_need_no_import_of_their_own() -> None:
    script = "import plait; print(plait.errors.RequestError.status, plait.tree.Tree is plait.Tree)"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["400", "True"]


def test_errors_pickle_and_keep_their_kind() -> None:
    import pickle

    from plait import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.PlaitError)]
    assert len(classes) > 8
    for cls in classes:
        again = pickle.loads(pickle.dumps(cls("what happened")))
        assert type(again) is cls
        assert str(again) == "what happened"
