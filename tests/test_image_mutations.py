"""Damaged files of every format: a ValueError or patches, in little memory, and nothing else is changed. Counts are for a whole run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAST = 1_500
SLOW = 298_500 // 9  # of each of nine seeds: 3 x 10^5 in all


@pytest.mark.parametrize(
    ("seed", "count"), [(0, FAST), *(pytest.param(seed, SLOW, marks=pytest.mark.slow(part=True)) for seed in range(1, 10))]
)
def test_mutated_images_are_refused_or_packed(seed: int, count: int) -> None:
    count = int(os.environ.get("IDEFICS2_FAST_MUTATIONS", count))
    command = [sys.executable, str(ROOT / "tests" / "support" / "mutated_images.py"), str(seed), str(count)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)
    assert ran.returncode == 0, (ran.stdout[-3000:], ran.stderr[-3000:])
    refused, packed, peak = map(int, ran.stdout.split())
    assert refused + packed == count
    assert min(refused, packed) > count // 20
    assert peak < 2000  # MB, the libraries' own 300 among them
