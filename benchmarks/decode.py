"""Decoding on this machine: ours beside transformers, llama.cpp and vLLM; same weights, threads and dtype, one run.

`tiny` is the trained model of the package, `mini` has random weights. Of each engine, in tokens/s:

    decode      one sequence from its first new token to its last, behind a prompt
    concurrent  32 sequences at once: new tokens over the whole time, reading the prompts included
    prefill N   one prompt of N tokens until its first new token
    tasks       the shipped model's tasks (its held-out problems, `tiny` only), one after the other, to their natural
                ends; plain and with MTP drafts; also without the time until the first token ("tasks_decode")

Decoding is greedy, and end tokens are ignored but in the tasks. MTP is measured on the tasks alone: the modules of
random weights draft nothing right. Our drafts are chosen within a quarter of the vocabulary (`draft_vocabulary`).

Decoding is held against a bound: the bandwidth of reading memory, measured, over the bytes that a token reads
(`config/cost.py`). Where these fit a cache, the bound may be passed, so the bandwidth of reading as few bytes again and
again is given too.

Every engine is a process of its own in its own environment (`make interop` installs them), one after the other.
vLLM's figure is the better of eager and compiled. Ours with drafts must say what ours says without.

    python benchmarks/decode.py [--models tiny mini] [--engines ours transformers llamacpp vllm] [--repeats 3]

Wants an idle machine and takes a quarter of an hour. The last line is JSON with the ratios of medians; the result
file holds everything, with command, commit and machine. The exit status is 1 when an engine failed or is missing, or
when drafts changed an answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bandwidth import WEIGHT_BYTES, decode_bytes, last_cache_bytes, read_bandwidth
from decode_cases import MODULES, Case, Shape, build
from decode_report import SHORT, compare_answers, complaints, ratios, show
from idle import Watch, wait_until_idle
from step35.config.cost import trunk_parameters
from step35.runtime.console import Console
from step35.runtime.device import set_threads
from step35.runtime.machine import environment

RESULTS = Path(__file__).parent / "results"
PEERS = Path(__file__).parent / "peers"
ROOT = Path(__file__).parents[1]
INTEROP = ROOT / ".interop"
PROGRAMS = INTEROP / "llama/build/bin"
PREFILL = {"tiny": (512,), "mini": (512, 2048)}
MEMORY_BYTES = 2 << 30
"""What is read to measure memory: larger than caches."""
DRAFT_SHARE = 4
"""Our drafts are chosen within the first of so many parts of the vocabulary."""
LIMIT_S = 1200
"""Of one process."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run an engine, in a process of its own."""

    name: str
    engine: str
    script: str
    python: Path
    needs: Sequence[Path] = ()
    weights: str
    """Dtype of the weights that it reads, a key of `WEIGHT_BYTES`."""
    tasks_only: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def variants(dtype: str) -> list[Variant]:
    """Return all ways that are compared."""
    here, theirs = Path(sys.executable), INTEROP / "transformers/bin/python"
    ours = {"engine": "ours", "script": "run_ours.py", "python": here}
    llama: dict[str, Any] = {"engine": "llamacpp", "script": "run_llama.py", "python": here}
    llama["needs"] = [PROGRAMS / name for name in ("llama-bench", "llama-batched-bench", "llama-server")]
    vllm = {"engine": "vllm", "script": "run_vllm.py", "python": INTEROP / "vllm/bin/python", "weights": dtype}
    return [
        Variant(name="ours", weights=dtype, **ours),
        Variant(name="ours-int8", weights="int8", **ours),
        Variant(name="transformers", engine="transformers", script="run_transformers.py", python=theirs, weights=dtype),
        Variant(name="llamacpp", weights=dtype, **llama),
        Variant(name="llamacpp-q8_0", weights="q8_0", **llama),
        Variant(name="vllm-eager", options={"compiled": False, "drafts": 0}, **vllm),
        Variant(name="vllm-compiled", options={"compiled": True, "drafts": 0}, **vllm),
        *(
            Variant(name=f"vllm-compiled-mtp{n}", tasks_only=True, options={"compiled": True, "drafts": n}, **vllm)
            for n in (1, 3)
        ),
    ]


def main() -> int:
    args = arguments()
    threads = set_threads(args.threads)
    check_idle(args.allow_busy)
    started, load_before = time.monotonic(), os.getloadavg()
    chosen = [v for v in variants(args.dtype) if v.engine in args.engines]
    bandwidths = {"memory": read_bandwidth(MEMORY_BYTES)}
    runs, bounds = list[dict[str, Any]](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            case = build(name, Path(folder), dtype=args.dtype, shape=shape_of(args, name))
            for variant in chosen:
                if case.tasks or not variant.tasks_only:
                    runs.append(run(variant, case, args, threads, Path(folder)))
            bounds += [bound(case, v, args, bandwidths) for v in chosen if v.engine in ("ours", "llamacpp")]
    rows = [row for one in runs for row in one.pop("rows")]
    medians = {(row["model"], row["variant"], row["what"]): row["median"] for row in rows}
    compare_answers(runs)
    named = ratios(medians, bounds, args.models, args.dtype)
    result = {
        "command": " ".join(["python", "benchmarks/decode.py", *sys.argv[1:]]),
        "environment": environment() | {
            "threads": threads, "load_average": load_before, "last_cache_bytes": last_cache_bytes(),
        },
        "dtype": args.dtype, "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens, "batch": args.batch,
        "tasks": args.tasks, "draft_share": DRAFT_SHARE, "repeats": args.repeats,
        "seconds": round(time.monotonic() - started),
        "read_bandwidths": {name: {"bytes_per_s": rate, "by": by} for name, (rate, by) in bandwidths.items()},
        "bounds": bounds, "runs": runs, "rows": rows, "ratios": named,
    }  # fmt: skip
    out = args.out or RESULTS / f"decode-{args.dtype}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    wrong = complaints(runs)
    show(result, wrong, Console())
    print(json.dumps(named))
    return 1 if wrong else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "mini"], choices=["tiny", "mini"])
    engines = ["ours", "transformers", "llamacpp", "vllm"]
    parser.add_argument("--engines", nargs="+", default=engines, choices=engines)
    parser.add_argument("--dtype", default="bfloat16", choices=list(SHORT))
    parser.add_argument("--threads", type=int, help="default: OMP_NUM_THREADS, else one per physical core")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="concurrent sequences")
    parser.add_argument("--prefill", type=int, nargs="+", help="lengths; default: 512, on mini also 2048")
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--allow-busy", action="store_true", help="measure though others use the machine")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/decode-DTYPE.json")
    return parser.parse_args()


def check_idle(allow_busy: bool) -> None:
    if not allow_busy and not wait_until_idle(60.0):
        raise SystemExit("other processes use this machine; end them, or give --allow-busy for figures of no worth.")


def shape_of(args: argparse.Namespace, model: str) -> Shape:
    prefill = args.prefill or PREFILL[model]
    return Shape(
        prompt=args.prompt_tokens, batch=args.batch, prefill=prefill, repeats=args.repeats, tasks=args.tasks
    )  # fmt: skip


def run(variant: Variant, case: Case, args: argparse.Namespace, threads: int, folder: Path) -> dict[str, Any]:
    """Run one engine on one model; return its rows and what is known of the run, or why there are none."""
    about: dict[str, Any] = {"model": case.name, "variant": variant.name, "rows": []}
    if problem := missing(variant):
        return about | {"missing": problem}
    print(f"{case.name}: {variant.name}", file=sys.stderr, flush=True)
    if not args.allow_busy:
        wait_until_idle(60.0)
    job, out = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps(job_of(variant, case, args, threads)))
    out.unlink(missing_ok=True)
    about["load_average"] = os.getloadavg()
    watch, started = Watch(), time.monotonic()
    problem = execute(variant, threads, job, out)
    about |= {"seconds": round(time.monotonic() - started, 1), "others_cores": watch.cores()}
    if problem:
        return about | {"failed": problem}
    found = json.loads(out.read_text())
    about["rows"] = [row(case.name, variant.name, what, samples) for what, samples in found.pop("speeds").items()]
    return about | found


def missing(variant: Variant) -> str | None:
    """Say what is not installed, and what to do about it."""
    absent = [path for path in (variant.python, *variant.needs) if not path.exists()]
    if not absent:
        return None
    folder = INTEROP / ("llama" if variant.engine == "llamacpp" else variant.engine)
    first = f"remove {folder.relative_to(ROOT)} and " if folder.exists() else ""
    return f"{absent[0].name} of {variant.engine} is not installed: {first}run `make interop`"


def job_of(variant: Variant, case: Case, args: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Return what the engine's script reads."""
    return {
        "variant": f"{case.name}: {variant.name}",
        "checkpoint": str(case.checkpoint),
        "gguf": str(case.ggufs.get(variant.weights, "")),
        "dtype": args.dtype, "weights": variant.weights, "threads": threads, "repeats": args.repeats,
        "rounds": case.rounds, "new_tokens": args.new_tokens,
        "tasks": case.tasks, "task_tokens": 256, "end_ids": list(case.config.eos_token_id),
        "depths": list(range(MODULES + 1)), "programs": str(PROGRAMS),
        "draft_vocabulary": case.config.vocab_size // DRAFT_SHARE,
        **variant.options,
    }  # fmt: skip


def execute(variant: Variant, threads: int, job: Path, out: Path) -> str | None:
    """Run the engine's script; return the end of what it said if it failed."""
    command = [str(variant.python), str(PEERS / variant.script), str(job), str(out)]
    variables = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if variant.engine == "vllm":
        variables["PYTHONPATH"] = str(ROOT / "tests/interop/engines")  # its repairs
        openmp = variant.python.parents[1] / "lib/libiomp5.so"
        if openmp.exists():
            variables["LD_PRELOAD"] = str(openmp)  # as vLLM asks for
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    late = threading.Timer(LIMIT_S, _end, [process])
    late.start()
    try:
        said = _progress(process)
        process.wait()
    finally:
        late.cancel()
        _end(process)
    if process.returncode == 0 and out.exists():
        return None
    return f"exit status {process.returncode}: {said[-1500:]}"


def _progress(process: subprocess.Popen[str]) -> str:
    """Pass on the script's own lines until it ends; return all it said."""
    assert process.stderr is not None
    said = list[str]()
    for line in process.stderr:
        if line.startswith("> "):
            print(line, end="", file=sys.stderr, flush=True)
        said.append(line)
    return "".join(said)


def _end(process: subprocess.Popen[str]) -> None:
    """End the script with whatever it has started; nothing happens when all have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def row(model: str, variant: str, what: str, samples: Sequence[float]) -> dict[str, Any]:
    return {
        "model": model, "variant": variant, "what": what, "median": median(samples), "best": max(samples),
        "samples": list(samples),
    }  # fmt: skip


def bound(
    case: Case, variant: Variant, args: argparse.Namespace, bandwidths: dict[str, tuple[float, str]]
) -> dict[str, Any]:
    """Return what reading allows one sequence at the middle of its new tokens; measures the cache if need be."""
    size = decode_bytes(case.config, args.prompt_tokens + args.new_tokens // 2, variant.weights, args.dtype)
    key = f"the {size / 1e6:.1f} MB of a token"
    if key not in bandwidths:
        bandwidths[key] = read_bandwidth(size)
    return {
        "model": case.name,
        "variant": variant.name,
        "weight_bytes": round(trunk_parameters(case.config) * WEIGHT_BYTES[variant.weights]),
        "bytes_a_token": size,
        "memory_tokens_per_s": bandwidths["memory"][0] / size,
        "cached_tokens_per_s": bandwidths[key][0] / size,
    }


if __name__ == "__main__":
    sys.exit(main())
