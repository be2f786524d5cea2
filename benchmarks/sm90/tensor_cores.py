"""wgmma on shared memory and registers, and mma.sync. Sums are fp32, in NumPy's order.

Source: NVIDIA, "Parallel Thread Execution ISA", matrix fragments, matrix descriptors and swizzles; the canonical layouts of descriptors as
CUTLASS states them (cute/atom/mma_traits_sm90_gmma.hpp).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from idefics2_fast.benchmarks.sm90.asynchronous import bind_commit, hold
from idefics2_fast.benchmarks.sm90.faults import MissingWait
from idefics2_fast.benchmarks.sm90.memory import words
from idefics2_fast.benchmarks.sm90.operands import Run, items, reader, slots, unknown
from idefics2_fast.benchmarks.sm90.ptx import Instruction, Program, Vector
from idefics2_fast.benchmarks.sm90.rounding import bf16_to_f32
from idefics2_fast.benchmarks.sm90.warps import whole_warps

ITEMSIZES = {"bf16": 2, "f16": 2, "tf32": 4}
PITCHES = {0: 16, 1: 128, 2: 64, 3: 32}
"""A descriptor's layout -> bytes of a swizzled row."""
SWIZZLES = {0: 0, 1: 7, 2: 3, 3: 1}


def numbers(bits: np.ndarray, type: str) -> np.ndarray:
    """Operands as fp32, which holds them all; tf32 is fp32 whose low 13 bits do not count."""
    if type == "bf16":
        return bf16_to_f32(bits.view(np.uint16))
    if type == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


# ---- fragments: which thread of a warp holds which element


def rows_from_registers(registers: list[np.ndarray], type: str) -> np.ndarray:
    """The A operand [warps, 16, K]: of register i, thread 4 g + q holds row g + 8 (i & 1), and of the row's words number q + 4 (i >> 1)."""
    stacked = numbers(np.stack(registers), type)
    per_word = 4 // ITEMSIZES[type]
    parts = stacked.reshape(len(registers) // 2, 2, -1, 8, 4, per_word)
    return parts.transpose(2, 1, 3, 0, 4, 5).reshape(parts.shape[2], 16, -1)


def columns_from_registers(registers: list[np.ndarray], type: str) -> np.ndarray:
    """The B operand [warps, K, 8] of mma.sync."""
    per_word = 4 // ITEMSIZES[type]
    parts = numbers(np.stack(registers), type).reshape(len(registers), -1, 8, 4, per_word)
    return parts.transpose(1, 0, 3, 4, 2).reshape(parts.shape[1], -1, 8)


def tile_from_registers(registers: list[np.ndarray]) -> np.ndarray:
    """Accumulators [warps, 16, N]: of registers 4 j + i, thread 4 g + q holds row g + 8 (i >> 1), column 8 j + 2 q + (i & 1)."""
    parts = np.stack(registers).view(np.float32).reshape(len(registers) // 4, 2, 2, -1, 8, 4)
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(parts.shape[3], 16, -1)


def registers_from_tile(tile: np.ndarray) -> np.ndarray:
    """The inverse: [N / 2, lanes] of bits."""
    parts = tile.reshape(len(tile), 2, 8, -1, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return np.ascontiguousarray(parts, np.float32).reshape(tile.shape[2] // 2, -1).view(np.uint32)


# ---- shared-memory operands


@lru_cache(maxsize=4096)
def chunks(descriptor: int, rows: int, depth: int, itemsize: int, transposed: bool) -> np.ndarray:
    """Pieces of 16 bytes that hold an operand of `rows` (M or N) x `depth` (K), as indices from the CTA's start.

    Returns:
        int64 [rows, depth pieces]; transposed (rows contiguous in memory): [depth, row pieces].
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    layout = descriptor >> 62
    pitch = PITCHES[layout]
    if not transposed:
        row, piece = np.arange(rows)[:, None], np.arange(depth * itemsize // 16)
        offset = row // 8 * stride + row % 8 * pitch + piece * (leading if layout == 0 else 16)
    else:
        row, piece, span = np.arange(depth)[:, None], np.arange(rows * itemsize // 16), pitch // 16
        outer, inner = (leading, stride) if layout == 0 else (stride, leading)
        offset = row // 8 * outer + row % 8 * pitch + piece // span * inner + piece % span * 16
    place = start + offset
    return (place ^ (((place >> 7) & SWIZZLES[layout]) << 4)) >> 4


def operand_index(machine, descriptors: np.ndarray, rows: int, depth: int, itemsize: int, transposed: bool) -> np.ndarray:
    """Pieces of the operands of CTAs with these descriptors [C], as indices [C, .., ..] of the whole shared memory."""
    first = machine.places[:, None, None] * (machine.shared.stride // 16)
    if (descriptors == descriptors[0]).all():
        return first + chunks(int(descriptors[0]), rows, depth, itemsize, transposed)
    return first + np.stack([chunks(int(descriptor), rows, depth, itemsize, transposed) for descriptor in descriptors])


def shared_operand(machine, descriptors: np.ndarray, rows: int, depth: int, type: str, transposed: bool, reads: list) -> np.ndarray:
    """An operand of each warpgroup [C, G, rows, depth] in fp32; warpgroups of a CTA that share it get it once, G = 1."""
    if (descriptors == descriptors[:, :1]).all():
        descriptors = descriptors[:, :1]
    tiles = []
    for column in descriptors.T:
        index = operand_index(machine, column, rows, depth, ITEMSIZES[type], transposed)
        lanes = np.repeat(np.arange(len(column)) * machine.threads, index[0].size)
        if (index >= (machine.places[:, None, None] * machine.shared.stride + machine.shared.size) // 16).any():
            machine.shared.check((index % (machine.shared.stride // 16) * 16).reshape(-1), lanes, 16)
        machine.shared.check_readable(index.reshape(-1), lanes, None, 16)
        values = numbers(words(machine.shared.bytes, 16)[index].reshape(*index.shape[:2], -1), type)
        tiles.append(values.swapaxes(1, 2) if transposed else values)
        hold(machine, index, 1)
        reads.append((16, index.reshape(-1)))
    return np.stack(tiles, 1)


# ---- wgmma


class Owed:
    """In the place of a register whose value a product has yet to deliver."""

    def __init__(self, name: str):
        self.name = name

    def view(self, dtype: type) -> np.ndarray:
        raise MissingWait(f"register {self.name} read while a product may still write it")


@dataclass
class Accumulator:
    """Tiles [warps, 16, N] that unfinished products add to."""

    tile: np.ndarray
    outstanding: int = 0

    def kept(self, ctas: np.ndarray) -> Accumulator:
        return Accumulator(self.tile[np.repeat(ctas, len(self.tile) // len(ctas))], self.outstanding)


@dataclass
class Product:
    """What an unfinished wgmma holds: accumulators, registers and pieces of shared memory."""

    targets: tuple[int, ...]
    registers: tuple[int, ...]
    reads: list[tuple[int, np.ndarray]]


def bind_wgmma(instruction: Instruction, program: Program) -> Run:
    kind = instruction.parts[1]
    if kind == "fence":
        return lambda machine, mask: machine.together("wgmma.fence")
    if kind == "commit_group":
        return bind_commit(instruction, lambda machine: machine.products)
    if kind == "wait_group":
        return lambda machine, mask: wait_products(machine, instruction.operands[0].bits)
    return bind_product(instruction, program)


def bind_product(instruction: Instruction, program: Program) -> Run:
    """D = A B + D, or A B: A [64, K] from registers or shared memory, B [K, N] from shared memory."""
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", instruction.parts[4])
    type = instruction.parts[-1]
    if instruction.parts[1] != "mma_async" or type not in ITEMSIZES or instruction.parts[5:] != ("f32", type, type) or shape is None:
        raise unknown(instruction)
    columns, depth = int(shape[1]), int(shape[2])
    target, left, right, accumulate, *flags = instruction.operands
    flags = [flag.bits for flag in flags]
    targets, fragments = slots(target), slots(left) if isinstance(left, Vector) else ()
    # What follows the two signs: whether A (in shared memory) and B are transposed; tf32 has neither.
    transpose_a, transpose_b = [*([0] if fragments else []), *flags[2:], 0, 0][:2]
    right_read, adds = reader(right, np.uint64, program), reader(accumulate, np.bool_, program)
    left_reads = [reader(item, np.uint32, program) for item in items(left)] if fragments else [reader(left, np.uint64, program)]
    sign = np.float32(flags[0] * flags[1])
    label = f"{instruction.parts[0]}.{instruction.parts[4]}.{type}"

    def run(machine, mask):
        machine.together("wgmma")
        groups, reads = machine.threads // 128, []
        per_group = lambda values: machine.full(values).reshape(len(machine.ctas), groups, 128)[:, :, 0]  # noqa: E731
        if fragments:
            a = rows_from_registers([read(machine) for read in left_reads], type).reshape(len(machine.ctas), groups, 64, depth)
        else:
            a = shared_operand(machine, per_group(left_reads[0](machine)), 64, depth, type, transpose_a, reads)
        b = shared_operand(machine, per_group(right_read(machine)), columns, depth, type, transpose_b, reads)
        product = np.broadcast_to(sign * (a @ b.swapaxes(2, 3)), (len(machine.ctas), groups, 64, columns)).reshape(-1, 16, columns)
        add_to(machine, targets, product, np.repeat(per_group(adds(machine)).reshape(-1), 4)[:, None, None])
        owe(machine, Product(targets, (*targets, *fragments), reads))
        machine.counts.flops[label] += 2 * 64 * columns * depth * groups * len(machine.ctas)

    return run


def add_to(machine, targets: tuple[int, ...], product: np.ndarray, adds: np.ndarray) -> None:
    accumulator = machine.accumulators.get(targets)
    if accumulator is None:
        old = tile_from_registers([machine.registers[slot].view(np.uint32) for slot in targets]) if adds.any() else None
        accumulator = machine.accumulators[targets] = Accumulator(product if old is None else np.where(adds, product + old, product))
    else:
        accumulator.tile = np.where(adds, accumulator.tile + product, product)
    accumulator.outstanding += 1


def owe(machine, product: Product) -> None:
    for slot in product.registers:
        machine.locked[slot] = machine.locked.get(slot, 0) + 1
    for slot in product.targets:
        machine.registers[slot] = Owed(machine.program.registers[slot].name)
    machine.products.add(product)


def wait_products(machine, left: int) -> None:
    machine.together("wgmma.wait_group")
    for product in machine.products.wait(left):
        for _, index in product.reads:
            hold(machine, index, -1)
        for slot in product.registers:
            machine.locked[slot] -= 1
            if not machine.locked[slot]:
                del machine.locked[slot]
        accumulator = machine.accumulators[product.targets]
        accumulator.outstanding -= 1
        if not accumulator.outstanding:
            del machine.accumulators[product.targets]
            for slot, values in zip(product.targets, registers_from_tile(accumulator.tile), strict=True):
                machine.registers[slot] = values


# ---- mma.sync


def bind_mma(instruction: Instruction, program: Program) -> Run:
    """D = A B + C of 16 x K by K x 8 in each warp."""
    shape = re.fullmatch(r"m16n8k(\d+)", instruction.parts[3])
    type = instruction.parts[-2]
    if shape is None or type not in ITEMSIZES or instruction.parts[4:] != ("row", "col", "f32", type, type, "f32"):
        raise unknown(instruction)
    targets = slots(instruction.operands[0])
    a, b, c = ([reader(item, np.uint32, program) for item in items(operand)] for operand in instruction.operands[1:])
    label = f"mma.{instruction.parts[3]}.{type}"

    def run(machine, mask):
        lanes = whole_warps(machine, mask)
        rows = rows_from_registers([read(machine) for read in a], type)
        product = rows @ columns_from_registers([read(machine) for read in b], type)
        tile = product + tile_from_registers([machine.full(read(machine)) for read in c])
        for slot, values in zip(targets, registers_from_tile(tile), strict=True):
            machine.write(slot, values, mask)
        machine.counts.flops[label] += 2 * 16 * 8 * int(shape[1]) * (len(lanes) // 32)

    return run


OPCODES: dict[str, Callable[[Instruction, Program], Run]] = {"mma": bind_mma, "wgmma": bind_wgmma}
