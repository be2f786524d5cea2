"""The interpreter of PTX against NumPy and exact arithmetic, with PTX written by hand: one family of instructions after the other."""

from __future__ import annotations

import operator
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idefics2_fast.benchmarks.sm90 import machine
from idefics2_fast.benchmarks.sm90.asynchronous import TensorMap
from idefics2_fast.benchmarks.sm90.counters import Counts
from idefics2_fast.benchmarks.sm90.faults import (
    Deadlock,
    Divergence,
    Misaligned,
    MissingBarrier,
    MissingWait,
    OutOfBounds,
    Trap,
    UnknownOpcode,
    UnwrittenRead,
    WriteConflict,
)
from idefics2_fast.benchmarks.sm90.machine import execute
from idefics2_fast.benchmarks.sm90.ptx import parse

TORCH = {"b16": torch.int16, "b32": torch.int32, "b64": torch.int64}
STEM = {"b16": "%h", "b32": "%r", "b64": "%d"}
RANDOM = np.random.default_rng(0)


def module(parameters: list[str], body: str, threads: int = 128, tail: str = "ret;") -> str:
    """A module with one kernel; `p0`, `p1`, ... in the body stand for its parameters."""
    declared = ",\n".join(
        f".param .align 64 .b8 k_param_{i}[128]" if kind == "map" else f".param .{kind} k_param_{i}" for i, kind in enumerate(parameters)
    )
    for i in reversed(range(len(parameters))):
        body = body.replace(f"[p{i}]", f"[k_param_{i}]").replace(f" p{i};", f" k_param_{i};")
    return f""".version 8.4
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k({declared})
.reqntid {threads}
{{
.reg .pred %p<32>;
.reg .b16 %h<32>;
.reg .b32 %r<400>;
.reg .b64 %d<64>;
{body}
{tail}
}}
"""


def run(
    parameters: dict[str, Tensor | TensorMap],
    body: str,
    *,
    threads: int = 128,
    grid: tuple[int, int, int] = (1, 1, 1),
    shared: int = 0,
    **more: object,
) -> Counts:
    kinds = ["map" if isinstance(value, TensorMap) else "u64" for value in parameters.values()]
    ptx = module(kinds, body, threads)
    return execute(ptx, grid=grid, arguments=parameters, shared_bytes=shared, num_warps=threads // 32, **more)


def words_of(values: np.ndarray, kind: str) -> np.ndarray:
    return np.ascontiguousarray(values).view({"b16": np.int16, "b32": np.int32, "b64": np.int64}[kind])


def lanewise(text: str, *inputs: np.ndarray, kind: str = "b32") -> np.ndarray:
    """The bits (`kind`) that instructions leave in {d} of each lane, given each lane's inputs as {0}, {1}, ..."""
    kinds = [f"b{8 * values.dtype.itemsize}" for values in inputs]
    size = len(inputs[0])
    padded = [np.concatenate([values, np.ones(-size % 128, values.dtype)]) for values in inputs]
    tensors = [torch.from_numpy(words_of(values, k).copy()) for values, k in zip(padded, kinds, strict=True)]
    out = torch.zeros(len(padded[0]), dtype=TORCH[kind])
    body = "mov.u32 %r390, %tid.x;\nmov.u32 %r391, %ctaid.x;\nmad.lo.s32 %r392, %r391, 128, %r390;\n"
    for i, k in enumerate([*kinds, kind]):
        width = int(k[1:]) // 8
        body += f"ld.param.b64 %d{40 + i}, [p{i}];\nmad.wide.s32 %d{40 + i}, %r392, {width}, %d{40 + i};\n"
        if i < len(kinds):
            body += f"ld.global.{k} {STEM[k]}{i}, [%d{40 + i}];\n"
    names = [f"{STEM[k]}{i}" for i, k in enumerate(kinds)]
    body += text.format(*names, d=f"{STEM[kind]}20") + f"\nst.global.{kind} [%d{40 + len(kinds)}], {STEM[kind]}20;\n"
    arguments = {f"x{i}": tensor for i, tensor in enumerate(tensors)} | {"out": out}
    run(arguments, body, grid=(len(out) // 128, 1, 1), unwritten=["out"])
    return out.numpy()[:size]


# ---- integers

EDGES = [0, 1, 2, 3, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFFFFFE, 0x00010000, 0x12345678]


def pairs(bits: int = 32, count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of edges and random words."""
    edges = [edge | (edge << 32 if bits == 64 else 0) for edge in EDGES]
    x, y = np.array([(a, b) for a in edges for b in edges], f"u{bits // 8}").T
    more = RANDOM.integers(0, 2**bits - 1, (2, count), f"u{bits // 8}")
    return np.concatenate([x, more[0]]), np.concatenate([y, more[1]])


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


def quotient(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


INTEGER = {
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "min": min,
    "max": max,
    "div": quotient,
    "rem": lambda x, y: x - quotient(x, y) * y,
}


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("type", ["u32", "s32", "u64", "s64"])
def test_integer_arithmetic(name: str, type: str) -> None:
    bits = int(type[1:])
    x, y = pairs(bits)
    if name in ("div", "rem"):
        # Dividing by zero, and the one quotient that does not fit, are not defined.
        keep = (y != 0) & ~((y == y.dtype.type(2**bits - 1)) & (x == x.dtype.type(1 << (bits - 1))))
        x, y = x[keep], y[keep]
    got = lanewise(f"{name}.{type} {{d}}, {{0}}, {{1}};", x, y, kind=f"b{bits}").view(f"u{bits // 8}")
    value = (lambda v: signed(int(v), bits)) if type[0] == "s" else int
    expected = [INTEGER[name](value(a), value(b)) % (1 << bits) for a, b in zip(x, y, strict=True)]
    assert got.tolist() == expected


@pytest.mark.parametrize("type", ["u32", "s32", "u64", "s64"])
def test_upper_half_of_a_product(type: str) -> None:
    bits = int(type[1:])
    x, y = pairs(bits)
    got = lanewise(f"mul.hi.{type} {{d}}, {{0}}, {{1}};", x, y, kind=f"b{bits}").view(f"u{bits // 8}")
    value = (lambda v: signed(int(v), bits)) if type[0] == "s" else int
    assert got.tolist() == [(value(a) * value(b) >> bits) % (1 << bits) for a, b in zip(x, y, strict=True)]


@pytest.mark.parametrize("type", ["u32", "s32"])
def test_wide_products(type: str) -> None:
    x, y = pairs()
    z = RANDOM.integers(0, 2**64 - 1, len(x), np.uint64)
    value = (lambda v: signed(int(v), 32)) if type[0] == "s" else int
    got = lanewise(f"mul.wide.{type} {{d}}, {{0}}, {{1}};", x, y, kind="b64").view("u8")
    assert got.tolist() == [value(a) * value(b) % 2**64 for a, b in zip(x, y, strict=True)]
    got = lanewise(f"mad.wide.{type} {{d}}, {{0}}, {{1}}, {{2}};", x, y, z, kind="b64").view("u8")
    assert got.tolist() == [(value(a) * value(b) + int(c)) % 2**64 for a, b, c in zip(x, y, z, strict=True)]


def test_carry_goes_from_one_word_to_the_next() -> None:
    x, y = pairs()
    got = lanewise("mad.lo.cc.u32 %r5, {0}, {1}, {0};\nmadc.hi.u32 {d}, {0}, {1}, 0;", x, y).view("u4")
    assert got.tolist() == [((int(a) * int(b) + int(a)) >> 32) % 2**32 for a, b in zip(x, y, strict=True)]


SHIFTS = {
    "shl.b32": lambda x, s: (x << s) % 2**32 if s < 32 else 0,
    "shr.u32": lambda x, s: x >> s if s < 32 else 0,
    "shr.s32": lambda x, s: (signed(x, 32) >> min(s, 31)) % 2**32,
}


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts(name: str) -> None:
    x, y = pairs()
    amount = np.where(np.arange(len(y)) % 3 == 0, y, y % 40).astype(np.uint32)
    got = lanewise(f"{name} {{d}}, {{0}}, {{1}};", x, amount).view("u4")
    assert got.tolist() == [SHIFTS[name](int(a), int(s)) for a, s in zip(x, amount, strict=True)]


def field(x: int, start: int, length: int, is_signed: bool) -> int:
    """bfe, bit by bit as the ISA defines it."""
    sign = 0 if not is_signed or length == 0 else x >> min(start + length - 1, 31) & 1
    bits = [x >> (start + i) & 1 if i < length and start + i < 32 else sign for i in range(32)]
    return sum(bit << i for i, bit in enumerate(bits))


@pytest.mark.parametrize("type", ["u32", "s32"])
def test_bit_fields(type: str) -> None:
    x, _ = pairs()
    start, length = RANDOM.integers(0, 40, (2, len(x)), np.uint32)
    got = lanewise(f"bfe.{type} {{d}}, {{0}}, {{1}}, {{2}};", x, start, length).view("u4")
    assert got.tolist() == [field(int(a), int(s), int(n), type == "s32") for a, s, n in zip(x, start, length, strict=True)]


def permuted(x: int, y: int, selector: int) -> int:
    source = struct.pack("<II", x, y)
    chosen = []
    for i in range(4):
        code = selector >> 4 * i & 15
        byte = source[code & 7]
        chosen.append((255 if byte & 128 else 0) if code & 8 else byte)
    return int.from_bytes(bytes(chosen), "little")


def table_of(x: int, y: int, z: int, table: int) -> int:
    return sum((table >> ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)) & 1) << i for i in range(32))


def inserted(x: int, y: int, z: int) -> int:
    mask = ((1 << z % 33) - 1) << 3 & 0xFFFFFFFF
    return y & ~mask | x << 3 & mask


WORDS = {
    "prmt.b32 {d}, {0}, {1}, {2};": permuted,
    "prmt.b32 {d}, {0}, {1}, 0x5410;": lambda x, y, z: y << 16 & 0xFFFF0000 | x & 0xFFFF,
    "lop3.b32 {d}, {0}, {1}, {2}, 0x96;": lambda x, y, z: x ^ y ^ z,
    "lop3.b32 {d}, {0}, {1}, {2}, 0x2b;": lambda x, y, z: table_of(x, y, z, 0x2B),
    "shf.l.wrap.b32 {d}, {0}, {1}, {2};": lambda x, y, z: ((y << 32 | x) << z % 32 >> 32) % 2**32,
    "shf.r.wrap.b32 {d}, {0}, {1}, {2};": lambda x, y, z: (y << 32 | x) >> z % 32 & 0xFFFFFFFF,
    "shf.r.clamp.b32 {d}, {0}, {1}, {2};": lambda x, y, z: (y << 32 | x) >> min(z, 32) & 0xFFFFFFFF,
    "popc.b32 {d}, {0};": lambda x, y, z: x.bit_count(),
    "clz.b32 {d}, {0};": lambda x, y, z: 32 - x.bit_length(),
    "brev.b32 {d}, {0};": lambda x, y, z: int(f"{x:032b}"[::-1], 2),
    "and.b32 {d}, {0}, {1};": lambda x, y, z: x & y,
    "or.b32 {d}, {0}, {1};": lambda x, y, z: x | y,
    "xor.b32 {d}, {0}, {1};": lambda x, y, z: x ^ y,
    "not.b32 {d}, {0};": lambda x, y, z: x ^ 0xFFFFFFFF,
    "neg.s32 {d}, {0};": lambda x, y, z: -x % 2**32,
    "abs.s32 {d}, {0};": lambda x, y, z: abs(signed(x, 32)) % 2**32,
    "mad.lo.s32 {d}, {0}, {1}, {2};": lambda x, y, z: (x * y + z) % 2**32,
    "rem.u32 %r5, {2}, 33;\nbfi.b32 {d}, {0}, {1}, 3, %r5;": inserted,
    "mov.b32 {{%h0, %h1}}, {0};\nmov.b32 {d}, {{%h1, %h0}};": lambda x, y, z: x >> 16 | (x & 0xFFFF) << 16,
    "mov.b64 %d0, {{{0}, {1}}};\nmov.b64 {{_, {d}}}, %d0;": lambda x, y, z: y,
}


@pytest.mark.parametrize("text", WORDS)
def test_words(text: str) -> None:
    x, y = pairs()
    z = RANDOM.integers(0, 2**32 - 1, len(x), np.uint32)
    z[::2] %= 40
    got = lanewise(text, x, y, z).view("u4")
    assert got.tolist() == [WORDS[text](int(a), int(b), int(c)) for a, b, c in zip(x, y, z, strict=True)]


STEPS = {
    "add.s32": lambda x, y: (x + y) % 2**32,
    "sub.s32": lambda x, y: (x - y) % 2**32,
    "mul.lo.s32": lambda x, y: x * y % 2**32,
    "mul.hi.u32": lambda x, y: x * y >> 32,
    "mul.hi.s32": lambda x, y: (signed(x, 32) * signed(y, 32) >> 32) % 2**32,
    "xor.b32": operator.xor,
    "and.b32": operator.and_,
    "max.s32": lambda x, y: max(signed(x, 32), signed(y, 32)) % 2**32,
    "min.u32": min,
    **SHIFTS,
}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12),
    st.integers(0, 2**32),
)
def test_chains_of_integer_instructions(steps: list[tuple[str, int, int]], seed: int) -> None:
    inputs = np.random.default_rng(seed).integers(0, 2**32 - 1, (2, 128), np.uint32)
    text, names = "mov.b32 %r6, {0};\nmov.b32 %r7, {1};\n", ["%r6", "%r7"]
    for i, (name, a, b) in enumerate(steps):
        text += f"{name} %r{8 + i}, {names[a % len(names)]}, {names[b % len(names)]};\n"
        names.append(f"%r{8 + i}")
    text += f"mov.b32 {{d}}, {names[-1]};"
    # {d} is register 20 and no step writes it but the last: steps use 8 to 19.
    got = lanewise(text, *inputs).view("u4")
    for lane in range(0, 128, 17):
        values = [int(inputs[0, lane]), int(inputs[1, lane])]
        for name, a, b in steps:
            values.append(STEPS[name](values[a % len(values)], values[b % len(values)]))
        assert int(got[lane]) == values[-1]


# ---- floats


def nearest(exact: Fraction) -> np.float32:
    """The fp32 nearest to an exact number, ties to even."""
    guess = np.float32(float(exact))
    if not np.isfinite(guess):
        return guess
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min((n for n in near if np.isfinite(n)), key=lambda n: (abs(Fraction(float(n)) - exact), int(np.float32(n).view(np.uint32)) & 1))


def hard_sums(count: int = 400) -> np.ndarray:
    """x, y, z whose x y + z lies on, or a hair off, the midpoint of two fp32 numbers; ordinary triples too."""
    x = RANDOM.standard_normal(count).astype(np.float32)
    y = RANDOM.standard_normal(count).astype(np.float32)
    z = RANDOM.standard_normal(count).astype(np.float32)
    half = count // 2
    # z with an odd last bit, plus half its ulp, plus a product 2^-40 of that: only one rounding sees on which side of the tie it lies.
    z[:half] = ((RANDOM.integers(1 << 23, 1 << 24, half) | 1) * 2.0**-23).astype(np.float32)
    x[:half] = np.float32(2.0**-24) * (1 + np.float32(2.0**-23) * RANDOM.integers(0, 2, half).astype(np.float32))
    y[:half] = 1 - np.float32(2.0**-24) * RANDOM.integers(0, 3, half).astype(np.float32)
    x[-20:] *= np.float32(1e-38)
    z[-20:] *= np.float32(1e-39)
    return np.stack([x, y, z])


def test_fma_rounds_once() -> None:
    x, y, z = hard_sums()
    got = lanewise("fma.rn.f32 {d}, {0}, {1}, {2};", x, y, z).view(np.float32)
    exact = [Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)) for a, b, c in zip(x, y, z, strict=True)]
    assert got.tolist() == [float(nearest(e)) for e in exact]
    twice = (x.astype(np.float64) * y + z).astype(np.float32)
    assert (got != twice).any(), "the inputs are not hard enough to tell one rounding from two"


FLOAT = {
    "add.f32 {d}, {0}, {1};": np.add,
    "sub.f32 {d}, {0}, {1};": np.subtract,
    "mul.f32 {d}, {0}, {1};": np.multiply,
    "div.full.f32 {d}, {0}, {1};": np.divide,
    "div.rn.f32 {d}, {0}, {1};": np.divide,
    "max.f32 {d}, {0}, {1};": np.fmax,
    "min.f32 {d}, {0}, {1};": np.fmin,
    "max.NaN.f32 {d}, {0}, {1};": np.maximum,
    "neg.f32 {d}, {0};": lambda x, y: -x,
    "abs.f32 {d}, {0};": lambda x, y: abs(x),
    "sqrt.rn.f32 {d}, {0};": lambda x, y: np.sqrt(x.astype(np.float64)).astype(np.float32),
    "rcp.approx.f32 {d}, {0};": lambda x, y: (1 / x.astype(np.float64)).astype(np.float32),
    "ex2.approx.f32 {d}, {0};": lambda x, y: np.exp2(x.astype(np.float64)).astype(np.float32),
    "lg2.approx.f32 {d}, {0};": lambda x, y: np.log2(x.astype(np.float64)).astype(np.float32),
    "rsqrt.approx.f32 {d}, {0};": lambda x, y: (1 / np.sqrt(x.astype(np.float64))).astype(np.float32),
}
SPECIALS = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38, -3.4e38, 1.5], np.float32)


@pytest.mark.parametrize("text", FLOAT)
def test_floats(text: str) -> None:
    x, y = (grid.ravel() for grid in np.meshgrid(SPECIALS, SPECIALS))
    x = np.concatenate([x, (RANDOM.standard_normal(300) * 10).astype(np.float32)])
    y = np.concatenate([y, (RANDOM.standard_normal(300) * 10).astype(np.float32)])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(lanewise(text, x, y).view(np.float32), FLOAT[text](x, y))


def test_flush_to_zero() -> None:
    x = np.array([1e-40, -1e-40, 1.0, 2e-38], np.float32)
    np.testing.assert_array_equal(lanewise("mul.ftz.f32 {d}, {0}, 0f3F800000;", x).view(np.float32), [0, -0.0, 1, x[3]])
    np.testing.assert_array_equal(lanewise("mul.ftz.f32 {d}, {0}, 0f3F000000;", x).view(np.float32), [0, -0.0, 0.5, 0])
    np.testing.assert_array_equal(lanewise("mul.f32 {d}, {0}, 0f3F000000;", x).view(np.float32), x / 2)


BF16 = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "max": torch.fmax, "min": torch.fmin}


@pytest.mark.parametrize("name", BF16)
def test_packed_bf16(name: str) -> None:
    values = torch.from_numpy((RANDOM.standard_normal((2, 600)) * 10.0 ** RANDOM.integers(-6, 6, (2, 600))).astype(np.float32)).bfloat16()
    x, y = (v.view(torch.int16).numpy().view(np.uint32) for v in values)
    rn = ".rn" if name in ("add", "sub", "mul") else ""
    got = lanewise(f"{name}{rn}.bf16x2 {{d}}, {{0}}, {{1}};", x, y)
    # Exact in fp64 but for sums of very unequal terms, none of which lies near a tie here.
    expected = BF16[name](values[0].double(), values[1].double()).bfloat16()
    assert torch.equal(torch.from_numpy(got.view(np.int16).copy()), expected.view(torch.int16))


def every_upper_half() -> np.ndarray:
    """fp32 around every tie of bf16 with few exponents, infinities, NaN, subnormals, and the largest numbers."""
    ranges = ((0x3F80, 0x3FA0), (0x7F70, 0x7F90), (0, 16), (0xFF70, 0xFF90))
    upper = np.concatenate([np.arange(*ends, dtype=np.uint32) for ends in ranges])
    return (upper[:, None] << 16 | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).reshape(-1).view(np.float32)


def test_rounding_to_bf16_is_that_of_torch() -> None:
    x = every_upper_half()
    got = torch.from_numpy(lanewise("cvt.rn.bf16.f32 %h0, {0};\nmov.b32 {d}, {{%h0, %h0}};", x).view(np.int16)[::2].copy()).view(
        torch.bfloat16
    )
    expected = torch.from_numpy(x.copy()).bfloat16()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()], expected[~got.isnan()])


def test_other_conversions_to_bf16() -> None:
    x = every_upper_half()
    finite = np.isfinite(x)
    zero = lanewise("cvt.rz.bf16.f32 %h0, {0};\nmov.b32 {d}, {{%h0, %h0}};", x).view(np.uint16)[::2]
    assert (zero[~np.isnan(x)] == (x.view(np.uint32) >> 16)[~np.isnan(x)]).all()
    packed = lanewise("cvt.rn.bf16x2.f32 {d}, {0}, {1};", x, x[::-1].copy()).view(np.uint16).reshape(-1, 2)
    single = lanewise("cvt.rn.bf16.f32 %h0, {0};\nmov.b32 {d}, {{%h0, %h0}};", x).view(np.uint16)[::2]
    assert (packed[:, 1] == single).all(), "the first source is the upper half"
    assert (packed[:, 0] == single[::-1]).all()
    relu = lanewise("cvt.rn.relu.bf16x2.f32 {d}, {0}, {0};", x).view(np.uint16)[::2]
    assert (relu[finite] == np.where(x < 0, 0, single)[finite]).all()
    saturated = lanewise("cvt.rn.satfinite.bf16x2.f32 {d}, {0}, {0};", x).view(np.uint16)[::2]
    assert (saturated[np.isinf(x) & (x > 0)] == 0x7F7F).all()
    back = lanewise("mov.b32 {{%h0, %h1}}, {0};\ncvt.f32.bf16 {d}, %h0;", single.astype(np.uint32)).view(np.uint32)
    assert (back == single.astype(np.uint32) << 16).all()


def test_conversions_with_integers() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2.9, -2.9, 3e9, -3e9, 5e9, np.nan, np.inf, -np.inf, 2**31, 2**32], np.float32)
    expected = {
        "rni.s32": [0, 2, 2, 0, -2, 3, -3, 2**31 - 1, -(2**31), 2**31 - 1, 0, 2**31 - 1, -(2**31), 2**31 - 1, 2**31 - 1],
        "rzi.s32": [0, 1, 2, 0, -1, 2, -2, 2**31 - 1, -(2**31), 2**31 - 1, 0, 2**31 - 1, -(2**31), 2**31 - 1, 2**31 - 1],
        "rmi.s32": [0, 1, 2, -1, -2, 2, -3, 2**31 - 1, -(2**31), 2**31 - 1, 0, 2**31 - 1, -(2**31), 2**31 - 1, 2**31 - 1],
        "rzi.u32": [0, 1, 2, 0, 0, 2, 0, 3 * 10**9, 0, 2**32 - 1, 0, 2**32 - 1, 0, 2**31, 2**32 - 1],
    }
    for name, values in expected.items():
        got = lanewise(f"cvt.{name}.f32 {{d}}, {{0}};", x)
        assert got.view("i4" if name.endswith("s32") else "u4").tolist() == values
    words = np.array([0, 1, -1, 16777217, 16777219, 2**31 - 1, -(2**31), 33554434], np.int32)
    assert lanewise("cvt.rn.f32.s32 {d}, {0};", words).view(np.float32).tolist() == [float(nearest(Fraction(int(w)))) for w in words]
    long = np.array([2**60 + 2**36 + 1, -(2**63), 2**53 + 1, 2**40 + 2**16], np.int64)
    assert lanewise("cvt.rn.f32.s64 {d}, {0};", long).view(np.float32).tolist() == [float(nearest(Fraction(int(w)))) for w in long]
    assert lanewise("cvt.s64.s32 {d}, {0};", words, kind="b64").tolist() == words.tolist()
    assert lanewise("cvt.u64.u32 {d}, {0};", words, kind="b64").tolist() == words.view("u4").tolist()
    assert lanewise("cvt.u32.u64 {d}, {0};", long).tolist() == long.astype(np.int32).tolist()
    assert lanewise("cvt.rmi.f32.f32 {d}, {0};", x).view("f4")[:7].tolist() == np.floor(x[:7]).tolist()


# ---- predicates

ORDERED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}


@pytest.mark.parametrize("name", [*ORDERED, *(f"{name}u" for name in ORDERED), "num", "nan"])
def test_float_comparisons(name: str) -> None:
    x, y = (grid.ravel() for grid in np.meshgrid(SPECIALS, SPECIALS))
    unordered = np.isnan(x) | np.isnan(y)
    if name in ("num", "nan"):
        expected = unordered == (name == "nan")
    else:
        expected = np.where(unordered, name.endswith("u"), ORDERED[name[:2]](x, y))
    got = lanewise(f"setp.{name}.f32 %p0, {{0}}, {{1}};\nselp.b32 {{d}}, 1, 0, %p0;", x, y)
    assert got.tolist() == expected.astype(int).tolist()


def test_integer_comparisons_and_combinations() -> None:
    x, y = pairs()
    text = """setp.lt.s32 %p0, {0}, {1};
setp.gt.u32 %p1|%p2, {0}, {1};
setp.eq.and.u32 %p3, {0}, {0}, %p0;
xor.pred %p4, %p3, %p1;
not.pred %p5, %p2;
and.pred %p6, %p4, %p5;
selp.b32 %r5, 1, 0, %p6;
selp.b32 %r6, 2, 0, %p2;
or.b32 {d}, %r5, %r6;"""
    got = lanewise(text, x, y)
    less, greater = x.view("i4") < y.view("i4"), x > y
    assert got.tolist() == (((less ^ greater) & greater) * 1 + ~greater * 2).tolist()


# ---- control flow


def collatz(n: int) -> int:
    steps = 0
    while n != 1:
        n, steps = (n // 2 if n % 2 == 0 else 3 * n + 1), steps + 1
    return steps


COLLATZ = """mov.b32 %r1, 0;
mov.b32 %r2, {0};
LOOP:
setp.eq.s32 %p0, %r2, 1;
@%p0 bra DONE;
and.b32 %r3, %r2, 1;
setp.eq.s32 %p1, %r3, 0;
@%p1 bra EVEN;
mad.lo.s32 %r2, %r2, 3, 1;
bra.uni NEXT;
EVEN:
shr.u32 %r2, %r2, 1;
NEXT:
add.s32 %r1, %r1, 1;
bra.uni LOOP;
DONE:
mov.b32 {d}, %r1;"""


def test_threads_part_and_join() -> None:
    n = np.arange(1, 400, dtype=np.int32)
    assert lanewise(COLLATZ, n).tolist() == [collatz(int(i)) for i in n]


def test_ctas_part_for_good() -> None:
    """Loops as long as the CTA's number, with a barrier inside: no CTA waits for another."""
    out = torch.zeros(40, dtype=torch.int32)
    body = """ld.param.b64 %d0, [p0];
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
mov.b32 %r2, 0;
mov.b32 %r3, 0;
LOOP:
setp.ge.s32 %p0, %r2, %r1;
@%p0 bra DONE;
bar.sync 0;
add.s32 %r3, %r3, %r2;
add.s32 %r2, %r2, 1;
bra.uni LOOP;
DONE:
setp.eq.s32 %p1, %r0, 0;
mad.wide.s32 %d1, %r1, 4, %d0;
@%p1 st.global.b32 [%d1], %r3;"""
    counts = run({"out": out}, body, grid=(40, 1, 1))
    assert out.tolist() == [i * (i - 1) // 2 for i in range(40)]
    assert counts.instructions["bar.sync"] == 4 * sum(range(40)), "instructions are counted for each warp"
    assert counts.ctas == 40


def test_threads_leave_early() -> None:
    out = torch.zeros(128, dtype=torch.int32)
    body = """ld.param.b64 %d0, [p0];
mov.u32 %r0, %tid.x;
setp.gt.u32 %p0, %r0, 40;
@%p0 ret;
mad.wide.u32 %d1, %r0, 4, %d0;
st.global.b32 [%d1], 7;"""
    run({"out": out}, body)
    assert out.tolist() == [7] * 41 + [0] * 87


def test_barrier_that_some_threads_miss() -> None:
    with pytest.raises(Divergence, match=r"barrier reached by 41 of 128 threads.*CTA \(0, 0, 0\).*bar.sync"):
        run({}, "mov.u32 %r0, %tid.x;\nsetp.gt.u32 %p0, %r0, 40;\n@%p0 bra OVER;\nbar.sync 0;\nOVER:")


def test_trap() -> None:
    with pytest.raises(Trap, match="thread 3;"):
        run({}, "mov.u32 %r0, %tid.x;\nsetp.eq.u32 %p0, %r0, 3;\n@%p0 trap;")


def test_scopes_of_inline_assembly() -> None:
    """Two copies of one text, with a register and a label of the same names in each."""
    block = """{{{{
.reg .pred complete;
mov.b32 %r{i}, 0;
waitLoop:
add.s32 %r{i}, %r{i}, 1;
setp.ge.s32 complete, %r{i}, {n};
@!complete bra.uni waitLoop;
}}}}
"""
    text = block.format(i=5, n=3) + block.format(i=6, n=4) + "add.s32 {d}, %r5, %r6;"
    assert lanewise(text, np.zeros(4, np.int32)).tolist() == [7] * 4


# ---- warps


def shuffled(mode: str, values: list[int], b: int, c: int) -> list[int]:
    """One warp by the ISA's pseudocode."""
    result = []
    for lane in range(32):
        segment, clamp = c >> 8 & 31, c & 31
        last, first = lane & segment | clamp & ~segment, lane & segment
        if mode == "up":
            j, inside = lane - b, lane - b >= last
        elif mode == "down":
            j, inside = lane + b, lane + b <= last
        elif mode == "bfly":
            j, inside = lane ^ b, lane ^ b <= last
        else:
            j = first | b & ~segment
            inside = j <= last
        result.append(values[j] if inside else values[lane])
    return result


@pytest.mark.parametrize(
    ("mode", "b", "c"),
    [("bfly", 1, 31), ("bfly", 16, 31), ("up", 3, 0), ("down", 5, 31), ("idx", 7, 31), ("down", 2, 0x181F), ("idx", 9, 0x1007)],
)
def test_shuffles(mode: str, b: int, c: int) -> None:
    x = RANDOM.integers(0, 2**31, 128, np.int32)
    expected = [v for w in range(4) for v in shuffled(mode, x[32 * w : 32 * w + 32].tolist(), b, c)]
    assert lanewise(f"shfl.sync.{mode}.b32 {{d}}, {{0}}, {b}, {c}, -1;", x).tolist() == expected
    assert lanewise(f"mov.b32 %r5, {b};\nshfl.sync.{mode}.b32 {{d}}|%p1, {{0}}, %r5, {c}, -1;", x).tolist() == expected


def test_shuffle_from_a_register() -> None:
    x, source = RANDOM.integers(0, 2**31, (2, 128), np.int32)
    expected = [x[i // 32 * 32 + source[i] % 32] for i in range(128)]
    assert lanewise("shfl.sync.idx.b32 {d}, {0}, {1}, 31, -1;", x, source).tolist() == expected


def test_votes_and_reductions() -> None:
    x = RANDOM.integers(0, 50, 128, np.int32)
    warps = x.reshape(4, 32)
    ballot = "setp.gt.s32 %p0, {0}, 20;\nvote.sync.ballot.b32 {d}, %p0, -1;"
    expected = [sum(int(v > 20) << i for i, v in enumerate(warp)) for warp in warps]
    assert lanewise(ballot, x).view("u4").tolist() == np.repeat(expected, 32).tolist()
    anyone = "setp.gt.s32 %p0, {0}, 48;\nvote.sync.any.pred %p1, %p0, -1;\nselp.b32 {d}, 1, 0, %p1;"
    assert lanewise(anyone, x).tolist() == np.repeat((warps > 48).any(1).astype(int), 32).tolist()
    for name, function in (("add.s32", np.sum), ("max.s32", np.max), ("min.s32", np.min)):
        assert lanewise(f"redux.sync.{name} {{d}}, {{0}}, -1;", x).tolist() == np.repeat(function(warps, axis=1), 32).tolist()
    elected = "elect.sync %r5|%p0, -1;\nselp.b32 {d}, 1, 0, %p0;"
    assert lanewise(elected, x).tolist() == ([1] + [0] * 31) * 4


def test_shuffle_in_part_of_a_warp() -> None:
    with pytest.raises(Divergence, match="part of a warp"):
        run({}, "mov.u32 %r0, %tid.x;\nsetp.gt.u32 %p0, %r0, 40;\n@%p0 bra OVER;\nshfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;\nOVER:")


# ---- global memory

COPY = """ld.param.b64 %d0, [p0];
ld.param.b64 %d1, [p1];
mov.u32 %r0, %tid.x;
mad.wide.u32 %d2, %r0, {stride}, %d0;
mad.wide.u32 %d3, %r0, {width}, %d1;
{load}
{store}"""


def copied(count: int = 1, stride: int | None = None) -> str:
    width = 4 * count
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    vector = f".v{count}" if count > 1 else ""
    load, store = f"ld.global{vector}.b32 {{ {registers} }}, [ %d2 + 0 ];", f"st.global{vector}.b32 [%d3], {{ {registers} }};"
    return COPY.format(stride=stride or width, width=width, load=load, store=store)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_copies_and_their_counts(count: int) -> None:
    x, y = torch.randn(128 * count), torch.zeros(128 * count)
    counts = run({"x": x, "y": y}, copied(count), unwritten=["y"])
    assert torch.equal(x, y)
    assert counts.requested == {("load", "x", 4 * count): 512 * count, ("store", "y", 4 * count): 512 * count}
    assert counts.segments == {("load", "x"): 4 * count, ("store", "y"): 4 * count}
    assert counts.bytes("load") == counts.bytes("store") == 512 * count == counts.widths("load")[4 * count]


def test_segments_of_a_strided_access() -> None:
    x, y = torch.randn(128 * 32), torch.zeros(128)
    counts = run({"x": x, "y": y}, copied(stride=128))
    assert torch.equal(x[::32], y)
    assert counts.segments == {("load", "x"): 128, ("store", "y"): 4}


def test_access_beyond_an_argument() -> None:
    with pytest.raises(
        OutOfBounds,
        match=r"argument 'x': 4-byte access outside its 508 bytes at byte 508; CTA \(0, 0, 0\), thread 127; line \d+: ld.global",
    ):
        run({"x": torch.randn(127), "y": torch.zeros(128)}, copied())
    with pytest.raises(OutOfBounds, match="argument 'y'.*st.global"):
        run({"x": torch.randn(128), "y": torch.zeros(127)}, copied())
    with pytest.raises(OutOfBounds, match="outside its 512 bytes at byte -4"):
        run({"x": torch.randn(128), "y": torch.zeros(128)}, copied().replace("[ %d2 + 0 ]", "[%d2+-4]"))
    with pytest.raises(OutOfBounds, match="lies in no argument"):
        run({"x": torch.randn(128), "y": torch.zeros(128)}, copied().replace("mad.wide.u32 %d2", "mov.b64 %d0, 0;\nmad.wide.u32 %d2"))


def test_a_view_is_bounded_by_its_own_elements() -> None:
    rows = torch.randn(128, 3)
    with pytest.raises(OutOfBounds, match="outside"):
        run({"x": rows.view(-1)[:127], "y": torch.zeros(128)}, copied())
    column = rows[:, 1]
    y = torch.zeros(128)
    run({"x": column, "y": y}, copied(stride=12))
    assert torch.equal(y, column)
    with pytest.raises(OutOfBounds, match="between the view's elements at byte 4; .*thread 1;"):
        run({"x": column, "y": y}, copied())


def test_two_views_of_one_storage() -> None:
    storage = torch.randn(256)
    expected = storage[:128].clone()
    run({"x": storage[:128], "y": storage[128:]}, copied())
    assert torch.equal(storage[128:], expected)


def test_misaligned_vector() -> None:
    """A promise that a pointer is divisible by 16 makes 16-byte accesses; the pointer that breaks it is caught."""
    storage = torch.randn(514)
    with pytest.raises(Misaligned, match="argument 'x': 16-byte access"):
        run({"x": storage[1:513], "y": torch.zeros(512)}, copied(4))


def test_read_of_what_nothing_has_written() -> None:
    x = torch.randn(128)
    with pytest.raises(UnwrittenRead, match="argument 'x'.*byte 0"):
        run({"x": x, "y": torch.zeros(128)}, copied(), unwritten=["x"])
    body = copied() + "\nld.global.b32 %r10, [%d3];"
    run({"x": x, "y": torch.zeros(128)}, body, unwritten=["y"])


def test_stores_of_two_ctas_to_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    body = """ld.param.b64 %d0, [p0];
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
mad.wide.u32 %d1, %r0, 4, %d0;
st.global.b32 [%d1], %r1;"""
    y = torch.zeros(128, dtype=torch.int32)
    with pytest.raises(WriteConflict, match=r"argument 'y'.*CTA"):
        run({"y": y}, body, grid=(2, 1, 1))
    monkeypatch.setattr(machine, "LANES", 128)
    with pytest.raises(WriteConflict, match=r"argument 'y': another thread.*CTA \(40, 0, 0\)"):
        run({"y": y}, body, grid=(41, 1, 1), ctas=[(0, 0, 0), (40, 0, 0)])
    run({"y": y}, body.replace("%ctaid.x", "%tid.x"), grid=(64, 1, 1))
    assert y.tolist() == list(range(128)), "equal values are no conflict"


OVERLAP = """ld.param.b64 %d0, [p0];
mov.u32 %r0, %tid.x;
mad.wide.u32 %d1, %r0, 4, %d0;
st.global.b32 [%d1], %r0;
{between}
xor.b32 %r1, %r0, 64;
mad.wide.u32 %d2, %r1, 4, %d0;
{after}"""


def test_order_between_threads_of_a_cta() -> None:
    y = torch.zeros(128, dtype=torch.int32)
    for after, kind in (("st.global.b32 [%d2], %r0;", WriteConflict), ("ld.global.b32 %r3, [%d2];", MissingBarrier)):
        with pytest.raises(kind, match="argument 'y'"):
            run({"y": y.clone()}, OVERLAP.format(between="", after=after))
        run({"y": y.clone()}, OVERLAP.format(between="bar.sync 0;", after=after))


def test_two_threads_store_at_once() -> None:
    body = "ld.param.b64 %d0, [p0];\nmov.u32 %r0, %tid.x;\nst.global.b32 [%d0], %r0;"
    with pytest.raises(WriteConflict, match="two threads store different values at once"):
        run({"y": torch.zeros(1, dtype=torch.int32)}, body)


def test_atomics() -> None:
    total, largest, turns = torch.zeros(1), torch.zeros(1, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    body = """ld.param.b64 %d0, [p0];
ld.param.b64 %d1, [p1];
ld.param.b64 %d2, [p2];
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
mad.lo.s32 %r2, %r1, 128, %r0;
cvt.rn.f32.s32 %r3, %r2;
atom.global.gpu.acq_rel.add.f32 %r4, [ %d0 + 0 ], %r3;
atom.global.gpu.acq_rel.max.s32 %r5, [ %d1 + 0 ], %r2;
mad.wide.u32 %d3, %r2, 4, %d2;
st.global.b32 [%d3], %r5;
red.global.add.f32 [%d0], %r3;"""
    counts = run({"total": total, "largest": largest, "turns": turns}, body, grid=(2, 1, 1))
    assert total.item() == 2 * sum(range(256))
    assert largest.item() == 255
    assert sorted(turns.tolist()) == [0, *range(255)], "each atomic found what the one before it left"
    assert counts.bytes("atomic", argument="total") == 2 * 256 * 4


def test_compare_and_swap_and_bf16_add() -> None:
    lock, total = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.bfloat16)
    body = """ld.param.b64 %d0, [p0];
ld.param.b64 %d1, [p1];
mov.u32 %r0, %tid.x;
add.s32 %r1, %r0, 1;
atom.global.acq_rel.gpu.cas.b32 %r2, [ %d0 + 0 ], 0, %r1;
mov.b16 %h0, 0x3F80;
atom.global.gpu.acq_rel.add.noftz.bf16 %h1, [ %d1 + 0 ], %h0;"""
    run({"lock": lock, "total": total}, body)
    assert lock.item() == 1
    assert total.item() == 128


# ---- shared memory

EXCHANGE = """ld.param.b64 %d0, [p0];
mov.u32 %r0, %tid.x;
mov.b32 %r9, global_smem;
shl.b32 %r1, %r0, {shift};
add.s32 %r1, %r1, %r9;
st.shared.b32 [%r1], %r0;
{barrier}
xor.b32 %r2, %r0, {mask};
shl.b32 %r3, %r2, {shift};
add.s32 %r3, %r3, %r9;
ld.shared.b32 %r4, [%r3];
mad.wide.u32 %d1, %r0, 4, %d0;
st.global.b32 [%d1], %r4;"""


def exchange(barrier: str = "bar.sync 0;", mask: int = 127, shift: int = 2, shared: int = 512) -> tuple[Tensor, Counts]:
    y = torch.zeros(128, dtype=torch.int32)
    return y, run({"y": y}, EXCHANGE.format(barrier=barrier, mask=mask, shift=shift), shared=shared)


def test_exchange_through_shared_memory() -> None:
    y, counts = exchange()
    assert y.tolist() == list(range(127, -1, -1))
    assert counts.shared == {("store", 4): 512, ("load", 4): 512}
    assert counts.bank_conflicts == 0


def test_exchange_without_barrier() -> None:
    with pytest.raises(MissingBarrier, match=r"shared memory: .*another warp.*ld.shared"):
        exchange(barrier="")
    y, _ = exchange(barrier="", mask=31)
    assert y.tolist() == [i ^ 31 for i in range(128)], "within a warp no barrier is needed"


def test_shared_memory_ends() -> None:
    with pytest.raises(OutOfBounds, match="shared memory: 4-byte access at byte 508 of 508; .*thread 127"):
        exchange(shared=508)


def test_read_of_unwritten_shared_memory() -> None:
    with pytest.raises(UnwrittenRead, match="shared memory: read of what nothing has written at byte 1020"):
        exchange(mask=255, shared=1024)


def test_bank_conflicts() -> None:
    """Steps of 32 words put a warp's words into one bank: 31 passes more than one, in each warp, once stored and once loaded."""
    _, counts = exchange(shift=7, shared=128 * 128)
    assert counts.bank_conflicts == 2 * 4 * 31


# ---- matrices


def test_ldmatrix_and_stmatrix() -> None:
    """Row r of matrix j lies at the address of thread 8 j + r; thread t gets elements 2 (t % 4), + 1 of row t // 4."""
    x = torch.arange(4 * 64, dtype=torch.int16)
    for suffix in ("", ".trans"):
        out, back = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(4 * 64, dtype=torch.int16)
        body = f"""ld.param.b64 %d0, [p0];
ld.param.b64 %d1, [p1];
ld.param.b64 %d2, [p2];
mov.u32 %r0, %tid.x;
mad.wide.u32 %d3, %r0, 16, %d0;
ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d3];
shl.b32 %r5, %r0, 4;
st.shared.v4.b32 [%r5], {{%r1, %r2, %r3, %r4}};
bar.sync 0;
ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 {{%r6, %r7, %r8, %r9}}, [%r5];
mad.wide.u32 %d4, %r0, 16, %d1;
st.global.v4.b32 [%d4], {{%r6, %r7, %r8, %r9}};
bar.sync 0;
stmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 [%r5+512], {{%r6, %r7, %r8, %r9}};
bar.sync 0;
ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r5+512];
mad.wide.u32 %d5, %r0, 16, %d2;
st.global.v4.b32 [%d5], {{%r1, %r2, %r3, %r4}};"""
        run({"x": x, "out": out, "back": back}, body, threads=32, shared=1024)
        matrices = x.view(4, 8, 8)
        expected = torch.empty(32, 4, 2, dtype=torch.int16)
        for t in range(32):
            for j in range(4):
                for i in range(2):
                    row, column = t // 4, 2 * (t % 4) + i
                    expected[t, j, i] = matrices[j, column, row] if suffix else matrices[j, row, column]
        assert torch.equal(out.view(torch.int16).view(32, 4, 2), expected)
        assert torch.equal(back, x)


@pytest.mark.parametrize("type", ["bf16", "f16"])
def test_mma_sync(type: str) -> None:
    """Fragments of m16n8k16 as the ISA's figures give them, thread by thread."""
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[type]
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    fragments = torch.empty(32, 12, dtype=dtype)
    sums = torch.empty(32, 4)
    place = {}
    for t in range(32):
        g, q = t // 4, t % 4
        for i in range(8):
            fragments[t, i] = a[g if i < 2 or 4 <= i < 6 else g + 8, 2 * q + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(4):
            fragments[t, 8 + i] = b[2 * q + (i & 1) + (8 if i >= 2 else 0), g]
            place[t, i] = (g if i < 2 else g + 8, 2 * q + (i & 1))
            sums[t, i] = c[place[t, i]]
    out = torch.zeros(32, 4)
    body = f"""ld.param.b64 %d0, [p0];
ld.param.b64 %d1, [p1];
ld.param.b64 %d2, [p2];
mov.u32 %r0, %tid.x;
mad.wide.u32 %d3, %r0, 24, %d0;
ld.global.v2.b32 {{%r1, %r2}}, [%d3];
ld.global.v2.b32 {{%r3, %r4}}, [%d3+8];
ld.global.v2.b32 {{%r5, %r6}}, [%d3+16];
mad.wide.u32 %d4, %r0, 16, %d1;
ld.global.v4.b32 {{%r7, %r8, %r9, %r10}}, [%d4];
mma.sync.aligned.m16n8k16.row.col.f32.{type}.{type}.f32
    {{%r11, %r12, %r13, %r14}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%r7, %r8, %r9, %r10}};
mad.wide.u32 %d5, %r0, 16, %d2;
st.global.v4.b32 [%d5], {{%r11, %r12, %r13, %r14}};"""
    counts = run({"ab": fragments, "c": sums, "out": out}, body, threads=32)
    expected = a.double() @ b.double() + c.double()
    for (t, i), where in place.items():
        assert out[t, i].item() == pytest.approx(expected[where].item(), abs=1e-4)
    assert dict(counts.flops) == {f"mma.m16n8k16.{type}": 2 * 16 * 8 * 16}


def image(matrix: Tensor, swizzle: int, transposed: bool) -> tuple[np.ndarray, int, int]:
    """Shared memory that holds an operand [rows, K] of wgmma, element by element, and its descriptor's two strides in bytes.

    Without `transposed`, K runs along a row of 16 bytes (no swizzle) or of the swizzle's width; with it, rows (M or N) do.
    """
    rows, depth = matrix.shape
    width = 16 if swizzle == 0 else 16 << swizzle
    if transposed:
        atoms, blocks = -(-2 * rows // width), depth // 8
        # Atoms of 8 steps of K by `width` bytes of rows; those side by side come first.
        beside, below = 8 * width, 8 * width * atoms
        leading, stride = (below, beside) if swizzle == 0 else (beside, below)
        size = below * blocks
    else:
        leading, stride = (8 * 16 * rows // 8, 8 * 16) if swizzle == 0 else (16, 8 * width)
        size = leading * 2 if swizzle == 0 else stride * rows // 8
    content = np.zeros(size // 2, np.int16)
    bits = matrix.view(torch.int16).numpy()
    for r in range(rows):
        for k in range(depth):
            if transposed:
                at = k // 8 * below + k % 8 * width + 2 * r // width * beside + 2 * r % width
            elif swizzle == 0:
                at = r // 8 * stride + r % 8 * 16 + k // 8 * leading + k % 8 * 2
            else:
                at = r // 8 * stride + r % 8 * width + 2 * k
            content[(at ^ (at >> 7 & (1 << swizzle) - 1) << 4) // 2] = bits[r, k]
    return content, leading, stride


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | (0 if swizzle == 0 else 4 - swizzle) << 62


WGMMA = """ld.param.b64 %d0, [p0];
ld.param.b64 %d1, [p1];
mov.u32 %r200, %tid.x;
{fill}
bar.sync 0;
fence.proxy.async.shared::cta;
wgmma.fence.sync.aligned;
mov.pred %p0, 0;
mov.pred %p1, -1;
wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{targets}}}, {a}, {b}, %p0, 1, 1{flags};
wgmma.commit_group.sync.aligned;
{wait}
{after}
{store}"""


def wgmma(a: Tensor, b: Tensor, swizzles: tuple[int, int], transposed: tuple[bool, bool], **edits: str) -> Tensor:
    """a [64, 16] (from registers where swizzles[0] is negative) times b [N, 16] transposed, by one warpgroup."""
    n, registers = b.shape[0], swizzles[0] < 0
    parts, operands, start = [], [], 0
    for matrix, swizzle, flip in zip((a, b), swizzles, transposed, strict=True):
        if swizzle >= 0:
            content, leading, stride = image(matrix, swizzle, flip)
            parts.append(np.concatenate([content, np.zeros(-len(content) % 1024, np.int16)]))
            operands.append(descriptor(start, leading, stride, swizzle))
            start += parts[-1].nbytes
    memory = torch.from_numpy(np.concatenate(parts))
    fill = []
    for i in range(start // 2048):
        fill.append(f"mad.wide.u32 %d2, %r200, 16, %d0;\nld.global.v4.b32 {{%r201, %r202, %r203, %r204}}, [%d2+{2048 * i}];")
        fill.append(f"shl.b32 %r205, %r200, 4;\nst.shared.v4.b32 [%r205+{2048 * i}], {{%r201, %r202, %r203, %r204}};")
    arguments = {"memory": memory, "out": torch.zeros(128, n // 2)}
    names = [f"%d{10 + i}" for i in range(len(operands))]
    fill += [f"mov.b64 {name}, {value - 2**64 if value >= 2**63 else value};" for name, value in zip(names, operands, strict=True)]
    if registers:
        arguments["fragments"] = torch.stack([torch.stack([a[row, column] for row, column in fragment_of_a(t)]) for t in range(128)])
        fill.append("ld.param.b64 %d3, [p2];\nmad.wide.u32 %d4, %r200, 16, %d3;\nld.global.v4.b32 {%r210, %r211, %r212, %r213}, [%d4];")
        names.insert(0, "{%r210, %r211, %r212, %r213}")
    targets = ", ".join(f"%r{i}" for i in range(n // 2))
    flags = f", {int(transposed[1])}" if registers else f", {int(transposed[0])}, {int(transposed[1])}"
    store = "\n".join(f"mad.wide.u32 %d5, %r200, {2 * n}, %d1;\nst.global.b32 [%d5+{4 * i}], %r{i};" for i in range(n // 2))
    lines = {"wait": "wgmma.wait_group.sync.aligned 0;", "after": ""} | {name: text for name, text in edits.items() if name != "repeat"}
    filled = {"fill": "\n".join(fill), "n": n, "targets": targets, "a": names[0], "b": names[1], "flags": flags, "store": store}
    first = WGMMA.format(**filled, **lines)
    product = next(line for line in first.splitlines() if line.startswith("wgmma.mma"))
    body = first.replace(product, product + "\n" + product.replace("%p0", "%p1")) if "repeat" in edits else first
    run(arguments, body, shared=start)
    result = torch.zeros(64, n)
    for t in range(128):
        for i in range(n // 2):
            row = 16 * (t // 32) + t % 32 // 4 + 8 * (i // 2 % 2)
            result[row, 8 * (i // 4) + 2 * (t % 4) + i % 2] = arguments["out"][t, i]
    return result


def fragment_of_a(t: int) -> list[tuple[int, int]]:
    """Elements of A that thread t of a warpgroup holds, in the order of its registers' halves."""
    row, column = 16 * (t // 32) + t % 32 // 4, 2 * (t % 4)
    return [(row + 8 * (i // 2 % 2), column + 8 * (i // 4) + i % 2) for i in range(8)]


CASES = [(a, b, ta, tb) for a in range(4) for b in range(4) for ta, tb in ((False, False), (a % 2 == 0, b % 2 == 1))]


@pytest.mark.parametrize(("swizzle_a", "swizzle_b", "transposed_a", "transposed_b"), [*CASES, (-1, 3, False, False), (-1, 3, False, True)])
def test_wgmma_in_every_swizzle(swizzle_a: int, swizzle_b: int, transposed_a: bool, transposed_b: bool) -> None:
    a, b = torch.randn(64, 16).bfloat16(), torch.randn(64, 16).bfloat16()
    got = wgmma(a, b, (swizzle_a, swizzle_b), (transposed_a, transposed_b))
    torch.testing.assert_close(got, a.float() @ b.float().T, atol=1e-4, rtol=1e-5)


def test_wgmma_accumulates() -> None:
    a, b = torch.randn(64, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    got = wgmma(a, b, (3, 1), (False, False), repeat="twice")
    torch.testing.assert_close(got, 2 * a.float() @ b.float().T, atol=1e-4, rtol=1e-5)


def test_wgmma_without_wait() -> None:
    a, b = torch.randn(64, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    with pytest.raises(MissingWait, match=r"register %r0 read while a product may still write it.*st.global"):
        wgmma(a, b, (3, 3), (False, False), wait="")
    with pytest.raises(MissingWait, match="register %r0 read"):
        wgmma(a, b, (3, 3), (False, False), wait="wgmma.wait_group.sync.aligned 1;")
    wait = "wgmma.wait_group.sync.aligned 0;"
    with pytest.raises(MissingWait, match=r"write to what an asynchronous operation may still read at byte 0.*st.shared"):
        wgmma(a, b, (3, 3), (False, False), wait="", after=f"st.shared.b32 [%r205], %r200;\n{wait}")
    with pytest.raises(MissingWait, match=r"register %r3 overwritten"):
        wgmma(a, b, (3, 3), (False, False), wait="", after=f"mov.b32 %r3, 0;\n{wait}")
    with pytest.raises(MissingWait, match=r"register %r211 overwritten"):
        wgmma(a, b, (-1, 3), (False, False), wait="", after=f"mov.b32 %r211, 0;\n{wait}")


# ---- asynchronous copies

COPY_ASYNC = """ld.param.b64 %d0, [p0];
ld.param.b64 %d1, [p1];
mov.u32 %r0, %tid.x;
mad.wide.u32 %d2, %r0, 16, %d0;
mad.wide.u32 %d3, %r0, 16, %d1;
shl.b32 %r1, %r0, 4;
setp.lt.u32 %p0, %r0, {rows};
selp.b32 %r2, 16, 0, %p0;
cp.async.cg.shared.global [ %r1 + 0 ], [ %d2 + 0 ], 0x10, %r2;
cp.async.commit_group;
{between}
{wait}
{barrier}
xor.b32 %r3, %r1, 1024;
ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3];
st.global.v4.b32 [%d3], {{%r4, %r5, %r6, %r7}};"""


def copy_async(
    rows: int = 128, between: str = "", wait: str = "cp.async.wait_group 0;", barrier: str = "bar.sync 0;"
) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(rows, 4), torch.full((128, 4), float("nan"))
    run({"x": x, "y": y}, COPY_ASYNC.format(rows=rows, between=between, wait=wait, barrier=barrier), shared=4096)
    return x, y


def test_cp_async() -> None:
    x, y = copy_async()
    assert torch.equal(y, torch.cat([x[64:], x[:64]]))


def test_cp_async_fills_with_zeros_and_does_not_read() -> None:
    x, y = copy_async(rows=100)
    assert torch.equal(y, torch.cat([x[64:], torch.zeros(28, 4), x[:64]]))


def test_cp_async_without_wait() -> None:
    with pytest.raises(MissingWait, match=r"read of what an asynchronous copy may still be writing.*ld.shared"):
        copy_async(wait="")
    with pytest.raises(MissingWait, match="asynchronous copy"):
        copy_async(wait="cp.async.wait_group 1;")
    with pytest.raises(MissingBarrier, match="another warp"):
        copy_async(barrier="")
    with pytest.raises(MissingWait, match="write to what an asynchronous copy may still be writing"):
        copy_async(between="st.shared.b32 [%r1], %r0;")


def test_cp_async_groups_finish_in_order() -> None:
    more = "cp.async.cg.shared.global [ %r1 + 2048 ], [ %d2 + 0 ], 0x10, %r2;\ncp.async.commit_group;"
    x, y = copy_async(between=more, wait="cp.async.wait_group 1;")
    assert torch.equal(y, torch.cat([x[64:], x[:64]]))


TMA = """ld.param.b64 %d1, [p1];
mov.u32 %r0, %tid.x;
mov.b32 %r1, k_param_0;
cvt.u64.u32 %d2, %r1;
cvta.param.u64 %d3, %d2;
setp.eq.u32 %p0, %r0, 0;
@%p0 mbarrier.init.shared::cta.b64 [%r399], 1;
bar.sync 0;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r399], {bytes};
mov.b32 %r2, {row};
mov.b32 %r3, {column};
mov.b32 %r4, 0;
@%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r4], [%d3, {{%r3, %r2}}], [%r399];
mov.b32 %r5, {parity};
{wait}
shl.b32 %r6, %r0, 4;
mad.wide.u32 %d4, %r0, 16, %d1;
ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r6];
st.global.v4.b32 [%d4], {{%r10, %r11, %r12, %r13}};
{after}"""
TMA_WAIT = """{
.reg .pred complete;
waitLoop:
mbarrier.try_wait.parity.shared::cta.b64 complete, [%r399], %r5;
@!complete bra.uni waitLoop;
}"""


def tensor_copy(swizzle: int, row: int = 0, column: int = 0, **edits: object) -> tuple[Tensor, Tensor, Counts]:
    """A box of 2048 bytes, and shared memory as it lies there."""
    columns = 64 if swizzle == 0 else 8 << swizzle
    x = torch.arange(1, 200 * 80 + 1, dtype=torch.int16).view(200, 80)
    out = torch.zeros(1024, dtype=torch.int16)
    box = TensorMap(x, (1024 // columns, columns), swizzle)
    values = {"bytes": 2048, "row": row, "column": column, "parity": 0, "wait": TMA_WAIT, "after": ""} | edits
    counts = run({"x": box, "out": out}, "mov.b32 %r399, 2048;\n" + TMA.format(**values), shared=4096)
    return x, out.view(1024 // columns, columns), counts


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
def test_tensor_copy_in_every_swizzle(swizzle: int) -> None:
    x, out, counts = tensor_copy(swizzle, row=7, column=8)
    rows, columns = out.shape
    expected = torch.zeros(1024, dtype=torch.int16)
    for r in range(rows):
        for c in range(columns):
            at = 2 * (r * columns + c)
            expected[(at ^ (at >> 7 & (1 << swizzle) - 1) << 4) // 2] = x[7 + r, 8 + c]
    assert torch.equal(out.reshape(-1), expected)
    assert counts.bytes("tma_load", argument="x") == 2048


def test_tensor_copy_past_the_edge_brings_zeros() -> None:
    x, out, counts = tensor_copy(0, row=-2, column=32)
    expected = torch.zeros(16, 64, dtype=torch.int16)
    expected[2:, :48] = x[:14, 32:]
    assert torch.equal(out, expected)
    assert counts.bytes("tma_load") == 2 * 14 * 48


def test_tensor_copy_without_wait() -> None:
    with pytest.raises(MissingWait, match="asynchronous copy may still be writing"):
        tensor_copy(3, wait="")
    with pytest.raises(MissingWait, match="asynchronous copy may still be writing"):
        tensor_copy(3, parity=1)


def test_mbarrier_that_nothing_completes() -> None:
    with pytest.raises(Deadlock, match="0 arrivals and 2048 bytes"):
        tensor_copy(3, bytes=4096)


STORE_BOX = """fence.proxy.async.shared::cta;
bar.sync 0;
mov.b32 %r20, k_param_2;
cvt.u64.u32 %d20, %r20;
cvta.param.u64 %d21, %d20;
@%p0 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d21, {%r3, %r2}], [%r4];
cp.async.bulk.commit_group;
WAIT
bar.sync 0;
st.shared.b32 [%r6], %r0;"""


@pytest.mark.parametrize("wait", ["cp.async.bulk.wait_group.read 0;", ""])
def test_tensor_store(wait: str) -> None:
    x = torch.randn(20, 64).bfloat16()
    y = torch.full_like(x, float("nan"))
    arguments = {"x": TensorMap(x, (16, 64), 3), "out": torch.zeros(1024, dtype=torch.int16), "y": TensorMap(y, (16, 64), 3)}
    body = TMA.format(bytes=2048, row=8, column=0, parity=0, wait=TMA_WAIT, after=STORE_BOX.replace("WAIT", wait))
    if not wait:
        with pytest.raises(MissingWait, match="write to what an asynchronous operation may still read"):
            run(arguments, "mov.b32 %r399, 2048;\n" + body, shared=4096)
        return
    run(arguments, "mov.b32 %r399, 2048;\n" + body, shared=4096, unwritten=["y"])
    assert torch.equal(y[8:], x[8:])
    assert y[:8].isnan().all()


def test_tensor_map_that_no_host_could_encode() -> None:
    with pytest.raises(ValueError, match="rows of 256 bytes"):
        TensorMap(torch.zeros(8, 128).bfloat16(), (8, 128), 3)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        TensorMap(torch.zeros(8, 100).bfloat16(), (8, 64), 3)


# ---- what is not covered, and arguments that do not fit


@pytest.mark.parametrize(
    "text", ["tcgen05.alloc.sync [%r0], 32;", "add.sat.s32 %r0, %r1, %r2;", "cvt.rp.f32.f64 %r0, %d0;", "fma.rn.f64 %d0, %d1, %d2, %d3;"]
)
def test_unknown_opcode_stops_with_its_name(text: str) -> None:
    with pytest.raises(UnknownOpcode, match=text.split()[0]):
        run({}, "setp.eq.u32 %p0, 0, 1;\n@%p0 " + text)


def test_arguments_that_do_not_fit() -> None:
    ptx = module(["u64", "u32"], "", 128)
    with pytest.raises(ValueError, match="num_warps=8"):
        execute(ptx, grid=(1, 1, 1), arguments={}, shared_bytes=0, num_warps=8)
    with pytest.raises(ValueError, match="takes 2 parameters"):
        execute(ptx, grid=(1, 1, 1), arguments={"a": 1, "b": 2, "c": 3}, shared_bytes=0, num_warps=4)
    with pytest.raises(ValueError, match="outside the grid"):
        execute(ptx, grid=(1, 1, 1), arguments={}, shared_bytes=0, num_warps=4, ctas=[(1, 0, 0)])
    with pytest.raises(ValueError, match="one .entry function"):
        parse("hello")


def test_chosen_ctas_run_alone() -> None:
    y = torch.zeros(6, dtype=torch.int32)
    body = """ld.param.b64 %d0, [p0];
mov.u32 %r0, %ctaid.y;
mov.u32 %r1, %ctaid.x;
mad.lo.s32 %r0, %r0, 3, %r1;
mad.wide.u32 %d1, %r0, 4, %d0;
st.global.b32 [%d1], 1;"""
    counts = run({"y": y}, body, grid=(3, 2, 1), ctas=[(0, 0, 0), (2, 1, 0)])
    assert y.tolist() == [1, 0, 0, 0, 0, 1]
    assert counts.ctas == 2
