"""Prompts and images to a Batch: Hugging Face's Idefics2Processor without padding, token for token."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from idefics2_fast.batch import Batch, find_image_rows
from idefics2_fast.config import Idefics2Config, TextConfig, VisionConfig, fields_of, section_of
from idefics2_fast.image_limits import DEFAULT_LIMITS, ImageLimits
from idefics2_fast.images import MAX_PIXELS, PATCH_SIZE, ImageSource, pack_images
from idefics2_fast.json_files import BOOL, OBJECT, TEXT, Field, check_fields, optional, read_object_if_there, require_file, short, whole
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

EDGE = whole(1, 100_000)
PROCESSOR_FIELDS = {
    "image_seq_len": optional(Field("1 or more, 65536 at most", whole(1, 2**16).holds)),
    "image_processor": optional(OBJECT),
    "chat_template": optional(TEXT),
}
IMAGE_FIELDS = {"do_image_splitting": BOOL, "do_pad": BOOL, "image_processor_type": TEXT}

VOCABULARIES = ("tokenizer.json", "tokenizer.model")  # where a tokenizer's words are
VOCABULARY_LIMIT = 64 * 2**20  # bytes
PROBE = "Hello world 12"
IMAGE_TOKEN_ID = Idefics2Config().image_token_id  # where config.json gives none

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
            revision: branch, tag or commit of a repository of the hub.
            position_ids, max_pixels, limits: as in `pack_images`.

        Raises:
            ValueError: files missing or damaged, an image setting that this engine does not implement, or a tokenizer that is not that
                of the config.json beside it: ids that the embedding has no row for, another id of the image token.
        """
        folder = resolve_checkpoint(path_or_hub_id, revision, weights=False)
        settings, source = _read_settings(folder)
        images = settings["image_processor"]
        shortest_edge, longest_edge = _edges(images, source)
        config = read_object_if_there(folder / "config.json")
        processor = cls(
            tokenizer=_load_tokenizer(folder, settings.get("chat_template")),
            split_images=images.get("do_image_splitting", False) if split_images is None else split_images,
            image_seq_len=settings.get("image_seq_len", 64) if image_seq_len is None else image_seq_len,
            shortest_edge=shortest_edge,
            longest_edge=longest_edge,
            position_ids=position_ids,
            max_pixels=max_pixels,
            limits=limits,
            **_model_limits(config, folder / "config.json"),
        )
        if config:
            _check_model(processor, config, folder / "config.json")
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
        return self._batch(texts, _images_of_prompts(images, len(texts), single))

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
        texts = [self._templated(c, f"conversation {i}", add_generation_prompt) for i, c in enumerate(plain)]
        return self._batch(texts, sources, templated=True)

    def _templated(self, messages: list[dict[str, Any]], name: str, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # templates are programs
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{name} is not what the checkpoint's chat template takes: {reason}") from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def _batch(self, texts: list[str], images: Sequence[Sequence[ImageSource]], *, templated: bool = False) -> Batch:
        """The batch of finished prompts. A chat template writes the BOS itself for all conversations, some or none."""
        self._check_prompts(texts, images)
        bos = self.tokenizer.bos_token if templated else None
        adds = [bos is None or not text.startswith(bos) for text in texts]
        expanded = [self.expand_marks(text) for text in texts]
        if len({*adds}) == 1:
            documents = self.tokenizer(expanded, add_special_tokens=adds[0])["input_ids"]
        else:
            documents = [self.tokenizer(text, add_special_tokens=add)["input_ids"] for text, add in zip(expanded, adds, strict=True)]
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
            if not text.isascii() and (half := re.search("[\ud800-\udfff]", text)):
                raise ValueError(f"prompt {index} holds {half[0]!r}, half of a character: expected valid Unicode")
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


def _read_settings(folder: Path) -> tuple[dict[str, Any], Path]:
    """processor_config.json with the image processor's settings in it, and the file that these came from.

    Raises:
        ValueError: no image settings, a damaged file, a value of another kind.
    """
    path = folder / "processor_config.json"
    settings = read_object_if_there(path)
    check_fields(settings, PROCESSOR_FIELDS, f"{path}: ")
    if not settings.get("image_processor"):
        path = folder / "preprocessor_config.json"
        settings = {**settings, "image_processor": read_object_if_there(path)}
    if not settings["image_processor"]:
        raise ValueError(f"{folder} has no image settings: expected them in processor_config.json or preprocessor_config.json")
    check_fields(settings["image_processor"], IMAGE_FIELDS, f"{path}: ")
    return {name: value for name, value in settings.items() if value is not None}, path


def _edges(settings: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """(shortest_edge, longest_edge) of an image processor's settings, which must otherwise be those of `pack_images`."""
    kind = settings.get("image_processor_type", "Idefics2ImageProcessor")
    if not str(kind).startswith("Idefics2ImageProcessor"):
        raise ValueError(f"{path}: image_processor_type is {short(kind)}, expected 'Idefics2ImageProcessor'")
    for name, expected in IMAGE_SETTINGS.items():
        value = settings.get(name, expected)
        if value != expected and not (isinstance(expected, list) and all(value == channel for channel in expected)):
            raise ValueError(f"{path}: the image setting {name} = {short(value)} is not supported, expected {expected!r}")
    ours = {*IMAGE_SETTINGS, "do_pad", "do_image_splitting"}
    for name, value in settings.items():
        if name.startswith("do_") and name not in ours and value:
            raise ValueError(f"{path}: the image setting {short(name)} = {short(value)} is not supported")
    size = settings.get("size", {"shortest_edge": 378, "longest_edge": 980})
    if not isinstance(size, Mapping) or set(size) != {"shortest_edge", "longest_edge"}:
        raise ValueError(f"{path}: the image setting size = {short(size)} is not supported, expected shortest_edge and longest_edge")
    check_fields(size, {"shortest_edge": EDGE, "longest_edge": EDGE}, f"{path}: size.")
    if size["shortest_edge"] > size["longest_edge"]:
        found = f"shortest_edge {size['shortest_edge']} and longest_edge {size['longest_edge']}"
        raise ValueError(f"{path}: size has {found}, expected the shortest to be the smaller")
    return size["shortest_edge"], size["longest_edge"]


def _model_limits(config: Mapping[str, Any], path: Path) -> dict[str, int]:
    """What the model's config.json, where there is one, says of positions."""
    try:
        vision, text = section_of(config, "vision_config"), section_of(config, "text_config")
        check_fields(vision, {"image_size": fields_of(VisionConfig)["image_size"]}, "vision_config.")
        check_fields(text, {"max_position_embeddings": fields_of(TextConfig)["max_position_embeddings"]}, "text_config.")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    limits = {}
    if "max_position_embeddings" in text:
        limits["max_positions"] = text["max_position_embeddings"]
    patch = vision.get("patch_size", PATCH_SIZE)
    if patch != PATCH_SIZE:
        raise ValueError(f"{path}: vision_config.patch_size is {short(patch)}, expected {PATCH_SIZE}")
    if "image_size" in vision:
        limits["positions_per_side"] = max(1, vision["image_size"] // PATCH_SIZE)
    return limits


def _check_model(processor: Processor, config: Mapping[str, Any], path: Path) -> None:
    """Refuses a tokenizer or image settings that are not those of the model beside them.

    Raises:
        ValueError: names what differs.
    """
    text, perceiver = section_of(config, "text_config"), section_of(config, "perceiver_config")
    rows = text.get("vocab_size", processor.vocab_size)
    fields_of(TextConfig)["vocab_size"].check(rows, f"{path}: text_config.vocab_size")
    if processor.vocab_size > rows:
        raise ValueError(f"the tokenizer has {processor.vocab_size} tokens, the model's embedding only {rows} rows")
    own = config.get("image_token_id", IMAGE_TOKEN_ID)
    if processor.image_token_id != own:
        found = f"{path}: image_token_id is {short(own)}, the tokenizer's {processor.image_token} has {processor.image_token_id}"
        raise ValueError(f"{found}: expected the tokenizer of this model")
    latents = perceiver.get("resampler_n_latents", processor.image_seq_len)
    if latents != processor.image_seq_len:
        found = f"{path}: perceiver_config.resampler_n_latents is {short(latents)}"
        raise ValueError(f"{found}, expected the processor's image_seq_len {processor.image_seq_len}")


def _load_tokenizer(folder: Path, chat_template: str | None) -> Any:
    """The tokenizer, with the chat template of the processor's files where they have one of their own."""
    from transformers import AutoTokenizer

    _check_tokenizer_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        _check_tokenizer(tokenizer)
    except BaseException as error:  # a damaged file makes the tokenizers library panic, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
            raise
        raise ValueError(f"{folder} has no tokenizer that transformers can load: {_reason(error, folder)}") from error
    legacy = read_object_if_there(folder / "chat_template.json").get("chat_template")
    template = chat_template or legacy or tokenizer.chat_template
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder}: chat_template is {short(template)}, expected text")
    tokenizer.chat_template = template
    return tokenizer


def _check_tokenizer_files(folder: Path) -> None:
    """The files that transformers reads, before it does."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        read_object_if_there(folder / name)
    for name in (*VOCABULARIES, "chat_template.jinja"):
        if not os.path.lexists(folder / name):
            continue
        require_file(folder / name)
        if (size := (folder / name).stat().st_size) > VOCABULARY_LIMIT:
            raise ValueError(f"{folder / name} has {size} bytes, expected {VOCABULARY_LIMIT} at most")


def _reason(error: BaseException, folder: Path) -> str:
    """What transformers says, and the file that is missing where that is why."""
    said = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
    missing = not any((folder / name).is_file() for name in VOCABULARIES)
    return f"there is no {' or '.join(VOCABULARIES)}: {said}" if missing else said


def _check_tokenizer(tokenizer: Any) -> None:
    """Refuses a tokenizer that has no words, as transformers makes one where their file is missing, or that loses text.

    Raises:
        ValueError: says what is wrong.
    """
    vocabulary = tokenizer.get_vocab()
    if not vocabulary.keys() - tokenizer.get_added_vocab().keys() - set(tokenizer.all_special_tokens):
        raise ValueError(f"it has {len(vocabulary)} tokens, all of them special, expected words, too")
    outside = max(tokenizer.encode(PROBE), default=0) - max(vocabulary.values())  # with what a prompt begins with
    if outside > 0:
        raise ValueError(f"it makes an id of {PROBE!r} that is {outside} more than its highest, expected its own")
    ids = tokenizer.encode(PROBE, add_special_tokens=False)
    if not ids:
        raise ValueError(f"it makes no token of {PROBE!r}, expected one or more")
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if tokenizer.unk_token_id not in ids and text.strip() != PROBE:
        raise ValueError(f"it makes {short(text)} of {PROBE!r}, expected the same text")
