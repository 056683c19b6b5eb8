"""GeluLinear and SplitLinear: plain, packed and in 8 bits, with oneDNN's operators and without, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_gemm import close, draw, filled, library  # noqa: F401

from ldmfast.models.linears import GeluLinear, SplitLinear

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


@DTYPES
@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 1, 8), (0, 5, 8), (33, 40)], ids=str)
def test_gelu_linear(shape, dtype, library) -> None:  # noqa: F811
    layer = filled(GeluLinear(shape[-1], 12), dtype)
    x = draw(*shape).to(dtype)
    exact = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()), approximate="tanh")
    close(layer(x), exact, dtype)
    layer.pack()
    close(layer(x), exact, dtype)
    layer.weight = torch.nn.Parameter(layer.dense(), requires_grad=False)
    layer.quantize()
    eight = layer(x)
    assert eight.shape == exact.shape and eight.dtype == torch.bfloat16
    if exact.numel():
        assert (eight.double() - exact).abs().max() <= 0.03 * exact.abs().max().clamp(min=1)


@DTYPES
@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (0, 5), (33,)], ids=str)
def test_split_linear(shape, dtype, library) -> None:  # noqa: F811
    layer = filled(SplitLinear(20, 8), dtype)
    whole, weight = draw(*shape, 20).to(dtype), layer.weight.clone()
    parts = (whole[..., :8].contiguous(), whole[..., 8:].contiguous())
    exact = F.linear(whole.double(), layer.weight.double(), layer.bias.double())
    close(layer(parts), exact, dtype)
    layer.pack()
    close(layer(parts), exact, dtype)
    assert torch.equal(layer.dense(), weight)
    layer.quantize(keep=True)
    eight, kept = layer(parts), layer.int8
    assert eight.shape == exact.shape and eight.dtype == torch.bfloat16
    if exact.numel():
        assert 0 < (eight.double() - exact).abs().max() <= 0.03 * exact.abs().max().clamp(min=1)
    layer.int8 = None
    close(layer(parts), exact, dtype)
    layer.int8 = kept
    layer.quantize()
    assert layer.weight is None and layer.rest is None and torch.equal(layer(parts), eight)
