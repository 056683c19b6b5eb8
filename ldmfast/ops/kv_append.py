"""kv_append: the rows of new tokens into a preallocated cache, at positions that lie on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import DeviceError, LdmfastError, ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, case, nbytes, register, shape_of


def rows_at(positions: Tensor, capacity: int, ring: bool) -> Tensor:
    """The row of each position, -1 for none."""
    if capacity == 0:
        return torch.full_like(positions, -1)
    row = positions % capacity if ring else positions
    return torch.where((positions >= 0) & (row < capacity), row, -1)


def reference(cache: Tensor, new: Tensor, positions: Tensor, ring: bool) -> None:
    if new.numel() == 0:
        return
    batch, capacity = cache.shape[:2]
    tokens = new.shape[1]
    row = rows_at(positions, capacity, ring).expand(batch, tokens)
    # which token a row gets, -1 for none; one column more takes the tokens without a row
    token = torch.full((batch, capacity + 1), -1, dtype=torch.int64, device=cache.device)
    token.scatter_(1, torch.where(row < 0, capacity, row), torch.arange(tokens, device=row.device).expand_as(row))
    token = token[:, :capacity]
    element = torch.arange(batch, device=row.device).unsqueeze(1)
    placed = new[element, token.clamp(min=0)]
    cache.copy_(torch.where((token < 0).view(batch, capacity, *[1] * (cache.ndim - 2)), cache, placed))


def peer(cache: Tensor, new: Tensor, positions: Tensor, ring: bool) -> None:
    """For positions that all have a row."""
    row = positions % cache.shape[1] if ring else positions
    cache[torch.arange(len(cache), device=cache.device).unsqueeze(1), row] = new


def fake(cache: Tensor, new: Tensor, positions: Tensor, ring: bool) -> None:
    return None


def cost(cache: Tensor, new: Tensor, positions: Tensor, ring: bool) -> Cost:
    return Cost(flops=0.0, bytes=2 * nbytes(new) + nbytes(positions))


def cases() -> Iterator[Case]:
    def make(batch: int, capacity: int, tokens: int, *row: int, start: int = 0, ring: bool = False, each: bool = False,
             layout: str = "contiguous", dropped: tuple[int, ...] = ()):
        """each: every element has positions of its own, in no order. dropped: tokens without a position."""
        def draw(d: Draw) -> tuple:
            positions = start + torch.arange(tokens).unsqueeze(0)
            if each:
                positions = torch.stack([torch.randperm(capacity, generator=d.generator)[:tokens]
                                         for _ in range(batch)]).reshape(batch, tokens)
            positions[:, list(dropped)] = -1
            return d.normal(batch, capacity, *row, layout=layout), d.normal(batch, tokens, *row), positions, ring
        return draw

    yield case("llada_block", "network big", make(1, 4096, 32, 2, 32, 128, start=1024))
    yield case("wan_frame", "network big", make(1, 32760, 1560, 2, 12, 128, start=31000, ring=True))
    yield case("var_scale", "network", make(2, 680, 256, 2, 16, 64, start=424))
    yield case("next_token", "", make(2, 12, 1, 2, 3, 8, start=7))
    yield case("goes_round", "", make(2, 5, 4, 2, 3, 8, start=13, ring=True))
    yield case("past_the_end", "", make(2, 6, 5, 2, 8, start=4))
    yield case("without_place", "", make(3, 9, 6, 16, each=True, dropped=(0, 4)))
    yield case("ragged", "ragged", make(3, 11, 7, 37, each=True))
    yield case("one_number", "ragged", make(2, 5, 3, each=True))
    yield case("one_row", "ragged", make(1, 1, 1, 2, 8, start=40, ring=True))
    yield case("misaligned", "view", make(2, 9, 4, 33, each=True, layout="view"))
    yield case("sliced", "view", make(2, 9, 4, 32, start=2, layout="slice"))
    yield case("no_tokens", "empty", make(2, 9, 0, 8))
    yield case("no_capacity", "empty", make(2, 0, 0, 8, ring=True))
    yield case("no_batch", "empty", make(0, 9, 4, 8))


_call = register(Op("kv_append", "(Tensor(a!) cache, Tensor new, Tensor positions, bool ring) -> ()", reference, fake,
                    cases, cost, peer))


def whole_rows(x: Tensor) -> bool:
    """Whether the dimensions after the tokens' are adjacent in memory."""
    expected = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:])):
        if size > 1 and stride != expected:
            return False
        expected *= max(1, size)
    return True


def checked_positions(op: str, positions: Tensor, batch: int, like: Tensor) -> Tensor:
    """As (batch or 1, tokens)."""
    shaped = positions.unsqueeze(0) if positions.ndim == 1 else positions
    if shaped.ndim != 2 or shaped.shape[0] not in (1, batch):
        raise ShapeError(f"{op}: positions has shape {shape_of(positions)}, needs (tokens,) or ({batch}, tokens)")
    if shaped.dtype != torch.int64 or shaped.device != like.device:
        raise DeviceError(f"{op}: positions is {shaped.dtype} on {shaped.device}, needs torch.int64 on {like.device}")
    return shaped


def _one_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@public
def kv_append(cache: Tensor, new: Tensor, positions: Tensor, *, ring: bool = False) -> None:
    """Writes new tokens into a cache: cache[b, positions[b, t]] = new[b, t].

    cache: (B, capacity, ...), for keys and values side by side (B, capacity, 2, heads, head_dim), whose parts attention
    reads in place; what stands after the first two dimensions is adjacent in memory. new: (B, T, ...), the same after
    T, of the cache's dtype (any) and device. positions: int64 (T,), or (B, T) with positions of each element's own, on
    that device, where they stay: a CUDA graph may count them up. A token whose position is negative, or past the
    capacity, is left out; with ``ring`` positions go round instead, so that the last ``capacity`` tokens are kept.
    Two tokens of an element that come to one row are an error that nobody reports: either may stay.
    Raises ShapeError, LdmfastError for other dtypes and for a cache of another layout, DeviceError.
    """
    one, other = ((x.shape[0], *x.shape[2:]) if x.ndim > 1 else None for x in (cache, new))
    if one is None or one != other:
        raise ShapeError(f"kv_append: cache has shape {shape_of(cache)} and new {shape_of(new)}; both need one "
                         "(batch, tokens, ...) that differs in tokens only")
    if cache.dtype != new.dtype:
        raise LdmfastError(f"kv_append: cache is {cache.dtype} and new {new.dtype}; give them one dtype")
    if cache.device != new.device:
        raise DeviceError(f"kv_append: cache is on {cache.device} and new on {new.device}; bring both to one device")
    if not whole_rows(cache):
        raise LdmfastError(f"kv_append: cache of shape {shape_of(cache)} has strides {cache.stride()}; what stands "
                           "after its first two dimensions must be adjacent in memory")
    if any(size > 1 and stride == 0 for size, stride in zip(cache.shape[:2], cache.stride())):
        raise LdmfastError(f"kv_append: cache of shape {shape_of(cache)} is expanded: its rows share memory; give it "
                           "rows of their own")
    place = checked_positions("kv_append", positions, new.shape[0], cache)
    if place.shape[1] != new.shape[1]:
        raise ShapeError(f"kv_append: {place.shape[1]} positions for {new.shape[1]} new tokens; give one for each")
    if ring and new.shape[1] > cache.shape[1]:
        raise ShapeError(f"kv_append: {new.shape[1]} new tokens go round a ring of {cache.shape[1]} more than once; "
                         "append its last ones only")
    if torch.compiler.is_compiling() or (new.numel() and _one_storage(cache, new)):  # a tracer has no addresses
        new = new.clone()  # rows are written one after another
    _call(cache, new, place, ring)
