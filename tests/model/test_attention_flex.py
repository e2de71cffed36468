from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from step35.model import attention_flex
from step35.model import attention_kernels as kernels

LENGTHS = {"one": [400], "two": [130, 270], "many": [1, 60, 128, 3, 200, 8]}


def segments(name: str) -> Tensor:
    """Return two packed rows, the documents of the second the other way round."""
    lengths = LENGTHS[name]
    rows = [torch.repeat_interleave(torch.arange(len(x)), torch.tensor(x)) for x in (lengths, lengths[::-1])]
    return torch.stack(rows)


def seen(segments_BT: Tensor, window: int | None) -> Tensor:
    positions = torch.arange(segments_BT.shape[1]).expand(segments_BT.shape)
    return kernels.visible(positions, positions, window) & kernels.same_document(segments_BT, segments_BT)


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 64, 128, 200, 512])
def test_each_block_is_listed_as_what_it_is(name: str, window: int | None) -> None:
    segments_BT = segments(name)
    mask = attention_flex.block_mask(*kernels.spans(segments_BT, window), segments_BT.shape[1])
    visible_BTS = seen(segments_BT, window)
    for row, visible_TS in enumerate(visible_BTS):
        for i, queries in enumerate(visible_TS.split(attention_flex.BLOCK)):
            blocks = queries.split(attention_flex.BLOCK, dim=1)
            partly = {j for j, block in enumerate(blocks) if block.any() and not block.all()}
            wholly = {j for j, block in enumerate(blocks) if block.all()}
            few = mask.kv_indices[row, 0, i, : mask.kv_num_blocks[row, 0, i]]
            full = mask.full_kv_indices[row, 0, i, : mask.full_kv_num_blocks[row, 0, i]]
            assert set(full.tolist()) == wholly
            assert partly <= set(few.tolist()) <= set(range(len(blocks))) - wholly
    if name == "one" and window == 64:  # a band two blocks wide, however long the text
        assert mask.kv_num_blocks.max() == 2


def attended(name: str, window: int | None) -> tuple[Tensor, Tensor]:
    segments_BT = segments(name)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, segments_BT.shape[1], heads, 16, generator=generator) for heads in (4, 2, 2))
    with torch.inference_mode():
        mask = attention_flex.block_mask(*kernels.spans(segments_BT, window), segments_BT.shape[1])
        found = attention_flex.attend_flex(q, k, v, mask)
        return found, kernels.attend(q, k, v, seen(segments_BT, window))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 200])
def test_flex_attention_equals_the_reference(name: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_flex, "_kernel", lambda: flex_attention)  # the mask's rule, without its blocks
    torch.testing.assert_close(*attended(name, window), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("window", [None, 200])
def test_the_compiled_kernel_equals_the_reference(name: str, window: int | None) -> None:
    torch.testing.assert_close(*attended(name, window), rtol=1e-5, atol=1e-5)  # goes by the blocks
