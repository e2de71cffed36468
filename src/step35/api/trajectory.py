"""What a rollout leaves behind: tokens, who wrote them, at which probability, under which weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Trajectory:
    """One episode as one token sequence of length T. All lists have T entries."""

    tokens: list[int]
    mask: list[bool]
    """True where the policy chose the token; False for prompts, tool responses and turn scaffolding."""
    logprobs: list[float]
    """Sampler's log-probability of each token; 0.0 where mask is False."""
    versions: list[int]
    """Weight version that generated the token; -1 where mask is False."""
    reward: float | None = None
    truncated: bool = False
    """The context or turn limit ended the episode before an answer."""
    info: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return one JSON line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Trajectory:
        """Read one line of `to_json`."""
        return cls(**json.loads(line))
