"""`generate` and `chat` on a micro checkpoint; what the model says is scripted where it matters."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from step35.api.sampler import Update
from step35.api.sampling import SamplingParams
from step35.cli import main as cli
from step35.engine.int8 import Int8Linear
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
    values = {
        "temperature": 1.8, "top_p": 0.9, "top_k": 90, "min_p": 0.01, "seed": 5, "max_tokens": 17, "speculate": 1,
        "repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": -0.2,
    }  # fmt: skip
    flags = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    shown = output(capsys, "generate", str(micro_checkpoint), "--prompt", "Add 1", *flags)
    params = SamplingParams(**values)
    assert shown == f"Add 1{LLM(micro_checkpoint).generate(['Add 1'], params)[0].text}\n"


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> list[tuple[LLM, SamplingParams]]:
    """What generates, and with which parameters, in the order of the calls to come."""
    calls, updates = [], LLM.updates

    def recording(self: LLM, prompt: Any, params: SamplingParams) -> Iterator[Update]:
        calls.append((self, params))
        return updates(self, prompt, params)

    monkeypatch.setattr(LLM, "updates", recording)
    return calls


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_the_settings_that_both_verbs_share(
    verb: str, micro_checkpoint: Path, created: list[tuple[LLM, SamplingParams]]
) -> None:
    command = [verb, str(micro_checkpoint), "--max-tokens", "5", *(["--message", "Hi"] if verb == "chat" else [])]
    flags = ["--stop", "a b", "--stop=c", "--min-p", "0.5", "--repetition-penalty", "2", "--presence-penalty", "0.5"]
    flags += ["--frequency-penalty", "0.25", "--max-context", "900", "--quantization", "int8", "--top-k", "3"]
    assert cli.main([*command, *flags]) == 0
    assert cli.main(command) == 0
    (llm, params), (plain_llm, plain) = created
    assert (params.stop, params.min_p, params.top_k, params.max_tokens) == (("a b", "c"), 0.5, 3, 5)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (2, 0.5, 0.25)
    assert llm.engine.max_context == 900
    assert any(isinstance(module, Int8Linear) for module in llm.model.modules())
    assert not any(isinstance(module, Int8Linear) for module in plain_llm.model.modules())
    assert (plain.stop, plain.min_p, plain.repetition_penalty) == ((), 0.0, 1.0)
    assert cli.main([*command, "--max-context", "2"]) != 0


def test_the_text_ends_before_a_stop_text(capsys: pytest.CaptureFixture[str], micro_checkpoint: Path) -> None:
    command = ["generate", str(micro_checkpoint), "--prompt", "Add 1", "--seed", "3", "--temperature", "2"]
    whole = output(capsys, *command).removeprefix("Add 1").removesuffix("\n")
    shown = output(capsys, *command, "--stop", whole[8:11])
    assert shown == f"Add 1{whole[: whole.index(whole[8:11])]}\n"


def test_a_schema_from_a_file_and_from_a_text(
    capsys: pytest.CaptureFixture[str], micro_checkpoint: Path, tmp_path: Path
) -> None:
    text = (
        '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": false}'
    )
    file = tmp_path / "schema.json"
    file.write_text(text)
    command = ["generate", str(micro_checkpoint), "--prompt", "Add 1", "--seed", "3", "--json-schema"]
    shown = output(capsys, *command, text)
    assert json.loads(shown.removeprefix("Add 1"))["a"] in (True, False)
    assert output(capsys, *command, str(file)) == shown


def test_an_expression_holds_behind_the_thinking(capsys: pytest.CaptureFixture[str], micro_checkpoint: Path) -> None:
    command = ["generate", str(micro_checkpoint), "--seed", "3", "--regex", "(yes|no){2}", "--prompt"]
    assert output(capsys, *command, "Add 1").removeprefix("Add 1") in ("yesyes\n", "yesno\n", "noyes\n", "nono\n")
    thinking = output(capsys, *command, "<think>\n", "--max-tokens", "5")
    assert not thinking.startswith(("<think>\nyes", "<think>\nno"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--json-schema", "{"], "--json-schema cannot be read"),
        (["--json-schema", "no.such.file"], "--json-schema no.such.file cannot be read"),
        (["--json-schema", "{}", "--regex", "a"], "both given"),
        (["--regex", "("], "unclosed group"),
    ],
)
def test_grammars_that_cannot_be_used_say_why(
    capsys: pytest.CaptureFixture[str], micro_checkpoint: Path, flags: list[str], message: str
) -> None:
    assert cli.main(["generate", str(micro_checkpoint), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_thinking_budget_closes_the_block(capsys: pytest.CaptureFixture[str], micro_checkpoint: Path) -> None:
    command = ["chat", str(micro_checkpoint), "--message", "Hi", "--max-tokens", "20", "--thinking-budget"]
    bound, free = output(capsys, *command, "0"), output(capsys, *command, "None")
    assert bound.startswith("\n\n")  # the closed, empty block; its tag is not shown
    assert not free.startswith("\n\n")


def test_text_is_the_same_with_any_number_of_drafts(
    capsys: pytest.CaptureFixture[str], micro_checkpoint: Path, created: list[tuple[LLM, SamplingParams]]
) -> None:
    command = ["generate", str(micro_checkpoint), "--prompt", "Add 1", "--seed", "3", "--max-tokens", "30"]
    shown = [output(capsys, *command, *flags) for flags in ([], ["--speculate", "0"], ["--speculate", "1"])]
    assert shown[0] == shown[1] == shown[2]
    assert [params.speculate for _, params in created] == [2, 0, 1]  # by default all modules draft


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
