"""Sources of tensors under their released names: a model, a checkpoint folder, a GGUF file.

Every source is a mapping that reads a tensor when asked for it, so that whoever loads, converts or writes needs one
tensor in memory beside the result. `check` compares a source with a config before anything is read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from step35.config.model import ModelConfig
from step35.errors import CheckpointError
from step35.model.layout import released_parts
from step35.model.step35 import Step35

SHOWN = 20
"""Problems that one error lists."""


class Tensors(Mapping[str, Tensor]):
    """Released name to tensor; reading happens at `source[name]`."""

    place: str
    """Where the tensors come from, for errors."""
    problems: tuple[str, ...] = ()
    """What is wrong with the source itself, such as truncated files."""
    lost: frozenset[str] = frozenset()
    """Tensors of files that `problems` names: not there, but not to be called missing one by one."""
    incomplete = False
    """Whether such files may hold any tensor."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""

    def read_into(self, name: str, out: Tensor) -> None:
        """Copy the tensor into `out`, rounded to its dtype."""
        out.copy_(self[name])


class StateTensors(Tensors):
    """The tensors of a model's state dictionary, found in `place`."""

    def __init__(self, state: Mapping[str, Tensor], config: ModelConfig, place: str) -> None:
        self.place = place
        self._state = state
        self._parts = {part.released: (name, part) for name, part in released_parts(config) if name in state}

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._parts[name][1].shape

    def __getitem__(self, name: str) -> Tensor:
        ours, part = self._parts[name]
        return self._state[ours].detach().narrow(part.dim, part.start, part.length)


class ModelTensors(StateTensors):
    """The tensors of a model in memory."""

    def __init__(self, model: Step35) -> None:
        super().__init__(model.state_dict(), model.config, "the model")


class Watched(Tensors):
    """`source`, telling `on_read` about every tensor that is read, for a progress bar."""

    def __init__(self, source: Tensors, on_read: Callable[[], None]) -> None:
        self.place, self.problems, self.lost = source.place, source.problems, source.lost
        self._source, self._on_read = source, on_read

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def __getitem__(self, name: str) -> Tensor:
        self._on_read()
        return self._source[name]


def fill(model: Step35, source: Tensors) -> None:
    """Copy every tensor of `source` into its slice of the model's packed parameters."""
    state = model.state_dict()
    with torch.no_grad():
        for ours, part in released_parts(model.config):
            source.read_into(part.released, state[ours].narrow(part.dim, part.start, part.length))


def check(source: Tensors, config: ModelConfig, *, also: frozenset[str] = frozenset()) -> None:
    """Raise `CheckpointError` unless `source` holds the tensors of `config`, all problems at once; `also` may exist."""
    wanted = {part.released: part.shape for _, part in released_parts(config)}
    problems = list(source.problems)
    missing = [name for name in wanted if name not in source and name not in source.lost]
    problems += [f"missing: {name}" for name in missing if not source.incomplete]
    problems += [f"unexpected: {name}" for name in source if name not in wanted and name not in also]
    for name, shape in wanted.items():
        if name in source and source.shape(name) != shape:
            problems.append(f"misshapen: {name} is {list(source.shape(name))}, config.json asks {list(shape)}")
    if problems:
        shown = "\n  ".join(problems[:SHOWN]) + (
            f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        )
        raise CheckpointError(f"{source.place} does not match its config.json:\n  {shown}\n{_remedy(missing, config)}")


def _remedy(missing: list[str], config: ModelConfig) -> str:
    trunk = config.num_hidden_layers
    if missing and all(name.startswith("model.layers.") and int(name.split(".")[2]) >= trunk for name in missing):
        return "Only tensors of MTP modules are missing: load with mtp=0 (--mtp 0) to do without."
    return "Export or fetch the checkpoint again, or correct config.json."
