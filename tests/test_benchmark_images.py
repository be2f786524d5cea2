"""The images suite: what it compares, and what it says when something is missing or wrong."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.hf_images import hf_patches
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from idefics2_fast.benchmarks import images, rivals
from idefics2_fast.benchmarks.images import FLOOR, HF, TORCHVISION, TWO_THREADS, Suite
from idefics2_fast.benchmarks.memory_floor import memory_floor
from idefics2_fast.benchmarks.report import verdicts
from idefics2_fast.benchmarks.rivals import Rival, packed
from idefics2_fast.benchmarks.timing import Measurement, Watch


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_transformers_images_are_packed_as_the_engines() -> None:
    sources = [noise(768, 1024), noise(300, 200)]
    out = Idefics2ImageProcessorPil()([sources], do_image_splitting=True, return_tensors="np")
    ours = torch.from_numpy(packed(out["pixel_values"], out["pixel_attention_mask"]))
    assert torch.equal(ours, hf_patches(sources, split=True))


def test_the_memory_floor_writes_every_byte() -> None:
    source, out = np.ones(10_000, np.uint8), torch.zeros(1000, 588).numpy()
    memory_floor()(source, out)
    assert (out.view(np.uint8) == 1).all()


def test_a_missing_rival_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rivals, "ENVIRONMENTS", tmp_path)
    rival = Rival("pillow-simd")
    assert "make rivals" in rival.absent
    rival.close()


def test_a_rival_that_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Here Pillow itself, in pillow-simd's place."""
    (tmp_path / "pillow-simd" / "bin").mkdir(parents=True)
    python = tmp_path / "pillow-simd" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(rivals, "ENVIRONMENTS", tmp_path)
    assert "this is Pillow" in Rival("pillow-simd").absent


def test_a_rival_is_timed_and_its_output_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "opencv-python-headless" / "bin").mkdir(parents=True)
    (tmp_path / "cv2.py").write_text(
        "__version__, INTER_AREA = '1', 3\nsetNumThreads = print\ndef resize(a, size, interpolation): return a[:size[1], :size[0]]"
    )
    python = tmp_path / "opencv-python-headless" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(rivals, "ENVIRONMENTS", tmp_path)
    rival = Rival("opencv-python-headless")
    job = rival.prepare([noise(50, 60)], size=(20, 30))
    assert (rival.absent, rival.version) == ("", "1")
    assert 0 < job.seconds() < 1
    assert np.array_equal(job.output(), noise(50, 60)[:20, :30])
    rival.close()


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.setattr(rivals, "ENVIRONMENTS", tmp_path)
    sizes = ((480, 640), (900, 400))
    monkeypatch.setattr(images, "SIZES", sizes)
    monkeypatch.setattr(images, "PHOTO", sizes[1])
    absent = {name: Rival(environment) for name, environment in images.RIVALS.items()}
    return Suite({size: noise(*size) for size in sizes}, absent, memory_floor(), tmp_path)


def test_every_provider_is_right_in_every_case(suite: Suite) -> None:
    for case in suite.cases():
        for name, call in case.calls.items():
            with torch.inference_mode():
                assert case.check(name, call(Watch(torch.device("cpu")))) == "", f"{case.rows[0].name}, {name}"
        assert {pair[0] for pair in case.rows[0].needs if isinstance(pair, tuple)} <= set(case.calls)
        assert (case.device, case.threads) == (torch.device("cpu"), 1)


def test_wrong_patches_are_seen(suite: Suite) -> None:
    case = next(suite.cases())
    right = case.calls[images.ENGINE](Watch(torch.device("cpu")))
    off = right.clone()
    off[7, 7] += 1 / 127.5
    assert case.check(images.ENGINE, right) == ""
    assert "not the bits" in case.check(images.ENGINE, off)
    assert "shape" in case.check(images.ENGINE, right[1:])
    assert case.check(TORCHVISION, off.numpy) == ""
    off[7, 7] += 3 / 127.5
    assert "off by 4.0 levels" in case.check(TORCHVISION, off.numpy)


def test_the_floor_is_not_to_be_passed_by_far_and_others_are_to_be_beaten(suite: Suite) -> None:
    (row,) = images.pack_case(suite, [images.PHOTO], split=False).rows
    taken = {images.ENGINE: 2.0, FLOOR: 1.0, HF: 50.0, images.AVX2: 5.0, TWO_THREADS: 1.5}
    results = {name: Measurement(rounds=[{"work": seconds}]) for name, seconds in taken.items()}
    results[TORCHVISION] = Measurement(absent="not here")
    expected = {">= 18x hf": True, "avx2 >= 5x hf": True, ">= 0.4x memory floor": True, "2 threads >= 1.5x idefics2_fast": False}
    if images._C.simd() == images.VNNI:
        expected[">= 1x avx2"] = True
    assert verdicts(row, results) == expected
    assert not verdicts(row, results | {FLOOR: Measurement(rounds=[{"work": 0.7}])})[">= 0.4x memory floor"]


def test_rivals_that_are_missing_are_named(suite: Suite) -> None:
    case = images.resize_case(suite, images.PHOTO)
    assert set(case.absent) == {images.PILLOW_SIMD, images.OPENCV}
    assert "make rivals" in case.absent[images.OPENCV]
