"""Random streams by name: each (seed, stage, step, purpose) has a stream of its own.

Nothing depends on how many numbers were drawn before, so a resumed run draws what an unbroken one draws,
and adding a consumer changes no other stream.
"""

from __future__ import annotations

import hashlib
import json

import torch


def derive(seed: int, *names: str | int) -> int:
    """Return a seed in 0..2^63-1 that depends on `seed` and every name, and on nothing else."""
    text = json.dumps([seed, *names])  # JSON keeps ("ab", "c") and ("a", "bc"), and 1 and "1", apart
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator on `device` for the stream (seed, names)."""
    return torch.Generator(device=device).manual_seed(derive(seed, *names))
