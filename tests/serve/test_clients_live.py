"""The official clients against the real engine with the model that comes with the package: every feature once."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from server_thread import Server

from step35.agents.tools.calculator import Calculator
from step35.cli.shipped import SHIPPED
from step35.config.serve import ServeSettings
from step35.engine.async_llm import AsyncLLM

KEY = "right"
QUESTION: list[Any] = [{"role": "user", "content": "Add 3860 to 5107."}]
ANSWER = "8967"
CALCULATOR: Any = Calculator.schema
LOOKUP: Any = {
    "type": "function",
    "function": {
        "name": "lookup",
        "parameters": {"type": "object", "properties": {"row": {"type": "integer"}}, "required": ["row"]},
    },
}
ANTHROPIC_TOOL: Any = {"name": "calculator", "input_schema": CALCULATOR["function"]["parameters"]}


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    """Return the engine."""
    engine = AsyncLLM(SHIPPED, max_batch=4, max_context=1024)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(llm: AsyncLLM) -> Iterator[Server]:
    """Return a server with a key, drafts and four places."""
    settings = ServeSettings(api_key=KEY, max_concurrent=4, max_context=llm.max_context, speculate=3)
    running = Server(llm, settings)
    yield running
    running.stop()


@pytest.fixture
def chat(server: Server) -> Callable[..., Any]:
    """Return the chat call, greedy unless told otherwise."""
    create: Any = server.client(KEY).chat.completions.create

    def ask(messages: list[Any] = QUESTION, **fields: Any) -> Any:
        return create(**{"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 120} | fields)

    return ask


@pytest.fixture
def claude(server: Server) -> anthropic.Anthropic:
    """Return the Anthropic client."""
    return anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0, timeout=30)


def metric(server: Server, name: str) -> float:
    """Return a number of /metrics."""
    text = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    [line] = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[-1])


def nothing_is_left(server: Server) -> None:
    """Wait until no generation runs and no block is held."""
    names = ("step35_engine_running", "step35_engine_full_blocks_held", "step35_engine_window_blocks_held")
    end = time.monotonic() + 5
    while any(metric(server, name) for name in names):
        assert time.monotonic() < end
        time.sleep(0.02)


def joined(chunks: list[Any], field: str) -> str:
    """Return the text of a field over all chunks."""
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    return "".join(getattr(delta, field, None) or "" for delta in deltas)


def test_a_turn_streamed_is_the_turn_as_a_whole(chat: Any) -> None:
    whole = chat(tools=[CALCULATOR])
    chunks = list(chat(tools=[CALCULATOR], stream=True, stream_options={"include_usage": True}))
    message = whole.choices[0].message
    assert joined(chunks, "reasoning_content") == message.reasoning_content != ""
    assert joined(chunks, "content") == (message.content or "")
    parts = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert "".join(part.function.arguments or "" for part in parts) == message.tool_calls[0].function.arguments
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert usage.prompt_tokens_details.cached_tokens > 0  # the same prompt a second time
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert usage.completion_tokens_details.accepted_prediction_tokens > 0


def test_an_agent_loop_ends_with_the_answer(chat: Any) -> None:
    messages = list(QUESTION)
    first = chat(messages, tools=[CALCULATOR])
    [call] = first.choices[0].message.tool_calls
    assert (first.choices[0].finish_reason, call.function.name) == ("tool_calls", "calculator")
    result = Calculator()(json.loads(call.function.arguments))
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    last = chat(messages, tools=[CALCULATOR]).choices[0]
    assert (last.message.content, last.finish_reason, last.message.tool_calls) == (ANSWER, "stop", None)


def test_logprobs_and_token_ids(chat: Any, llm: AsyncLLM) -> None:
    answer = chat(logprobs=True, top_logprobs=2, extra_body={"return_token_ids": True})
    choice = answer.choices[0]
    entries = choice.logprobs.content
    assert len(entries) == len(choice.token_ids) == answer.usage.completion_tokens
    assert all(entry.token == entry.top_logprobs[0].token for entry in entries)  # greedy
    assert all(entry.logprob >= entry.top_logprobs[1].logprob for entry in entries)
    assert llm.tokenizer.decode(answer.prompt_token_ids).endswith("<think>\n")
    chunks = list(chat(stream=True, extra_body={"return_token_ids": True}))
    streamed = [token for chunk in chunks for one in chunk.choices for token in getattr(one, "token_ids", None) or ()]
    assert streamed == choice.token_ids
    assert chunks[0].prompt_token_ids == answer.prompt_token_ids


def test_the_same_seed_gives_the_same_choices(chat: Any) -> None:
    def texts(seed: int) -> list[Any]:
        answer = chat(n=3, seed=seed, temperature=1.5, max_tokens=24, extra_body={"return_token_ids": True})
        return [choice.token_ids for choice in answer.choices]

    assert texts(1) == texts(1) != texts(2)
    assert len({tuple(ids) for ids in texts(1)}) > 1


def test_stop_texts_and_the_limit(chat: Any) -> None:
    whole = chat(extra_body={"thinking": "off"}, tools=[CALCULATOR], tool_choice="none")
    stop = whole.choices[0].message.content[2:4]
    stopped = chat(extra_body={"thinking": "off"}, tools=[CALCULATOR], tool_choice="none", stop=[stop]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole.choices[0].message.content[:2], "stop")
    assert chat(max_tokens=3).choices[0].finish_reason == "length"


def test_a_json_schema_is_kept(chat: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}, "sure": {"type": "boolean"}},
        "required": ["sum", "sure"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    content = chat(response_format=wanted, max_tokens=300).choices[0].message.content
    found = json.loads(content)
    assert set(found) == {"sum", "sure"}
    assert isinstance(found["sum"], int)
    assert isinstance(json.loads(chat(response_format={"type": "json_object"}).choices[0].message.content), dict)


def test_tool_choices(chat: Any) -> None:
    tools = [CALCULATOR, LOOKUP]
    assert chat(tools=tools, tool_choice="none").choices[0].message.tool_calls is None
    named = {"type": "function", "function": {"name": "lookup"}}
    [call, *_] = chat(tools=tools, tool_choice=named, parallel_tool_calls=False).choices[0].message.tool_calls
    assert call.function.name == "lookup"
    assert isinstance(json.loads(call.function.arguments)["row"], int)
    required = chat([{"role": "user", "content": "Hi."}], tools=tools, tool_choice="required").choices[0]
    assert {call.function.name for call in required.message.tool_calls} <= {"calculator", "lookup"}


def test_parallel_calls_and_one_at_a_time(chat: Any, llm: AsyncLLM) -> None:
    again = {llm.tokenizer.id_of("<tool_call>"): 100}  # this model alone writes one call at a time
    fields: dict[str, Any] = {"tools": [LOOKUP], "tool_choice": "required", "logit_bias": again}
    fields |= {"extra_body": {"thinking": "off"}, "max_tokens": 200}
    calls = chat(**fields).choices[0].message.tool_calls
    assert len(calls) == len({call.id for call in calls}) > 1
    alone = chat(parallel_tool_calls=False, **fields).choices[0]
    assert (len(alone.message.tool_calls), alone.finish_reason) == (1, "tool_calls")


def test_thinking_off_by_effort_and_by_budget(chat: Any) -> None:
    for fields in ({"extra_body": {"thinking": "off"}}, {"reasoning_effort": "none"}):
        answer = chat(**fields)
        assert answer.choices[0].message.reasoning_content is None
        assert answer.usage.completion_tokens_details.reasoning_tokens == 0
    budgeted = chat(extra_body={"thinking_budget": 2})
    assert budgeted.usage.completion_tokens_details.reasoning_tokens <= 2 + 4  # and the closing of the block
    assert len(budgeted.choices[0].message.reasoning_content) < len(chat().choices[0].message.reasoning_content)
    assert (
        chat(reasoning_effort="low").choices[0].message.reasoning_content == chat().choices[0].message.reasoning_content
    )


async def scores(llm: AsyncLLM, ids: list[int]) -> list[float]:
    """Return what the engine says of a sequence."""
    return (await llm.score([ids]))[0]


def test_completions_of_texts_and_ids(server: Server, llm: AsyncLLM) -> None:
    client = server.client(KEY)
    ids = llm.tokenizer.encode("def add(a, b):")
    extra = {"return_token_ids": True, "prompt_logprobs": 1}
    fields: Any = {"model": "tiny", "max_tokens": 12, "temperature": 0}
    by_ids = client.completions.create(prompt=ids, logprobs=1, extra_body=extra, **fields).choices[0]
    by_text = client.completions.create(prompt="def add(a, b):", **fields).choices[0]
    chunks = list(client.completions.create(prompt=ids, stream=True, **fields))
    assert by_ids.text == by_text.text == "".join(chunk.choices[0].text for chunk in chunks)
    assert by_ids.prompt_token_ids == ids
    assert len(by_ids.token_ids) == len(by_ids.logprobs.tokens) <= 12
    whole = asyncio.run(scores(llm, ids + by_ids.token_ids))
    entries = zip(ids[1:], by_ids.prompt_logprobs[1:], strict=True)
    said = [entry[str(token)]["logprob"] for token, entry in entries]
    assert said + by_ids.logprobs.token_logprobs == pytest.approx(whole, abs=1e-4)


def test_an_answer_is_scored_as_lm_eval_does(server: Server, llm: AsyncLLM) -> None:
    """The continuation's tokens between the context and the one new token, greedy when each is the likeliest."""
    client, context = server.client(KEY), llm.tokenizer.encode("def add(a, b):")
    fields: Any = {"model": "tiny", "temperature": 0}
    greedy = (
        client.completions.create(prompt=context, max_tokens=6, extra_body={"return_token_ids": True}, **fields)
        .choices[0]
        .token_ids
    )
    for answer, is_greedy in ((greedy, True), ([*greedy[:-1], greedy[-1] ^ 1], False)):
        scored = (
            client.completions.create(prompt=context + answer, max_tokens=1, echo=True, logprobs=1, **fields)
            .choices[0]
            .logprobs
        )
        logprobs, tops = (part[len(context) : -1] for part in (scored.token_logprobs, scored.top_logprobs))
        whole = asyncio.run(scores(llm, context + answer))
        assert logprobs == pytest.approx(whole[len(context) - 1 :], abs=1e-4)
        assert all(p == max(top.values()) for p, top in zip(logprobs, tops, strict=True)) == is_greedy


def test_responses_whole_and_streamed(server: Server) -> None:
    client = server.client(KEY)
    tool: Any = {"type": "function", **CALCULATOR["function"]}
    fields: Any = {"model": "tiny", "temperature": 0, "tools": [tool], "max_output_tokens": 120}
    first = client.responses.create(input=QUESTION, **fields)
    [call] = [item for item in first.output if item.type == "function_call"]
    result = Calculator()(json.loads(call.arguments))
    output = {"type": "function_call_output", "call_id": call.call_id, "output": result}
    items: Any = [*QUESTION, *(item.to_dict() for item in first.output), output]
    assert client.responses.create(input=items, **fields).output_text == ANSWER
    with client.responses.stream(input=items, **fields) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == ANSWER
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")


def test_the_anthropic_tool_loop(claude: anthropic.Anthropic) -> None:
    fields: Any = {"model": "tiny", "max_tokens": 120, "tools": [ANTHROPIC_TOOL]}
    fields["extra_body"] = {"temperature": 0}
    first = claude.messages.create(messages=QUESTION, **fields)
    [call] = [block for block in first.content if block.type == "tool_use"]
    assert (first.stop_reason, call.name, first.content[0].type) == ("tool_use", "calculator", "thinking")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": Calculator()(dict(call.input))}
    messages: Any = [
        *QUESTION,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    last = claude.messages.create(messages=messages, **fields)
    assert (last.content[-1].text, last.stop_reason) == (ANSWER, "end_turn")
    with claude.messages.stream(messages=messages, **fields) as stream:
        assert "".join(stream.text_stream) == ANSWER
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == [block.type for block in last.content]
    assert streamed.usage.output_tokens == last.usage.output_tokens
    counted = claude.messages.count_tokens(model="tiny", messages=messages, tools=[ANTHROPIC_TOOL])
    assert counted.input_tokens == last.usage.input_tokens + last.usage.cache_read_input_tokens
    forced = claude.messages.create(messages=QUESTION, tool_choice={"type": "tool", "name": "calculator"}, **fields)
    assert forced.content[-1].type == "tool_use"


def test_models_keys_and_what_is_refused(server: Server, claude: anthropic.Anthropic) -> None:
    [card] = server.client(KEY).models.list().data
    assert (card.id, card.max_model_len) == ("tiny", 1024)
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").models.list()
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="wrong").messages.create(model="tiny", max_tokens=1, messages=QUESTION)
    long: Any = [{"role": "user", "content": "word " * 2000}]
    with pytest.raises(openai.BadRequestError) as caught:
        server.client(KEY).chat.completions.create(model="tiny", messages=long)
    assert caught.value.code == "context_length_exceeded"


def test_a_full_server_says_so_and_a_client_that_leaves_is_cancelled(server: Server, chat: Any) -> None:
    endless = {"ignore_eos": True}
    nothing_is_left(server)
    stream = chat(n=4, stream=True, max_tokens=900, temperature=1, extra_body=endless)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as caught:
        chat()
    assert caught.value.response.headers["retry-after"] == "1"
    assert metric(server, "step35_engine_full_blocks_held") > 0
    stream.close()
    nothing_is_left(server)
    assert chat().choices[0].finish_reason == "stop"


def test_a_drain_lets_a_running_answer_end(llm: AsyncLLM) -> None:
    server = Server(llm, ServeSettings(max_context=1024))
    client: Any = server.client()
    request: Any = {"model": "tiny", "messages": QUESTION, "max_tokens": 900, "stream": True}
    stream = iter(client.chat.completions.create(**request, extra_body={"ignore_eos": True}))
    next(stream)
    server.server.handle_exit(signal.SIGTERM, None)
    assert httpx.get(f"{server.url}/health").status_code == 503
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(**request)
    *_, last = stream
    assert last.choices[0].finish_reason == "length"
    server.thread.join(5)
    assert not server.thread.is_alive()
