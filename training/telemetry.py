"""What a run says about itself: one JSON line a step; TensorBoard, trackio or Weights & Biases where asked for; a bar on a terminal.

metrics.jsonl   a line for each step that counts, flushed; cut back when the run goes back, so that no step stands in it twice
events.jsonl    skipped steps, rollbacks, resumes: appended, never cut

A full disk ends no step: lines that found no room are written with the next that does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from tqdm import tqdm

log = logging.getLogger(__name__)

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


class Sink(Protocol):
    """Where numbers go besides the JSON lines. Made with the run's folder, its configuration and the step it goes on from."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class Telemetry:
    """The records of one run, kept by rank 0; on other ranks nothing is written.

    Args:
        folder: of the run.
        step: the step that the run goes on from; later lines of an earlier attempt, and a line that a crash cut short, are removed.
        steps: how many the run has.
        peak_flops: FLOPs per second of all devices together; None leaves MFU out.
        sinks: names of `SINKS`.
        config: of the run, for the sinks.

    Raises:
        ValueError: an unknown sink, or one whose package is not installed (by its name).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        steps: int,
        step: int = 0,
        peak_flops: float | None = None,
        sinks: Sequence[str] = (),
        config: dict[str, Any] | None = None,
        rank: int = 0,
    ) -> None:
        check_sinks(sinks)
        self.folder, self.peak_flops, self._writes = Path(folder), peak_flops, rank == 0
        self._bar = tqdm(total=steps, initial=step, unit="step", file=sys.stderr, disable=None if self._writes else True)
        self._last, self._waited, self._since = step, 0.0, time.perf_counter()
        self._sinks: list[Sink] = []
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._metrics, self._events = Lines(self.folder / METRICS), Lines(self.folder / EVENTS)
            self._metrics.cut_back(step)
            self._sinks = [SINKS[name](self.folder, config or {}, step) for name in sinks]

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    def step(
        self, step: int, *, loss: float, lr: float, grad_norm: float, tokens: int, images: int, flops: float, **more: float
    ) -> dict[str, Any]:
        """Records a step that counts and returns the record.

        Args:
            step: how many steps are done, this one included; more than at the call before.
            tokens, images, flops: of this step on all ranks; flops are the model's, without recomputation.
            more: other numbers to keep.
        """
        assert step > self._last, f"step {step} after step {self._last}: a run that goes back calls rewind"
        now = time.perf_counter()
        seconds = now - self._since
        record = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": tokens, "images": images, "seconds": seconds}
        record |= {"tokens_per_s": tokens / seconds, "images_per_s": images / seconds, "data_wait": self._waited / seconds}
        record |= {"mfu": flops / seconds / self.peak_flops} if self.peak_flops else {}
        record |= {"memory_bytes": peak_memory()} | more
        self._last, self._waited, self._since = step, 0.0, now
        if self._writes:
            self._metrics.append(record)
            for sink in self._sinks:
                sink.log(step, {key: value for key, value in record.items() if key != "step"})
            self._show(record)
        return record

    def _show(self, record: dict[str, Any]) -> None:
        mfu = f", MFU {record['mfu']:.1%}" if "mfu" in record else ""
        self._bar.set_postfix_str(f"loss {record['loss']:.4f}, {record['tokens_per_s']:,.0f} tokens/s{mfu}", refresh=False)
        self._bar.update(record["step"] - self._bar.n)

    def event(self, step: int, kind: str, **fields: Any) -> None:
        """Notes what is no step: `fields` are JSON, the samples of a skipped step for example."""
        if self._writes:
            self._events.append({"time": time.time(), "step": step, "event": kind} | fields)

    def rewind(self, step: int) -> None:
        """The run goes back to the state after `step`: what was recorded of later steps is removed."""
        self._last, self._waited, self._since = step, 0.0, time.perf_counter()
        if self._writes:
            self._metrics.cut_back(step)
            for sink in self._sinks:
                sink.rewind(step)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()
        for sink in self._sinks:
            sink.close()


class Lines:
    """A file of JSON lines that grows, or that waits in memory while its disk has no room.

    A line that a crash cut short is ended before the next, so that it costs no other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten: list[dict[str, Any]] = []

    def append(self, record: dict[str, Any]) -> None:
        self._unwritten.append(record)
        try:
            append_to(self.path, "".join(map(json_line, self._unwritten)).encode())
        except OSError as error:
            if len(self._unwritten) == 1:
                log.warning("%s cannot be written: %s; its lines wait in memory", self.path, error.strerror)
        else:
            self._unwritten = []

    def cut_back(self, step: int) -> None:
        """Removes lines of steps later than `step`, and those that are no record of a step."""
        self._unwritten = [record for record in self._unwritten if record["step"] <= step]
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
        begin = [line for line, other in takewhile(lambda pair: pair[0] is pair[1], zip(lines, kept, strict=False))]
        if len(begin) < len(kept):
            aside = self.path.with_name(f"{self.path.name}.aside")
            try:
                aside.write_bytes(b"".join(kept))
                os.replace(aside, self.path)
                return
            except OSError as error:  # no room: what stands before the gap needs none
                aside.unlink(missing_ok=True)
                log.warning("%s loses the lines behind a damaged one: %s", self.path, error.strerror)
        if len(begin) < len(lines):
            os.truncate(self.path, sum(map(len, begin)))


def append_to(path: Path, data: bytes) -> None:
    """Appends all of `data` on a line of its own, or nothing.

    Raises:
        OSError: no room, for example; the file is as long as it was.
    """
    with open(path, "a+b", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            data = b"\n" + data
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def _step_of(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinite for what is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def json_line(record: dict[str, Any]) -> str:
    """One line; null for what is not finite, which JSON cannot say."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    return f"{json.dumps(finite, allow_nan=False)}\n"


def peak_memory() -> int:
    """Most bytes this process has held so far: of the GPU's memory if there is one, else of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- sinks ---


class TensorBoard:
    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        self.folder = folder / "tensorboard"
        self._open(step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        self._writer.close()


class Trackio:
    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        import trackio

        self._run = trackio.init(project="idefics2_fast", name=run_id(folder), config=config, resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def rewind(self, step: int) -> None:
        """Nothing: what was sent stays, and the steps that follow are drawn over it."""

    def close(self) -> None:
        self._run.finish()


class Wandb:
    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        import wandb

        name = run_id(folder)
        self._run = wandb.init(project="idefics2_fast", name=name, id=name, dir=str(folder), config=config, resume="allow")
        self._run.define_metric("*", step_metric="step")  # its own counter refuses to go back

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values | {"step": step})

    def rewind(self, step: int) -> None:
        """Nothing: what was sent stays, and the steps that follow are drawn over it."""

    def close(self) -> None:
        self._run.finish()


SINKS = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}  # each the name of the package that it needs


def check_sinks(names: Sequence[str]) -> None:
    """Raises ValueError for a sink that does not exist or whose package is missing."""
    for name in names:
        if name not in SINKS:
            raise ValueError(f"nothing is known of logging to {name!r}, expected {', '.join(SINKS)}")
        if find_spec(name) is None:
            raise ValueError(f"logging to {name} needs the package {name}, which is not installed: pip install {name}")


def run_id(folder: Path) -> str:
    """The same for a run each time it is taken up again, another for each folder."""
    return f"{folder.name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"
