"""APR's format (Pan et al. 2025, arXiv:2504.15466): a search calls searches, and reads only what they found.

    Moving to Node #0
    Current State: 51:[60, 45, 3, 15], Operations: []
    Exploring Operation: 60-45=15, Resulting Numbers: [3, 15, 15]
    Generated Node #0,0: 51:[3, 15, 15] Operation: 60-45=15
    <Calling Sub Searches>
    <Start Sub Search 0 at level 1> Moving to Node #0,0
    <End Calling Sub Searches>

A child starts from what its parent passes and sees nothing else: a node it is sent to is written out with its state, as
the parent generated it; any other message is passed as it stands. It ends with end-of-sequence. At the join the call
block is replaced by what came of it, so the parent's context holds no trace of the calls:

    <Sub Searches>
    <Goal Reached in Sub Search 0 at level 1 at Node #0,0>
    Moving to Node #0,0
    ... the path to the goal, none of the search ...
    51,51 equal: Goal Reached
    <End Sub Searches>

or `<No Solution in Sub Search 0 at level 1 at Node #0,0>` for one that found none. A child that was sent to no node
returns its last line. Children do not call, as in the released code. The two call tags must be one token each;
everything else is plain text. A node that the present call did not generate is malformed, and so is a message to no
node where the vocabulary has no words for what comes of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from plait.errors import RequestError
from plait.formats.base import (
    Block,
    Branch,
    BudgetLevels,
    Fork,
    Join,
    Malformed,
    Return,
    ThreadOutcome,
    Trajectory,
    TrajectoryFormat,
    ids,
)
from plait.formats.text import fail, refuse
from plait.tokenizer import Tokenizer
from plait.types import Budget, JoinKind, StopReason

_CALL, _END_CALL = "<Calling Sub Searches>", "<End Calling Sub Searches>"
_RESULTS, _END_RESULTS = "<Sub Searches>", "<End Sub Searches>"
_NODE = r"\d+(?:,\d+)*"
_START = re.compile(r"<Start Sub Search (\d+) at level (\d+)> ?(.*)")
_MOVING = re.compile(rf"Moving to Node #({_NODE})$")
_STATE = re.compile(r"Current State: (\d+:\[[\d, ]*\]), Operations: \[(.*)\]$")
_EXPLORING = re.compile(r"Exploring Operation: (\S+), Resulting Numbers: \[[\d, ]*\]$")
_GENERATED = re.compile(rf"Generated Node #({_NODE}): (\d+:\[[\d, ]*\]) Operation: (\S+)$")
_GOAL = re.compile(r"(\d+),\1 equal: Goal Reached$")
_UNEQUAL = re.compile(r"\d+,\d+ unequal: No Solution$")
_NO_SOLUTION = re.compile(r"No solution", re.IGNORECASE)
_BUDGET = re.compile(r"Sub Call Budget: (\d+) ")
_LINES = (_MOVING, _STATE, _EXPLORING, _GENERATED, _GOAL, _UNEQUAL, re.compile(r"No solution found\.$"))
_RESULT = re.compile(rf"<(Goal Reached|No Solution) in Sub Search (\d+) at level (\d+)(?: at Node #({_NODE}))?>$")


class APR(TrajectoryFormat):
    """Searches that call searches; message join in place of the call, budget in the prompt."""

    name: str = "apr"
    paper: str = "arXiv:2504.15466"
    join_kind: JoinKind = "message"

    def __init__(self, tokenizer: Tokenizer, *, levels: BudgetLevels | None = None) -> None:
        self.levels = levels
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_ids
        self._call, self._end_call = self.control_id(tokenizer, _CALL), self.control_id(tokenizer, _END_CALL)
        self.fork_ids = (self._call, self._end_call)
        self._nodeless = self._spells(f"{_RESULTS}\n<No Solution in Sub Search 0 at level 1>\n{_END_RESULTS}")
        """Whether this vocabulary has a way to say what came of a search that was sent to no node."""

    def _spells(self, text: str) -> bool:
        try:
            return bool(ids(self._tokenizer, text))
        except RequestError:
            return False

    @classmethod
    def tags(cls) -> tuple[str, ...]:
        return _CALL, _END_CALL

    def stop_ids(self, depth: int) -> tuple[int, ...]:
        return () if depth else (self._end_call,)

    def eos_ids(self) -> tuple[int, ...]:
        return self._eos

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | Malformed | None:
        if depth or not sampled_ids or sampled_ids[-1] != self._end_call:
            return None
        starts = [i for i, id in enumerate(sampled_ids) if id == self._call]
        if not starts:
            return Malformed(note=f"no {_CALL}")
        nodes = _Nodes(self._tokenizer.decode(sampled_ids[: starts[-1]]).split("\n"))
        branches: list[Branch] = []
        for line in self._tokenizer.decode(sampled_ids[starts[-1] + 1 : -1]).split("\n"):
            match = _START.match(line.strip())
            if match is None:
                continue
            message = match[3].strip()
            sent = _MOVING.match(message)
            told = nodes.written_out(sent[1]) if sent else message
            if told is None:
                return Malformed(note=f"it calls node #{sent and sent[1]}, which this call did not generate")
            if told and not sent and not self._nodeless:
                return Malformed(note=f"it calls no node but {told!r}; this vocabulary cannot say what comes of that")
            if told:
                header = (*self._tokenizer.bos_ids, *ids(self._tokenizer, told))
                branches.append(Branch(header_ids=header, label=message, key=match[1]))
        if not branches:
            return Malformed(note="a call without a sub search")
        return Fork(branches=tuple(branches), fresh=True, keep=starts[-1])

    def closer_ids(self, outcome: ThreadOutcome) -> tuple[int, ...]:
        return ()

    def join(self, threads: Sequence[ThreadOutcome]) -> Join:
        lines = [_RESULTS]
        for i, thread in enumerate(threads):
            asked = self._text(thread.header_ids)
            node = _MOVING.match(asked.partition("\n")[0])
            found = _path(f"{asked}{self._text(thread.token_ids)}".split("\n")) if node else self._last_line(thread)
            where = f"Sub Search {i} at level 1{f' at Node #{node[1]}' if node else ''}"
            lines += [f"<{'Goal Reached' if found else 'No Solution'} in {where}>", *found]
        return Join(forced_ids=ids(self._tokenizer, "\n".join([*lines, _END_RESULTS])))

    def _text(self, token_ids: Sequence[int]) -> str:
        around = (*self._tokenizer.bos_ids, *self._eos)
        return self._tokenizer.decode([id for id in token_ids if id not in around])

    def _last_line(self, thread: ThreadOutcome) -> list[str]:
        if thread.stop is not StopReason.EOS:
            return []
        lines = [line.strip() for line in self._text(thread.token_ids).split("\n") if line.strip()]
        return [] if not lines or _NO_SOLUTION.match(lines[-1]) else lines[-1:]

    def condition(self, prompt_ids: Sequence[int], budget: Budget) -> tuple[int, ...]:
        """Children for each call before the prompt, as in the paper: `Sub Call Budget: 10 `."""
        told = budget if self.levels is None else self.levels.within(budget)
        limits = [limit for limit in (told.max_threads_per_fork, told.max_threads) if limit is not None]
        if not limits:
            raise RequestError("the apr format writes the number of children into the prompt; max_threads sets none")
        bos = self._tokenizer.bos_ids
        at = len(bos) if tuple(prompt_ids[: len(bos)]) == bos else 0
        return (*prompt_ids[:at], *self._tokenizer.encode(f"Sub Call Budget: {min(limits)} "), *prompt_ids[at:])

    def conditioned(self, prompt_ids: Sequence[int]) -> tuple[Budget, tuple[int, ...]]:
        bos = self._tokenizer.bos_ids
        at = len(bos) if tuple(prompt_ids[: len(bos)]) == bos else 0
        match = _BUDGET.match(self._tokenizer.decode(prompt_ids[at:]))
        if match is None:
            return super().conditioned(prompt_ids)
        rest = prompt_ids[at + len(self._tokenizer.encode(match[0])) :]
        limits = Budget(max_threads=None, max_threads_per_fork=int(match[1]), max_tokens=None)
        return limits, (*prompt_ids[:at], *rest)

    def refuse(self, block: Block, depth: int) -> None:
        if depth or any(isinstance(part, (Block, Return)) for thread in block.threads for part in thread):
            raise refuse(self.name, "a sub search that is more than text")
        if any(block.needs) or block.race or block.conclusion:
            raise refuse(self.name, "sub searches that wait for each other, races and conclusions")

    def open_text(self, block: Block) -> str:
        calls = "".join(f"<Start Sub Search {i} at level 1> {told}\n" for i, told in enumerate(block.outlines))
        return f"{_CALL}\n{calls}{_END_CALL}"

    def end_text(self, returns: str | None, number: int = 1) -> str:
        return ""

    def close_text(self, conclusion: str) -> str:
        return ""

    def write(self, trajectory: Trajectory) -> str:
        if any(not isinstance(part, str) for part in trajectory):
            raise refuse(self.name, "a whole trajectory: each of its sequences is a text of its own")
        return "".join(map(str, trajectory))

    def read(self, text: str) -> Trajectory:
        """Check one sequence of a search, line by line: a parent as it reads itself at its end, or a child."""
        lines = text.split("\n")
        at = count = 0
        inside: re.Pattern[str] | str = ""
        for line in lines:
            if not inside and line in (_CALL, _RESULTS):
                inside, count = (_END_CALL if line == _CALL else _END_RESULTS), 0
            elif inside and line == inside:
                if not count:
                    raise fail(text, at, "a call without a sub search" if inside == _END_CALL else "no results")
                inside = ""
            elif (match := (_START if inside == _END_CALL else _RESULT).match(line)) and inside:
                number = match[1] if inside == _END_CALL else match[2]
                if number != str(count):
                    raise fail(text, at, f"sub search {number} stands where {count} belongs")
                count += 1
            elif inside == _END_CALL or not any(pattern.match(line) for pattern in _LINES):
                raise fail(text, at, f"not a line of a search: {line[:60]!r}")
            at += len(line) + 1
        if inside:
            raise fail(text, len(text), f"expected {inside}, found the end")
        return (text,) if text else ()


class _Nodes:
    """States of the nodes that a text generated or moved to, and the operations that led there."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._states: dict[str, str] = {}
        self._operations: dict[str, str] = {}
        at = ""
        for line in lines:
            if moving := _MOVING.match(line):
                at = moving[1]
            elif state := _STATE.match(line):
                self._operations[at] = state[2]
            elif generated := _GENERATED.match(line):
                node = generated[1]
                before = self._operations.get(node.rpartition(",")[0], "")
                self._states[node] = generated[2]
                self._operations[node] = f"{before}, '{generated[3]}'" if before else f"'{generated[3]}'"

    def written_out(self, node: str) -> str | None:
        """The prompt of a child that is sent to a node; None where nothing generated it."""
        if node not in self._states:
            return None
        state = f"Current State: {self._states[node]}, Operations: [{self._operations[node]}]"
        return f"Moving to Node #{node}\n{state}"


def _path(lines: Sequence[str]) -> list[str]:
    """The lines of a search that lead from where it began to its goal; none where it reached none."""
    entered: dict[str, list[str]] = {}
    made: dict[str, list[str]] = {}
    root = at = exploring = ""
    for line in lines:
        if moving := _MOVING.match(line):
            at = moving[1]
            root = root or at
            entered[at] = [line]
        elif _STATE.match(line) and at:
            entered[at] = [*entered[at][:1], line]
        elif _EXPLORING.match(line):
            exploring = line
        elif generated := _GENERATED.match(line):
            made[generated[1]] = [exploring, line]
        elif _GOAL.match(line):
            numbers = at.split(",")
            steps = [",".join(numbers[: i + 1]) for i in range(root.count(","), len(numbers))]
            path = [*entered.get(root, [])]
            for node in steps[1:]:
                path += [*made.get(node, []), *entered.get(node, [])]
            return [*path, exploring, line]
    return []
