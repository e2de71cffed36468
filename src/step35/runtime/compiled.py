"""Compile a C++ file of ours for this very CPU and load it; the result is kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from step35.runtime.machine import cpu_flags, cpu_model

HEADER = Path(__file__).with_name("vectors.h")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-w")
SWITCH = "STEP35_COMPILED"
"""Environment variable; 0 keeps everything in torch."""

log = logging.getLogger(__name__)


@lru_cache
def load_library(source: Path, purpose: str) -> ctypes.CDLL | None:
    """Return the library; None, with a warning, where it cannot be built: `purpose` then runs in torch, more slowly."""
    if os.environ.get(SWITCH) == "0":
        return None
    compiler = find_compiler()
    if compiler is None:
        log.warning("no C++ compiler found: %s runs in torch, several times slower; install g++ or set CXX", purpose)
        return None
    try:
        return ctypes.CDLL(str(build(compiler, source)))
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", "") or str(error)).splitlines()
        reason = next((line for line in lines if "error" in line), str(error))
        log.warning("%s could not be compiled, %s runs in torch, more slowly: %s", source.name, purpose, reason)
        return None


def find_compiler() -> str | None:
    """Return the C++ compiler: $CXX, g++ or c++; our files need GCC's vectors."""
    names = filter(None, (os.environ.get("CXX"), "g++", "c++"))
    return next((path for path in map(shutil.which, names) if path), None)


def build(compiler: str, source: Path) -> Path:
    """Return the shared library, built unless source, compiler, flags and CPU are those of an earlier build."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    texts = [path.read_text(encoding="utf-8") for path in (source, HEADER, *sorted(source.parent.glob("*.h")))]
    parts = [*texts, version, *FLAGS, cpu_model(), *sorted(cpu_flags())]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    target = cache_folder() / f"{source.stem}-{name}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            command = [compiler, *FLAGS, "-I", str(HEADER.parent), str(source), "-o", str(made)]
            subprocess.run(command, capture_output=True, text=True, check=True)
            made.replace(target)  # whole or not at all, whoever else builds it
    return target


def cache_folder() -> Path:
    """Return where built libraries are kept: $XDG_CACHE_HOME/step35, by default ~/.cache/step35."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "step35"
