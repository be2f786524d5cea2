"""Parameters, FLOPs and bytes of a model, from its configuration alone: integers, exact, no tensor made.

FLOPs are those of matrix products and attention, 2 for each multiplication and its addition; element-wise work is left out. Forward and
backward together take three times the forward FLOPs where every weight is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from idefics2_fast.config import Idefics2Config, PerceiverConfig, TextConfig, VisionConfig


class Parts(NamedTuple):
    """One number for each part of the model: token embedding, layers and last norm are `text`; the vocabulary projection is `head`."""

    vision: int
    projection: int
    perceiver: int
    text: int
    head: int

    @property
    def connector(self) -> int:
        return self.projection + self.perceiver

    @property
    def total(self) -> int:
        return sum(self)


def count_parameters(config: Idefics2Config) -> Parts:
    """Parameters of every part. At b bytes a value the weights take b * total bytes."""
    vision, perceiver, text = config.vision, config.perceiver, config.text
    width, hidden = vision.hidden_size, text.hidden_size
    embeddings = (vision.patch_dim + 1 + vision.positions_per_side**2) * width
    vision_layer = _vision_products(vision) + (3 + 1 + 1) * width + vision.intermediate_size + 2 * 2 * width  # products, biases, norms
    perceiver_layer = _perceiver_kv(perceiver, hidden) + _perceiver_products(perceiver, hidden) + 3 * hidden
    return Parts(
        vision=embeddings + vision.num_hidden_layers * vision_layer + 2 * width,
        projection=_projection_products(config),
        perceiver=perceiver.n_latents * hidden + perceiver.depth * perceiver_layer + hidden,
        text=text.vocab_size * hidden + text.num_hidden_layers * (_text_products(text) + 2 * hidden) + hidden,
        head=text.vocab_size * hidden,
    )


def forward_flops(config: Idefics2Config, documents: Sequence[int], images: Sequence[int] = (), *, head_rows: int | None = None) -> Parts:
    """FLOPs of one forward pass over a packed batch.

    Attention counts the pairs of query and key that see each other and no others: causal and windowed in the text, within an image
    in the vision tower, latents to context and latents in the perceiver.

    Args:
        documents: length in tokens of every document, the image tokens included.
        images: number of patches of every image.
        head_rows: rows that become logits; None for every token. Prefill takes one a document, training the trained ones.
    """
    vision, perceiver, text = config.vision, config.perceiver, config.text
    patches, latents, tokens = sum(images), len(images) * perceiver.n_latents, sum(documents)
    tower = patches * _vision_products(vision) + vision.hidden_size * 2 * sum(p * p for p in images)
    pooling = (patches + latents) * _perceiver_kv(perceiver, text.hidden_size) + latents * _perceiver_products(perceiver, text.hidden_size)
    pooling += perceiver.n_heads * perceiver.head_dim * 2 * perceiver.n_latents * (patches + latents)
    decoder = tokens * _text_products(text)
    decoder += text.num_attention_heads * text.head_dim * 2 * sum(_causal_pairs(n, text.sliding_window) for n in documents)
    return Parts(
        vision=2 * (patches * vision.patch_dim * vision.hidden_size + vision.num_hidden_layers * tower),
        projection=2 * patches * _projection_products(config),
        perceiver=2 * perceiver.depth * pooling,
        text=2 * text.num_hidden_layers * decoder,
        head=2 * (tokens if head_rows is None else head_rows) * text.vocab_size * text.hidden_size,
    )


def cache_bytes_per_token(config: Idefics2Config, bytes_per_value: int) -> int:
    """Bytes of the key/value cache for each token of a sequence, in all layers."""
    text = config.text
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * bytes_per_value


def decode_bytes(config: Idefics2Config, context_length: int, bytes_per_value: int) -> int:
    """Bytes read to decode one token: the language model's weights, one row of the embedding, and the cache that the token sees.

    Args:
        context_length: tokens of the sequence, the new one included. The sliding window bounds what is read of them.
    """
    text, parameters = config.text, count_parameters(config)
    weights = parameters.text - (text.vocab_size - 1) * text.hidden_size + parameters.head
    seen = context_length if text.sliding_window is None else min(context_length, text.sliding_window)
    return weights * bytes_per_value + seen * cache_bytes_per_token(config, bytes_per_value)


def _causal_pairs(length: int, window: int | None = None) -> int:
    """Pairs (query, key) with key <= query, and key > query - window where there is a window."""
    window = length if window is None else min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


# Sizes of a layer's weight matrices, which are also the multiplications that one row takes in it.


def _vision_products(vision: VisionConfig) -> int:
    return 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size


def _projection_products(config: Idefics2Config) -> int:
    return (2 * config.vision.hidden_size + config.text.hidden_size) * config.text.intermediate_size


def _perceiver_kv(perceiver: PerceiverConfig, hidden: int) -> int:
    return 2 * perceiver.num_key_value_heads * perceiver.head_dim * hidden


def _perceiver_products(perceiver: PerceiverConfig, hidden: int) -> int:
    """Of a latent: query, output and the gated MLP, four times as wide as the latent."""
    return 2 * perceiver.n_heads * perceiver.head_dim * hidden + 3 * 4 * hidden**2


def _text_products(text: TextConfig) -> int:
    attention = (2 * text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim * text.hidden_size
    return attention + 3 * text.hidden_size * text.intermediate_size
