"""layer_norm_modulate: LayerNorm over the last dimension, then y * (1 + scale) + shift."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn.functional import layer_norm

from ..errors import ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, nbytes, numel, register, shape_of


def reference(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None,
              bias: Tensor | None, eps: float) -> Tensor:
    dtype = accumulator(x)
    y = x.to(dtype)
    mean = y.mean(-1, keepdim=True)
    variance = (y - mean).square().mean(-1, keepdim=True)
    y = (y - mean) * (variance + eps).rsqrt()
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    batches = numel(x.shape[:-2])
    y = y.reshape(batches, *x.shape[-2:])
    if scale is not None:
        y = y * (1 + scale.to(dtype).unsqueeze(1))
    if shift is not None:
        y = y + shift.to(dtype).unsqueeze(1)
    return y.reshape(x.shape).to(x.dtype)


def peer(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None,
         eps: float) -> Tensor:
    y = layer_norm(x, x.shape[-1:], weight, bias, eps)
    if scale is None and shift is None:
        return y
    y = y.reshape(numel(x.shape[:-2]), *x.shape[-2:])
    y = y if scale is None else y * (1 + scale.unsqueeze(1))
    y = y if shift is None else y + shift.unsqueeze(1)
    return y.reshape(x.shape)


def fake(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None,
         eps: float) -> Tensor:
    return x.new_empty(x.shape)


def cost(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None,
         eps: float) -> Cost:
    return Cost(flops=9.0 * x.numel(), bytes=2 * nbytes(x) + nbytes(scale, shift, weight, bias))


def cases() -> Iterator[Case]:
    def make(shape: tuple[int, ...], *, modulated: bool = False, affine: bool = False,
             layout: str = "contiguous", batches: int | None = None, offset: float = 0.2):
        def draw(d: Draw) -> tuple:
            c = shape[-1]
            rows = numel(shape[:-2]) if batches is None else batches
            return (d.normal(*shape, layout=layout, offset=offset),
                    d.normal(rows, c, scale=0.3) if modulated else None,
                    d.normal(rows, c) if modulated else None,
                    d.normal(c, offset=1.0, scale=0.2) if affine else None,
                    d.normal(c, scale=0.2) if affine else None, 1e-5)
        return draw

    yield case("sd15_64x64", "network big", make((2, 4096, 320), affine=True))
    yield case("sd15_16x16", "network", make((2, 256, 1280), affine=True))
    yield case("clip_text", "network", make((2, 77, 768), affine=True))
    yield case("dit_xl", "network", make((2, 256, 1152), modulated=True))
    yield case("shared_condition", "", make((3, 10, 64), modulated=True, batches=1))
    yield case("both", "", make((2, 9, 40), modulated=True, affine=True))
    yield case("plain_rows", "", make((7, 48)))
    yield case("ragged", "ragged", make((3, 5, 37), modulated=True, affine=True))
    yield case("one_column", "ragged", make((2, 3, 1), affine=True))
    yield case("four_dims", "", make((2, 3, 5, 24), modulated=True))
    yield case("far_mean", "", make((2, 9, 320), affine=True, offset=30.0))
    yield case("misaligned", "view", make((2, 9, 33), layout="view", modulated=True))
    yield case("sliced", "view", make((2, 9, 32), layout="slice", affine=True))
    yield case("no_batch", "empty", make((0, 4, 32), modulated=True, affine=True))
    yield case("no_tokens", "empty", make((2, 0, 32), modulated=True))


_call = register(Op("layer_norm_modulate", "(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, "
                    "Tensor? bias, float eps) -> Tensor", reference, fake, cases, cost, peer))


def check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if x.ndim < 2:
        raise ShapeError(f"{op}: x has {x.ndim} dimensions, needs (..., tokens, channels)")
    c = x.shape[-1]
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != (c,):
            raise ShapeError(f"{op}: {name} has shape {shape_of(p)}, needs ({c},)")


def condition(op: str, name: str, p: Tensor | None, x: Tensor) -> Tensor | None:
    """Brings scale or shift to (batches or 1, C), the form the kernels take."""
    if p is None:
        return None
    lead, c = x.shape[:-2], x.shape[-1]
    if p.ndim == x.ndim and p.shape[-2] == 1:
        p = p.squeeze(-2)
    if p.shape[-1:] == (c,) and (p.ndim == 1 or p.shape[:-1] == lead or numel(p.shape[:-1]) == 1):
        return p.reshape(numel(p.shape[:-1]), c) if p.ndim != 2 else p
    raise ShapeError(f"{op}: {name} has shape {shape_of(p)}, needs {(*lead, c)}, "
                     f"{(*lead, 1, c)} or ({c},) for x of shape {shape_of(x)}")


@public
def layer_norm_modulate(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
                        weight: Tensor | None = None, bias: Tensor | None = None,
                        eps: float = 1e-5) -> Tensor:
    """LayerNorm (Ba et al. 2016) with optional weight and bias, then y * (1 + scale) + shift (adaLN of DiT,
    Peebles and Xie 2023, section 3.2).

    x: (..., T, C), floating. scale, shift: (N, C), (N, 1, C) or (C,), one row for all tokens of an element.
    weight, bias: (C,). Output: contiguous, x's shape and dtype. Statistics in fp32 (fp64 for fp64).
    Raises ShapeError when sizes do not fit.
    """
    name = "layer_norm_modulate"
    check(name, x, weight, bias)
    if scale is not None:
        scale = condition(name, "scale", scale, x)
    if shift is not None:
        shift = condition(name, "shift", shift, x)
    return _call(x, scale, shift, weight, bias, eps)
