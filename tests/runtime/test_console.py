from __future__ import annotations

import pytest
import rich.console

from step35.runtime import console as console_module
from step35.runtime.console import Console, duration, number


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console_module.time, "monotonic", clock.monotonic)
    return clock


def test_stage_shows_count_rate_eta_and_key(capsys, clock):
    with Console().stage("train", 100, "step") as stage:
        clock.now = 5.0
        stage.advance(10, key="loss 3.21")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train: 10/100 step  2 step/s  ETA 0:45  loss 3.21"
    assert lines[-1] == "train: 10/100 step in 0:05  loss 3.21"


def test_plain_lines_are_rare(capsys, clock):
    with Console().stage("train", 1000) as stage:
        for _ in range(1000):
            stage.advance()
    assert len(capsys.readouterr().out.splitlines()) == 11  # each tenth, and the last word


def test_slow_stage_speaks_every_five_seconds(capsys, clock):
    with Console().stage("rl", 1000) as stage:
        for _ in range(20):
            clock.now += 1.0
            stage.advance()
    assert len(capsys.readouterr().out.splitlines()) == 4 + 1


def test_resumed_stage_counts_from_done_and_rates_only_new_work(capsys, clock):
    with Console().stage("train", 100, done=50) as stage:
        clock.now = 10.0
        stage.advance(10)
    out = capsys.readouterr().out
    assert "resumed at 50/100" in out
    assert "60/100 step  1 step/s  ETA 0:40" in out


def test_failed_stage_says_where(capsys, clock):
    def fail() -> None:
        with Console().stage("train", 4) as stage:
            stage.advance()
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert capsys.readouterr().out.splitlines()[-1] == "train: stopped at 1/4 step in 0:00"


def test_unknown_total(capsys, clock):
    with Console().stage("read", None, "file") as stage:
        clock.now = 6.0
        stage.advance(3)
    assert "read: 3 file  0.5 file/s" in capsys.readouterr().out


def test_log_gets_the_same_plain_text(tmp_path, capsys, clock):
    path = tmp_path / "console.log"
    console = Console(path)
    console.print("[bold]kept as it is[/bold] " + "x" * 200)
    console.warn("careful")
    console.table("models", ["name", "loss"], [["a[0]", 1.5], ["b", 12345.678]])
    with console.stage("train", 1) as stage:
        stage.advance(key="loss 1")
    text = path.read_text()
    assert text == capsys.readouterr().out
    assert "[bold]kept as it is[/bold] " + "x" * 200 + "\n" in text
    assert "warning: careful" in text
    assert "a[0]" in text
    assert "12345.7" in text
    assert "\x1b" not in text


def test_terminal_gets_a_bar_and_the_log_stays_plain(tmp_path, capsys, clock):
    path = tmp_path / "console.log"
    console = Console(path)
    console.screen = rich.console.Console(force_terminal=True, width=100)
    console.bars.live.console = console.screen
    with console.stage("outer", 2) as outer, console.stage("inner", 10) as inner:
        inner.advance(10, key="loss 2")
        outer.advance()
    assert not console.bars.tasks
    assert "━" in capsys.readouterr().out
    text = path.read_text()
    assert "inner: 10/10 step in 0:00  loss 2" in text
    assert "━" not in text
    assert "\x1b" not in text


def test_duration():
    assert [duration(7), duration(725), duration(11045)] == ["0:07", "12:05", "3:04:05"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.38512, "0.385"), (3.0, "3"), (12.46, "12.5"), (999.4, "999"), (1234.0, "1,230"), (4_182_345.0, "4,180,000")],
)
def test_rates_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert number(value) == text
