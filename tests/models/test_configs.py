"""Which configs are taken: everything that is covered loads, everything else names key and value."""

from __future__ import annotations

import dataclasses

import diffusers
import pytest
import torch
from model_cases import KLS, LDM, SD1, SDXL, TINIES, UNETS, VQS

from ldmfast.errors import CheckpointError, PrecisionError
from ldmfast.models import REGISTRY, AutoencoderKL, UNet2D, UNet2DCondition, from_diffusers


@pytest.mark.parametrize("name", UNETS)
def test_parameter_names_and_shapes_are_diffusers(name: str) -> None:
    case = UNETS[name]
    with torch.device("meta"):
        theirs = getattr(diffusers, case.kind)(**case.config)
        ours = REGISTRY[case.kind][1].from_config(dict(theirs.config))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("kind, config", [(k, c) for k, table in (
    ("AutoencoderKL", KLS), ("VQModel", VQS), ("AutoencoderTiny", TINIES)) for c in table.values()])
def test_autoencoder_names_are_diffusers(kind: str, config: dict) -> None:
    with torch.device("meta"):
        theirs = getattr(diffusers, kind)(**config)
        ours = REGISTRY[kind][1].from_config(dict(theirs.config))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("kind", REGISTRY)
def test_defaults_are_diffusers(kind: str) -> None:
    """An empty config.json means the same network."""
    with torch.device("meta"):
        theirs, ours = getattr(diffusers, kind)(), REGISTRY[kind][1].from_config({})
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("change, message", [
    ({"act_fn": "mish"}, "config key 'act_fn' = 'mish' is not supported, needs 'silu' or 'swish'"),
    ({"attention_type": "gated"}, "config key 'attention_type' = 'gated'"),
    ({"num_attention_heads": 8}, "config key 'num_attention_heads' = 8"),
    ({"down_block_types": ["KDownBlock2D"] * 4}, "config key 'down_block_types' = 'KDownBlock2D'"),
    ({"up_block_types": ["SimpleCrossAttnUpBlock2D"] * 4}, "config key 'up_block_types' = 'SimpleCrossAttnUpBlock2D'"),
    ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "config key 'mid_block_type'"),
    ({"time_embedding_type": "fourier"}, "config key 'time_embedding_type' = 'fourier'"),
    ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 4}, "config key 'encoder_hid_dim_type'"),
    ({"addition_embed_type": "image"}, "config key 'addition_embed_type' = 'image'"),
    ({"addition_embed_type": "text_time"}, "needs addition_time_embed_dim"),
    ({"class_embed_type": "other"}, "config key 'class_embed_type' = 'other'"),
    ({"resnet_time_scale_shift": "ada_group"}, "config key 'resnet_time_scale_shift' = 'ada_group'"),
    ({"norm_num_groups": None}, "config key 'norm_num_groups' = None"),
    ({"norm_num_groups": 7}, "config key 'norm_num_groups' = 7 does not divide"),
    ({"attention_head_dim": [4, 4]}, "config key 'attention_head_dim' = .4, 4. has 2 entries"),
    ({"attention_head_dim": 5}, "gives 5 heads"),
    ({"block_out_channels": [32, 64]}, "config key 'down_block_types' has 4 entries"),
    ({"transformer_layers_per_block": [[1, 1]] * 4}, "needs reverse_transformer_layers_per_block"),
    ({"downsample_padding": 2}, "config key 'downsample_padding' = 2"),
    ({"a_new_switch": True}, "config key 'a_new_switch' = True is not known"),
    ({"block_out_channels": ["a"] * 4}, r"config key 'block_out_channels' = \('a', 'a', 'a', 'a'\) is not"),
])
def test_unsupported_unets(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        UNet2DCondition.from_config(SD1 | change)
    assert "\n" not in str(caught.value)


def test_other_unsupported() -> None:
    with pytest.raises(CheckpointError, match="'upsample_type' = 'resnet'"):
        UNet2D.from_config(LDM | {"upsample_type": "resnet"})
    with pytest.raises(CheckpointError, match="use UNet2DConditionModel"):
        UNet2D.from_config(LDM | {"down_block_types": ["CrossAttnDownBlock2D"] * 3})
    with pytest.raises(CheckpointError, match="'down_block_types' = 'DownBlock2D'"):
        AutoencoderKL.from_config({"down_block_types": ["DownBlock2D"]})
    with pytest.raises(CheckpointError, match="needs a AutoencoderKLConfig"):
        AutoencoderKL.from_config(UNet2D.config_class.from_dict(LDM))
    with pytest.raises(CheckpointError, match="Linear has no native model"):
        from_diffusers(torch.nn.Linear(2, 2))
    with torch.device("meta"), pytest.raises(PrecisionError, match="precision 'int4' is not available"):
        from_diffusers(diffusers.UNet2DConditionModel(**SD1), precision="int4")


def test_configs_are_frozen_and_round_trip() -> None:
    config = UNet2DCondition.config_class.from_dict(SDXL | {"_class_name": "UNet2DConditionModel", "new": None})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.in_channels = 3
    assert UNet2DCondition.config_class.from_dict(config.to_dict()) == config
    assert hash(config) == hash(dataclasses.replace(config))


def test_from_weights_names_what_is_wrong() -> None:
    with torch.device("meta"):
        weights = UNet2DCondition.from_config(SD1).state_dict()
    short = {k: v for k, v in weights.items() if k != "conv_in.bias"}
    with pytest.raises(CheckpointError, match=f"1 of {len(weights)} tensors are missing, first 'conv_in.bias'"):
        UNet2DCondition.from_weights(SD1, short)
    with pytest.raises(CheckpointError, match="tensor 'more' has no place in the model"):
        UNet2DCondition.from_weights(SD1, weights | {"more": weights["conv_in.bias"]})
    with pytest.raises(CheckpointError, match=r"'conv_in.weight' has shape \(32, 4, 3, 3\), the config asks for"):
        UNet2DCondition.from_weights(SD1 | {"in_channels": 9}, weights)
    assert UNet2DCondition.from_weights(SD1, weights.items()).conv_in.weight is not None
