"""One file of named tensors, whatever its format: what is in it, told from its header, and a stream of its tensors."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError


@dataclass(frozen=True)
class Stored:
    """How a tensor is stored. kind: torch's name of the dtype, or a quantised type's own ("Q4_K"). dtype: of the
    tensor that reading without conversion gives, float32 for a quantised type."""

    __slots__ = ("dtype", "kind", "nbytes", "shape")
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


class WeightFile(ABC):
    """An opened file. tensors: name -> how it is stored, in file order. metadata: the file's notes, all strings.
    hidden: names in the file that are used up by reading others."""

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]
    hidden: frozenset[str] = frozenset()

    @abstractmethod
    def read(self, names: Iterable[str] | None = None, dtype: torch.dtype | None = None,
             device: torch.device | str = "cpu", *, mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the given names, or of all in file order. dtype: floating tensors are converted.

        mapped: tensors that keep their dtype may share a copy-on-write mapping of the file. mapped False: one tensor
        at a time is in memory, for a caller that lets go of each before the next.
        """


_SCALES = frozenset({"scale_weight", "scale_input", "scaled_fp8"})
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_UNKNOWN = re.compile(r"(?:^|\.)(?:comfy_quant|weight_scale|weight_scale_inv|weight_scale_2|SCB|weight_format|"
                      r"(?:weight\.)?(?:absmax|quant_map|quant_state\..*))$")


class ScaledFp8(WeightFile):
    """ComfyUI's scaled 8-bit floats: ``<layer>.weight`` in fp8 times the scalar ``<layer>.scale_weight``.

    scale_input serves products in 8 bits and scaled_fp8 marks such a file; neither changes a number here. Scaled
    tensors are multiplied in float32.
    """

    def __init__(self, inner: WeightFile):
        self.path, self.metadata, self._inner = inner.path, inner.metadata, inner
        self._scales: dict[str, str] = {}
        self.tensors = dict(inner.tensors)
        self.hidden = frozenset(n for n in inner.tensors if n.rpartition(".")[2] in _SCALES)
        for name in sorted(self.hidden):
            layer, _, leaf = name.rpartition(".")
            del self.tensors[name]
            if leaf != "scale_weight":
                continue
            weight = f"{layer}.weight" if layer else "weight"
            stored, scale = inner.tensors.get(weight), inner.tensors[name]
            if stored is None or stored.dtype not in _FP8 or not scale.dtype.is_floating_point or (
                    scale.shape not in ((), (1,))):
                raise CheckpointError(f"{self.path}: {name!r} of shape {list(scale.shape)} is not one factor of an fp8 "
                                      f"tensor {weight!r}; this way of scaling is not supported, use the fp16 file")
            self._scales[weight] = name
            self.tensors[weight] = Stored(f"{stored.kind}, scaled", torch.float32, stored.shape, stored.nbytes)

    def read(self, names: Iterable[str] | None = None, dtype: torch.dtype | None = None,
             device: torch.device | str = "cpu", *, mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        names = list(self.tensors) if names is None else list(names)
        scales = dict(self._inner.read([self._scales[n] for n in names if n in self._scales], torch.float32))
        for name in names:
            scale = scales.get(self._scales.get(name, ""))
            if scale is None:
                yield from self._inner.read([name], dtype, device, mapped=mapped)
            else:
                for _, tensor in self._inner.read([name], torch.float32, device, mapped=False):
                    yield name, tensor.mul_(scale.to(device)).to(dtype or torch.float32)


def with_scales(file: WeightFile) -> WeightFile:
    """The file, with the scales of 8-bit tensors applied. Raises CheckpointError for a way of scaling not known."""
    for name in file.tensors:
        if _UNKNOWN.search(name):
            raise CheckpointError(f"{file.path}: {name!r} belongs to a quantised layout that is not supported; use the "
                                  "fp16 or the GGUF file of the model")
    leaves = {n.rpartition(".")[2] for n in file.tensors}
    return ScaledFp8(file) if leaves & _SCALES else file
