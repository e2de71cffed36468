"""The command line: help, suggestions, exit codes, and messages instead of tracebacks."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import step35
from step35.cli import main as cli
from step35.cli.shipped import SHIPPED
from step35.config.demo import DemoConfig
from step35.config.presets import preset
from step35.errors import CheckpointError, DataError, DivergedError, RunLockedError
from step35.model.step35 import Step35
from step35.model.weights import load_model
from step35.post.rl.critic import make_critic
from step35.runtime.signals import Terminated


def message_of(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    """Run a command that must fail with `code`, and return its message."""
    assert cli.main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    "statement",
    [
        "import step35",
        "from step35.cli.main import main; main(['--help'])",
        "from step35.cli.main import main; main(['--version'])",
        "from step35.cli.main import main; main(['chatt'])",
        "import step35.config.demo, step35.api.sampler",
    ],
)
def test_help_and_settings_load_without_torch(statement: str) -> None:
    check = "import sys; sys.exit('torch is loaded' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", f"{statement}\n{check}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_public_names_load_on_first_use() -> None:
    for name in step35.__all__:
        assert getattr(step35, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'llm'; it has LLM"):
        step35.llm  # noqa: B018


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) == 0
    listed = capsys.readouterr().out
    for verb in cli.VERBS:
        assert f"\n  {verb} " in listed


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([verb, "--help"])
    assert exit.value.code == 0
    assert f"step35 {verb}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"step35 {step35.__version__}\n"


def test_an_unknown_verb_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    error = message_of(capsys, ["genrate"])
    assert "unknown verb 'genrate'. Did you mean 'generate'?" in error
    assert "demo" in error


@pytest.mark.parametrize(
    "arguments", [["train", "--stepz", "3"], ["train", "--steps", "many"], ["demo", "--rl.stepz", "3"]]
)
def test_a_bad_option_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--steps", "0"],
        ["train", "--batch-rows", "6", "--micro-rows", "4"],
        ["demo", "--eval.problems", "0"],
        ["generate", "--temperature", "-1"],
    ],
)
def test_a_value_out_of_range_is_a_message(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    try:
        code: Any = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert arguments[-2].split(".")[-1].strip("-").replace("-", "_") in error.replace("-", "_")


@pytest.mark.parametrize("verb", ["demo", "train"])
def test_an_unknown_preset_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str
) -> None:
    out = tmp_path / "run"
    dry = ["--dry-run"] if verb == "train" else []
    error = message_of(capsys, [verb, "--preset", "tinny", "--out", str(out), *dry])
    assert "unknown preset 'tinny'. Did you mean 'tiny'?" in error
    assert not out.exists()


def test_a_dry_run_counts_parameters_and_leaves_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["train", "--dry-run", "--preset", "tiny", "--steps", "3", "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    parameters = dict(Step35(preset("tiny")).named_parameters())
    assert f" {sum(p.numel() for p in parameters.values()):,} " in shown
    assert f" {3 * 16 * 256:,} (3 steps of 4,096 at the end)" in shown
    assert all(f" {re.sub(r'[.][0-9]+[.]', '.N.', name)} " in shown for name in parameters)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["demo", "prepare", "train", "sft", "rl", "eval"])
def test_a_dry_run_of_any_long_verb_prints_settings_that_config_takes_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str
) -> None:
    source = ["--model", str(SHIPPED)] if verb in ("sft", "rl") else []
    seed = ["--seed", "3", "--out", str(tmp_path / "run"), *source]
    assert cli.main([verb, "--dry-run", *seed]) == 0
    shown = capsys.readouterr().out
    settings, _ = json.JSONDecoder().raw_decode(shown)
    assert settings["seed"] == 3
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    assert cli.main([verb, "--dry-run", "--config", str(file)]) == 0
    assert capsys.readouterr().out == shown
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_rl_counts_actor_critic_and_rollouts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rl", "--dry-run", "--model", str(SHIPPED), "--steps", "5", "--prompts", "3"]) == 0
    shown = capsys.readouterr().out
    actor = load_model(SHIPPED)
    for model in (actor, make_critic(actor)):
        assert f" {sum(p.numel() for p in model.parameters()):,} " in shown
    assert "30 (5 rounds of 3 x 2)" in shown


@pytest.mark.parametrize("verb", ["sft", "rl"])
def test_a_dry_run_on_no_checkpoint_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str) -> None:
    assert "is not a checkpoint folder" in message_of(capsys, [verb, "--dry-run", "--model", str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.toml", "stepz = 3", "unknown key 'stepz'. Did you mean 'steps'?"),
        ("a.json", '{"optim": {"kind": "muon", "momentom": 0.9}}', "momentom"),
        ("a.toml", "steps = 'many'", "steps='many'"),
        ("a.toml", "steps = 0", "steps=0"),
        ("a.toml", "steps = = 3", "is not valid TOML"),
        ("a.json", "{", "is not valid JSON"),
    ],
)
def test_a_bad_config_file_is_explained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, text: str, expected: str
) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    error = message_of(capsys, ["train", "--config", str(file)])
    assert expected in error
    assert str(file) in error


def test_a_nested_unknown_key_is_suggested(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "demo.toml"
    file.write_text("[rl]\nprompt = 3\n", encoding="utf-8")
    assert "unknown key 'rl.prompt'. Did you mean 'prompts'?" in message_of(capsys, ["demo", "--config", str(file)])


def test_a_config_file_that_is_missing_or_not_given(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "cannot be read" in message_of(capsys, ["train", "--config", str(tmp_path / "none.toml")])
    assert "--config needs a file" in message_of(capsys, ["train", "--config"])


def test_flags_beat_the_config_file_which_beats_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from step35.cli import train

    given: list[train.Args] = []
    monkeypatch.setattr(train, "main", lambda args: given.append(args) or 0)
    file = tmp_path / "train.toml"
    file.write_text("steps = 7\nlr = 0.5\noptim = {kind = 'adamw'}\n", encoding="utf-8")
    assert cli.main(["train", "--lr", "0.25", "--config", str(file), "--seed", "3"]) == 0
    args = given[0]
    assert (args.steps, args.lr, args.seed, args.optim.kind) == (7, 0.25, 3, "adamw")
    assert cli.main(["train", f"--config={file}", "--lr=0.25", "--seed=3"]) == 0
    assert given[1] == args
    assert args.final_lr == DemoConfig().train.final_lr


@pytest.mark.parametrize("verb", ["prepare", "train", "sft", "rl", "eval"])
def test_a_stage_on_its_own_has_the_demos_settings(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    module = importlib.import_module(f"step35.cli.{verb}")
    given: list[Any] = []
    monkeypatch.setattr(module, "main", lambda args: given.append(args) or 0)
    assert cli.main([verb]) == 0
    expected = getattr(DemoConfig(), verb).model_dump()
    assert {name: value for name, value in given[0].model_dump().items() if name in expected} == expected


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (DataError("no text"), 2),
        (CheckpointError("no model"), 2),
        (DivergedError("loss=nan"), 3),
        (KeyboardInterrupt(), 130),
        (Terminated(), 143),
        (RunLockedError("busy"), 75),
        (BrokenPipeError(), 141),
    ],
)
def test_errors_have_their_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: BaseException, code: int
) -> None:
    from step35.cli import doctor

    def fail(args: Any) -> int:
        raise raised

    monkeypatch.setattr(doctor, "main", fail)
    assert cli.main(["doctor"]) == code
    assert str(raised) in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from step35.cli import doctor

    monkeypatch.setattr(doctor, "main", lambda args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def commands_on(folder: Path, out: Path) -> list[list[str]]:
    """Return one command of every verb that reads a checkpoint."""
    return [
        ["generate", str(folder), "--max-tokens", "1"],
        ["chat", str(folder), "--message", "hi", "--max-tokens", "1"],
        ["eval", str(folder), "--out", str(out / "eval")],
        ["convert", str(folder), str(out / "converted")],
        ["sft", "--model", str(folder), "--out", str(out / "sft")],
        ["rl", "--model", str(folder), "--out", str(out / "rl")],
    ]


READERS = ["generate", "chat", "eval", "convert", "sft", "rl"]


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize("kind", ["missing", "empty", "a file"])
def test_what_is_no_checkpoint_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str, kind: str
) -> None:
    folder = tmp_path / "folder"
    if kind == "empty":
        folder.mkdir()
    elif kind == "a file":
        folder.write_text("not a folder")
    error = message_of(capsys, commands_on(folder, tmp_path)[READERS.index(verb)])
    assert str(folder) in error
    assert "config.json" in error


def cut_weights(folder: Path) -> None:
    [file] = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty_weights(folder: Path) -> None:
    [file] = folder.glob("*.safetensors")
    file.write_bytes(b"\x10")


def no_weights(folder: Path) -> None:
    [file] = folder.glob("*.safetensors")
    file.unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def torn_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"', encoding="utf-8")


def torn_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 32,', encoding="utf-8")


def torn_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {', encoding="utf-8")


def foreign_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")


def other_width(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "hidden_size": 40}), encoding="utf-8")


DAMAGES = {
    cut_weights: "truncated",
    empty_weights: "truncated",
    no_weights: "safetensors",
    no_tokenizer: "tokenizer.json",
    torn_tokenizer: "tokenizer.json",
    torn_config: "config.json",
    torn_index: "index.json",
    foreign_index: "index.json",
    other_width: "misshapen",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_a_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, micro_checkpoint: Path, damage: Any
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(micro_checkpoint, folder)
    damage(folder)
    for command in commands_on(folder, tmp_path)[:2]:
        error = message_of(capsys, command)
        assert str(folder) in error
        assert DAMAGES[damage] in error


def test_a_prompt_longer_than_the_context_is_a_message(
    capsys: pytest.CaptureFixture[str], micro_checkpoint: Path
) -> None:
    long = "1" * 2000
    for command in (
        ["generate", str(micro_checkpoint), "--prompt", long],
        ["chat", str(micro_checkpoint), "--message", long],
    ):
        assert "context holds 1024" in message_of(capsys, command)


def test_more_drafts_than_modules_is_a_message(capsys: pytest.CaptureFixture[str], micro_checkpoint: Path) -> None:
    assert "choose 0 to 2" in message_of(capsys, ["generate", str(micro_checkpoint), "--speculate", "5"])


@pytest.mark.parametrize(("verb", "dtype"), [("generate", "float8"), ("convert", "float4")])
def test_an_unknown_dtype_is_a_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, micro_checkpoint: Path, verb: str, dtype: str
) -> None:
    out = [str(tmp_path / "out")] if verb == "convert" else []
    try:
        code: Any = cli.main([verb, str(micro_checkpoint), *out, "--dtype", dtype])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err
    assert dtype in error
    assert "bfloat16" in error


def test_data_that_is_not_prepared_is_a_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    error = message_of(capsys, ["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")])
    assert str(tmp_path / "data") in error
    assert "step35 prepare" in error


def test_a_missing_conversations_file_is_a_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, micro_checkpoint: Path
) -> None:
    missing = str(tmp_path / "none.jsonl")
    out = str(tmp_path / "sft")
    error = message_of(capsys, ["sft", "--model", str(micro_checkpoint), "--out", out, "--conversations-file", missing])
    assert missing in error


def test_convert_rounds_and_keeps_the_rest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, micro_checkpoint: Path
) -> None:
    import torch

    out = tmp_path / "converted"
    assert cli.main(["convert", str(micro_checkpoint), str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    before, after = step35.load_model(micro_checkpoint).state_dict(), step35.load_model(out).state_dict()
    for name, tensor in before.items():
        expected = tensor if name.endswith(("router.weight", "router.bias")) else tensor.bfloat16().float()
        assert torch.equal(after[name], expected), name
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["torch_dtype"] == "bfloat16"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (micro_checkpoint / name).read_bytes()


def test_convert_does_not_overwrite_its_source(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, micro_checkpoint: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(micro_checkpoint, folder)
    assert "is or holds what is read" in message_of(
        capsys, ["convert", str(folder), str(tmp_path / "x" / ".." / "model")]
    )
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in micro_checkpoint.iterdir())


def test_fresh_deletes_runs_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    assert "not a run directory" in message_of(capsys, ["demo", "--out", str(precious), "--fresh"])
    assert (precious / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("verb", ["chat", "generate", "eval", "inspect"])
def test_a_run_given_as_a_model_is_told_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(SHIPPED, run / "model")
    (run / "config.json").write_text('{"steps": 3}')
    assert f"{run} is a run directory; its checkpoint is {run / 'model'}." in message_of(capsys, [verb, str(run)])


def test_a_run_refuses_another_preset_or_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from step35.cli.stages import check_inputs
    from step35.errors import ConfigError
    from step35.runtime.rundir import RunDir

    run = RunDir(tmp_path / "run")
    check_inputs(run, {"preset": "tiny", "model": tmp_path / "a"})
    check_inputs(run, {"preset": "tiny", "model": tmp_path / "a"})
    with pytest.raises(ConfigError, match="preset='tiny', not 'mini'"):
        check_inputs(run, {"preset": "mini", "model": tmp_path / "a"})
    with pytest.raises(ConfigError, match=r"model='\.\./a', not '\.\./b'"):
        check_inputs(run, {"preset": "tiny", "model": tmp_path / "b"})


def test_a_partial_table_keeps_the_demos_other_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "demo.toml"
    file.write_text("[sft]\nsteps = 10\n[rl]\nsteps = 3\n", encoding="utf-8")
    assert cli.main(["demo", "--dry-run", "--config", str(file)]) == 0
    settings, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    expected = DemoConfig().model_dump(mode="json")
    assert settings["sft"] == {**expected["sft"], "steps": 10}
    assert settings["rl"] == {**expected["rl"], "steps": 3}


def test_a_stage_seed_that_cannot_take_effect_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "demo.toml"
    file.write_text("[train]\nseed = 5\n", encoding="utf-8")
    assert "train.seed=5 cannot take effect" in message_of(capsys, ["demo", "--dry-run", "--config", str(file)])
    file.write_text("seed = -1\n", encoding="utf-8")
    assert "seed=-1" in message_of(capsys, ["demo", "--dry-run", "--config", str(file)])


@pytest.mark.parametrize("place", ["work", "work/thesis.txt"])
def test_convert_never_deletes_what_is_no_checkpoint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, place: str
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("years of it", encoding="utf-8")
    error = message_of(capsys, ["convert", str(SHIPPED), str(tmp_path / place)])
    assert "is not a checkpoint folder" in error
    assert (work / "thesis.txt").read_text(encoding="utf-8") == "years of it"


def test_convert_refuses_a_folder_around_its_source(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(SHIPPED, tmp_path / "outer" / "model")
    shutil.copytree(SHIPPED, tmp_path / "outer", dirs_exist_ok=True)
    error = message_of(capsys, ["convert", str(tmp_path / "outer" / "model"), str(tmp_path / "outer")])
    assert "is or holds what is read" in error
    assert (tmp_path / "outer" / "model" / "config.json").is_file()


def test_convert_replaces_an_older_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "model"
    shutil.copytree(SHIPPED, out)
    assert cli.main(["convert", str(SHIPPED), str(out), "--dtype", "float32"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert load_model(out).lm_head.weight.dtype == torch.float32


def test_help_into_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m step35.cli.main --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize(("verb", "continues"), [("train", True), ("chat", False)])
def test_only_verbs_that_resume_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str, continues: bool
) -> None:
    def stop(*arguments: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", stop)
    assert cli.main([verb]) == 130
    assert ("run the same command again" in capsys.readouterr().err) is continues


def test_bytes_that_are_no_text_do_not_stop_a_verb() -> None:
    command = [sys.executable, "-m", "step35.cli.main", "generate", "--prompt", "-", "--max-tokens", "2"]
    done = subprocess.run(command, input=b"\xff\xfe 1 + 1", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b" 1 + 1" in done.stdout


@pytest.mark.parametrize("verb", ["prepare", "eval", "demo"])
def test_a_file_where_a_folder_belongs_is_explained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine", encoding="utf-8")
    assert "cannot be written" in message_of(capsys, [verb, "--out", str(file)])
    assert "cannot be written" in message_of(capsys, [verb, "--out", str(file / "run")])
    assert file.read_text(encoding="utf-8") == "mine"


def test_a_run_directory_is_not_its_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(SHIPPED, tmp_path / "export")
    (tmp_path / "config.json").write_text('{"seed": 0}', encoding="utf-8")
    error = message_of(capsys, ["generate", str(tmp_path)])
    assert f"its checkpoint is {tmp_path / 'export'}" in error


def test_the_surface_is_listed() -> None:
    assert {"LLM", "SamplingParams", "chat", "load_model", "load_tokenizer", "save_model"} <= set(dir(step35))
