"""Demonstrations of the calculator for supervised fine-tuning; every tool message is really executed output.

Only the expression takes copying. The reasoning is a few generic words, so that a tiny model spends its
capacity on the call.
"""

from __future__ import annotations

import random

from step35.api.messages import Message
from step35.api.tools import Tool
from step35.data.arithmetic import Problem
from step35.errors import DataError

_BEFORE_CALL = ("Use the calculator.", "Call the calculator.", "Compute it.", "This needs the calculator.")
_AFTER_ERROR = ("Fix the expression.", "Try again.", "Correct the call.")
_AFTER_RESULT = ("Done.", "That is the result.", "Answer it.")


def demonstration(problem: Problem, calculator: Tool, *, index: int = 0, mistakes: float = 0.0) -> list[Message]:
    """Return question, call, output and answer; wording depends on `index` and the problem only.

    With probability `mistakes` a call that fails comes first, so that recovery is seen. Raises `DataError`
    when the tool's output is not the problem's answer.
    """
    draw = random.Random(f"demonstration/{index}/{problem.expression}")
    messages = [Message(role="user", content=problem.question)]
    reasoning = draw.choice(_BEFORE_CALL)
    if draw.random() < mistakes:
        messages += _call(calculator, draw.choice(_broken(problem.expression)), reasoning)
        reasoning = draw.choice(_AFTER_ERROR)
    messages += _call(calculator, problem.expression, reasoning)
    output = messages[-1]["content"]
    if output != problem.answer:
        raise DataError(
            f"the tool says '{output}' to '{problem.expression}', but the answer is '{problem.answer}'; "
            "give the calculator that the problem was made for."
        )
    messages.append(Message(role="assistant", content=output, reasoning_content=draw.choice(_AFTER_RESULT)))
    return messages


def _broken(expression: str) -> tuple[str, ...]:
    """Return slips of `expression` that cannot be evaluated."""
    return f"({expression}", f"{expression})", f"{expression} +", f"{expression} ="


def _call(calculator: Tool, expression: str, reasoning: str) -> list[Message]:
    """Return an assistant turn with one call and the tool's message."""
    arguments = {"expression": expression}
    turn = Message(
        role="assistant",
        content="",
        reasoning_content=reasoning,
        tool_calls=[
            {
                "id": "call_0",
                "type": "function",
                "function": {"name": calculator.name, "arguments": {**arguments}},
            }
        ],
    )
    return [turn, Message(role="tool", content=calculator(arguments), tool_call_id="call_0")]
