"""Which UNets are legal: diffusers' configs of UNet2DConditionModel and UNet2DModel, resolved to one plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import CheckpointError
from .base import Config, per_level, unsupported

_DOWN = {"DownBlock2D": "plain", "CrossAttnDownBlock2D": "cross", "AttnDownBlock2D": "attn"}
_UP = {"UpBlock2D": "plain", "CrossAttnUpBlock2D": "cross", "AttnUpBlock2D": "attn"}
_ACT = (None, "silu", "swish", "gelu", "mish")


@dataclass(frozen=True)
class BlockPlan:
    """One resolution level on the way down or up, or the middle.

    kind: "plain" (ResNet blocks), "cross" (each followed by a transformer) or "attn" (by self-attention).
    depths: transformer blocks after each ResNet block. skips: channels joined to each ResNet block's input.
    """

    kind: str
    in_channels: int
    out_channels: int
    layers: int
    resample: bool
    heads: int = 1
    head_dim: int = 1
    context_dim: int | None = None
    depths: tuple[int, ...] = ()
    only_cross_attention: bool = False
    skips: tuple[int, ...] = ()
    scale: float = 1.0


@dataclass(frozen=True)
class UNetPlan:
    """What the blocks have in common, and the blocks."""

    time_dim: int
    block_time_dim: int
    groups: int
    attention_groups: int
    eps: float
    scale_shift: bool
    padding: int
    linear_projection: bool
    dual: bool
    down: tuple[BlockPlan, ...]
    mid: BlockPlan | None
    up: tuple[BlockPlan, ...]


@dataclass(frozen=True)
class _UNetConfig(Config):
    """Keys that both kinds of UNet have."""

    sample_size: int | tuple[int, int] | None = None
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    act_fn: str = "silu"
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    class_embed_type: str | None = None
    num_class_embeds: int | None = None

    inert: ClassVar[frozenset[str]] = frozenset({"dropout", "upcast_attention"})


@dataclass(frozen=True)
class UNet2DConditionConfig(_UNetConfig):
    """config.json of diffusers' UNet2DConditionModel.

    attention_head_dim is the *number* of heads of the transformers (a misnomer kept by every checkpoint), and
    the head size of AttnDownBlock2D / AttnUpBlock2D, as in diffusers.
    """

    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: Any = 1
    reverse_transformer_layers_per_block: Any = None
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None
    class_embeddings_concat: bool = False

    choices: ClassVar = {
        "act_fn": ("silu", "swish"), "attention_type": ("default",), "num_attention_heads": (None,),
        "mid_block_type": (None, "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
        "resnet_time_scale_shift": ("default", "scale_shift"), "time_embedding_type": ("positional",),
        "encoder_hid_dim_type": (None, "text_proj"), "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
        "time_embedding_act_fn": _ACT, "timestep_post_act": _ACT,
    }
    # these act only in block types that choices and plan() refuse
    inert: ClassVar[frozenset[str]] = _UNetConfig.inert | {
        "resnet_skip_time_act", "resnet_out_scale_factor", "mid_block_only_cross_attention",
        "cross_attention_norm", "addition_embed_type_num_heads"}

    def check(self) -> None:
        _check_lists(self)
        plan = self.plan()
        if self.encoder_hid_dim_type is not None and self.encoder_hid_dim is None:
            raise unsupported("encoder_hid_dim", None, "the size of the text embedding that is projected")
        if self.addition_embed_type == "text_time" and None in (self.addition_time_embed_dim,
                                                                self.projection_class_embeddings_input_dim):
            raise CheckpointError("config key 'addition_embed_type' = 'text_time' needs "
                                  "addition_time_embed_dim "
                                  "and projection_class_embeddings_input_dim")
        for block in (*plan.down, *plan.up, *([plan.mid] if plan.mid else [])):
            if block.kind == "cross" and (block.heads < 1 or block.out_channels % block.heads):
                raise CheckpointError(f"config key 'attention_head_dim' gives {block.heads} heads, which do "
                                      "not "
                                      f"divide the level's {block.out_channels} channels")

    def plan(self) -> UNetPlan:
        channels, n = self.block_out_channels, len(self.block_out_channels)
        heads = per_level("attention_head_dim", self.attention_head_dim, n)
        contexts = per_level("cross_attention_dim", self.cross_attention_dim, n)
        layers = per_level("layers_per_block", self.layers_per_block, n)
        depths = per_level("transformer_layers_per_block", self.transformer_layers_per_block, n)
        only = per_level("only_cross_attention", self.only_cross_attention, n)
        reverse = self.reverse_transformer_layers_per_block
        if reverse is None and any(isinstance(d, tuple) for d in depths):
            raise CheckpointError("config key 'transformer_layers_per_block' is nested, which needs "
                                  "reverse_transformer_layers_per_block for the way up")
        up_depths = depths[::-1] if reverse is None else per_level("reverse_transformer_layers_per_block",
                                                                   reverse, n)
        down = tuple(BlockPlan(
            kind=_kind("down_block_types", self.down_block_types[i], _DOWN),
            in_channels=channels[max(i - 1, 0)], out_channels=channels[i], layers=layers[i],
            resample=i < n - 1, heads=heads[i], head_dim=heads[i], context_dim=contexts[i],
            depths=per_level("transformer_layers_per_block", depths[i], layers[i]),
            only_cross_attention=only[i]) for i in range(n))
        up = tuple(BlockPlan(
            kind=_kind("up_block_types", self.up_block_types[i], _UP),
            in_channels=channels[::-1][max(i - 1, 0)], out_channels=channels[::-1][i],
            layers=layers[::-1][i] + 1, resample=i < n - 1, heads=heads[::-1][i],
            head_dim=heads[i],  # not reversed: diffusers' order, which checkpoints were trained with
            context_dim=contexts[::-1][i],
            depths=per_level("transformer_layers_per_block", up_depths[i], layers[::-1][i] + 1),
            only_cross_attention=only[::-1][i], skips=_skips(channels[::-1], i, layers[::-1][i] + 1))
            for i in range(n))
        cross = self.mid_block_type == "UNetMidBlock2DCrossAttn"
        last = depths[-1]
        mid = None if self.mid_block_type is None else BlockPlan(
            kind="cross" if cross else "plain", in_channels=channels[-1], out_channels=channels[-1],
            layers=1 if cross else 0, resample=False, heads=heads[-1], context_dim=contexts[-1],
            depths=(last[0] if isinstance(last, tuple) else last,), scale=self.mid_block_scale_factor)
        time_dim = self.time_embedding_dim or 4 * channels[0]
        return UNetPlan(
            time_dim=time_dim, block_time_dim=time_dim * (2 if self.class_embeddings_concat else 1),
            groups=self.norm_num_groups, attention_groups=self.norm_num_groups, eps=self.norm_eps,
            scale_shift=self.resnet_time_scale_shift == "scale_shift", padding=self.downsample_padding,
            linear_projection=self.use_linear_projection, dual=self.dual_cross_attention,
            down=down, mid=mid, up=up)


@dataclass(frozen=True)
class UNet2DConfig(_UNetConfig):
    """config.json of diffusers' UNet2DModel: no prompt. attention_head_dim is the head size; None: one
    head."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    add_attention: bool = True

    choices: ClassVar = {
        "act_fn": ("silu", "swish"), "downsample_type": ("conv",), "upsample_type": ("conv",),
        "mid_block_type": (None, "UNetMidBlock2D"), "resnet_time_scale_shift": ("default", "scale_shift"),
        "time_embedding_type": ("positional",), "class_embed_type": (None, "timestep", "identity"),
    }
    inert: ClassVar[frozenset[str]] = _UNetConfig.inert | {"num_train_timesteps"}

    def check(self) -> None:
        _check_lists(self)
        if any("Cross" in t for t in (*self.down_block_types, *self.up_block_types)):
            raise CheckpointError("config of UNet2DModel names cross-attention blocks; use "
                                  "UNet2DConditionModel")
        self.plan()

    def plan(self) -> UNetPlan:
        channels, n, layers = self.block_out_channels, len(self.block_out_channels), self.layers_per_block
        reverse = channels[::-1]
        down = tuple(BlockPlan(
            kind=_kind("down_block_types", self.down_block_types[i], _DOWN),
            in_channels=channels[max(i - 1, 0)], out_channels=channels[i], layers=layers, resample=i < n - 1,
            head_dim=self.attention_head_dim or channels[i]) for i in range(n))
        up = tuple(BlockPlan(
            kind=_kind("up_block_types", self.up_block_types[i], _UP),
            in_channels=reverse[max(i - 1, 0)], out_channels=reverse[i], layers=layers + 1,
            resample=i < n - 1, head_dim=self.attention_head_dim or reverse[i],
            skips=_skips(reverse, i, layers + 1))
            for i in range(n))
        mid = None if self.mid_block_type is None else BlockPlan(
            kind="attn" if self.add_attention else "plain",
            in_channels=channels[-1], out_channels=channels[-1], layers=1, resample=False,
            head_dim=self.attention_head_dim or channels[-1],
            scale=self.mid_block_scale_factor)
        time_dim = self.time_embedding_dim or 4 * channels[0]
        return UNetPlan(
            time_dim=time_dim, block_time_dim=time_dim, groups=self.norm_num_groups,
            attention_groups=self.attn_norm_num_groups or self.norm_num_groups, eps=self.norm_eps,
            scale_shift=self.resnet_time_scale_shift == "scale_shift", padding=self.downsample_padding,
            linear_projection=False, dual=False, down=down, mid=mid, up=up)


def _kind(key: str, name: str, kinds: dict[str, str]) -> str:
    if name not in kinds:
        raise unsupported(key, name, " or ".join(kinds))
    return kinds[name]


def _skips(reverse: tuple[int, ...], i: int, layers: int) -> tuple[int, ...]:
    """Channels that the way down left for each ResNet block of level i of the way up."""
    return (reverse[i],) * (layers - 1) + (reverse[min(i + 1, len(reverse) - 1)],)


def _check_lists(config: Any) -> None:
    n = len(config.block_out_channels)
    for key in ("down_block_types", "up_block_types"):
        if len(getattr(config, key)) != n:
            raise CheckpointError(f"config key {key!r} has {len(getattr(config, key))} entries, "
                                  f"block_out_channels has {n}; they must agree")
    for key in ("norm_num_groups", "block_out_channels"):
        if not getattr(config, key):
            raise unsupported(key, getattr(config, key), "positive numbers")
    for c in config.block_out_channels:
        if c % config.norm_num_groups:
            raise CheckpointError(f"config key 'norm_num_groups' = {config.norm_num_groups} does not divide "
                                  f"{c} of block_out_channels")
    if config.downsample_padding not in (0, 1):
        raise unsupported("downsample_padding", config.downsample_padding, "0 or 1")
