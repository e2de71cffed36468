"""The critic: a copy of the policy's trunk whose head gives one number, the value of the state after each token."""

from __future__ import annotations

import torch
from torch import nn

from step35.model.linear import Linear
from step35.model.step35 import Step35


def make_critic(actor: Step35) -> Step35:
    """Return a model with the actor's trunk weights, no MTP modules, and a value head that starts at 0."""
    critic = Step35(actor.config.with_mtp(0))
    critic.load_state_dict({k: v for k, v in actor.state_dict().items() if not k.startswith("mtp.")})
    critic.lm_head = Linear(actor.config.hidden_size, 1)
    nn.init.zeros_(critic.lm_head.weight)
    return critic.to(actor.embed_tokens.weight.device, torch.float32)
