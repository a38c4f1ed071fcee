"""What is raised when several tasks of a group fail, and what messages say."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest
from click.testing import CliRunner

from plait.cli import main
from plait.engines import open_engine
from plait.errors import EngineError, Failures, PlaitError, nearest
from plait.formats import format_class
from plait.models import load_model


def test_one_cause_that_fails_many_tasks_is_said_once() -> None:
    async def main() -> None:
        said = ["full", "full", "gone", "gone", "full"]
        with Failures().unwrapped():
            raise ExceptionGroup("tasks", [EngineError(words) for words in said])

    with pytest.raises(EngineError, match="full") as raised:
        anyio.run(main)
    assert raised.value.__notes__ == ["also failed: EngineError('gone')"]


@pytest.mark.parametrize(
    "name", ["user:secret@host", "http://user:secret@host:8000", "user:se/c@ret@host", "a:sec:ret@b"]
)
def test_no_message_repeats_a_password(name: str) -> None:
    said = [str(nearest(name, ["torch", "http"], "engine"))]
    asks: list[Callable[[str], object]] = [open_engine, load_model, format_class]
    for ask in asks:
        with pytest.raises(PlaitError) as info:
            ask(name)
        said.append(str(info.value))
    for command in (["doctor", "--engine"], ["solve", "What is 2 + 2?", "--engine"], ["engines"]):
        result = CliRunner().invoke(main, [*command, name])
        assert result.exit_code == 2
        said.append(result.output)
    for text in said:
        assert "secret" not in text
        assert "se/c" not in text
        assert "ret@" not in text
    assert "unknown engine '***@host" in said[0] or "'***@b'" in said[0]


def test_an_at_sign_alone_hides_nothing() -> None:
    assert "'bset@8'; did you mean 'best@N'" in str(nearest("bset@8", ["best@N"], "method"))
