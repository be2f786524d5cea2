"""What an execution stops with. Each message ends with the instruction, its line in the PTX, the CTA and the thread."""

from __future__ import annotations


class Fault(RuntimeError):
    """A kernel did what no card promises to survive, or what this interpreter does not know."""

    def __init__(self, message: str, lane: int | None = None):
        super().__init__(message)
        self.lane = lane


class UnknownOpcode(Fault):
    """An instruction, or one of its modifiers, that the interpreter does not cover."""


class OutOfBounds(Fault):
    """An access outside every argument, outside one argument's elements, or outside shared memory."""


class Misaligned(Fault):
    """A vector access whose address is no multiple of its size: a card stops, and a false promise of divisibility leads here."""


class UnwrittenRead(Fault):
    """A read of memory that nothing has written."""


class MissingWait(Fault):
    """A register or memory was touched while an asynchronous copy or product that uses it had not been waited for."""


class MissingBarrier(Fault):
    """A thread read or overwrote what another wrote, without a barrier between them; between CTAs of a launch there is none."""


class WriteConflict(Fault):
    """Two threads stored different values at one address, in no defined order."""


class Divergence(Fault):
    """Threads that must execute an instruction together did not all reach it."""


class Deadlock(Fault):
    """A wait that nothing can end."""


class Trap(Fault):
    """The kernel stopped itself (`trap`, a failed device assertion)."""
