"""layer_norm_modulate_q8: layer_norm_modulate straight to uint8 codes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ._faults import public
from ._op import Case, Cost, Op, accumulator, register, shape_of
from ._q8 import RESULT, Codes, cost_of, empty_codes, encode, ends, torch_encode
from .layer_norm_modulate import cases as plain_cases
from .layer_norm_modulate import check, condition
from .layer_norm_modulate import cost as plain_cost
from .layer_norm_modulate import peer as plain_peer
from .layer_norm_modulate import reference as plain_reference


def reference(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None,
              bias: Tensor | None, eps: float) -> Codes:
    y = plain_reference(x.to(accumulator(x)), scale, shift, weight, bias, eps)
    return encode(y, *ends(y))


def peer(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None,
         eps: float) -> Codes:
    return torch_encode(plain_peer(x, scale, shift, weight, bias, eps))


def fake(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None,
         eps: float) -> Codes:
    return empty_codes(x, shape_of(x))


def cost(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None,
         eps: float) -> Cost:
    return cost_of(plain_cost(x, scale, shift, weight, bias, eps), x.numel(), x.dtype)


def cases() -> Iterator[Case]:
    return iter(plain_cases())


_call = register(Op("layer_norm_modulate_q8", "(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, "
                    "Tensor? bias, float eps)" + RESULT, reference, fake, cases, cost, peer, cpu_only=True))


@public
def layer_norm_modulate_q8(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
                           weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Codes:
    """uint8 codes of y = layer_norm_modulate(x, ...), which is never in memory itself.

    Arguments as in layer_norm_modulate; result and formula as in quantize, contiguous.
    Raises ShapeError when sizes do not fit.
    """
    name = "layer_norm_modulate_q8"
    check(name, x, weight, bias)
    return _call(x, condition(name, "scale", scale, x), condition(name, "shift", shift, x), weight, bias, eps)
