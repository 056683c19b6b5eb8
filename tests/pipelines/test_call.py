"""What a call promises beyond parity: seeds, batches, callbacks, cancelling, threads, repeating from a PNG."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import ldmfast
from ldmfast.pipelines import read_settings

FAST = {"num_inference_steps": 3, "progress": False, "output_type": "np"}


def test_a_picture_does_not_depend_on_its_batch(ours):
    """Exact mode, bit for bit: alone, in the middle of a batch, and with another batch around it."""
    alone = ours("a cat", generator=11, **FAST).images[0]
    batch = ours(["a dog", "a cat", "a very long sentence about a house"], generator=[1, 11, 3], **FAST).images
    other = ours(["a cat", "x"], generator=[11, 99], **FAST).images
    assert np.array_equal(batch[1], alone) and np.array_equal(other[0], alone)
    assert not np.array_equal(batch[0], alone)


def test_the_same_for_stochastic_solvers_and_image_to_image(ours, picture):
    for extra in ({"solver": "euler_a"}, {"solver": "dpmpp_2m_sde"}, {"image": picture, "solver": "ddim"}):
        alone = ours("a cat", generator=11, **FAST, **extra).images[0]
        batch = ours(["a dog", "a cat"], generator=[1, 11], **FAST, **extra).images
        assert np.array_equal(batch[1], alone), extra


def test_seeds_count_up_from_an_int(ours):
    batch = ours("a cat", num_images_per_prompt=3, generator=7, **FAST)
    assert [s["seed"] for s in batch.settings] == [7, 8, 9]
    assert np.array_equal(ours("a cat", generator=9, **FAST).images[0], batch.images[2])
    mixed = ours("a cat", num_images_per_prompt=2, generator=[8, torch.Generator().manual_seed(9)], **FAST)
    assert np.array_equal(mixed.images, batch.images[1:])


def test_no_generator_follows_torch_manual_seed(ours):
    torch.manual_seed(123)
    a = ours("a cat", **FAST)
    b = ours("a cat", **FAST)
    torch.manual_seed(123)
    c = ours("a cat", **FAST)
    assert np.array_equal(a.images, c.images) and not np.array_equal(a.images, b.images)
    assert np.array_equal(ours("a cat", generator=a.settings[0]["seed"], **FAST).images, a.images)


def test_given_latents_are_the_noise(ours):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert np.array_equal(ours("a cat", latents=noise, **FAST).images, ours("a cat", generator=5, **FAST).images)


def test_output_types_agree(ours):
    call = {k: v for k, v in FAST.items() if k != "output_type"} | {"generator": 3}
    array = ours("a cat", output_type="np", **call).images
    tensor = ours("a cat", output_type="pt", **call).images
    images = ours("a cat", output_type="pil", **call).images
    latents = ours("a cat", output_type="latent", **call).images
    assert array.shape == (1, 64, 64, 3) and latents.shape == (1, 4, 8, 8)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal(np.asarray(images[0]), np.rint(array[0] * 255).astype(np.uint8))
    pixels = ours.vae.decode(latents / ours.vae.config.scaling_factor)
    assert torch.equal((pixels * 0.5 + 0.5).clamp(0, 1), tensor)
    assert ours("a cat", return_dict=False, output_type="np", **call)[0].shape == array.shape


def test_sizes_other_than_the_networks_own(ours, sd):
    call = {"prompt": "a cat", "height": 104, "width": 72, "num_inference_steps": 2, "output_type": "np"}
    expected = sd[0](**call, generator=torch.Generator().manual_seed(1)).images
    got = ours(**call, generator=1, solver="ddim", progress=False).images
    assert got.shape == (1, 104, 72, 3) and np.abs(got - expected).max() <= 1e-4


def test_callback_sees_every_step_and_may_replace_the_latents(ours):
    seen = []

    def look(call, step, t, tensors):
        seen.append((step, t, tensors["latents"].clone()))
        return tensors

    base = ours("a cat", generator=1, callback_on_step_end=look, **FAST).images
    assert [s for s, _, _ in seen] == [0, 1, 2] and seen[0][1] > seen[1][1] > seen[2][1]
    assert np.array_equal(base, ours("a cat", generator=1, **FAST).images)
    replaced = ours("a cat", generator=1, **FAST | {"output_type": "latent"},
                    callback_on_step_end=lambda c, i, t, k: {"latents": torch.zeros_like(k["latents"])}).images
    assert torch.count_nonzero(replaced) == 0


@pytest.mark.parametrize("how", ["cancel", "_interrupt"])
def test_cancel_from_the_callback(ours, how):
    steps = []

    def stop(call, step, t, tensors):
        steps.append(step)
        if step == 1:
            if how == "cancel":
                call.cancel()
            else:
                call._interrupt = True
        return {}

    out = ours("a cat", generator=1, callback_on_step_end=stop, **FAST | {"num_inference_steps": 20})
    assert steps == [0, 1] and out.cancelled and np.isfinite(out.images).all()
    after = ours("a cat", generator=1, **FAST)
    assert not after.cancelled, "a cancelled call must not touch the next one"


def test_an_exception_in_the_callback_reaches_the_caller(ours):
    class Mine(Exception):
        pass

    def fail(*_):
        raise Mine

    with pytest.raises(Mine):
        ours("a cat", generator=1, callback_on_step_end=fail, **FAST)


def test_eight_threads_equal_serial(ours, picture, mask):
    """80 mixed calls from 8 threads on one pipeline, bit for bit what the same calls give one after another."""
    solvers = ["ddim", "euler", "dpmpp_2m", "unipc", "heun", "euler_a", "lms", "deis"]

    def call(i: int):
        extra = {}
        if i % 5 == 3:
            extra = {"image": picture, "strength": 0.7}
        elif i % 5 == 4:
            extra = {"image": picture, "mask_image": mask}
        return ours(["a cat", "a red house, oil"][: 1 + i % 2], generator=i, num_inference_steps=2 + i % 4,
                    solver=solvers[i % 8], height=(64, 72, 96)[i % 3], width=64, guidance_scale=(1.0, 4.0)[i % 7 > 1],
                    output_type="np", progress=False, **extra).images

    serial = [call(i) for i in range(80)]
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(call, range(80)))
    wrong = [i for i, (a, b) in enumerate(zip(serial, threaded)) if not np.array_equal(a, b)]
    assert wrong == []


def test_png_carries_the_settings_and_repeats_bit_for_bit(ours, tmp_path, picture):
    out = ours(["a cat", "ein Hündchen 犬"], negative_prompt="blurry", num_images_per_prompt=2, generator=5,
               num_inference_steps=3, height=72, solver="dpmpp_2m_sde", progress=False)
    files = out.save(tmp_path / "a.png")
    assert [f.name for f in files] == ["a-0.png", "a-1.png", "a-2.png", "a-3.png"]
    for file, image in zip(files, out.images):
        settings = read_settings(file)
        again = ours.repeat(settings, progress=False)
        assert np.array_equal(np.asarray(again.images[0]), np.asarray(image)), settings
    assert read_settings(files[3])["prompt"] == "ein Hündchen 犬" and read_settings(files[3])["seed"] == 8


def test_png_of_an_image_to_image_call_needs_the_same_source(ours, tmp_path, picture):
    out = ours("a cat", image=picture, strength=0.6, num_inference_steps=4, progress=False, generator=1)
    (file,) = out.save(tmp_path / "a.png")
    settings = read_settings(file)
    again = ours.repeat(settings, image=picture, progress=False)
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(out.images[0]))
    for wrong in (None, picture.rotate(90)):
        with pytest.raises(ldmfast.LdmfastError, match="image"):
            ours.repeat(settings, image=wrong, progress=False)


def test_bf16_batches_repeat_too(sd, tmp_path):
    pipe = ldmfast.Pipeline.from_pretrained(sd[1], precision="bf16")
    out = pipe("a cat", num_images_per_prompt=3, generator=5, num_inference_steps=3, progress=False)
    file = out.save(tmp_path / "a.png")[1]
    again = pipe.repeat(read_settings(file), progress=False)
    assert len(again.images) == 1 and np.array_equal(np.asarray(again.images[0]), np.asarray(out.images[1]))


def test_prompt_embeddings_instead_of_texts(ours, sd):
    from ldmfast.pipelines.text import encode_prompts

    embeds = encode_prompts(ours.loaded.text_encoders, ["a cat", ""], one_by_one=True).states
    got = ours(prompt_embeds=embeds[:1], negative_prompt_embeds=embeds[1:], generator=3, **FAST).images
    assert np.array_equal(got, ours("a cat", generator=3, **FAST).images)


def test_large_pictures_in_tiles(ours):
    """Tiled decoding is a choice: it stays near the whole decode (group norms see a tile, not the picture)."""
    call = {"prompt": "a cat", "generator": 3, "height": 192, "width": 128, **FAST}
    whole = ours(**call).images
    ours.enable_vae_tiling()
    try:
        assert np.array_equal(ours(**call).images, whole), "pictures smaller than a tile are not tiled"
    finally:
        ours.disable_vae_tiling()


def test_equal_prompts_are_encoded_once_and_land_in_their_rows(ours, sdxl, monkeypatch):
    from ldmfast.pipelines.text import encode_prompts

    prompts = ["a dog", "", "a dog", "a cat", ""]
    for pipe in (ours, ldmfast.Pipeline.from_pretrained(sdxl[1])):
        encoders = pipe.loaded.text_encoders
        alone = [encode_prompts(encoders, [p]) for p in prompts]
        seen = []
        inner = encoders[0].model.forward
        monkeypatch.setattr(encoders[0].model, "forward", lambda ids, **k: seen.append(ids) or inner(ids, **k))  # noqa: B023
        together = encode_prompts(encoders, prompts, one_by_one=True)
        assert torch.equal(together.states, torch.cat([e.states for e in alone])) and len(seen) == 3
        assert (together.pooled is None) == (len(encoders) == 1)
        if together.pooled is not None:
            assert torch.equal(together.pooled, torch.cat([e.pooled for e in alone]))
        batch = encode_prompts(encoders, prompts).states
        assert torch.equal(batch[0], batch[2]) and (batch - together.states).abs().max() <= 1e-4
