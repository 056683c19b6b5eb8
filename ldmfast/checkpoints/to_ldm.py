"""diffusers' and transformers' names to the CompVis layout: the rules of ldm.py read the other way.

A rule is (pattern, replacement, change), as there; what change does to a tensor is in ``Placed``. {down}, {up}: number
of an input or output block; {end}: of the one that resamples; {slot}: where the upsampler stands in its block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ..errors import CheckpointError
from .ldm import _RESNET, Rule

_LDM_RESNET = tuple((new.replace(".", r"\."), old.replace("\\", "")) for old, new, _ in _RESNET if new)


def _resnets(pattern: str, replacement: str) -> tuple[Rule, ...]:
    return tuple((pattern + p, replacement + r, "") for p, r in _LDM_RESNET)


UNET: tuple[Rule, ...] = (
    (r"time_embedding\.linear_1\.", "time_embed.0.", ""), (r"time_embedding\.linear_2\.", "time_embed.2.", ""),
    (r"(?:add|class)_embedding\.linear_1\.", "label_emb.0.0.", ""),
    (r"(?:add|class)_embedding\.linear_2\.", "label_emb.0.2.", ""),
    (r"class_embedding\.weight$", "label_emb.weight", ""),
    (r"conv_in\.", "input_blocks.0.0.", ""), (r"conv_norm_out\.", "out.0.", ""), (r"conv_out\.", "out.2.", ""),
    *_resnets(r"down_blocks\.(\d+)\.resnets\.(\d+)\.", "input_blocks.{down}.0."),
    (r"down_blocks\.(\d+)\.attentions\.(\d+)\.", "input_blocks.{down}.1.", ""),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.", "input_blocks.{end}.0.op.", ""),
    *_resnets(r"mid_block\.resnets\.0\.", "middle_block.0."), *_resnets(r"mid_block\.resnets\.1\.", "middle_block.2."),
    (r"mid_block\.attentions\.0\.", "middle_block.1.", ""),
    *_resnets(r"up_blocks\.(\d+)\.resnets\.(\d+)\.", "output_blocks.{up}.0."),
    (r"up_blocks\.(\d+)\.attentions\.(\d+)\.", "output_blocks.{up}.1.", ""),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.", "output_blocks.{up_end}.{slot}.conv.", ""),
)


def _vae_attention(pattern: str, replacement: str) -> tuple[Rule, ...]:
    names = (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), (r"to_out\.0", "proj_out"))
    return ((pattern + r"group_norm\.", replacement + "norm.", ""),
            *((rf"{pattern}{new}\.weight$", f"{replacement}{old}.weight", "conv") for new, old in names),
            *((rf"{pattern}{new}\.bias$", f"{replacement}{old}.bias", "") for new, old in names))


def _vae_resnet(pattern: str, replacement: str) -> tuple[Rule, ...]:
    return ((pattern + r"conv_shortcut\.", replacement + "nin_shortcut.", ""), (pattern, replacement, ""))


def _vae_side(side: str, blocks: str, level: str, resample: str) -> tuple[Rule, ...]:
    return (
        *_vae_resnet(rf"{side}\.{blocks}_blocks\.(\d+)\.resnets\.(\d+)\.", f"{side}.{blocks}.{level}.block.{{1}}."),
        *_vae_attention(rf"{side}\.{blocks}_blocks\.(\d+)\.attentions\.(\d+)\.",
                        f"{side}.{blocks}.{level}.attn.{{1}}."),
        (rf"{side}\.{blocks}_blocks\.(\d+)\.{resample}rs\.0\.conv\.", f"{side}.{blocks}.{level}.{resample}.conv.", ""),
        *_vae_resnet(rf"{side}\.mid_block\.resnets\.0\.", f"{side}.mid.block_1."),
        *_vae_resnet(rf"{side}\.mid_block\.resnets\.1\.", f"{side}.mid.block_2."),
        *_vae_attention(rf"{side}\.mid_block\.attentions\.0\.", f"{side}.mid.attn_1."),
        (rf"{side}\.conv_norm_out\.", f"{side}.norm_out.", ""), (rf"{side}\.(?=conv_in|conv_out)", f"{side}.", ""))


VAE: tuple[Rule, ...] = (
    *_vae_side("encoder", "down", "{0}", "downsample"), *_vae_side("decoder", "up", "{from_end}", "upsample"),
    (r"quant_conv\.", "quant_conv.", ""), (r"post_quant_conv\.", "post_quant_conv.", ""),
)

_PREFIX = r"(?:text_model\.)?"  # newer transformers leave it out
CLIP: tuple[Rule, ...] = (
    (_PREFIX + r"(?=embeddings\.|encoder\.|final_layer_norm\.)", "text_model.", ""),
    (r"text_projection\.", "text_projection.", ""),
)
_LAYER = _PREFIX + r"encoder\.layers\.(\d+)\."
OPEN_CLIP: tuple[Rule, ...] = (
    (_PREFIX + r"embeddings\.position_embedding\.weight$", "positional_embedding", ""),
    (_PREFIX + r"embeddings\.token_embedding\.", "token_embedding.", ""),
    (_PREFIX + r"final_layer_norm\.", "ln_final.", ""),
    (r"text_projection\.weight$", "text_projection", "transpose"),
    (_LAYER + r"layer_norm1\.", "transformer.resblocks.{0}.ln_1.", ""),
    (_LAYER + r"layer_norm2\.", "transformer.resblocks.{0}.ln_2.", ""),
    (_LAYER + r"mlp\.fc1\.", "transformer.resblocks.{0}.mlp.c_fc.", ""),
    (_LAYER + r"mlp\.fc2\.", "transformer.resblocks.{0}.mlp.c_proj.", ""),
    (_LAYER + r"self_attn\.out_proj\.", "transformer.resblocks.{0}.attn.out_proj.", ""),
    *((_LAYER + rf"self_attn\.{x}_proj\.", "transformer.resblocks.{0}.attn.in_proj_", x) for x in "qkv"),
)

RULES = {"unet": UNET, "vae": VAE, "clip": CLIP, "open_clip": OPEN_CLIP}
_COMPILED = {kind: tuple((re.compile(p), r, c) for p, r, c in rules) for kind, rules in RULES.items()}


@dataclass(frozen=True)
class Layout:
    """What the replacements refer to, read from the names of the whole part."""

    layers_per_block: int
    levels: int
    attended: frozenset[int]  # up blocks with transformers

    @classmethod
    def of(cls, names: Iterable[str]) -> Layout:
        text = "\n".join(names)
        layers = {int(n) for n in re.findall(r"^down_blocks\.\d+\.resnets\.(\d+)\.", text, re.M)}
        levels = {int(n) for n in re.findall(r"^decoder\.up_blocks\.(\d+)\.", text, re.M)}
        attended = {int(n) for n in re.findall(r"^up_blocks\.(\d+)\.attentions\.", text, re.M)}
        return cls(len(layers), len(levels), frozenset(attended))


@dataclass(frozen=True)
class Placed:
    """Where a tensor goes: its name, and for q, k and v the third of the rows of the packed projection."""

    name: str
    change: str = ""

    @property
    def third(self) -> int:
        return "qkv".index(self.change) if self.change in ("q", "k", "v") else 0

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the whole tensor in the file."""
        if self.change == "conv" and len(shape) == 2:
            return (*shape, 1, 1)
        if self.change == "transpose":
            return shape[::-1]
        return (3 * shape[0], *shape[1:]) if self.change in ("q", "k", "v") else shape

    def apply(self, tensor: Tensor) -> Tensor:
        if self.change == "conv" and tensor.ndim == 2:
            return tensor[:, :, None, None]
        return tensor.T.contiguous() if self.change == "transpose" else tensor


def rename(kind: str, name: str, layout: Layout) -> Placed:
    """The place of a tensor of a part ("unet", "vae", "clip", "open_clip"), without the part's prefix.

    Raises CheckpointError for a name that the layout has no place for.
    """
    for pattern, replacement, change in _COMPILED[kind]:
        match = pattern.match(name)
        if match is None or replacement is None:
            continue
        level, layer = (*(int(g) for g in match.groups()), 0, 0)[:2]
        n = layout.layers_per_block + 1
        new = replacement.format(*match.groups(), down=1 + level * n + layer, end=(level + 1) * n, up=level * n + layer,
                                 up_end=level * n + n - 1, slot=2 if level in layout.attended else 1,
                                 from_end=layout.levels - 1 - level)
        return Placed(new + name[match.end():], change)
    raise CheckpointError(f"tensor {name!r} of a {kind} has no place in the CompVis layout; the model is of a kind "
                          "that single files do not hold")
