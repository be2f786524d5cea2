"""Instructions of a warp or a whole CTA together: shuffles, votes, reductions, barriers.

Source: NVIDIA, "Parallel Thread Execution ISA", parallel synchronization and data movement.
"""

from __future__ import annotations

import numpy as np

from idefics2_fast.benchmarks.sm90.faults import Divergence
from idefics2_fast.benchmarks.sm90.operands import DTYPES, Run, modifiers, reader, slots, unknown
from idefics2_fast.benchmarks.sm90.ptx import Immediate, Instruction, Pair, Program


def whole_warps(machine, mask: np.ndarray | None) -> np.ndarray:
    """The lanes that are on; every warp must be on or off as one."""
    if mask is None:
        return machine.all_lanes
    count = mask.reshape(-1, 32).sum(1)
    partial = (count != 0) & (count != 32)
    if partial.any():
        raise Divergence("only part of a warp reached an instruction of the whole warp", int(32 * np.flatnonzero(partial)[0]))
    return np.flatnonzero(mask)


def sources_of(mode: str, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """shfl's source thread for [.., 32] threads, and whether it is inside the segment (else a thread keeps its own value)."""
    lane = np.arange(32)
    b, clamp, segment = b & 31, c & 31, (c >> 8) & 31
    last, first = (lane & segment) | (clamp & ~segment), lane & segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
    inside = source >= last if mode == "up" else source <= last
    return np.where(inside, source, lane), inside


def bind_shfl(instruction: Instruction, program: Program) -> Run:
    """shfl.sync: the mask of members is not compared with the threads present, which must be whole warps."""
    mode = instruction.parts[2]
    modifiers(instruction, "sync up down bfly idx b32")
    target = instruction.operands[0]
    value_to, inside_to = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    value = reader(instruction.operands[1], np.uint32, program)
    b, c = (reader(operand, np.uint32, program) for operand in instruction.operands[2:4])
    constant = all(isinstance(operand, Immediate) for operand in instruction.operands[2:4])
    fixed = sources_of(mode, b(None).astype(int), c(None).astype(int)) if constant else None

    def run(machine, mask):
        whole_warps(machine, mask)
        warps = value(machine).reshape(-1, 32)
        if fixed is not None:
            result, inside = warps[:, fixed[0]].reshape(-1), np.tile(fixed[1], len(warps))
        else:
            source, inside = sources_of(mode, *(machine.full(x(machine)).astype(int).reshape(-1, 32) for x in (b, c)))
            result = np.take_along_axis(warps, source, 1).reshape(-1)
        machine.write(value_to.slot, result, mask)
        if inside_to is not None:
            machine.write(inside_to.slot, inside.reshape(-1), mask)

    return run


def bind_vote(instruction: Instruction, program: Program) -> Run:
    parts = modifiers(instruction, "sync all any uni ballot pred b32")
    (slot,) = slots(instruction.operands[0])
    choice = reader(instruction.operands[1], np.bool_, program)
    kind = (parts & {"all", "any", "uni", "ballot"}).pop()

    def run(machine, mask):
        whole_warps(machine, mask)
        votes = machine.full(choice(machine)).reshape(-1, 32)
        if kind == "ballot":
            result = (votes << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        else:
            result = {"all": votes.all(1), "any": votes.any(1), "uni": votes.all(1) | ~votes.any(1)}[kind]
        machine.write(slot, np.repeat(result, 32), mask)

    return run


REDUCTIONS = {
    "add": np.add,
    "and": np.bitwise_and,
    "max": np.maximum,
    "min": np.minimum,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def bind_redux(instruction: Instruction, program: Program) -> Run:
    type = instruction.parts[-1]
    parts = modifiers(instruction, "sync add and max min or xor u32 s32 b32")
    function = REDUCTIONS[(parts & set(REDUCTIONS)).pop()]
    (slot,) = slots(instruction.operands[0])
    source = reader(instruction.operands[1], DTYPES[type], program)

    def run(machine, mask):
        whole_warps(machine, mask)
        result = function.reduce(source(machine).reshape(-1, 32), axis=1, dtype=DTYPES[type])
        machine.write(slot, np.repeat(result, 32).view(np.uint32), mask)

    return run


def bind_elect(instruction: Instruction, program: Program) -> Run:
    """elect.sync: thread 0 of each warp."""
    modifiers(instruction, "sync")
    target = instruction.operands[0]

    def run(machine, mask):
        whole_warps(machine, mask)
        if target.first is not None:
            machine.write(target.first.slot, np.zeros(machine.lanes, np.uint32), mask)
        if target.second is not None:
            machine.write(target.second.slot, machine.all_lanes % 32 == 0, mask)

    return run


def bind_barrier(instruction: Instruction, program: Program) -> Run:
    """Barriers of the whole CTA, and of a warp (whose own writes it always sees)."""
    parts = modifiers(instruction, "sync aligned warp cta")
    if "warp" in parts:

        def run_warp(machine, mask):
            whole_warps(machine, mask)

        return run_warp
    if instruction.guard is not None or not isinstance(instruction.operands[0], Immediate):
        raise unknown(instruction)
    count = instruction.operands[1].bits if len(instruction.operands) > 1 else None

    def run(machine, mask):
        if count not in (None, machine.threads):
            raise Divergence(f"a barrier of {count} of {machine.threads} threads is not covered")
        machine.synchronize()

    return run


OPCODES = {
    "bar": bind_barrier,
    "barrier": bind_barrier,
    "elect": bind_elect,
    "redux": bind_redux,
    "shfl": bind_shfl,
    "vote": bind_vote,
}
