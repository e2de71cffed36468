"""Playing tasks: messages of an `Environment` and tokens of a `Sampler`, turn by turn, for many episodes at once.

Tokens in, tokens out: what the policy sampled is never decoded and encoded again. Only the environment's answers
are encoded and appended, so every trajectory is exactly what the policy saw and wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from step35.api.environment import Environment, Outcome, Task
from step35.api.messages import Message
from step35.api.sampler import Completion, Sampler
from step35.api.sampling import SamplingParams
from step35.api.trajectory import Trajectory
from step35.data import chat
from step35.data.tokenizer import Tokenizer
from step35.runtime.seeding import derive


@dataclass
class Episode:
    """One task being played."""

    task: Task
    history: list[Message]
    trajectory: Trajectory
    done: bool = False

    @classmethod
    def start(cls, task: Task, tokenizer: Tokenizer) -> Episode:
        """Open the conversation with the task's messages and tools."""
        prompt = chat.encode_prompt(tokenizer, task.messages, task.tools)
        blank = Trajectory(prompt, [False] * len(prompt), [0.0] * len(prompt), [-1] * len(prompt))
        blank.info = {"question": task.messages[-1].get("content"), "answer": task.answer, "tool_errors": 0}
        return cls(task, list(task.messages), blank)

    def take(self, completion: Completion) -> None:
        """Append what the policy wrote."""
        ids = list(completion.token_ids)
        self.trajectory.tokens += ids
        self.trajectory.mask += [True] * len(ids)
        self.trajectory.logprobs += completion.logprobs
        self.trajectory.versions += [completion.version] * len(ids)

    def give(self, ids: list[int]) -> None:
        """Append what the environment said."""
        self.trajectory.tokens += ids
        self.trajectory.mask += [False] * len(ids)
        self.trajectory.logprobs += [0.0] * len(ids)
        self.trajectory.versions += [-1] * len(ids)


def play(
    sampler: Sampler,
    environment: Environment,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    params: SamplingParams,
    *,
    seeds: Sequence[int],
    max_turns: int,
    on_done: Callable[[int], None] = lambda finished: None,
) -> list[Trajectory]:
    """Play every task to its end, to `max_turns`, or to a turn of `params.max_tokens` (both: truncated).

    Turn j of episode i samples with a seed derived from (seeds[i], j), so episodes do not depend on each other.
    """
    episodes = [Episode.start(task, tokenizer) for task in tasks]
    for turn in range(max_turns):
        active = [(e, seed) for e, seed in zip(episodes, seeds, strict=True) if not e.done]
        if not active:
            break
        many = [replace(params, seed=derive(seed, turn)) for _, seed in active]
        completions = sampler.generate([e.trajectory.tokens for e, _ in active], many)
        for (episode, _), completion in zip(active, completions, strict=True):
            episode.take(completion)
            _advance(episode, completion, environment, tokenizer, last=turn == max_turns - 1)
        on_done(sum(e.done for e, _ in active))
    return [e.trajectory for e in episodes]


def _advance(
    episode: Episode, completion: Completion, environment: Environment, tokenizer: Tokenizer, *, last: bool
) -> None:
    """Let the environment answer the turn just taken."""
    trajectory = episode.trajectory
    if completion.finish_reason == "length":
        episode.done, trajectory.truncated, trajectory.reward = True, True, 0.0
        return
    turn = chat.parse(tokenizer.turn_text(completion.token_ids), episode.task.tools)
    outcome: Outcome = environment.respond(episode.task, episode.history, turn)
    trajectory.info["tool_errors"] += outcome.tool_errors
    episode.history += [turn, *outcome.observations]
    if outcome.done:
        episode.done, trajectory.reward = True, outcome.reward
    elif last:
        episode.done, trajectory.truncated, trajectory.reward = True, True, 0.0
    else:
        episode.give(tokenizer.encode(chat.continuation(outcome.observations)))
