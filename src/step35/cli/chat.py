"""Talk to a model in the terminal. Reasoning is dimmed; calls of the calculator are executed and shown.

The model that comes with the package is tiny and knows one thing: sums, differences, products, whole quotients and
remainders of two whole numbers of up to four digits. Ask "What is 4821 * 77?", "How much is 12 plus 30?", "Take 15
away from 400.", "How many times does 12 fit into 500?" or "What is the remainder of 100 divided by 7?".
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro
from pydantic import Field

from step35.cli.shipped import SHIPPED
from step35.config.base import Config

HELP = "Type a question; /new starts over, /quit or Ctrl-D ends."


class Args(Config):
    """Whom to talk to, and how."""

    path: tyro.conf.Positional[Path] = SHIPPED
    """Checkpoint folder in the released layout."""
    message: str = ""
    """Ask this one question and exit."""
    system: str = ""
    """System message."""
    tools: bool = True
    """Offer the calculator."""
    max_tokens: int = Field(default=256, ge=1)
    """Most tokens of one turn."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    seed: int | None = None
    """Seed of the sampling, above temperature 0."""
    dtype: str = "float32"
    """Dtype of weights and computation: float32, bfloat16 or float16."""


def main(args: Args) -> int:
    """Answer `--message`, or every line from the terminal or standard input."""
    from step35.cli.conversation import Conversation
    from step35.runtime.device import set_threads

    set_threads()
    conversation = Conversation(args)
    if args.message:
        conversation.ask(args.message)
        return 0
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP)
    while True:
        line = read_line("\nyou> " if interactive else "")
        if line is None or line.strip() == "/quit":
            return 0
        if line.strip() == "/new":
            conversation.reset()
        elif line.strip():
            conversation.ask(line.strip())


def read_line(prompt: str) -> str | None:
    """Return the next line, or None at the end of input."""
    try:
        return input(prompt)
    except EOFError:
        return None
