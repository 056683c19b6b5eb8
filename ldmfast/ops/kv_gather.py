"""kv_gather: rows of a cache by position and batch element: beams in a new order, tokens of a feature cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import DeviceError, ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, case, nbytes, register, shape_of
from .kv_append import checked_positions, rows_at


def reference(cache: Tensor, positions: Tensor, source: Tensor | None, ring: bool) -> Tensor:
    out = fake(cache, positions, source, ring)
    batch, tokens = out.shape[:2]
    if out.numel() == 0:
        return out
    if cache.numel() == 0:
        return out.zero_()
    row = rows_at(positions, cache.shape[1], ring).expand(batch, tokens)
    element = torch.arange(batch, device=row.device) if source is None else source
    there = (row >= 0) & ((element >= 0) & (element < len(cache))).unsqueeze(1)
    found = cache[element.clamp(0, len(cache) - 1).unsqueeze(1), row.clamp(min=0)]
    return out.copy_(torch.where(there.view(batch, tokens, *[1] * (cache.ndim - 2)), found, 0))


def peer(cache: Tensor, positions: Tensor, source: Tensor | None, ring: bool) -> Tensor:
    """For positions and elements that all have a row."""
    row = positions % cache.shape[1] if ring else positions
    element = torch.arange(len(cache), device=cache.device) if source is None else source
    return cache[element.unsqueeze(1), row]


def fake(cache: Tensor, positions: Tensor, source: Tensor | None, ring: bool) -> Tensor:
    return cache.new_empty((cache.shape[0] if source is None else source.shape[0], positions.shape[1],
                            *cache.shape[2:]))


def cost(cache: Tensor, positions: Tensor, source: Tensor | None, ring: bool) -> Cost:
    return Cost(flops=0.0, bytes=2 * nbytes(fake(cache, positions, source, ring)) + nbytes(positions, source))


def cases() -> Iterator[Case]:
    def make(batch: int, held: int, tokens: int, *row: int, start: int = 0, ring: bool = False, each: bool = False,
             source: tuple[int, ...] | None = None, layout: str = "contiguous", absent: tuple[int, ...] = ()):
        """each: every element has positions of its own, in no order. absent: tokens without a position."""
        def draw(d: Draw) -> tuple:
            elements = None if source is None else torch.tensor(source, dtype=torch.int64)
            positions = start + torch.arange(tokens).unsqueeze(0)
            if each:
                results = batch if source is None else len(source)
                positions = torch.stack([torch.randperm(held, generator=d.generator)[:tokens]
                                         for _ in range(results)]).reshape(results, tokens)
            positions[:, list(absent)] = -1
            return d.normal(batch, held, *row, layout=layout), positions, elements, ring
        return draw

    yield case("wan_window", "network big", make(1, 32760, 9360, 2, 12, 128, start=30000, ring=True))
    yield case("beams", "network big", make(8, 1024, 512, 2, 16, 64, source=(0, 0, 2, 1, 1, 7, 3, 3)))
    yield case("pixart_tokens", "network", make(2, 1024, 256, 1152, each=True))
    yield case("in_order", "", make(2, 5, 5, 2, 3, 8, start=13, ring=True))
    yield case("reordered", "", make(3, 12, 7, 2, 3, 8, source=(2, 0, 0, 1)))
    yield case("no_such_element", "", make(3, 6, 4, 16, source=(2, -1, 3), each=True))
    yield case("past_the_end", "", make(2, 6, 5, 2, 8, start=4))
    yield case("absent", "", make(3, 9, 6, 16, each=True, absent=(0, 4)))
    yield case("ragged", "ragged", make(3, 11, 7, 37, each=True))
    yield case("one_number", "ragged", make(2, 5, 3, each=True))
    yield case("misaligned", "view", make(2, 9, 4, 33, each=True, layout="view"))
    yield case("sliced", "view", make(2, 9, 4, 32, source=(1, 1), layout="slice"))
    yield case("no_tokens", "empty", make(2, 9, 0, 8))
    yield case("nothing_held", "empty", make(2, 0, 3, 8, ring=True))
    yield case("no_batch", "empty", make(2, 9, 4, 8, source=()))


_call = register(Op("kv_gather", "(Tensor cache, Tensor positions, Tensor? source, bool ring) -> Tensor", reference,
                    fake, cases, cost, peer))


@public
def kv_gather(cache: Tensor, positions: Tensor, source: Tensor | None = None, *, ring: bool = False) -> Tensor:
    """Tokens of a cache: out[b, t] = cache[source[b], positions[b, t]].

    cache: (B, capacity, ...) of any dtype. positions: int64 (T,), or (N, T) with positions of each element's own.
    source: int64 (N,), which element of the cache each result comes from (beams that go on, several samples of one
    prompt); without it N = B and each is its own. positions and source are on the cache's device, where they stay.
    Output: (N, T, ...), contiguous. Where the position is negative or past the capacity, or there is no such element,
    it is zero; with ``ring`` positions go round instead, as in ``kv_append``.
    Raises ShapeError, DeviceError.
    """
    if cache.ndim < 2:
        raise ShapeError(f"kv_gather: cache has shape {shape_of(cache)}, needs (batch, tokens, ...)")
    if source is not None and source.ndim != 1:
        raise ShapeError(f"kv_gather: source has shape {shape_of(source)}, needs one dimension")
    if source is not None and (source.dtype != torch.int64 or source.device != cache.device):
        raise DeviceError(f"kv_gather: source is {source.dtype} on {source.device}, needs torch.int64 on "
                          f"{cache.device}")
    batch = cache.shape[0] if source is None else source.shape[0]
    return _call(cache, checked_positions("kv_gather", positions, batch, cache), source, ring)
