"""Facts about this machine, found without torch: processor, memory, versions and the commit of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import step35

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")


def cpu_model() -> str:
    """Return the marketing name of the processor."""
    return next((info["model name"] for info in _processors() if "model name" in info), platform.processor())


def cpu_flags() -> frozenset[str]:
    """Return the instruction set flags, such as "avx512_bf16"; empty where the system does not list them."""
    processors = _processors()
    return frozenset(processors[0].get("flags", "").split()) if processors else frozenset()


def physical_cores() -> int:
    """Return the cores this process may use: hyper-threads count once, affinity and container quota apply."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    infos = [info for info in _processors() if int(info.get("processor", -1)) in allowed]
    cores = {(info["physical id"], info["core id"]) for info in infos if "core id" in info and "physical id" in info}
    return max(1, min(len(cores) or len(allowed), _quota_cores()))


def memory_bytes() -> int:
    """Return the memory of the machine, or the limit of the container where that is smaller."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read(CGROUP / "memory.max").strip()
    return min(installed, int(limit)) if limit.isdigit() else installed


def version_of(package: str) -> str | None:
    """Return the installed version of `package` without importing it, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit this code runs from ("-dirty" appended when edited), or None outside a checkout."""
    folder = Path(step35.__file__).parent
    if "site-packages" in folder.parts:  # an enclosing checkout would be somebody else's
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def environment() -> dict[str, object]:
    """Return what a reader needs to judge or repeat a run; the content of `env.json`."""
    return {
        "step35": version_of("step35"),
        "python": platform.python_version(),
        "torch": version_of("torch"),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": physical_cores(),
        "memory_bytes": memory_bytes(),
        "commit": git_commit(),
    }


def _processors() -> list[dict[str, str]]:
    blocks = _read(CPUINFO).strip().split("\n\n")
    pairs = [[line.split(":", 1) for line in block.splitlines() if ":" in line] for block in blocks]
    return [{key.strip(): value.strip() for key, value in block} for block in pairs if block]


def _quota_cores() -> int:
    quota, _, period = _read(CGROUP / "cpu.max").strip().partition(" ")
    if not (quota.isdigit() and period.isdigit()):
        return os.cpu_count() or 1
    return max(1, -(-int(quota) // int(period)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
