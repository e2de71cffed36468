"""The protocol of a task that a policy acts in: messages in, observations and a reward out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from step35.api.messages import Message, ToolSchema


@dataclass(frozen=True)
class Task:
    """One problem: the opening messages, the tools on offer, and what a verifier needs to judge the answer."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSchema, ...] = ()
    answer: str = ""
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What the environment says to an assistant turn."""

    observations: tuple[Message, ...] = ()
    """Messages to append before the next assistant turn; empty when the episode is over."""
    done: bool = False
    reward: float | None = None
    """Verdict in 0..1 once done. None means that no verdict was possible, which is not the same as 0."""
    tool_errors: int = 0


class Environment(Protocol):
    """A source of tasks and a judge. Stateless between calls, so that episodes can run in any order."""

    def sample(self, index: int) -> Task:
        """Return problem number `index`; the same index always gives the same problem."""
        ...

    def respond(self, task: Task, history: list[Message], turn: Message) -> Outcome:
        """Execute the tool calls of `turn`, or judge it as the final answer."""
        ...
