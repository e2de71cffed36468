"""The model, from embedding to logits.

    h = embed(tokens);  h = block_i(h) for every layer;  logits = lm_head(norm(h))
    MTP module k: g_k = block(eh_proj[enorm(embed(tokens shifted by k+1)); hnorm(g_{k-1})]),  g_{-1} = h before the norm

Single-device mathematics only: no placement, no sampling, no loss. Parameters may be fp32 while compute is bf16:
activations take `compute_dtype` at the embedding, and every matrix is cast to the activations' dtype where used.
"""

# B batch  T tokens  D model  V vocab

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step35.config.model import ModelConfig
from step35.model.block import Block
from step35.model.context import Context
from step35.model.experts import Experts
from step35.model.linear import Linear
from step35.model.mtp import MTPModule
from step35.model.norm import RMSNorm
from step35.model.router import Router


@dataclass
class Output:
    """Logits in fp32: `logits` (B, T, V), and with MTP one (B, T, V) per module in `mtp_logits`."""

    logits: Tensor
    mtp_logits: list[Tensor] = field(default_factory=list)


class Step35(nn.Module):
    """Step 3.5: sparse MoE decoder with hybrid attention and multi-token prediction."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.mtp: Sequence[MTPModule] = nn.ModuleList(
            MTPModule(config, i) for i in range(config.num_hidden_layers, config.total_layers)
        )
        self.compute_dtype: torch.dtype | None = None
        """Dtype of activations; None follows the embedding's parameters."""

    def router(self, layer: int) -> Router:
        """Return the router of MoE layer `layer`."""
        return self.layers[layer].moe.router

    def experts(self, layer: int) -> Experts:
        """Return the routed experts of MoE layer `layer`."""
        return self.layers[layer].moe.experts

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return token embeddings (B, T, D) in the compute dtype."""
        return self.embed_tokens(tokens_BT).to(self.compute_dtype or self.embed_tokens.weight.dtype)

    def trunk(self, tokens_BT: Tensor, context: Context) -> Tensor:
        """Return the last layer's output (B, T, D) before the final norm: what MTP modules and heads read."""
        h_BTD = self.embed(tokens_BT)
        for block in self.layers:
            h_BTD = block(h_BTD, context)
        return h_BTD

    def logits(self, h_BTD: Tensor) -> Tensor:
        """Return next-token logits (B, T, V) in fp32."""
        return self.lm_head(self.norm(h_BTD)).float()

    def mtp_states(
        self, tokens_BT: Tensor, h_BTD: Tensor, context: Context, modules: int | None = None
    ) -> list[Tensor]:
        """Return each module's block output (B, T, D), teacher-forced.

        Row t of module k has seen tokens up to t+1+k; its last k+1 rows lack a token and are not meaningful.
        """
        states: list[Tensor] = []
        for k, module in enumerate(self.mtp[:modules]):
            ahead_BT = F.pad(tokens_BT, (0, k + 1))[:, k + 1 :]
            h_BTD = module(self.embed(ahead_BT), h_BTD, context)
            states.append(h_BTD)
        return states

    def forward(self, tokens_BT: Tensor, mtp: bool = False, segments_BT: Tensor | None = None) -> Output:
        """Return logits for whole sequences; `segments_BT` (document numbers) keeps packed documents apart.

        Raises ValueError for tokens of another shape than (B, T).
        """
        if tokens_BT.dim() != 2:
            raise ValueError(f"tokens have shape {tuple(tokens_BT.shape)}; give (B, T), one sequence as (1, T).")
        context = Context.packed(tokens_BT, segments_BT)
        h_BTD = self.trunk(tokens_BT, context)
        states = self.mtp_states(tokens_BT, h_BTD, context) if mtp else []
        drafts = [module.logits(g).float() for module, g in zip(self.mtp, states, strict=False)]
        return Output(self.logits(h_BTD), drafts)
