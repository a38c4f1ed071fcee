"""Problems: gold traces are right, questions parse back, what is outside is refused, the split never leaks."""

from __future__ import annotations

import contextlib
import random
from itertools import islice, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait import tasks
from plait.errors import RequestError
from plait.formats import Block, open_format, render
from plait.tasks.notation import canonical, parse_expression
from plait.tasks.vocabulary import TOKENIZER, WIDE
from plait.tasks.worked import FORK_MARGIN

families = st.sampled_from(sorted(tasks.FAMILIES))
seeds = st.integers(0, 2**32)


def draw(name: str, seed: int) -> tasks.Problem:
    return tasks.sample(name, random.Random(seed), "train")


def text_of(trajectory: object) -> str:
    """Everything a solution says, threads included, in order."""
    assert isinstance(trajectory, tuple)
    out = ""
    for part in trajectory:
        if isinstance(part, Block):
            out += "".join(text_of(thread) for thread in part.threads) + part.conclusion
        else:
            out += str(part)
    return out


@given(families, seeds, st.booleans())
def test_both_gold_solutions_earn_full_marks(name: str, seed: int, parallel: bool) -> None:
    problem = draw(name, seed)
    chosen = tasks.FAMILIES[name]
    solution = chosen.parallel(problem) if parallel else chosen.serial(problem)
    assert tasks.grade(problem, text_of(solution))


@given(families, seeds)
def test_a_wrong_digit_in_the_answer_earns_nothing(name: str, seed: int) -> None:
    problem = draw(name, seed)
    last = problem.answer[-1]
    wrong = "12" if last == "e" else problem.answer[:-1] + str((int(last) + 1) % 10)
    assert not tasks.grade(problem, f"Answer: {wrong}")
    assert not tasks.grade(problem, problem.answer), "an answer must be given as one"
    assert not tasks.grade(problem, "")


@given(families, seeds)
def test_the_spoken_question_and_the_prompt_parse_back_to_the_problem(name: str, seed: int) -> None:
    problem = draw(name, seed)
    assert tasks.parse(problem.question) == problem
    assert tasks.parse(problem.prompt) == problem


@given(families, seeds)
def test_every_gold_trace_is_in_the_vocabulary_of_every_format(name: str, seed: int) -> None:
    problem = draw(name, seed)
    prompt_ids = (*TOKENIZER.bos_ids, *TOKENIZER.encode(tasks.spelled(problem.prompt)))
    for format in ("multiverse", "threadweaver"):
        tree = render(
            tasks.gold(problem, parallel=True),
            format=open_format(format, TOKENIZER),
            tokenizer=TOKENIZER,
            prompt_ids=prompt_ids,
        )
        forked = any(s.joins for s in tree.segments.values())
        assert forked == problem.forks
        last = tree.segments[f"0:{sum(s.thread == '0' for s in tree.segments.values()) - 1}"]
        assert tasks.grade(problem, TOKENIZER.decode(last.sampled_ids))


@given(families, seeds)
def test_forking_is_right_exactly_where_it_saves_the_margin(name: str, seed: int) -> None:
    shape, forks = draw(name, seed).shape, draw(name, seed).forks
    if name in ("long_multiplication", "expression", "bundle"):
        assert forks == (shape["parallel_cost"] <= (1 - FORK_MARGIN) * shape["serial_cost"])
    if name == "control":
        assert not forks


def test_predicted_costs_are_close_to_the_tokens_of_the_traces() -> None:
    for name in ("long_multiplication", "expression", "bundle", "product"):
        for problem in islice(tasks.problems(name, seed=3, split="train"), 30):
            serial = len(TOKENIZER.encode(text_of(tasks.FAMILIES[name].serial(problem)))) + 1
            assert abs(serial / problem.shape["serial_cost"] - 1) < 0.25, problem


def test_the_boundary_is_not_the_number_of_visible_digits() -> None:
    forks = [tasks.parse(q).forks for q in ("4738*5261", "4738*5000", "7*26", "47*526", "7*12345")]
    assert forks == [True, False, False, True, True]


def test_the_split_is_by_prompt_and_about_one_in_twenty() -> None:
    rng = random.Random(0)
    drawn = [tasks.FAMILIES["long_multiplication"].sample(rng).prompt for _ in range(4000)]
    share = sum(map(tasks.held_out, drawn)) / len(drawn)
    assert 0.035 < share < 0.07
    assert not any(tasks.held_out(p.prompt) for p in islice(tasks.problems("bundle", seed=0, split="train"), 50))
    assert all(tasks.held_out(p.prompt) for p in islice(tasks.problems("bundle", seed=0, split="held_out"), 10))


def test_the_same_seed_draws_the_same_problems() -> None:
    first, again = (list(islice(tasks.problems("product", seed=5, split="train"), 5)) for _ in range(2))
    other = list(islice(tasks.problems("product", seed=6, split="train"), 5))
    assert first == again != other


@pytest.mark.parametrize(
    ("question", "prompt", "family"),
    [
        ("What is 347 * 526?", "347*526?", "long_multiplication"),
        ("what's 347 times 526", "347*526?", "long_multiplication"),
        ("Compute 4,738 × 526.", "4738*526?", "long_multiplication"),  # noqa: RUF001
        ("347 x 526 = ?", "347*526?", "long_multiplication"),
        ("Calculate the product of 34 * 27 * 61 * 58", "34*27*61*58?", "product"),
        ("12*34 + (55+61)*78", "12*34+(55+61)*78?", "expression"),
        ("What is 347 * 52, 88 + 977 and (122 + 700) * 34?", "347*52;88+977;(122+700)*34?", "bundle"),
        ("347*52\n88+977", "347*52;88+977?", "bundle"),
        ("Use 3, 7 and 25 to make 54", "25,7,3>54?", "countdown"),
        ("use the numbers 3 7 25 to reach 54.", "25,7,3>54?", "countdown"),
        ("25,7,3>54?", "25,7,3>54?", "countdown"),
        ("What is 88 + 977?", "88+977?", "control"),
        ("(((47) + 36)) * 3 + 58", "(47+36)*3+58?", "control"),
        ("((47 + 36) * 3 + 58) * 2", "((47+36)*3+58)*2?", "control"),
        ("347 * 6", "347*6?", "control"),
    ],
)
def test_natural_questions_are_read(question: str, prompt: str, family: str) -> None:
    problem = tasks.parse(question)
    assert (problem.prompt, problem.family) == (prompt, family)


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("Who wrote Faust?", "not arithmetic"),
        ("", "no numbers"),
        ("12 - 5", "sums, products and brackets"),
        ("(3 + 4", "not closed"),
        ("1234567 * 89", "outside the trained range"),
        ("123456 * 123", "outside the trained range"),
        ("2 * 3 * 4", "outside the trained range"),
        ("Use 3, 7, 25 and 50 to make 81", "outside the trained range"),
        ("Use 3 and 7 to make 1000", "outside the trained range"),
        ("1+2;3+4;5+6;7+8;9+9", "outside the trained range"),
        ("007 * 35", "leading zeros"),
        ("5*67 + 812*3", "outside the trained range"),
        ("12*34; 56*78", "outside the trained range"),
        ("(2*3)*4", "outside the trained range"),
        ("Use 4, 5 and 7 to make 7", "times or over 1"),
        ("9" * 3000, "at most 2000"),
        ("(" * 500 + "1" + ")" * 500, "found '('"),
        ("<Parallel> 3 * 14", "not arithmetic"),
        ("0 * 35", "outside the trained range"),
    ],
)
def test_what_is_outside_is_refused_with_what_is_known(question: str, reason: str) -> None:
    with pytest.raises(RequestError, match=r"(?s)What is 347 \* 526\?.*Use 3, 7 and 25 to make 54") as caught:
        tasks.parse(question)
    assert reason in str(caught.value)


@given(st.text(max_size=60))
def test_no_text_makes_the_reader_fail_in_any_other_way(text: str) -> None:
    with contextlib.suppress(RequestError):
        assert tasks.parse(text).prompt.endswith("?")


@pytest.mark.parametrize(
    "answer",
    ["25-7=18,18*3=54", "25-7=18,3*18=54"],
)
def test_countdown_takes_any_valid_solution(answer: str) -> None:
    assert tasks.grade(tasks.parse("25,7,3>54"), f"Answer: {answer}")


@pytest.mark.parametrize(
    "answer",
    [
        "25-7=18,18*4=72",  # not a given number
        "25-7=18",  # not all numbers
        "25-7=18,18*3=53",  # wrong arithmetic
        "25-7=18,18*3=54,54*1=54",  # a number from nowhere
        "7-25=18,18*3=54",
        "25+29=54",
        "none",
        "54",
        "",
    ],
)
def test_countdown_refuses_wrong_solutions(answer: str) -> None:
    assert not tasks.grade(tasks.parse("25,7,3>54"), f"Answer: {answer}")


def test_countdown_takes_none_only_where_it_is_proven() -> None:
    problem = tasks.parse("2,2>99")
    assert problem.answer == "none"
    assert tasks.grade(problem, "Answer: none")
    assert not tasks.grade(problem, "Answer: 2+2=4")


@given(seeds)
def test_countdown_none_means_that_no_way_leads_there(seed: int) -> None:
    problem = draw("countdown", seed)
    left, right = problem.prompt.rstrip("?").split(">")

    def reaches(pool: tuple[int, ...], target: int) -> bool:
        if len(pool) == 1:
            return pool[0] == target
        for a, b in permutations(range(len(pool)), 2):
            x, y = pool[a], pool[b]
            rest = tuple(n for i, n in enumerate(pool) if i not in (a, b))
            values = [x + y, x - y, x * y, *([x // y] if x % y == 0 else [])]
            if any(1 <= v <= 99 and reaches((*rest, v), target) for v in values):
                return True
        return False

    solvable = reaches(tuple(map(int, left.split(","))), int(right))
    assert solvable == (problem.answer != "none")


def test_the_last_answer_counts_and_nothing_after_its_line() -> None:
    assert tasks.answer_of("Answer: 1\nAnswer: 22<eos>Answer") == "22"
    assert tasks.answer_of("no answer given") is None


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'countdown'"):
        tasks.family("countdwn")


def test_expressions_keep_their_nesting() -> None:
    assert str(parse_expression("((1+2)*3+4)*5")).count("Product") == 2
    assert canonical(" 3  *  4 ") == "3*4?"


HARDER = [
    ("product", {"factors": [5, 8], "up_to": 1000}),
    ("countdown", {"numbers": [0, 0, 0, 1], "up_to": 50}),
    ("long_multiplication", {"first": [0, 0, 0, 0, 0, 0, 1], "second": [0, 0, 0, 0, 0, 0, 1]}),
    ("expression", {"terms": [0, 0, 0, 0, 0, 1], "brackets": 1.0}),
    ("bundle", {"questions": [0, 0, 0, 0, 0, 1]}),
    ("control", {"steps": [6, 8]}),
]


@pytest.mark.parametrize(("name", "knobs"), HARDER)
def test_knobs_make_harder_problems_whose_gold_solutions_are_right(name: str, knobs: dict[str, object]) -> None:
    chosen = tasks.family(name, knobs)
    for problem in islice(tasks.problems(chosen, seed=3, split="train"), 8):
        for parallel in (True, False):
            solution = tasks.gold(problem, parallel=parallel)
            assert tasks.grade(problem, text_of(solution))
            opened = open_format("multiverse" if parallel else "sequential", WIDE)
            ids = (*WIDE.bos_ids, *WIDE.encode(tasks.spelled(problem.prompt)))
            render(solution, format=opened, tokenizer=WIDE, prompt_ids=ids)
    with pytest.raises(RequestError, match="outside the trained range"):
        tasks.parse(problem.question)


def test_a_product_of_eight_factors_is_reduced_by_a_tree_of_blocks() -> None:
    problem = next(tasks.problems(tasks.family("product", {"factors": [8, 8]}), seed=1, split="train"))
    blocks = [part for part in tasks.gold(problem, parallel=True) if isinstance(part, Block)]
    assert len(blocks) == 3
    assert len(blocks[0].threads) > len(blocks[1].threads)


def test_four_numbers_are_searched_to_the_end_or_to_the_first_hit() -> None:
    chosen = tasks.family("countdown", {"numbers": [0, 0, 0, 1]})
    for problem in islice(tasks.problems(chosen, seed=5, split="train"), 6):
        (block, _) = tasks.gold(problem, parallel=True)
        assert isinstance(block, Block)
        assert len(block.threads) == 6
        for thread in block.threads:
            text = text_of(thread)
            search, hit, found = text.partition("!=")
            assert bool(hit) != search.endswith("none")
            assert not hit or tasks.grade(problem, f"\nAnswer: {found}")
        assert any("!=" in text_of(t) for t in block.threads) == (problem.answer != "none")


@pytest.mark.parametrize(
    ("name", "knobs", "reason"),
    [
        ("product", {"factor": [5, 8]}, "did you mean 'factors'"),
        ("product", {"factors": [8, 5]}, "product cannot be drawn with"),
        ("countdown", {"numbers": "three"}, "countdown cannot be drawn with"),
    ],
)
def test_a_knob_that_is_not_there_or_cannot_be_is_refused(name: str, knobs: dict[str, object], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        tasks.family(name, knobs)


def test_a_refusal_shows_a_question_of_each_family() -> None:
    with pytest.raises(RequestError) as caught:
        tasks.parse("Why is the sky blue?")
    shown = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert [tasks.parse(question).family for question in shown] == list(tasks.FAMILIES)
