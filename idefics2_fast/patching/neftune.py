"""NEFTune for a patched Hugging Face model: each document's own length, no noise on padding, counter-based noise.

transformers' Trainer (`integrations/neftune.py`) registers its hook on the input embedding when training starts, long after the model was
patched, and takes the handle's `remove` when training ends. So one `Neftune` belongs to a patched model, and at the start of every forward
takes the place of transformers' hook under the same handle:

    neftune = Neftune(seed=None, length="document")         # when patching
    with neftune.forward(embedding, input_ids, attention_mask, position_ids):
        ...                                                 # around the patched forward; embedding = model.get_input_embeddings()
    neftune.undo(embedding)                                 # transformers' hook again, if one is there

`forward` does nothing where no hook of transformers' is registered. `embedding` may be PEFT's `ModulesToSaveWrapper`: the hook is where
`get_input_embeddings` leads, and so is `neftune_noise_alpha`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from idefics2_fast import ops

HOOK = "neftune_post_forward_hook"
LENGTHS = ("document", "padded")
# Token indices of one rank: more than any batch has.
RANK_TOKENS = 1 << 40


class Neftune:
    """The hook, and what it knows of the forward that runs. Copied and pickled with the model it is registered on.

    Args:
        seed: of the noise; None for `torch.initial_seed()`, read at each forward.
        length: "document" scales by the tokens of each document, "padded" by the row's length with its padding, as transformers does.
            Padding has no noise either way.
        rank: of this process among those with other data; None for `torch.distributed`'s. Ranks that share a batch must be given the same.

    Attributes:
        step: training forwards so far. The noise of a step is fixed by it and the seed: set it to resume.

    Raises:
        ValueError: another length.
    """

    def __init__(self, seed: int | None = None, length: str = "document", rank: int | None = None) -> None:
        if length not in LENGTHS:
            raise ValueError(f"neftune_length is {length!r}, expected one of {', '.join(LENGTHS)}")
        self.seed, self.length, self.rank, self.step = seed, length, rank, 0
        self._theirs: Any = None
        self._places: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def forward(
        self, embedding: nn.Module, input_ids: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Iterator[None]:
        """Makes ready for one forward of the model, whose embedding is called within. In training it is one step.

        Args:
            embedding: what `model.get_input_embeddings()` gives.
            input_ids: int64 [B, S]; None where embeddings come from elsewhere.
            attention_mask, position_ids: see `token_places`.

        Raises:
            ValueError: a mask that does not tell which tokens are padding.
        """
        hook = self._take(embedding)
        if hook is None or input_ids is None or not embedding.training:
            yield
            return
        lengths, tokens = token_places(input_ids, attention_mask, position_ids)
        if hook.length == "padded":
            lengths = torch.where(lengths > 0, input_ids.shape[1], 0)
        hook._places = lengths, tokens
        try:
            yield
        finally:
            hook._places = None
        hook.step += 1

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """What `register_forward_hook` takes: embeddings [B, S, C] with noise in training, as they are otherwise.

        A call outside of a forward (prompts embedded by hand) is a step of its own, and every row counts as one document without padding. A
        lone token, which Idefics2 compares embeddings with, has no noise.
        """
        if not module.training or output.ndim < 3:
            return output
        outside = self._places is None
        lengths, tokens = token_places(output[..., 0], None, None) if outside else self._places
        seed = torch.initial_seed() if self.seed is None else self.seed
        tokens = tokens + self._rank() * RANK_TOKENS
        noise = ops.Noise(lengths.flatten(), tokens.flatten(), module.neftune_noise_alpha, seed, self.step)
        noisy = ops.embedding(None, output.flatten(0, -2), noise=noise)
        self.step += outside
        return noisy.view_as(output)

    @staticmethod
    def is_asked_for(embedding: nn.Module) -> bool:
        """Whether transformers' hook, or one of ours in its place, stands on the embedding."""
        return any(isinstance(hook, Neftune) or getattr(hook, "__name__", "") == HOOK for hook in embedding._forward_hooks.values())

    @staticmethod
    def undo(embedding: nn.Module) -> None:
        """Gives transformers' hook its place back, where it is still registered."""
        hooks = embedding._forward_hooks
        hooks.update({key: hook._theirs for key, hook in hooks.items() if isinstance(hook, Neftune)})

    def _take(self, embedding: nn.Module) -> Neftune | None:
        """Takes the place of transformers' hook, whose handle stays good.

        Returns the hook that stands there, if any: a copied model's is a copy.
        """
        hooks = embedding._forward_hooks
        for key, hook in hooks.items():
            if getattr(hook, "__name__", "") == HOOK:
                self._theirs, hooks[key] = hook, self
        return next((hook for hook in hooks.values() if isinstance(hook, Neftune)), None)

    def _rank(self) -> int:
        if self.rank is not None:
            return self.rank
        return torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_places": None}


def token_places(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The length of each token's document, and the token's index among those that are not padding.

    A document is a row, or where `position_ids` start again within a row, as packed rows have them, a part of it.

    Args:
        input_ids: [B, S], for its shape and device.
        attention_mask: [B, S], or longer where a cache or a prefix goes before; 0 is padding. None means that nothing is.
        position_ids: [B, S] or [1, S]; None means that rows are not packed.

    Returns:
        lengths: int64 [B, S], 0 for padding.
        tokens: int64 [B, S], row after row. It does not depend on where the padding stands.

    Raises:
        ValueError: a mask of another shape.
    """
    batch, length = input_ids.shape
    place = torch.arange(batch * length, device=input_ids.device)
    if attention_mask is None:
        real = torch.ones_like(place, dtype=torch.bool)
    elif attention_mask.ndim == 2 and attention_mask.shape[0] == batch and attention_mask.shape[1] >= length:
        real = attention_mask[:, -length:].to(place.device).bool().flatten()
    else:
        raise ValueError(f"NEFTune needs an attention_mask [{batch}, {length}] to tell padding, got {list(attention_mask.shape)}")
    before = torch.where(real, place, -1).cummax(0).values.roll(1)
    before[:1] = -1
    starts = before < place // length * length
    if position_ids is not None:
        positions = position_ids.to(place.device).expand(batch, length).flatten()
        starts |= positions <= positions.index_select(0, before.clamp(min=0))
    document = (starts & real).cumsum(0)
    counts = torch.zeros(batch * length + 1, dtype=torch.int64, device=place.device).scatter_add(0, document, real.long())
    lengths = counts.index_select(0, document) * real
    return lengths.view(batch, length), (real.cumsum(0) - 1).view(batch, length)
