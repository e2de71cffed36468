"""The training loop: resume, update, log, validate, checkpoint. Pre-training and SFT are the same loop.

Everything random is a function of (seed, step), so a run resumed from a checkpoint continues bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from step35.config.train import TrainConfig
from step35.data.loader import Loader
from step35.model.step35 import Step35
from step35.runtime import checkpoint
from step35.runtime.console import Console
from step35.runtime.rundir import RunDir
from step35.runtime.saver import Saver
from step35.runtime.signals import interruptible
from step35.train.guard import Guard, Position, discard_damaged
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
) -> Position:
    """Train `model` in place to `config.steps`, resuming from the run's newest checkpoint; return where it ended.

    Without one it starts from `start`, the final state of an earlier stage, or from the model as it is. Ctrl-C
    and SIGTERM save the state before `KeyboardInterrupt` or `Terminated` goes on its way.
    """
    learner = Learner(model, config)
    restored = resume(learner, run, console)
    if start and not restored:
        # Not its running means: another stage's loss is another level, and no spike.
        learner.load_state_dict({key: value for key, value in start.items() if key != "monitor"})
    at = Position.of(restored)
    with (
        console.stage(name, config.steps, "step", done=at.step) as stage,
        interruptible() as interrupted,
        Saver(run, config.checkpoints, console) as saver,
    ):
        guard = Guard(learner, at, config, run, console, saver)
        if config.stability.rolls_back and not restored:
            guard.save()  # something to go back to before the first checkpoint is due
        while at.step < config.steps:
            saver.check()
            started, rows = time.perf_counter(), config.rows_at(at.step)
            metrics = guard.advance(loader)
            done, last, figures = at.step, at.step == config.steps, ""
            if metrics is not None:
                rate = rows * config.context / (time.perf_counter() - started)
                if validate and (done % config.validate_every == 0 or last):
                    metrics["val_loss"] = validate()
                if done % config.monitor_every == 0 or last:
                    metrics.update(learner.details())
                run.metrics.log(done, tokens=config.tokens_until(done), tokens_per_s=rate, **metrics)
                figures = f"loss {metrics['loss']:.3f}  {rate:,.0f} tokens/s"
            stopping = interrupted()  # asked once: a signal between two looks would leave without saving
            if stopping or (metrics is not None and (done % config.checkpoint_every == 0 or last)):
                guard.save()
            if stopping:
                saver.wait()
                interrupted.leave(run, done)
            stage.advance(done - stage.done, figures)
    return at


def resume(learner: Any, run: RunDir, console: Console) -> dict[str, Any]:
    """Load the newest readable checkpoint into `learner`; return its state, empty when the run starts anew.

    Damaged ones that are newer are discarded, so that nothing else takes them for the newest.
    """
    restored = checkpoint.latest_state(run.checkpoints)
    if restored:
        discard_damaged(restored, run, console)
        learner.load_state_dict(restored.state)
        run.events.event("resumed", step=restored.state["step"])
    state = restored.state if restored else {}
    run.metrics.truncate_after(state.get("step", 0))
    return state
