"""The student: the shipped UNet with low-rank changes of every convolution and linear layer."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from fast_norm import use_fast_norm
from torch import Tensor, nn

TINY = Path(__file__).resolve().parents[2] / "ldmfast/assets/tiny"
TIMES = (999, 759, 499, 259)  # of LCMScheduler and TCDScheduler at 4 steps


class Angles:
    """Noise levels as angles: x_t = cos(phi) x0 + sin(phi) noise, v = cos(phi) noise - sin(phi) x0 (Salimans and Ho
    2022, appendix D). A DDIM step turns: x_s = cos(phi_t - phi_s) x_t - sin(phi_t - phi_s) v."""

    def __init__(self) -> None:
        alphas = DDIMScheduler.from_pretrained(TINY / "scheduler").alphas_cumprod.double()
        self.phi = torch.cat([torch.acos(alphas.sqrt()).float(), torch.zeros(1)])  # the last one: no noise, index -1

    def turn(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin between times t and s, (n, 1, 1, 1); time -1 is the clean picture."""
        angle = (self.phi[t] - self.phi[s]).view(-1, 1, 1, 1)
        return angle.cos(), angle.sin()


class Student:
    """W = W0 + up down in every layer. The products are made once an iteration, and the gradients of W are pulled back
    to the factors: at these widths cheaper than to run the factors on activations."""

    def __init__(self, linear_rank: int, conv_rank: int) -> None:
        unet = UNet2DConditionModel.from_pretrained(TINY / "unet", torch_dtype=torch.float32)
        unet.set_attn_processor(AttnProcessor())
        self.unet = use_fast_norm(unet.requires_grad_(False)).to(memory_format=torch.channels_last)
        self.layers = {n: m for n, m in unet.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        self.base = {n: m.weight.detach().clone() for n, m in self.layers.items()}
        self.factors: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            layer.weight.requires_grad_(True)
            rows, columns = layer.weight.flatten(1).shape
            rank = min(conv_rank if isinstance(layer, nn.Conv2d) else linear_rank, rows, columns)
            self.factors[f"{name}.down"] = nn.Parameter(torch.randn(rank, columns) / math.sqrt(3 * columns))
            self.factors[f"{name}.up"] = nn.Parameter(torch.zeros(rows, rank))

    @torch.no_grad()
    def merge(self, factors: dict[str, Tensor] | None = None) -> None:
        """Writes W of the factors (its own by default) into the network."""
        f = factors or self.factors
        for name, layer in self.layers.items():
            product = f[f"{name}.up"] @ f[f"{name}.down"]
            layer.weight.copy_(self.base[name] + product.view(layer.weight.shape))

    @torch.no_grad()
    def pull_back(self) -> None:
        """Gradients of the factors from those of W, which are dropped."""
        for name, layer in self.layers.items():
            up, down = self.factors[f"{name}.up"], self.factors[f"{name}.down"]
            grad = layer.weight.grad.flatten(1)
            up.grad, down.grad = grad @ down.T, up.T @ grad
            layer.weight.grad = None
