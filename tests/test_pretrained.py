import json
import warnings
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft", reason="needs the hf extra")
    pytest.importorskip("safetensors")
pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

from torch.nn.attention.flex_attention import create_mask, flex_attention  # noqa: E402

import plait  # noqa: E402
import tiny_pretrained  # noqa: E402
import tiny_tokenizers  # noqa: E402
from plait.cli import main  # noqa: E402
from plait.commands.train import train_sft  # noqa: E402
from plait.errors import ModelError, RequestError  # noqa: E402
from plait.formats import open_format  # noqa: E402
from plait.formats.base import Block  # noqa: E402
from plait.tokenizer.fast import FastTokenizer  # noqa: E402
from plait.train.packing import Bucket, Packer  # noqa: E402
from plait.train.pretrained.model import BaseConfig, add_control_tokens, load, visible  # noqa: E402
from plait.train.pretrained.records import Records  # noqa: E402
from plait.train.rows import rows  # noqa: E402
from plait.train.sft import SFTConfig, config_from, load_config, to_toml, train  # noqa: E402
from plait.train.tensors import inputs, spans  # noqa: E402
from plait.train.trie import dense_mask, flatten  # noqa: E402
from random_trees import random_tree  # noqa: E402

FORMAT = "multiverse"
TRACE = (
    "Two sums. ",
    Block(outlines=("3+4", "5+6"), threads=(("3+4=7",), ("5+6=11",)), conclusion="7 and 11"),
    "\nAnswer: 18",
)
OTHER = (
    "Sums. ",
    Block(outlines=("9+4", "2+6"), threads=(("9+4=13",), ("2+6=8",)), conclusion="13 and 8"),
    "\nAnswer: 21",
)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pretrained.write(tmp_path_factory.mktemp(request.param), request.param)


def data(path: Path, trace: Any = TRACE, *, prompt: str = "3+4+5+6?") -> Path:
    """One trace as a line of JSON."""
    text = plait.formats.text_format(FORMAT).write(trace)
    path.write_text(json.dumps({"prompt": prompt, "response": text, "answer": "18"}) + "\n")
    return path


def settings(folder: Path, tmp_path: Path, **base: Any) -> dict[str, Any]:
    return {
        "seed": 1,
        "precision": "fp32",
        "base": {"path": str(folder), "device": "cpu", **base},
        "data": {"format": FORMAT, "path": str(data(tmp_path / "data.jsonl")), "buckets": [[1, 256]]},
        "schedule": {"steps": 60, "warmup_steps": 3, "floor": 0.1},
        "optimiser": {"lr": 0.02},
    }


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def run(config: SFTConfig, out: Path, **more: Any) -> Any:
    return train(config, out=out, say=lambda line: None, **more)


@pytest.mark.parametrize("seed", range(8))
def test_the_mask_of_flex_attention_is_the_trees(seed: int) -> None:
    tree = flatten(random_tree(seed, joins=("concat", "merge", "message")))
    end, lo, hi = (torch.from_numpy(a)[None] for a in (tree.end, tree.hide_lo, tree.hide_hi))
    mask = visible(end, lo, hi)
    dense = create_mask(mask, 1, 1, len(tree), len(tree), device="cpu")[0, 0]
    assert np.array_equal(dense.numpy(), dense_mask(tree.end, tree.hide_lo, tree.hide_hi))


def test_flex_attention_gives_what_sdpa_gives(folder: Path) -> None:
    base = load(BaseConfig(path=str(folder), device="cpu"), tags=[])
    packer = Packer([Bucket(rows=2, length=96)], num_spans=4)
    for seed in (3, 4, 5):
        tree = flatten(random_tree(seed, depth=2))
        if len(tree) <= 96:
            packer.add(tree)
    batch = packer.flush()[0]
    base.flex = True
    block = base.biases(*spans(batch))
    base.flex = False
    dense = base.biases(*spans(batch))
    q, k, v = torch.randn(3, 2, 4, 96, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = flex_attention(q, k, v, block_mask=block)
    assert torch.allclose(ours, torch.nn.functional.scaled_dot_product_attention(q, k, v, dense), atol=1e-5)


def test_a_packed_tree_has_the_loss_of_its_rows_in_transformers_own_forward(folder: Path) -> None:
    model = load(BaseConfig(path=str(folder), device="cpu"), tags=[])
    tree = random_tree(11, joins=("concat",))
    packed = flatten(tree)
    packer = Packer([Bucket(rows=1, length=len(packed) + 5)], num_spans=packed.hide_lo.shape[1])
    packer.add(packed)
    batch = packer.flush()[0]
    ids, positions, labels, prev = inputs(batch)
    loss = model.losses(ids, positions, labels, prev, model.biases(*spans(batch))).sum()
    alone = torch.zeros(())
    for row in rows(tree):
        logits = model.inner(input_ids=torch.from_numpy(row.token_ids)[None]).logits[0]
        at = np.flatnonzero(row.loss_mask)
        alone = alone + torch.nn.functional.cross_entropy(
            logits[at - 1], torch.from_numpy(row.token_ids[at]), reduction="sum"
        )
    assert float(loss) == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.parametrize(("tied", "spare"), [(True, 0), (False, 0), (True, 64)])
def test_tags_become_tokens_that_start_as_the_mean_of_their_pieces(tmp_path: Path, tied: bool, spare: int) -> None:
    path = tiny_pretrained.write(tmp_path, "qwen3", tied=tied, spare=spare)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    rows_before = model.get_input_embeddings().weight.shape[0]
    pieces = tokenizer.encode("<Goal>", add_special_tokens=False)
    means = [t.weight[pieces].mean(0).detach() for t in (model.get_input_embeddings(), model.get_output_embeddings())]
    ids = add_control_tokens(model, tokenizer, ["<Goal>", "</Goal>"])
    assert tokenizer.encode("a<Goal>", add_special_tokens=False)[1:] == ids[:1]
    for table, mean in zip((model.get_input_embeddings(), model.get_output_embeddings()), means, strict=True):
        assert torch.allclose(table.weight[ids[0]], mean, atol=1e-6)
    assert model.get_input_embeddings().weight.shape[0] == (rows_before if spare else rows_before + 2)
    assert add_control_tokens(model, tokenizer, ["<Goal>"]) == [], "a second time adds nothing"


def test_what_a_user_writes_never_becomes_a_control_token(folder: Path) -> None:
    model = load(BaseConfig(path=str(folder), device="cpu"), tags=["<Goal>"])
    words = model.tokenizer
    goal = words.control_id("<Goal>")
    assert goal is not None
    assert goal in words.encode("a<Goal>b", special=True)
    assert goal not in words.encode("a<Goal>b")
    assert words.decode(words.encode("a<Goal>b")) == "a<Goal>b"
    model.fast.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] | trim }}{% endfor %}</s>"
    words = FastTokenizer.of_fast(model.fast)
    ids = words.prompt_ids([{"role": "user", "content": "<Goal></s>x"}])
    assert goal not in ids
    assert ids.count(words.eos_ids[0]) == 1, "the template's own marker"
    assert words.decode(ids) == "<s>user: <Goal></s>x</s>"


@pytest.mark.parametrize(
    ("kind", "words"),
    [("qwen3", ""), ("llama", ""), ("qwen3", "qwen"), ("llama", "llama-legacy"), ("llama", "llama-first")],
)
def test_what_is_trained_is_what_is_sampled_from(
    kind: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = tiny_tokenizers.fast(words) if words else None
    folder = tiny_pretrained.write(tmp_path / "base", kind, fast=fast)
    question = " 3+4+5+6? <Goal></s><|im_end|>"
    values = settings(folder, tmp_path)
    values["data"]["path"] = str(data(tmp_path / "data.jsonl", prompt=question))
    outcome = run(config_from(values), tmp_path / "out")
    curve = losses(tmp_path / "out")
    assert curve[-1] < 0.05 < 2 < curve[0]

    served = plait.load_model(str(outcome.model), format=FORMAT)
    trainer = load(BaseConfig(path=str(folder), device="cpu"), tags=served.format.tags()).tokenizer
    assert served.tokenizer.eos_ids == trainer.eos_ids

    async def sampled() -> plait.Tree:
        async with served.open_engine(dtype="float32") as engine:
            return await plait.run(served.request(question), engine=engine, format=served.format)

    tree = anyio.run(sampled)
    assert tree.num_threads == 2
    source = Records(tmp_path / "data.jsonl")
    (record,) = source.split("train")
    trace = source.trace(record, format=open_format(FORMAT, trainer), tokenizer=trainer)
    # Id by id: the prompt, each thread, the join and the end.
    calls = [[(s.id, s.forced_ids, s.sampled_ids) for s in t.walk()] for t in (tree, trace)]
    assert calls[0] == calls[1]

    ask = ["solve", question, "--engine", f"torch:{outcome.model}", "--format", FORMAT, "--json"]
    with pytest.raises(SystemExit, match="0"):
        main([*ask, "--engine-option", "dtype=float32", "--engine-option", "device=cpu"])
    said = json.loads(capsys.readouterr().out)
    assert said["text"] == served.text(tree)
    assert said["text"].endswith("\nAnswer: 18")
    transformers.AutoModelForCausalLM.from_pretrained(outcome.model)


def test_adapters_learn_and_are_merged_into_the_folder(folder: Path, tmp_path: Path) -> None:
    base = settings(folder, tmp_path)
    base["schedule"]["steps"] = 30
    values = settings(run(config_from(base), tmp_path / "base").model, tmp_path, lora_rank=8)
    values["data"]["path"] = str(data(tmp_path / "other.jsonl", OTHER))
    values["schedule"]["steps"], values["optimiser"]["lr"] = 40, 0.01
    outcome = run(config_from(values), tmp_path / "out")
    curve = losses(tmp_path / "out")
    assert curve[-1] < curve[0] / 2
    # The folder without peft is the model with its adapters: it has the loss that training ended at, or less.
    whole = load(BaseConfig(path=str(outcome.model), device="cpu"), tags=[])
    source = Records(values["data"]["path"])
    format = open_format(FORMAT, whole.tokenizer)
    tree = flatten(source.trace(source.split("train")[0], format=format, tokenizer=whole.tokenizer))
    packer = Packer([Bucket(rows=1, length=256)], num_spans=1)
    packer.add(tree)
    batch = packer.flush()[0]
    ids, positions, labels, prev = inputs(batch)
    with torch.no_grad():
        loss = whole.losses(ids, positions, labels, prev, whole.biases(*spans(batch))).sum() / batch.num_trained
    assert float(loss) < curve[-1] * 1.05
    assert float(loss) > curve[-1] / 2


def test_gradient_checkpointing_changes_memory_and_no_gradient(folder: Path) -> None:
    tree = flatten(random_tree(11, joins=("concat",)))
    packer = Packer([Bucket(rows=1, length=len(tree))], num_spans=tree.hide_lo.shape[1])
    packer.add(tree)
    batch = packer.flush()[0]
    ids, positions, labels, prev = inputs(batch)
    found = []
    for on in (False, True):
        model = load(BaseConfig(path=str(folder), device="cpu", gradient_checkpointing=on), tags=[])
        model.losses(ids, positions, labels, prev, model.biases(*spans(batch))).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_bf16_trains(folder: Path, tmp_path: Path) -> None:
    values = settings(folder, tmp_path)
    values["precision"], values["schedule"]["steps"] = "bf16", 30
    run(config_from(values), tmp_path / "out")
    curve = losses(tmp_path / "out")
    assert curve[-1] < curve[0] / 2


@pytest.mark.parametrize("lora", [0, 4])
def test_an_interrupted_run_goes_on_to_the_bit(folder: Path, tmp_path: Path, lora: int) -> None:
    values = settings(folder, tmp_path, lora_rank=lora)
    values["schedule"]["steps"] = 8
    config = config_from(values)
    run(config, tmp_path / "whole")
    assert not run(config, tmp_path / "parts", stop_after_steps=3).finished
    assert run(config, tmp_path / "parts").finished
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    with pytest.raises(ModelError, match="another run: seed"):
        run(config_from(values | {"seed": 2}), tmp_path / "parts")


def test_data_that_cannot_be_read_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for text, said in (
        ("{", "line 1 is not JSON"),
        ('{"prompt": 3}', "line 1 has no `prompt`"),
        ("", "no line to train on"),
    ):
        path.write_text(text)
        with pytest.raises(RequestError, match=said):
            Records(path)
    with pytest.raises(RequestError, match="cannot read the data"):
        Records(tmp_path / "none.jsonl")


def test_a_text_that_the_vocabulary_cannot_write_is_named_by_its_line(folder: Path, tmp_path: Path) -> None:
    words = FastTokenizer.of_folder(folder)
    path = tmp_path / "data.jsonl"
    for prompt, response in (("caf\u00e9?", "yes"), ("why?", "caf\u00e9")):
        lines = [{"prompt": "a", "response": "b"}, {"prompt": prompt, "response": response}]
        path.write_text("\n".join(map(json.dumps, lines)))
        source, format = Records(path), open_format("sequential", words)
        right, wrong = source.split("train")
        assert source.trace(right, format=format, tokenizer=words).num_sampled == 2
        with pytest.raises(RequestError, match=r"line 2: the text 'caf.*' cannot be written without .* '<unk>'"):
            source.trace(wrong, format=format, tokenizer=words)


def test_records_come_in_passes_each_once(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(n)}) + "\n" for n in range(7)))
    records = Records(path)
    first = [records.at(n, seed=1)["prompt"] for n in range(7)]
    assert sorted(first) == [str(n) for n in range(7)]
    assert first != [records.at(n, seed=1)["prompt"] for n in range(7, 14)]
    assert first == [records.at(n, seed=1)["prompt"] for n in range(7)]


def test_the_command_trains_a_config_that_has_a_base(folder: Path, tmp_path: Path) -> None:
    values = settings(folder, tmp_path)
    config = tmp_path / "run.toml"
    config.write_text(to_toml(config_from(values)))
    assert train_sft(str(config), out=str(tmp_path / "out"), settings=["schedule.steps=2"]) == 0
    assert len(losses(tmp_path / "out")) == 2
    assert (tmp_path / "out" / "model" / "config.json").exists()


def test_the_config_that_ships_is_one() -> None:
    config = load_config(Path(__file__).parent.parent / "configs" / "hf_sft.toml")
    assert config.base is not None
    assert config.base.lora_rank == 32
