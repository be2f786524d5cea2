"""The corpus of the demo, the model that learns from it, and, slowly, that it does learn to read."""

from __future__ import annotations

import colorsys
import json
import random
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from idefics2_fast import Idefics2, Processor
from idefics2_fast.benchmarks import learn
from idefics2_fast.benchmarks.reading import (
    LATENTS,
    SPELLING,
    VOCABULARY,
    Speller,
    blanked,
    chats,
    examination,
    reader_processor,
    share_right,
    write_reader,
)
from idefics2_fast.benchmarks.reading_corpus import (
    COLUMNS,
    FIRST,
    HELD_OUT,
    MORE_WORDS,
    PATCH,
    READ,
    ROWS,
    TRAINED,
    TRAINED_MORE,
    WORDS,
    Lessons,
    Questions,
    Style,
    draw,
    is_held_out,
    load_font,
    random_letters,
)
from idefics2_fast.training import fit
from idefics2_fast.training.loader import Loader
from idefics2_fast.training.run import planner_of
from idefics2_fast.training.sources import open_source

DRAWN = 300


def drawings(style: Style, difficulty: float = 1.0) -> list:
    chance = random.Random(0)
    return [draw(chance.choice(WORDS), chance, difficulty, style) for _ in range(DRAWN)]


def families(style: Style) -> set[str]:
    return {load_font(*font, 20).getname()[0] for font in style.fonts}


def content(row: dict) -> tuple:
    return row["images"][0].size, row["images"][0].tobytes(), str(row["texts"])


# --- the corpus ---


@pytest.mark.parametrize("corpus", [Lessons, Questions])
def test_a_row_is_a_function_of_its_number_alone(corpus):
    rows = [content(row) for row in corpus(rows=600)]
    again = corpus(rows=600)
    assert [content(again[index]) for index in reversed(range(600))] == rows[::-1]
    assert sum(content(other) == row for other, row in zip(corpus(rows=600, seed=1), rows, strict=True)) < 60
    with pytest.raises(IndexError):
        again[600]


@pytest.mark.parametrize("trained", [TRAINED, TRAINED_MORE])
def test_what_is_held_out_shares_nothing_with_what_is_trained(trained):
    assert not families(trained) & families(HELD_OUT)
    assert not set(trained.sizes) & set(HELD_OUT.sizes)
    assert not set(trained.lefts) & set(HELD_OUT.lefts)
    assert not set(trained.tops) & set(HELD_OUT.tops)
    assert all(end <= begin or other_end <= start for start, end in trained.hues for begin, other_end in HELD_OUT.hues)


@pytest.mark.parametrize("style", [TRAINED, HELD_OUT])
def test_drawings_take_from_their_style_alone_and_all_of_it(style):
    drawn = drawings(style)
    assert {drawing.font[:3] for drawing in drawn} == set(style.fonts)
    assert {drawing.font[3] for drawing in drawn} == set(style.sizes)
    assert {drawing.place[0] for drawing in drawn} == set(style.lefts)
    assert {drawing.place[1] for drawing in drawn} == set(style.tops)
    strong = [colour for drawing in drawn for colour in (drawing.ink, drawing.ground) if max(colour) - min(colour) >= 50]
    assert len(strong) > DRAWN / 4
    for colour in strong:
        hue = colorsys.rgb_to_hsv(*colour)[0]
        assert any(start - 0.01 <= hue <= end + 0.01 for start, end in style.hues), colour  # of 50 levels, one is 1/300 of the circle


@pytest.mark.parametrize(("style", "family"), [(TRAINED, "DejaVu Sans"), (TRAINED_MORE, "DejaVu Sans Mono")])
def test_at_no_difficulty_all_drawings_are_alike(style, family):
    (font,) = {drawing.font for drawing in drawings(style, difficulty=0.0)}
    assert load_font(*font).getname()[0] == family
    assert {(drawing.ink, drawing.ground) for drawing in drawings(style, difficulty=0.0)} == {((0, 0, 0), (255, 255, 255))}


def test_lessons_are_drawn_in_their_style():
    rows = Lessons(rows=2560, captions=0.0, easy=0.2, hard=0.6, style=TRAINED_MORE)
    for row in islice(rows, 0, 256, 16):
        inked = np.flatnonzero((np.asarray(row["images"][0]) < 128).any((0, 2)))
        letters = len(row["texts"][0]["assistant"])
        assert inked[-1] - inked[0] == pytest.approx(letters * load_font(*TRAINED_MORE.fonts[0], 22).getlength("x"), abs=8)


@pytest.mark.parametrize("style", [TRAINED, HELD_OUT])
def test_images_are_whole_patches_with_all_of_the_ink(style):
    for drawing in drawings(style):
        pixels = np.asarray(drawing.image()).astype(int)
        assert pixels.shape == (drawing.grid[1] * PATCH, drawing.grid[0] * PATCH, 3)
        assert drawing.grid[0] * drawing.grid[1] in range(COLUMNS * ROWS, 30)
        inked = np.abs(pixels - drawing.ground).sum(2) > 0
        alone = Image.new("L", (300, 100))
        ImageDraw.Draw(alone).text((50, 30), drawing.text, fill=255, font=load_font(*drawing.font))
        left, top, right, bottom = alone.getbbox()
        columns, rows = (np.flatnonzero(inked.any(axis)) for axis in (0, 1))
        assert drawing.place[0] <= columns[0]
        assert drawing.place[1] <= rows[0]
        assert columns[-1] - columns[0] + 1 >= right - left - 2  # the faintest ink on a dark ground may round to none
        assert rows[-1] - rows[0] + 1 >= bottom - top - 2


def test_a_blank_image_has_no_ink():
    pages = examination(WORDS[:5])
    for page, empty in zip(pages, blanked(pages), strict=True):
        assert empty.image.size == page.image.size
        assert empty.image.getcolors() == [(page.image.width * page.image.height, (127, 127, 127))]
        assert (empty.question, empty.answer) == (page.question, page.answer)


def test_lessons_become_harder_and_stand_by_size():
    lessons = Lessons(rows=2560, captions=0.0, easy=0.2, hard=0.6)
    assert [lessons.difficulty(row) for row in (0, 511, 1024, 1536, 2559)] == pytest.approx([0, 0, 0.5, 1, 1], abs=2e-3)
    easy, hard = ([row["images"][0] for row in islice(lessons, begin, begin + lessons.WINDOW)] for begin in (0, 2304))
    grounds = [{image.getpixel((image.width - 1, image.height - 1)) for image in images} for images in (easy, hard)]
    assert grounds[0] == {(255, 255, 255)}
    assert len(grounds[1]) > 200
    areas = [image.width * image.height for image in hard]
    assert areas == sorted(areas)


def test_letters_held_out_are_never_trained_on():
    lessons = Lessons(rows=1500, letters=1.0, captions=0.0, easy=0.0)
    texts = [row["texts"][0]["assistant"] for row in lessons]
    assert len(set(texts)) > 1350  # three letters come twice now and then
    assert not any(map(is_held_out, texts))
    chance = random.Random(0)
    assert all(is_held_out(random_letters(chance, (4, 6), held_out=True)) for _ in range(50))


def test_few_texts_come_first():
    words = (*WORDS, *MORE_WORDS)
    lessons = Lessons(rows=5120, words=words, letters=0.6, captions=0.0, easy=0.5)
    first, middle, last = ([row["texts"][0]["assistant"] for row in islice(lessons, at, at + 256)] for at in (0, 1280, 2560))
    assert sum(text not in words for text in first) < 16
    assert sum(text in MORE_WORDS for text in first) == 0
    assert sum(text in words[90:] for text in middle) == 0
    assert sum(text in words[90:] for text in last) > 16
    assert [sum(text not in words for text in texts) for texts in (middle, last)] == pytest.approx([77, 154], abs=30)  # of 256, 4 sigma


def test_questions_are_answered_by_what_is_drawn():
    asked = [{pair["user"]: pair["assistant"] for pair in row["texts"]} for row in Questions(rows=300)]
    words = [answers for answers in asked if READ in answers]
    assert 200 < len(words) < 280
    assert all(answers[READ][0] == answers[FIRST] for answers in words)
    assert all(answers["How many letters are there?"] == str(len(answers[READ])) for answers in words)
    assert {answers["What is shown?"] for answers in asked if READ not in answers} >= {"cat", "temple"}
    assert all(answers["Is it a word?"] == ("yes" if READ in answers else "no") for answers in asked)


# --- the model ---


def test_the_tokenizer_has_letters_and_whole_questions():
    processor = reader_processor()
    tokens = processor.tokenizer.convert_ids_to_tokens(processor.tokenizer(f"User: x{READ}\nAssistant: apple")["input_ids"])
    assert tokens == ["<s>", "User:", " x", READ, "\nAssistant:", " a", "p", "p", "l", "e"]
    assert processor.vocab_size == len(VOCABULARY)
    assert processor.decode(processor.tokenizer("Any text, with 7 digits.")["input_ids"]) == "Any text, with 7 digits."


def test_transformers_processor_gives_the_same_tokens(tmp_path):
    from transformers import AutoProcessor

    write_reader(tmp_path, width=32)
    pages = examination(WORDS[:3])
    theirs = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(
        chats(pages), add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs={"padding": True}
    )
    ours = Processor.from_pretrained(tmp_path).chat(chats(pages))
    assert ours.token_ids.tolist() == [token for row in theirs["input_ids"] for token in row]


def test_a_speller_has_each_latent_name_a_letter(tmp_path):
    write_reader(tmp_path, width=32)
    recipe = learn.warm_up(tmp_path, tmp_path / "run", 100, tokens=8 * learn.TOKENS)
    loader = Loader(open_source(learn.lessons(100)), planner_of(recipe, reader_processor()), packs=1, shuffle=False, threads=1)
    (batch,) = next(loader).batches
    loader.close()
    reader, speller = (model.from_pretrained(tmp_path) for model in (Idefics2, Speller))
    (answered, count), (total, counted) = (model.loss_sum(batch) for model in (reader, speller))
    texts = [learn.lessons(100)[int(key)]["texts"][0]["assistant"] for key in batch.sample_keys]
    scores = reader.logits(reader.encode_images(batch)).log_softmax(-1).unflatten(0, (len(texts), LATENTS))
    named = [[f" {text[0]}", *text[1:], "<end_of_utterance>", *["</s>"] * LATENTS][:LATENTS] for text in texts]
    wanted = -sum(scores[image, latent, VOCABULARY.index(token)] for image, row in enumerate(named) for latent, token in enumerate(row))
    assert int(counted) == int(count)
    torch.testing.assert_close(total - answered, SPELLING * wanted)
    total.backward()
    assert all(parameter.grad is not None for parameter in speller.parameters())


def test_lessons_are_trained_in_their_own_order(tmp_path):
    write_reader(tmp_path, width=32)
    recipe = learn.warm_up(tmp_path, tmp_path / "run", 100, tokens=8 * learn.TOKENS)
    loader = Loader(open_source(learn.lessons(100)), planner_of(recipe, reader_processor()), packs=1, shuffle=False, threads=1)
    keys = [int(key) for _ in range(20) for key in next(loader).batches[0].sample_keys]
    loader.close()
    assert len(keys) == len(set(keys)) >= 140
    assert max(keys) < len(keys) + 16 * 8  # what the 16 open packs hold


def test_some_steps_make_the_loss_fall(tmp_path):
    write_reader(tmp_path / "untrained", width=32)
    recipe = learn.warm_up(tmp_path / "untrained", tmp_path / "run", 16, tokens=16 * learn.TOKENS, warmup=4, learning_rate=5e-3)
    fitted = fit(recipe, learn.lessons(16))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 16
    assert losses[-1] < 0.8 * losses[0]
    assert share_right(Idefics2.from_pretrained(fitted.weights), reader_processor(), examination(WORDS[:4])) <= 1


# --- learning ---


@pytest.mark.slow(minutes=12)
def test_a_reader_of_words_reads_letters_that_it_has_never_seen_together(tmp_path, monkeypatch):
    """Train on 150 words and random letters; examine strings of which one in eight is held out.

    Measured in 2000 steps: 91 % of the words, 54 % of the strings, nothing of blank images. In 3800
    steps it is 96 % and 65 %; in 4500 steps two seeds read 79 % and 68 % of the strings.
    """
    steps, words = 2000, (*WORDS, *MORE_WORDS)
    assert len(set(words)) == 150
    write_reader(tmp_path / "untrained", width=160)
    monkeypatch.setattr("idefics2_fast.training.run.Idefics2", Speller)
    fitted = fit(
        learn.warm_up(tmp_path / "untrained", tmp_path / "run", steps),
        learn.lessons(steps, words=words, style=TRAINED_MORE, letters=0.75, captions=0.0, easy=0.09, hard=0.38),
    )
    model, processor = Idefics2.from_pretrained(fitted.weights), Processor.from_pretrained(fitted.weights)
    chance = random.Random(0)
    of_words = examination([chance.choice(words) for _ in range(300)])
    of_letters = examination([random_letters(chance, (4, 6), held_out=True) for _ in range(200)])
    shares = [share_right(model, processor, pages) for pages in (of_words, of_letters, blanked(of_words), blanked(of_letters))]
    print(f"words {shares[0]:.1%}, letters {shares[1]:.1%}, blank images {shares[2]:.1%} and {shares[3]:.1%}")
    assert shares[0] >= 0.8
    assert shares[1] >= 0.35  # by chance 1 in 26^4; seeds differ by 10 %
    assert max(shares[2:]) <= 0.05  # the most frequent of 150 words is 1 in 70 of those asked
