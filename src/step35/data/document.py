"""One text and what is known about it: what every source yields."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text and what the meta line says about it."""

    text: str
    kind: str
    """code, documentation, text or arithmetic."""
    language: str
    domain: str
    source: str
    """Relative name, for example "stdlib/json/decoder.py"."""

    @property
    def meta(self) -> str:
        """The readable metadata line that the document starts with (app. A.3)."""
        return f"type: {self.kind} | language: {self.language} | domain: {self.domain} | source: {self.source}"
