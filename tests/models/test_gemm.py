"""Linear and Conv2d: packed, joined, without oneDNN's operators, and in 8 bits, against float64."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmfast.models import gemm, onednn
from ldmfast.models.gemm import Conv2d, Linear, Quantized, rows_to_int8
from ldmfast.models.layers import Attention, GroupNorm

SHAPES = [(2, 7, 24), (1, 1, 8), (0, 5, 8), (3, 0, 16), (33, 40)]
CONVS = [(2, 5, 7, 9, 3, 1, 1), (1, 8, 16, 1, 1, 1, 0), (0, 4, 6, 6, 3, 1, 1), (2, 16, 9, 8, 3, 2, 1),
         (1, 3, 4, 6, 3, 2, 0)]


def filled(layer: nn.Module, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) / max(1, p[0].numel()) ** 0.5)
    return layer.to(dtype).requires_grad_(False)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == exact.shape and found.dtype == dtype
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    if exact.numel():
        assert (found.double() - exact).abs().max() <= limit * exact.abs().max().clamp(min=1)


@pytest.fixture(params=["own", "onednn", "torch"])
def library(request, monkeypatch) -> str:
    """With our convolutions, with the operators that torch ships, and as if this torch had others."""
    monkeypatch.setattr(gemm, "OWN", request.param == "own")
    if request.param == "torch":
        monkeypatch.setattr(gemm, "ONEDNN", False)
        monkeypatch.setattr(gemm, "ONEDNN_INT8", False)
    elif not (gemm.ONEDNN and gemm.ONEDNN_INT8):
        pytest.skip("this torch has no oneDNN operators of the known schema")
    return request.param


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape, dtype, packed, library) -> None:
    layer = filled(Linear(shape[-1], 12), dtype)
    x, residual = draw(*shape).to(dtype), draw(*shape[:-1], 12, seed=2).to(dtype)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    if packed:
        layer.pack()
        assert layer.weight.is_mkldnn == (library != "torch" and dtype != torch.float64)
    close(layer(x), exact, dtype)
    before = residual.clone()
    close(layer(x, residual), exact + residual.double(), dtype)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", CONVS, ids=str)
def test_conv(shape, dtype, packed, library) -> None:
    n, c, h, w, k, stride, padding = shape
    layer = filled(Conv2d(c, 6, k, stride, padding), dtype)
    x = draw(n, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), stride, padding)
    residual = draw(*exact.shape, seed=2).to(dtype).contiguous(memory_format=torch.channels_last)
    if packed:
        layer.pack()
    close(layer(x), exact, dtype)
    before = residual.clone()
    close(layer(x, residual), exact + residual.double(), dtype)
    assert torch.equal(residual, before)


def test_packed_weight_is_the_weight() -> None:
    for layer in (filled(Linear(20, 12), torch.bfloat16), filled(Conv2d(8, 6, 3, padding=1), torch.bfloat16)):
        plain = layer.weight.clone()
        layer.pack()
        layer((draw(2, 20) if isinstance(layer, Linear) else draw(1, 8, 5, 5)).bfloat16())
        assert torch.equal(layer.dense(), plain)


def test_upsampled_conv(library) -> None:
    layer = filled(Conv2d(8, 6, 3, padding=1), torch.bfloat16)
    x = draw(2, 8, 5, 7).bfloat16().contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(F.interpolate(x.double(), scale_factor=2.0), layer.weight.double(), layer.bias.double(), padding=1)
    close(layer(x, upsample=True), exact, torch.bfloat16)
    layer.pack()
    close(layer(x, upsample=True), exact, torch.bfloat16)
    layer = filled(Conv2d(8, 6, 3, padding=1), torch.bfloat16)
    layer.quantize()
    assert (layer(x, upsample=True).double() - exact).abs().max() <= 0.03 * exact.abs().max()


@pytest.mark.parametrize("int8", [False, True])
def test_conv_of_changing_sizes_from_many_threads(int8, library) -> None:
    """The layout follows the size of the input; no result does, and none depends on who called before."""
    from concurrent.futures import ThreadPoolExecutor

    layer = filled(Conv2d(96, 96, 3, padding=1), torch.float32)
    weight = layer.weight.clone()
    layer.quantize() if int8 else layer.pack()
    pictures = [draw(1 + i % 2, 96, 6 + 5 * (i % 3), 9, seed=i) for i in range(12)]
    alone = []
    for x in pictures:
        fresh = filled(Conv2d(96, 96, 3, padding=1), torch.float32)
        fresh.quantize() if int8 else fresh.pack()
        alone.append(fresh(x))
    with ThreadPoolExecutor(4) as pool:
        shared = list(pool.map(layer, pictures * 3))
    assert all(torch.equal(a, b) for a, b in zip(shared, alone * 3))
    if not int8:
        assert torch.equal(layer.dense(), weight)


@pytest.mark.parametrize("context_dim", [None, 24])
@pytest.mark.parametrize("bias", [False, True])
def test_joined_attention_equals_separate(context_dim, bias) -> None:
    plain, joined = (filled(Attention(16, 2, 8, context_dim, bias), torch.float32) for _ in range(2))
    joined.join()
    getattr(joined, joined.joined).pack()
    x = draw(2, 9, 16)
    context = None if context_dim is None else draw(2, 5, context_dim, seed=3)
    outs = [m(x, None if context is None else m.keys_values(context)) for m in (plain, joined)]
    assert (outs[0] - outs[1]).abs().max() <= 1e-5


def test_an_unknown_schema_is_said_once() -> None:
    with pytest.warns(UserWarning, match="another mkldnn::_linear_pointwise than ldmfast knows; slower"):
        assert not onednn.as_expected({"mkldnn::_linear_pointwise": "(Tensor X) -> Tensor"}, "slower")
    with pytest.warns(UserWarning, match="another mkldnn::_not_there"):
        assert not onednn.as_expected({"mkldnn::_not_there": "(Tensor X) -> Tensor"}, "slower")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert onednn.as_expected({}, "") == torch.backends.mkldnn.is_available()


def exact_of(x: Quantized) -> Tensor:
    return (x.values.double() - x.zero_point) * x.scale.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_linear(shape, library) -> None:
    """The product of the 8-bit numbers is exact up to the output's rounding."""
    from ldmfast import ops

    layer = filled(Linear(shape[-1], 12), torch.float32)
    values, scale = rows_to_int8(layer.weight)
    bias = layer.bias.double()
    layer.quantize()
    x, residual = Quantized(*ops.quantize(draw(*shape) + 0.7)), draw(*shape[:-1], 12, seed=2).bfloat16()
    exact = F.linear(exact_of(x), values.double() * scale.double()[:, None], bias)
    close(layer(x), exact, torch.bfloat16)
    close(layer(x, residual), exact + residual.double(), torch.bfloat16)
    assert list(layer.state_dict()) and layer.weight is None


@pytest.mark.parametrize("shape", CONVS, ids=str)
def test_int8_conv(shape, library) -> None:
    """Borders included: what is outside the picture is zero, whatever the zero point."""
    from ldmfast import ops

    n, c, h, w, k, stride, padding = shape
    layer = filled(Conv2d(c, 6, k, stride, padding), torch.float32)
    values, scale = rows_to_int8(layer.weight)
    bias = layer.bias.double()
    layer.quantize()
    plain = (draw(n, c, h, w) + 0.7).bfloat16().contiguous(memory_format=torch.channels_last)
    x = Quantized(*ops.quantize(plain, pad=layer.border))
    inner = exact_of(x)[:, :, layer.border:layer.border + h, layer.border:layer.border + w]
    exact = F.conv2d(inner, values.double() * scale.double().view(-1, 1, 1, 1), bias, stride, padding)
    close(layer(x), exact, torch.bfloat16)
    assert torch.equal(layer(plain), layer(x))  # a floating input is quantised on the way
    residual = draw(*exact.shape, seed=2).bfloat16()
    close(layer(x, residual), exact + residual.double(), torch.bfloat16)


def test_int8_weights_are_within_half_a_step() -> None:
    weight = draw(5, 7, 3, 3)
    weight[2] = 0
    values, scale = rows_to_int8(weight)
    assert values.dtype == torch.int8 and int(values.abs().max()) == 127
    back = values.double() * scale.double().view(-1, 1, 1, 1)
    assert ((back - weight.double()).abs() <= scale.double().view(-1, 1, 1, 1) * 0.5001).all()


def test_nan_is_not_hidden_by_8_bits() -> None:
    layer = filled(Linear(8, 4), torch.float32)
    layer.quantize()
    x = draw(3, 8)
    x[1, 2] = float("nan")
    assert layer(x).isnan().any()
    broken = filled(Linear(8, 4), torch.float32)
    broken.weight[1, 1] = float("nan")
    broken.quantize()
    assert broken(draw(3, 8)).isnan().any()


@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_run_though_calls_are_direct(everywhere):
    """The NaN finder and calibration look at layers through hooks, which a direct call of forward() would pass by."""
    layer, x = Attention(8, 2, 4), torch.randn(1, 3, 8)
    seen: list[str] = []
    every = torch.nn.modules.module
    before = every.register_module_forward_pre_hook if everywhere else layer.register_forward_pre_hook
    after = every.register_module_forward_hook if everywhere else layer.register_forward_hook
    handles = [before(lambda m, a: seen.append(f"before {type(m).__name__}")),
               after(lambda m, a, out: seen.append(f"after {type(m).__name__}"))]
    try:
        layer(x)
    finally:
        for handle in handles:
            handle.remove()
    inner = [f"{when} Linear" for _ in range(4) for when in ("before", "after")] if everywhere else []
    assert seen == ["before Attention", *inner, "after Attention"]
    layer(x)
    assert len(seen) == 2 + len(inner)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("eight", [False, True])
def test_a_norm_and_its_convolution_are_the_same_as_one_and_the_other(library, eight, dtype) -> None:
    norm, conv = filled(GroupNorm(4, 24, 1e-5), dtype), filled(Conv2d(24, 40, 3, padding=1), dtype)
    conv.quantize() if eight else conv.pack()
    x = draw(2, 24, 9, 11).to(dtype, memory_format=torch.channels_last)
    shift, residual = draw(2, 24, seed=2).to(dtype), draw(2, 40, 9, 11, seed=3).to(dtype)
    one = norm.conv(conv, x, shift, residual)
    assert torch.equal(one, conv(norm.into(conv, x, shift), residual))
    seen: list[Tensor] = []
    handle = conv.register_forward_hook(lambda m, args, out: seen.append(out))
    assert torch.equal(norm.conv(conv, x, shift, residual), one)
    handle.remove()
    conv.forward = lambda *args, forward=conv.forward: forward(*args) * 2
    assert torch.equal(norm.conv(conv, x, shift, residual), one * 2)
    assert len(seen) == 1
