"""The shipped model: diffusers loads the same folder and draws the same pictures."""

from __future__ import annotations

import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import ldmfast

FOLDER = Path(ldmfast.__file__).parent / "assets" / "tiny"
CAPTIONS = ["a red circle above a blue square", "three yellow rings on a gray background",
            "a purple triangle left of a green circle", "something else entirely, 12 words!"]


def psnr(a, b) -> float:
    mse = float(np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2))
    return math.inf if mse == 0 else 10 * math.log10(1 / mse)


@pytest.fixture(scope="module")
def theirs():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def tiny():
    return ldmfast.Pipeline.tiny()


def test_diffusers_draws_the_same_pictures(theirs, tiny):
    call = {"prompt": CAPTIONS, "num_inference_steps": 20, "guidance_scale": 4.0, "output_type": "np"}
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    expected = theirs(**call, generator=[torch.Generator().manual_seed(s) for s in range(4)]).images
    got = tiny(**call, generator=[0, 1, 2, 3], solver="ddim", progress=False).images
    values = [psnr(a, b) for a, b in zip(got, expected)]
    print("PSNR against diffusers, DDIM 20 steps, dB:", [round(v, 1) for v in values])
    assert min(values) >= 40, values
    assert np.abs(got - expected).max() <= 1e-3, "far below 40 dB of error is expected in fp32"


DETERMINISTIC = ("ddim", "euler", "heun", "lms", "pndm", "dpmpp_2m", "dpm2", "unipc", "deis")


def test_every_solver_goes_to_the_same_picture(tiny):
    """All deterministic solvers integrate one ODE: with more steps each comes nearer to DDIM's 250-step picture.
    The stochastic ones have no such limit; they must give a finite picture that is not flat."""

    def draw(solver: str, steps: int):
        return tiny(CAPTIONS[0], generator=5, num_inference_steps=steps, solver=solver, output_type="np",
                    progress=False).images[0]

    reference = draw("ddim", 250)
    found = {s: (psnr(draw(s, 6), reference), psnr(draw(s, 60), reference)) for s in DETERMINISTIC}
    print("PSNR of 6 and 60 steps against DDIM with 250, dB:", found)
    assert all(many > few for few, many in found.values()), found
    for solver in set(ldmfast.samplers.SOLVERS) - set(DETERMINISTIC) - {"flow_euler", "flow_heun"}:
        image = draw(solver, 20)
        assert np.isfinite(image).all() and image.std() > 0.05, solver


def test_the_folder_is_small_and_loads_in_any_precision(tiny):
    size = sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file())
    assert size <= 12_000_000
    exact = tiny(CAPTIONS[0], generator=0, output_type="np", progress=False).images
    low = ldmfast.Pipeline.tiny(precision="bf16")(CAPTIONS[0], generator=0, output_type="np", progress=False).images
    assert psnr(low, exact) > 15
