"""generation_config.json: greedy text equal to transformers' for each field, kept by saving, and what is not applied is named."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hf import Sample, engine_of, to_batch, to_hf

from idefics2_fast import Idefics2, Idefics2Config
from idefics2_fast.benchmarks.local_checkpoint import random_model
from idefics2_fast.generation_config import FIELDS, NEUTRAL, PROCESSORS, WARPERS, warpers

NAMED = Idefics2Config.named("tiny")
TINY = replace(  # still smaller: what is tested are the settings
    NAMED,
    vision=replace(NAMED.vision, num_hidden_layers=1),
    text=replace(NAMED.text, num_hidden_layers=1, vocab_size=300),
    image_token_id=299,
    eos_token_ids=(2,),
)
NEW = 8


@pytest.fixture(scope="module")
def theirs() -> Any:
    return random_model(TINY)


@pytest.fixture(scope="module")
def ours(theirs: Any) -> Idefics2:
    return engine_of(theirs, TINY)


@pytest.fixture(scope="module")
def prompts() -> list[Any]:
    """The second one repeats itself, for penalties on what occurred."""
    return [Sample([1, 48, 173, 36, 41, 93, 68], []), Sample([1, *[176, 98, 94] * 3], [])]


@pytest.fixture(scope="module")
def plain(theirs: Any, prompts: list[Any]) -> list[list[int]]:
    """transformers' text without any setting."""
    return [answer_of_hf(theirs, prompt, {"eos_token_id": None}) for prompt in prompts]


def answer_of_hf(model: Any, prompt: Any, values: dict[str, Any]) -> list[int]:
    from transformers import GenerationConfig

    settings = {"max_new_tokens": NEW, "pad_token_id": 0, **values}
    made = model.generate(**to_hf([prompt]), generation_config=GenerationConfig(**settings))
    return made[0, len(prompt.tokens) :].tolist()


def cases(plain: list[int], prompt: list[int]) -> dict[str, dict[str, Any]]:
    """For each field a value that changes the text that begins as `plain`; several where it has several forms."""
    end = {"eos_token_id": plain[3]}
    return {
        "bad_words_ids": {"bad_words_ids": [[plain[0]], plain[2:4], [prompt[-1], plain[1]]], "eos_token_id": 2},
        "bad_words_ids of ends": {"bad_words_ids": [[plain[3]], [plain[0]]], **end},
        "sequence_bias": {"sequence_bias": [[[plain[0]], -50.0], [[5], 3.0], [[plain[1], 7], 90.0]]},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 30.0},
        "repetition_penalty": {"repetition_penalty": 1.8},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1, "sequence_bias": [[[prompt[-1]], 90.0]]},
        "min_length": {"min_length": len(prompt) + 6, **end},
        "min_new_tokens": {"min_new_tokens": 6, **end},
        "forced_eos_token_id": {"forced_eos_token_id": [11, 12]},
        "forced_bos_token_id": {"forced_bos_token_id": 11},
        "remove_invalid_values": {"remove_invalid_values": True},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [2, 3.0], "eos_token_id": 9},
        "suppress_tokens": {"suppress_tokens": plain[:3]},
        "begin_suppress_tokens": {"begin_suppress_tokens": plain[:3]},
        "max_new_tokens": {"max_new_tokens": 5},
        "max_length": {"max_length": len(prompt) + 4, "max_new_tokens": None},
        "eos_token_id": {"eos_token_id": [plain[4], 9]},
    }


@pytest.mark.parametrize("name", cases([0] * 9, [0] * 9))
def test_generate_gives_transformers_greedy_text_for_each_field(
    theirs: Any, ours: Idefics2, prompts: list[Any], plain: list[list[int]], name: str
) -> None:
    changed = 0
    for prompt, text in zip(prompts, plain, strict=True):
        values = {"max_new_tokens": NEW, "eos_token_id": None} | cases(text, prompt.tokens)[name]
        ends = values["eos_token_id"] or []
        result = ours.generate(
            to_batch([prompt], TINY),
            stop_tokens=ends if isinstance(ends, list) else [ends],
            generation_config=values,
        )
        expected = answer_of_hf(theirs, prompt, values)
        assert result.tokens == [expected]
        changed += expected != text
    assert changed or name in ("remove_invalid_values", "forced_bos_token_id"), "a field without effect shows nothing"


def test_every_processor_has_a_case() -> None:
    assert {*PROCESSORS} <= {*cases([0] * 9, [0] * 9)}
    assert {*PROCESSORS, *WARPERS} <= {*FIELDS}


def test_generate_in_company_gives_each_its_own_text(ours: Idefics2, prompts: list[Any]) -> None:
    values = {"repetition_penalty": 1.8, "min_new_tokens": 6, "max_new_tokens": NEW, "no_repeat_ngram_size": 2}
    together = ours.generate(to_batch(prompts, TINY), generation_config=values).tokens
    assert together == [ours.generate(to_batch([p], TINY), generation_config=values).tokens[0] for p in prompts]


SAMPLED = [
    {"top_k": 3},
    {"min_p": 0.2},
    {"typical_p": 0.5},
    {"epsilon_cutoff": 0.1},
    {"eta_cutoff": 0.3},
    {"top_h": 0.4},
    {"top_k": 5, "top_p": 0.5},
    {"top_p": 0.5, "min_p": 0.1, "typical_p": 0.9},
]


@pytest.mark.parametrize("values", SAMPLED, ids=str)
def test_warpers_leave_transformers_distribution(theirs: Any, values: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    settings = GenerationConfig(do_sample=True, temperature=2.0, **values)
    settings._eos_token_tensor = None
    logits, ids = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 4, torch.zeros(4, 1, dtype=torch.int64)
    expected = theirs._get_logits_processor(settings, input_ids_seq_length=1)(ids, logits)
    chain = warpers(values, 2.0, values.get("top_p", 1.0))
    assert torch.equal(reduce(lambda scores, process: process(ids, scores), chain, logits), expected)
    assert 0 < expected.isneginf().sum() < expected.numel()


def test_draws_come_from_the_warped_distribution(ours: Idefics2, prompts: list[Any]) -> None:
    file = {"do_sample": True, "temperature": 8.0, "top_k": 3, "max_new_tokens": 1}
    best = ours(to_batch(prompts[:1], TINY))[-1].topk(3).indices.tolist()
    drawn = ours.generate(to_batch(prompts[:1] * 60, TINY), generation_config=file).tokens
    assert {token for (token,) in drawn} == {*best}


# --- from the file ---


@pytest.fixture(scope="module")
def folder(ours: Idefics2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generation") / "tiny"
    ours.save_pretrained(path)
    return path


def write(folder: Path, values: dict[str, Any]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))


def test_the_released_file_is_applied_and_kept(folder: Path, prompts: list[Any], plain: list[list[int]], tmp_path: Path) -> None:
    """As HuggingFaceM4/idefics2-8b has it, with a bad word that greedy text begins with."""
    values = {
        "_from_model_config": True,
        "bad_words_ids": [[298], [299], [plain[0][0]]],
        "bos_token_id": 1,
        "eos_token_id": [2, 297],
        "pad_token_id": 0,
        "transformers_version": "4.40.0.dev0",
        "max_new_tokens": 3,
        "unknown_to_all": {"kept": [1, None]},
    }
    write(folder, values)
    model = Idefics2.from_pretrained(folder)
    batch = to_batch(prompts[:1], TINY)
    tokens = model.generate(batch).tokens[0]
    assert len(tokens) == 3
    assert tokens == model.generate(batch, bad_words=[[plain[0][0]]], max_new_tokens=3).tokens[0] != plain[0][:3]
    assert model.generate(batch, bad_words=(), max_new_tokens=5).tokens[0] == plain[0][:5]
    assert model.generate(batch, generation_config={}, max_new_tokens=5).tokens[0] == plain[0][:5]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == values


def test_stop_strings_and_sampling_of_the_file(folder: Path, prompts: list[Any]) -> None:
    write(folder, {"do_sample": True, "temperature": 2.0, "top_p": 0.5, "max_new_tokens": 8})
    model, batch = Idefics2.from_pretrained(folder), to_batch(prompts[:1], TINY)
    assert model.generate(batch).tokens == model.generate(batch, generation_config={}, temperature=2.0, top_p=0.5, max_new_tokens=8).tokens
    assert model.generate(batch, temperature=0).tokens == model.generate(batch, generation_config={}, max_new_tokens=8).tokens
    write(folder, {"stop_strings": "x"})
    with pytest.raises(ValueError, match="stop_strings and bad_words given as text need a tokenizer"):
        Idefics2.from_pretrained(folder).generate(batch)


@pytest.mark.parametrize("of_all", [True, False])
def test_generate_ends_where_generation_config_says(ours: Idefics2, prompts: list[Any], plain: list[list[int]], of_all: bool) -> None:
    """The end tokens of a generation_config that is given, or set on the model, stand in place of config.json's."""
    model, given = copy.copy(ours), {"eos_token_id": [plain[0][3], 40000]}
    model.generation_config = given if of_all else {}
    settings = {} if of_all else {"generation_config": given}
    answer = model.generate(to_batch(prompts[:1], TINY), max_new_tokens=NEW, **settings)
    assert answer.tokens[0] == plain[0][: plain[0].index(plain[0][3]) + 1]
    assert answer.finish == ["stop"]


def test_what_is_not_applied_is_named_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(folder, {"max_time": 3.0, "num_return_sequences": 2, "made_up": 1, "use_cache": True, "output_scores": False})
    with caplog.at_level(logging.WARNING):
        Idefics2.from_pretrained(folder)
    said = [record.message for record in caplog.records if "not applied" in record.message]
    assert len(said) == 1
    assert said[0].endswith("generation_config.json: not applied by this engine: 'max_time', 'num_return_sequences', 'made_up'")


@pytest.mark.parametrize("name", NEUTRAL)
def test_another_algorithm_is_refused_and_its_neutral_value_is_not(ours: Idefics2, prompts: list[Any], name: str) -> None:
    batch = to_batch(prompts[:1], TINY)
    with pytest.raises(ValueError, match=f"generation_config: {name} is .*, which this engine does not compute"):
        ours.generate(batch, generation_config={name: {"a": 1} if name == "watermarking_config" else 4})
    for value in (None, *NEUTRAL[name]):
        ours.generate(batch, generation_config={name: value}, max_new_tokens=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected an integer from 1"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0, expected a finite number above 0"),
        ({"repetition_penalty": True}, "repetition_penalty is True, expected"),
        ({"bad_words_ids": [320]}, r"bad_words_ids is \[320\], expected a list"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"sequence_bias": {"1": 2}}, "sequence_bias is"),
        ({"eos_token_id": "2"}, "eos_token_id is '2', expected"),
        ({"do_sample": 1}, "do_sample is 1, expected true or false"),
        ({"temperature": float("nan")}, "temperature is nan, expected a finite number"),
        ({"stop_strings": [1]}, "stop_strings"),
    ],
)
def test_values_of_another_kind_are_named(folder: Path, values: dict[str, Any], message: str) -> None:
    write(folder, values)
    with pytest.raises(ValueError, match=rf"generation_config\.json: {message}"):
        Idefics2.from_pretrained(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": [40000, 300]}, r"eos_token_id is \[300, 40000\], expected an id of the vocabulary of 300, or stop_tokens"),
        ({"suppress_tokens": [40000]}, "suppress_tokens holds 40000, expected ids of the vocabulary of 300"),
        ({"sequence_bias": [[[1, 40000], 1.0]]}, "sequence_bias holds 40000"),
        ({"forced_eos_token_id": 40000}, "forced_eos_token_id holds 40000"),
        ({"bad_words_ids": [[40000]]}, r"bad word \[40000\] holds ids outside the vocabulary of 300"),
        ({"max_length": 5}, "document 0 has 7 tokens: expected fewer than generation_config's max_length 5, or max_new_tokens"),
    ],
)
def test_values_that_do_not_fit_the_model_are_named(ours: Idefics2, prompts: list[Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.generate(to_batch(prompts[:1], TINY), generation_config=values)
