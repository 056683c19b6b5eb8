"""SD3 and FLUX against diffusers on the same random weights: every variant, precision, and way to be called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from model_cases import draw, error, randomise, rms
from test_full_size import filled
from torch import Tensor, nn

from ldmfast.errors import CheckpointError, LdmfastError, ShapeError
from ldmfast.models import Model, from_diffusers
from ldmfast.models.gemm import Linear
from ldmfast.quantization import Plan
from ldmfast.quantization.plan import Range, can_be_int8

FP32 = 1e-4  # of the output's RMS: the project's parity bound in exact precision

SD3 = {"sample_size": 16, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 4,
       "joint_attention_dim": 24, "caption_projection_dim": 64, "pooled_projection_dim": 20, "pos_embed_max_size": 12}
FLUX = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
        "joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6)}
TIMES = {"SD3Transformer2DModel": 500.0, "FluxTransformer2DModel": 0.5}


def positions(h: int, w: int) -> Tensor:
    ids = torch.zeros(h, w, 3)
    ids[..., 1], ids[..., 2] = torch.arange(h)[:, None], torch.arange(w)
    return ids.reshape(h * w, 3)


@dataclass(frozen=True)
class Case:
    kind: str
    config: dict[str, Any]
    tokens: int = 7

    def build(self, fill: Callable[[nn.Module], nn.Module] = randomise) -> nn.Module:
        return fill(getattr(diffusers, self.kind)(**self.config))

    @property
    def timestep(self) -> float:
        return TIMES[self.kind]

    def sample(self, n: int, size: tuple[int, int] = (12, 10)) -> Tensor:
        channels = self.config.get("in_channels", 16)
        return draw(n, channels, *size) if self.kind.startswith("SD3") else draw(n, size[0] * size[1], channels)

    def conditions(self, n: int, size: tuple[int, int] = (12, 10)) -> dict[str, Any]:
        c = self.config
        given = {"encoder_hidden_states": draw(n, self.tokens, c["joint_attention_dim"], seed=2),
                 "pooled_projections": draw(n, c["pooled_projection_dim"], seed=3)}
        if self.kind.startswith("Flux"):
            given |= {"img_ids": positions(*size), "txt_ids": torch.zeros(self.tokens, 3)}
        if c.get("guidance_embeds"):
            given["guidance"] = torch.linspace(3.5, 4, n)
        return given


def sd3(**changes: Any) -> Case:
    return Case("SD3Transformer2DModel", SD3 | changes)


def flux(**changes: Any) -> Case:
    return Case("FluxTransformer2DModel", FLUX | changes)


CASES = {
    "sd3": sd3(), "sd3.5_large": sd3(qk_norm="rms_norm"),
    "sd3.5_medium": sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "sd3_patch_4": sd3(patch_size=4, in_channels=9, out_channels=None),
    "flux_schnell": flux(), "flux_dev": flux(guidance_embeds=True),
    "flux_fill": flux(guidance_embeds=True, in_channels=40, out_channels=16),
}


def theirs_out(module: nn.Module, sample: Tensor, timestep: Any, **given: Any) -> Tensor:
    time = torch.as_tensor(timestep, dtype=sample.dtype).expand(len(sample))
    with torch.no_grad():
        return module(hidden_states=sample, timestep=time, **given).sample


@cache
def pair(name: str) -> tuple[nn.Module, Model]:
    theirs = CASES[name].build()
    return theirs, from_diffusers(theirs)


@pytest.mark.parametrize("name", CASES)
def test_matches_diffusers(name: str) -> None:
    case, (theirs, ours) = CASES[name], pair(name)
    packed = type(ours).from_weights(dict(theirs.config), theirs.state_dict(), pack=True)
    for n, size in ((1, (12, 10)), (2, (13, 17)), (3, (4, 5))):
        sample, given = case.sample(n, size), case.conditions(n, size)
        expected = theirs_out(theirs, sample, case.timestep, **given)
        for model in (ours, packed):
            got = model(sample, case.timestep, **given)
            assert got.shape == expected.shape and got.dtype == torch.float32
            assert error(got, expected) <= FP32, (n, size)


def test_no_picture() -> None:
    for case, (_, ours) in ((CASES[n], pair(n)) for n in ("sd3.5_medium", "flux_dev")):
        for model in (ours, from_diffusers(case.build(), precision="int8")):
            sample = case.sample(0)
            assert model(sample, case.timestep, **case.conditions(0)).numel() == 0


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_as_good_as_diffusers(name: str) -> None:
    """Against float64, at most twice the error that diffusers makes in bfloat16, at a time that bfloat16 holds."""
    case = CASES[name]
    theirs = case.build()
    ours = from_diffusers(theirs, precision="bf16")
    sample, given = case.sample(2), case.conditions(2)

    def result(dtype: torch.dtype) -> Tensor:
        low = {k: v if k.endswith("ids") else v.to(dtype) for k, v in given.items()}
        return theirs_out(case.build().to(dtype), sample.to(dtype), case.timestep, **low).double()

    exact = result(torch.float64)
    allowed = 2 * rms(result(torch.bfloat16) - exact)
    assert rms(ours(sample, case.timestep, **given).double() - exact) <= allowed


@pytest.mark.parametrize("name", ["sd3.5_medium", "flux_dev"])
def test_int8(name: str) -> None:
    """Blocks run in 8 bits, ends and modulations do not; 30 dB of signal to noise, not more than 60."""
    case, (theirs, ours) = CASES[name], pair(name)
    eight = from_diffusers(theirs, precision="int8")
    layers = {n: m for n, m in eight.named_modules() if isinstance(m, Linear)}
    assert {n for n, m in layers.items() if m.int8 is not None} == {n for n in layers if can_be_int8(n)}
    kept = {n.rsplit(".", 1)[-1] if n.endswith("linear") else n for n in layers if not can_be_int8(n)}
    assert kept >= {"linear", "context_embedder", "proj_out", "time_text_embed.timestep_embedder.linear_1"}
    assert "single_transformer_blocks.0.proj_out" in {n for n in layers if can_be_int8(n)} or name != "flux_dev"
    sample, given = case.sample(2), case.conditions(2)
    exact = ours(sample, case.timestep, **given)
    off = rms(eight(sample, case.timestep, **given).float() - exact) / rms(exact)
    assert 1e-3 < off < 10 ** (-30 / 20)


@pytest.mark.parametrize("name", ["sd3.5_medium", "flux_dev"])
def test_a_mixed_plan_switches_by_timestep(name: str) -> None:
    case, (theirs, _) = CASES[name], pair(name)
    layers = {n for n, m in from_diffusers(theirs, precision="bf16").named_modules() if isinstance(m, Linear)}
    kept = frozenset(n for n in layers if "attn.to" in n or "proj_out" in n)
    end = case.timestep * 1.2

    def build(*ranges: Range) -> Model:
        return type(pair(name)[1]).from_weights(dict(theirs.config), theirs.state_dict(), pack=True, int8=Plan(ranges),
                                                dtype=torch.bfloat16)

    inf = float("inf")
    mixed = build(Range(end, kept), Range(inf, frozenset()))
    low, high = build(Range(inf, kept)), build(Range(inf, frozenset()))
    sample, given = case.sample(1), case.conditions(1)
    below, above = case.timestep, case.timestep * 1.5
    assert torch.equal(mixed(sample, below, **given), low(sample, below, **given))
    assert torch.equal(mixed(sample, above, **given), high(sample, above, **given))
    assert not torch.equal(low(sample, below, **given), high(sample, below, **given))
    own = {id(t) for t in (*mixed.parameters(), *mixed.buffers())}
    assert all(id(t) in own for v in mixed.variants for t in (*v.parameters(), *v.buffers()))


@pytest.mark.parametrize("name", ["sd3.5_medium", "flux_dev"])
def test_prepared_state_gives_the_same_bits(name: str) -> None:
    case, (theirs, ours) = CASES[name], pair(name)
    sample, given = case.sample(2), case.conditions(2)
    times = [case.timestep * i / 20 for i in range(1, 41)]
    state = ours.prepare(times, **given)
    for t in times[::13]:
        assert torch.equal(ours(sample, t, state=state), ours(sample, t, **given))
    two = torch.tensor([times[3], times[30]], dtype=torch.float64)
    got = ours(sample, two, state=state)
    assert error(got, theirs_out(theirs, sample, two.float(), **given)) <= FP32
    with pytest.raises(LdmfastError, match="was not prepared"):
        ours(sample, 3e9, state=state)
    with pytest.raises(LdmfastError, match="together with a prepared state"):
        ours(sample, times[0], given["encoder_hidden_states"], state=state)


@pytest.mark.parametrize("controls", [1, 2, 3])
def test_sd3_controlnet_residuals_and_skipped_layers(controls: int) -> None:
    case, (theirs, ours) = CASES["sd3.5_medium"], pair("sd3.5_medium")
    sample, given = case.sample(2), case.conditions(2)
    plain = ours(sample, 9.0, **given)
    extra = {"block_controlnet_hidden_states": [draw(2, 30, 64, seed=20 + i) for i in range(controls)]}
    for more in (extra, {"skip_layers": [1]}, {**extra, "skip_layers": [0, 2]}):
        got = ours(sample, 9.0, **given, **more)
        assert error(got, theirs_out(theirs, sample, 9.0, **given, **more)) <= FP32
        assert error(got, plain) > 0.01


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("controls", [1, 2, 3])
def test_flux_controlnet_residuals(controls: int, repeat: bool) -> None:
    case = flux(num_layers=4, num_single_layers=3)
    theirs = case.build()
    sample, given = case.sample(2), case.conditions(2)
    residuals = [draw(2, 120, 64, seed=20 + i) for i in range(2 * controls)]
    extra = {"controlnet_block_samples": residuals[:controls], "controlnet_single_block_samples": residuals[controls:],
             "controlnet_blocks_repeat": repeat}
    got = from_diffusers(theirs)(sample, 0.3, **given, **extra)
    assert error(got, theirs_out(theirs, sample, 0.3, **given, **extra)) <= FP32


def test_positions_matter() -> None:
    case, (theirs, ours) = CASES["flux_schnell"], pair("flux_schnell")
    sample, given = case.sample(1), case.conditions(1)
    moved = given | {"img_ids": positions(12, 10) * 2.5 + 1, "txt_ids": torch.arange(21.0).view(7, 3)}
    got = ours(sample, 0.5, **moved)
    assert error(got, theirs_out(theirs, sample, 0.5, **moved)) <= FP32
    assert error(got, ours(sample, 0.5, **given)) > 0.01
    batched = {k: v[None] if k.endswith("ids") else v for k, v in given.items()}  # diffusers' former form
    assert torch.equal(ours(sample, 0.5, **batched), ours(sample, 0.5, **given))


SD3_MEDIUM = {"num_layers": 2, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
FULL = {
    "sd3": Case("SD3Transformer2DModel", SD3_MEDIUM | {"joint_attention_dim": 4096, "pooled_projection_dim": 2048}),
    "sd3.5_medium": Case("SD3Transformer2DModel", SD3_MEDIUM | {
        "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
        "dual_attention_layers": (0,), "pos_embed_max_size": 384}),
    "flux": Case("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 4096,
                                            "pooled_projection_dim": 768, "guidance_embeds": True, "in_channels": 64}),
}


@pytest.mark.parametrize("name", FULL)
def test_one_block_of_full_width(name: str) -> None:
    """One block of each kind at the published widths; SD 3's second is the last, in which the text ends."""
    case = FULL[name]
    theirs = filled(lambda: case.build(lambda m: m), 0)
    for table in theirs.buffers():  # SD 3's positions
        table.copy_(draw(*table.shape, seed=9))
    sample, given = case.sample(1, (6, 8)), case.conditions(1, (6, 8))
    expected = theirs_out(theirs, sample, case.timestep, **given)
    assert error(from_diffusers(theirs)(sample, case.timestep, **given), expected) <= FP32


@pytest.mark.parametrize("name, arguments, message", [
    ("sd3", {"sample": draw(2, 15, 8, 8)}, r"sample has shape \(2, 15, 8, 8\), needs \(pictures, 16, height, width\)"),
    ("sd3", {"sample": draw(2, 16, 8, 26)}, "sample has 4x13 patches of 2x2 latents, this model knows positions for"),
    ("sd3", {"sample": draw(3, 16, 8, 8)}, "sample has 3 pictures, the conditions were given for 2"),
    ("sd3", {"pooled_projections": None}, r"pooled_projections has shape None, needs \(2, 20\)"),
    ("sd3", {"encoder_hidden_states": draw(2, 5, 23)}, r"needs \(pictures, tokens, 24\)"),
    ("sd3", {"block_controlnet_hidden_states": [draw(2, 3, 64)]}, r"shape \(2, 3, 64\) where \(2, 30, 64\) is needed"),
    ("sd3", {"joint_attention_kwargs": {"ip_adapter_image_embeds": 1}}, "joint_attention_kwargs"),
    ("flux_dev", {"guidance": None}, "guidance has shape None"),
    ("flux_schnell", {"guidance": torch.ones(2)}, "no guidance embedding"),
    ("flux_dev", {"img_ids": None}, r"img_ids has shape None, needs \(tokens, 3\)"),
    ("flux_dev", {"txt_ids": torch.zeros(6, 3)}, r"txt_ids has shape \(6, 3\), needs \(7, 3\)"),
    ("flux_dev", {"img_ids": positions(12, 9)}, "sample has 120 tokens, img_ids has positions for 108"),
    ("flux_dev", {"sample": draw(2, 120, 17)}, r"needs \(pictures, tokens, 16\)"),
    ("flux_dev", {"controlnet_block_samples": [draw(2, 3, 64)]}, "controlnet samples: shape"),
])
def test_wrong_calls(name: str, arguments: dict, message: str) -> None:
    case, (_, ours) = CASES[name], pair(name)
    call = {"sample": case.sample(2), "timestep": case.timestep, **case.conditions(2)} | arguments
    with pytest.raises(LdmfastError, match=message) as caught:
        ours(**call)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ShapeError) or name == "sd3"


@pytest.mark.parametrize("case, message", [
    (sd3(caption_projection_dim=32), "caption_projection_dim"), (sd3(pos_embed_max_size=1 << 16), "pos_embed_max_size"),
    (sd3(num_layers=0), "num_layers"), (sd3(qk_norm="layer_norm"), "qk_norm"), (sd3(num_layers=1 << 19), "num_layers"),
    (flux(axes_dims_rope=(4, 6, 8)), "axes_dims_rope"), (flux(axes_dims_rope=(5, 5, 6)), "axes_dims_rope"),
    (flux(num_single_layers=1 << 19), "num_single_layers"), (flux(attention_head_dim=0), "attention_head_dim"),
])
def test_wrong_configs(case: Case, message: str) -> None:
    from ldmfast.models import REGISTRY

    with pytest.raises(CheckpointError, match=message):
        REGISTRY[case.kind][0].from_dict(case.config)
