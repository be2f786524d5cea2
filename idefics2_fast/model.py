"""Idefics2: vision tower, connector and language model over one packed batch.

Source: transformers `models/idefics2/modeling_idefics2.py`, Idefics2ForConditionalGeneration. T tokens, I images, L latents, C width.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idefics2_fast import counters, ops, weights
from idefics2_fast.batch import IGNORED, Batch, find_image_rows
from idefics2_fast.config import Idefics2Config
from idefics2_fast.connector import Connector
from idefics2_fast.counters import Parts
from idefics2_fast.generate import Generation, generate
from idefics2_fast.generation_config import log_ignored, read_generation_config
from idefics2_fast.kernels.segments import Segments
from idefics2_fast.language import TextModel
from idefics2_fast.layers import BASE, Choice, Linear, Route
from idefics2_fast.vision import VisionTower


class Idefics2(nn.Module):
    """The model.

        model = Idefics2.from_pretrained("HuggingFaceM4/idefics2-8b", dtype=torch.bfloat16, device="cuda")
        logits = model(batch)

    `Idefics2(config)` has fresh random weights; `from_pretrained` reads a checkpoint's.
    """

    def __init__(self, config: Idefics2Config) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config.vision)
        self.connector = Connector(config)
        self.text_model = TextModel(config.text)
        self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.choice = Choice()  # among named adapters, see adapters.py; `kept` is what merging them keeps
        self.kept: Any = None
        self.generation_config: dict[str, Any] = {}  # what generation_config.json holds, the defaults of `generate`
        if not self.lm_head.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights: std 1 / sqrt(fan in), half of it where a branch joins the residual; distinct latents, or they stay alike."""
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0) if name.endswith("weight") else weight.zero_()
            elif name.endswith("latents"):
                weight.normal_()
            elif name.endswith("embedding.weight") or name.endswith("embed_tokens.weight"):
                weight.normal_(std=0.5 if "position" in name else 1.0)
            else:
                joins = name.endswith(("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight"))
                weight.normal_(std=weight.shape[1] ** -0.5 * (0.5 if joins else 1.0))

    @property
    def device(self) -> torch.device:
        return getattr(self.lm_head, "base", self.lm_head).weight.device

    @property
    def dtype(self) -> torch.dtype:
        return getattr(self.lm_head, "base", self.lm_head).weight.dtype

    def forward(self, batch: Batch) -> Tensor:
        """Logits [T, vocab] of every token of the batch."""
        batch = self.routed(batch)
        return self.logits(self.hidden(batch), self._route(batch))

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy, in fp32, over the batch's trained tokens (`labels` that are not -100). Logits of other rows are not made.

        Raises:
            ValueError: the batch has no labels, or none that is trained.
        """
        if batch.labels is None or batch.answer_rows.shape[0] == 0:
            raise ValueError("the batch trains no token: expected labels with entries other than -100")
        total, count = self.loss_sum(batch)
        return total / count

    def loss_sum(self, batch: Batch, *, noise: ops.Noise | None = None, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        """The sum of the cross-entropy over the batch's trained tokens, fp32, and their number: what it is divided by is the caller's.

        Args:
            noise: what training adds to the embeddings of a batch; see `ops.Noise.of`.
            z_loss: weight of the squared log of the softmax's denominator.
        """
        batch = self.routed(batch)
        hidden = self.text_model.norm(self.hidden(batch, noise=noise).index_select(0, batch.answer_rows))
        targets = batch.labels.index_select(0, batch.answer_rows + 1)
        route = self._route(batch)
        if route.only or isinstance(self.lm_head, Linear):
            return ops.linear_cross_entropy(hidden, self.lm_head.matrix(route), targets, z_loss=z_loss)
        total, count = 0, 0
        for name in dict.fromkeys(batch.adapters):  # a head for each
            own = targets.where(self._rows_of(name, batch), IGNORED)
            of_name = ops.linear_cross_entropy(hidden, self.lm_head.under(name).matrix(), own, z_loss=z_loss)
            total, count = total + of_name[0], count + of_name[1]
        return total, count

    def _rows_of(self, adapter: str | None, batch: Batch) -> Tensor:
        """Which of the answer rows [R] belong to documents with this adapter."""
        documents = torch.bucketize(batch.answer_rows, batch.document_offsets[1:].to(torch.int64), right=True)
        return torch.tensor([name == adapter for name in batch.adapters], device=batch.device).index_select(0, documents)

    def routed(self, batch: Batch) -> Batch:
        """The batch with the usual adapter written into it where it does not say and adapters have names.

        A call does so once, at its start: what `use_adapter` says meanwhile is for the next one.

        Raises:
            ValueError: a document asks for an adapter that the model does not carry.
        """
        adapters = self.choice.of(batch.adapters, len(batch.documents))
        return batch if adapters == tuple(batch.adapters) else replace(batch, adapters=adapters)

    def _route(self, batch: Batch) -> Route:
        return Route.of(batch.adapters, batch.documents.lengths, batch.norms)

    def logits(self, hidden: Tensor, route: Route = BASE) -> Tensor:
        """Logits [rows, vocab] of hidden states [rows, C] before the last norm."""
        return self.lm_head(self.text_model.norm(hidden), route)

    def hidden(self, batch: Batch, *, noise: ops.Noise | None = None) -> Tensor:
        """Hidden states [T, C] before the last norm; each document attends to itself alone."""
        text = self.config.text

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scale = text.head_dim**-0.5
            return ops.segment_attention(q, k, v, batch.documents, causal=True, window=text.sliding_window, scale=scale)

        batch = self.routed(batch)
        x = self.embed(batch, noise=noise)
        return self.text_model(x, self.text_model.rotary(batch.positions, self.dtype), attend, self._route(batch))

    def embed(self, batch: Batch, *, noise: ops.Noise | None = None) -> Tensor:
        """Token embeddings [T, C] with the image features in the placeholders' rows, and with noise where it is given.

        Raises:
            ValueError: placeholders and images do not match.
        """
        batch = self.routed(batch)
        rows, features, table = self._image_rows(batch), None, self.text_model.embed_tokens
        if batch.patches is not None:
            # None of an image that no token stands for, which has its part in the backward pass all the same.
            dtype = getattr(table, "base", table).weight.dtype
            features = self.encode_images(batch).to(dtype)[: rows.shape[0]]
        return table(batch.token_ids, features, rows, noise, self._route(batch))

    def encode_images(self, batch: Batch) -> Tensor:
        """Image tokens [I * L, C] of the batch's images, in their order; those of each adapter's documents together."""
        names, features, order = self._image_adapters(self.routed(batch)), [], []
        if len(set(names)) < 2:
            route = Route.of(names[:1], (1,) * len(names[:1]), batch.norms)
            return self._encode(batch.patches, batch.patch_positions, batch.images, route)
        for name in dict.fromkeys(names):
            route = Route(((name, 0),), batch.norms)
            images = [image for image, own in enumerate(names) if own == name]
            rows = torch.cat([torch.arange(*batch.images.bounds[image : image + 2]) for image in images]).to(batch.device)
            segments = Segments.of_lengths([batch.images.lengths[image] for image in images], batch.device)
            patches, positions = (t.index_select(0, rows) for t in (batch.patches, batch.patch_positions))
            features.append(self._encode(patches, positions, segments, route))
            order += images
        back = torch.tensor(order, device=batch.device).argsort()
        return torch.cat(features).unflatten(0, (len(order), -1)).index_select(0, back).flatten(0, 1)

    def _encode(self, patches: Tensor, positions: Tensor, images: Segments, route: Route) -> Tensor:
        return self.connector(self.vision_model(patches, positions, images, route), images, route)

    def _image_adapters(self, batch: Batch) -> list[str | None]:
        """The adapter of each image's document, None for an image that no token stands for; [] where none has a name."""
        if len(set(batch.adapters)) < 2:
            return [*batch.adapters[:1]] * len(batch.images)
        firsts = self._image_rows(batch)[:: self.config.perceiver.n_latents].contiguous()
        documents = torch.bucketize(firsts, batch.document_offsets[1:].to(torch.int64), right=True).tolist()
        return [batch.adapters[document] for document in documents] + [None] * (len(batch.images) - len(documents))

    def _image_rows(self, batch: Batch) -> Tensor:
        images, latents = len(batch.images or ()), self.config.perceiver.n_latents
        if batch.image_rows is None:
            return find_image_rows(batch.token_ids, self.config.image_token_id, latents, images)
        if batch.image_rows.shape[0] and batch.image_rows.shape != (images * latents,):
            raise ValueError(
                f"image_rows has shape {list(batch.image_rows.shape)}, expected [{images * latents}]: {images} images x {latents}"
            )
        return batch.image_rows

    def forward_flops(self, batch: Batch) -> Parts:
        """FLOPs of `forward` on a batch, part by part; see `counters.forward_flops`."""
        return counters.forward_flops(self.config, batch.documents.lengths, batch.images.lengths if batch.images else ())

    def decode_bytes(self, context_length: int) -> int:
        """Bytes read to decode one token of a sequence of `context_length`; see `counters.decode_bytes`."""
        return counters.decode_bytes(self.config, context_length, self.dtype.itemsize)

    def hf_tensors(self) -> dict[str, Tensor]:
        """Every weight under its name in Hugging Face's state dict, as a view: what is written to one is written to the model.

        Adapters are no part of it.
        """
        named = dict(self.named_parameters())
        return {hf: view for name, tensor in named.items() for hf, view in self.hf_views(name, tensor.detach())}

    def hf_gradients(self) -> dict[str, Tensor]:
        """Gradients under Hugging Face's names, for parameters that have one."""
        named = {name: parameter.grad for name, parameter in self.named_parameters() if parameter.grad is not None}
        return {hf: view for name, tensor in named.items() for hf, view in self.hf_views(name, tensor)}

    def hf_views(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """The Hugging Face tensors that a parameter holds: their names and their views of it; none for a part of an adapter."""
        if name.endswith((".a", ".b", ".magnitude", ".shift")):
            return []
        name = name.replace(".base.", ".")
        name = name if name.startswith("lm_head") else f"model.{name}"
        name = name.replace("vision_model.layers", "vision_model.encoder.layers").replace(
            "embeddings.projection", "embeddings.patch_embedding"
        )
        if name.endswith("patch_embedding.weight"):
            side = self.config.vision.patch_size
            return [(name, tensor.view(-1, 3, side, side))]
        for fused, parts in FUSED.items():
            if fused in name:
                rows = tensor.split(self._fused_rows(name, fused, tensor.shape[0]))
                return [(name.replace(fused, part), view) for part, view in zip(parts, rows, strict=True)]
        return [(name, tensor)]

    def _fused_rows(self, name: str, fused: str, rows: int) -> list[int]:
        if fused == "qkv_proj" and "text_model" in name:
            text = self.config.text
            return [heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)]
        return [rows // len(FUSED[fused])] * len(FUSED[fused])

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        image_size: int | None = None,
        perceiver_rms_norm_eps: float | None = None,
        progress: weights.Progress | None = None,
    ) -> Idefics2:
        """Reads a Hugging Face checkpoint (safetensors, one file or shards) straight into the model's memory.

        Args:
            dtype: of the model, also by name ("bfloat16"); None or "auto" for the file's own, the widest where they differ.
            revision: branch, tag or commit of a repository of the hub.
            image_size: side in pixels of the position table; a checkpoint's own table is resized to it (378 -> 980: 27 x 27 -> 70 x 70).
            perceiver_rms_norm_eps: see `Idefics2Config.from_hf`.
            progress: called with the bytes read so far and the bytes in all.

        Raises:
            ValueError: no such checkpoint, or one whose tensors are not this model's; the line names file and key. No memory has
                been taken for the weights then.
        """
        dtype = weights.parse_dtype(dtype)
        folder = weights.resolve_checkpoint(path_or_hub_id, revision)
        config = Idefics2Config.from_hf(folder, perceiver_rms_norm_eps=perceiver_rms_norm_eps)
        generation_config = read_generation_config(folder)
        config = replace(config, eos_token_ids=weights.read_eos_ids(folder, config.eos_token_ids))
        if image_size is not None:
            config = replace(config, vision=replace(config.vision, image_size=image_size))
        _check_size(config, folder)
        with torch.device("meta"):
            model = cls(config)
        weights.check_weights(model.hf_tensors(), folder, resize=image_size is not None)
        model = model.to(dtype or weights.stored_dtype(folder)).to_empty(device=device)
        model.generation_config = generation_config
        log_ignored(generation_config, folder)
        weights.load_weights(model.hf_tensors(), folder, progress=progress)
        return model.eval()

    def save_pretrained(self, path: str | Path) -> None:
        """Writes config.json, generation_config.json and safetensors that transformers loads as the same model, bit by bit.

        Raises:
            ValueError: a model that carries adapters, which would be lost.
        """
        if self.choice.brought:
            names = ", ".join(self.choice.names) or "one without a name"
            raise ValueError(f"the model carries adapters ({names}), expected none: merge_adapters first, or save_adapters beside the base")
        weights.save_checkpoint(self.hf_tensors(), self.config.to_hf(), Path(path), generation=self.generation_config)

    def generate(self, batch: Batch, **settings: Any) -> Generation:
        """Continues every document of the batch; see `idefics2_fast.generate.generate` for settings and result."""
        return generate(self, batch, **settings)


def _check_size(config: Idefics2Config, folder: Path) -> None:
    """Refuses a config.json of far more weights than the files hold, before even modules are made; names and shapes are checked later."""
    described, stored = counters.count_parameters(config).total, weights.count_stored(folder)
    table = config.vision.positions_per_side**2 * config.vision.hidden_size  # of another size where image_size is given
    if described - table > 2 * stored:
        found = f"describes {described:,} parameters, the files of weights hold {stored:,}"
        raise ValueError(f"{folder / 'config.json'} {found}: expected as many")


# fused projections and the Hugging Face names of their row blocks, in order
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "kv_proj": ("k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
