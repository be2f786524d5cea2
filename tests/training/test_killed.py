"""kill -9 at random moments of a whole run: with restarts it ends with the bits of a run that is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run_killed.py")
KILLS = int(os.environ.get("IDEFICS2_FAST_KILLS", "4"))


def run(corpus: Path, out: Path, kills: int, steps: int) -> int:
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, corpus, out, str(kills), str(steps), "0"]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600 + 30 * kills, check=False)
    kills, code = json.loads(child.stdout.splitlines()[-1])
    assert code == 0, child.stderr
    return kills


def recorded(out: Path) -> list[tuple[int, float, float]]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


@pytest.mark.slow
def test_fit_killed_at_random_moments_ends_with_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    steps = 3 * KILLS
    assert run(corpus, tmp_path / "whole", 0, steps) == 0
    assert run(corpus, tmp_path / "killed", KILLS, steps) >= KILLS // 2  # it may reach its end before
    assert recorded(tmp_path / "killed") == recorded(tmp_path / "whole")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "killed" / "adapter" / name).read_bytes() == (tmp_path / "whole" / "adapter" / name).read_bytes()
