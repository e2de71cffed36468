"""GGUF files, as llama.cpp reads them: written and read tensor by tensor through the `gguf` package.

Formats: F32, BF16, and Q8_0 (blocks of 32 numbers with one scale). Norms, router and rotary frequencies are always
F32, and so is a matrix whose rows Q8_0 cannot divide.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from step35.config.model import ModelConfig
from step35.errors import CheckpointError, Step35Error
from step35.model.gguf_layout import (
    ARCHITECTURE,
    RELEASED_CONFIG,
    ROPE_FREQUENCIES,
    config_of,
    gguf_name,
    is_norm,
    metadata,
    released_name,
    rope_frequencies,
)
from step35.model.layout import FP32_NAMES, released_parts
from step35.model.tensors import Tensors
from step35.runtime.disk import disk_errors, publish

FORMATS = ("F32", "BF16", "Q8_0")
_FILE_TYPES = {"F32": 0, "Q8_0": 7, "BF16": 32}


class GGUFTensors(Tensors):
    """A GGUF file under released names, dequantised to fp32 when read; `metadata` holds its keys."""

    def __init__(self, path: Path) -> None:
        gguf = _library()
        if not path.is_file():
            raise CheckpointError(f"'{path}' is not a file; give a .gguf file.")
        try:
            reader = gguf.GGUFReader(path)
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError) as error:
            raise CheckpointError(
                f"{path} cannot be read as GGUF ({error}); it is {path.stat().st_size} bytes. Copy it again."
            ) from None
        self.place = str(path)
        self._tensors = {released_name(tensor.name): tensor for tensor in reader.tensors}
        self._frequencies = self._tensors.pop(ROPE_FREQUENCIES, None)
        self._dequantise = gguf.quants.dequantize

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._read(self._tensors[name]).view(self.shape(name))
        return tensor - 1.0 if is_norm(name) else tensor

    def config(self) -> ModelConfig:
        """Return the config that the file holds; for a file of another writer a config.json beside it comes first."""
        if RELEASED_CONFIG not in self.metadata and Path(self.place).with_name("config.json").is_file():
            return ModelConfig.read(Path(self.place).parent)
        ending = ".moe.gate.weight"
        moe_layers = sorted(int(name.split(".")[2]) for name in self._tensors if name.endswith(ending))
        frequencies = None if self._frequencies is None else self._read(self._frequencies)
        return config_of(self.metadata, moe_layers, frequencies)

    def _read(self, tensor: Any) -> Tensor:
        return torch.from_numpy(np.array(self._dequantise(tensor.data, tensor.tensor_type), dtype=np.float32))


def write_gguf(
    source: Tensors, config: ModelConfig, path: str | Path, *, form: str, vocabulary: dict[str, Any], name: str
) -> None:
    """Write `source` as one GGUF file; `vocabulary` holds the tokenizer's keys, `name` is shown to users.

    Raises `CheckpointError` for an unknown `form`, `ConfigError` for a config that GGUF cannot express. The file gets
    its name when it is whole.
    """
    if form not in FORMATS:
        raise CheckpointError(f"format='{form}' is not supported for GGUF; choose one of {', '.join(FORMATS)}.")
    path = Path(path)
    keys = {"general.name": name, "general.file_type": _FILE_TYPES[form], **metadata(config), **vocabulary}
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        publish(path, lambda temporary: _write(temporary, source, config, form, keys))


def _write(path: Path, source: Tensors, config: ModelConfig, form: str, keys: dict[str, Any]) -> None:
    gguf = _library()
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for key, value in keys.items():
        _add(writer, key, value)
    frequencies = rope_frequencies(config)
    if frequencies is not None:
        writer.add_tensor_info(ROPE_FREQUENCIES, frequencies.shape, np.dtype(np.float32), frequencies.nbytes)
    forms = {part.released: _form_of(part.released, part.shape, form) for _, part in released_parts(config)}
    for _, part in released_parts(config):
        stored = forms[part.released]
        shape = _stored_shape(part.shape, stored)
        dtype = np.dtype(np.float32 if stored == "F32" else np.uint8)
        size = int(np.prod(shape)) * dtype.itemsize
        raw = getattr(gguf.GGMLQuantizationType, stored)
        writer.add_tensor_info(gguf_name(part.released), shape, dtype, size, raw_dtype=raw)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if frequencies is not None:
            writer.write_tensor_data(frequencies.numpy())
        for released, stored in forms.items():
            writer.write_tensor_data(_stored(source[released], released, stored))
    finally:
        writer.close()


def _form_of(released: str, shape: tuple[int, ...], form: str) -> str:
    exact = len(shape) == 1 or released.endswith(FP32_NAMES)
    return "F32" if exact or (form == "Q8_0" and shape[-1] % 32) else form


def _stored_shape(shape: tuple[int, ...], form: str) -> tuple[int, ...]:
    """Return the shape of the stored array: fp32 numbers, or bytes."""
    bytes_of = {"F32": shape[-1], "BF16": 2 * shape[-1], "Q8_0": shape[-1] // 32 * 34}
    return (*shape[:-1], bytes_of[form])


def _stored(tensor: Tensor, released: str, form: str) -> np.ndarray[Any, Any]:
    tensor = tensor.detach().cpu().contiguous()
    if form == "BF16":
        return tensor.bfloat16().view(torch.uint8).numpy()
    numbers = (tensor.float() + 1.0 if is_norm(released) else tensor.float()).numpy()
    if form == "F32":
        return numbers
    gguf = _library()
    return gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)


def _add(writer: Any, key: str, value: Any) -> None:
    """Write one key as the GGUF type of its Python type."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise Step35Error("GGUF files need the gguf package; install it: pip install 'step35[gguf]'.") from None
    return gguf
