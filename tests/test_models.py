"""Models as files: what is read from them, what is refused, and gold traces in their place."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest

from plait import tasks
from plait.errors import ModelError, RequestError
from plait.models import Model, gold_model, load_model, twin_name
from plait.session import run
from plait.types import StopReason
from tiny_gguf import config, gguf, write_model


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_model(tmp_path / "some.gguf")


def test_a_model_says_what_it_was_trained_in(path: Path) -> None:
    model = load_model(str(path))
    assert (model.name, model.format_name, model.join, model.max_context) == ("some", "multiverse", "merge", 512)
    assert model.families == ("long_multiplication", "control")
    assert (model.num_weights, model.dtype) == (64, "F32")
    assert model.tokenizer.decode(model.tokenizer.encode("347*526?")) == "347*526?"
    assert model.format.name == "multiverse"


def test_weights_of_one_name_and_other_content_have_another_id(tmp_path: Path) -> None:
    first = load_model(str(write_model(tmp_path / "a.gguf")))
    second = load_model(str(write_model(tmp_path / "a.gguf", scores={})))
    assert first.name == second.name
    assert first.id != second.id


def test_a_run_folder_names_its_model(tmp_path: Path) -> None:
    (tmp_path / "adaptive").mkdir()
    assert load_model(str(write_model(tmp_path / "adaptive" / "model.gguf"))).name == "adaptive"


def test_loading_under_another_format_is_refused_and_both_are_named(path: Path) -> None:
    with pytest.raises(RequestError, match=r"trained in the multiverse format .* threadweaver"):
        load_model(str(path), format="threadweaver")
    assert load_model(str(path), format="multiverse").format_name == "multiverse"


def test_an_unknown_format_is_met_with_the_nearest(path: Path) -> None:
    with pytest.raises(RequestError, match="did you mean 'multiverse'"):
        load_model(str(path), format="multivers")


def test_an_unknown_name_is_met_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'plait-tiny'"):
        load_model("plait-tyni")


def test_a_path_without_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.gguf"):
        load_model(str(tmp_path / "nowhere.gguf"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(path: Path, share: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ModelError, match=r"corrupt|not a GGUF"):
        load_model(str(path))


@pytest.mark.parametrize("at", [4, 8, 16, 24])
def test_a_garbled_header_is_refused(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(ModelError):
        load_model(str(path))


def test_a_file_whose_sum_is_wrong_is_refused(path: Path) -> None:
    sums = path.with_name("SHA256SUMS")
    sums.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  some.gguf\n")
    load_model(str(path))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match="corrupt"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "neither a plait.config nor a vocabulary"),
        ("{", "cannot be read"),
        ("{}", "incomplete"),
        (json.dumps(config(tokenizer={"tokens": []})), "incomplete"),
    ],
)
def test_a_file_that_does_not_say_how_to_read_it_is_refused(tmp_path: Path, text: str | None, says: str) -> None:
    about: dict[str, str | int] = {"general.architecture": "llama", "llama.context_length": 512}
    if text is not None:
        about["plait.config"] = text
    (tmp_path / "x.gguf").write_bytes(gguf(about))
    with pytest.raises(ModelError, match=says):
        load_model(str(tmp_path / "x.gguf"))


def test_a_model_refuses_families_it_was_not_trained_on(path: Path) -> None:
    model = load_model(str(path))
    assert model.request("What is 347 * 526?", seed=3).seed == 3
    with pytest.raises(RequestError, match="not trained on countdown"):
        model.request("Use 3, 7 and 25 to make 54")


def test_a_twin_lies_beside_its_model(path: Path) -> None:
    assert Path(twin_name(load_model(str(path)))) == path.with_name("some-sequential.gguf")


def test_the_twin_of_a_run_folder_is_the_folder_beside_it(tmp_path: Path) -> None:
    (tmp_path / "adaptive").mkdir()
    model = load_model(str(write_model(tmp_path / "adaptive" / "model.gguf")))
    assert Path(twin_name(model)) == tmp_path / "adaptive-sequential" / "model.gguf"


def test_the_scripted_engine_is_not_given_weights(path: Path) -> None:
    with pytest.raises(RequestError, match="cannot run some"):
        load_model(str(path)).open_engine("scripted")


@pytest.mark.anyio
@pytest.mark.parametrize(
    "model", [gold_model(), gold_model("threadweaver"), gold_model(traces="serial")], ids=lambda m: m.name
)
async def test_gold_traces_answer_every_family(model: Model) -> None:
    async with model.open_engine() as engine:
        for family in tasks.FAMILIES:
            for problem in itertools.islice(tasks.problems(family, seed=1, split="held_out"), 3):
                tree = await run(model.request(problem.question), engine=engine, format=model.format)
                assert tree.stop is StopReason.EOS
                assert tasks.grade(problem, model.text(tree)), problem.prompt
                assert (tree.num_forks > 0) == (problem.forks and model.join != "none")
