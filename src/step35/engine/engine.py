"""The generation loop. A pass: plan rows, draft, run the trunk once for all, choose tokens, keep what is right.

Speculation changes the speed and nothing else. The trunk verifies all drafts in one pass; the token at each place
is chosen from the trunk's logits with that place's own random number, and a draft is accepted when it is that very
token. So output with drafts equals output without, greedy or sampled, and for the greedy drafts used here the
acceptance rate equals that of rejection sampling (the probability the trunk gives the draft).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from step35.api.sampler import Completion
from step35.api.sampling import SamplingParams
from step35.data.tokenizer import Tokenizer
from step35.engine.blocks import BLOCK_TOKENS
from step35.engine.grammar import GrammarCompiler
from step35.engine.kv_cache import PagedCache
from step35.engine.request import Request
from step35.engine.runner import Runner
from step35.engine.sampling import Choice, Place, Scores, most_likely, pick, shifts_logits, takes_likeliest
from step35.engine.scheduler import Rows, Scheduler
from step35.engine.speculative import DepthControl
from step35.engine.stop_text import StopText
from step35.engine.thinking import build_constraint
from step35.errors import ConfigError
from step35.model.step35 import Step35

MOST_BEHIND = 64
"""Positions by which a module that adaptive depth leaves out may lag before it is made to catch up."""

InFlight = Literal["continue", "finish"]
"""What requests in progress do when new weights arrive: go on with the new ones, or end with the old ones."""

News = list[tuple[Request, list[int]]]
"""The new tokens of each request that got any."""


class Engine:
    """Generates for any number of requests with one model on one device. Not thread-safe; see `AsyncLLM`.

    `cache_tokens` is the number of tokens whose keys and values full layers keep, for all requests together and for
    prefixes that may come again. `max_pass_tokens` bounds the rows of a pass: long prompts are read in chunks while
    others decode. `adaptive_depth` drafts no deeper than acceptance and times so far make worth while. With
    `draft_vocabulary` N, drafts are chosen among the first N token ids, and the compiled passes do not read the rest of
    the modules' heads: byte-pair vocabularies list tokens in the order of their merging, the common ones first.
    """

    def __init__(
        self,
        model: Step35,
        eos_ids: Sequence[int],
        *,
        tokenizer: Tokenizer | None = None,
        max_batch: int = 64,
        max_context: int | None = None,
        cache_tokens: int | None = None,
        max_pass_tokens: int = 512,
        adaptive_depth: bool = False,
        draft_vocabulary: int | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.eos_ids = tuple(eos_ids)
        self.max_context = min(max_context or 4096, model.config.max_position_embeddings)
        self.version = 0
        self.counters: Counter[str] = Counter()
        self.drafted, self.accepted = ([0] * len(model.mtp) for _ in range(2))
        weight = model.embed_tokens.weight
        dtype = model.compute_dtype or weight.dtype
        full, window = _block_counts(model, max_batch, self.max_context, cache_tokens, max_pass_tokens)
        self.cache = PagedCache(model.config, full_blocks=full, window_blocks=window, dtype=dtype, device=weight.device)
        self.runner = Runner(model, self.cache, _draft_vocabulary(model, draft_vocabulary))
        self.scheduler = Scheduler(self.cache, max_batch=max_batch, max_pass_tokens=max_pass_tokens)
        self.depths = DepthControl(len(model.mtp)) if adaptive_depth else None
        self._grammars = None if tokenizer is None else GrammarCompiler(tokenizer, model.config.vocab_size)
        self._new_weights: tuple[Mapping[str, Any], int] | None = None
        self._weights_taken = 0

    def create(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        stream_text: bool = False,
    ) -> list[Request]:
        """Return one request a prompt; raise `ConfigError` for what this model cannot do.

        With `stream_text`, `Request.text` has the text so far, special tokens included.
        """
        many = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(many) != len(prompts):
            raise ConfigError(
                f"{len(prompts)} prompts, but {len(many)} sampling params; give one for all, or one for each."
            )
        return [self._request(p, s, stream_text) for p, s in zip(prompts, many, strict=True)]

    def add(self, request: Request) -> None:
        """Queue a request; `step` will run it."""
        request.rekey(self._salt(request))
        self.scheduler.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request at once, if it has not ended yet."""
        if request.finish_reason is None:
            request.finish_reason = "cancelled"
            self.scheduler.finish(request)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._new_weights)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Run the requests to their ends; results come in order."""
        for _ in self.run(requests):
            pass
        return [request.completion() for request in requests]

    def run(self, requests: Sequence[Request]) -> Iterator[News]:
        """Run the requests to their ends, yielding after each pass their new tokens."""
        for request in requests:
            self.add(request)
        try:
            while any(request.finish_reason is None for request in requests):
                yield self.step()
        finally:
            for request in requests:
                self.cancel(request)

    def update_weights(self, state: Mapping[str, Any], version: int, in_flight: InFlight = "continue") -> None:
        """Take new weights now, or with "finish" once the requests in progress have ended with the old ones."""
        self._new_weights = (state, version)
        self.scheduler.admitting = False
        if in_flight == "continue" or not self.scheduler.running:
            self._load_weights()

    @torch.inference_mode()
    def step(self) -> News:
        """Run one pass and return the tokens that it brought."""
        self._swap_weights_when_idle()
        self._choose_depth()
        planned = self.runner.in_order(self.scheduler.plan())
        if not planned:
            return []
        started, decode_only = time.perf_counter(), all(rows.request.decoding for rows in planned)
        h_ND, scores = self.runner.run(planned)
        ready = [rows.request for rows in planned if rows.end == rows.request.length]
        self._read(planned, h_ND)
        news = self._accept(ready, scores) if ready else []
        self._catch_up(planned)
        for rows in planned:
            self._settle(rows.request)
        if self.depths is not None and decode_only:
            depth = max(rows.depth for rows in planned)
            self.depths.time(len(planned), depth, time.perf_counter() - started)
        self.counters["passes"] += 1
        self.counters["rows"] += len(h_ND)
        return news

    def statistics(self) -> dict[str, float]:
        """Return counters since the start, and how full the queue and the cache are."""
        pools = {"full": self.cache.full, "window": self.cache.window}
        gauges = {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "preemptions": self.scheduler.preemptions,
            "version": self.version,
        }
        for kind, pool in pools.items():
            gauges[f"{kind}_blocks"] = len(pool.holders)
            gauges[f"{kind}_blocks_held"] = len(pool.holders) - pool.available
        for k in range(len(self.drafted)):
            gauges[f"drafted_{k + 1}"], gauges[f"accepted_{k + 1}"] = self.drafted[k], self.accepted[k]
        return {**self.counters, **gauges}

    def _salt(self, request: Request) -> bytes:
        return b"%d %d" % (self._weights_taken, request.params.speculate)

    def _request(self, prompt: Sequence[int], params: SamplingParams, stream_text: bool) -> Request:
        if params.speculate > len(self.model.mtp):
            raise ConfigError(
                f"speculate={params.speculate}, but the model has {len(self.model.mtp)} MTP modules; "
                f"choose 0 to {len(self.model.mtp)}."
            )
        check_ids((*prompt, *params.logit_bias), self.model.config.vocab_size)
        request = Request.create(prompt, params, self.eos_ids, self.max_context)
        self._follow_text(request, stream_text)
        request.greedy = takes_likeliest(params) and request.constraint is None and not params.top_logprobs
        return request

    def _follow_text(self, request: Request, stream_text: bool) -> None:
        """Give the request what it needs to know of its text."""
        params = request.params
        if self.tokenizer is None or self._grammars is None:
            if stream_text or params.stop or params.grammar is not None or params.thinking_budget is not None:
                raise ConfigError(
                    "text streams, stop texts, grammars and thinking budgets need a tokenizer; give the engine one."
                )
            return
        if stream_text or params.stop:
            request.text = StopText(self.tokenizer, params.stop, skip_special=not stream_text)
        request.constraint = build_constraint(params, self.tokenizer, self._grammars)

    def _choose_depth(self) -> None:
        """With adaptive depth, let all requests that decode draft equally deep, as far as they may."""
        if self.depths is None:
            return
        decoding = [request for request in self.scheduler.running if request.decoding]
        most = max((request.params.speculate for request in decoding), default=0)
        if most:
            depth = self.depths.choose(len(decoding), most)
            for request in decoding:
                request.depth = min(depth, request.params.speculate)

    def _read(self, planned: list[Rows], h_ND: Tensor) -> None:
        """Note how far requests have run, and what the prompts' rows say."""
        done = 0
        for rows in planned:
            request = rows.request
            if request.params.prompt_logprobs is not None and rows.start + 1 < len(request.prompt):
                self._score_prompt(request, rows, h_ND[done : done + rows.count])
            request.computed = rows.end
            done += rows.count + rows.depth

    def _accept(self, requests: list[Request], scores: Scores) -> News:
        """Choose a token at every place, and keep those up to the first draft that was another token."""
        if all(request.greedy for request in requests):
            choice = Choice.likeliest(scores)
        else:
            choice = pick(scores, [place for request in requests for place in self._places(request)])
        news, first = [], 0
        for request in requests:
            part = slice(first, first + 1 + len(request.drafts))
            kept = self._take(request, choice.tokens[part], choice.logprobs[part], choice.raw_logprobs[part])
            self._report_top(request, choice, first, kept)
            news.append((request, request.tokens[-kept:]))
            first = part.stop
        self.counters["generated_tokens"] += sum(len(new) for _, new in news)
        return news

    def _places(self, request: Request) -> list[Place]:
        """Return what decides each place: its number, and the tokens and masks that hold if all drafts are right."""
        answer = request.generated if shifts_logits(request.params) else []  # long, and read by penalties alone
        constraint = request.constraint
        places, followed, dead = [], 0, False
        for ahead in range(1 + len(request.drafts)):
            allowed = None if constraint is None or dead else constraint.allowed()
            before = answer + request.drafts[:ahead]
            places.append(Place(request.params, request.uniform(ahead), request.prompt, before, allowed))
            if constraint is not None and ahead < len(request.drafts) and not dead:
                draft = request.drafts[ahead]
                dead = draft in request.end_ids or (allowed is not None and not bool(allowed[draft]))
                if not dead:  # behind a draft that cannot be right, nothing will be kept
                    constraint.advance(draft)
                    followed += 1
        if constraint is not None:
            constraint.rollback(followed)
        return places

    def _take(self, request: Request, chosen: list[int], logprobs: list[float], raw: list[float]) -> int:
        """Append the first token and one more for every draft that was right; return how many; count the drafts."""
        drafts, known, right = request.drafts, request.length, 0
        while right < len(drafts) and drafts[right] == chosen[right]:
            right += 1
        kept = request.extend(chosen[: right + 1], logprobs, raw, self.version)
        if drafts:
            right = min(right, kept - (request.finish_reason is not None))
            self._count_drafts(request, right)
            for k in range(len(drafts)):
                request.module_done[k] = known + min(k, right)
            request.computed = request.length - 1
            request.drafts = []
        return kept

    def _count_drafts(self, request: Request, right: int) -> None:
        """Count drafts at each depth as offered and as accepted; a token that ends the request judges none."""
        offered = right if request.finish_reason is not None else min(right + 1, len(request.drafts))
        for k in range(offered):
            request.drafted[k] += 1
            self.drafted[k] += 1
        for k in range(right):
            request.accepted[k] += 1
            self.accepted[k] += 1
        if self.depths is not None:
            self.depths.observe(offered, right)

    def _report_top(self, request: Request, choice: Choice, first: int, kept: int) -> None:
        if request.params.top_logprobs:
            source_NV = choice.raw_NV if request.params.logprobs_of == "raw" else choice.logprobs_NV
            assert source_NV is not None  # such a request is not `greedy`
            request.top_logprobs += most_likely(source_NV[first : first + kept], request.params.top_logprobs)

    def _score_prompt(self, request: Request, rows: Rows, h_TD: Tensor) -> None:
        """Note the log-probabilities of the prompt tokens that these rows predict, and the likeliest tokens there."""
        known = len(request.prompt_logprobs)  # a request that was preempted reads its prompt again
        targets = request.prompt[rows.start + 1 : rows.end + 1][max(0, known - rows.start) :]
        if targets:
            h_TD = h_TD[max(0, known - rows.start) :][: len(targets)].to(self.cache.dtype)
            logprobs_TV = self.model.logits(h_TD).log_softmax(-1)
            targets_T = torch.tensor(targets, device=h_TD.device)
            request.prompt_logprobs += logprobs_TV.gather(1, targets_T[:, None])[:, 0].tolist()
            if count := request.params.prompt_logprobs:
                request.prompt_top_logprobs += most_likely(logprobs_TV, count)

    def _catch_up(self, planned: list[Rows]) -> None:
        """Run the modules over prompt rows as soon as the trunk has: behind the window its states are given back.

        What adaptive depth has left out is made up for from time to time, for the same reason.
        """
        going = [r.request for r in planned if r.request.finish_reason is None]
        late = [request for request in going if request.reading or request.behind > MOST_BEHIND]
        if not late:
            return
        for k in range(len(self.model.mtp)):
            rows = [Rows(r, r.module_done[k], r.computed - r.module_done[k]) for r in late if k < len(r.module_done)]
            rows = self.runner.in_order(r for r in rows if r.count > 0)
            if rows:
                self.runner.module(k, rows)
                for r in rows:
                    r.request.module_done[k] = r.end

    def _settle(self, request: Request) -> None:
        """Publish and free blocks; let go of a request that has ended."""
        self.cache.settle(request)
        if request.finish_reason is not None:
            self.counters["prompt_tokens"] += len(request.prompt)
            self.counters["cached_tokens"] += request.cached
            self.counters["finished"] += 1
            self.scheduler.finish(request)

    def _swap_weights_when_idle(self) -> None:
        if self._new_weights is None:
            return
        if not self.scheduler.running and not any(r.generated_count for r in self.scheduler.waiting):
            self._load_weights()

    def _load_weights(self) -> None:
        assert self._new_weights is not None
        state, self.version = self._new_weights
        self._new_weights = None
        self._weights_taken += 1
        self.model.load_state_dict(state)
        self.scheduler.admitting = True
        for request in self.scheduler.waiting:
            if not request.generated_count:
                request.rekey(self._salt(request))


def _draft_vocabulary(model: Step35, given: int | None) -> int:
    """Return how many tokens drafts are chosen among; raise `ConfigError` for a number that cannot be."""
    vocabulary = model.config.vocab_size
    if given is not None and not 1 <= given <= vocabulary:
        raise ConfigError(f"draft_vocabulary={given} is not allowed; give a number of tokens from 1 to {vocabulary}.")
    return vocabulary if given is None else given


def _block_counts(
    model: Step35, max_batch: int, max_context: int, cache_tokens: int | None, max_pass_tokens: int
) -> tuple[int, int]:
    """Return how many full and how many sliding blocks to make; raise `ConfigError` if one request would not fit.

    Sliding blocks are enough for every running request's window, a pass's chunk, and as many windows again of
    prefixes that may come back.
    """
    deepest = len(model.mtp) + 1
    least = max_context + deepest
    tokens = max_batch * least if cache_tokens is None else cache_tokens
    if tokens < least:
        raise ConfigError(
            f"cache_tokens={tokens} holds no request of max_context={max_context} tokens; give at least {least}."
        )
    full = -(-tokens // BLOCK_TOKENS)
    window = max((layer.window or 0 for layer in model.config.layers()), default=0)
    per_request = -(-(window + deepest) // BLOCK_TOKENS) + 2
    chunk = -(-max_pass_tokens // BLOCK_TOKENS)
    return full, min(full, 2 * max_batch * per_request) + chunk + per_request


def check_ids(ids: Sequence[int], vocabulary: int) -> None:
    """Raise `ConfigError` when one of the ids is none of the vocabulary."""
    wrong = [token for token in ids if not 0 <= token < vocabulary]
    if wrong:
        raise ConfigError(f"token id {wrong[0]} is outside the vocabulary; give ids from 0 to {vocabulary - 1}.")
