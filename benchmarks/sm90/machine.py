"""Executes PTX on NumPy arrays: every register holds one number per lane, and the threads of several CTAs are the lanes.

Control flow: while all threads agree there is one program counter and no mask. Where threads of a CTA disagree, the groups run one at a
time, the one furthest behind first, and join again where their counters meet. Where whole CTAs disagree (loops of unequal length), the
machine splits in two that never meet again. Instructions that need all threads of a CTA or warp together say so when some are missing.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from idefics2_fast.benchmarks.sm90 import accesses, arithmetic, asynchronous, tensor_cores, warps
from idefics2_fast.benchmarks.sm90.asynchronous import Groups, TensorMap
from idefics2_fast.benchmarks.sm90.counters import Counts
from idefics2_fast.benchmarks.sm90.faults import Divergence, Fault, MissingWait, Trap
from idefics2_fast.benchmarks.sm90.memory import FIRST_WARP, GlobalMemory, SharedMemory
from idefics2_fast.benchmarks.sm90.operands import PARAMETER_BASE, PARAMETER_STRIDE, Run, modifiers, unknown
from idefics2_fast.benchmarks.sm90.ptx import KINDS, Instruction, Program, parse

LANES = 4096
"""Lanes of one machine: enough to hide NumPy's cost per call, few enough for the caches."""

Argument = Tensor | TensorMap | int | float


class Machine:
    """Threads of CTAs that have taken the same way so far."""

    def __init__(self, launch: Launch, ctas: np.ndarray):
        self.launch, self.program, self.memory, self.counts = launch, launch.program, launch.memory, launch.counts
        self.ctas, self.threads = ctas, launch.threads
        self.places = np.arange(len(ctas))
        """Where in the shared memory each CTA lives."""
        self.shared = SharedMemory(len(ctas), launch.shared_bytes)
        self.lanes = len(ctas) * self.threads
        self.mask: np.ndarray | None = None
        self.counter = 0
        self.parked: list[tuple[int, int, np.ndarray]] = []
        self.exited = np.zeros(self.lanes, bool)
        self.epoch = 0
        self.carry = np.zeros(self.lanes, np.uint64)
        self.local = np.full((self.lanes, self.program.local_bytes), 0xFF, np.uint8)
        self.copies, self.stores, self.products = Groups(), Groups(), Groups()
        self.unsynced: list[tuple[int, np.ndarray]] = []
        self.accumulators: dict[tuple[int, ...], tensor_cores.Accumulator] = {}
        self.locked: dict[int, int] = {}
        """Registers that products still use -> how many."""
        self.place_lanes()
        # Registers start as ones in every bit: NaN to any float, -1 to an integer.
        poison = {kind: np.full(self.lanes, np.iinfo(dtype).max if kind != "pred" else False, dtype) for kind, dtype in KINDS.items()}
        self.registers = [poison[register.kind] for register in self.program.registers]
        for name, value in self.special_registers().items():
            self.registers[name] = value.astype(np.uint32)

    def place_lanes(self) -> None:
        """What depends only on which thread of which CTA a lane is."""
        self.all_lanes = np.arange(self.lanes)
        thread = np.tile(np.arange(self.threads, dtype=np.uint64), len(self.ctas))
        width, height, _ = self.launch.grid
        linear = (self.ctas @ np.array([1, width, width * height])).astype(np.uint64)
        self.owners = (np.repeat(linear + np.uint64(1), self.threads) << np.uint64(32)) | (thread << np.uint64(20))
        self.shared_base = np.repeat(self.places * self.shared.stride, self.threads)
        self.warp_codes = (FIRST_WARP + thread // np.uint64(32)).astype(np.uint8)

    def special_registers(self) -> dict[int, np.ndarray]:
        thread = np.tile(np.arange(self.threads), len(self.ctas))
        known = {"%tid.x": thread, "%ntid.x": np.full(self.lanes, self.threads), "%laneid": thread % 32, "%warpid": thread // 32}
        for i, axis in enumerate("xyz"):
            known[f"%ctaid.{axis}"] = np.repeat(self.ctas[:, i], self.threads)
            known[f"%nctaid.{axis}"] = np.full(self.lanes, self.launch.grid[i])
            known.setdefault(f"%tid.{axis}", np.zeros(self.lanes, int))
            known.setdefault(f"%ntid.{axis}", np.ones(self.lanes, int))
        # A cluster is one CTA.
        known["%cluster_ctarank"] = np.zeros(self.lanes, int)
        return {register.slot: known[register.name] for register in self.program.registers if register.name in known}

    # ---- registers

    def full(self, value: np.ndarray) -> np.ndarray:
        """A scalar as one number per lane."""
        return np.full(self.lanes, value) if np.ndim(value) == 0 else value

    def write(self, slot: int | None, value: np.ndarray, mask: np.ndarray | None) -> None:
        """A register takes new lanes where the mask is on. Arrays are never changed in place: registers share them."""
        if slot is None:
            return
        if slot in self.locked:
            raise MissingWait(f"register {self.program.registers[slot].name} overwritten while a product may still use it")
        self.registers[slot] = value if mask is None else np.where(mask, value, self.registers[slot])

    def selected(self, mask: np.ndarray | None) -> np.ndarray:
        return self.all_lanes if mask is None else np.flatnonzero(mask)

    def together(self, what: str) -> None:
        """Asserts that every thread of every CTA is here."""
        if self.mask is not None:
            raise Divergence(f"{what} reached by {int(self.mask.sum())} of {self.lanes} threads", int(np.flatnonzero(self.mask)[0]))

    # ---- control flow

    def run(self) -> None:
        code, issued = self.launch.code, self.launch.issued
        while True:
            if self.parked and self.counter >= self.parked[0][0]:
                self.join()
            here = self.counter
            if here == len(code):
                break
            issued[here] += self.warps_on()
            try:
                target = code[here](self, self.mask)
            except Fault as fault:
                raise type(fault)(self.describe(fault)) from fault
            if target is None:
                self.counter = here + 1
            elif target < 0:
                if not self.parked:
                    break
                self.resume()
            else:
                self.counter = target
        self.finish()

    def warps_on(self) -> int:
        if self.mask is None:
            return self.lanes // 32
        return int(self.mask.reshape(-1, 32).any(1).sum())

    def park(self, counter: int, mask: np.ndarray) -> None:
        heapq.heappush(self.parked, (counter, id(mask), mask))

    def resume(self) -> None:
        """The group furthest behind, with every other that waits at the same place."""
        self.counter, _, mask = heapq.heappop(self.parked)
        while self.parked and self.parked[0][0] == self.counter:
            mask = mask | heapq.heappop(self.parked)[2]
        self.mask = None if mask.all() else mask

    def join(self) -> None:
        self.park(self.counter, self.mask)
        self.resume()

    def branch(self, taken: np.ndarray, target: int) -> int | None:
        """Jumps where `taken` (of all lanes). Returns the next counter of those that go on at once."""
        here = self.counter
        on = taken if self.mask is None else taken & self.mask
        off = ~taken if self.mask is None else ~taken & self.mask
        if not off.any():
            return target
        if not on.any():
            return None
        whole = on.reshape(-1, self.threads).sum(1)
        if self.mask is None and ((whole == 0) | (whole == self.threads)).all():
            other = self.split(whole != 0)
            other.counter = target
            self.launch.waiting.append(other)
            return None
        self.park(target, on)
        self.park(here + 1, off)
        self.resume()
        return self.counter

    def exit(self, mask: np.ndarray | None) -> int | None:
        """Threads leave; -1 when none of the running group is left."""
        if mask is None:
            return -1
        rest = ~mask if self.mask is None else self.mask & ~mask
        self.exited |= mask
        if not rest.any():
            return -1
        self.mask = rest
        return None

    def split(self, leaving: np.ndarray) -> Machine:
        """CTAs [C] leave for a machine of their own, with their registers and what they still wait for."""
        other = object.__new__(Machine)
        vars(other).update(vars(self))
        other.keep(leaving)
        self.keep(~leaving)
        return other

    def keep(self, ctas: np.ndarray) -> None:
        previous = len(ctas)
        kept: dict[int, np.ndarray] = {}

        def part(value):
            if isinstance(value, tensor_cores.Owed):
                return value
            if id(value) not in kept:
                kept[id(value)] = value.reshape(previous, self.threads, *value.shape[1:])[ctas].reshape(self.lanes, *value.shape[1:])
            return kept[id(value)]

        self.ctas, self.places = self.ctas[ctas], self.places[ctas]
        self.lanes = len(self.ctas) * self.threads
        self.registers = [part(value) for value in self.registers]
        self.exited, self.carry, self.local = part(self.exited), part(self.carry), part(self.local)
        self.accumulators = {slots: accumulator.kept(ctas) for slots, accumulator in self.accumulators.items()}
        self.products = self.products.map(lambda product: replace(product, reads=[self.own(*read) for read in product.reads]))
        self.copies, self.stores = (groups.map(lambda words: self.own(*words)) for groups in (self.copies, self.stores))
        self.unsynced = [self.own(*entry) for entry in self.unsynced]
        self.locked, self.parked = dict(self.locked), []
        self.place_lanes()

    def own(self, size: int, index: np.ndarray, *more: np.ndarray) -> tuple[int, np.ndarray]:
        """Of words of shared memory (and what else is known of each), those of this machine's CTAs."""
        mine = np.isin(index * size // self.shared.stride, self.places)
        return size, index[mine], *(values[mine] for values in more)

    def synchronize(self) -> None:
        """A barrier: what the CTA wrote to shared memory is there for all its threads."""
        self.together("barrier")
        for size, index in self.unsynced:
            self.shared.mark(index, 1, size)
        self.unsynced = []
        self.epoch += 1

    def finish(self) -> None:
        if self.products.owed() or self.stores.owed():
            raise MissingWait(f"{self.program.name} ends while products or bulk stores still read shared memory")

    def describe(self, fault: Fault) -> str:
        instruction = self.program.instructions[self.counter]
        place = ""
        if fault.lane is not None:
            cta = tuple(int(i) for i in self.ctas[fault.lane // self.threads])
            place = f"; CTA {cta}, thread {fault.lane % self.threads}"
        return f"{fault.args[0]}{place}; line {instruction.line}: {instruction.text[:160]}"


class Launch:
    """One kernel with its arguments bound, and what its CTAs share."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        arguments: Mapping[str, Argument],
        threads: int,
        shared_bytes: int,
        unwritten: tuple[str, ...],
    ):
        self.program, self.grid, self.threads, self.shared_bytes = program, grid, threads, shared_bytes
        maps = {name: value for name, value in arguments.items() if isinstance(value, TensorMap)}
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        for name, value in maps.items():
            tensors[name] = value.tensor
        self.memory = GlobalMemory(tensors, program.constants, unwritten)
        self.parameters, self.maps = self.bind(arguments)
        self.counts = Counts()
        self.issued = [0] * len(program.instructions)
        self.waiting: list[Machine] = []
        self.code = [guarded(instruction, program) for instruction in program.instructions]

    def bind(self, arguments: Mapping[str, Argument]) -> tuple[dict[str, object], dict[int, tuple[str, TensorMap]]]:
        """Values of the parameters by name, and tensor maps by address. Parameters beyond the arguments are Triton's scratch: null."""
        parameters: dict[str, object] = {}
        maps = {}
        for i, parameter in enumerate(self.program.parameters):
            name, value = list(arguments.items())[i] if i < len(arguments) else ("scratch", 0)
            if isinstance(value, TensorMap) != (parameter.size == 128):
                raise ValueError(f"parameter {i} of {self.program.name} takes {parameter.size} bytes, got {name} = {type(value).__name__}")
            if isinstance(value, TensorMap):
                maps[PARAMETER_BASE + PARAMETER_STRIDE * i] = (name, value)
            elif isinstance(value, Tensor):
                value = self.memory.by_name[name].address
            elif isinstance(value, float):
                value = int(np.float64(value).view(np.uint64) if parameter.type == "f64" else np.float32(value).view(np.uint32))
            parameters[parameter.name] = value
        return parameters, maps

    def execute(self, ctas: np.ndarray) -> Counts:
        batch = max(LANES // self.threads, 1)
        for start in range(0, len(ctas), batch):
            self.waiting.append(Machine(self, ctas[start : start + batch]))
            while self.waiting:
                self.waiting.pop().run()
        self.counts.ctas = len(ctas)
        for instruction, warps_on in zip(self.program.instructions, self.issued, strict=True):
            if warps_on:
                self.counts.instructions[instruction.opcode] += warps_on
                self.counts.lines[instruction.line] += warps_on
        return self.counts


def execute(
    ptx: str,
    *,
    grid: tuple[int, int, int],
    arguments: Mapping[str, Argument],
    shared_bytes: int,
    num_warps: int,
    ctas: Iterable[tuple[int, int, int]] | None = None,
    unwritten: Iterable[str] = (),
) -> Counts:
    """Runs a kernel on the CPU, on the tensors' own memory.

    Args:
        ptx: a module with one entry function.
        grid: CTAs in x, y, z.
        arguments: name -> value, in the order of the kernel's parameters: CPU tensors (an access may touch the tensor's elements and
            nothing else of its storage), `TensorMap` for the 128 bytes of a descriptor, numbers. Parameters that Triton appends for
            scratch memory are null.
        shared_bytes: dynamic shared memory of a CTA.
        num_warps: warps of a CTA.
        ctas: which to run; default all. The order in which CTAs run is not defined.
        unwritten: names of tensors that hold nothing yet; reading an element before it is stored is a fault.

    Returns:
        What was executed, requested and computed.

    Raises:
        Fault: a subclass that names what the kernel did wrong, with instruction, CTA and thread; `UnknownOpcode` before anything runs.
        ValueError: arguments that do not fit the parameters, or a number of warps other than the kernel was compiled for.
    """
    program = parse(ptx)
    threads = 32 * num_warps
    if program.threads not in (0, threads):
        raise ValueError(f"{program.name} is compiled for {program.threads} threads, got num_warps={num_warps}")
    if not len(arguments) <= len(program.parameters) <= len(arguments) + 2:
        raise ValueError(f"{program.name} takes {len(program.parameters)} parameters, two of them scratch; got {list(arguments)}")
    x, y, z = grid
    everything = ((i, j, k) for k in range(z) for j in range(y) for i in range(x))
    chosen = np.array(list(everything if ctas is None else ctas), np.int64).reshape(-1, 3)
    if ((chosen < 0) | (chosen >= np.array(grid))).any():
        raise ValueError(f"CTAs outside the grid {grid}: {chosen[((chosen < 0) | (chosen >= np.array(grid))).any(1)][0].tolist()}")
    launch = Launch(program, tuple(grid), arguments, threads, shared_bytes, tuple(unwritten))
    with np.errstate(all="ignore"):
        return launch.execute(chosen)


# ---- instructions of control flow, and the table of all


def bind_branch(instruction: Instruction, program: Program) -> Run:
    modifiers(instruction, "uni")
    target = program.labels[instruction.operands[0].name]

    def run(machine, mask):
        return target if mask is machine.mask else machine.branch(mask, target)

    return run


def bind_exit(instruction: Instruction, program: Program) -> Run:
    modifiers(instruction, "uni")
    return lambda machine, mask: machine.exit(mask)


def bind_trap(instruction: Instruction, program: Program) -> Run:
    def run(machine, mask):
        lanes = machine.selected(mask)
        if len(lanes):
            raise Trap("the kernel stopped itself", int(lanes[0]))

    return run


def bind_nothing(instruction: Instruction, program: Program) -> Run:
    """Orders and hints that lanes in lock step have no use for."""
    return lambda machine, mask: None


CONTROL = {
    "bra": bind_branch,
    "exit": bind_exit,
    "ret": bind_exit,
    "trap": bind_trap,
    **dict.fromkeys(("fence", "griddepcontrol", "membar", "nanosleep", "prefetch", "setmaxnreg"), bind_nothing),
}

TABLES = (CONTROL, arithmetic.OPCODES, accesses.OPCODES, asynchronous.OPCODES, tensor_cores.OPCODES, warps.OPCODES)
OPCODES: dict[str, Callable[[Instruction, Program], Run]] = {name: bind for table in TABLES for name, bind in table.items()}


def guarded(instruction: Instruction, program: Program) -> Run:
    """The instruction's function, with its guard's lanes as mask."""
    bind = OPCODES.get(instruction.parts[0])
    if bind is None:
        raise unknown(instruction)
    run = bind(instruction, program)
    if instruction.guard is None:
        return run
    register, negated = instruction.guard
    slot = register.slot

    def run_guarded(machine, mask):
        on = ~machine.registers[slot] if negated else machine.registers[slot]
        return run(machine, on if mask is None else on & mask)

    return run_guarded
