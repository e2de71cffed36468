"""`LLM`: a checkpoint ready to generate, in one process. Implements `api.Sampler`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from step35.api.messages import Message, ToolSchema
from step35.api.sampler import Completion, Update
from step35.api.sampling import SamplingParams
from step35.data import chat
from step35.data.tokenizer import Tokenizer, load_tokenizer
from step35.engine.engine import Engine, check_ids
from step35.engine.int8 import quantise
from step35.engine.request import Request
from step35.engine.stop_text import StopText
from step35.errors import ConfigError
from step35.model.context import Context
from step35.model.step35 import Step35
from step35.model.weights import load_model
from step35.runtime.hub import fetched

Prompt = str | Sequence[int]
SCORED = 1024
"""Positions whose logits `score` holds at a time: with a large vocabulary they are larger than all else."""


class LLM:
    """Load what `load_model` loads (a checkpoint folder, a .gguf file), or wrap a model and tokenizer in memory.

    `mtp` loads only the first so many MTP modules; 0 does without the tensors of any.
    `quantization="int8"` rounds the matrices of the model, in place, to 8 bits: see `engine/int8.py`.
    `options` go to `Engine`: `cache_tokens`, `max_pass_tokens`, `adaptive_depth`, `draft_vocabulary`.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        model: Step35 | None = None,
        tokenizer: Tokenizer | None = None,
        dtype: str | torch.dtype = "float32",
        device: str = "cpu",
        quantization: Literal["none", "int8"] = "none",
        mtp: int | None = None,
        max_batch: int = 64,
        max_context: int | None = None,
        **options: Any,
    ) -> None:
        if quantization not in ("none", "int8"):
            raise ConfigError(f"quantization={quantization!r} is unknown; choose none or int8.")
        if path is not None:
            path = fetched(path)
            model = load_model(path, dtype=dtype, device=device, mtp=mtp)
            tokenizer = load_tokenizer(path)
        if model is None or tokenizer is None:
            raise ValueError("LLM needs a checkpoint folder, or both model= and tokenizer=")
        if quantization == "int8":
            model = quantise(model)
        self.tokenizer = tokenizer
        self.engine = Engine(
            model, tokenizer.eos_ids, tokenizer=tokenizer, max_batch=max_batch, max_context=max_context, **options
        )

    @property
    def model(self) -> Step35:
        """The module that generates."""
        return self.engine.model

    def generate(
        self, prompts: Sequence[Prompt] | str, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continue each prompt (text, or token ids); text prompts get the BOS token in front.

        `params` are those of all prompts, or one for each. Raises `ConfigError` for what this model cannot do.
        """
        many = [prompts] if isinstance(prompts, str) else prompts
        requests = self.engine.create([self._ids(p) for p in many], params or SamplingParams())
        completions = self.engine.generate(requests)
        return [replace(c, text=self._text(r, c)) for r, c in zip(requests, completions, strict=True)]

    def chat(
        self,
        messages: list[Message],
        tools: list[ToolSchema] | None = None,
        params: SamplingParams | None = None,
    ) -> Message:
        """Return the next assistant message, reasoning and tool calls parsed.

        Raises `DataError` for messages that are no conversation.
        """
        prompt = chat.encode_prompt(self.tokenizer, messages, tools)
        [completion] = self.generate([prompt], params)
        return chat.parse(completion.text, tools)

    def updates(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Update]:
        """Yield what each pass brings: one token, or more when drafts were right, and the text that is complete."""
        [request] = self.engine.create([self._ids(prompt)], params or SamplingParams())
        request.text = request.text or StopText(self.tokenizer, skip_special=True)
        for news in self.engine.run([request]):
            for _, tokens in news:
                yield update(request, len(tokens))

    def stream_ids(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[list[int]]:
        """Yield the new tokens of each pass."""
        for new in self.updates(prompt, params):
            yield list(new.token_ids)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the text of `generate` piece by piece: never half a character, nor the start of a stop text."""
        for new in self.updates(prompt, params):
            if new.text:
                yield new.text

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probabilities of ids 1..T-1 of each sequence of T ids."""
        return [score_one(self.model, ids) for ids in sequences]

    def update_weights(self, state: Mapping[str, Any], version: int) -> None:
        """Take new weights between generations."""
        self.engine.update_weights(state, version)

    def _text(self, request: Request, completion: Completion) -> str:
        if request.text is not None:  # it ends before the stop text
            return request.text.whole
        return self.tokenizer.decode(list(completion.token_ids), skip_special=True)

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        try:
            return [index(token) for token in prompt]
        except TypeError:
            raise ConfigError(f"a prompt is {prompt!r:.80}; give a text, or a list of token ids.") from None


def score_one(model: Step35, ids: Sequence[int]) -> list[float]:
    """Return the T-1 log-probabilities of one sequence; raise `ConfigError` for ids outside the vocabulary."""
    check_ids(ids, model.config.vocab_size)
    tokens_BT = torch.tensor([list(ids)], dtype=torch.long, device=model.embed_tokens.weight.device)
    h_BTD = model.trunk(tokens_BT, Context.packed(tokens_BT))[:, :-1]
    parts = zip(torch.split(h_BTD, SCORED, 1), torch.split(tokens_BT[:, 1:], SCORED, 1), strict=True)
    losses = [F.cross_entropy(model.logits(h)[0], target[0], reduction="none") for h, target in parts]
    return (-torch.cat(losses)).tolist()


def update(request: Request, count: int) -> Update:
    """Describe the last `count` tokens of a request whose text is followed."""
    ended = request.finish_reason is not None
    assert request.text is not None
    return Update(
        tuple(request.tokens[-count:]),
        tuple(request.logprobs[-count:]),
        tuple(request.raw_logprobs[-count:]),
        tuple(request.top_logprobs[-count:]),
        request.text.take(),
        request.finish_reason,
        request.completion(request.text.whole) if ended else None,
    )
