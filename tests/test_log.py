"""A log on disk stays readable: cut off anywhere, on a full disk, after it was closed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from plait.errors import LogError, PlaitError, TreeError
from plait.events import Event, RunEnded
from plait.log import RunLog, read_log, read_tree, write_log
from plait.testing.strategies import CLOSE, FORK, Program, ToyFormat
from plait.tree import Tree
from plait.types import Budget, Request, StopReason

FULL = Path("/dev/full")


def some_run() -> tuple[Tree, list[Event]]:
    request = Request(prompt_ids=(7, 8), seed=5, temperature=1.0, budget=Budget(max_tokens=60))
    tree, events, _ = Program(request=request, format=ToyFormat(), weights={FORK: 4, CLOSE: 4}).run()
    assert tree.num_forks
    return tree, events


def test_a_log_reads_back_to_the_same_events_and_tree(tmp_path: Path) -> None:
    tree, events = some_run()
    write_log(events, tmp_path / "run.jsonl")
    assert read_log(tmp_path / "run.jsonl") == events
    assert read_tree(tmp_path / "run.jsonl") == tree


def test_each_event_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    _, events = some_run()
    with RunLog(tmp_path / "run.jsonl") as log:
        for n, event in enumerate(events[:5], 1):
            log.write(event)
            assert read_log(tmp_path / "run.jsonl") == events[:n]


def test_a_log_cut_off_anywhere_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    _, events = some_run()
    path = tmp_path / "run.jsonl"
    write_log(events, path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        n = whole[:size].count(b"\n")
        assert read_log(path) == events[:n]
        if n:
            Tree.from_events(read_log(path))
        else:
            with pytest.raises(TreeError, match="no whole event"):
                read_tree(path)


def test_a_bad_line_in_the_middle_is_named(tmp_path: Path) -> None:
    _, events = some_run()
    path = tmp_path / "run.jsonl"
    write_log(events, path)
    lines = path.read_bytes().split(b"\n")
    lines[2] = b"\xff{"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(TreeError, match=r"run\.jsonl, line 3"):
        read_log(path)
    path.write_text("# no log\n")
    with pytest.raises(TreeError, match=r"line 1: .*is it a log that `plait solve --trace` wrote"):
        read_log(path)


def test_a_log_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    _, events = some_run()
    path = tmp_path / "runs.jsonl"
    write_log(events, path)
    path.write_bytes(path.read_bytes() + b'{"event":"RunSta')
    with RunLog(path, append=True) as log:
        log.write(events[0])
    assert read_log(path) == [*events, events[0]]
    with RunLog(tmp_path / "new.jsonl", append=True) as log:
        log.write(events[0])
    assert read_log(tmp_path / "new.jsonl") == events[:1]


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
def test_a_full_disk_is_a_clear_error_and_closes_the_log() -> None:
    log = RunLog(FULL)
    with pytest.raises(LogError, match="cannot write /dev/full: No space left on device; the 0 events before"):
        log.write(RunEnded(stop=StopReason.EOS))
    with pytest.raises(LogError, match="is closed after 0 events"):
        log.write(RunEnded(stop=StopReason.EOS))


def test_a_disk_that_fills_up_keeps_what_was_written(tmp_path: Path) -> None:
    _, events = some_run()
    log = RunLog(tmp_path / "run.jsonl")
    file = log._file

    class Filling:
        """Takes 300 bytes, the last write only in part."""

        closed, room = False, 300

        def write(self, data: memoryview) -> int:
            n = min(len(data), self.room)
            if not n:
                raise OSError(28, os.strerror(28))
            self.room -= n
            return file.write(data[:n])

        def close(self) -> None:
            self.closed = True
            file.close()

    log._file = Filling()
    with pytest.raises(PlaitError, match="No space left"):  # noqa: PT012
        for event in events:
            log.write(event)
    assert (tmp_path / "run.jsonl").stat().st_size == 300
    assert 0 < log.num_events < len(events)
    assert read_log(tmp_path / "run.jsonl") == events[: log.num_events]


def test_a_closed_log_refuses_to_go_on(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run.jsonl") as log:
        pass
    with pytest.raises(LogError, match="is closed after 0 events"):
        log.write(RunEnded(stop=StopReason.EOS))


def test_a_path_that_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"cannot write .*: No such file or directory"):
        RunLog(tmp_path / "missing" / "run.jsonl")
    with pytest.raises(LogError, match=r"cannot read .*: No such file or directory"):
        read_log(tmp_path / "run.jsonl")
    with pytest.raises(LogError, match="Is a directory"):
        read_log(tmp_path)
