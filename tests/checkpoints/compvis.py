"""Writes diffusers models in the CompVis layout: the inverse of what the library reads, written independently."""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
           "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
_EMBEDDINGS = {"time_embedding": "time_embed", "add_embedding": "label_emb.0", "class_embedding": "label_emb.0"}


def unet(state: State, layers: int) -> State:
    """layers: ResNet blocks per level on the way down."""
    attended = {tuple(k.split(".")[1:4:2]) for k in state if k.startswith("up_blocks") and ".attentions." in k}
    return {_unet_name(k.split("."), layers, attended): v for k, v in state.items()}


def _unet_name(words: list[str], layers: int, attended: set) -> str:
    first = words[0]
    if first in _ENDS:
        return ".".join([_ENDS[first], *words[1:]])
    if first in _EMBEDDINGS:
        if len(words) == 2:
            return f"label_emb.{words[1]}"
        return ".".join([_EMBEDDINGS[first], {"linear_1": "0", "linear_2": "2"}[words[1]], words[2]])
    if first == "mid_block":
        kind, number, rest = words[1], int(words[2]), words[3:]
        at = f"middle_block.{2 * number if kind == 'resnets' else 1}"
        return ".".join([at, *(_resnet(rest) if kind == "resnets" else rest)])
    level, kind, number, rest = int(words[1]), words[2], int(words[3]), words[4:]
    if first == "down_blocks":
        if kind == "downsamplers":
            return ".".join(["input_blocks", str((level + 1) * (layers + 1)), "0.op", *rest[1:]])
        at, side = 1 + level * (layers + 1) + number, "input_blocks"
    else:
        if kind == "upsamplers":
            slot = "2" if (str(level), "0") in attended or (str(level), str(layers)) in attended else "1"
            return ".".join(["output_blocks", str(level * (layers + 1) + layers), slot, *rest])
        at, side = level * (layers + 1) + number, "output_blocks"
    return ".".join([side, str(at), *(["0", *_resnet(rest)] if kind == "resnets" else ["1", *rest])])


def _resnet(words: list[str]) -> list[str]:
    return [_RESNET[words[0]], *words[1:]]


def vae(state: State, levels: int) -> State:
    found = {}
    for name, tensor in state.items():
        words = name.split(".")
        if words[0] in ("quant_conv", "post_quant_conv") or words[1] in ("conv_in", "conv_out"):
            found[name] = tensor
        elif words[1] == "conv_norm_out":
            found[".".join([words[0], "norm_out", words[2]])] = tensor
        elif words[1] == "mid_block" and words[2] == "attentions":
            old = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[words[4]]
            value = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
            found[".".join([words[0], "mid.attn_1", old, words[-1]])] = value
        elif words[1] == "mid_block":
            found[".".join([words[0], f"mid.block_{int(words[3]) + 1}", *_vae_resnet(words[4:])])] = tensor
        else:
            side, level = words[0], int(words[2])
            at = f"encoder.down.{level}" if side == "encoder" else f"decoder.up.{levels - 1 - level}"
            if words[3] == "resnets":
                found[".".join([at, "block", words[4], *_vae_resnet(words[5:])])] = tensor
            else:
                found[".".join([at, words[3].removesuffix("rs"), *words[5:]])] = tensor
    return found


def _vae_resnet(words: list[str]) -> list[str]:
    return ["nin_shortcut" if words[0] == "conv_shortcut" else words[0], *words[1:]]


def wrapped(state: State) -> State:
    """Text encoder tensors with the text_model. prefix that newer transformers leave out."""
    return {k if k.startswith(("text_model.", "text_projection")) else f"text_model.{k}": v
            for k, v in state.items()}


def open_clip(state: State) -> State:
    """state: transformers' names with text_model. prefix."""
    found: State = {}
    state = dict(state)
    ends = {"embeddings.token_embedding.weight": "token_embedding.weight",
            "embeddings.position_embedding.weight": "positional_embedding",
            "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}
    for old, new in ends.items():
        found[new] = state.pop(f"text_model.{old}")
    if "text_projection.weight" in state:
        found["text_projection"] = state.pop("text_projection.weight").T.contiguous()
    layers = 1 + max(int(k.split(".")[3]) for k in state)
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}
    for i in range(layers):
        old, new = f"text_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            packed = [state[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            found[f"{new}attn.in_proj_{kind}"] = torch.cat(packed)
            for a, b in inner.items():
                found[f"{new}{b}.{kind}"] = state[f"{old}{a}.{kind}"]
    found["logit_scale"] = torch.tensor(4.6)
    return found


def prefixed(prefix: str, state: State) -> State:
    return {prefix + k: v.contiguous() for k, v in state.items()}
