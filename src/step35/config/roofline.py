"""How fast a model can decode on given hardware at best: a roofline, with and without MTP.

A step is one pass of the trunk over `drafts` + 1 tokens of each sequence, then `drafts` passes of MTP modules, one
after the other. A pass takes the longer of reading (weights once, cache once a sequence) and computing, and then its
collectives, which nothing hides. Weights split evenly over the devices, experts too; keys and values down to one
head a device. Left out: launches, sampling, scheduling, devices that wait for others or run below their peak. So a
measured speed is lower. One assumption may err the other way: experts are taken to be chosen evenly and independently,
and tokens that choose alike read fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from operator import mul

from step35.config.cost import active_parameters, kept_elements, mtp_module, parts, scores
from step35.config.hardware import BYTES, COLLECTIVE_S, Format, Hardware
from step35.config.model import LayerConfig, ModelConfig
from step35.errors import ConfigError

CLAIMED = (100, 350)
"""Tokens/s of a sequence that the release states for Hopper: 100-300 in typical use, 350 at most, in coding."""
COLLECTIVES_A_BLOCK = 2
"""All-reduces after attention and after the FFN."""
ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class Setup:
    """What decodes: devices, formats, and how often drafts are accepted."""

    hardware: Hardware
    gpus: int = 8
    weights: Format = "bfloat16"
    cache: Format = "bfloat16"
    acceptance: tuple[float, ...] = ()
    """Per MTP depth: the probability that its draft is accepted given that the one before was."""
    collective_s: float = COLLECTIVE_S

    @property
    def drafts(self) -> int:
        return len(self.acceptance)

    @property
    def tokens_a_step(self) -> float:
        """Tokens that one step yields on average: 1 + a1 + a1 a2 + a1 a2 a3."""
        return 1 + float(sum(accumulate(self.acceptance, mul)))


@dataclass(frozen=True)
class Pass:
    """Seconds of one pass, or of a step's passes together."""

    weights_s: float
    cache_s: float
    compute_s: float
    communication_s: float

    @property
    def seconds(self) -> float:
        return max(self.weights_s + self.cache_s, self.compute_s) + self.communication_s


@dataclass(frozen=True)
class Speed:
    """Decoding `batch` sequences at length `context`."""

    batch: int
    context: int
    step_s: float
    sequence: float
    """Tokens/s of one sequence."""
    total: float
    """Tokens/s of all sequences."""
    bound: str
    """What takes most of the step: weights, cache, compute or communication."""
    held_bytes: float
    """Weights, MTP and embedding included, and cache, on all devices together."""
    fits: bool


def speed(config: ModelConfig, setup: Setup, *, batch: int, context: int) -> Speed:
    """Return the bound on decoding speed. Raises `ConfigError` for what `check` refuses."""
    check(config, setup)
    drafting = [_module_pass(config, setup, i, batch=batch, context=context) for i in range(setup.drafts)]
    passes = [_trunk_pass(config, setup, batch=batch, context=context), *drafting]
    step_s = sum(one.seconds for one in passes)
    rate = setup.tokens_a_step / step_s
    held = held_bytes(config, setup, batch=batch, context=context)
    return Speed(
        batch=batch,
        context=context,
        step_s=step_s,
        sequence=rate,
        total=batch * rate,
        bound=_bound(passes),
        held_bytes=held,
        fits=held <= setup.gpus * setup.hardware.memory_bytes,
    )


def check(config: ModelConfig, setup: Setup) -> None:
    """Refuse more drafts than modules, probabilities outside 0..1, devices without link, weights that do not fit."""
    if setup.drafts > config.num_nextn_predict_layers:
        raise ConfigError(
            f"acceptance has {setup.drafts} depths, but the model has {config.num_nextn_predict_layers} MTP modules; "
            "give one probability a module, or fewer."
        )
    bad = [probability for probability in setup.acceptance if not 0 <= probability <= 1]
    if bad:
        raise ConfigError(f"acceptance={bad[0]} is no probability; give values from 0 to 1.")
    if setup.gpus < 1 or (setup.gpus > 1 and not setup.hardware.link):
        allowed = "at least 1" if setup.hardware.link else "1, for it has no link to others"
        raise ConfigError(f"gpus={setup.gpus} of {setup.hardware.name}: the number must be {allowed}.")
    size, room = _weight_bytes(config, setup), setup.hardware.memory_bytes
    if size > setup.gpus * room:
        more = f"give --gpus {ceil(size / room)} or more" if setup.hardware.link else "choose other --hardware"
        raise ConfigError(
            f"the weights in {setup.weights} are {size / 1e9:.1f} GB, and {setup.gpus} x {setup.hardware.name} hold "
            f"{setup.gpus * room / 1e9:.1f} GB; {more}, or smaller --weights."
        )


def held_bytes(config: ModelConfig, setup: Setup, *, batch: int, context: int) -> float:
    """Return the bytes that all devices hold: weights, and each sequence's cache, copied where heads are too few."""
    layers = config.layers()[: config.num_hidden_layers + setup.drafts]
    kept = sum(kept_elements(layer, context) * setup.gpus / _cache_shards(layer, setup) for layer in layers)
    return _weight_bytes(config, setup) + batch * kept * BYTES[setup.cache]


def distinct_experts(config: ModelConfig, tokens: int) -> float:
    """Return how many experts of a layer `tokens` tokens choose, if each chooses evenly: E (1 - (1 - K/E)^tokens)."""
    experts, chosen = config.moe_num_experts, config.moe_top_k
    return experts * (1 - (1 - chosen / experts) ** tokens)


def _trunk_pass(config: ModelConfig, setup: Setup, *, batch: int, context: int) -> Pass:
    """Verify: all dense weights and the chosen experts are read once, each sequence's cache once."""
    tokens = batch * (setup.drafts + 1)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    chosen = sum(distinct_experts(config, tokens) for _ in config.moe_layers_enum)
    work = _Work(
        layers=config.trunk_layers(),
        read=sum(part.total for part in parts(config) if part.name in _DENSE) + chosen * expert,
        products=tokens * (active_parameters(config) + config.vocab_size * config.hidden_size),
        collectives=COLLECTIVES_A_BLOCK * config.num_hidden_layers + 1,
    )
    return _pass(config, setup, work, batch=batch, context=context)


def _module_pass(config: ModelConfig, setup: Setup, depth: int, *, batch: int, context: int) -> Pass:
    """Draft at one depth: block and head are read once; the block sees all tokens of the step, the head the last.

    Joint projection and head have a collective each.
    """
    layer = config.layer(config.num_hidden_layers + depth)
    module, head = mtp_module(config, layer), config.vocab_size * config.hidden_size
    tokens = batch * (setup.drafts + 1)
    work = _Work(
        [layer], read=module + head, products=module * tokens + head * batch, collectives=2 + COLLECTIVES_A_BLOCK
    )
    return _pass(config, setup, work, batch=batch, context=context)


@dataclass(frozen=True)
class _Work:
    """What a pass does."""

    layers: list[LayerConfig]
    read: float
    """Parameters read."""
    products: float
    """Multiply-adds with parameters."""
    collectives: int


def _pass(config: ModelConfig, setup: Setup, work: _Work, *, batch: int, context: int) -> Pass:
    """Return the seconds that `work` takes on `drafts` + 1 tokens of each sequence."""
    hardware, gpus, tokens = setup.hardware, setup.gpus, batch * (setup.drafts + 1)
    kept = sum(kept_elements(layer, context) / _cache_shards(layer, setup) for layer in work.layers)
    score_flops = tokens * sum(scores(layer, context) for layer in work.layers)
    sent = tokens * config.hidden_size * ACTIVATION_BYTES * 2 * (gpus - 1) / gpus
    wire_s = sent / hardware.link if gpus > 1 else 0.0
    return Pass(
        weights_s=work.read * BYTES[setup.weights] / gpus / hardware.bandwidth,
        cache_s=batch * kept * BYTES[setup.cache] / hardware.bandwidth,
        compute_s=(2 * work.products / hardware.flops[setup.weights] + score_flops / hardware.flops["bfloat16"]) / gpus,
        communication_s=work.collectives * (setup.collective_s + wire_s) if gpus > 1 else 0.0,
    )


def _bound(passes: Sequence[Pass]) -> str:
    """Return what takes most of the passes' time: in each, reading or computing, whichever is longer, and the links."""
    reading = [one for one in passes if one.weights_s + one.cache_s >= one.compute_s]
    taken = {
        "weights": sum(one.weights_s for one in reading),
        "cache": sum(one.cache_s for one in reading),
        "compute": sum(one.compute_s for one in passes if one not in reading),
        "communication": sum(one.communication_s for one in passes),
    }
    return max(taken, key=lambda name: taken[name])


_DENSE = (
    "attention, full layers", "attention, sliding layers", "dense FFN", "shared experts", "routers", "norms",
    "output head",
)  # fmt: skip
"""Parts of the trunk that each pass reads whole."""


def _cache_shards(layer: LayerConfig, setup: Setup) -> int:
    return min(setup.gpus, layer.kv_heads)


def _weight_bytes(config: ModelConfig, setup: Setup) -> float:
    return sum(part.total for part in parts(config)) * BYTES[setup.weights]
