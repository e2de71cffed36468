"""Log-probabilities in the two forms of the OpenAI dialect, and of prompts in vLLM's.

One entry for each generated token, end token included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from step35.api.sampler import TopLogprobs
from step35.data.tokenizer import Tokenizer

LOWEST = -9999.0
"""What stands for minus infinity, which JSON cannot say."""


def chat_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[TopLogprobs], limit: int
) -> dict[str, Any]:
    """Return the `logprobs` object of a chat choice, with the `limit` likeliest tokens at each place."""
    entries = []
    for place, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        top = tops[place][:limit] if place < len(tops) else ()
        entry = _entry(tokenizer, token, logprob)
        entries.append(entry | {"top_logprobs": [_entry(tokenizer, *pair) for pair in top]})
    return {"content": entries, "refusal": None}


def text_logprobs(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    logprobs: Sequence[float],
    tops: Sequence[TopLogprobs],
    *,
    limit: int,
    offset: int = 0,
) -> dict[str, Any]:
    """Return the `logprobs` object of a text completion; `offset` is where its first token begins."""
    tokens = [tokenizer.decode([token]) for token in ids]
    offsets = [offset + sum(map(len, tokens[:place])) for place in range(len(tokens))]
    top = [{tokenizer.decode([token]): max(value, LOWEST) for token, value in pairs[:limit]} for pairs in tops]
    return {
        "tokens": tokens,
        "token_logprobs": [max(value, LOWEST) for value in logprobs],
        "top_logprobs": top or None,
        "text_offset": offsets,
    }


def prompt_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[float]
) -> list[dict[str, dict[str, Any]] | None]:
    """Return vLLM's `prompt_logprobs`: each prompt token's entry by its id, null for the first; ranks are unknown."""
    found: list[dict[str, dict[str, Any]] | None] = [None]
    for token, logprob in zip(ids[1:], logprobs, strict=True):
        entry = {"logprob": max(logprob, LOWEST), "rank": None, "decoded_token": tokenizer.decode([token])}
        found.append({str(token): entry})
    return found


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    # A token that is a part of a character has no text of its own, so its bytes cannot be told from it.
    whole = "\ufffd" not in text
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(text.encode()) if whole else None}
