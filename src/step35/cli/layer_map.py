"""The map of a model's layers: rows for the terminal, and a drawing as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from textwrap import wrap
from typing import Any
from xml.sax.saxutils import escape

from step35.config.model import LayerConfig, ModelConfig

STRIP = 50
"""Layers in a line of the terminal's map."""
COLUMNS = 12
"""Layers in a row of the drawing: three S3F1 blocks."""
LEGEND_CHARACTERS = 165
NBSP = "\u00a0"
"""A space that SVG keeps at the start of a line."""
BOX, GAP, MARGIN = (98, 64), 8, 24
COLOURS = {"full": "#2563eb", "sliding": "#93c5fd", "MoE": "#fde68a", "dense": "#d1d5db", "clip": "#dc2626"}


@dataclass(frozen=True)
class Kind:
    """Layers that differ in their number only."""

    layer: LayerConfig
    """The first of them."""
    indices: tuple[int, ...]
    mtp: bool


def kinds(config: ModelConfig) -> list[Kind]:
    """Return the kinds of layers, in the order in which they first appear."""
    found: dict[tuple[LayerConfig, bool], list[int]] = {}
    for index in range(config.total_layers):
        key = (replace(config.layer(index), index=0), index >= config.num_hidden_layers)
        found.setdefault(key, []).append(index)
    return [Kind(config.layer(indices[0]), tuple(indices), mtp) for (_, mtp), indices in found.items()]


def rows(config: ModelConfig) -> list[dict[str, Any]]:
    """Return what is to know about each kind, as text but for the numbers of its layers."""
    return [
        {
            "layers": list(kind.indices),
            "place": "MTP" if kind.mtp else "trunk",
            "attention": kind.layer.kind,
            "heads": f"{kind.layer.heads} q, {kind.layer.kv_heads} kv x {kind.layer.head_dim}",
            "window": "all" if kind.layer.window is None else f"{kind.layer.window:,}",
            "rope": _rope(kind.layer),
            "ffn": _ffn(config, kind.layer),
            "clip": _clip(kind.layer),
        }
        for kind in kinds(config)
    ]


def strip(config: ModelConfig) -> list[str]:
    """Return the map as lines: a ruler, F or S for attention, d or m for dense and MoE, ! where values are clipped."""
    layers = config.layers()
    lines = []
    for start in range(0, len(layers), STRIP):
        part = layers[start : start + STRIP]
        ruler = "".join(f"{la.index:<10}" for la in part[::10])
        marks = {
            "layer": ruler,
            "attention": "".join("F" if la.window is None else "S" for la in part),
            "FFN": "".join("m" if la.moe else "d" for la in part),
            "clip": "".join("." if _clip(la) == "none" else "!" for la in part),
            "MTP": "".join("+" if la.index >= config.num_hidden_layers else "." for la in part),
        }
        lines += [f"{name:<10}{text}".rstrip() for name, text in marks.items()]
    return [*lines, "F full attention, S sliding window; d dense, m MoE; ! activations clipped; + MTP module"]


def ranges(numbers: Sequence[int]) -> str:
    """Return "0-2, 5, 7-9" for rising numbers."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def svg(config: ModelConfig, title: str) -> str:
    """Return the drawing: a box a layer, upper half attention, lower half FFN, and a legend of the kinds."""
    lines = -(-config.total_layers // COLUMNS)
    sentences = [f"{ranges(kind.indices)}: {_sentence(config, kind)}" for kind in kinds(config)]
    legend = [line for text in sentences for line in wrap(text, LEGEND_CHARACTERS, subsequent_indent=" " * 6)]
    width = 2 * MARGIN + COLUMNS * (BOX[0] + GAP) - GAP
    top = 64
    below = top + lines * (BOX[1] + GAP) + 24
    height = below + 20 * (len(legend) + 3) + MARGIN
    boxes = [_box(config, i, top) for i in range(config.total_layers)]
    texts = [
        _text(MARGIN, below + 44 + 20 * i, line.replace(" " * 6, NBSP * 6), size=13) for i, line in enumerate(legend)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            _text(MARGIN, 32, title, size=20, weight="bold"),
            _text(MARGIN, 52, "upper half: attention; lower half: feed-forward", size=13, fill="#4b5563"),
            *boxes,
            *_key(below),
            *texts,
            "</svg>\n",
        ]
    )


def _box(config: ModelConfig, index: int, top: int) -> str:
    layer, mtp = config.layer(index), index >= config.num_hidden_layers
    x = MARGIN + index % COLUMNS * (BOX[0] + GAP)
    y = top + index // COLUMNS * (BOX[1] + GAP)
    half = BOX[1] // 2
    ffn = "MoE" if layer.moe else "dense"
    clipped = _clip(layer) != "none"
    edge = COLOURS["clip"] if clipped else "#6b7280"
    dashes = ' stroke-dasharray="5 3"' if mtp else ""
    ink = "#ffffff" if layer.window is None else "#111827"
    seen = "F" if layer.window is None else f"S {layer.window}"
    limits = [limit for limit in (layer.clip if layer.moe else 0.0, layer.clip_shared) if limit]
    clip = ", clip " + ", ".join(f"{limit:g}" for limit in limits) if clipped else ""
    tip = f"layer {index}: {_sentence(config, Kind(layer, (index,), mtp))}"
    return "\n".join(
        [
            f"<g><title>{escape(tip)}</title>",
            f'<rect x="{x}" y="{y}" width="{BOX[0]}" height="{half}" fill="{COLOURS[layer.kind]}"/>',
            f'<rect x="{x}" y="{y + half}" width="{BOX[0]}" height="{half}" fill="{COLOURS[ffn]}"/>',
            f'<rect class="layer" x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" fill="none" '
            f'stroke="{edge}" stroke-width="{2 if clipped else 1}"{dashes}/>',
            _text(x + 6, y + 14, f"{index}{' MTP' if mtp else ''} {seen}", size=11, fill=ink, weight="bold"),
            _text(x + 6, y + 27, f"{layer.heads} q, {layer.kv_heads} kv", size=11, fill=ink),
            _text(x + 6, y + half + 20, f"{ffn}{clip}", size=11),
            "</g>",
        ]
    )


def _key(y: int) -> list[str]:
    """Return the colours' meanings in one line."""
    meanings = ("full", "full attention (F)"), ("sliding", "sliding window (S)"), ("MoE", "MoE"), ("dense", "dense FFN")
    items = []
    for place, (name, meaning) in enumerate(meanings):
        x = MARGIN + 180 * place
        items.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{COLOURS[name]}" stroke="#6b7280"/>')
        items.append(_text(x + 20, y + 12, meaning, size=13))
    x = MARGIN + 180 * len(meanings)
    items.append(
        f'<rect x="{x}" y="{y}" width="14" height="14" fill="none" stroke="{COLOURS["clip"]}" stroke-width="2"/>'
    )
    items.append(_text(x + 20, y + 12, "activations clipped", size=13))
    x += 180
    items.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="none" stroke="#6b7280" stroke-dasharray="5 3"/>')
    items.append(_text(x + 20, y + 12, "MTP module", size=13))
    return items


def _text(x: int, y: int, text: str, *, size: int, fill: str = "#111827", weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{fill}">{escape(text)}</text>'


def _sentence(config: ModelConfig, kind: Kind) -> str:
    layer = kind.layer
    window = "full attention" if layer.window is None else f"sliding window of {layer.window:,}"
    heads = f"{layer.heads} query and {layer.kv_heads} KV heads of {layer.head_dim}"
    clip = f"; clip {_clip(layer)}" if _clip(layer) != "none" else ""
    return f"{'MTP, ' if kind.mtp else ''}{window}, {heads}, {_rope(layer)}; {_ffn(config, layer)}{clip}"


def _rope(layer: LayerConfig) -> str:
    scaled = f", x{layer.rope_scaling.factor:g} {layer.rope_scaling.rope_type}" if layer.rope_scaling else ""
    return f"theta {layer.rope_theta:,.0f} on {layer.rotary_dim} of {layer.head_dim}{scaled}"


def _ffn(config: ModelConfig, layer: LayerConfig) -> str:
    if not layer.moe:
        return f"dense {config.intermediate_size:,}"
    routed = f"{config.moe_top_k} of {config.moe_num_experts} x {config.moe_intermediate_size:,}"
    return f"MoE {routed} + shared {config.share_expert_dim:,}"


def _clip(layer: LayerConfig) -> str:
    """Return the limits: routed experts, then shared expert or dense FFN; the first only where there are experts."""
    parts = [f"{layer.clip:g} routed"] if layer.moe and layer.clip else []
    parts += [f"{layer.clip_shared:g} {'shared' if layer.moe else 'dense'}"] if layer.clip_shared else []
    return ", ".join(parts) or "none"
