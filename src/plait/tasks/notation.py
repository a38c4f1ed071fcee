"""Questions in plain words or signs to one canonical notation, and the arithmetic in it to a small tree.

Knows nothing of families: it says what was asked, the families say whether they can do it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

from plait.errors import RequestError
from plait.tasks.worked import PLACES

MAX_QUESTION = 2000
"""Characters; a longer text is no question of any family."""

_FILLER = re.compile(
    r"\b(what\s+is|what's|whats|what\s+are|compute|calculate|evaluate|work\s+out|find|solve|how\s+much\s+is"
    r"|the\s+(?:product|sum|value|result)\s+of|please|each|of\s+these|the\s+following|answer)\b[:,]?",
    re.IGNORECASE,
)
_WORDS = (
    (re.compile(r"\b(?:times|multiplied\s+by)\b", re.IGNORECASE), "*"),
    (re.compile(r"\b(?:plus|added\s+to)\b", re.IGNORECASE), "+"),
    (re.compile(r"\b(?:minus)\b", re.IGNORECASE), "-"),
    (re.compile(r"\b(?:divided\s+by|over)\b", re.IGNORECASE), "/"),
    (re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])"), "*"),
)
_SIGNS = str.maketrans({"×": "*", "·": "*", "⋅": "*", "−": "-", "–": "-", "÷": "/", "[": "(", "]": ")"})  # noqa: RUF001
_MAKE = re.compile(
    r"^\s*(?:use|using|with|from|combine)?\s*(?:the\s+)?(?:numbers?)?\s*:?\s*"
    r"(?P<numbers>\d+(?:\s*(?:,|and|&|,\s*and|\s)\s*\d+)*)\s*,?\s*"
    r"(?:>|to\s+(?:make|get|reach|obtain)|(?:make|get|reach))\s*(?P<target>\d+)\s*[.?!]*\s*$",
    re.IGNORECASE,
)
_THOUSANDS = re.compile(r"(?<![\d,])(\d{1,3})((?:,\d{3})+)(?![\d,])")


@dataclass(frozen=True, slots=True)
class Sum:
    terms: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Product:
    factors: tuple[Expression, ...]


Expression: TypeAlias = int | Sum | Product


def canonical(text: str) -> str:
    """One notation for a question: `347*526?`, `12*34;5+6?`, `25,7,3>54?`.

    >>> canonical("What is 347 * 526?"), canonical("Use 3, 7 and 25 to make 54")
    ('347*526?', '25,7,3>54?')

    Raises:
        RequestError: The text is not a question in numbers.
    """
    if len(text) > MAX_QUESTION:
        raise RequestError(f"the question has {len(text)} characters; at most {MAX_QUESTION} are read")
    if make := _MAKE.match(text):
        numbers = sorted((int(n) for n in re.findall(r"\d+", make["numbers"])), reverse=True)
        return f"{','.join(map(str, numbers))}>{int(make['target'])}?"
    text = _FILLER.sub(" ", text.translate(_SIGNS))
    text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    for pattern, sign in _WORDS:
        text = pattern.sub(sign, text)
    parts = [re.sub(r"\s+", " ", p).strip(" .?=:") for p in re.split(r"[;\n,?]|\band\b|\bthen\b", text)]
    questions = [re.sub(r"\s*([-+*/()])\s*", r"\1", p) for p in parts if p]
    for question in questions:
        if not re.fullmatch(r"[\d+*/()-]+", question):
            raise RequestError(f"{question[:60]!r} is not arithmetic")
    if not questions:
        raise RequestError("the question has no numbers in it")
    return f"{';'.join(questions)}?"


def spelled(prompt: str) -> str:
    """A canonical question as a model reads it: each digit after the letter of its place; Countdown's with two digits.

    What does not end in a question mark is no question in this notation, and is read as it stands.

    >>> spelled("347*20?"), spelled("25,7>32?")
    ('c3b4a7*b2a0?', '25,07>32?')
    """
    if not prompt.endswith("?"):
        return prompt
    if ">" in prompt:
        return two_digits(prompt)
    return re.sub(
        r"\d+", lambda m: "".join(f"{p}{d}" for p, d in zip(PLACES[len(m[0]) - 1 :: -1], m[0], strict=True)), prompt
    )


def two_digits(text: str) -> str:
    """A text with every single digit written as two.

    >>> two_digits("25-7=18")
    '25-07=18'
    """
    return re.sub(r"\d+", lambda m: m[0].zfill(2), text)


def parse_expression(text: str) -> Expression:
    """Sums and products with brackets, nested as written; signs of the same kind side by side are one node.

    >>> parse_expression("(12+7)*34+5")
    Sum(terms=(Product(factors=(Sum(terms=(12, 7)), 34)), 5))

    Raises:
        RequestError: It is not a complete expression of `+`, `*` and brackets.
    """
    tokens = re.findall(r"\d+|\S", text)
    expression, at = _sum(tokens, 0, 0)
    if at != len(tokens):
        raise RequestError(f"cannot read {tokens[at]!r} in {text[:60]!r}; sums, products and brackets are known")
    return expression


def _sum(tokens: list[str], at: int, depth: int) -> tuple[Expression, int]:
    terms: list[Expression] = []
    while True:
        term, at = _product(tokens, at, depth)
        terms.append(term)
        if at >= len(tokens) or tokens[at] != "+":
            return (terms[0] if len(terms) == 1 else Sum(tuple(terms))), at
        at += 1


def _product(tokens: list[str], at: int, depth: int) -> tuple[Expression, int]:
    factors: list[Expression] = []
    while True:
        factor, at = _atom(tokens, at, depth)
        factors.append(factor)
        if at >= len(tokens) or tokens[at] != "*":
            return (factors[0] if len(factors) == 1 else Product(tuple(factors))), at
        at += 1


def _atom(tokens: list[str], at: int, depth: int) -> tuple[Expression, int]:
    token = tokens[at] if at < len(tokens) else "the end"
    if token.isdigit():
        if len(token) > 1 and token[0] == "0":
            raise RequestError(f"{token!r} starts with a zero; write numbers without leading zeros")
        return int(token), at + 1
    if token == "(" and depth < 20:
        inner, at = _sum(tokens, at + 1, depth + 1)
        if at < len(tokens) and tokens[at] == ")":
            return inner, at + 1
        raise RequestError("a bracket is not closed")
    raise RequestError(f"expected a number or a bracket, found {token!r}; sums, products and brackets are known")
