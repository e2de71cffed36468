from __future__ import annotations

import json

import pytest
import torch
import tyro

from step35.cli import doctor


@pytest.fixture
def quick(monkeypatch):
    """Measure for an instant only."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(doctor, "PRODUCT_SECONDS", 1e-6)
    monkeypatch.setattr(doctor, "READ_BYTES", 2**20)


def test_command_line():
    assert not tyro.cli(doctor.Args, args=[]).as_json
    assert tyro.cli(doctor.Args, args=["--json"]).as_json


def test_json_is_whole_and_plausible(quick, capsys):
    assert doctor.main(doctor.Args(as_json=True)) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] > 1e8
    assert facts["disk_free_bytes"] > 0
    assert facts["compute_dtype"] in ("bfloat16", "float32")
    for rate in ("bf16_flops", "fp32_flops", "read_bytes_per_s"):
        assert 1e6 < facts[rate] < 1e18
    presets = {row["name"]: row for row in facts["presets"]}
    assert presets["flash"]["parameters"] > 190e9
    assert presets["tiny"]["trains"]
    assert {row["extra"] for row in facts["extras"]} >= {"report", "serve", "oracle"}


def test_report_for_people(quick, capsys):
    doctor.main(doctor.Args())
    out = capsys.readouterr().out
    for part in (
        "processor",
        "matmul bf16",
        "C++ compiler",
        "decoding",
        "matplotlib",
        "flash",
        "Memory here is enough",
    ):
        assert part in out


def test_matmul_rate_counts_two_operations_per_product(monkeypatch):
    monkeypatch.setattr(doctor, "_product_seconds", lambda matrix: matrix.shape[0] / 512 * 0.02)
    rate = doctor.matmul_rate(torch.float32, torch.device("cpu"))
    assert rate == pytest.approx(2 * 512**3 / 0.02)  # 256 is too quick to time, 512 takes long enough


def test_presets_fit_by_the_bytes_of_their_optimisers():
    memory = 1e9
    rows = {row["name"]: row for row in doctor._presets(memory, run_bytes=2)}
    mini = rows["mini"]
    assert mini["run_bytes"] == 2 * mini["parameters"] < 0.8 * memory
    assert 0.8 * memory < 12 * mini["parameters"] < mini["train_bytes"] < 16 * mini["parameters"]  # Muon and AdamW
    assert (mini["runs"], mini["trains"]) == (True, False)
    text = doctor.verdict(list(rows.values()))
    assert text == "Memory here is enough to train tiny and to run tiny, mini; too small for 30b-a3b, 100b-a10b, flash."


def test_missing_extras_name_their_command(monkeypatch):
    monkeypatch.setattr(doctor.machine, "version_of", lambda package: "1" if package == "step35" else None)
    rows = {row["package"]: row for row in doctor._extras()}
    assert rows["matplotlib"]["install"] == 'pip install "step35[report]"'
    assert rows["vllm"]["version"] is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (999.9, "1 kB"), (25_300_000_000, "25.3 GB"), (3.2e15, "3.2 PB")],
)
def test_amount(value, text):
    assert doctor.amount(value, "B") == text
