"""Checkpoints made on the spot, in Hugging Face's format, so that nothing has to be downloaded."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from idefics2_fast.config import Idefics2Config
from idefics2_fast.weights import SHARD_BYTES, save_checkpoint

if TYPE_CHECKING:
    from transformers import Idefics2ForConditionalGeneration


def write_model(
    folder: Path, config: Idefics2Config, *, dtype: torch.dtype = torch.float32, seed: int = 0, max_shard_size: int = SHARD_BYTES
) -> None:
    """Writes `random_model` with transformers itself: config.json, generation_config.json and safetensors."""
    random_model(config, dtype=dtype, seed=seed).save_pretrained(folder, max_shard_size=max_shard_size)


def random_model(config: Idefics2Config, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Idefics2ForConditionalGeneration:
    """transformers' model with seeded random weights.

    Activations stay near 1 through the depth and every parameter has an effect of its own, so that a wrong one shows.
    """
    model = _hugging_face_model(config, dtype, "cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        mean, std = _spread(name, parameter)
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)
    return model.eval()


def write_random_checkpoint(
    folder: Path, config: Idefics2Config, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, max_shard_size: int = SHARD_BYTES
) -> None:
    """Writes a random checkpoint of any size at the speed of the disk, without a model in memory.

    The spread is `write_model`'s, but weights of the same scale are overlapping slices of one block of noise: under 1 GB of memory for
    the 16.8 GB of the 8B model.
    """
    model = _hugging_face_model(config, dtype, "meta")
    save_checkpoint(_slices_of_noise(model.named_parameters(), seed), config.to_hf(), folder, max_shard_size=max_shard_size)


# The instruct model's, as in its tokenizer_config.json.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for piece in message['content'] %}"
    "{% if piece['type'] == 'text' %}{{ piece['text'] }}{% elif piece['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def write_processor(folder: Path, split: bool = False, image_seq_len: int = 64) -> None:
    """Writes Idefics2's processor files with transformers itself: tokenizer, image settings and chat template.

    The tokenizer is Mistral-7B-v0.1's, which ships inside the package mistral-common; Idefics2's three tokens follow it at 32000-32002.

    Args:
        split: the files' `do_image_splitting`.
        image_seq_len: placeholder tokens per image, the perceiver's latents.
    """
    from transformers import Idefics2Processor, LlamaTokenizer
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "clean_up_tokenization_spaces": False, "padding_side": "left"}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>", "add_bos_token": True}
    with tempfile.TemporaryDirectory() as source:
        shutil.copy(resources.files("mistral_common") / "data" / "tokenizer.model.v1", Path(source) / "tokenizer.model")
        (Path(source) / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = LlamaTokenizer.from_pretrained(source)
    images = Idefics2ImageProcessorPil(do_image_splitting=split)
    Idefics2Processor(images, tokenizer, image_seq_len=image_seq_len, chat_template=CHAT_TEMPLATE).save_pretrained(folder)


def _hugging_face_model(config: Idefics2Config, dtype: torch.dtype, device: str) -> Idefics2ForConditionalGeneration:
    from transformers import Idefics2Config as HuggingFaceConfig
    from transformers import Idefics2ForConditionalGeneration

    with torch.device(device):
        model = Idefics2ForConditionalGeneration(HuggingFaceConfig.from_dict(config.to_hf()))
    return model.to(dtype)


def _spread(name: str, parameter: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a random parameter."""
    *_, owner, kind = name.split(".")
    if kind == "bias":
        return 0.0, 0.1
    if "norm" in owner:
        return 1.0, 0.1
    if kind == "latents" or "embed_tokens" in owner or "position_embedding" in owner:
        return 0.0, 1.0
    return 0.0, parameter[0].numel() ** -0.5


def _slices_of_noise(parameters: Iterable[tuple[str, Tensor]], seed: int) -> dict[str, Tensor]:
    parameters = dict(parameters)
    longest: dict[tuple[float, float], int] = defaultdict(int)
    for name, parameter in parameters.items():
        spread = _spread(name, parameter)
        longest[spread] = max(longest[spread], parameter.numel())
    slack, step = 2**20, 7919  # neighbouring layers start at different places
    generator = torch.Generator().manual_seed(seed)
    dtype = next(iter(parameters.values())).dtype
    blocks = {spread: torch.empty(n + slack, dtype=dtype).normal_(*spread, generator=generator) for spread, n in longest.items()}
    return {
        name: blocks[_spread(name, parameter)][(start := i * step % slack) : start + parameter.numel()].view(parameter.shape)
        for i, (name, parameter) in enumerate(parameters.items())
    }
