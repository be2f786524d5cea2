"""A model small enough to learn to read on two CPU cores: its shape, its tokenizer, its first weights, and an examination."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from idefics2_fast import Batch, Idefics2, Idefics2Config, Processor
from idefics2_fast.batch import IGNORED
from idefics2_fast.benchmarks.local_checkpoint import CHAT_TEMPLATE
from idefics2_fast.benchmarks.reading_corpus import CAPTION, COUNT, FIRST, HELD_OUT, KIND, LETTERS, PATCH, READ, Style, blank, draw
from idefics2_fast.config import PerceiverConfig, TextConfig, VisionConfig
from idefics2_fast.ops import Noise

LATENTS = 8
SPELLING = 0.5  # weight of what latents name beside what is answered
NEW_TOKENS = 12  # of an answer at most
SIDE = 16  # of the position table
SPECIAL = ("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>")
# What is one token: the turns' beginnings, the questions, the first letter of an answer with the space before it.
PHRASES = ("User:", "\nAssistant:", READ, CAPTION, FIRST, COUNT, KIND, *(f" {letter}" for letter in LETTERS))
VOCABULARY = (*SPECIAL, *PHRASES, "\n", *map(chr, range(32, 127)))


def reader_config(width: int = 128) -> Idefics2Config:
    """1.2 million parameters at a width of 128: 3 layers see, 2 speak, 8 latents an image."""
    return Idefics2Config(
        vision=VisionConfig(
            hidden_size=width, intermediate_size=3 * width, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE * PATCH
        ),
        perceiver=PerceiverConfig(n_latents=LATENTS, depth=1, n_heads=4, head_dim=width // 4, num_key_value_heads=2),
        text=TextConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=width // 4,
            max_position_embeddings=512,
            sliding_window=None,
        ),
        image_token_id=VOCABULARY.index("<image>"),
        bos_token_id=VOCABULARY.index("<s>"),
        eos_token_ids=(VOCABULARY.index("</s>"), VOCABULARY.index("<end_of_utterance>")),
    )


def reader_processor() -> Processor:
    """Idefics2's chat template and image tokens over letters as tokens; images of 28 to 224 pixels a side as they are."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join((*map(re.escape, PHRASES), r"[\s\S]"))), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", VOCABULARY.index("<s>"))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    return Processor(
        tokenizer,
        image_seq_len=LATENTS,
        shortest_edge=2 * PATCH,
        longest_edge=SIDE * PATCH,
        positions_per_side=SIDE,
        max_positions=512,
    )


def write_reader(folder: Path, width: int = 128, seed: int = 0) -> None:
    """Writes a reader that has learned nothing yet, in Hugging Face's format."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Idefics2(reader_config(width)).save_pretrained(folder)
    reader_processor().save_pretrained(folder)


class Speller(Idefics2):
    """A reader with a second loss: latent i names letter i of the text on its image, straight through the head.

    Answers alone leave open which latent holds which letter: strings of random letters then stay at chance for thousands of steps. What it
    learns is weights of an `Idefics2`.
    """

    def encode_images(self, batch: Batch) -> Tensor:
        self._features = super().encode_images(batch)
        return self._features

    def loss_sum(self, batch: Batch, *, noise: Noise | None = None, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        """As `Idefics2.loss_sum`, of documents of one image and one answer each; the second loss is not counted among the tokens."""
        total, count = super().loss_sum(batch, noise=noise, z_loss=z_loss)
        named = F.cross_entropy(self.logits(self._features), spelled(batch), reduction="sum")
        return total + SPELLING * named, count


def spelled(batch: Batch) -> Tensor:
    """The tokens [I * LATENTS] that latents are to name: those of their document's answer, its last one repeated."""
    answers = (labels[labels != IGNORED] for labels in batch.labels.split(batch.documents.lengths))
    places = torch.arange(LATENTS, device=batch.device)
    return torch.cat([answer[places.clamp(max=len(answer) - 1)] for answer in answers])


class Page(NamedTuple):
    """A question of an examination."""

    image: Image.Image
    question: str
    answer: str


def examination(texts: Sequence[str], style: Style = HELD_OUT, seed: int = 0) -> list[Page]:
    """Each text to be read, drawn in a style."""
    chances = (random.Random(f"examination {seed} {number}") for number in range(len(texts)))
    return [Page(draw(text, chance, style=style).image(), READ, text) for text, chance in zip(texts, chances, strict=True)]


def blanked(pages: Sequence[Page]) -> list[Page]:
    """The same questions about images without anything on them."""
    return [page._replace(image=blank(page.image)) for page in pages]


def chats(pages: Sequence[Page]) -> list[list[dict[str, Any]]]:
    """The questions in Hugging Face's format."""
    pieces = ([{"type": "image", "image": page.image}, {"type": "text", "text": page.question}] for page in pages)
    return [[{"role": "user", "content": content}] for content in pieces]


def right(model: Idefics2, processor: Processor, pages: Sequence[Page]) -> list[bool]:
    """Whether each question is answered letter for letter."""
    given = model.generate(processor.chat(chats(pages)).to(model.device), max_new_tokens=NEW_TOKENS).texts
    return [text.strip() == page.answer for text, page in zip(given, pages, strict=True)]


def share_right(model: Idefics2, processor: Processor, pages: Sequence[Page]) -> float:
    return sum(right(model, processor, pages)) / len(pages)
