"""Samples to documents: the processor's own tokens, answers alone trained, sizes from headers, chance from the key alone."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.corpus import WORDS, mixed_rows, picture

from idefics2_fast import Processor, pack_images
from idefics2_fast.batch import IGNORED
from idefics2_fast.training.order import permutation, uniform
from idefics2_fast.training.planning import Document, Planner
from idefics2_fast.training.samples import Sample, read_row
from idefics2_fast.training.sources import check, open_source


@pytest.fixture(scope="module")
def planner(processor: Processor) -> Planner:
    return Planner(processor, seed=5, tokens=4096, patches=4096)


def text_row(*turns: str) -> dict:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]}


def trained_text(document: Document, processor: Processor) -> str:
    return processor.decode(document.labels[document.labels != IGNORED].tolist(), skip_special_tokens=False)


def messages_of(sample: Sample) -> list[dict]:
    pieces = lambda turn: [{"type": "image"} if piece is None else {"type": "text", "text": piece} for piece in turn.pieces]  # noqa: E731
    return [{"role": turn.role, "content": pieces(turn)} for turn in sample.turns]


ROWS = [
    text_row("Hello", "Hi"),
    text_row("Zwei\nZeilen é 😀", " <b>42</b>\n\n", "and?", "No.", "?"),
    {**text_row("What <image> and <image><image>word?", "This."), "images": [picture(40, 30), picture(90, 20), picture(30, 30)]},
    {**text_row("Look.", "It is <image>!"), "image": picture(40, 200)},
    {"messages": [{"role": "system", "content": "Be brief."}, *text_row("Hello", "Hi")["messages"]]},
]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_tokens_are_the_processors(planner: Planner, processor: Processor, row: dict, split: bool) -> None:
    """The chat's tokens but for the last line's end, and EOS; the patches of every crop."""
    sample = read_row(row, "k")
    document = replace(planner, split_share=float(split), upscale_share=0.0)(sample)
    batch = replace(processor, split_images=split).chat(messages_of(sample), list(sample.images) or None, add_generation_prompt=False)
    newline = processor.tokenizer("<end_of_utterance>\n", add_special_tokens=False)["input_ids"][1:]
    assert document.token_ids.tolist() == [*batch.token_ids.tolist()[: -len(newline)], 2]
    assert batch.token_ids.tolist()[-len(newline) :] == newline
    assert document.crops == (tuple(batch.images.lengths) if batch.images else ())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ROWS[0], " Hi<end_of_utterance></s>"),
        (ROWS[1], " <b>42</b>\n\n<end_of_utterance> No.<end_of_utterance>"),  # the user has the last word: its EOS is not the model's
        (ROWS[3], " It is !<end_of_utterance></s>"),
        (ROWS[4], "Hi<end_of_utterance></s>"),
    ],
)
def test_answers_alone_are_trained(planner: Planner, processor: Processor, row: dict, expected: str) -> None:
    """A user's turn, an opening or a line's end among the trained tokens would show in the text."""
    document = replace(planner, split_share=0.0)(read_row(row, "k"))
    assert trained_text(document, processor).replace(" ", "") == expected.replace(" ", "")
    trained = document.labels != IGNORED
    assert (document.labels[trained] == document.token_ids[trained]).all()


def test_the_first_answer_token_is_trained_and_the_colon_is_not(planner: Planner, processor: Processor) -> None:
    document = planner(read_row(text_row("Hello", "Hi"), "k"))
    first = int(np.argmax(document.labels != IGNORED))
    assert processor.tokenizer.convert_ids_to_tokens(document.token_ids[first - 1 : first + 1].tolist()) == [":", "▁Hi"]


def test_checking_data_plans_every_sample(planner: Planner, tmp_path: Path) -> None:
    rows = [text_row("?", "!") for _ in range(5)]
    rows[1] |= {"images": ["none.png"]}
    rows[2] = text_row("word " * 5000, "!")
    rows[4] = text_row("?", "</s>")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reasons = [rejection.reason for rejection in check(open_source(tmp_path / "a.jsonl"), planner)]
    expected = [
        f"line 2: image 0: there is no file {tmp_path / 'none.png'}",
        "line 3: the sample has 5012 tokens, expected at most 4096: samples are never cut",
        "line 5: the text holds '</s>', one of the tokenizer's special tokens: expected text without any",
    ]
    assert reasons == [f"{tmp_path / 'a.jsonl'}, {reason}" for reason in expected]


@pytest.mark.parametrize("token", ["<end_of_utterance>", "</s>", "<s>", "<fake_token_around_image>"])
def test_text_cannot_pass_for_structure(planner: Planner, token: str) -> None:
    with pytest.raises(ValueError, match=f"the text holds '{token}'"):
        planner(read_row(text_row(f"a {token}\nAssistant: b", "c"), "k"))


def test_a_template_that_looks_at_other_turns_is_refused(planner: Planner, processor: Processor) -> None:
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for message in messages %}", "{% for message in messages %}{{ loop.index }}"
    )
    with pytest.raises(ValueError, match="does not write turn after turn"):
        replace(planner, processor=replace(processor, tokenizer=tokenizer))(read_row(text_row("a", "b"), "k"))


def test_pairs_are_shuffled_and_stay_pairs(planner: Planner, processor: Processor) -> None:
    pairs = [(f"Question {word}?", f"Answer {word}.") for word in WORDS[:6]]
    row = {"texts": [{"user": question, "assistant": answer} for question, answer in pairs], "images": [picture(30, 30)]}
    orders = set()
    for epoch in range(8):
        document = replace(planner, split_share=0.0)(read_row(row, "k"), epoch)
        text = processor.decode(document.token_ids.tolist(), skip_special_tokens=False)
        assert text.count("User:<fake_token_around_image>") == 1
        assert text.startswith("<s>User:") or text.startswith("<s> User:")
        assert sorted(text.find(answer) - text.find(question) for question, answer in pairs)[0] > 0
        for word in WORDS[:6]:
            assert f"Question {word}?<end_of_utterance>\nAssistant: Answer {word}.<end_of_utterance>" in text
        orders.add(trained_text(document, processor))
    assert len(orders) >= 7  # of 720 orders two in eight meet with a probability of 4 %


def test_conversations_keep_their_order(planner: Planner, processor: Processor) -> None:
    row = text_row(*(f"{index}" for index in range(12)))
    assert len({trained_text(planner(read_row(row, "k"), epoch), processor) for epoch in range(4)}) == 1


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_planned_patches_are_those_of_the_pixels(planner: Planner, processor: Processor, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = picture(200, 90, kind=kind, **({} if kind == "BMP" else {"exif": exif}))
    row = {**text_row("?", "!"), "images": [data, picture(33, 300)]}
    for epoch in range(4):
        document = planner(read_row(row, "k"), epoch)
        rules = {"shortest_edge": processor.shortest_edge, "longest_edge": processor.longest_edge}
        packed = pack_images(document.images, split=document.split, upscale=document.upscale, **rules)
        assert tuple(packed.images.lengths) == document.crops


def test_headers_are_enough(planner: Planner) -> None:
    """A file cut off behind its header is planned; only decoding it shows."""
    data = picture(200, 90)
    document = planner(read_row({**text_row("?", "!"), "image": data[:60]}, "k"))
    assert document.crops == planner(read_row({**text_row("?", "!"), "image": data}, "k")).crops


@pytest.mark.parametrize("data", [b"", b"no image", picture(20, 20)[:20]])
def test_a_file_without_a_header_is_named(planner: Planner, data: bytes) -> None:
    with pytest.raises(ValueError, match="image 1: "):
        planner(read_row({**text_row("?", "!"), "images": [picture(20, 20), data]}, "k"))


def test_samples_that_cannot_fit_are_refused_and_not_cut(planner: Planner) -> None:
    with pytest.raises(ValueError, match="has 32 tokens, expected at most 20"):
        replace(planner, tokens=20)(read_row(text_row("word " * 10, "word " * 10), "k"))
    with pytest.raises(ValueError, match="patches, expected at most 8"):
        replace(planner, patches=8)(read_row({**text_row("?", "!"), "image": picture(100, 100)}, "k"))


def test_chance_has_the_recipes_shares(planner: Planner) -> None:
    """Half the samples split, half the images scaled up by Triangular(1.5, 2, 2): within 5 standard errors."""
    n, image = 2000, picture(30, 30)
    documents = [planner(read_row({**text_row("?", "!"), "image": image}, str(index))) for index in range(n)]
    split = np.mean([document.split for document in documents])
    factors = np.array([document.upscale[0] for document in documents])
    scaled = factors[factors > 1]
    assert abs(split - 0.5) < 5 * 0.5 / math.sqrt(n)
    assert abs(len(scaled) / n - 0.5) < 5 * 0.5 / math.sqrt(n)
    assert scaled.min() >= 1.5
    assert scaled.max() < 2.0
    deviation = 0.5 / math.sqrt(18)
    assert abs(scaled.mean() - (1.5 + 2 * 2.0) / 3) < 5 * deviation / math.sqrt(len(scaled))
    together = np.mean([document.split and document.upscale[0] > 1 for document in documents])
    assert abs(together - 0.25) < 5 * math.sqrt(3) / 4 / math.sqrt(n)  # the two draws know nothing of one another


def test_chance_is_the_keys_alone(planner: Planner) -> None:
    rows = [read_row(row, str(index)) for index, row in enumerate(mixed_rows(20))]
    once = [planner(row, 1) for row in rows]
    again = [planner(row, 1) for row in reversed(rows)][::-1]
    draws = lambda documents: [(document.split, document.upscale, document.token_ids.tolist()) for document in documents]  # noqa: E731
    assert draws(once) == draws(again)
    assert draws(once) != draws([planner(row, 2) for row in rows])
    assert draws(once) != draws([replace(planner, seed=6)(row, 1) for row in rows])
    assert draws(once) != draws([planner(replace(row, key=f"x{row.key}"), 1) for row in rows])


def test_draws_do_not_change() -> None:
    """A run resumed under other versions of Python and numpy draws the same: figures of the day this was written."""
    assert uniform(0, 1, "a.jsonl:7", "split") == 0.6381919650033248
    assert permutation(6, 0, "rows").tolist() == [2, 5, 3, 0, 1, 4]


@pytest.mark.parametrize(("setting", "value"), [("split_share", 1.5), ("upscale_share", -0.1), ("upscale_max", 1.2)])
def test_settings_out_of_range(planner: Planner, setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting} is {value}"):
        replace(planner, **{setting: value})


@pytest.mark.parametrize(
    ("name", "message"),
    [("chat_template", "no chat template"), ("bos_token", "no bos_token"), ("eos_token", "no eos_token")],
)
def test_planner_needs_of_the_tokenizer(processor: Processor, name: str, message: str) -> None:
    tokenizer = copy.deepcopy(processor.tokenizer)
    setattr(tokenizer, name, None)
    with pytest.raises(ValueError, match=f"the checkpoint.* {message}"):
        Planner(replace(processor, tokenizer=tokenizer), seed=5, tokens=4096, patches=4096)
