"""Batch: documents and their images, packed one after another, from the processor to the loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from idefics2_fast.kernels.segments import Segments

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """D documents of T tokens in all, with I images of P patches in all. No batch axis, no padding.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], rotary positions; they restart with every document.
        documents: D segments over the T tokens. Attention never crosses a border.
        labels: int64 [T] in Hugging Face's convention (token t is predicted from the tokens before it; -100 is not trained), or None.
        answer_rows: int64 [R], rows of hidden states that carry loss: row r predicts the trained token r + 1. Derived from `labels`.
        patches: uint8 [P, 588] as the processor makes them, or normalised floats; values in Conv2d's order (channel, row, column).
        patch_positions: int64 [P], rows of the vision tower's position table.
        images: I segments over the P patches.
        image_rows: int64 [I * latents], where in the T tokens the image features go; None means the model looks for placeholders, empty
            that the features are computed and go nowhere (a rank of a trainer whose documents have no image).
        adapters: D names of adapters that the documents take, None for the base alone; empty for the model's usual one.
        sample_keys: D names, one per document, for logs and for counter-based randomness.
        token_base: global index of the first token, so that noise is the same on any number of ranks.
        tokenizer: turns generated ids into text; None for batches made by hand.
        norms: DoRA's norms by layer, of a call during which weights stay as they are; see `layers.Route`.

    Raises:
        ValueError: shapes that do not belong together, at construction.
    """

    token_ids: Tensor
    positions: Tensor
    documents: Segments
    labels: Tensor | None = None
    answer_rows: Tensor | None = None
    patches: Tensor | None = None
    patch_positions: Tensor | None = None
    images: Segments | None = None
    image_rows: Tensor | None = None
    adapters: tuple[str | None, ...] = ()
    sample_keys: tuple[str, ...] = ()
    token_base: int = 0
    tokenizer: Any = None
    norms: Any = None

    def __post_init__(self) -> None:
        _check(self)
        if self.labels is not None and self.answer_rows is None:
            object.__setattr__(self, "answer_rows", answer_rows(self.labels, self.documents))

    @classmethod
    def from_documents(cls, documents: Sequence[Sequence[int]], **others: Any) -> Batch:
        """A batch of token id lists, positions counted from 0 in each."""
        lengths = [len(document) for document in documents]
        return cls(
            token_ids=torch.tensor([token for document in documents for token in document], dtype=torch.int64),
            positions=torch.cat([torch.arange(length) for length in lengths]) if lengths else torch.empty(0, dtype=torch.int64),
            documents=Segments.of_lengths(lengths),
            **others,
        )

    @property
    def document_offsets(self) -> Tensor:
        """int32 [D + 1]."""
        return self.documents.offsets

    @property
    def image_offsets(self) -> Tensor | None:
        """int32 [I + 1]."""
        return None if self.images is None else self.images.offsets

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; pinned memory is copied without waiting."""
        moved = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                moved[entry.name] = value.to(device, non_blocking=True)
            elif isinstance(value, Segments):
                moved[entry.name] = value.to(device)
        return replace(self, **moved)


def _check(batch: Batch) -> None:
    tokens = batch.token_ids.shape[0] if batch.token_ids.ndim == 1 else -1
    if tokens < 0 or batch.token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids is {batch.token_ids.dtype} {list(batch.token_ids.shape)}, expected int64 [T]")
    for name in ("positions", "labels"):
        value = getattr(batch, name)
        if value is not None and value.shape != (tokens,):
            raise ValueError(f"{name} has shape {list(value.shape)}, expected [{tokens}] as token_ids")
    if batch.documents.total != tokens:
        raise ValueError(f"documents end at token {batch.documents.total}, expected {tokens}, the length of token_ids")
    for name in ("sample_keys", "adapters"):
        if getattr(batch, name) and len(getattr(batch, name)) != len(batch.documents):
            raise ValueError(f"{len(getattr(batch, name))} {name} for {len(batch.documents)} documents")
    given = [getattr(batch, name) is not None for name in ("patches", "patch_positions", "images")]
    if any(given) != all(given):
        raise ValueError("patches, patch_positions and images belong together: give all three or none")
    if batch.patches is not None:
        _check_images(batch)


def _check_images(batch: Batch) -> None:
    patches = batch.patches.shape[0]
    if batch.patches.ndim != 2:
        raise ValueError(f"patches has shape {list(batch.patches.shape)}, expected [P, values per patch]")
    if batch.patch_positions.shape != (patches,):
        raise ValueError(f"patch_positions has shape {list(batch.patch_positions.shape)}, expected [{patches}] as patches")
    if batch.images.total != patches:
        raise ValueError(f"images end at patch {batch.images.total}, expected {patches}, the number of patches")
    if 0 in batch.images.lengths:
        raise ValueError(f"image {batch.images.lengths.index(0)} has no patch: an image needs one at least")


def answer_rows(labels: Tensor, documents: Segments) -> Tensor:
    """Rows [R] whose next token is trained: labels[r + 1] != -100 and r + 1 stands in the same document as r."""
    trained = labels != IGNORED
    starts = documents.offsets[:-1].to(torch.int64)
    trained[starts[starts < labels.shape[0]]] = False  # nothing precedes a document's first token
    return trained.nonzero()[:, 0] - 1


def find_image_rows(token_ids: Tensor, image_token_id: int, n_latents: int, n_images: int) -> Tensor:
    """Rows [n_images * n_latents] of the placeholders that image features replace, counted.

    Args:
        token_ids: int64 [T].
        n_latents: placeholders per image; each unbroken run must be one image's.

    Raises:
        ValueError: the placeholders are not `n_images` runs of `n_latents`.
    """
    rows = (token_ids == image_token_id).nonzero()[:, 0]
    breaks = (rows.diff() != 1).nonzero()[:, 0] + 1
    borders = [0, *breaks.tolist(), rows.shape[0]] if rows.shape[0] else [0]
    runs = [end - start for start, end in itertools.pairwise(borders)]
    wrong = next((i for i, run in enumerate(runs) if run != n_latents), None)
    if wrong is not None:
        raise ValueError(f"image {wrong} has a run of {runs[wrong]} placeholder tokens, expected {n_latents}")
    if len(runs) != n_images:
        raise ValueError(
            f"the text has places for {len(runs)} images ({len(runs)} runs of {n_latents} placeholders), but {n_images} images are given"
        )
    return rows
