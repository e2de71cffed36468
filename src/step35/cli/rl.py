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
    """Checkpoint to start from: a folder in the released layout, a .gguf file, a training run, or hf://ORG/NAME."""
    dry_run: bool = False
    """Print the resolved settings, memory and the number of rollouts, and stop."""


DEFAULT = Args.model_validate(DemoConfig().rl.model_dump())


def main(args: Args) -> int:
    """Train to the last round."""
    from step35.cli import stages
    from step35.cli.dry_run import describe_rl, show_settings
    from step35.model.weights import read_config
    from step35.runtime.console import Console
    from step35.runtime.device import set_threads
    from step35.runtime.hub import fetched
    from step35.runtime.rundir import RunDir

    config = RLConfig.model_validate(args.model_dump(include=set(RLConfig.model_fields)))
    if args.dry_run:
        model_config = read_config(args.model)
        show_settings(args, Console())
        describe_rl(model_config, config, Console())
        return 0
    set_threads()
    run = RunDir(args.out)
    console = Console(run.path / "console.log")
    stages.reinforce_model(run, fetched(args.model), config, console)
    console.print(f"model in {run.path / 'model'}")
    return 0
