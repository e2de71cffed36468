"""The architecture's knobs, spelled as the released `config.json` spells them, and read from and written to it.

Per-layer lists run over the trunk layers 0..L-1 and then the MTP layers L..L+M-1. `ModelConfig.layer(i)` answers
every question the mathematics asks about one layer; nothing else interprets the lists.
Source: the report's section 2 and Table 6; key names and defaults as the released checkpoint has them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from step35.config.base import Config
from step35.errors import CheckpointError, ConfigError

PER_LAYER = ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared")
"""Keys with one entry for every trunk and MTP layer."""

LayerType = Literal["full_attention", "sliding_attention"]
FULL: LayerType = "full_attention"
SLIDING: LayerType = "sliding_attention"


class RopeScaling(Config):
    """Frequency scaling of rotary embeddings for longer contexts (the llama3 rule)."""

    rope_type: Literal["llama3"] = "llama3"
    factor: float = Field(default=2.0, ge=1)
    original_max_position_embeddings: int = 131072
    low_freq_factor: float = 1.0
    high_freq_factor: float = 32.0


class SlidingHeads(Config):
    """Head counts of the layers whose type is `attention_type` (the released `attention_other_setting`)."""

    attention_type: LayerType = SLIDING
    num_attention_heads: int = Field(ge=1)
    num_attention_groups: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    true_head_dim: int | None = None


@dataclass(frozen=True)
class LayerConfig:
    """All that one layer needs to know about itself."""

    index: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    """Keys a query sees, itself included; None in full-attention layers."""
    rope_theta: float
    rotary_dim: int
    rope_scaling: RopeScaling | None
    moe: bool
    clip: float
    """Limit on routed experts' activations; 0 is off."""
    clip_shared: float
    """Limit on the shared expert's and the dense MLP's activations; 0 is off."""

    @property
    def kind(self) -> str:
        return "full" if self.window is None else "sliding"


class ModelConfig(Config):
    """One Step 3.5 model. Field names are the released keys."""

    vocab_size: int = Field(ge=2)
    hidden_size: int = Field(ge=8)
    intermediate_size: int = Field(ge=1)
    """Hidden width of the dense MLP in leading layers and in MTP layers."""
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    """Query heads in full-attention layers."""
    num_attention_groups: int = Field(ge=1)
    """KV heads in full-attention layers."""
    head_dim: int = Field(ge=2)
    attention_other_setting: SlidingHeads | None = None
    layer_types: tuple[LayerType, ...]
    sliding_window: int = Field(default=512, ge=1)
    rope_theta: tuple[float, ...]
    partial_rotary_factors: tuple[float, ...]
    rope_scaling: RopeScaling | None = None
    yarn_only_types: tuple[LayerType, ...] = (FULL,)
    """Layer types that `rope_scaling` applies to."""
    moe_layers_enum: tuple[int, ...] = ()
    moe_num_experts: int = Field(default=0, ge=0)
    moe_top_k: int = Field(default=0, ge=0)
    moe_intermediate_size: int = Field(default=0, ge=0)
    share_expert_dim: int = Field(default=0, ge=0)
    moe_router_scaling_factor: float = 1.0
    swiglu_limits: tuple[float, ...]
    swiglu_limits_shared: tuple[float, ...]
    num_nextn_predict_layers: int = Field(default=0, ge=0)
    """MTP modules."""
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    max_position_embeddings: int = Field(default=262144, ge=1)
    bos_token_id: int = 0
    eos_token_id: tuple[int, ...] = (1,)
    pad_token_id: int = 1
    other_keys: dict[str, Any] = Field(default_factory=dict)
    """Keys of a released config that this package does not read; written back unchanged."""

    @field_validator("eos_token_id", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        total = self.num_hidden_layers + self.num_nextn_predict_layers
        for name in PER_LAYER:
            if len(getattr(self, name)) != total:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, but num_hidden_layers={self.num_hidden_layers} "
                    f"and num_nextn_predict_layers={self.num_nextn_predict_layers} need {total}; give one entry a layer"
                )
        for i in range(total):
            self._check_layer(self.layer(i))
        if self.moe_layers_enum:
            self._check_moe()
        return self

    def _check_layer(self, layer: LayerConfig) -> None:
        if layer.heads % layer.kv_heads:
            where = "attention_other_setting." if layer.window and self.attention_other_setting else ""
            divisors = [n for n in range(1, layer.heads + 1) if layer.heads % n == 0]
            raise ValueError(
                f"{where}num_attention_heads={layer.heads} is not divisible by {where}num_attention_groups="
                f"{layer.kv_heads} (layer {layer.index}); choose groups from {divisors}"
            )
        if min(layer.clip, layer.clip_shared) < 0:
            raise ValueError(f"the swiglu limits of layer {layer.index} must be at least 0 (0 is off)")
        if layer.rotary_dim % 2 or not 0 < layer.rotary_dim <= layer.head_dim:
            raise ValueError(
                f"partial_rotary_factors[{layer.index}]={self.partial_rotary_factors[layer.index]} of head_dim="
                f"{layer.head_dim} gives {layer.rotary_dim} rotary channels; give an even number up to head_dim"
            )

    def _check_moe(self) -> None:
        if len(set(self.moe_layers_enum)) < len(self.moe_layers_enum):
            raise ValueError(f"moe_layers_enum={self.moe_layers_enum} names a layer twice; name each once")
        bad = [i for i in self.moe_layers_enum if not 0 <= i < self.num_hidden_layers]
        if bad:
            raise ValueError(f"moe_layers_enum names layers {bad}; layers run from 0 to {self.num_hidden_layers - 1}")
        if not 1 <= self.moe_top_k <= self.moe_num_experts:
            raise ValueError(
                f"moe_top_k={self.moe_top_k} is not in 1..moe_num_experts={self.moe_num_experts}; lower it"
            )
        if self.moe_intermediate_size < 1 or self.share_expert_dim < 1:
            raise ValueError(
                f"moe_intermediate_size={self.moe_intermediate_size} and share_expert_dim={self.share_expert_dim} "
                "must be at least 1 when moe_layers_enum is not empty"
            )

    @property
    def total_layers(self) -> int:
        """Trunk layers and MTP layers together."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def layer(self, index: int) -> LayerConfig:
        """Return what layer `index` (trunk or MTP) needs to know."""
        kind = self.layer_types[index]
        other = self.attention_other_setting
        own = other if other and other.attention_type == kind else None
        head_dim = own.head_dim if own else self.head_dim
        return LayerConfig(
            index=index,
            heads=own.num_attention_heads if own else self.num_attention_heads,
            kv_heads=own.num_attention_groups if own else self.num_attention_groups,
            head_dim=head_dim,
            window=self.sliding_window if kind == SLIDING else None,
            rope_theta=self.rope_theta[index],
            rotary_dim=round(head_dim * self.partial_rotary_factors[index]),
            rope_scaling=self.rope_scaling if kind in self.yarn_only_types else None,
            moe=index in self.moe_layers_enum,
            clip=self.swiglu_limits[index],
            clip_shared=self.swiglu_limits_shared[index],
        )

    def layers(self) -> list[LayerConfig]:
        """Return the trunk's layers, then those of the MTP modules."""
        return [self.layer(i) for i in range(self.total_layers)]

    def trunk_layers(self) -> list[LayerConfig]:
        """Return the trunk's layers."""
        return self.layers()[: self.num_hidden_layers]

    def with_mtp(self, modules: int) -> ModelConfig:
        """Return this config with `modules` MTP modules; new ones copy the last module's entries.

        Raises `ConfigError` when there is no module to copy.
        """
        if modules > self.num_nextn_predict_layers == 0:
            raise ConfigError("the model has no MTP module to copy; start from a checkpoint that has one.")
        values = self.model_dump()
        total = self.num_hidden_layers + modules
        for name in PER_LAYER:
            entries = list(values[name])
            values[name] = (entries + [entries[-1]] * modules)[:total]
        return ModelConfig.parse({**values, "num_nextn_predict_layers": modules})

    @classmethod
    def from_released(cls, values: dict[str, Any]) -> ModelConfig:
        """Read a released `config.json`; raise `ConfigError` naming key, value and remedy."""
        if not isinstance(values, dict):
            raise ConfigError(f"config.json holds a {type(values).__name__}; a table of settings is needed.")
        known = {k: v for k, v in values.items() if k in cls.model_fields and k != "other_keys"}
        other = {k: v for k, v in values.items() if k not in known}
        _refuse_variants(other)
        for key in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "head_dim"):
            if key not in known:
                raise ConfigError(f"config.json: key '{key}' is missing; is this a Step 3.5 checkpoint's config?")
        known["num_nextn_predict_layers"] = known.get("num_nextn_predict_layers") or 0
        total = known["num_hidden_layers"] + known["num_nextn_predict_layers"]
        if isinstance(known.get("rope_theta"), int | float):
            known["rope_theta"] = [known["rope_theta"]] * total
        known.setdefault("rope_theta", [10000.0] * total)
        known.setdefault("partial_rotary_factors", [1.0] * total)
        known.setdefault("layer_types", [SLIDING if i % 2 == 0 else FULL for i in range(total)])
        for key in ("swiglu_limits", "swiglu_limits_shared"):
            known[key] = [limit or 0.0 for limit in known.get(key) or [0.0] * total]
        known["moe_layers_enum"] = _layer_numbers(known.get("moe_layers_enum"), known["num_hidden_layers"])
        if known.get("yarn_only_types") is None:
            known["yarn_only_types"] = (FULL, SLIDING)
        if not known["moe_layers_enum"]:
            known.setdefault("share_expert_dim", 0)
        return cls.parse({**known, "other_keys": other}, where="config.json")

    def to_released(self) -> dict[str, Any]:
        """Return the content of a released `config.json`."""
        values = self.model_dump(mode="json", exclude={"other_keys"}, exclude_none=True)
        values["moe_layers_enum"] = ",".join(map(str, self.moe_layers_enum))
        return {**_CONSTANT_KEYS, **self.other_keys, **values}

    @classmethod
    def read(cls, folder: str | Path) -> ModelConfig:
        """Read `folder/config.json`; raise `CheckpointError` when there is none, `ConfigError` for what is in it."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder} is not a checkpoint folder: it has no config.json. Give a folder in the released layout "
                "(config.json, *.safetensors, tokenizer.json), for example the export/ folder of a run."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON ({error}); fetch or export the checkpoint again.") from None
        if isinstance(values, dict) and "hidden_size" not in values:
            refuse_run(path.parent)
        return cls.from_released(values)


# What the released config states and every engine assumes; fixed in this architecture.
_CONSTANT_KEYS: dict[str, Any] = {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "att_impl_type": "GQA",
    "use_qk_norm": True,
    "use_head_wise_attn_gate": True,
    "use_moe": True,
    "moe_layer_offset": 0,
    "moe_every_n_layer": 1,
    "norm_expert_weight": True,
    "moe_router_activation": "sigmoid",
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
    "sink": False,
    "zero_centered": True,
    "tie_word_embeddings": False,
    "use_rope_layers": [],
}


def refuse_run(folder: Path) -> None:
    """Raise `CheckpointError`, which names the checkpoint, for a run directory that holds one."""
    for inner in ("export", "model"):
        if (folder / inner / "config.json").is_file():
            raise CheckpointError(f"{folder} is a run directory; its checkpoint is {folder / inner}.")


def _refuse_variants(other: dict[str, Any]) -> None:
    """Refuse values that would need another architecture, rather than compute something else silently."""
    fixed = {k: v for k, v in _CONSTANT_KEYS.items() if k not in ("architectures", "use_moe", "use_rope_layers")}
    for key in ("moe_layer_offset", "moe_every_n_layer", "zero_centered", "use_qk_norm"):
        fixed.pop(key)  # stated by the release, read by no engine
    fixed["attention_bias"] = False
    if not all(other.get("use_rope_layers") or [True]):
        raise ConfigError(
            "config.json: use_rope_layers switches rotary embeddings off in some layers, which is not supported."
        )
    for key, value in fixed.items():
        if key in other and other[key] != value:
            raise ConfigError(
                f"config.json: {key}={other[key]!r} is not supported; this architecture has {key}={value!r}. "
                "Use a Step 3.5 checkpoint, or correct the key."
            )


def _layer_numbers(value: Any, layers: int) -> list[int]:
    """Return the MoE layer numbers of "3,4,5", a list, or the released default (all but layer 0)."""
    if value is None:
        return list(range(1, layers))
    if isinstance(value, str):
        try:
            return [int(part) for part in value.split(",") if part.strip()]
        except ValueError:
            raise ConfigError(
                f"config.json: moe_layers_enum={value!r} is not a list of layer numbers such as '3,4,5'."
            ) from None
    return list(value)
