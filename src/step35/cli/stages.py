"""The pipeline's stages, each a function of its settings and its run directory; the demo and the verbs share them.

A stage that is done says so in `done.json` and is not run again. Its model lies in `<stage>/model`, in the
released layout, where the next stage finds it.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from step35.agents.envs.arithmetic import ArithmeticEnvironment
from step35.agents.synth.arithmetic import demonstration
from step35.agents.tools.calculator import Calculator
from step35.api.messages import Message
from step35.config.base import Config
from step35.config.data import PrepareConfig
from step35.config.model import ModelConfig
from step35.config.post import SFTConfig
from step35.config.presets import preset
from step35.config.rl import RLConfig
from step35.config.train import TrainConfig
from step35.data import chat
from step35.data.arithmetic import problem
from step35.data.loader import Loader, PretrainLoader, validation
from step35.data.packing import Batch
from step35.data.prepare import PreparedData, prepare
from step35.data.tokenizer import Tokenizer, load_tokenizer
from step35.engine.llm import LLM
from step35.errors import ConfigError
from step35.model.init import grow_mtp, initialise
from step35.model.step35 import Step35
from step35.model.tensors import ModelTensors, Tensors
from step35.model.weights import ARCHITECTURE, load_model, released_config, save_tensors
from step35.post.rl.loop import reinforce
from step35.post.sft import Conversation, fine_tune, read_conversations, write_conversations
from step35.runtime.console import Console
from step35.runtime.device import reuse_memory
from step35.runtime.disk import fingerprint, read_record, sync_directory
from step35.runtime.lock import locked
from step35.runtime.rundir import RunDir
from step35.runtime.seeding import generator
from step35.runtime.sinks import tracking
from step35.train.step import validation_loss
from step35.train.trainer import train

DONE = "done.json"
_UNITS = {
    "collect": "character",
    "tokenise": "character",
    "arithmetic": "token",
    "tokenizer": "step",
    "baselines": "step",
}
"""What the steps of `prepare` count, where it is not documents."""


def stage(
    run: RunDir, config: Config, work: Callable[[], dict[str, Any]], console: Console, **inputs: str | Path
) -> dict[str, Any]:
    """Do `work` in `run` unless it is done; return its result with the seconds it took.

    A run made with other settings or from other `inputs` is refused with `ConfigError`, unless nothing was computed
    yet, one that another process is at with `RunLockedError`.
    """
    with locked(run.path):
        return _stage(run, config, work, console, inputs)


def _stage(
    run: RunDir, config: Config, work: Callable[[], dict[str, Any]], console: Console, inputs: Mapping[str, str | Path]
) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude={"out"})
    if run.begun:
        run.check_config(settings)
    else:
        (run.path / "inputs.json").unlink(missing_ok=True)  # of a start that failed
    check_inputs(run, inputs)
    finished = run.path / DONE
    if done := read_record(finished):
        return done
    if finished.is_file():
        console.warn(f"{finished} is damaged: the end of the stage is done again, from its newest checkpoint.")
    run.write_config(settings)
    run.write_env()
    run.events.event("started")
    reuse_memory()
    started = time.monotonic()
    with tracking(run, settings.get("track", ()), settings, console.warn):
        result = {**work(), "seconds": round(time.monotonic() - started, 1)}
    run.write_json(DONE, result)
    run.events.event("finished", seconds=result["seconds"])
    return result


def check_inputs(run: RunDir, inputs: Mapping[str, str | Path]) -> None:
    """Record what a stage starts from in `inputs.json`; raise `ConfigError` when the run started from something else.

    Paths are kept relative to the run, so that a run may be moved with what it was made from. What they held is
    kept too: new weights or data at the same place are another input.
    """
    found = {k: os.path.relpath(v, run.path) if isinstance(v, Path) else v for k, v in inputs.items()}
    found |= {f"content of {k}": fingerprint(v) for k, v in inputs.items() if isinstance(v, Path)}
    file = run.path / "inputs.json"
    former = read_record(file) if file.is_file() else found
    if found and not former:
        raise ConfigError(
            f"{file} is damaged, so nobody can tell what {run.path} was started from; delete that file if it was "
            f"{', '.join(f'{k}={v}' for k, v in inputs.items())}, or use another --out."
        )
    for name, value in found.items():
        if former.get(name) != value:
            raise ConfigError(
                f"{run.path} was started with {name}={former.get(name)!r}, not {value!r}; "
                "use the old one to resume it, another --out for a run of its own, or delete the folder."
            )
    if not file.is_file():
        run.write_json("inputs.json", found)


def prepare_data(out: Path, config: PrepareConfig, console: Console, *, context: int) -> PreparedData:
    """Build tokenizer, shards and baselines in `out`, with one progress bar a step."""
    with ExitStack() as bars:
        label, before, shown = "", 0.0, None

        def progress(step: str, done: float, total: float, figure: str) -> None:
            nonlocal label, before, shown
            if step != label or shown is None:
                bars.close()
                shown = bars.enter_context(
                    console.stage(f"prepare: {step}", int(total) or None, _UNITS.get(step, "document"))
                )
                label, before = step, 0.0
            shown.advance(int(done) - int(before), figure)
            before = done

        data = prepare(out, config, progress, context=context, tokenizer_texts=_chat_samples(config.seed))
    found = data.record["sources"]
    if found["skipped"]:
        console.warn(
            f"files left out: {found['files_left_out']:,}, lines that cannot be used: {found['bad_lines']:,}, "
            f"such as {found['skipped'][0]}; see {out / 'prepare.json'}"
        )
    return data


def _chat_samples(seed: int) -> list[str]:
    """Return rendered demonstrations, so that the chat format's words become tokens."""
    calculator = Calculator()
    problems = [problem(i, split="train", seed=seed) for i in range(300)]
    return [chat.render(demonstration(p, calculator, index=i), [calculator.schema]) for i, p in enumerate(problems)]


def pretrain(run: RunDir, model_name: str, data: PreparedData, config: TrainConfig, console: Console) -> dict[str, Any]:
    """Train preset `model_name` from scratch on prepared data."""

    def work() -> dict[str, Any]:
        architecture = preset(model_name).model_copy(update={"vocab_size": data.tokenizer.vocab_size})
        model = Step35(architecture)
        initialise(model, generator(config.seed, "init"))
        loader = PretrainLoader(data.train, config.context, config.seed)
        held_back = validation(data.val, config.context, max_rows=data.val.total_tokens)
        return fit(model, loader, held_back, data.tokenizer, config, run, console, name="train")

    return stage(run, config, work, console, preset=model_name, data=data.folder)


def fit(
    model: Step35,
    loader: Loader,
    held_back: Batch,
    tokenizer: Tokenizer,
    config: TrainConfig,
    run: RunDir,
    console: Console,
    *,
    name: str,
    validation_pass: int = 16,
    start: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train `model` with validation on `held_back`, publish it in the run, return loss, steps, tokens and rows.

    `validation_pass` are the rows of one forward pass; `start` is an earlier stage's final state.
    """
    losses: list[float] = []

    def validate() -> float:
        losses.append(validation_loss(model, held_back, rows=validation_pass))
        return losses[-1]

    write_architecture(run, model.config, tokenizer)
    end = train(model, loader, config, run, console, name=name, validate=validate, start=start)
    publish(model, tokenizer, run.path / "model")
    return {
        "val_loss": losses[-1] if losses else validate(),
        "steps": config.steps,
        "tokens": config.tokens_until(config.steps),
        "rows": end.row,  # rows taken from the loader, those of skipped batches and undone updates included
    }


def supervise(
    run: RunDir, source: Path, config: SFTConfig, console: Console, conversations: Path | None = None
) -> dict[str, Any]:
    """Fine-tune the model in `source` on `conversations`, or on synthesised calculator demonstrations."""

    def work() -> dict[str, Any]:
        tokenizer = load_tokenizer(source)
        model = grow_mtp(load_model(source), 3)
        file = conversations or run.path / "conversations.jsonl"
        if conversations is None and not file.is_file():
            write_conversations(file, synthesise(config, console))
        samples = read_conversations(file, console.warn)
        write_architecture(run, model.config, tokenizer)
        fine_tune(model, samples, tokenizer, config, run, console)
        publish(model, tokenizer, run.path / "model")
        return {"conversations": len(samples), "steps": config.steps}

    return stage(run, config, work, console, model=source, conversations=conversations or "synthesised")


def synthesise(config: SFTConfig, console: Console) -> list[Conversation]:
    """Make demonstrations on training problems; every tool call is executed."""
    calculator = Calculator()

    def solve(number: int) -> list[Message]:
        drawn = problem(number, split="train", seed=config.seed, phrasings=config.phrasings)
        return demonstration(drawn, calculator, index=number, mistakes=config.mistakes)

    made = []
    with console.stage("sft: synthesise", config.conversations, "conversation") as shown:
        for i in range(config.conversations):
            follows = random.Random(f"follow-up/{config.seed}/{i}").random() < config.follow_ups
            earlier = solve(config.conversations + i) if follows else []
            made.append(Conversation([*earlier, *solve(i)], [calculator.schema]))
            shown.advance()
    return made


def environment(split: str, seed: int) -> ArithmeticEnvironment:
    """Return the calculator task on "train" or "held_out" problems."""
    # RL draws from another stream of training problems than the demonstrations did.
    return ArithmeticEnvironment("held_out" if split == "held_out" else "train", seed + 1, Calculator())


def reinforce_model(run: RunDir, source: Path, config: RLConfig, console: Console) -> dict[str, Any]:
    """Improve the model in `source` by MIS-PO on fresh problems."""

    def work() -> dict[str, Any]:
        tokenizer = load_tokenizer(source)
        actor = load_model(source)
        write_architecture(run, actor.config, tokenizer)
        rollouts = LLM(model=load_model(source), tokenizer=tokenizer, max_batch=config.prompts * config.responses)
        reinforce(actor, rollouts, environment("train", config.seed), tokenizer, config, run, console)
        publish(actor, tokenizer, run.path / "model")
        return {"rounds": config.steps}

    return stage(run, config, work, console, model=source)


def write_architecture(run: RunDir, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Write config and tokenizer into the run, so that `convert` can export any of its checkpoints."""
    folder = RunDir(run.path / ARCHITECTURE)
    folder.write_json("config.json", released_config(config, "float32"))
    tokenizer.save(folder.path)


def publish(model: Step35, tokenizer: Tokenizer, folder: Path, *, dtype: str = "float32") -> None:
    """Write model, tokenizer, chat template and generation config to `folder`, whole or not at all."""
    publish_tensors(ModelTensors(model), model.config, tokenizer, folder, dtype=dtype)


def publish_tensors(source: Tensors, config: ModelConfig, tokenizer: Tokenizer, folder: Path, *, dtype: str) -> None:
    """Write a whole checkpoint folder from `source`, whole or not at all; `dtype` is one of `save_tensors`."""
    folder = folder.resolve()
    draft, former = _beside(folder)
    shutil.rmtree(draft, ignore_errors=True)
    save_tensors(source, config, draft, dtype=dtype)
    tokenizer.save(draft)
    write_generation_config(config, draft)
    if folder.exists():
        shutil.rmtree(former, ignore_errors=True)
        folder.rename(former)
    draft.rename(folder)
    sync_directory(folder.parent)  # what is in it was flushed as it was written
    shutil.rmtree(former, ignore_errors=True)


def check_beside(folder: Path) -> None:
    """Raise `ConfigError` when something lies where `publish_tensors` works, since it would be deleted.

    Not for a run's own folder, where only a killed publication leaves anything.
    """
    for path in _beside(folder.resolve()):
        if path.exists():
            raise ConfigError(f"'{path}' is in the way: writing needs that name; move it, or choose another out.")


def _beside(folder: Path) -> tuple[Path, Path]:
    """Return where the new content of `folder` is made, and where its old content waits to be deleted."""
    return folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.former")


def write_generation_config(config: ModelConfig, folder: Path) -> None:
    """Write `generation_config.json`: end tokens, and the report's decoding (temperature 1, top-p 1)."""
    content = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_id),
        "pad_token_id": config.pad_token_id,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    RunDir(folder).write_json("generation_config.json", content)
