"""`report.html`: speed, memory, growth, what a card should and does reach, and where it was measured. One file, nothing loaded."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from idefics2_fast.benchmarks.case import ENGINE
from idefics2_fast.benchmarks.record import ABSENT, RESULTS, Record, read_records
from idefics2_fast.benchmarks.report import seconds, size, written
from idefics2_fast.training.page import Bar, bars, chart, facts, page, table

AGAINST = "speed against "
BOUNDS = {"frozen", "linear layers alone", "memory floor", "2 threads", "avx2"}  # of what is measured beside others, no rivals
SCALING, PAPER = "scaling", "sm90"
FLOOR, PREDICTION, GOAL, MEASURED = "floor", "predicted, unmeasured", "goal", "measured"
POINT = re.compile(r"(?P<axis>.+): (?P<size>[\d.]+)")


def write_report(path: Path, files: Iterable[Path]) -> Path:
    """Writes the page of these files of results; returns it."""
    records = [record for file in files for record in read_records(file)]
    parts = [summary(records), speeds(records), memories(records), growth(records), roofline(records)]
    parts += [resources(), silent(records), everything(records), environment(records)]
    path.write_text(page("idefics2_fast, measured", "\n".join(filter(None, parts))), encoding="utf-8")
    return path


def summary(records: Sequence[Record]) -> str:
    if not records:
        return "<p>Nothing was measured.</p>"
    measured = [record for record in records if record.value is not None]
    suites = {record.suite for record in measured}
    return facts([("figures", f"{len(measured):,}"), ("suites", str(len(suites))), ("devices", str(len({r.device for r in records})))])


def grouped(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """By suite and device."""
    groups = defaultdict(list)
    for record in records:
        groups[record.suite, record.device].append(record)
    return dict(groups)


def heading(text: str, remark: str, figures: Sequence[str]) -> str:
    """A part of the page; "" without figures."""
    return f'<h2>{text}</h2><p>{remark}</p><div class="charts">{"".join(figures)}</div>' if any(figures) else ""


def labels(records: Sequence[Record]) -> dict[tuple[str, str], str]:
    """A name for each case and pass; of a case with one pass its own."""
    passes = defaultdict(set)
    for record in records:
        passes[record.case].add(record.pass_)
    return {(case, way): case + (f", {way}" if len(ways) > 1 else "") for case, ways in passes.items() for way in ways}


def empty() -> dict[str, list[Bar]]:
    """Bars by provider; the first have their colour everywhere."""
    return {name: [] for name in (ENGINE, "hf", "hf-tuned")}


def speeds(records: Sequence[Record]) -> str:
    chosen = [r for r in records if r.metric.startswith(AGAINST) and r.value and r.provider == ENGINE]
    figures = []
    for (suite, device), group in grouped(chosen).items():
        made, named = empty(), labels(group)
        for record in group:
            baseline = record.metric.removeprefix(AGAINST)
            if baseline not in BOUNDS and ENGINE not in baseline:
                bar = (named[record.case, record.pass_], record.value, record.low, record.high, f"{record.value:.2f} x")
                made.setdefault(baseline, []).append(bar)
        figures.append(bars(made, f"{suite}: how many times as fast as", device, reference=1.0))
    return heading("Speed", "Medians of the rounds' ratios; lines from the 20 % to the 80 % quantile. A logarithmic axis.", figures)


def memories(records: Sequence[Record]) -> str:
    figures = []
    for (suite, device), group in grouped(r for r in records if r.metric == "peak memory" and r.value).items():
        made, named = empty(), labels(group)
        for record in group:
            if record.provider not in BOUNDS and suite != SCALING:
                bar = (named[record.case, record.pass_], record.value, None, None, size(int(record.value)))
                made.setdefault(record.provider, []).append(bar)
        figures.append(bars(made, f"{suite}: peak memory", device))
    return heading("Memory", "Beyond what stood before the call: models and inputs.", figures)


def growth(records: Sequence[Record]) -> str:
    figures = []
    for (_, device), group in grouped(r for r in records if r.suite == SCALING).items():
        axes: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        for record in group:
            point = POINT.fullmatch(record.case)
            if point and record.metric == "time" and record.value:
                axes[point["axis"]][record.provider].append((float(point["size"]), record.value * 1e3))
        for axis, curves in axes.items():
            ordered = {provider: sorted(points) for provider, points in curves.items()}
            figures.append(chart(ordered, axis, f"ms; {exponents(group, axis)}; {device}", axis.split()[0], logarithmic=True))
    return heading("Growth", "Time over size, both axes logarithmic; the expected exponent is that of the FLOPs.", figures)


def exponents(records: Sequence[Record], axis: str) -> str:
    found = {(r.provider, r.metric): r.value for r in records if r.case == axis and r.value is not None}
    expected = found.get((ENGINE, "expected exponent"))
    said = [f"{provider} {value:.2f}" for (provider, metric), value in found.items() if metric == "exponent"]
    return "exponent " + ", ".join(said) + (f", expected {expected:.2f}" if expected is not None else "")


def roofline(records: Sequence[Record]) -> str:
    made: dict[str, list[Bar]] = {FLOOR: [], PREDICTION: [], GOAL: [], MEASURED: []}
    for record in records:
        kind = MEASURED if record.metric == "time" else record.metric
        if record.suite == PAPER and record.value and kind in made:
            made[kind].append((record.case, record.value, record.low, record.high, seconds(record.value)))
    remark = "What an H100 cannot beat, what a model predicts of the compiled code, and what was measured, where a card ran."
    return heading("Kernels on an H100", remark, [bars({k: v for k, v in made.items() if v}, "Roofline", "time")])


def resources() -> str:
    kept = json.loads((RESULTS / "sm90-resources.json").read_text())
    rows = []
    for key, row in kept["kernels"].items():
        config = " ".join(f"{name}={value}" for name, value in row["config"].items())
        products = " ".join(f"{shape}:{count}" for shape, count in row["products"].items()) or "-"
        cells = (key.replace("/", ", "), config, row["registers"], row["spills"], f"{row['shared'] / 1024:.0f} KB", row["ctas"], products)
        rows.append([escape(str(cell)) for cell in (*cells, row["instructions"])])
    head = ("kernel", "config", "registers", "spills", "shared", "CTAs an SM", "products", "hot loop")
    shown = f"Compiled by Triton {escape(kept['triton'])} for sm_90; {len(rows)} kernels."
    return f"<details><summary>Resources of the compiled kernels</summary><p>{shown}</p>{table(head, rows)}</details>"


def silent(records: Sequence[Record]) -> str:
    """Who has no time, and why."""
    reasons: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for record in records:
        if record.value is None:
            state = "absent" if record.note.startswith(ABSENT) else "wrong"
            cases = reasons[record.suite, record.provider, f"{state}: {record.note.removeprefix(ABSENT)}"]
            cases += [record.case] if record.case not in cases else []
    rows = [[*map(escape, (suite, provider, reason)), escape("; ".join(cases))] for (suite, provider, reason), cases in reasons.items()]
    return f"<h2>Without a time</h2>{table(('suite', 'provider', 'why', 'cases'), rows)}" if rows else ""


def everything(records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        if r.value is not None:
            numbers = (written(value, r.unit) for value in (r.value, r.low, r.high))
            cells = (r.suite, r.case, r.pass_, r.provider, r.metric, *numbers, r.device)
            rows.append([escape(cell) for cell in cells])
    head = ("suite", "case", "pass", "provider", "metric", "median", "20 %", "80 %", "device")
    return f"<details><summary>All figures</summary>{table(head, rows)}</details>" if rows else ""


def environment(records: Sequence[Record]) -> str:
    """Every device, software and commit that figures come from."""
    places = dict.fromkeys((r.device, ", ".join(f"{name} {version}" for name, version in r.versions.items()), r.commit) for r in records)
    rows = [list(map(escape, place)) for place in places]
    return f"<h2>Environment</h2>{table(('device', 'versions', 'commit'), rows)}" if rows else ""
