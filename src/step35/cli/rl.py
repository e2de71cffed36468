"""Reinforcement learning with MIS-PO on the calculator task: real rollouts, executed tools, verified rewards."""

from __future__ import annotations

from pathlib import Path

from step35.config.demo import DemoConfig
from step35.config.rl import RLConfig


class Args(RLConfig):
    """Settings of the run."""

    out: Path = Path("runs/rl")
    """Run directory; the finished model lies in its model/ folder."""
    model: Path = Path("runs/sft/model")
    """Checkpoint to start from, in the released layout."""


DEFAULT = Args.model_validate(DemoConfig().rl.model_dump())


def main(args: Args) -> int:
    """Train to the last round."""
    from step35.cli import stages
    from step35.runtime.console import Console
    from step35.runtime.device import set_threads
    from step35.runtime.rundir import RunDir

    set_threads()
    run = RunDir(args.out)
    console = Console(run.path / "console.log")
    config = RLConfig.model_validate(args.model_dump(exclude={"out", "model"}))
    stages.reinforce_model(run, args.model, config, console)
    console.print(f"model in {run.path / 'model'}")
    return 0
