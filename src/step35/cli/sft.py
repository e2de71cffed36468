"""Fine-tune a checkpoint on conversations, loss on assistant tokens only; MTP-2 and MTP-3 join in the last part."""

from __future__ import annotations

from pathlib import Path

from step35.config.demo import DemoConfig
from step35.config.post import SFTConfig


class Args(SFTConfig):
    """Settings of the run."""

    out: Path = Path("runs/sft")
    """Run directory; the finished model lies in its model/ folder."""
    model: Path = Path("runs/train/model")
    """Checkpoint to start from: a folder in the released layout, a .gguf file, a training run, or hf://ORG/NAME."""
    conversations_file: Path | None = None
    """JSON lines {"messages": [...], "tools": [...]}, or a .json file with a list of such records or of those of the
    released SFT data ("conversations", "loss_mask"); also .gz or .zst. Learned is what the assistant says behind the
    last user message: a new query erases the thinking before it, so put the turns to learn into lines of their own.
    Without a file, calculator demonstrations are synthesised."""
    dry_run: bool = False
    """Print the resolved settings, optimisers, memory and FLOPs, and stop."""


DEFAULT = Args.model_validate(DemoConfig().sft.model_dump())


def main(args: Args) -> int:
    """Fine-tune to the last step."""
    from step35.cli import stages
    from step35.cli.dry_run import describe_training, show_settings
    from step35.model.weights import read_config
    from step35.runtime.console import Console
    from step35.runtime.device import set_threads
    from step35.runtime.hub import fetched
    from step35.runtime.rundir import RunDir

    config = SFTConfig.model_validate(args.model_dump(include=set(SFTConfig.model_fields)))
    if args.dry_run:
        model_config = read_config(args.model).with_mtp(3)
        show_settings(args, Console())
        describe_training(model_config, config, Console())
        return 0
    set_threads()
    run = RunDir(args.out)
    console = Console(run.path / "console.log")
    stages.supervise(run, fetched(args.model), config, console, args.conversations_file)
    console.print(f"model in {run.path / 'model'}")
    return 0
