"""AsyncThink's actions (Chi et al. 2025, arXiv:2510.26658): fork and go on, wait where the result is needed.

    <FORK-1>sub-query</FORK-1> the organiser goes on <FORK-2>sub-query</FORK-2> ... <JOIN-1>
    <RETURN>what worker 1 returned</RETURN>
    ...

A worker starts from its sub-query alone and ends with `<RETURN>...</RETURN>`; the organiser goes on while it works and
waits at the matching `<JOIN-i>`, where the runtime writes what was returned. A number is free again after its join.
Workers that nobody waits for are cut where the organiser ends. The paper's exact punctuation is not published; the
vocabulary says how many numbers there are (the paper's pool of workers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from plait.formats.base import (
    Await,
    Block,
    Branch,
    Fork,
    Join,
    Malformed,
    Part,
    Return,
    Spawn,
    ThreadOutcome,
    Trajectory,
    TrajectoryFormat,
    Wait,
    ended,
    ids,
)
from plait.formats.text import Scanner, refuse
from plait.tokenizer import Tokenizer
from plait.types import JoinKind

MAX_NUMBER = 16


class AsyncThink(TrajectoryFormat):
    """Fork, go on, join where needed; message join.

    Raises:
        RequestError: The vocabulary has no `<FORK-1>`, or lacks a tag beside one that it has.
    """

    name: str = "asyncthink"
    paper: str = "arXiv:2510.26658"
    join_kind: JoinKind = "message"
    returns: str = "RETURN"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_ids
        self._opens: dict[int, str] = {}
        self._closes: dict[int, str] = {}
        self._joins: dict[int, str] = {}
        for i in range(1, MAX_NUMBER + 1):
            if i > 1 and tokenizer.control_id(f"<FORK-{i}>") is None:
                break
            self._opens[self.control_id(tokenizer, f"<FORK-{i}>")] = str(i)
            self._closes[self.control_id(tokenizer, f"</FORK-{i}>")] = str(i)
            self._joins[self.control_id(tokenizer, f"<JOIN-{i}>")] = str(i)
        self._return_open = self.control_id(tokenizer, "<RETURN>")
        self._return_close = self.control_id(tokenizer, "</RETURN>")
        self._before, self._after = ids(tokenizer, "\n<RETURN>"), ids(tokenizer, "</RETURN>\n")
        self.fork_ids = (*self._opens, *self._closes)

    @classmethod
    def tags(cls) -> tuple[str, ...]:
        numbered = (tag for i in range(1, MAX_NUMBER + 1) for tag in (f"<FORK-{i}>", f"</FORK-{i}>", f"<JOIN-{i}>"))
        return (*numbered, "<RETURN>", "</RETURN>")

    def stop_ids(self, depth: int) -> tuple[int, ...]:
        return (self._return_close,) if depth else (*self._closes, *self._joins)

    def eos_ids(self) -> tuple[int, ...]:
        return self._eos

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | Await | Malformed | None:
        if depth or not sampled_ids:
            return None
        if (number := self._joins.get(sampled_ids[-1])) is not None:
            return Await(keys=(number,))
        if (number := self._closes.get(sampled_ids[-1])) is None:
            return None
        starts = [i for i, id in enumerate(sampled_ids) if self._opens.get(id) == number]
        if not starts:
            return Malformed(note=f"</FORK-{number}> without <FORK-{number}>")
        query = tuple(sampled_ids[starts[-1] + 1 : -1])
        header = (*self._tokenizer.bos_ids, *query)
        if not query:
            return Malformed(note=f"fork {number} asks nothing")
        branch = Branch(header_ids=header, label=self._tokenizer.decode(query).strip(), key=number)
        return Fork(branches=(branch,), fresh=True, waits=False)

    def closer_ids(self, outcome: ThreadOutcome) -> tuple[int, ...]:
        if outcome.token_ids[-1:] == (self._return_close,):
            return ()
        return (
            (self._return_close,) if self._return_open in outcome.token_ids else (self._return_open, self._return_close)
        )

    def join(self, threads: Sequence[ThreadOutcome]) -> Join:
        text: list[int] = []
        for thread in threads:
            told = thread.token_ids
            at = len(told) - told[::-1].index(self._return_open) if self._return_open in told else len(told)
            text += (
                *self._before,
                *(id for id in told[at:] if id not in (self._return_close, *self._eos)),
                *self._after,
            )
        return Join(forced_ids=tuple(text))

    def open_text(self, block: Block) -> str:
        raise refuse(self.name, "a block: its threads start one by one")

    def spawn_text(self, part: Spawn) -> str:
        if part.number not in range(1, len(self._joins) + 1):
            raise refuse(self.name, f"thread {part.number}; this vocabulary has 1 to {len(self._joins)}")
        if not part.outline:
            raise refuse(self.name, "a thread that is asked nothing")
        return f"<FORK-{part.number}>{part.outline}</FORK-{part.number}>"

    def wait_text(self, part: Wait) -> str:
        return f"<JOIN-{part.number}>"

    def end_text(self, returns: str | None, number: int = 1) -> str:
        return f"<RETURN>{returns or ''}</RETURN>"

    def close_text(self, conclusion: str) -> str:
        raise refuse(self.name, "a block: its threads start one by one")

    def write(self, trajectory: Trajectory) -> str:
        """The organiser's text: of a worker only what it returns, where it is waited for."""
        texts: list[str] = []
        running: dict[int, Trajectory] = {}
        for part in trajectory:
            match part:
                case Spawn():
                    if part.number in running:
                        raise refuse(self.name, f"thread {part.number} twice at once")
                    if any(not isinstance(inner, (str, Return)) for inner in part.thread):
                        raise refuse(self.name, "a worker that is more than text")
                    running[part.number] = part.thread
                    texts.append(self.spawn_text(part))
                case Wait():
                    if part.number not in running:
                        raise refuse(self.name, f"a wait for thread {part.number}, which does not run")
                    _, returns = ended(running.pop(part.number))
                    texts += [self.wait_text(part), f"\n<RETURN>{returns or ''}</RETURN>\n"]
                case str():
                    texts.append(part)
                case _:
                    raise refuse(self.name, "a block: its threads start one by one")
        return "".join(texts)

    def read(self, text: str) -> Trajectory:
        """An organiser's trajectory: every fork is closed, every join is of a fork that runs and is answered.

        Of a worker it says what was returned, and nothing where nobody waited.
        """
        scan = Scanner(text, self.tags())
        parts: list[Part] = []
        running: dict[str, int] = {}
        while True:
            said = scan.plain()
            parts += [said] if said else []
            tag = scan.tag
            if not tag:
                break
            number = tag.strip("</>").partition("-")[2]
            if tag.startswith("<FORK"):
                if number in running:
                    raise scan.fail(f"thread {number} runs already")
                scan.take(tag)
                asked = scan.plain()
                if not asked.strip():
                    raise scan.fail(f"fork {number} asks nothing")
                scan.take(f"</FORK-{number}>")
                running[number] = len(parts)
                parts.append(Spawn(int(number), asked, ()))
            elif tag.startswith("<JOIN"):
                if number not in running:
                    raise scan.fail(f"thread {number} does not run")
                scan.take(tag)
                scan.blank()
                scan.take("<RETURN>")
                told = Return(scan.plain())
                scan.take("</RETURN>")
                scan.at += scan.text.startswith("\n", scan.at)
                spawn = parts[running[number]]
                assert isinstance(spawn, Spawn)
                parts[running.pop(number)] = replace(spawn, thread=(told,))
                parts.append(Wait(int(number)))
            else:
                raise scan.fail(f"{tag} belongs to nothing")
        return tuple(parts)
