"""Injected faults: a NaN batch, unreadable data, an exploding expert, a broken update; and what becomes of the run."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from step35.config.stability import (
    AlarmConfig,
    DataAlarmConfig,
    LateAlarmConfig,
    NonFiniteAlarmConfig,
    StabilityConfig,
)
from step35.config.train import TrainConfig
from step35.data.loader import PretrainLoader
from step35.data.packing import Batch
from step35.data.shards import ShardWriter, TokenShards
from step35.errors import DataError, DivergedError
from step35.model.step35 import Step35
from step35.runtime import checkpoint
from step35.runtime.console import Console
from step35.runtime.metrics import read_metrics
from step35.runtime.rundir import RunDir
from step35.runtime.signals import Terminated
from step35.train import muon
from step35.train.monitors.monitor import Monitor
from step35.train.polar import polar_express
from step35.train.step import Learner
from step35.train.trainer import train

CONFIG = TrainConfig(
    steps=8, batch_rows=2, micro_rows=1, context=16, warmup_steps=2, lr=0.01, dtype="float32", balance_rate=0.01,
    checkpoint_every=3, monitor_every=3,
)  # fmt: skip
Fault = Callable[[Step35], None]


class FaultyLoader:
    """Random rows; `at` maps a row number to a fault in the model when it is first read, or to an error, always."""

    def __init__(self, model: Step35, make_batch: Callable[..., Batch], at: dict[int, Fault | DataError]) -> None:
        self.model, self.make_batch, self.at = model, make_batch, dict(at)
        self.read: list[int] = []

    def rows(self, first: int, count: int) -> Batch:
        self.read.append(first)
        for row in range(first, first + count):
            error = self.at.get(row)
            if isinstance(error, DataError):
                raise error
        fault = self.at.pop(first, None)
        if fault is not None:
            assert not isinstance(fault, DataError)
            with torch.no_grad():
                fault(self.model)
        return self.make_batch(rows=count, tokens=16, vocabulary=96, seed=first)


@pytest.fixture
def start(make_model: Callable[..., Step35], make_batch: Callable[..., Batch], tmp_path: Path) -> Callable[..., Any]:
    """Return a function that trains with faults; gives the model and the loader."""

    def start(at: dict[int, Fault | DataError], folder: str = "run", steps: int = 8, **stability: Any) -> Any:
        model = make_model()
        loader = FaultyLoader(model, make_batch, at)
        config = CONFIG.model_copy(update={"stability": StabilityConfig(**stability), "steps": steps})
        train(model, loader, config, RunDir(tmp_path / folder), Console(), name="train")
        return model, loader

    return start


def events(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "events.jsonl")


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl")]


def scale_expert(model: Step35) -> None:
    model.layers[3].moe.experts.down_proj[2] *= 1000


def break_head(model: Step35) -> None:
    model.lm_head.weight[0, 0] = math.nan


class NaNBatch:
    """Makes the embeddings of one micro-batch NaN, once."""

    def __init__(self) -> None:
        self.handle: Any = None

    def __call__(self, model: Step35) -> None:
        def poison(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            self.handle.remove()
            return output * math.nan

        self.handle = model.embed_tokens.register_forward_hook(poison)


def after_the_update(change: Fault) -> Fault:
    """Return a fault that strikes when the next optimiser has stepped."""

    def arm(model: Step35) -> None:
        @torch.no_grad()
        def strike(*unused: object) -> None:
            handle.remove()
            change(model)

        handle = register_optimizer_step_post_hook(strike)

    return arm


def snapshot(model: Step35) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_nan_batch_is_skipped_and_changes_nothing(start: Callable[..., Any], tmp_path: Path) -> None:
    before: dict[str, torch.Tensor] = {}

    def look(model: Step35) -> None:
        before.update(snapshot(model))
        NaNBatch()(model)

    def compare(model: Step35) -> None:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name  # router bias included
        before["compared"] = torch.ones(1)

    model, loader = start({8: look, 10: compare}, non_finite=NonFiniteAlarmConfig(action="skip"))
    assert "compared" in before
    assert loader.read == [0, 2, 4, 6, 8, 10, 12, 14, 16]  # one batch more than steps
    assert steps(tmp_path / "run") == list(range(1, 9))
    alarm, skipped = events(tmp_path / "run")
    assert list(alarm) == ["kind", "time", "alarm", "step", "value", "limit", "where", "cause", "remedy", "action"]
    assert (alarm["kind"], alarm["alarm"], alarm["step"], alarm["action"]) == ("alarm", "non_finite", 4, "skip")
    assert alarm["where"].startswith("micro-batch 0, gradient of ")
    assert (skipped["kind"], skipped["step"], skipped["row"]) == ("batch_skipped", 4, 10)
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "step_8")
    assert (state["step"], state["row"], state["skips"]) == (8, 18, 0)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_skipped_batch_leaves_no_trace_in_the_weights(
    start: Callable[..., Any], make_model: Callable[..., Step35], make_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    class Without(FaultyLoader):
        def rows(self, first: int, count: int) -> Batch:
            return super().rows(first if first < 8 else first + 2, count)

    skipping, _ = start({8: NaNBatch()}, non_finite=NonFiniteAlarmConfig(action="skip"))
    model = make_model()
    train(model, Without(model, make_batch, {}), CONFIG, RunDir(tmp_path / "without"), Console(), name="train")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, skipping.state_dict()[name]), name


def test_weights_that_are_broken_stop_after_so_many_skips(start: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"3 batches in a row .*newest checkpoint is .*step_3") as stopped:
        start({8: break_head}, non_finite=NonFiniteAlarmConfig(action="skip"), max_skips=2)
    assert stopped.value.exit_code == 3
    assert [e["kind"] for e in events(tmp_path / "run")] == ["alarm"] + ["batch_skipped"] * 3 + ["stopped"]
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step_3"


def test_stopping_is_the_default_for_nan_and_saves_nothing(start: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"step 4: non_finite: .*NaN or infinite.*action = skip.*step_3"):
        start({8: NaNBatch()})
    assert [e["kind"] for e in events(tmp_path / "run")] == ["alarm", "stopped"]
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    start({})  # the batch is sound in the second run, which goes on from the checkpoint
    assert steps(tmp_path / "run") == list(range(1, 9))


def test_an_exploding_expert_alarms_once(start: Callable[..., Any], tmp_path: Path) -> None:
    start({8: scale_expert}, expert_blow_up=AlarmConfig(limit=20))
    blown = [e for e in events(tmp_path / "run") if e.get("alarm") == "expert_blow_up"]
    assert [(e["step"], e["where"], e["action"]) for e in blown] == [(4, "layer 3, expert 2", "warn")]
    assert blown[0]["value"] > 20
    assert steps(tmp_path / "run") == list(range(1, 9))
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert records[5]["expert_output"][2][2] > 20 * records[5]["expert_output"][2][1]
    assert records[5]["expert_down_norm"][2][2] > 20 * records[5]["expert_down_norm"][2][1]


def test_an_exploding_expert_is_rolled_back(start: Callable[..., Any], tmp_path: Path) -> None:
    model, loader = start({10: scale_expert}, expert_blow_up=AlarmConfig(limit=20, action="rollback"))
    kinds = [(e["kind"], e.get("step")) for e in events(tmp_path / "run")]
    assert kinds == [("alarm", 5), ("rolled_back", 3)]
    [rolled] = [e for e in events(tmp_path / "run") if e["kind"] == "rolled_back"]
    assert (rolled["from_step"], rolled["row"], rolled["count"]) == (5, 12, 1)
    assert loader.read == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]  # on past the data
    assert steps(tmp_path / "run") == list(range(1, 9))  # the undone steps are gone, and were made anew
    assert model.layers[3].moe.experts.down_proj[2].norm() < 20 * model.layers[3].moe.experts.down_proj[1].norm()
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "step_8")
    assert (state["row"], state["rollbacks"]) == (22, 1)


def test_a_rollback_survives_a_kill(start: Callable[..., Any], tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(model: Step35) -> None:
        raise KilledError

    settings = {"expert_blow_up": AlarmConfig(limit=20, action="rollback")}
    unbroken, _ = start({10: scale_expert}, "unbroken", **settings)
    with pytest.raises(KilledError):
        start({10: scale_expert, 14: kill}, "broken", **settings)
    resumed, loader = start({}, "broken", **settings)
    assert loader.read[0] == 12
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_without_a_checkpoint_due_the_start_is_gone_back_to(start: Callable[..., Any], tmp_path: Path) -> None:
    start({2: scale_expert}, expert_blow_up=AlarmConfig(limit=20, action="rollback"))
    [rolled] = [e for e in events(tmp_path / "run") if e["kind"] == "rolled_back"]
    assert (rolled["from_step"], rolled["step"]) == (1, 0)


def test_trouble_again_goes_back_further_and_then_stops(start: Callable[..., Any], tmp_path: Path) -> None:
    faults: dict[int, Fault | DataError] = dict.fromkeys((14, 16, 18), scale_expert)
    settings = {"expert_blow_up": AlarmConfig(limit=20, action="rollback"), "max_rollbacks": 2}
    with pytest.raises(DivergedError, match=r"2 rollbacks were made"):
        start(faults, **settings)
    found = [(e["kind"], e.get("step")) for e in events(tmp_path / "run") if e["kind"] != "alarm"]
    assert found == [("rolled_back", 6), ("checkpoint_discarded", 6), ("rolled_back", 3), ("stopped", 3)]
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step_3"


def damage(checkpoints: Path, step: int) -> None:
    """Flip a byte of a checkpoint, once it is written."""
    path = checkpoints / f"step_{step}" / "__0_0.distcp"
    while not path.exists():
        time.sleep(0.01)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_rollback_over_a_damaged_checkpoint_says_so(start: Callable[..., Any], tmp_path: Path) -> None:
    def spoil(model: Step35) -> None:
        damage(tmp_path / "run" / "checkpoints", 6)
        scale_expert(model)

    start({14: spoil}, expert_blow_up=AlarmConfig(limit=20, action="rollback"))
    found = [(e["kind"], e.get("step")) for e in events(tmp_path / "run")]
    assert found == [("alarm", 7), ("checkpoint_skipped", None), ("rolled_back", 3)]


def test_a_damaged_older_checkpoint_does_not_end_the_run(start: Callable[..., Any], tmp_path: Path) -> None:
    def spoil(model: Step35) -> None:
        damage(tmp_path / "run" / "checkpoints", 3)
        scale_expert(model)

    start({14: spoil, 16: scale_expert}, expert_blow_up=AlarmConfig(limit=20, action="rollback"))
    found = [(e["kind"], e.get("step")) for e in events(tmp_path / "run") if e["kind"] != "alarm"]
    assert found == [("rolled_back", 6), ("rolled_back", 6)]


def test_sigterm_is_heard_while_batches_are_skipped(start: Callable[..., Any], tmp_path: Path) -> None:
    def ask_to_stop(model: Step35) -> None:
        NaNBatch()(model)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated):
        start({8: ask_to_stop}, non_finite=NonFiniteAlarmConfig(action="skip"))
    assert [e["kind"] for e in events(tmp_path / "run")] == ["alarm", "batch_skipped", "interrupted"]
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "step_4")
    assert (state["step"], state["row"]) == (4, 10)
    _, loader = start({})
    assert loader.read[0] == 10


def test_an_outlier_of_the_orthogonalisation_is_undone(
    start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: Step35) -> None:
        shape = model.layers[2].moe.experts.down_proj.shape[1:]

        def outlier(gradients: torch.Tensor, **settings: Any) -> torch.Tensor:
            update = polar_express(gradients, **settings)
            if update.shape[-2:] == shape:
                monkeypatch.setattr(muon, "polar_express", polar_express)
                update[5, 0, 0] += 20  # matrix 1 of layer 2: layers 1 to 4 have four each
            return update

        monkeypatch.setattr(muon, "polar_express", outlier)

    start({10: spoil}, muon_outlier=LateAlarmConfig(limit=1.2, action="rollback"))
    found = [(e["kind"], e.get("step"), e.get("where")) for e in events(tmp_path / "run")]
    assert found == [("alarm", 5, "layers.2.moe.experts.down_proj"), ("rolled_back", 3, None)]


def test_load_imbalance_is_1_when_all_tokens_go_to_the_same_experts(
    make_model: Callable[..., Step35], make_batch: Callable[..., Batch]
) -> None:
    model = make_model(moe_num_experts=8)
    for layer in model.config.moe_layers_enum:
        model.router(layer).bias[:2] += 10
    figures = Learner(model, CONFIG).accumulate(make_batch(rows=2, tokens=16, vocabulary=96), 0)
    assert figures["load_imbalance"] == pytest.approx(1.0)


def test_an_update_that_is_too_large_is_undone(start: Callable[..., Any], tmp_path: Path) -> None:
    start(
        {10: after_the_update(lambda model: model.lm_head.weight.add_(3.0))},
        update_rms=LateAlarmConfig(limit=5, action="rollback"),
    )
    found = [(e["kind"], e.get("step"), e.get("where")) for e in events(tmp_path / "run")]
    assert found == [("alarm", 5, "head"), ("rolled_back", 3, None)]


def test_parameters_that_are_not_finite_are_never_saved(start: Callable[..., Any], tmp_path: Path) -> None:
    spoil = after_the_update(lambda model: model.layers[0].mlp.down_proj.weight.fill_(math.inf))
    start({10: spoil}, non_finite=NonFiniteAlarmConfig(action="skip"))  # too late to skip: rolled back
    found = [(e["kind"], e.get("where")) for e in events(tmp_path / "run")]
    assert found[:2] == [("alarm", "layers.0.mlp.down_proj.weight"), ("rolled_back", None)]
    for path in (tmp_path / "run" / "checkpoints").glob("step_*"):
        assert all(t.isfinite().all() for t in checkpoint.load(path)["model"].values())


def test_unreadable_rows_stop_with_the_file_or_are_left_out(start: Callable[..., Any], tmp_path: Path) -> None:
    error = DataError("data/shard_00007.bin does not match its checksum")
    with pytest.raises(DataError, match="shard_00007"):
        start({8: error}, "stopped")
    [alarm, stopped] = events(tmp_path / "stopped")
    assert (alarm["alarm"], alarm["where"], alarm["action"]) == ("bad_data", "rows 8 to 9", "stop")
    assert "shard_00007" in alarm["cause"]
    assert stopped["kind"] == "stopped"
    _, loader = start({9: error}, "skipped", bad_data=DataAlarmConfig(action="skip"))
    alarm, left_out = events(tmp_path / "skipped")
    assert (alarm["alarm"], alarm["value"], alarm["where"]) == ("bad_data", 1, "rows 9 to 9")
    assert (left_out["kind"], left_out["step"], left_out["rows"]) == ("rows_left_out", 4, [9])
    assert loader.read == [0, 2, 4, 6, 8, 8, 9, 10, 11, 13, 15]  # row 10 in place of row 9
    assert steps(tmp_path / "skipped") == list(range(1, 9))
    assert checkpoint.load(tmp_path / "skipped" / "checkpoints" / "step_8")["row"] == 17


def test_too_many_unreadable_rows_stop(start: Callable[..., Any], tmp_path: Path) -> None:
    faults: dict[int, Fault | DataError] = dict.fromkeys(range(8, 40), DataError("shard_00007.bin is gone"))
    with pytest.raises(DataError, match="shard_00007"):
        start(faults, bad_data=DataAlarmConfig(action="skip"), max_skips=3)
    alarm, stopped = events(tmp_path / "run")
    assert (alarm["value"], stopped["kind"]) == (7, "stopped")  # more than three batches of two rows


def test_a_shard_damaged_on_disk_is_named(make_model: Callable[..., Step35], tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data", vocab_size=96, shard_tokens=64) as writer:
        for document in range(6):
            writer.add([(document * 7 + i) % 96 for i in range(60)], "test")
    path = tmp_path / "data" / "shard_00002.bin"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    loader = PretrainLoader(TokenShards(tmp_path / "data"), 16, seed=0)
    config = CONFIG.model_copy(update={"steps": 20})
    with pytest.raises(DataError, match=r"shard_00002\.bin does not match its checksum"):
        train(make_model(), loader, config, RunDir(tmp_path / "run"), Console(), name="train")
    stability = StabilityConfig(bad_data=DataAlarmConfig(action="skip"))
    config = config.model_copy(update={"stability": stability, "batch_rows": 4})
    end = train(make_model(), loader, config, RunDir(tmp_path / "skipping"), Console(), name="train")
    left_out = [row for e in events(tmp_path / "skipping") if e["kind"] == "rows_left_out" for row in e["rows"]]
    assert (end.step, end.row) == (20, 80 + len(left_out))
    assert 0 < len(left_out) < end.row / 2  # one shard of six


def test_tokens_outside_the_vocabulary_are_bad_data(
    make_model: Callable[..., Step35], make_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    class Wild:
        def rows(self, first: int, count: int) -> Batch:
            return make_batch(rows=count, tokens=16, vocabulary=500, seed=first)

    with pytest.raises(DataError, match=r"rows 0 to 1 hold token ids \d+ to 4\d\d, .*vocabulary is 0 to 96"):
        train(make_model(), Wild(), CONFIG, RunDir(tmp_path), Console(), name="train")


@pytest.mark.parametrize("monitors", [True, False])
def test_alarms_resume_as_if_unbroken(start: Callable[..., Any], tmp_path: Path, monitors: bool) -> None:
    class KilledError(Exception):
        pass

    def kill(model: Step35) -> None:
        raise KilledError

    settings: dict[str, Any] = {
        "monitors": monitors, "window": 4, "loss_spike": AlarmConfig(limit=0.001),
        "expert_blow_up": AlarmConfig(limit=1.1), "per_micro_batch": True,
    }  # fmt: skip
    start({}, "unbroken", **settings)
    with pytest.raises(KilledError):
        start({10: kill}, "broken", **settings)
    start({}, "broken", **settings)
    kept = []
    for folder in ("unbroken", "broken"):
        records = read_metrics(tmp_path / folder / "metrics.jsonl")
        kept.append([{k: v for k, v in r.items() if k not in ("time", "tokens_per_s")} for r in records])
    assert kept[0] == kept[1]
    states = [
        checkpoint.load(tmp_path / folder / "checkpoints" / "step_8")["monitor"] for folder in ("unbroken", "broken")
    ]
    assert states[0] == states[1]


def test_monitors_change_no_loss(start: Callable[..., Any], tmp_path: Path) -> None:
    with_them, _ = start({}, "on", per_micro_batch=True)
    without, _ = start({}, "off", monitors=False)
    losses = [[r["loss"] for r in read_metrics(tmp_path / folder / "metrics.jsonl")] for folder in ("on", "off")]
    assert losses[0] == losses[1]
    for name, tensor in with_them.state_dict().items():
        assert torch.equal(tensor, without.state_dict()[name]), name


def test_the_monitors_are_off_when_they_are_off(make_model: Callable[..., Step35]) -> None:
    monitor = Monitor(make_model(), CONFIG.model_copy(update={"stability": StabilityConfig(monitors=False)}), {})
    assert monitor.observe(torch.zeros(1, 4)) is None
    assert monitor.sample() is None


def test_a_later_stage_starts_its_monitors_anew(
    make_model: Callable[..., Step35], make_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    for folder, start in (("one", None), ("two", tmp_path / "one" / "checkpoints" / "step_8")):
        model = make_model()
        state = checkpoint.load(start) if start else None
        loader = FaultyLoader(model, make_batch, {})
        train(model, loader, CONFIG, RunDir(tmp_path / folder), Console(), name="train", start=state)
    for folder in ("one", "two"):
        state = checkpoint.load(tmp_path / folder / "checkpoints" / "step_8")
        assert state["monitor"]["loss"]["count"] == 8
