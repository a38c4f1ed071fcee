"""A record of each problem and method: what was answered, whether forking was right, the cost; and files of them.

Knows nothing of engines, of how a record came about, or of how it is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from plait.errors import LogError, RequestError
from plait.types import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One problem, answered once: by one run, or by several of which one answer was taken (`plait.bench.methods`)."""

    model: str
    """Name and content of the weights."""
    family: str
    prompt: str
    question: str
    answer: str | None
    """What was answered; None where no answer was given."""
    right: bool
    forked: bool
    forks: bool
    """Whether forking is the right decision."""
    decision_right: bool
    threads: int
    num_forks: int
    total_tokens: int
    """Sampled, all threads of all runs together."""
    critical_path_tokens: int
    """Of the longest run, where there were several; so are `token_latency` and `longest_context_tokens`."""
    token_latency: int
    """ThreadWeaver's L; counts inserted tokens too."""
    longest_context_tokens: int
    reread_tokens: int
    wall_s: float
    stop: str
    serial_cost: int | None
    """Tokens that the families expect in line and with threads; None where a family does not say."""
    parallel_cost: int | None
    concurrency: int
    """Problems that ran at the same time: wall times of different ones do not compare."""
    seed: int
    max_threads: int | None = Budget().max_threads
    """The run's limits."""
    max_tokens: int | None = Budget().max_tokens
    method: str = "greedy"
    """By name, as `methods.method` takes it."""
    samples: int = 1
    """Runs, all at the same time."""
    temperature: float = 0.0

    @property
    def key(self) -> tuple[str, str, str]:
        """What was measured: prompt, model and method."""
        return self.prompt, self.model, self.method

    @property
    def predicted_saving(self) -> float | None:
        """Share of the critical path that forking is expected to save."""
        if not self.serial_cost or self.parallel_cost is None:
            return None
        return 1 - self.parallel_cost / self.serial_cost


def read_records(path: str | Path) -> list[Record]:
    """Records of a JSONL file, up to its last whole line; an empty list where there is no file.

    Raises:
        LogError: The file cannot be read.
        RequestError: A line is not a record.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as exc:
        raise LogError(f"cannot read {path}: {exc.strerror}") from exc
    names = [f.name for f in fields(Record) if f.default is MISSING]
    optional = [f.name for f in fields(Record) if f.default is not MISSING]
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line)
            # Files of before there were limits and methods in them are of the usual ones.
            others = {name: data[name] for name in optional if name in data}
            records.append(Record(**{name: data[name] for name in names}, **others))
        except (ValueError, KeyError, TypeError) as exc:
            raise RequestError(
                f"{path}, line {number} is not a result of `plait eval` ({exc!r}); give another --out"
            ) from exc
    return records


class RecordFile:
    """Appends records to a JSONL file, each at once; a half-written last line of an earlier run is cut off."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            if self.path.is_file():
                whole = self.path.read_bytes()
                if whole and not whole.endswith(b"\n"):
                    self.path.write_bytes(whole[: whole.rfind(b"\n") + 1])
            self._file = self.path.open("ab", buffering=0)
        except OSError as exc:
            raise LogError(f"cannot write {self.path}: {exc.strerror}") from exc

    def write(self, record: Record) -> None:
        rest = memoryview((json.dumps(asdict(record)) + "\n").encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as exc:
            raise LogError(f"cannot write {self.path}: {exc.strerror}; what it holds can be resumed") from exc

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def pairs(adaptive: Iterable[Record], twin: Iterable[Record]) -> Iterator[tuple[Record, Record]]:
    """The same problem on both, in the order of the first."""
    of_twin = {record.prompt: record for record in twin}
    for record in adaptive:
        if record.prompt in of_twin:
            yield record, of_twin[record.prompt]


def by_method(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """Records of each model and method, in order."""
    out: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        out.setdefault((record.model, record.method), []).append(record)
    return out
