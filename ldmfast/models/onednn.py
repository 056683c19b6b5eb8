"""oneDNN's operators as torch ships them: are they the known ones, and weights in the layout they prefer.

On a CPU torch ships oneDNN's operators with prepacked weights and fused additions, as semi-private names. Their schemas
are compared once, at import; where one differs, torch's public functions run instead and a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops._heap import keep_freed_memory

SCHEMAS = {
    "mkldnn::_linear_pointwise": "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> "
                                 "Tensor Y",
    "mkldnn::_linear_pointwise.binary": "(Tensor X, Tensor other, Tensor W, Tensor? B, str attr) -> Tensor Y",
    "mkldnn::_convolution_pointwise": "(Tensor X, Tensor W, Tensor? B, int[] padding, int[] stride, int[] dilation, "
                                      "int groups, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y",
    "mkldnn::_convolution_pointwise.binary": "(Tensor X, Tensor other, Tensor W, Tensor? B, int[] padding, int[] "
                                             "stride, int[] dilation, int groups, str binary_attr, Scalar? alpha, str? "
                                             "unary_attr, Scalar?[] unary_scalars, str? unary_algorithm) -> Tensor Y",
    "mkldnn::_reorder_linear_weight": "(Tensor self, int? batch_size=None) -> Tensor Y",
    "mkldnn::_reorder_convolution_weight": "(Tensor self, int[2] padding=0, int[2] stride=1, int[2] dilation=1, int "
                                           "groups=1, int[]? input_size=None) -> Tensor Y",
}
INT8_SCHEMAS = {
    "onednn::qlinear_prepack": "(Tensor weight, int[]? x_shape) -> Tensor",
    "onednn::qconv_prepack": "(Tensor weight, Tensor w_scales, float x_scale, int x_zp, int[] stride, int[] padding, "
                             "int[] dilation, int groups, int[]? x_shape=None) -> Tensor",
    "onednn::qlinear_pointwise.tensor": "(Tensor qx, Tensor x_scale, Tensor x_zero_point, Tensor qw, Tensor w_scale, "
                                        "Tensor w_zero_point, Tensor? bias, float output_scale, int "
                                        "output_zero_point, ScalarType? output_dtype, str post_op_name, Scalar?[] "
                                        "post_op_args, str post_op_algorithm) -> Tensor",
    "onednn::qlinear_pointwise.binary_tensor": "(Tensor qx, Tensor x_scale, Tensor x_zero_point, Tensor qw, Tensor "
                                               "w_scale, Tensor w_zero_point, Tensor? other, Tensor? bias, float "
                                               "output_scale, int output_zero_point, ScalarType? output_dtype, float "
                                               "other_scale, int other_zp, str binary_post_op, float binary_alpha, "
                                               "str unary_post_op, Scalar?[] unary_post_op_args, str "
                                               "unary_post_op_algorithm) -> Tensor",
    "onednn::qconv_pointwise.tensor": "(Tensor qx, Tensor x_scale, Tensor x_zero_point, Tensor qw, Tensor w_scale, "
                                      "Tensor w_zero_point, Tensor? bias, int[] stride, int[] padding, int[] "
                                      "dilation, int groups, float output_scale, int output_zero_point, ScalarType? "
                                      "output_dtype, str attr, Scalar?[] scalars, str? algorithm) -> Tensor",
}


def as_expected(schemas: dict[str, str], instead: str) -> bool:
    """Whether this torch has exactly these operators."""
    wrong = []
    for name, schema in schemas.items():
        base, _, overload = name.partition(".")
        try:
            found = str(torch._C._get_schema(base, overload))
        except RuntimeError:
            found = ""
        if found != name + schema:
            wrong.append(name)
    if wrong and torch.backends.mkldnn.is_available():
        warnings.warn(f"torch {torch.__version__} has another {wrong[0]} than ldmfast knows; {instead}", stacklevel=3)
    return not wrong and torch.backends.mkldnn.is_available()


_HOLES = 128 << 20  # bytes
_rearranged = 0  # bytes, since memory was last returned; a lost update between threads only delays it


def _return_memory(size: int) -> None:
    """Called after a weight was rearranged: now and then gives the holes that the former ones left to the system."""
    global _rearranged
    _rearranged += size
    if _rearranged > _HOLES:
        _rearranged = 0
        keep_freed_memory()


class Packed:
    """A convolution's weight in the layout that oneDNN prefers for the input of one size.

    The layout depends on the size, and with a foreign one oneDNN falls to a reference kernel, twenty times slower; so
    another size rearranges the weight, which costs what torch's own convolution pays at every call. Numbers never
    change, and a thread that still computes with the former layout keeps it alive.
    """

    def __init__(self, weight: Tensor, reorder: Callable[[Tensor, list[int]], Tensor]):
        self.held: tuple[tuple[int, ...], Tensor] = ((), weight)
        self.reorder = reorder

    def dense(self) -> Tensor:
        """The weight (out, in, kh, kw), of the numbers that were given."""
        weight = self.held[1]
        return weight.to_dense() if weight.is_mkldnn else weight

    def at(self, x: Tensor) -> Tensor:
        """The weight for an input like x."""
        shape = tuple(x.shape)
        made_for, weight = self.held
        if made_for != shape and x.numel() > 0:
            weight = self.reorder(weight.to_dense() if weight.is_mkldnn else weight, list(shape))
            self.held = (shape, weight)
            _return_memory(weight.numel() * weight.element_size())
        return weight
