"""CompVis / ComfyUI layout of SD 1, SD 2 and SDXL: the rules that turn its names into diffusers' ones.

A rule is (pattern, replacement, change): the pattern is matched at the start of the name behind its prefix,
the remainder of the name stays. {block} and {layer} number input_blocks and output_blocks by level, {up}
counts the decoder's levels from the other end. change tells what happens to the tensor; a replacement of None
drops it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import dit, flux, sd3

Rule = tuple[str, str | None, str]

UNET_PREFIXES = ("model.diffusion_model.", "")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")
# prefix, and the part that it is
CLIP_PREFIXES = (
    ("cond_stage_model.transformer.", "text_encoder"),
    ("conditioner.embedders.0.transformer.", "text_encoder"))
OPEN_CLIP_PREFIXES = (
    ("cond_stage_model.model.", "text_encoder"), ("conditioner.embedders.1.model.", "text_encoder_2"),
    ("conditioner.embedders.0.model.", "text_encoder_2"))

_RESNET: tuple[Rule, ...] = (
    (r"in_layers\.0\.", "norm1.", ""), (r"in_layers\.2\.", "conv1.", ""),
    (r"emb_layers\.1\.", "time_emb_proj.", ""),
    (r"out_layers\.0\.", "norm2.", ""), (r"out_layers\.3\.", "conv2.", ""),
    (r"skip_connection\.", "conv_shortcut.", ""),
)


def _resnets(pattern: str, replacement: str) -> tuple[Rule, ...]:
    return tuple((pattern + p, replacement + str(r), c) for p, r, c in _RESNET)


UNET: tuple[Rule, ...] = (
    (r"time_embed\.0\.", "time_embedding.linear_1.", ""),
    (r"time_embed\.2\.", "time_embedding.linear_2.", ""),
    (r"label_emb\.0\.0\.", "{label}.linear_1.", ""),
    (r"label_emb\.0\.2\.", "{label}.linear_2.", ""),
    (r"label_emb\.weight$", "class_embedding.weight", ""),
    (r"input_blocks\.0\.0\.", "conv_in.", ""),
    (r"input_blocks\.(\d+)\.0\.op\.", "down_blocks.{block}.downsamplers.0.conv.", ""),
    *_resnets(r"input_blocks\.(\d+)\.0\.", "down_blocks.{block}.resnets.{layer}."),
    (r"input_blocks\.(\d+)\.1\.", "down_blocks.{block}.attentions.{layer}.", ""),
    *_resnets(r"middle_block\.0\.", "mid_block.resnets.0."),
    *_resnets(r"middle_block\.2\.", "mid_block.resnets.1."),
    (r"middle_block\.1\.", "mid_block.attentions.0.", ""),
    (r"output_blocks\.(\d+)\.[12]\.conv\.", "up_blocks.{block}.upsamplers.0.conv.", ""),
    *_resnets(r"output_blocks\.(\d+)\.0\.", "up_blocks.{block}.resnets.{layer}."),
    (r"output_blocks\.(\d+)\.1\.", "up_blocks.{block}.attentions.{layer}.", ""),
    (r"out\.0\.", "conv_norm_out.", ""),
    (r"out\.2\.", "conv_out.", ""),
)


def _vae_attention(pattern: str, replacement: str) -> tuple[Rule, ...]:
    linear = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
    return ((pattern + r"norm\.", replacement + "group_norm.", ""),
            *((pattern + old + r"\.weight$", f"{replacement}{new}.weight", "linear") for old, new in linear),
            *((pattern + old + r"\.bias$", f"{replacement}{new}.bias", "") for old, new in linear))


def _vae_resnet(pattern: str, replacement: str) -> tuple[Rule, ...]:
    return ((pattern + r"nin_shortcut\.", replacement + "conv_shortcut.", ""), (pattern, replacement, ""))


def _vae_levels(old: str, new: str, number: str, resample: str) -> tuple[Rule, ...]:
    return (
        *_vae_resnet(old + r"\.(\d+)\.block\.(\d+)\.", f"{new}.{number}.resnets.{{1}}."),
        *_vae_attention(old + r"\.(\d+)\.attn\.(\d+)\.", f"{new}.{number}.attentions.{{1}}."),
        (rf"{old}\.(\d+)\.{resample}\.conv\.", f"{new}.{number}.{resample}rs.0.conv.", ""))


def _vae_ends(side: str) -> tuple[Rule, ...]:
    return (
        *_vae_resnet(rf"{side}\.mid\.block_1\.", f"{side}.mid_block.resnets.0."),
        *_vae_resnet(rf"{side}\.mid\.block_2\.", f"{side}.mid_block.resnets.1."),
        *_vae_attention(rf"{side}\.mid\.attn_1\.", f"{side}.mid_block.attentions.0."),
        (rf"{side}\.norm_out\.", f"{side}.conv_norm_out.", ""),
        (rf"{side}\.(?=conv_in|conv_out)", f"{side}.", ""))


VAE: tuple[Rule, ...] = (
    *_vae_levels(r"encoder\.down", "encoder.down_blocks", "{0}", "downsample"),
    *_vae_levels(r"decoder\.up", "decoder.up_blocks", "{up}", "upsample"),
    *_vae_ends("encoder"), *_vae_ends("decoder"),
    (r"quant_conv\.", "quant_conv.", ""), (r"post_quant_conv\.", "post_quant_conv.", ""),
    (r"(?:loss|model_ema)\.", None, ""),
)

CLIP: tuple[Rule, ...] = (
    (r"text_model\.embeddings\.position_ids$", None, ""), (r"embeddings\.position_ids$", None, ""),
    (r"text_model\.", "text_model.", ""), (r"text_projection\.", "text_projection.", ""),
    (r"(?=embeddings\.|encoder\.|final_layer_norm\.)", "text_model.", ""),
)

_LAYER = "text_model.encoder.layers.{0}."
OPEN_CLIP: tuple[Rule, ...] = (
    (r"positional_embedding$", "text_model.embeddings.position_embedding.weight", ""),
    (r"token_embedding\.", "text_model.embeddings.token_embedding.", ""),
    (r"ln_final\.", "text_model.final_layer_norm.", ""),
    (r"text_projection(?:\.weight)?$", "text_projection.weight", "transpose"),
    (r"transformer\.resblocks\.(\d+)\.ln_1\.", _LAYER + "layer_norm1.", ""),
    (r"transformer\.resblocks\.(\d+)\.ln_2\.", _LAYER + "layer_norm2.", ""),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", _LAYER + "mlp.fc1.", ""),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", _LAYER + "mlp.fc2.", ""),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", _LAYER + "self_attn.out_proj.", ""),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_weight$", _LAYER + "self_attn.{qkv}.weight", "split"),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_bias$", _LAYER + "self_attn.{qkv}.bias", "split"),
    (r"(?:logit_scale|attn_mask)$", None, ""),
)

RULES = {"unet": UNET, "vae": VAE, "clip": CLIP, "open_clip": OPEN_CLIP, "dit": dit.DIT, "pixart": dit.PIXART,
         "flux": flux.FLUX, "sd3": sd3.SD3}

_CHANGES: dict[str, Callable[[Tensor], Iterable[Tensor]]] = {
    "": lambda t: (t,),
    "linear": lambda t: (t.flatten(1),),  # a 1x1 convolution's weight
    "transpose": lambda t: (t.T.contiguous(),),  # stored as (inputs, outputs)
    "each": itertools.repeat,  # one for all blocks
    "swap": lambda t: (torch.cat(t.chunk(2)[::-1]),),  # shift and scale -> scale and shift
}
# what {qkv} stands for
SPLITS = {"split": ("q_proj", "k_proj", "v_proj"), "split_qkv": ("to_q", "to_k", "to_v"), "split_kv": ("to_k", "to_v"),
          "split_added": ("add_q_proj", "add_k_proj", "add_v_proj"),
          "split_single": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
_SHARES = {"split_single": (1, 1, 1, 4)}  # of the rows, where they are not equal


def split_rows(change: str, rows: int) -> list[int]:
    """Rows of each piece. Raises CheckpointError if they do not come out even."""
    shares = _SHARES.get(change, (1,) * len(SPLITS[change]))
    if rows % sum(shares):
        raise CheckpointError(f"{rows} rows do not make {' + '.join(map(str, shares))} equal parts")
    return [rows // sum(shares) * share for share in shares]


@dataclass(frozen=True)
class Numbers:
    """What the replacements refer to: ResNet blocks per UNet level on the way down, levels of the
    autoencoder, what the UNet's label embedding is, and blocks of a transformer."""

    layers_per_block: int = 2
    vae_levels: int = 4
    label: str = "add_embedding"
    blocks: int = 0


@dataclass(frozen=True)
class Renamed:
    """Where the tensor of one old name goes: one new name, or several of a packed projection or a shared tensor."""

    names: tuple[str, ...]
    change: str

    def apply(self, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        if self.change in SPLITS:
            return zip(self.names, tensor.split(split_rows(self.change, len(tensor))))
        return zip(self.names, _CHANGES[self.change](tensor))


_COMPILED = {kind: tuple((re.compile(p), r, c) for p, r, c in rules) for kind, rules in RULES.items()}


def rename(kind: str, name: str, numbers: Numbers) -> Renamed | None:
    """New names for a tensor of a part (a key of RULES), None to leave it out.

    name is without its prefix. Raises CheckpointError for a name that no rule knows.
    """
    for pattern, replacement, change in _COMPILED[kind]:
        match = pattern.match(name)
        if match is None:
            continue
        if replacement is None:
            return None
        n = numbers.layers_per_block + 1
        number = int(match[1]) if match.groups() else 0
        at = number - 1 if name.startswith("input_blocks") else number
        new = [replacement.format(*match.groups(), block=at // n, layer=at % n, label=numbers.label,
                                  up=numbers.vae_levels - 1 - number, qkv=part, each=part) + name[match.end():]
               for part in (range(numbers.blocks) if change == "each" else SPLITS.get(change, ("",)))]
        if change == "swap_last":
            change = "swap" if number == numbers.blocks - 1 else ""
        return Renamed(tuple(new), change)
    raise CheckpointError(f"tensor {name!r} has no place in a {kind} of the CompVis layout; the model is of "
                          "a kind "
                          "that is not supported")
