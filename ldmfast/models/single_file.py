"""``from_single_file`` of the models that checkpoints in one file hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from .. import checkpoints
from ..errors import CheckpointError

M = TypeVar("M", bound="FromSingleFile")


class FromSingleFile:
    """Mixin of the UNet and the autoencoder of Stable Diffusion, and of DiT, PixArt, SD 3 and FLUX."""

    part: ClassVar[str]

    @classmethod
    def from_single_file(cls: type[M], path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32,
                         device: torch.device | str = "cpu") -> M:
        """The model of a file that holds it alone, or among others; its config is inferred from names and shapes.

        path: safetensors, GGUF or a PyTorch file, with the names of the CompVis layout (SD 1, SD 2, SDXL, ComfyUI) or,
        where the model is alone, diffusers' own; DiT, SiT, PixArt, SD 3 and FLUX with those of their first release.
        dtype: of the weights, whatever the file's. An autoencoder alone does not tell SD 1 from SDXL:
        ``config.scaling_factor`` is then 0.18215. The model is laid out for its kernels and has no state_dict for other
        programs.
        Raises CheckpointError when the file is not readable, damaged, or holds no such model.
        """
        parts = checkpoints.open_single_file(Path(path))
        if cls.part not in parts.names:
            raise CheckpointError(f"{path}: holds no {cls.__name__}; it holds {', '.join(parts.names)}")
        model: Any = cls  # its other base is a Model
        try:
            return model.from_weights(parts.config(cls.part), parts.stream(cls.part, dtype, device), pack=True,
                                      dtype=dtype)
        except CheckpointError as error:
            raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
