"""Texts that state facts and recall them later, and prompts that ask for one: the needle in a haystack.

What context extension needs besides longer rows: documents in which something far back pays. A name is two words and a
place; about one in 8 names is kept from training, so that a probe asks for facts whose words were never joined before.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from step35.data.tokenizer import Tokenizer

_COLOURS = "amber azure black brown coral cream green grey ivory lilac olive pink red ruby silver teal white".split()  # noqa: SIM905
_THINGS = "anchor barrel basket bridge candle castle cellar engine garden harbor ladder lantern mirror orchard".split()  # noqa: SIM905
_PLACES = "Delft Faro Ghent Kyoto Lagos Lima Oslo Porto Quito Riga Seoul Siena Sofia Turin Vaasa Yalta".split()  # noqa: SIM905
_SUBJECTS = ("The wind", "A boat", "Some rain", "The road", "An old clock", "The market", "A train", "The river")
_VERBS = ("passed", "turned", "waited", "rested", "went on", "came back", "slowed down", "was quiet")
_WHENS = ("at noon", "before dawn", "in the evening", "for a while", "after the harvest", "all winter", "once more")


@dataclass(frozen=True)
class Needle:
    """A prompt that ends before a number which it stated earlier."""

    ids: tuple[int, ...]
    """BOS and the prompt's tokens."""
    answer: str
    """The number."""
    depth: float
    """Where the fact stands: 0 at the start of the prompt, 1 at its end."""


def document(index: int, *, seed: int, characters: int = 700) -> str:
    """Return training text number `index` of about `characters` characters: facts, filler, and facts recalled."""
    draw = random.Random(f"needle/{seed}/{index}")
    facts: list[tuple[str, str]] = []
    lines: list[str] = []
    length = 0
    while length < characters:
        kind = draw.random()
        if kind < 0.3 or not facts:
            facts.append((_name(draw, held_out=False), _number(draw)))
            lines.append(_fact(*facts[-1]))
        elif kind < 0.65:
            lines.append(_recall(*draw.choice(facts)))
        else:
            lines.append(_filler(draw))
        length += len(lines[-1]) + 1
    return "\n".join(lines) + "\n"


def needles(tokenizer: Tokenizer, *, context: int, prompts: int, seed: int) -> list[Needle]:
    """Return `prompts` prompts of at most `context` tokens, answer included, the needle's depth running evenly.

    One line in four states another fact, so that the number must be found by its name.
    """
    return [
        _prompt(tokenizer, context, (i + 0.5) / prompts, random.Random(f"probe/{seed}/{i}")) for i in range(prompts)
    ]


def _prompt(tokenizer: Tokenizer, context: int, depth: float, draw: random.Random) -> Needle:
    name, answer = _name(draw, held_out=True), _number(draw)
    question = _recall(name, "").removesuffix(" .")
    room = context - 1 - len(tokenizer.encode(f" {answer}")) - len(tokenizer.encode(question))
    needle = tokenizer.encode(_fact(name, answer) + "\n")
    lines: list[list[int]] = []
    used = len(needle)
    while True:
        text = _fact(_name(draw, held_out=True), _number(draw)) if draw.random() < 0.25 else _filler(draw)
        line = tokenizer.encode(text + "\n")
        if used + len(line) > room:
            break
        lines.append(line)
        used += len(line)
    lines.insert(round(depth * len(lines)), needle)
    ids = [tokenizer.bos_id, *(token for line in lines for token in line), *tokenizer.encode(question)]
    return Needle(tuple(ids), answer, depth)


def _fact(name: str, number: str) -> str:
    return f"The key of the {name} is {number}."


def _recall(name: str, number: str) -> str:
    return f"Recall: the key of the {name} is {number}."


def _filler(draw: random.Random) -> str:
    return f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} {draw.choice(_WHENS)}."


def _number(draw: random.Random) -> str:
    return str(draw.randrange(1000, 10000))


def _name(draw: random.Random, *, held_out: bool) -> str:
    """Draw a name from the training or the held-out side, which a hash fixes for ever."""
    while True:
        name = f"{draw.choice(_COLOURS)} {draw.choice(_THINGS)} of {draw.choice(_PLACES)}"
        if (hashlib.blake2b(name.encode(), digest_size=8).digest()[0] % 8 == 0) == held_out:
            return name
