"""What a suite is made of: cases, which providers take in turns, figures, which are taken once, and what is left out.

A suite is a module with `cases(scope)`, a generator of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch

from idefics2_fast.benchmarks.timing import Call, Measurement

ENGINE = "idefics2_fast"
CPU = torch.device("cpu")
SIZES = ("tiny", "small")

T = TypeVar("T")


@dataclass(frozen=True)
class Scope:
    """What a run asks of a suite.

    Attributes:
        device: where models run; images are prepared on the CPU in any case.
        parts: the wanted suites of a module that has several.
        quick: the first case of each suite, and that as small as still says something.
        model: this named size alone.
    """

    device: torch.device = CPU
    parts: tuple[str, ...] = ()
    quick: bool = False
    model: str | None = None

    @property
    def sizes(self) -> tuple[str, ...]:
        return (self.model,) if self.model else SIZES[:1] if self.quick else SIZES

    def first(self, made: Iterable[T]) -> Iterator[T]:
        """All of them; of a quick run the first."""
        return islice(made, 1 if self.quick else None)


@dataclass(frozen=True)
class Row:
    """One line of results: some phases of a case's calls.

    Attributes:
        name: of the case in the results.
        phases: counted together.
        steps: the time is divided by this.
        needs: least speed against a baseline, of this engine, or of the first of a pair (provider, baseline).
        memory: greatest share of a baseline's peak memory that the engine may take.
        pass_: "forward", "backward" or "both".
    """

    name: str
    phases: tuple[str, ...]
    steps: int = 1
    needs: Mapping[str | tuple[str, str], float] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    pass_: str = "forward"


@dataclass(frozen=True)
class Figure:
    """A number; `limit`: what it must be at least, or, without `at_least`, at most."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    at_least: bool = True
    low: float | None = None
    high: float | None = None
    provider: str = ENGINE
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.limit is None or (self.value >= self.limit if self.at_least else self.value <= self.limit)


@dataclass(frozen=True)
class Figures:
    """Numbers that were taken outside of the rounds, or computed.

    Attributes:
        device: its name, if not the run's: what is computed for a card is no measurement on this machine.
    """

    suite: str
    case: str
    figures: Sequence[Figure]
    pass_: str = "both"
    device: str = ""


@dataclass(frozen=True)
class Case:
    """Work that providers take in turns.

    Attributes:
        check: says what is wrong with a provider's output; "" where nothing is.
        absent: providers that cannot take part here, and why.
        derived: figures from what was measured; asked for when no provider was wrong.
        device, threads: where it runs, if not where the run does, with all threads.
    """

    suite: str
    calls: Mapping[str, Call]
    check: Callable[[str, Any], str]
    rows: tuple[Row, ...]
    absent: Mapping[str, str] = field(default_factory=dict)
    derived: Callable[[Mapping[str, Measurement]], Figures] | None = None
    device: torch.device | None = None
    threads: int | None = None


@dataclass(frozen=True)
class LeftOut:
    """A case that is not run here, and why."""

    suite: str
    case: str
    reason: str


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Torch computes with so many threads; None: as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
