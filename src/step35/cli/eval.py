"""Measure a checkpoint on held-out calculator problems: pass@1 with 95% intervals, MTP acceptance, decode speed."""

from __future__ import annotations

from pathlib import Path

import tyro

from step35.cli.shipped import SHIPPED
from step35.config.post import EvalConfig


class Args(EvalConfig):
    """What to measure."""

    path: tyro.conf.Positional[Path] = SHIPPED
    """Checkpoint folder in the released layout, .gguf file, training run (its newest checkpoint), or hf://ORG/NAME
    on the hub."""
    out: Path = Path("runs/eval")
    """Run directory; results are in its eval.json."""
    dry_run: bool = False
    """Print the resolved settings, and stop."""


def main(args: Args) -> int:
    """Measure and print a table. Raises `RunLockedError` when another process is writing the run directory."""
    from step35.cli.dry_run import show_settings
    from step35.cli.evaluation import evaluate
    from step35.runtime.console import Console
    from step35.runtime.device import set_threads
    from step35.runtime.lock import locked
    from step35.runtime.rundir import RunDir

    if args.dry_run:
        show_settings(args, Console())
        return 0
    set_threads()
    run = RunDir(args.out)
    console = Console(run.path / "console.log")
    config = EvalConfig.model_validate(args.model_dump(include=set(EvalConfig.model_fields)))
    name = str(args.path.resolve())
    with locked(run.path):
        run.write_env()
        found = evaluate(run, {name: args.path}, config, console)
    rows = [
        (f"pass@1, {r['mode']}", f"{r['accuracy']:.1%}", f"{r['low']:.1%} to {r['high']:.1%}")
        for r in found["accuracy"]
        if r["model"] == name
    ]
    rows.append(("MTP acceptance by depth", ", ".join(f"{rate:.2f}" for rate in found["accept_by_depth"][name]), ""))
    speed = found["speed"]
    rows.append(("decode tokens/s, plain", f"{speed['plain_tokens_per_s']:.0f}", ""))
    rows.append(
        ("decode tokens/s, speculative", f"{speed['speculative_tokens_per_s']:.0f}", f"{speed['speedup']:.2f}x")
    )
    console.table(str(args.path), ["figure", "value", "95% interval or ratio"], rows)
    return 0
