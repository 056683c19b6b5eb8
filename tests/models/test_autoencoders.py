"""Autoencoders against diffusers on the same random weights: every config, tiles, slices, quantisation."""

from __future__ import annotations

from functools import cache

import diffusers
import pytest
import torch
from model_cases import KLS, TINIES, VQS, draw, error, randomise, rms
from torch import nn

from ldmfast.errors import ShapeError
from ldmfast.models import AutoencoderKL, Model, Posterior, from_diffusers

FP32 = 1e-4  # of the output's RMS: the project's parity bound in exact precision


@cache
def pair(kind: str, name: str) -> tuple[nn.Module, Model]:
    configs = {"AutoencoderKL": KLS, "VQModel": VQS, "AutoencoderTiny": TINIES}[kind]
    theirs = randomise(getattr(diffusers, kind)(**configs[name]))
    return theirs, from_diffusers(theirs)


def latents(theirs: nn.Module, n: int, h: int, w: int) -> torch.Tensor:
    c = theirs.config
    return draw(n, getattr(c, "vq_embed_dim", None) or c.latent_channels, h, w)


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("n, h, w", [(1, 8, 8), (2, 7, 5), (0, 4, 4)])
def test_kl(name: str, n: int, h: int, w: int) -> None:
    theirs, ours = pair("AutoencoderKL", name)
    f = ours.config.downscale
    z, x = latents(theirs, n, h, w), draw(n, 3, h * f, w * f)
    picture, posterior = ours.decode(z), ours.encode(x)
    assert picture.shape == x.shape and posterior.mean.shape == z.shape
    if n:
        with torch.no_grad():
            assert error(picture, theirs.decode(z).sample) <= FP32
            expected = theirs.encode(x).latent_dist
        assert error(posterior.mean, expected.mean) <= FP32 and error(posterior.logvar, expected.logvar) <= FP32
        for seed in (0, 1):
            noise = (torch.Generator().manual_seed(seed) for _ in range(2))
            assert error(posterior.sample(next(noise)), expected.sample(next(noise))) <= FP32
        assert torch.equal(posterior.mode(), posterior.mean)


def test_kl_bfloat16_is_as_good_as_diffusers() -> None:
    theirs, _ = pair("AutoencoderKL", "sd")
    low = randomise(diffusers.AutoencoderKL(**KLS["sd"])).to(torch.bfloat16)
    ours = from_diffusers(theirs, precision="bf16")
    z, x = latents(theirs, 2, 8, 8), draw(2, 3, 32, 32)
    with torch.no_grad():
        exact, exact_mean = theirs.decode(z).sample, theirs.encode(x).latent_dist.mean
        allowed = 2 * rms(low.decode(z.bfloat16()).sample.float() - exact)
        allowed_mean = 2 * rms(low.encode(x.bfloat16()).latent_dist.mean.float() - exact_mean)
    assert rms(ours.decode(z).float() - exact) <= allowed
    assert rms(ours.encode(x).mean.float() - exact_mean) <= allowed_mean


def test_posterior_sampling() -> None:
    """One generator for the batch draws what diffusers draws; one a picture makes pictures independent."""
    moments = draw(3, 8, 4, 4) * 40
    posterior = Posterior(moments)
    assert posterior.logvar.min() == -30 and posterior.logvar.max() == 20
    single = [Posterior(moments[i:i + 1]).sample(torch.Generator().manual_seed(i)) for i in range(3)]
    together = posterior.sample([torch.Generator().manual_seed(i) for i in range(3)])
    assert torch.equal(together, torch.cat(single))
    with pytest.raises(ShapeError, match="2 generators for 3 pictures"):
        posterior.sample([torch.Generator(), torch.Generator()])


@pytest.mark.parametrize("h, w, tile", [(20, 20, 16), (33, 17, 16), (16, 40, 16), (5, 61, 8), (49, 49, 48)])
def test_tiles_match_diffusers(h: int, w: int, tile: int) -> None:
    """The same tiles and the same blending as diffusers' tiled_decode and tiled_encode, for any size."""
    theirs, ours = pair("AutoencoderKL", "sd")
    f = ours.config.downscale
    z, x = latents(theirs, 2, h, w), draw(2, 3, h * f, w * f)
    theirs.enable_tiling()
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = tile, tile * f
    with torch.no_grad():
        expected, moments = theirs.decode(z).sample, theirs.encode(x).latent_dist.parameters
    theirs.disable_tiling()
    assert error(ours.decode(z, tile=tile), expected) <= FP32
    assert error(ours.encode(x, tile=tile).moments, moments) <= FP32


def test_tiles_leave_no_seam() -> None:
    """Where tiles begin or end, no line of neighbouring pixels differs more than the roughest line of the
    untiled picture does."""
    _, ours = pair("AutoencoderKL", "sd")
    z = torch.nn.functional.interpolate(draw(1, 4, 6, 6), size=(40, 40), mode="bicubic")
    whole, tiles = ours.decode(z), ours.decode(z, tile=16)
    stride = 12 * ours.config.downscale  # a tile of 16 advances by 12
    for dim in (2, 3):
        plain, blended = whole.diff(dim=dim), tiles.diff(dim=dim)
        roughest = max(rms(line) for line in plain.unbind(dim))
        for border in range(stride, whole.shape[dim] - 1, stride):
            for at in (border - 1, border):
                assert rms(blended.select(dim, at)) <= roughest


def test_slices_equal_single_pictures() -> None:
    theirs, ours = pair("AutoencoderKL", "sd")
    z, x = latents(theirs, 3, 6, 10), draw(3, 3, 24, 40)
    assert torch.equal(ours.decode(z, slice=True), torch.cat([ours.decode(z[i:i + 1]) for i in range(3)]))
    assert torch.equal(ours.encode(x, slice=True).moments,
                       torch.cat([ours.encode(x[i:i + 1]).moments for i in range(3)]))
    assert torch.equal(ours.decode(z, slice=True, tile=8),
                       torch.cat([ours.decode(z[i:i + 1], tile=8) for i in range(3)]))
    assert error(ours.decode(z, slice=True), ours.decode(z)) <= FP32
    assert ours.decode(z[:0], slice=True, tile=4).shape == (0, 3, 24, 40)


@pytest.mark.parametrize("call, message", [
    (lambda m: m.decode(draw(1, 3, 8, 8)), r"latents have shape \(1, 3, 8, 8\), need \(pictures, 4, height, width\)"),
    (lambda m: m.decode(draw(4, 8, 8)), r"latents have shape \(4, 8, 8\)"),
    (lambda m: m.encode(draw(1, 4, 32, 32)), r"pictures have shape \(1, 4, 32, 32\)"),
    (lambda m: m.encode(draw(1, 3, 34, 32)), "pictures are 32x34, width and height must be multiples of 4"),
    (lambda m: m.decode(draw(1, 4, 32, 32), tile=3), "tile 3 leaves no whole overlap"),
    (lambda m: m.decode(draw(1, 4, 32, 32), tile=0), "tile 0 leaves no whole overlap"),
])
def test_wrong_shapes(call, message: str) -> None:
    _, ours = pair("AutoencoderKL", "sd")
    with pytest.raises(ShapeError, match=message) as caught:
        call(ours)
    assert "\n" not in str(caught.value)


def test_activations_stay_channels_last() -> None:
    _, ours = pair("AutoencoderKL", "sd")
    seen: list[str] = []
    wrong: list[str] = []

    def check(label: str):
        def hook(module, args, output):
            for x in [*args, output]:
                if isinstance(x, torch.Tensor) and x.ndim == 4 and "quant" not in label:
                    seen.append(label)
                    if not x.is_contiguous(memory_format=torch.channels_last):
                        wrong.append(label)
        return hook

    handles = [m.register_forward_hook(check(k)) for k, m in ours.named_modules()
               if k not in ("", "encoder", "decoder")]
    ours.decode(draw(2, 4, 8, 12))
    ours.encode(draw(2, 3, 32, 48))
    for handle in handles:
        handle.remove()
    assert len(seen) > 50 and not wrong


@pytest.mark.parametrize("name", VQS)
def test_vq(name: str) -> None:
    theirs, ours = pair("VQModel", name)
    f = ours.config.downscale
    z, x = latents(theirs, 2, 7, 5), draw(2, 3, 7 * f, 5 * f)
    with torch.no_grad():
        assert error(ours.encode(x), theirs.encode(x).latents) <= FP32
        codes = theirs.config.vq_embed_dim or theirs.config.latent_channels
        if theirs.config.norm_type == "spatial" and codes != theirs.config.latent_channels:
            return
        assert error(ours.decode(z), theirs.decode(z).sample) <= FP32
        free, expected = ours.decode(z, force_not_quantize=True), theirs.decode(z, force_not_quantize=True).sample
        assert error(free, expected) <= FP32
    assert error(ours.decode(z), free) > 0.01
    assert ours.decode(z[:0]).shape == (0, 3, 7 * f, 5 * f)


def test_vq_code_numbers() -> None:
    config = VQS["group"] | {"lookup_from_codebook": True}
    theirs = randomise(diffusers.VQModel(**config))
    ours = from_diffusers(theirs)
    codes = torch.randint(0, 64, (2, 6, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.decode(codes.flatten(), force_not_quantize=True, shape=(2, 6, 5, 3)).sample
    assert error(ours.decode(codes, force_not_quantize=True), expected) <= FP32
    with pytest.raises(ShapeError, match="code numbers have shape"):
        ours.decode(draw(2, 6, 5), force_not_quantize=True)


@pytest.mark.parametrize("name", TINIES)
def test_tiny(name: str) -> None:
    theirs, ours = pair("AutoencoderTiny", name)
    z, x = latents(theirs, 2, 7, 5) * 4, draw(2, 3, 28, 20)
    with torch.no_grad():
        assert error(ours.decode(z), theirs.decode(z).sample) <= FP32
        assert error(ours.encode(x), theirs.encode(x).latents) <= FP32
    assert error(ours.decode(z, slice=True), ours.decode(z)) <= FP32
    assert ours.encode(x[:0]).shape[0] == 0


def test_weights_are_shared() -> None:
    for kind, name in (("AutoencoderKL", "sd"), ("VQModel", "spatial"), ("AutoencoderTiny", "taesd")):
        theirs, ours = pair(kind, name)
        own = dict(ours.named_parameters())
        assert all(own[k].data_ptr() == p.data_ptr() for k, p in theirs.named_parameters())
        assert len(own) == len(list(theirs.parameters()))


def test_config_keeps_what_the_pipeline_needs() -> None:
    model = AutoencoderKL.from_config(KLS["attention_levels"] | {"scaling_factor": 0.5, "shift_factor": 0.25})
    c = model.config
    assert (c.scaling_factor, c.shift_factor, c.force_upcast) == (0.5, 0.25, True)
    assert c.latents_mean == (0.1, 0.2, 0.3, 0.4) and c.latents_std == (1.0, 2.0, 3.0, 4.0)
