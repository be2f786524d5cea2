"""The images suite: files and arrays to patches, beside transformers' two image processors, pillow-simd and OpenCV. One thread each.

A provider whose output is wrong gets no time: patches must be those of transformers' PIL processor to the bit; torchvision's within two of
255 levels, as pillow-simd's, whose resize it has.
"""

from __future__ import annotations

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
from idefics2_fast.benchmarks.case import CPU, ENGINE, Case, Row, Scope
from idefics2_fast.benchmarks.memory_floor import memory_floor
from idefics2_fast.benchmarks.photographs import photograph
from idefics2_fast.benchmarks.rivals import Rival, packed
from idefics2_fast.benchmarks.timing import Call, Watch
from idefics2_fast.images import plan_crops

# (height, width) of the photographs, a page and a thumbnail.
SIZES = ((480, 640), (768, 1024), (1200, 1600), (3508, 2480), (200, 300), (3000, 4000))
PAGE, PHOTO, THUMBNAIL = (3508, 2480), (3000, 4000), (200, 300)
EDGES = {"shortest_edge": 378, "longest_edge": 980}

TWO_THREADS = "2 threads"
AVX2, VNNI = "avx2", "vnni"
HF, TORCHVISION, PILLOW, PILLOW_SIMD, OPENCV, FLOOR = "hf", "hf torchvision", "Pillow", "pillow-simd", "OpenCV, by area", "memory floor"
RIVALS = {TORCHVISION: "torchvision", PILLOW_SIMD: "pillow-simd", OPENCV: "opencv-python-headless"}
SUITE, WORK = "images", ("work",)
LEVELS = 2.001 / 127.5  # two of 255, after normalising
OVER_FLOOR = 2.5  # times what moving the bytes takes, at most

Needs = Mapping[str | tuple[str, str], float]


def cases(scope: Scope) -> Iterator[Case]:
    """The suite's cases; of a quick run one photograph."""
    with prepared(scope.quick) as suite:
        yield from scope.first(suite.cases())


@dataclass(frozen=True)
class Suite:
    """What all cases share."""

    photographs: Mapping[tuple[int, int], np.ndarray]
    rivals: Mapping[str, Rival]
    floor: Callable[[np.ndarray, np.ndarray], None]
    folder: Path

    def cases(self) -> Iterator[Case]:
        for size in SIZES:
            yield pack_case(self, [size], split=False)
        yield pack_case(self, SIZES, split=True)
        yield files_case(self)
        for size in SIZES:
            if plan_crops(*size, split=False, **EDGES)[0].size != size:
                yield resize_case(self, size)

    def absent(self, rival: str) -> str:
        """Why a rival takes no part; "" where it does."""
        return self.rivals[rival].absent if rival in self.rivals else "it is not started in quick runs"

    def rival_calls(self, names: Sequence[str], images: Sequence[np.ndarray], **settings: Any) -> dict[str, Call]:
        present = [name for name in names if not self.absent(name)]
        return {name: _rival_call(self.rivals[name].prepare(images, **settings)) for name in present}

    def case(
        self, name: str, calls: Mapping[str, Call], check: Callable[[str, Any], str], needs: Needs, rivals: Sequence[str] = ()
    ) -> Case:
        absent = {name: self.absent(name) for name in rivals if self.absent(name)}
        return Case(SUITE, calls, check, (Row(name, WORK, needs=needs),), absent, device=CPU, threads=1)


@contextmanager
def prepared(quick: bool = False) -> Iterator[Suite]:
    """The suite, its rivals' processes running; of a quick run the first photograph, and no rivals, which take seconds to start."""
    with ExitStack() as stack:
        started = {} if quick else RIVALS
        rivals = {name: stack.enter_context(closing(Rival(environment))) for name, environment in started.items()}
        pictures = photographs(SIZES[:1] if quick else SIZES)
        yield Suite(pictures, rivals, memory_floor(), Path(stack.enter_context(tempfile.TemporaryDirectory())))


def photographs(sizes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], np.ndarray]:
    """Enlarged photographs, with the noise that a camera adds and a JPEG has to keep."""
    draw = np.random.default_rng(0)
    made = {}
    for number, (height, width) in enumerate(sizes):
        with Image.open(photograph(("china.jpg", "flower.jpg")[number % 2])) as original:
            picture = original.resize((width, height), Image.Resampling.BICUBIC)
        noise = draw.normal(0, 4, (height, width, 3)).astype(np.float32)
        made[height, width] = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
    return made


def files_case(suite: Suite) -> Case:
    """From JPEG files: decoding included, all images split."""
    paths = []
    for (height, width), pixels in suite.photographs.items():
        paths.append(str(suite.folder / f"{width}x{height}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=90)
    name = "files to patches, split batch of six"
    calls = {ENGINE: _pack_call(paths, split=True), TWO_THREADS: _pack_call(paths, split=True, threads=2), HF: _hf_call(paths, split=True)}
    return suite.case(name, calls, _same_patches(calls[HF]), {HF: 4, (TWO_THREADS, HF): 6})


def pack_case(suite: Suite, sizes: Sequence[tuple[int, int]], split: bool) -> Case:
    """From arrays: resize, normalise, pack."""
    images = [suite.photographs[size] for size in sizes]
    calls = {ENGINE: _pack_call(images, split), AVX2: _pack_call(images, split, loops="avx2"), HF: _hf_call(images, split)}
    calls |= suite.rival_calls([TORCHVISION], images, split=split)
    height, width = sizes[0]
    name = f"split batch of all {len(sizes)}" if split else f"resample and pack, {width}x{height}"
    speed = 30 if split else 12 if sizes[0] == THUMBNAIL else 18
    needs: dict[str | tuple[str, str], float] = {HF: speed, TORCHVISION: 22 if split else 8, (AVX2, HF): 5}
    if _C.simd() == VNNI:
        needs[AVX2] = 1
    if not split and sizes[0] in (PAGE, PHOTO):
        out = torch.ones(sum(rows * columns for rows, columns in (crop.grid for crop in plan_crops(*sizes[0], split=False, **EDGES))), 588)
        calls[FLOOR] = _timed(lambda: suite.floor(images[0], out.numpy()))
        needs[FLOOR] = 1 / OVER_FLOOR
    if not split and sizes[0] == PHOTO:
        calls[TWO_THREADS] = _pack_call(images, split, threads=2)
        needs[TWO_THREADS, ENGINE] = 1.5
    return suite.case(name, calls, _same_patches(calls[HF]), needs, [TORCHVISION])


def resize_case(suite: Suite, size: tuple[int, int]) -> Case:
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

    return suite.case(f"resize alone, {size[1]}x{size[0]}", calls, check, {PILLOW_SIMD: 1.5}, [PILLOW_SIMD, OPENCV])


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
