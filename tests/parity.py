"""Is a kernel as exact as it must be? Shared by test_ops.py and, through ``python tests/parity.py``, by the run of
every instruction-set level in a process of its own.

A kernel's error against the float64 reference may be twice that of torch's own implementation in the same dtype
(``row.peer``), plus a rounding band of one unit in the last place of the largest result. For fp64 there is no better
reference, so torch's fp32 error is scaled by the ratio of the two dtypes' rounding.

A row <op>_q8 gives codes of what row <op> gives: with y that result in float64 and e the error that <op> may have, the
ends of its range may be off by e, so scale by 2 e / 255; and a decoded code may be off by e and half a step of scale.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ldmfast import ops
from ldmfast.ops._op import Case, Op
from ldmfast.ops._q8 import RESULT

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
    out = (run or row.overload)(*args)
    if row.schema.endswith(RESULT):
        wrong = [text for one, expected in zip(out, row.fake(*args)) if (text := wrong_memory(one, expected))]
        return "; ".join(wrong) or wrong_codes(row, args, dtype, *out)
    if row.name == "quantize_rowwise":
        wrong = [text for one, expected in zip(out, row.fake(*args)) if (text := wrong_memory(one, expected))]
        return "; ".join(wrong) or wrong_rows(args[0].double(), *out)
    if wrong := wrong_memory(out, row.fake(*args)):
        return wrong
    if row.name == "pack_weight":  # moves numbers only; their order depends on the dtype
        return "" if torch.equal(out, row.reference(*args)) else "another order than the reference's"
    exact = row.reference(*cast(args, torch.float64))
    if not torch.equal(torch.isnan(out), torch.isnan(exact)):
        return "NaN where the reference has a number"
    error = distance(out, exact)
    limit = allowed(row, args, dtype, exact)
    return "" if error <= limit else f"error {error:.3g}, allowed {limit:.3g}"


def wrong_memory(out: Tensor, expected: Tensor) -> str:
    if (out.shape, out.dtype) != (expected.shape, expected.dtype) or out.stride() != expected.stride():
        return f"{out.dtype} {tuple(out.shape)} {out.stride()}, expected {expected.dtype} {tuple(expected.shape)} " \
               f"{expected.stride()}"
    return ""


def before_rounding(row: Op, args: Any, dtype: torch.dtype) -> tuple[Tensor, float]:
    """What the codes of a q8 row stand for, in float64 and without border, and the error it may have."""
    if row.name == "quantize":
        y = args[0].double()
        return y, torch.finfo(dtype).eps * float(y.abs().max() if y.numel() else 0)
    plain = ops.ROWS[row.name.removesuffix("_q8")]
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


def wrong_rows(x: Tensor, q: Tensor, scale: Tensor) -> str:
    """int8 rows of x: each scale to a rounding of max |x| / 127, each number to half a step."""
    single = torch.finfo(torch.float32)
    most = x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
    ideal = torch.where(most == 0, 1.0, (most / 127).clamp(min=single.tiny))
    if bool(((scale.double() - ideal).abs() > 2 * single.eps * ideal).any()):
        return f"scales {scale.tolist()}, ideally {ideal.tolist()}"
    off = (q.double() * scale.double()[:, None] - x).abs() - scale.double()[:, None] * 0.5 * (1 + 2**-16)
    return f"decoded numbers off by {float(off.max()):.3g} more than half a step" if bool((off > 0).any()) else ""


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
