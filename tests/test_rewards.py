from dataclasses import replace

import pytest

from plait.errors import RequestError
from plait.train.rewards import (
    TERMS,
    Group,
    Outcome,
    Reward,
    acceleration,
    budget_adherence,
    correctness,
    format_validity,
    kimi,
    latency,
    length_penalty,
    npr,
    parallel_r1,
)

RIGHT = Outcome(
    correct=True,
    forks=1,
    threads=2,
    closed_threads=2,
    segments=4,
    response_tokens=100,
    token_latency=60,
    sampled_tokens=90,
    critical_path_tokens=50,
    baseline_tokens=80.0,
)
WRONG = replace(RIGHT, correct=False)
ALONE = Group(outcomes=(RIGHT,))


def spam(outcome: Outcome, threads: int, tokens: int) -> Outcome:
    """The same run with threads that do nothing beside its longest one; each costs an outline on the main path."""
    return replace(
        outcome,
        threads=outcome.threads + threads,
        closed_threads=outcome.closed_threads + threads,
        response_tokens=outcome.response_tokens + threads * (tokens + 3),
        token_latency=outcome.token_latency + threads * 3,
        sampled_tokens=outcome.sampled_tokens + threads * (tokens + 3),
        critical_path_tokens=outcome.critical_path_tokens + threads * 3,
    )


@pytest.mark.parametrize(
    ("variant", "eta", "expected"),
    [
        ("paper", 0.1, 0.05),
        ("paper", 0.3, 0.15),
        ("paper", 0.6, 0.2),
        ("code", 0.1, 0.05),
        ("code", 0.048, 0.024),
        ("code", 0.3, 0.1),
        ("readme", 0.1, 0.5 * (1 / 0.9 - 1)),
        ("readme", 0.5, 0.1),
    ],
)
def test_the_three_published_accelerations_differ(variant: str, eta: float, expected: float) -> None:
    outcome = replace(RIGHT, response_tokens=1000, token_latency=round(1000 * (1 - eta)))
    assert acceleration(outcome, ALONE, variant=variant) == pytest.approx(expected)  # pyright: ignore[reportArgumentType]
    assert acceleration(replace(outcome, correct=False), ALONE) == 0


def test_the_released_code_pays_1_1_at_most_and_minus_1_for_a_wrong_answer() -> None:
    reward = Reward({"correctness": {"wrong": -1}, "acceleration": {"variant": "code"}})
    assert reward(RIGHT, ALONE) == pytest.approx(1.1)
    assert reward(replace(RIGHT, token_latency=100), ALONE) == 1.0
    assert reward(WRONG, ALONE) == -1.0


def test_threads_that_do_nothing_raise_every_published_acceleration_and_never_the_recommended_reward() -> None:
    modest = replace(RIGHT, token_latency=95)
    spammed = spam(modest, threads=50, tokens=40)
    for variant in ("paper", "code", "readme"):
        assert acceleration(spammed, ALONE, variant=variant) > acceleration(modest, ALONE, variant=variant)  # pyright: ignore[reportArgumentType]
    recommended = Reward({"correctness": {}, "latency": {}, "format_validity": {}})
    for threads in (1, 5, 50):
        assert recommended(spam(modest, threads, 40), ALONE) < recommended(modest, ALONE)


def test_latency_compares_with_a_number_that_the_policy_does_not_influence() -> None:
    assert latency(RIGHT, ALONE) == pytest.approx(0.5 * (1 - 50 / 80))
    assert latency(replace(RIGHT, response_tokens=10_000, sampled_tokens=9_000), ALONE) == latency(RIGHT, ALONE)
    assert latency(replace(RIGHT, critical_path_tokens=100), ALONE) == pytest.approx(-0.125)
    assert latency(replace(RIGHT, critical_path_tokens=10_000), ALONE) == -0.5
    assert latency(WRONG, ALONE) == latency(replace(RIGHT, baseline_tokens=None), ALONE) == 0


def test_a_right_answer_is_worth_more_than_a_wrong_one_however_slow_and_malformed() -> None:
    recommended = Reward({"correctness": {}, "latency": {"weight": 0.4}, "format_validity": {}})
    slow = replace(RIGHT, critical_path_tokens=10**6, faults=("x",))
    assert recommended(slow, ALONE) > recommended(WRONG, ALONE) > recommended(replace(WRONG, faults=("x",)), ALONE)


def test_faults_of_format_cost_and_a_limit_alone_does_not() -> None:
    assert format_validity(RIGHT, ALONE) == 0
    assert format_validity(replace(RIGHT, faults=("0:0: no <Goal>",)), ALONE) == -0.5
    assert format_validity(replace(RIGHT, limited=2), ALONE) == 0
    assert budget_adherence(replace(RIGHT, limited=2), ALONE) == -0.25
    assert budget_adherence(RIGHT, ALONE) == 0


def test_parallel_r1_pays_for_threads_in_two_steps_of_ten() -> None:
    paid = [step for step in range(20) if parallel_r1(RIGHT, replace(ALONE, step=step)) == pytest.approx(1.2)]
    assert paid == [8, 9, 18, 19]
    late = replace(ALONE, step=9)
    assert parallel_r1(replace(RIGHT, forks=0), late) == parallel_r1(replace(RIGHT, faults=("x",)), late) == 1
    assert parallel_r1(WRONG, late) == parallel_r1(WRONG, ALONE) == -1
    assert parallel_r1(RIGHT, late, schedule="S1") == 1


def test_npr_stays_in_the_ranges_of_its_paper() -> None:
    for faults in range(1, 8):
        bad = tuple(map(str, range(faults)))
        assert -2 <= npr(replace(RIGHT, faults=bad), ALONE) < 0
        assert -3 <= npr(replace(WRONG, faults=bad), ALONE) < -1
    assert (npr(RIGHT, ALONE), npr(WRONG, ALONE)) == (1, -1)
    assert npr(replace(RIGHT, faults=("x",)), ALONE, stage=3) == 1


def test_rewards_for_structure_fade_to_nothing() -> None:
    at = [kimi(WRONG, replace(ALONE, done=done)) for done in (0.0, 0.25, 0.5, 1.0)]
    assert at == pytest.approx([0.4, 0.2, 0.0, 0.0])
    unfinished = replace(RIGHT, closed_threads=1)
    assert kimi(unfinished, ALONE) == pytest.approx(0.3)
    assert kimi(replace(RIGHT, forks=0, threads=0, closed_threads=0), ALONE) == 0


def test_length_costs_only_in_groups_that_are_right_already() -> None:
    outcomes = [replace(RIGHT, token_latency=n) for n in (100, 300, 100, 2000)] + [replace(WRONG, token_latency=50)]
    group = Group(outcomes=outcomes)
    options = {"scale": 1000.0, "tau": 0.6}
    alpha = 0.2 * (0.8 - 0.6 + 1e-6) / (0.4 + 1e-6)
    costs = [length_penalty(o, group, **options) for o in outcomes]
    assert costs == pytest.approx([0, -alpha * 0.2, 0, -alpha, 0])
    assert not any(length_penalty(o, group, scale=1000.0, tau=0.9) for o in outcomes)
    assert length_penalty(WRONG, Group(outcomes=(WRONG,)), tau=0.0) == 0


def test_a_reward_is_the_sum_of_its_terms_and_says_each() -> None:
    reward = Reward({"correctness": {"right": 2}, "format_validity": {"penalty": 0.25}})
    bad = replace(RIGHT, faults=("x",))
    assert reward.parts(bad, ALONE) == {"correctness": 2.0, "format_validity": -0.25}
    assert reward(bad, ALONE) == 1.75


def test_a_run_that_the_system_failed_is_neither_right_nor_valid() -> None:
    failed = Outcome(correct=False, error="EngineError: gone")
    group = Group(outcomes=(failed,))
    for name in TERMS:
        assert TERMS[name](failed, group) <= 0
    assert correctness(failed, group) == 0
    assert not failed.valid


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no term"),
        ({"corectness": {}}, "did you mean 'correctness'"),
        ({"latency": {"weigth": 1.0}}, "did you mean 'weight'"),
        ({"latency": {"weight": "much"}}, "must be a number"),
        ({"acceleration": {"variant": "papre"}}, "did you mean 'paper'"),
        ({"npr": {"stage": 2}}, "stage of the reward term npr is 2; it must be 1 or 3"),
    ],
)
def test_an_unknown_term_or_option_says_what_is_allowed(options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Reward(options)
