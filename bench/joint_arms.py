"""Transformers over text and image tokens, at full width and a few blocks deep: the networks, and our arm."""

from __future__ import annotations

import time
from typing import Any

import diffusers
import torch
from arms import Network
from race import Arm, Call
from torch import Tensor

import ldmfast

SD3_MEDIUM = {"sample_size": 128, "num_layers": 4, "num_attention_heads": 24, "caption_projection_dim": 1536,
              "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 192}
FLUX_DEV = {"num_layers": 2, "num_single_layers": 4, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
            "guidance_embeds": True}
_NAMES = ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids", "guidance")


def step(model: Any, sample: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
    """conditions: in the order of _NAMES, the last three of FLUX only."""
    given = dict(zip(_NAMES, conditions))
    return model(hidden_states=sample, timestep=timestep, return_dict=False, **given)[0]


def sd3(config: dict[str, Any], size: int, tokens: int) -> Network:
    """Two pictures (guidance) of size x size latents."""
    noise = torch.Generator().manual_seed(1)
    inputs = (torch.randn(2, 16, size, size, generator=noise), torch.tensor([500.0, 500.0]),
              torch.randn(2, tokens, config["joint_attention_dim"], generator=noise),
              torch.randn(2, config["pooled_projection_dim"], generator=noise))
    return Network(diffusers.SD3Transformer2DModel, config, inputs, step)


def flux(config: dict[str, Any], size: int, tokens: int) -> Network:
    """One picture of size x size tokens. Weights are rounded to bf16 once the reference is made, to fit in memory.

    Guidance is 4: diffusers multiplies it by 1000 in bf16, which holds 4000 but makes 3504 of 3500."""
    noise = torch.Generator().manual_seed(1)
    ids = torch.zeros(size, size, 3)
    ids[..., 1], ids[..., 2] = torch.arange(size)[:, None], torch.arange(size)
    inputs = (torch.randn(1, size * size, config.get("in_channels", 64), generator=noise), torch.tensor([0.5]),
              torch.randn(1, tokens, config["joint_attention_dim"], generator=noise),
              torch.randn(1, config["pooled_projection_dim"], generator=noise), ids.view(size * size, 3),
              torch.zeros(tokens, 3), torch.tensor([4.0]))
    return Network(diffusers.FluxTransformer2DModel, config, inputs, step, low_only=True)


def ours(net: Network, precision: str) -> Arm:
    def build() -> tuple[Call, dict[str, Any]]:
        model = ldmfast.models.from_diffusers(net.module, precision=precision)
        sample, timestep, *conditions = net.cast(torch.float32 if precision == "exact" else torch.bfloat16)
        start, at = time.perf_counter(), float(timestep[0])
        state = model.prepare([at], conditions[0], **dict(zip(_NAMES[1:], conditions[1:])))
        facts = {"prepare_s": time.perf_counter() - start}
        return lambda: model(sample, at, state=state), facts

    return Arm(build, f"ldmfast {ldmfast.__version__}", f"precision={precision}; prompt projection and modulations "
               "once a call (prepare_s)", net.parameters * {"exact": 4, "bf16": 2, "int8": 2}[precision])
