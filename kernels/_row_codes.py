"""8-bit codes of rows, for the kernels that end in them: e4m3 or int8, with scale = max |row| / 448 or 127."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3(v):
    """fp32 numbers -> bytes of the nearest e4m3 number, at most 448; NaN gives 448. By hand, since sm_80 has no such
    conversion."""
    bits = v.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
    shifted = bits.to(tl.float32, bitcast=True) + 16384.0  # below 2^-6 fractions end at 2^-9
    small = shifted.to(tl.int32, bitcast=True) - 0x46800000
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    return (sign | tl.where(bits < 0x3C800000, small, normal)).to(tl.uint8)


@triton.jit
def quotient(y, scale):
    """y / scale, rounded once, in fp32."""
    return (tl.div_rn(y, scale) if y.dtype == tl.float32 else y / scale).to(tl.float32)


@triton.jit
def codes(y, scale, FP8: tl.constexpr):
    """Of rows y (R, C) and their scales (R,); bytes. 0 where a scale is NaN."""
    wide = scale.to(y.dtype)[:, None] + tl.zeros_like(y)
    v = tl.where(wide == wide, quotient(y, wide), 0.0)
    if FP8:
        return e4m3(v)
    else:
        bounded = tl.minimum(tl.maximum(v, -127.0), 127.0) + 12582912.0  # 1.5 * 2^23 leaves no room for a fraction
        return (bounded.to(tl.int32, bitcast=True) - 0x4B400000).to(tl.uint8)


@triton.jit
def scale_of(top, FP8: tl.constexpr):
    """Of rows whose largest magnitude is top (infinite if one is NaN)."""
    scale = (top.to(tl.float64) / (448.0 if FP8 else 127.0)).to(tl.float32)
    scale = tl.where(top == 0, 1.0, tl.maximum(scale, 1.1754943508222875e-38))
    return tl.where(scale < float("inf"), scale, float("nan"))


@triton.jit
def magnitude(y):
    return tl.where(y == y, tl.abs(y), float("inf"))
