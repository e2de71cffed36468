"""Speed of the model on this machine: ours beside transformers' text model, same weights, dtype and threads, one run.

Measured at each length T: prefill (logits at all positions) and training (loss and gradients; no optimiser, no MTP) in
tokens/s. A pass holds 4,096 tokens, or one sequence where that is longer, so that T changes attention alone and not how
many rows the other products have. Shares of time are taken from passes with marks at the borders of a part: the
sliding layers' attention as a whole (projections, norms, rotation, scores and sums, gate), also as a share of all
layers' attention, its scores and sums alone ("kernel"), and those of all layers; what remains then is held against the
measured peak of matrix products.

At T = 512 a query of `mini` sees 256 keys on average and 480 at 4,096, so the kernel's own share rises between them by
the sum alone. The shares are therefore taken a second time ("narrow"), the window at most a quarter of the shortest T.

    python benchmarks/model.py [--preset mini] [--lengths 512 4096 16384] [--dtype bfloat16]

The last line is JSON with the ratios; the result file holds everything, with command, commit and machine.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from step35.config.cost import active_parameters
from step35.config.model import LayerConfig
from step35.config.presets import preset
from step35.model.attention import Attention
from step35.model.context import Context
from step35.model.init import initialise
from step35.model.step35 import Step35
from step35.model.weights import save_model, set_dtypes
from step35.runtime.console import Console
from step35.runtime.device import reuse_memory, set_threads
from step35.runtime.machine import environment
from step35.train.loss import summed_cross_entropy

RESULTS = Path(__file__).parent / "results"
RATIOS = (
    "training_ratio",
    "forward_ratio",
    "sliding_attention_share",
    "sliding_kernel_share",
    "sliding_share_of_attention",
    "narrow_sliding_attention_share",
    "narrow_sliding_kernel_share",
    "non_attention_of_peak",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--tokens", type=int, default=4096, help="of a pass of several short sequences")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, default=20.0, help="time to spend on each measurement")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/model-PRESET-DTYPE.json")
    args = parser.parse_args()
    threads = set_threads()
    reuse_memory()  # as every training verb does; theirs gains as well
    dtype = getattr(torch, args.dtype)
    console = Console()
    config = preset(args.preset).with_mtp(0)
    ours = Step35(config)
    initialise(ours, torch.Generator().manual_seed(0))
    theirs = load_transformers(ours).to(dtype)
    set_dtypes(ours, dtype)
    narrow = min(config.sliding_window, min(args.lengths) // 4)
    peaks = {name: matmul_peak(getattr(torch, name)) for name in ("float32", "bfloat16")}
    rows = []
    for length in args.lengths:
        shape = max(1, args.tokens // length), length
        tokens = torch.randint(16, ours.config.vocab_size, shape, generator=torch.Generator().manual_seed(length))
        row = measure(ours, theirs, tokens, args.seconds)
        row |= {f"narrow_{name}": share for name, share in measure_shares(ours, tokens, args.seconds, narrow).items()}
        row["non_attention_of_peak"] = row["non_attention_flops"] / peaks[args.dtype]
        row["non_attention_of_bfloat16_peak"] = row["non_attention_flops"] / peaks["bfloat16"]
        rows.append(row)
        print(json.dumps(row), flush=True)
    ratios = summary(rows)
    show(rows, console)
    result = {
        "command": " ".join(["python", "benchmarks/model.py", *sys.argv[1:]]),
        "environment": environment() | {"threads": threads, "transformers": transformers.__version__},
        "preset": args.preset, "dtype": args.dtype, "matmul_peak_flops": peaks, "rows": rows, "ratios": ratios,
    }  # fmt: skip
    out = args.out or RESULTS / f"model-{args.preset}-{args.dtype}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(ratios))


def load_transformers(model: Step35) -> torch.nn.Module:
    """Return transformers' model with the same weights, read by its own loader from the released layout."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        path = Path(folder) / "config.json"
        text = json.loads(path.read_text())
        wrapped = {
            "architectures": ["Step3p7ForConditionalGeneration"],
            "model_type": "step3p7",
            "image_token_id": text["vocab_size"] - 1,
            "text_config": text,
            "vision_config": {"width": 32, "layers": 1, "heads": 2, "image_size": 56, "patch_size": 14},
        }  # transformers knows this text model only inside the multimodal one
        path.write_text(json.dumps(wrapped))
        return transformers.Step3p7ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )


class Clock:
    """Seconds spent in parts of a pass, forward and backward.

    The backward pass runs operations in the reverse order of the forward pass, so a part's lie between the two marks.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, name: str, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return the part's output, its time counted as `name`'s."""
        return Mark.apply(self, name, 1, part(*Mark.apply(self, name, -1, *inputs)))[0]

    def add(self, name: str, sign: int) -> None:
        self.seconds[name] += sign * time.perf_counter()


class Mark(torch.autograd.Function):
    """The identity, which takes the time when it is passed: where a part begins, forward -1, and where it ends, 1."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, name: str, sign: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.clock, ctx.name, ctx.sign = clock, name, sign
        clock.add(name, sign)
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.clock.add(ctx.name, -ctx.sign)
        return None, None, None, *grads


class Timed(Context):
    """A pass whose scores and sums are timed, by kind of layer; `window`, if any, replaces the sliding layers'."""

    clock: Clock
    window: int | None = None

    def attend(self, layer: LayerConfig, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor) -> Tensor:
        if self.window and layer.window:
            layer = replace(layer, window=self.window)
        return self.clock.timed(f"{layer.kind} kernel", partial(super().attend, layer), q_BTHC, k_BTKC, v_BTKC)


def train_timed(model: Step35, tokens: Tensor, clock: Clock, window: int | None) -> None:
    """Run one forward and backward pass; count its time, and that of attention, on the clock."""
    context = Timed.packed(tokens)
    context.clock, context.window = clock, window
    modules = [layer.attention for layer in model.layers]
    for module in modules:
        module.forward = partial(time_attention, module, clock)
    clock.add("pass", -1)
    train_ours(model, tokens, context)
    clock.add("pass", 1)
    for module in modules:
        del module.forward


def time_attention(module: Attention, clock: Clock, x_BTD: Tensor, context: Context) -> Tensor:
    """Return what the module does, timed by kind of layer."""
    return clock.timed(module.layer.kind, lambda x: type(module).forward(module, x, context), x_BTD)


def train_ours(model: Step35, tokens: Tensor, context: Context | None = None) -> None:
    """Run one forward and backward pass."""
    context = context or Context.packed(tokens)
    h_ND = model.norm(model.trunk(tokens, context))[:, :-1].flatten(0, 1)
    (summed_cross_entropy(h_ND, model.lm_head.weight, tokens[:, 1:].flatten()) / len(h_ND)).backward()
    model.zero_grad(set_to_none=True)


def train_theirs(model: torch.nn.Module, tokens: Tensor) -> None:
    """Run one forward and backward pass, the loss as transformers computes it."""
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad(set_to_none=True)


def measure(ours: Step35, theirs: torch.nn.Module, tokens: Tensor, seconds: float) -> dict[str, float]:
    """Return tokens/s, shares and FLOP/s at one length; ours and theirs run in turn, the fastest of each counts."""
    size = tokens.numel()
    with torch.inference_mode():
        output, expected = ours(tokens).logits, theirs(input_ids=tokens).logits.float()
        error = float((output - expected).norm() / expected.norm())
        del output, expected
        forward, forward_theirs = fastest([lambda: ours(tokens), lambda: theirs(input_ids=tokens)], seconds)
    training, training_theirs = fastest(
        [lambda: train_ours(ours, tokens), lambda: train_theirs(theirs, tokens)], seconds
    )
    shares = measure_shares(ours, tokens, seconds)
    used = active_parameters(ours.config) + ours.lm_head.weight.numel()
    return {
        "length": tokens.shape[1],
        "sequences": len(tokens),
        "relative_error": error,
        "forward_tokens_per_s": size / forward,
        "forward_tokens_per_s_transformers": size / forward_theirs,
        "forward_ratio": forward_theirs / forward,
        "training_tokens_per_s": size / training,
        "training_tokens_per_s_transformers": size / training_theirs,
        "training_ratio": training_theirs / training,
        **shares,
        "non_attention_flops": 6 * used * size / (training * (1 - shares["kernel_share"])),
    }


def measure_shares(model: Step35, tokens: Tensor, seconds: float, window: int | None = None) -> dict[str, float]:
    """Return attention's shares of the time of training passes, with the model's own window or another."""
    clock, passes = Clock(), 0
    while clock.seconds["pass"] < seconds:
        train_timed(model, tokens, clock, window)
        passes += 1
    share = {name: spent / clock.seconds["pass"] for name, spent in clock.seconds.items()}
    return {
        "sliding_attention_share": share["sliding"],
        "sliding_kernel_share": share["sliding kernel"],
        "sliding_share_of_attention": share["sliding"] / (share["sliding"] + share["full"]),
        "kernel_share": share["sliding kernel"] + share["full kernel"],
        "sliding_kernel_s_per_token": clock.seconds["sliding kernel"] / (passes * tokens.numel()),
    }


def fastest(works: list[Callable[[], object]], seconds: float) -> list[float]:
    """Run the works in turn until `seconds` have passed, each at least once; return the least time of each."""
    best = [math.inf] * len(works)
    began = time.perf_counter()
    while math.inf in best or time.perf_counter() - began < seconds:
        for i, work in enumerate(works):
            start = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def matmul_peak(dtype: torch.dtype, size: int = 2048) -> float:
    """Return the FLOP/s of a large product, measured."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / min(fastest([lambda: a @ b], 2.0))


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the ratios by name."""
    ratios = {}
    for row in rows:
        length = int(row["length"])
        for key in RATIOS:
            ratios[f"{key}_{length}"] = round(row[key], 3)
        ratios[f"sliding_kernel_us_per_token_{length}"] = round(row["sliding_kernel_s_per_token"] * 1e6, 1)
    ratios["non_attention_of_bfloat16_peak"] = round(max(row["non_attention_of_bfloat16_peak"] for row in rows), 3)
    return ratios


def show(rows: list[dict[str, float]], console: Console) -> None:
    """Print the tables."""

    def pair(row: dict[str, float], what: str) -> tuple[str, str, str]:
        return (
            f"{row[f'{what}_tokens_per_s']:,.0f}",
            f"{row[f'{what}_tokens_per_s_transformers']:,.0f}",
            f"{row[f'{what}_ratio']:.2f}x",
        )

    heads = ["T", "forward", "theirs", "ratio", "training", "theirs", "ratio"]
    speeds = [(f"{int(row['length']):,}", *pair(row, "forward"), *pair(row, "training")) for row in rows]
    console.table("ours and transformers, tokens/s", heads, speeds)
    shares = (*(name for name in RATIOS if "share" in name), "kernel_share", "non_attention_of_peak")
    heads = ["T", "SWA", "its kernel", "of attention", "narrow SWA", "its kernel", "all kernels", "rest of the peak"]
    of_pass = [(f"{int(row['length']):,}", *(f"{row[name]:.1%}" for name in shares)) for row in rows]
    console.table("a training pass of ours", heads, of_pass)


if __name__ == "__main__":
    main()
