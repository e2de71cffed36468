"""The RL loop: roll out with the sampler, learn, send the weights back. On-policy, one round at a time.

The loop knows only protocols: any `Sampler` generates and any `Environment` judges.
"""

from __future__ import annotations

from pathlib import Path

from step35.api.environment import Environment
from step35.api.sampler import Sampler
from step35.api.sampling import SamplingParams
from step35.api.trajectory import Trajectory
from step35.config.rl import RLConfig
from step35.data.episode import play
from step35.data.tokenizer import Tokenizer
from step35.errors import DataError
from step35.model.step35 import Step35
from step35.post.rl.batch import TrajectoryBatch
from step35.post.rl.learner import RLLearner
from step35.runtime.console import Console
from step35.runtime.disk import write_text
from step35.runtime.rundir import RunDir
from step35.runtime.saver import Saver
from step35.runtime.seeding import derive
from step35.runtime.signals import interruptible
from step35.train.trainer import resume


def reinforce(
    actor: Step35,
    sampler: Sampler,
    environment: Environment,
    tokenizer: Tokenizer,
    config: RLConfig,
    run: RunDir,
    console: Console,
    *,
    name: str = "rl",
) -> Step35:
    """Train `actor` in place to `config.steps` rounds, resuming from the run's newest checkpoint."""
    learner = RLLearner(actor, config)
    first = resume(learner, run, console).get("step", 0)
    sampler.update_weights(actor.state_dict(), first)
    with (
        console.stage(name, config.steps, "round", done=first) as stage,
        interruptible() as interrupted,
        Saver(run, config.checkpoints, console) as saver,
    ):
        for step in range(first, config.steps):
            saver.check()
            trajectories = roll_out(sampler, environment, tokenizer, config, step)
            _save_rollouts(run.rollouts / f"step_{step}.jsonl", trajectories)
            judged = [t for t in trajectories if t.reward is not None]
            if not judged:
                raise DataError(
                    f"round {step}: the environment gave no verdict on any of {len(trajectories)} rollouts."
                )
            metrics = learner.update(TrajectoryBatch.of(judged, tokenizer.pad_id), step)
            done = step + 1
            sampler.update_weights(actor.state_dict(), done)
            summary = summarise(trajectories)
            run.metrics.log(done, **summary, **metrics)
            stopping = interrupted()
            if done % config.checkpoint_every == 0 or done == config.steps or stopping:
                saver.save(done, {"step": done, **learner.state_dict()})
            if stopping:
                saver.wait()
                interrupted.leave(run, done)
            stage.advance(1, f"reward {summary['reward']:.3f}  entropy {metrics['entropy']:.3f}")
    return actor


def roll_out(
    sampler: Sampler, environment: Environment, tokenizer: Tokenizer, config: RLConfig, step: int
) -> list[Trajectory]:
    """Play fresh problems, `responses` times each, at temperature 1 and top-p 1."""
    numbers = [step * config.prompts + i for i in range(config.prompts) for _ in range(config.responses)]
    tasks = [environment.sample(number) for number in numbers]
    seeds = [derive(config.seed, "rollout", step, i) for i in range(len(tasks))]
    params = SamplingParams(max_tokens=config.max_turn_tokens, temperature=1.0, top_p=1.0)
    return play(sampler, environment, tokenizer, tasks, params, seeds=seeds, max_turns=config.max_turns)


def summarise(trajectories: list[Trajectory]) -> dict[str, float]:
    """Return the rollouts' statistics."""
    count = len(trajectories)
    judged = [t for t in trajectories if t.reward is not None]
    return {
        "reward": sum(t.reward or 0.0 for t in judged) / max(1, len(judged)),
        "no_verdict": count - len(judged),
        "truncation_rate": sum(t.truncated for t in trajectories) / count,
        "response_tokens": sum(sum(t.mask) for t in trajectories) / count,
        "tool_errors": sum(t.info.get("tool_errors", 0) for t in trajectories) / count,
    }


def _save_rollouts(path: Path, trajectories: list[Trajectory]) -> None:
    write_text(path, "".join(t.to_json() + "\n" for t in trajectories))
