"""The checkpoints and prompts that `make interop` runs through every engine: random ones, the shipped one."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from step35.cli.convert import Args as ConvertArgs
from step35.cli.convert import main as convert
from step35.cli.shipped import SHIPPED
from step35.cli.stages import environment, publish
from step35.config.model import RopeScaling
from step35.config.presets import s3f1
from step35.data import chat
from step35.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from step35.model.init import initialise
from step35.model.step35 import Step35

SHAPES: dict[str, dict[str, Any]] = {
    "random-a": {
        "layers": 9, "dense": 1, "mtp": 3, "heads": 4, "sliding_heads": 6, "groups": 2, "head_dim": 32,
        "hidden_size": 128, "intermediate_size": 224, "sliding_window": 16, "moe_num_experts": 16, "moe_top_k": 4,
        "moe_intermediate_size": 64, "share_expert_dim": 96, "moe_router_scaling_factor": 3.0, "theta_full": 5e6,
        "clips": {6: 7.0, 8: 7.0}, "clips_shared": {0: 1.0, 8: 1.5},
        "rope_scaling": RopeScaling(original_max_position_embeddings=64),
    },
    "random-b": {
        "layers": 5, "dense": 2, "mtp": 1, "heads": 2, "sliding_heads": 4, "groups": 2, "head_dim": 64,
        "hidden_size": 64, "intermediate_size": 160, "sliding_window": 8, "moe_num_experts": 8, "moe_top_k": 2,
        "moe_intermediate_size": 32, "share_expert_dim": 32, "moe_router_scaling_factor": 1.5,
    },
    "random-c": {
        "layers": 8, "dense": 1, "mtp": 2, "heads": 8, "sliding_heads": 12, "groups": 4, "head_dim": 32,
        "hidden_size": 160, "intermediate_size": 256, "sliding_window": 33, "moe_num_experts": 24, "moe_top_k": 6,
        "moe_intermediate_size": 32, "share_expert_dim": 64, "moe_router_scaling_factor": 2.0, "theta_full": 1e5,
        "clips": {5: 7.0}, "clips_shared": {7: 2.0},
        "rope_scaling": RopeScaling(original_max_position_embeddings=128, factor=4.0, high_freq_factor=8.0),
    },
}  # fmt: skip
TEXTS = (
    "What is 12 * 7?",
    "  spaces\n\nand 12345 digits, 3.14",
    "Ünïcode: 你好 🙂 <think>\n</think>",
    "<|im_start|>user\nhi<|im_end|>",
)
NEW_TOKENS = 48


def build(folder: Path) -> list[Path]:
    """Write all cases under `folder`: checkpoint/, model.gguf and prompts.json each."""
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = train_tokenizer(["the quick brown fox and 123 lazy dogs " * 4, *TEXTS], 400)
    made = []
    for seed, (name, shape) in enumerate(SHAPES.items()):
        case = folder / name
        publish(_random_model(shape, tokenizer, seed), tokenizer, case / "checkpoint")
        made.append(_finish(case, _random_prompts(tokenizer, seed)))
    shutil.copytree(SHIPPED, folder / "shipped" / "checkpoint")
    made.append(_finish(folder / "shipped", _problems(load_tokenizer(SHIPPED)), q8=True))
    return made


def _random_model(shape: dict[str, Any], tokenizer: Tokenizer, seed: int) -> Step35:
    """Return a model whose every part shows in the logits, and whose MTP modules often agree with its trunk."""
    config = s3f1(**shape, vocab_size=tokenizer.vocab_size, max_position_embeddings=512, eos_token_id=(1, 3))
    model = Step35(config).eval()
    generator = torch.Generator().manual_seed(seed)
    initialise(model, generator)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim == 1:
                tensor.normal_(std=0.2, generator=generator)
            elif "gate_up_proj" in name:
                tensor *= 4  # so that clips bite
            elif name == "lm_head.weight":
                tensor *= 20
            elif name == "embed_tokens.weight":
                tensor *= 16  # so that a token says much of its successor, and drafts are often right
        for module in model.mtp:
            module.joint_proj.weight *= 0.3
            module.joint_proj.weight[:, : config.hidden_size] += 8 * torch.eye(config.hidden_size)
            module.head.weight.copy_(model.lm_head.weight)
    return model


def _finish(case: Path, prompts: list[list[int]], *, q8: bool = False) -> Path:
    convert(ConvertArgs(path=case / "checkpoint", out=case / "model.gguf", to="gguf", dtype="float32"))
    if q8:
        convert(ConvertArgs(path=case / "checkpoint", out=case / "model-q8.gguf", to="gguf", dtype="q8_0"))
    content = {"ids": prompts, "new_tokens": NEW_TOKENS, "texts": TEXTS}
    (case / "prompts.json").write_text(json.dumps(content))
    return case


def _random_prompts(tokenizer: Tokenizer, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [
        [tokenizer.bos_id] + [draw.randrange(11, tokenizer.vocab_size) for _ in range(n)] for n in (20, 47, 90, 160)
    ]


def _problems(tokenizer: Tokenizer) -> list[list[int]]:
    tasks = [environment("held_out", 0).sample(i) for i in range(6)]
    return [chat.encode_prompt(tokenizer, task.messages, task.tools) for task in tasks]
