"""A sampler that says what it is told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from step35.api.sampler import Completion, Update
from step35.api.sampling import SamplingParams
from step35.data.tokenizer import StreamDecoder, Tokenizer


@dataclass
class FakeSampler:
    """Answers with `texts` in turn, a token at a time; `stay` keeps it from ending."""

    tokenizer: Tokenizer
    texts: list[str] = field(default_factory=lambda: ["Hm.\n</think>\nHello"])
    stay: bool = False
    error: Exception | None = None
    prompts: list[str] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)

    async def stream(self, prompt: Sequence[int], params: SamplingParams) -> AsyncIterator[Update]:
        """Say the next text."""
        if self.error:
            raise self.error
        text = self.texts[len(self.prompts) % len(self.texts)]
        self.prompts.append(self.tokenizer.decode(prompt))
        self.params.append(params)
        end = self.tokenizer.id_of("<|im_end|>")
        ids, decoder = (*self.tokenizer.encode(text), end), StreamDecoder(self.tokenizer)
        cut = len(ids) > params.max_tokens
        ids = ids[: params.max_tokens]
        try:
            for place, token in enumerate(ids):
                last = place == len(ids) - 1 and not self.stay
                top = ((((token, -0.5), (0, -2.0))[: params.top_logprobs]),) if params.top_logprobs else ()
                piece = "" if token == end else decoder.push(token)
                reason = ("length" if cut else "stop") if last else None
                whole = Completion(ids, (-0.5,) * len(ids), reason, cached_tokens=2) if reason else None
                if whole and params.prompt_logprobs is not None:
                    whole = replace(whole, prompt_logprobs=(-0.25,) * (len(prompt) - 1))
                    tops = [((0, -0.125), (token, -0.25))[: params.prompt_logprobs] for token in prompt[1:]]
                    whole = replace(whole, prompt_top_logprobs=tuple(tops) if params.prompt_logprobs else ())
                yield Update((token,), (-0.4,), (-0.5,), top, piece, reason, whole)
                self.started.set()
                await asyncio.sleep(0)
            await asyncio.Event().wait()
        finally:
            self.closed.set()

    def statistics(self) -> Mapping[str, float]:
        """Return one number."""
        return {"cache_tokens": 7.0}
