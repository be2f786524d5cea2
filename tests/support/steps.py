"""Steps of a trainer on a very small model, the same in any process: documents, with and without images, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from idefics2_fast import Batch, Idefics2, Idefics2Config, Segments
from idefics2_fast.batch import find_image_rows
from idefics2_fast.training.parallel import Ranks
from idefics2_fast.training.recipe import Recipe
from idefics2_fast.training.trainer import Trainer

TINY = Idefics2Config.named("tiny")
IMAGE, NEW = 61, (60, 61, 62)
LATENTS = 4
CONFIG = replace(
    TINY,
    text=replace(TINY.text, vocab_size=64),
    perceiver=replace(TINY.perceiver, n_latents=LATENTS),
    image_token_id=IMAGE,
    eos_token_ids=(2,),
)


@dataclass(frozen=True)
class Text:
    """A document: token ids, labels, and the patches of an image or none."""

    ids: list[int]
    labels: list[int]
    patches: Tensor | None = None


def document(tokens: int, trained: int, patches: int = 0, seed: int = 0) -> Text:
    """Random tokens, an image of some patches after the first, the last `trained` tokens trained."""
    draw = torch.Generator().manual_seed(1000 * seed + 10 * tokens + patches)
    words = torch.randint(3, 60, (tokens - 1,), generator=draw).tolist()
    ids = [1, *([60, *[IMAGE] * LATENTS, 60] if patches else []), *words]
    pixels = torch.randint(0, 256, (patches, 588), generator=draw, dtype=torch.uint8) if patches else None
    return Text(ids, [-100] * (len(ids) - trained) + ids[-trained:], pixels)


def batch_of(documents: Sequence[Text], token_base: int = 0) -> Batch:
    batch = Batch.from_documents(
        [text.ids for text in documents],
        labels=torch.tensor([label for text in documents for label in text.labels]),
        sample_keys=tuple(map(str, range(len(documents)))),
        token_base=token_base,
    )
    pixels = [text.patches for text in documents if text.patches is not None]
    if not pixels:
        return batch
    images = Segments.of_lengths([patches.shape[0] for patches in pixels])
    return replace(
        batch,
        patches=torch.cat(pixels),
        patch_positions=torch.cat([torch.arange(patches.shape[0]) for patches in pixels]),
        images=images,
        image_rows=find_image_rows(batch.token_ids, IMAGE, LATENTS, len(pixels)),
    )


def packed(*packs: Sequence[Text]) -> list[Batch]:
    """A batch for each pack, numbered through as the loader does."""
    batches, base = [], 0
    for pack in packs:
        batches.append(batch_of(pack, base))
        base += batches[-1].token_ids.shape[0]
    return batches


def trainer_of(ranks: Ranks, **changes: Any) -> Trainer:
    """A trainer of the same weights each time; B is not zero, so that dropout and magnitudes show."""
    settings = {"rank": 4, "dropout": 0.1, "dtype": "float32", "learning_rate": 1e-2, "warmup": 0, "schedule": "constant"}
    torch.manual_seed(0)
    model = Idefics2(CONFIG)
    trainer = Trainer(model, Recipe(**settings | changes), ranks, new_tokens=NEW)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                local = torch.randn(parameter.shape, generator=draw) * 0.05
                parameter.copy_(torch.distributed.tensor.distribute_tensor(local, parameter.device_mesh, parameter.placements))
    trainer.restored()
    return trainer


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Whole gradients, by the parameters' names."""
    named = {name: parameter.grad for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    return {name: getattr(grad, "full_tensor", lambda grad=grad: grad)().clone() for name, grad in named.items()}
