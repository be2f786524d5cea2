"""What became slower, or lost its time, from one file of results to another.

Ratios are compared wherever they were taken; times, memory and other figures on one device alone. A change counts beyond a threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from idefics2_fast.benchmarks.record import ABSENT, Record, read_records
from idefics2_fast.benchmarks.report import table

THRESHOLD = 0.10
LESS_IS_BETTER = {"s": True, "B": True, "x": False}  # by unit; figures of other units are not judged
OVERHEAD = "overhead"  # in the metric of a ratio that should be small


def main(old: Path, new: Path, threshold: float = THRESHOLD) -> int:
    """Prints what became worse from `old` to `new`; returns 1 if anything did."""
    before, after = read_records(old), read_records(new)
    lines = list(regressions(before, after, threshold))
    compared = len(pairs(before, after))
    if not compared:
        print(f"{old} and {new} have nothing in common that can be compared.")
        return 1
    if lines:
        print(table([["case", "provider", "metric", "old", "new", "worse by"], *lines]))
    print(f"{len(lines)} of {compared} figures became worse by more than {threshold:.0%}.")
    return int(bool(lines))


def pairs(before: Sequence[Record], after: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Records of the same thing: ratios from any device, else from one device. Those that were taken in both files, or only in the old."""
    old = {key: record for record in before for key in (record.key, _anywhere(record))}
    found = []
    for record in after:
        key = record.key if record.key in old or record.unit != "x" else _anywhere(record)
        if key in old and old[key].value is not None and record.unit in LESS_IS_BETTER and not record.note.startswith(ABSENT):
            found.append((old[key], record))
    return found


def regressions(before: Sequence[Record], after: Sequence[Record], threshold: float) -> Iterator[list[str]]:
    """Lines of a table."""
    for old, new in pairs(before, after):
        where = [f"{new.suite}: {new.case}, {new.pass_}", new.provider, new.metric]
        if new.value is None:
            yield [*where, f"{old.value:.3g} {old.unit}", "-", new.note]
        elif (change := worse_by(old, new)) > threshold:
            yield [*where, f"{old.value:.3g} {old.unit}", f"{new.value:.3g} {new.unit}", f"{change:.0%}"]


def worse_by(old: Record, new: Record) -> float:
    """By which share the new value is worse: 1.0 for twice the time, or half the speed."""
    less_is_better = LESS_IS_BETTER[new.unit] or OVERHEAD in new.metric
    better, worse = (old.value, new.value) if less_is_better else (new.value, old.value)
    return worse / better - 1 if better else float("inf") if worse else 0.0


def _anywhere(record: Record) -> tuple[str, ...]:
    return (*record.key[:-1], "")
