"""Checkpoints in the released layout: safetensors in one file or in shards, read tensor by tensor, written in shards.

Our packed parameters are filled slice by slice, so loading needs the model's own memory plus one tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from step35.config.model import ModelConfig
from step35.errors import CheckpointError
from step35.model.layout import FP32_NAMES, released_parts
from step35.model.step35 import Step35
from step35.runtime.disk import disk_errors

INDEX = "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(path: str | Path, *, dtype: str = "float32", device: str = "cpu") -> Step35:
    """Load a checkpoint folder in the released layout; router weights and biases stay fp32.

    Raises `CheckpointError` for a folder that is no checkpoint, and for missing, unexpected, misshapen or truncated
    tensors (all named at once); `ConfigError` for a config that contradicts itself.
    """
    folder = Path(path)
    target = dtype_named(dtype)
    config = ModelConfig.read(folder)
    with torch.device("meta"):
        model = Step35(config)
    model.to_empty(device=device)
    _set_dtypes(model, target)
    _fill(model, folder)
    return model.eval()


def save_model(model: Step35, path: str | Path, *, dtype: str = "float32", shard_bytes: int = 4 * 2**30) -> None:
    """Write `config.json` and safetensors shards with an index into folder `path`, in the released names."""
    folder = Path(path)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shards = _shards(model, dtype_named(dtype), shard_bytes)
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for name, tensors in zip(names, shards, strict=True):
            _publish(
                folder / name,
                lambda temporary, tensors=tensors: save_file(tensors, temporary, {"format": "pt"}),
            )
        where = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        size = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))})
        config = model.config.to_released()
        config.pop("dtype", None)  # the newer spelling of the next key
        _write_json(folder / "config.json", {**config, "torch_dtype": dtype})
        for stale in set(folder.glob("*.safetensors")) - {folder / name for name in names}:
            stale.unlink()


def dtype_named(name: str) -> torch.dtype:
    """Return the torch dtype called `name`; raise `CheckpointError` for one that checkpoints do not use here."""
    if name not in DTYPES:
        raise CheckpointError(f"dtype='{name}' is not supported; choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def released_tensors(model: Step35, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under its released name, contiguous, in `dtype` (router weights and biases in fp32)."""
    state = model.state_dict()
    for name, part in released_parts(model.config):
        tensor = state[name].detach().narrow(part.dim, part.start, part.length).to("cpu")
        keep = part.released.endswith(FP32_NAMES)
        yield part.released, tensor.to(torch.float32 if keep else dtype).contiguous().clone()


def _shards(model: Step35, dtype: torch.dtype, shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in released_tensors(model, dtype):
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def _set_dtypes(model: Step35, dtype: torch.dtype) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.endswith(("router.weight", "router.bias")):
            tensor.data = tensor.data.to(dtype)
        else:
            tensor.data = tensor.data.float()


def _fill(model: Step35, folder: Path) -> None:
    """Copy every released tensor into its slice, collecting all problems before raising."""
    files = _locate(folder)
    state = model.state_dict()
    wanted = {part.released: (name, part) for name, part in released_parts(model.config)}
    problems = [f"unexpected: {name}" for name in files if name not in wanted]
    found = set()
    for file in sorted(set(files.values())):
        with _opened(file) as tensors:
            for released in tensors.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                if released not in wanted:
                    continue
                found.add(released)
                name, part = wanted[released]
                tensor = tensors.get_tensor(released)
                if tuple(tensor.shape) != part.shape:
                    problems.append(
                        f"misshapen: {released} is {list(tensor.shape)}, config.json asks {list(part.shape)}"
                    )
                    continue
                with torch.no_grad():
                    state[name].narrow(part.dim, part.start, part.length).copy_(tensor)
    problems = [f"missing: {name}" for name in wanted if name not in found] + problems
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointError(
            f"{folder} does not match its config.json:\n  {shown}\n"
            "Export or fetch the checkpoint again, or correct config.json."
        )


def _locate(folder: Path) -> Mapping[str, Path]:
    """Return the file that holds each tensor, from the index or from the files themselves."""
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{index} is not an index of tensors ({error!r}); fetch or export it again."
            ) from None
        absent = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if absent:
            raise CheckpointError(f"{folder}: {INDEX} names files that are not there: {', '.join(absent)}; fetch them.")
        return {name: folder / file for name, file in weight_map.items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has a config.json but no *.safetensors file; export or fetch the weights.")
    located = {}
    for file in files:
        with _opened(file) as tensors:
            located.update(dict.fromkeys(tensors.keys(), file))
    return located


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        handle = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); it is {file.stat().st_size} bytes and probably truncated. Copy it again."
        ) from None
    with handle as tensors:
        yield tensors


def _publish(path: Path, write: object) -> None:
    """Write to a temporary name and rename, so that a file under its final name is always whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, value: object) -> None:
    _publish(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))
