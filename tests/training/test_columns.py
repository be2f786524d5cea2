"""Every part of a row that would change what is trained is honoured, or refused by its name."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from support.corpus import picture

from idefics2_fast import Processor
from idefics2_fast.batch import IGNORED
from idefics2_fast.training.planning import Planner
from idefics2_fast.training.samples import Sample, Turn, read_row
from idefics2_fast.training.sources import Rejection, open_source

PICTURE = picture(30, 20)
ASK, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
ROWS = {
    "messages": {"messages": [ASK, ANSWER]},
    "texts": {"texts": [{"user": "Why?", "assistant": "So."}]},
    "conversations": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
}
FORMATS = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
TURNS = (Turn("user", ("Why?",)), Turn("assistant", ("So.",)))


def refused(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_row(row, "k")


def answering(**fields: Any) -> dict[str, Any]:
    return {"messages": [ASK, ANSWER | fields]}


# --- the system's turn ---


@FORMATS
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_column_is_a_turn(row: dict, name: str) -> None:
    assert read_row(row | {name: "Be brief."}, "k").turns == (Turn("system", ("Be brief.",)), *TURNS)
    assert read_row(row | {name: " "}, "k").turns == read_row(row | {name: None}, "k").turns == TURNS


def test_a_system_column_beside_a_system_turn() -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, ASK, ANSWER]}
    assert read_row(row | {"system": "Be brief.", "system_prompt": None}, "k") == read_row(row, "k")
    refused(row | {"system": "Be long."}, "system is 'Be long.' and the system speaks otherwise")
    refused(ROWS["texts"] | {"system": "a", "system_prompt": "b"}, "system is 'a' and the system speaks otherwise")
    refused(ROWS["texts"] | {"system": ["a"]}, "system is ['a'], expected the text")


def test_pairs_are_shuffled_behind_the_system(processor: Processor) -> None:
    texts = [{"user": f"Question {i}", "assistant": f"Answer {i}"} for i in range(4)]
    sample = read_row({"texts": texts, "system": "Be brief.", "image": PICTURE}, "k")
    planner = Planner(processor, seed=0, tokens=4096, patches=4096)
    orders = {processor.decode(planner(sample, epoch).token_ids.tolist(), skip_special_tokens=False) for epoch in range(6)}
    assert len(orders) > 1
    for text in orders:
        assert text.replace("<s> ", "<s>").startswith("<s>System: Be brief.<end_of_utterance>\nUser:<fake_token")


# --- which answers are trained ---


def trained_text(processor: Processor, row: dict) -> str:
    document = Planner(processor, seed=0, tokens=4096, patches=4096)(read_row(row, "k"))
    return processor.decode(document.labels[document.labels != IGNORED].tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("name", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize(("off", "on"), [(0, 1), (False, True), (0.0, 1.0)])
def test_a_turn_that_is_switched_off_is_not_trained(processor: Processor, name: str, off: Any, on: Any) -> None:
    messages = [ASK, ANSWER | {name: off}, ASK | {name: off}, ANSWER | {"content": "Yes.", name: on}]
    assert trained_text(processor, {"messages": messages}).split() == ["Yes.<end_of_utterance></s>"]
    messages = [ASK, ANSWER | {name: None}, ASK | {name: None}, {"role": "assistant", "content": "Yes.", name: off}]
    assert trained_text(processor, {"messages": messages}).split() == ["So.<end_of_utterance>"]


def test_every_format_has_the_switch(processor: Processor) -> None:
    texts = [{"user": "a", "assistant": "b", "weight": 0}, {"user": "c", "assistant": "d"}]
    said = [("human", "a", 0), ("gpt", "b", 0), ("human", "c", None), ("gpt", "d", 1)]
    conversations = [{"from": role, "value": text, "weight": weight} for role, text, weight in said]
    for row in ({"texts": texts}, {"conversations": conversations}):
        assert [turn.trained for turn in read_row(row, "k").turns[1::2]] == [False, True]
        assert trained_text(processor, row).split("<end")[0].strip() == "d"


def test_switches_that_mean_nothing_here_are_refused() -> None:
    refused(answering(weight=0.5), "weight is 0.5, expected 0 or 1")
    refused(answering(train="no"), "train is 'no', expected 0 or 1")
    refused(answering(loss=[1]), "loss is [1], expected 0 or 1")
    refused(answering(weight=0), "no answer is to be trained on")
    refused(answering(train=False, weight=1), "no answer is to be trained on")
    refused({"messages": [ASK | {"weight": 1}, ANSWER]}, "weight of a turn of the user is 1")
    for name, value in {"weight": 0, "train": False}.items():
        refused(ROWS["texts"] | {name: value}, f"{name} of the row is {value}")
    refused(ROWS["texts"] | {"weight": 0.3}, "weight is 0.3")
    assert read_row(ROWS["texts"] | {"weight": 1.0, "train": True}, "k").turns == TURNS


# --- parts that cannot be trained on ---

PARTS = {
    "videos": ["a.mp4"],
    "video": "a.mp4",
    "audios": [{"bytes": b"x", "path": None}],
    "Audio": b"x",
    "tools": '[{"name": "f"}]',
    "functions": [{"name": "f"}],
    "tool_calls": [{}],
    "documents": [{"text": "a"}],
    "chosen": ANSWER,
    "rejected": [ANSWER],
    "loss_mask": [0, 1],
    "chat_template_kwargs": {"thinking": True},
}
NOTHING = [None, "", " [] ", "{}", [], {}, False, 0, float("nan"), {"bytes": None, "path": None}, ()]


@FORMATS
@pytest.mark.parametrize("name", PARTS)
def test_columns_that_cannot_be_trained_on_are_refused(row: dict, name: str) -> None:
    refused(row | {name: PARTS[name]}, f"the row has {name}: ")
    for nothing in NOTHING:
        assert read_row(row | {name: nothing}, "k") == read_row(row, "k")


@pytest.mark.parametrize("name", [*PARTS, "name", "images", "reasoning_content", "prefix", "tool_call_id", "refusal"])
def test_parts_of_messages_that_cannot_be_trained_on_are_refused(name: str) -> None:
    value = PARTS.get(name, "text")
    refused(answering(**{name: value}), f"a message has {name}: ")
    refused(
        {"conversations": [ROWS["conversations"]["conversations"][0] | {name: value}, {"from": "gpt", "value": "a"}]},
        f"a message has {name}: ",
    )
    refused({"texts": [ROWS["texts"]["texts"][0] | {name: value}]}, f"a message has {name}: ")
    for nothing in NOTHING:
        assert read_row(answering(**{name: nothing}), "k").turns == TURNS


def test_a_call_without_text_is_named() -> None:
    refused(answering(content=None, tool_calls=[{"id": "1"}]), "a message has tool_calls: ")
    for role in ("tool", "function", "developer"):
        refused({"messages": [ASK, {"role": role, "content": "x"}, ANSWER]}, f"the role '{role}' is not known")


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}, "messages holds {"),
        ({"type": "video", "video": "a.mp4"}, "messages holds {"),
        ({"type": "input_text", "text": "a"}, "messages holds {"),
        ({"type": "text", "text": "a", "image": "b.png"}, "expected one image or one text"),
        ({"type": "image", "image": PICTURE, "text": "a"}, "expected one image or one text"),
        ({"type": "image", "image": PICTURE, "url": "b.png"}, "expected one image or one text"),
        ({"type": "image", "text": "a"}, "expected an image without text"),
        ({"type": "image", "image": PICTURE, "min_pixels": 9}, "a piece of a message has min_pixels: 9"),
        ({"type": "image", "image": PICTURE, "index": 1}, "image piece 0 has index 1, expected 0"),
    ],
)
def test_pieces_that_say_two_things_are_refused(piece: dict, message: str) -> None:
    refused({"messages": [ASK | {"content": [piece, {"type": "text", "text": "?"}]}, ANSWER]}, message)


def test_pieces_as_arrow_fills_them() -> None:
    blank = {"image": None, "video": None, "index": None, "text": None}
    pieces = [blank | {"type": "image", "index": 0}, blank | {"type": "text", "text": "Why?"}]
    assert read_row({"messages": [ASK | {"content": pieces}, ANSWER], "images": [PICTURE]}, "k").images == (PICTURE,)


@pytest.mark.parametrize("name", ["image_path", "img", "picture", "image_url", "image_0", "image1", "photos", "image_files"])
def test_images_under_another_name_are_not_dropped(name: str) -> None:
    refused(ROWS["messages"] | {name: "a.png"}, f"the column {name} is 'a.png' and the row has no image")
    assert read_row(ROWS["messages"] | {name: None}, "k").turns == TURNS
    assert len(read_row(ROWS["messages"] | {name: "a.png", "image": PICTURE}, "k").images) == 1


def test_preference_rows_are_refused_by_name() -> None:
    refused({"prompt": "a", "chosen": [ANSWER], "rejected": [ANSWER]}, "the columns are prompt, chosen, rejected")
    refused({"conversations": ROWS["conversations"]["conversations"], "chosen": ANSWER}, "the row has chosen")


# --- image marks ---


@pytest.mark.parametrize(
    "marks", [("<image1>", "<image2>"), ("<image_0>", "<image_1>"), ("<|image_1|>", "<|image_2|>"), ("<Image 1>", "<Image-2>")]
)
def test_numbered_marks_that_count_the_images_stand_for_them(marks: tuple[str, str]) -> None:
    text = f"In {marks[0]} and {marks[1]}?"
    pieces = ("In ", None, " and ", None, "?")
    assert read_row({"messages": [ASK | {"content": text}, ANSWER], "images": [b"a", b"b"]}, "k").turns[0] == Turn("user", pieces)
    text = f"{marks[0]}\n{marks[1]}\nWhy?"
    talk = [{"from": "human", "value": text}, {"from": "gpt", "value": "So."}]
    plain = [{"from": "human", "value": "<image>\n<image>\nWhy?"}, {"from": "gpt", "value": "So."}]
    assert read_row({"conversations": talk, "images": [b"a", b"b"]}, "k") == read_row({"conversations": plain, "images": [b"a", b"b"]}, "k")


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("<image1>", 0),
        ("<image1><image3>", 2),
        ("<image2><image1>", 2),
        ("<image1>", 2),
        ("<image1><image1>", 2),
        ("<image><image2>", 2),
        ("<image2><image3>", 2),
        ("<image99999999999>", 1),
    ],
)
def test_numbered_marks_that_count_otherwise_are_refused(text: str, images: int) -> None:
    row = {"texts": [{"user": f"{text} Why?", "assistant": "So."}], "images": [b"a"] * images}
    if text == "<image99999999999>":  # no number that a row could mean
        assert read_row(row, "k").turns[0].pieces == (None, f"{text} Why?")
    else:
        refused(row, "the text holds the marks ['<image")


def test_an_answer_may_not_name_an_image_as_text() -> None:
    refused(
        {"texts": [{"user": "<image1> Why?", "assistant": "<image1> says so."}], "images": [b"a"]}, "the marks ['<image1>', '<image1>']"
    )


@pytest.mark.parametrize(
    "mark",
    [
        "<ImageHere>",
        "<|image|>",
        "<Image>",
        "<img>",
        "<image_placeholder>",
        "<|image_pad|>",
        "<|vision_start|>",
        "<start_of_image>",
        "[IMG]",
        "<IMG_CONTEXT>",
        "<im_patch>",
        "<video>",
        "<|audio_1|>",
    ],
)
def test_marks_of_other_models_are_refused_in_questions(mark: str) -> None:
    for images in ([], [b"a"]):
        for text in (f"{mark}Why?", f"Why?\n{mark}"):
            refused({"texts": [{"user": text, "assistant": "So."}], "images": images}, f"the text holds '{mark}'")
    assert read_row({"texts": [{"user": "Why?", "assistant": f"{mark}"}]}, "k").turns[1].pieces == (mark,)


@pytest.mark.parametrize(
    "text", ["Is <img> or <video> void?", "<images>", "a < image > b", "[image]", "<img src='a'>", "<|im_start|>", "<imagery>", "x[0] <b>"]
)
def test_text_about_tags_is_text(text: str) -> None:
    assert read_row({"texts": [{"user": text, "assistant": "So."}]}, "k").turns[0].pieces == (text,)


def test_text_that_is_not_unicode_is_refused() -> None:
    for row in (json.loads('{"texts": [{"user": "a\\ud83d", "assistant": "b"}]}'), ROWS["messages"] | {"system": "\udc00"}):
        refused(row, "half of a character")
    assert read_row(json.loads('{"texts": [{"user": "\\ud83d\\ude00", "assistant": "b"}]}'), "k")


# --- every way in ---


def test_parquet_and_datasets_are_looked_at_like_json(tmp_path: Path) -> None:
    rows = [
        ROWS["texts"] | {"system": "Be brief.", "videos": videos, "weight": weight}
        for videos, weight in [(None, 1), (["a.mp4"], None), ([], 0)]
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    dataset = datasets.Dataset.from_list(rows)
    for data in (rows, tmp_path / "a.jsonl", tmp_path / "a.parquet", dataset):
        source = open_source(data)
        first, *others = (source.attempt(row, lambda sample: sample) for row in range(3))
        assert isinstance(first, Sample)
        assert first.turns[0] == Turn("system", ("Be brief.",))
        assert all(isinstance(other, Rejection) for other in others)
        assert "the row has videos" in others[0].reason
        assert "weight of the row is 0" in others[1].reason


def test_a_datasets_transform_is_kept() -> None:
    dataset = datasets.Dataset.from_list([{"question": "Why?"}] * 2)
    dataset.set_transform(lambda batch: {"texts": [[{"user": text, "assistant": "So."}] for text in batch["question"]]})
    assert open_source(dataset).read(1).turns == TURNS


def test_media_of_a_dataset_stay_undecoded(tmp_path: Path) -> None:
    """Inside messages, too; sound is refused and not decoded."""
    features = datasets.Features(
        {
            "messages": datasets.List(
                {
                    "role": datasets.Value("string"),
                    "content": datasets.List(
                        {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
                    ),
                }
            ),
            "audio": datasets.Audio(),
        }
    )
    pieces = [
        {"type": "image", "text": None, "image": {"bytes": b"no image", "path": None}},
        {"type": "text", "text": "Why?", "image": None},
    ]
    messages = [{"role": "user", "content": pieces}, {"role": "assistant", "content": [{"type": "text", "text": "So.", "image": None}]}]
    table = pa.Table.from_pylist(
        [{"messages": messages, "audio": None}, {"messages": messages, "audio": {"bytes": b"x", "path": None}}],
        schema=features.arrow_schema,
    )
    source = open_source(datasets.Dataset(table))
    assert source.read(0).images == (b"no image",)
    with pytest.raises(ValueError, match="the row has audio"):
        source.read(1)


def test_columns_that_are_not_read_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [ROWS["texts"] | {"id": 1, "context": "c", "hint": "h", "videos": None}, answering(emotion="glad", id=3)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows * 3)))
    parquet.write_table(pa.Table.from_pylist([ROWS["texts"] | {"answer_type": "x"}]), tmp_path / "c.parquet")
    source = open_source(tmp_path)
    with caplog.at_level(logging.WARNING):
        for row in range(len(source)):
            source.read(row)
    named = sorted(record.getMessage() for record in caplog.records)
    places = ["column 'answer_type'", "column 'context'", "column 'hint'", "field of messages 'emotion'"]
    assert named == [f"the {place} is not read: training goes without it" for place in places]


def test_names_that_are_not_read_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    source = open_source([ROWS["texts"] | {f"x{i}": 1 for i in range(1000)} | {"y" * 10**6: 1, 7: 2}])
    source.read(0)
    assert len(caplog.records) == 100
    assert max(len(record.getMessage()) for record in caplog.records) < 200


OTHER_CASES = [
    ({"System": "Be brief."}, {}, "the row has System: 'Be brief.', which is not read: expected it to be called system"),
    ({"Weight": 0}, {}, "the row has Weight: 0"),
    ({"image": "a.png", "Images": ["b.png"]}, {}, "the row has Images"),
    ({}, {"Weight": 0}, "a message has Weight: 0, which is not read: expected it to be called weight"),
    ({}, {"TRAIN": False}, "a message has TRAIN: False"),
]


@pytest.mark.parametrize(("row", "answer", "message"), OTHER_CASES)
def test_names_in_capitals_are_not_dropped(row: dict, answer: dict, message: str, tmp_path: Path) -> None:
    """What would be read in lower case is neither read nor passed over; in Parquet's columns either."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", **answer}]
    whole = {"messages": messages, **row}
    with pytest.raises(ValueError, match=message):
        read_row(whole, "k")
    parquet.write_table(pa.Table.from_pylist([whole]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "a.parquet").read(0)
    empty = {name: None for name in row if name != "image"}
    assert read_row(whole | empty | {"messages": [{**m, **dict.fromkeys(answer)} for m in messages]}, "k").turns
