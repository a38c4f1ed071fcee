"""A rollout as rows of token ids: what trainers take that know sequences and know nothing of trees.

A row is the last context of a thread with everything that this thread sampled in it, so a rollout has about one row a
thread. Each sampled token is trained in exactly one row, its own thread's; in all others, and where a join reads it
again, it is context. What the runtime wrote is never trained. Knows nothing of trainers, formats and numbers of torch.
Source: the context-completion pairs of ThreadWeaver (Lian et al. 2025, arXiv:2512.07843).
"""

from __future__ import annotations

from dataclasses import dataclass

from plait.errors import RequestError, UnsupportedJoin
from plait.formats import FORMATS, format_class
from plait.tree import Segment, Tree
from plait.types import Merge


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """A causal sequence. `mask` and `logprobs` are those of `response_ids`, id by id."""

    thread: str
    """Whose tokens it trains."""
    segments: tuple[str, ...]
    """The engine calls whose tokens it trains."""
    prompt_ids: tuple[int, ...]
    """The run's prompt; in a row that does not begin with it, what comes before the first trained token."""
    response_ids: tuple[int, ...]
    """All that follows, up to the last trained token."""
    mask: tuple[int, ...]
    """1 where the engine sampled the token in this thread, else 0."""
    logprobs: tuple[float, ...]
    """Natural log as the engine said it; 0 off the mask."""

    @property
    def num_trained(self) -> int:
        return sum(self.mask)


def check_rows(format: str) -> None:
    """Refuse a format whose runs plain rows do not express.

    Raises:
        RequestError: No format has this name.
        UnsupportedJoin: After a merge, tokens see keys and values that were computed in isolation, at positions that
            overlap: a causal sequence is another function, and training it would teach what is never run.
    """
    if format_class(format).join_kind == "merge":
        fit = [name for name in FORMATS.own if format_class(name).join_kind != "merge"]
        raise UnsupportedJoin(
            f"the {format} format joins by merge, which rows of plain sequences cannot express; formats whose joins "
            f"are text: {', '.join(fit)}. Packed trees train it: `plait train rl`"
        )


def token_rows(tree: Tree) -> list[TokenRow]:
    """Rows of a rollout, the root's last: the last row always holds a sampled token.

    A thread's calls share a row as long as each continues the one before it; where a join put a message in a block's
    place, what was sampled before it has a row of its own.

    Raises:
        UnsupportedJoin: The tree holds a merge.

    Example:
        >>> parts = [
        ...     Segment(id="0:0", forced_ids=(1, 2), sampled_ids=[3], logprobs=[-0.1]),
        ...     Segment(id="0/0.0:0", parent="0:0", forced_ids=(10,), sampled_ids=[4], logprobs=[-0.2]),
        ...     Segment(id="0:1", parent="0:0", forced_ids=(10, 4, 9), sampled_ids=[5], logprobs=[-0.3],
        ...             joins=("0/0.0:0",), join="concat"),
        ... ]
        >>> for row in token_rows(Tree({s.id: s for s in parts})):
        ...     print(row.prompt_ids, row.response_ids, row.mask)
        (1, 2) (3, 10, 4) (0, 0, 1)
        (1, 2) (3, 10, 4, 9, 5) (1, 0, 0, 0, 1)
    """
    prompt = next((s.forced_ids for s in tree.walk() if s.parent is None), ())
    rows = [_row(tree, calls, prompt) for calls in _chains(tree)]
    # Stable: rows of threads in program order, then the root's.
    return sorted(rows, key=lambda row: row.thread == "0")


def _chains(tree: Tree) -> list[list[Segment]]:
    """The calls of each row, each the continuation of the one before it; forced segments in between included."""
    open_: dict[str, list[Segment]] = {}
    chains: list[list[Segment]] = []
    for segment in tree.walk():
        chain = open_.get(segment.thread)
        if chain is None or chain[-1].id != segment.parent or segment.keep is not None:
            chain = open_[segment.thread] = []
            chains.append(chain)
        chain.append(segment)
    return [chain for chain in chains if any(s.sampled_ids for s in chain)]


def _row(tree: Tree, chain: list[Segment], prompt: tuple[int, ...]) -> TokenRow:
    while not chain[-1].sampled_ids:
        chain.pop()
    parts = tree.context(chain[0].id)
    if any(isinstance(part, Merge) for part in parts) or any(s.join == "merge" for s in chain):
        raise UnsupportedJoin(f"segment {chain[-1].id} follows a merge, which a causal sequence cannot express")
    ids = [id for part in parts if not isinstance(part, Merge) for id in part]
    mask, logprobs = [0] * len(ids), [0.0] * len(ids)
    for segment in chain:
        if segment is not chain[0]:
            ids += segment.forced_ids
            mask += [0] * len(segment.forced_ids)
            logprobs += [0.0] * len(segment.forced_ids)
        if len(segment.logprobs) != len(segment.sampled_ids):
            raise RequestError(f"segment {segment.id} was sampled without log-probabilities; ask the engine for them")
        ids += segment.sampled_ids
        mask += [1] * len(segment.sampled_ids)
        logprobs += segment.logprobs
    # A prompt of at least one token is what trainers require; nothing before the first sampled token is trained, and a
    # thread that does not see its parent may begin like the prompt by chance.
    first = mask.index(1)
    at = min(first, len(prompt)) if prompt and tuple(ids[: len(prompt)]) == prompt else first
    return TokenRow(
        thread=chain[0].thread,
        segments=tuple(s.id for s in chain if s.sampled_ids),
        prompt_ids=tuple(ids[:at]),
        response_ids=tuple(ids[at:]),
        mask=tuple(mask[at:]),
        logprobs=tuple(logprobs[at:]),
    )
