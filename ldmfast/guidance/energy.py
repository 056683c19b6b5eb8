"""Guidance by gradients: of an energy of the picture that is seen in the noise, or of a classifier that reads noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import LdmfastError, ShapeError
from .guide import At, Guidance, Outs
from .levels import moved, not_pure_noise, picture_of
from .scaled import check_number, check_range


def gradient(function: Callable[..., Tensor], x: Tensor, *more: float) -> Tensor:
    """Of function(x, ...) (pictures,) by x, with autograd. Raises LdmfastError where it has none."""
    with torch.inference_mode(False), torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        value = function(at, *more)
        if not isinstance(value, Tensor) or value.shape != (len(x),):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"the function of a guidance gave {shape}, needs one number a picture, ({len(x)},)")
        if not value.requires_grad:
            raise LdmfastError("the function of a guidance has no gradient: it must be differentiable, and networks of "
                               "ldmfast, which are made for inference, are not")
        found, = torch.autograd.grad(value.sum(), at)
    return found


@dataclass(frozen=True, kw_only=True)
class _Gradient(Guidance):
    scale: float = 1.0
    start: float = 0.0
    stop: float = 1.0

    linear: ClassVar[bool] = False
    plain: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        check_range(self.start, self.stop)

    def on(self, at: At) -> bool:
        return bool(at.call.within(self.start, self.stop)[at.stage]) and self.scale != 0


@dataclass(frozen=True, kw_only=True)
class Energy(_Gradient):
    """Lowers an energy of the picture: the score gains -scale * grad E(picture), where picture is the guided estimate
    behind x and the gradient by x is taken as that by the picture divided by alpha. The part of the chain rule that
    goes through the network is left out (unlike DPS: Chung et al. 2023; FreeDoM: Yu et al. 2023), because the networks
    here have no backward pass. Costs no forward.

    energy: (pictures, C, h, w) latents in fp32 -> (pictures,), differentiable by torch.
    """

    energy: Callable[[Tensor], Tensor]

    def combine(self, e: Tensor | None, outs: Outs, at: At) -> Tensor | None:
        if e is None or not self.on(at):
            return e
        picture = picture_of(e, at.x.to(e.dtype), at.alpha, at.sigma, at.call.prediction)
        push = gradient(self.energy, picture).to(e.dtype)
        return moved(e, self.scale * at.sigma / not_pure_noise(at.alpha) * push, at.alpha, at.sigma, at.call.prediction)

    def to_dict(self) -> dict[str, Any]:
        return {"name": "Energy", "scale": self.scale, "start": self.start, "stop": self.stop,
                "energy": getattr(self.energy, "__name__", type(self.energy).__name__)}


@dataclass(frozen=True, kw_only=True)
class Classifier(_Gradient):
    """Raises what a classifier says of the noisy x: the score gains scale * grad log p(y | x, t) (Dhariwal and Nichol
    2021, algorithm 1; scale 1 is the conditional score of an unconditional network). Costs no forward of the network.

    log_prob: (x, t) -> (pictures,), differentiable by torch. x: (pictures, C, h, w) as the network is shown it, alpha *
    picture + sigma * noise. t: the network's time, a number.
    """

    log_prob: Callable[[Tensor, float], Tensor]

    def combine(self, e: Tensor | None, outs: Outs, at: At) -> Tensor | None:
        if e is None or not self.on(at):
            return e
        t = float(at.call.table.network_times[at.stage])
        push = gradient(self.log_prob, at.x.to(e.dtype), t).to(e.dtype)
        return moved(e, -self.scale * at.sigma * push, at.alpha, at.sigma, at.call.prediction)

    def to_dict(self) -> dict[str, Any]:
        return {"name": "Classifier", "scale": self.scale, "start": self.start, "stop": self.stop,
                "log_prob": getattr(self.log_prob, "__name__", type(self.log_prob).__name__)}
