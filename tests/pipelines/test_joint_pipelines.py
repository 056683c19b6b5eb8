"""SD 3 and FLUX: whole calls against diffusers' pipelines on the same folders, in fp32, to 1e-4."""

from __future__ import annotations

from dataclasses import replace

import joint_folders as folders
import numpy as np
import pytest
import torch

import ldmfast
from ldmfast.caches import TaylorSeer
from ldmfast.errors import CheckpointError, LdmfastError
from ldmfast.pipelines.flux import FluxPipeline
from ldmfast.pipelines.load import ASSETS
from ldmfast.tuning import Promise, Settings
from ldmfast.tuning.settings import conditions, identity

LIMIT = 1e-4


def worst(a, b) -> float:
    return float(np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).max())


def pair(tmp_path_factory, pipe):
    folder = tmp_path_factory.mktemp(type(pipe).__name__)
    pipe.save_pretrained(folder)
    return pipe, ldmfast.Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return pair(tmp_path_factory, folders.sd3())


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return pair(tmp_path_factory, folders.flux())


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def embeds(width: int, pooled: int, tokens: int = 9) -> dict:
    g = torch.Generator().manual_seed(8)
    drawn = [torch.randn(2, tokens, width, generator=g), torch.randn(2, pooled, generator=g)]
    return {f"{p}{k}": x * s for p, s in (("", 1.0), ("negative_", 0.5))
            for k, x in zip(("prompt_embeds", "pooled_prompt_embeds"), drawn)}


SHORT = {"max_sequence_length": 16, "num_inference_steps": 5}
SD3_CALLS = {
    "two": {"prompt": ["a red cat", "two dogs"], "negative_prompt": ["blurry", "rain"], "height": 64, "width": 80,
            **SHORT},
    "texts": {"prompt": "a cat", "prompt_2": "a red cat", "prompt_3": "the old moon in rain",
              "negative_prompt_2": "dogs", "negative_prompt_3": "very blurry", "guidance_scale": 3.0, **SHORT},
    "unguided": {"prompt": "a cat", "guidance_scale": 1.0, "sigmas": [1.0, 0.7, 0.2], "max_sequence_length": 8},
    "skip_layers": {"prompt": "a cat", "skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.7,
                    "skip_layer_guidance_start": 0.1, "clip_skip": 1, **SHORT},
    "embeds": {**embeds(80, 64), "num_inference_steps": 3},
}


@pytest.mark.parametrize("name", SD3_CALLS)
def test_sd3(sd3, name) -> None:
    theirs, ours = sd3
    call = SD3_CALLS[name]
    pictures = 2 if name in ("two", "embeds") else 1
    expected = theirs(**call, generator=seeds(*range(5, 5 + pictures)), output_type="np").images
    got = ours(**call, generator=list(range(5, 5 + pictures)), output_type="np", progress=False)
    assert expected.std() > 0.05
    assert worst(got.images, expected) <= LIMIT


@pytest.mark.parametrize("name, value", [("true_cfg_scale", 2.0), ("negative_prompt_2", "dogs"),
                                         ("cache", TaylorSeer(interval=2, on="output"))])
def test_a_promise_of_flux_is_for_the_measured_arguments(flux, name, value) -> None:
    _, ours = flux
    call = {"negative_prompt": "a cat", "true_cfg_scale": 1.5, "height": 64, "width": 64, "max_sequence_length": 8,
            "generator": 0, "progress": False, "output_type": "latent"}
    made = ours("two dogs", num_inference_steps=2, **call).settings
    tuned = Settings(steps=2, promise=Promise(
        measure="psnr", limit=30.0, bound=31.0, mean=33.0, worst=24.0, held_out=20, new=100, confidence=0.95, share=0.9,
        share_bound=0.7, one=25.0, finalists=1, speedup=2.0, made=conditions(made[0])))
    tuned = replace(tuned, model=identity(ours), version=ldmfast.__version__, device="cpu")
    assert ours("the moon", settings=tuned, **call).report.promise == str(tuned.promise)
    told = ours("the moon", settings=tuned, **call | {name: value}).report.promise
    assert told.startswith(f"nothing: tuned with {name} ")


def test_sd3_defaults(sd3) -> None:
    theirs, ours = sd3
    expected = theirs("a cat", generator=torch.Generator().manual_seed(3), output_type="np").images
    got = ours("a cat", generator=torch.Generator().manual_seed(3), output_type="np", progress=False)
    assert worst(got.images, expected) <= LIMIT
    assert got.settings[0]["num_inference_steps"] == 28 and got.settings[0]["guidance_scale"] == 7.0


def test_sd3_without_t5_and_with_a_shift_that_follows_the_size(tmp_path_factory) -> None:
    theirs, ours = pair(tmp_path_factory, folders.sd3(with_t5=False, dynamic=True))
    for extra in ({}, {"mu": 0.9, "height": 80, "width": 48}):
        call = {"prompt": "a cat", "num_images_per_prompt": 2, "output_type": "np", **SHORT, **extra}
        expected = theirs(**call, generator=torch.Generator().manual_seed(1)).images
        got = ours(**call, generator=torch.Generator().manual_seed(1), progress=False).images
        assert worst(got, expected) <= LIMIT


FLUX_CALLS = {
    "two": {"prompt": ["a red cat", "two dogs"], "height": 64, "width": 96, **SHORT},
    "true_cfg": {"prompt": "a cat", "prompt_2": "a red cat", "negative_prompt": "blurry",
                 "negative_prompt_2": "old rain", "true_cfg_scale": 3.0, "guidance_scale": 1.5, "height": 64,
                 "width": 64, **SHORT},
    "sigmas": {"prompt": "a cat", "true_cfg_scale": 3.0, "sigmas": [1.0, 0.6, 0.3], "height": 96, "width": 64,
               "max_sequence_length": 8},
    "embeds": {**embeds(24, 32), "true_cfg_scale": 2.0, "num_inference_steps": 3, "height": 64, "width": 64},
}


@pytest.mark.parametrize("name", FLUX_CALLS)
def test_flux(flux, name) -> None:
    theirs, ours = flux
    call = FLUX_CALLS[name]
    pictures = 2 if name in ("two", "embeds") else 1
    expected = theirs(**call, generator=seeds(*range(5, 5 + pictures)), output_type="np").images
    got = ours(**call, generator=list(range(5, 5 + pictures)), output_type="np", progress=False)
    assert expected.std() > 0.05
    assert worst(got.images, expected) <= LIMIT


def test_flux_schnell_latents_in_and_out(tmp_path_factory) -> None:
    theirs, ours = pair(tmp_path_factory, folders.flux(guidance=False))
    start = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(2))
    call = {"prompt": "a cat", "latents": start, "height": 64, "width": 64, "output_type": "latent",
            "num_inference_steps": 4, "max_sequence_length": 16}
    expected, got = theirs(**call).images, ours(**call, progress=False).images
    assert got.shape == expected.shape and worst(got, expected) <= LIMIT * float(expected.abs().max())


@pytest.mark.parametrize("which", ["sd3", "flux"])
def test_pictures_do_not_depend_on_their_batch_and_can_be_repeated(which, request) -> None:
    _, ours = request.getfixturevalue(which)
    call = {"height": 64, "width": 64, "progress": False, **SHORT}
    both = ours(["a red cat", "two dogs"], negative_prompt="rain", generator=[5, 6], output_type="np", **call)
    alone = ours("two dogs", negative_prompt="rain", generator=6, output_type="np", **call)
    assert np.array_equal(both.images[1], alone.images[0])
    again = ours.repeat(both.settings[1], progress=False).images[0]
    assert np.array_equal(np.asarray(again), (both.images[1] * 255).round().astype("uint8"))
    assert set(ours.components) >= {"transformer", "vae", "scheduler", "text_encoder", "tokenizer_2"}


@pytest.mark.parametrize("which", ["sd3", "flux"])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_lower_precisions_stay_near(which, precision, request) -> None:
    _, ours = request.getfixturevalue(which)
    low = ldmfast.Pipeline.from_pretrained(ours.source, precision=precision)
    call = {"prompt": "a red cat", "height": 64, "width": 64, "generator": 5, "output_type": "np", "progress": False}
    a, b = ours(**call, **SHORT).images, low(**call, **SHORT).images
    assert 0 < float(np.sqrt(np.square(a - b).mean())) < 0.03


def test_quantize_writes_a_file_that_loading_finds(sd3, tmp_path) -> None:
    """The denoiser is under its own part's name, and its table of positions, a buffer, is in the file, too."""
    import shutil

    folder = tmp_path / "sd3"
    shutil.copytree(sd3[1].source, folder)
    report = ldmfast.quantization.quantize(folder, prompts=["a cat"], steps=3, progress=False)
    assert report.file.parent == folder / "transformer" and report.plan.sqnr
    assert "transformer_blocks.0.attn.to_added_qkv" in report.plan.sqnr
    call = {"prompt": "a red cat", "generator": 5, "output_type": "np", "progress": False, **SHORT}
    stored = ldmfast.Pipeline.from_pretrained(folder, precision="int8")
    assert 0 < float(np.sqrt(np.square(stored(**call).images - sd3[1](**call).images).mean())) < 0.03


@pytest.mark.parametrize("which", ["sd3", "flux"])
def test_the_pipeline_accelerated_in_place(which, request, native_calls) -> None:
    theirs, _ = request.getfixturevalue(which)
    call = {"prompt": "a red cat", "height": 64, "width": 64, "output_type": "np", **SHORT}
    expected = theirs(**call, generator=torch.Generator().manual_seed(4)).images
    ldmfast.accelerate(theirs)
    got = theirs(**call, generator=torch.Generator().manual_seed(4)).images
    ldmfast.restore(theirs)
    assert worst(got, expected) <= LIMIT
    assert {type(theirs.transformer).__name__, "decoder"} <= set(native_calls)


@pytest.mark.parametrize("which, call, message", [
    ("sd3", {}, "no prompt was given"), ("sd3", {"prompt": ["a", "b"], "prompt_3": ["c"]}, "prompt_3 has 1 texts"),
    ("sd3", {"prompt": "a", "height": 60}, "height=60 is not a positive multiple of 16"),
    ("sd3", {"prompt": "a", "max_sequence_length": 513}, "more than 512"),
    ("sd3", {"prompt": "a", "skip_guidance_layers": [3]}, "skip_guidance_layers"),
    ("sd3", {"prompt": "a", "latents": torch.zeros(1, 4, 7, 8)}, r"latents are \(1, 4, 7, 8\)"),
    ("sd3", {"prompt_embeds": torch.zeros(1, 3, 80)}, "pooled_prompt_embeds"),
    ("sd3", {"prompt": ["a", "b"], "negative_prompt": ["c"] * 3}, "3 negative prompts were given for 2 prompts"),
    ("sd3", {"prompt": "a", "mu": 0.5}, "mu=0.5"),
    ("flux", {"prompt": "a", "height": 100}, "multiple of 16"), ("flux", {"prompt": 7}, "prompt is a int"),
    ("flux", {"prompt": "a", "output_type": "gif"}, "output_type"),
    ("flux", {"prompt": "a", "control_image": np.zeros((8, 8, 3))}, "network that takes no pictures"),
    ("flux", {"prompt": "a", "solver": "pndm"}, "this schedule is a rectified flow"),
])
def test_wrong_calls(which, call, message, request) -> None:
    _, ours = request.getfixturevalue(which)
    with pytest.raises(LdmfastError, match=message) as caught:
        ours(**call)
    assert "\n" not in str(caught.value)


def test_a_file_of_the_network_is_no_pipeline(flux, tmp_path) -> None:
    from safetensors.torch import save_file

    width = {"img_in.weight": (64, 16), "txt_in.weight": (64, 24), "vector_in.in_layer.weight": (64, 32),
             "final_layer.linear.weight": (16, 64), "double_blocks.0.img_attn.norm.query_norm.scale": (16,),
             "double_blocks.0.img_attn.qkv.weight": (192, 64)}
    save_file({k: torch.zeros(v) for k, v in width.items()}, tmp_path / "flux.safetensors")
    with pytest.raises(CheckpointError, match=r"holds a FluxTransformer2D without .*FluxTransformer2D.from_s"):
        ldmfast.Pipeline.from_single_file(tmp_path / "flux.safetensors")


def test_other_pipelines_of_the_families_are_refused(flux, tmp_path) -> None:
    import json
    import shutil
    from pathlib import Path

    shutil.copytree(flux[1].source, tmp_path / "fill")
    index = Path(tmp_path / "fill" / "model_index.json")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxInpaintPipeline"}))
    with pytest.raises(CheckpointError, match="a FluxInpaintPipeline is not supported"):
        ldmfast.Pipeline.from_pretrained(tmp_path / "fill")


def test_a_family_opens_its_own_folders_only(sd3) -> None:
    for folder, kind in ((ASSETS / "tiny", "StableDiffusionPipeline"), (sd3[1].source, "StableDiffusion3Pipeline")):
        with pytest.raises(CheckpointError, match=f"is no FluxPipeline but a {kind}; open it with"):
            FluxPipeline.from_pretrained(folder)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).random((height, width, 3))


@pytest.mark.parametrize("kind", ["FluxControlPipeline", "FluxFillPipeline"])
def test_flux_with_pictures(kind, tmp_path_factory) -> None:
    """Depth, Canny and Fill draw what diffusers does, in the same order of random numbers."""
    from PIL import Image

    theirs, ours = pair(tmp_path_factory, folders.flux(kind=kind))
    image = Image.fromarray((picture(64, 80) * 255).astype(np.uint8))
    mask = Image.fromarray(np.pad(np.full((30, 41), 255, np.uint8), ((10, 24), (9, 30))))
    given = {"image": image, "mask_image": mask} if kind == "FluxFillPipeline" else {"control_image": image}
    call = {"prompt": "a red cat", "height": 64, "width": 80, **SHORT, **given}
    expected = theirs(**call, generator=torch.Generator().manual_seed(5), output_type="np").images
    got = ours(**call, generator=5, output_type="np", progress=False)
    assert expected.std() > 0.05
    assert worst(got.images, expected) <= LIMIT
    assert not got.settings[0]["repeatable"]
    assert got.settings[0]["guidance_scale"] == (30.0 if kind == "FluxFillPipeline" else 3.5)
    with pytest.raises(LdmfastError, match="is needed by this network"):
        ours("a red cat")
