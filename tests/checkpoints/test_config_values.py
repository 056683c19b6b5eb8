"""Configs with values that no program writes: refused by key and value, before a network is built from them.

Each of these raised a TypeError or an OverflowError from deep inside, or ran for minutes, when they were found by
tools/fuzz_checkpoints.py.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import ldmfast
from ldmfast.checkpoints import open_folder, open_single_file
from ldmfast.errors import CheckpointError
from ldmfast.models import REGISTRY, TEXT_ENCODERS
from ldmfast.samplers import Schedule

TINY = Path(ldmfast.__file__).parent / "assets" / "tiny"


@pytest.mark.parametrize("name, change, message", [
    ("UNet2DConditionModel", {"layers_per_block": 1 << 40}, "'layers_per_block' = 1099511627776 is not"),
    ("UNet2DConditionModel", {"layers_per_block": 255}, "ask for 1020 blocks, the limit is 160"),
    ("UNet2DConditionModel", {"transformer_layers_per_block": [1, 2, 3, 100]}, "ask for 800 blocks"),
    ("UNet2DConditionModel", {"reverse_transformer_layers_per_block": 357}, "ask for 2856 blocks"),
    ("UNet2DConditionModel", {"transformer_layers_per_block": None}, "'transformer_layers_per_block' = None is not"),
    ("UNet2DConditionModel", {"transformer_layers_per_block": 1.5}, "'transformer_layers_per_block' = 1.5 is not"),
    ("UNet2DConditionModel", {"in_channels": True}, "'in_channels' = True is not int"),
    ("UNet2DConditionModel", {"in_channels": -4}, "'in_channels' = -4 is not int in range"),
    ("UNet2DConditionModel", {"norm_eps": float("nan")}, "'norm_eps' = nan is not float"),
    ("UNet2DConditionModel", {"center_input_sample": 4294967296}, "'center_input_sample' = 4294967296 is not bool"),
    ("UNet2DConditionModel", {"block_out_channels": [320] * 99}, "'block_out_channels' = .* is not"),
    ("UNet2DModel", {"block_out_channels": {"a": 1}}, "'block_out_channels' = {'a': 1} is not"),
    ("AutoencoderKL", {"latent_channels": "4"}, "'latent_channels' = '4' is not int"),
    ("AutoencoderKL", {"sample_size": [512, 512, 512]}, "'sample_size' = .* is not"),
    ("VQModel", {"num_vq_embeddings": 1 << 30}, "'num_vq_embeddings' = 1073741824 is not"),
    ("AutoencoderTiny", {"num_encoder_blocks": [1, 3, 3, 500]}, "ask for 501 blocks|ask for 503 blocks"),
    ("CLIPTextModel", {"num_hidden_layers": 1 << 20}, "ask for 1048576 blocks, the limit is 160"),
    ("CLIPTextModel", {"vocab_size": "49408"}, "'vocab_size' = '49408' is not int"),
    ("CLIPTextModel", {"layer_norm_eps": float("inf")}, "'layer_norm_eps' = inf is not float"),
    ("CLIPTextModelWithProjection", {"num_attention_heads": 0}, "'num_attention_heads' = 0 is not supported"),
])
def test_models(name: str, change: dict, message: str) -> None:
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        (REGISTRY | TEXT_ENCODERS)[name][0].from_dict(change)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and time.process_time() - start < 1


@pytest.mark.parametrize("change, message", [
    ({"_class_name": ["DDIMScheduler"]}, r"_class_name=\['DDIMScheduler'\] is not supported"),
    ({"num_train_timesteps": 1 << 40}, "num_train_timesteps=1099511627776 is not a value like 1000"),
    ({"num_train_timesteps": "1000"}, "num_train_timesteps='1000' is not"),
    ({"beta_start": float("nan")}, "beta_start=nan is not"), ({"beta_end": None}, "beta_end=None is not"),
    ({"beta_schedule": ["linear"]}, r"beta_schedule=\['linear'\] is not"),
    ({"trained_betas": ["x"]}, r"trained_betas=\['x'\] is not a list of numbers"),
    ({"trained_betas": 5}, "trained_betas=5 is not a list of numbers"),
    ({"a\nb": 1}, r"'a\\nb' = 1 is not known here"),
])
def test_schedulers(change: dict, message: str) -> None:
    good = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "lambda_min_clipped": -float("inf")}
    assert Schedule.from_config(good).num_train_timesteps == 1000
    with pytest.raises(CheckpointError, match=message) as caught:
        Schedule.from_config(good | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file, change, message", [
    ("vae/config.json", {"_class_name": ["x"]}, r"_class_name \"\['x'\]\" is not the name of a class"),
    ("vae/config.json", {"_class_name": "a\nb"}, "is not the name of a class"),
    ("model_index.json", {"vae": ["diffusers", {}]}, "has no part 'vae'"),
    ("model_index.json", {"vae": ["diffusers", "\n"]}, "has no part 'vae'"),
])
def test_folders(file: str, change: dict, message: str, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "tiny")
    path = tmp_path / "tiny" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_folder(tmp_path / "tiny").config("vae")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, shape", [
    ("first_stage_model.encoder.mid.attn_1.k.weight", ()),
    ("first_stage_model.encoder.mid.attn_1.k.weight", (4, 4, 3, 3)),
    ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias", (64,)),
    ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias", ()),
])
def test_shapes_that_a_change_of_names_needs(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """A scalar where three projections are packed raised an IndexError, and rows that do not divide lost tensors."""
    from test_single_file import sd2

    made = sd2()
    made.tensors[name] = torch.ones(shape)
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({k: v.clone() for k, v in made.tensors.items()}, path)
    with pytest.raises(CheckpointError, match=r"has shape \[.*\], which the original layout does not have there"):
        open_single_file(path)
