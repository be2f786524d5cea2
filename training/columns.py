"""The parts of a row: read, refused because they would change what is trained, or not read and named once."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from reprlib import repr as short
from typing import Any

logger = logging.getLogger(__name__)

IMAGES = ("image", "images")
SYSTEM = ("system", "system_prompt")
# Whether a turn is trained: `weight` of OpenAI and ShareGPT, `train` and `training` of axolotl,
# `loss` of XTuner and ms-swift.
SWITCHES = ("weight", "train", "training", "loss")
ROW_SWITCHES = ("weight", "train", "training")  # `loss` of a row is mostly a measured number

# Parts that change what other trainers train on. A row in which one is not empty is refused.
CONTENT = frozenset(
    "video videos audio audios tools tool_choice tool_calls tool_call tool_call_id functions "
    "function_call documents chosen rejected rejected_response loss_mask completion_mask "
    "assistant_masks train_detail training_detail loss_scale chat_template_kwargs".split()
)
OF_MESSAGES = CONTENT | set("name image images reasoning reasoning_content thinking prefix refusal attachments files mask".split())
OF_PIECES = CONTENT | set("image_url input_audio file document bytes detail resized_height resized_width min_pixels max_pixels".split())
# Columns that hold images under another name: refused where a row has no image in IMAGES.
OTHER_IMAGES = re.compile(r"(image|img|picture|photo)s?([_-]?(path|file|filename|url|byte|list)s?|[_-]?\d+)?")
# Columns that describe a row: not read, and not worth a word.
HARMLESS = frozenset(
    "id ids idx index uid uuid guid key source sources dataset dataset_name dataset_id subset split "
    "task task_name task_type category domain type lang language metadata meta info license url "
    "origin tag tags hash md5 sha256 date time created_at timestamp author model score scores rating "
    "width height size image_id image_ids image_size image_sizes image_width image_height "
    "question_id conversation_id prompt_id doc_id sample_id num_turns n_turns __index_level_0__ "
    "cache_control annotations citations".split()
)
KNOWN = HARMLESS.union(CONTENT, OF_MESSAGES, OF_PIECES, IMAGES, SYSTEM, SWITCHES)


def is_empty(value: Any, depth: int = 4) -> bool:
    """Whether a part of a row says nothing: None, NaN, False, 0, no text, no element.

    So are objects of which all values are empty, as Arrow writes a missing object, and the text of
    an empty JSON value.

    Args:
        depth: objects in objects that are looked into.
    """
    if value is None:
        return True
    if isinstance(value, str):
        return len(value) < 99 and value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, float) and math.isnan(value):
        return True
    if isinstance(value, Mapping):
        return not value or (depth > 0 and all(is_empty(v, depth - 1) for v in value.values()))
    if hasattr(value, "__len__"):
        return len(value) == 0
    return isinstance(value, int | float) and value == 0


def refuse_parts(part: Mapping[str, Any], refused: Collection[str], where: str) -> None:
    """Refuses a row, a message or a piece of one with a part that would be dropped.

    Raises:
        ValueError: one of the refused parts is not empty.
    """
    for name, value in part.items():
        if isinstance(name, str) and name.lower() in refused and not is_empty(value):
            raise ValueError(f"{where} has {name}: {short(value)}, which is not trained on: expected none")


def refuse_other_images(row: Mapping[str, Any]) -> None:
    """Refuses a row without images whose images stand in a column that is not read.

    Raises:
        ValueError: there is such a column, and it is not empty.
    """
    for name, value in row.items():
        if name in IMAGES or not isinstance(name, str):
            continue
        if OTHER_IMAGES.fullmatch(name.lower()) and not is_empty(value):
            raise ValueError(f"the column {name} is {short(value)} and the row has no image: expected images in {' or '.join(IMAGES)}")


def looked_at(columns: Collection[str]) -> list[str]:
    """Those of a row's columns, besides the turns, that are read or may have to be refused."""
    names = {*IMAGES, *SYSTEM, *ROW_SWITCHES}
    first = [name for name in IMAGES if name in columns]
    return first + [
        name
        for name in columns
        if name not in IMAGES and (name.lower() in names or name.lower() in CONTENT or OTHER_IMAGES.fullmatch(name.lower()))
    ]


def refuse_other_cases(part: Mapping[str, Any], read: Collection[str], where: str) -> None:
    """Refuses a row or a message with a part that would be read if it were written in lower case.

    Raises:
        ValueError: there is such a part, and it is not empty. 0 and False say something, of a switch.
    """
    for name, value in part.items():
        said = not is_empty(value) or isinstance(value, int)
        if isinstance(name, str) and name not in read and name.lower() in read and said:
            raise ValueError(f"{where} has {name}: {short(value)}, which is not read: expected it to be called {name.lower()}")


class Unread:
    """Logs each name of a part that is not read, once."""

    MOST = 100  # names; a hostile file has more

    def __init__(self) -> None:
        self._names: set[str] = set()

    def __call__(self, names: Iterable[Any], where: str) -> None:
        """Names the parts of something that are in no list of this module."""
        for name in names:
            if isinstance(name, str) and name.lower() in KNOWN:
                continue
            entry = f"{where} {short(name)}"
            if entry in self._names or len(self._names) >= self.MOST:
                continue
            self._names.add(entry)
            logger.warning("the %s is not read: training goes without it", entry)


NoteUnread = Callable[[Iterable[Any], str], None]


def note_nothing(names: Iterable[Any], where: str) -> None:
    """Takes the place of an Unread where none is wanted."""
