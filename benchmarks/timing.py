"""Time and memory of several providers side by side in one run.

Every provider's output is checked first, and one that is wrong gets no time. Then all take turns, round after round, so that whatever
else the machine does falls on all alike; each gives the median and the 20 % and 80 % quantiles of its rounds.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm


class Quantiles(NamedTuple):
    low: float
    median: float
    high: float


def quantiles(values: Sequence[float]) -> Quantiles:
    """The 20 %, 50 % and 80 % quantiles, linear between the values."""
    return Quantiles(*np.quantile(values, (0.2, 0.5, 0.8)).tolist())


class PeakMemory:
    """Memory in use beyond what was in use when this was made: models and inputs that exist by then do not count.

    On a CUDA device the tensors there. On a CPU the process's resident memory (VmHWM, which the kernel resets on request): everything
    counts, by whomever it was allocated. Freed memory that the C library holds back is given back to the system first, or it would
    count where it is not used, and its reuse would not be seen.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        self.reset()
        self.base = torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")

    @staticmethod
    def available(device: torch.device) -> bool:
        return device.type == "cuda" or os.access("/proc/self/clear_refs", os.W_OK)

    def reset(self) -> None:
        """Forgets earlier peaks."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes at the highest point since `reset`."""
        highest = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        return max(0, highest - self.base)


def _status(name: str) -> int:
    """A size in /proc/self/status, in bytes."""
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


class Watch:
    """Times the phases of one call, and notes the memory that each reaches.

    Attributes:
        seconds: of each phase. One that comes several times adds up.
        peaks: bytes of each phase, as `PeakMemory` counts them; empty unless `memory` is given.
    """

    def __init__(self, device: torch.device, memory: PeakMemory | None = None) -> None:
        self.device, self.memory = device, memory
        self.seconds: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, int] = defaultdict(int)
        self._phase, self._since = "", 0.0

    def start(self, phase: str) -> None:
        """Begins a phase; one that runs ends here. What a call does before its first phase is not measured."""
        self.stop()
        if self.memory is not None:
            self.memory.reset()
        self._synchronize()
        self._phase, self._since = phase, time.perf_counter()

    def stop(self) -> None:
        if not self._phase:
            return
        self._synchronize()
        self.seconds[self._phase] += time.perf_counter() - self._since
        if self.memory is not None:
            self.peaks[self._phase] = max(self.peaks[self._phase], self.memory.peak())
        self._phase = ""

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# A provider's part: does the work once, tells the watch its phases, returns what is checked.
Call = Callable[[Watch], Any]


@dataclass
class Measurement:
    """What one provider came to.

    Attributes:
        wrong: what was wrong with its output; then nothing else is known of it.
        absent: why it does not take part here; the same.
        once: it was taken once, and every round is that one.
        rounds: seconds of each phase, round by round.
        peaks: bytes of each phase; empty where memory cannot be measured.
    """

    wrong: str = ""
    absent: str = ""
    once: bool = False
    rounds: list[dict[str, float]] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)

    def seconds(self, phases: Sequence[str]) -> list[float]:
        """Of these phases together, round by round."""
        return [sum(times[phase] for phase in phases) for times in self.rounds]

    def peak(self, phases: Sequence[str]) -> int | None:
        return max(self.peaks[phase] for phase in phases) if self.peaks else None


def measure(
    calls: Mapping[str, Call],
    check: Callable[[str, Any], str],
    *,
    device: torch.device,
    seconds: float,
    rounds: tuple[int, int],
    once: float = math.inf,
    title: str = "",
) -> dict[str, Measurement]:
    """Checks every provider, then times those that are right.

    Args:
        calls: the providers' parts by their names. Each round takes them in another order.
        check: says what is wrong with a provider's output; "" where nothing is.
        seconds: how long the rounds may take in all, going by the first pass.
        rounds: the fewest and the most rounds, which hold before `seconds`.
        once: what takes longer than so many seconds, and twice as long as the fastest, is not taken again: its first pass counts in
            every round.
    """
    with tqdm(total=len(calls), desc=title, leave=False, dynamic_ncols=True) as bar:
        results = {name: _first_pass(name, call, check, device, bar) for name, call in calls.items()}
        first = {name: sum(result.rounds[0].values()) for name, result in results.items() if not result.wrong}
        limit = max(once, 2 * min(first.values(), default=0.0))
        right = [name for name in first if first[name] <= limit]
        for name in first.keys() - set(right):
            results[name].once = True
        pass_seconds = sum(sum(results[name].rounds.pop().values()) for name in right)
        least, most = rounds
        turns = min(most, max(least, int(seconds / max(pass_seconds, 1e-9))))
        bar.total += turns * len(right)
        chance = random.Random(0)
        for _ in range(turns):
            # In another order each round: a provider would always find the caches as the same one has left them.
            for name in chance.sample(right, len(right)):
                bar.set_postfix_str(name)
                watch = Watch(device)
                _run(calls[name], watch)
                results[name].rounds.append(dict(watch.seconds))
                bar.update()
    for result in results.values():
        result.rounds *= turns if result.once else 1
    return results


def _first_pass(name: str, call: Call, check: Callable[[str, Any], str], device: torch.device, bar: tqdm) -> Measurement:
    """Warms up, checks, and measures the memory: a call that begins with its memory given back is not a fair one to time."""
    bar.set_postfix_str(name)
    watch = Watch(device, PeakMemory(device) if PeakMemory.available(device) else None)
    wrong = check(name, _run(call, watch))
    bar.update()
    return Measurement(wrong=wrong) if wrong else Measurement(rounds=[dict(watch.seconds)], peaks=dict(watch.peaks))


def _run(call: Call, watch: Watch) -> Any:
    with torch.inference_mode():
        output = call(watch)
    watch.stop()
    return output
