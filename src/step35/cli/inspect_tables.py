"""The tables of `step35 inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from step35.cli import layer_map
from step35.cli.doctor import amount
from step35.config.model import ModelConfig
from step35.config.scale import CONTEXT, LAWS, Suggestion
from step35.config.table8 import CONTEXTS, FFN_FACTOR, LAYOUTS, Entry, sliding_share, variant
from step35.runtime.console import Console


def show_costs(args: Any, found: dict[str, Any], console: Console) -> None:
    """Print parameters by part, their sums, and what a sequence costs."""
    rows = [
        (p["part"], f"{p['total']:,}", f"{p['active']:,}", f"{p['total'] / found['total']:.1%}") for p in found["parts"]
    ]
    console.table(args.model, ["part", "parameters", "used by one token", "share"], rows)
    sums = [
        ("trunk", f"{found['trunk']:,}"),
        ("active for one token, without embedding and output head", f"{found['active']:,}"),
        ("with MTP", f"{found['total']:,}"),
        (f"weights in {args.weights}", amount(found["weight_bytes"], "B")),
    ]
    console.table("in all", ["what", "parameters or bytes"], sums)
    costs = [
        (
            f"{c['context']:,}",
            amount(c["cache_bytes"], "B"),
            amount(c["prefill_flops"], ""),
            amount(c["decode_flops"], ""),
            amount(c["read_bytes"], "B"),
        )
        for c in found["costs"]
    ]
    heads = [
        "context",
        f"cache ({args.cache})",
        "prefill FLOPs a token",
        "decode FLOPs a token",
        "read a decoded token",
    ]
    console.table("one sequence", heads, costs)


def show_layers(config: ModelConfig, console: Console) -> None:
    """Print the map of the layers, and what is to know about each kind."""
    console.print("\n".join(layer_map.strip(config)))
    rows = [
        (
            layer_map.ranges(r["layers"]),
            f"{r['attention']}{', MTP' * (r['place'] == 'MTP')}",
            *(r[k] for k in _KIND[2:]),
        )
        for r in layer_map.rows(config)
    ]
    console.table("kinds of layers", _KIND, rows)


def show_layouts(entries: Sequence[Entry], console: Console) -> None:
    """Print Table 8: ours, the report's and how far they are apart."""
    rows = [
        (
            e.model,
            e.layout,
            f"{e.context // 1024}k",
            f"{e.prefill:.3f}",
            f"{e.prefill_reported:.2f}",
            f"{e.prefill_deviation:+.1%}",
            f"{e.decode:.3f}",
            f"{e.decode_reported:.2f}",
            f"{e.decode_deviation:+.1%}",
            f"{e.decode_plain:.3f}",
        )
        for e in entries
    ]
    console.table("FLOPs of a token relative to S3F1 (Table 8)", _TABLE8, rows)
    factors = " and ".join(f"{factor} on {model}" for model, factor in FFN_FACTOR.items())
    shares = [
        sliding_share(variant(model, name), n) for model in FFN_FACTOR for name in ("S3F1", *LAYOUTS) for n in CONTEXTS
    ]
    console.print(
        "prefill: 2 x active parameters, and the full layers' scores at mean length; no embedding, no output head.\n"
        f"  The sliding layers' scores, at most {max(shares):.1%} of it, are left out.\n"
        f"decode: a fit, not the report's own account: FLOPs of attention, and those of the FFN times {factors}.\n"
        "decode, plain: every FLOP once, which is what a token costs. docs/cost.md says what else was tried."
    )


def show_scale(name: str, config: ModelConfig, training: Suggestion, console: Console) -> None:
    """Print what the dial chose, by which law, and the command that trains it."""
    values = {**_shape(config), **_settings(training)}
    console.table(
        f"{name}: the laws", ["what", "value", "law", "source"], [(k, values[k], *law) for k, law in LAWS.items()]
    )
    if training.extrapolates:
        console.warn("the batch and rate laws were fitted at 1e17 to 2e19 FLOPs; here they extrapolate")
    rows = training.batch_tokens // CONTEXT
    console.print(
        f"step35 train --preset {name} --context {CONTEXT} --batch-rows {rows} --micro-rows 1 --steps {training.steps} "
        f"--lr {training.lr:.2g} --final-lr {training.final_lr:.2g}"
    )


def _shape(config: ModelConfig) -> dict[str, str]:
    full, sliding = config.layer(0), config.layer(1)
    return {
        "width": f"{config.hidden_size:,}",
        "head dim": f"{full.head_dim}",
        "heads, full": f"{full.heads}",
        "heads, sliding": f"{sliding.heads}",
        "KV heads": f"{full.kv_heads}",
        "dense FFN": f"{config.intermediate_size:,}",
        "dense layers": f"{config.num_hidden_layers - len(config.moe_layers_enum)}",
        "experts, top-8 + 1 shared": f"{config.moe_num_experts}",
        "expert hidden": f"{config.moe_intermediate_size:,}",
        "vocabulary": f"{config.vocab_size:,}",
        "MTP modules": f"{config.num_nextn_predict_layers}",
    }


def _settings(training: Suggestion) -> dict[str, str]:
    return {
        "tokens": f"{training.tokens:.3g}",
        "training FLOPs": f"{training.flops:.3g}",
        "batch tokens": f"{training.batch_tokens:,}",
        "peak learning rate": f"{training.lr:.2g}",
        "final learning rate": f"{training.final_lr:.2g}",
    }


_KIND = ("layers", "attention", "heads", "window", "rope", "ffn", "clip")
_TABLE8 = (
    "model", "layout", "length", "prefill", "report", "off", "decode", "report", "off", "decode, plain",
)  # fmt: skip
