"""Floating-point rounding as the card does it: bf16, single-rounding multiply-add, conversions to integers.

A sum rounded to odd at 53 bits rounds correctly a second time at any width up to 51 bits (Boldo and Melquiond, "Emulation of FMA and
correctly rounded sums: proved algorithms using rounding to odd", 2008).
"""

from __future__ import annotations

import numpy as np

BF16_NAN = np.uint16(0x7FFF)
BF16_MAX = np.uint16(0x7F7F)
HALF_ULP = np.uint64(1 << 28)
DISCARDED = np.uint64((1 << 29) - 1)
TINY = 2.0**-125


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """fp32 to the bits of bf16, to nearest even or toward zero; NaN becomes 0x7fff as `cvt` makes it."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    if not toward_zero:
        bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.where(np.isnan(value), BF16_NAN, (bits >> np.uint32(16)).astype(np.uint16))


def flush(value: np.ndarray) -> np.ndarray:
    """`.ftz`: fp32 subnormals become zero of the same sign."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)


def sum_to_odd(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x + y in fp64, rounded to odd."""
    total = x + y
    back = total - x
    error = (x - (total - back)) + (y - back)
    bits = total.view(np.int64)
    # Toward the exact sum: the neighbour of an even, inexact result that lies on the error's side.
    step = np.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    return np.where(inexact, bits + step, bits).view(np.float64)


def f64_to_f32_odd(value: np.ndarray) -> np.ndarray:
    """fp64 rounded to odd at 24 bits."""
    rounded = value.astype(np.float32)
    bits = rounded.view(np.int32)
    step = np.where(np.abs(value) > np.abs(rounded.astype(np.float64)), 1, -1)
    inexact = (rounded != value) & np.isfinite(rounded) & (bits & 1 == 0)
    return np.where(inexact, bits + step, bits).astype(np.int32).view(np.float32)


def fma_f32(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z with one rounding.

    The product is exact in fp64. Rounding the sum twice differs from rounding it once only where fp64 lands on the midpoint of two fp32
    numbers, or among the subnormals; only there is the sum rounded to odd first.
    """
    product = x.astype(np.float64) * y
    total = product + z
    doubtful = ((total.view(np.uint64) & DISCARDED) == HALF_ULP) | (np.abs(total) < TINY)
    if doubtful.any():
        total = np.where(doubtful, sum_to_odd(product, np.asarray(z, np.float64)), total)
    return total.astype(np.float32)


def to_integer(value: np.ndarray, direction: str, dtype: type) -> np.ndarray:
    """A float to an integer: rounded in the direction of `cvt` (rni, rzi, rmi, rpi), saturated, NaN to zero (to 2^63 at 64 bits)."""
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[direction](value.astype(np.float64))
    limits = np.iinfo(dtype)
    inside = (rounded >= float(limits.min)) & (rounded < float(limits.max) + (limits.bits < 64))
    result = np.where(inside, rounded, 0).astype(dtype)
    result = np.where(rounded >= float(limits.max), dtype(limits.max), result)
    result = np.where(rounded <= float(limits.min), dtype(limits.min), result)
    invalid = np.uint64(1 << 63).astype(dtype) if limits.bits == 64 else dtype(0)
    return np.where(np.isnan(rounded), invalid, result)


def high_64(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The upper half of the product of two uint64."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    xl, xh, yl, yh = x & low, x >> shift, y & low, y >> shift
    middle = xh * yl + ((xl * yl) >> shift)
    return xh * yh + (middle >> shift) + (((middle & low) + xl * yh) >> shift)
