"""The checkpoint that comes with the package: small, whole, and what `chat` and `generate` use by default."""

from __future__ import annotations

import step35
from step35.cli.main import main
from step35.cli.shipped import SHIPPED
from step35.data import chat


def test_it_is_small_and_has_a_card_with_the_command() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 10_000_000
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert "step35 demo" in card
    assert (SHIPPED / "tokenizer.json").is_file()
    assert (SHIPPED / "generation_config.json").is_file()


def test_it_calls_the_calculator_with_the_numbers_it_was_asked_about() -> None:
    llm = step35.LLM(SHIPPED)
    from step35.agents.tools.calculator import Calculator

    tools = [Calculator.schema]
    questions = ["What is 312 + 45?", "How much is 907 minus 38?", "What is 77 - 31?", "Add 45 to 860."]
    prompts = [chat.encode_prompt(llm.tokenizer, [{"role": "user", "content": q}], tools) for q in questions]
    greedy = step35.SamplingParams(max_tokens=64, temperature=0)
    turns = [chat.parse(llm.tokenizer.decode(list(c.token_ids)), tools) for c in llm.generate(prompts, greedy)]
    calls = [turn["tool_calls"][0]["function"] for turn in turns if turn.get("tool_calls")]
    assert len(calls) == len(questions), "every question is answered by a call first"
    assert all(call["name"] == "calculator" for call in calls)
    asked = [{"312", "45"}, {"907", "38"}, {"77", "31"}, {"45", "860"}]
    copied = [
        set(str(call["arguments"]["expression"]).split()) >= numbers for call, numbers in zip(calls, asked, strict=True)
    ]
    assert sum(copied) >= 3


def test_drafting_changes_nothing() -> None:
    llm = step35.LLM(SHIPPED)
    texts = [
        llm.generate("def add(a, b):", step35.SamplingParams(max_tokens=24, temperature=0, speculate=depth))[0].text
        for depth in range(len(llm.model.mtp) + 1)
    ]
    assert len(llm.model.mtp) == 3
    assert len(set(texts)) == 1


def test_generate_needs_no_path(capsys: object) -> None:
    assert main(["generate", "--prompt", "import os", "--max-tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("import os")  # type: ignore[attr-defined]
