"""Whether others use the machine: a wait before a measurement, and a reading around it. Linux; elsewhere unknown."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

IDLE_CORES = 0.15
"""Cores that others may use on a machine that counts as idle."""
LOOK_S = 2.0
"""How long it must be idle."""


def wait_until_idle(limit_s: float) -> bool:
    """Wait until others used less than `IDLE_CORES` for `LOOK_S`; return False when that took longer than allowed."""
    end = time.monotonic() + limit_s
    while True:
        with_others = Watch()
        time.sleep(LOOK_S)
        busy = with_others.cores()
        if busy is None or busy < IDLE_CORES:
            return True
        if time.monotonic() > end:
            return False
        print(f"others use {busy:.2f} cores; waiting", file=sys.stderr, flush=True)


class Watch:
    """Measures, from its making on, the cores that others than this process and its ended children keep busy."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.all_s, self.own_s = _all_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """Return them on average until now; None where the system does not tell."""
        now = _all_seconds()
        if self.all_s is None or now is None:
            return None
        others = (now - self.all_s) - (_own_seconds() - self.own_s)
        return round(max(0.0, others / (time.monotonic() - self.started)), 3)


def _all_seconds() -> float | None:
    """Return the seconds that all cores were busy since the start of the system."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
