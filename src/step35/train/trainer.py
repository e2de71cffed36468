"""The training loop: resume, update, log, validate, checkpoint. Pre-training and SFT are the same loop.

Everything random is a function of (seed, step), so a run resumed from a checkpoint continues bit for bit.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from step35.config.train import TrainConfig
from step35.data.loader import Loader
from step35.model.step35 import Step35
from step35.runtime import checkpoint
from step35.runtime.console import Console
from step35.runtime.rundir import RunDir
from step35.train.step import Learner


def train(
    model: Step35,
    loader: Loader,
    config: TrainConfig,
    run: RunDir,
    console: Console,
    *,
    name: str,
    validate: Callable[[], float] | None = None,
    start: dict[str, Any] | None = None,
) -> Step35:
    """Train `model` in place to `config.steps`, resuming from the run's newest checkpoint.

    Without one it starts from `start`, the final state of an earlier stage, or from the model as it is. Ctrl-C saves
    the state before `KeyboardInterrupt` goes on its way.
    """
    learner = Learner(model, config)
    restored = resume(learner, run, console)
    if start and not restored:
        learner.load_state_dict(start)
    first, row = restored.get("step", 0), restored.get("row", 0)
    with console.stage(name, config.steps, "step", done=first) as stage, interruptible() as interrupted:
        for step in range(first, config.steps):
            started = time.perf_counter()
            rows = config.rows_at(step)
            metrics = learner.update(loader.rows(row, rows), step)
            done, row = step + 1, row + rows
            rate = rows * config.context / (time.perf_counter() - started)
            if validate and (done % config.validate_every == 0 or done == config.steps):
                metrics["val_loss"] = validate()
            if done % config.monitor_every == 0 or done == config.steps:
                metrics.update(learner.panels())
            run.metrics.log(done, tokens=config.tokens_until(done), tokens_per_s=rate, **metrics)
            if done % config.checkpoint_every == 0 or done == config.steps or interrupted():
                checkpoint.save(run.checkpoints, done, {"step": done, "row": row, **learner.state_dict()})
            if interrupted():
                run.events.event("interrupted", step=done)
                raise KeyboardInterrupt
            stage.advance(1, f"loss {metrics['loss']:.3f}  {rate:,.0f} tokens/s")
    return model


def resume(learner: Any, run: RunDir, console: Console) -> dict[str, Any]:
    """Load the newest readable checkpoint into `learner`; return its state, empty when the run starts anew."""
    restored = checkpoint.latest_state(run.checkpoints)
    if restored:
        for reason in restored.skipped:
            console.warn(reason)
            run.events.event("checkpoint_skipped", reason=reason)
        learner.load_state_dict(restored.state)
        run.events.event("resumed", step=restored.state["step"])
    state = restored.state if restored else {}
    run.metrics.truncate_after(state.get("step", 0))
    return state


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C until the step is done; the yielded function says whether it came.

    A second Ctrl-C interrupts at once. Outside the main thread signals cannot be handled and stay as they are.
    """
    came = False

    def hold(signum: int, frame: Any) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = signal.signal(signal.SIGINT, hold)
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)
