"""Samples to documents, before any pixel: tokens, labels, and from the images' headers what becomes of each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import numpy as np

from idefics2_fast.batch import IGNORED
from idefics2_fast.images import image_size, plan_crops
from idefics2_fast.processor import CROPS, Processor
from idefics2_fast.training.order import uniform
from idefics2_fast.training.samples import ImageReference, Sample, Turn
from idefics2_fast.training.sources import describe

MIN_UPSCALE = 1.5
# Conversations whose tokens are kept: those of small data return every epoch, captions and classes more often.
REMEMBERED = 4096
REMEMBERED_LENGTH = 4096  # characters and image tokens; longer conversations are made anew


@dataclass(frozen=True)
class Document:
    """A sample as it will be trained on, all but the pixels.

    Attributes:
        key: the sample's.
        token_ids: int64 [T], from BOS to EOS.
        labels: int64 [T], -100 but for the answers, their end tokens and the EOS after one.
        images: the sample's.
        split: each image as its four quarters and the whole.
        upscale: a factor for each image.
        crops: the number of patches of each crop that the vision tower will see, in order.
    """

    key: str
    token_ids: np.ndarray
    labels: np.ndarray
    images: tuple[ImageReference, ...]
    split: bool
    upscale: tuple[float, ...]
    crops: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def n_patches(self) -> int:
        return sum(self.crops)


@dataclass(frozen=True)
class Planner:
    """Plans samples. All chance is drawn from (seed, epoch, the sample's key).

    Attributes:
        processor: gives the tokens, the chat template and the rules for images. Its `split_images` is not used.
        tokens, patches: the most that a document may have, the capacities of a pack.
        split_share: share of the samples whose images are split.
        upscale_share: share of the images that are scaled up.
        upscale_max: M of Triangular(1.5, M, M), from which the factor is drawn.

    Raises:
        ValueError: a setting out of range; a tokenizer without chat template, BOS or EOS.
    """

    processor: Processor
    seed: int
    tokens: int
    patches: int
    split_share: float = 0.5
    upscale_share: float = 0.5
    upscale_max: float = 2.0

    def __post_init__(self) -> None:
        for name in ("split_share", "upscale_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        if self.upscale_max < MIN_UPSCALE:
            raise ValueError(f"upscale_max is {self.upscale_max}, expected {MIN_UPSCALE} or more")
        if self.processor.tokenizer.chat_template is None:
            raise ValueError("the checkpoint has no chat template: training on conversations needs one")
        for name in ("bos_token", "eos_token"):
            if getattr(self.processor.tokenizer, name) is None:
                raise ValueError(f"the checkpoint's tokenizer has no {name}: expected one for each document")
        # Made here and not when wanted: a new processor adds tokens to the tokenizer, which other threads may not be using then.
        object.__setattr__(self, "_processors", [replace(self.processor, split_images=split) for split in (False, True)])

    def __call__(self, sample: Sample, epoch: int = 0) -> Document:
        """The document of a sample in an epoch.

        Raises:
            ValueError: text with one of the tokenizer's special tokens, an image that cannot be opened, more tokens or patches than fit.
        """
        self._check_length(sample)
        draw = functools.partial(uniform, self.seed, epoch, sample.key)
        split = draw("split") < self.split_share
        turns = _shuffled(sample.turns, draw) if sample.pairs else sample.turns
        length = self._length(sample)
        tokenize = self._remembered if length <= REMEMBERED_LENGTH else self._tokens_and_labels
        token_ids, labels = tokenize(tuple(turns), split)
        self._check_tokens(len(token_ids), len(sample.images), split)
        factors = tuple(self._upscale(draw, index) for index in range(len(sample.images)))
        crops = self._crops(sample.images, split, factors)
        return Document(sample.key, token_ids, labels, sample.images, split, factors, crops)

    def room(self, images: int) -> int:
        """Bytes of text that surely fit beside so many images, split ones: a token stands for one byte at least."""
        return self.tokens - images * 5 * (self.processor.image_seq_len + 2) - 2

    def _upscale(self, draw: functools.partial[float], index: int) -> float:
        if draw("upscale", index) >= self.upscale_share:
            return 1.0
        return MIN_UPSCALE + (self.upscale_max - MIN_UPSCALE) * math.sqrt(draw("factor", index))

    def _crops(self, images: Sequence[ImageReference], split: bool, factors: Sequence[float]) -> tuple[int, ...]:
        """Patches of each crop of the images. Those that other epochs may draw must fit, too."""
        rules = {"shortest_edge": self.processor.shortest_edge, "longest_edge": self.processor.longest_edge}
        splits = self.split_share > 0
        largest = self.upscale_max if self.upscale_share > 0 else 1.0
        crops, most = [], 0
        for index, (image, factor) in enumerate(zip(images, factors, strict=True)):
            try:
                height, width = image_size(image, self.processor.max_pixels, self.processor.limits)
                planned = plan_crops(height, width, split=split, upscale=factor, **rules)
                other = plan_crops(height, width, split=splits, upscale=largest, **rules)
            except ValueError as error:
                raise ValueError(f"image {index}: {describe(error)}") from error
            crops += [math.prod(crop.grid) for crop in planned]
            most += sum(math.prod(crop.grid) for crop in other)
        if max(most, sum(crops)) > self.patches:
            raise ValueError(f"the sample has {max(most, sum(crops))} patches, expected at most {self.patches}: samples are never cut")
        return tuple(crops)

    @property
    def _most_tokens(self) -> int:
        limits = (self.tokens, self.processor.max_positions)
        return min(limit for limit in limits if limit is not None)

    def _length(self, sample: Sample) -> int:
        """Characters and image tokens of a sample."""
        images = len(sample.images) * CROPS * self.processor.image_seq_len
        return images + sum(len(piece) for turn in sample.turns for piece in turn.pieces if piece)

    def _check_length(self, sample: Sample) -> None:
        """Refuses what has too many tokens by any count, before the cost of counting them.

        A turn has one at least, an image its placeholders, and text one for each `_longest_token`
        characters.
        """
        most = self._most_tokens
        characters = sum(len(piece) for turn in sample.turns for piece in turn.pieces if piece)
        images = len(sample.images) * self.processor.image_seq_len
        least = max(len(sample.turns), images, -(-characters // self._longest_token))
        if least > most:
            counts = f"{len(sample.turns)} turns, {len(sample.images)} images and {characters} characters"
            raise ValueError(f"the sample has {counts}, more than {least - 1} tokens; expected at most {most}: samples are never cut")

    def _check_tokens(self, tokens: int, images: int, split: bool) -> None:
        """Refuses a sample that does not fit, or would not in an epoch in which its images are split."""
        if self.split_share > 0 and not split:
            tokens += images * (CROPS - 1) * (self.processor.image_seq_len + 1)
        if tokens > self._most_tokens:
            where = " with its images split" if images and self.split_share > 0 else ""
            raise ValueError(f"the sample has {tokens} tokens{where}, expected at most {self._most_tokens}: samples are never cut")

    @functools.cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.processor.tokenizer.get_vocab()))

    @functools.cached_property
    def _remembered(self) -> Callable[[tuple[Turn, ...], bool], tuple[np.ndarray, np.ndarray]]:
        return functools.lru_cache(maxsize=REMEMBERED)(self._tokens_and_labels)

    def _tokens_and_labels(self, turns: Sequence[Turn], split: bool) -> tuple[np.ndarray, np.ndarray]:
        """int64 [T] each. The answer and its end token are trained, and EOS after it; the line's end between turns is not."""
        tokenizer = self.processor.tokenizer
        pieces = [(self._processors[split].expand_marks(text), trained) for text, trained in self._pieces(turns)]
        text = "".join(piece for piece, _ in pieces)
        add_bos = not text.startswith(tokenizer.bos_token)
        encoded = tokenizer(text, add_special_tokens=add_bos, return_offsets_mapping=True)
        token_ids = np.array(encoded["input_ids"])
        starts = np.array([start for start, _ in encoded["offset_mapping"]])
        piece = np.searchsorted(list(accumulate(len(text) for text, _ in pieces)), starts, side="right")
        trained = np.array([trained for _, trained in pieces])[piece]
        trained &= ~np.isin(token_ids, tokenizer.convert_tokens_to_ids([self.processor.image_token, self.processor.fake_token]))
        labels = np.where(trained, token_ids, IGNORED)
        eos = tokenizer.eos_token_id
        return np.append(token_ids, eos), np.append(labels, eos if turns[-1].role == "assistant" and turns[-1].trained else IGNORED)

    def _pieces(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        """The conversation's text by the chat template, without the last line's end, in pieces that are trained or are not."""
        messages = [{"role": turn.role, "content": [self._content(piece) for piece in turn.pieces]} for turn in turns]
        render = functools.partial(self.processor.tokenizer.apply_chat_template, tokenize=False)
        whole, *each = render([messages, *([message] for message in messages)])
        if "".join(each) != whole:
            raise ValueError("the chat template does not write turn after turn on its own: answers cannot be told from questions")
        opening = self._opening
        pieces = []
        for turn, text in zip(turns, each, strict=True):
            if turn.role != "assistant":
                pieces.append((text, False))
                continue
            if not text.startswith(opening):
                raise ValueError(f"the chat template opens an answer with {text[: len(opening)]!r}, but asks for one with {opening!r}")
            answer = text[len(opening) :].removesuffix("\n")
            pieces += [(opening, False), (answer, turn.trained), (text[len(opening) + len(answer) :], False)]
        last, trained = pieces.pop()
        return [*pieces, (last.removesuffix("\n"), trained)]

    def _content(self, piece: str | None) -> dict[str, str]:
        if piece is None:
            return {"type": "image"}
        special = next((token for token in self._special_tokens if token in piece), None)
        if special is not None:
            raise ValueError(f"the text holds {special!r}, one of the tokenizer's special tokens: expected text without any")
        return {"type": "text", "text": piece}

    @functools.cached_property
    def _special_tokens(self) -> list[str]:
        return [token.content for token in self.processor.tokenizer.added_tokens_decoder.values() if token.special]

    @functools.cached_property
    def _opening(self) -> str:
        """What the template writes before an answer."""
        question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        render = functools.partial(self.processor.tokenizer.apply_chat_template, question, tokenize=False)
        return render(add_generation_prompt=True)[len(render(add_generation_prompt=False)) :]


def _shuffled(turns: tuple[Turn, ...], draw: functools.partial[float]) -> list[Turn]:
    """Questions and answers in another order behind the system's turns, the images again before the first."""
    system = [turn for turn in turns if turn.role == "system"]
    first, *others = turns[len(system) :]
    n_images = sum(piece is None for piece in first.pieces)
    turns = (replace(first, pieces=first.pieces[n_images:]), *others)
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    order = sorted(range(len(pairs)), key=lambda index: draw("order", index))
    question, *rest = chain.from_iterable(pairs[index] for index in order)
    return [*system, replace(question, pieces=(None,) * n_images + question.pieces), *rest]
