"""Log-probabilities in the two forms of the OpenAI dialect, and of prompts in vLLM's.

One entry for each generated token, end token included, and where it is asked for, for each of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
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
    logprobs: Sequence[float | None],
    tops: Sequence[TopLogprobs | None],
    *,
    limit: int,
    offset: int = 0,
) -> dict[str, Any]:
    """Return the `logprobs` object of a text completion; `offset` is where its first token begins.

    The first token of a prompt has None for a log-probability, and for its likeliest tokens. Elsewhere the token itself
    stands among these in any case, as in OpenAI's API.
    """
    tokens = [tokenizer.decode([token]) for token in ids]
    return {
        "tokens": tokens,
        "token_logprobs": [None if value is None else max(value, LOWEST) for value in logprobs],
        "top_logprobs": [_by_text(tokenizer, *at, limit) for at in zip(ids, logprobs, tops, strict=bool(tops))] or None,
        "text_offset": list(accumulate(map(len, tokens), initial=offset))[:-1],
    }


def prompt_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[TopLogprobs]
) -> list[dict[str, dict[str, Any]] | None]:
    """Return vLLM's `prompt_logprobs`: by id, entries of each prompt token and of the likeliest at its place.

    The first is null; the rank of a token that is not among the likeliest is unknown.
    """
    found: list[dict[str, dict[str, Any]] | None] = [None]
    for place, (token, logprob) in enumerate(zip(ids[1:], logprobs, strict=True)):
        ranked = [(*pair, rank) for rank, pair in enumerate(tops[place], start=1)] if tops else []
        entries = ranked if any(other == token for other, _, _ in ranked) else [(token, logprob, None), *ranked]
        found.append(
            {
                str(of): {"logprob": max(value, LOWEST), "rank": rank, "decoded_token": tokenizer.decode([of])}
                for of, value, rank in entries
            }
        )
    return found


def _by_text(
    tokenizer: Tokenizer, token: int, logprob: float | None, top: TopLogprobs | None, limit: int
) -> dict[str, float] | None:
    """Return log-probabilities by text; of tokens that look alike, parts of characters, the likeliest is shown."""
    if top is None or logprob is None:
        return None
    pairs = top[:limit]
    if all(other != token for other, _ in pairs):
        pairs = (*pairs, (token, logprob))
    return {tokenizer.decode([token]): max(value, LOWEST) for token, value in reversed(pairs)}


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    # A token that is a part of a character has no text of its own, so its bytes cannot be told from it.
    whole = "\ufffd" not in text
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(text.encode()) if whole else None}
