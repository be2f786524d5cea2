"""The images suite: files and arrays to patches, beside transformers' two image processors, pillow-simd and OpenCV. One thread each.

`python -m idefics2_fast.benchmarks.images` prints each case and then what must hold. A provider whose output is wrong gets no time: patches
must be those of transformers' PIL processor to the bit; torchvision's within two of 255 levels, as pillow-simd's, whose resize it has.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from idefics2_fast import _C, pack_images
from idefics2_fast.benchmarks.memory_floor import memory_floor
from idefics2_fast.benchmarks.model import Case, Row
from idefics2_fast.benchmarks.record import default_path, device_name, versions, write_records
from idefics2_fast.benchmarks.report import ENGINE, records, seconds, speed_up, table
from idefics2_fast.benchmarks.rivals import Rival, packed
from idefics2_fast.benchmarks.timing import Call, Measurement, Watch, measure, quantiles
from idefics2_fast.images import plan_crops

# (height, width) of the photographs, a page and a thumbnail.
SIZES = ((480, 640), (768, 1024), (1200, 1600), (3508, 2480), (200, 300), (3000, 4000))
PAGE, PHOTO = (3508, 2480), (3000, 4000)
EDGES = {"shortest_edge": 378, "longest_edge": 980}

TWO_THREADS = "2 threads"
AVX2 = "avx2"
HF, TORCHVISION, PILLOW, PILLOW_SIMD, OPENCV, FLOOR = "hf", "hf torchvision", "Pillow", "pillow-simd", "OpenCV, by area", "memory floor"
RIVALS = {TORCHVISION: "torchvision", PILLOW_SIMD: "pillow-simd", OPENCV: "opencv-python-headless"}
SUITE, WORK = "images", ("work",)
LEVELS = 2.001 / 127.5  # two of 255, after normalising


@dataclass(frozen=True)
class Need:
    """What must hold of a case: how many times as fast a provider is as another; for the memory floor, how many times as slow at most."""

    what: str
    provider: str
    baseline: str
    required: float
    aim: float

    def ratio(self, row: Row, results: Mapping[str, Measurement]) -> float | None:
        pair = (self.baseline, self.provider) if self.baseline == FLOOR else (self.provider, self.baseline)
        ratios = speed_up(row, results, *pair)
        return quantiles(ratios).median if ratios else None

    def holds(self, ratio: float) -> bool:
        return ratio <= self.required if self.baseline == FLOOR else ratio >= self.required


@dataclass(frozen=True)
class Suite:
    """What all cases share."""

    photographs: Mapping[tuple[int, int], np.ndarray]
    rivals: Mapping[str, Rival]
    floor: Callable[[np.ndarray, np.ndarray], None]
    folder: Path

    def cases(self) -> Iterator[tuple[Case, Sequence[Need]]]:
        yield files_case(self)
        for size in SIZES:
            yield pack_case(self, [size], split=False)
        yield pack_case(self, SIZES, split=True)
        for size in SIZES:
            if plan_crops(*size, split=False, **EDGES)[0].size != size:
                yield resize_case(self, size)

    def rival_calls(self, names: Sequence[str], images: Sequence[np.ndarray], **settings: Any) -> dict[str, Call]:
        present = [name for name in names if not self.rivals[name].absent]
        return {name: _rival_call(self.rivals[name].prepare(images, **settings)) for name in present}


@contextmanager
def prepared() -> Iterator[Suite]:
    """The suite, its rivals' processes running. Says which there are."""
    with ExitStack() as stack:
        rivals = {name: stack.enter_context(closing(Rival(environment))) for name, environment in RIVALS.items()}
        for name, rival in rivals.items():
            print(f"{name}: {rival.absent or rival.version}")
        yield Suite(photographs(), rivals, memory_floor(), Path(stack.enter_context(tempfile.TemporaryDirectory())))


def photographs() -> dict[tuple[int, int], np.ndarray]:
    """Enlarged photographs, with the noise that a camera adds and a JPEG has to keep."""
    from sklearn.datasets import load_sample_image

    draw = np.random.default_rng(0)
    made = {}
    for number, (height, width) in enumerate(SIZES):
        picture = Image.fromarray(load_sample_image(("china.jpg", "flower.jpg")[number % 2])).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        noise = draw.normal(0, 4, (height, width, 3)).astype(np.float32)
        made[height, width] = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
    return made


def files_case(suite: Suite) -> tuple[Case, Sequence[Need]]:
    """From JPEG files: decoding included, all images split."""
    paths = []
    for (height, width), pixels in suite.photographs.items():
        paths.append(str(suite.folder / f"{width}x{height}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=90)
    name = "files to patches, split batch of six"
    calls = {ENGINE: _pack_call(paths, split=True), TWO_THREADS: _pack_call(paths, split=True, threads=2), HF: _hf_call(paths, split=True)}
    needs = [Need(f"{name}, one thread", ENGINE, HF, 4, 6), Need(f"{name}, two threads", TWO_THREADS, HF, 6, 10)]
    return _case(name, calls, _same_patches(calls[HF]), needs), needs


def pack_case(suite: Suite, sizes: Sequence[tuple[int, int]], split: bool) -> tuple[Case, Sequence[Need]]:
    """From arrays: resize, normalise, pack."""
    images = [suite.photographs[size] for size in sizes]
    calls = {ENGINE: _pack_call(images, split), AVX2: _pack_call(images, split, loops="avx2"), HF: _hf_call(images, split)}
    calls |= suite.rival_calls([TORCHVISION], images, split=split)
    height, width = sizes[0]
    name = f"split batch of all {len(sizes)}" if split else f"resample and pack, {width}x{height}"
    needs = [Need(name, ENGINE, HF, *((30, 40) if split else (20, 28))), Need(name, ENGINE, TORCHVISION, *((22, 33) if split else (8, 13)))]
    needs.append(Need(f"{name}, AVX2", AVX2, HF, 5, 14))
    if not split and sizes[0] in (PAGE, PHOTO):
        out = torch.ones(sum(rows * columns for rows, columns in (crop.grid for crop in plan_crops(*sizes[0], split=False, **EDGES))), 588)
        calls[FLOOR] = _timed(lambda: suite.floor(images[0], out.numpy()))
        needs.append(Need(f"{name}, time over the memory floor", ENGINE, FLOOR, 2.5, 1.4))
    if not split and sizes[0] == PHOTO:
        calls[TWO_THREADS] = _pack_call(images, split, threads=2)
        needs.append(Need(f"{name}, two threads against one", TWO_THREADS, ENGINE, 1.5, 1.85))
    return _case(name, calls, _same_patches(calls[HF]), needs), needs


def resize_case(suite: Suite, size: tuple[int, int]) -> tuple[Case, Sequence[Need]]:
    """Bytes to bytes. This engine's come out as patches, the others' as images."""
    pixels = suite.photographs[size]
    image = Image.fromarray(pixels)
    plan = plan_crops(*size, split=False, **EDGES)[0]
    height, width = plan.size
    calls = {
        ENGINE: _pack_call([pixels], dtype=torch.uint8),
        PILLOW: _timed(lambda: image.resize((width, height), Image.Resampling.BILINEAR)),
    }
    calls |= suite.rival_calls([PILLOW_SIMD, OPENCV], [pixels], size=plan.size)
    expected = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))

    def check(name: str, output: Any) -> str:
        if name == ENGINE:
            same = torch.equal(output, pack_images([expected], dtype=torch.uint8, shortest_edge=1, longest_edge=10**5).patches)
            return "" if same else "other bytes than Pillow's"
        resized = output() if callable(output) else np.asarray(output)
        if resized.shape != expected.shape:
            return f"shape {resized.shape}, expected {expected.shape}"
        off = int(np.abs(resized.astype(np.int16) - expected).max())
        allowed = {PILLOW: 0, PILLOW_SIMD: 2, OPENCV: 255}[name]  # a mean over areas is another resize
        return "" if off <= allowed else f"off by {off} levels, {allowed} are allowed"

    name = f"resize alone, {size[1]}x{size[0]}"
    needs = [Need(name, ENGINE, PILLOW_SIMD, 1.5, 3.5)]
    return _case(name, calls, check, needs), needs


def _case(name: str, calls: Mapping[str, Call], check: Callable[[str, Any], str], needs: Sequence[Need]) -> Case:
    least = {
        need.baseline: need.required for need in needs if need.provider == ENGINE and need.baseline in calls and need.baseline != FLOOR
    }
    return Case(SUITE, calls, check, (Row(name, WORK, needs=least),))


def _timed(work: Callable[[], Any]) -> Call:
    def call(watch: Watch) -> Any:
        watch.start("work")
        return work()

    return call


def _pack_call(
    images: Sequence[Any], split: bool = False, threads: int = 1, dtype: torch.dtype = torch.float32, loops: str | None = None
) -> Call:
    """This engine, into a buffer that is used again."""
    out = torch.ones_like(pack_images(images, split=split, dtype=dtype).patches)
    unforced = _C.simd()

    def call(watch: Watch) -> torch.Tensor:
        _C.use_simd(loops or unforced)
        watch.start("work")
        patches = pack_images(images, split=split, dtype=dtype, threads=threads, out=out).patches
        watch.stop()
        _C.use_simd(unforced)
        return patches

    return call


def _hf_call(images: Sequence[Any], split: bool) -> Call:
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    return _timed(partial(Idefics2ImageProcessorPil(), [list(images)], do_image_splitting=split, return_tensors="np"))


def _rival_call(job: Rival.Job) -> Call:
    def call(watch: Watch) -> Callable[[], np.ndarray]:
        watch.seconds["work"] += job.seconds()
        return job.output

    return call


def _same_patches(hf: Call) -> Callable[[str, Any], str]:
    """A check of patches against those of transformers' PIL processor."""
    theirs = hf(Watch(torch.device("cpu")))
    expected = packed(theirs["pixel_values"], theirs["pixel_attention_mask"])

    def check(name: str, output: Any) -> str:
        if name in (HF, FLOOR):
            return ""
        patches = output() if callable(output) else output.numpy()
        if patches.shape != expected.shape:
            return f"shape {patches.shape}, expected {expected.shape}"
        if name == TORCHVISION:
            off = float(np.abs(patches - expected).max())
            return "" if off <= LEVELS else f"off by {off * 127.5:.1f} levels, 2 are allowed"
        return "" if np.array_equal(patches, expected) else "not the bits of transformers' PIL processor"

    return check


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where a provider's output was wrong or a requirement that was measured does not hold."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    print(f"{device_name(device)}, {len(os.sched_getaffinity(0))} CPUs, loops: {_C.simd()}; {versions()}")
    summary = [["what must hold", "against", "required", "aim", "measured", ""]]
    failed = False
    with prepared() as suite:
        for case, needs in suite.cases():
            results = measure(case.calls, case.check, device=device, seconds=options.seconds, rounds=(5, 40), title=case.rows[0].name)
            print(f"\n{_table(case.rows[0], results)}", flush=True)
            summary += [_line(need, case.rows[0], results, suite.rivals) for need in needs]
            failed |= any(result.wrong for result in results.values())
            if not options.seconds < 2:
                write_records(options.out or default_path(device), records(case, results, device))
    print(f"\n{table(summary)}")
    return int(failed or any(line[-1] == "FAIL" for line in summary))


def _line(need: Need, row: Row, results: Mapping[str, Measurement], rivals: Mapping[str, Rival]) -> list[str]:
    ratio = need.ratio(row, results)
    limits = [f"{'<=' if need.baseline == FLOOR else '>='} {need.required:g} x", f"{need.aim:g} x"]
    if ratio is not None:
        return [need.what, need.baseline, *limits, f"{ratio:.2f} x", "pass" if need.holds(ratio) else "FAIL"]
    absent = need.baseline in rivals and rivals[need.baseline].absent
    return [need.what, need.baseline, *limits, "-", "absent" if absent else "FAIL"]


def _table(row: Row, results: Mapping[str, Measurement]) -> str:
    lines = [["provider", "time", "20 to 80 %", f"{ENGINE} against it"]]
    for name, result in results.items():
        if result.wrong:
            lines.append([name, "wrong", result.wrong, "-"])
            continue
        low, median, high = quantiles(result.seconds(WORK))
        ratio = speed_up(row, results, ENGINE, name)
        lines.append([name, seconds(median), f"{seconds(low)} to {seconds(high)}", f"{quantiles(ratio).median:.2f}x" if ratio else "-"])
    return f"images: {row.name}\n{table(lines)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m idefics2_fast.benchmarks.images", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each case may take; under 2 nothing is kept")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines to add to, by default results/<device>.jsonl in this package")
    return parser


if __name__ == "__main__":
    sys.exit(main())
