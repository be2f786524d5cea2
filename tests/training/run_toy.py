"""A small run, as the trainer makes one, in processes that may be killed; test_checkpoint.py starts it.

The first argument lists jobs in JSON: arguments of `train`, "kill" (a point of `arm` and the number of the save), "world" (ranks),
"lines" and "wait" (of a job of one process: it is killed so many seconds after it has logged so many lines), and "copy" (where the folder
is copied to afterwards). Each runs in forked children of its own, so that torch is imported once.
The answer on stdout: the ranks' exit codes of each job.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # the optimizers import it when first made: once, before the forks
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from idefics2_fast.training import checkpoint
from idefics2_fast.training.checkpoint import Checkpoints, run_state, set_run_state

POINTS = ["staging", "file write", "digest", "metadata", "manifest", "rename", "renamed", "pointer", "pointed", "prune", "mid-step"]


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, nth: int) -> None:
    """Makes this process die at `point` of its nth save, through the function that the point is in."""
    saves = 0

    def patch(holder: object, name: str, before: Callable = lambda *_: None, after: Callable = lambda *_: None, of: str = "") -> None:
        whole = getattr(holder, name)

        def wrapped(*args, **kwargs):
            hit = saves == nth and (not of or Path(args[0]).name.startswith(of))
            if hit:
                before(*args)
            result = whole(*args, **kwargs)
            if hit:
                after(*args)
            return result

        setattr(holder, name, wrapped)

    def staged_and_counted(stager: DefaultStager, tensors: dict) -> dict:
        nonlocal saves
        saves += 1
        staged = stage(stager, tensors)
        if point == "staging" and saves == nth:
            die()
        return staged

    def half_file(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        die()

    def half_shard(writer: HuggingFaceStorageWriter, *_: object) -> None:
        shard = max(Path(writer.path).glob("shard-*"))
        os.truncate(shard, shard.stat().st_size // 2)
        die()

    def half_folder(path: Path, **_: object) -> None:
        next(path.glob("shard-*")).unlink()
        die()

    stage, DefaultStager.stage = DefaultStager.stage, staged_and_counted
    match point:
        case "file write":
            patch(HuggingFaceStorageWriter, "write_data", after=half_shard)
        case "digest":
            patch(checkpoint, "digest", before=die)
        case "metadata":
            patch(checkpoint, "write_file", before=half_file, of=checkpoint.RUN)
        case "manifest":
            patch(checkpoint, "write_file", before=half_file, of=checkpoint.MANIFEST)
        case "rename":
            patch(os, "rename", before=die, of=checkpoint.ASIDE)
        case "renamed":
            patch(os, "rename", after=die, of=checkpoint.ASIDE)
        case "pointer":
            patch(os, "replace", before=die)
        case "pointed":
            patch(os, "replace", after=die)
        case "prune":
            patch(shutil, "rmtree", before=half_folder, of=checkpoint.OLD)
        case _:
            assert point in ("staging", "mid-step"), point


class Toy(nn.Module):
    """Rows that two ranks cannot share evenly, a parameter of one element, a frozen one, a buffer, and noise from torch's own generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(6, 7).requires_grad_(False)
        self.up, self.down = nn.Linear(7, 15), nn.Linear(15, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return self.down(F.dropout(torch.tanh(self.up(self.frozen(x))), 0.2)).squeeze(-1)


def batch(cursor: int) -> tuple[list[int], torch.Tensor]:
    """Four samples, each a function of its number alone."""
    keys = list(range(cursor, cursor + 4))
    return keys, torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(key)) for key in keys])


def fingerprint(state: dict) -> str:
    """Of every tensor of a state, whole, bit for bit. A collective."""
    tensors = checkpoint.split(state)[0]
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in sorted(tensors.items())}
    return hashlib.sha256(b"".join(name.encode() + t.detach().numpy().tobytes() for name, t in whole.items())).hexdigest()


def train(folder: str, log: str, kill: list | None = None, steps: int = 24, every: int = 4, asynchronous: bool = True) -> None:
    """Goes on to step `steps`. Rank 0 logs "resumed <step> <fingerprint>", then "<step> <loss> <sample keys> <fingerprint after it>"."""
    torch.set_num_threads(1)
    if kill:
        arm(*kill)
    model = Toy()
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh, ignored_params=set(model.frozen.parameters()))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
    checkpoints = Checkpoints(folder, "recipe")
    state = run_state(model, optimizer) | {"schedule": schedule.state_dict()}
    loaded = checkpoints.load(state)
    step, cursor = 0, 0
    if loaded:
        set_run_state(model, optimizer, state)
        schedule.load_state_dict(state["schedule"])
        step, cursor = loaded.step, loaded.extra["loader"]["cursor"]
    start = step
    with open(log if checkpoints.rank == 0 else os.devnull, "a", buffering=1) as lines:
        lines.write(f"resumed {step} {fingerprint(state)}\n")
        while step < steps:
            keys, x = batch(cursor)
            loss = F.mse_loss(model(x), x.sum(-1))
            loss.backward()
            if kill and kill[0] == "mid-step" and step == start + kill[1] * every + 2:
                checkpoints.wait()  # whether the last save is through would be a race
                die()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step, cursor = step + 1, cursor + 4
            state = run_state(model, optimizer) | {"schedule": schedule.state_dict()}
            lines.write(f"{step} {loss.item().hex()} {keys[0]}-{keys[-1]} {fingerprint(state)}\n")
            if step % every == 0:
                checkpoints.save(step, state, {"loader": {"cursor": cursor}}, asynchronous=asynchronous)
        checkpoints.wait()


def rank(number: int, world: int, store: str, job: dict) -> None:
    """One rank, in a process of its own; with world 0, a process without a process group. A job's `kill` is the last rank's."""
    if world:
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=number, world_size=world)
    train(**job | {"kill": job.get("kill") if number + 1 >= world else None})


def run(job: dict) -> list[int]:
    world, copy = job.pop("world", 0), job.pop("copy", None)
    lines, wait = job.pop("lines", None), job.pop("wait", None)
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(max(1, world)):
            processes.append(os.fork())
            if processes[-1] == 0:
                try:
                    rank(number, world, f"{folder}/store", job)
                except BaseException as error:
                    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    os._exit(1)
                os._exit(0)
        if lines is not None:
            kill_after(processes[0], Path(job["log"]), lines, wait)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    if copy:
        shutil.copytree(job["folder"], copy)
    return codes


def kill_after(process: int, log: Path, lines: int, wait: float) -> None:
    """Kills a process that has not ended, after it has logged so many more lines, and some seconds."""
    wanted = lines + (log.read_bytes().count(b"\n") if log.exists() else 0)
    while not log.exists() or log.read_bytes().count(b"\n") < wanted:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.001)
    time.sleep(wait)
    os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    print(json.dumps([run(job) for job in json.loads(sys.argv[1])]))
