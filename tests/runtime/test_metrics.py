from __future__ import annotations

import json
import math
from pathlib import Path

import numpy
import pytest
import torch

from step35.errors import DataError, DiskFullError
from step35.runtime.metrics import EventsLog, MetricsLog, read_metrics


def test_log_and_read_back(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log(1, loss=1 / 3, tokens=12345678901, load=[[0.5, 0.25], (1, 2)], note=None, ok=True)
    record = read_metrics(log.path)[0]
    assert record.pop("time") > 1.6e9
    assert record == {
        "step": 1,
        "loss": 0.333333,
        "tokens": 12345678901,
        "load": [[0.5, 0.25], [1, 2]],
        "note": None,
        "ok": True,
    }


def test_tensor_and_array_values(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log(torch.tensor(3), a=torch.tensor(1.5), b=numpy.float32(0.1), c=[torch.ones(2), numpy.arange(2)])
    record = read_metrics(log.path)[0]
    assert (record["step"], record["a"], record["b"], record["c"]) == (3, 1.5, 0.1, [[1.0, 1.0], [0, 1]])


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log(1, loss=math.nan, norms=[torch.tensor(math.inf), -math.inf])

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads(log.path.read_text(), parse_constant=refuse)
    record = read_metrics(log.path)[0]
    assert math.isnan(record["loss"])
    assert record["norms"] == [math.inf, -math.inf]


def test_torn_last_line_is_ignored_then_repaired(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1]
    log = MetricsLog(path)
    log.log(2, loss=2.0)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert len(read_metrics(path)) == 2
    MetricsLog(path).log(3)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)


def test_truncate_after_drops_later_steps_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.log(step, loss=step / 7)
    before = path.read_text().splitlines()
    with open(path, "a") as file:
        file.write('{"step": 3, "torn')
    log.truncate_after(3)
    assert path.read_text().splitlines() == before[:3]  # the kept lines are untouched
    log.log(4)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]


def test_missing_file_has_no_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    MetricsLog(path).truncate_after(0)
    assert not path.exists()


def test_events(tmp_path):
    log = EventsLog(tmp_path / "events.jsonl")
    log.event("resume", step=4, path=Path("a/b"))
    record = json.loads(log.path.read_text())
    assert (record["kind"], record["step"], record["path"]) == ("resume", 4, "a/b")
    assert record["time"] > 1.6e9


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=r"metrics\.jsonl"):
        MetricsLog(path).log(1, loss=1.0)
