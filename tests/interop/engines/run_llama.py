"""llama.cpp on one case's GGUF file: logits, greedy tokens and the text of ids. Runs in its own environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

F32 = 0


def main() -> None:
    case, out, file = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    prompts = json.loads((case / "prompts.json").read_text())
    longest = max(map(len, prompts["ids"])) + prompts["new_tokens"] + 8
    model = llama_cpp.Llama(
        str(case / file), n_ctx=longest, n_batch=longest, n_ubatch=longest, n_threads=2, n_threads_batch=2,
        logits_all=True, type_k=F32, type_v=F32, flash_attn=False, verbose=False,
    )  # fmt: skip
    arrays = {}
    for i, prompt in enumerate(prompts["ids"]):
        model.reset()
        model.eval(prompt)
        arrays[f"logits{i}"] = np.array(model.scores[: len(prompt)], dtype=np.float32)
        greedy = []
        for _ in range(prompts["new_tokens"]):
            greedy.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval(greedy[-1:])
        arrays[f"greedy{i}"] = np.array(greedy)
    for i, text in enumerate(prompts["texts"]):
        arrays[f"encoded{i}"] = np.array(model.tokenize(text.encode(), add_bos=False, special=True))
    np.savez(out, version=f"llama.cpp, llama-cpp-python {llama_cpp.__version__}", **arrays)


main()
