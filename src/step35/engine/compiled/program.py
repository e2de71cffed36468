"""The model and its cache as the structures that `step.cpp` reads, and the calls that run it.

Nothing is copied: the structures point at the parameters, so weights that change in place are followed.
"""

# N rows  D model  V vocab

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step35.engine.blocks import BLOCK_TOKENS
from step35.engine.kv_cache import PagedCache
from step35.engine.sampling import Scores
from step35.engine.scheduler import Rows
from step35.model.experts import Experts
from step35.model.mlp import MLP
from step35.model.mtp import MTPModule
from step35.model.rope import inverse_frequencies
from step35.model.step35 import Step35
from step35.runtime.compiled import load_library

SOURCE = Path(__file__).with_name("step.cpp")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1}
BLOCK, MOST_GROUP, MOST_EXPERTS = 16, 64, 4096
"""What `step.cpp` is written for: tokens of a cache block, most query heads a kv head, most experts a layer."""


class CMatrix(Structure):
    _fields_ = (("data", c_void_p), ("scales", c_void_p), ("outs", c_int64), ("ins", c_int64), ("type", c_int32))


class CMlp(Structure):
    _fields_ = (("gate_up", CMatrix), ("down", CMatrix), ("hidden", c_int64), ("clip", c_float))


class CLayer(Structure):
    _fields_ = (
        *((name, CMatrix) for name in ("attention_norm", "qkv", "gate", "q_norm", "k_norm", "out", "ffn_norm")),
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int32) for name in ("heads", "kv_heads", "head_dim", "window", "rope", "experts", "top_k")),
        ("routed_scale", c_float),
        *((name, CMatrix) for name in ("router", "router_bias")),
        *((name, CMlp) for name in ("routed", "shared")),
    )


class CModule(Structure):
    _fields_ = (
        *((name, CMatrix) for name in ("embedding_norm", "hidden_norm", "joint", "norm", "head")),
        ("layer", CLayer),
    )


class CRope(Structure):
    _fields_ = (("frequencies", c_void_p), ("half", c_int64))


class CModel(Structure):
    _fields_ = (
        *((name, CMatrix) for name in ("embedding", "norm", "head")),
        *((name, c_void_p) for name in ("layers", "modules", "ropes", "hidden")),
        *((name, c_int32) for name in ("layer_count", "rope_count", "cache_type", "threads")),
        ("eps", c_float),
    )


class CBatch(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("tokens", "positions", "request", "full", "window")),
        *((name, c_int32) for name in ("rows", "first")),
    )


class CRequests(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("asked", "tokens", "full", "window")),
        *((name, c_int32) for name in ("count", "modules")),
    )


class Program:
    """The compiled passes of one model over one cache."""

    def __init__(self, library: ctypes.CDLL, model: Step35, cache: PagedCache, draft_vocabulary: int) -> None:
        self.library, self.model, self.cache = library, model, cache
        self.size, self.vocabulary = model.config.hidden_size, model.config.vocab_size
        self._kept: list[Any] = []  # what the structures point at
        self._ropes: dict[tuple[float, ...], int] = {}
        self._frequencies: list[Tensor] = []
        layers = [self._layer(block) for block in model.layers]
        modules = [self._module(module, draft_vocabulary) for module in model.mtp]
        ropes = [CRope(f.data_ptr(), len(f)) for f in self._frequencies]
        hidden = [state.data_ptr() for state in cache.hidden]
        self.c = CModel(
            matrix(model.embed_tokens.weight), matrix(model.norm.weight), linear(model.lm_head),
            self._array(CLayer, layers), self._array(CModule, modules), self._array(CRope, ropes),
            self._array(c_void_p, hidden) if hidden else None,
            len(layers), len(ropes), CACHE_TYPES[cache.dtype], torch.get_num_threads(),
            model.config.rms_norm_eps,
        )  # fmt: skip
        self.at = byref(self.c)
        library.run.argtypes = (c_void_p,) * 7

    @classmethod
    def create(cls, model: Step35, cache: PagedCache, draft_vocabulary: int) -> Program | None:
        """Return the model's compiled passes; None where they do not fit it, or cannot be compiled."""
        if not fits(model, cache):
            return None
        library = load_library(SOURCE, "decoding")
        return None if library is None else cls(library, model, cache, draft_vocabulary)

    def run(self, rows: Sequence[Rows]) -> tuple[Tensor, Scores]:
        """Make the drafts that are asked for, then run the trunk over all rows and over these.

        Returns the trunk's output (N, D), fp32, and the scores of each request's last known token and of its drafts.
        """
        modules = len(self.model.mtp)
        asked, tokens, count, ends = array("i"), array("i"), 0, 0
        for request, start, known, depth in rows:
            done, end = request.module_done[:depth], start + known
            first, ready = min(start, *done) if done else start, end == request.length
            asked.extend((depth, first, start, end, ready, *done, *[0] * (modules - depth)))
            tokens.extend(request.tokens[first:end])
            count += known + depth
            ends += 1 + depth if ready else 0
        tables = _tables(rows)
        table = _at(tables)
        requests = CRequests(_at(asked), _at(tokens), table, table + 8 * len(rows), len(rows), modules)
        h_ND, y_NV = torch.empty(count, self.size), torch.empty(ends, self.vocabulary)
        best, logprobs = array("i", bytes(4 * ends)), array("f", bytes(4 * ends))
        drafts = array("i", bytes(4 * len(rows) * modules))
        self.library.run(
            self.at, byref(requests), h_ND.data_ptr(), y_NV.data_ptr(), _at(best), _at(logprobs), _at(drafts)
        )
        for n, r in enumerate(rows):
            if r.depth:
                r.request.drafts = drafts[n * modules : n * modules + r.depth].tolist()
        return h_ND, Scores(y_NV, best.tolist(), logprobs.tolist())

    def module(self, k: int, tokens: Sequence[int], rows: Sequence[Rows]) -> Tensor:
        """Return MTP module k's output (N, D), fp32, and keep it for the next module."""
        h_ND = torch.empty(len(tokens), self.size)
        self.library.module(self.at, k, byref(batch(tokens, rows, k + 1)), c_void_p(h_ND.data_ptr()))
        return h_ND

    def logits(self, h_ND: Tensor) -> Scores:
        """Return the logits of the trunk's outputs (N, D)."""
        h_ND, count = h_ND.float().contiguous(), len(h_ND)
        y_NV, best, logprobs = torch.empty(count, self.vocabulary), (c_int32 * count)(), (c_float * count)()
        at = c_void_p(h_ND.data_ptr()), count, c_void_p(y_NV.data_ptr())
        self.library.logits(self.at, *at, best, logprobs)
        return Scores(y_NV, best[:], logprobs[:])

    def _array(self, kind: Any, items: Sequence[Any]) -> int | None:
        array = (kind * len(items))(*items)
        self._kept.append(array)
        return ctypes.addressof(array)

    def _module(self, module: MTPModule, draft_vocabulary: int) -> CModule:
        head = linear(module.head)
        head.outs = draft_vocabulary
        return CModule(
            matrix(module.embedding_norm.weight), matrix(module.hidden_norm.weight), linear(module.joint_proj),
            matrix(module.norm.weight), head, self._layer(module.block),
        )  # fmt: skip

    def _layer(self, block: Any) -> CLayer:
        attention, moe = block.attention, block.moe
        layer = attention.layer
        c = CLayer(
            matrix(block.attention_norm.weight), linear(attention.qkv_proj), linear(attention.gate_proj),
            matrix(attention.q_norm.weight), matrix(attention.k_norm.weight), linear(attention.o_proj),
            matrix(block.ffn_norm.weight),
            self.cache.keys[layer.index].data_ptr(), self.cache.values[layer.index].data_ptr(),
            layer.heads, layer.kv_heads, layer.head_dim, layer.window or 0, self._rope(inverse_frequencies(layer)),
        )  # fmt: skip
        if moe is None:
            c.shared = mlp(block.mlp)
        else:
            router = moe.router
            c.experts, c.top_k, c.routed_scale = len(router.weight), router.top_k, router.scale
            c.router, c.router_bias = matrix(router.weight), matrix(router.bias)
            c.routed, c.shared = experts(moe.experts), mlp(moe.shared)
        return c

    def _rope(self, frequencies: Tensor) -> int:
        """Return the number of the table with these frequencies; layers of one kind share one."""
        key = tuple(frequencies.tolist())
        if key not in self._ropes:
            self._ropes[key] = len(self._frequencies)
            self._frequencies.append(frequencies)
        return self._ropes[key]


def fits(model: Step35, cache: PagedCache) -> bool:
    """Return whether `step.cpp` can run this model: on a CPU, in types it knows, within its limits."""
    tensors = [*model.parameters(), *model.buffers()]
    known = all(t.device.type == "cpu" and t.dtype in TYPES and t.is_contiguous() for t in tensors)
    layers = model.config.layers()
    return (
        known
        and BLOCK_TOKENS == BLOCK
        and cache.dtype in CACHE_TYPES
        and all(layer.heads // layer.kv_heads <= MOST_GROUP for layer in layers)
        and model.config.moe_num_experts <= MOST_EXPERTS
    )


def matrix(weight: Tensor, scales: Tensor | None = None) -> CMatrix:
    """Describe a weight (..., outs, ins), or a vector as one row."""
    outs = weight.numel() // weight.shape[-1]
    return CMatrix(
        weight.data_ptr(), None if scales is None else scales.data_ptr(), outs, weight.shape[-1], TYPES[weight.dtype]
    )


def linear(module: Any) -> CMatrix:
    """Describe a linear layer's weight."""
    return matrix(module.weight, getattr(module, "scales", None))


def mlp(module: MLP) -> CMlp:
    """Describe a dense MLP."""
    return CMlp(linear(module.gate_up_proj), linear(module.down_proj), module.down_proj.weight.shape[-1], module.clip)


def experts(module: Experts) -> CMlp:
    """Describe the routed experts of a layer."""
    gate_up = matrix(module.gate_up_proj, getattr(module, "gate_up_scales", None))
    down = matrix(module.down_proj, getattr(module, "down_scales", None))
    return CMlp(gate_up, down, module.down_proj.shape[-1], module.clip)


def batch(tokens: Sequence[int], rows: Sequence[Rows], first: int) -> CBatch:
    """Describe the rows of a pass, in order, and the block tables of their requests."""
    count, positions, owners = len(tokens), list[int](), list[int]()
    for n, r in enumerate(rows):
        positions += range(r.start, r.end)
        owners += [n] * r.count
    ids = array("i", [*tokens, *positions, *owners])
    tables = _tables(rows)
    at, table = _at(ids), _at(tables)
    c = CBatch(at, at + 4 * count, at + 8 * count, table, table + 8 * len(rows), count, first)
    c.kept = ids, tables  # alive as long as what points at them
    return c


def _at(numbers: array[Any]) -> int:
    """Return where numbers lie."""
    return numbers.buffer_info()[0]


def _tables(rows: Sequence[Rows]) -> array[int]:
    """Return where the requests' block tables lie: those of full layers, then those of sliding layers."""
    return array("Q", [*(_at(r.request.full) for r in rows), *(_at(r.request.window) for r in rows)])
