"""A run from a recipe to its last checkpoint: data, trainer, checkpoints, guard and telemetry, step by step.

The folder of a run holds

    recipe.json      the recipe
    checkpoints/     to go on from (training/checkpoint.py)
    lock             the process that uses the folder (training/lock.py)
    metrics.jsonl, events.jsonl, quarantine.jsonl
    adapter/         the adapters in PEFT's format, with the weights trained beside them; or model/, the whole model, where all is trained
    report.html      the run in figures, and the answers to the rows held out
"""

from __future__ import annotations

import functools
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from idefics2_fast import Idefics2, Processor
from idefics2_fast.adapter_files import save_adapters
from idefics2_fast.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    Loaded,
    committed_steps,
    run_state,
    set_run_state,
    write_aside,
)
from idefics2_fast.training.guard import Action, Guard, Stop, Stopped, Verdict, gather_rare
from idefics2_fast.training.identity import Identity, identify
from idefics2_fast.training.loader import Loader, Step
from idefics2_fast.training.lock import run_lock
from idefics2_fast.training.parallel import Ranks, ranks, whole_state
from idefics2_fast.training.planning import Planner
from idefics2_fast.training.recipe import Recipe
from idefics2_fast.training.report import answer_rows, write_report
from idefics2_fast.training.sources import First, Source, join_pairs, open_source
from idefics2_fast.training.telemetry import Telemetry, check_sinks
from idefics2_fast.training.trainer import DTYPES, Losses, Trainer

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
RETRY = 10.0  # seconds until a checkpoint that found no room is tried again
# Dense FLOPs per second in bf16 of cards that runs are measured by (NVIDIA's data sheets, SXM).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Fitted:
    """What a run ended with: steps done, the last loss, where its weights are, and the exit code of a run that was told to stop.

    `loss` is NaN where no step was left to do.
    """

    steps: int
    loss: float
    weights: Path
    exit_code: int = 0


def fit(
    recipe: Recipe,
    data: Source | Sequence[Mapping[str, Any]] | None = None,
    *,
    wait_for_room: bool = False,
) -> Fitted:
    """Trains as a recipe says; goes on from the newest checkpoint in its folder that verifies.

    SIGTERM and SIGINT end the run: at once while it starts or reports, else at the next step's border
    with a checkpoint, waiting for data or not.

    Args:
        data: rows, or a datasets.Dataset; None reads `recipe.data`. A sequence that makes its rows on
            demand may give a `fingerprint`, text that stands for them in the run's identity; all rows
            of another are read once.
        wait_for_room: where a full disk keeps a checkpoint from being saved, try again until there is room.

    Raises:
        ValueError: data, model or number of ranks that cannot be used; a folder that another run uses,
            or that holds the run of another recipe, other data or another model.
        GuardError: losses or gradients that do not recover.
        CheckpointError: a checkpoint that could not be saved; those before it stand.
    """
    with Stop() as stop, ExitStack() as held:
        try:
            with stop.raising():
                check_sinks(recipe.log_to)
                if not recipe.out:
                    raise ValueError("out is empty, expected the folder of the run")
                rows = open_source(recipe.data if data is None else data)
                processor = Processor.from_pretrained(recipe.model)
                with ranks() as group:
                    _check_ranks(recipe, group)
                    group.on_first(lambda: held.enter_context(run_lock(Path(recipe.out))))
                    result = _train(recipe, rows, processor, group, stop, wait_for_room)
                if group.first and not result.exit_code:
                    answers = answer_rows(recipe, result.weights, rows, group.device) if recipe.held_out else []
                    write_report(Path(recipe.out), recipe, answers)
        except Stopped:
            checkpoints = Path(recipe.out) / CHECKPOINTS
            return Fitted(max(committed_steps(checkpoints), default=0), math.nan, checkpoints, stop.exit_code)
        return result


def trained_rows(source: Source, recipe: Recipe, processor: Processor) -> Source:
    """All rows but those that the recipe holds out, joined where it says so.

    Raises:
        ValueError: none is left.
    """
    if recipe.held_out >= len(source):
        raise ValueError(f"held_out is {recipe.held_out}, expected fewer than the {len(source)} rows that there are")
    trained = First(source, len(source) - recipe.held_out) if recipe.held_out else source
    return join_pairs(trained, planner_of(recipe, processor).room) if recipe.join else trained


def _check_ranks(recipe: Recipe, group: Ranks) -> None:
    if recipe.packs % group.world:
        raise ValueError(f"packs is {recipe.packs}, expected a multiple of the {group.world} ranks that share them")


def planner_of(recipe: Recipe, processor: Processor) -> Planner:
    """Plans samples as the recipe says."""
    return Planner(
        processor,
        seed=recipe.seed,
        tokens=recipe.tokens,
        patches=recipe.patches,
        split_share=recipe.split_share,
        upscale_share=recipe.upscale_share,
        upscale_max=recipe.upscale_most,
    )


def _train(recipe: Recipe, rows: Source, processor: Processor, group: Ranks, stop: Stop, wait_for_room: bool) -> Fitted:
    with short_turns(), ExitStack() as held:
        model = Idefics2.from_pretrained(recipe.model, dtype=DTYPES[recipe.dtype], device=group.device)
        identity = group.on_first(lambda: identify(recipe, rows, model, processor))
        run = _Run(recipe, trained_rows(rows, recipe, processor), processor, model, identity, group, held, wait_for_room)
        with stop.polite():
            ended = run.go(stop)
        return ended or Fitted(run.done, run.loss, run.export())


@contextmanager
def short_turns(seconds: float = 5e-4) -> Iterator[None]:
    """How long one of Python's threads may keep others waiting: by default 5 ms, which the step pays whenever the loader is at work."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class _Run:
    """The state of a run between its steps. What it opens is closed with `held`."""

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        processor: Processor,
        model: Idefics2,
        identity: Identity,
        group: Ranks,
        held: ExitStack,
        wait_for_room: bool,
    ) -> None:
        self.recipe, self.group, self.out = recipe, group, Path(recipe.out)
        self.processor, self.wait_for_room = processor, wait_for_room
        self.trainer = Trainer(model, recipe, group, new_tokens=_new_tokens(processor))
        self.guard = Guard(skip_at_most=recipe.skip_at_most, **({} if recipe.roll_back else {"factor": math.inf}))
        self.checkpoints = Checkpoints(self.out / CHECKPOINTS, recipe.digest(), keep=recipe.keep, identity=identity)
        self.loader = self._load_data(source)
        held.callback(self.loader.close)
        self.loss = float("nan")
        self.saved: dict[str, Any] | None = None  # what the newest checkpoint holds beside weights
        self.done, remarks = self._resume()
        if group.first:
            write_aside(self.out / "recipe.json", json.dumps(asdict(recipe), indent=2) + "\n")
        self.telemetry = Telemetry(
            self.out,
            steps=recipe.steps,
            step=self.done,
            peak_flops=_peak_flops(group),
            sinks=recipe.log_to,
            config=asdict(recipe),
            rank=group.rank,
        )
        held.callback(self.telemetry.close)
        for remark in remarks:
            self._remark("resume", remark)

    def go(self, stop: Stop) -> Fitted | None:
        """The steps that are left. None when all are done, and otherwise what a signal has left of the run."""
        while self.done < self.recipe.steps:
            with self.telemetry.waiting():
                self.loader.wait(lambda: stop.received)
                ending = stop.requested()
                step = None if ending else self.loader.take()
            if step is None:
                break
            self.loader.refill()
            self._step(step)
            if self.done % self.recipe.save_every == 0 or self.done == self.recipe.steps:
                self._save(stop, wait=self.done == self.recipe.steps)
        if not stop.requested():
            return None
        self._save(stop, wait=True)
        return Fitted(self.done, self.loss, self.out / CHECKPOINTS, stop.exit_code)

    def _load_data(self, source: Source) -> Loader:
        return Loader(
            source,
            planner_of(self.recipe, self.processor),
            packs=self.recipe.packs,
            shuffle=self.recipe.shuffle,
            rank=self.group.rank,
            world_size=self.group.world,
            threads=self.recipe.workers,
            quarantine=self.out / "quarantine.jsonl",
            gather=gather_rare,
        )

    def _step(self, step: Step) -> None:
        """One step of the optimizer, or what the guard says instead."""
        losses = self.trainer.accumulate(step.batches, self.done)
        keys = tuple(key for batch in step.batches for key in batch.sample_keys)
        verdict = self.guard.inspect(self.done, losses.mine, losses.grad_norm, keys)
        if verdict.action is Action.PROCEED:
            rate = self.trainer.update(self.done)
            self.done, self.loss = self.done + 1, losses.loss
            self._record(step, losses, rate)
        else:
            self.trainer.skip()
            self.telemetry.event(self.done, verdict.action.value, reason=verdict.reason, samples=verdict.sample_keys)
            if verdict.action is Action.ROLL_BACK:
                self._roll_back(verdict)

    def _record(self, step: Step, losses: Losses, rate: float) -> None:
        self.telemetry.step(
            self.done,
            loss=losses.loss,
            lr=rate,
            grad_norm=losses.grad_norm,
            tokens=step.tokens,
            images=losses.images,
            flops=losses.flops,
            trained_tokens=losses.trained,
            fill_tokens=step.fill[0],
            fill_patches=step.fill[1],
            epoch=step.epoch,
        )

    def _save(self, stop: Stop, wait: bool) -> None:
        """A checkpoint of this moment, if the newest is not one already; `wait` brings it to the disk."""
        extra = {"loader": self.loader.state(), "guard": self.guard.state_dict()}
        now = {"step": self.done, **extra}
        while True:
            try:
                if now != self.saved and self.loader.begun:
                    state = run_state(self.trainer.model, self.trainer.optimizer)
                    self.checkpoints.save(self.done, state, extra | {"libraries": libraries()}, asynchronous=not wait)
                    self.saved = now
                elif wait:
                    self.checkpoints.wait()
                return
            except CheckpointError as error:
                self.saved = None
                self._wait_for_room(error, stop)

    def _wait_for_room(self, error: CheckpointError, stop: Stop) -> None:
        """Returns when saving may be tried again; raises `error` where that was not asked for, or the run is told to end."""
        if not (error.full and self.wait_for_room):
            raise error
        self._remark("full disk", f"{error}; the run waits for room")
        until = time.monotonic() + RETRY
        while time.monotonic() < until and not stop.received:
            time.sleep(0.1)
        if stop.requested():
            raise error

    def _remark(self, event: str, reason: str) -> None:
        """A line for people, once, and one of events.jsonl."""
        if self.group.first:
            log.warning("step %d: %s", self.done, reason)
        self.telemetry.event(self.done, event, reason=reason)

    def _resume(self) -> tuple[int, list[str]]:
        """Steps that are done already, those of the newest checkpoint that verifies; and what is to be said about it."""
        loaded = self._restore()
        if loaded is None:
            return 0, []
        self.loader.load_state(loaded.extra["loader"])
        if loaded.step > self.recipe.steps:
            raise ValueError(f"steps is {self.recipe.steps}, and the run in {self.out} has done {loaded.step}: expected as many or more")
        identity = self.checkpoints.identity
        if loaded.identity is not None:
            self.saved = {"step": loaded.step, "loader": loaded.extra["loader"], "guard": loaded.extra["guard"]}
            before = loaded.identity["recipe"]["steps"]
            remarks = []
        else:
            before = (identity.earlier or {}).get("steps", self.recipe.steps)
            remarks = ["the checkpoint is of format 1, without the identity of data, model and processor: it is recorded from here on"]
        if before != self.recipe.steps:
            rate = "" if self.recipe.schedule == "constant" else f"; the {self.recipe.schedule} schedule is drawn over them from here on"
            remarks.append(f"{self.recipe.steps} steps, and {before} before{rate}")
        now, saved = libraries(), loaded.extra.get("libraries", {})
        if others := [f"{name} {now[name]}, and {version} before" for name, version in saved.items() if now.get(name, version) != version]:
            remarks.append(f"{'; '.join(others)}: steps from here on need not have the bits of the run so far")
        return loaded.step, remarks

    def _restore(self, before: int | None = None) -> Loaded | None:
        state = run_state(self.trainer.model, self.trainer.optimizer)
        loaded = self.checkpoints.load(state, before=before)
        if loaded is not None:
            set_run_state(self.trainer.model, self.trainer.optimizer, state)
            self.trainer.restored()
            self.guard.load_state_dict(loaded.extra["guard"])
        return loaded

    def _roll_back(self, verdict: Verdict) -> None:
        """The weights of the newest checkpoint, and the data from here on: the samples in between are not seen again."""
        loaded = self._restore(before=self.done + 1)
        if loaded is None:
            raise ValueError(f"{verdict.reason}, and there is no checkpoint yet to go back to: lower save_every or the learning rate")
        self.done = loaded.step
        self.telemetry.rewind(self.done)

    def export(self) -> Path:
        """The trained weights for other programs. A collective."""
        whole = self.recipe.adapter == "full"
        folder = self.out / ("model" if whole else "adapter")
        if whole:
            state = whole_state(self.trainer.model)
            if self.group.first:
                plain = Idefics2(self.trainer.model.config)
                plain.load_state_dict(state)
                plain.generation_config = self.trainer.model.generation_config
                plain.to(DTYPES[self.recipe.dtype]).save_pretrained(folder)
        else:
            save_adapters(self.trainer.model, folder, base=self.recipe.model)
        if self.group.first:
            self.processor.save_pretrained(folder)
        dist.barrier()
        return folder


@functools.cache
def libraries() -> dict[str, str]:
    """The versions of what makes a step's numbers, where they are installed by these names."""
    versions = {}
    for name in ("idefics2-fast", "torch", "transformers", "tokenizers", "pillow"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _new_tokens(processor: Processor) -> list[int]:
    """The ids that Idefics2 adds to its language model's."""
    names = (processor.fake_token, processor.image_token, "<end_of_utterance>")
    return sorted(processor.tokenizer.convert_tokens_to_ids(name) for name in names)


def _peak_flops(group: Ranks) -> float | None:
    if group.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(group.device)
    return next((group.world * flops for card, flops in PEAK_FLOPS.items() if card in name), None)
