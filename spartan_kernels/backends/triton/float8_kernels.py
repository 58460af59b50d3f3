"""Kernel that rounds the rows of a matrix to 8 bits, each divided by a scale of its own."""

from __future__ import annotations

import triton
import triton.language as tl

from spartan_kernels import float8

_LARGEST = tl.constexpr(float8.LARGEST)
_SMALLEST_SCALE = tl.constexpr(float8.SMALLEST_SCALE)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def nearest(x):
    """The nearest number with 3 bits of mantissa and an exponent from -6 on, the even one of two: then a cast is exact.

    A GPU's cast does the same; the interpreter's takes the larger one of two.
    """
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    coarse = tl.maximum(power, 0.015625) * 1572864.0  # 1.5 * 2^20: its last bit is that of the result
    return (x + coarse) - coarse


@triton.jit
def _rounded_rows_kernel(x_ptr, rounded_ptr, scales_ptr, features, stride_x, BLOCK: tl.constexpr):
    """One row: its scale, NaN where an entry is not finite, and its entries times 1 / scale, to the nearest.

    Both divisions are those of float32 to the last bit, as in the reference: by another quotient, entries would be
    rounded to another number.
    """
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, features, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.abs(tl.load(x_ptr + row * stride_x + at, at < features, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.where(x < INFINITY, x, INFINITY))  # NaN too
    most = tl.max(largest, 0)
    scale = tl.maximum(tl.div_rn(most, _LARGEST), _SMALLEST_SCALE)
    scale = tl.where(most < INFINITY, scale, float("nan"))
    tl.store(scales_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    for start in range(0, features, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride_x + at, at < features, other=0.0).to(tl.float32)
        rounded = nearest(x * inverse)
        tl.store(rounded_ptr + row * features + at, rounded.to(rounded_ptr.dtype.element_ty), at < features)
