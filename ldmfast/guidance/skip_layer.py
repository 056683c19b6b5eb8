"""Skip-layer guidance: away from what the network predicts without some of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import LdmfastError
from .guide import COND, Branch, Call, Guidance, Terms
from .scaled import check_number, check_range


@dataclass(frozen=True, kw_only=True)
class SkipLayer(Guidance):
    """Adds scale * (cond - skipped), ``skipped`` being the conditional prediction without the blocks ``layers``, in the
    steps between two fractions, both excluded (STG: Hyung et al. 2024; Stable Diffusion 3.5's inference, with its
    defaults). Costs one forward without those blocks. layers: numbers of blocks, in the network's order.
    """

    layers: Sequence[int] = (7, 8, 9)
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def __post_init__(self) -> None:
        layers = (self.layers,) if isinstance(self.layers, int) else self.layers
        whole = isinstance(layers, (list, tuple)) and layers and all(
            isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers)
        if not whole:
            raise LdmfastError(f"layers={self.layers!r} must be numbers of blocks, 0 or more")
        object.__setattr__(self, "layers", tuple(layers))
        check_number("scale", self.scale)
        check_range(self.start, self.stop)

    def terms(self, call: Call) -> Terms:
        steps = call.table.num_steps
        on = self.scale * ((call.step > steps * self.start) & (call.step < steps * self.stop))
        return {Branch("skipped", skip=tuple(self.layers)): -on, COND: np.asarray(on, dtype=np.float64)}

    def check(self, network: object) -> None:
        blocks = 1 + max((getattr(m, "place", -1) for m in network.modules()), default=-1)  # type: ignore[attr-defined]
        from ..models import FluxTransformer2D

        if isinstance(network, FluxTransformer2D):
            raise LdmfastError("SkipLayer: a FluxTransformer2D has no blocks that may be left out; use CFG with "
                               "true_cfg_scale")
        if max(self.layers) >= blocks:
            raise LdmfastError(f"SkipLayer: layers={list(self.layers)} are not numbers of blocks, 0 to {blocks - 1}")
