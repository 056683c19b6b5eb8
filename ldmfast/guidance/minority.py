"""Self-guided minority sampling: towards pictures that the network itself finds hard to restore."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import LdmfastError
from .guide import COND, Array, At, Branch, Call, Guidance, Outs, Source, exact
from .levels import moved, not_pure_noise, picture_of
from .scaled import check_number, check_range


@dataclass(frozen=True)
class Renoised(Source):
    """The network's own estimate, noised to a level of its own."""

    level: float = 0.0
    alpha: float = 1.0
    sigma: float = 0.0
    seed: int = 0

    def shown(self, x: Tensor, out: Tensor, seen: Tensor | None, at: At) -> Tensor:
        picture = picture_of(exact(out), exact(x), at.alpha, at.sigma, at.call.prediction)
        g = torch.Generator().manual_seed(1000 * self.seed + at.stage)
        # one for all: none depends on its neighbours
        noise = torch.randn(picture.shape[1:], generator=g, dtype=torch.float32, device="cpu").to(picture)
        return self.alpha * picture + self.sigma * noise

    def time(self, t: float) -> float:
        return self.level


@dataclass(frozen=True, kw_only=True)
class Minority(Guidance):
    """Raises the loss by which a network tells what is rare: the picture seen in x is noised to the level ``time`` and
    restored, and x is pushed along the gradient of the squared distance between the two, the restored one held fixed
    (Um and Ye 2024, "Self-Guided Generation of Minority Samples Using Diffusion Models", eq. 8-10; the gradient by x is
    that by the picture divided by alpha, as in Energy). Costs one forward more, which must wait for the others.

    time: of the second evaluation, as the schedule counts it, mostly to 1000. every: steps between two pushes. The
    second noise is the same for every picture, of ``seed``.
    """

    scale: float = 1.0
    time: float = 600.0
    every: int = 1
    start: float = 0.0
    stop: float = 1.0
    seed: int = 0

    linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        check_number("time", self.time, 0.0)
        check_range(self.start, self.stop)
        for name, value, least in (("every", self.every, 1), ("seed", self.seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise LdmfastError(f"{name}={value!r} is not a whole number of at least {least}")

    def branch(self, call: Call) -> Branch:
        alpha, sigma = call.level(float(self.time))
        return Branch("restored", source=Renoised(COND, float(self.time), alpha, sigma, self.seed))

    def reads(self, call: Call) -> Mapping[Branch, Array]:
        on = call.within(self.start, self.stop) & (call.step % self.every == 0) & (self.scale != 0)
        return {self.branch(call): on, COND: on}

    def combine(self, e: Tensor | None, outs: Outs, at: At) -> Tensor | None:
        branch = self.branch(at.call)
        if e is None or branch not in outs:
            return e
        source, prediction = branch.source, at.call.prediction
        assert isinstance(source, Renoised)
        cond, x = exact(outs[COND]), exact(at.x)
        picture = picture_of(cond, x, at.alpha, at.sigma, prediction)
        shown = source.shown(x, cond, None, at)
        restored = picture_of(exact(outs[branch]), shown, source.alpha, source.sigma, prediction)
        push = 2 * (picture - restored)  # of the squared distance, by the picture
        return moved(e, -self.scale * at.sigma / not_pure_noise(at.alpha) * push, at.alpha, at.sigma, prediction)
