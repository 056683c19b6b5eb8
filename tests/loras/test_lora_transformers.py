"""LoRA on transformers: SD 3, FLUX, PixArt and DiT against diffusers' networks whose weights are the dense sum, and
the layouts with the original layers' names."""

from __future__ import annotations

import copy
import json

import diffusers
import lora_cases as make
import pytest
import torch
from torch import nn

import ldmfast
from ldmfast import loras
from ldmfast.errors import CheckpointError, LdmfastError
from ldmfast.models import REGISTRY
from ldmfast.quantization import Plan

CONFIGS = {
    "SD3Transformer2DModel": dict(sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
                                  num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=64,
                                  pooled_projection_dim=32, pos_embed_max_size=12, qk_norm="rms_norm",
                                  dual_attention_layers=(0,)),
    "FluxTransformer2DModel": dict(in_channels=16, out_channels=16, num_layers=2, num_single_layers=2,
                                   attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
                                   pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=True),
    "PixArtTransformer2DModel": dict(num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=8,
                                     patch_size=2, cross_attention_dim=64, caption_channels=32, out_channels=8),
    "DiTTransformer2DModel": dict(num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=8,
                                  patch_size=2, in_channels=4, out_channels=8, num_embeds_ada_norm=10)}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = getattr(diffusers, name)(**CONFIGS[name]).eval().requires_grad_(False)
    for parameter in net.parameters():  # biases and gains, too, are no zeros and ones
        parameter.add_(torch.randn(parameter.shape) * 0.02)
    return net


def call(name: str, net: nn.Module) -> torch.Tensor:
    noise = torch.Generator().manual_seed(3)
    dtype = next(net.parameters()).dtype

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise).to(dtype)

    prompt, pooled = draw(2, 7, 32), draw(2, 32)
    if name.startswith("Flux"):
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
        out = net(draw(2, 16, 16), timestep=torch.tensor([0.5, 0.5]), encoder_hidden_states=prompt,
                  pooled_projections=pooled, img_ids=ids, txt_ids=torch.zeros(7, 3), guidance=torch.tensor([3.5, 3.5]))
    elif name.startswith("SD3"):
        out = net(draw(2, 4, 8, 8), timestep=torch.tensor([500.0, 500.0]), encoder_hidden_states=prompt,
                  pooled_projections=pooled)
    elif name.startswith("PixArt"):
        sizes = {} if isinstance(net, ldmfast.models.base.Model) else {
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        out = net(draw(2, 4, 8, 8), encoder_hidden_states=prompt, timestep=torch.tensor([500, 500]), **sizes)
    else:
        out = net(draw(2, 4, 8, 8), timestep=torch.tensor([500, 500]), class_labels=torch.tensor([1, 4]))
    return (out if isinstance(out, torch.Tensor) else out[0]).double()


def linears(net: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear)}


def draw(net: nn.Module, seed: int) -> make.Lora:
    noise, found = torch.Generator().manual_seed(seed), {}
    for i, (name, m) in enumerate(linears(net).items()):
        down = torch.randn(3 + i % 3, m.in_features, generator=noise) * m.in_features ** -0.5
        up = torch.randn(m.out_features, 3 + i % 3, generator=noise) * 0.1
        found[name] = make.Matrices(down, up, (1.0, 2.0, 4.0)[i % 3])
    return found


def merged(net: nn.Module, deltas: dict[str, torch.Tensor]) -> nn.Module:
    net = copy.deepcopy(net)
    for name, delta in deltas.items():
        weight = net.get_submodule(name).weight
        weight.copy_((weight.double() + delta).float())
    return net


def ours(theirs: nn.Module, precision: str) -> ldmfast.models.base.Model:
    if precision == "unpacked":
        return ldmfast.models.from_diffusers(theirs)
    dtype = torch.float32 if precision == "exact" else torch.bfloat16
    weights = {k: v.clone() for k, v in theirs.state_dict().items()}
    return REGISTRY[type(theirs).__name__][1].from_weights(
        dict(theirs.config), weights, pack=True, dtype=dtype, int8=Plan() if precision == "int8" else None).eval()


def peft(lora: make.Lora) -> dict[str, torch.Tensor]:
    return {f"transformer.{key}": tensor for key, tensor in make.lora_a_b(lora).items()}


def kohya(lora: make.Lora) -> dict[str, torch.Tensor]:
    return {key.replace("lora_te_", "lora_transformer_"): t for key, t in make.kohya(
        {f"text.{name}": m for name, m in lora.items()}).items()}


@pytest.mark.parametrize("mode", ["side", "fused"])
@pytest.mark.parametrize("precision", ["exact", "unpacked", "bf16", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_linear_against_diffusers_with_the_dense_sum(name: str, precision: str, mode: str):
    """exact: 1e-4. bf16, 8 bits: as the UNets' (test_lora_layers), a multiple of the error without LoRA. Linears with
    GELU inside and FLUX's linear of two inputs had no way to add anything."""
    theirs = network(name)
    base = ours(theirs, precision)
    first, second = draw(theirs, 1), draw(theirs, 2)
    stack = loras.Stack.of({"transformer": base})
    for key, given in (("a", kohya(first)), ("b", peft(second))):
        stack = stack.with_adapter(key, loras.load(given, {"transformer": base}))
    choice = stack.choice(["a", "b"], [0.7, -1.5])
    if mode == "fused":
        stack, choice = loras.stack.replace(stack, active=choice).fuse(None, None, 1.0), ()
    plain, before = call(name, theirs), call(name, base)
    got = call(name, stack.networks(choice)["transformer"])
    wanted = call(name, merged(theirs, {n: 0.7 * first[n].delta - 1.5 * second[n].up.double() @ second[n].down.double()
                                        for n in first}))
    assert (wanted - plain).norm() > 0.1 * plain.norm(), "the adapters must be seen"
    if precision in ("exact", "unpacked"):
        assert (got - wanted).abs().max() <= 1e-4
    else:
        alone, error = (before - plain).norm() / plain.norm(), (got - wanted).norm() / wanted.norm()
        assert error <= (3 if mode == "fused" and precision == "int8" else 2) * alone, (error, alone)
    assert torch.equal(call(name, base), before), "the base itself was changed"


# original layer -> diffusers' modules in the order of its outputs, and whether scale and shift change places
ORIGINAL = {
    "SD3Transformer2DModel": {
        "joint_blocks.0.x_block.attn.qkv": ([f"transformer_blocks.0.attn.to_{n}" for n in "qkv"], False),
        "joint_blocks.0.x_block.attn2.qkv": ([f"transformer_blocks.0.attn2.to_{n}" for n in "qkv"], False),
        "joint_blocks.1.context_block.attn.qkv": ([f"transformer_blocks.1.attn.add_{n}_proj" for n in "qkv"], False),
        "joint_blocks.1.x_block.mlp.fc1": (["transformer_blocks.1.ff.net.0.proj"], False),
        "joint_blocks.0.context_block.adaLN_modulation.1": (["transformer_blocks.0.norm1_context.linear"], False),
        "joint_blocks.1.context_block.adaLN_modulation.1": (["transformer_blocks.1.norm1_context.linear"], True),
        "final_layer.adaLN_modulation.1": (["norm_out.linear"], True)},
    "FluxTransformer2DModel": {
        "double_blocks.0.img_attn.qkv": ([f"transformer_blocks.0.attn.to_{n}" for n in "qkv"], False),
        "double_blocks.1.txt_attn.qkv": ([f"transformer_blocks.1.attn.add_{n}_proj" for n in "qkv"], False),
        "double_blocks.0.img_mlp.0": (["transformer_blocks.0.ff.net.0.proj"], False),
        "double_blocks.0.txt_mod.lin": (["transformer_blocks.0.norm1_context.linear"], False),
        "single_blocks.1.linear1": ([*(f"single_transformer_blocks.1.attn.to_{n}" for n in "qkv"),
                                     "single_transformer_blocks.1.proj_mlp"], False),
        "single_blocks.0.linear2": (["single_transformer_blocks.0.proj_out"], False),
        "final_layer.adaLN_modulation.1": (["norm_out.linear"], True)}}


def original(net: nn.Module, name: str) -> tuple[make.Lora, dict[str, torch.Tensor]]:
    """LoRA of the original layers, and what that adds to each weight of diffusers'."""
    noise, found, deltas = torch.Generator().manual_seed(4), {}, {}
    for old, (modules, swapped) in ORIGINAL[name].items():
        layers = [net.get_submodule(m) for m in modules]
        m = make.Matrices(torch.randn(4, layers[0].in_features, generator=noise) * 0.2,
                          torch.randn(sum(x.out_features for x in layers), 4, generator=noise) * 0.6, 2.0)
        delta = torch.cat(m.delta.chunk(2)[::-1]) if swapped else m.delta
        found[old] = m
        deltas |= zip(modules, delta.split([x.out_features for x in layers]))
    return found, deltas


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
@pytest.mark.parametrize("name", ORIGINAL)
def test_names_of_the_original_layers(name: str, layout: str):
    theirs = network(name)
    lora, deltas = original(theirs, name)
    if layout == "kohya":
        given = make.kohya({f"unet.{n}": m for n, m in lora.items()})
    else:
        given = {f"diffusion_model.{n}.{end}": t for n, m in lora.items() for end, t in (
            ("lora_down.weight", m.down), ("lora_up.weight", m.up), ("alpha", torch.tensor(m.alpha)))}
    base = ours(theirs, "exact")
    stack = loras.Stack.of({"transformer": base}).with_adapter("a", loras.load(given, {"transformer": base}))
    got, wanted = call(name, stack.networks(stack.chosen)["transformer"]), call(name, merged(theirs, deltas))
    assert (wanted - call(name, theirs)).norm() > 0.1 * wanted.norm()
    assert (got - wanted).abs().max() <= 1e-4


def test_fused_layers_are_parted_as_in_diffusers_converter():
    """It knows FLUX.1's own sizes alone."""
    noise, wide, lora, wanted = torch.Generator().manual_seed(4), 3072, {}, {}
    for old, (modules, swapped) in ORIGINAL["FluxTransformer2DModel"].items():
        if not swapped:  # which its converter leaves out
            outputs = [4 * wide if n.endswith(("proj_mlp", "net.0.proj")) else 6 * wide if "norm" in n else wide
                       for n in modules]
            lora[old] = make.Matrices(torch.randn(4, 2, generator=noise), torch.randn(sum(outputs), 4, generator=noise),
                                      2.0)
            wanted |= zip(modules, lora[old].delta.split(outputs))
    converted = diffusers.FluxPipeline.lora_state_dict(make.kohya({f"unet.{n}": m for n, m in lora.items()}))
    deltas = {key.removeprefix("transformer.").removesuffix(".lora_A.weight"):
              converted[key.replace("lora_A", "lora_B")].double() @ down.double()
              for key, down in converted.items() if key.endswith(".lora_A.weight")}
    assert deltas.keys() == wanted.keys()
    assert all((deltas[module] - delta).abs().max() <= 1e-5 for module, delta in wanted.items())


def test_what_does_not_fit_is_named():
    base = ours(network("FluxTransformer2DModel"), "unpacked")
    down, up = torch.zeros(2, 64), torch.zeros(100, 2)
    for given, told in (
            ({"lora_unet_double_blocks_0_img_attn_qkv": (down, up)}, r"64 \+ 64 \+ 64 outputs"),
            ({"lora_unet_double_blocks_7_img_attn_qkv": (down, up)}, "has no place in transformer"),
            ({"lora_te3_encoder_block_0_layer_0_SelfAttention_q": (down, up)}, "is for the T5 encoder")):
        tensors = {f"{k}.lora_{end}.weight": t for k, pair in given.items() for end, t in zip(("down", "up"), pair)}
        with pytest.raises(CheckpointError, match=told):
            loras.load(tensors, {"transformer": base})


def test_a_pipeline_draws_with_adapters_and_takes_them_out_again(tmp_path):
    """The shipped transformer: as diffusers' own peft layout for its class; settings name the adapters."""
    pipe = ldmfast.Pipeline.tiny(network="dit")
    generator = torch.Generator().manual_seed(1)
    slots = loras.adapter.slots(pipe.unet)
    given = {}
    for name in ("transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.attn.to_q", "norm_out.linear"):
        out, width = slots[name].shape
        given |= {f"transformer.{name}.lora_A.weight": torch.randn(4, width, generator=generator) * 0.2,
                  f"transformer.{name}.lora_B.weight": torch.randn(out, 4, generator=generator) * 0.2}
    call = {"num_inference_steps": 2, "generator": 5, "output_type": "np", "progress": False}
    plain = pipe("a red circle", **call).images
    pipe.load_lora_weights(given, "style")
    out = pipe("a red circle", **call)
    assert abs(out.images - plain).max() > 0.05
    assert list(out.settings[0]["loras"]) == ["style"]
    settings = json.loads(json.dumps(out.settings[0]))
    pipe.set_adapters("style", 0.5)
    with pytest.raises(LdmfastError, match="set_adapters"):
        pipe.repeat(settings)
    pipe.set_adapters("style")
    assert pipe.get_list_adapters() == {"transformer": ["style"]}
    pipe.fuse_lora()
    assert abs(pipe("a red circle", **call).images - out.images).max() <= 1e-3
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert (pipe("a red circle", **call).images == plain).all()
