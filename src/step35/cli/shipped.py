"""The small trained checkpoint that comes with the package, so that `chat` and `generate` work at once."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parent.parent / "assets" / "tiny"
