"""Global and shared memory that know what has been written, by whom, and what an asynchronous copy still owes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from idefics2_fast.benchmarks.sm90.faults import Misaligned, MissingBarrier, MissingWait, OutOfBounds, UnwrittenRead, WriteConflict

# Arguments lie this far apart, and each storage begins in the middle: an address, even one before the first byte, tells its argument.
# Storages are aligned as on a card, beyond any access.
ARGUMENT_BITS = 40

UNWRITTEN, READY, PENDING = 0, 1, 255
FIRST_WARP = 2
"""States of a byte of shared memory; FIRST_WARP + warp: written by that warp since the last barrier."""


def words(buffer: np.ndarray, size: int) -> np.ndarray:
    """Bytes as words of 1, 2, 4 or 8 bytes [N], or of 16 [N, 2]; an incomplete last word is left out."""
    whole = buffer[: len(buffer) // size * size]
    return whole.view("u8").reshape(-1, 2) if size == 16 else whole.view(f"u{size}")


def pattern(code: int, size: int) -> np.generic:
    """A word of `size` bytes (of 8, for 16) that all hold `code`."""
    width = min(size, 8)
    return np.frombuffer(bytes([code] * width), f"u{width}")[0]


def aligned(addresses: np.ndarray, size: int, what: str, lanes: np.ndarray) -> None:
    if (addresses & (size - 1)).any():
        bad = int(np.flatnonzero(addresses & (size - 1))[0])
        raise Misaligned(f"{what}: {size}-byte access at offset {int(addresses[bad])}", int(lanes[bad]))


class Storage:
    """The memory behind one or more arguments: its bytes, which of them are written, and who stored them in this launch."""

    def __init__(self, bytes_: np.ndarray):
        self.bytes = bytes_
        self.written: np.ndarray | None = None
        self.owners: np.ndarray | None = None
        """One uint64 a unit: CTA + 1, thread (12 bits), barriers passed (20 bits). Allocated by the first store."""
        self.unit = 1

    def owners_of(self, size: int, unit: int) -> np.ndarray:
        """Owners by words of `size` bytes [N, size // unit]; the unit shrinks to the narrowest store seen."""
        unit = min(unit, size)
        if self.owners is None:
            self.unit = unit
            self.owners = np.zeros(-(-len(self.bytes) // 16) * 16 // unit, np.uint64)
        elif unit < self.unit:
            self.owners = np.repeat(self.owners, self.unit // unit)
            self.unit = unit
        return self.owners.reshape(-1, max(size // self.unit, 1))


class Argument:
    """A tensor argument: a range of its storage. Between the elements of a view that leaves gaps, access is out of bounds too."""

    def __init__(self, name: str, index: int, tensor: Tensor, storage: Storage):
        self.name, self.storage, self.itemsize = name, storage, tensor.element_size()
        self.base = (2 * index + 1) << (ARGUMENT_BITS - 1)
        self.start = tensor.storage_offset() * self.itemsize
        spans = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        self.stop = self.start + (sum(spans) + 1) * self.itemsize if tensor.numel() else self.start
        self.address = self.base + self.start
        self.inside: np.ndarray | None = None
        if tensor.numel() and self.stop - self.start != tensor.numel() * self.itemsize:
            self.inside = np.zeros(len(storage.bytes), np.uint8)
            rows = np.ndarray((*tensor.shape, self.itemsize), np.uint8, self.inside, self.start, strides_in_bytes(tensor))
            rows[...] = 1

    def mark_unwritten(self) -> None:
        if self.storage.written is None:
            self.storage.written = np.ones(len(self.storage.bytes), np.uint8)
        self.storage.written[self.start : self.stop] = 0

    def fault(self, kind: type, what: str, offsets: np.ndarray, bad: np.ndarray, lanes: np.ndarray) -> Exception:
        first = int(np.flatnonzero(bad)[0])
        return kind(f"argument {self.name!r}: {what} at byte {int(offsets[first]) - self.start}", int(lanes[first]))


def strides_in_bytes(tensor: Tensor) -> tuple[int, ...]:
    return (*(stride * tensor.element_size() for stride in tensor.stride()), 1)


class GlobalMemory:
    """Arguments and constants of one launch, at addresses as a card would give them."""

    def __init__(self, tensors: Mapping[str, Tensor], constants: Mapping[str, bytes], unwritten: tuple[str, ...]):
        self.storages: dict[int, Storage] = {}
        self.arguments: list[Argument | None] = [None]
        self.by_name: dict[str, Argument] = {}
        self.constants: dict[str, int] = {}
        for name, tensor in tensors.items():
            self.by_name[name] = self.add(name, tensor, self.storage(tensor))
        for name, content in constants.items():
            self.constants[name] = self.add(
                name, torch.tensor(list(content), dtype=torch.uint8), Storage(np.frombuffer(content, np.uint8))
            ).address
        for name in unwritten:
            self.by_name[name].mark_unwritten()

    def add(self, name: str, tensor: Tensor, storage: Storage) -> Argument:
        self.arguments.append(Argument(name, len(self.arguments), tensor, storage))
        return self.arguments[-1]

    def storage(self, tensor: Tensor) -> Storage:
        untyped = tensor.untyped_storage()
        if untyped.data_ptr() not in self.storages:
            self.storages[untyped.data_ptr()] = Storage(torch.empty(0, dtype=torch.uint8).set_(untyped).numpy())
        return self.storages[untyped.data_ptr()]

    def split(self, addresses: np.ndarray, lanes: np.ndarray, size: int) -> list[tuple[Argument, np.ndarray | slice, np.ndarray]]:
        """Lanes by argument, with offsets into its storage that are inside its elements and aligned."""
        if (addresses >> ARGUMENT_BITS == addresses[0] >> ARGUMENT_BITS).all():
            argument = self.argument(int(addresses[0]), lanes[0])
            offsets = addresses - argument.base
            self.check(argument, offsets, lanes, size)
            return [(argument, slice(None), offsets)]
        parts = []
        for index in np.unique(addresses >> ARGUMENT_BITS):
            part = np.flatnonzero(addresses >> ARGUMENT_BITS == index)
            argument = self.argument(int(addresses[part[0]]), lanes[part[0]])
            self.check(argument, addresses[part] - argument.base, lanes[part], size)
            parts.append((argument, part, addresses[part] - argument.base))
        return parts

    def argument(self, address: int, lane: int) -> Argument:
        index = address >> ARGUMENT_BITS
        if not 0 < index < len(self.arguments):
            raise OutOfBounds(f"address {address:#x} lies in no argument (a null pointer is 0)", int(lane))
        return self.arguments[index]

    @staticmethod
    def check(argument: Argument, offsets: np.ndarray, lanes: np.ndarray, size: int) -> None:
        beyond = (offsets < argument.start) | (offsets > argument.stop - size)
        if beyond.any():
            length = argument.stop - argument.start
            raise argument.fault(OutOfBounds, f"{size}-byte access outside its {length} bytes", offsets, beyond, lanes)
        aligned(offsets, size, f"argument {argument.name!r}", lanes)
        if argument.inside is not None:
            gaps = words(argument.inside, size)[offsets // size] != pattern(1, size)
            gaps = gaps.any(1) if gaps.ndim == 2 else gaps
            if gaps.any():
                raise argument.fault(OutOfBounds, f"{size}-byte access between the view's elements", offsets, gaps, lanes)

    def load(self, addresses: np.ndarray, lanes: np.ndarray, owners: np.ndarray, size: int, ordered: bool = False) -> np.ndarray:
        """Words [k] ([k, 2] at 16 bytes). `ordered`: the load may see what other CTAs stored."""
        parts = self.split(addresses, lanes, size)
        result = None
        for argument, part, offsets in parts:
            index = offsets // size
            self.check_readable(argument, offsets, lanes[part], None if ordered else owners[part], size)
            values = words(argument.storage.bytes, size)[index]
            if len(parts) == 1:
                return values
            if result is None:
                result = np.zeros((len(addresses), *values.shape[1:]), values.dtype)
            result[part] = values
        return result

    @staticmethod
    def check_readable(argument: Argument, offsets: np.ndarray, lanes: np.ndarray, owners: np.ndarray | None, size: int) -> None:
        storage = argument.storage
        if storage.written is not None:
            missing = words(storage.written, size)[offsets // size] != pattern(1, size)
            missing = missing.any(1) if missing.ndim == 2 else missing
            if missing.any():
                raise argument.fault(UnwrittenRead, f"{size}-byte read of what nothing has written", offsets, missing, lanes)
        if storage.owners is not None and owners is not None:
            foreign = unordered(storage.owners_of(size, storage.unit)[offsets // size], owners).any(1)
            if foreign.any():
                raise argument.fault(MissingBarrier, "read of what another thread stores in this launch", offsets, foreign, lanes)

    def store(self, addresses: np.ndarray, lanes: np.ndarray, owners: np.ndarray, values: np.ndarray, size: int) -> None:
        """Words [k] or [k, 2] stored; different values from threads in no order are a conflict."""
        for argument, part, offsets in self.split(addresses, lanes, size):
            storage, index = argument.storage, offsets // size
            memory, mine = words(storage.bytes, size), values[part]
            holders = storage.owners_of(size, argument.itemsize)
            foreign = unordered(holders[index], owners[part]).any(1)
            if foreign.any() and (foreign & differs(memory[index], mine)).any():
                foreign &= differs(memory[index], mine)
                raise argument.fault(WriteConflict, "another thread stored another value in this launch", offsets, foreign, lanes[part])
            memory[index] = mine
            overlap = differs(memory[index], mine)
            if overlap.any():
                raise argument.fault(WriteConflict, "two threads store different values at once", offsets, overlap, lanes[part])
            holders[index] = owners[part][:, None]
            if storage.written is not None:
                words(storage.written, size)[index] = pattern(1, size)


def differs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x != y).any(1) if x.ndim == 2 else x != y


def unordered(holders: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Whether what `holders` [k, units] stored is in no order with `owners` [k]: another CTA, or another thread since the last barrier."""
    owners = owners[:, None]
    other_cta = (holders >> np.uint64(32)) != (owners >> np.uint64(32))
    low = np.uint64(0xFFFFFFFF)
    other_thread = ((holders & low) >> np.uint64(20)) != ((owners & low) >> np.uint64(20))
    same_epoch = (holders & np.uint64(0xFFFFF)) == (owners & np.uint64(0xFFFFF))
    return (holders != 0) & (other_cta | (other_thread & same_epoch))


class SharedMemory:
    """Shared memory of several CTAs, one after the other. Indices count words of the access's size from the first CTA's start."""

    def __init__(self, ctas: int, size: int):
        self.size = size
        self.stride = -(-max(size, 1) // 1024) * 1024
        self.bytes = np.zeros(ctas * self.stride, np.uint8)
        self.state = np.zeros(ctas * self.stride, np.uint8)
        self.readers = np.zeros(ctas * self.stride, np.uint8)
        """Products and bulk stores that still read a byte."""
        self.barriers: dict[int, object] = {}

    def check(self, addresses: np.ndarray, lanes: np.ndarray, size: int) -> None:
        beyond = (addresses < 0) | (addresses > self.size - size)
        if beyond.any():
            first = int(np.flatnonzero(beyond)[0])
            message = f"shared memory: {size}-byte access at byte {int(addresses[first])} of {self.size}"
            raise OutOfBounds(message, int(lanes[first]))
        aligned(addresses, size, "shared memory", lanes)

    def load(self, index: np.ndarray, lanes: np.ndarray, warps: np.ndarray | None, size: int) -> np.ndarray:
        """Words at these indices. `warps`: each reader's code; a warp may read what it wrote since the barrier."""
        self.check_readable(index, lanes, warps, size)
        return words(self.bytes, size)[index]

    def check_readable(self, index: np.ndarray, lanes: np.ndarray | None, warps: np.ndarray | None, size: int) -> None:
        state = words(self.state, size)[index]
        if (state == pattern(READY, size)).all():
            return
        codes = np.ascontiguousarray(state).view(np.uint8).reshape(*index.shape, size)
        self.refuse(codes == UNWRITTEN, UnwrittenRead, "read of what nothing has written", index, lanes, size)
        self.refuse(codes == PENDING, MissingWait, "read of what an asynchronous copy may still be writing", index, lanes, size)
        foreign = codes != READY
        if warps is not None:
            foreign &= codes != warps[..., None]
        self.refuse(foreign, MissingBarrier, "read of what another warp wrote since the last barrier", index, lanes, size)

    def refuse(self, bad: np.ndarray, kind: type, what: str, index: np.ndarray, lanes: np.ndarray | None, size: int) -> None:
        if bad.any():
            first = int(np.flatnonzero(bad.any(-1).reshape(-1))[0])
            at = int(index.reshape(-1)[first]) * size % self.stride
            raise kind(f"shared memory: {what} at byte {at}", None if lanes is None else int(lanes[first]))

    def store(self, index: np.ndarray, lanes: np.ndarray, values: np.ndarray, codes: np.ndarray | int, size: int) -> None:
        """Words written; each byte takes its writer's code."""
        self.check_writable(index, lanes, codes, size)
        memory = words(self.bytes, size)
        memory[index] = values
        overlap = differs(memory[index], values)
        self.refuse(overlap[:, None], WriteConflict, "two threads store different values at once", index, lanes, size)
        self.mark(index, codes, size)

    def check_writable(self, index: np.ndarray, lanes: np.ndarray | None, codes: np.ndarray | int, size: int) -> None:
        busy = words(self.readers, size)[index] != 0
        self.refuse(busy.reshape(len(busy), -1), MissingWait, "write to what an asynchronous operation may still read", index, lanes, size)
        owed = np.ascontiguousarray(words(self.state, size)[index]).view(np.uint8).reshape(*index.shape, size) == PENDING
        self.refuse(owed, MissingWait, "write to what an asynchronous copy may still be writing", index, lanes, size)

    def mark(self, index: np.ndarray, codes: np.ndarray | int, size: int) -> None:
        width = min(size, 8)
        spread = (np.asarray(codes).astype(f"u{width}") * pattern(1, size)).astype(f"u{width}")
        words(self.state, size)[index] = spread[..., None] if size == 16 and spread.ndim else spread
