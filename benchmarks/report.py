"""Measurements as records, and as tables in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch

from idefics2_fast.benchmarks.case import ENGINE, Case, Figures, LeftOut, Row
from idefics2_fast.benchmarks.record import ABSENT, ONCE, Record, commit, device_name, versions
from idefics2_fast.benchmarks.timing import Measurement, quantiles

BASELINES = ("hf", "hf-tuned")


def speed_up(row: Row, results: Mapping[str, Measurement], provider: str, baseline: str) -> list[float] | None:
    """How many times as fast as the baseline, round by round; None where one of the two is absent or wrong."""
    times = [results[name].seconds(row.phases) for name in (baseline, provider) if name in results]
    if len(times) < 2 or not all(times):
        return None
    return [theirs / own for theirs, own in zip(*times, strict=True)]


def verdicts(row: Row, results: Mapping[str, Measurement]) -> dict[str, bool]:
    """What the row requires, in words, and whether it holds. A provider without a time fails it, one that is absent is not asked."""
    held = {}
    for pair, least in row.needs.items():
        provider, baseline = pair if isinstance(pair, tuple) else (ENGINE, pair)
        if not any(name in results and results[name].absent for name in (provider, baseline)):
            ratios = speed_up(row, results, provider, baseline)
            who = "" if provider == ENGINE else f"{provider} "
            held[f"{who}>= {least:g}x {baseline}"] = ratios is not None and quantiles(ratios).median >= least
    for baseline, most in row.memory.items():
        own, theirs = (results[name].peak(row.phases) if name in results else None for name in (ENGINE, baseline))
        held[f"memory <= {most:g}x {baseline}"] = None not in (own, theirs) and own <= most * theirs
    return held


def records(case: Case, results: Mapping[str, Measurement], device: torch.device) -> list[Record]:
    """Time and peak memory of every provider, the engine's speed against the others, and what is derived from them."""
    where = _where(case.suite, device_name(device))
    made = []
    for row in case.rows:
        common = {"case": row.name, "pass_": row.pass_, **where}
        pairs = [(ENGINE, name) for name in results if name != ENGINE] + [pair for pair in row.needs if isinstance(pair, tuple)]
        for name, result in results.items():
            made += _records_of(row, name, result, common)
        for provider, baseline in dict.fromkeys(pairs):
            if ratios := speed_up(row, results, provider, baseline):
                low, median, high = quantiles(ratios)
                made.append(
                    Record(provider=provider, metric=f"speed against {baseline}", unit="x", value=median, low=low, high=high, **common)
                )
    return made + (records_of(figures, device) if (figures := derived(case, results)) else [])


def derived(case: Case, results: Mapping[str, Measurement]) -> Figures | None:
    """The case's figures; None where it has none, or a provider was wrong."""
    return case.derived(results) if case.derived and not any(result.wrong for result in results.values()) else None


def judged(figures: Figures | None) -> list[bool]:
    """Of the figures that have a limit, whether they hold it."""
    return [figure.holds for figure in figures.figures if figure.limit is not None] if figures else []


def records_of(what: Figures | LeftOut, device: torch.device) -> list[Record]:
    """Figures, and what is left out."""
    if isinstance(what, LeftOut):
        where = _where(what.suite, device_name(device))
        return [Record(case=what.case, provider=ENGINE, metric="time", unit="s", value=None, note=ABSENT + what.reason, **where)]
    where = _where(what.suite, what.device or device_name(device))
    return [
        Record(
            case=what.case,
            provider=figure.provider,
            pass_=what.pass_,
            metric=figure.name,
            unit=figure.unit,
            value=figure.value,
            low=figure.low,
            high=figure.high,
            note=figure.note,
            **where,
        )
        for figure in what.figures
    ]


def _where(suite: str, device: str) -> dict[str, object]:
    return {"suite": suite, "device": device, "versions": versions(), "commit": commit()}


def _records_of(row: Row, name: str, result: Measurement, common: Mapping[str, object]) -> list[Record]:
    if not result.rounds:
        return [Record(provider=name, metric="time", unit="s", value=None, note=result.wrong or ABSENT + result.absent, **common)]
    low, median, high = (value / row.steps for value in quantiles(result.seconds(row.phases)))
    made = [Record(provider=name, metric="time", unit="s", value=median, low=low, high=high, note=ONCE if result.once else "", **common)]
    if (peak := result.peak(row.phases)) is not None:
        made.append(Record(provider=name, metric="peak memory", unit="B", value=peak, **common))
    return made


def case_table(case: Case, results: Mapping[str, Measurement]) -> str:
    """The case's rows, a line for each provider, and what is derived from them."""
    parts = [_row_table(case.suite, row, results) for row in case.rows]
    figures = derived(case, results)
    return "\n\n".join([*parts, *([figures_table(figures)] if figures else [])])


def figures_table(figures: Figures) -> str:
    lines = [["figure", "value", "required", ""]]
    for figure in figures.figures:
        required = "-" if figure.limit is None else f"{'>=' if figure.at_least else '<='} {figure.limit:g}"
        verdict = "" if figure.limit is None else "PASS" if figure.holds else "FAIL"
        name = figure.name if figure.provider == ENGINE else f"{figure.provider}: {figure.name}"
        lines.append([name, written(figure.value, figure.unit), required, verdict])
    return f"{figures.suite}: {figures.case}\n{table(lines)}"


def _row_table(suite: str, row: Row, results: Mapping[str, Measurement]) -> str:
    lines = [["provider", "time", "20 to 80 %", "memory", *(f"vs {name}" for name in BASELINES)]]
    for name, result in results.items():
        if not result.rounds:
            lines.append([name, "wrong" if result.wrong else "absent", *["-"] * (len(lines[0]) - 2)])
            continue
        low, median, high = (value / row.steps for value in quantiles(result.seconds(row.phases)))
        ratios = (speed_up(row, results, name, baseline) for baseline in BASELINES)
        shown = [f"{quantiles(ratio).median:.2f}x" if ratio else "-" for ratio in ratios]
        lines.append([name, seconds(median), f"{seconds(low)} to {seconds(high)}", size(result.peak(row.phases)), *shown])
    required = ", ".join(f"{need}: {'PASS' if held else 'FAIL'}" for need, held in verdicts(row, results).items())
    notes = [f"\n  {name} has no time: {result.wrong or result.absent}" for name, result in results.items() if not result.rounds]
    title, drawn = f"{suite}: {row.name}, {row.pass_}", table(lines, widths=(19, 9, 20, 9, 8, 11))
    return f"{title}\n{drawn}\n  required: {required or 'nothing'}{''.join(notes)}"


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
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.0f} kB"


def written(value: float | None, unit: str) -> str:
    """A figure with its unit; "-" for none."""
    if value is None:
        return "-"
    return seconds(value) if unit == "s" else size(int(value)) if unit == "B" else f"{value:.3g} {unit}".rstrip()
