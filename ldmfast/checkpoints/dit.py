"""Original layouts of DiT and SiT (one layout, which does not tell them apart) and of PixArt alpha and sigma: the rules
for their names, in the form of ``ldm``, and the configs that names and shapes imply."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from ..errors import CheckpointError

PREFIXES = ("", "model.", "module.", "model.diffusion_model.")
MARK = "blocks.0.attn.qkv.weight"  # of both; PixArt has a t_block, DiT a y_embedder.embedding_table

_BLOCK = "transformer_blocks.{0}."
_COMMON: tuple[tuple[str, str | None, str], ...] = (
    (r"pos_embed$", None, ""),  # sines and cosines, which follow from the size
    (r"x_embedder\.proj\.", "pos_embed.proj.", ""),
    (r"blocks\.(\d+)\.attn\.qkv\.", _BLOCK + "attn1.{qkv}.", "split_qkv"),
    (r"blocks\.(\d+)\.attn\.proj\.", _BLOCK + "attn1.to_out.0.", ""),
    (r"blocks\.(\d+)\.mlp\.fc1\.", _BLOCK + "ff.net.0.proj.", ""),
    (r"blocks\.(\d+)\.mlp\.fc2\.", _BLOCK + "ff.net.2.", ""),
)
DIT: tuple[tuple[str, str | None, str], ...] = (
    *_COMMON,
    # one embedder, which diffusers repeats in every block
    (r"t_embedder\.mlp\.0\.", "transformer_blocks.{each}.norm1.emb.timestep_embedder.linear_1.", "each"),
    (r"t_embedder\.mlp\.2\.", "transformer_blocks.{each}.norm1.emb.timestep_embedder.linear_2.", "each"),
    (r"y_embedder\.embedding_table\.", "transformer_blocks.{each}.norm1.emb.class_embedder.embedding_table.", "each"),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.", _BLOCK + "norm1.linear.", ""),
    (r"final_layer\.adaLN_modulation\.1\.", "proj_out_1.", ""),
    (r"final_layer\.linear\.", "proj_out_2.", ""),
)
PIXART: tuple[tuple[str, str | None, str], ...] = (
    *_COMMON,
    (r"t_embedder\.mlp\.0\.", "adaln_single.emb.timestep_embedder.linear_1.", ""),
    (r"t_embedder\.mlp\.2\.", "adaln_single.emb.timestep_embedder.linear_2.", ""),
    (r"csize_embedder\.mlp\.0\.", "adaln_single.emb.resolution_embedder.linear_1.", ""),
    (r"csize_embedder\.mlp\.2\.", "adaln_single.emb.resolution_embedder.linear_2.", ""),
    (r"ar_embedder\.mlp\.0\.", "adaln_single.emb.aspect_ratio_embedder.linear_1.", ""),
    (r"ar_embedder\.mlp\.2\.", "adaln_single.emb.aspect_ratio_embedder.linear_2.", ""),
    (r"t_block\.1\.", "adaln_single.linear.", ""),
    (r"y_embedder\.y_embedding$", None, ""),  # stands for dropped captions in training
    (r"y_embedder\.y_proj\.fc1\.", "caption_projection.linear_1.", ""),
    (r"y_embedder\.y_proj\.fc2\.", "caption_projection.linear_2.", ""),
    (r"blocks\.(\d+)\.scale_shift_table$", _BLOCK + "scale_shift_table", ""),
    (r"blocks\.(\d+)\.cross_attn\.q_linear\.", _BLOCK + "attn2.to_q.", ""),
    (r"blocks\.(\d+)\.cross_attn\.kv_linear\.", _BLOCK + "attn2.{qkv}.", "split_kv"),
    (r"blocks\.(\d+)\.cross_attn\.proj\.", _BLOCK + "attn2.to_out.0.", ""),
    (r"final_layer\.scale_shift_table$", "scale_shift_table", ""),
    (r"final_layer\.linear\.", "proj_out.", ""),
)

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published widths; others have heads of 64 channels


def kind_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """"dit" or "pixart" of a file with MARK."""
    return "pixart" if "t_block.1.weight" in shapes else "dit"


def config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json of a DiT or PixArt. shapes: names without prefix.

    Sizes come from the stored positions, or are 32 latents without them. Raises CheckpointError for an incomplete
    model."""
    def need(name: str, dims: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != dims:
            raise CheckpointError(f"tensor {name!r} with {dims} dimensions is missing (found {shapes.get(name)}); not "
                                  "a complete model of the original DiT or PixArt layout")
        return shapes[name]

    width, channels, patch, _ = need("x_embedder.proj.weight", 4)
    blocks = sorted({int(n.split(".")[1]) for n in shapes if n.startswith("blocks.") and n.split(".")[1].isdigit()})
    if not blocks or blocks != list(range(len(blocks))):
        raise CheckpointError(f"blocks are numbered {blocks}; needs 0, 1, 2, ... without gaps")
    tokens = shapes.get("pos_embed", ())
    heads = _HEADS.get(width, max(1, width // 64))
    size = isqrt(tokens[-2]) * patch if len(tokens) >= 2 else 32
    common = {"num_attention_heads": heads, "attention_head_dim": width // heads, "in_channels": channels,
              "out_channels": need("final_layer.linear.weight", 2)[0] // max(1, patch * patch),
              "num_layers": len(blocks), "sample_size": size, "patch_size": patch, "norm_eps": 1e-6}
    if kind_of(shapes) == "dit":
        return {"_class_name": "DiTTransformer2DModel", **common, "norm_type": "ada_norm_zero", "freq_shift": 0,
                "num_embeds_ada_norm": need("y_embedder.embedding_table.weight", 2)[0] - 1}
    # alpha was trained with captions of 120 tokens and sigma with 300, and only sigma stretches positions below 512 px
    sigma = len(c := shapes.get("y_embedder.y_embedding", ())) > 0 and c[0] == 300
    return {"_class_name": "PixArtTransformer2DModel", **common, "norm_type": "ada_norm_single",
            "cross_attention_dim": width, "caption_channels": need("y_embedder.y_proj.fc1.weight", 2)[1],
            "use_additional_conditions": "csize_embedder.mlp.0.weight" in shapes,
            "interpolation_scale": size / 64 if sigma else max(size // 64, 1)}
