from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from step35.cli import charts
from step35.cli.report import PANELS, build_report
from step35.errors import Step35Error
from step35.runtime.rundir import RunDir

VOID = {"meta", "br"}
LOADING = {"src", "href", "xlink:href", "data", "action", "poster", "srcset"}
NASTY = "<script>alert('x')</script> & see https://example.org"


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would show or load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.shown = ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in LOADING]
        self.loads += [url for _, value in attrs for url in re.findall(r"url\(([^)]*)\)", value or "")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.shown += data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return whole_run(tmp_path / "demo")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The report of a whole run, built once."""
    return build_report(whole_run(tmp_path_factory.mktemp("report") / "demo"))


def whole_run(path: Path) -> Path:
    """Write a run as the demo leaves it."""
    run = RunDir(path)
    run.write_config({"seed": 0, "note": NASTY})
    run.write_env()
    run.write_json(
        "summary.json",
        {
            "val_loss": 2.5,
            "unigram_loss": 6.1,
            "bigram_loss": 4.2,
            "acc_sft": 0.6,
            "acc_rl": 0.8,
            "spec_equal": True,
        },
    )
    sample = {"model": "rl", "question": "1 + 1?", "text": NASTY, "answer": "2", "correct": True}
    row = {
        "model": "sft",
        "mode": "greedy",
        "n": 200,
        "correct": 120,
        "accuracy": 0.6,
        "low": 0.53,
        "high": 0.66,
    }
    run.write_json(
        "eval.json",
        {
            "accuracy": [row],
            "accept_by_depth": {"sft": [0.7, 0.5], "rl": [0.8, 0.6]},
            "speed": {
                "plain_tokens_per_s": 50.0,
                "speculative_tokens_per_s": 80.0,
                "speedup": 1.6,
                "equal": True,
            },
            "transcripts": [sample],
        },
    )
    RunDir(run.path / "data").write_json(
        "prepare.json",
        {
            "sources": [{"name": "code", "licence": "PSF", "tokens": 1000}],
            "skipped": {"no_licence": 7},
            "unigram_loss": 6.1,
            "bigram_loss": 4.2,
        },
    )
    for stage in ("train", "sft"):
        RunDir(run.path / stage).write_json("done.json", {"steps": 20, "seconds": 1.5})
        metrics = RunDir(run.path / stage).metrics
        for step in range(1, 21):
            metrics.log(
                step, loss=6 / step, mtp_loss=[7 / step, 8 / step], lr=0.01,
                grad_norm=float("inf") if step == 3 else 1.0, tokens_per_s=900.0, balance_loss=0.1,
                load_cv=0.3, dead_experts=0, clip_share=0.0,
            )  # fmt: skip
            if step % 10 == 0:
                table = [[0.25 + 0.01 * layer * expert for expert in range(4)] for layer in range(3)]
                metrics.log(step, val_loss=5 / step, expert_load=table, expert_output=table, expert_rms=table)
    rl = RunDir(run.path / "rl").metrics
    for step in range(1, 6):
        rl.log(
            step, reward=step / 5, accept_tokens=0.9, accept_trajectories=0.8, entropy=1.0, grad_norm=1.0,
            value_loss=0.2, ratio_mean=1.0, ratio_min=0.5, ratio_max=2.0, kl=0.01, truncation_rate=0.1,
            mtp_loss=[0.5, 0.6], response_tokens=30.0, tool_errors=0, lr=1e-4,
        )  # fmt: skip
    return run.path


def panels(text: str) -> dict[str, str]:
    return dict(re.findall(r"<section><h2>(.*?)</h2>(.*?)</section>", text, flags=re.DOTALL))


def test_every_panel_is_filled(report):
    text = report.read_text()
    assert report.name == "report.html"
    found = panels(text)
    assert list(found) == [title for title, _ in PANELS]
    assert "not run yet" not in text
    assert "cannot be shown" not in text
    shown = Page(text).shown
    for part in (
        "train: loss", "sft: loss", "val_loss", "mtp_loss 2", "unigram_loss", "bigram_loss",
        "learning rate", "gradient norm", "expert load at step 20", "load CV", "expert output norm",
        "expert activation RMS", "rl: reward", "entropy", "accept_trajectories", "ratio_max",
        "rl: loss of the MTP modules", "truncation rate", "value loss", "0.53 – 0.66", "accepted drafts",
        "speculative_tokens_per_s", "PSF", "no_licence", "cores",
    ):  # fmt: skip
        assert part in shown, part


def test_page_loads_nothing_from_anywhere(report):
    text = report.read_text()
    page = Page(text)
    assert page.loads
    assert all(load.startswith(("#", "data:image/png;base64,")) for load in page.loads)
    assert not set(page.tags) & {"script", "link", "iframe", "img", "object", "embed", "base"}
    assert "@import" not in text
    addresses = re.findall(r"https?://[\w.]+", text)
    assert set(addresses) == {"https://example.org"}  # from the transcript and the settings, as text only


def test_transcripts_are_escaped(report):
    text = report.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#x27;x&#x27;)" in panels(text)["Sample transcripts"]
    assert NASTY in Page(text).shown


def test_charts_follow_the_colour_of_the_page(report):
    text = report.read_text()
    assert "currentColor" in text
    assert "#1a2b3c" not in text


def test_an_empty_run_says_not_run_yet(tmp_path):
    text = build_report(tmp_path).read_text()
    Page(text)
    assert text.count("not run yet") == len(PANELS)


def test_report_after_the_first_stage(run):
    for stage in ("sft", "rl"):
        (run / stage / "metrics.jsonl").unlink()
    (run / "eval.json").unlink()
    (run / "summary.json").unlink()
    found = panels(build_report(run).read_text())
    assert "not run yet" in found["Reinforcement learning"]
    assert "not run yet" in found["Accuracy"]
    assert "<svg" in found["Loss"]
    assert "unigram" not in found["Loss"]
    assert "sft: loss" not in found["Loss"]


def test_a_run_of_one_stage(run):
    assert "rl: reward" in build_report(run / "rl").read_text()


def test_damaged_and_foreign_files_spoil_only_their_panel(run):
    (run / "summary.json").write_text('{"val_loss":')
    (run / "eval.json").write_text(json.dumps({"accuracy": [3], "accept_by_depth": {"rl": [0.5]}}))
    (run / "rl" / "metrics.jsonl").write_text("nonsense\n{}\n")
    text = build_report(run).read_text()
    assert "summary.json cannot be read" in text
    assert "line 1 is not a JSON object" in text
    assert "cannot be shown" in panels(text)["Accuracy"]
    assert "<svg" in panels(text)["Acceptance by MTP depth"]


def test_without_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Step35Error, match=r"pip install \"step35\[report\]\""):
        build_report(run)


def test_the_running_mean_leaves_gaps_out() -> None:
    values = [1.0, 2.0, 3.0, math.nan, 5.0]
    assert charts.running_mean(values, width=3) == [1.5, 2.0, 2.5, 4.0, 5.0]
    assert math.isnan(charts.running_mean([math.nan] * 3)[1])


def test_a_recipe_shows_its_stages_in_order_with_their_probes(tmp_path):
    for name in ("10-sft", "2-long", "1-short"):
        stage = RunDir(tmp_path / name)
        stage.metrics.log(1, loss=2.0)
        probes = [{"context": 1024, "accuracy": 0.5, "by_depth": [0.5, None]}]
        stage.write_json("done.json", {"steps": 1, "val_loss": 2.5, "needles_after": probes, "acceptance_after": [0.8]})
    found = panels(build_report(tmp_path).read_text())
    order = re.findall(r"<td>(\d+-\w+)</td>", found["Stages"])
    assert order == ["1-short", "2-long", "10-sft"]
    assert found["Stages"].count("needles found after, by depth (rows: 1024)") == 3
    assert found["Loss"].count("2-long: loss") == 1
    assert "cannot be shown" not in "".join(found.values())
