"""Rows of three formats become one Sample; what is wrong with a row is said."""

import re
from pathlib import Path

import pytest
from PIL import Image
from support.corpus import picture

from idefics2_fast.training.samples import Sample, Turn, columns_of, find_format, read_row

ASKED = Turn("user", (None, "What is it?"))
ANSWERED = Turn("assistant", ("A lamp.",))
PICTURE = picture(30, 20)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A lamp."}], "images": [PICTURE]},
        {"messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A lamp."}], "image": PICTURE},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A lamp."}]},
            ],
            "images": [{"bytes": PICTURE, "path": "elsewhere.png"}],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A lamp."}]},
            ]
        },
        {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A lamp."}], "image": PICTURE},
        {"conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A lamp."}], "images": [PICTURE], "id": 7},
    ],
)
def test_formats_give_one_sample(row: dict) -> None:
    assert read_row(row, "k") == Sample("k", (ASKED, ANSWERED), (PICTURE,))


def test_the_cauldron_joins_the_pairs_of_an_image() -> None:
    texts = [{"user": "What is it?", "assistant": "A lamp.", "source": "s"}, {"user": "Colour?", "assistant": "Red.", "source": "s"}]
    sample = read_row({"images": [PICTURE], "texts": texts}, "k")
    assert sample == Sample("k", (ASKED, ANSWERED, Turn("user", ("Colour?",)), Turn("assistant", ("Red.",))), (PICTURE,), pairs=True)


def test_marks_fix_the_order_of_pairs() -> None:
    texts = [{"user": "In <image>?", "assistant": "A lamp."}, {"user": "And in <image>?", "assistant": "Red."}]
    sample = read_row({"images": [PICTURE, PICTURE], "texts": texts}, "k")
    assert (sample.turns[2], sample.pairs) == (Turn("user", ("And in ", None, "?")), False)


def test_text_alone_and_a_system_turn() -> None:
    messages = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    assert [turn.role for turn in read_row({"messages": messages, "images": None}, "k").turns] == ["system", "user", "assistant", "user"]


def test_images_come_in_many_ways(tmp_path: Path) -> None:
    pil = Image.new("RGB", (3, 4))
    given = ["a b.png", str(tmp_path / "c.png"), (tmp_path / "d e.png").as_uri(), {"bytes": None, "path": "f.png"}, PICTURE, pil]
    row = {"texts": [{"user": "?", "assistant": "!"}], "images": given}
    expected = (*(str(tmp_path / name) for name in ("a b.png", "c.png", "d e.png", "f.png")), PICTURE, pil)
    assert read_row(row, "k", tmp_path).images == expected


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "the row is []"),
        ({"text": "a"}, "the format is not known: the columns are text, expected one of messages (TRL), texts"),
        ({"messages": TALK, "texts": []}, "the columns messages, texts belong to different formats"),
        ({"messages": []}, "messages is [], expected a list"),
        ({"messages": "hello"}, "messages is 'hello'"),
        ({"messages": [{"role": "user"}]}, "messages holds {'role': 'user'}"),
        ({"texts": [{"user": "a", "assistant": None}]}, "texts holds"),
        ({"conversations": [{"from": "tool", "value": "x"}], "image": PICTURE}, "the role 'tool' is not known"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, TALK[1]]}, "messages holds {'type': 'video'}"),
        ({"messages": TALK[:1]}, "no turn is the assistant's"),
        ({"messages": TALK[::-1]}, "the assistant speaks first"),
        ({"messages": [TALK[0], {"role": "assistant", "content": " "}]}, "a turn of the assistant is empty"),
        ({"messages": TALK, "image": PICTURE, "images": []}, "both image and images"),
        ({"messages": [{"role": "user", "content": "<image> <image>"}, TALK[1]], "images": [PICTURE]}, "2 image marks and 1 images"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, TALK[1]]}, "1 image marks and 0 images"),
        ({"messages": TALK, "images": ["https://example.org/a.png"]}, "is not downloaded"),
        ({"messages": TALK, "images": ["file://server/a.png"]}, "on the machine server"),
        ({"messages": TALK, "images": [{"bytes": None, "path": None}]}, "the image is None"),
        ({"messages": TALK, "images": [3]}, "the image is 3, expected a path"),
    ],
)
def test_bad_rows(row: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_row(row, "k")


def test_columns() -> None:
    assert find_format(["id", "conversations", "image"]) == "conversations"
    assert columns_of(["id", "messages", "images"]) == ["messages", "images"]
