"""Bad input: one line that names the value and the way out, by a typed error, before any network runs."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import ldmfast
from ldmfast import CheckpointError, DeviceError, LdmfastError, PrecisionError, ShapeError

NAN = torch.full((1, 4, 8, 8), float("nan"))

BAD_CALLS = {
    "height not a multiple of 8": ({"height": 65}, ShapeError, "height=65.*64 or 72"),
    "width zero": ({"width": 0}, ShapeError, "width=0"),
    "width negative": ({"width": -64}, ShapeError, "width=-64"),
    "height fraction": ({"height": 64.5}, ShapeError, "64.5"),
    "negative steps": ({"num_inference_steps": -3}, LdmfastError, "num_inference_steps=-3"),
    "no steps": ({"num_inference_steps": 0}, LdmfastError, "num_inference_steps=0"),
    "fractional steps": ({"num_inference_steps": 2.5}, LdmfastError, "2.5"),
    "unknown solver": ({"solver": "dpmpp_2n"}, LdmfastError, "did you mean 'dpmpp_2m'"),
    "no prompt": ({"prompt": None}, LdmfastError, "prompt"),
    "prompt a number": ({"prompt": 3}, LdmfastError, "int"),
    "prompt list holds None": ({"prompt": ["a", None]}, LdmfastError, "prompt"),
    "empty prompt list": ({"prompt": []}, ShapeError, "empty"),
    "negative prompts of another count": ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, ShapeError, "2"),
    "guidance NaN": ({"guidance_scale": float("nan")}, LdmfastError, "guidance_scale"),
    "eta negative": ({"eta": -1}, LdmfastError, "eta"),
    "generators of another count": ({"generator": [1, 2]}, ShapeError, "2 generators.*1 picture"),
    "generator a truth value": ({"generator": True}, LdmfastError, "bool"),
    "generator a text": ({"generator": "7"}, LdmfastError, "generator"),
    "latents of another shape": ({"latents": torch.zeros(1, 4, 9, 8), "height": 64}, ShapeError, "latents"),
    "latents NaN": ({"latents": NAN}, LdmfastError, "NaN"),
    "output type": ({"output_type": "jpeg"}, LdmfastError, "'jpeg'.*pil"),
    "mask without image": ({"mask_image": np.zeros((64, 64))}, LdmfastError, "image"),
    "strength above one": ({"image": np.zeros((64, 64, 3)), "strength": 1.2}, LdmfastError, "strength=1.2"),
    "strength without image": ({"strength": 0.5}, LdmfastError, "strength"),
    "image a text": ({"image": "cat.png"}, LdmfastError, "image"),
    "image with NaN": ({"image": np.full((64, 64, 3), np.nan)}, LdmfastError, "NaN"),
    "image with 5 channels": ({"image": np.zeros((64, 64, 5))}, ShapeError, "5 channels"),
    "two images for one picture": ({"image": [np.zeros((64, 64, 3))] * 2}, ShapeError, "2 pictures"),
    "clip skip": ({"clip_skip": 9}, LdmfastError, "clip_skip=9"),
    "timesteps and sigmas": ({"timesteps": [900, 1], "sigmas": [3.0, 1.0]}, LdmfastError, "sigmas"),
    "rising timesteps": ({"timesteps": [1, 900]}, LdmfastError, "timesteps"),
    "far too large": ({"height": 8 * 10**12}, ShapeError, "8000000000000.*memory"),
    "no pictures": ({"num_images_per_prompt": 0}, LdmfastError, "num_images_per_prompt=0"),
    "prompt and embeddings": ({"prompt_embeds": torch.zeros(1, 77, 32)}, LdmfastError, "both"),
    "half a character": ({"prompt": "a \udcff"}, LdmfastError, r"prompt holds '\\udcff', half a character"),
    "height beyond 64 bits": ({"height": 8 * 10**30}, ShapeError, "height=8.* beyond any memory"),
    "height negative": ({"height": -8}, ShapeError, "height=-8 is not a positive multiple of 8: use 8"),
    "scale beyond a float": ({"guidance_scale": 10**400}, LdmfastError, "guidance_scale=1000.* finite"),
    "two scales": ({"guidance_scale": torch.ones(2)}, LdmfastError, "guidance_scale=.*not a finite number"),
    "two numbers of steps": ({"num_inference_steps": np.array([1, 2])}, LdmfastError, "not a whole number"),
    "table of timesteps": ({"timesteps": np.ones((2, 2))}, LdmfastError, "not a list of numbers"),
    "timestep beyond a float": ({"timesteps": [10**400]}, LdmfastError, "not a list of numbers"),
    "a billion pictures": ({"num_images_per_prompt": 10**9}, ShapeError, "1000000000 pictures.*65536 at most"),
    "generators hold a truth value": ({"generator": [True]}, LdmfastError, "holds a bool"),
    "sizes no pair": ({"original_size": 64}, LdmfastError, "original_size=64 is not a pair"),
    "crops of none": ({"crops_coords_top_left": None}, LdmfastError, "crops_coords_top_left=None is not a pair"),
    "target a fraction": ({"target_size": (64, 0.5)}, LdmfastError, "target_size=0.5 is not a whole number"),
    "callback no function": ({"callback_on_step_end": 5}, LdmfastError, "callback_on_step_end is a int"),
    "latents nowhere": ({"latents": torch.zeros(1, 4, 8, 8, device="meta")}, LdmfastError, "latents are .* on meta"),
    "latents complex": ({"latents": NAN.nan_to_num() + 0j}, LdmfastError, "latents are a torch.complex64"),
    "image of one dimension": ({"image": np.zeros(64)}, ShapeError, r"image has shape \(64,\)"),
    "image without pixels": ({"image": np.zeros((0, 0, 3))}, ShapeError, r"image has shape \(0, 0, 3\)"),
    "picture without pixels": ({"image": Image.new("RGB", (64, 0))}, ShapeError, r"image has shape \(0, 64, 3\)"),
    "image of words": ({"image": np.full((8, 8, 3), "a")}, LdmfastError, "image is an array of <U1"),
    "image nowhere": ({"image": torch.zeros(3, 8, 8, device="meta")}, LdmfastError, "image is a .* on meta"),
    "image counted to 255": ({"image": np.full((64, 64, 3), 200.0)}, LdmfastError, "reaches 200: give uint8"),
    "callback tensors": ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, LdmfastError, "latents"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(ours, name, monkeypatch):
    change, error, pattern = BAD_CALLS[name]
    monkeypatch.setattr(type(ours.unet), "forward", None)  # nothing heavy may run before the refusal
    with pytest.raises(error, match=pattern) as caught:
        ours(**{"prompt": "a cat", "num_inference_steps": 2, "progress": False, "generator": 0, **change})
    assert "\n" not in str(caught.value)


def test_missing_folder_and_parts(sd, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        ldmfast.Pipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError):
        ldmfast.Pipeline.from_single_file(tmp_path / "nowhere.safetensors")
    for part in ("unet", "vae", "tokenizer"):
        copy = tmp_path / part
        shutil.copytree(sd[1], copy)
        shutil.rmtree(copy / part)
        with pytest.raises(CheckpointError, match=part):
            ldmfast.Pipeline.from_pretrained(copy)


def test_text_encoder_of_another_class(sd, tmp_path):
    copy = tmp_path / "m"
    shutil.copytree(sd[1], copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["transformers", "T5EncoderModel"]}))
    with pytest.raises(CheckpointError, match=r"'text_encoder' is a T5EncoderModel.*CLIPTextModelWithProjection"):
        ldmfast.Pipeline.from_pretrained(copy)


@pytest.mark.parametrize("damage", ["truncated", "pickle", "empty", "lying config", "broken json", "unknown key"])
def test_damaged_folder(sd, tmp_path, damage):
    copy = tmp_path / "m"
    shutil.copytree(sd[1], copy)
    weights, config = copy / "unet" / "diffusion_pytorch_model.safetensors", copy / "unet" / "config.json"
    settings = json.loads(config.read_text())
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "pickle":
        torch.save({"x": torch.zeros(2)}, weights)
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "lying config":
        config.write_text(json.dumps(settings | {"block_out_channels": [32, 32]}))
    elif damage == "broken json":
        config.write_text(config.read_text()[:-20])
    else:
        config.write_text(json.dumps(settings | {"down_block_types": ["StrangeBlock2D", "DownBlock2D"]}))
    with pytest.raises(CheckpointError) as caught:
        ldmfast.Pipeline.from_pretrained(copy)
    assert "\n" not in str(caught.value)
    assert "unet" in str(caught.value) or "Strange" in str(caught.value)


def test_device_and_precision(sd):
    folder = sd[1]
    with pytest.raises(DeviceError, match="'tpu9'"):
        ldmfast.Pipeline.from_pretrained(folder, device="tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="no GPU"):
            ldmfast.Pipeline.from_pretrained(folder, device="cuda")
    with pytest.raises(PrecisionError, match="'int3'"):
        ldmfast.Pipeline.from_pretrained(folder, precision="int3")
    with pytest.raises(PrecisionError, match="contradict"):
        ldmfast.Pipeline.from_pretrained(folder, precision="exact", dtype=torch.bfloat16)
    with pytest.raises(PrecisionError, match="float16"):
        ldmfast.Pipeline.from_pretrained(folder, dtype=torch.float16)
    with pytest.raises(CheckpointError, match="fp8"):
        ldmfast.Pipeline.from_pretrained(folder, variant="fp8")


def test_a_long_prompt_is_cut_with_a_warning_that_shows_the_rest(ours, sd):
    prompt = "a cat " * 40 + "wearing a hat"
    with pytest.warns(UserWarning, match="wearing a hat"):
        got = ours(prompt, generator=1, num_inference_steps=2, output_type="np", solver="ddim", progress=False).images
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours("a cat", generator=1, num_inference_steps=2, output_type="np", progress=False)
    expected = sd[0](prompt, generator=torch.Generator().manual_seed(1), num_inference_steps=2,
                     output_type="np").images
    assert np.abs(got - expected).max() <= 1e-4


def test_nan_in_the_middle_is_named_with_step_and_module(sd):
    """A network that breaks at one step: the error names the step and the module, and no picture comes out."""
    pipe = ldmfast.Pipeline.from_pretrained(sd[1])
    module = pipe.unet.get_submodule("mid_block.resnets.0.conv1")
    calls = {"n": 0}

    inner = module.forward

    def spoil(x):
        calls["n"] += 1
        # the third step goes wrong, in the run itself (5 steps) and in the run that looks for the cause
        return inner(x) * float("nan") if calls["n"] in (3, 8) else inner(x)

    module.forward = spoil
    with pytest.raises(PrecisionError, match=r"step 3 of 5.*mid_block\.resnets\.0\.conv1"):
        pipe("a cat", generator=1, num_inference_steps=5, progress=False, solver="ddim")


def test_nan_in_the_decoder_is_named(sd):
    pipe = ldmfast.Pipeline.from_pretrained(sd[1])
    with torch.no_grad():
        pipe.vae.get_parameter("decoder.conv_in.bias").fill_(float("inf"))
    with pytest.raises(PrecisionError, match=r"decoder.*decoder\.conv_in"):
        pipe("a cat", generator=1, num_inference_steps=2, progress=False)


def _networks(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def _called(pipe, **call) -> list[str]:
    """Names of the modules without parts that a call runs, in order of their first run."""
    leaves = {f"{part}.{name}": m for part, model in _networks(pipe).items()
              for name, m in model.named_modules() if name and not list(m.children())}
    seen: dict[str, None] = {}
    for name, module in leaves.items():  # no hooks: where there are any, norms are not fused into convolutions
        module.forward = lambda *a, name=name, inner=module.forward, **k: (seen.setdefault(name), inner(*a, **k))[1]
    pipe(**call)
    for module in leaves.values():
        del module.forward
    return list(seen)


@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_nan_at_twenty_sites_is_named_every_time(precision, sd, picture):
    """Text encoders, the source's encoder, embeddings made once a call, the network's steps, the decoder: wherever one
    number becomes NaN, the error names that very module (embeddings and text encoders were not looked at before)."""
    pipe = ldmfast.Pipeline.from_pretrained(sd[1], precision=precision)
    call = {"prompt": "a cat", "image": picture, "strength": 0.9, "generator": 1, "num_inference_steps": 2,
            "progress": False, "solver": "euler"}
    called = _called(pipe, **call)
    sites = [called[i * (len(called) - 1) // 19] for i in range(20)]
    assert {name.split(".")[0] for name in sites} == set(_networks(pipe)) and len(set(sites)) == 20
    named = []
    for site in sites:
        part, _, inside = site.partition(".")
        module = _networks(pipe)[part].get_submodule(inside)

        def spoil(*args, inner=module.forward, **kwargs):
            out = inner(*args, **kwargs)
            out[(0, *(n // 2 for n in out.shape[1:]))] = float("nan")  # row 0: embeddings are padded to 16
            return out

        module.forward = spoil
        try:
            with pytest.raises(PrecisionError) as caught:
                pipe(**call)
        finally:
            del module.forward
        named.append(f"first in module '{site}'" in str(caught.value))
    print(f"{precision}: {sum(named)} of {len(sites)} sites named")
    assert all(named), [site for site, ok in zip(sites, named) if not ok]
    assert np.isfinite(np.asarray(pipe(**call).images[0])).all()


def test_png_without_settings(ours, tmp_path, picture):
    from ldmfast.pipelines import read_settings

    picture.save(tmp_path / "plain.png")
    picture.save(tmp_path / "photo.jpg")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n garbage")
    for name in ("plain.png", "photo.jpg", "broken.png", "none.png"):
        with pytest.raises(LdmfastError, match=name):
            read_settings(tmp_path / name)
    out = ours("a cat", generator=1, num_inference_steps=1, progress=False)
    with pytest.raises(LdmfastError, match=r"\.png"):
        out.save(tmp_path / "x.jpg")
    with pytest.raises(LdmfastError, match="does not exist"):
        out.save(tmp_path / "nowhere" / "x.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.png", "photo.jpg", "plain.png"]


@pytest.mark.parametrize("arguments, message", [
    ({"timesteps": 5}, "timesteps=5 is not a list of numbers"),
    ({"sigmas": "ab"}, "sigmas='ab' is not a list of numbers"),
    ({"clip_skip": "1"}, "clip_skip='1' is not a whole number"),
    ({"class_labels": 3}, "not class-conditional"),
    ({"callback_on_step_end_tensor_inputs": None}, "only .'latents'. is offered"),
    ({"negative_prompt_embeds": torch.zeros(1, 77, 32)}, "negative_prompt_embeds were given without prompt_embeds"),
    ({"prompt_attention_mask": torch.ones(1, 77)}, "prompt_attention_mask goes with the prompt_embeds of PixArt only"),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_what_a_network_has_no_use_for_is_said(ours, arguments, message):
    with pytest.raises(LdmfastError, match=message):
        ours("a cat", progress=False, **arguments)
