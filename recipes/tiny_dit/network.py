"""The tiny diffusion transformer while it trains: diffusers' SD3Transformer2DModel on the shipped caption encoder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ldmfast.testing.scenes import OBJECT_COLOURS, SHAPES

SHIPPED = Path(__file__).resolve().parents[2] / "ldmfast" / "assets" / "tiny"
TEXT_WIDTH = 128
CONFIG: dict[str, Any] = dict(
    sample_size=8,
    patch_size=1,
    in_channels=8,
    out_channels=8,
    num_layers=5,
    attention_head_dim=32,
    num_attention_heads=4,
    caption_projection_dim=128,
    joint_attention_dim=2 * TEXT_WIDTH,  # the states of both encoders side by side
    pooled_projection_dim=2 * TEXT_WIDTH,
    pos_embed_max_size=8,
    qk_norm="rms_norm",
)
# The classes: what a single kind of object can be.
CLASSES = [f"{colour} {shape}" for colour in OBJECT_COLOURS for shape in SHAPES]
# SD 3 without its T5 encoder puts as many tokens of zeros in its place as `max_sequence_length` says, 256 by
# default. They have no positions, so they stay equal in every block: one of them whose attention counts that many
# times (log of it added to the scores) is the same network, and four times cheaper to train.
NULL_TOKENS = (1, 256)


def load_text_encoder() -> CLIPTextModelWithProjection:
    """The shipped UNet's caption encoder, fp32, frozen. Its projection is the identity: the network's own first
    layer sees the end-of-text state as it is."""
    config = json.loads((SHIPPED / "text_encoder" / "config.json").read_text())
    for key in ("architectures", "transformers_version", "dtype", "model_type"):
        config.pop(key)
    model = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    state = load_file(SHIPPED / "text_encoder" / "model.safetensors")
    state = {k if k.startswith("text_model.") else f"text_model.{k}": v.float() for k, v in state.items()}
    model.load_state_dict(state | {"text_projection.weight": torch.eye(TEXT_WIDTH)})
    return model.eval().requires_grad_(False)


def load_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(str(SHIPPED / "tokenizer"))


def load_vae() -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(SHIPPED / "vae", torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)


class JointAttention:
    """Attention processor of plain products (the backward of torch's fused CPU attention is slow at these sizes) with
    a bias on the last key, the null token's."""

    def __init__(self) -> None:
        self.bias: Tensor | None = None  # (tokens,), all zero but for the last

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None,
                 ) -> tuple[Tensor, Tensor | None]:
        x, text = hidden_states, encoder_hidden_states
        n, image = x.shape[0], x.shape[1]

        def heads(y: Tensor, norm: nn.Module | None = None) -> Tensor:
            y = y.view(n, -1, attn.heads, y.shape[-1] // attn.heads).transpose(1, 2)
            return y if norm is None else norm(y)

        q = torch.cat([heads(attn.to_q(x), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)], 2)
        k = torch.cat([heads(attn.to_k(x), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)], 2)
        v = torch.cat([heads(attn.to_v(x)), heads(attn.add_v_proj(text))], 2)
        if attn.context_pre_only:
            q = q[:, :, :image]
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + self.bias.to(q.dtype)
        out = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        shown = attn.to_out[0](out[:, :image])
        return shown, None if attn.context_pre_only else attn.to_add_out(out[:, image:])


class Velocity(nn.Module):
    """(noisy latents, sigma in [0, 1], token states, pooled states, bias) -> noise minus latents.

    bias: (all tokens,) of JointAttention, see null_bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = SD3Transformer2DModel(**CONFIG)
        for name, parameter in self.net.named_parameters():
            # as in DiT: every block starts as the identity, and the prediction at zero
            if any(f"{part}.linear." in name for part in ("norm1", "norm1_context", "norm_out")) or "proj_out" in name:
                nn.init.zeros_(parameter)
            elif name.endswith("weight") and parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
        self.attention = JointAttention()
        for block in self.net.transformer_blocks:
            block.attn.set_processor(self.attention)

    def forward(self, z: Tensor, sigma: Tensor, states: Tensor, pooled: Tensor, bias: Tensor) -> Tensor:
        net, self.attention.bias = self.net, bias
        temb = net.time_text_embed(1000 * sigma, pooled)
        text = net.context_embedder(torch.cat([states, states.new_zeros(len(states), 1, states.shape[2])], 1))
        x = net.pos_embed(z)
        for block in net.transformer_blocks:
            text, x = block(hidden_states=x, encoder_hidden_states=text, temb=temb)
        return unpatched(net.proj_out(net.norm_out(x, temb)))


def unpatched(tokens: Tensor) -> Tensor:
    """(n, patches, p * p * channels) -> (n, channels, side, side)."""
    p, channels = CONFIG["patch_size"], CONFIG["out_channels"]
    side = math.isqrt(tokens.shape[1])
    grid = tokens.view(-1, side, side, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    return grid.reshape(-1, channels, side * p, side * p)


def null_bias(count: int) -> Tensor:
    """For a null token that stands for `count` of them."""
    tokens = (CONFIG["sample_size"] // CONFIG["patch_size"]) ** 2 + 33
    bias = torch.zeros(tokens)
    bias[-1] = math.log(count)
    return bias
