"""Bad words as text, stop strings and streamed text: what a reader sees, and that time is linear in the text."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from time import process_time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hf import sample, to_batch

from idefics2_fast import Idefics2, Idefics2Config
from idefics2_fast.benchmarks.local_checkpoint import write_processor
from idefics2_fast.generate import _Text
from idefics2_fast.matching import Matcher

NAMED = Idefics2Config.named("tiny")
TINY = replace(
    NAMED,
    vision=replace(NAMED.vision, num_hidden_layers=1),
    text=replace(NAMED.text, num_hidden_layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16),
)


@pytest.fixture(scope="module")
def model() -> Idefics2:
    torch.manual_seed(0)
    return Idefics2(TINY).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("processor")
    write_processor(folder)
    return AutoTokenizer.from_pretrained(folder)


def answer(model: Idefics2, tokenizer: Any, **settings: Any) -> Any:
    batch = replace(to_batch([sample([], TINY, seed=3)], TINY), tokenizer=tokenizer)
    return model.generate(batch, **{"max_new_tokens": 30, "stop_tokens": ()} | settings)


# --- bad words ---


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.5, "seed": 4}], ids=["greedy", "sampled"])
def test_bad_words_as_text_do_not_appear(model: Idefics2, tokenizer: Any, sampled: dict[str, Any]) -> None:
    """Pieces of what is said otherwise: at the start, within and across tokens, with a space before and without."""
    free = answer(model, tokenizer, **sampled).texts[0]
    draw = random.Random(0)
    for length in (1, 2, 3, 6):
        at = [0, *(draw.randrange(len(free) - length) for _ in range(4))]
        words = [free[i : i + length] for i in at]
        words += [f" {words[0]}", words[1].strip() or "x"]
        text = answer(model, tokenizer, bad_words=words, **sampled).texts[0]
        assert [word for word in words if word in text] == []
        assert not text.startswith(words[0])
        assert len(text) > 20


def test_a_bad_word_is_avoided_however_it_is_cut_into_tokens(model: Idefics2, tokenizer: Any) -> None:
    """The model is led to write a word letter by letter, and as its own tokens."""
    word = "hello"
    for tokens in (tokenizer.convert_tokens_to_ids(list(word)), tokenizer.encode(word, add_special_tokens=False)):
        led = {"sequence_bias": [[tokens[: n + 1], 1e3 * (n + 1)] for n in range(len(tokens))]}
        assert word in answer(model, tokenizer, generation_config=led).texts[0]
        for bad in (word, "hell", "ello"):
            assert bad not in answer(model, tokenizer, generation_config=led, bad_words=[bad]).texts[0]


def test_a_bad_word_that_is_a_special_token_counts_as_it(model: Idefics2, tokenizer: Any) -> None:
    led = {"sequence_bias": [[[32002], 1e4], [[32001], 5e3]]}
    tokens = answer(model, tokenizer, generation_config=led, bad_words=["<end_of_utterance>"]).tokens[0]
    assert set(tokens) == {32001}


def led_letter_by_letter(tokenizer: Any, word: str) -> dict[str, Any]:
    tokens = tokenizer.convert_tokens_to_ids(list(word))
    return {"sequence_bias": [[tokens[: n + 1], 1e3 * (n + 1)] for n in range(len(tokens))]}


@pytest.mark.parametrize("setting", ["bad_words", "stop_strings"])
def test_generate_a_word_that_was_added_to_the_vocabulary(model: Idefics2, tokenizer: Any, setting: str) -> None:
    """It is text, and made of other tokens, too; a special token is none."""
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["hello"])
    led = led_letter_by_letter(tokenizer, "hello")
    assert "hello" in answer(model, added, generation_config=led).texts[0]
    assert "hello" not in answer(model, added, generation_config=led, **{setting: ["hello"]}).texts[0]


@pytest.mark.parametrize("string", ["<end_of_utterance>ab", " </s>", "</s><s>"])
def test_generate_stop_string_around_a_special_token(model: Idefics2, tokenizer: Any, string: str) -> None:
    with pytest.raises(ValueError, match=r"stop_strings holds '.*', expected text, or one special token"):
        answer(model, tokenizer, stop_strings=["x", string])


def test_bad_words_leave_other_documents_alone(model: Idefics2, tokenizer: Any) -> None:
    samples = [sample([], TINY, seed=seed) for seed in range(3)]
    settings = {"max_new_tokens": 20, "stop_tokens": (), "temperature": 1.0, "bad_words": ["a", "th"]}
    batches = [replace(to_batch(some, TINY), tokenizer=tokenizer) for some in (samples, *([s] for s in samples))]
    together, *alone = (model.generate(batch, seed=[7] * len(batch.documents), **settings) for batch in batches)
    assert together.texts == [one.texts[0] for one in alone]


def test_bad_words_that_forbid_everything_are_named(model: Idefics2, tokenizer: Any) -> None:
    only = tokenizer.convert_tokens_to_ids("a")
    others = [[token] for token in range(TINY.text.vocab_size) if token != only]
    assert set(answer(model, tokenizer, bad_words=others).texts[0]) == {"a"}
    with pytest.raises(ValueError, match="bad_words leave no token to go on with"):
        answer(model, tokenizer, bad_words=[*others, "aaa"])


# --- streams ---


def streamed(tokenizer: Any, ids: list[int], stops: list[str] = ()) -> _Text:
    text, pieces = _Text(tokenizer, stops), []
    for place, token in enumerate(ids):
        pieces.append(text.extend(token, last=place == len(ids) - 1))
        if text.stopped:
            break
    assert "".join(pieces) == text.text
    return text


PIECES = ["a", " b", "é", "漢", "🦊", "\n", "  ", "</s>", "<image>", "word", "."]


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(st.sampled_from(["a", " b", "é", "漢", "🦊", "\n", "  ", "</s>", "<image>", "word", "."]) | st.text(max_size=3)).map(
        "".join
    )
)
def test_streamed_text_is_the_decoded_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert streamed(tokenizer, ids).text == expected if ids else True


def test_a_special_token_between_words_takes_no_space(tokenizer: Any) -> None:
    cat, dog = (tokenizer.encode(word, add_special_tokens=False) for word in ("cat", "dog"))
    ids = [*cat, 32000, 32000, 32002, *dog]
    assert streamed(tokenizer, ids).text == tokenizer.decode(ids, skip_special_tokens=True) == "cat dog"


WORDS = st.text("ab", min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(words=st.lists(WORDS, max_size=6), text=st.text("abc", max_size=30))
def test_matcher_finds_what_find_finds(words: list[str], text: str) -> None:
    matcher, state = Matcher(words), 0
    for end, character in enumerate(text, 1):
        state = matcher.step(state, character)
        so_far = text[:end]
        assert matcher.found[state] == max((len(word) for word in words if so_far.endswith(word)), default=0)
        begun = (n for word in words for n in range(len(word) + 1) if so_far.endswith(word[:n]))
        assert matcher.depth[state] == max(begun, default=0)


class Letters:
    """A tokenizer of one character a token."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(map(chr, tokens))


def seconds(count: int, stops: list[str], token: str = "a") -> float:
    text, before = _Text(Letters(), stops), process_time()
    for _ in range(count):
        text.extend(ord(token), last=False)
    return process_time() - before


@pytest.mark.parametrize(
    ("stops", "token"),
    [
        ([], "a"),
        ([f"{n} never" for n in range(3000)], "a"),
        (["a" * 2000 + "b"], "a"),  # always half of a stop string
        (["a" * n + "b" for n in range(1, 60)], "a"),
        ([], "\ufffd"),  # bytes that never become a character
    ],
    ids=["none", "many", "long", "nested", "lost"],
)
def test_a_token_costs_the_same_late_as_early_and_with_any_stop_strings(stops: list[str], token: str) -> None:
    """8000 tokens against 2000: four times the time, where quadratic is sixteen. The least of three rounds."""
    short, long = (min(seconds(count, stops, token) for _ in range(3)) for count in (2000, 8000))
    assert long < 8 * short + 0.02
    assert long < 2.0


def test_bad_words_by_ids_cost_no_more_for_long_texts(model: Idefics2) -> None:
    from idefics2_fast.generate import _Bans, _Sequence

    bans = _Bans([[n % 300, n // 300, 5] for n in range(3000)], 32003, torch.device("cpu"))
    logits = torch.zeros(1, 32003)
    sequence = _Sequence(list(range(20_000)), 10, torch.Generator())
    before = process_time()
    for _ in range(200):
        bans.apply(logits, [sequence])
    assert process_time() - before < 0.2  # three thousand words over twenty thousand tokens took 90 s
