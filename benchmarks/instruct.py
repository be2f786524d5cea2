"""The instruct suite: a step of this engine's trainer beside transformers and PEFT on the same samples, and what its loader does.

A step is DoRA and NEFTune, forward, backward, clipping and AdamW, in fp32. Documents of several questions and answers, some without an
image, one with two, of different sizes. A provider's loss and its gradient's norm must be within 1e-4 of transformers', the noise the same.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from idefics2_fast import Batch, Idefics2, Processor, ops
from idefics2_fast.adapter_files import save_adapters
from idefics2_fast.adapters import adapted
from idefics2_fast.batch import IGNORED
from idefics2_fast.benchmarks.case import CPU, ENGINE, Case, Figure, Figures, Row, Scope
from idefics2_fast.benchmarks.learn import answering
from idefics2_fast.benchmarks.model import PROMPT
from idefics2_fast.benchmarks.providers import HuggingFace, checkpoint
from idefics2_fast.benchmarks.reading import write_reader
from idefics2_fast.benchmarks.reading_corpus import Questions
from idefics2_fast.benchmarks.record import device_name
from idefics2_fast.benchmarks.timing import Call, Watch
from idefics2_fast.benchmarks.training_step import Step, TunedStep
from idefics2_fast.training import Recipe, fit, instruct
from idefics2_fast.training.loader import Loader, probe_patches
from idefics2_fast.training.optim import set_rate
from idefics2_fast.training.parallel import Ranks, ranks
from idefics2_fast.training.run import planner_of
from idefics2_fast.training.sources import open_source
from idefics2_fast.training.telemetry import METRICS
from idefics2_fast.training.trainer import Trainer

SUITE = "instruct"
TOLERANCE = 1e-4
LORA = "LoRA"
LOADING = "the demo's questions: data"
WARM = 5  # steps of a run that are left out: its threads start, and its caches fill
# (height, width) of the images of each document; padded to the greatest height and width they fill 0.40 of their batch. With greater
# ones `small` takes minutes.
SIZES = {
    "tiny": (((980, 452),), ((551, 980), (378, 504)), (), ()),
    "small": (((756, 350),), ((425, 756), (378, 378)), (), ()),
}
QUICK = (((480, 378),), ())

Pictures = Sequence[Sequence[tuple[int, int]]]  # sizes of the images of each document
Outcome = tuple[float, float]  # loss, norm of the gradient


def documents(pictures: Pictures) -> list[dict[str, Any]]:
    """A row in TRL's columns for each document: its images, then three questions and answers; about 250 tokens with an image."""
    draw = np.random.default_rng(0)
    rows = []
    for number, sizes in enumerate(pictures):
        images = [Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        pieces = [{"type": "image", "image": image} for image in images]
        messages = []
        for turn in range(3):
            asked = {"type": "text", "text": PROMPT[20 * turn : 20 * turn + 150 + 20 * number]}
            answered = {"type": "text", "text": PROMPT[: 40 + 10 * turn]}
            messages += [
                {"role": "user", "content": [*pieces, asked] if turn == 0 else [asked]},
                {"role": "assistant", "content": [answered]},
            ]
        rows.append({"messages": messages})
    return rows


class Ours:
    """A step of this engine's trainer."""

    def __init__(self, folder: Path, group: Ranks, **changes: Any) -> None:
        self.recipe = recipe_of(folder, **changes)
        self.trainer = Trainer(Idefics2.from_pretrained(folder), self.recipe, group)

    @torch.no_grad()
    def move_adapters(self) -> None:
        """Away from where they start, so that every gradient and every norm counts."""
        draw = torch.Generator().manual_seed(0)
        for layer in adapted(self.trainer.model).values():
            layer.b.to_local().normal_(std=0.02, generator=draw)
            layer.magnitude.mul_(1 + 0.05 * torch.randn(layer.magnitude.shape, generator=draw))
        self.trainer.restored()

    def prime(self) -> None:
        """Makes the optimizer's state, which is there in every step but a run's first."""
        set_rate(self.trainer.optimizer, 0.0)
        for parameter in self.trainer.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.trainer.optimizer.step()
        self.trainer.skip()

    def call(self, batch: Batch) -> Call:
        def run(watch: Watch) -> Outcome:
            with torch.inference_mode(False), torch.enable_grad():
                watch.start("step")
                losses = self.trainer.accumulate([batch], step=0)
                self.trainer.update(step=0)
                watch.stop()
            return losses.loss, losses.grad_norm

        return run


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    """The recipe's own, but for chance that transformers draws otherwise, or not at all. Nothing is recomputed in the backward pass."""
    settings = {"tokens": 2048, "patches": 9800, "packs": 1, "dtype": "float32", "checkpointing": "none", "trained": ("connector",)}
    return instruct(folder, "", "", **settings, dropout=0.0, split_share=0.0, upscale_share=0.0, **changes)


def batch_of(rows: Sequence[Mapping[str, Any]], recipe: Recipe) -> Batch:
    """All rows in one pack, as the loader makes it."""
    loader = Loader(open_source(rows), planner_of(recipe, Processor.from_pretrained(recipe.model)), packs=1, epochs=1)
    try:
        ((batch,),) = [step.batches for step in loader]
    finally:
        loader.close()
    return batch


def padded(plain: HuggingFace, batch: Batch, rows: Sequence[Mapping[str, Any]], images: bool = True) -> dict[str, Any]:
    """A batch of rows in TRL's columns as transformers' processor makes it: a padded row of each document, and its images if asked for."""
    processor, chats = plain.processor, [rows[int(key)]["messages"] for key in batch.sample_keys]
    processor.image_processor.do_image_splitting = False
    texts = [processor.apply_chat_template(chat).removesuffix("\n") + processor.tokenizer.eos_token for chat in chats]
    pictures = [pictures_of(chat) for chat in chats]
    inputs = dict(processor(text=texts, images=pictures if images and any(pictures) else None, padding=True, return_tensors="pt"))
    real = inputs["attention_mask"].bool()
    assert torch.equal(inputs["input_ids"][real], batch.token_ids), "transformers' tokens are others"
    inputs["labels"] = torch.full_like(inputs["input_ids"], IGNORED).masked_scatter(real, batch.labels)
    return inputs


def one_by_one(plain: HuggingFace, batch: Batch, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same with a list of images [3, h, w], none of them padded."""
    pictures = [picture for key in batch.sample_keys for picture in pictures_of(rows[int(key)]["messages"])]
    pixels = plain.processor.image_processor([pictures], do_pad=False)["pixel_values"][0]
    return {**padded(plain, batch, rows, images=False), "images": [torch.from_numpy(image) for image in pixels]}


def pictures_of(chat: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
    return [piece["image"] for message in chat for piece in message["content"] if piece["type"] == "image"]


def noise_of(batch: Batch, recipe: Recipe, width: int) -> Tensor:
    """What the trainer adds to the embeddings of its step 0: [T, width]."""
    drawn = ops.Noise.of(batch.documents, alpha=recipe.neftune_alpha, seed=recipe.seed, step=0)
    drawn = replace(drawn, lengths=drawn.lengths.index_fill(0, batch.image_rows, 0))
    return ops.embedding(None, torch.zeros(batch.documents.total, width), noise=drawn)


def their_call(step: Step, inputs: Mapping[str, Any], noise: Tensor, recipe: Recipe) -> Call:
    """A step of `Step` with clipping and NEFTune, as transformers draws it; in the first, which is checked, `noise` is in its place."""
    first = [torch.zeros(*inputs["input_ids"].shape, noise.shape[1]).masked_scatter(inputs["attention_mask"].bool()[..., None], noise)]

    def add_noise(module: nn.Module, args: Any, embeddings: Tensor) -> Tensor:
        most = recipe.neftune_alpha / math.sqrt(embeddings.shape[1] * embeddings.shape[2])
        return embeddings + (first.pop() if first else torch.zeros_like(embeddings).uniform_(-most, most))

    step.plain.model.get_input_embeddings().register_forward_hook(add_noise)

    def run(watch: Watch) -> Outcome:
        with torch.inference_mode(False), torch.enable_grad():
            step.start_anew()
            watch.start("step")
            loss = step.loss(inputs)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(step.trained.values(), recipe.clip)
            step.optimizer.step()
            watch.stop()
        return loss.item(), norm.item()

    return run


def cases(scope: Scope) -> Iterator[Case | Figures]:
    """The suite's cases for each size of model, and what the loader does."""
    for size in scope.sizes:
        yield from scope.first(cases_of(size, QUICK if scope.quick else SIZES[size]))
    if "tiny" in scope.sizes and not scope.quick:
        yield loader_figures()


def cases_of(size: str, pictures: Pictures) -> Iterator[Case]:
    with ranks() as group:
        yield step_case(size, group, pictures)
        yield adapters_case(size, group, pictures)


def named(size: str, pictures: Pictures) -> str:
    return f"{size} fp32, {len(pictures)} documents, {sum(map(len, pictures))} images"


def step_case(size: str, group: Ranks, pictures: Pictures) -> Case:
    """The step of three providers, the adapters of this engine's loaded by PEFT."""
    from peft import PeftModel

    rows = documents(pictures)
    with checkpoint(size, torch.float32) as folder, tempfile.TemporaryDirectory() as adapter:
        ours = Ours(folder, group)
        ours.move_adapters()
        save_adapters(ours.trainer.model, adapter)
        ours.prime()
        batch = batch_of(rows, ours.recipe)
        adapt = partial(PeftModel.from_pretrained, model_id=adapter, is_trainable=True)
        step, tuned = (made(HuggingFace(folder, torch.float32, CPU), adapt=adapt) for made in (Step, TunedStep))
    noise = noise_of(batch, ours.recipe, ours.trainer.model.config.text.hidden_size)
    theirs = {step: padded(step.plain, batch, rows), tuned: one_by_one(tuned.plain, batch, rows)}
    calls = {step.name: their_call(step, inputs, noise, ours.recipe) for step, inputs in theirs.items()}
    needs, memory = {"hf": 4.0, "hf-tuned": 1.3}, {"hf": 0.4, "hf-tuned": 0.7}
    row = Row(f"{named(size, pictures)}: DoRA and NEFTune training step", ("step",), needs=needs, memory=memory, pass_="both")
    return Case(SUITE, calls | {ENGINE: ours.call(batch)}, near_first(), (row,))


def adapters_case(size: str, group: Ranks, pictures: Pictures) -> Case:
    """DoRA beside LoRA of the same rank, both fresh, when they compute the same."""
    with checkpoint(size, torch.float32) as folder:
        steps = {LORA: Ours(folder, group, adapter="lora"), ENGINE: Ours(folder, group)}
        batch = batch_of(documents(pictures), steps[ENGINE].recipe)
    for step in steps.values():
        step.prime()
    row = Row(f"{named(size, pictures)}: DoRA beside LoRA", ("step",), needs={LORA: 1 / 1.10}, pass_="both")
    return Case(SUITE, {name: step.call(batch) for name, step in steps.items()}, near_first(loss_alone=True), (row,))


def near_first(loss_alone: bool = False) -> Callable[[str, Outcome], str]:
    """A check of the loss, and of the gradient's norm, against the first provider's."""
    expected: list[Outcome] = []

    def check(name: str, outcome: Outcome) -> str:
        expected.append(outcome)
        for what, value, right in zip(("loss",) if loss_alone else ("loss", "norm of the gradient"), outcome, expected[0], strict=False):
            if not abs(value - right) <= TOLERANCE * right:
                return f"the {what} is {value:.6f}, expected {right:.6f}"
        return ""

    return check


# --- the loader ---


def loader_figures(steps: int = 40) -> Figures:
    """A run of the demo's second lesson: how full its packs are, and whether the model waits for them.

    The loader alone, for as many steps, says how much faster it could be. The first steps are left out, while threads and caches start.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_reader(folder / "reader")
        rows = Questions(rows=4000)
        recipe = balanced(replace(answering(folder / "reader", folder / "run", steps), held_out=0), rows)
        fit(recipe, rows)
        run = _lines(folder / "run")[WARM:]
        loaded = seconds_of_loader(recipe, rows, steps)
    seconds = sum(step["seconds"] for step in run)
    waited = sum(step["data_wait"] * step["seconds"] for step in run)
    figures = [
        Figure("fill of tokens", mean(step["fill_tokens"] for step in run), "", 0.90),
        Figure("fill of patches", mean(step["fill_patches"] for step in run), "", 0.85),
        Figure("loader against model", seconds / len(run) / loaded, "x", 3.0),
        Figure("data wait", waited / seconds, "", 0.02, at_least=False),
        Figure("time to the first loss", seconds_to_first_loss(), "s", 60.0, at_least=False),
    ]
    return Figures(SUITE, LOADING, figures, device=device_name(CPU))


def balanced(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> Recipe:
    """The recipe with the capacity in patches that goes with its tokens in these rows."""
    planner = planner_of(recipe, Processor.from_pretrained(recipe.model))
    return replace(recipe, patches=probe_patches(open_source(rows), planner))


def seconds_of_loader(recipe: Recipe, rows: Sequence[Mapping[str, Any]], steps: int) -> float:
    """Of one step, when nothing else is done. What was made ready before the first is left out."""
    planner = planner_of(recipe, Processor.from_pretrained(recipe.model))
    loader = Loader(open_source(rows), planner, packs=recipe.packs, threads=recipe.workers)
    try:
        for _ in range(WARM):
            next(loader)
        begin = time.perf_counter()
        for _ in range(steps):
            next(loader)
        return (time.perf_counter() - begin) / steps
    finally:
        loader.close()


def seconds_to_first_loss() -> float:
    """From the command line to the first line of metrics.jsonl: the tiny model, in a process of its own."""
    with checkpoint("tiny", torch.float32) as folder:
        data, out = folder / "rows.jsonl", folder / "run"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in stored(documents(SIZES["tiny"]) * 4, folder)))
        command = [sys.executable, "-m", "idefics2_fast.training", "instruct", "--model", str(folder), "--data", str(data)]
        command += ["--out", str(out), "--steps", "1", "--warmup", "0", "--packs", "1", "--dtype", "float32"]
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONSAFEPATH": "1"}
        begin = time.perf_counter()
        with (folder / "said").open("w") as said:
            child = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
            while child.poll() is None and not _lines(out):
                time.sleep(0.05)
            seconds = time.perf_counter() - begin
        if child.wait() or not _lines(out):
            raise RuntimeError(f"the run ended with {child.returncode}: {(folder / 'said').read_text()[-500:]}")
        return seconds


def stored(rows: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """The rows with their images as files."""
    for row, number in zip(rows, count()):
        messages = []
        for message in row["messages"]:
            pieces = [dict(piece) for piece in message["content"]]
            for place, piece in enumerate(pieces):
                if "image" in piece:
                    piece["path"] = f"{number}-{place}.png"
                    piece.pop("image").save(folder / piece["path"])
            messages.append({**message, "content": pieces})
        yield {"messages": messages}


def _lines(run: Path) -> list[dict[str, float]]:
    path = run / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
