"""Train, post-train and talk to a Step 3.5 model on this machine: prepare, train, sft, rl, eval, export, report.

Run it again after an interruption: it continues where it stopped. Everything it measures is in the run directory.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from step35.cli import charts, evaluation, stages
from step35.cli.dry_run import describe_rl, describe_training, show_settings
from step35.cli.report import build_report
from step35.config.demo import DemoConfig
from step35.config.presets import preset
from step35.data.tokenizer import load_tokenizer
from step35.errors import ConfigError, DiskFullError
from step35.model.weights import load_model
from step35.runtime.console import Console
from step35.runtime.device import set_threads
from step35.runtime.disk import free_bytes
from step35.runtime.lock import locked
from step35.runtime.rundir import RunDir

NEEDED_BYTES = 600_000_000


class Args(DemoConfig):
    """Settings of the demo."""

    fresh: bool = False
    """Delete the run directory first."""
    dry_run: bool = False
    """Print the resolved settings, and what pre-training and RL cost, and stop."""


DEFAULT = Args()


def main(args: Args) -> int:
    """Run every stage that is not done yet."""
    charts.require()
    model_config = preset(args.preset)
    config = args.seeded()
    if args.dry_run:
        model_config = model_config.model_copy(update={"vocab_size": config.prepare.vocab_size})
        show_settings(config, Console())
        describe_training(model_config, config.train, Console())
        describe_rl(model_config.with_mtp(3), config.rl, Console())
        return 0
    if args.fresh:
        remove_run(args.out)
    run = RunDir(args.out)
    with locked(run.path):
        return demonstrate(run, config)


def demonstrate(run: RunDir, config: DemoConfig) -> int:
    """Run the demo in `run`, which no one else writes to meanwhile."""
    settings = config.model_dump(mode="json", exclude={"out", "fresh", "dry_run"})
    run.check_config(settings)
    if not (run.path / "summary.json").is_file():  # a finished run stays as it was
        run.write_config(settings)
        run.write_env()
    check_space(run.path)
    set_threads()
    console = Console(run.path / "console.log")
    console.print(f"step35 demo in {run.path}, seed {config.seed}")
    summary = pipeline(run, config, console)
    show(run, summary, console)
    return 0


def pipeline(run: RunDir, config: DemoConfig, console: Console) -> dict[str, Any]:
    """Run the stages in turn and return the summary."""
    clock = Clock(run)
    with clock:
        data = stages.prepare_data(run.path / "data", config.prepare, console, context=config.train.context)
    with clock:
        trained = stages.pretrain(RunDir(run.path / "train"), config.preset, data, config.train, console)
    with clock:
        stages.supervise(RunDir(run.path / "sft"), run.path / "train" / "model", config.sft, console)
    with clock:
        stages.reinforce_model(RunDir(run.path / "rl"), run.path / "sft" / "model", config.rl, console)
    with clock:
        models = {name: run.path / name / "model" for name in ("sft", "rl")}
        found = evaluation.evaluate(run, models, config.eval, console)
    with clock:
        difference = export(run.path / "rl" / "model", run.path / "export", console)
    summary = {
        "val_loss": trained["val_loss"],
        "unigram_loss": data.unigram_loss,
        "bigram_loss": data.bigram_loss,
        "acc_sft": evaluation.greedy(found, "sft"),
        "acc_rl": evaluation.greedy(found, "rl"),
        "spec_equal": found["speed"]["equal"],
        "spec_speedup": found["speed"]["speedup"],
        "accept_by_depth": found["accept_by_depth"]["rl"],
        "export_difference": difference,
        "seconds": clock.seconds(),
        "stage_seconds": {name: stage_seconds(run.path / name) for name in ("train", "sft", "rl")},
        "seed": config.seed,
    }
    run.write_json("summary.json", summary)
    with clock:
        build_report(run.path)
    return summary


def export(source: Path, out: Path, console: Console) -> float:
    """Write the bf16 checkpoint and check it: reload it and compare its logits with the trained model's.

    Returns the largest difference of a log-probability on a fixed text; bf16 rounding is all it may hold.
    """
    import torch

    trained, tokenizer = load_model(source), load_tokenizer(source)
    if not (out / "config.json").is_file():
        stages.publish(trained, tokenizer, out, dtype="bfloat16")
    exported = load_model(out)
    ids = torch.tensor(
        [[tokenizer.bos_id, *load_tokenizer(out).encode("def add(a, b):\n    return a + b\n12 + 34 = 46")]]
    )
    with torch.inference_mode():
        logprobs = [model(ids).logits.log_softmax(-1) for model in (trained, exported)]
    rounded = all(
        torch.equal(a.to(torch.bfloat16), b.to(torch.bfloat16))
        for a, b in zip(trained.state_dict().values(), exported.state_dict().values(), strict=True)
    )
    if not rounded:
        raise RuntimeError(f"{out}: a reloaded tensor differs from the trained one by more than bf16 rounding")
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    console.print(f"export: {out} ({size:.1f} MB, bf16), reloaded and equal to the trained model in bf16")
    return float((logprobs[0] - logprobs[1]).abs().max())


class Clock:
    """Adds up the seconds of the stages over all sessions in `clock.json`.

    A stage that is interrupted counts too, except when the process was killed outright.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.started = 0.0

    def seconds(self) -> float:
        """Return the seconds so far."""
        file = self.run.path / "clock.json"
        return float(json.loads(file.read_text(encoding="utf-8"))["seconds"]) if file.is_file() else 0.0

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *error: object) -> None:
        if (self.run.path / "summary.json").is_file():
            return  # finished before: looking at the results again costs nothing
        total = self.seconds() + time.monotonic() - self.started
        self.run.write_json("clock.json", {"seconds": round(total, 1)})


def stage_seconds(folder: Path) -> float:
    """Return the seconds of a finished stage's last session."""
    return float(json.loads((folder / stages.DONE).read_text(encoding="utf-8"))["seconds"])


def remove_run(path: Path) -> None:
    """Delete a run directory; raise `ConfigError` for a folder that is not one, whatever it is."""
    if not path.exists():
        return
    if not ((path / "config.json").is_file() and (path / "env.json").is_file()):
        raise ConfigError(f"--fresh would delete {path}, which is not a run directory; choose another --out.")
    with locked(path):
        shutil.rmtree(path)


def check_space(path: Path) -> None:
    """Raise `DiskFullError` when the disk cannot hold the run."""
    free = free_bytes(path)
    if free < NEEDED_BYTES and not (path / "summary.json").is_file():
        raise DiskFullError(
            f"{path} has {free / 1e6:.0f} MB free, and the demo needs about {NEEDED_BYTES / 1e6:.0f} MB; "
            "free some space or choose another --out."
        )


def show(run: RunDir, summary: dict[str, Any], console: Console) -> None:
    """Print the closing table and what to try next."""
    accept = ", ".join(f"{rate:.2f}" for rate in summary["accept_by_depth"])
    rows = [
        ("validation loss (nats per token)", f"{summary['val_loss']:.3f}"),
        ("  bigram / unigram baseline", f"{summary['bigram_loss']:.3f} / {summary['unigram_loss']:.3f}"),
        ("held-out accuracy after SFT", f"{summary['acc_sft']:.1%}"),
        ("held-out accuracy after RL (MIS-PO)", f"{summary['acc_rl']:.1%}"),
        ("MTP acceptance by depth", accept),
        ("speculative = plain greedy", "yes" if summary["spec_equal"] else "NO"),
        ("speculative speed-up at batch 1", f"{summary['spec_speedup']:.2f}x"),
        ("seconds", f"{summary['seconds']:.0f}"),
    ]
    console.table("step35 demo", ["figure", "value"], rows)
    console.print(f"report: {run.path / 'report.html'}")
    console.print("next:")
    program = "step35" if shutil.which("step35") else os.path.relpath(sys.argv[0])
    for command in (
        f"{program} chat {run.path / 'export'}",
        f'{program} generate {run.path / "train" / "model"} --prompt "def fibonacci(n):"',
        f"{program} runs plot {run.path / 'rl'} --terminal",
        f"{program} demo --out runs/other --seed 1 --rl.steps 40",
    ):
        console.print(f"  {command}")
