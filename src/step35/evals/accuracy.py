"""pass@1 on an environment's problems, greedy and sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from step35.api.environment import Environment
from step35.api.sampler import Sampler
from step35.api.sampling import SamplingParams
from step35.api.trajectory import Trajectory
from step35.config.post import EvalConfig
from step35.data.episode import play
from step35.data.tokenizer import Tokenizer
from step35.evals.stats import wilson
from step35.runtime.seeding import derive


def accuracy(
    sampler: Sampler,
    environment: Environment,
    tokenizer: Tokenizer,
    config: EvalConfig,
    *,
    greedy: bool,
    on_done: Callable[[int], None] = lambda finished: None,
) -> tuple[dict[str, Any], list[Trajectory]]:
    """Return {"mode", "n", "correct", "accuracy", "low", "high", ...} and the trajectories.

    Sampled pass@1 averages `config.samples` samples at temperature 1; its interval counts problems, not samples,
    since samples of one problem are not independent.
    """
    repeats = 1 if greedy else config.samples
    numbers = [i for i in range(config.problems) for _ in range(repeats)]
    params = SamplingParams(max_tokens=config.max_turn_tokens, temperature=0.0 if greedy else 1.0)
    tasks = [environment.sample(i) for i in numbers]
    seeds = [derive(config.seed, "eval", j) for j in range(len(tasks))]
    played = play(
        sampler,
        environment,
        tokenizer,
        tasks,
        params,
        seeds=seeds,
        max_turns=config.max_turns,
        on_done=on_done,
    )
    judged = [t for t in played if t.reward is not None]
    rate = sum(t.reward or 0.0 for t in judged) / max(1, len(judged))
    problems = max(1, len(judged) // repeats)
    low, high = wilson(rate * problems, problems)
    result = {
        "mode": "greedy" if greedy else "sampled",
        "n": problems,
        "samples": repeats,
        "correct": round(rate * problems, 2),
        "accuracy": rate,
        "low": low,
        "high": high,
        "truncated": sum(t.truncated for t in played) / len(played),
        "tool_errors": sum(t.info["tool_errors"] for t in played) / len(played),
    }
    return result, played
