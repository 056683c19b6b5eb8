"""Several conditions at once, of one network or of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LdmfastError
from .guide import EXTRA, UNCOND, Branch, Call, Guidance, Terms
from .scaled import check_range, numbers


@dataclass(frozen=True, kw_only=True)
class Compose(Guidance):
    """Adds scale_k * (cond_k - uncond) for more prompts: the score of the product of p(x) and, for each prompt, its
    implicit classifier to that power (Liu et al. 2022, "Compositional Visual Generation with Composable Diffusion
    Models", eq. 11; Unite and Conquer: Nair et al. 2023, has the same fusion with reliability weights). A negative
    scale is a negation. One branch for each in the batch.

    prompts: texts, each for all pictures of the call. scales: one for each.
    """

    prompts: Sequence[str]
    scales: Sequence[float]
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        given = self.prompts
        if isinstance(given, str) or not given or not all(isinstance(p, str) for p in given):
            raise LdmfastError(f"prompts={given!r} must be a list of texts")
        object.__setattr__(self, "prompts", tuple(given))
        object.__setattr__(self, "scales", numbers("scales", self.scales))
        if len(self.scales) != len(self.prompts):
            raise LdmfastError(f"{len(self.scales)} scales were given for {len(self.prompts)} prompts; give one each")
        check_range(self.start, self.stop)

    def terms(self, call: Call) -> Terms:
        on = call.within(self.start, self.stop)
        found: dict[Branch, Any] = {UNCOND: -sum(self.scales) * on}
        for text, scale in zip(self.prompts, self.scales):
            branch = Branch(text, condition=EXTRA + text)
            found[branch] = found.get(branch, 0.0) + np.asarray(scale * on)
        return found


Denoise = Callable[[Tensor, float, int], Tensor]


def mixture(denoisers: Sequence[Denoise], log_weights: Callable[[Tensor, float, int], Tensor]) -> Denoise:
    """The denoiser of the law sum_k w_k p_k of several models, each trained on data of its own (compartments: Golatkar
    et al. 2024, "Training Data Protection with Compositional Diffusion Models"): the average of their predictions,
    weighed for each picture by how likely it is to be theirs, w_k p_k(x_t). A compartment is forgotten by leaving it
    out. Any prediction type that is affine in the noise, all the same.

    log_weights(x, t, stage) -> (models, pictures), up to a constant a picture; x as the networks are shown it.
    """
    def denoise(x: Tensor, t: float, stage: int) -> Tensor:
        share = log_weights(x, t, stage).softmax(0)
        if share.shape != (len(denoisers), len(x)):
            raise LdmfastError(f"log_weights gave {tuple(share.shape)}, needs ({len(denoisers)} models, {len(x)} "
                               "pictures)")
        total = torch.zeros_like(x)
        for one, weight in zip(denoisers, share):
            total = total + one(x, t, stage) * weight.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        return total

    return denoise


def product(means: Sequence[Tensor], variances: Sequence[Tensor | float], reliabilities: Sequence[float] | None = None,
            ) -> tuple[Tensor, Tensor]:
    """Mean and variance of the normalised product of Gaussians N(means[k], variances[k])^reliabilities[k] (Unite and
    Conquer: Nair et al. 2023, "Unite and Conquer: Plug & Play Multi-Modal Synthesis using Diffusion Models", eq. 9).
    Raises LdmfastError for lists of different lengths, or a total precision that is not positive."""
    a = [1.0] * len(means) if reliabilities is None else list(reliabilities)
    if not means or len(means) != len(variances) or len(a) != len(means):
        raise LdmfastError(f"product: {len(means)} means, {len(variances)} variances and {len(a)} reliabilities; their "
                           "numbers must agree")
    precisions = [r / torch.as_tensor(v, dtype=m.dtype, device=m.device) for r, v, m in zip(a, variances, means)]
    total = torch.stack(torch.broadcast_tensors(*precisions)).sum(0)
    if not bool((total > 0).all()):
        raise LdmfastError(f"product: reliabilities {a} leave no positive precision; their weighted sum must be one")
    mean = sum((p * m for p, m in zip(precisions, means)), torch.zeros_like(means[0])) / total
    return mean, 1 / total


def united(denoisers: Sequence[Denoise], reliabilities: Sequence[float]) -> Denoise:
    """The fusion of several models of one process, whose steps have one variance: the reverse step of the product of
    theirs, which is the average of their predictions by reliability. A single model, or one of weight 1 beside zeros,
    is itself, and models of weight 0 are not evaluated."""
    total = sum(reliabilities)
    if len(reliabilities) != len(denoisers) or not total > 0:
        raise LdmfastError(f"united: reliabilities {list(reliabilities)} for {len(denoisers)} models; give one for "
                           "each, of a positive sum")
    used = [(one, r / total) for one, r in zip(denoisers, reliabilities) if r]

    def denoise(x: Tensor, t: float, stage: int) -> Tensor:
        parts = [one(x, t, stage) * r if r != 1 else one(x, t, stage) for one, r in used]
        return sum(parts[1:], parts[0])

    return denoise
