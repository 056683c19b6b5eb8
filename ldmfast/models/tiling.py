"""Large pictures in overlapping tiles, blended so that no seam is left; batches one picture at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ShapeError
from ..ops._load import reused_memory

Network = Callable[[Tensor], Tensor]
# of a tile, diffusers' share; linear blending over it hides the tiles' different norm statistics
_OVERLAP = 0.25


def sliced(network: Network, x: Tensor) -> Tensor:
    """network(x), one picture at a time."""
    return torch.cat([network(picture) for picture in x.split(1)]) if len(x) > 1 else network(x)


def tiled(network: Network, x: Tensor, tile: int, scale: float) -> Tensor:
    """network(x) in tiles of ``tile`` pixels of x. scale: output pixels per input pixel (8, 1/8, ...).

    Memory is bounded by the tile and one row of output tiles. Raises ShapeError for a tile without overlap.
    """
    stride, out_tile = int(tile * (1 - _OVERLAP)), int(tile * scale)
    blend = int(out_tile * _OVERLAP)
    if stride < 1 or blend < 1 or stride * scale != out_tile - blend:
        raise ShapeError(f"tile {tile} leaves no whole overlap at scale {scale:g}; take a multiple of "
                         f"{int(max(4, 4 / scale))}")
    if x.shape[2] <= tile and x.shape[3] <= tile:
        return network(x)
    out: Tensor | None = None
    above: list[Tensor] = []
    for top in range(0, x.shape[2], stride):
        row: list[Tensor] = []
        for left in range(0, x.shape[3], stride):
            part = network(x[:, :, top:top + tile, left:left + tile])
            if above:
                _blend(above[len(row)], part, blend, 2)
            if row:
                _blend(row[-1], part, blend, 3)
            row.append(part)
            if out is None:
                size = (int(x.shape[2] * scale), int(x.shape[3] * scale))
                out = part.new_empty((*part.shape[:2], *size)).contiguous(memory_format=torch.channels_last)
            y, z = int(top * scale), int(left * scale)
            piece = part[:, :, :out_tile - blend, :out_tile - blend]
            out[:, :, y:y + piece.shape[2], z:z + piece.shape[3]] = piece
        above = row
    return network(x) if out is None else out


def _blend(before: Tensor, after: Tensor, extent: int, dim: int) -> None:
    """Fades from the end of ``before`` into the start of ``after``, in place, along a dimension."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    shape = [1] * 4
    shape[dim] = extent
    weight = (torch.arange(extent, device=after.device, dtype=torch.float32) / extent).view(shape)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    start = after.narrow(dim, 0, extent)
    start.copy_(end * (1 - weight) + start * weight)


def run(network: Network, x: Tensor, tile: int | None, scale: float, slice: bool) -> Tensor:
    """network(x), in tiles of ``tile`` pixels of x if given, one picture at a time if ``slice``."""

    def whole(part: Tensor) -> Tensor:
        return network(part) if tile is None else tiled(network, part, tile, scale)

    with reused_memory():
        return sliced(whole, x) if slice else whole(x)


def check_image(name: str, x: Tensor, channels: int, multiple: int = 1) -> None:
    """Raises ShapeError unless x is (N, channels, H, W) with H and W multiples of ``multiple``."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ShapeError(f"{name} have shape {tuple(x.shape)}, need (pictures, {channels}, height, width)")
    if x.shape[2] % multiple or x.shape[3] % multiple:
        raise ShapeError(f"{name} are {x.shape[3]}x{x.shape[2]}, width and height must be multiples of "
                         f"{multiple}; "
                         "resize or crop")
