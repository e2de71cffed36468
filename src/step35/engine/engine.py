"""The generation loop: prefill, then rounds of draft, verify and accept until every sequence has ended.

Speculation changes the speed and nothing else. The trunk verifies all drafts in one pass; the token at each place
is chosen from the trunk's logits with that place's own random number, and a draft is accepted when it is that very
token. So output with drafts equals output without, greedy or sampled, and for the greedy drafts used here the
acceptance rate equals that of rejection sampling (the probability the trunk gives the draft).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from step35.api.sampler import Completion
from step35.api.sampling import SamplingParams
from step35.engine.request import Request
from step35.engine.runner import Runner
from step35.engine.sampling import choose
from step35.errors import ConfigError
from step35.model.step35 import Step35


class Engine:
    """Generates for batches of token prompts with one model on one device."""

    def __init__(
        self, model: Step35, eos_ids: Sequence[int], *, max_batch: int = 64, max_context: int | None = None
    ) -> None:
        self.model = model
        self.eos_ids = tuple(eos_ids)
        self.max_batch = max_batch
        self.max_context = min(max_context or 4096, model.config.max_position_embeddings)
        self.version = 0

    def create(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Request]:
        """Return one request a prompt."""
        many = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        deepest = max((p.speculate for p in many), default=0)
        if deepest > len(self.model.mtp):
            raise ConfigError(
                f"speculate={deepest}, but the model has {len(self.model.mtp)} MTP modules; "
                f"choose 0 to {len(self.model.mtp)}."
            )
        return [Request.create(p, s, self.eos_ids, self.max_context) for p, s in zip(prompts, many, strict=True)]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Run the requests in waves of `max_batch`; results come in order."""
        for start in range(0, len(requests), self.max_batch):
            for _ in self.run(requests[start : start + self.max_batch]):
                pass
        return [request.completion(self.version) for request in requests]

    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> Iterator[list[tuple[Request, list[int]]]]:
        """Generate for one wave, yielding after each pass the new tokens of each request."""
        depth = max(r.params.speculate for r in requests)
        slots = max(len(r.prompt) + r.limit for r in requests) + depth + 1
        runner = Runner(self.model, [r.prompt for r in requests], slots, depth)
        active = list(requests)
        logits = runner.prefill([r.length for r in active])[:, None]
        drafts: list[list[int]] = [[] for _ in active]
        while True:
            news = self._accept(active, drafts, logits)
            for row, (request, new) in enumerate(news):
                runner.append(row, request.length - len(new), new)
            yield news
            going = [row for row, request in enumerate(active) if request.finish_reason is None]
            if not going:
                return
            if len(going) < len(active):
                runner.keep(going)
                active = [active[row] for row in going]
            lengths = [r.length for r in active]
            drafts = runner.draft(lengths).tolist() if depth else [[] for _ in active]
            logits = runner.decode(lengths, depth)

    def _accept(
        self, active: list[Request], drafts: list[list[int]], logits_BTV: torch.Tensor
    ) -> list[tuple[Request, list[int]]]:
        """Choose a token at every place, and keep those up to the first draft that was another token."""
        places = logits_BTV.shape[1]
        params = [r.params for r in active for _ in range(places)]
        uniforms = [r.uniform(ahead) for r in active for ahead in range(places)]
        tokens, logprobs = choose(logits_BTV.flatten(0, 1), params, uniforms)
        tokens_BT = tokens.view(-1, places).tolist()
        logprobs_BT = logprobs.view(-1, places).tolist()
        news = []
        for request, drafted, chosen, logprob in zip(active, drafts, tokens_BT, logprobs_BT, strict=True):
            news.append((request, self._take(request, drafted[: request.params.speculate], chosen, logprob)))
        return news

    @staticmethod
    def _take(request: Request, drafted: list[int], chosen: list[int], logprobs: list[float]) -> list[int]:
        """Append the first token and one more for every draft that was right; count drafts by depth."""
        new = []
        for place in range(len(drafted) + 1):
            new.append(chosen[place])
            if not request.append(chosen[place], logprobs[place]) or place == len(drafted):
                break
            request.drafted[place] += 1
            if drafted[place] != chosen[place]:
                break
            request.accepted[place] += 1
        return new
