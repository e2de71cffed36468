from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from step35.data.packing import Batch
from step35.model.context import Context
from step35.model.step35 import Step35
from step35.train.weight_clipping import clip_weights, largest_products


def inputs_of(model: Step35, batch: Batch, layer: int) -> dict[int, torch.Tensor]:
    """Return what each expert of `layer` reads, token by token."""
    seen: list[torch.Tensor] = []
    handle = model.layers[layer].moe.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = torch.as_tensor(batch.tokens)
    context = Context.packed(tokens, torch.as_tensor(batch.segments), record=True)
    model.trunk(tokens, context)
    handle.remove()
    chosen = next(r.experts_NK for r in context.routing or [] if r.layer == layer)
    x_ND = seen[0].flatten(0, 1)
    return {e: x_ND[(chosen == e).any(1)] for e in range(model.config.moe_num_experts)}


@torch.no_grad()
def test_products_are_measured_and_clipped_to_tau(
    make_model: Callable[..., Step35], make_batch: Callable[..., Batch]
) -> None:
    model, batches = make_model(), [make_batch(seed=1), make_batch(seed=2)]
    largest = largest_products(model, batches)
    experts = model.experts(2)
    expected = torch.zeros(3, 4)
    for batch in batches:
        for e, x in inputs_of(model, batch, 2).items():
            hidden = F.linear(x, experts.gate_up_proj[e])
            gate, up = hidden.chunk(2, -1)
            out = F.linear(F.silu(gate).clamp(max=0.4) * up.clamp(-0.4, 0.4), experts.down_proj[e])
            found = torch.stack([y.norm(dim=-1).amax() for y in (gate, up, out)])
            expected[:, e] = torch.maximum(expected[:, e], found)
    torch.testing.assert_close(largest[2], expected, rtol=1e-4, atol=1e-5)
    before = experts.gate_up_proj.clone(), experts.down_proj.clone()
    tau = float(largest[2].median())
    clipped = [c for c in clip_weights(model, largest, tau) if c.layer == 2]
    assert 0 < len(clipped) == int((largest[2] > tau).sum()) < 12
    for c in clipped:
        place = ("gate", "up", "down").index(c.projection)
        now, then = (
            (w[0][c.expert].chunk(2)[place], w[1][c.expert])[place == 2] if place < 2 else w[1][c.expert]
            for w in ((experts.gate_up_proj, experts.down_proj), before)
        )
        torch.testing.assert_close(now, then * tau / c.largest)
        assert c.largest == pytest.approx(float(expected[place, c.expert]), rel=1e-4)


def test_nothing_is_clipped_below_tau(make_model: Callable[..., Step35], make_batch: Callable[..., Batch]) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert clip_weights(model, largest_products(model, [make_batch()]), tau=1e9) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_clipping_again_finds_gates_and_ups_at_tau(
    make_model: Callable[..., Step35], make_batch: Callable[..., Batch]
) -> None:
    model, batch = make_model(), make_batch()
    first = largest_products(model, [batch])
    tau = 0.5 * float(first[1][:2].max())
    clip_weights(model, {1: first[1]}, tau)  # the first MoE layer's inputs do not change
    again = largest_products(model, [batch])[1]
    assert float(again[:2].max()) == pytest.approx(tau, rel=1e-4)
    assert float(again[2].max()) <= tau * (1 + 1e-4)
