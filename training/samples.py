"""Rows to samples: the columns of TRL, The Cauldron and ShareGPT, as they are."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from reprlib import repr as short  # an image's bytes may stand in what a message shows
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image

from idefics2_fast.processor import IMAGE_TOKEN
from idefics2_fast.training.columns import (
    CONTENT,
    IMAGES,
    OF_MESSAGES,
    OF_PIECES,
    ROW_SWITCHES,
    SWITCHES,
    SYSTEM,
    NoteUnread,
    is_empty,
    looked_at,
    note_nothing,
    refuse_other_cases,
    refuse_other_images,
    refuse_parts,
)

ImageReference = str | bytes | Image.Image
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

# <image1>, <image_1>, <|image_1|>: they stand for images where they count them in order.
NUMBERED = re.compile(r"<\|?image[ _-]?(\d{1,9})\|?>", re.IGNORECASE)
MARK = re.compile(f"{re.escape(IMAGE_TOKEN)}|{NUMBERED.pattern}", re.IGNORECASE)
# What other models' data writes where an image, a video or sound stands.
FOREIGN = re.compile(
    r"<\|(?:image|video|audio)(?:[ _-]?(?:\d{1,9}|pad|placeholder|start|end|token))?\|>"
    r"|<(?:image|img)(?:here|[ _-]?(?:placeholder|pad|context|soft_token|start|end|token))/?>"
    r"|<image/?>|<(?:video|audio)[ _-]?(?:\d{1,9}|placeholder)>|<\|vision_(?:start|end|pad)\|>"
    r"|<(?:start|end)_of_image>|<im_(?:patch|start|end)>|(?-i:\[IMG(?:_\w{1,9})?\])"
    # Words of HTML, too, of which a text may speak: at the beginning or the end of a line.
    r"|(?m:^)[ \t]*<(?:img|video|audio)>|<(?:img|video|audio)>[ \t]*(?m:$)",
    re.IGNORECASE,
)
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: "system", "user" or "assistant".
        pieces: text, or None where an image stands.
        trained: for the assistant's: whether the answer is trained on.
    """

    role: str
    pieces: tuple[str | None, ...]
    trained: bool = True


@dataclass(frozen=True)
class Sample:
    """A conversation to train on, its images not yet opened.

    Attributes:
        key: names the row for good, on any machine: all chance is drawn from it.
        turns: the last turns may be the user's; the first that is not the system's always is.
        images: paths, the bytes of files, or PIL images, in the order of the turns' images.
        pairs: the turns after the images are questions and answers that do not build on one another: their order is free.
    """

    key: str
    turns: tuple[Turn, ...]
    images: tuple[ImageReference, ...] = ()
    pairs: bool = False


def find_format(columns: Collection[str]) -> str:
    """The column that tells the format: "messages" (TRL), "texts" (The Cauldron) or "conversations" (ShareGPT).

    Raises:
        ValueError: none of them is there, or several.
    """
    found = [name for name in FORMATS if name in columns]
    if len(found) != 1:
        problem = f"the columns {', '.join(found)} belong to different formats" if found else "the format is not known"
        expected = "messages (TRL), texts (The Cauldron) or conversations (ShareGPT), and the images in image or images"
        raise ValueError(f"{problem}: the columns are {_names(columns)}, expected one of {expected}")
    return found[0]


def _names(columns: Collection[Any]) -> str:
    shown = [str(name) if isinstance(name, str) and len(name) <= 80 else short(name) for name in islice(columns, 20)]
    return ", ".join(shown) + (" and more" if len(columns) > 20 else "") or "none"


def columns_of(columns: Collection[str]) -> list[str]:
    """Those of a row's columns that are read, or looked at because a row may be refused for them."""
    name = find_format(columns)
    return [name, *(other for other in looked_at(columns) if other != name)]


def read_row(
    row: Mapping[str, Any],
    key: str,
    folder: str | os.PathLike[str] = "",
    note: NoteUnread = note_nothing,
) -> Sample:
    """The sample of a row in any of the three formats.

    Images are paths (relative ones from `folder`), file:// URLs, the bytes of a file, PIL images, or
    {"bytes": ..., "path": ...} as datasets stores them. Where no text holds `<image>` and no piece
    is one, all images stand before the user's first text. `<image1>`, `<image2>` ... stand for
    images where they count all of them in order.

    A column `system` or `system_prompt` is a turn of the system. `weight`, `train`, `training` or
    `loss` of a message says whether an answer is trained on. Parts that would change what is
    trained and are not read (columns.py) must be empty.

    Args:
        note: is told the names of parts that are not read.

    Raises:
        ValueError: not a row, no single format, turns that are not in it, more or fewer image marks
            than images, no answer that is trained, parts that cannot be trained on.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"the row is {short(row)}, expected an object with columns")
    name = find_format(row)
    _check_columns(row, name, note)
    listed = row[name]
    if not isinstance(listed, list | tuple) or not listed:
        raise ValueError(f"{name} is {short(listed)}, expected a list that is not empty")
    images = _images_of_row(row)
    marks = _Marks()
    turns, inside = FORMATS[name](listed, marks, note)
    if inside and images:
        raise ValueError("images are given both inside the messages and in a column, expected one of the two")
    images = images or inside
    if not images:
        refuse_other_images(row)
    refuse_other_cases(row, IMAGES, "the row")
    turns = _with_system(row, turns, marks)
    _check_roles(turns)
    marks.check(len(images))
    n_marks = sum(piece is None for turn in turns for piece in turn.pieces)
    if n_marks == 0:
        turns = _with_images_first(turns, len(images))
    elif n_marks != len(images):
        raise ValueError(f"there are {n_marks} image marks and {len(images)} images, expected as many of both")
    if (empty := next((turn for turn in turns if not _says(turn, images=True)), None)) is not None:
        raise ValueError(f"a turn of the {empty.role} is empty, expected text or an image")
    # A question without text needs its images before it: such pairs keep their order.
    free = name == "texts" and n_marks == 0 and all(map(_says, turns))
    return Sample(key, turns, tuple(_reference(image, folder) for image in images), pairs=free)


def _says(turn: Turn, images: bool = False) -> bool:
    """Whether there is text in a turn, or, if that counts, an image."""
    return any(images if piece is None else piece.strip() for piece in turn.pieces)


def _check_columns(row: Mapping[str, Any], name: str, note: NoteUnread) -> None:
    refuse_parts(row, CONTENT, "the row")
    refuse_other_cases(row, (*SYSTEM, *ROW_SWITCHES), "the row")
    for switch in ROW_SWITCHES:
        value = row.get(switch)
        if switch in row and not _is_missing(value) and _switch(switch, value) is False:
            raise ValueError(f"{switch} of the row is {value}, expected rows that are trained on")
    note(row.keys() - {name, *IMAGES}, "column")


def _images_of_row(row: Mapping[str, Any]) -> list[Any]:
    given = [name for name in IMAGES if row.get(name) is not None]
    if len(given) == 2:
        raise ValueError("the row has both image and images, expected one of the two")
    images = row[given[0]] if given else []
    return list(images) if isinstance(images, list | tuple) else [images]


@dataclass
class _Marks:
    """Splits the texts of a row at its image marks.

    Attributes:
        numbered: the numbered marks, in order.
        plain: how many images stand without a number.
    """

    numbered: list[re.Match[str]] = field(default_factory=list)
    plain: int = 0

    def split(self, text: str, role: str) -> tuple[str | None, ...]:
        """Pieces of a text around its marks, none of them empty; None for a mark.

        Raises:
            ValueError: text that is not Unicode, or a question with a mark of another model's data.
        """
        if not text.isascii() and (half := SURROGATE.search(text)):
            raise ValueError(f"the text holds {half[0]!r}, half of a character: expected valid Unicode")
        if "<" not in text and "[" not in text:
            return (text,) if text else ()
        pieces: list[str | None] = []
        end = 0
        for mark in MARK.finditer(text):
            if mark[1] is None and mark[0] != IMAGE_TOKEN:  # <Image>, which FOREIGN names
                continue
            pieces += [text[end : mark.start()], None]
            end = mark.end()
            if mark[1] is None:
                self.plain += 1
            else:
                self.numbered.append(mark)
        pieces.append(text[end:])
        if role != "assistant":
            _refuse_foreign_marks(pieces)
        return tuple(piece for piece in pieces if piece != "")

    def check(self, images: int) -> None:
        """Compares the numbered marks with the images of the row.

        Raises:
            ValueError: they do not count the images in order, from 0 or 1.
        """
        if not self.numbered:
            return
        numbers = [int(mark[1]) for mark in self.numbered]
        if self.plain or len(numbers) != images or numbers != [*range(numbers[0], numbers[0] + images)] or numbers[0] > 1:
            shown = short([mark[0] for mark in self.numbered])
            raise ValueError(
                f"the text holds the marks {shown} and the row has {images} images: expected"
                f" {IMAGE_TOKEN} for each, or numbers that count them in order"
            )


def _refuse_foreign_marks(pieces: list[str | None]) -> None:
    found = next((mark for piece in pieces if piece and (mark := FOREIGN.search(piece))), None)
    if found is not None:
        raise ValueError(
            f"the text holds {found[0].strip()!r}, which stands for an image or a video in data of other"
            f" models: expected {IMAGE_TOKEN} for an image"
        )


Parsed = tuple[tuple[Turn, ...], list[Any]]


def _trl(messages: list[Any], marks: _Marks, note: NoteUnread) -> Parsed:
    turns, inside = [], []
    for message in messages:
        _check_message(message, ("role", "content"), note)
        role, content = _fields(message, "role", "content", where="messages")
        pieces: list[str | None] = []
        images = 0
        for piece in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = piece.get("type") if isinstance(piece, Mapping) else None
            if kind == "image":
                pieces.append(None)
                inside += _source_of_piece(piece, note)
                images += 1
            elif kind == "text" and isinstance(piece.get("text"), str):
                _source_of_piece(piece, note)
                pieces += marks.split(piece["text"], role)
            else:
                raise ValueError(f'messages holds {short(piece)}, expected {{"type": "text", "text": str}} or {{"type": "image"}}')
        marks.plain += images
        turns.append(Turn(role, tuple(pieces), _is_trained(message, role)))
    _check_order(messages)
    return tuple(turns), inside


def _source_of_piece(piece: Mapping[str, Any], note: NoteUnread) -> list[Any]:
    """The image that a piece brings along, if it does."""
    refuse_parts(piece, OF_PIECES, "a piece of a message")
    given = [name for name in ("image", "path", "url") if piece.get(name) is not None]
    both = piece["type"] == "image" and not is_empty(piece.get("text"))
    if len(given) + both > 1 or (given and piece["type"] == "text"):
        raise ValueError(f"a piece of a message is {short(piece)}, expected one image or one text")
    if both:
        raise ValueError(f"a piece of a message is {short(piece)}, expected an image without text")
    note(piece.keys() - {"type", "text", "image", "path", "url", "index"}, "field of pieces")
    return [piece[name] for name in given]


def _check_order(messages: list[Any]) -> None:
    """Compares `index` of image pieces, where they have one, with their order."""
    pieces = (
        piece for message in messages if not isinstance(message["content"], str) for piece in message["content"] if piece["type"] == "image"
    )
    for place, piece in enumerate(pieces):
        index = piece.get("index")
        if not _is_missing(index) and index != place:
            raise ValueError(f"image piece {place} has index {short(index)}, expected {place}")


def _cauldron(texts: list[Any], marks: _Marks, note: NoteUnread) -> Parsed:
    turns = []
    for pair in texts:
        _check_message(pair, ("user", "assistant"), note)
        question, answer = _fields(pair, "user", "assistant", where="texts")
        trained = _is_trained(pair, "assistant")
        turns.append(Turn("user", marks.split(question, "user")))
        turns.append(Turn("assistant", marks.split(answer, "assistant"), trained))
    return tuple(turns), []


def _sharegpt(conversations: list[Any], marks: _Marks, note: NoteUnread) -> Parsed:
    turns = []
    for message in conversations:
        _check_message(message, ("from", "value"), note)
        role, text = _fields(message, "from", "value", where="conversations")
        role = SHAREGPT_ROLES.get(role, role)
        # A mark stands on a line of its own there.
        pieces = tuple(piece and piece.strip("\n") for piece in marks.split(text, role))
        kept = tuple(piece for piece in pieces if piece != "")
        turns.append(Turn(role, kept, _is_trained(message, role)))
    return tuple(turns), []


FORMATS: dict[str, Callable[[list[Any], _Marks, NoteUnread], Parsed]] = {
    "messages": _trl,
    "texts": _cauldron,
    "conversations": _sharegpt,
}


def _fields(message: Any, first: str, second: str, *, where: str) -> tuple[Any, Any]:
    content = message.get(second) if isinstance(message, Mapping) else None
    as_expected = isinstance(content, str) or (where == "messages" and isinstance(content, list | tuple))
    if not as_expected or not isinstance(message.get(first), str):
        raise ValueError(f'{where} holds {short(message)}, expected {{"{first}": str, "{second}": str}}')
    return message[first], content


def _check_message(message: Any, read: tuple[str, str], note: NoteUnread) -> None:
    if isinstance(message, Mapping):
        refuse_parts(message, OF_MESSAGES, "a message")
        refuse_other_cases(message, SWITCHES, "a message")
        note(message.keys() - {*read, *SWITCHES}, "field of messages")


def _is_trained(message: Mapping[str, Any], role: str) -> bool:
    """Whether a message is trained on, by the switches that it has."""
    trained = True
    for name in SWITCHES:
        value = message.get(name)
        if _is_missing(value):
            continue
        on = _switch(name, value)
        if on and role != "assistant":
            raise ValueError(f"{name} of a turn of the {role} is {value}, expected 0: answers alone are trained on")
        trained = trained and on
    return trained


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, int | float) or value not in (0, 1):
        raise ValueError(f"{name} is {short(value)}, expected 0 or 1, false or true")
    return bool(value)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _with_system(row: Mapping[str, Any], turns: tuple[Turn, ...], marks: _Marks) -> tuple[Turn, ...]:
    """The turns behind that of the system, which a column holds."""
    given = {name: row[name] for name in SYSTEM if not is_empty(row.get(name))}
    if not given:
        return turns
    name, text = next(iter(given.items()))
    if not all(isinstance(value, str) for value in given.values()):
        raise ValueError(f"{name} is {short(text)}, expected the text of the system's turn")
    spoken = "".join(piece or IMAGE_TOKEN for turn in turns[:1] for piece in turn.pieces)
    if turns[0].role == "system" and {spoken.strip(), *map(str.strip, given.values())} == {text.strip()}:
        return turns
    if turns[0].role == "system" or len({value.strip() for value in given.values()}) > 1:
        raise ValueError(f"{name} is {short(text)} and the system speaks otherwise, too: expected one of the two")
    return (Turn("system", marks.split(text, "system")), *turns)


def _check_roles(turns: tuple[Turn, ...]) -> None:
    unknown = next((turn.role for turn in turns if turn.role not in ROLES), None)
    if unknown is not None:
        raise ValueError(f"the role {short(unknown)} is not known, expected one of {', '.join(ROLES)}")
    spoken = [turn for turn in turns if turn.role != "system"]
    answers = [turn for turn in spoken if turn.role == "assistant"]
    if not answers:
        raise ValueError("no turn is the assistant's, expected an answer to train on")
    if spoken[0].role != "user":
        raise ValueError("the assistant speaks first, expected the user")
    if not any(turn.trained for turn in answers):
        raise ValueError("no answer is to be trained on, expected one at least")


def _with_images_first(turns: tuple[Turn, ...], n_images: int) -> tuple[Turn, ...]:
    index = next(i for i, turn in enumerate(turns) if turn.role == "user")
    first = replace(turns[index], pieces=(None,) * n_images + turns[index].pieces)
    return (*turns[:index], first, *turns[index + 1 :])


def _reference(image: Any, folder: str | os.PathLike[str]) -> ImageReference:
    if isinstance(image, Mapping):  # datasets' undecoded image: the path beside bytes is but a name
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes | Image.Image):
        return image
    if isinstance(image, str | os.PathLike) and os.fspath(image):
        path = os.fspath(image)
        if path.lower().startswith(("file:/", "file://")):
            return _path_of_url(path)
        if "://" in path or path.startswith("data:"):
            raise ValueError(f"the image {short(path)} is not downloaded: expected a local file, or the bytes of one")
        return str(Path(folder, path))
    raise ValueError(f"the image is {short(image)}, expected a path, bytes, a PIL image, or an object with bytes or path")


def _path_of_url(url: str) -> str:
    """The path of a file URL: all that follows the host, `#` and `?` too, its %-codes decoded."""
    rest = url[len("file:") :]
    host, path = "", rest
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        path = slash + path
    if host.lower() not in ("", "localhost"):
        raise ValueError(f"the image {short(url)} is on the machine {host[:99]}, expected a file of this one: file:///...")
    return os.fsdecode(unquote_to_bytes(path))
