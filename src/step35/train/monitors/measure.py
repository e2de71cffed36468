"""The description of a measured figure, from which `docs/stability.md` is generated."""

from __future__ import annotations

from typing import NamedTuple


class Measure(NamedTuple):
    """A key of metrics.jsonl; CLASS and LAYER in it stand for a matrix class and a layer number."""

    key: str
    formula: str
    healthy: str
    remedy: str
