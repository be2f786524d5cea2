"""One run at a time in a folder: refused by name, free again whatever end the other one took."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from idefics2_fast.training.lock import LOCK, run_lock

HOLD = """
import sys, time
from pathlib import Path
from idefics2_fast.training.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_run_lock_refuses_by_name_until_the_other_is_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=f"run is in use by the run of process {other.pid} on {socket.gethostname()}: end it"):
                run_lock(tmp_path / "run").__enter__()
        finally:
            other.send_signal(signal.SIGKILL)
    assert (tmp_path / "run" / LOCK).read_text().split()[1] == str(other.pid)
    with run_lock(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).read_text().split() == [socket.gethostname(), str(os.getpid())]
        assert f"was left locked by process {other.pid}" in caplog.text
    caplog.clear()
    with run_lock(tmp_path / "run"):
        assert caplog.text == ""  # the last one left in order


def test_run_lock_refuses_a_second_in_one_process(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
            run_lock(tmp_path).__enter__()
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    with run_lock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("text", "refused"),
    [("", False), ("torn", False), (f"{socket.gethostname()} 4194999", False), (f"{socket.gethostname()} 1", True), ("elsewhere 17", True)],
    ids=["empty", "torn", "dead", "alive", "another host"],
)
def test_run_lock_without_locks_goes_by_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, refused: bool) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / LOCK).write_text(text)
    if refused:
        with pytest.raises(ValueError, match="in use by the run of process"):
            run_lock(tmp_path).__enter__()
        assert (tmp_path / LOCK).read_text() == text
    else:
        with run_lock(tmp_path):
            assert str(os.getpid()) in (tmp_path / LOCK).read_text()
