"""Two hundred steps of this trainer and of transformers with PEFT: the same samples, the same start, and at every step the same loss."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.corpus import mixed_rows
from torch import Tensor

from idefics2_fast import Idefics2, Idefics2Config, Processor
from idefics2_fast.adapter_files import save_adapters
from idefics2_fast.benchmarks.instruct import padded
from idefics2_fast.benchmarks.local_checkpoint import write_model, write_processor
from idefics2_fast.benchmarks.providers import HuggingFace
from idefics2_fast.training import Recipe, instruct
from idefics2_fast.training.loader import Loader, Step
from idefics2_fast.training.parallel import ranks
from idefics2_fast.training.run import planner_of
from idefics2_fast.training.sources import open_source
from idefics2_fast.training.trainer import Trainer

STEPS, WARMUP, RATE, DECAY, CLIP = 200, 20, 1e-3, 0.1, 1.0
NEW_TOKENS = [32000, 32001, 32002]
CPU = torch.device("cpu")
TINY = Idefics2Config.named("tiny")
CONFIG = replace(
    TINY,
    vision=replace(TINY.vision, num_hidden_layers=1),
    perceiver=replace(TINY.perceiver, n_latents=4, depth=1),
    text=replace(TINY.text, num_hidden_layers=2),
)


def write_checkpoint(folder: Path) -> None:
    """A model smaller than tiny, for images of 28 to 112 pixels."""
    write_model(folder, CONFIG)
    write_processor(folder, image_seq_len=CONFIG.perceiver.n_latents)
    replace(Processor.from_pretrained(folder), shortest_edge=28, longest_edge=112).save_pretrained(folder)


def conversations(n: int) -> list[dict[str, Any]]:
    """Rows in TRL's columns, of one question or two, with images or without."""
    rows = []
    for row in mixed_rows(n):
        pieces = [{"type": "image", "image": Image.open(io.BytesIO(image)).convert("RGB")} for image in row["images"]]
        messages = []
        for text in row["texts"][:2]:
            messages.append({"role": "user", "content": [*pieces, {"type": "text", "text": text["user"]}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": text["assistant"]}]})
            pieces = []
        rows.append({"messages": messages})
    return rows


def recipe_of(model: Path, out: Path) -> Recipe:
    """The recipe's own trained parts: DoRA on tower and language model, connector, new tokens. Nothing is left to chance."""
    schedule = {"steps": STEPS, "warmup": WARMUP, "learning_rate": RATE, "weight_decay": DECAY, "clip": CLIP, "schedule": "linear"}
    nothing_drawn = {"dropout": 0.0, "neftune_alpha": 0.0, "split_share": 0.0, "upscale_share": 0.0}
    return instruct(
        model,
        "",
        out,
        tokens=120,
        patches=150,
        packs=2,
        rank=4,
        alpha=8.0,
        dtype="float32",
        checkpointing="none",
        **schedule,
        **nothing_drawn,
    )


def our_losses(trainer: Trainer, steps: Sequence[Step]) -> Iterator[float]:
    for index, step in enumerate(steps):
        yield trainer.accumulate(step.batches, index).loss
        trainer.update(index)


class TheirTrainer:
    """What a script with transformers and PEFT does: padded batches, the model's own loss, torch's AdamW, clipping and LambdaLR."""

    def __init__(self, model: Path, adapter: Path) -> None:
        from peft import PeftModel

        self.plain = HuggingFace(model, torch.float32, CPU)
        self.model = PeftModel.from_pretrained(self.plain.model, adapter, is_trainable=True).train()
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        decay = {name: p for name, p in trained.items() if ".lora_A." in name or ".lora_B." in name or name.endswith("proj.weight")}
        others = {name: p for name, p in trained.items() if name not in decay}
        for name, parameter in others.items():
            if "embed_tokens" in name or "lm_head" in name:
                parameter.register_post_accumulate_grad_hook(keep_new_tokens)
        groups = [{"params": [*decay.values()], "weight_decay": DECAY}, {"params": [*others.values()], "weight_decay": 0.0}]
        self.trained, self.optimizer = list(trained.values()), torch.optim.AdamW(groups, lr=RATE)
        rise_and_fall = lambda step: min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))  # noqa: E731
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rise_and_fall)

    def losses(self, steps: Sequence[Step], rows: Sequence[dict[str, Any]]) -> Iterator[float]:
        for step in steps:
            batches = [padded(self.plain, batch, rows) for batch in step.batches]
            count = sum((inputs["labels"] != -100).sum() for inputs in batches)
            total = 0.0
            for inputs in batches:
                loss = self.model(**inputs, num_items_in_batch=count).loss
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            yield total


def keep_new_tokens(parameter: Tensor) -> None:
    others = torch.ones(parameter.shape[0], dtype=torch.bool)
    others[NEW_TOKENS] = False
    parameter.grad[others] = 0


@pytest.mark.slow(minutes=2)
def test_two_hundred_steps_have_the_losses_of_transformers_and_peft(tmp_path):
    """Every loss within 1e-3, absolute and relative: DoRA, connector and new tokens trained, two packs a step, nothing drawn."""
    write_checkpoint(tmp_path / "model")
    rows, recipe = conversations(40), recipe_of(tmp_path / "model", tmp_path / "out")
    loader = Loader(open_source(rows), planner_of(recipe, Processor.from_pretrained(recipe.model)), packs=recipe.packs)
    steps = [next(loader) for _ in range(STEPS)]
    loader.close()
    with ranks() as group:
        trainer = Trainer(Idefics2.from_pretrained(recipe.model), recipe, group, new_tokens=NEW_TOKENS)
        save_adapters(trainer.model, tmp_path / "adapter", base=recipe.model)
        ours = list(our_losses(trainer, steps))
    theirs = list(TheirTrainer(tmp_path / "model", tmp_path / "adapter").losses(steps, rows))
    assert len(ours) == len(theirs) == STEPS
    assert theirs[-1] < theirs[0] - 1  # there is something to learn, and to differ in
    assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) < 1e-3
    assert max(abs(one - other) / other for one, other in zip(ours, theirs, strict=True)) < 1e-3
