"""What `eval` and the demo measure of trained models; every finished part is kept in `eval.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from step35.api.trajectory import Trajectory
from step35.cli.stages import environment
from step35.config.post import EvalConfig
from step35.data import chat
from step35.data.tokenizer import Tokenizer
from step35.engine.llm import LLM
from step35.evals.accuracy import accuracy
from step35.evals.speed import acceptance, compare
from step35.runtime.console import Console
from step35.runtime.device import set_threads
from step35.runtime.disk import fingerprint, read_record
from step35.runtime.rundir import RunDir

TRANSCRIPTS = 6


def evaluate(run: RunDir, models: Mapping[str, Path], config: EvalConfig, console: Console) -> dict[str, Any]:
    """Measure every model; the last one's decode speed too. Parts that `eval.json` already holds are kept."""
    file = run.path / "eval.json"
    settings = config.model_dump(mode="json")
    found = read_record(file)
    if found.get("settings") != settings or "checkpoints" not in found:
        found = {"settings": settings, "checkpoints": {}, "accuracy": [], "accept_by_depth": {}, "transcripts": []}
    for name, folder in models.items():
        checkpoint = fingerprint(folder)
        if found["checkpoints"].get(name) != checkpoint:
            _evaluate_one(found, name, LLM(folder, max_batch=128), config, console)
            found["checkpoints"][name] = checkpoint
            run.write_json("eval.json", found)
    measured = {"model": name, "checkpoint": checkpoint}
    if not measured.items() <= found.get("speed", {}).items():
        found["speed"] = {**measured, **_speed(LLM(folder), config, console)}
        run.write_json("eval.json", found)
    return found


def _evaluate_one(found: dict[str, Any], name: str, llm: LLM, config: EvalConfig, console: Console) -> None:
    task = environment("held_out", config.seed)
    found["accuracy"] = [record for record in found["accuracy"] if record["model"] != name]
    found["transcripts"] = [record for record in found["transcripts"] if record["model"] != name]
    for greedy_mode in (True, False):
        mode = "greedy" if greedy_mode else "sampled"
        total = config.problems * (1 if greedy_mode else config.samples)
        with console.stage(f"eval {name}, {mode}", total, "problem") as shown:
            result, played = accuracy(llm, task, llm.tokenizer, config, greedy=greedy_mode, on_done=shown.advance)
            shown.advance(0, f"accuracy {result['accuracy']:.1%}")
        found["accuracy"].append({"model": name, **result})
        if greedy_mode:
            found["transcripts"] += [_transcript(name, t, llm.tokenizer) for t in _telling(played)]
    if llm.model.mtp:
        prompts = _prompts(llm.tokenizer, config, min(64, config.problems))
        found["accept_by_depth"][name] = acceptance(
            llm, prompts, depth=len(llm.model.mtp), max_tokens=config.max_turn_tokens
        )
    else:
        found["accept_by_depth"][name] = []


def _speed(llm: LLM, config: EvalConfig, console: Console) -> dict[str, Any]:
    """Compare decoding at batch 1, on one thread: the products of one token are too small to share."""
    prompts = _prompts(llm.tokenizer, config, config.speed_prompts)
    threads = set_threads(1)
    with console.stage("eval speed", 1, "comparison") as shown:
        result = compare(llm.stream_ids, prompts, depth=len(llm.model.mtp), max_tokens=config.max_turn_tokens)
        result["threads"] = threads
        shown.advance(1, f"{result['speedup']:.2f}x")
    set_threads()
    return result


def _prompts(tokenizer: Tokenizer, config: EvalConfig, count: int) -> list[list[int]]:
    task = environment("held_out", config.seed)
    tasks = [task.sample(i) for i in range(count)]
    return [chat.encode_prompt(tokenizer, t.messages, t.tools) for t in tasks]


def _telling(played: list[Trajectory]) -> list[Trajectory]:
    """Choose transcripts to show: failures first, then successes."""
    wrong = [t for t in played if not t.reward][: TRANSCRIPTS // 2]
    right = [t for t in played if t.reward][: TRANSCRIPTS - len(wrong)]
    return [*wrong, *right]


def _transcript(name: str, played: Trajectory, tokenizer: Tokenizer) -> dict[str, Any]:
    start = played.mask.index(True) if True in played.mask else len(played.mask)
    return {
        "model": name,
        "question": played.info["question"],
        "answer": played.info["answer"],
        "text": tokenizer.decode(played.tokens[start:]),
        "correct": bool(played.reward),
    }


def greedy(found: dict[str, Any], model: str) -> float:
    """Return a model's greedy pass@1."""
    records = [r for r in found["accuracy"] if r["model"] == model and r["mode"] == "greedy"]
    return float(records[0]["accuracy"])
