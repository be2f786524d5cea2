"""Hugging Face's model beside this engine's, with the same weights and the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idefics2_fast import Batch, Idefics2, Idefics2Config, Segments
from idefics2_fast.batch import find_image_rows

PATCH = 14
FAKE = 32000


def engine_of(model, config: Idefics2Config, dtype: torch.dtype | None = None) -> Idefics2:
    """This engine with the Hugging Face model's weights."""
    dtype = dtype or model.dtype
    engine = Idefics2(config).to(dtype)
    theirs = model.state_dict()
    for name, view in engine.hf_tensors().items():
        view.copy_(theirs[name])
    return engine.eval()


@dataclass
class Sample:
    """One document: tokens with runs of placeholders, and its images as normalised floats [3, h, w] of any size."""

    tokens: list[int]
    images: list[Tensor]


def sample(sizes: Sequence[tuple[int, int]], config: Idefics2Config, text: int = 7, seed: int = 0) -> Sample:
    """Text, then each image (fake, latents x placeholder, fake) followed by text. Pixels are whole multiples of 1/127.5, as bytes give."""
    draw = torch.Generator().manual_seed(seed)
    words = lambda: torch.randint(3, 32000, (text,), generator=draw).tolist()  # noqa: E731
    tokens = [config.bos_token_id, *words()]
    images = []
    for height, width in sizes:
        tokens += [FAKE, *[config.image_token_id] * config.perceiver.n_latents, FAKE, *words()]
        images.append((torch.randint(0, 256, (3, height, width), generator=draw).float() - 127.5) / 127.5)
    return Sample(tokens, images)


def to_hf(samples: Sequence[Sample], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The padded, masked batch that Hugging Face's processor makes (text padded on the left)."""
    length = max(len(s.tokens) for s in samples)
    ids, mask = torch.zeros(len(samples), length, dtype=torch.int64), torch.zeros(len(samples), length, dtype=torch.int64)
    for row, s in enumerate(samples):
        ids[row, length - len(s.tokens) :] = torch.tensor(s.tokens)
        mask[row, length - len(s.tokens) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    count = max(len(s.images) for s in samples)
    if count:
        height = max(i.shape[1] for s in samples for i in s.images)
        width = max(i.shape[2] for s in samples for i in s.images)
        pixels = torch.zeros(len(samples), count, 3, height, width, dtype=dtype)
        real = torch.zeros(len(samples), count, height, width, dtype=torch.int64)
        for row, s in enumerate(samples):
            for column, image in enumerate(s.images):
                pixels[row, column, :, : image.shape[1], : image.shape[2]] = image.to(dtype)
                real[row, column, : image.shape[1], : image.shape[2]] = 1
        inputs |= {"pixel_values": pixels, "pixel_attention_mask": real}
    return inputs


def patchify(image: Tensor) -> Tensor:
    """[3, h, w] to whole patches [P, 588] in Conv2d's order."""
    rows, columns = image.shape[1] // PATCH, image.shape[2] // PATCH
    grid = image[:, : rows * PATCH, : columns * PATCH].reshape(3, rows, PATCH, columns, PATCH)
    return grid.permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)


def positions_of(height: int, width: int, side: int = 70) -> Tensor:
    """Rows of the position table, by the formula in transformers' Idefics2VisionEmbeddings."""
    edges = torch.arange(1 / side, 1.0, 1 / side)
    coordinate = lambda n: torch.bucketize((torch.arange(n).float() * (1.0 / torch.tensor(n))).clamp(max=1 - 1e-6), edges, right=True)  # noqa: E731
    return (coordinate(height // PATCH)[:, None] * side + coordinate(width // PATCH)).flatten()


def to_batch(
    samples: Sequence[Sample], config: Idefics2Config, *, as_bytes: bool = True, labels: Sequence[Sequence[int]] | None = None
) -> Batch:
    """The same samples packed."""
    images = [image for s in samples for image in s.images]
    others = {}
    if images:
        patches = torch.cat([patchify(image) for image in images])
        others = {
            "patches": (patches * 127.5 + 127.5).round().to(torch.uint8) if as_bytes else patches,
            "patch_positions": torch.cat([positions_of(*image.shape[1:], config.vision.positions_per_side) for image in images]),
            "images": Segments.of_lengths([(i.shape[1] // PATCH) * (i.shape[2] // PATCH) for i in images]),
        }
    batch = Batch.from_documents([s.tokens for s in samples], **others)
    rows = find_image_rows(batch.token_ids, config.image_token_id, config.perceiver.n_latents, len(images))
    flat = None if labels is None else torch.tensor([label for row in labels for label in row])
    return Batch(**{**vars(batch), "image_rows": rows, "labels": flat})


def unpad(padded: Tensor, samples: Sequence[Sample]) -> Tensor:
    """Rows [T, ...] of the real tokens of a left-padded [B, length, ...]."""
    return torch.cat([row[row.shape[0] - len(s.tokens) :] for row, s in zip(padded, samples, strict=True)])
