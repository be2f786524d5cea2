"""The loader: one global plan a step, of which each rank decodes its slice. Grain gives the threads, the prefetch and the state's path."""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from absl import logging as absl_logging

from idefics2_fast.batch import IGNORED, Batch, find_image_rows
from idefics2_fast.images import PackedImages, pack_images
from idefics2_fast.kernels.segments import Segments
from idefics2_fast.processor import Processor
from idefics2_fast.training.order import RowsInOrder, ShuffledRows
from idefics2_fast.training.packing import Pack, Packer, balanced_patches
from idefics2_fast.training.planning import Document, Planner
from idefics2_fast.training.sources import Rejection, Source

# Grain warns on every rank that it found no profiler of jax.
absl_logging.get_absl_logger().addFilter(lambda record: "jax profiler" not in record.getMessage())

import grain  # noqa: E402

log = logging.getLogger(__name__)

REPORTED = 20
PROBED = 512


@dataclass(frozen=True)
class Step:
    """What one rank trains on between two updates of the weights.

    Attributes:
        index: of the step in the run, from 0.
        batches: this rank's, as many on every rank. `token_base` of a batch is the index of its first token in the whole step, over all
            ranks. A batch with nothing to train holds one BOS, under the key "".
        epoch: how many times the data has been gone through, in parts.
        tokens, patches: of all ranks, as planned.
        fill: shares of the capacities in tokens and patches that are used, over all ranks.
    """

    index: int
    batches: tuple[Batch, ...]
    epoch: float
    tokens: int
    patches: int
    fill: tuple[float, float]


class TooManyRejections(ValueError):
    """More of the data is bad than a run should leave out unseen."""


class Quarantine:
    """The samples left out, each counted once, with reasons; the run stops when they are too many.

    Args:
        path: JSON lines of key and reason are appended to it; None for no file.
        rows: samples that there are.
        share: of the samples seen, how many may be left out.
        least: so many may be in any case, if others remain.
    """

    def __init__(self, path: Path | None, rows: int, share: float, least: int) -> None:
        self.path, self.rows, self.share, self.least = path, rows, share, least
        self.reasons: dict[str, str] = {}

    def add(self, rejection: Rejection) -> None:
        """Counts a sample, if it has not been."""
        if rejection.key not in self.reasons:
            self.reasons[rejection.key] = rejection.reason
            self._write({rejection.key: rejection.reason}, "a")

    def restore(self, reasons: Mapping[str, str], others: Mapping[str, str] = MappingProxyType({})) -> None:
        """Back to the samples that had been left out once; the file holds them and `others`."""
        self.reasons = dict(reasons)
        self._write({**others, **self.reasons}, "w")

    def check(self, seen: int, others: Mapping[str, str] = MappingProxyType({})) -> None:
        """To be called when `seen` samples have been, the same ones in each epoch.

        Args:
            others: key and reason of samples that were left out elsewhere.

        Raises:
            TooManyRejections: above both limits.
        """
        reasons, seen = {**others, **self.reasons}, min(seen, self.rows)
        limit = min(max(self.least, int(self.share * seen)), self.rows - 1)
        if len(reasons) > limit:
            listed = "\n".join(list(reasons.values())[:REPORTED])
            more = f"\n... and {len(reasons) - REPORTED} more" if len(reasons) > REPORTED else ""
            raise TooManyRejections(f"{len(reasons)} of {seen} samples cannot be used, expected at most {limit}:\n{listed}{more}")

    def _write(self, reasons: Mapping[str, str], mode: str) -> None:
        if self.path is None:
            return
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in reasons.items())
        except OSError as error:  # no room: the checkpoints hold the list, too
            log.warning("%s cannot be written: %s", self.path, error.strerror)


class Loader:
    """Steps of packed batches without end, or for some epochs.

    Every rank plans every step alike; the plan does not know how many ranks there are. `state` after a step says which samples are next.
    A sample that cannot be planned (a bad row, an image without a header, one that fits no pack) is left out of the plan; one whose image
    turns out damaged when it is decoded is taken out of its batch, and the rest of the plan stays. All of them count together.

    Args:
        source: rows.
        planner: makes documents of them; its `seed` shuffles them, too.
        packs: batches in a step, over all ranks; a multiple of `world_size`.
        epochs: None for no end. The last step is filled up with batches that train nothing.
        shuffle: go through the rows in another order in each epoch, else in their own.
        threads: for planning, and as many for decoding; with 1 the thread that makes steps ready does both, and none waits for another.
        prefetch: steps that are made ready ahead.
        max_open: as in Packer.
        quarantine: file of what was left out, on rank 0.
        gather: what all ranks found damaged, from what this one did, in one order; called once a step, on every rank.
        max_rejected, least_rejected: share of the samples, and number, above both of which the run stops.

    Raises:
        ValueError: settings that do not go together.
        TooManyRejections: from `__next__`, with the list.
    """

    def __init__(
        self,
        source: Source,
        planner: Planner,
        *,
        packs: int,
        epochs: int | None = None,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 4,
        prefetch: int = 2,
        max_open: int = 16,
        quarantine: Path | None = None,
        max_rejected: float = 1e-3,
        least_rejected: int = 8,
        gather: Callable[[Sequence[Rejection]], Sequence[Rejection]] = lambda found: found,
    ) -> None:
        if packs % world_size or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} has no even share of {packs} packs: expected a multiple of the world size")
        self.planner, self.source, self.slice = planner, source, slice(rank * packs // world_size, (rank + 1) * packs // world_size)
        self._identity = {"seed": planner.seed, "rows": len(source), "packs": packs, "tokens": planner.tokens, "patches": planner.patches}
        left_out = (quarantine if rank == 0 else None, len(source), max_rejected, least_rejected)
        self._undecoded, self._gather = Quarantine(*left_out), gather
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._map = map if threads == 1 else self._executor.map
        reading = grain.ReadOptions(*((0, 0) if threads == 1 else (threads, 16 * threads)))
        self._plans = _Plans(source, planner, epochs, shuffle)
        plans = grain.MapDataset.source(self._plans)
        steps = _Steps(
            plans.to_iter_dataset(reading),
            plans,
            packs,
            Packer(planner.tokens, planner.patches, max_open),
            Quarantine(*left_out),
        )
        self._iterator = _Ahead(iter(steps.map(self._decode)), prefetch)

    def __iter__(self) -> Iterator[Step]:
        return self

    def wait(self, until: Callable[[], bool]) -> None:
        """Returns when the next step is ready, or soon after `until` is true. Signals are handled meanwhile, whatever holds the data up."""
        self._iterator.wait(until)

    def __next__(self) -> Step:
        step = self.take()
        self.refill()
        return step

    def take(self) -> Step:
        """The next step; no other is made ready in its place before `refill`.

        The thread that makes steps ready holds the GIL for milliseconds: awake, it would keep its consumer waiting.
        """
        step, plan, damaged = next(self._iterator)
        for rejection in self._gather(damaged):
            self._undecoded.add(rejection)
        self._undecoded.check(plan.cursor, plan.rejected)
        return step

    def refill(self) -> None:
        """Makes another step ready, after `take`."""
        self._iterator.refill()

    @property
    def begun(self) -> bool:
        """Whether a step was given, in this process or before it."""
        return self._iterator.get_state()["step"] > 0

    def state(self) -> dict[str, Any]:
        """What the steps after the last one given depend on, for JSON: the same on any rank of any number of ranks."""
        return {**self._identity, **self._iterator.get_state(), "undecoded": dict(self._undecoded.reasons)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on behind the step after which `state` was taken.

        Raises:
            ValueError: a state of other data or settings, or samples of it that cannot be planned any more.
        """
        for name, expected in self._identity.items():
            if state.get(name) != expected:
                raise ValueError(f"the loader's state has {name} = {state.get(name)}, expected {expected} as in this run")
        self._iterator.set_state({name: value for name, value in state.items() if name not in (*self._identity, "undecoded")})
        self._undecoded.restore(state["undecoded"], others=state["rejected"])

    def close(self) -> None:
        """Ends the threads, without waiting for one that the disk holds up."""
        self._iterator.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _decode(self, plan: _StepPlan) -> tuple[Step, _StepPlan, list[Rejection]]:
        """A step of its plan, and the samples of this rank's slice whose images are damaged."""
        mine = plan.packs[self.slice]
        pixels = [self._map(self._pixels, pack.positions, pack.documents) for pack in mine]
        bases = np.cumsum([0, *(pack.tokens for pack in plan.packs)])[self.slice]
        damaged: list[Rejection] = []
        batches = [self._batch(pack, of_pack, int(base), damaged) for pack, of_pack, base in zip(mine, pixels, bases, strict=True)]
        tokens, patches = (sum(getattr(pack, name) for pack in plan.packs) for name in ("tokens", "patches"))
        fill = (tokens / (len(plan.packs) * self.planner.tokens), patches / (len(plan.packs) * self.planner.patches))
        return Step(plan.index, tuple(batches), plan.cursor / len(self.source), tokens, patches, fill), plan, damaged

    def _pixels(self, position: int, document: Document) -> PackedImages | Rejection | None:
        try:
            return decode_images(document, self.planner.processor)
        except BaseException as error:
            return self.source.reject(self._plans.order[position][1], error)

    def _batch(self, pack: Pack, pixels: Iterable[PackedImages | Rejection | None], token_base: int, damaged: list[Rejection]) -> Batch:
        """The documents of a pack whose images are whole; the others are added to `damaged`."""
        kept: list[tuple[Document, PackedImages | None]] = []
        for document, result in zip(pack.documents, pixels, strict=True):
            if isinstance(result, Rejection):
                damaged.append(result)
            else:
                kept.append((document, result))
        return make_batch(kept, self.planner.processor, token_base)


class _Ahead:
    """The elements of a Grain iterator, made ready in a thread, each with the iterator's state behind it.

    A consumer that finds an element ready never gives up the GIL for it: `refill` lets the thread go on.

    Args:
        ahead: elements that are made ready; with 0 there is no thread.
    """

    def __init__(self, iterator: grain.DatasetIterator, ahead: int) -> None:
        self._iterator, self._ahead = iterator, ahead
        self._state = iterator.get_state()
        self._start()

    def _start(self) -> None:
        """Queues of their own for each thread: one that was left behind changes nothing."""
        self._ready: queue.SimpleQueue[_Made] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._head: _Made | None = None
        self._thread: threading.Thread | None = None

    def wait(self, until: Callable[[], bool], poll: float = 0.1) -> None:
        """Returns when an element is ready, or at most `poll` seconds after `until` is true."""
        if not self._ahead:
            return
        if self._thread is None:
            for _ in range(self._ahead):
                self._room.put(True)
            arguments = (self._iterator, self._ready, self._room)
            self._thread = threading.Thread(target=_make, args=arguments, name="steps", daemon=True)
            self._thread.start()
        while self._head is None and not until():
            try:
                self._head = self._ready.get(timeout=poll)
            except queue.Empty:
                continue

    def __next__(self) -> Any:
        if not self._ahead:
            element = next(self._iterator)
            self._state = self._iterator.get_state()
            return element
        self.wait(lambda: False)
        assert self._head is not None
        if self._head.error is not None:  # it stays: what is asked for once more fails alike
            raise self._head.error
        element, self._state, self._head = self._head.element, self._head.state, None
        return element

    def refill(self) -> None:
        """Makes one more element ready."""
        self._room.put(True)

    def get_state(self) -> dict[str, Any]:
        """Behind the element given last."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        self._end()
        if self._thread is not None:  # it must not touch the iterator any more
            self._thread.join()
        self._iterator.set_state(state)
        self._state = state
        self._start()

    def close(self) -> None:
        self._end()
        self._iterator.close()

    def _end(self) -> None:
        """Lets the thread end behind the element that it is at."""
        while not self._room.empty():
            with suppress(queue.Empty):
                self._room.get_nowait()
        self._room.put(False)


@dataclass(frozen=True)
class _Made:
    element: Any = None
    state: dict[str, Any] | None = None
    error: BaseException | None = None


def _make(iterator: grain.DatasetIterator, ready: queue.SimpleQueue[_Made], room: queue.SimpleQueue[bool]) -> None:
    """One element for each True in `room`, until there is a False or the iterator fails."""
    while room.get():
        try:
            ready.put(_Made(next(iterator), iterator.get_state()))
        except BaseException as error:
            ready.put(_Made(error=error))
            return


def make_batch(documents: Sequence[tuple[Document, PackedImages | None]], processor: Processor, token_base: int = 0) -> Batch:
    """One batch of documents, each with the pixels of its images if it has any. Without a document it is a BOS that trains nothing."""
    if not documents:
        bos = processor.tokenizer.bos_token_id
        return Batch.from_documents([[bos]], labels=torch.tensor([IGNORED]), sample_keys=("",), token_base=token_base)
    batch = Batch.from_documents(
        [document.token_ids.tolist() for document, _ in documents],
        labels=torch.from_numpy(np.concatenate([document.labels for document, _ in documents])),
        sample_keys=tuple(document.key for document, _ in documents),
        token_base=token_base,
    )
    packed = [images for _, images in documents if images is not None]
    if not packed:
        return batch
    n_images = sum(len(images.images) for images in packed)
    return replace(
        batch,
        patches=torch.cat([images.patches for images in packed]),
        patch_positions=torch.cat([images.patch_positions for images in packed]),
        images=Segments.of_lengths(length for images in packed for length in images.images.lengths),
        image_rows=find_image_rows(batch.token_ids, processor.image_token_id, processor.image_seq_len, n_images),
    )


def probe_patches(source: Source, planner: Planner, probed: int = PROBED) -> int:
    """The capacity in patches that goes with `planner.tokens`, from the first rows in the run's order: see `balanced_patches`."""
    unlimited = _Plans(source, replace(planner, patches=sys.maxsize), epochs=1)
    planned = (unlimited[position][1] for position in range(min(probed, len(source))))
    documents = [document for document in planned if isinstance(document, Document)]
    if not documents:
        raise ValueError(f"none of the first {min(probed, len(source))} samples can be used: check the data")
    return balanced_patches(documents, planner.tokens)


def decode_images(document: Document, processor: Processor) -> PackedImages | None:
    """The pixels of a document's images, if it has any.

    Raises:
        ValueError: an image that cannot be decoded, or has another size than planned.
    """
    if not document.images:
        return None
    packed = pack_images(
        document.images,
        split=document.split,
        shortest_edge=processor.shortest_edge,
        longest_edge=processor.longest_edge,
        positions_per_side=processor.positions_per_side,
        position_ids=processor.position_ids,
        max_pixels=processor.max_pixels,
        limits=processor.limits,
        upscale=document.upscale,
        threads=1,
    )
    if tuple(packed.images.lengths) != document.crops:
        raise ValueError("an image has another size than when it was planned")
    return packed


class _Plans:
    """The endless stream of planned samples, by position: for Grain a source with random access."""

    def __init__(self, source: Source, planner: Planner, epochs: int | None, shuffle: bool = True) -> None:
        self.source, self.planner = source, planner
        self.order = ShuffledRows(source.blocks, planner.seed) if shuffle else RowsInOrder(len(source))
        self._len = sys.maxsize if epochs is None else epochs * len(source)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, position: int) -> tuple[int, Document | Rejection]:
        epoch, row = self.order[position]
        return position, self.source.attempt(row, lambda sample: self.planner(sample, epoch))


@dataclass(frozen=True)
class _StepPlan:
    """`rejected`: key and reason of the samples before `cursor` that could not be planned."""

    index: int
    packs: tuple[Pack, ...]
    cursor: int
    rejected: dict[str, str]


class _Steps(grain.IterDataset):
    def __init__(self, parent: grain.IterDataset, *others: Any) -> None:
        super().__init__(parent)
        self._others = others

    def __iter__(self) -> grain.DatasetIterator[_StepPlan]:
        return _StepIterator(iter(self._parent), *self._others)


class _StepIterator(grain.DatasetIterator[_StepPlan]):
    """Packs planned samples, some packs a step. Its state is the cursor in the stream and the open packs, as positions."""

    def __init__(self, parent: grain.DatasetIterator, plans: grain.MapDataset, packs: int, packer: Packer, quarantine: Quarantine) -> None:
        super().__init__(parent)
        self._plans, self._n_packs, self._packer, self._quarantine = plans, packs, packer, quarantine
        self._index = self._cursor = 0

    def __next__(self) -> _StepPlan:
        packs: list[Pack] = []
        while len(packs) < self._n_packs and (pack := self._next_pack()) is not None:
            packs.append(pack)
        if not packs:
            raise StopIteration
        packs += [Pack() for _ in range(self._n_packs - len(packs))]
        self._index += 1
        return _StepPlan(self._index - 1, tuple(packs), self._cursor, dict(self._quarantine.reasons))

    def _next_pack(self) -> Pack | None:
        for position, planned in self._parent:
            self._cursor = position + 1
            if isinstance(planned, Rejection):
                self._quarantine.add(planned)
                self._quarantine.check(self._cursor)
            elif (closed := self._packer.add(position, planned)) is not None:
                return closed
        return self._packer.open.pop(0) if self._packer.open else None

    def get_state(self) -> dict[str, Any]:
        return {
            "step": self._index,
            "cursor": self._cursor,
            "open": [list(pack.positions) for pack in self._packer.open],
            "rejected": dict(self._quarantine.reasons),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state({"next_index": state["cursor"]})
        self._index, self._cursor = state["step"], state["cursor"]
        self._quarantine.restore(state["rejected"])
        self._packer.open = [self._planned_again(positions) for positions in state["open"]]

    def _planned_again(self, positions: Sequence[int]) -> Pack:
        pack = Pack()
        for position in positions:
            _, planned = self._plans[position]
            if isinstance(planned, Rejection):
                raise ValueError(f"a sample of the saved state cannot be planned any more: {planned.reason}")
            pack.add(position, planned)
        return pack
