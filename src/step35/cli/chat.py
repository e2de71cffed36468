"""Talk to a model in the terminal. Reasoning is dimmed; calls of the calculator are executed and shown.

The model that comes with the package is tiny and knows one thing: sums, differences, products, whole quotients and
remainders of two whole numbers of up to four digits. Ask "What is 4821 * 77?", "How much is 12 plus 30?", "Take 15
away from 400.", "How many times does 12 fit into 500?" or "What is the remainder of 100 divided by 7?".
"""

from __future__ import annotations

import sys

from pydantic import Field

from step35.cli.decoding import Decoding

HELP = "Type a question; /new starts over, /quit or Ctrl-D ends."


class Args(Decoding):
    """Whom to talk to, and how."""

    max_tokens: int = Field(default=256, ge=1)
    """Most tokens of one turn."""
    message: str = ""
    """Ask this one question and exit."""
    system: str = ""
    """System message."""
    tools: bool = True
    """Offer the calculator."""
    thinking_budget: int | None = Field(default=None, ge=0)
    """Most tokens of thinking in a turn; then the think block is closed and the answer follows. None sets no limit."""


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
