from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from step35.model.context import Context
from step35.model.init import clone_mtp, grow_mtp
from step35.model.step35 import Step35

Make = Callable[..., Step35]
T = 12


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(97, (1, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("k", [0, 1])
@torch.no_grad()
def test_row_t_of_module_k_has_seen_tokens_up_to_t_plus_1_plus_k(make_model: Make, tokens: Tensor, k: int) -> None:
    model = make_model()
    before = model(tokens, mtp=True).mtp_logits[k][0]
    for s in range(k + 1, T):
        changed = tokens.clone()
        changed[0, s] = (changed[0, s] + 1) % 97
        difference = (model(changed, mtp=True).mtp_logits[k][0] - before).abs().amax(-1)
        assert difference[s - 1 - k] > 1e-2, f"row {s - 1 - k} has not seen token {s}"
        assert (difference[: s - 1 - k] < 1e-4).all(), f"a row before {s - 1 - k} has seen token {s}"


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_text_may_be_shorter_than_the_modules_look_ahead(make_model: Make, tokens: Tensor, length: int) -> None:
    model = grow_mtp(make_model(), 3)
    whole, short = model(tokens, mtp=True), model(tokens[:, :length], mtp=True)
    for k, logits in enumerate(short.mtp_logits):
        assert logits.shape == (1, length, 97)
        seen = max(0, length - 1 - k)  # rows whose tokens are all there
        torch.testing.assert_close(logits[:, :seen], whole.mtp_logits[k][:, :seen])


def test_tokens_of_another_shape_are_refused(make_model: Make, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"tokens have shape \(12,\); give \(B, T\)"):
        make_model()(tokens[0])


@torch.no_grad()
def test_states_before_the_norms_flow_from_trunk_to_module_to_module(make_model: Make, tokens: Tensor) -> None:
    model = make_model()
    last: list[Tensor] = []
    model.layers[-1].register_forward_hook(lambda module, inputs, output: last.append(output))
    output = model(tokens, mtp=True)
    h_BTD = last[0]
    torch.testing.assert_close(output.logits, model.lm_head(model.norm(h_BTD)))
    for k, module in enumerate(model.mtp):
        ahead = torch.cat([tokens[:, k + 1 :], torch.zeros(1, k + 1, dtype=torch.long)], dim=1)
        embedding = module.embedding_norm(model.embed_tokens.weight[ahead])
        joint = module.joint_proj(torch.cat([embedding, module.hidden_norm(h_BTD)], dim=-1))
        h_BTD = module.block(joint, Context.packed(tokens))  # handed on as it is, without the module's norm
        torch.testing.assert_close(output.mtp_logits[k], module.head(module.norm(h_BTD)))


@torch.no_grad()
def test_fewer_modules_give_the_first_states(make_model: Make, tokens: Tensor) -> None:
    model = make_model()
    context = Context.packed(tokens)
    h_BTD = model.trunk(tokens, context)
    both = model.mtp_states(tokens, h_BTD, context)
    assert len(both) == 2
    [first] = model.mtp_states(tokens, h_BTD, context, 1)
    assert torch.equal(first, both[0])
    assert model.mtp_states(tokens, h_BTD, context, 0) == []


def test_cloning_copies_the_first_module_into_the_others_without_sharing(make_model: Make) -> None:
    model = make_model()
    first = {name: tensor.clone() for name, tensor in model.mtp[0].state_dict().items()}
    assert not torch.equal(model.mtp[1].head.weight, first["head.weight"])
    clone_mtp(model)
    for name, tensor in model.mtp[1].state_dict().items():
        assert torch.equal(tensor, first[name]), name
    with torch.no_grad():
        model.mtp[1].head.weight.add_(1)
    assert torch.equal(model.mtp[0].head.weight, first["head.weight"])


@torch.no_grad()
def test_growing_keeps_what_is_there_and_clones_the_first_module(make_model: Make, tokens: Tensor) -> None:
    model = make_model()
    grown = grow_mtp(model, 4)
    assert grown.config.num_nextn_predict_layers == len(grown.mtp) == 4
    for name, tensor in model.state_dict().items():
        assert torch.equal(grown.state_dict()[name], tensor), name
    for k in (2, 3):
        for name, tensor in model.mtp[0].state_dict().items():
            assert torch.equal(grown.mtp[k].state_dict()[name], tensor), name
    torch.testing.assert_close(grown(tokens, mtp=True).mtp_logits[:2], model(tokens, mtp=True).mtp_logits)
    grown.embed_tokens.weight.add_(1)
    assert not torch.equal(grown.embed_tokens.weight, model.embed_tokens.weight)


def test_shrinking_drops_the_last_modules(make_model: Make) -> None:
    model = make_model()
    shrunk = grow_mtp(model, 1)
    assert len(shrunk.mtp) == 1
    assert torch.equal(shrunk.mtp[0].head.weight, model.mtp[0].head.weight)
