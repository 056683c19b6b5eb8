"""GeluLinear and SplitLinear: plain, packed and in 8 bits, with oneDNN's operators and without, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_gemm import close, draw, filled, library  # noqa: F401

from ldmfast.models import gemm
from ldmfast.models.gemm import Linear
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


@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 1, 8), (0, 5, 8), (33, 40)], ids=str)
@pytest.mark.parametrize("eight", [False, True])
def test_a_linear_of_our_own(shape, eight, monkeypatch) -> None:
    """What layers with many inputs take, here from one input on."""
    monkeypatch.setattr(gemm, "OWN", True)
    monkeypatch.setattr(Linear, "own_from", (1, 1))
    layer = filled(Linear(shape[-1], 12), torch.bfloat16)
    x, residual = draw(*shape).bfloat16(), draw(*shape[:-1], 12, seed=2).bfloat16()
    weight, exact = layer.weight.clone(), F.linear(x.double(), layer.weight.double(), layer.bias.double())
    if eight:
        layer.quantize()
        assert layer.int8.own
        step = layer.int8.scale[:, None] / 2
        assert bool(((layer.int8.dense(torch.float32) - weight.float()).abs() <= step * 1.01).all())
    else:
        layer.pack()
        assert layer.own and torch.equal(layer.dense(), weight)
        layer.pack()  # once
        assert torch.equal(layer.dense(), weight)
    for more in (None, residual):
        got, wanted = layer(x, more), exact if more is None else exact + more.double()
        assert got.shape == exact.shape and got.dtype == torch.bfloat16
        if exact.numel():
            limit = (0.03 if eight else 0.01) * exact.abs().max().clamp(min=1)
            assert (got.double() - wanted).abs().max() <= limit


@pytest.mark.parametrize("eight", [False, True])
def test_a_split_linear_of_our_own(eight, monkeypatch) -> None:
    """Only the second of its products is deep enough in bf16; in 8 bits both are ours."""
    monkeypatch.setattr(gemm, "OWN", True)
    monkeypatch.setattr(Linear, "own_from", (8, 12))
    layer = filled(SplitLinear(20, 8), torch.bfloat16)
    whole, weight = draw(2, 7, 20).bfloat16(), layer.weight.clone()
    parts = (whole[..., :8].contiguous(), whole[..., 8:].contiguous())
    exact = F.linear(whole.double(), layer.weight.double(), layer.bias.double())
    if eight:
        layer.quantize()
        assert layer.int8.first.own and layer.int8.rest.own
    else:
        layer.pack()
        assert layer.weight.ndim != 7 and layer.rest.ndim == 7 and torch.equal(layer.dense(), weight)
    assert (layer(parts).double() - exact).abs().max() <= (0.03 if eight else 0.01) * exact.abs().max()
