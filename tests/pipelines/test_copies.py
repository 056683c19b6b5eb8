"""Copies of pipelines and of their networks, and what they share."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest

import ldmfast


def draw(pipe):
    return pipe("a red circle", generator=5, num_inference_steps=2, output_type="np", progress=False).images


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
def test_a_deep_copy_draws_the_same_and_has_adapters_of_its_own(precision):
    """copy.deepcopy ended in errors about locks and opaque tensors; diffusers' pipelines can be copied."""
    pipe = ldmfast.Pipeline.tiny(precision=precision)
    expected, twin = draw(pipe), copy.deepcopy(pipe)
    assert np.array_equal(draw(twin), expected)
    twin.load_lora_weights(ldmfast.pipelines.pipeline.ASSETS / "tiny_lcm", "lcm")
    twin.enable_vae_tiling()
    assert not np.array_equal(draw(twin), expected)
    assert np.array_equal(draw(pipe), expected) and pipe.get_active_adapters() == [] and not pipe.vae_tiling


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
def test_a_deep_copy_of_a_network_gives_the_same(precision):
    pipe = ldmfast.Pipeline.tiny(precision=precision)
    twin = copy.copy(pipe)
    twin.loaded = dataclasses.replace(pipe.loaded, unet=copy.deepcopy(pipe.unet), vae=copy.deepcopy(pipe.vae))
    assert twin.unet is not pipe.unet and next(iter(twin.unet.children())) is not next(iter(pipe.unet.children()))
    assert np.array_equal(draw(twin), draw(pipe))


def test_a_pickle_is_refused_in_one_line():
    with pytest.raises(ldmfast.LdmfastError, match="from_pretrained") as error:
        pickle.dumps(ldmfast.Pipeline.tiny())
    assert "\n" not in str(error.value)
