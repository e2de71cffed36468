"""Shared fixtures: a model of 100k parameters that has every part of the architecture, and batches for it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from step35.config.model import RopeScaling
from step35.config.presets import s3f1
from step35.data.packing import Batch, Row, stack
from step35.model.init import initialise
from step35.model.step35 import Step35

MICRO: dict[str, Any] = {
    "layers": 5, "dense": 1, "mtp": 2, "heads": 2, "sliding_heads": 4, "groups": 2, "head_dim": 16,
    "theta_full": 5e6, "clips": {2: 0.4, 4: 0.4}, "clips_shared": {0: 0.4, 4: 0.4},
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "sliding_window": 8,
    "moe_num_experts": 4, "moe_top_k": 2, "moe_intermediate_size": 16, "share_expert_dim": 24,
    "moe_router_scaling_factor": 2.0, "max_position_embeddings": 256, "eos_token_id": (1, 3),
    "rope_scaling": RopeScaling(original_max_position_embeddings=1024),
}  # fmt: skip
"""Layers 0 and 4 are full, 1 to 3 and the MTP modules sliding. The clips are tight, so that they bite."""


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Step35]:
    """Return a function from a seed (and changes to `MICRO`) to a fresh model."""

    def make(seed: int = 0, **changes: Any) -> Step35:
        model = Step35(s3f1(**{**MICRO, **changes}))
        generator = torch.Generator().manual_seed(seed)
        initialise(model, generator)
        with torch.no_grad():  # off their neutral start, so that a norm, bias or head that is left out shows
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if tensor.ndim == 1:
                    tensor.normal_(std=0.2, generator=generator)
                elif "head" in name:
                    tensor *= 5
        return model

    return make


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """Give torch its number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """Return a function to random rows of two documents and padding, with unequal numbers of targets."""

    def make(rows: int = 4, tokens: int = 24, vocabulary: int = 97, seed: int = 0) -> Batch:
        random = np.random.default_rng(seed)
        return stack(
            [_row(random, tokens, vocabulary, first=tokens // 2 + row, padding=2 * row) for row in range(rows)]
        )

    return make


def _row(random: np.random.Generator, tokens: int, vocabulary: int, *, first: int, padding: int) -> Row:
    segments = np.zeros(tokens, dtype=np.int32)
    segments[first:] = 1
    segments[tokens - padding :] = -1
    targets = (random.random(tokens) < 0.8) & (segments >= 0)
    targets[[0, first]] = False
    return Row(random.integers(0, vocabulary, tokens), segments, targets)


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Return a source of processes that have the trainer loaded and start in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["step35.train.trainer"])
    return context


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the folder of reference data."""
    return Path(__file__).parent / "golden"
