"""The report of a run: a page that stands alone, curves where the numbers are, answers beside what was expected."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from support.browser import CHROMIUM, Page, drawn

from idefics2_fast.training import page, report
from idefics2_fast.training.recipe import instruct
from idefics2_fast.training.report import Answer, write_report
from idefics2_fast.training.samples import Sample, Turn
from idefics2_fast.training.sources import Rejection, open_source

RECIPE = instruct("a <model>", "data.jsonl", "out", rank=8)


def write_metrics(folder: Path, steps: int) -> None:
    records = [
        {
            "step": step,
            "loss": 4 - 3 * step / steps,
            "lr": 1e-4,
            "grad_norm": 0.5,
            "tokens": 100,
            "images": 2,
            "seconds": 0.5,
            "tokens_per_s": 200.0,
        }
        | {"data_wait": 0.25, "memory_bytes": 10**9, "fill_tokens": 0.9, "fill_patches": 0.8}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, "JPEG")
    return buffer.getvalue()


def test_the_page_stands_alone_and_shows_all_parts(tmp_path):
    write_metrics(tmp_path, 50)
    (tmp_path / "events.jsonl").write_text(json.dumps({"time": 0.0, "step": 7, "event": "skip", "reason": "loss <nan>"}) + "\n")
    answers = [Answer("what is <image> ?", "a <b>", "a <b>", (jpeg(),)), Answer("q", "yes", "no", ()), Rejection("k", "line 9: bad")]
    text = write_report(tmp_path, RECIPE, answers).read_text()
    page = Page(text)
    assert all(place.startswith("data:image/jpeg;base64,") for place in page.places)
    assert not {"script", "link"} & set(page.tags)
    assert page.tags.count("svg") == page.tags.count("figure") == 6
    assert "prefers-color-scheme: dark" in text
    for part in (
        "1 of 2 answers",
        "a &lt;b&gt;",
        "line 9: bad",
        "loss &lt;nan&gt;",
        "a &lt;model&gt;",
        RECIPE.digest(),
        "set here",
        "25.0%",
    ):
        assert part in text, part
    assert Image.open(io.BytesIO(base64.b64decode(page.places[0].split(",")[1]))).size == (8, 6)


def test_curves_are_where_the_numbers_are(tmp_path):
    write_metrics(tmp_path, 50)
    text = write_report(tmp_path, RECIPE).read_text()
    loss = ElementTree.fromstring(re.search(r"<svg.*?</svg>", text, re.DOTALL)[0])
    points = [tuple(map(float, pair.split(","))) for pair in loss.find("polyline").get("points").split()]
    assert len(points) == 50
    lines = {label.text: float(line.get("y1")) for line, label in zip(loss.iter("line"), loss.findall("text[@class='y']"), strict=True)}
    (top, y_top), (low, y_low) = max((float(k), v) for k, v in lines.items()), min((float(k), v) for k, v in lines.items())
    for step, (x, y) in enumerate(points, 1):
        assert x == pytest.approx(page.LEFT + (page.WIDTH - page.LEFT - page.RIGHT) * (step - 1) / 49, abs=0.1)
        assert y_low + (4 - 3 * step / 50 - low) / (top - low) * (y_top - y_low) == pytest.approx(y, abs=0.1)


def test_long_runs_are_averaged_and_short_ones_are_points(tmp_path):
    write_metrics(tmp_path, 5000)
    text = write_report(tmp_path, RECIPE).read_text()
    assert all(len(points.split()) <= report.POINTS for points in re.findall(r'points="(.*?)"', text))
    write_metrics(tmp_path, 1)
    assert write_report(tmp_path, RECIPE).read_text().count("<circle") == 7
    (tmp_path / "metrics.jsonl").unlink()
    assert "No step was done" in write_report(tmp_path, RECIPE).read_text()


TORN = [b'{"step": 3, "lo', b"\0\0\0", b"\xff\xfe", b"5", b"[]", b"{}", b'{"step": null}', b"[" * 100_000]


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
@pytest.mark.parametrize("torn", TORN, ids=range(len(TORN)))
def test_a_torn_line_costs_itself(tmp_path, name, torn):
    write_metrics(tmp_path, 6)
    event = json.dumps({"time": 0.0, "step": 2, "event": "skip", "reason": "no number"})
    (tmp_path / "events.jsonl").write_text(f"{event}\n" * 3)
    lines = (tmp_path / name).read_bytes().splitlines(keepends=True)
    lines[1] = torn + b"\n"
    (tmp_path / name).write_bytes(b"".join(lines)[:-2])  # the last one, too
    text = write_report(tmp_path, RECIPE).read_text()
    assert f"2 of the lines of {name} cannot be read and are left out: 2, {len(lines)}." in text
    assert text.count("no number") == (1 if name == "events.jsonl" else 3)
    assert "<svg" in text


def test_a_line_without_a_number_is_read(tmp_path):
    write_metrics(tmp_path, 3)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    records[2]["loss"] = records[1]["grad_norm"] = None
    records[0].pop("lr")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = write_report(tmp_path, RECIPE).read_text()
    assert "not finite" in text
    assert "cannot be read" not in text


@pytest.mark.parametrize("row", ["missing", "damaged", "no answer", "anything"])
def test_a_row_held_out_that_fails_costs_its_line(tmp_path, monkeypatch, row):
    talk = [{"user": "?", "assistant": "!"}]
    (tmp_path / "damaged.png").write_bytes(jpeg()[:40])
    bad = {"missing": {"images": [str(tmp_path / "gone.png")], "texts": talk}, "damaged": {"images": [str(tmp_path / "damaged.png")]}}
    bad |= {"no answer": {"messages": [{"role": "user", "content": "?"}]}, "anything": {"texts": talk}}
    source = open_source([{"texts": talk}, {"texts": talk} | bad[row], {"texts": talk}])

    def answer(model, processor, sample):
        if row == "anything" and sample.key == "1":
            raise RecursionError
        list(map(report._thumbnail, sample.images))
        return Answer("?", "!", "!", ())

    if row != "no answer":
        monkeypatch.setattr(report, "_answer", answer)
    else:
        (sample,) = [Sample("1", (Turn("user", ("?",)),))]
        with pytest.raises(ValueError, match="no answer"):
            report._answer(None, None, sample)
        return
    answers = [report._attempt(source, number, lambda sample: report._answer(None, None, sample)) for number in range(3)]
    assert [type(each).__name__ for each in answers] == ["Answer", "Rejection", "Answer"]
    assert "row 1: " in answers[1].reason
    assert "1 of 2" not in write_report(tmp_path, RECIPE, answers).read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here to open the page in")
@pytest.mark.parametrize(("scheme", "back", "line"), [(1, (251, 251, 250), (37, 99, 201)), (0, (22, 24, 26), (122, 167, 240))], ids=str)
def test_a_browser_draws_the_page_in_both_schemes_and_has_nothing_to_say(tmp_path, scheme, back, line):
    write_metrics(tmp_path, 50)
    colours = drawn(write_report(tmp_path, RECIPE, [Answer("q", "yes", "no", (jpeg(),))]), scheme, tmp_path)
    assert max(colours, key=colours.get) == back
    assert colours[line] > 500  # the curves


def test_figures_are_short() -> None:
    shown = {0.0: "0", 5e-5: "5e-5", 1e-4: "1e-4", 1.234e-4: "1.234e-4", 0.00125: "0.00125", 0.75: "0.75", 1234.5: "1,234", -2e-4: "-2e-4"}
    assert {value: page.figure(value) for value in shown} == shown
    assert page.figure(None) == "not finite"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.98), (1.2e-5, 1e-4), (5, 5), (0, 0), (-3, 2), (99_000, 101_500)])
def test_ticks_are_round_and_enclose_the_range(low, high):
    ticks = page.round_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 6
    mantissa = f"{ticks[1] - ticks[0]:.0e}"[0]
    assert mantissa in "125"


def test_write_report_of_lines_that_people_and_crashes_leave(tmp_path):
    """Numbers beyond a float, and names of files that are not UTF-8: the report is written, the lines before it too."""
    write_metrics(tmp_path, 3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": {"9" * 400}, "tokens": 1, "images": 1, "seconds": 1, "data_wait": 0, "memory_bytes": 1}}\n')
    events = [{"step": 10**400, "event": "skip"}, {"step": 1, "event": "skip", "reason": "row \udcff.jsonl:1", "samples": ["\udcff:1"]}]
    (tmp_path / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    text = write_report(tmp_path, RECIPE).read_text()
    assert "1 of the lines of metrics.jsonl cannot be read and are left out: 4." in text
    assert "1 of the lines of events.jsonl cannot be read and are left out: 1." in text
    assert "row \\udcff.jsonl:1" in text


def test_write_report_on_a_full_disk(tmp_path, monkeypatch):
    """The report of before stands."""
    write_metrics(tmp_path, 3)
    before = write_report(tmp_path, RECIPE).read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    write_metrics(tmp_path, 5)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, RECIPE)
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]
