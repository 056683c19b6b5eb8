"""What a caller has set in torch: pictures stay the same, bit for bit, and what comes back is an ordinary tensor."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

import ldmfast
from ldmfast.guidance import Minority
from ldmfast.models import from_diffusers
from ldmfast.samplers import Schedule, sample
from ldmfast.tuning import Settings


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES = {
    "float64": lambda: default_dtype(torch.float64), "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"), "with meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
CALLS = {  # a network, and a call that draws noise on the way
    "unet": {"solver": "euler_a", "image": PICTURE, "strength": 0.7, "prompt_weighting": True},
    "dit": {"guidance_scale": 2.0, "guidance": Minority(scale=0.1, start=0.4)},
    "lcm": {},  # a LoRA is loaded and fused
}


def draw(pipe, **call):
    return pipe("a (red:1.2) circle", **{"generator": 5, "num_inference_steps": 3, "output_type": "np",
                                         "progress": False, **call}).images


@pytest.fixture(scope="module", params=list(CALLS))
def drawn(request):
    pipe, call = ldmfast.Pipeline.tiny(request.param), CALLS[request.param]
    return request.param, pipe, call, draw(pipe, **call)


@pytest.mark.parametrize("mode", list(MODES))
def test_a_mode_of_the_caller_changes_no_picture(drawn, mode):
    """float64 as the default drew other noise; meta and autocast ended calls and loads in errors out of torch."""
    network, pipe, call, expected = drawn
    with MODES[mode]():
        there = draw(pipe, **call)
        loaded = ldmfast.Pipeline.tiny(network)
    assert np.array_equal(there, expected)
    assert np.array_equal(draw(loaded, **call), expected)


@pytest.mark.parametrize("mode", ["autocast", "meta"])
def test_a_model_alone_runs_under_a_mode(mode):
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    theirs = UNet2DModel(sample_size=8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                         up_block_types=("UpBlock2D",) * 2, layers_per_block=1, norm_num_groups=8)
    x = torch.randn(1, 3, 8, 8)
    for dtype in (None, torch.bfloat16):
        expected = from_diffusers(theirs, dtype)(x.to(dtype or x.dtype), 7)
        with MODES[mode]():
            found = from_diffusers(theirs, dtype)(x.to(dtype or x.dtype), 7)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["float64", "meta"])
@pytest.mark.parametrize("generator", [lambda: torch.Generator().manual_seed(1),
                                       lambda: [torch.Generator().manual_seed(1)]])
def test_a_sampler_alone_draws_its_noise_in_fp32(mode, generator):
    def run():
        return sample(lambda x, t, stage: 0.1 * x, x, schedule, solver="euler_a", steps=4, generator=generator())

    x, schedule = torch.ones(1, 4, 2, 2), Schedule.from_config({"_class_name": "EulerAncestralDiscreteScheduler"})
    expected = run()
    with MODES[mode]():
        assert torch.equal(run(), expected)


@pytest.mark.parametrize("output", ["pt", "latent"])
@pytest.mark.parametrize("network", ["unet", "dit"])
def test_what_comes_back_can_be_trained_on(network, output):
    """They were inference tensors, which autograd refuses; diffusers' are not."""
    images = draw(ldmfast.Pipeline.tiny(network), output_type=output)
    weight = torch.ones((), requires_grad=True)
    (images * weight).sum().backward()
    assert torch.allclose(weight.grad, images.sum())
    images[0].zero_()
    assert images.requires_grad_().is_leaf


def test_a_callback_may_take_gradients_and_write_in_place():
    pipe = ldmfast.Pipeline.tiny()

    def by_gradient(call, step, t, tensors):
        with torch.enable_grad():
            x = tensors["latents"].detach().requires_grad_()
            gradient, = torch.autograd.grad(0.125 * x.square().sum(), x)
        return {"latents": tensors["latents"] - gradient}

    def in_place(call, step, t, tensors):
        tensors["latents"].mul_(0.75)

    def replaced(call, step, t, tensors):
        return {"latents": tensors["latents"] * 0.75}

    plain, *changed = [draw(pipe, callback_on_step_end=c) for c in (None, by_gradient, in_place, replaced)]
    assert not np.array_equal(plain, changed[-1])
    assert np.array_equal(changed[1], changed[2]) and np.allclose(changed[0], changed[2], atol=1e-5)


def test_a_callback_has_the_callers_default_device():
    devices = []
    with default_device("meta"):
        draw(ldmfast.Pipeline.tiny(), callback_on_step_end=lambda *_: devices.append(torch.zeros(1).device.type))
    assert set(devices) == {"meta"}


@pytest.mark.parametrize("mode", ["float64", "meta"])
def test_a_certificate_is_the_same(mode):
    """certify made tensors of its own on the caller's device."""
    pipe = ldmfast.Pipeline.tiny()

    def report():
        return pipe.certify(["a red circle", "a ring"], Settings(precision="bf16", steps=2),
                            reference=Settings(steps=2), progress=False)

    expected = report()
    with MODES[mode]():
        found = report()
    assert found.psnr == expected.psnr and found.latent_error == expected.latent_error
