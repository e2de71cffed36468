"""/v1/chat/completions through the official client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

USER: list[Any] = [{"role": "user", "content": "Hi"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
OTHER: Any = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}
CALL = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n"
    "</function>\n</tool_call>"
)


def ask(server: Any, **fields: Any) -> Any:
    """Return the answer of the chat route."""
    fields.setdefault("messages", USER)
    return server.client().chat.completions.create(model="tiny", **fields)


def test_a_turn_comes_back_with_reasoning_content_and_usage(serve: Any, tokenizer: Any) -> None:
    server = serve("Let me see.\n</think>\nHello")
    answer = ask(server)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content, message.tool_calls) == ("Hello", "Let me see.", None)
    assert answer.choices[0].finish_reason == "stop"
    assert server.sampler.prompts[0].endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert server.sampler.params[0].in_thinking
    usage = answer.usage
    assert usage.prompt_tokens == len(tokenizer.encode(server.sampler.prompts[0]))
    assert usage.prompt_tokens_details.cached_tokens == 2
    assert usage.completion_tokens_details.reasoning_tokens == len(tokenizer.encode("Let me see.\n</think>"))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_adds_up_to_the_same_turn(serve: Any) -> None:
    chunks = list(ask(serve("So.\n</think>\nHello"), stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "So."
    assert "".join(delta.content or "" for delta in deltas) == "Hello"
    assert deltas[0].role == "assistant"
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 3


def test_tool_calls_come_back_typed(serve: Any) -> None:
    answer = ask(serve(f"Two.\n</think>\n{CALL}{CALL}"), tools=[TOOL])
    calls = answer.choices[0].message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("add", {"a": 1, "b": 2})
    ] * 2
    assert len({call.id for call in calls}) == 2
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None


def test_a_call_of_a_tool_that_was_not_offered_is_text(serve: Any) -> None:
    server = serve(f"Two.\n</think>\nOK {CALL}")
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        choice = ask(server, **fields).choices[0]
        assert (choice.message.tool_calls, choice.message.content) == (None, f"OK {CALL}")
        assert (choice.message.reasoning_content, choice.finish_reason) == ("Two.", "stop")
        chunks = list(ask(server, stream=True, **fields))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == f"OK {CALL}"


def test_streamed_tool_calls_say_id_and_name_once(serve: Any) -> None:
    chunks = list(ask(serve(f"Two.\n</think>\nOK {CALL}"), tools=[TOOL], stream=True))
    parts = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert [part.function.name for part in parts if part.id] == ["add"]
    assert json.loads("".join(part.function.arguments for part in parts)) == {"a": 1, "b": 2}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_without_parallel_calls_the_turn_ends_after_the_first(serve: Any) -> None:
    server = serve(f"Two.\n</think>\n{CALL}{CALL}")
    answer = ask(server, tools=[TOOL], parallel_tool_calls=False)
    assert len(answer.choices[0].message.tool_calls) == 1
    assert answer.choices[0].finish_reason == "tool_calls"
    assert server.sampler.closed.wait(1)


def test_tool_choice_becomes_a_grammar_or_a_ban(serve: Any, tokenizer: Any) -> None:
    server = serve(f"x\n</think>\n{CALL}")
    ask(server, tools=[TOOL, OTHER], tool_choice="required")
    ask(server, tools=[TOOL, OTHER], tool_choice={"type": "function", "function": {"name": "add"}})
    ask(server, tools=[TOOL, OTHER], tool_choice="none")
    ask(server, tools=[TOOL, OTHER])
    required, named, none, auto = server.sampler.params
    assert required.grammar.tools == (TOOL, OTHER)
    assert named.grammar.tools == (TOOL,)
    assert none.grammar is None
    assert none.logit_bias == {tokenizer.id_of("<tool_call>"): -100.0}
    assert (auto.grammar, dict(auto.logit_bias)) == (None, {})
    with pytest.raises(openai.BadRequestError, match="tools: add"):
        ask(server, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "sub"}})


def test_response_format_becomes_a_grammar(serve: Any) -> None:
    server = serve('x\n</think>\n{"a": 1}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    ask(server, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    answer = ask(server, response_format={"type": "json_object"})
    assert json.loads(answer.choices[0].message.content) == {"a": 1}
    assert [params.grammar.json_schema for params in server.sampler.params] == [schema, {"type": "object"}]
    assert all(params.in_thinking for params in server.sampler.params)


def test_thinking_can_be_switched_off(serve: Any) -> None:
    server = serve("Hello")
    for off in ({"thinking": "off"}, {"chat_template_kwargs": {"enable_thinking": False}}, {"thinking_budget": 0}):
        answer = ask(server, extra_body=off)
        assert answer.choices[0].message.content == "Hello"
        assert answer.usage.completion_tokens_details.reasoning_tokens == 0
    assert all(prompt.endswith("assistant\n<think>\n\n</think>\n") for prompt in server.sampler.prompts)
    assert not any(params.in_thinking for params in server.sampler.params)


def test_a_thinking_budget_holds_across_tool_turns(serve: Any, tokenizer: Any) -> None:
    server = serve(effort_low_tokens=11)
    turn = {"role": "assistant", "content": "", "reasoning_content": "one two three"}
    turn["tool_calls"] = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}]
    messages = [*USER, turn, {"role": "tool", "content": "3", "tool_call_id": "1"}]
    used = len(tokenizer.encode("one two three"))
    ask(server, messages=messages, extra_body={"thinking_budget": used + 5})
    ask(server, messages=messages, extra_body={"thinking_budget": used})
    ask(server, messages=[*messages, *USER], extra_body={"thinking_budget": used})
    ask(server, reasoning_effort="low")
    assert [params.thinking_budget for params in server.sampler.params] == [5, None, used, 11]
    assert [params.in_thinking for params in server.sampler.params] == [True, False, True, True]


def test_sampling_fields_arrive(serve: Any) -> None:
    server = serve()
    extra = {"min_p": 0.1, "top_k": 5, "repetition_penalty": 1.1}
    ask(
        server, temperature=0.5, top_p=0.9, seed=3, stop=["a", "b"], max_completion_tokens=9, logit_bias={"5": 2},
        presence_penalty=0.5, frequency_penalty=0.25, extra_body=extra,
    )  # fmt: skip
    params = server.sampler.params[0]
    assert (params.temperature, params.top_p, params.seed, params.stop, params.max_tokens) == (
        0.5,
        0.9,
        3,
        ("a", "b"),
        9,
    )
    assert (params.min_p, params.top_k, params.repetition_penalty) == (0.1, 5, 1.1)
    assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (0.5, 0.25, {5: 2.0})


def test_choices_have_seeds_of_their_own(serve: Any) -> None:
    server = serve("x\n</think>\none", "x\n</think>\ntwo")
    answer = ask(server, n=2, seed=7)
    assert [choice.message.content for choice in answer.choices] == ["one", "two"]
    assert [params.seed for params in server.sampler.params] == [7, 8]
    streamed = {0: "", 1: ""}
    for chunk in ask(server, n=2, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == {0: "one", 1: "two"}


def test_logprobs_have_an_entry_for_each_token(serve: Any) -> None:
    server = serve()
    answer = ask(server, logprobs=True, top_logprobs=2)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    assert entries[0].logprob == -0.5
    assert bytes(entries[0].bytes).decode() == entries[0].token
    assert [len(entry.top_logprobs) for entry in entries] == [2] * len(entries)
    streamed = [
        entry
        for chunk in ask(server, logprobs=True, top_logprobs=2, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert streamed == entries


def test_token_ids_come_back_for_training(serve: Any, tokenizer: Any) -> None:
    server = serve("x\n</think>\nHello")
    answer = ask(server, extra_body={"return_token_ids": True})
    assert tokenizer.decode(answer.prompt_token_ids) == server.sampler.prompts[0]
    assert tokenizer.decode(answer.choices[0].token_ids) == "x\n</think>\nHello<|im_end|>"
    chunks = list(ask(server, stream=True, extra_body={"return_token_ids": True}))
    ids = [token for chunk in chunks for choice in chunk.choices for token in getattr(choice, "token_ids", None) or ()]
    assert ids == answer.choices[0].token_ids
    assert chunks[0].prompt_token_ids == answer.prompt_token_ids


def test_a_cut_turn_says_length(serve: Any) -> None:
    answer = ask(serve("thinking on and on"), max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2


def test_parts_and_the_developer_role_are_read(serve: Any) -> None:
    server = serve()
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    ask(server, messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>" in server.sampler.prompts[0]
