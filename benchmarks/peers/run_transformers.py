"""transformers' text model on one job: `generate` with its key-value cache, greedy. Runs in its own environment."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rounds import Timing, load, measure, save


def main() -> None:
    job, out = load()
    torch.set_num_threads(job["threads"])
    model = read(Path(job["checkpoint"]), getattr(torch, job["dtype"]))
    speeds = measure(job, lambda prompts, new: generate(model, prompts, new))
    save(out, f"transformers {transformers.__version__}, torch {torch.__version__}", speeds)


def read(checkpoint: Path, dtype: torch.dtype) -> Any:
    """Load the checkpoint inside the multimodal config that transformers knows this text model by."""
    text = json.loads((checkpoint / "config.json").read_text())
    config = {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "image_token_id": text["vocab_size"] - 1,
        "text_config": text,
        "vision_config": {"width": 32, "layers": 1, "heads": 2, "image_size": 56, "patch_size": 14},
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        for file in checkpoint.glob("model*"):
            (Path(folder) / file.name).symlink_to(file.resolve())
        model = transformers.Step3p7ForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        )
    model.generation_config.eos_token_id = None
    return model.eval()


class Clock(transformers.LogitsProcessor):
    """Notes when the first token's logits are there; changes nothing."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.first = self.first or time.perf_counter()
        return scores


@torch.inference_mode()
def generate(model: Any, prompts: Sequence[Sequence[int]], new: int) -> Timing:
    ids = torch.tensor(prompts)
    clock, started = Clock(), time.perf_counter()
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, use_cache=True,
        pad_token_id=1, logits_processor=[clock],
    )  # fmt: skip
    total = time.perf_counter() - started
    if output.shape != (len(prompts), ids.shape[1] + new):
        raise SystemExit(f"transformers gave {tuple(output.shape)} ids, not {len(prompts)} x {ids.shape[1] + new}")
    return Timing(clock.first - started, total)


main()
