"""/v1/completions, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest


def test_texts_and_ids_are_continued(serve: Any, tokenizer: Any) -> None:
    server = serve("one", "two")
    ids = tokenizer.encode("abc")
    for prompt in ("abc", ids, ["abc"], [ids]):
        server.client().completions.create(model="tiny", prompt=prompt)
    assert server.sampler.prompts == ["abc"] * 4
    answer = server.client().completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=50, seed=1)
    assert [choice.text for choice in answer.choices] == ["one", "two", "one", "two"]
    assert server.sampler.prompts[4:] == ["a", "a", "b", "b"]
    assert [params.seed for params in server.sampler.params[4:]] == [1, 2, 1, 2]
    assert not server.sampler.params[0].in_thinking


def test_a_stream_adds_up(serve: Any, tokenizer: Any) -> None:
    chunks = list(
        serve("one two")
        .client()
        .completions.create(model="tiny", prompt="a", stream=True, logprobs=1, extra_body={"return_token_ids": True})
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two"
    ids = [token for chunk in chunks for token in chunk.choices[0].token_ids]
    assert tokenizer.decode(ids) == "one two<|im_end|>"
    assert chunks[0].choices[0].prompt_token_ids == tokenizer.encode("a")
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs_in_the_older_form(serve: Any) -> None:
    answer = serve("one two").client().completions.create(model="tiny", prompt="a", logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == "one two<|im_end|>"
    assert logprobs.token_logprobs == [-0.5] * len(logprobs.tokens)
    assert len(logprobs.top_logprobs) == len(logprobs.text_offset) == len(logprobs.tokens)
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])


def test_prompt_logprobs_in_vllms_form(serve: Any, tokenizer: Any) -> None:
    client, ids = serve("one").client(), tokenizer.encode("abc def")
    answer = client.completions.create(model="tiny", prompt=ids, extra_body={"prompt_logprobs": 0})
    first, *rest = answer.choices[0].prompt_logprobs
    assert first is None
    assert rest == [
        {str(token): {"logprob": -0.25, "rank": None, "decoded_token": tokenizer.decode([token])}} for token in ids[1:]
    ]
    assert not hasattr(client.completions.create(model="tiny", prompt=ids).choices[0], "prompt_logprobs")
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs=1"):
        client.completions.create(model="tiny", prompt=ids, extra_body={"prompt_logprobs": 1})
    with pytest.raises(openai.BadRequestError, match="leave out stream"):
        client.completions.create(model="tiny", prompt=ids, stream=True, extra_body={"prompt_logprobs": 0})


def test_what_is_not_served_is_named(serve: Any) -> None:
    client = serve().client()
    with pytest.raises(openai.BadRequestError, match="echo is not served"):
        client.completions.create(model="tiny", prompt="a", echo=True)
    with pytest.raises(openai.BadRequestError, match="not in the vocabulary"):
        client.completions.create(model="tiny", prompt=[10**6])
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.completions.create(model="tiny", prompt="")


def test_tokens_and_back(serve: Any, tokenizer: Any) -> None:
    server = serve()
    answer = httpx.post(f"{server.url}/tokenize", json={"text": "abc"}).json()
    assert answer["tokens"] == tokenizer.encode("abc")
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": answer["tokens"]}).json()["text"] == "abc"
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert tokenizer.decode(chat["tokens"]).endswith("<|im_start|>assistant\n<think>\n")
    assert httpx.post(f"{server.url}/tokenize", json={}).status_code == 400
