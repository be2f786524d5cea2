"""Loads, stores, atomics and the copies of matrices between registers and shared memory."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from idefics2_fast.benchmarks.sm90.arithmetic import decode_short, encode_short
from idefics2_fast.benchmarks.sm90.counters import distinct_segments, excess_passes
from idefics2_fast.benchmarks.sm90.faults import OutOfBounds
from idefics2_fast.benchmarks.sm90.memory import words
from idefics2_fast.benchmarks.sm90.operands import DTYPES, Run, address, items, modifiers, narrow, reader, slots, unknown, widen
from idefics2_fast.benchmarks.sm90.ptx import Instruction, Program
from idefics2_fast.benchmarks.sm90.warps import whole_warps

HINTS = (
    "nc weak relaxed acquire release volatile cta gpu sys cluster "
    "L1::evict_first L1::evict_last L1::evict_normal L1::evict_unchanged L1::no_allocate "
    "L2::cache_hint L2::evict_first L2::evict_last L2::evict_normal L2::64B L2::128B L2::256B ca cg cs lu cv wb wt"
)
ORDERED = {"relaxed", "acquire", "volatile"}


def space(instruction: Instruction) -> str:
    """The state space; a generic address is taken as global, for nothing else forms one."""
    known = {"param", "global", "shared", "local", "const"}
    return next((part.split("::")[0] for part in instruction.parts[1:] if part.split("::")[0] in known), "global")


def shape(instruction: Instruction) -> tuple[str, int]:
    """The element's type and how many a thread moves."""
    modifiers(instruction, HINTS + " v2 v4 v8 global shared shared::cta local param", instruction.parts[-1])
    count = next((int(part[1:]) for part in instruction.parts if re.fullmatch(r"v\d", part)), 1)
    if instruction.parts[-1] not in DTYPES or count * np.dtype(DTYPES[instruction.parts[-1]]).itemsize > 16:
        raise unknown(instruction)
    return instruction.parts[-1], count


# ---- what an access of lanes does, shared with cp.async


def count_global(machine, direction: str, addresses: np.ndarray, mask: np.ndarray | None, size: int) -> None:
    """Bytes and segments by argument; the lanes of one access that lie in several arguments are counted with the first."""
    lanes = machine.selected(mask)
    if not len(lanes):
        return
    name = machine.memory.argument(int(addresses[lanes[0]]), int(lanes[0])).name
    machine.counts.requested[direction, name, size] += len(lanes) * size
    machine.counts.segments[direction, name] += distinct_segments(addresses, mask)


def load_global(machine, addresses: np.ndarray, lanes: np.ndarray, size: int, ordered: bool = False) -> np.ndarray:
    owners = machine.owners[lanes] | np.uint64(machine.epoch)
    return machine.memory.load(addresses[lanes], lanes, owners, size, ordered)


def shared_index(machine, addresses: np.ndarray, lanes: np.ndarray, size: int) -> np.ndarray:
    machine.shared.check(addresses[lanes], lanes, size)
    return (machine.shared_base[lanes] + addresses[lanes]) // size


def count_shared(machine, direction: str, addresses: np.ndarray, mask: np.ndarray | None, size: int) -> None:
    machine.counts.shared[direction, size] += (machine.lanes if mask is None else int(np.count_nonzero(mask))) * size
    machine.counts.bank_conflicts += excess_passes(addresses, mask, size)


def store_shared(machine, index: np.ndarray, lanes: np.ndarray, values: np.ndarray, size: int) -> None:
    machine.shared.store(index, lanes, values, machine.warp_codes[lanes], size)
    machine.unsynced.append((size, index))


# ---- ld, st


def bind_ld(instruction: Instruction, program: Program) -> Run:
    if space(instruction) == "param":
        return bind_parameter(instruction, program)
    type, count = shape(instruction)
    dtype = np.dtype(DTYPES[type])
    size = dtype.itemsize * count
    at = address(instruction.operands[1], program)
    targets = items(instruction.operands[0])
    load = {"global": load_words, "shared": load_shared_words, "local": load_local_words}[space(instruction)]
    ordered = bool(ORDERED & set(instruction.parts))

    def run(machine, mask):
        lanes = machine.selected(mask)
        if not len(lanes):
            return
        values = load(machine, at(machine), mask, lanes, size, ordered).view(dtype).reshape(-1, count)
        for i, target in enumerate(targets):
            column = np.ascontiguousarray(values[:, i])
            if mask is not None:
                column, loaded = np.zeros(machine.lanes, dtype), column
                column[lanes] = loaded
            machine.write(target.slot, widen(column, target), mask)

    return run


def load_words(machine, addresses, mask, lanes, size, ordered):
    count_global(machine, "load", addresses, mask, size)
    return load_global(machine, addresses, lanes, size, ordered)


def load_shared_words(machine, addresses, mask, lanes, size, ordered):
    count_shared(machine, "load", addresses, mask, size)
    return machine.shared.load(shared_index(machine, addresses, lanes, size), lanes, machine.warp_codes[lanes], size)


def local_index(machine, addresses, lanes, size):
    beyond = (addresses[lanes] < 0) | (addresses[lanes] > machine.program.local_bytes - size)
    if beyond.any():
        raise OutOfBounds("local memory: access outside the thread's arrays", int(lanes[np.flatnonzero(beyond)[0]]))
    return lanes[:, None], addresses[lanes, None] + np.arange(size)


def load_local_words(machine, addresses, mask, lanes, size, ordered):
    return machine.local[local_index(machine, addresses, lanes, size)]


def bind_parameter(instruction: Instruction, program: Program) -> Run:
    """ld.param: the argument's bits; a parameter is read whole."""
    source = instruction.operands[1]
    dtype = DTYPES[instruction.parts[-1]]
    if source.offset or source.base.name not in {parameter.name for parameter in program.parameters}:
        raise unknown(instruction)
    name, target = source.base.name, instruction.operands[0]
    bits = 8 * np.dtype(dtype).itemsize

    def run(machine, mask):
        value = np.array(int(machine.launch.parameters[name]) & ((1 << bits) - 1), f"u{bits // 8}").view(dtype)
        machine.write(target.slot, widen(np.full(machine.lanes, value), target), mask)

    return run


def bind_st(instruction: Instruction, program: Program) -> Run:
    type, count = shape(instruction)
    dtype = np.dtype(DTYPES[type])
    size = dtype.itemsize * count
    at = address(instruction.operands[0], program)
    sources = [narrow(item, dtype.type, program) for item in items(instruction.operands[1])]
    store = {"global": store_words, "shared": store_shared_words, "local": store_local_words}[space(instruction)]

    def run(machine, mask):
        lanes = machine.selected(mask)
        if not len(lanes):
            return
        values = np.empty((machine.lanes, count), dtype)
        for i, source in enumerate(sources):
            values[:, i] = source(machine)
        store(machine, at(machine), mask, lanes, values[lanes], size)

    return run


def store_words(machine, addresses, mask, lanes, values, size):
    count_global(machine, "store", addresses, mask, size)
    owners = machine.owners[lanes] | np.uint64(machine.epoch)
    flat = words(values.reshape(-1).view(np.uint8), size)
    machine.memory.store(addresses[lanes], lanes, owners, flat, size)


def store_shared_words(machine, addresses, mask, lanes, values, size):
    count_shared(machine, "store", addresses, mask, size)
    index = shared_index(machine, addresses, lanes, size)
    store_shared(machine, index, lanes, words(values.reshape(-1).view(np.uint8), size), size)


def store_local_words(machine, addresses, mask, lanes, values, size):
    machine.local[local_index(machine, addresses, lanes, size)] = values.view(np.uint8)


# ---- atomics


def swap(old, new):
    return new


ATOMICS: dict[str, Callable] = {
    "add": np.add,
    "and": np.bitwise_and,
    "exch": swap,
    "max": np.maximum,
    "min": np.minimum,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def bind_atomic(instruction: Instruction, program: Program) -> Run:
    """atom and red: lanes take turns in their order. Bits are compared and swapped (`cas`) or combined in the type's arithmetic."""
    type = instruction.parts[-1]
    parts = modifiers(instruction, "global shared relaxed acquire release acq_rel cta gpu sys noftz cas " + " ".join(ATOMICS), type)
    function = next((ATOMICS[part] for part in instruction.parts if part in ATOMICS), None)
    if (function is None) == ("cas" not in parts) or space(instruction) not in ("global", "shared"):
        raise unknown(instruction)
    operands = instruction.operands if instruction.parts[0] == "atom" else (None, *instruction.operands)
    slot = None if operands[0] is None else slots(operands[0])[0]
    at = address(operands[1], program)
    dtype = DTYPES[type]
    sources = [reader(operand, dtype, program) for operand in operands[2:]]
    apply = compare_and_swap if "cas" in parts else arithmetic_of(type, function)
    access = atomic_shared if space(instruction) == "shared" else atomic_global

    def run(machine, mask):
        lanes = machine.selected(mask)
        if not len(lanes):
            return
        operands_on = [machine.full(source(machine))[lanes] for source in sources]
        old = access(machine, at(machine), mask, lanes, operands_on, np.dtype(dtype), apply)
        if slot is not None:
            result = np.zeros(machine.lanes, dtype)
            result[lanes] = old
            machine.write(slot, widen(result, machine.program.registers[slot]), mask)

    return run


def compare_and_swap(old, expected, new):
    return new if old == expected else old


def arithmetic_of(type: str, function: Callable) -> Callable:
    if type not in ("f16", "bf16", "f16x2", "bf16x2"):
        return function
    return lambda old, new: encode_short(function(decode_short(old, type), decode_short(new, type)), type)[0]


def take_turns(memory: np.ndarray, index: np.ndarray, operands: list[np.ndarray], apply: Callable) -> np.ndarray:
    """Read-modify-write at each index in order; returns what each found."""
    old = np.empty(len(index), memory.dtype)
    for i, place in enumerate(index):
        old[i] = memory[place]
        memory[place] = apply(memory[place], *(operand[i] for operand in operands))
    return old


def atomic_global(machine, addresses, mask, lanes, operands, dtype, apply):
    size = dtype.itemsize
    count_global(machine, "atomic", addresses, mask, size)
    load_global(machine, addresses, lanes, size, ordered=True)
    base = machine.memory.argument(int(addresses[lanes[0]]), int(lanes[0]))
    for argument, part, offsets in machine.memory.split(addresses[lanes], lanes, size):
        assert argument is base, "an atomic's lanes lie in one argument"
        memory = words(argument.storage.bytes, size).view(dtype)
        return take_turns(memory, offsets // size, [operand[part] for operand in operands], apply)


def atomic_shared(machine, addresses, mask, lanes, operands, dtype, apply):
    size = dtype.itemsize
    count_shared(machine, "atomic", addresses, mask, size)
    index = shared_index(machine, addresses, lanes, size)
    machine.shared.check_readable(index, lanes, machine.warp_codes[lanes], size)
    return take_turns(words(machine.shared.bytes, size).view(dtype), index, operands, apply)


# ---- ldmatrix, stmatrix


def matrix_rows(machine, addresses: np.ndarray, lanes: np.ndarray, count: int) -> np.ndarray:
    """Word indices [warps, count, 8] of the rows of 16 bytes; the rows of matrix j come from threads 8 j to 8 j + 7."""
    first = lanes.reshape(-1, 32)[:, : 8 * count].reshape(-1)
    return shared_index(machine, addresses, first, 16).reshape(-1, count, 8), first


def matrix_shape(instruction: Instruction) -> tuple[int, bool]:
    parts = modifiers(instruction, "sync aligned m8n8 x1 x2 x4 trans shared shared::cta b16")
    return next(int(part[1]) for part in parts if part in ("x1", "x2", "x4")), "trans" in parts


def bind_ldmatrix(instruction: Instruction, program: Program) -> Run:
    """Matrices of 8 x 8 halves: thread t gets elements 2 (t % 4) and the next of row t // 4, of its transpose with `trans`."""
    count, transposed = matrix_shape(instruction)
    targets = slots(instruction.operands[0])
    at = address(instruction.operands[1], program)

    def run(machine, mask):
        lanes = whole_warps(machine, mask)
        index, first = matrix_rows(machine, at(machine), lanes, count)
        machine.counts.shared["ldmatrix", 16] += 16 * index.size
        warps = np.repeat(machine.warp_codes[lanes[::32]], 8 * count)
        halves = machine.shared.load(index.reshape(-1), first, warps, 16).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            halves = np.ascontiguousarray(halves.swapaxes(2, 3))
        values = halves.view(np.uint32).reshape(-1, count, 32)
        for i, slot in enumerate(targets):
            result = np.zeros(machine.lanes, np.uint32)
            result[lanes] = values[:, i].reshape(-1)
            machine.write(slot, result, mask)

    return run


def bind_stmatrix(instruction: Instruction, program: Program) -> Run:
    count, transposed = matrix_shape(instruction)
    at = address(instruction.operands[0], program)
    sources = [reader(item, np.uint32, program) for item in items(instruction.operands[1])]

    def run(machine, mask):
        lanes = whole_warps(machine, mask)
        index, first = matrix_rows(machine, at(machine), lanes, count)
        machine.counts.shared["stmatrix", 16] += 16 * index.size
        values = np.stack([source(machine)[lanes].reshape(-1, 32) for source in sources], 1)
        halves = np.ascontiguousarray(values).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            halves = np.ascontiguousarray(halves.swapaxes(2, 3))
        store_shared(machine, index.reshape(-1), first, words(halves.reshape(-1).view(np.uint8), 16), 16)

    return run


OPCODES = {
    "atom": bind_atomic,
    "ld": bind_ld,
    "ldmatrix": bind_ldmatrix,
    "red": bind_atomic,
    "st": bind_st,
    "stmatrix": bind_stmatrix,
}
