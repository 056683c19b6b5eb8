"""What the native network cannot serve runs diffusers' own forward, says so once, and gives diffusers' bits."""

from __future__ import annotations

import copy
import warnings

import accelerate
import accelerate.hooks
import accelerate_models as make
import pytest
import torch
from accelerate_models import inputs
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import ldmfast


class Boosted(AttnProcessor):
    """A user's processor that changes the picture."""

    def __call__(self, *args, **kwargs):
        return 1.5 * super().__call__(*args, **kwargs)


class Learned(torch.nn.Module):
    """A processor with weights, as IP-Adapter's: torch keeps it among the children, not among the attributes."""

    def forward(self, *args, **kwargs):
        return 1.5 * AttnProcessor()(*args, **kwargs)


class LoraLinear(torch.nn.Module):
    """As LoRA libraries do it: a module of their own in place of the linear."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.delta = torch.nn.Linear(base.in_features, base.out_features)

    def forward(self, x):
        return self.base_layer(x) + self.delta(x)


def _lora(m):
    torch.manual_seed(9)
    attention = m.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_q = LoraLinear(attention.to_q)


def _circular(m):
    m.conv_in.padding_mode = "circular"


def _more_heads(m):
    for module in m.modules():
        if hasattr(module, "heads"):
            module.heads *= 2


def _parametrize(m):
    class Double(torch.nn.Module):
        def forward(self, w):
            return 2 * w

    torch.nn.utils.parametrize.register_parametrization(m.conv_in, "weight", Double())


def _patched_submodule(m):
    forward = m.mid_block.forward
    m.mid_block.forward = lambda *a, **k: 2 * forward(*a, **k)


def _dropout(m):
    for module in m.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5


CHANGES = {
    "freeu": (lambda m: m.enable_freeu(0.9, 0.2, 1.2, 1.4), "FreeU"),
    "processor": (lambda m: m.set_attn_processor(Boosted()), "processor' was changed to Boosted"),
    "learned processor": (lambda m: m.set_attn_processor(Learned()), "processor' was changed to Learned"),
    "fused projections": (lambda m: m.fuse_qkv_projections(), "fuse_qkv_projections"),
    "lora": (_lora, "LoraLinear"),
    "hook": (lambda m: m.mid_block.register_forward_hook(lambda *x: 2 * x[2]), "'mid_block' has a forward hook"),
    "pre hook": (lambda m: m.conv_out.register_forward_pre_hook(lambda _, x: 2 * x[0]),
                 "'conv_out' has a forward hook"),
    "global hook": (None, "global forward hooks"),
    "circular padding": (_circular, "'conv_in.padding_mode' was changed"),
    "attention heads": (_more_heads, "attn1.heads' was changed"),
    "parametrization": (_parametrize, "'conv_in' is"),
    "patched submodule": (_patched_submodule, "'mid_block' has a forward of its own"),
    "changed dropout": (_dropout, r"\.p' was changed"),
    "other conv": (lambda m: setattr(m, "conv_in", torch.nn.Conv2d(4, 32, 1)), r"'conv_in\.kernel_size' was changed"),
    "layerwise casting": (lambda m: m.enable_layerwise_casting(torch.bfloat16, torch.float32), "weights are torch.bf"),
    "sequential offload": (lambda m: accelerate.cpu_offload(m, torch.device("cpu")), "meta"),
    "float64": (lambda m: m.double(), "torch.float64"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("precision", ["exact", "bf16"])
@torch.no_grad()
def test_a_changed_model(name, precision):
    """diffusers' own model with the same change is the oracle, and its bits must come out."""
    change, reason = CHANGES[name]
    theirs = make.unet()
    ours = ldmfast.accelerate(copy.deepcopy(theirs), precision=precision)
    given = [x.double() if name == "float64" and x.is_floating_point() else x for x in inputs()]
    before = ours(*inputs()).sample
    handle = None
    if change is None:
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda m, x, out: 2 * out if isinstance(m, torch.nn.Conv2d) else None)
    else:
        for model in (ours, theirs):
            torch.manual_seed(3)
            change(model)
    try:
        wanted = theirs(*given).sample
        with pytest.warns(UserWarning, match=reason):
            out = ours(*given).sample
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "ldmfast")
            assert torch.equal(ours(*given).sample, out)  # said once
    finally:
        if handle is not None:
            handle.remove()
    assert torch.equal(out, wanted)
    if name not in ("fused projections", "float64", "sequential offload", "changed dropout"):
        assert (wanted - before).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:ldmfast")
@torch.no_grad()
def test_after_the_change_is_taken_back_it_is_fast_again(native_calls):
    model = ldmfast.accelerate(make.unet())
    first = model(*inputs()).sample
    undo = {
        "freeu": lambda: model.disable_freeu(),
        "processor": lambda: model.set_attn_processor(AttnProcessor2_0()),
        "float64": lambda: model.float(),
        "circular padding": lambda: setattr(model.conv_in, "padding_mode", "zeros"),
        "sequential offload": lambda: accelerate.hooks.remove_hook_from_module(model, recurse=True),
    }
    for name, back in undo.items():
        CHANGES[name][0](model)
        given = [x.double() if name == "float64" and x.is_floating_point() else x for x in inputs()]
        model(*given)
        count = len(native_calls)
        back()
        assert torch.equal(model(*inputs()).sample, first), name
        assert len(native_calls) == count + 1, name


ARGUMENTS = {
    "unknown attention argument": (lambda: dict(cross_attention_kwargs={"strength": 1}), "strength"),
    "residuals of one picture": (lambda: dict(
        down_block_additional_residuals=[torch.ones(1, 32, 16, 16), torch.ones(1, 32, 16, 16), torch.ones(1, 32, 8, 8),
                                         torch.ones(1, 64, 8, 8)],
        mid_block_additional_residual=torch.ones(1, 64, 8, 8)), "down_block_additional_residuals"),
    "mask with a dimension more": (lambda: dict(encoder_attention_mask=torch.ones(2, 1, 7)), "encoder_attention_mask"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
@torch.no_grad()
def test_arguments(name):
    given, reason = ARGUMENTS[name]
    theirs = make.unet()
    ours = ldmfast.accelerate(copy.deepcopy(theirs))
    with pytest.warns(UserWarning, match=reason):
        out = ours(*inputs(), **given()).sample
    assert torch.equal(out, theirs(*inputs(), **given()).sample)


@torch.no_grad()
def test_errors_are_those_of_diffusers():
    theirs = make.unet()
    ours = ldmfast.accelerate(copy.deepcopy(theirs))
    x, t, e = inputs()
    for bad in ((x, t, e[..., :5]), (x[:, :3], t, e), (x.half(), t, e), (x, t, None), (x, t, e[:1]),
                (x[:0], torch.tensor([]), e[:0]), (x, "5", e)):
        with pytest.raises(Exception) as wanted:
            theirs(*bad)
        with pytest.raises(wanted.type) as got:
            ours(*bad)
        assert str(got.value) == str(wanted.value)
    vae = ldmfast.accelerate(make.vae_kl())
    for model in (vae, make.vae_kl()):
        with pytest.raises(RuntimeError, match="expected input"):
            model.decode(torch.randn(1, 3, 8, 8))
    labelled = ldmfast.accelerate(make.unet_2d(num_class_embeds=3))
    with pytest.raises(ValueError, match="class_labels should be provided"):
        labelled(torch.randn(1, 3, 16, 16), 5)


def test_gradients_are_those_of_diffusers():
    theirs = make.unet()
    ours = ldmfast.accelerate(copy.deepcopy(theirs))
    with pytest.warns(UserWarning, match="gradients"):
        ours(*inputs()).sample.square().mean().backward()
    theirs(*inputs()).sample.square().mean().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(a.grad, b.grad), name
    x = inputs()[0].requires_grad_()
    ours.requires_grad_(False)
    ours(x, *inputs()[1:]).sample.sum().backward()
    assert x.grad.abs().max() > 0


def test_without_gradients_of_anything_grad_mode_does_not_matter(native_calls):
    ours = ldmfast.accelerate(make.unet().requires_grad_(False))
    assert not ours(*inputs()).sample.requires_grad and len(native_calls) == 1


@torch.no_grad()
def test_dropout_of_train_mode():
    ours = ldmfast.accelerate(make.unet(dropout=0.5))
    clean = ours(*inputs()).sample
    ours.train()
    with pytest.warns(UserWarning, match="dropout"):
        assert (ours(*inputs()).sample - clean).abs().max() > 1e-3
    assert torch.equal(ours.eval()(*inputs()).sample, clean)


@torch.no_grad()
def test_autocast_and_compile():
    theirs = make.unet()
    ours = ldmfast.accelerate(copy.deepcopy(theirs))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="autocast"):
        out = ours(*inputs()).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(out, theirs(*inputs()).sample)
    with pytest.warns(UserWarning, match="compiled"):
        out = torch.compile(ours, backend="eager", fullgraph=True)(*inputs()).sample
    assert torch.equal(out, theirs(*inputs()).sample)


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export(strict):
    """torch.export traces diffusers' forward, and reads its arguments from the code object."""
    theirs = make.dit()
    ours = ldmfast.accelerate(copy.deepcopy(theirs))
    given = {"hidden_states": inputs()[0], "timestep": torch.tensor([3, 9]), "class_labels": torch.tensor([1, 2])}
    with pytest.warns(UserWarning, match="compiled or traced"):
        program = torch.export.export(ours, (), kwargs=given, strict=strict)
    torch.testing.assert_close(program.module()(**given).sample, theirs(**given).sample, rtol=0, atol=1e-6)


@torch.no_grad()
def test_forward_mode_derivatives():
    theirs = make.unet()
    theirs.set_attn_processor(AttnProcessor())  # torch's fused attention has no forward derivative on a CPU
    ours = ldmfast.accelerate(copy.deepcopy(theirs))
    x, t, e = inputs()
    with pytest.warns(UserWarning, match="torch.func"):
        _, out = torch.func.jvp(lambda x: ours(x, t, e).sample, (x,), (torch.ones_like(x),))
    _, wanted = torch.func.jvp(lambda x: theirs(x, t, e).sample, (x,), (torch.ones_like(x),))
    assert torch.equal(out, wanted) and wanted.abs().max() > 1e-3


@torch.no_grad()
def test_hooks_inside_an_autoencoder():
    theirs = make.vae_kl()
    ours = ldmfast.accelerate(copy.deepcopy(theirs))
    for vae in (ours, theirs):
        vae.decoder.mid_block.register_forward_hook(lambda *x: 2 * x[2])
    z = torch.randn(1, 4, 8, 8)
    with pytest.warns(UserWarning, match=r"'decoder\.mid_block' has a forward hook"):
        out = ours.decode(z).sample
    assert torch.equal(out, theirs.decode(z).sample)


@torch.no_grad()
def test_lora_layers_of_peft():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    theirs = make.unet()
    ours = ldmfast.accelerate(copy.deepcopy(theirs))
    first = ours(*inputs()).sample
    for model in (ours, theirs):
        torch.manual_seed(7)
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="LoRA"):
        out = ours(*inputs(), cross_attention_kwargs={"scale": 0.7}).sample
    assert torch.equal(out, theirs(*inputs(), cross_attention_kwargs={"scale": 0.7}).sample)
    for model in (ours, theirs):
        model.fuse_lora(lora_scale=0.5)
        model.unload_lora()
    torch.testing.assert_close(ours(*inputs()).sample, theirs(*inputs()).sample, rtol=0, atol=1e-4)
    assert (theirs(*inputs()).sample - first).abs().max() > 1e-3
