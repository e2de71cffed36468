"""`generate` and `chat` on a micro checkpoint; what the model says is scripted where it matters."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from step35.api.sampler import Update
from step35.api.sampling import SamplingParams
from step35.cli import main as cli
from step35.engine.llm import LLM

CALL = (
    "Use the calculator.\n</think>\n<tool_call>\n<function={name}>\n<parameter=expression>\n{expression}\n"
    "</parameter>\n</function>\n</tool_call><|im_end|>"
)
ANSWER = "That is the result.\n</think>\n{text}<|im_end|>"

Script = Callable[..., list[str]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Return a function that makes the model say given turns; it returns the list of the prompts to come, as text."""

    def install(*turns: str) -> list[str]:
        prompts: list[str] = []

        def stream(self: LLM, prompt: Any, params: SamplingParams | None = None) -> Iterator[str]:
            prompts.append(self.tokenizer.decode(list(prompt)))
            ids = self.tokenizer.encode(turns[len(prompts) - 1])
            for start in range(0, len(ids), 3):  # as accepted drafts arrive
                yield self.tokenizer.decode(ids[start : start + 3], skip_special=True)

        monkeypatch.setattr(LLM, "stream", stream)
        return prompts

    return install


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_generate_prints_prompt_and_continuation(capsys: pytest.CaptureFixture[str], micro_checkpoint: Path) -> None:
    arguments = ["generate", str(micro_checkpoint), "--prompt", "What is 2", "--temperature", "0", "--max-tokens", "20"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    params = SamplingParams(max_tokens=20, temperature=0.0)
    [expected] = LLM(micro_checkpoint).generate(["What is 2"], params)
    assert shown.out == f"What is 2{expected.text}\n"
    assert shown.err.startswith(f"[{len(expected.token_ids)} tokens in ")
    assert "tokens/s" in shown.err


def test_sampling_flags_reach_the_sampler(capsys: pytest.CaptureFixture[str], micro_checkpoint: Path) -> None:
    values = {"temperature": 0.8, "top_p": 0.7, "top_k": 9, "seed": 5, "max_tokens": 17, "speculate": 1}
    flags = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    shown = output(capsys, "generate", str(micro_checkpoint), "--prompt", "Add 1", *flags)
    params = SamplingParams(**values)
    assert shown == f"Add 1{LLM(micro_checkpoint).generate(['Add 1'], params)[0].text}\n"


def test_text_is_the_same_with_any_number_of_drafts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, micro_checkpoint: Path
) -> None:
    updates, depths = LLM.updates, []

    def recording(self: LLM, prompt: Any, params: SamplingParams) -> Iterator[Update]:
        depths.append(params.speculate)
        return updates(self, prompt, params)

    monkeypatch.setattr(LLM, "updates", recording)
    command = ["generate", str(micro_checkpoint), "--prompt", "Add 1", "--seed", "3", "--max-tokens", "30"]
    shown = [output(capsys, *command, *flags) for flags in ([], ["--speculate", "0"], ["--speculate", "1"])]
    assert shown[0] == shown[1] == shown[2]
    assert depths == [2, 0, 1]  # by default all modules draft


def test_seeds_repeat_and_differ(capsys: pytest.CaptureFixture[str], micro_checkpoint: Path) -> None:
    command = ["generate", str(micro_checkpoint), "--max-tokens", "12", "--temperature", "2", "--seed"]
    first, again, other = (output(capsys, *command, seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_a_prompt_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, micro_checkpoint: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    shown = output(capsys, "generate", str(micro_checkpoint), "--max-tokens", "1", "--prompt", "-")
    assert shown.startswith("from a pipe")


def test_chat_answers_a_message_with_a_real_model(capsys: pytest.CaptureFixture[str], micro_checkpoint: Path) -> None:
    command = ["chat", str(micro_checkpoint), "--message", "What is 2 + 3?", "--max-tokens", "20"]
    first, again = output(capsys, *command), output(capsys, *command)
    assert first.strip()
    assert first == again


def test_chat_runs_the_calls_and_shows_them(
    capsys: pytest.CaptureFixture[str], micro_checkpoint: Path, script: Script
) -> None:
    prompts = script(CALL.format(name="calculator", expression="4821 * 77"), ANSWER.format(text="It is 371217."))
    shown = output(capsys, "chat", str(micro_checkpoint), "--message", "What is 4821 * 77?")
    parts = ["Use the calculator.", "<tool_call>", "4821 * 77", "= 371217", "That is the result.", "It is 371217."]
    places = [shown.index(part) for part in parts]
    assert places == sorted(places)
    assert "</think>" not in shown
    assert "<|im_end|>" not in shown
    assert len(prompts) == 2
    assert "What is 4821 * 77?" in prompts[0]
    assert '"name": "calculator"' in prompts[0]
    assert prompts[1].endswith(
        "<|im_start|>tool_response\n<tool_response>371217</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_a_failing_call_is_shown_and_answered(
    capsys: pytest.CaptureFixture[str], micro_checkpoint: Path, script: Script
) -> None:
    turns = [CALL.format(name="search", expression="2"), CALL.format(name="calculator", expression="2 +")]
    prompts = script(*turns, ANSWER.format(text="I cannot."))
    shown = output(capsys, "chat", str(micro_checkpoint), "--message", "?")
    assert "= error: no tool named search" in shown
    assert "= error: not an arithmetic expression" in shown
    assert "I cannot." in shown
    assert "error: not an arithmetic expression" in prompts[2]


def test_a_long_result_is_not_cut_in_the_conversation(
    capsys: pytest.CaptureFixture[str], micro_checkpoint: Path, script: Script
) -> None:
    script(CALL.format(name="calculator", expression="7 ** 110"), ANSWER.format(text="x" * 100))
    shown = output(capsys, "chat", str(micro_checkpoint), "--message", "?")
    assert f"= {7**110}" in shown.splitlines()
    assert "x" * 100 in shown.splitlines()


def test_without_tools_none_is_offered(
    capsys: pytest.CaptureFixture[str], micro_checkpoint: Path, script: Script
) -> None:
    prompts = script(ANSWER.format(text="Hello."))
    output(capsys, "chat", str(micro_checkpoint), "--message", "Hi", "--no-tools", "--system", "Be brief.")
    assert "calculator" not in prompts[0]
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompts[0]


def test_a_conversation_goes_on_until_it_starts_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, micro_checkpoint: Path, script: Script
) -> None:
    prompts = script(*(ANSWER.format(text=f"answer {n}") for n in range(3)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\n\n  second \n/new\nthird\n/quit\nnever\n"))
    shown = output(capsys, "chat", str(micro_checkpoint), "--system", "Be brief.")
    assert [f"answer {n}" in shown for n in range(3)] == [True] * 3
    assert len(prompts) == 3
    assert "first" in prompts[1]
    assert "answer 0" in prompts[1]
    assert "user\nsecond<|im_end|>" in prompts[1]
    assert "first" not in prompts[2]
    assert "Be brief." in prompts[2]


def test_the_end_of_input_ends_the_chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, micro_checkpoint: Path, script: Script
) -> None:
    prompts = script(ANSWER.format(text="Hello."))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    assert "Hello." in output(capsys, "chat", str(micro_checkpoint))
    assert len(prompts) == 1
