"""Small networks with random weights, ours and diffusers', and sampling loops around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ldmfast import models
from ldmfast.caches import Policy, Session

TIMES = (901.0, 751.0, 601.0, 451.0, 301.0, 151.0, 51.0, 1.0)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(module: nn.Module) -> nn.Module:
    """All parameters random: matrices keep the variance of their input, norms are around 1, biases around 0."""
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        centre = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
        p.data = noise * p[0].numel() ** -0.5 if p.ndim > 1 else centre + 0.2 * noise
    return module.eval().requires_grad_(False)


@dataclass(frozen=True)
class Case:
    """kind and config: of diffusers' network. conditions: of two pictures. x: their state at the start."""

    kind: str
    config: dict[str, Any]
    conditions: Callable[[], dict[str, Tensor]]
    shape: tuple[int, ...] = (2, 4, 8, 8)
    per_time: float = 1.0  # what the network is told for a time

    def theirs(self) -> nn.Module:
        return randomise(getattr(diffusers, self.kind)(**self.config))

    def both(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
        module = self.theirs()
        return module, models.from_diffusers(module, dtype=dtype)

    @property
    def times(self) -> list[float]:
        return [t * self.per_time for t in TIMES]


JOINT = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
         "pooled_projection_dim": 20}
CASES = {
    "unet": Case("UNet2DConditionModel",
                 {"block_out_channels": (16, 32), "cross_attention_dim": 24, "norm_num_groups": 4,
                  "attention_head_dim": 2, "layers_per_block": 2, "sample_size": 8,
                  "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                  "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")},
                 lambda: {"encoder_hidden_states": draw(2, 7, 24, seed=2)}),
    "dit": Case("DiTTransformer2DModel",
                {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "sample_size": 8,
                 "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_embeds_ada_norm": 5},
                lambda: {"class_labels": torch.tensor([3, 5])}),
    "pixart": Case("PixArtTransformer2DModel",
                   {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "sample_size": 8,
                    "patch_size": 2, "cross_attention_dim": 32, "caption_channels": 24, "out_channels": 4},
                   lambda: {"encoder_hidden_states": draw(2, 7, 24, seed=2)}),
    "sd3": Case("SD3Transformer2DModel",
                JOINT | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "caption_projection_dim": 32,
                         "pos_embed_max_size": 8, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
                lambda: {"encoder_hidden_states": draw(2, 7, 24, seed=2),
                         "pooled_projections": draw(2, 20, seed=3)}),
    "flux": Case("FluxTransformer2DModel",
                 JOINT | {"in_channels": 4, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (4, 6, 6)},
                 lambda: {"encoder_hidden_states": draw(2, 7, 24, seed=2), "pooled_projections": draw(2, 20, seed=3),
                          "img_ids": torch.arange(48.0).view(16, 3) % 5, "txt_ids": torch.zeros(7, 3)},
                 (2, 16, 4), per_time=1e-3),
}


def follow(network: Callable[[Tensor, float, int], Tensor], x: Tensor, times: Sequence[float]) -> list[Tensor]:
    """The predictions of all evaluations of a run of small Euler steps, so that caches meet a moving input."""
    found = []
    for step, t in enumerate(times):
        y = network(x, t, step)
        found.append(y)
        x = x - 0.1 * y.float().reshape(x.shape)
    return found


def with_cache(net: Any, case: Case, *policies: Policy) -> tuple[list[Tensor], Session]:
    """The predictions of one of our networks with a cache, and the session."""
    session = Session.of(policies, net, case.times)
    assert session is not None
    state = net.prepare(case.times, **case.conditions())

    def network(x: Tensor, t: float, step: int) -> Tensor:
        return session.evaluate(lambda rows: net(rows, t, state=state, cache=session), x, step)

    return follow(network, draw(*case.shape), case.times), session


def without_cache(net: Any, case: Case) -> list[Tensor]:
    state = net.prepare(case.times, **case.conditions())
    return follow(lambda x, t, step: net(x, t, state=state), draw(*case.shape), case.times)


def theirs(module: nn.Module, case: Case, before: Callable[[int, float], None] = lambda step, t: None) -> list[Tensor]:
    """The predictions of diffusers' network, told of every evaluation before it."""
    conditions = case.conditions()

    def network(x: Tensor, t: float, step: int) -> Tensor:
        before(step, t)
        time = torch.full((len(x),), t)
        if case.kind.startswith("PixArt"):
            conditions["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        return module(x, timestep=time, **conditions, return_dict=False)[0]

    with torch.no_grad():
        return follow(network, draw(*case.shape), case.times)
