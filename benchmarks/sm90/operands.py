"""From an instruction's operands to functions that read lanes and slots that take results.

An opcode's entry in a table is a function `bind(instruction, program)`; it looks at operands and modifiers once and returns
`run(machine, mask)`, which does the work of all lanes. A mask of None stands for every lane.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from idefics2_fast.benchmarks.sm90.faults import UnknownOpcode
from idefics2_fast.benchmarks.sm90.ptx import Address, Immediate, Instruction, Program, Register, Symbol, Vector

Run = Callable[[object, object], "int | None"]
Read = Callable[[object], np.ndarray]

DTYPES = {
    "pred": np.bool_,
    **{f"{letter}{bits}": np.dtype(f"u{bits // 8}").type for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}").type for bits in (8, 16, 32, 64)},
    "f16": np.uint16,
    "bf16": np.uint16,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "f32": np.float32,
    "f64": np.float64,
}

# Address spaces in the 64-bit address of this machine. Shared and local addresses start at 0 in their own space.
PARAMETER_BASE = 1 << 20
PARAMETER_STRIDE = 1 << 8


def unknown(instruction: Instruction) -> UnknownOpcode:
    return UnknownOpcode(f"opcode {instruction.opcode!r} is not covered: line {instruction.line}: {instruction.text[:120]}")


def modifiers(instruction: Instruction, known: str, *skip: str) -> set[str]:
    """The opcode's parts after the first; any that is neither in `known` nor in `skip` is unknown."""
    parts = set(instruction.parts[1:])
    if parts - set(known.split()) - set(skip):
        raise unknown(instruction)
    return parts


def types(instruction: Instruction) -> list[str]:
    return [part for part in instruction.parts[1:] if part in DTYPES]


def literal(bits: int, dtype: type) -> np.generic:
    if dtype is np.bool_:
        return np.bool_(bits != 0)
    width = 8 * np.dtype(dtype).itemsize
    return np.array(bits & ((1 << width) - 1), dtype=f"u{width // 8}").view(dtype)[()]


def constant_address(operand: Symbol, program: Program) -> int:
    """The number that the name of an array stands for in an instruction."""
    names = [parameter.name for parameter in program.parameters]
    if operand.name in names:
        return PARAMETER_BASE + PARAMETER_STRIDE * names.index(operand.name)
    if operand.name in program.local:
        return program.local[operand.name]
    if operand.name in program.constants:
        return -(list(program.constants).index(operand.name) + 1)
    if operand.name == "global_smem":
        return 0
    raise ValueError(f"name {operand.name!r} is not defined")


def reader(operand: object, dtype: type, program: Program) -> Read:
    """The operand's lanes as `dtype`: a view of a register of that width, or a scalar."""
    if isinstance(operand, Register):
        slot = operand.slot
        return lambda machine: machine.registers[slot].view(dtype)
    if isinstance(operand, Symbol) and operand.name in program.constants:
        name = operand.name
        return lambda machine: dtype(machine.memory.constants[name])
    value = literal(operand.bits if isinstance(operand, Immediate) else constant_address(operand, program), dtype)
    return lambda machine: value


def narrow(operand: object, dtype: type, program: Program) -> Read:
    """The low bits of an operand whose register may be wider than `dtype`."""
    if isinstance(operand, Register) and operand.kind != "pred":
        width = np.dtype(dtype).itemsize
        own = DTYPES[operand.kind]
        if np.dtype(own).itemsize > width:
            slot, bits = operand.slot, np.dtype(f"u{width}").type
            return lambda machine: machine.registers[slot].view(own).astype(bits).view(dtype)
    return reader(operand, dtype, program)


def widen(values: np.ndarray, register: Register) -> np.ndarray:
    """Values as the bits of a register at least as wide: signed values are sign-extended."""
    own = np.dtype(DTYPES[register.kind])
    if values.dtype.itemsize == own.itemsize:
        return values.view(own)
    return values.astype(f"i{own.itemsize}" if values.dtype.kind == "i" else own).view(own)


def items(operand: object) -> tuple:
    return operand.items if isinstance(operand, Vector) else (operand,)


def slots(operand: object) -> tuple[int | None, ...]:
    """Destination slots; the sink `_` is None."""
    return tuple(None if isinstance(item, Symbol) else item.slot for item in items(operand))


def address(operand: Address, program: Program) -> Read:
    """Lanes of int64: base plus offset. Shared and local addresses are 32-bit and wrap as such."""
    if isinstance(operand.base, Register):
        dtype = DTYPES[operand.base.kind]
        base, offset = reader(operand.base, dtype, program), literal(operand.offset, dtype)
        if operand.offset == 0:
            return lambda machine: base(machine).astype(np.int64)
        return lambda machine: (base(machine) + offset).astype(np.int64)
    if isinstance(operand.base, Symbol) and operand.base.name in program.constants:
        name, offset = operand.base.name, operand.offset
        return lambda machine: machine.full(np.int64(machine.memory.constants[name] + offset))
    start = operand.base.bits if isinstance(operand.base, Immediate) else constant_address(operand.base, program)
    value = np.int64(start + operand.offset)
    return lambda machine: machine.full(value)
