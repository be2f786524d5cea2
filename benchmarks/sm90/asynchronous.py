"""Copies that run beside the threads: cp.async with its groups, tensor copies (TMA) with mbarriers, bulk stores.

A copy moves its data at once but the bytes stay owed until the wait that makes them visible: whoever touches them before is at fault.
Source: NVIDIA, "Parallel Thread Execution ISA", asynchronous data movement; swizzles as for tensor maps in the CUDA driver API.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from idefics2_fast.benchmarks.sm90.accesses import count_global, load_global, shared_index
from idefics2_fast.benchmarks.sm90.faults import Deadlock, Fault, Misaligned
from idefics2_fast.benchmarks.sm90.memory import PENDING, READY, pattern, words
from idefics2_fast.benchmarks.sm90.operands import Run, address, modifiers, reader, unknown
from idefics2_fast.benchmarks.sm90.ptx import Instruction, Program

SWIZZLES = {0: 0, 1: 1, 2: 3, 3: 7}
"""Mode of a tensor map (none, 32, 64, 128 bytes) -> address bits 7.. that are added without carry to bits 4..."""


class Groups:
    """Work in order: what is open joins a group when committed; a wait leaves at most so many groups unfinished."""

    def __init__(self):
        self.open: list = []
        self.committed: list[list] = []

    def add(self, item: object) -> None:
        self.open.append(item)

    def commit(self) -> None:
        self.committed.append(self.open)
        self.open = []

    def wait(self, left: int) -> list:
        done = self.committed[: max(len(self.committed) - left, 0)]
        self.committed = self.committed[len(done) :]
        return [item for group in done for item in group]

    def owed(self) -> bool:
        return bool(self.open) or any(self.committed)

    def map(self, function: Callable) -> Groups:
        other = Groups()
        other.open = [function(item) for item in self.open]
        other.committed = [[function(item) for item in group] for group in self.committed]
        return other


# ---- cp.async


def bind_cp(instruction: Instruction, program: Program) -> Run:
    if instruction.parts[:2] != ("cp", "async"):
        raise unknown(instruction)
    if "bulk" in instruction.parts:
        return bind_bulk(instruction, program)
    if instruction.parts[2] == "commit_group":
        return bind_commit(instruction, lambda machine: machine.copies)
    if instruction.parts[2] in ("wait_group", "wait_all"):
        left = instruction.operands[0].bits if instruction.operands else 0
        return lambda machine, mask: wait_copies(machine, left)
    return bind_copy(instruction, program)


def bind_commit(instruction: Instruction, groups: Callable) -> Run:
    def run(machine, mask):
        machine.together(instruction.opcode)
        groups(machine).commit()

    return run


def bind_copy(instruction: Instruction, program: Program) -> Run:
    """cp.async: 4, 8 or 16 bytes a thread; of `source size` fewer bytes the rest is zero, and the source is not touched past them."""
    modifiers(instruction, "async ca cg shared shared::cta global L2::cache_hint L2::64B L2::128B L2::256B")
    size = instruction.operands[2].bits
    to, source = (address(operand, program) for operand in instruction.operands[:2])
    given = reader(instruction.operands[3], np.uint32, program) if len(instruction.operands) > 3 else None
    if len(instruction.operands) > 4 or "L2::cache_hint" in instruction.parts:
        raise unknown(instruction)

    def run(machine, mask):
        lanes = machine.selected(mask)
        if not len(lanes):
            return
        wanted = np.ones(machine.lanes, bool) if given is None else machine.full(given(machine)) != 0
        if given is not None and (wanted & (machine.full(given(machine)) != size))[lanes].any():
            raise Fault(f"cp.async of part of its {size} bytes is not covered", int(lanes[0]))
        reading = wanted if mask is None else wanted & mask
        start = source(machine)
        values = np.zeros((machine.lanes, size), np.uint8)
        if reading.any():
            count_global(machine, "copy", start, reading, size)
            values[reading] = load_global(machine, start, np.flatnonzero(reading), size).view(np.uint8).reshape(-1, size)
        index = shared_index(machine, to(machine), lanes, size)
        machine.shared.store(index, lanes, words(values[lanes].reshape(-1), size), PENDING, size)
        machine.copies.add((size, index, machine.warp_codes[lanes]))

    return run


def wait_copies(machine, left: int) -> None:
    """A thread sees its own copies; the others see them after the next barrier."""
    machine.together("cp.async.wait_group")
    for size, index, codes in machine.copies.wait(left):
        machine.shared.mark(index, codes, size)
        machine.unsynced.append((size, index))


# ---- mbarriers


@dataclass
class Barrier:
    """An mbarrier: its phase completes when all arrivals and all announced bytes have come."""

    arrivals: int
    left: int
    phase: int = 0
    bytes: int = 0
    deliveries: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def complete(self) -> bool:
        """Ends the phase if everything has come."""
        if self.left or self.bytes:
            return False
        self.phase ^= 1
        self.left = self.arrivals
        return True


def barrier_at(machine, addresses: np.ndarray, lane: int) -> Barrier:
    place = int(machine.shared_base[lane] + addresses[lane])
    if place not in machine.shared.barriers:
        raise Fault(f"no mbarrier at byte {int(addresses[lane])} of shared memory", int(lane))
    return machine.shared.barriers[place]


def bind_mbarrier(instruction: Instruction, program: Program) -> Run:
    kind = instruction.parts[1]
    known = "init inval arrive expect_tx try_wait test_wait parity release acquire cta shared shared::cta b64"
    modifiers(instruction, known)
    position = {"init": 0, "inval": 0, "arrive": 1, "expect_tx": 0, "try_wait": 1, "test_wait": 1}[kind]
    at = address(instruction.operands[position], program)
    rest = [reader(operand, np.uint32, program) for operand in instruction.operands[position + 1 :]]
    if kind in ("try_wait", "test_wait"):
        if "parity" not in instruction.parts:
            raise unknown(instruction)
        return bind_wait(instruction.operands[0], at, rest[0])
    act = {"init": initialize, "inval": invalidate, "arrive": arrive, "expect_tx": arrive}[kind]
    arrives, expects = kind == "arrive", "expect_tx" in instruction.parts

    def run(machine, mask):
        addresses = at(machine)
        for lane in machine.selected(mask):
            number = int(machine.full(rest[0](machine))[lane]) if rest else 1
            act(machine, addresses, lane, number, arrives, expects)

    return run


def initialize(machine, addresses, lane, number, *_):
    machine.shared.check(addresses[[lane]], np.array([lane]), 8)
    machine.shared.barriers[int(machine.shared_base[lane] + addresses[lane])] = Barrier(number, number)


def invalidate(machine, addresses, lane, *_):
    barrier_at(machine, addresses, lane)
    del machine.shared.barriers[int(machine.shared_base[lane] + addresses[lane])]


def arrive(machine, addresses, lane, number, arrives, expects):
    barrier = barrier_at(machine, addresses, lane)
    barrier.bytes += number if expects else 0
    barrier.left -= (1 if expects else number) if arrives else 0
    if barrier.left < 0:
        raise Deadlock("more arrivals than the mbarrier expects", int(lane))
    barrier.complete()


def bind_wait(target: object, at: Callable, parity: Callable) -> Run:
    """A wait for the phase of this parity brings what is on its way; a phase that nothing will complete is a deadlock."""

    def run(machine, mask):
        addresses, waited = at(machine), machine.full(parity(machine))
        places = machine.shared_base + addresses
        for place in np.unique(places[machine.selected(mask)]):
            lane = int(np.flatnonzero(places == place)[0])
            barrier = barrier_at(machine, addresses, lane)
            if int(waited[lane]) == barrier.phase:
                deliver(machine, barrier, lane)
        machine.write(target.slot, np.ones(machine.lanes, bool), mask)

    return run


def deliver(machine, barrier: Barrier, lane: int) -> None:
    for count, index in barrier.deliveries:
        machine.shared.mark(index, READY, 16)
        barrier.bytes -= count
    barrier.deliveries = []
    if not barrier.complete():
        raise Deadlock(f"mbarrier waits for {barrier.left} arrivals and {barrier.bytes} bytes that nothing brings", lane)


# ---- tensor copies


@dataclass(frozen=True)
class TensorMap:
    """The 128 bytes of a tensor map, as a host encodes them.

    Attributes:
        tensor: strided like the map; its last stride is 1.
        block: elements of the box, one number for each dimension.
        swizzle: 0 none, 1, 2, 3: 32, 64, 128 bytes.
    """

    tensor: Tensor
    block: tuple[int, ...]
    swizzle: int

    def __post_init__(self):
        row = self.block[-1] * self.tensor.element_size()
        if len(self.block) != self.tensor.ndim or self.tensor.stride(-1) != 1:
            raise ValueError(
                f"expected a block for each dimension and a last stride of 1, got {self.block}, strides {self.tensor.stride()}"
            )
        if row % 16 or (self.swizzle and row > 16 << self.swizzle):
            raise ValueError(
                f"rows of {row} bytes do not fit swizzle {self.swizzle}: expected a multiple of 16, at most {16 << self.swizzle}"
            )
        pitches = [stride * self.tensor.element_size() for stride in self.tensor.stride()[:-1]]
        if any(pitch % 16 for pitch in pitches):
            raise ValueError(f"expected strides of multiples of 16 bytes, got {pitches}")

    def elements(self, start: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Offsets in bytes of the box's elements [product of block], and which of them the tensor has."""
        grids = np.meshgrid(*(np.arange(size) + first for size, first in zip(self.block, start, strict=True)), indexing="ij")
        has = np.ones(self.block, bool)
        offsets = np.zeros(self.block, np.int64)
        for grid, size, stride in zip(grids, self.tensor.shape, self.tensor.stride(), strict=True):
            has &= (grid >= 0) & (grid < size)
            offsets += grid * stride
        return offsets.reshape(-1) * self.tensor.element_size(), has.reshape(-1)

    def chunks(self, start: int) -> np.ndarray:
        """Addresses in shared memory of the box's pieces of 16 bytes, in the box's order."""
        row = self.block[-1] * self.tensor.element_size()
        plain = start + np.arange(int(np.prod(self.block[:-1])) * row // 16) * 16
        return plain ^ (((plain >> 7) & SWIZZLES[self.swizzle]) << 4)


def bind_bulk(instruction: Instruction, program: Program) -> Run:
    parts = instruction.parts
    if "commit_group" in parts:
        return bind_commit(instruction, lambda machine: machine.stores)
    if "wait_group" in parts:
        left = instruction.operands[0].bits
        return lambda machine, mask: wait_stores(machine, left)
    known = "async bulk tensor 1d 2d 3d 4d 5d shared::cta shared::cluster global tile mbarrier::complete_tx::bytes bulk_group"
    modifiers(instruction, known)
    if "tensor" not in parts:
        raise unknown(instruction)
    loads = "bulk_group" not in parts
    box, local = instruction.operands[1 if loads else 0], address(instruction.operands[0 if loads else 1], program)
    map_at = reader(box.base, np.uint64, program)
    start = [reader(item, np.int32, program) for item in reversed(box.coordinates)]
    barrier = address(instruction.operands[2], program) if loads else None

    def run(machine, mask):
        for lane in machine.selected(mask):
            pointer = int(machine.full(map_at(machine))[lane])
            if pointer not in machine.launch.maps:
                raise Fault(f"{pointer:#x} is no tensor map", int(lane))
            corner = [int(machine.full(read(machine))[lane]) for read in start]
            name, tensor_map = machine.launch.maps[pointer]
            at = int(local(machine)[lane])
            if at % 128:
                raise Misaligned(f"tensor copy at byte {at} of shared memory, expected a multiple of 128", int(lane))
            if loads:
                load_box(machine, int(lane), name, tensor_map, corner, at, barrier_at(machine, barrier(machine), lane))
            else:
                store_box(machine, int(lane), name, tensor_map, corner, at)

    return run


def box_index(machine, lane: int, tensor_map: TensorMap, at: int) -> np.ndarray:
    chunks = tensor_map.chunks(at)
    lanes = np.full(len(chunks), lane)
    machine.shared.check(chunks, lanes, 16)
    return (machine.shared_base[lane] + chunks) // 16


def load_box(machine, lane: int, name: str, tensor_map: TensorMap, corner: list[int], at: int, barrier: Barrier) -> None:
    offsets, has = tensor_map.elements(corner)
    size = tensor_map.tensor.element_size()
    lanes = np.full(int(has.sum()), lane)
    values = np.zeros(len(has), f"u{size}")
    if has.any():
        owners = machine.owners[lanes] | np.uint64(machine.epoch)
        values[has] = machine.memory.load(machine.memory.by_name[name].address + offsets[has], lanes, owners, size)
    index = box_index(machine, lane, tensor_map, at)
    chunk_lanes = np.full(len(index), lane)
    machine.shared.store(index, chunk_lanes, words(values.view(np.uint8), 16), PENDING, 16)
    barrier.deliveries.append((values.nbytes, index))
    machine.counts.requested["tma_load", name, 0] += int(has.sum()) * size


def store_box(machine, lane: int, name: str, tensor_map: TensorMap, corner: list[int], at: int) -> None:
    offsets, has = tensor_map.elements(corner)
    size = tensor_map.tensor.element_size()
    index = box_index(machine, lane, tensor_map, at)
    values = machine.shared.load(index, np.full(len(index), lane), None, 16).reshape(-1).view(f"u{size}")
    hold(machine, index, 1)
    machine.stores.add((16, index))
    if has.any():
        lanes = np.full(int(has.sum()), lane)
        owners = machine.owners[lanes] | np.uint64(machine.epoch)
        machine.memory.store(machine.memory.by_name[name].address + offsets[has], lanes, owners, values[has], size)
    machine.counts.requested["tma_store", name, 0] += int(has.sum()) * size


def hold(machine, index: np.ndarray, sign: int) -> None:
    """One reader more (1) or fewer (-1) of pieces of 16 bytes."""
    readers = words(machine.shared.readers, 16)
    readers[index] = readers[index] + pattern(1, 16) if sign > 0 else readers[index] - pattern(1, 16)


def wait_stores(machine, left: int) -> None:
    machine.together("cp.async.bulk.wait_group")
    for _, index in machine.stores.wait(left):
        hold(machine, index, -1)


OPCODES = {"cp": bind_cp, "mbarrier": bind_mbarrier}
