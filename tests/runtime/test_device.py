from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from step35.errors import ConfigError
from step35.runtime import device, machine
from step35.runtime.seeding import derive, generator

CPU = """processor\t: {0}
model name\t: Example CPU
physical id\t: 0
core id\t\t: {1}
flags\t\t: fpu {2}
"""


@pytest.fixture
def fake_cpu(tmp_path, monkeypatch):
    """Pretend to be four hardware threads on two cores."""

    def pretend(flags: str = "", allowed: tuple[int, ...] = (0, 1, 2, 3), quota: str = "max 100000") -> None:
        (tmp_path / "cpuinfo").write_text("\n".join(CPU.format(n, n // 2, flags) for n in range(4)))
        (tmp_path / "cpu.max").write_text(quota)
        monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(machine, "CGROUP", tmp_path)
        monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(allowed), raising=False)
        monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)

    return pretend


def test_auto_and_named_devices(monkeypatch):
    assert device.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.pick_device("auto") == torch.device("cuda")


def test_missing_and_unknown_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device.pick_device("cuda:0").index == 0
    with pytest.raises(ConfigError, match="sees 1 CUDA"):
        device.pick_device("cuda:1")
    with pytest.raises(ConfigError, match="auto, cpu, cuda"):
        device.pick_device("gpu")


@pytest.mark.parametrize(
    ("flags", "speedup", "dtype"),
    [
        ("avx512_bf16", 3.0, torch.bfloat16),
        ("amx_bf16", 3.0, torch.bfloat16),
        ("avx512_bf16", 0.6, torch.float32),
        ("avx512f avx2", 3.0, torch.float32),
    ],
)
def test_compute_dtype_needs_the_flag_and_the_speed(fake_cpu, monkeypatch, flags, speedup, dtype):
    fake_cpu(flags)
    monkeypatch.setattr(device, "_bf16_speedup", lambda: speedup)
    assert device.compute_dtype(torch.device("cpu")) == dtype


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float32)])
def test_compute_dtype_follows_the_cuda_capability(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda which: capability)
    assert device.compute_dtype(torch.device("cuda")) == dtype


def test_physical_cores_count_threads_affinity_and_quota(fake_cpu):
    fake_cpu()
    assert machine.physical_cores() == 2
    assert machine.cpu_model() == "Example CPU"
    fake_cpu(allowed=(0, 1))
    assert machine.physical_cores() == 1
    fake_cpu(quota="150000 100000")
    assert machine.physical_cores() == 2
    fake_cpu(quota="50000 100000")
    assert machine.physical_cores() == 1


def test_container_memory_limit(fake_cpu, tmp_path):
    fake_cpu()
    installed = machine.memory_bytes()
    (tmp_path / "memory.max").write_text("1000000\n")
    assert machine.memory_bytes() == 1_000_000 < installed
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_bytes() == installed


def test_set_threads(monkeypatch, fake_cpu):
    before = torch.get_num_threads()
    try:
        assert device.set_threads(1) == 1 == torch.get_num_threads()
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        fake_cpu()
        assert device.set_threads() == 2 == torch.get_num_threads()
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert device.set_threads() == 1
        with pytest.raises(ConfigError, match="threads=0"):
            device.set_threads(0)
    finally:
        torch.set_num_threads(before)


def test_streams_are_repeatable_and_distinct():
    assert derive(0, "train", 1) == 6_133_370_629_789_370_551  # must never change: runs on disk depend on it
    seeds = {
        derive(0, "train", 1),
        derive(1, "train", 1),
        derive(0, "train", 2),
        derive(0, "train", "1"),
        derive(0, "train"),
        derive(0, "tr", "ain", 1),
    }
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    first, again, other = (torch.rand(4, generator=generator(0, name)) for name in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_freed_memory_is_kept() -> None:
    script = """
import torch
from step35.runtime.device import reuse_memory
reuse_memory()
torch.ones(2**26)  # 256 MB, freed at once
resident = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
print(resident * 1024 > 2**28)
"""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("glibc only")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
