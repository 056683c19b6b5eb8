"""Is a kernel as exact as it must be? Shared by test_ops.py and, through ``python tests/parity.py``, by the run of
every instruction-set level in a process of its own.

A kernel's error against the float64 reference may be twice that of torch's own implementation in the same dtype
(``row.peer``), plus a rounding band of one unit in the last place of the largest result. For fp64 there is no better
reference, so torch's fp32 error is scaled by the ratio of the two dtypes' rounding.

A row <op>_q8 gives codes of what row <op> gives: with y that result in float64 and e the error that <op> may have, the
ends of its range may be off by e, so scale by 2 e / 255; and a decoded code may be off by e and half a step of scale.
Rows that only move numbers (MOVES) have to agree in every bit.
Codes with a scale a row (quantize_rowwise, <op>_rows), or under a given scale (<op>_fp8), have to decode to within half
a step of what they were made from, and of the error that this may have.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ldmfast import ops
from ldmfast.ops._op import Case, Op
from ldmfast.ops._q8 import RESULT, ROW_RESULT

MOVES = ("kv_append", "kv_gather", "pack_weight")  # rows that compute nothing
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cast(args: Any, dtype: torch.dtype) -> Any:
    """The arguments with every floating tensor in another dtype (the float64 coefficient table stays)."""
    if isinstance(args, Tensor):
        return args.to(dtype) if args.is_floating_point() else args
    if isinstance(args, (list, tuple)):
        return type(args)(cast(a, dtype) for a in args)
    return args


def distance(a: Tensor, b: Tensor) -> float:
    difference = (a.double() - b.double()).abs()
    return float(difference[torch.isfinite(difference)].max()) if difference.numel() else 0.0


def low_precision(row: Op, args: Any) -> Tensor:
    if any(isinstance(a, Tensor) and a.numel() == 0 for a in args):
        return row.reference(*args)
    table = args[:1] if row.name == "lincomb" else ()
    try:
        return row.peer(*args)
    except RuntimeError:  # torch has no such kernel for mixed or odd dtypes: one dtype for all
        return row.peer(*table, *cast(args[len(table):], torch.float32))


def allowed(row: Op, args: Any, dtype: torch.dtype, exact: Tensor) -> float:
    top = float(exact.abs().max()) if exact.numel() else 0.0
    if dtype != torch.float64:
        return 2 * distance(low_precision(row, args), exact) + torch.finfo(dtype).eps * top
    keep = 1 if row.name == "lincomb" else 0
    single = low_precision(row, (*args[:keep], *cast(args[keep:], torch.float32)))
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return ratio * 2 * distance(single, exact) + 2 * torch.finfo(dtype).eps * top


def failure(row: Op, case: Case, dtype: torch.dtype, run: Any = None) -> str:
    """Empty if the kernel (the live one unless ``run`` is given) is exact enough, otherwise what is wrong."""
    args = case.args(dtype)
    before = copied(args) if row.name in MOVES else ()
    out = (run or row.overload)(*args)
    if row.name in MOVES:
        return moved(row, before, args, out)
    if row.schema.endswith(RESULT):
        wrong = [text for one, expected in zip(out, row.fake(*args)) if (text := wrong_memory(one, expected))]
        return "; ".join(wrong) or wrong_codes(row, args, dtype, *out)
    if row.schema.endswith(ROW_RESULT):
        return wrong_row_codes(row, args, dtype, *out)
    if out.dtype == torch.float8_e4m3fn:
        return wrong_scaled_codes(row, args, dtype, out)
    if wrong := wrong_memory(out, row.fake(*args)):
        return wrong
    exact = row.reference(*cast(args, torch.float64))
    if not torch.equal(torch.isnan(out), torch.isnan(exact)):
        return "NaN where the reference has a number"
    error = distance(out, exact)
    limit = allowed(row, args, dtype, exact)
    return "" if error <= limit else f"error {error:.3g}, allowed {limit:.3g}"


def copied(args: Any) -> Any:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in args)


def moved(row: Op, before: Any, args: Any, out: Any) -> str:
    """Every number where the reference puts it. before: a copy of args, which a row that writes has changed."""
    expected = row.reference(*before)
    if row.writes:
        if out is not None:
            return "gives something"
        return "" if torch.equal(args[0], before[0]) else "not what the reference writes"
    return wrong_memory(out, expected) or ("" if torch.equal(out, expected) else "another order than the reference's")


def wrong_memory(out: Tensor, expected: Tensor) -> str:
    if (out.shape, out.dtype) != (expected.shape, expected.dtype) or out.stride() != expected.stride():
        return f"{out.dtype} {tuple(out.shape)} {out.stride()}, expected {expected.dtype} {tuple(expected.shape)} " \
               f"{expected.stride()}"
    return ""


def before_rounding(row: Op, args: Any, dtype: torch.dtype) -> tuple[Tensor, float]:
    """What the codes of a row stand for, in float64 and without border, and the error it may have."""
    if row.name in ("quantize", "quantize_rowwise"):
        y = args[0].double()
        exact = row.name == "quantize_rowwise" or y.numel() == 0
        return y, 0.0 if exact else torch.finfo(dtype).eps * float(y.abs().max())
    plain = ops.ROWS[row.name.removesuffix("_q8").removesuffix("_rows").removesuffix("_fp8")]
    args = args[:len(plain.overload._schema.arguments)]
    y = plain.reference(*cast(args, torch.float64))
    return y, allowed(plain, args, dtype, y)


def wrong_codes(row: Op, args: Any, dtype: torch.dtype, q: Tensor, scale: Tensor, zero_point: Tensor) -> str:
    y, error = before_rounding(row, args, dtype)
    _, ideal, ideal_zero = row.reference(*cast(args, torch.float64))
    single = torch.finfo(torch.float32)
    step, zero = float(scale), int(zero_point)
    if not abs(step - float(ideal)) <= 2 * error / 255 + 2 * single.eps * float(ideal) + single.tiny:
        return f"scale {step:.9g}, ideally {float(ideal):.9g}, result exact to {error:.3g}"
    if abs(zero - int(ideal_zero)) > 1 + 3 * error / step:  # by one where it lies half-way
        return f"zero point {zero}, ideally {int(ideal_zero)}"
    pad = (q.shape[-1] - y.shape[-1]) // 2 if q.ndim == 4 else 0
    inside = q[..., pad:q.shape[-2] - pad, pad:q.shape[-1] - pad] if pad else q
    if pad and int((q != zero).sum()) != int((inside != zero).sum()):
        return "the border is not the zero point"
    off = distance((inside.double() - zero) * step, y)
    limit = step / 2 * (1 + 1 / 64) + error
    return "" if off <= limit else f"decoded codes off by {off:.3g}, allowed {limit:.3g}"


def wrong_row_codes(row: Op, args: Any, dtype: torch.dtype, q: Tensor, scale: Tensor) -> str:
    """int8 or e4m3 codes of rows, scale = max|y| / 127 or 448; a row that is not finite has scale NaN and codes 0."""
    for one, expected in zip((q, scale), row.fake(*args)):
        if wrong := wrong_memory(one, expected):
            return wrong
    y, error = before_rounding(row, args, dtype)
    codes, scale, largest = q.double(), scale.unsqueeze(-1), 127 if q.dtype == torch.int8 else 448
    top = y.abs().amax(-1, keepdim=True) if y.shape[-1] else y.new_zeros(scale.shape)
    ideal = torch.where(top == 0, 1.0, top / largest)
    finite = torch.isfinite(ideal)
    if not torch.equal(torch.isfinite(scale), finite) or codes[~finite.expand(y.shape)].any():
        return "a row that is not finite needs scale NaN and codes 0"
    single = torch.finfo(torch.float32)
    if ((scale - ideal).abs() > 2 * single.eps * ideal + single.tiny + error / largest)[finite].any():
        return "a scale is not the largest magnitude over the largest code"
    return _off(codes, scale.double(), y, error, q.dtype, finite.expand(y.shape))


def wrong_scaled_codes(row: Op, args: Any, dtype: torch.dtype, q: Tensor) -> str:
    """e4m3 codes under the scale that is the last argument."""
    if wrong := wrong_memory(q, row.fake(*args)):
        return wrong
    y, error = before_rounding(row, args, dtype)
    scale = args[-1].double()
    return _off(q.double(), scale, y.clamp(-448 * scale, 448 * scale), error, q.dtype, torch.isfinite(y))


def _off(codes: Tensor, scale: Tensor, y: Tensor, error: float, kind: torch.dtype, finite: Tensor) -> str:
    step = torch.ones_like(y)
    if kind != torch.int8:  # three bits of fraction, below 2^-6 those of 2^-6
        step = torch.exp2(torch.floor(torch.log2(codes.abs().clamp(min=2.0**-6))) - 3)
    off = (((codes * scale - y).abs() - error) / (step * scale))[finite]
    return "" if not off.numel() or off.max() <= 0.5 + 1 / 64 else f"a code is off by {float(off.max()):.3g} steps"


def small_cases(row: Op) -> list[Case]:
    return [case for case in row.cases() if "big" not in case.tags]


def main() -> int:
    torch.set_num_threads(1)
    failures = [f"{row.name} {case.name} {dtype}: {text}"
                for row in ops.ROWS.values() for case in small_cases(row) if "network" not in case.tags
                for dtype in DTYPES if (text := failure(row, case, dtype))]
    live = {row.live("cpu") for row in ops.ROWS.values()}
    print("\n".join(failures) or f"all exact, live: {', '.join(sorted(live))}")
    print(f"kernels from {ops.CPU_LIBRARY.path}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
