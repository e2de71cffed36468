"""Arithmetic problems whose operands never cross from training to evaluation.

`held_out` splits the integers themselves: a held-out problem holds no operand that a training problem holds,
so solving it takes copying and not recall. `problem` feeds demonstrations and the environment, `document`
feeds pre-training.
"""

from __future__ import annotations

import hashlib
import operator
import random
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held_out"]

_OPERATIONS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}
_DIGITS = (1, 2, 2, 2, 3, 3, 3, 4, 4)
"""Digits of an operand, one entry drawn at random; the answer may be longer."""
_NESTED_SHARE = 0.05
"""Share of problems with three operands and parentheses."""

_PHRASINGS = {
    "+": (
        "What is {a} + {b}?",
        "Add {b} to {a}.",
        "How much is {a} plus {b}?",
        "Tom has {a} apples and buys {b} more. How many now?",
    ),
    "-": (
        "What is {a} - {b}?",
        "Take {b} away from {a}.",
        "How much is {a} minus {b}?",
        "Ann has {a} coins and spends {b}. How many are left?",
    ),
    "*": (
        "What is {a} * {b}?",
        "Multiply {a} by {b}.",
        "{a} times {b}",
        "There are {a} boxes with {b} pens each. How many pens?",
    ),
    "//": (
        "What is {a} // {b}?",
        "How many times does {b} fit into {a}?",
        "Divide {a} by {b}, whole part only.",
        "{a} sweets for {b} children. How many whole sweets each?",
    ),
    "%": (
        "What is {a} % {b}?",
        "Divide {a} by {b}, remainder only.",
        "What is the remainder of {a} divided by {b}?",
        "{a} modulo {b}",
    ),
}
PHRASINGS = 4
"""Ways in which a problem of two operands can be put."""
_NESTED_PHRASINGS = ("What is {e}?", "Compute {e}.", "How much is {e}?", "{e}")


@dataclass(frozen=True)
class Problem:
    """A question in words, the expression that answers it, and the answer."""

    question: str
    expression: str
    answer: str


def held_out(n: int) -> bool:
    """Tell whether the integer `n` is kept from training: about one in 8, fixed for ever by a hash."""
    return hashlib.blake2b(b"%d" % n, digest_size=8).digest()[0] % 8 == 0


def problem(index: int, *, split: Split, seed: int, phrasings: int = PHRASINGS) -> Problem:
    """Return problem number `index` of a split; the same arguments always give the same problem."""
    return draw_problem(random.Random(f"problem/{seed}/{split}/{index}"), split, phrasings)


def draw_problem(draw: random.Random, split: Split, phrasings: int = PHRASINGS) -> Problem:
    """Draw a problem with all operands from the split's side, put in one of the first `phrasings` ways."""
    if draw.random() < _NESTED_SHARE:
        return _nested_problem(draw, split)
    symbol = draw.choice(list(_OPERATIONS))
    a, b = draw_operand(draw, split), draw_operand(draw, split)
    if symbol in ("-", "//", "%"):  # nobody spends more than they have, or divides 12 by 900
        a, b = max(a, b), min(a, b)
    question = draw.choice(_PHRASINGS[symbol][:phrasings]).format(a=a, b=b)
    return Problem(question, f"{a} {symbol} {b}", str(_OPERATIONS[symbol](a, b)))


def draw_operand(draw: random.Random, split: Split) -> int:
    """Draw a positive operand, mostly of 2 to 4 digits, from the split's side."""
    while True:
        digits = draw.choice(_DIGITS)
        n = draw.randrange(10 ** (digits - 1), 10**digits)
        if held_out(n) == (split == "held_out"):
            return n


def _nested_problem(draw: random.Random, split: Split) -> Problem:
    """Two operations with the parenthesis left or right; no division, so no divisor can become zero."""
    a, b, c = (draw_operand(draw, split) for _ in range(3))
    inner, outer = draw.choice("+-*"), draw.choice("+-*")
    if draw.random() < 0.5:
        expression = f"({a} {inner} {b}) {outer} {c}"
        answer = _OPERATIONS[outer](_OPERATIONS[inner](a, b), c)
    else:
        expression = f"{a} {outer} ({b} {inner} {c})"
        answer = _OPERATIONS[outer](a, _OPERATIONS[inner](b, c))
    question = draw.choice(_NESTED_PHRASINGS).format(e=expression)
    return Problem(question, expression, str(answer))


def document(index: int, *, seed: int) -> str:
    """Return pre-training text number `index`: a few problems in one layout, training operands only.

    Every question is followed by its expression twice and its answer twice. Most digits of such a text can be
    copied and are not random, which is what makes a small model learn to copy: in texts that state each number
    once, the loss of digits that nobody can predict drowns the signal.
    """
    draw = random.Random(f"document/{seed}/{index}")
    layout = draw.choice(_LAYOUTS)
    return "\n".join(layout.format(p=draw_problem(draw, "train")) for _ in range(5)) + "\n"


_LAYOUTS = (
    "{p.question} => {p.expression} => {p.expression}\n= {p.answer} => {p.answer}",
    "{p.question} | {p.expression} | {p.expression}\n= {p.answer} | {p.answer}",
    "{p.question} -> {p.expression} -> {p.expression}\n= {p.answer} -> {p.answer}",
    "Q: {p.question}\nE: {p.expression}\n>>> {p.expression}\n{p.answer}\nA: {p.answer}",
    "{p.question}\ncalculator({p.expression})\n{p.expression}\n= {p.answer}\n{p.answer}",
)
