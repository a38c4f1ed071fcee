"""A trajectory of one format as one of another, where the meaning allows.

Knows no engine and no vocabulary. What has another form with the same meaning is put into it; what has none is refused:
a format without dependencies cannot keep threads from running at once, one without races cannot stop them.
"""

from __future__ import annotations

from typing import Any

from plait.formats.base import Block, Part, Return, Spawn, Trajectory, TrajectoryFormat, Wait, ended, order


def convert(trajectory: Trajectory, *, to: TrajectoryFormat) -> Trajectory:
    """The same trajectory in the forms that a format has.

    A format that never forks gets the threads one after another, as one line of reasoning would have thought them: in
    an order that their needs allow, and of a race those up to the first that found something. A format whose threads
    return all that they wrote gets what a thread returns as its last line.

    Raises:
        RequestError: The format has no form for a part of it.
    """
    if to.join_kind == "none":
        text = "".join(_in_line(trajectory))
        return (text,) if text else ()
    told = trajectory if _returns(to) else _told(trajectory)
    to.write(told)
    return told


def _returns(format: TrajectoryFormat) -> Any:
    return getattr(format, "returns", "")


def _told(trajectory: Trajectory) -> Trajectory:
    parts: list[Part] = []
    for part in trajectory:
        if isinstance(part, Block):
            threads = tuple(_told(thread) for thread in part.threads)
            part = Block(part.outlines, threads, part.conclusion, part.needs, part.race)
        elif isinstance(part, Return):
            part = f"\n{part.text}" if part.text else ""
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        elif part:
            parts.append(part)
    return tuple(parts)


def _in_line(trajectory: Trajectory) -> list[str]:
    texts: list[str] = []
    for part in trajectory:
        match part:
            case Return():
                texts.append(f"\n{part.text}")
            case Block():
                texts += _block_in_line(part)
            case Spawn():
                # Thought through where it was asked for; the wait finds it done.
                texts += ["\n", *_in_line(part.thread), "\n"]
            case Wait():
                pass
            case str():
                texts.append(part)
    return texts


def _block_in_line(block: Block) -> list[str]:
    texts: list[str] = []
    for i in order(block.needs or [()] * len(block.threads)) or ():
        texts += ["\n", *_in_line(block.threads[i])]
        if block.race and ended(block.threads[i])[1] is not None:
            break
    return [*texts, "\n", block.conclusion]
