"""Prompts and images to a Batch: Hugging Face's Idefics2Processor without padding, token for token."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short  # an image's bytes may stand in what a message shows
from typing import Any

from idefics2_fast.batch import Batch, find_image_rows
from idefics2_fast.image_limits import DEFAULT_LIMITS, ImageLimits
from idefics2_fast.images import MAX_PIXELS, PATCH_SIZE, ImageSource, pack_images
from idefics2_fast.weights import resolve_checkpoint

FAKE_TOKEN = "<fake_token_around_image>"
IMAGE_TOKEN = "<image>"
END_TOKEN = "<end_of_utterance>"
CROPS = 5  # of a split image: four quarters and the whole

# The image processing that `pack_images` does. Files that ask for another are refused.
IMAGE_SETTINGS = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 2,  # bilinear
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}

Message = Mapping[str, Any]
Images = Sequence[Sequence[ImageSource]] | Sequence[ImageSource] | ImageSource


@dataclass(frozen=True)
class Processor:
    """Turns prompts with `<image>` marks, or chats, into one packed Batch.

    Attributes:
        tokenizer: a tokenizer of transformers; the image tokens it lacks are added to it, as Idefics2Processor does.
        split_images: give each image as its four quarters and then the whole.
        image_seq_len: placeholder tokens per image (or crop), the number of the model's perceiver latents.
        shortest_edge, longest_edge: of an image after resizing, in pixels.
        positions_per_side, position_ids, max_pixels, limits: as in `pack_images`.
        max_positions: the longest prompt in tokens; None for no limit.
    """

    tokenizer: Any
    split_images: bool = False
    image_seq_len: int = 64
    shortest_edge: int = 378
    longest_edge: int = 980
    positions_per_side: int = 70
    position_ids: str = "transformers-5"
    max_pixels: int = MAX_PIXELS
    limits: ImageLimits = DEFAULT_LIMITS
    max_positions: int | None = None

    def __post_init__(self) -> None:
        if self.image_seq_len < 1:
            raise ValueError(f"image_seq_len is {self.image_seq_len}, expected 1 or more")
        self.tokenizer.add_special_tokens({"additional_special_tokens": [self.fake_token, self.image_token, END_TOKEN]})

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        split_images: bool | None = None,
        image_seq_len: int | None = None,
        position_ids: str = "transformers-5",
        max_pixels: int = MAX_PIXELS,
        limits: ImageLimits = DEFAULT_LIMITS,
        revision: str | None = None,
    ) -> Processor:
        """Reads the processor files of a checkpoint in Hugging Face's format: tokenizer, image settings, chat template.

        Args:
            path_or_hub_id: the checkpoint's folder, or its name on the Hugging Face hub.
            split_images, image_seq_len: override the files' `do_image_splitting` and `image_seq_len`.
            position_ids, max_pixels, limits: as in `pack_images`.

        Raises:
            ValueError: files missing or damaged, an image setting that this engine does not implement, or a tokenizer with ids that the
                model's embedding has no row for.
        """
        folder = resolve_checkpoint(path_or_hub_id, revision, weights=False)
        settings = _read_json(folder / "processor_config.json")
        images = settings.get("image_processor") or _read_json(folder / "preprocessor_config.json")
        if not images:
            raise ValueError(f"{folder} has no image settings: expected them in processor_config.json or preprocessor_config.json")
        shortest_edge, longest_edge = _edges(images)
        config = _read_json(folder / "config.json")
        processor = cls(
            tokenizer=_load_tokenizer(folder, settings.get("chat_template")),
            split_images=bool(images.get("do_image_splitting", False)) if split_images is None else split_images,
            image_seq_len=settings.get("image_seq_len", 64) if image_seq_len is None else image_seq_len,
            shortest_edge=shortest_edge,
            longest_edge=longest_edge,
            position_ids=position_ids,
            max_pixels=max_pixels,
            limits=limits,
            **_model_limits(config),
        )
        rows = (config.get("text_config") or {}).get("vocab_size", processor.vocab_size)
        if processor.vocab_size > rows:
            raise ValueError(f"the tokenizer has {processor.vocab_size} tokens, the model's embedding only {rows} rows")
        return processor

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files that Hugging Face's AutoProcessor, and `from_pretrained`, load back."""
        self.tokenizer.save_pretrained(folder)
        images = IMAGE_SETTINGS | {
            "image_processor_type": "Idefics2ImageProcessor",
            "do_pad": True,
            "do_image_splitting": self.split_images,
            "size": {"shortest_edge": self.shortest_edge, "longest_edge": self.longest_edge},
        }
        settings = {"processor_class": "Idefics2Processor", "image_seq_len": self.image_seq_len, "image_processor": images}
        (Path(folder) / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    @property
    def image_token(self) -> str:
        return getattr(self.tokenizer, "image_token", IMAGE_TOKEN)

    @property
    def fake_token(self) -> str:
        return getattr(self.tokenizer, "image_boundary_token", FAKE_TOKEN)

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id that the tokenizer gives, added tokens included."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def __call__(self, texts: str | Sequence[str], images: Images | None = None) -> Batch:
        """A batch of one document per prompt, each starting with the tokenizer's BOS.

        Args:
            texts: one prompt or a list of them; `<image>` marks where an image goes.
            images: for each prompt the list of its images, in the order of the marks (sources as in `pack_images`). For one prompt given
                as a str also a plain list, or one image. None where no prompt has a mark.

        Returns:
            The Batch; `patches`, `patch_positions`, `images` and `image_rows` are None where it has no image.

        Raises:
            ValueError: an empty prompt, one longer than `max_positions` or with more or fewer marks than images, named by its index; an
                image that cannot be used, named by its index among all images of the batch.
        """
        single = isinstance(texts, str)
        texts = [texts] if single else list(texts)
        return self._batch(texts, _images_of_prompts(images, len(texts), single), add_special_tokens=True)

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        images: Images | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> Batch:
        """A batch of one document per conversation, through the checkpoint's chat template.

        Args:
            conversations: one list of messages or several, in Hugging Face's format: `{"role": "user", "content": [...]}` with pieces
                `{"type": "text", "text": ...}` and `{"type": "image"}`. An image piece may carry its source under "image", "path" or
                "url" (a local path, too). A content that is a str stands for one text piece.
            images: as in `__call__`, for image pieces without a source.
            add_generation_prompt: end with the opening of the assistant's answer.

        Raises:
            ValueError: as `__call__`; a conversation that is not in the format; no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError("the checkpoint has no chat template: call the processor with finished prompts instead")
        single = bool(conversations) and isinstance(conversations[0], Mapping)
        plain, sources = [], []
        for index, conversation in enumerate([conversations] if single else conversations):
            messages, found = _plain_conversation(conversation, f"conversation {index}")
            plain.append(messages)
            sources.append(found)
        if images is not None:
            if any(sources):
                raise ValueError("images are given both inside the conversations and separately: expected one of the two")
            sources = _images_of_prompts(images, len(plain), single)
        texts = [self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=add_generation_prompt) for c in plain]
        bos = self.tokenizer.bos_token
        templated_bos = bool(texts) and bos is not None and texts[0].startswith(bos)
        return self._batch(texts, sources, add_special_tokens=not templated_bos)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def _batch(self, texts: list[str], images: Sequence[Sequence[ImageSource]], *, add_special_tokens: bool) -> Batch:
        self._check_prompts(texts, images)
        documents = self.tokenizer([self.expand_marks(text) for text in texts], add_special_tokens=add_special_tokens)["input_ids"]
        for index, document in enumerate(documents):
            if self.max_positions is not None and len(document) > self.max_positions:
                raise ValueError(f"prompt {index} has {len(document)} tokens, expected at most {self.max_positions}, the model's positions")
        sources = [source for of_prompt in images for source in of_prompt]
        if not sources:
            return Batch.from_documents(documents, tokenizer=self.tokenizer)
        packed = pack_images(
            sources,
            split=self.split_images,
            shortest_edge=self.shortest_edge,
            longest_edge=self.longest_edge,
            positions_per_side=self.positions_per_side,
            position_ids=self.position_ids,
            max_pixels=self.max_pixels,
            limits=self.limits,
        )
        batch = Batch.from_documents(
            documents, patches=packed.patches, patch_positions=packed.patch_positions, images=packed.images, tokenizer=self.tokenizer
        )
        return replace(batch, image_rows=find_image_rows(batch.token_ids, self.image_token_id, self.image_seq_len, len(packed.images)))

    def _check_prompts(self, texts: Sequence[str], images: Sequence[Sequence[ImageSource]]) -> None:
        if not texts:
            raise ValueError("no prompt is given, expected one or more")
        for index, (text, sources) in enumerate(zip(texts, images, strict=True)):
            if not isinstance(text, str):
                raise ValueError(f"prompt {index} is a {type(text).__name__}, expected a str")
            if not text:
                raise ValueError(f"prompt {index} is empty, expected text")
            marks = text.count(self.image_token)
            if marks != len(sources):
                raise ValueError(f"prompt {index} has {marks} {self.image_token} marks and {len(sources)} images, expected as many of both")

    def expand_marks(self, text: str) -> str:
        """Puts each image's run of placeholders in place of its mark. Neighbouring images share the fake token between them."""
        fake, image = self.fake_token, self.image_token
        run = f"{fake}{image * self.image_seq_len}{fake}" * (CROPS if self.split_images else 1)
        text = text.replace(image, run).replace(f"{fake}{fake}", fake)
        # A word that follows directly keeps its word boundary (transformers since 5.0).
        return re.sub(rf"{re.escape(fake)}(?=[^\s<])", f"{fake} ", text)


def _images_of_prompts(images: Images | None, n_prompts: int, single: bool) -> Sequence[Sequence[ImageSource]]:
    """The list of each prompt's images."""
    if images is None:
        return [[] for _ in range(n_prompts)]
    nested = isinstance(images, list | tuple) and all(isinstance(of_prompt, list | tuple) for of_prompt in images)
    if single and not (nested and images):
        return [images if isinstance(images, list | tuple) else [images]]
    if not nested:
        raise ValueError("images is not a list of lists, expected the list of each prompt's images")
    if len(images) != n_prompts:
        raise ValueError(f"images has {len(images)} lists for {n_prompts} prompts, expected one list per prompt")
    return images


def _plain_conversation(conversation: Sequence[Message], name: str) -> tuple[list[dict[str, Any]], list[ImageSource]]:
    """The conversation as the chat template reads it, and the image sources found in it."""
    if not conversation or not isinstance(conversation, list | tuple):
        raise ValueError(f"{name} is {short(conversation)}, expected a list of messages")
    messages, sources = [], []
    for message in conversation:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not content or not isinstance(content, str | list | tuple) or not isinstance(message.get("role"), str):
            raise ValueError(f'{name} holds {short(message)}, expected {{"role": str, "content": str or list of pieces}}, not empty')
        pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for piece in pieces:
            sources += _sources_of_piece(piece, name)
        plain = [{"type": "image"} if piece["type"] == "image" else dict(piece) for piece in pieces]
        messages.append({**message, "content": plain})
    return messages, sources


def _sources_of_piece(piece: Any, name: str) -> list[ImageSource]:
    kind = piece.get("type") if isinstance(piece, Mapping) else None
    if kind == "image":
        return [piece[key] for key in ("image", "path", "url") if piece.get(key) is not None]
    if kind != "text" or not isinstance(piece.get("text"), str):
        raise ValueError(f'{name} holds the piece {short(piece)}, expected {{"type": "text", "text": str}} or {{"type": "image", ...}}')
    return []


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def _edges(settings: Mapping[str, Any]) -> tuple[int, int]:
    """(shortest_edge, longest_edge) of an image processor's settings, which must otherwise be those of `pack_images`."""
    kind = settings.get("image_processor_type", "Idefics2ImageProcessor")
    if not str(kind).startswith("Idefics2ImageProcessor"):
        raise ValueError(f"image_processor_type is {kind!r}, expected 'Idefics2ImageProcessor'")
    for name, expected in IMAGE_SETTINGS.items():
        value = settings.get(name, expected)
        if value != expected and not (isinstance(expected, list) and all(value == channel for channel in expected)):
            raise ValueError(f"the image setting {name} = {value!r} is not supported, expected {expected!r}")
    ours = {*IMAGE_SETTINGS, "do_pad", "do_image_splitting"}
    for name, value in settings.items():
        if name.startswith("do_") and name not in ours and value:
            raise ValueError(f"the image setting {name} = {value!r} is not supported")
    size = settings.get("size", {"shortest_edge": 378, "longest_edge": 980})
    if not isinstance(size, Mapping) or set(size) != {"shortest_edge", "longest_edge"}:
        raise ValueError(f"the image setting size = {size!r} is not supported, expected shortest_edge and longest_edge")
    return size["shortest_edge"], size["longest_edge"]


def _model_limits(config: Mapping[str, Any]) -> dict[str, int]:
    """What the model's config.json, where there is one, says of positions."""
    vision, text = (config.get(f"{part}_config") or {} for part in ("vision", "text"))
    limits = {}
    if "max_position_embeddings" in text:
        limits["max_positions"] = text["max_position_embeddings"]
    if vision.get("patch_size", PATCH_SIZE) != PATCH_SIZE:
        raise ValueError(f"vision_config.patch_size is {vision['patch_size']}, expected {PATCH_SIZE}")
    if "image_size" in vision:
        limits["positions_per_side"] = vision["image_size"] // PATCH_SIZE
    return limits


def _load_tokenizer(folder: Path, chat_template: str | None) -> Any:
    """The tokenizer, with the chat template of the processor's files where they have one of their own."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no tokenizer that transformers can load: {error}") from error
    legacy = _read_json(folder / "chat_template.json").get("chat_template")
    tokenizer.chat_template = chat_template or legacy or tokenizer.chat_template
    return tokenizer
