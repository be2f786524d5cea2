"""torchrun with the run's exit code: on two ranks, of which one waits for data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from idefics2_fast.training import torchrun

FLAGS = "--steps 400 --warmup 2 --tokens 300 --patches 400 --packs 2 --rank 2 --dtype float32 --save-every 1000 --trained= --targets text"

# The command, in which rank 1 waits for data for ever once it has planned so many samples.
HELD_UP = """
import os, sys, threading
from idefics2_fast.training.__main__ import end, main
from idefics2_fast.training.planning import Planner
plan, planned = Planner.__call__, []
def slow(self, *arguments):
    planned.append(1)
    if os.environ["RANK"] == "1" and len(planned) > 110:
        threading.Event().wait()
    return plan(self, *arguments)
Planner.__call__ = slow
end(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("code", "expected"), [(75, 75), *(pytest.param(*codes, marks=pytest.mark.slow) for codes in ((0, 0), (2, 2), (-9, 137)))]
)
def test_torchrun_ends_as_its_processes_do(tmp_path: Path, code: int, expected: int) -> None:
    ending = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)" if code < 0 else f"import sys; sys.exit({code})"
    (tmp_path / "ending.py").write_text(ending)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    command = [sys.executable, "-m", torchrun.__name__, "--standalone", str(tmp_path / "ending.py")]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == expected, child.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_torchrun_hands_on_the_code_of_a_signal(corpus: Path, tmp_path: Path, number: int, code: int) -> None:
    (tmp_path / "held_up.py").write_text(HELD_UP)
    places = ["--model", corpus / "model", "--data", corpus / "data.jsonl", "--out", tmp_path / "run"]
    command = [sys.executable, "-m", torchrun.__name__, "--standalone", "--nproc-per-node=2", tmp_path / "held_up.py", "instruct"]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*map(str, [*command, *places]), *FLAGS.split()], env=environment, stdout=subprocess.PIPE, text=True) as process:
        metrics, steps = tmp_path / "run" / "metrics.jsonl", -1
        while process.poll() is None and (steps < 1 or steps < lines_of(metrics)):  # until no more steps are done
            steps = lines_of(metrics)
            time.sleep(5 if steps else 0.5)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"stopped by a signal after {steps} steps" in out
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step-{steps:08d}\n"


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0
