"""How many generations run at once, and whether new ones may start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from step35.serve.errors import ApiError

RETRY_AFTER = {"Retry-After": "1"}


class Gate:
    """Counts running generations; refuses those beyond `limit` and, while draining, all."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.active = 0
        self.draining = False

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Take `count` places for the time of the block; raise a 429 or 503 when they are not to be had."""
        if self.draining:
            raise ApiError("the server is shutting down; ask another one.", status=503, headers=RETRY_AFTER)
        if count > self.limit:
            raise ApiError(f"{count} generations in one request; this server runs at most {self.limit}.", param="n")
        if self.active + count > self.limit:
            raise ApiError(
                f"{self.active} of {self.limit} generations are running; try again in a moment.",
                status=429,
                code="rate_limit_exceeded",
                headers=RETRY_AFTER,
            )
        self.active += count
        try:
            yield
        finally:
            self.active -= count
