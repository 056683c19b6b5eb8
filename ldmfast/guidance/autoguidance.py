"""Autoguidance: away from a bad version of the same network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import LdmfastError
from .guide import COND, Array, Branch, Call, Terms
from .scaled import Scaled


@dataclass(frozen=True, kw_only=True)
class AutoGuidance(Scaled):
    """e = weak + scale * (cond - weak): ``weak`` is the prediction of a network that was trained less, is smaller or
    coarser, for the same condition (Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself",
    eq. 3). It stands in the place of classifier-free guidance, and needs no unconditional prediction.

    weak: the other pipeline (its denoiser is used: an earlier checkpoint, another precision, one with an adapter), or
    the network itself. Costs one forward of it.
    """

    weak: Any = None

    plain: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not hasattr(getattr(self.weak, "unet", self.weak), "prepare"):
            raise LdmfastError(f"weak={type(self.weak).__name__} is neither a Pipeline nor one of ldmfast.models: give "
                               "the one to be guided away from")

    @property
    def network(self) -> Any:
        return getattr(self.weak, "unet", self.weak)

    def check(self, network: Any) -> None:
        check_other(network, self.network, "AutoGuidance")

    def terms(self, call: Call) -> Terms:
        w = self.scales(call)
        return {Branch("weak", network=self.network): 1 - w, COND: w - 1}

    def reads(self, call: Call) -> Mapping[Branch, Array]:
        return {COND: self.scales(call) != 1} if self.rescale else {}

    def to_dict(self) -> dict[str, Any]:
        settings = {k: v for k, v in vars(self).items() if k != "weak"}
        return {"name": "AutoGuidance", **settings, "weak": type(self.network).__name__}


def check_other(network: Any, other: Any, what: str) -> None:
    """Raises LdmfastError for a network that does not take and give what the pipeline's does."""
    for key in ("in_channels", "out_channels", "cross_attention_dim", "joint_attention_dim", "patch_size"):
        ours, theirs = (getattr(n.config, key, None) for n in (network, other))
        if ours != theirs:
            raise LdmfastError(f"{what}: the other network has {key}={theirs!r}, the pipeline's {ours!r}; they must "
                               "agree")
    if next(network.parameters()).device != next(other.parameters()).device:
        raise LdmfastError(f"{what}: the other network is on {next(other.parameters()).device}, the pipeline on "
                           f"{next(network.parameters()).device}; load both on one device")
