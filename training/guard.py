"""When a step must not count, when the run must go back, and when it must end: one answer on all ranks.

Everything here runs over the default process group with CPU tensors (gloo), or in one process without a group.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from statistics import median
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)
T = TypeVar("T")

ECHO = 5.0  # seconds
REQUEUE = 75  # sysexits.h's EX_TEMPFAIL: "try again later". The run saved and ended because it was told to; start the same command again.


class GuardError(RuntimeError):
    """The run cannot go on by itself. The message is the report: steps, ranks, samples."""


class Action(Enum):
    PROCEED = "proceed"
    SKIP = "skip"  # drop this step's gradients: no optimizer step
    ROLL_BACK = "roll back"  # load an earlier checkpoint, and skip the samples from there to here


@dataclass(frozen=True)
class Verdict:
    """What to do with a step, on every rank alike; why; and the samples of the ranks at fault (of all ranks, for a spike)."""

    action: Action
    reason: str = ""
    sample_keys: tuple[str, ...] = ()


class Guard:
    """Looks at each step between its backward pass and its optimizer step.

    A loss is a spike if it stands above the median of the last accepted ones by more than `sigmas` robust standard deviations (1.4826 times
    the median absolute deviation), and above `factor` times the median: the first alone would fire on a flat curve, the second on a noisy
    one.

    Args:
        skip_at_most: steps in a row with a non-finite loss or gradient; the last of them raises.
        factor: infinite where nothing is a spike.
        window: accepted losses that the median is taken of; nothing is a spike before a quarter of it is there.
        rollbacks_at_most: rollbacks with less than `window` accepted steps in between; one more raises.
    """

    def __init__(
        self, *, skip_at_most: int = 5, window: int = 64, sigmas: float = 6.0, factor: float = 2.0, rollbacks_at_most: int = 3
    ) -> None:
        for name, value, least in (("skip_at_most", skip_at_most, 1), ("window", window, 4), ("rollbacks_at_most", rollbacks_at_most, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")
        if not (sigmas > 0 and factor > 1):
            raise ValueError(f"sigmas is {sigmas} and factor {factor}, expected more than 0 and more than 1")
        self.skip_at_most, self.sigmas, self.factor, self.rollbacks_at_most = skip_at_most, sigmas, factor, rollbacks_at_most
        self.losses: deque[float] = deque(maxlen=window)
        self.skipped: list[str] = []
        self.rollbacks = self.accepted = 0

    def inspect(self, step: int, loss: float, grad_norm: float, sample_keys: Sequence[str]) -> Verdict:
        """The verdict on a step. A collective.

        Args:
            loss: of this rank's share, or of the whole batch; the history takes the mean over ranks.
            grad_norm: of all gradients, or of this rank's.
            sample_keys: of the samples that this rank has seen in the step.

        Raises:
            GuardError: too many steps in a row were skipped, or too many rollbacks brought nothing.
        """
        wrong = [not math.isfinite(loss), not math.isfinite(grad_norm)]
        rows = over_ranks([*map(float, wrong), 0.0 if wrong[0] else loss])
        faults = [
            f"{what} on rank {rank}" for rank, row in enumerate(rows) for what, bad in zip(("loss", "gradient"), row, strict=False) if bad
        ]
        if faults:
            keys = gather(sample_keys if any(wrong) else ())
            return self._skip(step, f"non-finite {', '.join(faults)}", keys)
        self.skipped = []
        mean = sum(row[2] for row in rows) / len(rows)
        if self._is_spike(mean):
            return self._roll_back(step, mean, gather(sample_keys))
        self.losses.append(mean)
        self.accepted += 1
        if self.accepted == self.losses.maxlen:
            self.rollbacks = 0
        return Verdict(Action.PROCEED)

    def _is_spike(self, loss: float) -> bool:
        if 4 * len(self.losses) < self.losses.maxlen or math.isinf(self.factor):
            return False
        middle = median(self.losses)
        sigma = 1.4826 * median(abs(other - middle) for other in self.losses)
        return loss - middle > max(self.sigmas * sigma, (self.factor - 1) * abs(middle))

    def _skip(self, step: int, reason: str, keys: tuple[str, ...]) -> Verdict:
        report = f"step {step}: {reason}; samples {', '.join(keys)}"
        log.warning("skipped %s", report)
        self.skipped.append(report)
        if len(self.skipped) >= self.skip_at_most:
            raise GuardError("\n  ".join([f"{len(self.skipped)} steps in a row were skipped, and the run stops:", *self.skipped]))
        return Verdict(Action.SKIP, reason, keys)

    def _roll_back(self, step: int, loss: float, keys: tuple[str, ...]) -> Verdict:
        reason = f"loss {loss:.6g} where the median of the last {len(self.losses)} is {median(self.losses):.6g}"
        log.warning("spike at step %d: %s; samples %s", step, reason, ", ".join(keys))
        self.rollbacks, self.accepted = self.rollbacks + 1, 0
        if self.rollbacks > self.rollbacks_at_most:
            raise GuardError(
                f"step {step}: {reason}, after {self.rollbacks_at_most} rollbacks that did not help; samples {', '.join(keys)}"
            )
        return Verdict(Action.ROLL_BACK, reason, keys)

    def state_dict(self) -> dict[str, Any]:
        """JSON, the same on all ranks."""
        return {"losses": list(self.losses), "skipped": self.skipped.copy(), "rollbacks": self.rollbacks, "accepted": self.accepted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Back to a saved state, at a resume or a rollback; rollbacks done since stay counted, or a run could go round in circles."""
        self.losses = deque(state["losses"], self.losses.maxlen)
        self.skipped = list(state["skipped"])
        if state["rollbacks"] >= self.rollbacks:
            self.rollbacks, self.accepted = state["rollbacks"], state["accepted"]


class Stopped(KeyboardInterrupt):
    """A signal came while nothing was under way that had to be brought to an end. No handler of errors may keep it."""


class Stop:
    """SIGTERM and SIGINT as a wish to end at the next step's border.

        with Stop() as stop:
            for step in ...:
                ...
                if stop.requested():
                    checkpoints.save(..., asynchronous=False)
                    sys.exit(stop.exit_code)

    A second signal of the same kind acts as if nobody listened. Under torchrun only one that comes ECHO seconds later does: torchrun passes
    on what the processes have received already, and ends those that are left when one has ended. It kills them 30 s after its signal.
    Outside of a process's main thread, where Python hands no signals on, nothing is listened to.
    """

    def __init__(self) -> None:
        self._received = self._agreed = 0
        self._raises = False
        self._before: dict[int, Any] = {}
        self._noted: dict[int, float] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._before:
            self._restore(next(iter(self._before)))

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Around what may be broken off anywhere: a signal, one received before included, raises Stopped."""
        self._raises = True
        try:
            self._raise_received()
            yield
        finally:
            self._raises = False

    @contextmanager
    def polite(self) -> Iterator[None]:
        """Within `raising`, around what is to be brought to an end: signals are a wish again."""
        self._raises = False
        yield
        self._raises = True
        if not self._agreed:
            self._raise_received()

    @property
    def received(self) -> bool:
        """Whether this rank was signalled."""
        return self._received > 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        first = self._noted.setdefault(number, time.monotonic())
        echo = "TORCHELASTIC_RUN_ID" in os.environ
        if echo and first < time.monotonic() - ECHO:
            self._restore(number)
            signal.raise_signal(number)
        self._received = max(self._received, number)
        if not echo:
            self._restore(number)
        if self._raises:
            self._raise_received()

    def _raise_received(self) -> None:
        if self._received:
            self._agreed = self._received
            raise Stopped

    def _restore(self, number: int) -> None:
        signal.signal(number, self._before.pop(number) or signal.SIG_DFL)  # None: a handler that C code had set

    def requested(self) -> bool:
        """Whether any rank was signalled; the same answer on all. A collective: to be asked once a step, by every rank."""
        self._agreed = int(max(row[0] for row in over_ranks([float(self._received)])))
        return self._agreed > 0

    @property
    def exit_code(self) -> int:
        """REQUEUE after SIGTERM; as a shell says it, 130, after SIGINT: a person who presses Ctrl-C does not want the run back."""
        return REQUEUE if self._agreed == signal.SIGTERM else 128 + self._agreed


def over_ranks(row: list[float]) -> list[list[float]]:
    """The rows of all ranks, in fp64. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [row]
    rows = torch.zeros(dist.get_world_size(), len(row), dtype=torch.float64)
    rows[dist.get_rank()] = torch.tensor(row, dtype=torch.float64)
    dist.all_reduce(rows)
    return rows.tolist()


def gather(items: Sequence[T]) -> tuple[T, ...]:
    """What all ranks have, in the order of the ranks. A collective."""
    parts: list[Sequence[T]] = [tuple(items)]
    if dist.is_initialized():
        parts = [()] * dist.get_world_size()
        dist.all_gather_object(parts, tuple(items))
    return tuple(item for part in parts for item in part)


def gather_rare(items: Sequence[T]) -> tuple[T, ...]:
    """`gather` for what there hardly ever is: where no rank has any, one sum is all that travels. A collective."""
    return gather(items) if any(row[0] for row in over_ranks([float(len(items))])) else ()
