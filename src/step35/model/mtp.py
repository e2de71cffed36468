"""Multi-token prediction modules (section 2): each predicts one token further than the one before it.

Module k (0-based) at position t joins the embedding of token t+1+k with the hidden state that module k-1 (or, for
k = 0, the trunk before its final norm) left at t, and predicts token t+2+k. The raw block output is handed on.
"""

# B batch  T tokens  D model  V vocab

from __future__ import annotations

import torch
from torch import Tensor, nn

from step35.config.model import ModelConfig
from step35.model.block import Block
from step35.model.context import Context
from step35.model.linear import Linear
from step35.model.norm import RMSNorm


class MTPModule(nn.Module):
    """eh_proj([enorm(embedding); hnorm(hidden)]), one sliding block with a dense FFN, a norm and head of its own."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.joint_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = Block(config, index)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)

    def forward(self, embedding_BTD: Tensor, h_BTD: Tensor, context: Context) -> Tensor:
        """Return the block output (B, T, D): the next module's input, and through `logits` the prediction."""
        joint = torch.cat([self.embedding_norm(embedding_BTD), self.hidden_norm(h_BTD)], dim=-1)
        return self.block(self.joint_proj(joint), context)

    def logits(self, h_BTD: Tensor) -> Tensor:
        """Return the draft logits (B, T, V)."""
        return self.head(self.norm(h_BTD))
