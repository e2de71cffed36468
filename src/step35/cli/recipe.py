"""The stages of a recipe, run in turn: each starts from the weights, moments and data position of the one before.

A stage's folder is a run directory; its `model/` is the checkpoint in the released layout, `account.json` says what it
read. After a stage with a probe, the needle probe is put to the model before it and after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from step35.cli import stages
from step35.cli.report import build_report
from step35.config.model import ModelConfig
from step35.config.post import SFTConfig
from step35.config.presets import preset
from step35.config.recipe import RecipeConfig, StageConfig, with_theta
from step35.config.train import TrainConfig
from step35.data.loader import PackedLoader, validation
from step35.data.packing import Batch
from step35.data.prefetch import Prefetch
from step35.data.prepare import PreparedData
from step35.data.sampler import MixtureLoader
from step35.engine.llm import LLM
from step35.errors import CheckpointError, ConfigError
from step35.evals.needle import find_needles
from step35.evals.speed import acceptance
from step35.model.init import initialise
from step35.model.step35 import Step35
from step35.post.sft import packed_rows, read_conversations
from step35.runtime import checkpoint
from step35.runtime.console import Console
from step35.runtime.device import pick_device
from step35.runtime.lock import locked
from step35.runtime.rundir import RunDir
from step35.runtime.seeding import generator
from step35.train.step import check_fit

CALCULATOR = "calculator"
"""Conversations of this name are synthesised: calculator demonstrations with executed calls."""
WINDOW_ROWS = 256
"""Most rows of a window of the mixture: shares are exact by window."""
MANY_EPOCHS = 4
"""Reading data more often adds little (Muennighoff et al. 2023, arXiv:2305.16264)."""
VALIDATION_PASS_TOKENS = 4096
ACCEPTANCE_PROMPTS = 24
ACCEPTANCE_TOKENS = 48


def run_recipe(run: RunDir, recipe: RecipeConfig, console: Console) -> None:
    """Run every stage of `recipe` that is not done yet, then write the report page."""
    check_recipe(recipe)
    check_files(recipe)
    with locked(run.path):
        _run_recipe(run, recipe, console)


def _run_recipe(run: RunDir, recipe: RecipeConfig, console: Console) -> None:
    settings = recipe.model_dump(mode="json")
    run.check_config(settings)
    run.write_config(settings)
    run.write_env()
    first = recipe.training(recipe.stages[0])
    data = stages.prepare_data(run.path / "data", recipe.prepare, console, context=first.context)
    for stage in recipe.stages:
        validation_rows(data, recipe.training(stage))  # too few for the last stage is to be said before the first
    former: RunDir | None = None
    rows = []
    read: dict[str, int] = {}
    for number, stage in enumerate(recipe.stages, start=1):
        folder = RunDir(run.path / f"{number}-{stage.name}")
        result = run_stage(folder, recipe, stage, data, former, read, console)
        read[stage.name] = result["rows"]
        rows.append((stage.name, *_figures(result)))
        former = folder
    columns = ["stage", "validation loss", "needles before", "needles after", "acceptance before", "acceptance after"]
    console.table("curriculum", columns, rows)
    console.print(f"report: {build_report(run.path)}")


def run_stage(
    run: RunDir,
    recipe: RecipeConfig,
    stage: StageConfig,
    data: PreparedData,
    former: RunDir | None,
    read: Mapping[str, int],
    console: Console,
) -> dict[str, Any]:
    """Train one stage in `run`, or return its result when it is done; `read` are the rows earlier stages took."""
    config = recipe.training(stage)

    def work() -> dict[str, Any]:
        shape = architecture(recipe, stage, data.tokenizer.vocab_size)
        model = Step35(shape)
        initialise(model, generator(recipe.seed, "init"))
        begun = checkpoint.latest(run.checkpoints) is not None
        start = None if begun or former is None else _final_state(former, recipe, before=stage)
        loader, held_back = _loader(recipe, stage, config, data, read, console), validation_rows(data, config)
        packing = _packing(loader)
        console.print(f"{stage.name}: packing: " + ", ".join(f"{name} {value:.2%}" for name, value in packing.items()))
        found = stages.fit(
            model.to(pick_device("auto")), Prefetch(loader), held_back, data.tokenizer, config, run, console,
            name=stage.name, validation_pass=max(1, VALIDATION_PASS_TOKENS // config.context), start=start,
        )  # fmt: skip
        if isinstance(loader, MixtureLoader):
            account = loader.account(found["rows"])
            run.write_json("account.json", {name: asdict(read) for name, read in account.items()})
        return found | {"packing": packing} | _compare(recipe, stage, config, former, run, data, console)

    own = stage.model_dump_json(exclude={"train"})  # the trainer's knobs are settings of the run
    inputs: dict[str, str | Path] = {"recipe": own, "data": data.folder}
    if former:
        inputs["former"] = former.path / "model"
    return stages.stage(run, config, work, console, **inputs)


def architecture(recipe: RecipeConfig, stage: StageConfig, vocab_size: int) -> ModelConfig:
    """Return the model of `stage`: the preset with the recipe's MTP modules and the angles reached by then."""
    # A preset may be a finished model whose positions are stretched by rope_scaling; training stretches nothing.
    shape = preset(recipe.preset).model_copy(update={"vocab_size": vocab_size, "rope_scaling": None})
    if recipe.mtp is not None:
        shape = shape.with_mtp(recipe.mtp)
    for earlier in recipe.stages[: recipe.stages.index(stage) + 1]:
        shape = with_theta(shape, earlier.theta_full, earlier.theta_sliding)
    return shape


def _final_state(former: RunDir, recipe: RecipeConfig, *, before: StageConfig) -> dict[str, Any]:
    """Return the final state of the stage before `before`, which ran in `former`. Raises `CheckpointError`."""
    restored = checkpoint.latest_state(former.checkpoints)
    last = recipe.training(recipe.stages[recipe.stages.index(before) - 1]).steps
    if restored is None or restored.skipped or restored.state["step"] != last:
        reason = " ".join(restored.skipped.values()) + " " if restored else ""
        raise CheckpointError(
            f"{former.checkpoints} has no whole checkpoint of the stage's last step, {last}, to go on from. {reason}"
            f"Put it back, or delete {former.path} to train that stage again."
        )
    return restored.state


def _loader(
    recipe: RecipeConfig,
    stage: StageConfig,
    config: TrainConfig,
    data: PreparedData,
    read: Mapping[str, int],
    console: Console,
) -> MixtureLoader | PackedLoader:
    if stage.conversations:
        return _conversations(recipe, stage, config, data, console)
    loader = mixture(recipe, stage, data, read)
    for name, part in loader.account(config.rows_until(config.steps)).items():
        if part.epochs > MANY_EPOCHS:
            console.warn(f"{stage.name}: source {name!r} is read {part.epochs:.1f} times over; prepare more of it")
    return loader


def mixture(
    recipe: RecipeConfig, stage: StageConfig, data: PreparedData, read: Mapping[str, int] | None = None
) -> MixtureLoader:
    """Return the stage's mixture; each source goes on where the stages before have left it.

    `read` has the rows that each of them took, skipped and undone ones included; without it, those of its plan.
    """
    start: dict[str, int] = {}
    for earlier in recipe.stages[: recipe.stages.index(stage)]:
        if earlier.mixture:
            config = recipe.training(earlier)
            rows = (read or {}).get(earlier.name, config.rows_until(config.steps))
            start |= _mixture(recipe, earlier, data, start).behind(rows)
    return _mixture(recipe, stage, data, start)


def _mixture(recipe: RecipeConfig, stage: StageConfig, data: PreparedData, start: dict[str, int]) -> MixtureLoader:
    weights, config = recipe.weights(stage), recipe.training(stage)
    rows = config.rows_until(config.steps)
    masked: int | None = None
    if stage.mask_meta_from_tokens is not None:
        masked = max(0, stage.mask_meta_from_tokens - recipe.tokens_before(stage)) // config.context
    return MixtureLoader(
        {name: data.sources[name] for name in weights},
        weights,
        context=config.context,
        seed=recipe.seed,
        start=start,
        window_rows=math.ceil(rows / math.ceil(rows / WINDOW_ROWS)),  # whole windows: the rest of one is read by none
        mask_meta_from=masked,
    )


def check_recipe(recipe: RecipeConfig) -> None:
    """Raise `ConfigError` for what would stop a later stage: settings that do not fit the model, unknown sources."""
    prepared = {source.name for source in recipe.prepare.sources} or {"corpus"}
    for stage in recipe.stages:
        config = recipe.training(stage)
        check_fit(architecture(recipe, stage, recipe.prepare.vocab_size), config)
        if config.mtp_joint_from is not None and config.mtp_joint_from >= config.steps:
            raise ConfigError(
                f"stage {stage.name!r}: mtp_joint_from={config.mtp_joint_from} never comes: the stage has "
                f"{config.steps} steps, 0 to {config.steps - 1}."
            )
        missing = sorted(recipe.weights(stage).keys() - prepared) if stage.mixture else []
        if missing:
            raise ConfigError(
                f"stage {stage.name!r}: no source is called {missing}; prepare.sources has {sorted(prepared)}."
            )


def check_files(recipe: RecipeConfig) -> None:
    """Raise `ConfigError` for a file of conversations that is not there."""
    for stage in recipe.stages:
        if stage.conversations not in (None, CALCULATOR) and not Path(str(stage.conversations)).is_file():
            raise ConfigError(
                f"stage {stage.name!r}: conversations={stage.conversations!r} is no file; give JSON lines of "
                f'conversations, or "{CALCULATOR}" for synthesised ones.'
            )


def _packing(loader: MixtureLoader | PackedLoader) -> dict[str, float]:
    """Return the share of the rows that is no padding, and of a mixture's fitting documents those that were cut."""
    return (
        {"filled": loader.filled} if isinstance(loader, PackedLoader) else {"filled": 1.0, "cut": loader.packing().cut}
    )


def _conversations(
    recipe: RecipeConfig, stage: StageConfig, config: TrainConfig, data: PreparedData, console: Console
) -> PackedLoader:
    if stage.conversations == CALCULATOR:
        samples = stages.synthesise(SFTConfig(conversations=stage.tokens // 100, seed=recipe.seed), console)
    else:
        samples = read_conversations(Path(str(stage.conversations)), console.warn)
    return PackedLoader(packed_rows(samples, data.tokenizer, config.context, console), recipe.seed)


def _compare(
    recipe: RecipeConfig,
    stage: StageConfig,
    config: TrainConfig,
    former: RunDir | None,
    run: RunDir,
    data: PreparedData,
    console: Console,
) -> dict[str, Any]:
    """Put the stage's probes to the model before it and after it."""
    models = {"before": former.path / "model"} if former else {}
    models["after"] = run.path / "model"
    found: dict[str, Any] = {}
    for name, folder in models.items():
        llm = LLM(folder, max_batch=8)
        if stage.probe:
            with console.stage(f"{stage.name}: needles {name}", len(stage.probe.contexts), "context") as shown:
                found[f"needles_{name}"] = []
                for context in stage.probe.contexts:
                    result = find_needles(
                        llm, data.tokenizer, context=context, prompts=stage.probe.prompts, seed=recipe.seed
                    )
                    found[f"needles_{name}"].append(result)
                    shown.advance(1, f"{result['accuracy']:.1%} at {context:,}")
        if config.mtp_joint_from is not None:
            prompts = validation_rows(data, config).tokens[:ACCEPTANCE_PROMPTS, :64].tolist()
            found[f"acceptance_{name}"] = acceptance(
                llm, prompts, depth=len(llm.model.mtp), max_tokens=ACCEPTANCE_TOKENS
            )
    return found


def validation_rows(data: PreparedData, config: TrainConfig) -> Batch:
    """Return the held-back rows at the stage's context, about 65,000 tokens of them."""
    return validation(data.val, config.context, max_rows=max(1, 65_536 // config.context))


def _figures(result: dict[str, Any]) -> list[str]:
    needles = [
        ", ".join(f"{r['accuracy']:.0%} at {r['context']:,}" for r in result.get(f"needles_{name}", [])) or "-"
        for name in ("before", "after")
    ]
    accepted = [
        ", ".join(f"{rate:.2f}" for rate in result.get(f"acceptance_{name}", [])) or "-" for name in ("before", "after")
    ]
    return [f"{result['val_loss']:.3f}", *needles, *accepted]
