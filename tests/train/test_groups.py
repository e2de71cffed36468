from __future__ import annotations

import torch

from step35.config.presets import tiny
from step35.config.train import MuonConfig, TrainConfig
from step35.model.step35 import Step35
from step35.train.groups import Assignment, assign, build_optimisers
from step35.train.muon import Muon

CONFIG = tiny()

MUON = {
    "attention.qkv_proj.weight",
    "attention.o_proj.weight",
    "mlp.gate_up_proj.weight",
    "mlp.down_proj.weight",
    "moe.experts.gate_up_proj",
    "moe.experts.down_proj",
    "moe.shared.gate_up_proj.weight",
    "moe.shared.down_proj.weight",
    "joint_proj.weight",
}
ADAMW = {"embed_tokens.weight", "lm_head.weight", "head.weight", "attention.gate_proj.weight", "moe.router.weight"}
ADAMW_WITHOUT_DECAY = {
    "norm.weight",
    "attention_norm.weight",
    "ffn_norm.weight",
    "embedding_norm.weight",
    "hidden_norm.weight",
    "attention.q_norm.weight",
    "attention.k_norm.weight",
}


def meta_model() -> Step35:
    with torch.device("meta"):
        return Step35(CONFIG)


def table(kind: str = "muon") -> dict[str, Assignment]:
    named = dict(meta_model().named_parameters())
    rows = assign(CONFIG, named, kind)
    assert [row.name for row in rows] == list(named)
    return {row.name: row for row in rows}


def kind_of(name: str) -> str:
    """Return a parameter's name without its layer."""
    for prefix in ("layers.", "mtp."):
        if name.startswith(prefix):
            name = name.split(".", 2)[2].removeprefix("block.")
    return name


def test_who_gets_what() -> None:
    groups: dict[tuple[str, bool], set[str]] = {}
    for name, row in table().items():
        groups.setdefault((row.optimiser, row.decays), set()).add(kind_of(name))
    assert groups == {("muon", True): MUON, ("adamw", True): ADAMW, ("adamw", False): ADAMW_WITHOUT_DECAY}


def test_packed_matrices_are_cut_into_their_parts() -> None:
    rows = table()
    expected = {
        "layers.0.attention.qkv_proj.weight": (0, (128, 64, 64)),
        "layers.1.attention.qkv_proj.weight": (0, (192, 64, 64)),
        "mtp.0.block.attention.qkv_proj.weight": (0, (192, 64, 64)),
        "layers.0.mlp.gate_up_proj.weight": (0, (256, 256)),
        "layers.1.moe.experts.gate_up_proj": (1, (32, 32)),
        "layers.1.moe.experts.down_proj": (0, (16,)),
        "layers.1.moe.shared.gate_up_proj.weight": (0, (64, 64)),
        "mtp.0.joint_proj.weight": (0, (128,)),
    }
    assert {name: (rows[name].dim, rows[name].sizes) for name in expected} == expected


def test_adamw_may_have_everything() -> None:
    rows = table("adamw").values()
    assert {row.optimiser for row in rows} == {"adamw"}
    assert {kind_of(row.name) for row in rows if row.decays} == MUON | ADAMW


def test_optimisers_hold_every_trainable_parameter_once_with_its_decay() -> None:
    model = meta_model()
    train = TrainConfig(
        weight_decay=0.07, lr=0.01, optim=MuonConfig(momentum=0.8, steps=4, smallest=0.01, iteration_dtype="float32")
    )
    muon, adamw = build_optimisers(dict(model.named_parameters()), CONFIG, train)
    assert isinstance(muon, Muon)
    assert muon.polar == {"steps": 4, "smallest": 0.01, "dtype": torch.float32}
    assert (muon.param_groups[0]["momentum"], muon.param_groups[0]["weight_decay"]) == (0.8, 0.07)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.07, 0.0]
    assert all(parameter.ndim == 1 for parameter in adamw.param_groups[1]["params"])
    held = [id(p) for optimiser in (muon, adamw) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
