"""What the stages make on their way: the demonstrations of SFT, and what tells one run from another."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from step35.api.messages import Message
from step35.cli import stages
from step35.cli.stages import publish, stage, synthesise
from step35.config.data import PrepareConfig
from step35.config.post import EvalConfig, SFTConfig
from step35.data.lines import BadLines, total
from step35.data.tokenizer import load_tokenizer
from step35.errors import ConfigError
from step35.model.weights import load_model
from step35.runtime.console import Console
from step35.runtime.rundir import RunDir


def questions(messages: list[Message]) -> list[str]:
    return [str(message["content"]) for message in messages if message["role"] == "user"]


def test_some_demonstrations_follow_an_earlier_exchange() -> None:
    made = synthesise(SFTConfig(conversations=400, follow_ups=0.25, seed=1), Console())
    asked = [questions(c.messages) for c in made]
    assert len(made) == 400
    assert 60 < sum(len(q) == 2 for q in asked) < 140
    assert {len(q) for q in asked} == {1, 2}
    assert all(c.messages[-1]["role"] == "assistant" and "tool_calls" not in c.messages[-1] for c in made)
    assert all(len(set(q)) == len(q) for q in asked)


def test_demonstrations_keep_to_their_phrasings_and_the_seed() -> None:
    settings = SFTConfig(conversations=300, follow_ups=0.5, phrasings=1)
    made = synthesise(settings, Console())
    wordings = {re.sub(r"\d+", "N", q) for c in made for q in questions(c.messages) if "(" not in q}
    assert wordings == {f"What is N {symbol} N?" for symbol in ("+", "-", "*", "//", "%")}
    assert made == synthesise(settings, Console())
    assert made != synthesise(settings.model_copy(update={"seed": 1}), Console())


def test_no_follow_ups_when_none_are_asked_for() -> None:
    made = synthesise(SFTConfig(conversations=50, follow_ups=0.0), Console())
    assert all(len(questions(c.messages)) == 1 for c in made)


def test_all_that_is_left_out_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = BadLines()
    bad.leave_out("binary.md", "contains null")
    for number in range(1, 1235):
        bad.add(tmp_path / "rows.jsonl", number, "not JSON")
    data = SimpleNamespace(record={"sources": total([bad.record()])})
    monkeypatch.setattr(stages, "prepare", lambda *given, **named: data)
    stages.prepare_data(tmp_path, PrepareConfig(), Console(), context=64)
    assert "files left out: 1, lines that cannot be used: 1,234, such as " in capsys.readouterr().out


def test_a_stage_refuses_other_content_at_the_same_place(tmp_path: Path) -> None:
    source, run = tmp_path / "source.txt", RunDir(tmp_path / "run")
    source.write_text("one", encoding="utf-8")
    settings = EvalConfig()
    assert stage(run, settings, lambda: {"made": 1}, Console(), text=source)["made"] == 1
    assert stage(run, settings, lambda: {"made": 2}, Console(), text=source)["made"] == 1
    source.write_text("two", encoding="utf-8")
    with pytest.raises(ConfigError, match="content of text"):
        stage(run, settings, lambda: {"made": 2}, Console(), text=source)


DAMAGE = ["", '{"made', "[1]", "null", "5"]


@pytest.mark.parametrize("content", DAMAGE)
def test_a_damaged_done_file_is_none(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "done.json").write_text(content)
    assert stage(run, EvalConfig(), lambda: {"made": 1}, Console())["made"] == 1
    assert "done.json is damaged" in capsys.readouterr().out
    assert stage(run, EvalConfig(), lambda: {"made": 2}, Console())["made"] == 1


@pytest.mark.parametrize("content", DAMAGE)
def test_damaged_inputs_are_named(tmp_path: Path, content: str) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "inputs.json").write_text(content)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"inputs\.json is damaged.* delete that file if it was preset=small"):
        stage(run, EvalConfig(), lambda: {"made": 1}, Console(), preset="small")
    assert not (tmp_path / "done.json").exists()


def test_a_model_is_on_the_disk_before_it_is_published(
    micro_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, out = load_model(micro_checkpoint), load_tokenizer(micro_checkpoint), tmp_path / "model"
    publish(model, tokenizer, out)
    order: list[int | str] = []  # inodes of what is flushed, names of what is renamed to
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: (order.append(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(Path, "rename", lambda path, new: (order.append(new.name), rename(path, new)))
    publish(model, tokenizer, out)
    published = order.index("model")
    for path in (out, *out.iterdir()):
        assert path.stat().st_ino in order[:published], path
    assert tmp_path.stat().st_ino in order[published:]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_moved_run_is_still_done(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "source.txt").write_text("one", encoding="utf-8")
    stage(
        RunDir(tmp_path / "a" / "run"), EvalConfig(), lambda: {"made": 1}, Console(), text=tmp_path / "a" / "source.txt"
    )
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    again = stage(
        RunDir(tmp_path / "b" / "run"), EvalConfig(), lambda: {"made": 2}, Console(), text=tmp_path / "b" / "source.txt"
    )
    assert again["made"] == 1


def test_a_start_that_failed_before_anything_was_computed_binds_nobody(tmp_path: Path) -> None:
    run, console = RunDir(tmp_path / "run"), Console(tmp_path / "run" / "console.log")
    first, second = EvalConfig(problems=3), EvalConfig(problems=4)

    def fail() -> dict[str, object]:
        raise ConfigError("no such model")

    def fail_late() -> dict[str, object]:
        run.metrics.log(1, loss=1.0)
        return fail()

    with pytest.raises(ConfigError, match="no such model"):
        stage(run, first, fail, console, model=tmp_path / "a")
    with pytest.raises(ConfigError, match="no such model"):
        stage(run, second, fail_late, console, model=tmp_path / "b")
    with pytest.raises(ConfigError, match="problems: 4 in the folder, 3 now"):
        stage(run, first, fail, console, model=tmp_path / "b")
    with pytest.raises(ConfigError, match=r"model='\.\./b', not '\.\./a'"):
        stage(run, second, fail, console, model=tmp_path / "a")
    stage(run, second, dict, console, model=tmp_path / "b")
