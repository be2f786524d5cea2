"""A run from a recipe to its last checkpoint: data, trainer, checkpoints, guard and telemetry, step by step.

The folder of a run holds

    recipe.json      the recipe
    checkpoints/     to go on from (training/checkpoint.py)
    metrics.jsonl, events.jsonl, quarantine.jsonl
    adapter/         the adapters in PEFT's format, with the weights trained beside them; or model/, the whole model, where all is trained
    report.html      the run in figures, and the answers to the rows held out
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from idefics2_fast import Idefics2, Processor
from idefics2_fast.adapter_files import save_adapters
from idefics2_fast.training.checkpoint import Checkpoints, run_state, set_run_state
from idefics2_fast.training.guard import Action, Guard, Stop, Verdict, gather_rare
from idefics2_fast.training.loader import Loader, Step
from idefics2_fast.training.parallel import Ranks, ranks, whole_state
from idefics2_fast.training.planning import Planner
from idefics2_fast.training.recipe import Recipe
from idefics2_fast.training.report import answer_rows, write_report
from idefics2_fast.training.sources import First, Source, join_pairs, open_source
from idefics2_fast.training.telemetry import Telemetry, check_sinks
from idefics2_fast.training.trainer import DTYPES, Losses, Trainer

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


def fit(recipe: Recipe, data: Source | Sequence[Mapping[str, Any]] | None = None) -> Fitted:
    """Trains as a recipe says; goes on from the newest checkpoint in its folder that verifies.

    Args:
        data: rows, or a datasets.Dataset; None reads `recipe.data`.

    Raises:
        ValueError: data, model or number of ranks that cannot be used, or a folder that holds the run of another recipe.
        GuardError: losses or gradients that do not recover.
    """
    check_sinks(recipe.log_to)
    rows = open_source(recipe.data if data is None else data)
    processor = Processor.from_pretrained(recipe.model)
    with ranks() as group:
        _check_ranks(recipe, group)
        result = _train(recipe, trained_rows(rows, recipe, processor), processor, group)
    if group.first and not result.exit_code:
        answers = answer_rows(recipe, result.weights, rows, group.device) if recipe.held_out else []
        write_report(Path(recipe.out), recipe, answers)
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


def _train(recipe: Recipe, source: Source, processor: Processor, group: Ranks) -> Fitted:
    with Stop() as stop, short_turns():
        model = Idefics2.from_pretrained(recipe.model, dtype=DTYPES[recipe.dtype], device=group.device)
        run = _Run(recipe, source, processor, model, group)
        try:
            return run.go(stop)
        finally:
            run.close()


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
    def __init__(self, recipe: Recipe, source: Source, processor: Processor, model: Idefics2, group: Ranks) -> None:
        self.recipe, self.group, self.out = recipe, group, Path(recipe.out)
        self.processor = processor
        self.trainer = Trainer(model, recipe, group, new_tokens=_new_tokens(processor))
        self.guard = Guard(skip_at_most=recipe.skip_at_most, **({} if recipe.roll_back else {"factor": math.inf}))
        self.checkpoints = Checkpoints(self.out / "checkpoints", recipe.digest(), keep=recipe.keep)
        self.loader = self._load_data(source)
        self.done, self.loss = self._resume(), float("nan")
        if group.first:
            (self.out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
        self.telemetry = Telemetry(
            self.out,
            steps=recipe.steps,
            step=self.done,
            peak_flops=_peak_flops(group),
            sinks=recipe.log_to,
            config=asdict(recipe),
            rank=group.rank,
        )

    def go(self, stop: Stop) -> Fitted:
        while self.done < self.recipe.steps:
            with self.telemetry.waiting():
                step = next(self.loader)
            self._step(step)
            ending = stop.requested()
            if self.done % self.recipe.save_every == 0 or self.done == self.recipe.steps or ending:
                self._save(wait=ending or self.done == self.recipe.steps)
            if ending:
                return Fitted(self.done, self.loss, self.out / "checkpoints", stop.exit_code)
        return Fitted(self.done, self.loss, self._export())

    def close(self) -> None:
        self.loader.close()
        self.telemetry.close()

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

    def _save(self, wait: bool) -> None:
        state = run_state(self.trainer.model, self.trainer.optimizer)
        extra = {"loader": self.loader.state(), "guard": self.guard.state_dict()}
        self.checkpoints.save(self.done, state, extra, asynchronous=not wait)

    def _resume(self) -> int:
        """Steps that are done already: those of the newest checkpoint that verifies."""
        loaded = self._restore()
        if loaded is None:
            return 0
        step, extra = loaded
        self.loader.load_state(extra["loader"])
        return step

    def _restore(self, before: int | None = None) -> tuple[int, dict[str, Any]] | None:
        state = run_state(self.trainer.model, self.trainer.optimizer)
        loaded = self.checkpoints.load(state, before=before)
        if loaded is None:
            return None
        set_run_state(self.trainer.model, self.trainer.optimizer, state)
        self.trainer.restored()
        self.guard.load_state_dict(loaded.extra["guard"])
        return loaded.step, loaded.extra

    def _roll_back(self, verdict: Verdict) -> None:
        """The weights of the newest checkpoint, and the data from here on: the samples in between are not seen again."""
        loaded = self._restore(before=self.done + 1)
        if loaded is None:
            raise ValueError(f"{verdict.reason}, and there is no checkpoint yet to go back to: lower save_every or the learning rate")
        self.done = loaded[0]
        self.telemetry.rewind(self.done)

    def _export(self) -> Path:
        """The trained weights for other programs. A collective."""
        whole = self.recipe.adapter == "full"
        folder = self.out / ("model" if whole else "adapter")
        if whole:
            state = whole_state(self.trainer.model)
            if self.group.first:
                plain = Idefics2(self.trainer.model.config)
                plain.load_state_dict(state)
                plain.to(DTYPES[self.recipe.dtype]).save_pretrained(folder)
        else:
            save_adapters(self.trainer.model, folder, base=self.recipe.model)
        if self.group.first:
            self.processor.save_pretrained(folder)
        dist.barrier()
        return folder


def _new_tokens(processor: Processor) -> list[int]:
    """The ids that Idefics2 adds to its language model's."""
    names = (processor.fake_token, processor.image_token, "<end_of_utterance>")
    return sorted(processor.tokenizer.convert_tokens_to_ids(name) for name in names)


def _peak_flops(group: Ranks) -> float | None:
    if group.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(group.device)
    return next((group.world * flops for card, flops in PEAK_FLOPS.items() if card in name), None)
