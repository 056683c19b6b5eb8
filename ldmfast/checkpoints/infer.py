"""Configs of the parts of a CompVis-layout checkpoint, from names and shapes alone.

What shapes cannot tell follows a rule: heads are 8 at every level where proj_in is a convolution (SD 1), and
channels / 64, at least 1, where it is a linear layer (SD 2, SDXL); text encoders have hidden / 64 heads, at
least 1; norms have 32 groups, or the largest power of two that divides every width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


def _indices(shapes: Shapes, pattern: str) -> list[int]:
    """Sorted distinct numbers that the pattern's group takes."""
    compiled = re.compile(pattern)
    return sorted({int(m[1]) for m in map(compiled.match, shapes) if m})


def _need(shapes: Shapes, name: str, dims: int) -> tuple[int, ...]:
    if name not in shapes or len(shapes[name]) != dims:
        raise CheckpointError(f"tensor {name!r} with {dims} dimensions is missing (found "
                              f"{shapes.get(name)}); not a complete model of the CompVis layout")
    return shapes[name]


def _groups(widths: list[int]) -> int:
    groups = 32
    while any(w % groups for w in widths):
        groups //= 2
    return groups


def _one_or_list(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def unet_config(shapes: Shapes, pooled: int | None = None) -> dict[str, Any]:
    """config.json of the UNet. shapes: names without prefix. pooled: channels of the pooled prompt, if
    known."""
    blocks = _indices(shapes, r"input_blocks\.(\d+)\.")
    ops = _indices(shapes, r"input_blocks\.(\d+)\.0\.op\.")
    if not blocks or blocks != list(range(len(blocks))):
        raise CheckpointError(f"input_blocks are numbered {blocks}; needs 0, 1, 2, ... without gaps")
    layers = (ops[0] if ops else len(blocks)) - 1
    levels = len(ops) + 1
    if ops != [(layers + 1) * (i + 1) for i in range(levels - 1)] or len(blocks) != levels * (layers + 1):
        raise CheckpointError(f"input_blocks have downsampling at {ops} of {len(blocks)}; levels of unequal "
                              "depth are "
                              "not supported")
    firsts = [1 + i * (layers + 1) for i in range(levels)]
    widths = [_need(shapes, f"input_blocks.{i}.0.out_layers.3.weight", 4)[0] for i in firsts]
    depths = [len(_indices(shapes, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.")) for i in firsts]
    up = [len(_indices(shapes, rf"output_blocks\.{i * (layers + 1)}\.1\.transformer_blocks\.(\d+)\."))
          for i in range(levels)]
    middle = len(_indices(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\."))
    if not middle or up != depths[::-1] or (depths[-1] and depths[-1] != middle):
        raise CheckpointError(f"transformer depths are {depths} down, {middle} in the middle, {up} up; only "
                              "UNets with "
                              "the same depths down and up are supported")
    context = _need(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    linear = len(shapes.get("middle_block.1.proj_in.weight", ())) == 2
    heads = [max(w // 64, 1) for w in widths] if linear else [8] * levels
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel", "sample_size": 64,
        "in_channels": _need(shapes, "input_blocks.0.0.weight", 4)[1],
        "out_channels": _need(shapes, "out.2.weight", 4)[0],
        "block_out_channels": widths, "layers_per_block": layers, "cross_attention_dim": context,
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in up],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "transformer_layers_per_block": _one_or_list([d or 1 for d in depths[:-1]] + [middle]),
        "attention_head_dim": _one_or_list(heads), "use_linear_projection": linear,
        "norm_num_groups": _groups(widths),
    }
    config.update(_labels(shapes, max(*depths, middle), pooled))
    return config


def _labels(shapes: Shapes, depth: int, pooled: int | None) -> dict[str, Any]:
    """What is added to the time embedding. A projected label is SDXL's micro-conditioning if some level has
    more than one transformer block (6 sizes; 5 in the refiner, which has 4 blocks everywhere), else
    unCLIP's."""
    if "label_emb.weight" in shapes:
        return {"num_class_embeds": shapes["label_emb.weight"][0]}
    if "label_emb.0.0.weight" not in shapes:
        return {}
    size = _need(shapes, "label_emb.0.0.weight", 2)[1]
    if depth == 1:
        return {"class_embed_type": "projection", "projection_class_embeddings_input_dim": size}
    time = 256
    for numbers in (6, 5):
        if pooled is not None and size > pooled and (size - pooled) % numbers == 0:
            time = (size - pooled) // numbers
            break
    return {"addition_embed_type": "text_time", "addition_time_embed_dim": time, "sample_size": 128,
            "projection_class_embeddings_input_dim": size}


def label_part(config: Mapping[str, Any]) -> str:
    return "add_embedding" if config.get("addition_embed_type") else "class_embedding"


def vae_config(shapes: Shapes, xl: bool = False) -> dict[str, Any]:
    """config.json of the autoencoder; scaling_factor 0.18215, SDXL's 0.13025."""
    levels = len(_indices(shapes, r"encoder\.down\.(\d+)\."))
    widths = [_need(shapes, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    latent = _need(shapes, "decoder.conv_in.weight", 4)[1]
    down = [f"encoder.down.{i}.attn.0.q.weight" in shapes for i in range(levels)]
    up = [f"decoder.up.{i}.attn.0.q.weight" in shapes for i in range(levels)][::-1]
    return {
        "_class_name": "AutoencoderKL", "sample_size": 1024 if xl else 512,
        "in_channels": _need(shapes, "encoder.conv_in.weight", 4)[1],
        "out_channels": _need(shapes, "decoder.conv_out.weight", 4)[0],
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in up],
        "block_out_channels": widths, "latent_channels": latent,
        "layers_per_block": len(_indices(shapes, r"encoder\.down\.0\.block\.(\d+)\.")),
        "norm_num_groups": _groups(widths), "scaling_factor": 0.13025 if xl else 0.18215, "force_upcast": xl,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }


def clip_config(shapes: Shapes, projection: bool = False, act: str = "quick_gelu") -> dict[str, Any]:
    """config.json of a text encoder. shapes: transformers' names (text_model. ...), after renaming.

    eos_token_id 2 is what every Stable Diffusion folder has: the pooled token is then the one of highest id.
    """
    vocabulary, hidden = _need(shapes, "text_model.embeddings.token_embedding.weight", 2)
    layers = _indices(shapes, r"text_model\.encoder\.layers\.(\d+)\.")
    if not layers or layers != list(range(len(layers))):
        raise CheckpointError(f"text encoder has layers {layers}; needs 0, 1, 2, ... without gaps")
    name = "text_projection.weight"
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "model_type": "clip_text_model", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": _need(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": len(layers), "num_attention_heads": max(hidden // 64, 1),
        "max_position_embeddings": _need(shapes, "text_model.embeddings.position_embedding.weight", 2)[0],
        "projection_dim": shapes[name][0] if name in shapes else hidden, "hidden_act": act,
        "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }


def prediction_type(unet: Mapping[str, Any], metadata: Mapping[str, str], names: Shapes,
                    override: str | None = None) -> str:
    """"epsilon" or "v_prediction".

    In this order: the argument; the file's modelspec.prediction_type; a tensor named v_pred (how trainers
    mark such models); SD 2 (linear projections, a context of 1024, 4 channels, no labels) is taken for the
    768 model, which predicts v, unless modelspec.resolution says 512x512; everything else predicts epsilon.
    """
    if override is not None:
        if override not in ("epsilon", "v_prediction"):
            raise CheckpointError(f"prediction_type {override!r} is unknown; give 'epsilon' or "
                                  "'v_prediction'")
        return override
    marked = metadata.get("modelspec.prediction_type", "").lower()
    if marked in ("epsilon", "v", "v_prediction"):
        return "epsilon" if marked == "epsilon" else "v_prediction"
    if "v_pred" in names:
        return "v_prediction"
    second = (unet["use_linear_projection"] and unet["cross_attention_dim"] == 1024
              and unet["in_channels"] == 4)
    plain = "projection_class_embeddings_input_dim" not in unet and "num_class_embeds" not in unet
    if second and plain and metadata.get("modelspec.resolution", "") not in ("512x512", "512"):
        return "v_prediction"
    return "epsilon"


def scheduler_config(xl: bool, prediction: str, zero_terminal: bool = False) -> dict[str, Any]:
    """The scheduler that the published folders of these models name, with their noise schedule."""
    common = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
              "num_train_timesteps": 1000, "prediction_type": prediction, "timestep_spacing": "leading"}
    if zero_terminal:
        common |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if xl:
        return {"_class_name": "EulerDiscreteScheduler", **common}
    if prediction == "v_prediction":
        return {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, **common}
    return {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, **common}
