"""Hugging Face's vision tower and perceiver on packed rows: [1, P, C], every image's own patches, nothing padded.

Hugging Face's modules are called as they stand, containers too, so that hooks, PEFT's layers, gradient checkpointing and sharding work as
before; hooks see packed rows. In place of masks they are handed `PackedPatches` or `Segments`, and these functions, which stand before
the modules' own `forward`, act on those; with anything else they call the original.

Source: transformers `models/idefics2/modeling_idefics2.py`. I real images, P patches of all of them, L latents, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idefics2_fast import _C, ops
from idefics2_fast.kernels.segments import Segments
from idefics2_fast.layers import by_rows
from idefics2_fast.patching.dora import Unsupported
from idefics2_fast.patching.ledger import fall_back, is_plain
from idefics2_fast.vision import by_total

# Patches that go through together on a CPU without gradients; an image of more goes alone. Fewer than the engine's own: Hugging Face's
# modules write into fresh memory at every step, and what does not fit the allocator's cache is faulted in anew each time.
PATCHES = 1024


@dataclass(frozen=True)
class Settings:
    """Which parts of the path are packed, and whether to raise where none can be."""

    attention: bool
    perceiver: bool
    strict: bool


@dataclass(frozen=True)
class PackedPatches:
    """What stands in place of the patch mask where patches are packed.

    Attributes:
        positions: int64 [P], rows of the position table.
        images: I segments over the P patches.
    """

    positions: Tensor
    images: Segments


@dataclass(frozen=True)
class Images:
    """Where the real images stand in a padded batch.

    Attributes:
        indices: of the real images, among all B * N.
        grids: rows and columns of patches of each real image.
        counts: real images of each of the B samples.
        frame: rows and columns of patches of the padded frame.
    """

    indices: list[int]
    grids: list[tuple[int, int]]
    counts: list[int]
    frame: tuple[int, int]

    @property
    def lengths(self) -> list[int]:
        return [rows * columns for rows, columns in self.grids]


def get_image_features(
    settings: Settings,
    self: nn.Module,
    original: Callable[..., Any],
    pixel_values: Tensor,
    pixel_attention_mask: Tensor | None = None,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Idefics2Model.get_image_features: pixels [B, N, 3, H, W] and their mask [B, N, H, W] to B tensors [images * L, C].

    An image is real where its mask is not empty; without a mask, where not all its pixels are 0. `last_hidden_state` is laid out as Hugging
    Face's, zeros where that has what it made of padding; so it is, too, where hidden states are asked for, which Hugging Face's own path
    computes.
    """
    keep = self.config.return_dict if return_dict is None else return_dict
    try:
        _check_dropout(self)
        images = find_images(pixel_values, pixel_attention_mask, self.config.vision_config.patch_size)
    except Unsupported as error:
        fall_back(str(error), strict=settings.strict)
        return original(pixel_values, pixel_attention_mask=pixel_attention_mask, return_dict=return_dict, **kwargs)
    if any(value is not None and value is not False for value in kwargs.values()) or _records_outputs(self.vision_model.config):
        output = original(pixel_values, pixel_attention_mask=pixel_attention_mask, return_dict=True, **kwargs)
        real = _patch_mask(images, output.last_hidden_state.device).flatten(1)[..., None]
        output.last_hidden_state = output.last_hidden_state.masked_fill(~real, 0.0)
    else:
        output = _encode(settings, self, pixel_values.flatten(0, 1), images)
    return output if keep else output.to_tuple()


def _records_outputs(config: Any) -> bool:
    return bool(getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False))


def _check_dropout(model: nn.Module) -> None:
    for module, config in ((model.vision_model, model.config.vision_config), (model.connector, model.config.perceiver_config)):
        if module.training and config.attention_dropout:
            raise Unsupported(f"attention_dropout = {config.attention_dropout} in {type(config).__name__}")


def _encode(settings: Settings, model: nn.Module, pixels: Tensor, images: Images) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    latents = model.config.perceiver_config.resampler_n_latents
    if not images.indices:
        nothing = pixels.new_empty(0, model.config.text_config.hidden_size, dtype=model.dtype)
        return BaseModelOutputWithPooling(pooler_output=[nothing] * len(images.counts))
    rows = (_packed_tower if settings.attention else _padded_tower)(model, pixels, images)
    padded = pad_rows(rows, images)
    if settings.perceiver:
        groups = _groups(images.lengths, rows.device)
        pieces = zip(rows.split([sum(group) for group in groups]), groups, strict=True)
        features = torch.cat(
            [model.connector(piece[None], attention_mask=Segments.of_lengths(group, rows.device))[0] for piece, group in pieces]
        )
    else:
        features = model.connector(padded, attention_mask=_patch_mask(images, rows.device).flatten(1)).flatten(0, 1)
    pooled = features.split([count * latents for count in images.counts])
    return BaseModelOutputWithPooling(last_hidden_state=padded, pooler_output=list(pooled))


def _groups(lengths: Sequence[int], device: torch.device) -> list[list[int]]:
    """Images that go through together: on a CPU without gradients a few at a time."""
    if torch.is_grad_enabled() or device.type != "cpu" or _sharded():
        return [list(lengths)]
    return by_total(list(lengths), PATCHES)


def _sharded() -> bool:
    """Whether other ranks may hold parts of the weights: to gather them, all must call every module equally often."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _packed_tower(model: nn.Module, pixels: Tensor, images: Images) -> Tensor:
    """Vision features [P, C]."""
    config, outputs, start = model.config.vision_config, [], 0
    for group in _groups(images.lengths, pixels.device):
        here = slice(start, start + len(group))
        start += len(group)
        patches = gather_patches(pixels, images.indices[here], images.grids[here], config.patch_size, model.dtype)
        positions = [_positions(*grid, config.image_size // config.patch_size) for grid in images.grids[here]]
        packed = PackedPatches(torch.cat(positions).to(pixels.device, non_blocking=True), Segments.of_lengths(group, pixels.device))
        outputs.append(model.vision_model(pixel_values=patches, patch_attention_mask=packed).last_hidden_state[0])
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _positions(rows: int, columns: int, side: int) -> Tensor:
    return torch.from_numpy(_C.grid_positions(rows, columns, side, "transformers-5"))


def _padded_tower(model: nn.Module, pixels: Tensor, images: Images) -> Tensor:
    """Vision features [P, C] by Hugging Face's padded path."""
    real = pixels.index_select(0, torch.tensor(images.indices, device=pixels.device)).to(model.dtype)
    padded = model.vision_model(pixel_values=real, patch_attention_mask=_patch_mask(images, pixels.device)).last_hidden_state
    framed = padded.unflatten(1, images.frame)
    return torch.cat([image[:rows, :columns].flatten(0, 1) for image, (rows, columns) in zip(framed, images.grids, strict=True)])


def _patch_mask(images: Images, device: torch.device) -> Tensor:
    mask = torch.zeros(len(images.grids), *images.frame, dtype=torch.bool)
    for image, (rows, columns) in zip(mask, images.grids, strict=True):
        image[:rows, :columns] = True
    return mask.to(device)


def find_images(pixel_values: Tensor, pixel_attention_mask: Tensor | None, patch: int) -> Images:
    """The real images of pixels [B, N, 3, H, W], their sizes read from the mask [B, N, H, W].

    Raises:
        Unsupported: a mask that is not one rectangle, one patch or more, at the top left of every image.
    """
    batch, number, _, height, width = pixel_values.shape
    if pixel_attention_mask is None:
        real = pixel_values.flatten(2).ne(0).any(-1).flatten().tolist()
        sizes = [(height, width) if there else (0, 0) for there in real]
    elif pixel_attention_mask.shape != (batch, number, height, width):
        raise Unsupported(f"pixel_attention_mask has shape {list(pixel_attention_mask.shape)}, the pixels {list(pixel_values.shape)}")
    else:
        sizes = _rectangles(pixel_attention_mask.flatten(0, 1))
    grids = [(rows // patch, columns // patch) for rows, columns in sizes]
    indices = [index for index, (rows, columns) in enumerate(sizes) if rows and columns]
    small = next((index for index in indices if 0 in grids[index]), None)
    if small is not None:
        raise Unsupported(f"image {small} has {sizes[small]} pixels, less than a patch of {patch}")
    counts = [sum(first <= index < first + number for index in indices) for first in range(0, batch * number, number)]
    return Images(indices, [grids[index] for index in indices], counts, (height // patch, width // patch))


def _rectangles(mask: Tensor) -> list[tuple[int, int]]:
    """Height and width of the ones at the top left of every mask [N, H, W]."""
    mask = mask.bool() if mask.is_floating_point() else mask
    in_rows, in_columns = mask.sum(2), mask.sum(1)
    heights, widths = in_columns[:, :1], in_rows[:, :1]
    row, column = (torch.arange(side, device=mask.device) for side in mask.shape[1:])
    fits = (in_rows == widths * (row < heights)).all(1) & (in_columns == heights * (column < widths)).all(1)
    fits &= (heights[:, 0] <= mask.shape[1]) & (widths[:, 0] <= mask.shape[2])
    numbers = torch.stack([heights[:, 0], widths[:, 0], fits.long()], dim=1).tolist()
    wrong = next((index for index, (_, _, fit) in enumerate(numbers) if not fit), None)
    if wrong is not None:
        raise Unsupported(f"pixel_attention_mask of image {wrong} is not a rectangle of ones at the top left")
    return [(height, width) for height, width, _ in numbers]


def gather_patches(pixels: Tensor, indices: Sequence[int], grids: Sequence[tuple[int, int]], patch: int, dtype: torch.dtype) -> Tensor:
    """Patches [P, channels * patch * patch] of some of the images [N, channels, H, W], in Conv2d's order."""
    lengths = [rows * columns for rows, columns in grids]
    out = pixels.new_empty(sum(lengths), pixels.shape[1] * patch * patch, dtype=dtype)
    for index, (rows, columns), piece in zip(indices, grids, out.split(lengths), strict=True):
        image = pixels[index, :, : rows * patch, : columns * patch].unflatten(2, (columns, patch)).unflatten(1, (rows, patch))
        piece.view(rows, columns, -1, patch, patch).copy_(image.permute(1, 3, 0, 2, 4))
    return out


def pad_rows(packed: Tensor, images: Images) -> Tensor:
    """Rows [P, C] to [I, rows * columns of the frame, C], zeros where there is no patch."""
    frames = []
    for piece, (rows, columns) in zip(packed.split(images.lengths), images.grids, strict=True):
        margins = (0, 0, 0, images.frame[1] - columns, 0, images.frame[0] - rows)
        frames.append(F.pad(piece.view(rows, columns, -1), margins).flatten(0, 1))
    return torch.stack(frames)


def vision_transformer(
    self: nn.Module,
    original: Callable[..., Any],
    pixel_values: Tensor,
    patch_attention_mask: Tensor | PackedPatches | None = None,
    **kwargs: Any,
) -> Any:
    """Idefics2VisionTransformer.forward: patches [P, 3 * 14 * 14] to features [1, P, C]."""
    if not isinstance(patch_attention_mask, PackedPatches):
        return original(pixel_values, patch_attention_mask, **kwargs)
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    embeddings = self.embeddings(pixel_values=pixel_values, patch_attention_mask=patch_attention_mask)
    encoded = self.encoder(inputs_embeds=embeddings, attention_mask=patch_attention_mask.images)
    return BaseModelOutputWithPooling(last_hidden_state=self.post_layernorm(encoded.last_hidden_state))


def vision_embeddings(
    self: nn.Module, original: Callable[..., Any], pixel_values: Tensor, patch_attention_mask: Tensor | PackedPatches
) -> Tensor:
    """Idefics2VisionEmbeddings.forward: patches [P, 3 * 14 * 14] to [1, P, C]."""
    if not isinstance(patch_attention_mask, PackedPatches):
        return original(pixel_values, patch_attention_mask)
    conv = self.patch_embedding
    if is_plain(conv, nn.Conv2d):
        embedded = F.linear(pixel_values, conv.weight.flatten(1), conv.bias)
    else:
        embedded = conv(pixel_values.unflatten(1, (-1, self.patch_size, self.patch_size))).flatten(1)
    return (embedded + self.position_embedding(patch_attention_mask.positions.to(embedded.device)))[None]


def vision_attention(
    self: nn.Module, original: Callable[..., Any], hidden_states: Tensor, attention_mask: Tensor | Segments | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Idefics2VisionAttention.forward: [1, P, C] to the same, each image to itself."""
    if not isinstance(attention_mask, Segments):
        return original(hidden_states, attention_mask, **kwargs)
    q, k, v = (project(hidden_states)[0].unflatten(1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
    attended = ops.segment_attention(q, k, v, attention_mask.to(q.device), scale=self.scale)
    return self.out_proj(attended.flatten(1)[None]), None


def vision_mlp(self: nn.Module, original: Callable[..., Any], hidden_states: Tensor) -> Tensor:
    """Idefics2VisionMLP.forward, without gradients on a CPU in blocks of rows."""
    return _in_blocks(self, original, hidden_states)


def connector(self: nn.Module, original: Callable[..., Any], image_hidden_states: Tensor, attention_mask: Tensor | Segments) -> Tensor:
    """Idefics2Connector.forward, its projection without gradients on a CPU in blocks of rows."""
    if not isinstance(attention_mask, Segments):
        return original(image_hidden_states, attention_mask)
    context = _in_blocks(self.modality_projection, self.modality_projection, image_hidden_states)
    return self.perceiver_resampler(context=context, attention_mask=attention_mask)


def _in_blocks(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) of packed rows x [1, P, C], in blocks where nobody watches the modules beneath."""
    watched = any(part._forward_hooks or part._forward_pre_hooks or "_hf_hook" in vars(part) for part in module.modules())
    if watched or x.ndim != 3 or x.shape[0] != 1 or _sharded():
        return function(x)
    return by_rows(lambda rows: function(rows[None])[0], x[0])[None]


def perceiver_resampler(
    self: nn.Module, original: Callable[..., Any], context: Tensor, attention_mask: Tensor | Segments, **kwargs: Any
) -> Tensor:
    """Idefics2PerceiverResampler.forward: context [1, P, C] to latents [1, I * L, C]."""
    if not isinstance(attention_mask, Segments):
        return original(context, attention_mask, **kwargs)
    latents = self.latents.repeat(len(attention_mask), 1)[None]
    for layer in self.layers:
        latents = layer(latents, context, attention_mask=attention_mask, position_ids=None)
    return self.norm(latents)


def perceiver_attention(
    self: nn.Module,
    original: Callable[..., Any],
    latents: Tensor,
    context: Tensor,
    attention_mask: Tensor | Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Idefics2PerceiverAttention.forward: latents [1, I * L, C] attend to their image's part of the context [1, P, C] and to themselves."""
    if not isinstance(attention_mask, Segments):
        return original(latents, context, attention_mask, **kwargs)
    rows, patches = torch.cat([context, latents], dim=1), context.shape[1]
    q, k, v = (
        project(x)[0].unflatten(1, (-1, self.head_dim)) for project, x in ((self.q_proj, latents), (self.k_proj, rows), (self.v_proj, rows))
    )
    context_and_own = (k[:patches], v[:patches], k[patches:], v[patches:])
    attended = ops.perceiver_attention(q, *context_and_own, attention_mask.to(q.device), scale=self.scaling)
    return self.o_proj(attended.flatten(1)[None]), None


def inputs_merger(
    self: nn.Module, original: Callable[..., Any], input_ids: Tensor | None, inputs_embeds: Tensor, image_hidden_states: Tensor
) -> Tensor:
    """Idefics2Model.inputs_merger: token embeddings [B, T, C] with the image features in the placeholders' rows.

    Raises:
        ValueError: placeholders and features do not match in number.
    """
    if input_ids is None:
        placeholder = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        places = (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)
    else:
        places = input_ids == self.config.image_token_id
    rows = places.flatten().nonzero()[:, 0].to(inputs_embeds.device)
    features = image_hidden_states.to(inputs_embeds.device, inputs_embeds.dtype).flatten(0, -2)
    if rows.shape[0] != features.shape[0]:
        raise ValueError(f"Image features and image tokens do not match, tokens: {rows.shape[0]}, features: {features.shape[0]}")
    return inputs_embeds.flatten(0, 1).index_copy(0, rows, features).view_as(inputs_embeds)
