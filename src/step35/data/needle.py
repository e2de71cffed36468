"""Texts that state a number and recall it later, and prompts that ask for it: the needle in a haystack.

What context extension needs besides longer rows: documents in which something far back pays. This is the pass-key
task of Mohtashami and Jaggi (arXiv:2305.16300). About one in 8 numbers is kept from training, so that a probe can
only be answered from its own text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from step35.data.arithmetic import held_out
from step35.data.tokenizer import Tokenizer

_SUBJECTS = ("The wind", "A boat", "Some rain", "The road", "An old clock", "The market", "A train", "The river")
_VERBS = ("passed", "turned", "waited", "rested", "went on", "came back", "slowed down", "was quiet")
_WHENS = ("at noon", "before dawn", "in the evening", "for a while", "after the harvest", "all winter", "once more")
_QUESTION = "So the pass key is"


@dataclass(frozen=True)
class Needle:
    """A prompt that ends before a number which it stated earlier."""

    ids: tuple[int, ...]
    """BOS and the prompt's tokens."""
    answer: str
    """The number."""
    depth: float
    """Where the number stands: 0 at the start of the prompt, 1 at its end."""


def document(index: int, *, seed: int, characters: int = 700) -> str:
    """Return training text number `index` of about `characters` characters: filler, a number, and three recalls.

    The number stands in the first half and its recalls in the second, so that a model must look far back: where a
    sliding window reaches, nothing else learns to.
    """
    draw = random.Random(f"needle/{seed}/{index}")
    number = _number(draw, in_probe=False)
    lines: list[str] = []
    length = 0
    while not lines or length < characters - 120:  # what the number and its recalls take
        lines.append(_filler(draw))
        length += len(lines[-1]) + 1
    half = len(lines) // 2
    for place in sorted((draw.randrange(half, len(lines) + 1) for _ in range(3)), reverse=True):
        lines.insert(place, f"{_QUESTION} {number}.")
    lines.insert(draw.randrange(half + 1), _fact(number))
    return "\n".join(lines) + "\n"


def needles(tokenizer: Tokenizer, *, context: int, prompts: int, seed: int) -> list[Needle]:
    """Return `prompts` prompts of nearly `context` tokens, answer included, the number's depth running evenly."""
    return [
        _prompt(tokenizer, context, (i + 0.5) / prompts, random.Random(f"probe/{seed}/{i}")) for i in range(prompts)
    ]


def _prompt(tokenizer: Tokenizer, context: int, depth: float, draw: random.Random) -> Needle:
    answer = _number(draw, in_probe=True)
    question, fact = tokenizer.encode(_QUESTION), tokenizer.encode(_fact(answer) + "\n")
    room = context - 1 - len(fact) - len(question) - len(tokenizer.encode(f" {answer}"))
    lines: list[list[int]] = []
    while room >= len(line := tokenizer.encode(_filler(draw) + "\n")):
        lines.append(line)
        room -= len(line)
    lines.insert(round(depth * len(lines)), fact)
    ids = [tokenizer.bos_id, *(token for line in lines for token in line), *question]
    return Needle(tuple(ids), answer, depth)


def _fact(number: str) -> str:
    return f"The pass key is {number}. Remember it."


def _filler(draw: random.Random) -> str:
    return f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} {draw.choice(_WHENS)}."


def _number(draw: random.Random, *, in_probe: bool) -> str:
    while True:
        number = draw.randrange(1000, 10000)
        if held_out(number) == in_probe:
            return str(number)
