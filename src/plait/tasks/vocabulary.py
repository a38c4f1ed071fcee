"""The vocabulary of the models that Plait trains itself: single digits, signs, place letters, a few
words, and the control tokens.

Digits are ids 0-9. Texts are what `decode` prints. Control tokens of several formats are here, so that one vocabulary
serves all of them; a model knows those it was trained on.
"""

from __future__ import annotations

from plait.formats import format_class
from plait.registry import Registry
from plait.tasks.worked import PLACES
from plait.tokenizer import FixedTokenizer

WORDS = (
    *"0123456789",
    *"+-*/=()",
    *",;?:~!<>",
    *PLACES[:12],
    " ",
    "\n",
    ": ",
    "Sum: ",
    "none",
    "\nAnswer: ",
)
CONTROL = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<think>",
    "</think>",
    "<Parallel>",
    "</Parallel>",
    "<Outlines>",
    "</Outlines>",
    "<Outline>",
    "</Outline>",
    "<Thread>",
    "</Thread>",
    "<Conclusion>",
    "</Conclusion>",
    "<Goal>",
    "</Goal>",
    "<Path>",
    "</Path>",
)
SIZE = 64
"""Ids of the embedding; those without a text are reserved, never sampled by a trained model."""

_RESERVED = tuple(f"<reserved{i}>" for i in range(SIZE - len(WORDS) - len(CONTROL)))

TOKENIZER = FixedTokenizer((*WORDS, *CONTROL, *_RESERVED), control=(*CONTROL, *_RESERVED), bos="<bos>", eos="<eos>")
"""The embedded models'."""

WIDE = FixedTokenizer((*TOKENIZER.tokens, *PLACES[12:]), control=(*CONTROL, *_RESERVED), bos="<bos>", eos="<eos>")
"""The same ids, and letters for numbers of up to 24 digits: for problems that need a larger machine."""

SEARCH_WORDS = (
    *(str(number) for number in range(100)),
    *"+-*/=",
    *"!?'>",
    " ",
    "\n",
    ",",
    ", ",
    ":",
    ": ",
    ":[",
    "', '",
    "Token Budget: ",
    "Sub Call Budget: ",
    "Moving to Node #",
    "\nMoving to Node #",
    "\nCurrent State: ",
    "], Operations: []",
    "], Operations: ['",
    "']",
    "\nExploring Operation: ",
    ", Resulting Numbers: [",
    "]",
    "]\n",
    "]\nGenerated Node #",
    "] Operation: ",
    " equal: Goal Reached",
    " unequal: No Solution",
    "\nNo solution found.",
    "\nStart Sub Search at level ",
    ": Moving to Node #",
    "\nExit Sub Search at level ",
    "\nNo solution found in sub search",
    "\n<Start Sub Search ",
    " at level 1> Moving to Node #",
    "<Sub Searches>",
    "\n<Goal Reached in Sub Search ",
    "\n<No Solution in Sub Search ",
    " at level 1 at Node #",
    "\n<End Sub Searches>",
    "\nAnswer: ",
)
SEARCH_CONTROL = ("<Calling Sub Searches>", "<End Calling Sub Searches>")

SEARCH = FixedTokenizer(
    (*SEARCH_WORDS, *CONTROL, *SEARCH_CONTROL), control=(*CONTROL, *SEARCH_CONTROL), bos="<bos>", eos="<eos>"
)
"""Of searches as in the APR paper: a token for each number up to 99 and for each phrase, its newline included."""

MESSAGES = (
    "<Start Sub Search ",
    " at level 1> ",
    " at level 1>",
    "<Sub Searches>",
    "<End Sub Searches>",
    "<Goal Reached in Sub Search ",
    "<No Solution in Sub Search ",
)
JOINS = FixedTokenizer(
    (*TOKENIZER.tokens, *MESSAGES, *SEARCH_CONTROL),
    control=(*CONTROL, *_RESERVED, *SEARCH_CONTROL),
    bos="<bos>",
    eos="<eos>",
)
"""The embedded models' ids, and APR's phrases: one vocabulary for the same problems in every kind of join."""

TOKENIZERS: Registry[FixedTokenizer] = Registry(
    "plait.vocabularies",
    "vocabulary",
    {"compact": TOKENIZER, "wide": WIDE, "search": SEARCH, "joins": JOINS},
    of=FixedTokenizer,
)


def tokenizer_for(vocabulary: str, format: str) -> FixedTokenizer:
    """What a model is trained in: a vocabulary, and after its own ids a control token for each tag that it lacks.

    Args:
        vocabulary: One of `TOKENIZERS`.
        format: Name of the trajectory format that has the tags.

    Raises:
        RequestError: There is no such vocabulary or format, or the package that brings it is broken.
    """
    own, tags = TOKENIZERS[vocabulary], format_class(format).tags()
    lacking = [tag for tag in dict.fromkeys(tags) if tag not in own.tokens]
    about = own.to_dict()
    more = {name: [*about[name], *lacking] for name in ("tokens", "control")}
    return FixedTokenizer.from_dict(about | more) if lacking else own
