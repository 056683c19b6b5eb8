"""PAG, SEG, SAG and skip-layer guidance: whole pictures against diffusers' pipelines on small random networks."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks.smoothed_energy_guidance_utils import _gaussian_blur_2d
from diffusers.pipelines.deprecated.stable_diffusion_sag import StableDiffusionSAGPipeline
from guidance_oracles import rows_of

import ldmfast
from ldmfast.caches import FORA, DeepCache
from ldmfast.engine import Engine, RecordedGraphs
from ldmfast.guidance import CFG, PAG, SAG, SEG, SkipLayer, from_settings
from ldmfast.guidance.perturb import attentions, grid
from ldmfast.guidance.seg import blur

sys.path.append(str(Path(__file__).parents[1] / "pipelines"))

import joint_folders
from pipeline_cases import make_sd

SHORT: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 4.0}
PROMPTS = ["a red circle above a blue square", "two green triangles"]
CALL: dict[str, Any] = {"num_inference_steps": 6, "generator": 4, "progress": False, "output_type": "latent"}


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def sd(request, tmp_path_factory) -> Any:
    pipe, folder = make_sd(prediction_type=request.param), tmp_path_factory.mktemp("sd")
    pipe.save_pretrained(folder)
    return pipe, ldmfast.Pipeline.from_pretrained(folder)


def compare(theirs: Any, ours: ldmfast.Pipeline, guidance: Any, call: dict[str, Any], extra: dict[str, Any]) -> None:
    theirs.set_progress_bar_config(disable=True)
    expected = theirs("a cat", **call, **extra, generator=torch.Generator().manual_seed(3)).images
    call = call | {"progress": False, "solver": None if ours.schedule.flow else "ddim"}
    found = ours("a cat", **call, guidance=guidance, generator=torch.Generator().manual_seed(3)).images
    plain = ours("a cat", **call, generator=torch.Generator().manual_seed(3)).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - plain).abs().max() > 1e-2


class BlurredQueries:
    """A diffusers attention processor: of the last third (or half) of the batch, diffusers' own blur of the queries."""

    def __init__(self, branches: int, sigma: float) -> None:
        self.branches, self.sigma = branches, sigma

    def __call__(self, attn: Any, x: torch.Tensor, **_: Any) -> torch.Tensor:
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        first = len(x) // self.branches * (self.branches - 1)
        width = min(math.ceil(6 * self.sigma) + 1 - math.ceil(6 * self.sigma) % 2, 5) if self.sigma < 1e4 else 0
        limit = 0.0 if self.sigma < 1e4 else math.inf  # theirs has the two cases the other way round
        q = torch.cat([q[:first], _gaussian_blur_2d(q[first:].clone(), width, self.sigma, limit)])
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[0](mixed)


@pytest.mark.parametrize("scale", [4.0, 1.0])
@pytest.mark.parametrize("layers, extra", [("mid", {}), (["down", "up_blocks.1"], {"pag_adaptive_scale": 0.002})],
                         ids=["mid", "several, adaptive"])
def test_pag_on_a_unet(sd, layers: Any, extra: dict[str, Any], scale: float) -> None:
    parts, ours = sd
    theirs = diffusers.StableDiffusionPAGPipeline(**parts.components, pag_applied_layers=layers,
                                                  requires_safety_checker=False)
    guidance = PAG(scale=2.5, layers=layers, adaptive_scale=extra.get("pag_adaptive_scale", 0.0))
    call = SHORT | {"guidance_scale": scale, "height": 64, "width": 64}
    compare(theirs, ours, guidance, call, {"pag_scale": 2.5, **extra})


@pytest.mark.parametrize("sigma", [0.8, math.inf])
def test_seg_on_a_unet(sd, sigma: float) -> None:
    parts, ours = sd
    theirs = diffusers.StableDiffusionPAGPipeline(**parts.components, requires_safety_checker=False)
    theirs.set_pag_applied_layers("mid", (BlurredQueries(3, sigma), BlurredQueries(2, sigma)))
    compare(theirs, ours, SEG(scale=2.5, sigma=sigma), SHORT | {"height": 64, "width": 64}, {"pag_scale": 2.5})


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_sag_on_a_unet(sd, scale: float) -> None:
    parts, ours = sd
    theirs = StableDiffusionSAGPipeline(**parts.components, requires_safety_checker=False)
    call = SHORT | {"guidance_scale": scale, "height": 64, "width": 64}
    compare(theirs, ours, SAG(scale=0.75), call, {"sag_scale": 0.75})


def test_pag_and_skipped_layers_on_sd3(tmp_path) -> None:
    """Blocks 1 and 2: the last, where the text ends, and one in the middle. Without norms of queries and keys, which
    diffusers' processor of PAG leaves out."""
    parts = joint_folders.sd3(with_t5=False)
    config = {**parts.transformer.config, "qk_norm": None, "dual_attention_layers": ()}
    parts.transformer = diffusers.SD3Transformer2DModel.from_config(config).eval()
    joint_folders.randomise(parts.transformer, 1)
    parts.transformer.proj_out.weight.data.mul_(0.3)
    parts.save_pretrained(tmp_path)
    ours = ldmfast.Pipeline.from_pretrained(tmp_path)
    needed = {k: v for k, v in parts.components.items() if k not in ("image_encoder", "feature_extractor")}
    theirs = diffusers.StableDiffusion3PAGPipeline(**needed, pag_applied_layers=["blocks.1", "blocks.2"])
    call = SHORT | {"height": 64, "width": 64, "max_sequence_length": 16}
    compare(theirs, ours, PAG(scale=2.5, layers=["blocks.1", "blocks.2"]), call, {"pag_scale": 2.5})
    old = ours("a cat", **call, generator=3, progress=False, skip_guidance_layers=[1], skip_layer_guidance_stop=0.9,
               skip_layer_guidance_start=0.1).images
    new = ours("a cat", **call, generator=3, progress=False, guidance=SkipLayer(layers=[1], start=0.1, stop=0.9)).images
    assert torch.equal(old, new)


def test_the_blur_is_diffusers() -> None:
    image = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = image.flatten(2).transpose(1, 2)
    for sigma, width in ((1.0, 7), (0.5, 3), (2.5, 9)):
        expected = _gaussian_blur_2d(rows.clone(), width, sigma, 0.0).transpose(1, 2).view_as(image)
        torch.testing.assert_close(blur(image, sigma, width), expected, rtol=0, atol=1e-6)
    assert grid(64, (8, 8)) == (8, 8) and grid(12, (5, 7)) == (3, 4) and grid(6, (8, 12)) == (2, 3)


@pytest.mark.parametrize("guidance, rows", [
    (PAG(stop=0.5), [3, 3, 3, 2, 2, 2]), ([CFG(scale=1.0), SEG()], [2] * 6), (SAG(), [2, 1] * 6),
    ([PAG(layers="up"), SEG(start=0.5)], [3, 3, 3, 4, 4, 4]),
    (SkipLayer(layers=(2,), stop=0.4), [2, 2, 1, 2, 1, 2, 2, 2]),
], ids=lambda v: str(v)[:30])
def test_forwards(tiny, guidance: Any, rows: list[int]) -> None:
    """What one batch can hold is one batch."""
    with rows_of(tiny["bf16"].unet) as seen:
        tiny["bf16"](PROMPTS[0], **CALL, guidance_scale=3.0, guidance=guidance)
    assert seen == rows


@pytest.mark.parametrize("guidance", [PAG(layers=["mid", "down"]), SEG(sigma=1.0), SAG(), SkipLayer(layers=3)], ids=str)
def test_batches_settings_and_caches(tiny, guidance: Any) -> None:
    """Exact pictures do not depend on their neighbours; a cache of interval 1 changes nothing; settings repeat."""
    call = CALL | {"guidance": guidance, "num_inference_steps": 4}
    both = tiny["exact"](PROMPTS, **call | {"generator": [4, 5]})
    alone = tiny["exact"](PROMPTS[1], **call | {"generator": [5]})
    assert torch.equal(both.images[1:], alone.images)
    cached = tiny["exact"](PROMPTS[1], **call | {"generator": [5]}, cache=FORA(interval=1))
    torch.testing.assert_close(cached.images, alone.images, rtol=0, atol=2e-5)
    deep = tiny["exact"](PROMPTS[1], **call | {"generator": [5]}, cache=DeepCache(interval=2))
    assert torch.isfinite(deep.images).all() and deep.report.reused["deep"] == 2
    assert from_settings(alone.settings[0]["guidance"]) == (guidance,) and alone.settings[0]["repeatable"]


def test_the_transformer_too_and_the_engine_steps_aside() -> None:
    pipe = ldmfast.Pipeline.tiny("dit")
    call = {"class_labels": [1], "num_inference_steps": 3, "generator": 0, "progress": False, "output_type": "latent"}
    if pipe.loaded.text_encoders:
        call = {"prompt": PROMPTS[0], "num_inference_steps": 3, "generator": 0, "progress": False,
                "output_type": "latent"}
    plain = pipe(**call).images
    given = PAG(layers="blocks.2"), SEG(layers="blocks.2"), SAG(layer="blocks.2"), SkipLayer(layers=2, stop=1.0)
    for guidance in given:
        assert (pipe(**call, guidance=guidance).images - plain).abs().max() > 1e-3
    for guidance, name in (PAG(), "PAG"), (SEG(), "SEG"):
        with pytest.raises(ldmfast.LdmfastError, match=f"^{name}: layers='mid' names none of the self-attentions"):
            pipe(**call, guidance=guidance)
    pipe.engine = Engine(RecordedGraphs())
    with pytest.warns(RuntimeWarning, match="runs eagerly.*changes the attention inside"):
        pipe(**call, guidance=PAG(layers="blocks.2"))


def test_layers_are_named_as_in_diffusers(sd) -> None:
    parts, ours = sd
    theirs = {n for n, m in parts.unet.named_modules() if n.endswith("attn1")}
    assert set(attentions(ours.unet)) == theirs
