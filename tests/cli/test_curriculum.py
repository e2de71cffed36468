"""A whole recipe, small: what passes from stage to stage, what is written, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from step35.cli.main import main
from step35.cli.recipe import mixture
from step35.config.load import load_file as load_recipe
from step35.config.recipe import RecipeConfig
from step35.data.prepare import PreparedData
from step35.data.sampler import MixtureLoader
from step35.model.weights import load_model
from step35.runtime.metrics import read_metrics

RECIPE = """
preset = "tiny"
mtp = 2

[prepare]
vocab_size = 512
val_tokens = 4096
[[prepare.sources]]
name = "sums"
builtin = "arithmetic"
chars = 200_000
[[prepare.sources]]
name = "recall"
builtin = "needle"
chars = 200_000

[train]
batch_rows = 4
micro_rows = 4
context = 32
warmup_steps = 0
dtype = "float32"
checkpoint_every = 2

[[stages]]
name = "short"
tokens = 512
mixture = { sums = 3, recall = 1 }
[stages.train]
lr = 1e-2

[[stages]]
name = "long"
tokens = 512
mixture = { recall = 1 }
replay = 0.25
replay_of = "short"
theta_full = 1e6
mask_meta_from_tokens = 0
probe = { contexts = [64, 128], prompts = 8 }
[stages.train]
context = 128
batch_rows = 2
freeze_router = true
ep_weight = 0.0
balance_rate = 0.0

[[stages]]
name = "mtp"
tokens = 256
mixture = { sums = 1 }
[stages.train]
mtp_joint_from = 0
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curriculum")
    (folder / "recipe.toml").write_text(RECIPE)
    assert main(["curriculum", str(folder / "recipe.toml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_each_stage_is_a_run_with_a_model_in_the_released_layout(run: Path) -> None:
    thetas = {}
    for folder in ("1-short", "2-long", "3-mtp"):
        config = load_model(run / folder / "model").config
        thetas[folder] = (config.layer(0).rope_theta, config.layer(1).rope_theta)
        assert config.num_nextn_predict_layers == 2
    assert thetas == {"1-short": (1e4, 1e4), "2-long": (1e6, 1e4), "3-mtp": (1e6, 1e4)}
    assert [len(read_metrics(run / f / "metrics.jsonl")) for f in ("1-short", "2-long", "3-mtp")] == [4, 2, 2]


def test_the_frozen_router_stays_and_the_rest_moves(run: Path) -> None:
    before, after = (load_model(run / f / "model").state_dict() for f in ("1-short", "2-long"))
    same = {name for name in before if before[name].equal(after[name])}
    routers = {name for name in before if "router" in name}
    assert routers
    assert routers <= same
    assert "embed_tokens.weight" not in same


def test_the_account_is_exact(run: Path) -> None:
    first, second = (read(run / f / "account.json") for f in ("1-short", "2-long"))
    assert {name: source["tokens"] for name, source in first.items()} == {"sums": 384, "recall": 128}
    assert sum(source["tokens"] for source in second.values()) == 512
    assert set(second) == {"recall", "sums"}  # sums by replay
    results = [read(run / f / "done.json") for f in ("1-short", "2-long", "3-mtp")]
    assert [result["rows"] for result in results] == [16, 4, 8]
    assert all(result["packing"]["filled"] == 1 and 0 <= result["packing"]["cut"] <= 1 for result in results)


@pytest.mark.parametrize("rows", [16, 48])
def test_a_stage_reads_on_behind_the_rows_that_were_really_taken(run: Path, rows: int) -> None:
    recipe, data = load_recipe(run.parent / "recipe.toml", RecipeConfig), PreparedData.load(run / "data")
    first = mixture(recipe, recipe.stages[0], data)
    second = mixture(recipe, recipe.stages[1], data, {"short": rows})
    expected = MixtureLoader(
        data.sources, recipe.weights(recipe.stages[1]), context=128, seed=0, window_rows=4, mask_meta_from=0,
        start=first.behind(rows),
    )  # fmt: skip
    assert np.array_equal(second.rows(0, 4).tokens, expected.rows(0, 4).tokens)
    anew = mixture(recipe, recipe.stages[1], data, {"short": 0})
    assert not np.array_equal(second.rows(0, 4).tokens, anew.rows(0, 4).tokens)


def again(run: Path, folder: Path, text: str = RECIPE) -> int:
    """Run the recipe again on a copy of `run` that the caller has changed."""
    (folder / "recipe.toml").write_text(text)
    return main(["curriculum", str(folder / "recipe.toml"), "--out", str(run)])


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_stage_does_not_start_from_an_older_state_of_the_one_before(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "2-long")
    [tensors] = (copy / "1-short" / "checkpoints" / "step_4").glob("*.distcp")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert again(copy, tmp_path) != 0
    assert "no whole checkpoint of the stage's last step, 4" in capsys.readouterr().err
    assert not (copy / "2-long" / "metrics.jsonl").exists()


def test_a_stage_that_has_begun_needs_the_one_before_no_more(copy: Path, tmp_path: Path) -> None:
    (copy / "2-long" / "done.json").unlink()
    shutil.rmtree(copy / "1-short" / "checkpoints")
    assert again(copy, tmp_path) == 0


def test_what_follows_from_an_alarm_may_change(copy: Path, tmp_path: Path) -> None:
    assert again(copy, tmp_path, RECIPE.replace("[train]", '[train]\nstability.non_finite.action = "skip"')) == 0


def test_probes_and_acceptance_are_measured_before_and_after(run: Path) -> None:
    result = read(run / "2-long" / "done.json")
    for name in ("needles_before", "needles_after"):
        assert [r["context"] for r in result[name]] == [64, 128]
        assert all(r["prompts"] == 8 for r in result[name])
    joint = read(run / "3-mtp" / "done.json")
    assert len(joint["acceptance_before"]) == len(joint["acceptance_after"]) == 2
    report = (run / "report.html").read_text()
    assert "2-long: needles found after" in report
    assert "not run yet" not in report


def test_a_finished_recipe_does_nothing_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("metrics.jsonl")}
    assert main(["curriculum", str(run.parent / "recipe.toml"), "--out", str(run)]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("metrics.jsonl")} == before
    assert "needles after" in capsys.readouterr().out


def test_another_recipe_in_the_same_folder_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run.parent / "other.toml").write_text(RECIPE.replace("1e-2", "2e-2"))
    assert main(["curriculum", str(run.parent / "other.toml"), "--out", str(run)]) != 0
    assert "holds a run with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mixture = { sums = 1 }", "mixture = { books = 1 }", "no source is called ['books']"),
        ("mtp_joint_from = 0", "mtp_joint_from = 0\nep_groups = 5", "not divisible by ep_groups=5"),
        ("mtp_joint_from = 0", "mtp_joint_from = 2", "mtp_joint_from=2 never comes"),
        ("mtp_joint_from = 0", "context = 4104", "context=4104 is beyond the model's max_position_embeddings=4096"),
        ('"tiny"', '"tinny"', "unknown preset 'tinny'"),
    ],
)
def test_a_mistake_in_the_last_stage_is_said_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    (tmp_path / "r.toml").write_text(RECIPE.replace(old, new))
    for flags in ([], ["--dry-run"]):
        assert main(["curriculum", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run"), *flags]) != 0
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "data").exists()


def test_too_little_validation_text_for_the_last_stage_is_said_before_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = RECIPE.replace('"tiny"', '"mini"')
    (tmp_path / "r.toml").write_text(longer + "context = 8192\nbatch_rows = 1\nmicro_rows = 1\n")
    assert main(["curriculum", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run")]) != 0
    assert "less than one row of context=8192" in capsys.readouterr().err
    assert not (tmp_path / "run" / "1-short").exists()


def test_a_rate_is_stated_or_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    command = ["curriculum", str(tmp_path / "r.toml"), "--dry-run", "--rate"]
    with pytest.raises(SystemExit):
        main([*command, "0"])
    assert "greater than 0" in capsys.readouterr().err
    assert main([*command, "5", "--measure"]) != 0
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cpu", "gpu", "flash"])
def test_the_recipes_that_come_with_the_project_are_sound(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parents[2] / "recipes" / f"{name}.toml"
    recipe = load_recipe(file, RecipeConfig)
    assert [s.name for s in recipe.stages][:6] == [
        "pretrain-1", "pretrain-2a", "pretrain-2b", "midtrain-1", "midtrain-2", "sft"
    ]  # fmt: skip
    assert main(["curriculum", str(file), "--dry-run", "--rate", "1000"]) == 0
    shown = capsys.readouterr().out
    hours = sum(s.tokens for s in recipe.stages) / 1000 / 3600
    assert f"{hours:,.2f}" in shown


def test_the_timeline_can_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    assert main(["curriculum", str(tmp_path / "r.toml"), "--dry-run", "--measure"]) == 0
    shown = capsys.readouterr().out
    assert "in all" in shown
    assert "who gets which optimiser" in shown
    assert not (tmp_path / "run").exists()
