"""Self-attention guidance: away from what the network predicts where what it attends to is blurred."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .guide import COND, UNCOND, At, Branch, Call, Guidance, Source, Terms, exact
from .levels import noise_of, picture_of
from .perturb import check_layers, grid, places, plain
from .scaled import check_number, check_range
from .seg import blur

_WIDTH = 9  # pixels of the blur's kernel, as in diffusers


@dataclass(frozen=True)
class Degraded(Source):
    """What the network is shown: its own estimate, blurred where self-attention looks most, with its own noise."""

    layer: str = "mid"
    sigma: float = 1.0
    threshold: float = 1.0

    def place(self, network: Any) -> int:
        return min(places(network, (self.layer,), "SAG"))

    def spy(self, keep: Callable[[Tensor], None]) -> Any:
        """Self-attention that hands over how much each token is looked at, (N, tokens): the map's mean over the heads,
        summed over the queries."""
        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, text: int, size: tuple[int, int]) -> Tensor:
            scores = torch.einsum("nqhd,nkhd->nhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
            scores = scores if bias is None else scores + bias.float()
            keep(scores.softmax(-1).mean(1).sum(1)[:, text:])
            return plain(q, k, v, bias, text)

        return attend

    def shown(self, x: Tensor, out: Tensor, seen: Tensor | None, at: At) -> Tensor:
        assert seen is not None
        prediction, x, out = at.call.prediction, exact(x), exact(out)
        picture = picture_of(out, x, at.alpha, at.sigma, prediction)
        h, w = grid(seen.shape[1], (x.shape[2], x.shape[3]))
        mask = F.interpolate((seen > self.threshold).to(x.dtype).view(-1, 1, h, w), x.shape[2:])
        picture = torch.lerp(picture, blur(picture, self.sigma, _WIDTH), mask)
        return at.alpha * picture + at.sigma * noise_of(out, x, at.alpha, at.sigma, prediction)


@dataclass(frozen=True, kw_only=True)
class SAG(Guidance):
    """Adds scale * (uncond - degraded), of the conditional prediction where there is no unconditional one: the picture
    that the network sees in x is blurred where the self-attention of ``layer`` puts more than its share, noised again
    with the network's own noise, and denoised once more (Hong et al. 2023, "Improving Sample Quality of Diffusion
    Models Using Self-Attention Guidance", eq. 18-25). Costs one forward more, which must wait for the others.
    Defaults are those of diffusers' StableDiffusionSAGPipeline. sigma: of the blur, in latents.
    """

    scale: float = 0.75
    layer: str = "mid"
    sigma: float = 1.0
    threshold: float = 1.0
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        check_layers((self.layer,))
        check_number("scale", self.scale)
        check_number("sigma", self.sigma, 1e-6)
        check_number("threshold", self.threshold, 0.0)
        check_range(self.start, self.stop)

    def terms(self, call: Call) -> Terms:
        on = float(self.scale) * call.within(self.start, self.stop)
        found: dict[Branch, Any] = {}
        for base, where in ((UNCOND, call.uncond), (COND, ~call.uncond)):
            source = Degraded(base, self.layer, float(self.sigma), float(self.threshold))
            weight = np.where(where, on, 0.0)
            found |= {base: weight, Branch("degraded " + base.name, base.condition, source=source): -weight}
        return found
