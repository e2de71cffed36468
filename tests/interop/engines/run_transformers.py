"""transformers' text model on one case: logits and greedy tokens. Runs in its own environment."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers


def wrapped(checkpoint: Path, folder: Path) -> Path:
    """Link the checkpoint into a multimodal config: transformers knows this text model only inside `step3p7`."""
    text = json.loads((checkpoint / "config.json").read_text())
    config = {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "torch_dtype": text["torch_dtype"],
        "image_token_id": text["vocab_size"] - 1,
        "text_config": text,
        "vision_config": {"width": 32, "layers": 1, "heads": 2, "image_size": 56, "patch_size": 14},
    }
    (folder / "config.json").write_text(json.dumps(config))
    for file in checkpoint.glob("model*"):
        (folder / file.name).symlink_to(file.resolve())
    return folder


def main() -> None:
    case, out = Path(sys.argv[1]), Path(sys.argv[2])
    prompts = json.loads((case / "prompts.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        model, info = transformers.Step3p7ForConditionalGeneration.from_pretrained(
            wrapped(case / "checkpoint", Path(folder)),
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    lost = [name for name in info["missing_keys"] if "vision" not in name and "projector" not in name]
    if lost or info["mismatched_keys"]:
        raise SystemExit(f"transformers did not find {lost}, mismatched {info['mismatched_keys']}")
    arrays = {}
    with torch.no_grad():
        for i, prompt in enumerate(prompts["ids"]):
            ids = torch.tensor([prompt])
            arrays[f"logits{i}"] = model(input_ids=ids).logits[0].float().numpy()
            for _ in range(prompts["new_tokens"]):
                following = model(input_ids=ids).logits[0, -1].argmax()
                ids = torch.cat([ids, following.view(1, 1)], dim=1)
            arrays[f"greedy{i}"] = ids[0, len(prompt) :].numpy()
    np.savez(out, version=f"transformers {transformers.__version__}", **arrays)


main()
