"""What `import plait` promises."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import anyio
import pytest

import plait
from plait.engines.scripted import ScriptedEngine


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


MODEL = plait.load_model()
REQUEST = MODEL.request("What is 347 * 526?")


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("request", "What is 2 + 2?", r"the request is 'What is 2 \+ 2\?'.*model\.request\(text\)"),
        ("request", (1, 2), "must be a Request"),
        ("engine", "llamacpp", r"the engine is 'llamacpp'.*async with model\.open_engine\(\) as engine"),
        ("engine", ScriptedEngine, "the engine is <class"),
        ("engine", MODEL, "must be one that is open"),
        ("engine", None, "the engine is None"),
        ("format", "multiverse", r"the format is 'multiverse'.*model\.format"),
        ("format", type(MODEL.format), "the format is <class"),
        ("format", None, "the format is None"),
        ("meta", "a note", "meta is 'a note'; it must be a Mapping or left out"),
    ],
)
def test_a_run_says_what_was_likely_meant(name: str, wrong: Any, says: str) -> None:
    given: dict[str, Any] = {"request": REQUEST, "engine": ScriptedEngine(), "format": MODEL.format, name: wrong}
    request = given.pop("request")

    async def main() -> None:
        await plait.run(request, **given)

    with pytest.raises(plait.PlaitError, match=says):
        anyio.run(main)


@pytest.mark.parametrize("wrong", [("abc",), ((1, 2, 3),), ([1, 2],), (((1.5,),),), ((("a",),),)], ids=repr)
@pytest.mark.parametrize("name", ["scripted", "llamacpp"])
def test_an_engine_refuses_what_is_no_context(name: str, wrong: tuple[Any]) -> None:
    async def main() -> None:
        engine = ScriptedEngine() if name == "scripted" else MODEL.open_engine(name, threads=1)
        params = plait.SamplingParams(max_tokens=1)
        async with engine:
            with pytest.raises(plait.PlaitError, match="it must be a tuple of runs of token ids"):
                await anext(engine.generate(wrong[0], params))
            for no_params in (5, REQUEST):
                given: Any = no_params
                with pytest.raises(plait.PlaitError, match="they must be SamplingParams"):
                    await anext(engine.generate(((1, 2),), given))

    anyio.run(main)


@pytest.mark.parametrize("wrong", [None, 3, MODEL, ["a"]], ids=["None", "3", "a model", "a list"])
def test_what_is_asked_for_by_name_is_asked_for_by_name(wrong: Any) -> None:
    says = "; it must be text"
    with pytest.raises(plait.PlaitError, match=says):
        plait.load_model(wrong)
    with pytest.raises(plait.PlaitError, match=says):
        plait.open_engine(wrong)
    with pytest.raises(plait.PlaitError, match=says):
        plait.open_format(wrong, MODEL.tokenizer)
    with pytest.raises(plait.PlaitError, match=says):
        MODEL.request(wrong)
    with pytest.raises(plait.PlaitError, match=r"the tokenizer is .*model\.tokenizer"):
        plait.open_format("multiverse", wrong)
    with pytest.raises(plait.PlaitError, match=r"must be a Tree: `await plait\.run"):
        MODEL.answer(wrong)


def test_settings_that_are_none_name_the_nearest() -> None:
    with pytest.raises(plait.PlaitError, match="'temprature'; did you mean 'temperature'"):
        MODEL.request("What is 347 * 526?", temprature=0.5)
    with pytest.raises(plait.PlaitError, match="unknown option of the plait format 'level'; did you mean 'levels'"):
        plait.open_format("plait", MODEL.tokenizer, level=3)


def test_the_address_of_a_server_is_an_engine() -> None:
    pytest.importorskip("h11")
    engine = plait.open_engine("http://localhost:8000", max_calls=3)
    assert type(engine).__name__ == "HttpEngine"
    with pytest.raises(plait.PlaitError, match="http://host:port"):
        plait.open_engine("ftp://localhost")


def test_errors_pickle_and_keep_their_kind() -> None:
    import pickle

    from plait import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.PlaitError)]
    assert len(classes) > 8
    for cls in classes:
        again = pickle.loads(pickle.dumps(cls("what happened")))
        assert type(again) is cls
        assert str(again) == "what happened"
