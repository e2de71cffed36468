"""The parts of `benchmarks/decode.py` that need no engine: prompts, parsing, the bound, ratios, complaints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from rounds import Timing, add_tasks, measure
from run_llama import parse_batched, parse_bench, timing_of

from bandwidth import decode_bytes, read_bandwidth
from decode import bound, missing, row, variants
from decode_cases import FIRST_ID, Shape, make_rounds
from decode_report import compare_answers, complaints, ratios
from idle import Watch
from step35.config.presets import preset


def test_prompts_are_all_different_and_their_rounds_alike() -> None:
    rounds = make_rounds(100, Shape(prompt=12, batch=3, prefill=[20, 30], repeats=2, tasks=0))
    prompts = [p for r in rounds for p in (r["single"], *r["batch"], *r["prefill"])]
    assert len(rounds) == 3
    assert [len(p) for p in prompts] == 3 * [12, 12, 12, 12, 20, 30]
    assert len({tuple(p[:12]) for p in prompts}) == len(prompts)
    assert all(FIRST_ID <= token < 100 for p in prompts for token in p)


def test_speeds_come_from_all_rounds_but_the_first() -> None:
    asked: list[tuple[int, int]] = []

    def generate(prompts: Sequence[Sequence[int]], new: int) -> Timing:
        asked.append((len(prompts), new))
        return Timing(0.5, 0.5 + (new - 1) * 0.25)

    prompts = {"single": [1] * 4, "batch": [[1] * 4] * 2, "prefill": [[1] * 8]}
    found = measure({"rounds": [prompts] * 3, "new_tokens": 9, "variant": "x"}, generate)
    assert found == {"prefill_8": [16.0] * 2, "decode": [4.0] * 2, "concurrent": [2 * 9 / 2.5] * 2}
    assert asked == [(1, 1), (1, 8), (2, 8), (1, 1), (1, 9), (2, 9), (1, 1), (1, 9), (2, 9)]


def test_tasks_count_whole_and_from_the_first_token_on() -> None:
    speeds: dict[str, list[float]] = {}
    add_tasks(speeds, 2, [5, 7], [Timing(1.0, 2.0), Timing(1.0, 3.0)])
    add_tasks(speeds, 0, [10], [Timing(0.5, 2.5)])
    assert speeds == {
        "tasks_mtp2": [12 / 5], "tasks_decode_mtp2": [10 / 3], "tasks_plain": [4.0], "tasks_decode_plain": [4.5],
    }  # fmt: skip


def test_llama_bench_is_parsed() -> None:
    entries = [
        {"n_prompt": 512, "n_gen": 0, "n_depth": 0, "samples_ts": [900, 910.5]},
        {"n_prompt": 0, "n_gen": 128, "n_depth": 128, "samples_ts": [160.0, 150.0]},
    ]
    assert parse_bench(entries) == {"prefill_512": [900.0, 910.5], "decode": [160.0, 150.0]}


def test_batched_bench_counts_new_tokens_over_the_whole_time() -> None:
    line = {"pp": 128, "tg": 64, "pl": 32, "t_pp": 3.0, "t_tg": 5.0, "speed": 768.0}
    assert parse_batched(f"a note\n{json.dumps(line)}\n") == 32 * 64 / 8.0
    assert parse_batched("a note\n") is None


def test_times_of_the_server_are_in_milliseconds() -> None:
    assert timing_of({"prompt_ms": 250.0, "predicted_ms": 500.0}) == Timing(0.25, 0.75)


def test_bytes_of_a_token_are_the_active_weights_and_the_cache() -> None:
    config = preset("mini")
    assert decode_bytes(config, 192, "int8", "bfloat16") < decode_bytes(config, 192, "q8_0", "bfloat16")
    weights = decode_bytes(config, 192, "bfloat16", "bfloat16") - decode_bytes(config, 192, "int8", "bfloat16")
    assert 28e6 < weights < 31e6  # 20.8M active and the head of 8.4M
    cache = decode_bytes(config, 193, "int8", "bfloat16") - decode_bytes(config, 192, "int8", "bfloat16")
    assert cache == 9 * 2 * 4 * 64 * 2  # within the window, all layers keep one token more


def test_bound_is_bandwidth_over_bytes() -> None:
    case = SimpleNamespace(name="mini", config=preset("mini"))
    args = SimpleNamespace(prompt_tokens=128, new_tokens=128, dtype="bfloat16")
    ours = variants("bfloat16")[0]
    size = decode_bytes(case.config, 192, "bfloat16", "bfloat16")
    bandwidths = {"memory": (1e10, "x"), f"the {size / 1e6:.1f} MB of a token": (3e10, "x")}
    found = bound(case, ours, args, bandwidths)  # type: ignore[arg-type]
    assert found["memory_tokens_per_s"] == pytest.approx(1e10 / size)
    assert found["cached_tokens_per_s"] == pytest.approx(3e10 / size)


def test_reading_is_measured() -> None:
    rate, name = read_bandwidth(1 << 16, repeats=1)
    assert rate > 0
    assert name


MEDIANS = {
    ("mini", "ours", "decode"): 200.0,
    ("mini", "ours-int8", "decode"): 300.0,
    ("mini", "transformers", "decode"): 20.0,
    ("mini", "llamacpp", "decode"): 160.0,
    ("mini", "llamacpp-q8_0", "decode"): 240.0,
    ("mini", "ours", "concurrent"): 900.0,
    ("mini", "vllm-eager", "concurrent"): 500.0,
    ("mini", "vllm-compiled", "concurrent"): 600.0,
    ("tiny", "ours", "tasks_plain"): 100.0,
    ("tiny", "ours", "tasks_mtp3"): 180.0,
    ("tiny", "vllm-compiled-mtp3", "tasks_mtp3"): 90.0,
}


def test_ratios_are_named_and_take_the_better_vllm() -> None:
    limits = {"memory_tokens_per_s": 250.0, "cached_tokens_per_s": 500.0}
    bounds = [
        {"model": "mini", "variant": name, **limits} for name in ("ours", "ours-int8", "llamacpp", "llamacpp-q8_0")
    ]
    assert ratios(MEDIANS, bounds, ["tiny", "mini"], "bfloat16") == {
        "mini_single_vs_transformers": 10.0,
        "mini_single_vs_llamacpp_bf16": 1.25,
        "mini_single_int8_vs_llamacpp_q8_0": 1.25,
        "mini_concurrent_vs_vllm": 1.5,
        "tiny_tasks_mtp3_vs_vllm": 2.0,
        "mtp3_vs_plain_shipped_tasks": 1.8,
        "mini_share_of_bandwidth_bound": 0.8,
        "mini_share_of_cached_bandwidth_bound": 0.4,
        "mini_int8_share_of_bandwidth_bound": 1.2,
        "mini_int8_share_of_cached_bandwidth_bound": 0.6,
        "mini_llamacpp_share_of_bandwidth_bound": 0.64,
        "mini_llamacpp_share_of_cached_bandwidth_bound": 0.32,
        "mini_llamacpp_q8_0_share_of_bandwidth_bound": 0.96,
        "mini_llamacpp_q8_0_share_of_cached_bandwidth_bound": 0.48,
    }


def test_what_is_missing_failed_or_changed_an_answer_is_said() -> None:
    runs = [
        {"model": "tiny", "variant": "ours", "equal_to_plain": [32, 32, 31, 32]},
        {"model": "tiny", "variant": "vllm-eager", "missing": "not there"},
        {"model": "mini", "variant": "llamacpp", "failed": "exit status 1"},
        {"model": "mini", "variant": "ours", "equal_to_plain": [0, 0, 0, 0]},
    ]
    assert complaints(runs) == [
        "tiny: ours: 2 drafts changed 1 of 32 answers",
        "tiny: vllm-eager missing: not there",
        "mini: llamacpp failed: exit status 1",
    ]


def test_an_engine_that_is_not_installed_comes_with_its_remedy() -> None:
    [found] = [v for v in variants("bfloat16") if v.name == "transformers"]
    absent = SimpleNamespace(python=Path("/nowhere/python"), needs=(), engine="llamacpp")
    assert "make interop" in str(missing(absent))  # type: ignore[arg-type]
    assert missing(SimpleNamespace(python=Path(__file__), needs=(), engine=found.engine)) is None  # type: ignore[arg-type]


def test_answers_are_counted_against_ours() -> None:
    runs = [
        {"variant": "ours", "answers": [[1], [2]]},
        {"variant": "llamacpp", "answers": [[1], [3]]},
        {"variant": "transformers"},
    ]
    compare_answers(runs)
    assert [one.get("answers_equal_to_ours") for one in runs] == [2, 1, None]
    assert all("answers" not in one for one in runs)


def test_rows_keep_their_samples() -> None:
    assert row("tiny", "ours", "decode", [3.0, 1.0, 2.0]) == {
        "model": "tiny", "variant": "ours", "what": "decode", "median": 2.0, "best": 3.0, "samples": [3.0, 1.0, 2.0],
    }  # fmt: skip


def test_own_work_is_not_the_work_of_others() -> None:
    watch = Watch()
    cores = watch.cores()
    assert cores is None or cores >= 0
