"""Arithmetic with a calculator as an environment: calls are executed, the final number is judged exactly."""

from __future__ import annotations

from step35.agents.loop import run_call
from step35.api.environment import Outcome, Task
from step35.api.messages import Message
from step35.api.tools import Tool
from step35.data.arithmetic import Split, problem


class ArithmeticEnvironment:
    """Problems of one split; follows `step35.api.environment.Environment`."""

    def __init__(self, split: Split, seed: int, calculator: Tool) -> None:
        self._split: Split = split
        self._seed = seed
        self._calculator = calculator

    def sample(self, index: int) -> Task:
        """Return problem number `index` as one user message with the calculator on offer."""
        drawn = problem(index, split=self._split, seed=self._seed)
        return Task(
            messages=(Message(role="user", content=drawn.question),),
            tools=(self._calculator.schema,),
            answer=drawn.answer,
            info={"expression": drawn.expression},
        )

    def respond(self, task: Task, history: list[Message], turn: Message) -> Outcome:
        """Run the calls of `turn`; without calls judge its content: 1.0 for exactly the answer, else 0.0.

        Space around the answer and one period behind it are allowed.
        """
        calls = turn.get("tool_calls") or []
        if not calls:
            answer = str(turn.get("content") or "").strip().removesuffix(".")
            return Outcome(done=True, reward=float(answer == task.answer))
        outputs = [run_call(call, {self._calculator.name: self._calculator}) for call in calls]
        observations = tuple(
            Message(role="tool", content=output, tool_call_id=call.get("id", ""))
            for call, output in zip(calls, outputs, strict=True)
        )
        return Outcome(observations, tool_errors=sum(output.startswith("error:") for output in outputs))
