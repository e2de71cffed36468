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
    answer = client.completions.create(model="tiny", prompt=ids, extra_body={"prompt_logprobs": 1})
    first, *rest = answer.choices[0].prompt_logprobs
    assert first is None
    for token, entries in zip(ids[1:], rest, strict=True):
        assert [(int(of), entry["logprob"], entry["rank"]) for of, entry in entries.items()] == [
            (token, -0.25, None),
            (0, -0.125, 1),
        ]
    answer = client.completions.create(model="tiny", prompt=ids, extra_body={"prompt_logprobs": 2})
    assert answer.choices[0].prompt_logprobs[1][str(ids[1])]["rank"] == 2
    with pytest.raises(openai.BadRequestError, match="leave out stream"):
        client.completions.create(model="tiny", prompt=ids, stream=True, extra_body={"prompt_logprobs": 0})


def test_echo_puts_the_prompt_in_front(serve: Any, tokenizer: Any) -> None:
    client, ids = serve("one two").client(), tokenizer.encode("abc def")
    choice = client.completions.create(model="tiny", prompt=ids, echo=True, logprobs=1).choices[0]
    said = tokenizer.encode("one two")
    assert choice.text == "abc defone two"
    assert choice.logprobs.token_logprobs == [None, *[-0.25] * (len(ids) - 1), *[-0.5] * (len(said) + 1)]
    assert "".join(choice.logprobs.tokens) == "abc defone two<|im_end|>"
    first, *rest = choice.logprobs.top_logprobs
    assert first is None
    assert rest[: len(ids) - 1] == [
        {tokenizer.decode([0]): -0.125, tokenizer.decode([token]): -0.25} for token in ids[1:]
    ]
    assert rest[len(ids) - 1 :] == [
        {tokenizer.decode([token]): -0.5} for token in (*said, tokenizer.id_of("<|im_end|>"))
    ]
    for place, text in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True):
        assert f"{choice.text}<|im_end|>"[place:].startswith(text)
    chunks = list(client.completions.create(model="tiny", prompt="abc def", echo=True, stream=True, n=2))
    for index in (0, 1):
        assert "".join(c.choices[0].text for c in chunks if c.choices[0].index == index) == "abc defone two"
    assert client.completions.create(model="tiny", prompt=ids, echo=None).choices[0].text == "one two"
    with pytest.raises(openai.BadRequestError, match="leave out stream"):
        client.completions.create(model="tiny", prompt=ids, echo=True, logprobs=0, stream=True)
    several = client.completions.create(model="tiny", prompt=["abc", "d e"], echo=True, logprobs=0, n=2).choices
    assert [choice.text for choice in several] == ["abcone two"] * 2 + ["d eone two"] * 2
    assert [choice.logprobs.tokens[0] for choice in several] == [
        tokenizer.decode(tokenizer.encode(text)[:1]) for text in ("abc", "abc", "d e", "d e")
    ]


def test_a_prompt_is_scored_without_an_answer(serve: Any, tokenizer: Any) -> None:
    client, ids = serve("one two").client(), tokenizer.encode("abc def")
    for stream in (False, True):
        fields: Any = {"model": "tiny", "prompt": ids, "max_tokens": 0, "echo": True}
        if stream:
            [chunk] = client.completions.create(**fields, stream=True)
            choice = chunk.choices[0]
        else:
            answer = client.completions.create(**fields, logprobs=0)
            assert answer.usage.completion_tokens == 0
            choice = answer.choices[0]
            assert choice.logprobs.token_logprobs == [None, *[-0.25] * (len(ids) - 1)]
            assert choice.logprobs.top_logprobs is None
            scored = client.completions.create(**fields, logprobs=1).choices[0].logprobs
            assert len(scored.top_logprobs) == len(scored.tokens) == len(ids)
        assert (choice.text, choice.finish_reason) == ("abc def", "length")
    with pytest.raises(openai.BadRequestError, match="set echo"):
        client.completions.create(model="tiny", prompt=ids, max_tokens=0)


def test_what_is_not_served_is_named(serve: Any) -> None:
    client = serve().client()
    with pytest.raises(openai.BadRequestError, match="suffix is not served"):
        client.completions.create(model="tiny", prompt="a", suffix="b")
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
