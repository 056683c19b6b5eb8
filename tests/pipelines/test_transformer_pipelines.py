"""DiT and PixArt: whole calls against diffusers' pipelines on the same folders, in fp32, to 1e-4."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformer_folders as folders

import ldmfast
from ldmfast.errors import LdmfastError, ShapeError

LIMIT = 1e-4
AS_GIVEN = {"use_resolution_binning": False, "clean_caption": False}  # cleaning needs packages of its own


def worst(a, b) -> float:
    return float(np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).max())


def pair(tmp_path_factory, pipe):
    folder = tmp_path_factory.mktemp(type(pipe).__name__)
    pipe.save_pretrained(folder)
    return pipe, ldmfast.Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return pair(tmp_path_factory, folders.dit())


@pytest.fixture(scope="module")
def alpha(tmp_path_factory):
    """With micro-conditions, which diffusers' pipeline gives to networks of 128 x 128 latents."""
    return pair(tmp_path_factory, folders.pixart(sample_size=128))


@pytest.fixture(scope="module")
def sigma(tmp_path_factory):
    return pair(tmp_path_factory, folders.pixart(sigma=True))


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


@pytest.mark.parametrize("call", [{}, {"guidance_scale": 1.0, "num_inference_steps": 5}])
def test_dit(dit, call) -> None:
    theirs, ours = dit
    expected = theirs([7, 999, 7], generator=seeds(1, 2, 3), output_type="np", **call).images
    got = ours(class_labels=[7, 999, 7], generator=[1, 2, 3], solver="ddim", output_type="np", progress=False, **call)
    assert expected.std() > 0.05
    assert worst(got.images, expected) <= LIMIT
    assert [row["class_label"] for row in got.settings] == [7, 999, 7]
    again = ours.repeat(got.settings[1], progress=False).images[0]
    assert np.array_equal(np.asarray(again), (got.images[1] * 255).round().astype("uint8"))


@pytest.mark.parametrize("config, sigmas", [
    ({"shift": 2.0}, None),  # time runs from noise to data, the velocity is noise - data
    ({"invert_sigmas": True}, None),  # SiT: from 0 to 1, data - noise
    ({"invert_sigmas": True, "num_train_timesteps": 1}, [1.0, 0.8, 0.5, 0.2]),  # and t itself is what it is told
], ids=["flow", "sit", "sit_unit_time"])
def test_a_dit_that_predicts_a_velocity(config, sigmas, tmp_path_factory) -> None:
    """Against a loop of diffusers' own scheduler and network, whose pipeline takes noise predictions only."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs, ours = pair(tmp_path_factory, folders.dit(FlowMatchEulerDiscreteScheduler(**config)))
    scheduler, net, labels = theirs.scheduler, theirs.transformer, torch.tensor([7, 999])
    scheduler.set_timesteps(sigmas=sigmas) if sigmas else scheduler.set_timesteps(6)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            classes = torch.cat([torch.full((2,), 1000), labels])
            both = net(torch.cat([x, x]), timestep=t.expand(4), class_labels=classes, return_dict=False)[0][:, :4]
            uncond, cond = both.chunk(2)
            x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x, return_dict=False)[0]
    steps = {"sigmas": sigmas} if sigmas else {"num_inference_steps": 6}
    got = ours(class_labels=[7, 999], latents=noise, guidance_scale=3.0, output_type="latent", progress=False, **steps)
    assert worst(got.images, x) <= LIMIT * float(x.abs().max()) and got.settings[0]["solver"] == "flow_euler"


@pytest.mark.parametrize("call", [
    {"prompt": "a red cat", "height": 64, "width": 96},
    {"prompt": ["a red cat", "TWO dogs on the moon "], "negative_prompt": "blurry", "num_inference_steps": 4,
     "num_images_per_prompt": 2, "height": 64, "width": 64},
    {"prompt": "a very wide view of the moon", "guidance_scale": 1.0, "num_inference_steps": 3, "height": 48,
     "width": 80, "max_sequence_length": 20},
])
def test_pixart_alpha(alpha, call) -> None:
    theirs, ours = alpha
    count = (2 if isinstance(call["prompt"], list) else 1) * call.get("num_images_per_prompt", 1)
    expected = theirs(**call, generator=seeds(*range(count)), output_type="np", **AS_GIVEN).images
    got = ours(**call, generator=list(range(count)), output_type="np", use_resolution_binning=False, progress=False)
    assert expected.std() > 0.05
    assert worst(got.images, expected) <= LIMIT


def test_pixart_sigma(sigma) -> None:
    theirs, ours = sigma
    call = {"prompt": ["a red cat", "an old house in rain"], "num_inference_steps": 5, "output_type": "np"}
    expected = theirs(**call, generator=seeds(3, 4), **AS_GIVEN).images
    assert worst(ours(**call, generator=[3, 4], progress=False).images, expected) <= LIMIT


def test_prompt_embeddings_of_diffusers(sigma) -> None:
    """Padded embeddings with masks, as diffusers' encode_prompt gives them."""
    theirs, ours = sigma
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    with torch.no_grad():
        given = dict(zip(names, theirs.encode_prompt("two dogs", negative_prompt="a house")))
    call = {"num_inference_steps": 3, "output_type": "np", **given}
    expected = theirs(**call, negative_prompt=None, generator=seeds(3), **AS_GIVEN).images
    assert worst(ours(**call, generator=3, progress=False).images, expected) <= LIMIT
    with pytest.raises(ShapeError, match="negative_prompt_attention_mask"):
        ours(**call | {"negative_prompt_attention_mask": None})


def test_resolution_binning(tmp_path) -> None:
    theirs = folders.pixart(sample_size=32)
    theirs.save_pretrained(tmp_path)
    ours = ldmfast.Pipeline.from_pretrained(tmp_path)
    call = {"prompt": "a cat", "num_inference_steps": 2, "height": 208, "width": 120, "output_type": "np"}
    expected = theirs(**call, generator=seeds(3), clean_caption=False).images
    got = ours(**call, generator=3, progress=False)
    assert expected.shape == got.images.shape == (1, 208, 120, 3)
    assert worst(got.images, expected) <= LIMIT
    assert (got.settings[0]["height"], got.settings[0]["width"]) == (208, 120)


def test_a_prompt_is_encoded_once(sigma) -> None:
    """Equal prompts of later calls, and in every precision, come from the encoder's cache; other texts do not."""
    _, ours = sigma
    encoder = ours.components["text_encoder"]
    runs = []
    handle = encoder.register_forward_pre_hook(lambda module, args: runs.append(args[0].shape[1]))
    call = {"num_inference_steps": 1, "output_type": "latent", "progress": False, "generator": 1}
    first = ours("a painting of dogs", negative_prompt="rain", **call).images
    assert runs == [5, 2]  # its own tokens and </s>, no padding
    assert torch.equal(ours("a painting of dogs", negative_prompt="rain", **call).images, first)
    assert runs == [5, 2]
    assert not torch.equal(ours("a painting of a cat", negative_prompt="rain", **call).images, first)
    assert runs == [5, 2, 6]
    handle.remove()


def test_a_long_prompt_is_cut_with_a_warning(sigma) -> None:
    theirs, ours = sigma
    call = {"prompt": "a red cat on the moon", "num_inference_steps": 2, "max_sequence_length": 4, "output_type": "np"}
    expected = theirs(**call, generator=seeds(3), **AS_GIVEN).images
    with pytest.warns(UserWarning, match="cut off: 'on the moon'"):
        got = ours(**call, generator=3, progress=False).images
    assert worst(got, expected) <= LIMIT


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_lower_precisions_run(alpha, dit, precision) -> None:
    """Near the exact picture: a wrong layer would be as far away as another seed."""
    for (_, exact), call in ((alpha, {"prompt": "a red cat", "height": 64, "width": 64}), (dit, {"class_labels": [3]})):
        low = ldmfast.Pipeline.from_pretrained(exact.source, precision=precision)
        call |= {"num_inference_steps": 4, "output_type": "latent", "progress": False, "guidance_scale": 1.0}
        wanted, other = exact(**call, generator=1).images, exact(**call, generator=2).images
        error = (low(**call, generator=1).images.float() - wanted).norm() / (other - wanted).norm()
        assert 0 < error < 0.1


def test_bad_calls(dit, sigma) -> None:
    _, ours = dit
    with pytest.raises(LdmfastError, match="class_labels from 0 to 999"):
        ours(num_inference_steps=1)
    with pytest.raises(LdmfastError, match="leave the range 0 to 999"):
        ours(class_labels=[1000])
    with pytest.raises(LdmfastError, match="has no text encoder"):
        ours("a cat", class_labels=[1])
    with pytest.raises(ShapeError, match="height=72 is not a positive multiple of 16"):
        sigma[1]("a cat", height=72)
    with pytest.raises(LdmfastError, match="max_sequence_length=0"):
        sigma[1]("a cat", max_sequence_length=0)


def test_t5_is_stored_in_8_bits(sigma) -> None:
    """The blocks' linears in int8 with a scale a row, everything else in bf16; states are as near as the weights are:
    each is within half a step of its row, 1 / 254 of the row's largest."""
    exact, bf16, eight = (ldmfast.Pipeline.from_pretrained(sigma[1].source, precision=p).loaded.text_encoders[0]
                          for p in ("exact", "bf16", "int8"))
    kept = dict(eight.model.named_parameters())
    linears = {n for n, m in exact.model.encoder.block.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {n for n, p in kept.items() if p.dtype == torch.int8} == {f"encoder.block.{n}.weight" for n in linears}
    assert all(p.dtype in (torch.int8, torch.bfloat16) for p in kept.values())
    for name in linears:
        layer, weight = (e.model.encoder.block.get_submodule(name) for e in (eight, exact))
        weight = weight.weight
        step = layer.scale[:, None] / 2
        # the stored weights are those of bf16, whose rounding is 2^-9
        off = (layer.weight.float() * layer.scale[:, None] - weight).abs()
        assert bool((off <= step * 1.001 + weight.abs() * 2**-8).all())
    wanted, low, found = (e.encode(["a red cat", "two dogs on the moon"], 40) for e in (exact, bf16, eight))
    assert torch.equal(found.mask, wanted.mask) and found.states.dtype == torch.bfloat16

    def error(embeds) -> float:
        return float((embeds.states.float() - wanted.states).norm() / wanted.states.norm())

    assert 0 < error(found) <= 3 * error(low) + 0.01
