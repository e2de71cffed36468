"""What a tool is: a schema for the model and a function from arguments to text."""

from __future__ import annotations

from typing import Any, Protocol

from step35.api.messages import ToolSchema


class Tool(Protocol):
    """A callable that a model may use. Errors are answers: they come back as text, never as exceptions."""

    @property
    def name(self) -> str:
        """The function name the model writes in its call."""
        ...

    @property
    def schema(self) -> ToolSchema:
        """The tool object shown to the model in the system turn."""
        ...

    def __call__(self, arguments: dict[str, Any]) -> str:
        """Run the tool and return its output, or text that begins with "error:"."""
        ...
