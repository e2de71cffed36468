"""Table 8 by the documented accountings, and the layouts it compares."""

from __future__ import annotations

from pathlib import Path

import pytest

from step35.config.model import FULL
from step35.config.presets import preset
from step35.config.table8 import CONTEXTS, LAYOUTS, REPORTED, entries, prefill, sliding_share, variant


def test_every_entry_is_within_three_percent_of_the_report() -> None:
    found = entries()
    assert len(found) == 12
    assert max(abs(entry.prefill_deviation) for entry in found) < 0.03
    assert max(abs(entry.decode_deviation) for entry in found) < 0.02


def test_the_plain_decode_count_does_not_give_the_reports_figures() -> None:
    off = [entry.decode_plain / entry.decode_reported - 1 for entry in entries() if entry.layout != "S3F1+heads"]
    assert min(off) > 0.05  # were this to fail, the fit would be needless


def test_sliding_scores_are_a_small_share_of_prefill() -> None:
    shares = [sliding_share(variant(m, la), n) for m in REPORTED for la in LAYOUTS for n in CONTEXTS]
    assert 0 == min(shares) < max(shares) < 0.04


@pytest.mark.parametrize(("layout", "full", "sliding_heads"), [("S3F1", 12, 64), ("S1F1", 23, 64), ("FFFF", 45, None)])
def test_layouts_of_flash(layout: str, full: int, sliding_heads: int | None) -> None:
    config = variant("flash", layout)
    trunk = [config.layer(i) for i in range(config.num_hidden_layers)]
    assert sum(layer.window is None for layer in trunk) == full
    assert {layer.heads for layer in trunk if layer.window} == ({sliding_heads} if sliding_heads else set())
    assert FULL not in config.layer_types[45:]


@pytest.mark.parametrize("model", REPORTED)
def test_more_sliding_heads_give_the_preset_itself(model: str) -> None:
    assert variant(model, "S3F1+heads") == preset(model)


def test_prefill_by_hand() -> None:
    config = variant("30b-a3b", "FFFF")
    projections = 48 * 2048 * (2 * 32 * 128 + 2 * 8 * 128 + 32)
    ffn = 3 * 2048 * (6144 + 47 * 9 * 768) + 47 * 128 * 2048
    scores = 48 * 4 * 32 * 128 * 65_536 / 2
    assert prefill(config, 65_536) == pytest.approx(2 * (projections + ffn) + scores, rel=1e-3)


def test_the_document_shows_these_figures() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cost.md").read_text(encoding="utf-8")
    for e in entries():
        prefill_cells = f"{e.prefill:.3f} | {e.prefill_reported:.2f} | {e.prefill_deviation:+.1%}"
        decode_cells = f"{e.decode:.3f} | {e.decode_reported:.2f} | {e.decode_deviation:+.1%} | {e.decode_plain:.3f}"
        assert f"| {e.model} | {e.layout} | {e.context // 1024}k | {prefill_cells} | {decode_cells} |" in text
