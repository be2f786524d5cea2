"""The state of a run on disk: saved beside the training, committed in one rename, believed only when every byte is what was written.

A checkpoint is a folder `step-00000100` of

    shard-*.safetensors   the tensors, each rank's shards in files of its own (torch.distributed.checkpoint's safetensors writer)
    rng-00000.json        the random generators of each rank
    run.json              step, recipe hash, everything else that was to be kept, names and shapes of the tensors
    manifest              a line "<sha256>  <name>" for each file above, as `sha256sum --check manifest` reads it

run.json says its `format`: 2. Format 1 had no field `format` and no identity of the run's inputs (training/identity.py); it is read.

It is written aside as `.aside-step-00000100`; every file and the folder are fsynced; the folder is renamed; only then `latest`, a file
that holds the newest folder's name, is replaced; and old checkpoints go last. A checkpoint of the same step and the new one trade places
in one system call. On a file system without that call the old one steps aside as `.replaced-step-00000100`, and is put back after a crash
between the two renames. Whatever moment a process dies at, `latest` names a whole
checkpoint, and every folder with a checkpoint's name is one. No pickle is read or written: the tensors' metadata are the safetensors
headers, the rest is JSON.

Host memory beside the training's: one copy of the tensors that this rank saves, held for the whole run (pinned where there is a GPU), and,
while they are written, one file's bytes: FILE_BYTES, or the largest tensor's shard if that is more.
"""

import ctypes
import dataclasses
import errno
import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from idefics2_fast.training.identity import Identity

log = logging.getLogger(__name__)
T = TypeVar("T")

FILE_BYTES = 2**30  # a rank's file is closed at the tensor that fills it: the writer holds one file's bytes at a time
LATEST, MANIFEST, RUN = "latest", "manifest", "run.json"
ASIDE, OLD, REPLACED, STEP = ".aside-", ".old-", ".replaced-", "step-"
FORMAT = 2  # of run.json
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Those before it are untouched; the message names the newest.

    Attributes:
        full: whether the disk has no room, the same on all ranks.
    """

    full = False


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What was loaded: the step after which it was saved, `extra` as it was given, and why newer checkpoints (by name) were passed over.

    `identity` is that of the run which saved it (`Identity.record`); None in a checkpoint of format 1.
    """

    step: int
    extra: dict[str, Any]
    skipped: dict[str, str]
    identity: dict[str, Any] | None = None


class Checkpoints:
    """The checkpoints of one run. Made on all ranks together, after the process group if there is one; every method is for all ranks.

    Args:
        folder: on a file system that all ranks share.
        recipe_hash: of the recipe that the run follows.
        keep: how many of the newest stay.
        every: checkpoints at multiples of so many steps stay for good.
        identity: of the run; it is saved, and a checkpoint of a run with another is refused. Without
            one the recipe's hash alone is compared.
    """

    def __init__(
        self,
        folder: str | Path,
        recipe_hash: str,
        *,
        keep: int = 2,
        every: int | None = None,
        identity: Identity | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least one checkpoint must stay (two outlive a damaged file)")
        if every is not None and every < 1:
            raise ValueError(f"every is {every}, expected a number of steps")
        self.folder, self.recipe_hash, self.keep, self.every = Path(folder), recipe_hash, keep, every
        self.identity = identity
        # Saving goes on in a thread beside the training, so its collectives must not meet the training's.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if self._group else (0, 1)
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending; not verified."""
        return committed_steps(self.folder)

    def save(self, step: int, state: dict[str, Any], extra: dict[str, Any], *, asynchronous: bool = True) -> None:
        """Saves `state` as that after `step` steps. Returns when it is copied: training may go on; `wait` says whether it reached the disk.

        Args:
            state: dicts and lists of tensors and of what JSON holds (see `run_state`). DTensors are saved by shards; other tensors and
                values count as the same on all ranks.
            extra: JSON; rank 0's is kept. Loader and guard state, independent of the number of ranks.

        Raises:
            CheckpointError: the save before, or with asynchronous=False this one, failed.
        """
        self.wait()
        tensors, plain = split(state)
        specs = {name: spec(tensor) for name, tensor in tensors.items()}
        run = {"format": FORMAT, "step": step, "recipe": self.recipe_hash, "extra": extra, "plain": plain, "tensors": specs}
        if self.identity is not None:
            run["identity"] = self.identity.record()
        record, generators = json.dumps(run).encode(), json.dumps(random_state()).encode()
        staged = self._stager.stage(tensors)
        self._pending = self._thread.submit(self._write, step, staged, record, generators)
        if not asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when the save under way is committed; CheckpointError if it failed on any rank. To be called before the process ends."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(self, state: dict[str, Any], *, before: int | None = None) -> Loaded | None:
        """Loads the newest checkpoint that verifies into `state`, in place, and sets the random generators; None if there is no checkpoint.

        The digests of all files are checked before any tensor is read. A rank that the saving run did not have keeps its generators.

        Args:
            state: as it was saved, with any values.
            before: only checkpoints of earlier steps. Later ones are removed afterwards: the run rolls back and must not find them again.

        Raises:
            ValueError: no checkpoint verifies, or the newest that does is of another run (the message names each difference), or has
                other tensors than `state`.
        """
        self.wait()
        self._everywhere(self._heal, rank=0)
        skipped: dict[str, str] = {}
        steps = self._everywhere(self.steps)[0]
        for step in reversed(steps if before is None else [step for step in steps if step < before]):
            path = self.folder / folder_name(step)
            reason = self._damage(path)
            if reason is None:
                run = self._read(path, state)
                if before is not None:
                    self._everywhere(lambda step=step: self._forget_after(step), rank=0)
                return Loaded(step, run["extra"], skipped, run.get("identity"))
            skipped[path.name] = reason
            log.warning("checkpoint %s is passed over: %s", path, reason)
        if skipped:
            raise ValueError(f"no checkpoint in {self.folder} verifies: {'; '.join(f'{name}: {why}' for name, why in skipped.items())}")
        return None

    def _everywhere(self, work: Callable[[], T], *, rank: int | None = None) -> list[T]:
        """What `work` returns on each rank (or on one: None elsewhere). Fails on all if it fails on any, so that none is left waiting."""
        result, error = None, None
        try:
            result = work() if rank in (None, self.rank) else None
        except Exception as caught:
            error = caught
        if self._group is None:
            outcomes = [(result, error)]
        else:
            outcomes = [None] * self.world_size
            dist.all_gather_object(outcomes, (result, error and f"rank {self.rank}: {describe(error)}"), group=self._group)
        failures = [error for _, error in outcomes if error is not None]
        if failures:
            raise error if error is not None else CheckpointError("; ".join(failures))
        return [result for result, _ in outcomes]

    # --- saving ---

    def _write(self, step: int, tensors: dict[str, torch.Tensor], record: bytes, generators: bytes) -> None:
        aside = self.folder / f"{ASIDE}{folder_name(step)}"
        try:
            self._everywhere(lambda: self._begin(aside), rank=0)
            writer = dcp.HuggingFaceStorageWriter(str(aside), fqn_to_index_mapping=files(tensors), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            digests = self._everywhere(lambda: self._finish_rank(aside, generators))
            self._everywhere(lambda: self._commit(aside, step, record, {k: v for part in digests for k, v in part.items()}), rank=0)
        except (Exception, CheckpointException) as error:
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)  # on a full disk the next attempt needs the room
            newest = folder_name(self.steps()[-1]) if self.steps() else "none"
            reason = describe(error)
            failed = CheckpointError(f"saving step {step} failed: {reason}; newest checkpoint in {self.folder}: {newest}")
            failed.full = is_full(reason)
            raise failed from error

    def _begin(self, aside: Path) -> None:
        self._heal()
        for leftover in (*self.folder.glob(f"{ASIDE}*"), *self.folder.glob(f"{OLD}*")):
            remove(leftover)
        aside.mkdir()

    def _finish_rank(self, aside: Path, generators: bytes) -> dict[str, str]:
        """Digests of this rank's files, which the writer has fsynced."""
        write_file(aside / rng_name(self.rank), generators)
        return {path.name: digest(path) for path in (aside / rng_name(self.rank), *aside.glob(f"shard-{self.rank + 1:05d}-*"))}

    def _commit(self, aside: Path, step: int, record: bytes, digests: dict[str, str]) -> None:
        write_file(aside / RUN, record)
        digests[RUN] = digest(aside / RUN)
        if set(digests) != {path.name for path in aside.iterdir()}:
            raise OSError(errno.ENOENT, f"{self.folder} is not a folder that all ranks share: rank 0 does not see the others' files")
        write_file(aside / MANIFEST, manifest_of(digests))
        sync(aside)
        final = self.folder / folder_name(step)
        if final.exists():  # damaged, of a course that the run has left, or saved again after skipped steps
            replace(final, aside)
        else:
            os.rename(aside, final)
        sync(self.folder)
        self._point_at(step)
        self._prune(step)

    def _heal(self) -> None:
        """Puts back what a crash in the middle of `replace` has left aside."""
        for replaced in self.folder.glob(f"{REPLACED}*"):
            final = self.folder / replaced.name.removeprefix(REPLACED)
            if final.exists():
                remove(replaced)
            else:
                os.rename(replaced, final)

    def _point_at(self, step: int) -> None:
        aside = self.folder / f"{ASIDE}{LATEST}"
        write_file(aside, f"{folder_name(step)}\n".encode())
        os.replace(aside, self.folder / LATEST)
        sync(self.folder)

    def _prune(self, step: int) -> None:
        """Removes what is neither among the newest nor at a multiple of `every`, and steps after `step`, which this run never reached."""
        past = [other for other in self.steps() if other <= step]
        kept = {*past[-self.keep :], *(other for other in past if self.every and other % self.every == 0)}
        for other in self.steps():
            if other not in kept:
                discard(self.folder / folder_name(other))

    def _forget_after(self, step: int) -> None:
        self._point_at(step)
        for later in self.steps():
            if later > step:
                discard(self.folder / folder_name(later))

    # --- loading ---

    def _damage(self, path: Path) -> str | None:
        """In what the folder differs from its manifest, if it does; the ranks share the files among them. The same answer on all ranks."""

        def digests(names: list[str]) -> dict[str, str]:
            with ThreadPoolExecutor(8) as threads:
                return dict(zip(names, threads.map(lambda name: digest(path / name), names), strict=True))

        try:
            names = self._everywhere(lambda: sorted(file.name for file in path.iterdir() if file.name != MANIFEST), rank=0)[0]
            parts = self._everywhere(lambda: digests(names[self.rank :: self.world_size]))
            expected = self._everywhere((path / MANIFEST).read_bytes, rank=0)[0]
        except (OSError, CheckpointError) as error:
            return str(error)
        found = manifest_of({k: v for part in parts for k, v in part.items()})
        if found == expected:
            return None
        lines = set(found.splitlines()) ^ set(expected.splitlines())
        names = sorted({line.partition(b"  ")[2].decode(errors="replace") for line in lines})
        return f"differs from its manifest in {', '.join(names) or 'line ends'}"

    def _read(self, path: Path, state: dict[str, Any]) -> dict[str, Any]:
        """run.json, after the tensors were read into `state`."""
        run = json.loads((path / RUN).read_bytes())
        self._check_run(path, run)
        if folder_name(run["step"]) != path.name:
            raise ValueError(f"{path} holds the state after step {run['step']}, expected the name {folder_name(run['step'])}")
        tensors, plain = split(state)
        for kind, saved, wanted in (
            ("tensors", run["tensors"], {name: spec(tensor) for name, tensor in tensors.items()}),
            ("values", dict.fromkeys(run["plain"]), dict.fromkeys(plain)),
        ):
            if saved != wanted:
                different = sorted(name for name in {*saved, *wanted} if saved.get(name, "none") != wanted.get(name, "none"))
                shown = [f"{name} {saved.get(name, 'none')} -> {wanted.get(name, 'none')}" for name in different[:5]]
                raise ValueError(f"{path} has other {kind} than the run, {len(different)} in all (saved -> expected): {'; '.join(shown)}")
        reader = dcp.HuggingFaceStorageReader(str(path))
        dcp.load(tensors, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        for name, holder, key in leaves(state):
            if name in run["plain"]:
                holder[key] = tuple(run["plain"][name]) if isinstance(holder[key], tuple) else run["plain"][name]
        if (path / rng_name(self.rank)).exists():
            set_random_state(json.loads((path / rng_name(self.rank)).read_bytes()))
        return run

    def _check_run(self, path: Path, run: dict[str, Any]) -> None:
        if (found := run.get("format", 1)) > FORMAT:
            raise ValueError(f"{path} has format {found}, expected {FORMAT} or less: a newer version of this program saved it")
        if self.identity is not None:
            if differences := self.identity.differences(run, self.recipe_hash):
                raise ValueError(f"{path} belongs to another run: {'; '.join(differences)} (expected the same; another folder starts anew)")
        elif run["recipe"] != self.recipe_hash:
            raise ValueError(f"{path} was saved by recipe {run['recipe']}, and this run follows {self.recipe_hash}")


# --- what a run consists of ---


def run_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The trained parameters, the buffers and the optimizer's state under the parameters' full names, the same on any number of ranks.

    The tensors are the model's and the optimizer's own, not copies. A fresh optimizer gets its zero state, so that it can be loaded into.
    Frozen parameters are left out: they are those of the weights that the recipe names.
    """
    parameters, moments = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    return {"model": parameters, "optimizer": moments}


def set_run_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Puts back what `run_state` gave, after `Checkpoints.load`."""
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options)


def random_state() -> dict[str, Any]:
    """The states of this process's random generators, as JSON holds them. What the run draws by counters does not depend on them."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    numpy = [name, keys.tolist(), position, has_gauss, gauss]
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state().tolist()}
    return state | ({"cuda": torch.cuda.get_rng_state().tolist()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))


def leaves(tree: dict[str, Any] | list[Any], path: str = "") -> Iterator[tuple[str, dict[str, Any] | list[Any], Any]]:
    """Every leaf of dicts in lists in dicts: its name ("optimizer/param_groups/0/lr"), what holds it and under which key."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            yield from leaves(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", tree, key


def split(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a state and its other leaves, both by name."""
    named = [(name, holder[key]) for name, holder, key in leaves(state)]
    assert len({name for name, _ in named}) == len(named), "two leaves of the state have one name"
    tensors = {name: value for name, value in named if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in named if name not in tensors}


def spec(tensor: torch.Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), *tensor.shape]


def files(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Which of a rank's files, from 1, a tensor goes to: about FILE_BYTES each."""
    index, held, numbers = 1, 0, {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if held and held + local.nbytes > FILE_BYTES:
            index, held = index + 1, 0
        numbers[name], held = index, held + local.nbytes
    return numbers


# --- files ---


def committed_steps(folder: Path) -> list[int]:
    """Steps of the committed checkpoints in a folder, ascending; not verified.

    Other names, of copies that people make, are left alone.
    """
    names = {path.name for path in folder.glob(f"{STEP}*")}
    steps = {int(number) for name in names if (number := name.removeprefix(STEP)).isdecimal()}
    return sorted(step for step in steps if folder_name(step) in names)


def folder_name(step: int) -> str:
    return f"{STEP}{step:08d}"


def rng_name(rank: int) -> str:
    return f"rng-{rank:05d}.json"


def manifest_of(digests: dict[str, str]) -> bytes:
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_aside(path: Path, text: str) -> None:
    """Writes a small file in one rename: what was there stands until all of it is on the disk."""
    aside = path.with_name(f"{path.name}.aside")
    try:
        write_file(aside, text.encode("utf-8", "backslashreplace"))
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def sync(folder: Path) -> None:
    """Makes the names in a folder durable, as fsync of a file does its bytes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(old: Path, new: Path) -> None:
    """Puts the folder `new` in the place of `old`, and removes `old`; see the module's docstring."""
    if exchange(old, new):
        remove(new)
        return
    aside = old.with_name(f"{REPLACED}{old.name}")
    remove(aside)
    os.rename(old, aside)
    os.rename(new, old)
    remove(aside)


def exchange(one: Path, other: Path) -> bool:
    """Lets two names trade places in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <fcntl.h> and <linux/fs.h>
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(swap)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(one))


def discard(path: Path) -> None:
    """Removes a checkpoint; a half-removed one no longer bears a checkpoint's name."""
    old = path.with_name(f"{OLD}{path.name}")
    remove(old)
    os.rename(path, old)
    remove(old)


def remove(path: Path) -> None:
    """Removes a file or a folder; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def describe(error: BaseException) -> str:
    """What went wrong, without the tracebacks that torch's CheckpointException (no Exception, by its bases) prints for each rank."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {cause!r}" for rank, (cause, _) in sorted(error.failures.items()))
    return repr(error)


def is_full(error: BaseException | str) -> bool:
    """Whether an error, or its text, says that the disk has no room: libraries in other languages raise errors of their own."""
    text = error if isinstance(error, str) else describe(error)
    return any(os.strerror(code) in text for code in FULL)
