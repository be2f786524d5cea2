"""Pages that stand alone, light and dark: the frame, charts as SVG, tables. The trainer's report and the benchmarks' are made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 220, 64, 24, 12, 28
COLOURS = 7  # classes c0, c1, ... of curves and bars


def page(title: str, body: str) -> str:
    return PAGE.format(title=escape(title), body=body)


def chart(curves: Mapping[str, Points], title: str, unit: str, axis: str, *, logarithmic: bool = False) -> str:
    """A figure of curves over one axis, named where there are several; "" where there is no point."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    across, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    ticks = powers(low, high) if logarithmic else round_ticks(min(low, 0) if low >= 0 and low < 0.5 * high else low, high)
    places = sorted(set(across)) if logarithmic else sorted({min(across), round((min(across) + max(across)) / 2), max(across)})
    scale = math.log if logarithmic else float
    x = _line(scale(min(across)), scale(max(across)), LEFT, WIDTH - RIGHT)
    y = _line(scale(ticks[0]), scale(ticks[-1]), HEIGHT - BOTTOM, TOP)
    drawn = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(scale(tick)):.1f}" y2="{y(scale(tick)):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y(scale(tick)) + 4:.1f}" class="y">{figure(tick)}</text>'
        for tick in ticks
    )
    drawn += "".join(f'<text x="{x(scale(place)):.1f}" y="{HEIGHT - 8}" class="x">{place:,g}</text>' for place in places)
    drawn += f'<text x="{LEFT - 8}" y="{HEIGHT - 8}" class="axis">{escape(axis)}</text>'
    for index, curve in enumerate(curves.values()):
        drawn += _curve([(x(scale(place)), y(scale(value))) for place, value in curve], index, marked=logarithmic)
    legend = {name: index for index, name in enumerate(curves)} if len(curves) > 1 else {}
    return _figure(title, unit, legend, f"{title} over {axis}", HEIGHT, drawn)


def _line(start: float, end: float, first: float, last: float) -> Callable[[float], float]:
    """A function from [start, end] to [first, last]; the middle where all is one point."""
    return lambda value: first + (last - first) * ((value - start) / (end - start) if end > start else 0.5)


def _curve(points: Points, index: int, marked: bool) -> str:
    dots = (
        "".join(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" class="c{index}"/>' for px, py in points) if marked or len(points) == 1 else ""
    )
    if len(points) < 2:
        return dots
    return f'<polyline class="c{index}" points="{" ".join(f"{px:.1f},{py:.1f}" for px, py in points)}"/>{dots}'


# label, value, low and high, or None where there is one number, what is written beside it
Bar = tuple[str, float, float | None, float | None, str]
LABELS, NUMBERS, STEP, GAP, LETTERS = 262, 80, 20, 16, 38


def bars(groups: Mapping[str, Sequence[Bar]], title: str, remark: str, *, reference: float | None = None) -> str:
    """A figure of horizontal bars, their quantiles as lines; a colour for each group, an empty one's kept free; the bars of one label stand
    together. They start at zero; with a `reference` there, to either side, on a logarithmic axis."""
    rows = [(index, bar) for index, group in enumerate(groups.values()) for bar in group]
    if not rows:
        return ""
    labels = list(dict.fromkeys(bar[0] for _, bar in rows))
    rows.sort(key=lambda row: (labels.index(row[1][0]), row[0]))
    ends = [value for _, bar in rows for value in bar[1:4] if value] + ([reference] if reference else [])
    scale = math.log if reference else float
    across = _line(scale(min(ends) / 1.1) if reference else 0.0, scale(max(ends) * 1.1), LABELS, WIDTH - NUMBERS)
    x = lambda value: across(scale(value))  # noqa: E731
    start = x(reference or 0.0)
    drawn, top, last = "", TOP, None
    for index, (label, value, low, high, said) in rows:
        if label != last:
            top += GAP if last else 0
            drawn += _label(label, top)
            last = label
        drawn += _bar(x, start, top, index % COLOURS, value, low, high, said)
        top += STEP
    axis = f'<line x1="{start:.1f}" x2="{start:.1f}" y1="{TOP - 4}" y2="{top}"/>'
    legend = {name: index for index, name in enumerate(groups) if groups[name]}
    return _figure(title, remark, legend, title, top + 8, drawn + axis)


def _label(text: str, top: float) -> str:
    """At the left of a bar, in two lines where it is long."""
    first, second = text, ""
    if len(text) > LETTERS:
        cut = text.rfind(" ", 0, LETTERS + 1)
        first, second = (text[:cut], text[cut + 1 :]) if cut > 0 else (text[:LETTERS], text[LETTERS:])
    if len(second) > LETTERS:
        second = second[: LETTERS - 1] + "…"
    lines = [(first, top + 13), (second, top + 27)] if second else [(first, top + 13)]
    return "".join(f'<text x="{LABELS - 8}" y="{y}" class="y">{escape(line)}</text>' for line, y in lines)


def _bar(
    x: Callable[[float], float], start: float, top: float, index: int, value: float, low: float | None, high: float | None, said: str
) -> str:
    end, middle = x(value), top + STEP / 2 - 1
    drawn = f'<rect x="{min(start, end):.1f}" y="{top}" width="{max(abs(end - start), 1):.1f}" height="{STEP - 4}" class="c{index}"/>'
    if low and high:
        drawn += f'<line class="range" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{middle}" y2="{middle}"/>'
    return drawn + f'<text x="{WIDTH - 4}" y="{top + 13}" class="y">{escape(said)}</text>'


def _figure(title: str, unit: str, legend: Mapping[str, int], label: str, height: int, drawn: str) -> str:
    names = "".join(f' <span class="c{index % COLOURS}">{escape(name)}</span>' for name, index in legend.items())
    caption = f"<figcaption>{escape(title)} <small>{escape(unit)}</small>{names}</figcaption>"
    return f'<figure>{caption}<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{drawn}</svg></figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML. The table scrolls on its own where the window is narrow."""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return wide(f"<tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{lines}")


def wide(rows: str) -> str:
    return f'<div class="wide"><table>{rows}</table></div>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in pairs)}</dl>"


def round_ticks(low: float, high: float) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, around a range."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def powers(low: float, high: float) -> list[float]:
    """Powers of ten around a range; of two where that is a narrow one."""
    base = 10.0 if high / low > 30 else 2.0
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    return [base**index for index in range(first, max(last, first + 1) + 1)]


def figure(value: float | None) -> str:
    """Four digits that say something."""
    if value is None:
        return "not finite"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{
  --back: #fbfbfa; --text: #1d1f21; --dim: #6b7075; --line: #e2e3e1;
  --first: #2563c9; --second: #c2571a;
  --third: #4d7f2a; --fourth: #8a4fbf; --fifth: #0d8791; --sixth: #b0347c; --good: #1d7a3e; --bad: #b3261e;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --back: #16181a; --text: #e8e8e6; --dim: #9aa0a6; --line: #34383c;
    --first: #7aa7f0; --second: #eb9a62;
  --third: #9bc474; --fourth: #c39be8; --fifth: #62c4cc; --sixth: #ea8bbd; --good: #6fce8f; --bad: #f08a83;
  }}
}}
body {{ margin: 2rem auto; max-width: 84rem; padding: 0 1rem; font: 15px/1.45 system-ui, sans-serif; }}
body {{ background: var(--back); color: var(--text); }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.5rem; }}
main > :not(figure) {{ grid-column: 1 / -1; margin: 0; }}
dl {{ display: flex; flex-wrap: wrap; gap: .5rem 2rem; }}
dt {{ color: var(--dim); font-size: .85rem; }}
dd {{ margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }}
figure {{ margin: 0; }}
figcaption {{ font-weight: 600; }}
figcaption span {{ margin-left: .5rem; white-space: nowrap; }}
figcaption span::before {{ content: "\\25a0\\00a0"; }}
small {{ color: var(--dim); font-weight: 400; }}
svg {{ width: 100%; height: auto; }}
svg line {{ stroke: var(--line); }}
svg text {{ fill: var(--dim); font-size: 12px; font-variant-numeric: tabular-nums; }}
.y, .axis {{ text-anchor: end; }}
.x {{ text-anchor: middle; }}
polyline {{ fill: none; stroke-width: 1.8; stroke-linejoin: round; }}
svg line.range {{ stroke: var(--text); stroke-width: 1.5; }}
.c0 {{ --own: var(--first); }} .c1 {{ --own: var(--second); }} .c2 {{ --own: var(--third); }} .c3 {{ --own: var(--fourth); }}
.c4 {{ --own: var(--fifth); }} .c5 {{ --own: var(--sixth); }} .c6 {{ --own: var(--dim); }}
polyline {{ stroke: var(--own); }} circle, rect {{ fill: var(--own); }} span {{ color: var(--own); }}
.wide {{ overflow-x: auto; }}
main > h2 {{ margin-top: 1.5rem; }}
main > h2 + p {{ color: var(--dim); margin: 0; }}
.charts {{ columns: 30rem 2; column-gap: 1.5rem; }}
.charts figure {{ break-inside: avoid; margin-bottom: 1.5rem; }}
summary {{ cursor: pointer; font-weight: 600; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }}
th, td {{ min-width: 5rem; }}
th {{ color: var(--dim); font-weight: 500; }}
td:first-child {{ overflow-wrap: normal; }}
td img {{ max-width: 120px; max-height: 120px; margin-right: .3rem; border: 1px solid var(--line); }}
.same {{ color: var(--good); }} .other {{ color: var(--bad); }}
</style>
</head>
<body>
<h1>{title}</h1>
<main>
{body}
</main>
</body>
</html>
"""
