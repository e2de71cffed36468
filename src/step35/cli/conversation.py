"""A conversation shown as it is generated: reasoning dim, calls and results marked, control tokens hidden."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from step35.agents.loop import respond
from step35.agents.tools.calculator import Calculator
from step35.api.messages import Message
from step35.data import chat

if TYPE_CHECKING:
    from step35.cli.chat import Args

REASONING, CALL, RESULT = "dim italic", "cyan", "green"
TAGS = re.compile("(</think>|</?tool_call>)")
"""Where the style changes; each is one token, so it comes whole."""


class Conversation:
    """The model, the messages so far, and the screen."""

    def __init__(self, args: Args) -> None:
        self.args = args
        self.llm = args.load()
        calculator = Calculator()
        self.tools = {calculator.name: calculator} if args.tools else {}
        self.screen = Console(highlight=False)
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [Message(role="system", content=self.args.system)] if self.args.system else []

    def ask(self, question: str) -> None:
        """Answer one user message, running tools on the way."""
        self.messages.append(Message(role="user", content=question))
        for message in respond(self._turn, self.messages, self.tools):
            if message["role"] == "tool":
                self.screen.print(Text(f"= {message['content']}", style=RESULT), soft_wrap=True)

    def _turn(self, messages: list[Message]) -> Message:
        """Generate one assistant turn, printing it token by token."""
        schemas = [tool.schema for tool in self.tools.values()]
        prompt = chat.encode_prompt(self.llm.tokenizer, messages, schemas)
        params = self.args.params(self.llm, in_thinking=True)
        text, style = "", REASONING
        for piece in self.llm.stream(prompt, params):
            text += piece
            style = self._show(piece, style)
        self.screen.print()
        return chat.parse(text, schemas)

    def _show(self, text: str, style: str) -> str:
        """Print new text and return the style of what follows it."""
        for piece in TAGS.split(text):
            if piece == "<tool_call>":
                style = CALL
            if piece != "</think>":
                self.screen.print(Text(piece, style=style), end="", soft_wrap=True)
            if piece in ("</think>", "</tool_call>"):
                style = ""
        return style
