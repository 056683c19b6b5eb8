"""UNet2D: the denoiser of unconditional latent diffusion (diffusers' UNet2DModel)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import LdmfastError
from ..torch_modes import own_modes
from .unet_config import UNet2DConfig
from .unet_state import UNetState, as_list
from .unet_trunk import UNetTrunk

if TYPE_CHECKING:
    from ..caches import Session


class UNet2D(UNetTrunk):
    """Ho et al. 2020, appendix B, as used by Rombach et al. 2022 for unconditional models. Thread-safe."""

    config_class = UNet2DConfig

    def __init__(self, config: UNet2DConfig):
        super().__init__(config)

    @own_modes()
    def prepare(self, timesteps: Tensor | Sequence[float] | float, *,
                class_labels: Tensor | None = None) -> UNetState:
        """Time embeddings of all timesteps of a call. class_labels: (N,) int, or (N, D) for identity
        classes."""
        times = list(dict.fromkeys(_whole(timesteps)))
        emb, label = self.embed_time(times), self.embed_class(class_labels)
        if class_labels is not None and label is None:
            raise LdmfastError("class_labels were given, this model has no classes; leave them out")
        emb = emb if label is None else emb + label
        return UNetState({t: i for i, t in enumerate(times)}, *self.places.project_times(emb), (), None,
                         None if label is None else len(label))

    @own_modes()
    def forward(self, sample: Tensor, timestep: Tensor | float, *, class_labels: Tensor | None = None,
                state: UNetState | None = None, cache: Session | None = None) -> Tensor:
        """sample (N, in_channels, H, W), any H and W -> (N, out_channels, H, W), channels-last.

        timestep: tensor () or (N,), or a number, of which the fraction is dropped as in diffusers. With
        ``state`` from prepare() no labels are given. cache: of this call (ldmfast.caches).
        Raises ShapeError for sizes that do not fit.
        """
        self.check_sample(sample)
        if not isinstance(timestep, Tensor):
            timestep = _whole(timestep)[0]
        if state is None:
            state = self.prepare(timestep, class_labels=class_labels)
        elif class_labels is not None:
            raise LdmfastError("class_labels were given together with a prepared state; give one of the two")
        step = replace(state.step(timestep, len(sample)), cache=cache)
        return self.at(as_list(timestep)).run(sample, step)


def _whole(timesteps: Tensor | Sequence[float] | float) -> list[float]:
    """Numbers lose their fraction, tensors keep it: so does UNet2DModel, and its checkpoints are used so."""
    times = as_list(timesteps)
    return times if isinstance(timesteps, Tensor) else [float(int(t)) for t in times]
