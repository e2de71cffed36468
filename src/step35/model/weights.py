"""Checkpoints in the released layout: loaded tensor by tensor, written shard by shard.

Our packed parameters are filled slice by slice, so loading needs the model's own memory plus one tensor, and writing
one shard at a time.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from step35.config.model import ModelConfig
from step35.errors import CheckpointError
from step35.model.checkpoint_files import INDEX, CheckpointFiles
from step35.model.fp8 import SCALE_SUFFIX, is_quantised, quantisation_config, quantise, scale_shape
from step35.model.gguf import GGUFTensors
from step35.model.layout import FP32_NAMES, released_parts
from step35.model.step35 import Step35
from step35.model.tensors import ModelTensors, StateTensors, Tensors, check, fill
from step35.runtime.device import dtype_name
from step35.runtime.disk import disk_errors, publish
from step35.runtime.hub import fetched
from step35.runtime.manifest import MANIFEST

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes of a model in memory."""
ARCHITECTURE = "architecture"
"""Folder of a training run with the config and the tokenizer of its checkpoints, which hold neither."""
FORMATS = (*DTYPES, "float8")
"""What a checkpoint may be written in; "float8" is the block-quantised FP8 format of `model/fp8.py`."""


def load_model(
    path: str | Path, *, dtype: str | torch.dtype = "float32", device: str = "cpu", mtp: int | None = None
) -> Step35:
    """Load a checkpoint folder in the released layout, or a .gguf file; router weights and biases stay fp32.

    A training run (its newest checkpoint) or a checkpoint of it, `checkpoints/step_N`, will do, too, and an address on
    the hub (`runtime/hub.py`).

    `mtp` loads only the first so many MTP modules (0: the trunk and its head); None loads all that the config names.
    Raises `CheckpointError` for a folder that is no checkpoint, and for missing, unexpected, misshapen or truncated
    tensors (all named at once); `ConfigError` for a config that contradicts itself.
    """
    target = dtype_named(dtype)
    config, source = open_checkpoint(path, mtp=mtp)
    with torch.device("meta"):
        model = Step35(config)
    set_dtypes(model, target)
    model.to_empty(device=device)
    fill(model, source)
    return model.eval()


def open_checkpoint(path: str | Path, *, mtp: int | None = None) -> tuple[ModelConfig, Tensors]:
    """Return config and tensors of a checkpoint folder or a .gguf file, checked against each other, nothing read yet.

    Arguments, sources and errors are those of `load_model`. The weights of a training checkpoint are read at once,
    since a live run may delete it any time.
    """
    path = fetched(path)
    source: Tensors
    if step := training_checkpoint(path):
        from step35.runtime.checkpoint import load_tensors  # half as long to import as torch, and rarely wanted

        whole = ModelConfig.read(architecture(step))
        state = load_tensors(step, "model/") or load_tensors(step, "actor/model/")
        source = StateTensors(state, whole, str(step))
    elif path.suffix == ".gguf":
        source = GGUFTensors(path)
        whole = source.config()
    else:
        whole = ModelConfig.read(path)
        source = CheckpointFiles(path, whole)
    config = whole if mtp is None else _first_modules(whole, mtp, path)
    check(source, config, also=frozenset(part.released for _, part in released_parts(whole)))
    return config, source


def read_config(path: str | Path) -> ModelConfig:
    """Return the config of what `load_model` loads; of a checkpoint on the hub nothing else is fetched."""
    path = fetched(path, files=["config.json"])
    if step := training_checkpoint(path):
        return ModelConfig.read(architecture(step))
    return GGUFTensors(path).config() if path.suffix == ".gguf" else ModelConfig.read(path)


def training_checkpoint(path: Path) -> Path | None:
    """Return `path` if it is `checkpoints/step_N`, the newest one if it is a training run, None if it is neither.

    Raises `CheckpointError` for a run that has not saved yet.
    """
    if (path / MANIFEST).is_file():
        return path
    if not (path / ARCHITECTURE).is_dir():
        return None
    from step35.runtime.checkpoint import latest

    newest = latest(path / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{path} is a run that has saved no checkpoint yet; wait for its first one.")
    return newest


def architecture(step: Path) -> Path:
    """Return the folder of config and tokenizer that `checkpoints/step_N` belongs to. Raises `CheckpointError`."""
    folder = step.resolve().parents[1] / ARCHITECTURE
    if not folder.is_dir():
        raise CheckpointError(f"{step} is a training checkpoint without its run: {folder} is missing; copy it there.")
    return folder


def save_model(
    model: Step35, path: str | Path, *, dtype: str | torch.dtype = "float32", shard_bytes: int = 4 * 2**30
) -> None:
    """Write the model into folder `path`; see `save_tensors`."""
    save_tensors(ModelTensors(model), model.config, path, dtype=dtype_name(dtype), shard_bytes=shard_bytes)


def save_tensors(
    source: Tensors, config: ModelConfig, path: str | Path, *, dtype: str = "float32", shard_bytes: int = 4 * 2**30
) -> None:
    """Write `config.json` and safetensors shards with an index into folder `path`, in the released names.

    `dtype` is one of `FORMATS`; router weights and biases stay fp32. One shard is in memory at a time.
    """
    if dtype not in FORMATS:
        raise CheckpointError(f"dtype='{dtype}' is not supported; choose one of {', '.join(FORMATS)}.")
    folder = Path(path)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shards = _plan(config, dtype, shard_bytes)
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        where, size = {}, 0
        for file, released in zip(names, shards, strict=True):
            tensors = {name: tensor for r in released for name, tensor in _stored(r, source[r], dtype).items()}
            publish(folder / file, lambda temporary, tensors=tensors: save_file(tensors, temporary, {"format": "pt"}))
            where.update(dict.fromkeys(tensors, file))
            size += sum(tensor.nbytes for tensor in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))})
        _write_json(folder / "config.json", released_config(config, dtype))
        for stale in set(folder.glob("*.safetensors")) - {folder / name for name in names}:
            stale.unlink()


def released_config(config: ModelConfig, dtype: str) -> dict[str, object]:
    """Return the content of `config.json` for a checkpoint written as `dtype`."""
    values = config.to_released()
    for key in ("dtype", "quantization_config"):  # the newer spelling of torch_dtype; the format that was read
        values.pop(key, None)
    if dtype != "float8":
        return {**values, "torch_dtype": dtype}
    names = [part.released for _, part in released_parts(config)]
    return {**values, "torch_dtype": "bfloat16", "quantization_config": quantisation_config(names)}


def dtype_named(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype of a name or of itself; raise `CheckpointError` for one not used in checkpoints here."""
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise CheckpointError(f"dtype='{name}' is not supported; choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _first_modules(config: ModelConfig, modules: int, path: Path) -> ModelConfig:
    if not 0 <= modules <= config.num_nextn_predict_layers:
        raise CheckpointError(
            f"mtp={modules} is not in 0..{config.num_nextn_predict_layers}, the MTP modules of {path}; lower it."
        )
    return config.with_mtp(modules)


def _stored(released: str, tensor: Tensor, dtype: str) -> dict[str, Tensor]:
    """Return what a checkpoint in `dtype` stores for one released tensor, under the stored names."""
    if released.endswith(FP32_NAMES):
        tensors = {released: tensor.float()}
    elif dtype == "float8" and is_quantised(released):
        numbers, scale = quantise(tensor)
        tensors = {released: numbers, released + SCALE_SUFFIX: scale}
    else:
        tensors = {released: tensor.to(DTYPES.get(dtype, torch.bfloat16))}
    if dtype == "float16" and not tensors[released].isfinite().all():
        largest = tensor.float().abs().max()
        raise CheckpointError(f"{released} has {largest:.3g}, beyond float16's 65504; write bfloat16 or float32.")
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _plan(config: ModelConfig, dtype: str, shard_bytes: int) -> list[list[str]]:
    """Return the released names of each shard; none is opened before the one before it is full."""
    shards: list[list[str]] = [[]]
    filled = 0
    for _, part in released_parts(config):
        size = _stored_bytes(part.released, part.shape, dtype)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(part.released)
        filled += size
    return shards


def _stored_bytes(released: str, shape: tuple[int, ...], dtype: str) -> int:
    if released.endswith(FP32_NAMES):
        return 4 * math.prod(shape)
    if dtype == "float8" and is_quantised(released):
        return math.prod(shape) + 4 * math.prod(scale_shape(shape))
    return DTYPES.get(dtype, torch.bfloat16).itemsize * math.prod(shape)


def set_dtypes(model: Step35, dtype: torch.dtype) -> None:
    """Give the model's tensors `dtype`, in place; router weights and biases become fp32."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.endswith(("router.weight", "router.bias")):
            tensor.data = tensor.data.to(dtype)
        else:
            tensor.data = tensor.data.float()


def _write_json(path: Path, value: object) -> None:
    publish(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))
