"""How fast a model can decode on named hardware: the roofline as a table, and where the claimed speed falls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

from step35.cli import doctor
from step35.cli.doctor import amount
from step35.config.cost import trunk_parameters
from step35.config.hardware import HOPPER, Format, Hardware, device
from step35.config.model import ModelConfig
from step35.config.presets import flash
from step35.config.roofline import CLAIMED, Setup, speed
from step35.runtime.console import Console

ASSUMED = (0.9, 0.8, 0.7)
"""Acceptance by depth where none is given: an assumption, the report states none. `step35 eval` measures a model's."""
HEADS = ("batch", "context", "plain tok/s", "MTP tok/s", "gain", "MTP tok/s in all", "bound by", "memory")


def hardware(name: str, *, weights: Format, flops: float | None, bandwidth: float | None) -> Hardware:
    """Return the named device; for "cpu" this machine, measured for what is not given."""
    if name != "cpu":
        found = device(name)
        peak = found.flops if flops is None else {**found.flops, weights: flops}
        return replace(found, flops=peak, bandwidth=bandwidth or found.bandwidth)
    from step35.runtime.machine import memory_bytes

    if flops is None or bandwidth is None:
        measured_flops, measured_bandwidth = _measure(weights)
        flops, bandwidth = flops or measured_flops, bandwidth or measured_bandwidth
    rates: dict[Format, float] = {"float32": flops, "bfloat16": flops, "float8": flops}
    return Hardware("cpu", rates, bandwidth, memory_bytes(), 0, "this machine, measured or as given")


def examine(config: ModelConfig, setup: Setup, *, batches: Sequence[int], contexts: Sequence[int]) -> dict[str, Any]:
    """Return each batch and context with and without MTP, and how the claim compares."""
    plain = replace(setup, acceptance=())
    rows = [
        {
            "batch": batch,
            "context": context,
            "plain": asdict(speed(config, plain, batch=batch, context=context)),
            "mtp": asdict(speed(config, setup, batch=batch, context=context)) if setup.drafts else None,
        }
        for batch in batches
        for context in contexts
    ]
    claimed = setup.hardware.name in HOPPER and trunk_parameters(config) == trunk_parameters(flash())
    return {
        **asdict(setup),
        "tokens_a_step": setup.tokens_a_step,
        "rows": rows,
        "claim": _claim(rows) if claimed else None,
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Print the table and the claim."""
    machine = found["hardware"]
    title = (
        f"decoding on {found['gpus']} x {machine['name']}, {found['weights']} weights, {found['cache']} cache: at best"
    )
    console.table(title, HEADS, [_row(row, found) for row in found["rows"]])
    figures = (
        f"{amount(machine['flops'][found['weights']], 'FLOP/s')}, {amount(machine['bandwidth'], 'B/s')}, "
        f"{amount(machine['memory_bytes'], 'B')}"
    )
    console.print(f"{machine['name']}: {figures} ({machine['source']})")
    if found["acceptance"]:
        given = ", ".join(f"{a:g}" for a in found["acceptance"])
        console.print(f"MTP: acceptance by depth {given}, so {found['tokens_a_step']:.3g} tokens a step")
    console.print(
        "tok/s are of one sequence, and a bound: devices at their peak, no launches, sampling or scheduling.\n"
        "Experts are taken to be chosen evenly; tokens that choose alike read fewer."
    )
    if found["claim"]:
        low, high = CLAIMED
        console.print(
            f"claimed for Step 3.5 Flash on Hopper, as served: {low}-{high} tok/s. A bound is compared to it:"
        )
        for meaning, places in found["claim"].items():
            console.print(f"  {meaning}: {places or 'none of these'}")


def _row(row: dict[str, Any], found: dict[str, Any]) -> tuple[object, ...]:
    plain, mtp = row["plain"], row["mtp"]
    last = mtp or plain
    held, room = last["held_bytes"] / 1e9, found["gpus"] * found["hardware"]["memory_bytes"] / 1e9
    memory = f"{held:,.3g} of {room:,.4g} GB" if last["fits"] else f"no room: {held:,.4g} of {room:,.4g} GB"
    if not last["fits"]:
        return row["batch"], f"{row['context']:,}", "-", "-", "-", "-", "-", memory
    drafted = (_rate(mtp["sequence"]), f"x{mtp['sequence'] / plain['sequence']:.2f}") if mtp else ("no MTP", "-")
    rates = (_rate(plain["sequence"]), *drafted, _rate(last["total"]))
    return row["batch"], f"{row['context']:,}", *rates, last["bound"], memory


def _claim(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return which settings' bounds lie within, above and below the claimed speed; those that fit only."""
    low, high = CLAIMED
    rates = [(row["batch"], row["context"], row["mtp"] or row["plain"]) for row in rows]
    rated = [(batch, context, one["sequence"]) for batch, context, one in rates if one["fits"]]
    return {
        f"bound within {low}-{high}": _places([place for place in rated if low <= place[2] <= high]),
        f"bound above {high}, so the claim is a part of it": _places([place for place in rated if place[2] > high]),
        f"bound below {low}, so out of reach": _places([place for place in rated if place[2] < low]),
    }


def _places(rated: Sequence[tuple[int, int, float]]) -> str:
    """Return "batch 8 at 4,096 to 32,768 (315 to 302)" for each batch."""
    texts = []
    for batch, group in groupby(rated, key=lambda place: place[0]):
        found = list(group)
        ends = [found[0]] if len(found) == 1 else [found[0], found[-1]]
        contexts, rates = (" to ".join(part) for part in zip(*[(f"{c:,}", _rate(r)) for _, c, r in ends], strict=True))
        texts.append(f"batch {batch} at {contexts} ({rates})")
    return "; ".join(texts)


def _rate(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.3g}"


def _measure(weights: Format) -> tuple[float, float]:
    """Return this CPU's FLOP/s in the weights' format (float8 multiplies as float32) and the bytes/s it reads."""
    import torch

    from step35.runtime.device import set_threads
    from step35.runtime.machine import memory_bytes

    set_threads()
    dtype = torch.bfloat16 if weights == "bfloat16" else torch.float32
    size = min(doctor.READ_BYTES, memory_bytes() // 8)
    return doctor.matmul_rate(dtype, torch.device("cpu")), doctor.read_bandwidth(size)
