"""`step35 convert` between safetensors, FP8 and GGUF."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from step35.cli import main as cli
from step35.cli.stages import write_architecture
from step35.data.tokenizer import load_tokenizer
from step35.model.weights import load_model
from step35.runtime import checkpoint
from step35.runtime.rundir import RunDir


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gguf_and_back_changes_nothing(dtype: str, micro_checkpoint: Path, tmp_path: Path) -> None:
    stored, file, back = tmp_path / "stored", tmp_path / "model.gguf", tmp_path / "back"
    assert cli.main(["convert", str(micro_checkpoint), str(stored), "--dtype", dtype]) == 0
    assert cli.main(["convert", str(stored), str(file), "--to", "gguf", "--dtype", "float32"]) == 0
    assert cli.main(["convert", str(file), str(back), "--dtype", dtype]) == 0
    for one, other in zip(sorted(stored.iterdir()), sorted(back.iterdir()), strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes(), one.name


def test_fp8_and_back_is_near(micro_checkpoint: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", str(micro_checkpoint), str(tmp_path / "fp8"), "--dtype", "float8"]) == 0
    assert cli.main(["convert", str(tmp_path / "fp8"), str(tmp_path / "back"), "--dtype", "bfloat16"]) == 0
    expected, found = load_model(micro_checkpoint), load_model(tmp_path / "back")
    for name, tensor in expected.state_dict().items():
        error = (found.state_dict()[name] - tensor).abs().max()
        assert error <= tensor.abs().max() / 14, name  # 1/16 of FP8, then bf16
    assert not torch.equal(expected.layers[1].moe.experts.down_proj, found.layers[1].moe.experts.down_proj)


def test_modules_can_be_left_out(micro_checkpoint: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", str(micro_checkpoint), str(tmp_path / "trunk"), "--mtp", "0"]) == 0
    assert len(load_model(tmp_path / "trunk").mtp) == 0
    assert cli.main(["generate", str(tmp_path / "trunk"), "--prompt", "What", "--max-tokens", "3"]) == 0


def test_a_gguf_file_keeps_its_tokenizer_and_speaks(micro_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    assert cli.main(["convert", str(micro_checkpoint), str(file), "--to", "gguf", "--dtype", "q8_0"]) == 0
    assert cli.main(["convert", str(file), str(tmp_path / "back")]) == 0
    text = "What is 12 * 7? <think>"
    expected = load_tokenizer(micro_checkpoint).encode(text)
    assert load_tokenizer(tmp_path / "back").encode(text) == load_tokenizer(file).encode(text) == expected


def test_what_can_be_converted_can_be_used_as_it_is(
    micro_checkpoint: Path, run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.gguf"
    assert cli.main(["convert", str(micro_checkpoint), str(file), "--to", "gguf", "--dtype", "float32"]) == 0
    checkpoint.save(run.checkpoints, 1, {"step": 1, "model": load_model(micro_checkpoint).state_dict()})
    answers = []
    capsys.readouterr()
    greedy = ["--prompt", "What is", "--max-tokens", "12", "--temperature", "0"]
    for path in (micro_checkpoint, file, run.path, run.checkpoints / "step_1"):
        assert cli.main(["generate", str(path), *greedy]) == 0
        answers.append(capsys.readouterr().out.rsplit("[", 1)[0])
    assert len(set(answers)) == 1
    figures = []
    for path in (micro_checkpoint, file):
        assert cli.main(["inspect", str(path), "--json"]) == 0
        figures.append(capsys.readouterr().out)
    assert figures[0] == figures[1]


def test_a_checkpoint_without_the_tensors_of_its_modules_is_used_with_mtp_0(
    micro_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk = tmp_path / "trunk"
    assert cli.main(["convert", str(micro_checkpoint), str(trunk), "--mtp", "0"]) == 0
    shutil.copy(micro_checkpoint / "config.json", trunk)  # which names two modules
    arguments = ["generate", str(trunk), "--prompt", "What", "--max-tokens", "3"]
    assert cli.main(arguments) != 0
    assert "load with mtp=0 (--mtp 0) to do without" in capsys.readouterr().err
    assert cli.main([*arguments, "--mtp", "0"]) == 0


@pytest.mark.parametrize(
    ("out", "arguments", "message"),
    [
        ("folder", ["--to", "gguf"], "must be a file that ends in .gguf"),
        ("m.gguf", ["--to", "gguf", "--dtype", "float8"], "dtype=float8 is not a GGUF format"),
        ("folder", ["--dtype", "q8_0"], "exists in GGUF files only; add --to gguf"),
        ("folder", ["--mtp", "5"], "mtp=5 is not in 0..2"),
        ("model.gguf", [], "ends in .gguf; add --to gguf"),
    ],
)
def test_what_does_not_fit_is_refused(
    out: str, arguments: list[str], message: str, micro_checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert cli.main(["convert", str(micro_checkpoint), str(tmp_path / out), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_users_is_removed(
    micro_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "model.tmp", tmp_path / "model"
    shutil.copytree(micro_checkpoint, source)
    assert cli.main(["convert", str(source), str(out)]) == 2  # writing uses the name model.tmp
    assert "is in the way" in capsys.readouterr().err
    assert load_model(source)
    shutil.copytree(micro_checkpoint, out)
    shutil.move(source, tmp_path / "source")
    (out / "notes.txt").write_text("mine")
    assert cli.main(["convert", str(tmp_path / "source"), str(out)]) == 2
    assert "also holds notes.txt" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine"


def test_the_current_folder_is_refused(
    micro_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", str(micro_checkpoint), "."]) == 2
    assert "is the current folder" in capsys.readouterr().err


def test_a_link_to_a_folder_stays_a_link(micro_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        assert cli.main(["convert", str(micro_checkpoint), str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert load_model(tmp_path / "real")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.fixture
def run(micro_checkpoint: Path, tmp_path: Path) -> RunDir:
    """A training run of the micro model that has not saved yet."""
    run = RunDir(tmp_path / "run")
    write_architecture(run, load_model(micro_checkpoint).config, load_tokenizer(micro_checkpoint))
    return run


@pytest.mark.parametrize("kind", ["train", "rl"])
def test_any_checkpoint_of_a_run_is_exported(run: RunDir, micro_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    for step in (1, 2):
        weights = {name: tensor + step for name, tensor in load_model(micro_checkpoint).state_dict().items()}
        part = {"model": weights, "optimisers": [{"momentum": torch.ones(3)}]}
        state = part if kind == "train" else {"actor": part, "critic": {"model": {}}}
        checkpoint.save(run.checkpoints, step, {"step": step, **state})
    for path, step in ((run.path, 2), (run.checkpoints / "step_1", 1), (run.checkpoints / "step_2", 2)):
        out = tmp_path / "out"
        assert cli.main(["convert", str(path), str(out), "--dtype", "float32"]) == 0
        expected = load_model(micro_checkpoint).state_dict()
        for name, tensor in load_model(out).state_dict().items():
            assert torch.equal(tensor, expected[name] + step), name
        text = "What is 12 * 7? <think>"
        assert load_tokenizer(out).encode(text) == load_tokenizer(micro_checkpoint).encode(text)
    assert cli.main(["convert", str(run.path), str(tmp_path / "trunk"), "--mtp", "0"]) == 0
    assert len(load_model(tmp_path / "trunk").mtp) == 0


def test_a_run_that_cannot_be_exported_says_why(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", str(run.path), str(tmp_path / "out")]) == 2
    assert "has saved no checkpoint yet" in capsys.readouterr().err
    step = checkpoint.save(run.checkpoints, 1, {"model": {}})
    assert cli.main(["convert", str(step), str(tmp_path / "out")]) == 2
    assert "does not match its config.json" in capsys.readouterr().err
    (step / "state.json").write_text("{}")
    assert cli.main(["convert", str(step), str(tmp_path / "out")]) == 2
    assert "its manifest says" in capsys.readouterr().err
    shutil.rmtree(run.path / "architecture")
    assert cli.main(["convert", str(step), str(tmp_path / "out")]) == 2
    assert f"{run.path / 'architecture'} is missing" in capsys.readouterr().err
