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


def unnested(trajectory: Trajectory) -> Trajectory:
    """The same trajectory without blocks inside threads: what nested threads did are threads that others need.

    A thread that forked becomes a thread that needs those, and says what it said after their join; what it said before
    its block it says first. Threads with more than one block of their own, and with races inside, stay as they are.
    """
    return tuple(_unnested_block(part) if isinstance(part, Block) else part for part in trajectory)


def _unnested_block(block: Block) -> Block:
    if block.race:
        return block
    outlines: list[str] = []
    threads: list[Trajectory] = []
    needs: list[tuple[int, ...]] = []

    def lift(outline: str, thread: Trajectory, own: tuple[int, ...]) -> int:
        """Add a thread after all that it needs; its place."""
        blocks = [part for part in thread if isinstance(part, Block)]
        if len(blocks) == 1 and not blocks[0].race:
            inner = blocks[0]
            told = inner.needs or [()] * len(inner.threads)
            places: dict[int, int] = {}
            for i in order(told) or ():
                places[i] = lift(inner.outlines[i], inner.threads[i], tuple(places[n] for n in told[i]))
            own = (*own, *(places[i] for i in range(len(inner.threads))))
            texts = [part for part in thread if isinstance(part, str)]
            ends = [part for part in thread if isinstance(part, Return)]
            at = thread.index(inner)
            texts.insert(sum(isinstance(part, str) for part in thread[:at]), inner.conclusion)
            text = "".join(texts)
            thread = (*((text,) if text else ()), *ends)
        outlines.append(outline)
        threads.append(thread)
        needs.append(own)
        return len(threads) - 1

    told = block.needs or [()] * len(block.threads)
    places: dict[int, int] = {}
    for i in order(told) or ():
        places[i] = lift(block.outlines[i], block.threads[i], tuple(places[n] for n in told[i]))
    return Block(tuple(outlines), tuple(threads), block.conclusion, tuple(needs) if any(needs) else ())
