"""The same work done by transformers and by this engine: photographs and questions to image features, first logits and answers.

A provider processes chats to inputs of its own kind, and works on from there. All of them read one checkpoint.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm

import idefics2_fast
from idefics2_fast import Batch, Idefics2, Idefics2Config, Processor
from idefics2_fast.benchmarks.local_checkpoint import write_model, write_processor
from idefics2_fast.benchmarks.timing import Watch
from idefics2_fast.cache import KVCache
from idefics2_fast.generate import prefill

Chat = list[Mapping[str, Any]]  # messages in Hugging Face's format, each image under "image": a path as str, or a PIL image


def question(text: str, images: Sequence[str | Image] = ()) -> Chat:
    """A user's turn: images, then a text."""
    pieces = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*pieces, {"type": "text", "text": text}]}]


class HuggingFace:
    """transformers as it comes: one padded, masked batch, SDPA (its default), its own `generate`."""

    name = "hf"

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoProcessor, Idefics2ForConditionalGeneration

        self.device = device
        self.model = Idefics2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.model.generation_config.eos_token_id = None  # as many tokens as are asked for
        for parameter in self.model.parameters():
            parameter.sum()  # transformers maps the file: weights come into memory at their first use, here and not while it is measured
        self.processor = AutoProcessor.from_pretrained(folder)

    @property
    def text_model(self) -> nn.Module:
        return self.model.model.text_model

    def process(self, chats: Sequence[Chat], *, split: bool = False) -> Mapping[str, Any]:
        """Decoded, resized and padded images, padded token ids, on the device."""
        self.processor.image_processor.do_image_splitting = split
        inputs = self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
        )
        return inputs.to(self.device)

    def encode(self, inputs: Mapping[str, Any]) -> Tensor:
        """Image tokens [I * L, C]."""
        encoded = self.model.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"], return_dict=True)
        return torch.cat(encoded.pooler_output)

    def first_logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """Logits [D, vocab] of the first new token, images encoded on the way."""
        return self.model(**inputs, logits_to_keep=1).logits[:, -1]

    def generate(self, inputs: Mapping[str, Any], new_tokens: int) -> list[list[int]]:
        """The `new_tokens` likeliest tokens, one after another, of every chat."""
        out = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        return out[:, inputs["input_ids"].shape[1] :].tolist()


class HuggingFaceTuned:
    """transformers at its best here: images unpadded, encoded one by one (no masks), SDPA, a bare loop in place of `generate`."""

    name = "hf-tuned"

    def __init__(self, plain: HuggingFace) -> None:
        self.plain, self.model, self.device = plain, plain.model, plain.device

    @property
    def text_model(self) -> nn.Module:
        return self.plain.text_model

    def process(self, chats: Sequence[Chat], *, split: bool = False) -> Mapping[str, Any]:
        """As `HuggingFace.process`, but `images` is a list of [3, h, w]."""
        from transformers.image_utils import load_image

        processor = self.plain.processor
        processor.image_processor.do_image_splitting = split
        texts = processor.apply_chat_template(chats, add_generation_prompt=True)
        inputs = processor(text=texts, padding=True, return_tensors="pt").to(self.device)
        pieces = (piece for chat in chats for message in chat for piece in message["content"] if piece["type"] == "image")
        sources = [load_image(piece["image"]) for piece in pieces]
        inputs["images"] = []
        if sources:
            pixels = processor.image_processor([sources], do_pad=False)["pixel_values"][0]
            inputs["images"] = [torch.from_numpy(image).to(self.device) for image in pixels]
        return inputs

    def encode(self, inputs: Mapping[str, Any]) -> Tensor:
        return torch.cat(self.encode_images(inputs["images"]).pooler_output)

    def first_logits(self, inputs: Mapping[str, Any]) -> Tensor:
        return self._prefill(inputs).logits[:, -1]

    def generate(self, inputs: Mapping[str, Any], new_tokens: int) -> list[list[int]]:
        out, mask = self._prefill(inputs), inputs["attention_mask"]
        tokens = [out.logits[:, -1].argmax(-1)]
        for _ in range(new_tokens - 1):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = self._forward(mask, input_ids=tokens[-1][:, None], past_key_values=out.past_key_values)
            tokens.append(out.logits[:, -1].argmax(-1))
        return torch.stack(tokens, 1).tolist()

    def encode_images(self, images: Sequence[Tensor]) -> Any:
        """What `forward` takes as `mm_encoder_outputs["image"]`."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        encoded = [self.model.model.get_image_features(image[None, None], return_dict=True).pooler_output[0] for image in images]
        return BaseModelOutputWithPooling(pooler_output=encoded)

    def _prefill(self, inputs: Mapping[str, Any]) -> Any:
        images = {"mm_encoder_outputs": {"image": self.encode_images(inputs["images"])}} if inputs["images"] else {}
        return self._forward(inputs["attention_mask"], input_ids=inputs["input_ids"], **images)

    def _forward(self, mask: Tensor, **inputs: Any) -> Any:
        padded = len(mask) > 1 and not bool(mask.all())
        return self.model(**inputs, attention_mask=mask if padded else None, logits_to_keep=1, use_cache=True)


class HuggingFaceCompiled(HuggingFaceTuned):
    """The tuned way under `torch.compile`, sizes left open; the weights are shared.

    Layers of the vision tower and the perceiver are compiled one by one: they share their code, which takes seconds, and is faster here
    than the tower as a whole. The language model is compiled as a whole, for its layers differ in their place in the cache.
    """

    name = "hf-compiled"

    def __init__(self, plain: HuggingFace) -> None:
        super().__init__(copy.copy(plain))
        weights = {id(tensor): tensor for tensor in (*plain.model.parameters(), *plain.model.buffers())}
        self.model = self.plain.model = copy.deepcopy(plain.model, weights)
        parts = self.model.model
        for part in (*parts.vision_model.encoder.layers, *parts.connector.perceiver_resampler.layers, parts.text_model):
            part.compile(dynamic=True)


class Engine:
    """idefics2_fast: packed, nothing padded."""

    name = "idefics2_fast"

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self.model = Idefics2.from_pretrained(folder, dtype=dtype, device=device)
        self.processor = Processor.from_pretrained(folder)

    @property
    def text_model(self) -> nn.Module:
        return self.model.text_model

    def process(self, chats: Sequence[Chat], *, split: bool = False) -> Batch:
        return replace(self.processor, split_images=split).chat(chats).to(self.device)

    def encode(self, inputs: Batch) -> Tensor:
        return self.model.encode_images(inputs)

    def first_logits(self, inputs: Batch) -> Tensor:
        capacities = [length + 1 for length in inputs.documents.lengths]
        return prefill(self.model, inputs, KVCache(self.model.config.text, capacities, dtype=self.model.dtype, device=self.device))

    def generate(self, inputs: Batch, new_tokens: int) -> list[list[int]]:
        return self.model.generate(inputs, max_new_tokens=new_tokens, stop_tokens=()).tokens


class Patched(HuggingFace):
    """transformers' model and processor under `idefics2_fast.patch`, called as `HuggingFace` calls its own."""

    name = "idefics2_fast"

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(folder, dtype, device)
        idefics2_fast.patch(self.model, self.processor)


Provider = HuggingFace | HuggingFaceTuned | Engine | Patched


def load_providers(size: str, dtype: torch.dtype, device: torch.device) -> tuple[HuggingFace, HuggingFaceTuned, Engine]:
    """All three, from one checkpoint."""
    with checkpoint(size, dtype) as folder:
        plain = HuggingFace(folder, dtype, device)
        return plain, HuggingFaceTuned(plain), Engine(folder, dtype, device)


@contextmanager
def checkpoint(size: str, dtype: torch.dtype) -> Iterator[Path]:
    """A temporary checkpoint of a named size, written by transformers itself: random weights, the same each time, the real tokenizer."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, in the convolution too, or outputs could not be compared
    config = Idefics2Config.named(size)
    with tempfile.TemporaryDirectory() as name, tqdm(total=2, desc=f"{size}: writing random weights", leave=False) as bar:
        folder = Path(name)
        write_model(folder, config, dtype=dtype)
        write_processor(folder, image_seq_len=config.perceiver.n_latents)
        bar.update()
        bar.set_description(f"{size}: loading")
        yield folder


def answer(provider: Provider, inputs: Any, new_tokens: int, watch: Watch) -> list[list[int]]:
    """`generate` with its phases told apart from outside: "image encoding" until the language model first runs, "prefill" for that run,
    "decode" for all after it."""
    watch.start("image encoding")
    with _runs_of(provider.text_model, ("prefill", "decode"), watch):
        return provider.generate(inputs, new_tokens)


@contextmanager
def _runs_of(text_model: nn.Module, phases: Sequence[str], watch: Watch) -> Iterator[None]:
    """Starts the phases one by one with the first runs of the language model."""
    left = list(phases)

    def begin(*_: Any) -> None:
        if left:
            watch.start(left.pop(0))

    hook = text_model.register_forward_pre_hook(begin)
    try:
        yield
    finally:
        hook.remove()
