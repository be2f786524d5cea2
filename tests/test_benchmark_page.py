"""The benchmarks' page: a page that stands alone, whose bars and curves are where the numbers are."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.browser import CHROMIUM, DARK, LIGHT, Page, drawn

from idefics2_fast.benchmarks import __main__ as command
from idefics2_fast.benchmarks.page import write_report
from idefics2_fast.benchmarks.record import Record, write_records
from idefics2_fast.training.page import bars, chart

WHERE = {"device": "a <processor>", "versions": {"torch": "2.13.0"}, "commit": "abc"}
ONE = Record(suite="encode", case="8 images", provider="idefics2_fast", metric="time", unit="s", value=0.5, **WHERE)


def some_records() -> list[Record]:
    speed = replace(ONE, metric="speed against hf", unit="x", value=4.0, low=3.0, high=5.0)
    made = [ONE, speed, replace(speed, metric="speed against hf-tuned", value=0.8, low=0.7, high=0.9)]
    made += [
        replace(ONE, provider=name, metric="peak memory", unit="B", value=size) for name, size in (("idefics2_fast", 1e7), ("hf", 4e8))
    ]
    made += [replace(ONE, suite="scaling", case=f"patches of an image: {size}", value=size * 1e-4) for size in (729, 1521, 2916)]
    made += [replace(ONE, suite="scaling", case="patches of an image", metric=name, unit="", value=v) for name, v in EXPONENTS.items()]
    paper = replace(ONE, suite="sm90", case="embedding", device="H100 SXM, on paper")
    made += [replace(paper, metric=name, value=value) for name, value in (("floor", 45e-6), ("predicted, unmeasured", 50e-6))]
    made += [replace(paper, device="NVIDIA H100", metric="time", value=60e-6)]
    return [
        *made,
        replace(ONE, provider="liger", value=None, note="absent: not <installed>"),
        replace(ONE, provider="x", value=None, note="off"),
    ]


EXPONENTS = {"exponent": 1.0, "expected exponent": 1.13}


@pytest.fixture
def report(tmp_path: Path) -> Path:
    write_records(tmp_path / "results.jsonl", some_records())
    return write_report(tmp_path / "report.html", [tmp_path / "results.jsonl"])


def test_the_page_stands_alone_and_says_what_was_measured(report: Path) -> None:
    text = report.read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.places == []
    assert not re.search(r"https?://|@import|url\(", text)
    for part in ("4.00 x", "0.80 x", "10.0 MB", "400.0 MB", "exponent idefics2_fast 1.00, expected 1.13", "60.0 us", "45.0 us"):
        assert part in text, part
    for part in ("absent: not &lt;installed&gt;", "wrong: off", "a &lt;processor&gt;", "torch 2.13.0", "abc", "CTAs an SM"):
        assert part in text, part
    assert page.tags.count("svg") == 4


def test_nothing_measured_is_a_page_too(tmp_path: Path) -> None:
    assert "Nothing was measured" in write_report(tmp_path / "report.html", []).read_text()


def test_the_command_writes_it_from_results_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(tmp_path / "results.jsonl", some_records())
    arguments = ["--no-run", "--report", str(tmp_path / "report.html"), "--out", str(tmp_path / "results.jsonl")]
    assert command.main(arguments) == 0
    assert "4.00 x" in (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in capsys.readouterr().out


def svg(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", text, re.DOTALL)[0])


def test_bars_begin_at_the_reference_and_are_as_long_as_their_logarithm() -> None:
    drawn = svg(
        bars(
            {"hf": [("a", 4.0, 2.0, 8.0, "4 x"), ("b", 2.0, None, None, "2 x")], "old": [("a", 0.5, None, None, "-")]},
            "t",
            "x",
            reference=1,
        )
    )
    four, half, two = ((float(r.get("x")), float(r.get("width")), r.get("class")) for r in drawn.iter("rect"))
    assert (four[2], half[2], two[2]) == ("c0", "c1", "c0")
    assert four[1] == pytest.approx(2 * two[1], abs=0.2)
    assert half[1] == pytest.approx(two[1], abs=0.2)
    assert four[0] == pytest.approx(two[0], abs=0.1)
    assert half[0] + half[1] == pytest.approx(two[0], abs=0.2)
    (line,) = drawn.findall("line[@class='range']")
    assert float(line.get("x2")) - float(line.get("x1")) == pytest.approx(four[1], abs=0.2)  # from 2 to 8 as from 1 to 4


def test_bars_without_a_reference_begin_at_zero() -> None:
    drawn = svg(bars({"hf": [("a", 4.0, None, None, "4"), ("b", 1.0, None, None, "1")]}, "t", "B"))
    four, one = (float(rect.get("width")) for rect in drawn.iter("rect"))
    assert four == pytest.approx(4 * one, abs=0.5)


def test_curves_on_logarithmic_axes_are_straight_where_costs_are_powers() -> None:
    curve = [(size, 0.003 * size**2) for size in (1, 2, 4, 64)]
    points = svg(chart({"a": curve}, "t", "ms", "size", logarithmic=True)).find("polyline").get("points").split()
    (x0, y0), *_, (x1, y1) = at = [tuple(map(float, point.split(","))) for point in points]
    for (size, _), (x, y) in zip(curve, at, strict=True):
        assert x == pytest.approx(x0 + (x1 - x0) * math.log(size, 64), abs=0.2)
        assert y == pytest.approx(y0 + (y1 - y0) * math.log(size, 64), abs=0.2)
    assert y1 < y0


def test_long_labels_are_cut_into_two_lines() -> None:
    label = "a case with a very long name indeed, " * 4
    lines = [text.text for text in svg(bars({"hf": [(label, 2.0, None, None, "2 x")]}, "t", "x")).findall("text[@class='y']")]
    assert all(len(line) <= 38 for line in lines)
    assert lines[1].endswith("…")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here to open the page in")
@pytest.mark.parametrize(
    ("scheme", "back", "bar"), [(LIGHT, (251, 251, 250), (37, 99, 201)), (DARK, (22, 24, 26), (122, 167, 240))], ids=["light", "dark"]
)
def test_a_browser_draws_every_plot_in_both_schemes_and_has_nothing_to_say(report: Path, tmp_path: Path, scheme: int, back, bar) -> None:
    colours = drawn(report, scheme, tmp_path, size="1400,2200")
    assert max(colours, key=colours.get) == back
    assert colours[bar] > 500  # bars of the engine and its curve
