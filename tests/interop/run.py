"""`make interop`: our numbers against those of transformers, vLLM and llama.cpp, on the same checkpoints, as one table.

Every engine runs in its own environment (install.sh), as a process that reads a case and writes arrays. The exit
status is 1 when a comparison is out of tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cases
import numpy as np
import serve_vllm
import torch

from step35.api.sampling import SamplingParams
from step35.data.tokenizer import load_tokenizer
from step35.engine.engine import Engine
from step35.model.context import Context
from step35.model.step35 import Step35
from step35.model.weights import load_model
from step35.runtime.console import Console

ROOT = Path(__file__).parents[2] / ".interop"
ENGINES = Path(__file__).parent / "engines"
GREEDY = SamplingParams(temperature=0, max_tokens=cases.NEW_TOKENS)
DRAFTED_TOKENS = 64


@dataclass
class Row:
    """One line of the table."""

    engine: str
    case: str
    what: str
    error: float | None
    tolerance: float | None
    equal: int | None = None
    of: int | None = None
    all_equal: bool = True
    """Whether `equal` must be `of`."""

    @property
    def good(self) -> bool:
        within = self.error is None or self.tolerance is None or self.error < self.tolerance
        return within and (not self.all_equal or self.equal == self.of)


@dataclass
class Case:
    """A case's folder, and what we say of it."""

    folder: Path
    model: Step35
    prompts: list[list[int]]
    logits: list[np.ndarray]
    greedy: list[list[int]]

    @classmethod
    def load(cls, folder: Path) -> Case:
        model = load_model(folder / "checkpoint")
        prompts = json.loads((folder / "prompts.json").read_text())["ids"]
        with torch.no_grad():
            logits = [model(torch.tensor([ids])).logits[0].numpy() for ids in prompts]
        completions = Engine(model, ()).generate(Engine(model, ()).create(prompts, GREEDY))
        return cls(folder, model, prompts, logits, [list(c.token_ids) for c in completions])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "cases", help="where the checkpoints are made")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    loaded = [Case.load(folder) for folder in cases.build(args.work)]
    rows: list[Row] = []
    for case in loaded:
        for compare in (transformers, vllm, vllm_server, llama, llama_q8, tokens_of_text, drafts):
            rows += compare(case)
            print(f"interop: {case.folder.name}: {compare.__name__} done", flush=True)
    console = Console()
    shown = [
        (r.engine, r.case, r.what, "-" if r.error is None else f"{r.error:.1e}",
         "-" if r.tolerance is None else f"{r.tolerance:.0e}",
         "-" if r.of is None else f"{r.equal}/{r.of}", "ok" if r.good else "WRONG")
        for r in rows
    ]  # fmt: skip
    console.table("interop", ["engine", "case", "what", "error", "allowed", "tokens equal", ""], shown)
    if args.json:
        args.json.write_text(json.dumps([vars(r) | {"good": r.good} for r in rows], indent=1) + "\n")
    return 0 if all(r.good for r in rows) else 1


def transformers(case: Case) -> list[Row]:
    """Logits (relative error in norm) and greedy tokens, fp32."""
    found = _engine("transformers", "run_transformers.py", case)
    return [_against(case, found, "fp32 logits", 1e-5, lambda i: (case.logits[i], found[f"logits{i}"]))]


def vllm(case: Case) -> list[Row]:
    """Log-probabilities of all tokens at all places of the prompts (largest difference) and greedy tokens."""
    found = _engine("vllm", "run_vllm.py", case)

    def pair(i: int) -> tuple[np.ndarray, np.ndarray]:
        ours = torch.from_numpy(case.logits[i][:-1]).double().log_softmax(-1).numpy()
        return ours, found[f"logprobs{i}"]

    worst = max(float(np.abs(ours - theirs).max()) for ours, theirs in map(pair, range(len(case.prompts))))
    return [_against(case, found, "fp32 prompt log-probs, largest", 1e-4, pair, error=worst)]


def vllm_server(case: Case) -> list[Row]:
    """What `step35 serve --backend vllm` answers over HTTP, with drafts, to problems that want a tool."""
    if case.folder.name != "shipped":
        return []  # random models call no tools
    found = serve_vllm.answers(case.folder / "checkpoint", case.folder / "serve-vllm.log")
    return [Row("vllm serve", "shipped", what, None, None, equal, of) for what, (equal, of) in found.items()]


def llama(case: Case) -> list[Row]:
    """Logits (relative error in norm) and greedy tokens from the exported F32 file."""
    found = _engine("llama", "run_llama.py", case, "model.gguf")
    return [_against(case, found, "F32 logits", 1e-5, lambda i: (case.logits[i], found[f"logits{i}"]))]


def llama_q8(case: Case) -> list[Row]:
    """The same from the Q8_0 file of the trained model, for which llama.cpp rounds activations to 8 bits too."""
    if case.folder.name != "shipped":
        return []  # random experts are chosen by margins that rounding turns over
    found = _engine("llama", "run_llama.py", case, "model-q8.gguf")
    row = _against(case, found, "Q8_0 logits", 1e-1, lambda i: (case.logits[i], found[f"logits{i}"]))
    row.all_equal = False
    return [row]


def tokens_of_text(case: Case) -> list[Row]:
    """The ids of texts by llama.cpp's reading of the exported vocabulary."""
    found = _engine("llama", "run_llama.py", case, "model.gguf")
    tokenizer = load_tokenizer(case.folder / "checkpoint")
    equal = sum(found[f"encoded{i}"].tolist() == tokenizer.encode(text) for i, text in enumerate(cases.TEXTS))
    return [Row("llama.cpp", case.folder.name, "ids of text", None, None, equal, len(cases.TEXTS))]


def drafts(case: Case) -> list[Row]:
    """Greedy drafted and accepted tokens of llama.cpp's server with chained MTP heads, and its output.

    llama.cpp runs every head over the verified tokens from the trunk's states, and chains heads for drafts only; ours
    chain over the whole prefix, as in training. So its counts are held to its rule, computed with our modules; what
    our engine accepts is shown beside them.
    """
    name, modules = case.folder.name, len(case.model.mtp)
    options = ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(modules), "--spec-draft-p-min", "0"]
    with _llama_server(case.folder / "model.gguf", options) as ask:
        answers = [ask(prompt) for prompt in case.prompts]
    theirs = [(a["timings"].get("draft_n", 0), a["timings"].get("draft_n_accepted", 0)) for a in answers]
    outputs = [_generated(case.model, prompt, modules) for prompt in case.prompts]
    by_rule = [_chained(case.model, p, tokens) for p, (tokens, _) in zip(case.prompts, outputs, strict=True)]
    same = sum(a["tokens"] == tokens for a, (tokens, _) in zip(answers, outputs, strict=True))
    counts = sum(a == b for a, b in zip(by_rule, theirs, strict=True))
    llama_drafted, llama_accepted = (sum(column) for column in zip(*theirs, strict=True))
    drafted, accepted = (sum(column) for column in zip(*(pair for _, pair in outputs), strict=True))
    what = (
        f"{modules} heads: accepted {llama_accepted} of {llama_drafted}; our full-prefix chain {accepted} of {drafted}"
    )
    return [
        Row("llama.cpp", name, f"speculative, {modules} heads: greedy tokens", None, None, same, len(answers)),
        Row("llama.cpp", name, what, None, None, counts, len(answers)),
    ]


def _generated(model: Step35, prompt: list[int], modules: int) -> tuple[list[int], tuple[int, int]]:
    """Return our speculative output, and (drafted, accepted) counted as llama.cpp's server counts.

    It drafts no further than one token short of the end, and counts every drafted token.
    """
    engine = Engine(model, model.config.eos_token_id)
    requests = engine.create([prompt], SamplingParams(temperature=0, max_tokens=DRAFTED_TOKENS, speculate=modules))
    drafted = accepted = known = 0
    for [(_, new)] in engine.run(requests):
        room = min(modules, DRAFTED_TOKENS - known - 1) if known else 0
        drafted += room
        accepted += min(len(new) - 1, room)
        known += len(new)
    return list(requests[0].completion().token_ids), (drafted, accepted)


@torch.no_grad()
def _chained(model: Step35, prompt: list[int], output: list[int]) -> tuple[int, int]:
    """Return (drafted, accepted) by llama.cpp's rule for a known greedy output, from whole passes without caches."""
    sequence = torch.tensor([prompt + output])
    h_BTD = model.trunk(sequence, Context.packed(sequence))
    before_BTD = torch.cat([torch.zeros_like(h_BTD[:, :1]), h_BTD[:, :-1]], dim=1)  # row p: token p, state p - 1
    drafted = accepted = 0
    known = len(prompt) + 1
    while known < sequence.shape[1]:
        tokens, states = sequence[:, :known], before_BTD[:, :known]
        room = min(len(model.mtp), len(prompt) + DRAFTED_TOKENS - known - 1)
        new, right = 0, True
        for k in range(room):
            g_BTD = model.mtp[k](model.embed(tokens), states, Context.packed(tokens))
            draft = model.mtp[k].logits(g_BTD[:, -1:]).argmax(-1)
            tokens, states = torch.cat([tokens, draft], dim=1), torch.cat([states, g_BTD[:, -1:]], dim=1)
            right = right and known + new < sequence.shape[1] and int(draft) == int(sequence[0, known + new])
            new += right
        drafted += room
        ends = known + new == sequence.shape[1]
        accepted += new - (ends and new < room)  # a draft that ends the output counts in the last place only
        known += new + 1  # the trunk's own token follows
    return drafted, accepted


def _against(
    case: Case, found: dict[str, np.ndarray], what: str, tolerance: float,
    pair: Callable[[int], tuple[np.ndarray, np.ndarray]], error: float | None = None,
) -> Row:  # fmt: skip
    """Compare arrays in norm (unless `error` is given) and greedy tokens."""
    if error is None:
        pairs = [pair(i) for i in range(len(case.prompts))]
        error = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
    equal = sum(found[f"greedy{i}"].tolist() == tokens for i, tokens in enumerate(case.greedy))
    return Row(str(found["version"]), case.folder.name, what, error, tolerance, equal, len(case.greedy))


def _engine(environment: str, script: str, case: Case, *arguments: str) -> dict[str, np.ndarray]:
    """Run an engine's script on the case (once), and return its arrays."""
    out = case.folder / f"{script.removesuffix('.py')}-{'-'.join(arguments)}.npz"
    if not out.is_file():
        command = [ROOT / environment / "bin/python", ENGINES / script, case.folder, out, *arguments]
        done = subprocess.run([str(c) for c in command], env=_variables(), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{script} failed on {case.folder.name}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return dict(np.load(out))


def _variables() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "2", "LLAMA_CPP_LIB_PATH": str(ROOT / "llama/build/bin")}


@contextmanager
def _llama_server(model: Path, options: list[str]) -> Iterator[Callable[[list[int]], dict]]:
    """Start llama.cpp's server on a free loopback port; give a function from a prompt to its answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(ROOT / "llama/build/bin/llama-server"), "-m", str(model), "--host", "127.0.0.1", "--port", str(port),
        "-c", "512", "-t", "2", "-np", "1", "-ctk", "f32", "-ctv", "f32", "-fa", "off", *options,
    ]  # fmt: skip
    log = model.with_suffix(".server.log")
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as server:
        try:
            _wait(port, server, log)
            yield lambda prompt: _ask(port, prompt)
        finally:
            server.terminate()


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        time.sleep(0.25)
        if server.poll() is not None:
            raise SystemExit(f"llama-server ended:\n{log.read_text()[-3000:]}")
        try:
            if b"ok" in urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read():
                return
        except OSError:
            continue
    raise SystemExit(f"llama-server did not answer within a minute:\n{log.read_text()[-3000:]}")


def _ask(port: int, prompt: list[int]) -> dict:
    body = {
        "prompt": prompt, "n_predict": DRAFTED_TOKENS, "temperature": 0, "return_tokens": True, "cache_prompt": False
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request, timeout=300))


if __name__ == "__main__":
    sys.exit(main())
