"""Integer, floating-point, comparison, conversion and bit instructions.

Approximate instructions (`ex2.approx`, `rcp.approx`, `div.full`, ...) give the correctly rounded result: a card's differ by an ulp or two.
Source: NVIDIA, "Parallel Thread Execution ISA", instruction set.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial

import numpy as np

from idefics2_fast.benchmarks.sm90.operands import DTYPES, Run, items, literal, modifiers, narrow, reader, slots, types, unknown, widen
from idefics2_fast.benchmarks.sm90.ptx import Immediate, Instruction, Pair, Program, Register, Vector
from idefics2_fast.benchmarks.sm90.rounding import bf16_to_f32, f32_to_bf16, f64_to_f32_odd, flush, fma_f32, high_64, sum_to_odd, to_integer

SHORT = {"bf16", "bf16x2", "f16", "f16x2"}
FLOATS = SHORT | {"f32", "f64"}


# ---- values of a type


def decode_short(bits: np.ndarray, type: str) -> np.ndarray:
    """bf16 and fp16 as fp64; the two halves of a packed register are neighbours."""
    bits = np.ascontiguousarray(bits).view(np.uint16)
    return (bf16_to_f32(bits) if type.startswith("bf16") else bits.view(np.float16)).astype(np.float64)


def encode_short(value: np.ndarray, type: str) -> np.ndarray:
    bits = f32_to_bf16(f64_to_f32_odd(value)) if type.startswith("bf16") else value.astype(np.float16).view(np.uint16)
    return bits.view(DTYPES[type])


def unsigned(value: np.ndarray) -> np.ndarray:
    return value if value.dtype.kind in "ub" else value.view(f"u{value.dtype.itemsize}")


def elementwise(known: str, floating: Callable | None, integer: Callable | None, short: Callable | None = None) -> Callable:
    """Instructions whose result has the type of their sources; `short` computes bf16 and fp16 in fp64 (default: `floating`)."""

    def bind(instruction: Instruction, program: Program) -> Run:
        type = instruction.parts[-1]
        parts = modifiers(instruction, known, type)
        function = integer if type not in FLOATS else (short or floating) if type in SHORT else floating
        if function is None or type not in DTYPES:
            raise unknown(instruction)
        if function in (np.fmax, np.fmin) and "NaN" in parts:
            function = np.maximum if function is np.fmax else np.minimum
        (slot,) = slots(instruction.operands[0])
        sources = [reader(operand, DTYPES[type], program) for operand in instruction.operands[1:]]
        return writer(slot, sources, function, type, "ftz" in parts)

    return bind


def writer(slot: int, sources: list, function: Callable, type: str, ftz: bool) -> Run:
    if type in SHORT:

        def run(machine, mask):
            machine.write(slot, encode_short(function(*(decode_short(source(machine), type) for source in sources)), type), mask)

    elif ftz:

        def run(machine, mask):
            machine.write(slot, flush(function(*(flush(source(machine)) for source in sources))).view(np.uint32), mask)

    elif len(sources) == 2:
        first, second = sources

        def run(machine, mask):
            machine.write(slot, unsigned(function(first(machine), second(machine))), mask)

    else:

        def run(machine, mask):
            machine.write(slot, unsigned(function(*(source(machine) for source in sources))), mask)

    return run


# ---- floating point


def through_f64(function: Callable) -> Callable:
    """A function of fp32 by way of fp64: correctly rounded but for ties closer than fp64 can tell."""

    def evaluate(value):
        return function(value.astype(np.float64)).astype(value.dtype)

    return evaluate


def bind_fma(instruction: Instruction, program: Program) -> Run:
    if instruction.parts[-1] == "f64":
        raise unknown(instruction)
    return elementwise("rn ftz", fma_f32, None, fma_short)(instruction, program)


def fma_short(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return sum_to_odd(x * y, z)


def sign_bits(instruction: Instruction, program: Program) -> Run:
    """neg and abs of floats change the sign bit alone, of NaN too."""
    type = instruction.parts[-1]
    if type not in FLOATS:
        return elementwise("", None, np.negative if instruction.parts[0] == "neg" else np.abs)(instruction, program)
    modifiers(instruction, "ftz", type)
    bits = np.dtype(DTYPES[type]).itemsize * 8
    dtype = DTYPES[f"u{bits}"]
    sign = literal(0x80008000 if type.endswith("x2") else 1 << (bits - 1), dtype)
    (slot,) = slots(instruction.operands[0])
    source = reader(instruction.operands[1], dtype, program)
    function = partial(np.bitwise_xor, sign) if instruction.parts[0] == "neg" else partial(np.bitwise_and, ~sign)
    if "ftz" in instruction.parts:
        return lambda machine, mask: machine.write(slot, function(flush(source(machine).view(np.float32)).view(np.uint32)), mask)
    return lambda machine, mask: machine.write(slot, function(source(machine)), mask)


# ---- integers


def truncated(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Division rounded toward zero."""
    quotient = x // y
    return quotient + ((quotient < 0) & (quotient * y != x)).astype(quotient.dtype) if quotient.dtype.kind == "i" else quotient


def bind_mul(instruction: Instruction, program: Program) -> Run:
    return bind_product(instruction, program, add=False)


def bind_mad(instruction: Instruction, program: Program) -> Run:
    return bind_product(instruction, program, add=True)


def product_part(half: str, dtype: type) -> Callable:
    """The lower, upper or whole product of two integers."""
    bits = 8 * np.dtype(dtype).itemsize
    if half == "lo":
        return np.multiply
    if half == "hi" and bits == 64:
        return high_64 if dtype is np.uint64 else lambda x, y: signed_high(x, y)
    double = np.dtype(f"{np.dtype(dtype).kind}{bits // 4}").type
    if half == "wide":
        return lambda x, y: np.multiply(x, y, dtype=double)
    return lambda x, y: (np.multiply(x, y, dtype=double) >> double(bits)).astype(dtype)


def signed_high(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    high = high_64(x.view(np.uint64), y.view(np.uint64)).view(np.int64)
    return high - np.where(x < 0, y, 0) - np.where(y < 0, x, 0)


def bind_product(instruction: Instruction, program: Program, add: bool) -> Run:
    """mul and mad of integers, with the carry that chains of `mad.lo.cc`, `madc.hi` pass on; mul of floats."""
    type = instruction.parts[-1]
    if type in FLOATS:
        if add:
            raise unknown(instruction)
        return elementwise("rn ftz", np.multiply, None)(instruction, program)
    parts = modifiers(instruction, "lo hi wide cc", type)
    half = (parts & {"lo", "hi", "wide"}).pop()
    dtype = DTYPES[type]
    multiply = product_part(half, dtype)
    wide = DTYPES[f"{type[0]}{16 * np.dtype(dtype).itemsize}"] if half == "wide" else dtype
    (slot,) = slots(instruction.operands[0])
    x, y = (reader(operand, dtype, program) for operand in instruction.operands[1:3])
    if not add:
        return lambda machine, mask: machine.write(slot, unsigned(multiply(x(machine), y(machine))), mask)
    z = reader(instruction.operands[3], wide, program)
    if "cc" in parts or instruction.parts[0] == "madc":
        return carried(slot, lambda machine: multiply(x(machine), y(machine)), z, instruction)
    return lambda machine, mask: machine.write(slot, unsigned(multiply(x(machine), y(machine)) + z(machine)), mask)


def carried(slot: int, first: Callable, second: Callable, instruction: Instruction) -> Run:
    """first + second + carry of uint32; `.cc` keeps the carry."""
    takes, keeps = instruction.parts[0] in ("addc", "madc"), "cc" in instruction.parts
    if instruction.parts[-1] != "u32":
        raise unknown(instruction)

    def run(machine, mask):
        total = first(machine).astype(np.uint64) + second(machine) + (machine.carry if takes else np.uint64(0))
        machine.write(slot, total.astype(np.uint32), mask)
        if keeps:
            carry = total >> np.uint64(32)
            machine.carry = carry if mask is None else np.where(mask, carry, machine.carry)

    return run


def bind_add(instruction: Instruction, program: Program) -> Run:
    if "cc" in instruction.parts or instruction.parts[0] == "addc":
        modifiers(instruction, "cc", instruction.parts[-1])
        (slot,) = slots(instruction.operands[0])
        first, second = (reader(operand, np.uint32, program) for operand in instruction.operands[1:])
        return carried(slot, first, second, instruction)
    return elementwise("rn ftz", np.add, np.add, sum_to_odd)(instruction, program)


def bind_shift(instruction: Instruction, program: Program) -> Run:
    """Shifts by 32 bits and more give zero, or the sign."""
    kind, type = instruction.parts
    dtype = DTYPES[type]
    bits = 8 * np.dtype(dtype).itemsize
    (slot,) = slots(instruction.operands[0])
    value, amount = reader(instruction.operands[1], dtype, program), reader(instruction.operands[2], np.uint32, program)
    shift = np.left_shift if kind == "shl" else np.right_shift
    if isinstance(instruction.operands[2], Immediate) and 0 <= instruction.operands[2].bits < bits:
        by = dtype(instruction.operands[2].bits)
        return lambda machine, mask: machine.write(slot, unsigned(shift(value(machine), by)), mask)

    def run(machine, mask):
        by = amount(machine)
        shifted = shift(value(machine), np.minimum(by, bits - 1).astype(dtype))
        if shift is np.left_shift or shifted.dtype.kind == "u":
            shifted = np.where(by < bits, shifted, dtype(0))
        machine.write(slot, unsigned(shifted), mask)

    return run


def funnel(instruction: Instruction, program: Program) -> Run:
    """shf: 64 bits from two words, shifted left (upper word) or right (lower word)."""
    left = modifiers(instruction, "l r wrap clamp b32") >= {"l"}
    clamp = "clamp" in instruction.parts
    (slot,) = slots(instruction.operands[0])
    low, high, amount = (reader(operand, np.uint32, program) for operand in instruction.operands[1:])

    def run(machine, mask):
        pair = (np.uint64(0) + high(machine) << np.uint64(32)) | low(machine)
        by = np.uint64(0) + (np.minimum(amount(machine), np.uint32(32)) if clamp else amount(machine) & np.uint32(31))
        shifted = (pair << by) >> np.uint64(32) if left else pair >> by
        machine.write(slot, machine.full(shifted.astype(np.uint32)), mask)

    return run


def bfe(x: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """A field of 32-bit words; the sign of a signed field is its last bit inside the word."""
    start, length = start.astype(np.int64) & 255, length.astype(np.int64) & 255
    field = (x.astype(np.int64) >> np.minimum(start, 32 if x.dtype.kind == "u" else 31)) & ((np.int64(1) << np.minimum(length, 32)) - 1)
    if x.dtype.kind == "u":
        return field.astype(np.uint32)
    last = np.minimum(np.minimum(start + length - 1, 31) - np.minimum(start, 31), 31)
    negative = (length > 0) & ((x.astype(np.int64) >> np.minimum(start + length - 1, 31)) & 1 == 1)
    return np.where(negative, field | ~((np.int64(2) << last) - 1), field).astype(np.int32)


def bfi(x: np.ndarray, y: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The low bits of x put into y."""
    start, length = np.uint64(0) + (start & 255), np.minimum(np.uint64(0) + (length & 255), np.uint64(32))
    field = ((np.uint64(1) << length) - np.uint64(1)) << np.minimum(start, np.uint64(32))
    shifted = (np.uint64(0) + x) << np.minimum(start, np.uint64(32))
    return ((shifted & field) | ((np.uint64(0) + y) & ~field)).astype(np.uint32)


def prmt(x: np.ndarray, y: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes out of eight; bit 3 of a selector repeats the byte's sign instead."""
    pair = (np.uint64(0) + x) | ((np.uint64(0) + y) << np.uint64(32))
    result = np.uint64(0)
    for i in range(4):
        code = (np.uint64(0) + selector >> np.uint64(4 * i)) & np.uint64(15)
        byte = (pair >> ((code & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        byte = np.where(code & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        result = result | (byte << np.uint64(8 * i))
    return result.astype(np.uint32)


def lop3(x: np.ndarray, y: np.ndarray, z: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros_like(x + y + z)
    for i in range(8):
        term = (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        result |= term & np.where((table >> np.uint32(i)) & 1, ~np.uint32(0), np.uint32(0))
    return result


def popcount(x: np.ndarray) -> np.ndarray:
    return np.bitwise_count(x).astype(np.uint32)


def leading_zeros(x: np.ndarray) -> np.ndarray:
    """clz: 32 minus the bit length, which the exponent of the fp64 value gives."""
    return (np.uint32(32) - np.frexp(x.astype(np.float64))[1].astype(np.uint32)).astype(np.uint32)


def reversed_bits(x: np.ndarray) -> np.ndarray:
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        x = ((x >> np.uint32(shift)) & np.uint32(mask)) | ((x & np.uint32(mask)) << np.uint32(shift))
    return x


def words(function: Callable, known: str = "b32 u32") -> Callable:
    """Instructions on unsigned words of 32 bits."""

    def bind(instruction: Instruction, program: Program) -> Run:
        modifiers(instruction, known)
        (slot,) = slots(instruction.operands[0])
        sources = [reader(operand, np.uint32, program) for operand in instruction.operands[1:]]
        return lambda machine, mask: machine.write(slot, function(*(source(machine) for source in sources)), mask)

    return bind


def bind_bfe(instruction: Instruction, program: Program) -> Run:
    type = instruction.parts[-1]
    modifiers(instruction, "u32 s32")
    (slot,) = slots(instruction.operands[0])
    x = reader(instruction.operands[1], DTYPES[type], program)
    start, length = (reader(operand, np.uint32, program) for operand in instruction.operands[2:])
    return lambda machine, mask: machine.write(slot, unsigned(bfe(x(machine), start(machine), length(machine))), mask)


# ---- comparison and selection

COMPARISONS = {
    **dict.fromkeys(("eq", "equ"), operator.eq),
    **dict.fromkeys(("ne", "neu"), operator.ne),
    **dict.fromkeys(("lt", "lo", "ltu"), operator.lt),
    **dict.fromkeys(("le", "ls", "leu"), operator.le),
    **dict.fromkeys(("gt", "hi", "gtu"), operator.gt),
    **dict.fromkeys(("ge", "hs", "geu"), operator.ge),
}
COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def bind_setp(instruction: Instruction, program: Program) -> Run:
    """A comparison, perhaps combined with a predicate; for floats `u` after its name makes NaN true, else NaN is false."""
    comparison, type = instruction.parts[1], instruction.parts[-1]
    parts = modifiers(instruction, "and or xor ftz num nan", comparison, type)
    x, y = (reader(operand, DTYPES[type], program) for operand in instruction.operands[1:3])
    combine = next((COMBINATIONS[part] for part in instruction.parts if part in COMBINATIONS), None)
    third = reader(instruction.operands[3], np.bool_, program) if combine else None
    target = instruction.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    compare = comparison_of(comparison, type, "ftz" in parts, instruction)

    def run(machine, mask):
        result = compare(x(machine), y(machine))
        for register, value in ((first, result), (second, None if second is None else ~result)):
            if register is not None:
                machine.write(register.slot, value if combine is None else combine(value, third(machine)), mask)

    return run


def comparison_of(name: str, type: str, ftz: bool, instruction: Instruction) -> Callable:
    if type not in FLOATS:
        if name not in COMPARISONS:
            raise unknown(instruction)
        return COMPARISONS[name]
    if type.endswith("x2") or name not in {*COMPARISONS, "num", "nan"}:
        raise unknown(instruction)
    value = (lambda x: decode_short(x, type)) if type in SHORT else flush if ftz else (lambda x: x)
    if name in ("num", "nan"):
        return lambda x, y: (np.isnan(value(x)) | np.isnan(value(y))) == (name == "nan")
    compare, unordered = COMPARISONS[name], name.endswith("u") and len(name) == 3
    if unordered and name != "neu":
        return lambda x, y: compare(value(x), value(y)) | np.isnan(value(x)) | np.isnan(value(y))
    if name == "ne":
        return lambda x, y: (value(x) != value(y)) & ~(np.isnan(value(x)) | np.isnan(value(y)))
    return lambda x, y: compare(value(x), value(y))


def bind_selp(instruction: Instruction, program: Program) -> Run:
    modifiers(instruction, "", instruction.parts[-1])
    dtype = DTYPES[f"u{8 * np.dtype(DTYPES[instruction.parts[-1]]).itemsize}"]
    (slot,) = slots(instruction.operands[0])
    x, y = (reader(operand, dtype, program) for operand in instruction.operands[1:3])
    choice = reader(instruction.operands[3], np.bool_, program)
    return lambda machine, mask: machine.write(slot, np.where(choice(machine), x(machine), y(machine)), mask)


# ---- moves and conversions


def bind_mov(instruction: Instruction, program: Program) -> Run:
    modifiers(instruction, "", instruction.parts[-1])
    target, source = instruction.operands
    if isinstance(target, Vector):
        return unpack(target, source, program)
    if isinstance(source, Vector):
        return pack(target, source, program)
    read = reader(source, DTYPES[target.kind], program)
    slot = target.slot
    if isinstance(source, Register):
        return lambda machine, mask: machine.write(slot, read(machine), mask)
    return lambda machine, mask: machine.write(slot, machine.full(read(machine)), mask)


def unpack(target: Vector, source: object, program: Program) -> Run:
    count, part = len(target.items), DTYPES[next(item.kind for item in target.items if isinstance(item, Register))]
    whole = DTYPES[f"u{8 * count * np.dtype(part).itemsize}"]
    read, targets = reader(source, whole, program), slots(target)

    def run(machine, mask):
        values = np.ascontiguousarray(machine.full(read(machine))).view(part).reshape(-1, count)
        for i, slot in enumerate(targets):
            if slot is not None:
                machine.write(slot, values[:, i].copy(), mask)

    return run


def pack(target: Register, source: Vector, program: Program) -> Run:
    count, whole = len(source.items), DTYPES[target.kind]
    part = DTYPES[f"u{8 * np.dtype(whole).itemsize // count}"]
    reads = [reader(item, part, program) for item in source.items]
    slot = target.slot

    def run(machine, mask):
        values = np.empty((machine.lanes, count), part)
        for i, read in enumerate(reads):
            values[:, i] = read(machine)
        machine.write(slot, values.view(whole)[:, 0], mask)

    return run


def bind_cvt(instruction: Instruction, program: Program) -> Run:
    parts = modifiers(instruction, "rn rz rna rni rzi rmi rpi ftz sat satfinite relu tf32 pack", *types(instruction))
    target = items(instruction.operands[0])[0]
    if parts >= {"rna", "tf32"} or parts >= {"rn", "tf32"}:
        return convert(target, instruction.operands[1], np.float32, tf32_nearest(parts), program)
    to, *froms = types(instruction)
    if "tf32" in parts or "pack" in parts or len(froms) != 1:
        raise unknown(instruction)
    if len(instruction.operands) == 3:
        return convert_pair(instruction, target, to, froms[0], parts, program)
    function = conversion(to, froms[0], parts)
    if function is None or to.endswith("x2"):
        raise unknown(instruction)
    return convert(target, instruction.operands[1], DTYPES[froms[0]], function, program)


def convert(target: Register, source: object, dtype: type, function: Callable, program: Program) -> Run:
    read = narrow(source, dtype, program)
    return lambda machine, mask: machine.write(target.slot, widen(machine.full(function(read(machine))), target), mask)


def convert_pair(instruction: Instruction, target: Register, to: str, source: str, parts: set[str], program: Program) -> Run:
    """Two fp32 to one packed register: the first operand is the upper half."""
    function = conversion(to.removesuffix("x2"), source, parts) if to in ("bf16x2", "f16x2") and source == "f32" else None
    if function is None:
        raise unknown(instruction)
    upper, lower = (reader(operand, np.float32, program) for operand in instruction.operands[1:])

    def run(machine, mask):
        halves = np.empty((machine.lanes, 2), np.uint16)
        halves[:, 0], halves[:, 1] = function(lower(machine)), function(upper(machine))
        machine.write(target.slot, halves.view(np.uint32)[:, 0], mask)

    return run


def tf32_nearest(parts: set[str]) -> Callable:
    """fp32 with 10 bits of mantissa: ties away from zero (rna) or to even (rn)."""

    def round_away(value):
        return ((value.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)

    def round_even(value):
        bits = value.view(np.uint32)
        return ((bits + np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)).view(np.float32)

    return round_away if "rna" in parts else round_even


def conversion(to: str, source: str, parts: set[str]) -> Callable | None:
    """A function from lanes of `source` (bits, for bf16 and fp16) to lanes of `to`."""
    if source in FLOATS and to in FLOATS:
        return between_floats(to, source, parts)
    if source in FLOATS:
        direction = next((part for part in ("rni", "rzi", "rmi", "rpi") if part in parts), None)
        decode = (lambda x: decode_short(x, source)) if source in SHORT else flush if "ftz" in parts else (lambda x: x)
        return None if direction is None else lambda x: to_integer(decode(x), direction, DTYPES[to])
    if to in ("f32", "f64"):
        return (lambda x: x.astype(DTYPES[to])) if "rn" in parts or to == "f64" else None
    if to in FLOATS:
        # A 32-bit integer is exact in fp64, from where one rounding remains.
        return (lambda x: encode_short(np.atleast_1d(x).astype(np.float64), to)) if "rn" in parts and "64" not in source else None
    if "sat" in parts:
        limits = np.iinfo(DTYPES[to])
        return lambda x: np.clip(x, max(limits.min, np.iinfo(x.dtype).min), min(limits.max, np.iinfo(x.dtype).max)).astype(DTYPES[to])
    return lambda x: x.astype(DTYPES[to])


def between_floats(to: str, source: str, parts: set[str]) -> Callable | None:
    if to in ("f32", "f64") and to == source:
        directions = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
        rounded = next((directions[part] for part in parts if part in directions), lambda x: x)
        before = flush if "ftz" in parts else (lambda x: x)
        after = (lambda x: np.where(x > 0, np.minimum(x, np.float32(1)), np.float32(0))) if "sat" in parts else (lambda x: x)
        return lambda x: after(rounded(before(x)))
    if parts & {"sat", "rni", "rzi", "rmi", "rpi"}:
        return None
    if source in SHORT and to in ("f32", "f64"):
        return lambda x: decode_short(x, source).astype(DTYPES[to])
    if source in SHORT:
        return None
    if to in ("f32", "f64"):
        return (lambda x: x.astype(DTYPES[to])) if not parts & {"rz"} else None
    if source != "f32" or (parts & {"rz"} and to != "bf16"):
        return None
    encode = partial(f32_to_bf16, toward_zero="rz" in parts) if to == "bf16" else lambda x: x.astype(np.float16).view(np.uint16)
    return clamped(encode, to, parts)


def clamped(encode: Callable, to: str, parts: set[str]) -> Callable:
    """relu: negative numbers become zero. satfinite: magnitudes beyond the largest finite number become that."""
    largest = np.float32(3.3895313892515355e38 if to == "bf16" else 65504.0)

    def limited(value):
        if "relu" in parts:
            value = np.where(value < 0, np.float32(0), value)
        return encode(np.clip(value, -largest, largest) if "satfinite" in parts else value)

    return limited if parts & {"relu", "satfinite"} else encode


def bind_policy(instruction: Instruction, program: Program) -> Run:
    """createpolicy: a hint to the cache."""
    (slot,) = slots(instruction.operands[0])
    return lambda machine, mask: machine.write(slot, machine.full(np.uint64(0)), mask)


def bind_cvta(instruction: Instruction, program: Program) -> Run:
    """A generic address of global or parameter memory is the address itself."""
    modifiers(instruction, "to global param u64")
    (slot,) = slots(instruction.operands[0])
    source = reader(instruction.operands[1], np.uint64, program)
    return lambda machine, mask: machine.write(slot, machine.full(source(machine)), mask)


def sine(instruction: Instruction, program: Program) -> Run:
    return elementwise("approx ftz", through_f64(np.sin if instruction.parts[0] == "sin" else np.cos), None)(instruction, program)


def copysign(instruction: Instruction, program: Program) -> Run:
    """The magnitude of the second source with the sign of the first."""
    return elementwise("", lambda x, y: np.copysign(y, x), None)(instruction, program)


OPCODES: dict[str, Callable[[Instruction, Program], Run]] = {
    "abs": sign_bits,
    "add": bind_add,
    "addc": bind_add,
    "and": elementwise("", None, np.bitwise_and),
    "bfe": bind_bfe,
    "bfi": words(bfi),
    "brev": words(reversed_bits),
    "clz": words(leading_zeros),
    "copysign": copysign,
    "cos": sine,
    "createpolicy": bind_policy,
    "cvt": bind_cvt,
    "cvta": bind_cvta,
    "div": elementwise("full approx rn ftz", np.divide, truncated),
    "ex2": elementwise("approx ftz", through_f64(np.exp2), None),
    "fma": bind_fma,
    "lg2": elementwise("approx ftz", through_f64(np.log2), None),
    "lop3": words(lop3),
    "mad": bind_mad,
    "madc": bind_mad,
    "max": elementwise("NaN ftz", np.fmax, np.maximum),
    "min": elementwise("NaN ftz", np.fmin, np.minimum),
    "mov": bind_mov,
    "mul": bind_mul,
    "neg": sign_bits,
    "not": elementwise("", None, np.invert),
    "or": elementwise("", None, np.bitwise_or),
    "popc": words(popcount),
    "prmt": words(prmt),
    "rcp": elementwise("approx rn ftz", np.reciprocal, None),
    "rem": elementwise("", None, np.fmod),
    "rsqrt": elementwise("approx ftz", through_f64(lambda x: 1 / np.sqrt(x)), None),
    "selp": bind_selp,
    "setp": bind_setp,
    "shf": funnel,
    "shl": bind_shift,
    "shr": bind_shift,
    "sin": sine,
    "sqrt": elementwise("approx rn ftz", np.sqrt, None),
    "sub": elementwise("rn ftz", np.subtract, np.subtract, lambda x, y: sum_to_odd(x, -y)),
    "tanh": elementwise("approx", through_f64(np.tanh), None),
    "xor": elementwise("", None, np.bitwise_xor),
}
