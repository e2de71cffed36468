from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from step35.api.sampling import SamplingParams
from step35.api.trajectory import Trajectory
from step35.engine.engine import Engine
from step35.model.step35 import Step35
from step35.post.rl.batch import TrajectoryBatch, state_values, token_logprobs
from step35.post.rl.critic import make_critic

MakeModel = Callable[..., Step35]


def trajectory(length: int, seed: int, **fields: object) -> Trajectory:
    """A prompt of three tokens, then turns of the policy and of the environment."""
    draw = random.Random(seed)
    mask = [t >= 3 and draw.random() < 0.7 for t in range(length)]
    mask[-1] = True
    logprobs = [-draw.random() if acted else 0.0 for acted in mask]
    versions = [0 if acted else -1 for acted in mask]
    return Trajectory([draw.randrange(97) for _ in range(length)], mask, logprobs, versions, reward=1.0, **fields)


TRAJECTORIES = [trajectory(20, 1), trajectory(9, 2, truncated=True), trajectory(14, 3)]


@pytest.fixture
def critic(make_model: MakeModel) -> Step35:
    critic = make_critic(make_model())
    with torch.no_grad():
        critic.lm_head.weight.normal_(generator=torch.Generator().manual_seed(7))
    return critic


@torch.no_grad()
def test_logprobs_and_entropies_equal_those_of_each_token_alone(make_model: MakeModel) -> None:
    model = make_model()
    logprobs, entropies = token_logprobs(model, TrajectoryBatch.of(TRAJECTORIES, pad_id=1))
    expected_logprobs, expected_entropies = torch.zeros(3, 20), torch.zeros(3, 20)
    for b, played in enumerate(TRAJECTORIES):
        log_p = model(torch.tensor([played.tokens])).logits[0].log_softmax(-1)
        for t, acted in enumerate(played.mask):
            if acted:
                expected_logprobs[b, t] = log_p[t - 1, played.tokens[t]]
                expected_entropies[b, t] = -(log_p[t - 1].exp() * log_p[t - 1]).sum()
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(entropies, expected_entropies, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_values_are_those_of_the_state_before_each_token(critic: Step35) -> None:
    values, final = state_values(critic, TrajectoryBatch.of(TRAJECTORIES, pad_id=1))
    expected = torch.zeros(3, 20)
    for b, played in enumerate(TRAJECTORIES):
        alone = critic(torch.tensor([played.tokens])).logits[0, :, 0]
        assert alone.std() > 0.1
        for t, acted in enumerate(played.mask):
            if acted:
                expected[b, t] = alone[t - 1]
        torch.testing.assert_close(final[b], alone[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


def test_padding_has_no_influence(make_model: MakeModel, critic: Step35) -> None:
    model = make_model()
    results = []
    for pad_id in (1, 50):
        batch = TrajectoryBatch.of(TRAJECTORIES, pad_id=pad_id)
        logprobs, _ = token_logprobs(model, batch)
        values, final = state_values(critic, batch)
        model.zero_grad()
        logprobs.sum().backward()
        results.append([logprobs, values, final, model.layers[1].attention.qkv_proj.weight.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_batch_holds_the_trajectories_and_its_rows_are_cut_to_their_longest() -> None:
    batch = TrajectoryBatch.of(TRAJECTORIES, pad_id=1)
    assert batch.tokens_BT.shape == (3, 20)
    assert batch.lengths_B.tolist() == [20, 9, 14]
    assert batch.truncated_B.tolist() == [False, True, False]
    assert batch.tokens_BT[1].tolist() == TRAJECTORIES[1].tokens + [1] * 11
    assert batch.segments_BT[1].tolist() == [0] * 9 + [-1] * 11
    assert batch.mask_BT[1].tolist() == TRAJECTORIES[1].mask + [False] * 11
    part = batch.rows(torch.tensor([2, 1]))
    assert part.tokens_BT.tolist() == [TRAJECTORIES[2].tokens, TRAJECTORIES[1].tokens + [1] * 5]
    assert part.lengths_B.tolist() == [14, 9]
    torch.testing.assert_close(part.infer_BT[0], torch.tensor(TRAJECTORIES[2].logprobs))


@pytest.mark.parametrize("speculate", [0, 2])
@torch.no_grad()
def test_the_engines_logprobs_are_the_learners(make_model: MakeModel, speculate: int) -> None:
    # What MIS-PO's narrow bands rest on: same weights, same tokens, same log-probabilities.
    model = make_model().eval()
    prompts = [[5, 6, 7], [5, 6, 8, 9, 10], [11] * 20]
    engine = Engine(model, eos_ids=(1, 3))
    params = [SamplingParams(max_tokens=24, seed=i, speculate=speculate) for i in range(3)]
    completions = engine.generate(engine.create(prompts, params))
    played = [
        Trajectory(
            tokens=[*prompt, *done.token_ids],
            mask=[False] * len(prompt) + [True] * len(done.token_ids),
            logprobs=[0.0] * len(prompt) + list(done.logprobs),
            versions=[-1] * len(prompt) + [0] * len(done.token_ids),
            reward=1.0,
        )
        for prompt, done in zip(prompts, completions, strict=True)
    ]
    batch = TrajectoryBatch.of(played, pad_id=1)
    assert batch.mask_BT.sum() > 20
    logprobs, _ = token_logprobs(model, batch)
    assert (logprobs - batch.infer_BT).abs().max() < 1e-5


def test_the_critic_starts_as_the_trunk_with_a_value_of_zero(make_model: MakeModel) -> None:
    actor = make_model()
    critic = make_critic(actor)
    assert len(critic.mtp) == 0
    _, final = state_values(critic, TrajectoryBatch.of(TRAJECTORIES, pad_id=1))
    assert torch.equal(final, torch.zeros(3))
    for name, tensor in critic.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(tensor, actor.state_dict()[name]), name
    with torch.no_grad():
        critic.embed_tokens.weight.add_(1)
    assert not torch.equal(critic.embed_tokens.weight, actor.embed_tokens.weight)
