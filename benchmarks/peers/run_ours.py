"""Our engine on one job, in the dtype or with int8 weights; on the shipped tasks also with drafts of each depth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rounds import Speeds, Timing, add_tasks, load, measure, save, say

from step35 import __version__
from step35.api.sampling import SamplingParams
from step35.engine.llm import LLM
from step35.runtime.device import reuse_memory, set_threads

TASK_ROUNDS = 5
"""Rounds of the tasks for each repeat: one takes a tenth of a second, less than the machine's speed stays the same."""


def main() -> None:
    job, out = load()
    set_threads(job["threads"])
    reuse_memory()
    quantization = "int8" if job["weights"] == "int8" else "none"
    llm = LLM(job["checkpoint"], dtype=job["dtype"], quantization=quantization)
    speeds = measure(job, lambda prompts, new: generate(llm, prompts, new))
    answers, tokens_a_pass = on_tasks(llm, job, speeds)
    equal = [sum(a == b for a, b in zip(found, answers[0], strict=True)) for found in answers]
    save(
        out, f"step35 {__version__}", speeds, answers=answers[0], equal_to_plain=equal, tokens_a_pass=tokens_a_pass
    )  # fmt: skip


def generate(llm: LLM, prompts: Sequence[Sequence[int]], new: int) -> Timing:
    return run(llm, prompts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))[0]


def run(llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams) -> tuple[Timing, list[list[int]]]:
    """Run the prompts to their ends together; return the times and the new tokens."""
    first, started = 0.0, time.perf_counter()
    requests = llm.engine.create(prompts, params)
    for news in llm.engine.run(requests):
        first = first or (time.perf_counter() - started if news else 0.0)
    timing = Timing(first, time.perf_counter() - started)
    return timing, [list(request.completion().token_ids) for request in requests]


def on_tasks(llm: LLM, job: dict[str, Any], speeds: Speeds) -> tuple[list[list[list[int]]], list[float]]:
    """Answer the tasks one after the other, plain and at each depth in turn; add the speeds.

    Returns by depth the answers, and the tokens of a pass over the trunk, prompts' passes included. Each round has a
    fresh engine, so that it reads the prompts again.
    """
    depths = range(len(llm.model.mtp) + 1)
    answers: list[list[list[int]]] = [[] for _ in depths]
    tokens_a_pass = [0.0 for _ in depths]
    for number in range(TASK_ROUNDS * job["repeats"] + 1 if job["tasks"] else 0):
        for depth in depths:
            fresh = LLM(model=llm.model, tokenizer=llm.tokenizer, draft_vocabulary=job["draft_vocabulary"])
            params = SamplingParams(temperature=0, max_tokens=job["task_tokens"], speculate=depth)
            found = [run(fresh, [task], params) for task in job["tasks"]]
            answers[depth] = [tokens for _, [tokens] in found]
            counts = [len(tokens) for tokens in answers[depth]]
            tokens_a_pass[depth] = sum(counts) / fresh.engine.counters["passes"]
            if number:
                add_tasks(speeds, depth, counts, [timing for timing, _ in found])
        say(f"{job['variant']}: tasks, round {number} done")
    return answers, tokens_a_pass


main()
