"""How much a turn may think: switched off, an effort, or a budget of tokens for each user query.

A budget holds across tool turns: what the assistant messages after the last user query have thought already is
subtracted. When nothing is left, the think block is prefilled empty and closed, as when thinking is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from step35.api.messages import Message
from step35.config.serve import ServeSettings
from step35.data.tokenizer import Tokenizer
from step35.serve.errors import ApiError

CLOSED_BLOCK = "\n</think>\n"
"""After the generation prompt, which opens the block: an empty block, as the chat format prints one."""
EFFORTS = ("none", "minimal", "low", "medium", "high")


@dataclass(frozen=True)
class Thinking:
    """Whether a turn thinks, and for how many tokens for each user query (None: without limit)."""

    enabled: bool = True
    budget: int | None = None

    def left(self, messages: Sequence[Message], tokenizer: Tokenizer) -> Thinking:
        """Return what is left for the next turn of this conversation."""
        if not self.enabled or self.budget is None:
            return self
        budget = self.budget - spent(messages, tokenizer)
        return Thinking(enabled=budget > 0, budget=max(budget, 0))


def spent(messages: Sequence[Message], tokenizer: Tokenizer) -> int:
    """Count the thinking tokens of the assistant messages after the last user message."""
    tokens = 0
    for message in reversed(messages):
        if message.get("role") == "user":
            break
        if message.get("role") == "assistant":
            tokens += len(tokenizer.encode(message.get("reasoning_content") or ""))
    return tokens


def choose(
    settings: ServeSettings, *, enabled: bool | None = None, effort: str | None = None, budget: int | None = None
) -> Thinking:
    """Return the thinking that a request asks for: its switch, then its budget, then its effort, then the default."""
    if effort is not None and effort not in EFFORTS:
        raise ApiError(
            f"reasoning_effort={effort!r} is not allowed; give one of {', '.join(EFFORTS)}.", param="reasoning_effort"
        )
    if enabled is False or (budget is None and effort in ("none", "minimal")):
        return Thinking(enabled=False)
    efforts = {
        "low": settings.effort_low_tokens,
        "medium": settings.effort_medium_tokens,
        "high": settings.effort_high_tokens,
    }
    if budget is None:
        budget = efforts.get(effort or "", settings.thinking_budget)
    return Thinking(enabled=budget != 0, budget=budget)
