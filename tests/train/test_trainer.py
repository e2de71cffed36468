"""Interruption: a run that was stopped, however, ends bit for bit where an unbroken one ends."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from step35.config.train import MuonConfig, TrainConfig
from step35.data.packing import Batch
from step35.errors import CheckpointError
from step35.model.step35 import Step35
from step35.runtime import checkpoint
from step35.runtime.console import Console
from step35.runtime.metrics import read_metrics
from step35.runtime.rundir import RunDir
from step35.train.trainer import train

CONFIG = TrainConfig(
    steps=7, batch_rows=2, micro_rows=1, context=16, warmup_steps=2, lr=0.01, mtp_joint_from=4, dtype="float32",
    checkpoint_every=3, validate_every=3, monitor_every=3,
)  # fmt: skip


class StoppedError(Exception):
    """The machine went away."""


class FakeLoader:
    """Two rows a step; before the rows of step `at`, `stop` is called."""

    def __init__(self, make_batch: Callable[..., Batch], at: int = -1, stop: Callable[[], None] = lambda: None) -> None:
        self.make_batch, self.at, self.stop = make_batch, at, stop

    def rows(self, first: int, count: int) -> Batch:
        if first == 2 * self.at:
            self.stop()
        return self.make_batch(rows=count, tokens=16, seed=first // 2)


Start = Callable[..., Step35]


@pytest.fixture
def start(make_model: Callable[..., Step35], make_batch: Callable[..., Batch]) -> Start:
    """Return a function that trains in a folder with everything made anew, as a new process would."""

    def start(
        folder: Path,
        at: int = -1,
        stop: Callable[[], None] = lambda: None,
        former: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Step35:
        model = make_model()
        loader = FakeLoader(make_batch, at, stop)
        config = CONFIG.model_copy(update=changes)
        train(model, loader, config, RunDir(folder), Console(), name="train", validate=lambda: 1.5, start=former)
        return model

    return start


def kill() -> None:
    raise StoppedError


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def leaves(value: Any, where: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries and lists."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in leaves(inner, f"{where}/{key}").items()}
    return {where: value}


def final_state(folder: Path) -> dict[str, Any]:
    return leaves(checkpoint.load(folder / "checkpoints" / "step_7"))


def logged(folder: Path) -> list[dict[str, Any]]:
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in ("time", "tokens_per_s")} for record in records]


def assert_same_run(ours: Path, theirs: Path) -> None:
    state, expected = final_state(ours), final_state(theirs)
    assert state.keys() == expected.keys()
    assert any(key.endswith("/momentum") for key in state)
    assert any(key.endswith("/exp_avg_sq") for key in state)
    for key, value in expected.items():
        same = torch.equal(state[key], value) if isinstance(value, torch.Tensor) else state[key] == value
        assert same, key
    assert logged(ours) == logged(theirs)
    assert [record["step"] for record in logged(ours)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_killed_run_resumes_as_if_unbroken(start: Start, tmp_path: Path, at: int) -> None:
    # Killed right after a checkpoint (3), or with steps in the log that must be replayed (4 and 5, where the
    # later MTP modules join at step 4).
    start(tmp_path / "unbroken")
    with pytest.raises(StoppedError):
        start(tmp_path / "broken", at, kill)
    assert [record["step"] for record in logged(tmp_path / "broken")] == list(range(1, at + 1))
    assert checkpoint.latest(tmp_path / "broken" / "checkpoints") == tmp_path / "broken" / "checkpoints" / "step_3"
    model = start(tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
    assert torch.equal(model.lm_head.weight, final_state(tmp_path / "unbroken")["/model/lm_head.weight"])


def test_a_killed_run_of_bf16_weights_resumes_from_its_masters(start: Start, tmp_path: Path) -> None:
    start(tmp_path / "unbroken", param_dtype="bfloat16")
    with pytest.raises(StoppedError):
        start(tmp_path / "broken", 4, kill, param_dtype="bfloat16")
    model = start(tmp_path / "broken", param_dtype="bfloat16")
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
    master = final_state(tmp_path / "unbroken")["/model/lm_head.weight"]
    assert master.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, master.bfloat16())


def test_ctrl_c_saves_the_step_and_then_interrupts(start: Start, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    start(tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "broken", 4, interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.latest(tmp_path / "broken" / "checkpoints") == tmp_path / "broken" / "checkpoints" / "step_5"
    events = read_metrics(tmp_path / "broken" / "events.jsonl")
    assert [(event["kind"], event.get("step")) for event in events] == [("interrupted", 5)]
    start(tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
    events = read_metrics(tmp_path / "broken" / "events.jsonl")
    assert [(event["kind"], event.get("step")) for event in events] == [("interrupted", 5), ("resumed", 5)]


def test_a_second_ctrl_c_interrupts_at_once(start: Start, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def twice() -> None:
        interrupt()
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, 1, twice)
    assert checkpoint.latest(tmp_path / "checkpoints") is None
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_does_nothing(start: Start, tmp_path: Path) -> None:
    start(tmp_path)
    before = logged(tmp_path)
    model = start(tmp_path, 0, kill)
    assert logged(tmp_path) == before
    assert torch.equal(model.lm_head.weight, final_state(tmp_path)["/model/lm_head.weight"])


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path / "unbroken")
    start(tmp_path / "broken")
    (tmp_path / "broken" / "checkpoints" / "step_7" / "__0_0.distcp").write_bytes(b"half")
    start(tmp_path / "broken")
    output = capsys.readouterr().out
    assert "its manifest says" in output
    assert "Going back to step_6." in output
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
    kinds = [event["kind"] for event in read_metrics(tmp_path / "broken" / "events.jsonl")]
    assert kinds == ["checkpoint_skipped", "resumed"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(start: Start, tmp_path: Path) -> None:
    start(tmp_path, steps=3)
    for path in (tmp_path / "checkpoints").glob("step_*"):
        (path / "state.json").write_bytes(b"half")
    with pytest.raises(CheckpointError):
        start(tmp_path)


def test_validation_and_panels_are_logged_when_due(start: Start, tmp_path: Path) -> None:
    start(tmp_path)
    records = logged(tmp_path)
    assert [r["step"] for r in records if "val_loss" in r] == [3, 6, 7]
    assert [r["step"] for r in records if "expert_load" in r] == [3, 6, 7]
    assert [r["tokens"] for r in records] == [32 * step for step in range(1, 8)]
    assert [len(r["mtp_loss"]) for r in records] == [1, 1, 1, 1, 2, 2, 2]


def test_a_stage_takes_up_the_weights_and_moments_of_another_also_with_a_frozen_router(
    start: Start, tmp_path: Path
) -> None:
    start(tmp_path / "first")
    former = checkpoint.load(tmp_path / "first" / "checkpoints" / "step_7")
    start(tmp_path / "second", former=former, freeze_router=True, steps=1, lr=1e-9, warmup_steps=0)
    second = checkpoint.load(tmp_path / "second" / "checkpoints" / "step_1")
    for name, tensor in former["model"].items():
        if "router" in name:
            assert torch.equal(second["model"][name], tensor), name
        else:
            torch.testing.assert_close(second["model"][name], tensor, rtol=0, atol=1e-7)
    momenta = [s["momentum"] for s in former["optimisers"][0]["state"].values()]
    later = [s["momentum"] for s in second["optimisers"][0]["state"].values()]
    # One step keeps 95% of the momentum; from nothing it would be 5% of a gradient.
    assert all(float((new * old).sum() / (old * old).sum()) > 0.8 for new, old in zip(later, momenta, strict=True))


def test_a_stage_trains_with_settings_of_its_own(start: Start, tmp_path: Path) -> None:
    start(tmp_path / "first")
    former = checkpoint.load(tmp_path / "first" / "checkpoints" / "step_7")
    changes = {"weight_decay": 0.0, "optim": MuonConfig(momentum=0.0, adamw_betas=(0.1, 0.2)), "steps": 1}
    start(tmp_path / "second", former=former, **changes)
    state = checkpoint.load(tmp_path / "second" / "checkpoints" / "step_1")
    muon, adamw = (optimiser["param_groups"] for optimiser in state["optimisers"])
    assert (muon[0]["momentum"], muon[0]["weight_decay"]) == (0.0, 0.0)
    assert [tuple(group["betas"]) for group in adamw] == [(0.1, 0.2)] * 2
    assert state["dtype"] == "float32"
    rounded = start(tmp_path / "third", former=former, dtype="bfloat16", steps=1)
    assert rounded.compute_dtype == torch.bfloat16
