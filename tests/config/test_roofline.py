"""The roofline against hand counts and limits: what is read, what bounds a step, what does not fit."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from step35.config.cost import active_parameters, cost, parts
from step35.config.hardware import DEVICES, HOPPER, Hardware, device
from step35.config.presets import flash, mini, preset, tiny
from step35.config.roofline import CLAIMED, Setup, distinct_experts, speed
from step35.errors import ConfigError

ALONE = Hardware("alone", {"float32": 1e30, "bfloat16": 1e30, "float8": 1e30}, 1e12, 1e15, 0, "a test")
"""Computes at once, reads 1 TB/s."""
PLAIN = Setup(device("h800"))
DRAFTING = Setup(device("h800"), acceptance=(0.9, 0.8, 0.7))


def test_batch_1_on_one_device_reads_what_the_cost_model_says() -> None:
    found = speed(flash(), Setup(ALONE, gpus=1), batch=1, context=10_000)
    assert found.step_s == pytest.approx(cost(flash(), 10_000).read_bytes / 1e12)
    assert found.sequence == found.total == pytest.approx(1 / found.step_s)


def test_weights_are_read_once_and_caches_once_a_sequence() -> None:
    steps = [speed(preset("30b-a3b"), Setup(ALONE, gpus=1), batch=10**9, context=n).step_s for n in (1000, 2000)]
    cache = [cost(preset("30b-a3b"), n).cache_bytes for n in (1000, 2000)]
    assert steps[1] - steps[0] == pytest.approx(10**9 * (cache[1] - cache[0]) / 1e12)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 8.0), (2, 8 * (2 - 8 / 288)), (10_000, 288.0)])
def test_distinct_experts(tokens: int, expected: float) -> None:
    assert distinct_experts(flash(), tokens) == pytest.approx(expected)


def test_compute_bounds_large_batches_and_scales_with_devices() -> None:
    slow = dataclasses.replace(ALONE, flops={"float32": 1e9, "bfloat16": 1e9, "float8": 1e9}, link=1e30)
    one, four = (speed(tiny(), Setup(slow, gpus=n, collective_s=0), batch=64, context=64) for n in (1, 4))
    assert one.bound == "compute"
    assert one.step_s == pytest.approx(64 * cost(tiny(), 64).decode_flops / 1e9)
    assert one.step_s == pytest.approx(4 * four.step_s)


def test_collectives_are_counted() -> None:
    fast = dataclasses.replace(ALONE, bandwidth=1e30, link=1e30)
    found = speed(flash(), Setup(fast, gpus=8, acceptance=(1.0, 1.0), collective_s=1e-6), batch=1, context=100)
    assert found.step_s == pytest.approx((2 * 45 + 1 + 2 * 4) * 1e-6)
    assert found.bound == "communication"
    assert found.sequence == pytest.approx(3 / found.step_s)


def test_tokens_of_a_step() -> None:
    assert PLAIN.tokens_a_step == 1
    assert DRAFTING.tokens_a_step == pytest.approx(1 + 0.9 + 0.72 + 0.504)


def test_mtp_gains_where_reading_bounds_and_loses_when_nothing_is_accepted() -> None:
    plain = speed(flash(), PLAIN, batch=1, context=65_536)
    assert speed(flash(), DRAFTING, batch=1, context=65_536).sequence > 1.3 * plain.sequence
    refused = dataclasses.replace(DRAFTING, acceptance=(0.0, 0.0, 0.0))
    assert speed(flash(), refused, batch=1, context=65_536).sequence < plain.sequence


def test_the_bound_is_above_the_claim_for_one_sequence_on_hopper() -> None:
    for name in HOPPER:
        found = speed(flash(), dataclasses.replace(DRAFTING, hardware=device(name)), batch=1, context=4096)
        assert found.sequence > CLAIMED[1]


def test_longer_or_more_sequences_are_slower_each() -> None:
    grid = [[speed(flash(), DRAFTING, batch=b, context=n).sequence for n in (4096, 65_536)] for b in (1, 8, 32)]
    assert all(row[0] > row[1] for row in grid)
    assert all(upper[0] > lower[0] for upper, lower in itertools.pairwise(grid))


def test_memory() -> None:
    found = speed(flash(), PLAIN, batch=32, context=262_144)
    weights = 2 * sum(part.total for part in parts(flash()))
    assert found.held_bytes == weights + 32 * cost(flash(), 262_144).cache_bytes
    assert not found.fits
    assert speed(flash(), PLAIN, batch=1, context=262_144).fits


def test_more_devices_than_kv_heads_copy_the_cache() -> None:
    alone, spread = (speed(mini(), Setup(device("h100"), gpus=n), batch=1, context=4096).held_bytes for n in (4, 8))
    assert spread - alone == cost(mini(), 4096).cache_bytes  # four KV heads on eight devices: twice


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (Setup(device("h100"), gpus=2), r"398\.8 GB, and 2 x h100 hold 160\.0 GB; give --gpus 5 or more"),
        (Setup(device("h100"), acceptance=(0.5,) * 4), "4 depths, but the model has 3 MTP modules"),
        (Setup(device("h100"), acceptance=(1.5,)), r"acceptance=1\.5 is no probability"),
        (Setup(device("h100"), gpus=0), "gpus=0 of h100: the number must be at least 1"),
        (Setup(ALONE, gpus=2), "gpus=2 of alone: the number must be 1, for it has no link"),
    ],
)
def test_refusals(setup: Setup, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        speed(flash(), setup, batch=1, context=100)


def test_devices() -> None:
    assert set(HOPPER) < set(DEVICES)
    for name, found in DEVICES.items():
        assert found.name == name
        assert found.flops["float32"] < found.flops["bfloat16"] <= found.flops["float8"]
        assert found.source
    with pytest.raises(ConfigError, match=r"hardware='h10' is unknown\. Did you mean 'h100'\? Choose from: a100"):
        device("h10")


def test_the_active_parameters_bound_a_dense_read() -> None:
    read = speed(flash(), Setup(ALONE, gpus=1), batch=1, context=1).step_s * 1e12 / 2
    assert active_parameters(flash()) < read < 1.06 * active_parameters(flash())  # and the output head
