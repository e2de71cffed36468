"""What `benchmarks/decode.py` says of its runs: ratios by name, tables, and what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from decode_cases import MODULES
from step35.runtime.console import Console

SHORT = {"bfloat16": "bf16", "float32": "f32"}
Medians = Mapping[tuple[str, str, str], float]
"""Tokens/s by model, variant and what was measured."""


def compare_answers(runs: Sequence[dict[str, Any]]) -> None:
    """Replace the answers to the tasks by how many are ours."""
    ours = next((one["answers"] for one in runs if one["variant"] == "ours" and one.get("answers")), None)
    for one in runs:
        answers = one.pop("answers", None)
        if answers and ours:
            one["answers_equal_to_ours"] = sum(a == b for a, b in zip(answers, ours, strict=True))


def complaints(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return what is wrong with the runs."""
    found = []
    for one in runs:
        name = f"{one['model']}: {one['variant']}"
        found += [f"{name} {key}: {one[key]}" for key in ("missing", "failed") if key in one]
        equal = one.get("equal_to_plain", [])
        for depth, count in enumerate(equal):
            if count != equal[0]:
                found.append(f"{name}: {depth} drafts changed {equal[0] - count} of {equal[0]} answers")
    return found


def ratios(
    medians: Medians, bounds: Sequence[Mapping[str, Any]], models: Sequence[str], dtype: str
) -> dict[str, float]:
    """Return the ratios by name; those whose parts were not measured are left out."""
    pairs: dict[str, tuple[float | None, float | None]] = {}
    for model in models:
        pairs |= _against_peers(medians, model, SHORT[dtype])
    for variant, mark in (("ours", ""), ("ours-int8", "int8_")):
        plain = medians.get(("tiny", variant, "tasks_plain"))
        decode = medians.get(("tiny", variant, "tasks_decode_plain"))
        for depth in range(1, MODULES + 1):
            name = f"{mark}mtp{depth}_vs_plain_shipped_tasks"
            pairs[name] = (medians.get(("tiny", variant, f"tasks_mtp{depth}")), plain)
            pairs[f"{name}_decode"] = (medians.get(("tiny", variant, f"tasks_decode_mtp{depth}")), decode)
    for one in bounds:
        measured = medians.get((one["model"], one["variant"], "decode"))
        mark = "" if one["variant"] == "ours" else one["variant"].removeprefix("ours-").replace("-", "_") + "_"
        pairs[f"{one['model']}_{mark}share_of_bandwidth_bound"] = (measured, one["memory_tokens_per_s"])
        pairs[f"{one['model']}_{mark}share_of_cached_bandwidth_bound"] = (measured, one["cached_tokens_per_s"])
    return {name: round(ours / theirs, 3) for name, (ours, theirs) in pairs.items() if ours and theirs}


def _against_peers(medians: Medians, model: str, short: str) -> dict[str, tuple[float | None, float | None]]:
    """Return our speed and each peer's, by the name of the ratio."""
    peers = {
        "transformers": ("transformers",),
        f"llamacpp_{short}": ("llamacpp",),
        "vllm": tuple(sorted({variant for _, variant, _ in medians if variant.startswith("vllm")})),
    }
    named = {"decode": "single", "concurrent": "concurrent", "tasks_plain": "tasks_plain"}
    named |= {f"tasks_mtp{n}": f"tasks_mtp{n}" for n in range(1, MODULES + 1)}
    named |= {what: what for _, _, what in medians if what.startswith("prefill")}
    pairs = {}
    for what, name in named.items():
        ours = medians.get((model, "ours", what))
        for peer, ways in peers.items():
            speeds = [medians[model, way, what] for way in ways if (model, way, what) in medians]
            pairs[f"{model}_{name}_vs_{peer}"] = (ours, max(speeds, default=None))
        rounded = (medians.get((model, way, what)) for way in ("ours-int8", "llamacpp-q8_0"))
        pairs[f"{model}_{name}_int8_vs_llamacpp_q8_0"] = (next(rounded), next(rounded))
    return pairs


def show(result: Mapping[str, Any], wrong: Sequence[str], console: Console) -> None:
    """Print the tables and what is wrong."""
    console.table("tokens/s, median (best)", *_table(result["rows"], ""))
    if any(row["what"].startswith("tasks") for row in result["rows"]):
        console.table("shipped tasks: tokens/s, median (best)", *_table(result["rows"], "tasks_"))
        console.table("shipped tasks, from the first token on", *_table(result["rows"], "tasks_decode_"))
    shown = [
        (
            one["model"],
            one["variant"],
            *(f"{one[size] / 1e6:.1f} MB" for size in ("weight_bytes", "bytes_a_token")),
            *(f"{one[speed]:,.0f}" for speed in ("memory_tokens_per_s", "cached_tokens_per_s")),
        )
        for one in result["bounds"]
    ]
    console.table(
        "bound by reading", ["model", "engine", "weights", "a token reads", "memory tok/s", "cached tok/s"], shown
    )
    for name, found in result["read_bandwidths"].items():
        console.print(f"reading {name}: {found['bytes_per_s'] / 1e9:.1f} GB/s ({found['by']})")
    if cache := result["environment"]["last_cache_bytes"]:
        console.print(f"last level of cache: {cache / 1e6:.1f} MB; weights that fit it need not come from memory")
    busy = [one for one in result["runs"] if (one.get("others_cores") or 0) > 0.15]
    for one in busy:
        console.warn(f"{one['model']}: {one['variant']}: others used {one['others_cores']:.2f} cores meanwhile")
    for line in wrong:
        console.warn(line)


def _table(rows: Sequence[Mapping[str, Any]], prefix: str) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the heads and a line for each model and variant, of what begins with the longest fitting prefix."""
    prefixes = ("tasks_decode_", "tasks_", "")
    mine = [row for row in rows if next(p for p in prefixes if row["what"].startswith(p)) == prefix]
    cells = {(row["model"], row["variant"], row["what"]): f"{row['median']:,.0f} ({row['best']:,.0f})" for row in mine}
    columns = sorted(
        {row["what"] for row in mine}, key=lambda what: ("_mtp" in what or "prefill" in what, len(what), what)
    )
    names = dict.fromkeys((row["model"], row["variant"]) for row in mine)
    lines = [(*name, *(cells.get((*name, column), "-") for column in columns)) for name in names]
    return ["model", "engine", *(column.removeprefix(prefix) for column in columns)], lines
