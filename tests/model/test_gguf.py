"""GGUF files: names, numbers and keys as llama.cpp reads them (`make interop` runs it), and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader

from step35.config.model import ModelConfig, RopeScaling
from step35.config.presets import flash, s3f1
from step35.data.gguf_vocabulary import RULES, tokenizer_from_keys, vocabulary_keys
from step35.data.tokenizer import Tokenizer, train_tokenizer
from step35.errors import CheckpointError, ConfigError
from step35.model import gguf_layout
from step35.model.gguf import GGUFTensors, write_gguf
from step35.model.layout import released_parts
from step35.model.step35 import Step35
from step35.model.tensors import ModelTensors, check
from step35.model.weights import load_model

Make = Callable[..., Step35]
VOCABULARY = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(97)], "tokenizer.ggml.model": "gpt2"}


@pytest.fixture
def model(make_model: Make) -> Step35:
    """A model that GGUF can express: no clip in an MTP layer, which `make_model` has none of either."""
    return make_model(hidden_size=64, moe_intermediate_size=32, intermediate_size=96, share_expert_dim=32)


def write(model: Step35, path: Path, form: str = "F32") -> GGUFReader:
    write_gguf(ModelTensors(model), model.config, path, form=form, vocabulary=VOCABULARY, name="test")
    return GGUFReader(path)


def values(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def test_tensors_have_llama_names_shapes_and_numbers(model: Step35, tmp_path: Path) -> None:
    reader = write(model, tmp_path / "m.gguf")
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    block, moe, module = model.layers[1], model.layers[1].moe, model.mtp[1]
    assert torch.equal(tensors["blk.1.attn_q.weight"], block.attention.qkv_proj.weight[:64])
    assert torch.equal(tensors["blk.1.attn_v.weight"], block.attention.qkv_proj.weight[96:])
    assert torch.equal(tensors["blk.1.attn_gate.weight"], block.attention.gate_proj.weight)
    assert torch.equal(tensors["blk.1.ffn_up_exps.weight"], moe.experts.gate_up_proj[:, 32:])
    assert torch.equal(tensors["blk.1.exp_probs_b.bias"], moe.router.bias)
    assert torch.equal(tensors["blk.1.ffn_down_shexp.weight"], moe.shared.down_proj.weight)
    assert torch.equal(tensors["blk.0.ffn_gate.weight"], model.layers[0].mlp.gate_up_proj.weight[:96])
    assert torch.equal(tensors["blk.6.nextn.eh_proj.weight"], module.joint_proj.weight)
    assert torch.equal(tensors["blk.6.nextn.shared_head_head.weight"], module.head.weight)
    norms = {
        "output_norm.weight": model.norm, "blk.1.attn_norm.weight": block.attention_norm,
        "blk.1.attn_k_norm.weight": block.attention.k_norm, "blk.1.ffn_norm.weight": block.ffn_norm,
        "blk.6.nextn.enorm.weight": module.embedding_norm, "blk.6.nextn.hnorm.weight": module.hidden_norm,
        "blk.6.nextn.shared_head_norm.weight": module.norm,
    }  # fmt: skip
    for name, norm in norms.items():
        assert torch.equal(tensors[name], norm.weight + 1), name
    dense, sparse, mtp = 3, 8, 3 + 5
    assert len(tensors) == 4 + 7 * 9 + dense + 4 * sparse + 2 * mtp  # the 4: embedding, norm, head, rope_freqs


def test_the_release_has_the_published_number_of_tensors() -> None:
    trunk = flash().with_mtp(0)
    assert len(list(released_parts(trunk))) + 1 == 754  # rope_freqs is the one more
    names = [gguf_layout.gguf_name(part.released) for _, part in released_parts(flash())]
    assert len(set(names)) == len(names)
    assert [gguf_layout.released_name(name) for name in names] == [part.released for _, part in released_parts(flash())]


def test_the_keys_are_those_of_the_published_file() -> None:
    keys = gguf_layout.metadata(flash())
    published = {
        "block_count": 48, "context_length": 262144, "embedding_length": 4096, "feed_forward_length": 11264,
        "attention.key_length": 128, "attention.value_length": 128, "attention.sliding_window": 512,
        "rope.freq_base": 5e6, "rope.freq_base_swa": 1e4, "expert_count": 288, "expert_used_count": 8,
        "expert_feed_forward_length": 1280, "expert_shared_feed_forward_length": 1280, "expert_weights_scale": 3.0,
        "expert_weights_norm": True, "expert_gating_func": 2, "nextn_predict_layers": 3, "leading_dense_block_count": 3,
    }  # fmt: skip
    for key, value in published.items():
        assert keys[f"step35.{key}"] == value, key
    full = [i % 4 == 0 and i < 45 for i in range(48)]
    assert keys["step35.attention.head_count"] == [64 if f else 96 for f in full]
    assert keys["step35.attention.sliding_window_pattern"] == [not f for f in full]
    assert keys["step35.swiglu_clamp_exp"][43:] == [7.0, 7.0, 0.0, 0.0, 0.0]
    assert keys["step35.swiglu_clamp_shexp"][43:] == [0.0, 16.0, 0.0, 0.0, 0.0]
    assert "step35.rope.dimension_count" not in keys  # llama.cpp would halve it


def test_frequency_divisors_follow_the_llama3_rule() -> None:
    divisors = gguf_layout.rope_frequencies(flash())
    assert divisors.shape == (64,)
    wave = 2 * np.pi * 5e6 ** (np.arange(32) / 32)
    turns = 131072 / wave
    blend = np.clip((turns - 1) / 31, 0, 1)
    np.testing.assert_allclose(divisors[:32], 1 / ((1 - blend) / 2 + blend), rtol=1e-6)
    assert (divisors[32:] == 1).all()
    assert gguf_layout.rope_frequencies(flash().model_copy(update={"rope_scaling": None})) is None


@pytest.mark.parametrize("form", ["F32", "BF16", "Q8_0"])
def test_matrices_take_the_form_and_the_rest_stays_fp32(form: str, model: Step35, tmp_path: Path) -> None:
    reader = write(model, tmp_path / "m.gguf", form)
    forms = {t.name: t.tensor_type.name for t in reader.tensors}
    exact = [
        n for n in forms if n.endswith(("norm.weight", "exp_probs_b.bias", "ffn_gate_inp.weight", "rope_freqs.weight"))
    ]
    assert {forms[name] for name in exact} == {"F32"}
    assert {forms[name] for name in forms if name not in exact} == {form}
    assert values(reader)["general.file_type"] == {"F32": 0, "BF16": 32, "Q8_0": 7}[form]


@pytest.mark.parametrize(("form", "error"), [("F32", 1e-7), ("BF16", 2**-8), ("Q8_0", 1 / 127)])
def test_what_is_written_is_read_back(form: str, error: float, model: Step35, tmp_path: Path) -> None:
    write(model, tmp_path / "m.gguf", form)
    loaded = load_model(tmp_path / "m.gguf")
    assert loaded.config.model_copy(update={"other_keys": {}}) == model.config
    for name, tensor in model.state_dict().items():
        found = loaded.state_dict()[name]
        assert (found - tensor).abs().max() <= error * tensor.abs().max() + 1e-7, name
        if form != "F32" and tensor.ndim > 1 and "router" not in name:
            assert not torch.equal(found, tensor), name


def test_rows_that_q8_cannot_divide_stay_fp32(make_model: Make, tmp_path: Path) -> None:
    reader = write(make_model(hidden_size=64), tmp_path / "m.gguf", "Q8_0")  # experts of 16
    forms = {t.name: t.tensor_type.name for t in reader.tensors}
    assert forms["blk.1.ffn_down_exps.weight"] == "F32"
    assert forms["blk.1.ffn_up_exps.weight"] == "Q8_0"


def test_a_file_of_another_writer_gives_its_config_back(model: Step35, tmp_path: Path, monkeypatch: Any) -> None:
    # The same file without our own key, and with the release's rotary scaling, which others' files imply.
    released = s3f1(**{**SMALL, "rope_scaling": RopeScaling()})
    keys = gguf_layout.metadata(released)
    del keys[gguf_layout.RELEASED_CONFIG]
    keys |= {"general.architecture": "step35", "tokenizer.ggml.tokens": ["t"] * 97, "tokenizer.ggml.bos_token_id": 0}
    keys |= {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.padding_token_id": 1}
    frequencies = gguf_layout.rope_frequencies(released)
    found = gguf_layout.config_of(keys, list(released.moe_layers_enum), frequencies)
    expected = released.model_copy(update={"eos_token_id": (3,), "other_keys": {}})
    for key in type(found).model_fields:
        if key != "attention_other_setting":
            assert getattr(found, key) == getattr(expected, key), key
    assert [found.layer(i) for i in range(7)] == [expected.layer(i) for i in range(7)]
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight does not follow.*config\.json beside"):
        gguf_layout.config_of(keys, list(released.moe_layers_enum), frequencies * 1.5)
    with pytest.raises(ConfigError, match="holds a 'llama' model"):
        gguf_layout.config_of(keys | {"general.architecture": "llama"}, [], None)
    plain = keys | {"step35.expert_weights_scale": 0.0, "step35.feed_forward_length": [48] * 7}
    assert gguf_layout.config_of(plain, [], frequencies).moe_router_scaling_factor == 1.0  # 0 is "no scaling"
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight does not follow"):
        gguf_layout.config_of(keys, [], frequencies[:3])
    del keys["step35.embedding_length"]
    with pytest.raises(ConfigError, match=r"lacks the key step35\.embedding_length"):
        gguf_layout.config_of(keys, [], None)


SMALL: dict[str, Any] = {
    "layers": 5, "dense": 1, "mtp": 2, "heads": 2, "sliding_heads": 4, "groups": 2, "head_dim": 16, "theta_full": 5e6,
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "sliding_window": 8, "moe_num_experts": 4,
    "moe_top_k": 2, "moe_intermediate_size": 16, "share_expert_dim": 24, "moe_router_scaling_factor": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partial": 0.25}, r"partial_rotary_factors\[0\] must be 0\.5"),
        ({"clips": {5: 7.0}}, "MTP layer 5 has a swiglu limit"),
    ],
)
def test_what_gguf_cannot_express_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gguf_layout.metadata(s3f1(**{**SMALL, **changes}))


def test_a_config_beside_the_file_serves_files_of_other_writers_only(
    model: Step35, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(model, tmp_path / "ours.gguf")
    keys = gguf_layout.metadata(model.config)
    del keys[gguf_layout.RELEASED_CONFIG]
    monkeypatch.setattr("step35.model.gguf.metadata", lambda config: keys)
    write(model, tmp_path / "theirs.gguf")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_released() | {"sliding_window": 5}))
    assert load_model(tmp_path / "ours.gguf").config.sliding_window == 8
    assert load_model(tmp_path / "theirs.gguf").config.sliding_window == 5


def test_broken_and_foreign_files_are_refused(model: Step35, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(CheckpointError, match="is not a file"):
        load_model(path)
    path.write_bytes(b"nonsense" * 100)
    with pytest.raises(CheckpointError, match=r"cannot be read as GGUF.*800 bytes"):
        load_model(path)
    write(model, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        load_model(path)
    with pytest.raises(CheckpointError, match="format='Q4_K'"):
        write(model, path, "Q4_K")


def test_a_failed_write_leaves_the_older_file(model: Step35, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    write(model, path)
    before = path.read_bytes()

    def dies(self: gguf.GGUFWriter, tensor: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", dies)
    with pytest.raises(RuntimeError, match="killed"):
        write(model, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["what is 12 * 7? the answer is 84 " * 5], 300)


def test_a_vocabulary_comes_back(tokenizer: Tokenizer, make_model: Make) -> None:
    config = make_model().config.model_copy(update={"vocab_size": tokenizer.vocab_size + 5})
    keys = vocabulary_keys(tokenizer, config)
    assert len(keys["tokenizer.ggml.tokens"]) == config.vocab_size
    assert keys["tokenizer.ggml.tokens"][-1] == f"[PAD{config.vocab_size - 1}]"
    assert keys["tokenizer.ggml.token_type"][-1] == 5
    assert keys["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 3, 4]  # <think> is no control token: it must be shown
    again = tokenizer_from_keys(keys, config)
    text = "What is 7 * 12? <think>\n84</think><|im_end|> ünï 🙂"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text
    assert again.eos_ids == config.eos_token_id
    assert again.vocab_size == tokenizer.vocab_size
    with pytest.raises(CheckpointError, match="rule 'llama-bpe'"):
        tokenizer_from_keys(keys | {"tokenizer.ggml.pre": "llama-bpe"}, config)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_recognised_and_cuts_text(rule: str, tokenizer: Tokenizer, make_model: Make) -> None:
    content = json.loads(tokenizer.backend.to_str()) | {"pre_tokenizer": RULES[rule]}
    changed = Tokenizer(type(tokenizer.backend).from_str(json.dumps(content)))
    assert vocabulary_keys(changed, make_model(vocab_size=400).config)["tokenizer.ggml.pre"] == rule
    words = [word for word, _ in changed.backend.pre_tokenizer.pre_tokenize_str("in 1234\n\nyou")]
    numbers = {"gpt-2": ["Ġ1234"], "smollm": ["1", "2", "3", "4"], "deepseek-v3": ["123", "4"]}
    assert [word for word in words if any(c.isdigit() for c in word)] == numbers[rule]


def test_what_a_vocabulary_cannot_hold_is_refused(tokenizer: Tokenizer, make_model: Make) -> None:
    config = make_model().config.model_copy(update={"vocab_size": tokenizer.vocab_size, "pad_token_id": -1})
    keys = vocabulary_keys(tokenizer, config)
    assert "tokenizer.ggml.padding_token_id" not in keys
    with pytest.raises(CheckpointError, match=r"lacks the keys tokenizer\.ggml\.merges"):
        tokenizer_from_keys({name: value for name, value in keys.items() if not name.endswith("merges")}, config)
    with pytest.raises(CheckpointError, match="cannot be rebuilt"):
        tokenizer_from_keys(keys | {"tokenizer.ggml.merges": ["no such"]}, config)
    with pytest.raises(ConfigError, match=r"config\.json says vocab_size=97"):
        vocabulary_keys(tokenizer, make_model().config)
    content = json.loads(tokenizer.backend.to_str()) | {"normalizer": {"type": "Lowercase"}}
    with pytest.raises(ConfigError, match=r"normalizer.*Lowercase"):
        vocabulary_keys(Tokenizer(type(tokenizer.backend).from_str(json.dumps(content))), config)


def test_an_unnamed_rule_is_refused(tokenizer: Tokenizer, make_model: Make) -> None:
    content = json.loads(tokenizer.backend.to_str()) | {"pre_tokenizer": {"type": "Whitespace"}}
    changed = Tokenizer(type(tokenizer.backend).from_str(json.dumps(content)))
    with pytest.raises(ConfigError, match=r"no name for this tokenizer's pre_tokenizer.*Whitespace"):
        vocabulary_keys(changed, make_model(vocab_size=400).config)


def test_the_source_reports_what_it_lacks(model: Step35, tmp_path: Path) -> None:
    write(model, tmp_path / "m.gguf")
    source = GGUFTensors(tmp_path / "m.gguf")
    assert len(source) == len(list(source)) == len(list(released_parts(model.config)))
    bigger = ModelConfig.from_released(model.config.to_released() | {"intermediate_size": 100})
    with pytest.raises(CheckpointError, match=r"misshapen: model\.layers\.0\.mlp\.gate_proj\.weight is \[96, 64\]"):
        check(source, bigger)
