"""A run that is killed and started again, many times; test_killed.py starts it.

Arguments: the corpus, the folder of the run, how many kills, a seed. Each start is a forked child, so
that torch is imported once. A child is killed with SIGKILL a random time after it has done one to three steps,
of which each is saved beside the next: while a step, a file, a rename or a start is under way. The answer on stdout: kills, and
the last child's exit code.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from idefics2_fast.training import instruct
from idefics2_fast.training.run import fit


def start(corpus: Path, out: Path, steps: int) -> int:
    child = os.fork()
    if child == 0:
        settings = {"tokens": 300, "patches": 400, "packs": 1, "rank": 2, "targets": ("text",), "trained": (), "dtype": "float32"}
        settings |= {"warmup": 1, "save_every": 1, "workers": 1, "dropout": 0.1, "learning_rate": 1e-3, "schedule": "constant"}
        try:
            fit(instruct(corpus / "model", corpus / "data.jsonl", out, steps=steps, **settings))
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill(child: int, out: Path, draw: random.Random) -> int:
    """The child's exit code, after it was killed unless it ended before."""
    begun, wanted, changes, last = lines(out), draw.randint(1, 3), 0, None
    early = time.monotonic() + draw.uniform(0, 2) if draw.random() < 0.1 else None
    while changes < wanted:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if early is not None and time.monotonic() > early:
            break
        now = lines(out)
        changes += last is not None and now > last and now > begun - 1
        last = now
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.2))
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    corpus, out, most, steps, seed = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
    draw, kills, code = random.Random(seed), 0, -9
    while kills < most and code == -9:
        code = kill(start(corpus, out, steps), out, draw)
        kills += code == -9
    if code == -9:
        code = os.waitstatus_to_exitcode(os.waitpid(start(corpus, out, steps), 0)[1])
    print(json.dumps([kills, code]))
