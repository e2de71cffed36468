from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import tyro

from step35.cli import runs
from step35.errors import ConfigError, DataError, Step35Error
from step35.runtime.rundir import RunDir


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A demo with two stages, and a model exported beside its checkpoints."""
    root = tmp_path / "runs"
    RunDir(root / "demo").write_env()
    train = RunDir(root / "demo" / "train")
    train.events.event("resume", step=2)
    for step in range(1, 6):
        train.metrics.log(step, loss=6.0 - step, lr=0.01, mtp_loss=[1.0])
    rl = RunDir(root / "demo" / "rl")
    rl.metrics.log(1, reward=0.25)
    exported = root / "demo" / "train" / "checkpoints" / "export"
    exported.mkdir(parents=True)
    (exported / "metrics.jsonl").write_text("")
    (root / "demo" / "model").mkdir()
    (root / "demo" / "model" / "config.json").write_text("{}")
    return root


def command(*args: str) -> int:
    return runs.main(tyro.cli(runs.Args, args=list(args)))


def test_list_shows_stages_as_runs_of_their_own(root, capsys):
    assert command("list", "--root", str(root)) == 0
    out = capsys.readouterr().out
    assert [path.relative_to(root).as_posix() for path in runs.find_runs(root)] == [
        "demo",
        "demo/rl",
        "demo/train",
    ]
    row = next(line for line in out.splitlines() if "demo/train" in line)
    assert "loss 1" in row
    assert " 5 " in row
    assert "reward 0.25" in out


def test_list_without_runs(tmp_path, capsys):
    command("list", "--root", str(tmp_path / "none"))
    assert "step35 demo" in capsys.readouterr().out


def test_show(root, capsys):
    command("show", "demo/train", "--root", str(root))
    out = capsys.readouterr().out
    assert "metrics at step 5" in out
    assert "resume" in out
    assert "step=2" in out
    assert "metrics.jsonl" in out
    command("show", str(root / "demo"))
    assert "cores" in capsys.readouterr().out


def test_files_that_a_live_run_takes_away_meanwhile(root, capsys, monkeypatch):
    gone = root / "demo" / "train" / "metrics.jsonl.tmp-1"
    gone.write_text("")
    stat = Path.stat

    def racing(path: Path, **options):
        if path == gone:
            gone.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", racing)
    for arguments in (["list"], ["show", "demo/train"]):
        gone.write_text("")
        assert command(*arguments, "--root", str(root)) == 0
    out = capsys.readouterr().out
    assert "demo/rl" in out
    assert "metrics.jsonl" in out
    assert gone.name not in out


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_a_damaged_record_is_named_and_the_rest_shown(root, capsys, content):
    (root / "demo" / "train" / "env.json").write_text(content)
    (root / "demo" / "train" / "summary.json").write_text(content)
    command("show", "demo/train", "--root", str(root))
    out = capsys.readouterr().out
    assert "env.json is damaged" in out
    assert "summary.json is damaged" in out
    assert "metrics at step 5" in out


def test_a_damaged_log_hides_no_other_run(root, capsys):
    with open(root / "demo" / "train" / "metrics.jsonl", "a") as file:
        file.write("nonsense\n{}\n")
    command("list", "--root", str(root))
    lines = capsys.readouterr().out.splitlines()
    assert any("demo/train" in line and "metrics.jsonl is damaged" in line for line in lines)
    assert any("demo/rl" in line and "reward 0.25" in line for line in lines)
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 6 is not a JSON object"):
        command("show", "demo/train", "--root", str(root))


def test_unknown_run_is_answered_with_the_known_ones(root):
    with pytest.raises(ConfigError, match="Did you mean 'demo/train'"):
        command("show", "demo/trian", "--root", str(root))


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot_writes_an_image(root, kind):
    command("plot", "demo/train", "--root", str(root), "--keys", "loss,lr", "--format", kind)
    content = (root / "demo" / "train" / f"plot.{kind}").read_bytes()
    assert (b"PNG" in content[:8]) == (kind == "png")
    assert len(content) > 2000


def test_plot_in_the_terminal(root, capsys):
    command("plot", "demo/train", "--root", str(root), "--terminal")
    assert "loss █▆▅▃▁ 5 to 1" in capsys.readouterr().out


def test_plot_of_an_unknown_metric(root):
    with pytest.raises(ConfigError, match=r"'los' is not a metric.*Did you mean 'loss'"):
        command("plot", "demo/train", "--root", str(root), "--keys", "los")
    with pytest.raises(ConfigError, match=r"no metrics of its own.*demo/train"):
        command("plot", "demo", "--root", str(root))


def test_plot_without_matplotlib(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Step35Error, match=r"pip install \"step35\[report\]\""):
        command("plot", "demo/train", "--root", str(root))


def test_sparkline():
    assert runs.sparkline([0.0, 1.0, math.nan, 0.5]) == "▁█·▅"
    assert runs.sparkline([2.0, 2.0]) == "▁▁"
    assert runs.sparkline([math.nan]) == "·"
    assert len(runs.sparkline([float(n) for n in range(1000)])) <= 60
