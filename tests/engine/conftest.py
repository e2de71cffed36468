"""A micro model whose MTP modules often, but not always, guess what its trunk chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from step35.config.presets import s3f1
from step35.engine import runner
from step35.model.init import initialise
from step35.model.step35 import Step35

VOCAB = 29


def build(seed: int, vocab: int = VOCAB, mtp: int = 3, **settings: Any) -> Step35:
    """Return a random model with every part of the architecture and a window shorter than the tests' sequences.

    With heads alike, and with what the modules read of the newest token about as the trunk reads it, drafts agree
    with the trunk for some tokens. Random heads would never agree, and acceptance would go untested.
    """
    settings = {"max_position_embeddings": 1024, **settings}
    config = s3f1(
        layers=5, dense=1, mtp=mtp, heads=2, sliding_heads=4, groups=2, head_dim=16,
        clips={3: 0.5, 4: 0.5}, clips_shared={4: 0.5},
        vocab_size=vocab, hidden_size=32, intermediate_size=48, sliding_window=8,
        moe_num_experts=4, moe_top_k=2, moe_intermediate_size=24, share_expert_dim=16,
        moe_router_scaling_factor=2.0, eos_token_id=(1, 3), **settings,
    )  # fmt: skip
    model = Step35(config).eval()
    initialise(model, torch.Generator().manual_seed(seed))
    size = config.hidden_size
    with torch.no_grad():
        model.lm_head.weight *= 12  # peaked distributions, so that sampled tokens agree with greedy drafts at times
        model.embed_tokens.weight *= 4
        for module in model.mtp:
            module.head.weight.copy_(model.lm_head.weight)
            module.joint_proj.weight *= 0.5
            module.joint_proj.weight[:, :size] += 2 * torch.eye(size)
    return model


@pytest.fixture(scope="module", params=["compiled", "torch", "both", "graphs"])
def passes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a module's tests with compiled passes, in torch, with both side by side in one pass, and as graphs would."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param in ("torch", "graphs"):
            patch.setattr(runner.Program, "create", lambda *_: None)
        if request.param == "graphs":
            patch.setattr(runner.Runner, "graphs_on", ("cpu",))
        if request.param == "both":
            patch.setattr(runner, "FEW_ROWS", 3)
        yield


@pytest.fixture(scope="session")
def build_model() -> Callable[..., Step35]:
    return build


@pytest.fixture(scope="session")
def model() -> Step35:
    """Shared by the tests, which must not change it."""
    return build(seed=0)
