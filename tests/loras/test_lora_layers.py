"""One layer in every state (plain, packed, 8 bits) with adapters beside it or in it, against float64; and the networks,
against diffusers with the dense sum in its weights."""

from __future__ import annotations

from types import SimpleNamespace

import lora_cases as make
import pytest
import torch

import ldmfast
from ldmfast import loras, ops
from ldmfast.loras.fuse import fused
from ldmfast.loras.side import Pair, pair, with_side
from ldmfast.models import gemm
from ldmfast.models.layers import as_tokens
from ldmfast.quantization import Plan, Range

LAYERS = {
    "linear": (lambda: gemm.Linear(48, 80), (2, 7, 48), {}),
    "gated": (lambda: gemm.GatedLinear(48, 2 * 40), (2, 7, 48), {}),
    "conv1": (lambda: gemm.Conv2d(24, 40, 1), (2, 24, 6, 5), {}),
    "conv3": (lambda: gemm.Conv2d(24, 40, 3, padding=1), (2, 24, 6, 5), {}),
    "strided": (lambda: gemm.Conv2d(24, 40, 3, stride=2, padding=1), (2, 24, 7, 6), {}),
    "upsampling": (lambda: gemm.Conv2d(24, 40, 3, padding=1), (2, 24, 5, 4), {"upsample": True}),
}
STATES = ["float32", "float32 packed", "bfloat16", "bfloat16 packed", "int8", "int8 codes"]


def built(name: str, state: str):
    """The layer in the state, its input as it takes it, and float64 copies of what both stand for."""
    torch.manual_seed(0)
    make_layer, shape, extra = LAYERS[name]
    dtype = torch.float32 if state.startswith("float32") else torch.bfloat16
    layer = make_layer().to(dtype).requires_grad_(False)
    x = torch.randn(shape).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    if "packed" in state:
        layer.pack()
    given, meant = x, x.double()
    if state.startswith("int8"):
        layer.quantize()
    if state == "int8 codes":
        border = 0 if extra else layer.border
        given = gemm.Quantized(*ops.quantize(ops.upsample2x(x) if extra and layer.border else x, pad=layer.border))
        extra = {} if extra and layer.border else extra
        q = given.values[..., border:-border, border:-border] if border else given.values
        meant = (q.double() - given.zero_point) * given.scale.double()
    weight = (layer.dense() if layer.int8 is None else layer.int8.dense(torch.float32)).double()
    return SimpleNamespace(layer=layer, given=given, meant=meant, weight=weight, extra=extra)


def reference(case, weight):
    bias = case.layer.bias.double() if case.layer.int8 is None or case.layer.int8.bias is None else (
        case.layer.int8.bias.double())
    if not isinstance(case.layer, gemm.Conv2d):
        y = torch.nn.functional.linear(case.meant, weight, bias)
        return ops.ROWS["geglu"].reference(y) if isinstance(case.layer, gemm.GatedLinear) else y
    x = case.meant.repeat_interleave(2, 2).repeat_interleave(2, 3) if case.extra else case.meant
    return torch.nn.functional.conv2d(x, weight, bias, case.layer.stride, case.layer.padding)


def adapters(case, seed: int):
    """Two adapters of different rank, with their weights, in the layer's dtype."""
    noise = torch.Generator().manual_seed(seed)
    w = case.weight
    dtype = torch.float32 if case.layer.int8 is None and case.layer.bias.dtype == torch.float32 else torch.bfloat16
    found = []
    for rank, weight in ((3, 1.0), (8, -0.5)):
        down = (torch.randn(rank, *w.shape[1:], generator=noise) * w[0].numel() ** -0.5).to(dtype)
        down = down.flatten(1) if down.shape[2:] == (1, 1) else down
        up = torch.randn(w.shape[0], rank, generator=noise).to(dtype)
        found.append((pair(case.layer, down, up), weight))
    return found


def packing(layer):
    weight = layer._parameters["weight"]
    return (weight is not None and (weight.is_mkldnn, weight.shape), type(getattr(layer, "layout", None)),
            layer.int8 is not None and type(layer.int8.values if layer.int8.layout is None else layer.int8.layout))


def total(weight, pairs: list[tuple[Pair, float]]):
    return weight + sum(w * (p.up.double() @ p.down.flatten(1).double()).view(weight.shape) for p, w in pairs)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name, state):
    """The error may be three times that of the layer without adapters: what they add is as large as its own result and
    is rounded by itself. Fused, the weight is the sum, rounded once; in 8 bits to half a step of each row's scale."""
    case = built(name, state)
    before = case.layer(case.given, **case.extra)
    alone = (before.double() - reference(case, case.weight)).abs().max()
    pairs = adapters(case, 1)
    wanted = reference(case, total(case.weight, pairs))
    assert (wanted - reference(case, case.weight)).abs().max() > 0.5, "the adapters must be seen"
    band = torch.finfo(before.dtype).eps * float(wanted.abs().max())
    if state == "int8":  # the layer rounds its input: what it stands for is not known here
        alone = alone.clamp_min(0.03 * float(wanted.abs().max()))
    beside = with_side(case.layer, pairs)
    error = (beside(case.given, **case.extra).double() - wanted).abs().max()
    assert error <= 3 * alone + 3 * band, (float(error), float(alone), band)
    inside = fused(case.layer, pairs, {})
    got = inside.dense() if inside.int8 is None else inside.int8.dense(torch.float32)
    sums = total(case.weight, pairs)
    # a sum of so many products in fp32, and the one rounding to the weight's own form
    products = sum(abs(w) * (p.up.double().abs() @ p.down.flatten(1).double().abs()) for p, w in pairs).view(sums.shape)
    step = (3 + 8 + 2) * torch.finfo(torch.float32).eps / 2 * (case.weight.abs() + products)
    step = step + (torch.finfo(got.dtype).eps / 2 * sums.abs() if inside.int8 is None else
                   inside.int8.scale.view(-1, *[1] * (sums.ndim - 1)) / 2)
    assert bool(((got.double() - sums).abs() <= step * 1.001).all())
    assert packing(inside) == packing(case.layer)
    if inside.int8 is None:
        error = (inside(case.given, **case.extra).double() - wanted).abs().max()
        assert error <= 3 * alone + 6 * band, (float(error), float(alone))
    assert torch.equal(case.layer(case.given, **case.extra), before), "the layer itself was changed"


@pytest.mark.parametrize("codes", [False, True, "fp8", "int8_rows"])
def test_a_gate_that_ends_in_codes(codes):
    case = built("gated", "int8 codes")
    y = with_side(case.layer, adapters(case, 2))(case.given, codes=codes)
    wanted = reference(case, total(case.weight, adapters(case, 2)))
    y = y.dense(torch.float64) if codes is True else y.dense().double() if codes else y.double()
    # e4m3 has three bits after the first
    assert (y - wanted).abs().max() <= (0.02 + 2**-4 * (codes == "fp8")) * wanted.abs().max()


def unet_inputs():
    noise = torch.Generator().manual_seed(5)
    return torch.randn(2, 8, 8, 8, generator=noise), 500.0, torch.randn(2, 32, 128, generator=noise)


def outputs(network, encoder):
    sample, t, prompt = unet_inputs()
    ids = torch.arange(64).reshape(2, 32) * 7 % 680
    with torch.no_grad():
        out = network(sample.to(network.dtype), t, prompt.to(network.dtype))
        return {"unet": getattr(out, "sample", out).double(), "text_encoder": encoder(ids)[0].double()}


@pytest.fixture(scope="module")
def theirs():
    return make.diffusers_pipeline()


@pytest.mark.parametrize("mode", ["side", "fused"])
@pytest.mark.parametrize("precision", ["exact", "unpacked", "bf16", "int8"])
def test_networks_against_diffusers_with_the_dense_sum(theirs, precision, mode):
    """Every linear and convolution of the UNet and the text encoder has a LoRA. exact: 1e-4. bf16 and 8 bits: twice the
    error that the networks have without LoRA, which is measured alike; 8 bits fused round twice."""
    if precision == "unpacked":
        networks = {c: ldmfast.models.from_diffusers(getattr(theirs, c)) for c in ("unet", "text_encoder")}
    else:
        parts = ldmfast.Pipeline.tiny(precision=precision).components
        networks = {c: parts[c] for c in ("unet", "text_encoder")}
    first, second = make.draw(theirs, 1), make.draw(theirs, 2, wanted=lambda n: "to_" in n or "q_proj" in n)
    stack = loras.Stack.of(networks)
    for name, lora in (("a", first), ("b", second)):
        stack = stack.with_adapter(name, loras.load(make.kohya(lora), networks))
    choice = stack.choice(["a", "b"], [0.7, -1.5])
    if mode == "fused":
        stack = loras.stack.replace(stack, active=choice).fuse(None, None, 1.0)
        choice = ()
    summed = make.merged(theirs, (first, 0.7), (second, -1.5))
    plain = outputs(theirs.unet, theirs.text_encoder)
    wanted = outputs(summed.unet, summed.text_encoder)
    networks_with = stack.networks(choice)
    base, got = outputs(**as_pair(networks)), outputs(**as_pair(networks_with))
    for c, expected in wanted.items():
        assert (expected - plain[c]).norm() > 0.1 * plain[c].norm(), "the adapters must be seen"
        if precision in ("exact", "unpacked"):
            assert (got[c] - expected).abs().max() <= 1e-4
        else:
            alone = (base[c] - plain[c]).norm() / plain[c].norm()
            error = (got[c] - expected).norm() / expected.norm()
            assert error <= (3 if mode == "fused" and precision == "int8" else 2) * alone, (c, error, alone)


def as_pair(networks):
    return {"network": networks["unet"], "encoder": networks["text_encoder"]}


def test_networks_with_a_plan_of_ranges(theirs):
    """An int8 network with one twin a range of timesteps: the adapters are in the twin that runs, and in the UNet that
    prepares its state."""
    kept = frozenset({"mid_block.attentions.0.transformer_blocks.0.ff.net.2", "up_blocks.0.resnets.0.conv1"})
    weights = theirs.unet.state_dict()

    def build(plan):
        return ldmfast.models.UNet2DCondition.from_weights(dict(theirs.unet.config), weights, pack=True, int8=plan,
                                                           dtype=torch.bfloat16)

    lora = make.draw(theirs, 1, components=["unet"])
    for mode in ("side", "fused"):
        found = []
        for plan in (Plan((Range(600.0, kept), Range(float("inf"), frozenset()))), Plan((Range(float("inf"), kept),))):
            networks = {"unet": build(plan)}
            stack = loras.Stack.of(networks).with_adapter("a", loras.load(make.kohya(lora), networks))
            stack = stack.fuse(None, None, 1.0) if mode == "fused" else stack
            sample, t, prompt = unet_inputs()
            with torch.no_grad():
                network = stack.networks(stack.chosen)["unet"]
                found.append(network(sample.bfloat16(), t, prompt.bfloat16()))
        assert torch.equal(*found)


def test_tokens_of_an_image_are_a_view():
    """The side of a 1x1 convolution is a product over pixels, in the memory order that the convolution has."""
    case = built("conv1", "bfloat16 packed")
    out = with_side(case.layer, adapters(case, 3))(case.given)
    assert out.is_contiguous(memory_format=torch.channels_last) and as_tokens(out).data_ptr() == out.data_ptr()
