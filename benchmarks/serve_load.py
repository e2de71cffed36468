"""Load on a server: many concurrent streams, a share of which hang up in the middle, for some minutes.

Starts `step35 serve` on a free port and keeps `--streams` streams of chat turns open; each begins with one of a few
system prompts, and `--disconnects` of them leave: half at their first token, half while they wait for it. Reports the
times to the first token and between tokens, errors by status, the server's memory over time, and the blocks still held
at the end.

    python benchmarks/serve_load.py [PATH] [--streams 200] [--seconds 300] [--disconnects 0.3] [--out FILE]

The last line is JSON. Exits with 1 when a stream ended with an error other than 429, or when a block was not given
back. Server and clients share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from step35.runtime.machine import environment

RESULTS = Path(__file__).parent / "results"
SYSTEMS = [" ".join(f"Rule {n} of set {s}: be brief." for n in range(8)) for s in range(4)]


@dataclass
class Record:
    """What the clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="checkpoint folder; default: the model of the package")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--disconnects", type=float, default=0.3)
    parser.add_argument("--max-concurrent", type=int, default=256, help="of the server; fewer than streams gives 429s")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, default=RESULTS / "serve-load.json")
    args = parser.parse_args()
    command = [sys.executable, "-m", "step35.cli.main", "serve", *([args.path] if args.path else []), "--port", "0"]
    command += ["--max-concurrent", str(args.max_concurrent)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = _address(server)
        record, left = Record(), {}
        asyncio.run(load(address, args, server.pid, record, left))
    finally:
        server.terminate()
        server.wait(60)
    result = summary(record, left, args)
    args.out.write_text(json.dumps(result | {"command": sys.argv, "environment": environment()}, indent=2) + "\n")
    print(json.dumps(result))
    return 0 if not result["errors"] and not result["blocks_held"] else 1


def _address(server: subprocess.Popen[str]) -> str:
    """Wait for the line that says where the server listens."""
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"http://\S+(?=/v1)", line):
            return found[0]
    raise SystemExit("the server ended before it listened; run `step35 serve` to see why")


async def load(address: str, args: argparse.Namespace, pid: int, record: Record, left: dict[str, float]) -> None:
    """Keep the streams going until the time is up, then look at what the server still holds."""
    limits = httpx.Limits(max_connections=args.streams + 8)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
        args.model = (await client.get("/v1/models")).json()["data"][0]["id"]
        end = time.monotonic() + args.seconds
        tasks = [
            asyncio.create_task(_streams(client, args, random.Random(n), end, record)) for n in range(args.streams)
        ]
        while time.monotonic() < end:
            record.memory_mib.append(_memory_mib(pid))
            await asyncio.sleep(min(5.0, args.seconds / 20))
        await asyncio.gather(*tasks)
        await asyncio.sleep(1.0)
        left.update(_gauges((await client.get("/metrics")).text))


async def _streams(
    client: httpx.AsyncClient, args: argparse.Namespace, numbers: random.Random, end: float, record: Record
) -> None:
    """Ask one question after the other; after a 429, wait as long as the server says."""
    await asyncio.sleep(numbers.random())
    while time.monotonic() < end:
        try:
            status, wait = await _ask(client, args, numbers, record)
        except httpx.HTTPError as error:
            status, wait = type(error).__name__, 0.1
        record.statuses[status] += 1
        await asyncio.sleep(wait)


async def _ask(
    client: httpx.AsyncClient, args: argparse.Namespace, numbers: random.Random, record: Record
) -> tuple[str, float]:
    """Stream one chat turn, or leave it; return how it ended, and how long to wait before the next."""
    question = f"What is {numbers.randrange(10**4)} * {numbers.randrange(100)}?"
    messages = [{"role": "system", "content": numbers.choice(SYSTEMS)}, {"role": "user", "content": question}]
    body = {"model": args.model, "messages": messages, "stream": True, "max_tokens": args.max_tokens}
    leaves = numbers.random() < args.disconnects
    patience = None
    if leaves and numbers.random() < 0.5:
        patience = numbers.random() * (statistics.median(record.first_s[-100:]) if record.first_s else 0.5)
    try:
        async with asyncio.timeout(patience):
            return await _read(client, body, record, leaves)
    except TimeoutError:
        return "left", 0.0


async def _read(client: httpx.AsyncClient, body: dict[str, Any], record: Record, leaves: bool) -> tuple[str, float]:
    """Read a turn to its end, or to its first token."""
    last = start = time.perf_counter()
    seen = 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            return str(answer.status_code), float(answer.headers.get("Retry-After", 0.1))
        async for line in answer.aiter_lines():
            if '"error"' in line[:20]:
                return "error in the stream", 0.0
            if not re.search(r'"(content|reasoning_content)": ?"[^"]', line):
                continue
            now = time.perf_counter()
            (record.between_s if seen else record.first_s).append(now - last if seen else now - start)
            last, seen = now, seen + 1
            if leaves:
                return "left", 0.0
    return "whole", 0.0


def _memory_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def _gauges(text: str) -> dict[str, float]:
    lines = (line.split() for line in text.splitlines() if line.startswith("step35_engine_"))
    return {name: float(value) for name, value in lines}


def summary(record: Record, left: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures by name: seconds, MiB, counts."""
    settled = record.memory_mib[len(record.memory_mib) // 4 :]
    allowed = ("whole", "left", "429")
    return {
        "streams": args.streams,
        "seconds": args.seconds,
        "ended": dict(record.statuses),
        "share_left": record.statuses["left"] / max(1, record.statuses.total()),
        "errors": sum(count for status, count in record.statuses.items() if status not in allowed),
        "first_token_s": _quantiles(record.first_s),
        "between_tokens_s": _quantiles(record.between_s),
        "generated_tokens_per_s": left.get("step35_engine_generated_tokens", 0) / args.seconds,
        "memory_mib": {"after_a_quarter": settled[0], "most_after": max(settled), "end": settled[-1]},
        "blocks_held": left["step35_engine_full_blocks_held"] + left["step35_engine_window_blocks_held"],
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100)
    return {"p50": cuts[49], "p99": cuts[98], "max": max(values)}


if __name__ == "__main__":
    sys.exit(main())
