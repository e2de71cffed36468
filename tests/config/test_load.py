from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from step35.config.data import PrepareConfig
from step35.config.demo import DemoConfig
from step35.config.load import load_file
from step35.config.presets import preset
from step35.config.recipe import RecipeConfig
from step35.config.train import AdamWConfig, MuonConfig, TrainConfig
from step35.errors import ConfigError


def write(folder: Path, text: str, name: str = "settings.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, kind: Any = DemoConfig, name: str = "settings.toml") -> str:
    with pytest.raises(ConfigError) as caught:
        load_file(write(folder, text, name), kind)
    return str(caught.value)


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    toml = 'seed = 3\n[train]\nsteps = 7\n[train.optim]\nkind = "adamw"\n[rl.mis_po]\ntoken_low = 0.25\n'
    values = {
        "seed": 3,
        "train": {"steps": 7, "optim": {"kind": "adamw"}},
        "rl": {"mis_po": {"token_low": 0.25}},
    }
    loaded = load_file(write(tmp_path, toml), DemoConfig)
    assert loaded == load_file(write(tmp_path, json.dumps(values), "settings.json"), DemoConfig)
    assert (loaded.seed, loaded.train.steps, loaded.rl.mis_po.token_low) == (3, 7, 0.25)
    assert loaded.train.optim == AdamWConfig()
    assert loaded.train.lr == TrainConfig().lr


def test_a_file_is_laid_over_the_default_key_by_key(tmp_path: Path) -> None:
    default = TrainConfig(steps=9, context=64)
    assert load_file(write(tmp_path, "steps = 7\n"), TrainConfig, default) == TrainConfig(steps=7, context=64)


def test_a_table_is_laid_over_the_default_key_by_key_too(tmp_path: Path) -> None:
    sft = load_file(write(tmp_path, "[sft]\nsteps = 7\n"), DemoConfig, DemoConfig()).sft
    assert sft == DemoConfig().sft.model_copy(update={"steps": 7})


def test_a_runs_own_config_is_a_valid_input(tmp_path: Path) -> None:
    config = DemoConfig(seed=5, train=TrainConfig(steps=9, optim=AdamWConfig(adamw_betas=(0.8, 0.9))))
    path = write(tmp_path, json.dumps(config.model_dump(mode="json")), "config.json")
    assert load_file(path, DemoConfig) == config


def test_an_unknown_key_gets_a_suggestion(tmp_path: Path) -> None:
    message = refusal(tmp_path, "sead = 1\n")
    assert "unknown key 'sead'. Did you mean 'seed'?" in message
    assert "preset" in message  # the known keys
    assert "settings.toml" in message


def test_a_nested_unknown_key_gets_a_suggestion_from_its_own_table(tmp_path: Path) -> None:
    message = refusal(tmp_path, "[train]\nstepps = 1\n[rl.mis_po]\ntoken_hihg = 2.0\n")
    assert "unknown key 'train.stepps'. Did you mean 'steps'?" in message
    assert "unknown key 'rl.mis_po.token_hihg'. Did you mean 'token_high'?" in message


def test_an_unknown_key_of_the_optimiser_gets_a_suggestion_too(tmp_path: Path) -> None:
    message = refusal(tmp_path, '[optim]\nkind = "muon"\nmomentun = 0.9\n', TrainConfig)
    assert "Did you mean 'momentum'?" in message


STAGE = """
    preset = "tiny"
    [[stages]]
    name = "first"
    tokens = 1000
    mixture = { code = 1.0 }
"""


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (RecipeConfig, f"{STAGE}lr = 3", "unknown key 'stages.0.lr'. Known keys here: "),
        (RecipeConfig, f"{STAGE}{STAGE[STAGE.index('[[') :]}tokns = 3", "'stages.1.tokns'. Did you mean 'tokens'?"),
        (
            RecipeConfig,
            f"{STAGE}probe = {{ contexts = [64], promts = 3 }}",
            "'stages.0.probe.promts'. Did you mean 'pr",
        ),
        (PrepareConfig, '[[sources]]\nname = "web"\npath = ["a.txt"]', "'sources.0.path'. Did you mean 'paths'?"),
        (
            TrainConfig,
            "batch_ramp = [{ row = 4 , rows = 4, until_tokens = 5 }]",
            "'batch_ramp.0.row'. Did you mean 'rows'?",
        ),
    ],
)
def test_an_unknown_key_of_an_entry_is_named_alone(tmp_path: Path, kind: Any, text: str, words: str) -> None:
    message = refusal(tmp_path, text, kind)
    assert words in message
    assert message.count("\n") == 0


def test_a_list_that_is_too_short_by_itself_is_still_refused(tmp_path: Path) -> None:
    assert "stages=[]: Tuple should have at least 1 item" in refusal(
        tmp_path, 'preset = "tiny"\nstages = []', RecipeConfig
    )


def test_a_wrong_value_is_named(tmp_path: Path) -> None:
    message = refusal(tmp_path, '[train]\nsteps = 0\nlr = "fast"\n')
    assert "train.steps=0" in message
    assert "train.lr='fast'" in message


def test_settings_that_contradict_each_other_are_refused_with_a_remedy(tmp_path: Path) -> None:
    message = refusal(tmp_path, "batch_rows = 6\nmicro_rows = 4\n", TrainConfig)
    assert "batch_rows=6 is not divisible by micro_rows=4" in message
    assert "[1, 2, 3, 6]" in message


def test_the_optimiser_is_chosen_by_its_kind(tmp_path: Path) -> None:
    muon = load_file(write(tmp_path, '[optim]\nkind = "muon"\nsteps = 3\n'), TrainConfig).optim
    assert muon == MuonConfig(steps=3)
    adamw = load_file(write(tmp_path, '[optim]\nkind = "adamw"\n'), TrainConfig).optim
    assert isinstance(adamw, AdamWConfig)
    assert "'muon', 'adamw'" in refusal(tmp_path, '[optim]\nkind = "adam"\n', TrainConfig)
    assert "kind" in refusal(tmp_path, "[optim]\nsteps = 3\n", TrainConfig)
    assert "steps" in refusal(tmp_path, '[optim]\nkind = "adamw"\nsteps = 3\n', TrainConfig)


def test_an_unknown_preset_gets_a_suggestion() -> None:
    expected = r"unknown preset 'flsh'\. Did you mean 'flash'\? Presets: tiny, mini, .*, flash, or scale-N"
    with pytest.raises(ConfigError, match=expected):
        preset("flsh")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("settings.toml", "seed = \n", "not valid TOML"),
        ("settings.json", "{", "not valid JSON"),
        ("settings.json", "[1]", "a table of settings"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    message = refusal(tmp_path, text, name=name)
    assert words in message
    assert name in message


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml cannot be read"):
        load_file(tmp_path / "absent.toml", DemoConfig)


def test_configs_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().steps = 3  # type: ignore[misc]
