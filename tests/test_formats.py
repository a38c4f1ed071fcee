"""Formats: exact text on the wire, what counts as a fork, what a join reads."""

from __future__ import annotations

import pytest

from plait.errors import RequestError
from plait.formats import Block, Fork, Malformed, ThreadOutcome, TrajectoryFormat, open_format, render
from plait.formats.threadweaver import ThreadWeaver
from plait.tasks.vocabulary import TOKENIZER
from plait.tokenizer import FixedTokenizer
from plait.types import Merge, StopReason

TAGGED = ("threadweaver", "multiverse")


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, special=True)


def opened(name: str) -> TrajectoryFormat:
    return open_format(name, TOKENIZER)


def fork_of(name: str, text: str) -> Fork:
    fork = opened(name).parse(encode(text), 0)
    assert isinstance(fork, Fork)
    return fork


def test_threadweaver_is_exact_on_the_wire() -> None:
    trajectory = ("7", Block(outlines=("60", "5"), threads=(("6*9=54",), ("5*9=45",))), "\nAnswer: 99")
    tree = render(trajectory, format=opened("threadweaver"), tokenizer=TOKENIZER, prompt_ids=encode("9?"))
    text = {s.id: (TOKENIZER.decode(s.forced_ids), TOKENIZER.decode(s.sampled_ids)) for s in tree.walk()}
    assert text == {
        "0:0": (
            "9?",
            "7<Parallel>\n<Outlines>\n<Outline>1: 60</Outline>\n<Outline>2: 5</Outline>\n</Outlines>",
        ),
        "0/0.0:0": ("\n<Thread>\n1:", " 6*9=54\n</Thread>"),
        "0/0.1:0": ("\n<Thread>\n2:", " 5*9=45\n</Thread>"),
        "0:1": (
            "\n<Thread>\n1: 6*9=54\n</Thread><Thread>\n2: 5*9=45\n</Thread>\n",
            "</Parallel>\nAnswer: 99<eos>",
        ),
    }
    assert tree.segments["0:1"].join == "concat"


def test_threadweaver_with_conclusion_opens_it_for_the_model() -> None:
    format = ThreadWeaver(TOKENIZER, conclusion=True)
    tree = render(
        (Block(outlines=("1",), threads=(("2",),), conclusion="3"),),
        format=format,
        tokenizer=TOKENIZER,
        prompt_ids=encode("9?"),
    )
    joined = tree.segments["0:1"]
    assert TOKENIZER.decode(joined.forced_ids).endswith("</Thread>\n<Conclusion>\n")
    assert TOKENIZER.decode(joined.sampled_ids) == "3\n</Conclusion>\n</Parallel><eos>"


def test_multiverse_merges_and_opens_the_conclusion() -> None:
    trajectory = (Block(outlines=("6", "5"), threads=(("6*9",), ("5",)), conclusion="Sum: 09"), "\nAnswer: 9")
    tree = render(trajectory, format=opened("multiverse"), tokenizer=TOKENIZER, prompt_ids=encode("9?"))
    joined = tree.segments["0:1"]
    assert TOKENIZER.decode(joined.forced_ids) == "<Conclusion>"
    assert TOKENIZER.decode(joined.sampled_ids) == "Sum: 09</Conclusion></Parallel>\nAnswer: 9<eos>"
    prefix, merge, after = tree.context("0:1")
    assert isinstance(merge, Merge)
    assert [TOKENIZER.decode(b[0]) for b in merge.branches if isinstance(b[0], tuple)] == [
        "<Path>1: 6*9</Path>",
        "<Path>2: 5</Path>",
    ]
    assert prefix == tuple(encode("9?<Parallel><Goal><Outline>1: 6</Outline><Outline>2: 5</Outline></Goal>"))
    assert after == joined.forced_ids


def test_repeated_numbers_count_once_and_are_noted() -> None:
    fork = fork_of(
        "multiverse", "<Parallel><Goal><Outline>1: 6</Outline><Outline>1: 7</Outline><Outline>2: 8</Outline></Goal>"
    )
    assert [b.label for b in fork.branches] == ["6", "8"]
    assert fork.note == "outline 1 twice"


def test_numbers_are_copied_as_they_are_in_the_order_written() -> None:
    fork = fork_of(
        "threadweaver", "<Parallel>\n<Outlines>\n<Outline>3: 6</Outline>\n<Outline>1: 7</Outline>\n</Outlines>"
    )
    assert [TOKENIZER.decode(b.header_ids) for b in fork.branches] == ["\n<Thread>\n3:", "\n<Thread>\n1:"]


@pytest.mark.parametrize(
    "text",
    [
        "</Goal>",
        "<Parallel><Goal></Goal>",
        "<Goal><Outline>7</Outline></Goal>",
        "<Goal>1: 6</Goal>",
        "<Goal><Outline></Goal>",
    ],
)
def test_a_block_without_a_numbered_outline_is_malformed(text: str) -> None:
    assert isinstance(opened("multiverse").parse(encode(text), 0), Malformed)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("<Outline>1: 6</Outline></Goal>", "no <Goal>"),
        ("<Goal><Outline>1: 6</Outline><Outline>7</Outline></Goal>", "an outline without a number"),
        ("<Goal><Outline>1: 6<Outline>2: 7</Goal>", ""),
    ],
)
def test_what_can_be_read_is_read_and_the_rest_noted(text: str, note: str) -> None:
    assert fork_of("multiverse", text).note == note


def test_only_the_last_list_of_a_call_counts() -> None:
    fork = fork_of("multiverse", "<Goal><Outline>1: 6</Outline><Goal><Outline>2: 7</Outline></Goal>")
    assert [b.label for b in fork.branches] == ["7"]


def test_two_hundred_outlines_are_read_and_left_to_the_budget() -> None:
    text = "".join(f"<Outline>{i}: 6</Outline>" for i in range(200))
    assert len(fork_of("multiverse", f"<Goal>{text}</Goal>").branches) == 200


def test_a_block_inside_a_thread_is_text() -> None:
    for name in TAGGED:
        format = opened(name)
        assert format.parse(encode(format.open_text(Block(outlines=("6", "7"), threads=()))), 1) is None
        assert format.stop_ids(0) != format.stop_ids(1)


def test_eos_inside_a_thread_is_not_read_again_by_the_parent() -> None:
    format = opened("threadweaver")
    header = tuple(encode("\n<Thread>\n1:"))
    outcome = ThreadOutcome(header_ids=header, token_ids=tuple(encode("6<eos>\n</Thread>")), stop=StopReason.EOS)
    assert TOKENIZER.decode(format.join([outcome]).forced_ids) == "\n<Thread>\n1:6\n</Thread>\n"


def test_a_vocabulary_without_the_tags_is_refused_by_name() -> None:
    plain = FixedTokenizer(("a", "<e>"), control=("<e>",), bos="<e>", eos="<e>")
    with pytest.raises(RequestError, match="needs <Goal> as one control token"):
        open_format("multiverse", plain)
    with pytest.raises(RequestError, match="did you mean 'multiverse'"):
        open_format("multivers", TOKENIZER)


def test_a_users_text_never_becomes_control_ids() -> None:
    with pytest.raises(RequestError, match="no 'P'"):
        TOKENIZER.encode("3<Parallel>")
    assert TOKENIZER.decode(TOKENIZER.encode("12*34?")) == "12*34?"
