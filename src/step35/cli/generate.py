"""Continue a text, streaming, with a checkpoint folder or the small model that comes with the package."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from step35.cli.decoding import Decoding
from step35.errors import ConfigError

if TYPE_CHECKING:
    from step35.api.sampling import Grammar


class Args(Decoding):
    """What to continue, and how."""

    max_tokens: int = Field(default=128, ge=1)
    """Most tokens to generate."""
    temperature: float = Field(default=0.7, ge=0)
    """0 is greedy, 1 samples from the model's own distribution."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    prompt: str | None = None
    """Text to continue; "-" reads it from standard input. By default, a question for the calculator as `chat` asks it,
    which is the text that the model of the package knows how to continue."""
    json_schema: str | None = None
    """Allow nothing but JSON that fits this schema: a file, or the schema itself, which begins with "{". Where the
    prompt ends in an open think block, this holds for what follows the thinking."""
    regex: str | None = None
    """Allow nothing but a text that this expression matches as a whole; again, behind the thinking."""


def main(args: Args) -> int:
    """Print the prompt and its continuation as it is generated."""
    from step35.runtime.device import set_threads

    set_threads()
    prompt = question() if args.prompt is None else sys.stdin.read() if args.prompt == "-" else args.prompt
    limits = grammar(args)
    llm = args.load()
    params = args.params(llm, grammar=limits, in_thinking=prompt.endswith("<think>\n"))
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


def grammar(args: Args) -> Grammar | None:
    """Return what limits the text; raise `ConfigError` for a schema that cannot be read."""
    from step35.api.sampling import Grammar

    if args.json_schema is not None and args.regex is not None:
        raise ConfigError("--json-schema and --regex are both given; leave one out.")
    if args.json_schema is not None:
        return Grammar(json_schema=schema(args.json_schema))
    return None if args.regex is None else Grammar(regex=args.regex)


def schema(source: str) -> dict[str, Any]:
    """Read a JSON schema from a file, or from the text itself."""
    inline = source.lstrip().startswith("{")
    where = "--json-schema" if inline else f"--json-schema {source}"
    try:
        found = json.loads(source if inline else Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f'{where} cannot be read: {error}; give a file, or the schema itself, "{{" first.') from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where} holds {found!r}; a schema is an object.")
    return found
