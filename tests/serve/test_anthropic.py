"""/v1/messages through the official client."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

USER: list[Any] = [{"role": "user", "content": "Hi"}]
TOOL: Any = {
    "name": "add",
    "description": "Add.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
CALL = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"


def client(server: Any) -> anthropic.Anthropic:
    """Return the official client."""
    return anthropic.Anthropic(base_url=server.url, api_key="key", max_retries=0, timeout=10)


def ask(server: Any, **fields: Any) -> Any:
    """Return the answer of the messages route."""
    return client(server).messages.create(**{"model": "tiny", "max_tokens": 99, "messages": USER} | fields)


def test_a_message_has_thinking_text_calls_and_usage(serve: Any, tokenizer: Any) -> None:
    server = serve(f"Well.\n</think>\nOK {CALL}")
    message = ask(server, system="Be brief.", tools=[TOOL], extra_body={"temperature": 0.5})
    thinking, text, call = message.content
    assert (thinking.type, thinking.thinking, text.text) == ("thinking", "Well.", "OK ")
    assert (call.type, call.name, call.input) == ("tool_use", "add", {"a": 1})
    assert message.stop_reason == "tool_use"
    assert message.usage.cache_read_input_tokens == 2
    assert message.usage.input_tokens + 2 == len(tokenizer.encode(server.sampler.prompts[0]))
    assert "<|im_start|>system\nBe brief.\n\n# Tools" in server.sampler.prompts[0]
    assert (
        '{"type": "function", "function": {"name": "add", "description": "Add.", "parameters"'
        in (server.sampler.prompts[0])
    )
    assert server.sampler.params[0].temperature == 0.5


def test_the_stream_adds_up_to_the_same_message(serve: Any) -> None:
    server = serve(f"Well.\n</think>\nOK {CALL}{CALL}")
    with client(server).messages.stream(model="tiny", max_tokens=99, messages=USER, tools=[TOOL]) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[0].thinking == "Well."
    assert message.content[2].input == {"a": 1}
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens > 5


def test_blocks_become_the_turns_of_the_chat_format(serve: Any) -> None:
    server = serve()
    turn = [
        {"type": "thinking", "thinking": "I add.", "signature": ""},
        {"type": "text", "text": "Now"},
        {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}},
    ]
    results = [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "3"}]}]
    messages = [*USER, {"role": "assistant", "content": turn}, {"role": "user", "content": results}]
    ask(server, messages=messages, tools=[TOOL])
    assert server.sampler.prompts[0].endswith(
        f"<|im_start|>assistant\n<think>\nI add.\n</think>\nNow{CALL}<|im_end|>\n"
        "<|im_start|>tool_response\n<tool_response>3</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_tool_choice_and_thinking(serve: Any) -> None:
    server = serve("Hello")
    ask(server, tools=[TOOL], tool_choice={"type": "any"}, thinking={"type": "disabled"})
    ask(server, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2000)
    forced, budgeted = server.sampler.params
    assert [tool["function"]["name"] for tool in forced.grammar.tools] == ["add"]
    assert (forced.in_thinking, budgeted.in_thinking, budgeted.thinking_budget) == (False, True, 1024)


def test_stop_reasons(serve: Any) -> None:
    assert ask(serve("x\n</think>\nHello")).stop_reason == "end_turn"
    assert ask(serve("x\n</think>\nHello"), max_tokens=2).stop_reason == "max_tokens"


def test_tokens_are_counted(serve: Any, tokenizer: Any) -> None:
    server = serve()
    ask(server)
    counted = client(server).messages.count_tokens(model="tiny", messages=USER)
    assert counted.input_tokens == len(tokenizer.encode(server.sampler.prompts[0]))


def test_errors_have_the_shape_of_the_dialect(serve: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="reads text only"):
        ask(serve(), messages=[{"role": "user", "content": [{"type": "image", "source": {}}]}])
    with pytest.raises(anthropic.NotFoundError) as caught:
        ask(serve(), model="claude")
    assert caught.value.body == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "model 'claude' is not served here; use 'tiny'."},
    }
    with pytest.raises(anthropic.AuthenticationError):
        ask(serve(api_key="right"))
