"""The RL loop against a sampler and an environment that are fakes: only the protocols hold them together."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from step35.api.environment import Environment, Outcome, Task
from step35.api.messages import Message
from step35.api.sampler import Completion, Sampler
from step35.api.sampling import SamplingParams
from step35.api.trajectory import Trajectory
from step35.config.rl import MISPOConfig, RLConfig
from step35.data import chat
from step35.data.tokenizer import Tokenizer, load_tokenizer
from step35.errors import DataError
from step35.model.step35 import Step35
from step35.post.rl.loop import reinforce, roll_out
from step35.runtime import checkpoint
from step35.runtime.console import Console
from step35.runtime.metrics import read_metrics
from step35.runtime.rundir import RunDir

WIDE = MISPOConfig(token_low=1e-9, token_high=1e9, trajectory_low=1e-9, trajectory_high=1e9)
CONFIG = RLConfig(
    steps=4, prompts=2, responses=2, max_turns=2, max_turn_tokens=12, actor_batches=2, critic_batches=1,
    actor_warmup=2, critic_warmup=2, mis_po=WIDE, checkpoint_every=2, seed=1,
)  # fmt: skip


class StoppedError(Exception):
    """The machine went away."""


@dataclass
class FakeSampler:
    """Answers "so\\n</think>\\nyes" or "no" by the seed, and remembers what it was given."""

    tokenizer: Tokenizer
    version: int = -1
    weights: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        assert not isinstance(params, SamplingParams)
        self.prompts += [list(p) for p in prompts]
        self.params += params
        done = []
        for one in params:
            assert one.seed is not None
            word = "yes" if one.seed % 2 else "no"
            ids = tuple(self.tokenizer.encode(f"{word}\n</think>\n{word}<|im_end|>"))
            done.append(Completion(ids, (-0.5,) * len(ids), "stop", self.version))
        return done

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        raise NotImplementedError

    def update_weights(self, state: Mapping[str, Any], version: int) -> None:
        self.version = version
        self.weights.append((version, state["lm_head.weight"].clone()))


@dataclass
class FakeEnvironment:
    """Judges answers by `verdict`; before it first gives problem `at` it calls `stop`."""

    verdict: Callable[[Task, str], float | None] = lambda task, answer: float(answer == "yes")
    at: int = -1
    stop: Callable[[], None] = lambda: None
    sampled: list[int] = field(default_factory=list)

    def sample(self, index: int) -> Task:
        if index == self.at and index not in self.sampled:
            self.stop()
        self.sampled.append(index)
        return Task(messages=(Message(role="user", content=f"question {index}"),), answer=str(index))

    def respond(self, task: Task, history: list[Message], turn: Message) -> Outcome:
        return Outcome(done=True, reward=self.verdict(task, turn["content"]))


@pytest.fixture(scope="module")
def tokenizer(golden: Path) -> Tokenizer:
    return load_tokenizer(golden / "tiny-a")


Start = Callable[..., tuple[Step35, FakeSampler]]


@pytest.fixture
def start(make_model: Callable[..., Step35], tokenizer: Tokenizer) -> Start:
    """Return a function that runs the loop in a folder with everything made anew, as a new process would."""

    def start(folder: Path, environment: Environment | None = None, **changes: Any) -> tuple[Step35, FakeSampler]:
        actor, sampler = make_model(vocab_size=384), FakeSampler(tokenizer)
        config = CONFIG.model_copy(update=changes)
        protocol: Sampler = sampler
        reinforce(actor, protocol, environment or FakeEnvironment(), tokenizer, config, RunDir(folder), Console())
        return actor, sampler

    return start


def logged(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "time"} for r in read_metrics(folder / "metrics.jsonl")]


def test_every_round_sends_its_weights_with_their_version(start: Start, tmp_path: Path) -> None:
    actor, sampler = start(tmp_path)
    assert [version for version, _ in sampler.weights] == [0, 1, 2, 3, 4]
    for (_, before), (_, after) in zip(sampler.weights, sampler.weights[1:], strict=False):
        assert not torch.equal(before, after)
    assert torch.equal(sampler.weights[-1][1], actor.lm_head.weight)


def test_rollouts_are_saved_with_what_the_sampler_said(start: Start, tmp_path: Path, tokenizer: Tokenizer) -> None:
    _, sampler = start(tmp_path)
    for step in range(4):
        lines = (tmp_path / "rollouts" / f"step_{step}.jsonl").read_text().splitlines()
        played = [Trajectory.from_json(line) for line in lines]
        assert len(played) == 4
        for number, one in enumerate(played):
            index = step * 2 + number // 2  # two responses to each of two fresh problems
            prompt = chat.encode_prompt(tokenizer, [Message(role="user", content=f"question {index}")], [])
            assert sampler.prompts[step * 4 + number] == prompt == one.tokens[: len(prompt)]
            written = one.tokens[len(prompt) :]
            answer = "yes" if one.reward else "no"
            assert tokenizer.decode(written) == f"{answer}\n</think>\n{answer}<|im_end|>"
            assert one.mask == [False] * len(prompt) + [True] * len(written)
            assert one.logprobs == [0.0] * len(prompt) + [-0.5] * len(written)
            assert one.versions == [-1] * len(prompt) + [step] * len(written)


def test_sampling_is_from_the_policy_itself_with_a_seed_for_each_episode(start: Start, tmp_path: Path) -> None:
    _, sampler = start(tmp_path)
    assert len({one.seed for one in sampler.params}) == len(sampler.params) == 16
    assert {(one.temperature, one.top_p, one.top_k, one.max_tokens) for one in sampler.params} == {(1.0, 1.0, 0, 12)}


def test_no_verdict_is_dropped_and_not_scored_zero(start: Start, tmp_path: Path) -> None:
    def verdict(task: Task, answer: str) -> float | None:
        return None if int(task.answer) % 2 else 1.0

    start(tmp_path, FakeEnvironment(verdict), steps=1)
    [record] = logged(tmp_path)
    assert record["no_verdict"] == 2
    assert record["reward"] == 1.0
    assert record["value_loss"] == pytest.approx(1.0)  # all values start at 0 and all returns that count are 1


def test_a_round_without_any_verdict_stops(start: Start, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"round 0: .* no verdict on any of 4"):
        start(tmp_path, FakeEnvironment(lambda task, answer: None))


def test_the_log_tells_how_the_round_went(start: Start, tmp_path: Path) -> None:
    start(tmp_path)
    for step, record in enumerate(logged(tmp_path)):
        lines = (tmp_path / "rollouts" / f"step_{step}.jsonl").read_text().splitlines()
        played = [Trajectory.from_json(line) for line in lines]
        assert record["step"] == step + 1
        assert record["reward"] == pytest.approx(sum(one.reward or 0 for one in played) / 4)
        assert record["response_tokens"] == pytest.approx(sum(sum(one.mask) for one in played) / 4)
        assert (record["truncation_rate"], record["tool_errors"], record["no_verdict"]) == (0, 0, 0)


def kill() -> None:
    raise StoppedError


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("at", "stop", "error", "done"),
    [(4, kill, StoppedError, 2), (6, kill, StoppedError, 2), (4, interrupt, KeyboardInterrupt, 3)],
)
def test_a_stopped_run_resumes_as_if_unbroken(
    start: Start, tmp_path: Path, at: int, stop: Callable[[], None], error: type[BaseException], done: int
) -> None:
    # Problem 4 is the first of the third round, problem 6 of the fourth: then the third must be replayed.
    unbroken, _ = start(tmp_path / "unbroken")
    with pytest.raises(error):
        start(tmp_path / "broken", FakeEnvironment(at=at, stop=stop))
    path = checkpoint.latest(tmp_path / "broken" / "checkpoints")
    assert path is not None
    assert path.name == f"step_{done}"
    environment = FakeEnvironment()
    resumed, sampler = start(tmp_path / "broken", environment)
    assert [version for version, _ in sampler.weights] == list(range(done, 5))
    assert environment.sampled[0] == 2 * done
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert logged(tmp_path / "broken") == logged(tmp_path / "unbroken")
    for step in range(4):
        name = f"rollouts/step_{step}.jsonl"
        assert (tmp_path / "broken" / name).read_text() == (tmp_path / "unbroken" / name).read_text()


def test_rollouts_depend_on_seed_and_round_only(tokenizer: Tokenizer) -> None:
    def rewards(seed: int, step: int) -> list[float | None]:
        config = CONFIG.model_copy(update={"seed": seed, "prompts": 16})
        return [one.reward for one in roll_out(FakeSampler(tokenizer), FakeEnvironment(), tokenizer, config, step)]

    assert rewards(0, 1) == rewards(0, 1)
    assert rewards(0, 1) != rewards(0, 2)
    assert rewards(0, 1) != rewards(1, 1)
