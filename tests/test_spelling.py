"""Texts in the events of a run: what was said comes out whole, wherever tokens and chunks end, and means no more."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("gguf", reason="writes its own weights: needs the train extra")
pytest.importorskip("tokenizers", reason="needs the torch extra")

from tokenizers import Tokenizer, decoders, models

import tiny_tokenizers
import tiny_vocabulary
from plait.engines.llamacpp.vocabulary import GgufTokenizer
from plait.errors import TreeError
from plait.events import Event, RunEnded, RunStarted, SegmentEnded, SegmentStarted, TokensSampled, decode, encode
from plait.log import RunLog, read_log
from plait.models import gold_model, load_model
from plait.session import open_run
from plait.spelling import LogVocabulary, Spelling, describe, readable
from plait.terminal.reading import Reader, reader_of
from plait.testing.strategies import Program, programs
from plait.tokenizer.fast import FastTokenizer
from plait.tokenizer.text import TextTokenizer
from plait.tree import Tree
from plait.types import Budget, StopReason
from plait.viewer import describe_run, inspect_log

BROKEN = "\ufffd"
FAST = ("qwen", "llama-legacy", "llama-first", "llama-always")
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\ufffd"), max_size=4),
        st.sampled_from(
            ["the sky is blue", " ", "\n", "12", "\U0001f600", " \U0001f600", "\u5929\u7a7a", "<|im_end|>", "</s>"]
        ),
    ),
    max_size=6,
).map("".join)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    folder = tmp_path_factory.mktemp("vocabularies")
    made: dict[str, TextTokenizer] = {
        "gguf-bytes": GgufTokenizer(tiny_vocabulary.write_bytes(folder / "bytes.gguf")),
        "gguf-pieces": GgufTokenizer(tiny_vocabulary.write_pieces(folder / "pieces.gguf")),
    }
    for kind in FAST:
        (folder / kind).mkdir()
        tiny_tokenizers.tokenizer(kind).save(str(folder / kind / "tokenizer.json"))
        llama = kind.startswith("llama")
        settings = {
            "bos_token": "<s>" if llama else None,
            "eos_token": "</s>" if llama else "<|im_end|>",
            "chat_template": tiny_tokenizers.LLAMA if llama else tiny_tokenizers.QWEN,
        }
        (folder / kind / "tokenizer_config.json").write_text(json.dumps(settings))
        made[kind] = FastTokenizer.of_folder(folder / kind)
    return made


def run_of(
    tokenizer: TextTokenizer, forced: Sequence[int], sampled: Sequence[int], *, chunk: int, live: bool = False
) -> list[Event]:
    """A run of one segment, as a log of it is read; `live`: as far as it has come before the segment ends."""
    events: list[Event] = [
        RunStarted(meta={"tokenizer": describe(tokenizer), "format": "sequential"}),
        SegmentStarted(id="0:0", parent=None, forced_ids=tuple(forced)),
    ]
    for at in range(0, len(sampled), chunk):
        ids = tuple(sampled[at : at + chunk])
        events.append(TokensSampled(id="0:0", token_ids=ids, logprobs=(0.0,) * len(ids)))
    if not live:
        events += [SegmentEnded(id="0:0", stop=StopReason.EOS), RunEnded(stop=StopReason.EOS)]
    spelling = Spelling(tokenizer)
    return [decode(encode(spelling.spell(event))) for event in events]


def read(events: Sequence[Event]) -> tuple[Tree, Reader]:
    tree = Tree.from_events(readable(events))
    return tree, reader_of(tree.meta)


def texts_of(events: Sequence[Event]) -> list[str | None]:
    return [t for e in events if isinstance(e, SegmentStarted | TokensSampled) for t in e.texts]


# Characters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gguf-bytes", "gguf-pieces", *FAST])
@given(forced=TEXTS, sampled=TEXTS, chunk=st.integers(1, 5))
def test_what_was_said_is_read_whole_from_a_log_alone(
    tokenizers: dict[str, TextTokenizer], kind: str, forced: str, sampled: str, chunk: int
) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(forced), tokenizer.encode(sampled)
    events = run_of(tokenizer, *ids, chunk=chunk)
    tree, reader = read(events)
    segment = tree.segments["0:0"]
    assert reader.wire(segment.forced_ids) == tokenizer.decode(ids[0])
    assert reader.text(segment.sampled_ids) == tokenizer.decode(ids[1])
    assert "".join(filter(None, texts_of(events))) == tokenizer.decode([*ids[0], *ids[1]])


@pytest.mark.parametrize("kind", ["gguf-bytes", "gguf-pieces", "qwen"])
@given(data=st.data())
def test_whatever_is_sampled_is_read_as_the_tokenizer_reads_it(
    tokenizers: dict[str, TextTokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer.tokens) - 1), max_size=24))
    events = run_of(tokenizer, (), ids, chunk=data.draw(st.integers(1, 4)))
    tree, reader = read(events)
    got, whole = reader.wire(tree.segments["0:0"].sampled_ids), tokenizer.decode(ids)
    # Of bytes that are no character, how many marks stand for them may differ.
    said = [re.sub(f"{BROKEN}+", "", text) for text in (got, whole)]
    assert said[0] == said[1]
    assert (BROKEN in got) == (BROKEN in whole)


@pytest.mark.parametrize("kind", ["gguf-bytes", "gguf-pieces", *FAST])
def test_a_character_of_several_tokens_is_the_last_ones_text(tokenizers: dict[str, TextTokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("\U0001f600")
    assert len(ids) == 4
    assert texts_of(run_of(tokenizer, ids, ids, chunk=1)) == [None, None, None, "\U0001f600"] * 2


@pytest.mark.parametrize("kind", ["gguf-bytes", "gguf-pieces", *FAST])
def test_a_character_that_nobody_finished_is_marked(tokenizers: dict[str, TextTokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("is\U0001f600")[:-1]
    ends = tokenizer.eos_ids[:1]
    for sampled, live in ((ids, False), (ids, True), ((*ids, *ends), False)):
        tree, reader = read(run_of(tokenizer, (), sampled, chunk=2, live=live))
        assert reader.text(tree.segments["0:0"].sampled_ids) == f"is{BROKEN}"
    tree, reader = read(run_of(tokenizer, (), [*ids, *tokenizer.encode("the")], chunk=2))
    assert re.sub(f"{BROKEN}+", BROKEN, reader.text(tree.segments["0:0"].sampled_ids)) == f"is{BROKEN}the"


def test_a_token_is_spelled_by_what_is_before_it() -> None:
    vocabulary = {text: id for id, text in enumerate(["[UNK]", "[SEP]", "the", "sky", "##s", "."])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    inner.add_special_tokens(["[SEP]"])
    tokenizer = FastTokenizer(inner, named={"eos_token": "[SEP]"}, eos_ids=(), template=None, name="words")
    assert texts_of(run_of(tokenizer, (), (2, 3, 4, 2, 5), chunk=1)) == ["the", " sky", "s", " the", "."]


def test_bytes_that_become_no_character_are_not_held_for_ever(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["gguf-pieces"]
    byte = tokenizer.tokens.index("<0xFF>")
    texts = texts_of(run_of(tokenizer, (), [byte] * 30, chunk=1))
    assert texts == [*[None] * 7, BROKEN * 8] * 3 + [None] * 6


# What texts mean ---------------------------------------------------------------------------------------------------


def test_text_that_looks_like_a_control_token_is_text(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["gguf-bytes"]
    written, meant = tokenizer.encode("<|im_end|>"), tokenizer.encode("<|im_end|>", special=True)
    assert len(written) > len(meant) == 1
    events = run_of(tokenizer, (), [*written, *meant], chunk=1)
    tree, reader = read(events)
    segment = tree.segments["0:0"]
    assert reader.text(segment.sampled_ids) == "<|im_end|>"
    assert reader.wire(segment.sampled_ids) == "<|im_end|><|im_end|>"
    pieces = describe_run(events)["pieces"]
    assert [id for id in pieces["control"] if id in segment.sampled_ids] == meant
    # Also where one token of another id says the same.
    events = [replace(e, texts=("<|im_end|>",)) if isinstance(e, TokensSampled) else e for e in events]
    tree, reader = read(events)
    assert reader.text(tree.segments["0:0"].sampled_ids) == "<|im_end|>" * len(written)


def test_ids_keep_their_numbers_but_where_one_has_several_texts(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["gguf-pieces"]
    ids = tokenizer.encode("the sky \U0001f600 is \U0001f602")
    events = run_of(tokenizer, (), ids, chunk=3)
    run = describe_run(events)
    sampled, others = run["segments"][0]["sampled"], run["pieces"].get("ids", {})
    assert [others.get(str(number), number) for number in sampled] == ids
    assert "".join(run["pieces"]["texts"][str(number)] for number in sampled) == tokenizer.decode(ids)
    assert readable(readable(events)) == readable(events)


def test_a_log_says_few_control_tokens_and_never_a_whole_vocabulary(tokenizers: dict[str, TextTokenizer]) -> None:
    for tokenizer in tokenizers.values():
        about = describe(tokenizer)
        assert set(about) == {"control", "bos", "eos"}
        assert all(tokenizer.control_id(text) == id for text, id in about["control"].items())
        assert set(tokenizer.eos_ids) <= set(about["control"].values())
    of_bytes = tokenizers["gguf-bytes"]
    # Those of the template, those that end a text and those of the format; nobody asked for the others.
    assert set(describe(of_bytes)["control"]) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert "<Parallel>" in describe(of_bytes, ["<Parallel>", "<Path>"])["control"]


def test_a_block_is_read_by_its_tags(tokenizers: dict[str, TextTokenizer]) -> None:
    tags = {"<Parallel>": 3, "</Parallel>": 4, "<Path>": 5, "</Path>": 6, "<Summary>": 7, "</Summary>": 8}
    events: list[Event] = [
        RunStarted(
            meta={"format": "parallel_r1", "tokenizer": {"control": {"</s>": 2, **tags}, "bos": [], "eos": [2]}}
        ),
        SegmentStarted(id="0:0", parent=None, forced_ids=(9,), texts=("Why?",)),
        TokensSampled(id="0:0", token_ids=(10, 3), logprobs=(0.0, 0.0), texts=("Well. ", "<Parallel>")),
        SegmentEnded(id="0:0", stop=StopReason.STOP),
    ]
    tree, reader = read([decode(encode(event)) for event in events])
    said, *_ = reader.parts(tree)
    assert said.text == "Well. "  # pyright: ignore[reportAttributeAccessIssue]


@given(program=programs())
def test_texts_change_nothing_of_a_run(tokenizers: dict[str, TextTokenizer], program: Program) -> None:
    tokenizer = tokenizers["gguf-bytes"]
    tree, events, _ = program.run(chunk_size=2)
    spelling = Spelling(tokenizer)
    spelled = [decode(encode(spelling.spell(event))) for event in events]
    assert Tree.from_events(spelled) == tree
    told = replace(spelled[0], meta={"tokenizer": describe(tokenizer)})  # pyright: ignore[reportCallIssue]
    again, reader = read([told, *spelled[1:]])
    assert again.usage() == tree.usage()
    for s in tree.segments.values():
        read_ = reader.wire(again.segments[s.id].token_ids)
        assert read_.replace(BROKEN, "") == tokenizer.decode(s.token_ids).replace(BROKEN, "")


# Logs --------------------------------------------------------------------------------------------------------------


def test_events_of_a_vocabulary_that_the_log_holds_have_no_texts() -> None:
    model = gold_model()
    spelling = Spelling(model.tokenizer)
    event = TokensSampled(id="0:0", token_ids=(1,), logprobs=(0.0,))
    assert spelling.spell(event) is event
    assert "texts" not in encode(event)
    assert describe(model.tokenizer) == model.tokenizer.to_dict()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "texts", ['["a"]', '["a","b","c"]', '["a",1]', '"ab"', "3", '[["a"],"b"]'], ids=lambda text: f"texts={text}"
)
def test_texts_that_are_not_those_of_the_ids_are_refused(texts: str) -> None:
    with pytest.raises(TreeError, match="not an event"):
        decode(f'{{"event":"TokensSampled","id":"0:0","token_ids":[1,2],"logprobs":[0,0],"texts":{texts}}}')


@pytest.mark.parametrize(
    "about",
    [None, 3, [], {"control": 3}, {"control": {"a": "b"}}, {"control": {"a": float("inf")}}, {"control": {}, "bos": 1}],
)
def test_a_meta_that_says_nothing_of_use_leaves_the_texts(about: Any) -> None:
    events: list[Event] = [
        RunStarted(meta={"tokenizer": about}),
        SegmentStarted(id="0:0", parent=None, forced_ids=(5,)),
        TokensSampled(id="0:0", token_ids=(7, 8), logprobs=(0.0, 0.0), texts=("so", "on")),
    ]
    tree, reader = read(events)
    assert reader.wire(tree.segments["0:0"].token_ids) == "<5?>soon"


def test_a_vocabulary_of_a_log_writes_its_control_tokens_only() -> None:
    made = LogVocabulary(texts={1: "a", 2: "<x>"}, ids={}, control={"<x>": 2}, bos_ids=(), eos_ids=(2,))
    assert made.encode("<x>", special=True) == [2]
    assert made.decode(made.encode("<x>")) == made.decode(made.encode("a")) == ""
    assert made.encode("") == []


def test_a_run_of_a_gguf_file_is_logged_and_read_as_text(tmp_path: Path) -> None:
    model = load_model(str(tiny_vocabulary.write_bytes(tmp_path / "model.gguf")), format="sequential")
    path, live = tmp_path / "run.jsonl", list[str]()

    async def main() -> Tree:
        async with model.open_engine() as engine:
            request = model.request("Why is the sky blue? \U0001f600", budget=Budget(max_tokens=40), temperature=1.0)
            meta = {"question": "why", "tokenizer": describe(model.tokenizer, model.format.tags())}
            spelling = Spelling(model.tokenizer)
            async with open_run(request, engine=engine, format=model.format, meta=meta) as run:
                with RunLog(path) as log:
                    async for event in run:
                        log.write(spelling.spell(event))
                return run.tree

    tree = anyio.run(main)
    root = tree.segments["0:0"]
    events = read_log(path)
    again, reader = read(events)
    assert reader.wire(again.segments["0:0"].forced_ids) == model.tokenizer.decode(root.forced_ids)
    live.append(reader.text(again.segments["0:0"].sampled_ids))
    said = Reader(model.tokenizer, model.format).text(root.sampled_ids)
    assert re.sub(f"{BROKEN}+", "", live[0]) == re.sub(f"{BROKEN}+", "", said)
    sample = inspect_log([describe_run(events)], epochs=[0.0])["samples"][0]
    assert "Why is the sky blue? \U0001f600" in str(sample["events"])
    # The ids are those of the model.
    assert Tree.from_events(events) == tree
