"""Linears in 8 bits with a scale for each row of both factors, as GPUs multiply: e4m3 (Micikevicius et al. 2022)
through torch._scaled_mm, int8 through torch._int_mm. A CPU runs the same calls, to check the numbers.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import PrecisionError
from ..quantization import Plan

FORMS = ("fp8", "int8_rows")  # of a quantization.Plan
_STEP = 16  # cuBLAS: both sizes of a weight of 8 bits are multiples of it
_LEAST_ROWS = 17  # torch._int_mm on a GPU takes no fewer
_SCHEMAS = {
    "fp8": ("aten::_scaled_mm", "(Tensor self, Tensor mat2, Tensor scale_a, Tensor scale_b, Tensor? bias=None, Tensor? "
                                "scale_result=None, ScalarType? out_dtype=None, bool use_fast_accum=False) -> Tensor"),
    "int8_rows": ("aten::_int_mm", "(Tensor self, Tensor mat2) -> Tensor")}


def _known(form: str) -> bool:
    """Whether this torch has the operator as it is called here."""
    name, schema = _SCHEMAS[form]
    known = str(torch._C._get_schema(name, "")) == name + schema
    if not known:
        warnings.warn(f"torch {torch.__version__} has another {name} than ldmfast knows; these products run as "
                      "floating-point ones, which is slower", stacklevel=3)
    return known


KNOWN = {form: _known(form) for form in FORMS}


def check_device(precision: str, device: torch.device) -> None:
    """Raises PrecisionError where a GPU is too old for a precision of 8 bits; warns on a CPU, which is slow in fp8."""
    if device.type == "cpu":
        if precision == "fp8":
            warnings.warn("ldmfast: precision='fp8' on a CPU computes what a GPU would, slowly; 'int8' and 'bf16' are "
                          "fast here", RuntimeWarning, stacklevel=3)
        return
    needed = {"fp8": (8, 9), "int8": (8, 0)}[precision]
    found = torch.cuda.get_device_capability(device)
    if found < needed:
        others = "'int8' or 'bf16'" if precision == "fp8" and found >= (8, 0) else "'exact'"
        raise PrecisionError(f"precision={precision!r} needs a GPU of compute capability {needed[0]}.{needed[1]} or "
                             f"newer, {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: use {others}")


def plan_for(precision: str, device: torch.device) -> Plan | None:
    """The plan that needs no data, of a precision of 8 bits on a device; None for other precisions.
    Raises PrecisionError where a GPU is too old for it."""
    if precision not in ("int8", "fp8"):
        return None
    check_device(precision, device)
    return Plan(form="fp8" if precision == "fp8" else "int8" if device.type == "cpu" else "int8_rows")


def fits(weight: Tensor) -> bool:
    """Whether the product with this weight (out, in) exists in 8 bits."""
    return weight.ndim == 2 and weight.numel() > 0 and all(size % _STEP == 0 for size in weight.shape)


def rows_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (out, ...) -> int8 values and one fp32 scale for each output, symmetric: value * scale."""
    values, scale = ops.quantize_rowwise(weight.detach().flatten(1))
    return values.view(weight.shape), scale


def sums_of_rows(values: Tensor) -> Tensor:
    """Of each output's int8 values, int32. On a CPU by a product with ones: torch sums integers 50 times as slowly."""
    rows = values.flatten(1)
    if rows.device.type != "cpu" or rows.numel() == 0:
        return rows.sum(1).int()
    return torch._int_mm(rows, rows.new_ones(rows.shape[1], 1)).squeeze(1)


class RowCodes(NamedTuple):
    """An activation of 8 bits with a scale for each row, as a norm or a gate before the product gives it.

    values: e4m3 or int8 (..., C). scale: fp32 (...). dtype: that the activation would have, and the product has.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    def dense(self) -> Tensor:
        """What the codes stand for."""
        return (self.values.float() * self.scale.unsqueeze(-1)).to(self.dtype)


class RowwiseWeight(nn.Module):
    """Weight of a product whose two factors are rounded to 8 bits row by row; nothing of higher precision is kept.

    values: e4m3 or int8 (out, in). scale: fp32 (1, out). bias: (out,) or None.
    """

    values: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, form: str):
        super().__init__()
        self.form = form
        values, scale = ops.quantize_rowwise(weight.detach(), fp8=form == "fp8")
        self.register_buffer("values", values)
        self.register_buffer("scale", scale.unsqueeze(0))
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor | RowCodes, residual: Tensor | None = None) -> Tensor:
        """x: (..., in), bf16 (on a CPU also fp32), or its codes -> x W^T + b (+ residual), of x's dtype."""
        if not isinstance(x, RowCodes):
            x = RowCodes(*ops.quantize_rowwise(x, fp8=self.form == "fp8"), x.dtype)
        codes = x.values.reshape(-1, x.values.shape[-1])
        out = self._product(codes, x.scale.reshape(-1, 1), x.dtype).view(*x.values.shape[:-1], len(self.values))
        return out if residual is None else out.add_(residual)

    def _product(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        if len(codes) == 0:
            return scale.new_empty(0, len(self.values), dtype=dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if not KNOWN[self.form]:
            wide = F.linear(codes.float() * scale, self.dense(torch.float32))
            return (wide if bias is None else wide.add_(bias)).to(dtype)
        if self.form == "fp8":
            return torch._scaled_mm(codes, self.values.t(), scale, self.scale, bias=bias, out_dtype=dtype)
        count = len(codes)
        if codes.is_cuda and count < _LEAST_ROWS:
            codes = F.pad(codes, (0, 0, 0, _LEAST_ROWS - count))
        sums = torch._int_mm(codes, self.values.t())[:count]
        out = sums.float().mul_(scale).mul_(self.scale)
        return (out if bias is None else out.add_(bias)).to(dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that the codes stand for."""
        return (self.values.float() * self.scale.t()).to(dtype)
