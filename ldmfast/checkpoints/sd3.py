"""Stability's layout of SD 3 and 3.5: the rules for the transformer's names, in the form of ``ldm``, and the config
that names and shapes imply."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from .flux import count, need

PREFIXES = ("model.diffusion_model.", "")
MARK = "joint_blocks.0.x_block.attn.qkv.weight"
# of the autoencoder in the same file
VAE = {"scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024}

_BLOCK = "transformer_blocks.{0}."
_X, _TEXT = r"joint_blocks\.(\d+)\.x_block\.", r"joint_blocks\.(\d+)\.context_block\."


def _attention(name: str) -> tuple[tuple[str, str | None, str], ...]:
    return ((rf"{_X}{name}\.qkv\.", f"{_BLOCK}{name}.{{qkv}}.", "split_qkv"),
            (rf"{_X}{name}\.proj\.", f"{_BLOCK}{name}.to_out.0.", ""),
            (rf"{_X}{name}\.ln_q\.", f"{_BLOCK}{name}.norm_q.", ""),
            (rf"{_X}{name}\.ln_k\.", f"{_BLOCK}{name}.norm_k.", ""))


SD3: tuple[tuple[str, str | None, str], ...] = (
    (r"pos_embed$", "pos_embed.pos_embed", ""), (r"x_embedder\.proj\.", "pos_embed.proj.", ""),
    (r"t_embedder\.mlp\.0\.", "time_text_embed.timestep_embedder.linear_1.", ""),
    (r"t_embedder\.mlp\.2\.", "time_text_embed.timestep_embedder.linear_2.", ""),
    (r"y_embedder\.mlp\.0\.", "time_text_embed.text_embedder.linear_1.", ""),
    (r"y_embedder\.mlp\.2\.", "time_text_embed.text_embedder.linear_2.", ""),
    (r"context_embedder\.", "context_embedder.", ""),
    *_attention("attn"), *_attention("attn2"),
    (_TEXT + r"attn\.qkv\.", _BLOCK + "attn.{qkv}.", "split_added"),
    (_TEXT + r"attn\.proj\.", _BLOCK + "attn.to_add_out.", ""),
    (_TEXT + r"attn\.ln_q\.", _BLOCK + "attn.norm_added_q.", ""),
    (_TEXT + r"attn\.ln_k\.", _BLOCK + "attn.norm_added_k.", ""),
    (_X + r"adaLN_modulation\.1\.", _BLOCK + "norm1.linear.", ""),
    # the last block only scales and shifts its text, and diffusers has these two the other way round
    (_TEXT + r"adaLN_modulation\.1\.", _BLOCK + "norm1_context.linear.", "swap_last"),
    (_X + r"mlp\.fc1\.", _BLOCK + "ff.net.0.proj.", ""), (_X + r"mlp\.fc2\.", _BLOCK + "ff.net.2.", ""),
    (_TEXT + r"mlp\.fc1\.", _BLOCK + "ff_context.net.0.proj.", ""),
    (_TEXT + r"mlp\.fc2\.", _BLOCK + "ff_context.net.2.", ""),
    (r"final_layer\.linear\.", "proj_out.", ""),
    (r"final_layer\.adaLN_modulation\.1\.", "norm_out.linear.", "swap"),
)


def config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json of an SD 3 transformer, whose heads have 64 channels (with q/k norms: as many as those have). shapes:
    names without prefix. Raises CheckpointError for an incomplete model."""
    width, channels, patch, _ = need(shapes, "x_embedder.proj.weight", 4)
    blocks = count(shapes, "joint_blocks")
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    dual = [i for i in range(blocks) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes]
    head = norm[0] if norm else 64
    places = need(shapes, "pos_embed", 3)[1]
    return {"_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": patch, "in_channels": channels,
            "out_channels": need(shapes, "final_layer.linear.weight", 2)[0] // max(1, patch * patch),
            "num_layers": blocks, "attention_head_dim": head, "num_attention_heads": width // max(1, head),
            "joint_attention_dim": need(shapes, "context_embedder.weight", 2)[1], "caption_projection_dim": width,
            "pooled_projection_dim": need(shapes, "y_embedder.mlp.0.weight", 2)[1], "pos_embed_max_size": isqrt(places),
            "qk_norm": "rms_norm" if norm else None, "dual_attention_layers": dual}
