"""Generated tokens to text as it may be shown: whole characters, and nothing from a stop text on."""

from __future__ import annotations

from collections.abc import Sequence

from step35.data.tokenizer import StreamDecoder, Tokenizer


class StopText:
    """Decodes one generation. What may be the beginning of a stop text is held back until it is known."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, skip_special: bool = False) -> None:
        self._decoder = StreamDecoder(tokenizer, skip_special=skip_special)
        self._stops = tuple(stops)
        self._held = ""
        self._shown: list[str] = []
        self._taken = 0

    def push(self, token: int) -> bool:
        """Add a token; return whether a stop text is complete."""
        return self._add(self._decoder.push(token))

    def flush(self) -> None:
        """Show what is held back: no more tokens will come."""
        self._add(self._decoder.flush())
        self._show(self._held)
        self._held = ""

    def take(self) -> str:
        """Return the text that was added since the last call."""
        new = "".join(self._shown[self._taken :])
        self._taken = len(self._shown)
        return new

    @property
    def whole(self) -> str:
        """All text shown so far."""
        return "".join(self._shown)

    def _add(self, text: str) -> bool:
        held = self._held + text
        found = [place for place in map(held.find, self._stops) if place >= 0]
        if found:
            self._show(held[: min(found)])
            self._held = ""
            return True
        keep = max((self._overlap(held, stop) for stop in self._stops), default=0)
        self._show(held[: len(held) - keep])
        self._held = held[len(held) - keep :]
        return False

    def _show(self, text: str) -> None:
        if text:
            self._shown.append(text)

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Return how many characters at the end of `text` begin `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
