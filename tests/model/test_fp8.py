"""Block-quantised FP8: the numbers against a loop over blocks, the files against the release's names and shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from step35.errors import CheckpointError, ConfigError
from step35.model.fp8 import FP8, dequantise, is_quantised, quantise
from step35.model.step35 import Step35
from step35.model.weights import load_model, save_model

Make = Callable[..., Step35]
SINGLE = "model-00001-of-00001.safetensors"


def block_by_block(weight: Tensor) -> Tensor:
    """Quantise and dequantise each 128 x 128 block by itself."""
    out = torch.zeros_like(weight)
    for index in range(weight[..., 0, 0].numel()):
        matrix, result = weight.flatten(0, -3)[index], out.flatten(0, -3)[index]
        for row in range(0, matrix.shape[0], 128):
            for column in range(0, matrix.shape[1], 128):
                block = matrix[row : row + 128, column : column + 128]
                scale = block.abs().max() / 448
                if scale > 0:
                    result[row : row + 128, column : column + 128] = (block / scale).to(FP8).float() * scale
    return out


@pytest.mark.parametrize("shape", [(1, 128, 128), (1, 300, 200), (1, 1, 1), (3, 130, 256), (2, 127, 129)])
def test_blocks_have_scales_of_their_own(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[-1])
    weight[..., :5, :] = 0
    numbers, scale = quantise(weight)
    assert numbers.dtype == FP8
    assert numbers.shape == weight.shape
    assert scale.shape == (shape[0], -(-shape[1] // 128), -(-shape[2] // 128))
    assert torch.equal(dequantise(numbers, scale), block_by_block(weight))
    again, same = quantise(dequantise(numbers, scale))
    assert torch.equal(dequantise(again, same), dequantise(numbers, scale))  # a second pass changes nothing


def test_a_block_of_zeros_stays_zero() -> None:
    numbers, scale = quantise(torch.zeros(4, 4))
    assert scale.item() == 1
    assert not dequantise(numbers, scale).any()


def test_the_error_is_that_of_three_mantissa_bits() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    error = (dequantise(*quantise(weight)) - weight).abs()
    assert (error <= weight.abs() / 16 + weight.abs().max() * 2**-15).all()
    assert error.max() > 0


@pytest.fixture
def fp8_folder(make_model: Make, tmp_path: Path) -> Path:
    save_model(make_model(hidden_size=160, intermediate_size=272), tmp_path, dtype="float8")
    return tmp_path


def test_files_hold_the_released_names_shapes_and_dtypes(fp8_folder: Path) -> None:
    tensors = load_file(fp8_folder / SINGLE)
    shapes = {
        "model.layers.0.mlp.gate_proj.weight_scale_inv": (3, 2),
        "model.layers.0.mlp.down_proj.weight_scale_inv": (2, 3),
        "model.layers.1.moe.gate_proj.weight_scale_inv": (4, 1, 2),
        "model.layers.1.moe.down_proj.weight_scale_inv": (4, 2, 1),
        "model.layers.1.self_attn.q_proj.weight_scale_inv": (1, 2),
    }
    for name, shape in shapes.items():
        assert tensors[name].dtype == torch.float32
        assert tuple(tensors[name].shape) == shape, name
    kept = {name: t.dtype for name, t in tensors.items() if not name.endswith("_scale_inv") and not is_quantised(name)}
    fp32 = {name for name, dtype in kept.items() if dtype == torch.float32}
    assert fp32 == {f"model.layers.{i}.moe.{end}" for i in (1, 2, 3, 4) for end in ("gate.weight", "router_bias")}
    assert {kept[n] for n in kept if n not in fp32} == {torch.bfloat16}
    assert all(tensors[name].dtype == FP8 for name in tensors if is_quantised(name))
    config = json.loads((fp8_folder / "config.json").read_text())
    quantisation = config["quantization_config"]
    assert quantisation["weight_block_size"] == [128, 128]
    left_out = {name.removesuffix(".weight") for name in kept if name.endswith(".weight") and "norm" not in name}
    assert set(quantisation["modules_to_not_convert"]) == left_out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reading_dequantises_and_rounds_once(dtype: str, fp8_folder: Path) -> None:
    tensors = load_file(fp8_folder / SINGLE)
    model = load_model(fp8_folder, dtype=dtype)
    stored = "model.layers.2.moe.up_proj.weight"
    exact = dequantise(tensors[stored], tensors[stored + "_scale_inv"])
    assert torch.equal(model.layers[2].moe.experts.gate_up_proj[:, 16:], exact.to(getattr(torch, dtype)))


def test_a_round_trip_changes_nothing(fp8_folder: Path, tmp_path: Path) -> None:
    model = load_model(fp8_folder)
    save_model(model, tmp_path / "again", dtype="float8")
    again = load_model(tmp_path / "again")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    save_model(model, tmp_path / "plain", dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_a_missing_or_misshapen_scale_is_named(fp8_folder: Path) -> None:
    tensors = load_file(fp8_folder / SINGLE)
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    tensors["model.layers.1.moe.up_proj.weight_scale_inv"] = torch.ones(4, 2, 2)
    save_file(tensors, fp8_folder / SINGLE)
    with pytest.raises(CheckpointError) as caught:
        load_model(fp8_folder)
    assert "missing: model.layers.0.mlp.up_proj.weight_scale_inv" in str(caught.value)
    assert "misshapen: model.layers.1.moe.up_proj.weight_scale_inv is [4, 2, 2]" in str(caught.value)
    assert "asks [4, 1, 2]" in str(caught.value)


def test_other_quantised_formats_are_refused(fp8_folder: Path) -> None:
    path = fp8_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ConfigError, match=r"quant_method='awq'.*Use the bf16 or the FP8 release"):
        load_model(fp8_folder)
