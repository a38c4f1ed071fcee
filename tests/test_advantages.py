import numpy as np
import pytest

from plait.errors import RequestError
from plait.train.advantages import ADVANTAGES, advantages

SPEED = {"a": 1.10, "b": 1.05, "c": 1.00, "d": 1.02}
"""A group in which all are right: rewards differ by a bonus of hundredths."""


def test_p_grpo_centres_on_the_mean_of_rollouts_whatever_their_number_of_segments() -> None:
    # Rollouts of 1, 4, 4 and 6 engine calls. Averaging over calls instead gives -1.91, .19, .14, .09.
    worth = advantages("mean", {"p": {"0": -1.0, "1": 1.1, "2": 1.05, "3": 1.0}})
    assert list(worth.values()) == pytest.approx([-1.5375, 0.5625, 0.5125, 0.4625])


def test_dividing_by_the_spread_turns_a_bonus_of_hundredths_into_ones() -> None:
    plain = advantages("mean", {"p": SPEED})
    divided = advantages("group_std", {"p": SPEED})
    assert [plain[id] for id in "abcd"] == pytest.approx([0.0575, 0.0075, -0.0425, -0.0225])
    assert [divided[id] for id in "abcd"] == pytest.approx([1.32, 0.17, -0.98, -0.52], abs=0.01)


def test_the_batch_spread_keeps_such_a_group_small_beside_one_that_is_half_wrong() -> None:
    mixed = {"e": 0.0, "f": 1.0, "g": 0.0, "h": 1.0}
    worth = advantages("batch_std", {"p": SPEED, "q": mixed})
    spread = np.std([*SPEED.values(), *mixed.values()], ddof=1) + 1e-6
    assert worth["a"] == pytest.approx(0.0575 / spread)
    assert worth["f"] == pytest.approx(0.5 / spread)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_of_one_and_a_group_of_equals_teach_nothing(name: str) -> None:
    worth = advantages(name, {"p": {"0": 7.0}, "q": {"1": 0.5, "2": 0.5}, "r": {}})
    assert set(worth) == {"0", "1", "2"}
    assert all(abs(a) < 1e-9 for a in worth.values())


@pytest.mark.parametrize("name", ADVANTAGES)
def test_groups_are_compared_within_themselves(name: str) -> None:
    worth = advantages(name, {"easy": {"0": 1.0, "1": 0.9}, "hard": {"2": 0.0, "3": 0.1}})
    assert worth["0"] > 0 > worth["1"]
    assert worth["3"] > 0 > worth["2"]


def test_a_copy_cannot_stand_in_for_a_rollout() -> None:
    # Published: a padding copy in a group of its own has mean 0, and its rollout got the raw reward of -1.
    with pytest.raises(ValueError, match="'0' stands in two groups"):
        advantages("mean", {"p": {"0": -1.0, "1": 1.1}, "pad": {"0": -1.0}})


def test_no_rollouts_have_no_advantages() -> None:
    assert advantages("mean", {}) == advantages("batch_std", {"p": {}}) == {}


def test_an_unknown_rule_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RequestError, match="did you mean 'group_std'"):
        advantages("grop_std", {})
