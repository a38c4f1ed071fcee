"""What is raised when several tasks of a group fail."""

from __future__ import annotations

import anyio
import pytest

from plait.errors import EngineError, Failures


def test_one_cause_that_fails_many_tasks_is_said_once() -> None:
    async def main() -> None:
        said = ["full", "full", "gone", "gone", "full"]
        with Failures().unwrapped():
            raise ExceptionGroup("tasks", [EngineError(words) for words in said])

    with pytest.raises(EngineError, match="full") as raised:
        anyio.run(main)
    assert raised.value.__notes__ == ["also failed: EngineError('gone')"]
