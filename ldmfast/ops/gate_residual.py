"""gate_residual: x + gate * y, the end of every adaLN-zero branch."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..errors import LdmfastError, ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, nbytes, numel, register, shape_of
from .layer_norm_modulate import condition


def _by_element(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """x as (N, T, C), gate as (N or 1, 1, C)."""
    return x.reshape(numel(x.shape[:-2]), *x.shape[-2:]), gate.unsqueeze(1)


def reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    dtype = accumulator(x)
    flat, factor = _by_element(y.to(dtype), gate.to(dtype))
    return (x.to(dtype) + (flat * factor).reshape(x.shape)).to(x.dtype).contiguous()


def peer(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    flat, factor = _by_element(y, gate)
    return x + (flat * factor).reshape(x.shape)


def fake(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def cost(x: Tensor, y: Tensor, gate: Tensor) -> Cost:
    return Cost(flops=2.0 * x.numel(), bytes=2 * nbytes(x) + nbytes(y, gate))


def cases() -> Iterator[Case]:
    def make(shape: tuple[int, ...], *, layout: str = "contiguous", batches: int | None = None):
        def draw(d: Draw) -> tuple:
            rows = numel(shape[:-2]) if batches is None else batches
            return d.normal(*shape, layout=layout), d.normal(*shape, layout=layout), d.normal(rows, shape[-1])
        return draw

    yield case("flux_1024", "network big", make((1, 1024, 3072)))
    yield case("sd3_4096", "network big", make((2, 4096, 1536)))
    yield case("dit_xl", "network", make((2, 256, 1152)))
    yield case("shared_gate", "", make((3, 10, 64), batches=1))
    yield case("plain_rows", "", make((7, 48)))
    yield case("four_dims", "", make((2, 3, 5, 24)))
    yield case("ragged", "ragged", make((3, 5, 37)))
    yield case("one_column", "ragged", make((2, 3, 1)))
    yield case("misaligned", "view", make((2, 9, 33), layout="view"))
    yield case("sliced", "view", make((2, 9, 32), layout="slice"))
    yield case("no_batch", "empty", make((0, 4, 32)))
    yield case("no_tokens", "empty", make((2, 0, 32)))


_call = register(Op("gate_residual", "(Tensor x, Tensor y, Tensor gate) -> Tensor", reference, fake, cases, cost,
                    peer))


@public
def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y: the residual sum of an adaLN-zero block (Peebles and Xie 2023, section 3.2), rounded once.

    x, y: (..., T, C), floating, one shape and dtype. gate: (N, C), (N, 1, C) or (C,), one row for all tokens of an
    element. Output: contiguous, x's shape and dtype.
    Raises ShapeError when sizes do not fit, LdmfastError for mixed dtypes of x and y.
    """
    if x.ndim < 2 or x.shape != y.shape:
        raise ShapeError(f"gate_residual: x has shape {shape_of(x)} and y {shape_of(y)}; both need one "
                         "(..., tokens, channels)")
    if x.dtype != y.dtype:
        raise LdmfastError(f"gate_residual: x is {x.dtype} and y {y.dtype}; give them one dtype")
    return _call(x, y, condition("gate_residual", "gate", gate, x))
