"""What limits the next token: the protocol between the engine and grammars, thinking budgets and the like."""

from __future__ import annotations

from typing import Any, Protocol


class Constraint(Protocol):
    """Follows one generation. It moves on with every token, and back again over drafts that were rejected."""

    def allowed(self) -> Any | None:
        """Return which tokens may come next, a boolean tensor (V,), or None when all may."""
        ...

    def advance(self, token: int) -> None:
        """Move on by one token that `allowed` permitted."""
        ...

    def rollback(self, tokens: int) -> None:
        """Take the last `tokens` tokens back."""
        ...
