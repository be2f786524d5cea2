"""Threads: the C++ pool alone, and `pack_images` from many threads, after a fork, beside torch's, with errors."""

import io
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.memory import survives

from idefics2_fast import _C, images, pack_images

ROOT = Path(__file__).parents[1]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def jpeg(height: int, width: int, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(noise(height, width, seed)).save(stream, "JPEG")
    return stream.getvalue()


BATCH = [jpeg(700, 900, 1), noise(1000, 1100), jpeg(500, 400, 2), Image.fromarray(noise(450, 1300)), jpeg(30, 50, 3)]


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return pack_images(BATCH, split=True, threads=1).patches


# --- the pool alone ---


@pytest.mark.parametrize("sanitizer", ["none", pytest.param("thread", marks=pytest.mark.slow)])
def test_the_pool(sanitizer: str, tmp_path: Path) -> None:
    """Every task once, errors to the caller, nested calls, many callers, forks, and no time spent in waiting."""
    compiler = os.environ.get("CXX") or "g++"
    program = tmp_path / "pool_check"
    options = ["-fsanitize=thread"] if sanitizer == "thread" else []
    sources = [ROOT / "tests" / "support" / "pool_check.cpp", ROOT / "csrc" / "pool.cpp"]
    build = [
        *compiler.split(),
        "-std=c++17",
        "-O1",
        "-g",
        "-pthread",
        *options,
        f"-I{ROOT / 'csrc'}",
        *map(str, sources),
        "-o",
        str(program),
    ]
    made = subprocess.run(build, capture_output=True, text=True, check=False)
    if options and made.returncode:
        pytest.skip(f"this compiler has no thread sanitizer: {made.stderr[-200:]}")
    assert made.returncode == 0, made.stderr
    command = [str(program), *options]
    if options and shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # the sanitizer does not know the layout of memory that newer kernels draw
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if options and "FATAL: ThreadSanitizer" in ran.stderr:
        pytest.skip(ran.stderr[:200])
    assert (ran.stdout, ran.returncode) == ("all holds\n", 0), ran.stdout + ran.stderr


# --- packing on threads ---


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_any_number_of_threads_gives_the_same(threads: int, dtype: torch.dtype, expected: torch.Tensor) -> None:
    if dtype != torch.uint8:
        expected = pack_images(BATCH, split=True, dtype=dtype, threads=1).patches
    assert torch.equal(pack_images(BATCH, split=True, dtype=dtype, threads=threads).patches, expected)


def test_one_image_on_many_threads_gives_the_same() -> None:
    """Here the threads share an image, and rows are resized twice where their parts meet."""
    for size in ((2000, 3000), (3000, 700), (378, 378)):
        alone = pack_images([noise(*size)], threads=1).patches
        for threads in (2, 3, 7):
            assert torch.equal(pack_images([noise(*size)], threads=threads).patches, alone)


def test_many_python_threads_at_once(expected: torch.Tensor) -> None:
    with ThreadPoolExecutor(8) as executor:
        made = [executor.submit(pack_images, BATCH, split=True, threads=threads) for threads in (1, 2, 3, 4) * 3]
        for future in made:
            assert torch.equal(future.result(timeout=120).patches, expected)


def test_after_a_fork(expected: torch.Tensor) -> None:
    """As a DataLoader's workers are made, while this process's own threads exist and work."""
    pack_images([noise(2000, 3000)], threads=3)
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            pack_images([noise(300, 400)], threads=3)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        assert survives(lambda: check_equal(pack_images([noise(2000, 3000)], threads=3).patches), seconds=60)
    finally:
        stop.set()
        busy.join()


def check_equal(patches: torch.Tensor) -> None:
    alone = pack_images([noise(2000, 3000)], threads=1).patches
    np.testing.assert_array_equal(patches.numpy(), alone.numpy())  # torch's own threads do not work after a fork


class Identity(torch.autograd.Function):
    """Packs images in the backward, which runs in a thread of torch's."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        Identity.packed = pack_images(BATCH, split=True, threads=3).patches
        return gradient


def test_within_torchs_threads(expected: torch.Tensor) -> None:
    x = torch.ones(300, 300, requires_grad=True)
    (Identity.apply(x @ x) @ x).sum().backward()
    assert torch.equal(Identity.packed, expected)


def test_beside_torchs_threads(expected: torch.Tensor) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    stop = threading.Event()

    def multiply() -> None:
        x = torch.ones(256, 256)
        while not stop.is_set():
            x @ x

    busy = threading.Thread(target=multiply)
    busy.start()
    try:
        assert torch.equal(pack_images(BATCH, split=True, threads=2).patches, expected)
    finally:
        stop.set()
        busy.join()
        torch.set_num_threads(before)


def test_python_runs_on_while_pixels_are_resized() -> None:
    """The lock is released: a resize of a second leaves another thread its turns."""
    pixels = noise(3000, 4000)
    out = np.zeros((3640 * 12, 588), np.uint8)
    crops = [((0, 0, 3000, 4000), (735, 980))] * 12
    turns, stop = [], threading.Event()

    def count() -> None:
        while not stop.wait(0.001):
            turns.append(time.monotonic())

    counter = threading.Thread(target=count)
    counter.start()
    begin = time.monotonic()
    _C.pack_patches(pixels, crops, out, None, images.PASS_ORDER, 1)
    end = time.monotonic()
    stop.set()
    counter.join()
    assert sum(begin < turn < end for turn in turns) >= 3


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_first_bad_image_is_named(threads: int) -> None:
    """Whichever thread fails first. The files are found out when they are decoded, after those before them are written."""
    bad = jpeg(600, 700)[:9000]
    with pytest.raises(ValueError, match=r"^image 2: the file of 9000 bytes cannot be decoded: .*truncated"):
        pack_images([BATCH[0], BATCH[1], bad, bad, BATCH[0]], threads=threads)


def test_files_are_decoded_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images wait for each other within the decoder: one thread alone would never get through."""
    meeting = threading.Barrier(2, timeout=30)
    transpose = images.ImageOps.exif_transpose

    def wait(image: Image.Image, **options: bool) -> None:
        meeting.wait()
        transpose(image, **options)

    monkeypatch.setattr(images.ImageOps, "exif_transpose", wait)
    pack_images([BATCH[0], BATCH[2]], threads=2)


# --- the number of threads ---


def test_the_number_of_threads() -> None:
    assert _C.num_threads() == len(os.sched_getaffinity(0))
    try:
        images.set_num_threads(3)
        assert _C.num_threads() == 3
    finally:
        images.set_num_threads(len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2"])
def test_bad_numbers_of_threads(threads: object) -> None:
    for call in (lambda: images.set_num_threads(threads), lambda: pack_images([], threads=threads)):
        with pytest.raises(ValueError, match=rf"threads is {threads!r}, expected 1 or more"):
            call()
