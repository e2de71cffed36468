"""Say what this machine is, how fast it computes, and which models it can train and run."""

from __future__ import annotations

import json
import sysconfig
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import tyro

from step35.config.base import Config
from step35.config.presets import PRESETS
from step35.runtime import machine
from step35.runtime.console import Console
from step35.runtime.disk import free_bytes

EXTRAS = {
    "report": ("matplotlib",),
    "gguf": ("gguf",),
    "data": ("pyarrow", "backports.zstd"),
    "serve": ("fastapi",),
    "agents": ("openai",),
    "track": ("tensorboard",),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "scale": ("ray", "vllm"),
    "oracle": ("transformers",),
}
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
USABLE = 0.8
"""Share of the memory that weights may fill; the rest is for activations, cache and the system."""
READ_BYTES = 2**28
"""Beyond most caches, yet soon filled: on virtual machines a GB of fresh memory can take seconds to touch."""
PRODUCT_SECONDS = 0.02
"""A matrix product that takes this long is large enough to time."""


class Args(Config):
    """Options of `step35 doctor`."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the facts as JSON."""


def main(args: Args) -> int:
    """Measure, then print a report or JSON."""
    facts = examine()
    if args.as_json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts, Console())
    return 0


def examine() -> dict[str, Any]:
    """Return everything `doctor` knows: bytes, FLOP/s and bytes/s. Takes a few seconds."""
    import torch

    from step35.engine.compiled.program import SOURCE as DECODING
    from step35.model.compiled.library import libraries
    from step35.runtime.compiled import find_compiler, load_library
    from step35.runtime.device import compute_dtype, dtype_name, pick_device, set_threads

    threads = set_threads()
    device = pick_device("auto")
    dtype = compute_dtype(device)
    memory = machine.memory_bytes()
    devices = [_cuda_device(index) for index in range(torch.cuda.device_count())]
    return {
        **machine.environment(),
        "features": [flag for flag in FEATURES if flag in machine.cpu_flags()],
        "threads": threads,
        "disk_free_bytes": free_bytes(Path.cwd()),
        "device": str(device),
        "compute_dtype": dtype_name(dtype),
        "bf16_flops": matmul_rate(torch.bfloat16, device),
        "fp32_flops": matmul_rate(torch.float32, device),
        "read_bytes_per_s": read_bandwidth(min(READ_BYTES, memory // 8)),
        "devices": devices,
        "compiler": find_compiler(),
        "compiled_decoding": load_library(DECODING, "decoding") is not None,
        "compiled_training": libraries() is not None,
        "python_headers": (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
        "extras": _extras(),
        "presets": _presets(memory, run_bytes=4),  # the verbs load fp32, on the CPU
    }


def matmul_rate(dtype: Any, device: Any) -> float:
    """Return the best FLOP/s of square matrix products, the size doubled until one is long enough to time."""
    import torch

    size, seconds, best = 256, 0.0, 0.0
    while seconds < PRODUCT_SECONDS and size <= 8192:
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        seconds = min(_product_seconds(matrix) for _ in range(4))
        best = max(best, 2 * size**3 / seconds)
        size *= 2
    return best


def _product_seconds(matrix: Any) -> float:
    start = time.perf_counter()
    product = matrix @ matrix
    product[0, 0].item()  # waits for the accelerator
    return time.perf_counter() - start


def read_bandwidth(size_bytes: int) -> float:
    """Return the bytes/s of summing an array of `size_bytes`, which should exceed the processor's caches."""
    import torch

    array = torch.ones(size_bytes // 4)  # ones, since untouched zeros are one shared page of memory
    times = []
    for _ in range(3):
        start = time.perf_counter()
        array.sum()
        times.append(time.perf_counter() - start)
    return array.nbytes / min(times)


def _cuda_device(index: int) -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(index)
    capability = f"{found.major}.{found.minor}"
    return {"name": found.name, "memory_bytes": found.total_memory, "capability": capability}


def _extras() -> list[dict[str, Any]]:
    """Return each optional package, its version if installed, and the command that installs it."""
    installed = machine.version_of("step35") is not None
    provided = metadata.metadata("step35").get_all("Provides-Extra") or [] if installed else []
    return [
        {
            "extra": extra,
            "package": package,
            "version": machine.version_of(package),
            "install": f'pip install "step35[{extra}]"' if extra in provided else f"pip install {package}",
        }
        for extra, packages in EXTRAS.items()
        for package in packages
    ]


def _presets(memory: float, *, run_bytes: int) -> list[dict[str, Any]]:
    """Return what each preset needs, in bytes, and whether `memory` holds it."""
    import torch

    from step35.cli.dry_run import state_bytes
    from step35.model.step35 import Step35
    from step35.train.groups import assign

    rows = []
    for name, build in PRESETS.items():
        with torch.device("meta"):  # shapes without memory, so the largest preset is counted too
            named = dict(Step35(build()).named_parameters())
        parameters = sum(weight.numel() for weight in named.values())
        run, train = parameters * run_bytes, state_bytes(named, assign(build(), named, "muon"))
        room = memory * USABLE
        row = {"name": name, "parameters": parameters, "run_bytes": run, "train_bytes": train}
        rows.append({**row, "runs": run <= room, "trains": train <= room})
    return rows


def verdict(presets: list[dict[str, Any]]) -> str:
    """Return in one sentence which presets fit."""
    trains = [row["name"] for row in presets if row["trains"]]
    runs = [row["name"] for row in presets if row["runs"]]
    small = [row["name"] for row in presets if not row["runs"]]
    text = f"Memory here is enough to train {', '.join(trains) or 'nothing'}"
    text += f" and to run {', '.join(runs) or 'nothing'}"
    return text + (f"; too small for {', '.join(small)}." if small else ".")


def _show(facts: dict[str, Any], console: Console) -> None:
    devices = [
        f"{found['name']}, {amount(found['memory_bytes'], 'B')}, capability {found['capability']}"
        for found in facts["devices"]
    ]
    compiler = facts["compiler"] or "none: torch.compile needs one (apt install g++)"
    headers = "" if facts["python_headers"] else ", but no Python.h (apt install python3-dev)"
    elsewhere = "" if facts["device"] == "cpu" else " (load_model(device=) uses it; the verbs run on the CPU so far)"
    rows = [
        ("processor", f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads used"),
        ("features", " ".join(facts["features"]) or "none known"),
        (
            "memory",
            f"{amount(facts['memory_bytes'], 'B')}, read at {amount(facts['read_bytes_per_s'], 'B/s')}",
        ),
        ("disk free", amount(facts["disk_free_bytes"], "B")),
        ("CUDA devices", "\n".join(devices) or "none"),
        ("best device", f"{facts['device']} in {facts['compute_dtype']}{elsewhere}"),
        ("matmul bf16", amount(facts["bf16_flops"], "FLOP/s")),
        ("matmul fp32", amount(facts["fp32_flops"], "FLOP/s")),
        ("C++ compiler", compiler + headers),
        ("decoding", "compiled for this CPU" if facts["compiled_decoding"] else "in torch, several times slower"),
        ("training", "compiled for this CPU" if facts["compiled_training"] else "in torch, slower"),
        ("versions", f"step35 {facts['step35']}, python {facts['python']}, torch {facts['torch']}"),
        ("system", facts["platform"]),
    ]
    console.table("machine", ["fact", "value"], rows)
    extras = [(row["extra"], row["package"], row["version"] or row["install"]) for row in facts["extras"]]
    console.table("optional packages", ["extra", "package", "version, or how to get it"], extras)
    console.table(
        "presets",
        ["preset", "parameters", "to run", "to train", "here"],
        [
            (
                row["name"],
                amount(row["parameters"], ""),
                amount(row["run_bytes"], "B"),
                amount(row["train_bytes"], "B"),
                "trains and runs" if row["trains"] else "runs" if row["runs"] else "too large",
            )
            for row in facts["presets"]
        ],
    )
    console.print(verdict(facts["presets"]))
    if facts["compute_dtype"] == "bfloat16" and facts["bf16_flops"] < facts["fp32_flops"]:
        console.warn("bf16 products are slower than fp32 ones here; train in fp32 if the memory allows it")


def amount(value: float, unit: str) -> str:
    """Return `value` with a decimal prefix and three digits, such as "23.5 GB"."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}{unit}".rstrip()
        value /= 1000
    return f"{value:.3g} P{unit}".rstrip()
