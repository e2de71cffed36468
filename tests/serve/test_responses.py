"""/v1/responses through the official client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

TOOL: Any = {
    "type": "function",
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
CALL = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"


def ask(server: Any, **fields: Any) -> Any:
    """Return the answer of the responses route."""
    return server.client().responses.create(**{"model": "tiny", "input": "Hi"} | fields)


def test_a_response_has_reasoning_message_calls_and_usage(serve: Any) -> None:
    response = ask(serve(f"Well.\n</think>\nOK {CALL}"), tools=[TOOL], instructions="Be brief.")
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert response.output[0].content[0].text == "Well."
    assert response.output_text == "OK "
    assert json.loads(response.output[2].arguments) == {"a": 1}
    assert (response.status, response.usage.input_tokens_details.cached_tokens) == ("completed", 2)


def test_the_stream_adds_up_to_the_same_response(serve: Any) -> None:
    server = serve(f"Well.\n</think>\nOK {CALL}")
    with server.client().responses.stream(model="tiny", input="Hi", tools=[TOOL]) as stream:
        events = list(stream)
        response = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "OK "
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert events[-1].type == "response.completed"


def test_items_become_the_turns_of_the_chat_format(serve: Any) -> None:
    server = serve(f"I add.\n</think>\nNow{CALL}", "x\n</think>\n3")
    first = ask(server, tools=[TOOL])
    items = [{"role": "user", "content": "Hi"}, *(item.model_dump() for item in first.output)]
    items.append({"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "3"})
    ask(server, input=items, tools=[TOOL])
    assert server.sampler.prompts[1].endswith(
        f"<|im_start|>assistant\n<think>\nI add.\n</think>\nNow{CALL}<|im_end|>\n"
        "<|im_start|>tool_response\n<tool_response>3</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_options_arrive_and_state_is_refused(serve: Any) -> None:
    server = serve("{}")
    form = {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}}
    response = ask(server, text=form, reasoning={"effort": "none"}, max_output_tokens=1)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    params = server.sampler.params[0]
    assert (params.grammar.json_schema, params.in_thinking) == ({"type": "object"}, False)
    ask(server, tools=[TOOL], tool_choice={"type": "function", "name": "add"})
    assert server.sampler.params[1].grammar.tools[0]["function"]["name"] == "add"
    with pytest.raises(openai.BadRequestError, match="nothing is stored here"):
        ask(server, previous_response_id="resp_1")
