"""Polar Express in true fp16 and bf16 gives what the CPU gives by rounding. Skipped without a CUDA device."""

from __future__ import annotations

import pytest
import torch

from step35.train.polar import polar_express

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 64, 160), (160, 64)])
def test_cuda_rounds_as_the_cpu_does(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected, found = polar_express(gradient, dtype=dtype), polar_express(gradient.cuda(), dtype=dtype)
    assert found.device.type == "cuda"
    assert torch.equal(found, found.to(dtype).float())
    # Sums are taken in another order, so single roundings differ, and the steps amplify them.
    assert (found.cpu() - expected).norm() / expected.norm() < max(8 * torch.finfo(dtype).eps, 1e-5)
