"""The values that a session holds, with their sizes counted."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import partial

from torch import Tensor

from .. import ops

Value = tuple[Tensor | None, ...]  # what a segment gives: one tensor, or those of text and image


class _Rows:
    """A tensor as 8-bit codes; its last dimension, or the channels of an image, share a scale."""

    def __init__(self, x: Tensor) -> None:
        self.image = x.ndim == 4
        rows = x.permute(0, 2, 3, 1) if self.image else x
        self.codes, self.scale = ops.quantize_rowwise(rows)
        self.dtype = x.dtype
        self.nbytes = self.codes.nbytes + self.scale.nbytes

    def back(self) -> Tensor:
        x = (self.codes.float() * self.scale[..., None]).to(self.dtype)
        return x.permute(0, 3, 1, 2) if self.image else x

    def map(self, function: Callable[[Tensor], Tensor]) -> _Rows:
        return _Rows(function(self.back()))


class _Plain:
    """A tensor that is nobody else's: one that shows a part of some memory would keep all of it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
        self.nbytes = x.nbytes

    def back(self) -> Tensor:
        return self.x

    def map(self, function: Callable[[Tensor], Tensor]) -> _Plain:
        return _Plain(function(self.x))


Held = tuple[_Rows | _Plain | None, ...]  # a Value as it is held


def hold(value: Iterable[Tensor | None], int8: bool) -> Held:
    return tuple(None if x is None else (_Rows if int8 else _Plain)(x) for x in value)


def size(held: Held) -> int:
    """In bytes."""
    return sum(x.nbytes for x in held if x is not None)


class Store:
    """Segment -> its last values with the evaluations they are of, the newest first; at most as many as asked.

    bytes: held now, peak: the most so far.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, Hashable], list[tuple[int, Held]]] = {}
        self.bytes = self.peak = 0

    def put(self, kind: str, place: Hashable, step: int, value: Iterable[Tensor | None], most: int, int8: bool) -> None:
        held = hold(value, int8)
        row = self._values.setdefault((kind, place), [])
        for _, old in row[most - 1:]:
            self.bytes -= size(old)
        row[:] = [(step, held), *row[: most - 1]]
        self.bytes += size(held)
        self.peak = max(self.peak, self.bytes)

    def steps(self, kind: str, place: Hashable) -> tuple[int, ...]:
        """The evaluations whose values are held."""
        return tuple(step for step, _ in self._values.get((kind, place), ()))

    def get(self, kind: str, place: Hashable, number: int = 0) -> Value:
        return tuple(None if x is None else x.back() for x in self._values[kind, place][number][1])

    def drop(self, kind: str) -> None:
        for key in [k for k in self._values if k[0] == kind]:
            self.bytes -= sum(size(held) for _, held in self._values.pop(key))

    def map(self, function: Callable[[str, Tensor], Tensor]) -> None:
        """Replaces every tensor by function(kind, tensor)."""
        for (kind, _), row in self._values.items():
            for i, (step, held) in enumerate(row):
                self.bytes -= size(held)
                row[i] = step, tuple(None if x is None else x.map(partial(function, kind)) for x in held)
                self.bytes += size(row[i][1])
