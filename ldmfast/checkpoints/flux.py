"""Black Forest Labs' layout of FLUX.1: the rules for its names, in the form of ``ldm``, and the config that names and
shapes imply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError

PREFIXES = ("", "model.diffusion_model.", "transformer.")
MARK = "double_blocks.0.img_attn.qkv.weight"

_DOUBLE, _SINGLE = "transformer_blocks.{0}.", "single_transformer_blocks.{0}."


def _embedder(old: str, new: str) -> tuple[tuple[str, str | None, str], ...]:
    return ((rf"{old}\.in_layer\.", f"time_text_embed.{new}.linear_1.", ""),
            (rf"{old}\.out_layer\.", f"time_text_embed.{new}.linear_2.", ""))


FLUX: tuple[tuple[str, str | None, str], ...] = (
    (r"img_in\.", "x_embedder.", ""), (r"txt_in\.", "context_embedder.", ""),
    *_embedder("time_in", "timestep_embedder"), *_embedder("vector_in", "text_embedder"),
    *_embedder("guidance_in", "guidance_embedder"),
    (r"double_blocks\.(\d+)\.img_mod\.lin\.", _DOUBLE + "norm1.linear.", ""),
    (r"double_blocks\.(\d+)\.txt_mod\.lin\.", _DOUBLE + "norm1_context.linear.", ""),
    (r"double_blocks\.(\d+)\.img_attn\.qkv\.", _DOUBLE + "attn.{qkv}.", "split_qkv"),
    (r"double_blocks\.(\d+)\.txt_attn\.qkv\.", _DOUBLE + "attn.{qkv}.", "split_added"),
    (r"double_blocks\.(\d+)\.img_attn\.norm\.query_norm\.scale$", _DOUBLE + "attn.norm_q.weight", ""),
    (r"double_blocks\.(\d+)\.img_attn\.norm\.key_norm\.scale$", _DOUBLE + "attn.norm_k.weight", ""),
    (r"double_blocks\.(\d+)\.txt_attn\.norm\.query_norm\.scale$", _DOUBLE + "attn.norm_added_q.weight", ""),
    (r"double_blocks\.(\d+)\.txt_attn\.norm\.key_norm\.scale$", _DOUBLE + "attn.norm_added_k.weight", ""),
    (r"double_blocks\.(\d+)\.img_attn\.proj\.", _DOUBLE + "attn.to_out.0.", ""),
    (r"double_blocks\.(\d+)\.txt_attn\.proj\.", _DOUBLE + "attn.to_add_out.", ""),
    (r"double_blocks\.(\d+)\.img_mlp\.0\.", _DOUBLE + "ff.net.0.proj.", ""),
    (r"double_blocks\.(\d+)\.img_mlp\.2\.", _DOUBLE + "ff.net.2.", ""),
    (r"double_blocks\.(\d+)\.txt_mlp\.0\.", _DOUBLE + "ff_context.net.0.proj.", ""),
    (r"double_blocks\.(\d+)\.txt_mlp\.2\.", _DOUBLE + "ff_context.net.2.", ""),
    (r"single_blocks\.(\d+)\.modulation\.lin\.", _SINGLE + "norm.linear.", ""),
    (r"single_blocks\.(\d+)\.linear1\.", _SINGLE + "{qkv}.", "split_single"),
    (r"single_blocks\.(\d+)\.linear2\.", _SINGLE + "proj_out.", ""),
    (r"single_blocks\.(\d+)\.norm\.query_norm\.scale$", _SINGLE + "attn.norm_q.weight", ""),
    (r"single_blocks\.(\d+)\.norm\.key_norm\.scale$", _SINGLE + "attn.norm_k.weight", ""),
    (r"final_layer\.linear\.", "proj_out.", ""),
    (r"final_layer\.adaLN_modulation\.1\.", "norm_out.linear.", "swap"),
)


def config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json of a FLUX transformer. shapes: names without prefix. The axes of the positions are FLUX.1's (16, 56,
    56), or the same shares of another head. Raises CheckpointError for an incomplete model."""
    width, channels = need(shapes, "img_in.weight", 2)
    head = need(shapes, "double_blocks.0.img_attn.norm.query_norm.scale", 1)[0]
    time = 2 * (head // 16)
    return {"_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": channels,
            "out_channels": need(shapes, "final_layer.linear.weight", 2)[0],
            "num_layers": count(shapes, "double_blocks"), "num_single_layers": count(shapes, "single_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": width // max(1, head), "joint_attention_dim": need(shapes, "txt_in.weight", 2)[1],
            "pooled_projection_dim": need(shapes, "vector_in.in_layer.weight", 2)[1],
            "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
            "axes_dims_rope": [time, (head - time) // 2, (head - time) // 2]}


def need(shapes: Mapping[str, tuple[int, ...]], name: str, dims: int) -> tuple[int, ...]:
    if len(shapes.get(name, ())) != dims:
        raise CheckpointError(f"tensor {name!r} with {dims} dimensions is missing (found {shapes.get(name)}); not a "
                              "complete model of the original layout")
    return shapes[name]


def count(shapes: Mapping[str, tuple[int, ...]], blocks: str) -> int:
    """The number of blocks. Raises CheckpointError when they are not numbered 0, 1, 2, ..."""
    found = sorted({int(n.split(".")[1]) for n in shapes if n.startswith(f"{blocks}.") and n.split(".")[1].isdigit()})
    if found != list(range(len(found))):
        raise CheckpointError(f"{blocks} are numbered {found}; needs 0, 1, 2, ... without gaps")
    return len(found)
