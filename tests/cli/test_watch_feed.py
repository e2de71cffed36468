"""What the page is told of a run: curves that keep their spikes, panels, alarms, and whether it still runs."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step35.cli import watch_feed
from step35.cli.watch_facts import facts, status_of
from step35.cli.watch_feed import Curve, Feed, bucket_width
from step35.runtime.rundir import RunDir
from step35.train.monitors.experts import expert_panels

END = 2**32 - 2


def curve(values) -> Curve:
    made = Curve()
    for step, value in enumerate(values, start=1):
        made.add(step, float(value))
    return made


def test_a_short_curve_is_given_as_it_is():
    found = curve([3, 2, 1]).window(0, END, 10)
    assert found == {"first": [1, 2, 3], "mean": [3, 2, 1], "bad": []}


def test_a_spike_of_one_step_survives_a_million():
    values = np.sin(np.arange(1_000_000) / 1e5)
    values[654_321] = 50.0
    values[123_456] = -50.0
    made = Curve()
    made.steps.extend(range(1_000_000))
    made.values.extend(values)
    begun = time.perf_counter()
    found = made.window(0, END, 400)
    assert time.perf_counter() - begun < 2
    assert len(found["first"]) <= 400
    assert (max(found["high"]), min(found["low"])) == (50, -50)
    place = found["high"].index(50)
    assert found["first"][place] <= 654_321 <= found["last"][place]
    close = made.window(found["first"][place], found["last"][place], 4096)  # zoomed in, it has its own step
    assert (close["first"][close["mean"].index(50)], close["bad"]) == (654_321, [])


@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=300),
    points=st.integers(1, 40),
)
def test_buckets_against_a_plain_loop(values, points):
    found = curve(values).window(0, END, points)
    width = bucket_width(len(values), points)
    parts = [values[i : i + width] for i in range(0, len(values), width)]
    assert len(parts) <= points
    assert found["first"] == [1 + width * i for i in range(len(parts))]
    kept = [[v for v in part if np.isfinite(v)] for part in parts]
    expected = [np.mean(part) if part else None for part in kept]
    assert found["mean"] == [None if v is None else pytest.approx(v, rel=1e-5) for v in expected]
    if width > 1:
        assert found["low"] == [pytest.approx(min(part), rel=1e-5) if part else None for part in kept]
        assert found["high"] == [pytest.approx(max(part), rel=1e-5) if part else None for part in kept]
    assert found["bad"] == [step for step, v in enumerate(values, start=1) if not np.isfinite(v)][:100]


def test_buckets_stay_where_they_are_while_the_curve_grows():
    made = curve(range(1000))
    before = made.window(500, END, 100)
    for step in range(1001, 1201):
        made.add(step, 7.0)
    after = made.window(500, END, 100)
    assert after["first"][: len(before["first"])] == before["first"]
    assert after["mean"][: len(before["mean"]) - 1] == before["mean"][:-1]


def test_a_window_holds_its_steps():
    found = curve(range(1, 101)).window(20, 29, 400)
    assert found["first"] == list(range(20, 30))
    assert curve([1.0]).window(5, 9, 400)["first"] == []


def test_a_value_beyond_float32_counts_as_infinite():
    assert curve([1.0, 1e300]).window(0, END, 9) == {"first": [1, 2], "mean": [1.0, None], "bad": [2]}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.write_config({"steps": 100})
    run.events.event("started")
    for step in range(1, 11):
        run.metrics.log(step, loss=1 / step, **({"rms": [[1.0, step], [0.0, "nan"]]} if step % 5 == 0 else {}))
    return run


def test_facts(run):
    (run.checkpoints / "step_4").mkdir(parents=True)
    (run.checkpoints / "step_10").mkdir()
    (run.checkpoints / "step_12.tmp-3").mkdir()
    feed = Feed(run.path)
    feed.poll()
    found = facts(feed)
    json.dumps(found, allow_nan=False)
    assert (found["status"], found["step"], found["steps"]) == ("running", 10, 100)
    assert found["checkpoints"] == [4, 10]
    assert found["last"] == {"loss": 0.1, "rms/min": 0, "rms/median": 1, "rms/max": 10}
    assert found["panel_records"] == 2
    assert found["bad_lines"] == 0


def test_the_last_value_is_not_rounded(tmp_path):
    run = RunDir(tmp_path)
    run.metrics.log(1, tokens=2_415_919_104, loss=0.1, bad=math.nan)
    feed = Feed(run.path)
    feed.poll()
    assert facts(feed)["last"] == {"tokens": 2_415_919_104, "loss": 0.1, "bad": "nan"}


def test_pace_and_time_left_follow_the_latest_records(run):
    for step in range(11, 31):
        with open(run.metrics.path, "a") as file:
            file.write(json.dumps({"step": step, "time": 1000.0 + 2 * step}) + "\n")
    feed = Feed(run.path)
    feed.poll()
    found = facts(feed)
    assert (found["seconds_per_step"], found["seconds_left"]) == (2.0, 140.0)


def test_panels_are_read_from_their_place_in_the_file(run):
    feed = Feed(run.path)
    feed.poll()
    assert feed.panels(1) == {
        "step": 10, "layers": None,
        "panels": {"rms": {"column": "expert", "rows": [[1.0, 10], [0.0, None]], "low": 0.0, "high": 10.0}},
    }  # fmt: skip
    assert feed.panels(0)["step"] == 5
    assert feed.panels(2) is None
    run.metrics.truncate_after(4)  # under our feet, before the next poll
    assert feed.panels(1) is None


def test_every_panel_says_what_its_columns_are(tmp_path):
    run = RunDir(tmp_path)
    sums = {3: torch.ones(8, 5), 4: torch.ones(8, 5)}
    run.metrics.log(1, **expert_panels(sums, groups=2))
    feed = Feed(run.path)
    feed.poll()
    panels = feed.panels(0)["panels"]
    assert {key: (panel["column"], len(panel["rows"][0])) for key, panel in panels.items()} == {
        "expert_load": ("expert", 8), "group_load": ("EP group", 2), "expert_rms": ("expert", 8),
        "expert_output": ("expert", 8), "expert_clip": ("expert", 8),
    }  # fmt: skip


def test_a_rewritten_log_is_read_anew(run):
    feed = Feed(run.path)
    feed.poll()
    run.metrics.truncate_after(6)
    run.metrics.log(7, loss=9.0)
    feed.poll()
    assert (feed.step, feed.records, len(feed.spots), feed.generation) == (7, 7, 1, 2)
    assert list(feed.curves["loss"].steps) == list(range(1, 8))


def test_damaged_lines_are_counted_and_left_out(run):
    with open(run.metrics.path, "a") as file:
        file.write('nonsense\n[1]\n{"step": "x"}\n{"step": -1}\n{"step": 11, "loss": 0.5}\n{"step": 12, "lo')
    feed = Feed(run.path)
    feed.poll()
    assert (feed.bad_lines, feed.step) == (4, 11)


def test_alarms_are_counted_and_the_newest_kept(run, monkeypatch):
    monkeypatch.setattr(watch_feed, "EVENTS_KEPT", 5)
    feed = Feed(run.path)
    for step in range(20):
        run.events.event("alarm", alarm="loss_spike", step=step, action="skip")
        run.events.event("batch_skipped", step=step)
    feed.poll()
    found = facts(feed)
    assert found["alarm_counts"] == {"loss_spike": 20}
    assert [alarm["step"] for alarm in found["alarms"]] == [15, 16, 17, 18, 19]
    assert {event["kind"] for event in found["events"]} == {"batch_skipped"}


def test_status(run):
    feed = Feed(run.path)
    feed.poll()
    now = time.time()
    assert status_of(feed, now).word == "running"
    assert status_of(feed, now + 3600).word == "stalled"
    for kind, word in (("interrupted", "interrupted"), ("resumed", "running"), ("stopped", "stopped")):
        run.events.event(kind)
        run.events.event("checkpoint_failed")  # says nothing about that
        feed.poll()
        assert status_of(feed, now).word == word
    run.write_json("done.json", {})
    assert status_of(feed, now + 3600).word == "finished"
    empty = Feed(run.path / "nowhere")
    empty.poll()
    assert status_of(empty, now).word == "empty"


def test_a_slow_run_is_given_more_patience(run):
    with open(run.metrics.path, "a") as file:
        file.writelines(json.dumps({"step": step, "time": 600.0 * step}) + "\n" for step in range(11, 80))
    feed = Feed(run.path)
    feed.poll()
    written = os.stat(run.metrics.path).st_mtime
    assert status_of(feed, written + 3600).word == "running"
    assert status_of(feed, written + 7200).word == "stalled"
