"""Linears in 8 bits with a scale for each row: torch._scaled_mm and _int_mm on a CPU, against float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import ldmfast
from ldmfast import ops
from ldmfast.errors import LdmfastError, PrecisionError
from ldmfast.models import DiT, layers, rowwise
from ldmfast.models.gemm import Conv2d, GatedLinear, Linear
from ldmfast.models.layers import LayerNorm
from ldmfast.models.linears import GeluLinear, SplitLinear
from ldmfast.models.rowwise import FORMS, RowCodes, RowwiseWeight
from ldmfast.quantization import Plan, can_be_int8
from ldmfast.quantization.measure import Meter

sys.path.insert(0, str(Path(__file__).parent))
import test_quantization as tensorwise


def made(kind: type[Linear], inputs: int, outputs: int, seed: int = 0) -> Linear:
    torch.manual_seed(seed)
    layer = kind(inputs, outputs).requires_grad_(False)
    torch.nn.init.normal_(layer.bias)
    return layer


def rounded(x: torch.Tensor, form: str) -> torch.Tensor:
    """What the codes of a tensor's rows stand for, in float64."""
    codes, scale = ops.quantize_rowwise(x, fp8=form == "fp8")
    return codes.double() * scale.double().unsqueeze(-1)


@pytest.mark.parametrize("known", [True, False], ids=["operator", "fallback"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 9, 64), (1, 64), (33, 64)], ids=str)
def test_product_is_that_of_the_rounded_factors(shape, form, dtype, known, monkeypatch):
    """With and without a residual. Only the result is rounded: e4m3 and int8 products are exact in fp32 sums of 64."""
    monkeypatch.setitem(rowwise.KNOWN, form, known)
    layer = made(Linear, 64, 48)
    x, residual = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 48).to(dtype)
    exact = rounded(x, form) @ rounded(layer.weight, form).T + layer.bias.to(dtype).double()
    layer.quantize_rows(form)
    assert layer.weight is None and (layer.dense() - rounded_weight(layer)).abs().max() == 0
    band = 2 * torch.finfo(dtype).eps * exact.abs().max() + 64 * torch.finfo(torch.float32).eps * exact.abs().max()
    found = layer(x)
    assert found.dtype == dtype and (found.double() - exact).abs().max() <= band
    added = layer(x, residual.clone())
    assert (added.double() - exact - residual.double()).abs().max() <= 3 * band


def rounded_weight(layer: Linear) -> torch.Tensor:
    return layer.rowwise.values.float() * layer.rowwise.scale.T


@pytest.mark.parametrize("form", FORMS)
def test_other_linears_compute_what_their_plain_ones_do(form):
    """GEGLU's, GELU's and that of two inputs: as a plain layer of the weight that the codes stand for, to within the
    rounding of the activation."""
    for kind, x in ((GatedLinear, torch.randn(5, 64)), (GeluLinear, torch.randn(5, 64)),
                    (SplitLinear, (torch.randn(5, 32), torch.randn(5, 32)))):
        layer, plain = made(kind, 64, 32), made(kind, 64, 32)
        layer.quantize_rows(form)
        plain.weight.copy_(layer.dense())
        exact, found = plain(x), layer(x)
        error = (found - exact).norm() / exact.norm()
        assert 0 < error < (0.05 if form == "fp8" else 0.02), kind


def test_a_row_that_is_not_finite_stays_visible():
    layer = made(Linear, 64, 48)
    layer.quantize_rows("fp8")
    x = torch.randn(4, 64)
    x[2, 5] = float("nan")
    assert torch.isnan(layer(x)).any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("form", FORMS)
def test_networks_round_their_linears_and_leave_the_rest(form):
    model, exact = tensorwise.unet(Plan(form=form)), tensorwise.unet(None)
    layers = dict(model.named_modules())
    eight = {n for n, m in layers.items() if isinstance(m, Linear) and m.rowwise is not None}
    assert eight and not any(n.split(".")[-1] in ("time_emb_proj", "to_kv") for n in eight)
    assert all(m.int8 is None for m in layers.values() if isinstance(m, (Linear, Conv2d)))
    assert all(m.rowwise.scale.dtype == torch.float32 for n, m in layers.items() if n in eight)
    out, expected = tensorwise.run(model), tensorwise.run(exact)
    error = float((out - expected).norm() / expected.norm())
    assert 0 < error < 0.1, error


@pytest.mark.parametrize("form", FORMS)
def test_norms_and_gates_give_codes_themselves(form, monkeypatch):
    """No pass over memory of its own rounds what a LayerNorm or a GEGLU hands to a product of 8 bits: what is left to
    quantize_rowwise comes out of attention, of a GroupNorm, or of the text encoder."""
    asked: list[tuple[int, ...]] = []
    rowwise_op = rowwise.ops.quantize_rowwise
    model = tensorwise.unet(Plan(form=form))
    blocks = [m for m in model.modules() if type(m).__name__ == "TransformerBlock"]
    assert blocks and all(b.ff.entry.rowwise is not None for b in blocks)
    monkeypatch.setattr(rowwise.ops, "quantize_rowwise",
                        lambda x, fp8: asked.append(tuple(x.shape)) or rowwise_op(x, fp8=fp8))
    tensorwise.run(model)
    layers = [m for m in model.modules() if isinstance(m, Linear) and m.rowwise is not None]
    fed = sum(3 + 1 for _ in blocks)  # attn1's and attn2's entry, the MLP's two linears
    assert len(asked) == len(layers) - fed, (len(asked), len(layers), fed)


@pytest.mark.parametrize("form", FORMS)
def test_codes_make_the_product_that_their_numbers_make(form):
    """Codes from a norm are those of its unrounded result; a layer of another form, and adapters, see their numbers."""
    torch.manual_seed(3)
    x = torch.randn(2, 9, 64)
    layer, plain = made(Linear, 64, 48), made(Linear, 64, 48)
    layer.quantize_rows(form)
    norm = LayerNorm(64, 1e-5).requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    codes = norm.into(layer, x)
    assert isinstance(codes, RowCodes) and codes.dtype == x.dtype
    exact = rounded(norm(x), form) @ layer.dense().double().T + layer.bias.double()
    assert (layer(codes).double() - exact).norm() / exact.norm() < 1e-4  # a few codes fall on the other side of a tie
    assert torch.equal(plain(codes), plain(codes.dense()))
    layer.lora = lambda seen, residual: torch.ones(2, 9, 48) * float(seen.sum())
    assert torch.allclose(layer(codes), layer.rowwise(codes) + codes.dense().sum(), atol=1e-3)


def test_transformer_in_fp8():
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "in_channels": 4,
              "patch_size": 2, "num_embeds_ada_norm": 10, "norm_type": "ada_norm_zero",
              "activation_fn": "gelu-approximate"}
    weights = {k: v.detach().clone() for k, v in DiT.from_config(config).state_dict().items()}
    outs = []
    for plan in (None, Plan(form="fp8")):
        model = DiT.from_weights(config, weights, pack=True, int8=plan, dtype=torch.bfloat16)
        sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        outs.append(model(sample, torch.tensor([5, 5]), class_labels=torch.tensor([1, 2])).float())
    assert sum(isinstance(m, RowwiseWeight) for m in model.modules()) >= 2 * 4
    error = float((outs[1] - outs[0]).norm() / outs[0].norm())
    assert 0 < error < 0.1, error


@pytest.mark.parametrize("form", FORMS)
def test_sqnr_of_rows_is_near_theory(form):
    """Two roundings of uniform relative noise: e4m3 keeps 3 bits of fraction, whose noise is about 32 dB below the
    number; int8 with a scale a row of normal numbers some 40 dB below."""
    unet = tensorwise.unet(None)
    meter = Meter(unet, form)
    with meter.watching():
        tensorwise.run(unet)
    table = meter.sqnr([float("inf")])
    assert set(table) == {n for n, m in unet.named_modules() if isinstance(m, Linear) and can_be_int8(n)}
    low, high = (22, 35) if form == "fp8" else (30, 46)
    assert table and all(low < row[0] < high for row in table.values()), table


def test_attention_in_fp8_is_opted_in(monkeypatch):
    """Among the tokens of a picture only; off again, every bit is as before."""
    model, seen = tensorwise.unet(None), []
    before, fp8 = tensorwise.run(model), layers.ops.attention_fp8
    monkeypatch.setattr(layers.ops, "attention_fp8", lambda q, k, v: seen.append(k.shape[1]) or fp8(q, k, v))
    model.attend_in_fp8()
    out = tensorwise.run(model)
    blocks = [m for m in model.modules() if isinstance(m, layers.Attention) and m.context_dim is None]
    assert len(seen) == len(blocks) > 0 and 5 not in seen  # the prompt has five tokens
    error = float((out - before).norm() / before.norm())
    assert 0 < error < 0.1, error
    model.attend_in_fp8(False)
    assert torch.equal(tensorwise.run(model), before)
    next(m for m in model.modules() if isinstance(m, Linear)).lora = object()
    with pytest.raises(LdmfastError, match="an adapter is active"):
        model.attend_in_fp8()


@pytest.mark.parametrize("depth", [40, 64, 128])
def test_attention_in_fp8_against_float64(depth):
    """The error that its docstring states, of the rounding of q, k and v (that of the weights: tests/test_triton.py).
    Keys far from zero, alike for all tokens, cost nothing."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 256, 2, depth) for _ in range(3))
    for moved in (k, k + 20 * torch.randn(depth)):
        exact = ops.ROWS["attention"].reference(q.double(), moved.double(), v.double(), None, depth**-0.5, False, 1)
        error = float((ops.attention_fp8(q, moved, v).double() - exact).norm() / exact.norm())
        assert 0.005 < error < 0.06, error


def test_fp8_pipeline_draws_what_bf16_draws():
    with pytest.warns(RuntimeWarning, match="on a CPU computes what a GPU would, slowly"):
        pipe = ldmfast.Pipeline.tiny(precision="fp8")
    call = {"num_inference_steps": 4, "generator": 1, "output_type": "pt", "progress": False}
    pictures = [p("a red circle", **call).images.float() for p in (pipe, ldmfast.Pipeline.tiny(precision="bf16"))]
    psnr = -10 * torch.log10((pictures[0] - pictures[1]).square().mean())
    assert 20 < psnr < 60
    assert any(isinstance(m, RowwiseWeight) for m in pipe.unet.modules())


@pytest.mark.parametrize(("precision", "capability", "text"), [
    ("fp8", (8, 6), "needs a GPU of compute capability 8.9 or newer, some GPU has 8.6: use 'int8' or 'bf16'"),
    ("int8", (7, 5), "needs a GPU of compute capability 8.0 or newer, some GPU has 7.5: use 'exact'")])
def test_a_gpu_that_is_too_old_is_named(precision, capability, text, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    with pytest.raises(PrecisionError, match=text):
        rowwise.plan_for(precision, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert rowwise.plan_for(precision, torch.device("cuda")).form == {"fp8": "fp8", "int8": "int8_rows"}[precision]


def test_a_lora_is_fused_into_codes():
    from ldmfast.loras.fuse import fused
    from ldmfast.loras.side import Pair

    layer = made(Linear, 64, 48)
    weight = layer.weight.detach().clone()
    layer.quantize_rows("fp8")
    up = torch.randn(48, 4)
    pair = Pair(torch.randn(4, 64), up, up)
    new = fused(layer, [(pair, 0.5)], {})
    expected = rounded(rounded(weight, "fp8").float() + 0.5 * (pair.up @ pair.down), "fp8")
    assert (new.dense() - expected).abs().max() < 1e-6
    assert torch.equal(layer.dense(), rounded(weight, "fp8").float())  # as it was

