"""Pre-train a model preset on prepared data: Muon, loss-free balancing, MTP-1. Run again to continue."""

from __future__ import annotations

from pathlib import Path

from step35.config.demo import DemoConfig
from step35.config.train import TrainConfig


class Args(TrainConfig):
    """Settings of the run."""

    out: Path = Path("runs/train")
    """Run directory; the finished model lies in its model/ folder."""
    data: Path = Path("runs/data")
    """Folder made by `step35 prepare`."""
    preset: str = "tiny"
    """Model preset: tiny, mini, 30b-a3b, 100b-a10b, flash, or scale-N with N trunk layers."""
    dry_run: bool = False
    """Print the resolved settings, optimisers, memory and FLOPs, and stop."""


DEFAULT = Args.model_validate(DemoConfig().train.model_dump())


def main(args: Args) -> int:
    """Train to the last step."""
    from step35.cli import stages
    from step35.cli.dry_run import describe_training, show_settings
    from step35.config.presets import preset
    from step35.data.prepare import PreparedData
    from step35.runtime.console import Console
    from step35.runtime.device import set_threads
    from step35.runtime.rundir import RunDir

    config = TrainConfig.model_validate(args.model_dump(include=set(TrainConfig.model_fields)))
    if args.dry_run:
        model_config = preset(args.preset)
        if (args.data / "prepare.json").is_file():
            vocabulary = PreparedData.load(args.data).tokenizer.vocab_size
            model_config = model_config.model_copy(update={"vocab_size": vocabulary})
        show_settings(args, Console())
        describe_training(model_config, config, Console())
        return 0
    set_threads()
    run = RunDir(args.out)
    console = Console(run.path / "console.log")
    result = stages.pretrain(run, args.preset, PreparedData.load(args.data), config, console)
    console.print(f"validation loss {result['val_loss']:.3f}; model in {run.path / 'model'}")
    return 0
