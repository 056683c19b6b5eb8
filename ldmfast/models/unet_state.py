"""What of a UNet does not depend on the sample: computed once a call, looked up at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LdmfastError, ShapeError
from .layers import Attention, KeysValues, ResnetBlock, by_rows
from .unet_blocks import Step


@dataclass(frozen=True)
class UNetState:
    """Result of ``prepare``: time embeddings of all timesteps, prompt keys and values.

    rows: timestep -> row of ``times``. times: (timesteps, pictures or 1, C), the channels of all ResNet blocks one
    after the other; widths: how many each has. batch: the number of pictures the conditions were given for, or None
    where there are no conditions.
    """

    rows: dict[float, int]
    times: Tensor
    widths: tuple[int, ...]
    prompts: tuple[KeysValues, ...]
    prompt_bias: Tensor | None
    batch: int | None

    @property
    def numbers(self) -> dict[float, int]:
        """timestep -> its number."""
        return self.rows

    def step(self, timestep: Tensor | float, pictures: int, self_bias: Tensor | None = None) -> Step:
        """The part for one evaluation. timestep: number, or tensor () or (pictures,).

        Raises ShapeError for another number of pictures than prepared, LdmfastError for another timestep.
        """
        if self.batch not in (None, pictures):
            raise ShapeError(f"sample has {pictures} pictures, the conditions were given for {self.batch}; "
                             "they must agree")
        rows = rows_of(self.rows, timestep, pictures)
        if len(set(rows)) <= 1:
            times = self.times[rows[0] if rows else 0].expand(pictures, -1)
        else:
            index = torch.tensor(rows, device=self.times.device)
            own = torch.arange(pictures, device=index.device)
            times = self.times[index, own if self.times.shape[1] > 1 else own * 0]
        return Step(times.split(self.widths, dim=1), self.prompts, self.prompt_bias, self_bias)

    def step_at(self, row: Tensor, pictures: int) -> Step:
        """The part for one evaluation at a row of ``times`` that only the device knows. row: int64 (1,)."""
        times = self.times.index_select(0, row)[0].expand(pictures, -1)
        return Step(times.split(self.widths, dim=1), self.prompts, self.prompt_bias, None)


def rows_of(known: dict[float, int], timestep: Tensor | float, pictures: int) -> list[int]:
    """The prepared rows of one timestep for all pictures, or of one for each. Raises ShapeError for another number of
    timesteps, LdmfastError for one that was not prepared."""
    times = as_list(timestep)
    for t in times:
        if t not in known:
            raise LdmfastError(f"timestep {t} was not prepared; call prepare() with it ({len(known)} timesteps were)")
    if len(times) not in (1, pictures):
        raise ShapeError(f"timestep has {len(times)} entries, needs 1 or one for each of {pictures} pictures")
    return [known[t] for t in times]


def as_list(timestep: Tensor | float | Sequence[float]) -> list[float]:
    """Raises ShapeError for a tensor of more than one dimension, for no timesteps, and for what is not a number."""
    if isinstance(timestep, Tensor) and timestep.ndim > 1:
        raise ShapeError(f"timestep has shape {tuple(timestep.shape)}, needs () or (pictures,)")
    given = timestep.reshape(-1).tolist() if isinstance(timestep, Tensor) else timestep
    try:
        if isinstance(given, str):
            raise TypeError
        times = [float(t) for t in given] if isinstance(given, Sequence) else [float(given)]
    except (TypeError, ValueError) as error:
        raise ShapeError(f"timestep {timestep!r:.60} is no number; give one, or a tensor () or (pictures,)") from error
    if not times:
        raise ShapeError("timestep is empty; it needs one number for the call, or one for each picture")
    return times


class Places:
    """The ResNet blocks and cross-attentions of a UNet, in the order of their slots in the state."""

    def __init__(self, model: nn.Module) -> None:
        self.resnets = tuple(m for m in model.modules() if isinstance(m, ResnetBlock))
        self.crossing = tuple(m for m in model.modules() if isinstance(m, Attention) and m.context_dim is not None)
        for slot, resnet in enumerate(self.resnets):
            resnet.slot = slot
        for slot, attention in enumerate(self.crossing):
            attention.slot = slot

    def project_times(self, embedding: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Time embedding (timesteps, pictures or 1, D) -> (timesteps, pictures or 1, C) of all ResNet blocks side by
        side, and their widths."""
        rows = by_rows(F.silu, embedding.flatten(0, 1))
        times = [by_rows(m.time_emb_proj, rows) for m in self.resnets]
        return torch.cat(times, dim=1).unflatten(0, embedding.shape[:2]), tuple(t.shape[1] for t in times)

    def project_prompt(self, prompt: Tensor) -> tuple[KeysValues, ...]:
        """Prompt (N, T, C) -> keys and values of every cross-attention."""
        return tuple(m.keys_values(prompt[:, m.context]) for m in self.crossing)


def mask_bias(name: str, mask: Tensor | None, pictures: int, dtype: torch.dtype) -> Tensor | None:
    """Mask (N, keys), 1 keep and 0 discard -> (N, 1, 1, keys): 0 or -10000, as diffusers does."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != pictures:
        raise ShapeError(f"{name} has shape {tuple(mask.shape)}, needs ({pictures}, keys) with 1 for keep")
    return ((1 - mask.to(dtype)) * -10000.0)[:, None, None]
