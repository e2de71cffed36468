"""llama.cpp on one job: its own benchmarks for fixed lengths, its server on the shipped tasks. Standard library only.

`llama-bench` and `llama-batched-bench` run random tokens and choose none, so the figures leave sampling out.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rounds import Speeds, Timing, add_tasks, load, save, say


def main() -> None:
    job, out = load()
    speeds, commit = fixed_lengths(job)
    answers: list[list[int]] = []
    for drafts in job["depths"] if job["tasks"] else ():
        answers = on_tasks(job, drafts, speeds)
        say(f"{job['variant']}: tasks with {drafts} drafts done")
    save(out, f"llama.cpp {commit}", speeds, answers=answers)


def fixed_lengths(job: dict[str, Any]) -> tuple[Speeds, str]:
    """Return the speeds of prompts and decoding by llama.cpp's benchmarks, and its commit."""
    prompts = job["rounds"][0]
    prompt, new, batch = len(prompts["single"]), job["new_tokens"], len(prompts["batch"])
    lengths = ",".join(str(len(ids)) for ids in prompts["prefill"])
    reading = _bench(job, "-p", lengths, "-n", "0")
    decoding = _bench(job, "-p", "0", "-n", str(new), "-d", str(prompt))
    say(f"{job['variant']}: llama-bench done")
    speeds = parse_bench(reading + decoding)
    speeds["concurrent"] = [_batched(job, prompt, new, batch) for _ in range(job["repeats"])]
    say(f"{job['variant']}: llama-batched-bench done")
    return speeds, reading[0]["build_commit"]


def parse_bench(entries: Sequence[dict[str, Any]]) -> Speeds:
    """Return tokens/s by what was measured, from `llama-bench -o json`."""
    return {
        "decode" if entry["n_gen"] else f"prefill_{entry['n_prompt']}": [float(speed) for speed in entry["samples_ts"]]
        for entry in entries
    }


def parse_batched(output: str) -> float | None:
    """Return new tokens over the whole time, reading the prompts included, from `llama-batched-bench`'s JSON line."""
    line = re.search(r"\{.*\}", output)
    if line is None:
        return None
    entry = json.loads(line[0])
    return float(entry["pl"] * entry["tg"] / (entry["t_pp"] + entry["t_tg"]))


def _bench(job: dict[str, Any], *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        _call(job, "llama-bench", *arguments, "-r", str(job["repeats"]), "-o", "json")
    )
    return found


def _batched(job: dict[str, Any], prompt: int, new: int, batch: int) -> float:
    shape = ["-npp", str(prompt), "-ntg", str(new), "-npl", str(batch), "-c", str(batch * (prompt + new))]
    for _ in range(3):  # it has once ended well without its line
        speed = parse_batched(_call(job, "llama-batched-bench", *shape, "--output-format", "jsonl"))
        if speed is not None:
            return speed
    raise SystemExit("llama-batched-bench printed no line of JSON")


def _call(job: dict[str, Any], program: str, *arguments: str) -> str:
    command = [f"{job['programs']}/{program}", "-m", job["gguf"], "-t", str(job["threads"]), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def on_tasks(job: dict[str, Any], drafts: int, speeds: Speeds) -> list[list[int]]:
    """Answer the tasks one after the other; add the speeds by the server's own clock, return the answers."""
    answers: list[list[int]] = []
    with _server(job, drafts) as ask:
        for number in range(job["repeats"] + 1):
            found = [ask(task) for task in job["tasks"]]
            answers = [answer["tokens"] for answer in found]
            if number:
                timings = [timing_of(answer["timings"]) for answer in found]
                add_tasks(speeds, drafts, [len(tokens) for tokens in answers], timings)
    return answers


def timing_of(answer: dict[str, float]) -> Timing:
    """Return the times that the server states with an answer."""
    return Timing(answer["prompt_ms"] / 1000, (answer["prompt_ms"] + answer["predicted_ms"]) / 1000)


@contextmanager
def _server(job: dict[str, Any], drafts: int) -> Iterator[Callable[[Sequence[int]], dict[str, Any]]]:
    """Start the server on a free loopback port; give a function from a prompt to its answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        f"{job['programs']}/llama-server", "-m", job["gguf"], "--host", "127.0.0.1", "--port", str(port),
        "-c", "4096", "-np", "1", "-t", str(job["threads"]),
    ]  # fmt: skip
    if drafts:
        command += ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(drafts), "--spec-draft-p-min", "0"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as server,
    ):
        try:
            _wait(port, server)
            yield lambda prompt: _ask(job, port, prompt)
        finally:
            server.terminate()


def _wait(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        time.sleep(0.25)
        if server.poll() is not None:
            raise SystemExit(f"llama-server ended with {server.returncode}")
        try:
            if b"ok" in urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read():
                return
        except OSError:
            continue
    raise SystemExit("llama-server did not answer within a minute")


def _ask(job: dict[str, Any], port: int, prompt: Sequence[int]) -> dict[str, Any]:
    body = {"prompt": list(prompt), "n_predict": job["task_tokens"], "temperature": 0, "return_tokens": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer: dict[str, Any] = json.load(urllib.request.urlopen(request, timeout=300))
    return answer


if __name__ == "__main__":
    main()
