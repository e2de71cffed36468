"""Continue a text, streaming, with a checkpoint folder or the small model that comes with the package."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import tyro
from pydantic import Field

from step35.cli.shipped import SHIPPED
from step35.config.base import Config


class Args(Config):
    """What to continue, and how."""

    path: tyro.conf.Positional[Path] = SHIPPED
    """Checkpoint folder in the released layout."""
    prompt: str | None = None
    """Text to continue; "-" reads it from standard input. By default, a question for the calculator as `chat` asks it,
    which is the text that the model of the package knows how to continue."""
    max_tokens: int = Field(default=128, ge=1)
    """Most tokens to generate."""
    temperature: float = Field(default=0.7, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = Field(default=0, ge=0)
    """Sample from the k likeliest tokens; 0 for all."""
    seed: int | None = None
    """Seed of the sampling; without one, each call differs."""
    speculate: int | None = Field(default=None, ge=0)
    """MTP drafts a step; by default as many as the model has modules. The text is the same with any number."""
    dtype: str = "float32"
    """Dtype of weights and computation: float32, bfloat16 or float16."""


def main(args: Args) -> int:
    """Print the prompt and its continuation as it is generated."""
    from step35.api.sampling import SamplingParams
    from step35.engine.llm import LLM
    from step35.runtime.device import set_threads

    set_threads()
    llm = LLM(args.path, dtype=args.dtype)
    prompt = question() if args.prompt is None else sys.stdin.read() if args.prompt == "-" else args.prompt
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        speculate=len(llm.model.mtp) if args.speculate is None else args.speculate,
    )
    started = time.perf_counter()
    tokens = passes = 0
    for new in llm.updates(prompt, params):
        if not passes:
            print(prompt, end="")
        tokens, passes = tokens + len(new.token_ids), passes + 1
        print(new.text, end="", flush=True)
    print()
    seconds = time.perf_counter() - started
    print(
        f"[{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s, {tokens / passes:.2f} a pass]",
        file=sys.stderr,
    )
    return 0


def question() -> str:
    """Return the default prompt: one question in the chat format, the calculator on offer."""
    from step35.agents.tools.calculator import Calculator
    from step35.data import chat

    return chat.render(
        [{"role": "user", "content": "What is 4821 * 77?"}], [Calculator().schema], add_generation_prompt=True
    )
