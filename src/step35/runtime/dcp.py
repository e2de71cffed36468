"""Named tensors in torch's distributed checkpoint format (DCP), written and read by one process.

DCP streams each tensor into `__0_0.distcp` and puts what lies where into `.metadata`. It is the format because its
files describe shards: a cluster's ranks can write their own files beside these, and read other splits back.

DCP pickles `.metadata`, and would read it with plain `pickle`, which can run any code. Here it is read by an unpickler
that knows the few classes a table of tensors is made of. The tensors themselves go through `torch.load` with
`weights_only`, and values that are not tensors, which DCP would pickle too, are not given to it.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

METADATA = ".metadata"
CLASSES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),  # its name since Python 3.13
}
"""What `.metadata` may be made of, by module; torch's dtypes besides."""


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` into the new folder `folder`, each file flushed to the disk; `RuntimeError` says why not."""
    with _as_one_process():
        # One thread: DCP loses the errors of further ones.
        save(tensors, storage_writer=FileSystemWriter(folder, thread_count=1), no_dist=True)


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, by the rest of their names, on the CPU."""
    with _as_one_process():
        reader = _Reader(folder)
        found = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
        }
        load(found, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


class _Reader(FileSystemReader):
    """DCP's reader with an unpickler that runs nothing."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / METADATA, "rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}, which no table of tensors needs")


@contextmanager
def _as_one_process() -> Iterator[None]:
    """Turn DCP's own exception into an error with its cause, and stop DCP wondering about the missing process group."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        yield
    except CheckpointException as error:  # not an Exception, and it hides what happened
        failure = next(iter(error.failures.values()))[0]
        raise RuntimeError(f"{type(failure).__name__}: {failure}") from failure
