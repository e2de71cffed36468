from __future__ import annotations

import cmath
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from step35.config.model import LayerConfig
from step35.model import attention_kernels as kernels
from step35.model.attention import Attention
from step35.model.context import Context
from step35.model.rope import inverse_frequencies, rope_table, rotate
from step35.model.step35 import Step35

Make = Callable[..., Step35]
FULL, SLIDING = 0, 1
"""A layer of each kind."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


# Everything once more, one number at a time.


def frequencies(layer: LayerConfig) -> list[float]:
    """Return each pair's frequency, scaled by the case distinction over its wavelength."""
    result = []
    for j in range(layer.rotary_dim // 2):
        frequency = layer.rope_theta ** (-2 * j / layer.rotary_dim)
        if layer.rope_scaling:
            frequency = scaled(frequency, layer.rope_scaling)
        result.append(frequency)
    return result


def scaled(frequency, scaling):
    wavelength, context = 2 * math.pi / frequency, scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / scaling.factor
    share = (context / wavelength - low) / (high - low)
    return (1 - share) * frequency / scaling.factor + share * frequency


def turned(vector: Tensor, position: int, layer: LayerConfig) -> Tensor:
    """Turn channels j and j + r/2 as one complex number."""
    result = vector.clone()
    half = layer.rotary_dim // 2
    for j, frequency in enumerate(frequencies(layer)):
        number = complex(vector[j], vector[j + half]) * cmath.exp(1j * position * frequency)
        result[j], result[j + half] = number.real, number.imag
    return result


def normed(vector: Tensor, weight: Tensor) -> Tensor:
    return vector / (vector.square().mean() + 1e-5).sqrt() * (1 + weight)


def by_hand(attention: Attention, x_TD: Tensor) -> Tensor:
    """Attention head by head, query by query, key by key."""
    layer, size = attention.layer, attention.layer.head_dim
    rows = attention.qkv_proj.weight.split(size)
    keys, values = rows[layer.heads : layer.heads + layer.kv_heads], rows[layer.heads + layer.kv_heads :]
    outputs = []
    for t, x in enumerate(x_TD):
        heads = []
        for h in range(layer.heads):
            group = h // (layer.heads // layer.kv_heads)
            query = turned(normed(rows[h] @ x, attention.q_norm.weight), t, layer)
            seen = [s for s in range(t + 1) if layer.window is None or t - s < layer.window]
            scores = []
            for s in seen:
                key = turned(normed(keys[group] @ x_TD[s], attention.k_norm.weight), s, layer)
                scores.append(query @ key / math.sqrt(size))
            weights = torch.stack(scores).softmax(0)
            mixed = sum(weight * (values[group] @ x_TD[s]) for weight, s in zip(weights, seen, strict=True))
            heads.append(torch.sigmoid(attention.gate_proj.weight[h] @ x) * mixed)
        outputs.append(attention.o_proj.weight @ torch.cat(heads))
    return torch.stack(outputs)


@pytest.mark.parametrize("order", [(FULL, SLIDING), (SLIDING, FULL)])
@pytest.mark.parametrize("partial", [0.5, 1.0])
@torch.no_grad()
def test_attention_equals_the_sum_written_out(make_model: Make, order: tuple[int, int], partial: float) -> None:
    # Norms, rotation, scaling, grouped heads, window, gate and projections, all independently of the module.
    model, x_BTD = make_model(partial=partial), random(1, 11, 32)
    context = Context.packed(torch.zeros(1, 11, dtype=torch.long))  # shared, as in a forward pass
    for index in order:
        attention = model.layers[index].attention
        torch.testing.assert_close(attention(x_BTD, context)[0], by_hand(attention, x_BTD[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", [FULL, SLIDING])
def test_each_half_split_pair_is_turned_and_the_rest_passes(make_model: Make, index: int) -> None:
    layer = make_model().config.layer(index)
    assert layer.rotary_dim == (8 if index == FULL else 16)
    positions = torch.tensor([[0, 1, 5, 199]])
    x_BTHC = random(1, 4, 3, 16)
    y_BTHC = rotate(x_BTHC, *rope_table(layer, positions, torch.float32))
    for t, position in enumerate(positions[0].tolist()):
        for h in range(3):
            expected = turned(x_BTHC[0, t, h], position, layer)
            torch.testing.assert_close(y_BTHC[0, t, h], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(y_BTHC[..., layer.rotary_dim :], x_BTHC[..., layer.rotary_dim :])


def test_scaling_follows_the_wavelength_rule_in_all_three_ranges(make_model: Make) -> None:
    layer = make_model(head_dim=64).config.layer(FULL)
    wavelengths = [2 * math.pi * layer.rope_theta ** (2 * j / layer.rotary_dim) for j in range(layer.rotary_dim // 2)]
    assert any(w < 1024 / 32 for w in wavelengths)
    assert any(1024 / 32 < w < 1024 for w in wavelengths)
    assert any(w > 1024 for w in wavelengths)
    torch.testing.assert_close(inverse_frequencies(layer), torch.tensor(frequencies(layer)), rtol=1e-5, atol=0)


def test_scaling_applies_to_full_layers_only(make_model: Make) -> None:
    config = make_model().config
    assert [config.layer(i).rope_scaling is not None for i in range(7)] == [True, *[False] * 3, True, *[False] * 2]


def visible_by_gradient(attention: Attention, tokens: int) -> list[list[bool]]:
    """Return for each query which inputs its output depends on."""
    x_BTD = random(1, tokens, 32).requires_grad_()
    y_TD = attention(x_BTD, Context.packed(torch.zeros(1, tokens, dtype=torch.long)))[0]
    direction = random(32, seed=1)
    return [(torch.autograd.grad(y @ direction, x_BTD, retain_graph=True)[0][0] != 0).any(-1).tolist() for y in y_TD]


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let texts of tens of tokens take the paths that thousands take."""
    monkeypatch.setattr(kernels, "SMALLEST_BLOCK", 4)
    monkeypatch.setattr(kernels, "SHORT_DOCUMENT", 4)


@pytest.mark.parametrize("tokens", [8, 12, 13, 24, 29])
def test_a_sliding_query_sees_exactly_window_keys_itself_included(make_model: Make, tokens: int) -> None:
    # 8 tokens fit the window, 12 are masked, more take the banded path.
    seen = visible_by_gradient(make_model().layers[SLIDING].attention, tokens)
    assert seen == [[0 <= t - s < 8 for s in range(tokens)] for t in range(tokens)]


def test_a_full_query_sees_all_earlier_keys(make_model: Make) -> None:
    assert visible_by_gradient(make_model().layers[FULL].attention, 20) == [
        [s <= t for s in range(20)] for t in range(20)
    ]


@torch.no_grad()
def test_logits_depend_on_no_later_token(make_model: Make) -> None:
    model = make_model()
    tokens = random_tokens(1, 22)
    before = model(tokens).logits[0]
    for s in (0, 9, 21):
        changed = tokens.clone()
        changed[0, s] = (changed[0, s] + 1) % 97
        difference = (model(changed).logits[0] - before).abs().amax(-1)
        assert (difference[:s] < 1e-4).all()
        assert difference[s] > 1e-2


@pytest.mark.parametrize("window", [None, 1, 3, 8, 20])
@pytest.mark.parametrize("tokens", [1, 8, 13, 24, 31, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_the_fast_paths_equal_the_reference(tokens: int, window: int | None, packed: bool) -> None:
    positions = torch.arange(tokens).expand(2, -1)
    segments = torch.zeros(2, tokens, dtype=torch.long)
    if packed:
        segments[0, tokens // 3 :], segments[0, tokens // 2 :], segments[1, tokens - 4 :] = 1, 2, -1
    mask = kernels.visible(positions, positions, window) & kernels.same_document(segments, segments)
    results = []
    for fast in (False, True):
        q, k, v = (random(2, tokens, heads, 16, seed=heads + i).requires_grad_() for i, heads in enumerate((4, 2, 2)))
        if fast and window is None:
            y = kernels.attend_documents(q, k, v, kernels.document_lengths(segments))
        elif fast:
            y = kernels.attend_banded(q, k, v, kernels.band_mask(positions, segments, window), window)
        else:
            y = kernels.attend(q, k, v, mask)
        results.append([y, *torch.autograd.grad((y * random(*y.shape, seed=9)).sum(), (q, k, v))])
    for reference, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("segments", "lengths"),
    [
        ([[0, 0, 0, 0]], [4]),
        ([[0, 0, 1, 1], [0, 1, 1, -1]], [2, 2, 1, 2, 1]),
        ([[0, 0], [0, 0]], [2, 2]),  # rows are borders
        ([[3, 3, 5, 3]], [2, 1, 1]),
    ],
)
def test_documents_are_told_by_their_borders(segments: list[list[int]], lengths: list[int]) -> None:
    assert kernels.document_lengths(torch.tensor(segments)) == lengths


@torch.no_grad()
def test_a_number_that_comes_again_is_another_document(make_model: Make) -> None:
    model, tokens = make_model(), random_tokens(1, 36)
    runs = [torch.repeat_interleave(torch.tensor(ids), 12)[None] for ids in ([0, 1, 0], [0, 1, 2])]
    assert torch.equal(*(model(tokens, segments_BT=segments).logits for segments in runs))
    assert model(tokens[:, :0]).logits.shape == (1, 0, 97)


def test_scores_of_a_window_grow_with_the_window_not_the_text() -> None:
    # The banded path computes (W + Q) scores a query, Q a quarter of the window.
    for tokens in (4096, 16384):
        positions = torch.arange(tokens)[None]
        mask = kernels.band_mask(positions, torch.zeros_like(positions), 512)
        assert mask.numel() == tokens * (512 + 128)
        assert mask.sum() == sum(min(t + 1, 512) for t in range(tokens))


@torch.no_grad()
def test_the_path_fits_the_documents(make_model: Make) -> None:
    def path(lengths: list[int], window: int | None) -> str:
        segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
        return Context.packed(segments, segments)._path(window)

    assert path([13], 8) == "banded"
    assert path([8, 5], 8) == "documents"  # none is longer than the window: it hides nothing
    assert path([12], 8) == "packed"  # as wide as one band
    assert path([40], None) == path([20, 20], None) == "documents"
    assert path([2] * 20, None) == "packed"  # a call for each would take longer


@torch.no_grad()
def test_packed_documents_equal_separate_ones(make_model: Make) -> None:
    model = make_model()
    lengths = [5, 21, 3]  # 29 tokens take the banded path, the documents alone take all
    documents = [random_tokens(1, length, seed=length) for length in lengths]
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = model(torch.cat(documents, dim=1), mtp=True, segments_BT=segments)
    start = 0
    for document, length in zip(documents, lengths, strict=True):
        alone = model(document, mtp=True)
        rows = slice(start, start + length)
        torch.testing.assert_close(packed.logits[:, rows], alone.logits, rtol=1e-4, atol=1e-4)
        for k in range(2):  # the last k+1 rows are given tokens of the next document, which they never score
            inner = slice(start, start + length - k - 1)
            ours = packed.mtp_logits[k][:, inner]
            torch.testing.assert_close(ours, alone.mtp_logits[k][:, : length - k - 1], rtol=1e-4, atol=1e-4)
        start += length
