"""All measures and alarms as the tables of `docs/stability.md`, so that page and code cannot part.

python -m step35.train.monitors.catalog docs/stability.md    # writes the tables anew
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from step35.config.stability import StabilityConfig
from step35.train.monitors import attention, clipping, experts, matrices, monitor
from step35.train.monitors.alarms import BAD_DATA, RULES
from step35.train.monitors.measure import Measure

GROUPS: tuple[tuple[str, tuple[Measure, ...]], ...] = (
    ("Loss, finiteness and router bias", monitor.MEASURES),
    ("Experts", experts.MEASURES),
    ("Activation clipping", clipping.MEASURES),
    ("Attention and gates", attention.MEASURES),
    ("Gradients, parameters and updates", matrices.MEASURES),
)


def measures_page() -> str:
    """Return one table for each group of measures."""
    parts = []
    for title, measures in GROUPS:
        rows = [f"| `{m.key}` | {m.formula} | {m.healthy} | {m.remedy} |" for m in measures]
        parts.append("\n".join([f"### {title}", "| key | formula | healthy | otherwise |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def alarms_page() -> str:
    """Return the table of alarms with their default limits."""
    defaults = StabilityConfig()
    lines = ["| alarm | holds when | default | cause | remedy |", "|---|---|---|---|---|"]
    for rule in RULES:
        config = getattr(defaults, rule.name)
        sign = ">" if rule.side == "above" else "<"
        holds = f"`{rule.metric}` {sign} {config.limit:g}, {config.patience} steps in a row"
        lines.append(f"| `{rule.name}` | {holds} | {config.action} | {rule.cause} | {rule.remedy} |")
    action = defaults.bad_data.action
    lines.append(f"| `bad_data` | reading rows raises `DataError` | {action} | {BAD_DATA.cause} | {BAD_DATA.remedy} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """Return `page` with its generated parts, which stand between two comments each, written anew."""
    for name, text in (("measures", measures_page()), ("alarms", alarms_page())):
        part = re.compile(rf"(<!-- {name}: generated -->\n).*?(\n<!-- end -->)", re.DOTALL)
        page = part.sub(lambda found, text=text: found[1] + text + found[2], page)  # type: ignore[misc]
    return page


def describes(key: str) -> bool:
    """Return whether a measure describes the key of metrics.jsonl."""
    keys = [m.key for _, measures in GROUPS for m in measures]
    patterns = [re.escape(k).replace("CLASS", "[a-z_]+").replace("LAYER", r"\d+").replace("KEY", ".+") for k in keys]
    return any(re.fullmatch(pattern, key) for pattern in patterns)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
