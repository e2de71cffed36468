"""What the stages make on their way: the demonstrations of SFT."""

from __future__ import annotations

import re

from step35.api.messages import Message
from step35.cli.stages import synthesise
from step35.config.post import SFTConfig
from step35.runtime.console import Console


def questions(messages: list[Message]) -> list[str]:
    return [str(message["content"]) for message in messages if message["role"] == "user"]


def test_some_demonstrations_follow_an_earlier_exchange() -> None:
    made = synthesise(SFTConfig(conversations=400, follow_ups=0.25, seed=1), Console())
    asked = [questions(c.messages) for c in made]
    assert len(made) == 400
    assert 60 < sum(len(q) == 2 for q in asked) < 140
    assert {len(q) for q in asked} == {1, 2}
    assert all(c.messages[-1]["role"] == "assistant" and "tool_calls" not in c.messages[-1] for c in made)
    assert all(len(set(q)) == len(q) for q in asked)


def test_demonstrations_keep_to_their_phrasings_and_the_seed() -> None:
    settings = SFTConfig(conversations=300, follow_ups=0.5, phrasings=1)
    made = synthesise(settings, Console())
    wordings = {re.sub(r"\d+", "N", q) for c in made for q in questions(c.messages) if "(" not in q}
    assert wordings == {f"What is N {symbol} N?" for symbol in ("+", "-", "*", "//", "%")}
    assert made == synthesise(settings, Console())
    assert made != synthesise(settings.model_copy(update={"seed": 1}), Console())


def test_no_follow_ups_when_none_are_asked_for() -> None:
    made = synthesise(SFTConfig(conversations=50, follow_ups=0.0), Console())
    assert all(len(questions(c.messages)) == 1 for c in made)
