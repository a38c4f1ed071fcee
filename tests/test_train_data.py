import random

import pytest

from plait.errors import RequestError
from plait.train.data import SERIAL_SHARE, gold_source


def test_traces_of_either_kind_fork_by_chance_and_are_otherwise_the_same() -> None:
    sources = [gold_source("multiverse", traces=kind) for kind in ("either", "parallel", "serial")]
    drawn = [[source("product", random.Random(n), "train") for source in sources] for n in range(80)]
    # Where the gold trace forks at all, one of the two; everywhere else there is no choice.
    chosen = [either.num_forks > 0 for either, parallel, _ in drawn if parallel.num_forks]
    assert len(chosen) > 20
    assert all(either in (parallel, serial) for either, parallel, serial in drawn)
    assert abs(sum(chosen) / len(chosen) - (1 - SERIAL_SHARE)) < 0.2


def test_an_unknown_kind_of_trace_is_refused() -> None:
    with pytest.raises(RequestError, match="did you mean 'either'"):
        gold_source("multiverse", traces="eithr")
