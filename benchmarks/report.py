"""Measurements as records, and as tables in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch

from idefics2_fast.benchmarks.model import Case, Row
from idefics2_fast.benchmarks.record import Record, commit, device_name, versions
from idefics2_fast.benchmarks.timing import Measurement, quantiles

ENGINE = "idefics2_fast"
BASELINES = ("hf", "hf-tuned")


def speed_up(row: Row, results: Mapping[str, Measurement], provider: str, baseline: str) -> list[float] | None:
    """How many times as fast as the baseline, round by round; None where one of the two is absent or wrong."""
    times = [results[name].seconds(row.phases) for name in (baseline, provider) if name in results]
    if len(times) < 2 or not all(times):
        return None
    return [theirs / own for theirs, own in zip(*times, strict=True)]


def verdicts(row: Row, results: Mapping[str, Measurement]) -> dict[str, bool]:
    """What the row requires of the engine, in words, and whether it holds. A provider without a time fails it."""
    held = {}
    for baseline, least in row.needs.items():
        ratios = speed_up(row, results, ENGINE, baseline)
        held[f">= {least:g}x {baseline}"] = ratios is not None and quantiles(ratios).median >= least
    for baseline, most in row.memory.items():
        own, theirs = (results[name].peak(row.phases) if name in results else None for name in (ENGINE, baseline))
        held[f"memory <= {most:g}x {baseline}"] = None not in (own, theirs) and own <= most * theirs
    return held


def records(case: Case, results: Mapping[str, Measurement], device: torch.device) -> list[Record]:
    """Time and peak memory of every provider, and the engine's speed against the others."""
    where = {"suite": case.suite, "device": device_name(device), "versions": versions(), "commit": commit()}
    made = []
    for row in case.rows:
        common = {"case": row.name, "pass_": row.pass_, **where}
        for name, result in results.items():
            made += _records_of(row, name, result, common)
            if name != ENGINE and (ratios := speed_up(row, results, ENGINE, name)):
                low, median, high = quantiles(ratios)
                made.append(Record(provider=ENGINE, metric=f"speed against {name}", unit="x", value=median, low=low, high=high, **common))
    return made


def _records_of(row: Row, name: str, result: Measurement, common: Mapping[str, object]) -> list[Record]:
    if result.wrong:
        return [Record(provider=name, metric="time", unit="s", value=None, note=result.wrong, **common)]
    low, median, high = (value / row.steps for value in quantiles(result.seconds(row.phases)))
    made = [Record(provider=name, metric="time", unit="s", value=median, low=low, high=high, **common)]
    if (peak := result.peak(row.phases)) is not None:
        made.append(Record(provider=name, metric="peak memory", unit="B", value=peak, **common))
    return made


def case_table(case: Case, results: Mapping[str, Measurement]) -> str:
    """The case's rows, a line for each provider."""
    return "\n\n".join(_row_table(case.suite, row, results) for row in case.rows)


def _row_table(suite: str, row: Row, results: Mapping[str, Measurement]) -> str:
    lines = [["provider", "time", "20 to 80 %", "memory", *(f"vs {name}" for name in BASELINES)]]
    for name, result in results.items():
        if result.wrong:
            lines.append([name, "wrong", *["-"] * (len(lines[0]) - 2)])
            continue
        low, median, high = (value / row.steps for value in quantiles(result.seconds(row.phases)))
        ratios = (speed_up(row, results, name, baseline) for baseline in BASELINES)
        shown = [f"{quantiles(ratio).median:.2f}x" if ratio else "-" for ratio in ratios]
        lines.append([name, seconds(median), f"{seconds(low)} to {seconds(high)}", size(result.peak(row.phases)), *shown])
    required = ", ".join(f"{need}: {'PASS' if held else 'FAIL'}" for need, held in verdicts(row, results).items())
    notes = [f"\n  {name} has no time: {result.wrong}" for name, result in results.items() if result.wrong]
    return f"{suite}: {row.name}\n{table(lines, widths=(19, 9, 20, 9, 8, 11))}\n  required: {required}{''.join(notes)}"


def table(lines: Sequence[Sequence[str]], widths: Sequence[int] = ()) -> str:
    """Lines of cells under a header, the first column aligned to the left and the others to the right.

    Args:
        widths: the columns' least widths.
    """
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    wide = [max(pair) for pair in zip_longest(wide, widths, fillvalue=0)]
    drawn = ["  " + "  ".join([line[0].ljust(wide[0]), *map(str.rjust, line[1:], wide[1:])]) for line in lines]
    rule = "  " + "-" * (max(len(line) for line in drawn) - 2)
    return "\n".join([drawn[0], rule, *drawn[1:]])


def seconds(value: float) -> str:
    """Three digits, in the unit that fits."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale:
            return f"{value / scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{value * 1e9:.0f} ns"


def size(value: int | None) -> str:
    """Bytes, in the decimal unit that fits; "-" for what was not measured."""
    if value is None:
        return "-"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
