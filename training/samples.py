"""Rows to samples: the columns of TRL, The Cauldron and ShareGPT, as they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short  # an image's bytes may stand in what a message shows
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from idefics2_fast.processor import IMAGE_TOKEN

ImageReference = str | bytes | Image.Image
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: "system", "user" or "assistant".
        pieces: text, or None where an image stands.
    """

    role: str
    pieces: tuple[str | None, ...]


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
        raise ValueError(f"{problem}: the columns are {', '.join(columns) or 'none'}, expected one of {expected}")
    return found[0]


def columns_of(columns: Collection[str]) -> list[str]:
    """Those of a row's columns that are read."""
    return [find_format(columns), *(name for name in ("image", "images") if name in columns)]


def read_row(row: Mapping[str, Any], key: str, folder: str | os.PathLike[str] = "") -> Sample:
    """The sample of a row in any of the three formats.

    Images are paths (relative ones from `folder`), file:// URLs, the bytes of a file, PIL images, or {"bytes": ..., "path": ...} as
    datasets stores them. Where no text holds `<image>` and no piece is one, all images stand before the user's first text.

    Raises:
        ValueError: not a row, no single format, turns that are not in it, more or fewer image marks than images, no answer.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"the row is {short(row)}, expected an object with columns")
    name = find_format(row)
    listed = row[name]
    if not isinstance(listed, list | tuple) or not listed:
        raise ValueError(f"{name} is {short(listed)}, expected a list that is not empty")
    images = _images_of_row(row)
    turns, inside = FORMATS[name](listed)
    if inside and images:
        raise ValueError("images are given both inside the messages and in a column, expected one of the two")
    images = images or inside
    _check_roles([turn.role for turn in turns])
    marks = sum(piece is None for turn in turns for piece in turn.pieces)
    if marks == 0:
        turns = _with_images_first(turns, len(images))
    elif marks != len(images):
        raise ValueError(f"there are {marks} image marks and {len(images)} images, expected as many of both")
    empty = next((turn.role for turn in turns if not any(piece is None or piece.strip() for piece in turn.pieces)), None)
    if empty is not None:
        raise ValueError(f"a turn of the {empty} is empty, expected text or an image")
    references = tuple(_reference(image, folder) for image in images)
    return Sample(key, turns, references, pairs=name == "texts" and marks == 0)


def _images_of_row(row: Mapping[str, Any]) -> list[Any]:
    given = [name for name in ("image", "images") if row.get(name) is not None]
    if len(given) == 2:
        raise ValueError("the row has both image and images, expected one of the two")
    images = row[given[0]] if given else []
    return list(images) if isinstance(images, list | tuple) else [images]


def _trl(messages: list[Any]) -> tuple[tuple[Turn, ...], list[Any]]:
    turns, inside = [], []
    for message in messages:
        role, content = _fields(message, "role", "content", where="messages")
        pieces: list[str | None] = []
        for piece in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = piece.get("type") if isinstance(piece, Mapping) else None
            if kind == "image":
                pieces.append(None)
                inside += [piece[name] for name in ("image", "path", "url") if piece.get(name) is not None][:1]
            elif kind == "text" and isinstance(piece.get("text"), str):
                pieces += _split_at_marks(piece["text"])
            else:
                raise ValueError(f'messages holds {short(piece)}, expected {{"type": "text", "text": str}} or {{"type": "image"}}')
        turns.append(Turn(role, tuple(pieces)))
    return tuple(turns), inside


def _cauldron(texts: list[Any]) -> tuple[tuple[Turn, ...], list[Any]]:
    turns = []
    for pair in texts:
        question, answer = _fields(pair, "user", "assistant", where="texts")
        turns += [Turn("user", _split_at_marks(question)), Turn("assistant", _split_at_marks(answer))]
    return tuple(turns), []


def _sharegpt(conversations: list[Any]) -> tuple[tuple[Turn, ...], list[Any]]:
    turns = []
    for message in conversations:
        role, text = _fields(message, "from", "value", where="conversations")
        # A mark stands on a line of its own there.
        pieces = tuple(piece and piece.strip("\n") for piece in _split_at_marks(text))
        turns.append(Turn(SHAREGPT_ROLES.get(role, role), tuple(piece for piece in pieces if piece != "")))
    return tuple(turns), []


FORMATS: dict[str, Callable[[list[Any]], tuple[tuple[Turn, ...], list[Any]]]] = {
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


def _split_at_marks(text: str) -> tuple[str | None, ...]:
    """Pieces of a text around its `<image>` marks, none of them empty."""
    first, *others = text.split(IMAGE_TOKEN)
    pieces = [first, *(piece for other in others for piece in (None, other))]
    return tuple(piece for piece in pieces if piece != "")


def _check_roles(roles: list[str]) -> None:
    unknown = next((role for role in roles if role not in ROLES), None)
    if unknown is not None:
        raise ValueError(f"the role {unknown!r} is not known, expected one of {', '.join(ROLES)}")
    spoken = [role for role in roles if role != "system"]
    if "assistant" not in spoken:
        raise ValueError("no turn is the assistant's, expected an answer to train on")
    if spoken[0] != "user":
        raise ValueError("the assistant speaks first, expected the user")


def _with_images_first(turns: tuple[Turn, ...], n_images: int) -> tuple[Turn, ...]:
    index = next(i for i, turn in enumerate(turns) if turn.role == "user")
    first = Turn("user", (None,) * n_images + turns[index].pieces)
    return (*turns[:index], first, *turns[index + 1 :])


def _reference(image: Any, folder: str | os.PathLike[str]) -> ImageReference:
    if isinstance(image, Mapping):  # datasets' undecoded image: the path beside bytes is but a name
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes | Image.Image):
        return image
    if isinstance(image, str | os.PathLike) and os.fspath(image):
        path = os.fspath(image)
        if path.startswith("file://"):
            parts = urlsplit(path)
            if parts.netloc not in ("", "localhost"):
                raise ValueError(f"the image {path} is on the machine {parts.netloc}, expected a file of this one: file:///...")
            return unquote(parts.path)
        if "://" in path or path.startswith("data:"):
            raise ValueError(f"the image {short(path)} is not downloaded: expected a local file, or the bytes of one")
        return str(Path(folder, path))
    raise ValueError(f"the image is {short(image)}, expected a path, bytes, a PIL image, or an object with bytes or path")
