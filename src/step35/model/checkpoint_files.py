"""The safetensors files of a checkpoint folder: one file or shards with an index, memory-mapped, FP8 or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from step35.config.model import ModelConfig
from step35.errors import CheckpointError
from step35.model.fp8 import FP8, SCALE_SUFFIX, block_of, dequantise, dequantise_into, scale_shape
from step35.model.tensors import Tensors

FLOATS = ("F64", "F32", "BF16", "F16")
INDEX = "model.safetensors.index.json"


class CheckpointFiles(Tensors):
    """Released tensors in `folder`; FP8 ones are dequantised when read."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.place = str(folder)
        self._block = block_of(config.other_keys.get("quantization_config"))
        self._where: dict[str, safe_open] = {}
        weight_map = _weight_map(folder)
        problems, unreadable = [], set()
        for name in sorted(set(weight_map.values())) or sorted(file.name for file in folder.glob("*.safetensors")):
            try:
                file = safe_open(folder / name, framework="pt")
                self._where.update(dict.fromkeys(file.keys(), file))
            except FileNotFoundError:
                problems.append(f"absent: {name}, which {INDEX} names")
                unreadable.add(name)
            except (SafetensorError, OSError) as error:
                size = (folder / name).stat().st_size
                problems.append(f"truncated or damaged: {name} cannot be read ({error}); it is {size} bytes")
                unreadable.add(name)
        if not self._where and not problems:
            raise CheckpointError(f"{folder} has a config.json but no *.safetensors file; export or fetch the weights.")
        self.lost = frozenset(name for name, file in weight_map.items() if file in unreadable)
        self.incomplete = bool(unreadable) and not weight_map
        self.problems = (*problems, *self._scale_problems())

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._where if not self._is_scale(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._where[name].get_tensor(name)
        scale = self._scale(name)
        return tensor if scale is None else dequantise(tensor, scale, self._block)

    def read_into(self, name: str, out: Tensor) -> None:
        scale = self._scale(name)
        if scale is None:
            out.copy_(self._where[name].get_tensor(name))
        else:
            dequantise_into(out, self._where[name].get_tensor(name), scale, self._block)

    def _is_scale(self, name: str) -> bool:
        return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in self._where

    def _scale(self, name: str) -> Tensor | None:
        scale = name + SCALE_SUFFIX
        return self._where[scale].get_tensor(scale) if scale in self._where else None

    def _scale_problems(self) -> list[str]:
        problems = []
        for name, file in self._where.items():
            scale = name + SCALE_SUFFIX
            if scale in self._where:
                wanted = scale_shape(self.shape(name), self._block)
                if self.shape(scale) != wanted:
                    problems.append(f"misshapen: {scale} is {list(self.shape(scale))}, its matrix asks {list(wanted)}")
            elif (dtype := file.get_slice(name).get_dtype()) == "F8_E4M3":
                problems.append(f"missing: {scale}, without which the {FP8} numbers of {name} mean nothing")
            elif dtype not in FLOATS:
                problems.append(
                    f"unreadable: {name} is stored as {dtype}; only {', '.join(FLOATS)} and FP8 blocks are read"
                )
        return problems


def _weight_map(folder: Path) -> dict[str, str]:
    """Return tensor name to file name as the index says; empty without an index."""
    index = folder / INDEX
    if not index.is_file():
        return {}
    try:
        return {str(name): str(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of tensors ({error!r}); fetch or export it again.") from None
