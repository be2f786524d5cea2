"""A checkpoint's folder with damaged, hostile or foreign files: a ValueError that names the file, or a model that answers."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import re
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from idefics2_fast import Batch, Idefics2, Idefics2Config, Processor
from idefics2_fast.benchmarks.reading import reader_processor, write_reader
from idefics2_fast.json_files import SIZE_LIMIT, read_object
from idefics2_fast.weights import SINGLE_FILE, parse_dtype, read_header, stored_dtype

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few layers with a tokenizer of letters, which loads in milliseconds."""
    path = tmp_path_factory.mktemp("checkpoint") / "reader"
    write_reader(path, width=32)
    return path


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def edit(path: Path, *place: Any, to: Any) -> None:
    """Changes one value in a JSON file."""
    value = json.loads(path.read_text())
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = to
    path.write_text(json.dumps(value))


def use(folder: Path) -> str:
    """Loads a folder as a user does, and asks for a token."""
    processor = Processor.from_pretrained(folder)
    model = Idefics2.from_pretrained(folder)
    batch = processor("Hello")
    return model.generate(batch, max_new_tokens=1, temperature=0).texts[0]


# --- values of config.json ---

WRONG = [None, "64", [64], {}, True, 6.5, float("nan"), float("inf"), -1, 0, 10**30, 2**63]
SIZES = [
    *(("vision_config", name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")),
    *(("perceiver_config", name) for name in ("resampler_n_latents", "resampler_depth", "resampler_n_heads", "resampler_head_dim")),
    ("perceiver_config", "num_key_value_heads"),
    *(("text_config", name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")),
    ("text_config", "max_position_embeddings"),
]


@pytest.mark.parametrize("place", SIZES, ids=".".join)
def test_a_size_that_is_none_is_refused_by_file_field_and_value(folder: Path, place: tuple[str, str]) -> None:
    field = place[1].removeprefix("resampler_")
    for value in WRONG:
        edit(folder / "config.json", *place, to=value)
        with pytest.raises(ValueError, match=rf"config\.json: .*\b{field} is .*, expected"):
            Idefics2.from_pretrained(folder)


EPS = [("text_config", "rms_norm_eps"), ("perceiver_config", "rms_norm_eps"), ("vision_config", "layer_norm_eps")]


@pytest.mark.parametrize("value", ["1e-5", [1e-5], True, -1e-5, float("nan"), 1e400, 7])
@pytest.mark.parametrize("place", EPS, ids=".".join)
def test_an_eps_that_is_none_is_refused(folder: Path, place: tuple[str, str], value: Any) -> None:
    edit(folder / "config.json", *place, to=value)
    with pytest.raises(ValueError, match=rf"config\.json: {place[0]}\.{place[1]} is .*, expected a finite number"):
        Idefics2.from_pretrained(folder)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("text_config",), [1], r"config\.json: text_config is \[1\], expected an object"),
        (("vision_config",), "x", "vision_config is 'x', expected an object"),
        (("text_config", "rope_parameters"), 3, "rope_parameters is 3, expected an object"),
        (("text_config", "rope_parameters", "rope_theta"), "x", "rope_theta is 'x', expected a finite number"),
        (("text_config", "rope_parameters", "rope_type"), ["yarn"], "rope_type .* is not supported"),
        (("text_config", "hidden_act"), {}, "hidden_act = {} is not supported"),
        (("text_config", "eos_token_id"), [[2]], "eos_token_id is"),
        (("text_config", "bos_token_id"), "1", "bos_token_id is '1'"),
        (("image_token_id",), 1e3, "image_token_id is 1000.0"),
        (("image_token_id",), 10**6, "image_token_id 1000000 is outside the vocabulary"),
        (("text_config", "num_key_value_heads"), 3, "num_attention_heads is 4, expected a multiple of num_key_value_heads 3"),
        (("vision_config", "image_size"), 13, "image_size is 13, expected patch_size 14 at least"),
        (("text_config", "head_dim"), 7, "head_dim is 7, expected an even number"),
        (("model_type",), 10**9, "model_type is 1000000000, expected 'idefics2'"),
    ],
)
def test_values_that_are_of_another_kind_or_do_not_agree(folder: Path, place: tuple[Any, ...], value: Any, message: str) -> None:
    edit(folder / "config.json", *place, to=value)
    with pytest.raises(ValueError, match=message):
        Idefics2.from_pretrained(folder)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("text_config", "num_hidden_layers"), 4096),
        (("text_config", "vocab_size"), 2**24),
        (("text_config", "intermediate_size"), 2**20),
        (("vision_config", "num_hidden_layers"), 4096),
        (("perceiver_config", "resampler_depth"), 4000),
        (("vision_config", "image_size"), 2**19),
        (("perceiver_config", "resampler_n_latents"), 2**16),
    ],
)
def test_sizes_beyond_the_files_are_refused_before_memory_is_taken(
    folder: Path, place: tuple[str, str], value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(folder / "config.json", *place, to=value)
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    before = process_time()
    with pytest.raises(ValueError, match=r"config\.json describes .* parameters|has shape|does not hold this model's weights"):
        Idefics2.from_pretrained(folder)
    assert process_time() - before < 2


def test_an_id_of_zero_is_an_id() -> None:
    hf = Idefics2Config.named("tiny").to_hf()
    hf["text_config"] |= {"bos_token_id": 0, "eos_token_id": 0}
    config = Idefics2Config.from_hf(hf)
    assert (config.bos_token_id, config.eos_token_ids) == (0, (0,))


@pytest.mark.parametrize("text", [{"model_type": "mistral", "vocab_size": 32003}, None], ids=["given", "absent"])
def test_what_a_section_leaves_out_is_what_transformers_takes(text: dict[str, Any] | None) -> None:
    from transformers import Idefics2Config as HuggingFaceConfig

    hf = {"model_type": "idefics2", "image_token_id": 5, "text_config": text}
    theirs, ours = HuggingFaceConfig.from_dict(copy.deepcopy(hf)), Idefics2Config.from_hf(hf)
    for section, expected in ((ours.text, theirs.text_config), (ours.vision, theirs.vision_config)):
        for name, value in vars(section).items():
            assert value == (expected.rope_parameters[name] if name == "rope_theta" else getattr(expected, name)), name


# --- files of weights ---


def write_header(path: Path, header: bytes, data: int = 0) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(data))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (lambda: b"{" + b",".join(b'"w%d":0' % (n // 2) for n in range(60_000)) + b"}", "the key 'w0' occurs twice"),
        (lambda: b"{" + b",".join(b'"w%d":0' % n for n in range(60_000)) + b',"w59999":0}', "the key 'w59999' occurs twice"),
        (lambda: b'{"w":' + b"[" * 10**6 + b"]" * 10**6 + b"}", "is not valid JSON"),
        (lambda: b'{"w":{"dtype":"F32","shape":[' + b",".join([b"9" * 4000] * 500) + b'],"data_offsets":[0,0]}}', "damaged header entry"),
        (lambda: b'{"w":{"dtype":"F32","shape":[9223372036854775807,4611686018427387904],"data_offsets":[0,8]}}', "8 bytes, expected"),
        (lambda: b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "damaged header entry"),
        (lambda: b'{"' + b"n" * 10**6 + b'":0}', "damaged header entry"),
        (lambda: b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(50_000)) + b"}", None),
    ],
    ids=["twice", "last twice", "deep", "wide", "overflow", "nan", "long name", "many"],
)
def test_headers_cost_time_and_memory_in_proportion(tmp_path: Path, header: Callable[[], bytes], message: str | None) -> None:
    write_header(tmp_path / SINGLE_FILE, header(), 8 if message else 0)
    before = process_time()
    if message is None:
        assert len(read_header(tmp_path / SINGLE_FILE)) == 50_000
    else:
        with pytest.raises(ValueError, match=message) as caught:
            read_header(tmp_path / SINGLE_FILE)
        assert len(str(caught.value)) < 1000
    assert process_time() - before < 5


def test_files_past_their_limit_are_not_read(folder: Path, tmp_path: Path) -> None:
    with open(tmp_path / SINGLE_FILE, "wb") as file:
        file.write(struct.pack("<Q", SIZE_LIMIT + 1))
        file.truncate(10**10)
    with pytest.raises(ValueError, match=f"has a header of {SIZE_LIMIT + 1} bytes, expected {SIZE_LIMIT} at most"):
        read_header(tmp_path / SINGLE_FILE)
    for name in (*JSON_FILES, "chat_template.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"):
        path = Path(shutil.copytree(folder, tmp_path / name)) / name
        with open(path, "ab") as file:
            file.truncate(10**10)
        with pytest.raises(ValueError, match=rf"{re.escape(name)} has 10000000000 bytes, expected \d+ at most"):
            use(path.parent)


def test_a_tensor_that_makes_the_whole_model_wider_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / SINGLE_FILE).items()}
    name = "model.text_model.norm.weight"
    save_file(tensors | {name: tensors[name].float()}, folder / SINGLE_FILE)
    with caplog.at_level(logging.WARNING):
        assert Idefics2.from_pretrained(folder).dtype == stored_dtype(folder) == torch.float32
    said = next(record.message for record in caplog.records if "several dtypes" in record.message)
    assert f"1 float32 ('{name}')" in said
    assert f"{len(tensors) - 1} bfloat16" in said
    caplog.clear()
    assert Idefics2.from_pretrained(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert not caplog.records


@pytest.mark.parametrize(
    ("given", "expected"),
    [("bfloat16", torch.bfloat16), ("torch.float16", torch.float16), (torch.float32, torch.float32), ("auto", None), (None, None)],
)
def test_a_dtype_may_be_given_by_name(folder: Path, given: Any, expected: torch.dtype | None) -> None:
    assert parse_dtype(given) == expected
    assert Idefics2.from_pretrained(folder, dtype=given).dtype == (expected or torch.float32)


@pytest.mark.parametrize("given", ["bf16", "int8", torch.int8, torch.float64, 16, ["float32"], ""])
def test_another_dtype_is_named(folder: Path, given: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype is .*, expected .*bfloat16"):
        Idefics2.from_pretrained(folder, dtype=given)


def test_a_position_table_of_another_size_than_config_json_says_needs_the_argument(folder: Path) -> None:
    side = json.loads((folder / "config.json").read_text())["vision_config"]["image_size"]
    edit(folder / "config.json", "vision_config", "image_size", to=2 * side)
    with pytest.raises(ValueError, match=r"position_embedding.weight' has shape .*, the model expects"):
        Idefics2.from_pretrained(folder)
    assert Idefics2.from_pretrained(folder, image_size=2 * side).config.vision.image_size == 2 * side


def test_a_revision_is_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **settings: asked.append(settings["revision"]) or folder)
    for load in (Idefics2.from_pretrained, Processor.from_pretrained):
        load("owner/name", revision="v1")
        with pytest.raises(ValueError, match="revision 'v1' was given for .* a local folder"):
            load(folder, revision="v1")
    assert asked == ["v1", "v1"]


# --- the tokenizer and the model ---


@pytest.mark.parametrize("left", [("tokenizer_config.json",), ("tokenizer_config.json", "chat_template.jinja"), ()], ids=str)
def test_a_checkpoint_without_words_is_refused(folder: Path, left: tuple[str, ...]) -> None:
    """transformers makes a tokenizer of special tokens alone of it."""
    for path in folder.iterdir():
        if "token" in path.name and path.name not in left:
            path.unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer that transformers can load: there is no tokenizer\.json or tokenizer\.model"):
        Processor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("decoder",), None, "it makes 'H e l l o   w o r l d   1 2' of|loses|it makes"),
        (("model", "vocab"), {"<unk>": 0, "<s>": 1, "</s>": 2}, "special|tokens"),
        (("model",), {"type": "None"}, "can load"),
        (("added_tokens",), 3, "can load"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(folder: Path, place: tuple[Any, ...], value: Any, message: str) -> None:
    edit(folder / "tokenizer.json", *place, to=value)
    with pytest.raises(ValueError, match=message):
        Processor.from_pretrained(folder)


@pytest.mark.parametrize("load", [Processor.from_pretrained, use])
def test_an_image_token_of_another_id_than_the_models_is_refused(folder: Path, load: Callable[[Path], Any]) -> None:
    edit(folder / "config.json", "image_token_id", to=5)
    with pytest.raises(ValueError, match=r"config\.json: image_token_id is 5, the tokenizer's <image> has \d+: expected"):
        load(folder)


def test_an_image_of_another_number_of_tokens_than_the_models_is_refused(folder: Path) -> None:
    edit(folder / "processor_config.json", "image_seq_len", to=3)
    with pytest.raises(ValueError, match=r"resampler_n_latents is \d+, expected the processor's image_seq_len 3"):
        Processor.from_pretrained(folder)


def test_generate_refuses_what_another_models_processor_made(folder: Path) -> None:
    import numpy as np

    model, processor = Idefics2.from_pretrained(folder), reader_processor()
    batch = processor("<image>Hello", np.zeros((28, 28), np.uint8))
    assert model.generate(batch, max_new_tokens=1).tokens
    other = replace(model.config, image_token_id=3)
    model.config = other
    with pytest.raises(ValueError, match=r"images at tokens of id \d+, expected the model's image_token_id 3"):
        model.generate(batch, max_new_tokens=1)
    outside = Batch.from_documents([[1, 40_000]])
    with pytest.raises(ValueError, match="the batch has the token id 40000, expected ids of the model's vocabulary of"):
        model.generate(outside, max_new_tokens=1)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% for %}", "{{ messages.x.y }}", "{{ raise_exception('no') }}"])
def test_a_chat_template_that_fails_is_named(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="conversation 0 is not what the checkpoint's chat template takes: "):
        Processor.from_pretrained(folder).chat([{"role": "user", "content": "Hi"}])


# --- anything ---

HOSTILE = [
    None, True, False, 0, 1, -1, 2, 3, 64, 2**31, 2**63, 10**400, 0.0, -0.5, 1e-9, 1e308, float("nan"), float("inf"), "", "x", "\ud800",
    "../x", "a/b", "a\0b", "keys", [], [[]], [1], ["x"], [None], {}, {"a": 1}, [10**9], "x" * 5000, [0] * 2000, {"keys": []},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside a value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutate(text: str, draw: random.Random) -> bytes:
    """One to three changes of a JSON file: values, keys, or bytes."""
    if draw.random() < 0.1:
        content, at = bytearray(text.encode()), draw.randrange(len(text))
        content[at : at + draw.choice([0, 1, 5])] = draw.randbytes(draw.randrange(4))
        return bytes(content[: draw.choice([at, len(content)])])
    value = json.loads(text)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        everywhere = list(places(value))
        if not everywhere:
            break
        *path, key = draw.choice(everywhere)
        inner = value
        for step in path:
            inner = inner[step]
        action = draw.random()
        if action < 0.15:
            del inner[key]
        elif action < 0.25 and isinstance(inner, dict):
            inner[draw.choice(["keys", "x", "__class__", "dtype", "auto_map", "é", "a/b"])] = copy.deepcopy(draw.choice(HOSTILE))
        else:
            old = inner[key]
            nearby = [old * 2, old * 10**6, -old, float(old % 10**9), str(old % 10**9)] if type(old) is int else []
            # A copy: a value placed inside itself by a later change would have no end.
            inner[key] = copy.deepcopy(draw.choice([*HOSTILE, *nearby]))
    return json.dumps(value).encode()


def fuzz(whole: Path, folder: Path, count: int, seed: int) -> None:
    """Each of `count` folders with a file mutated is refused by a ValueError or answers; memory stays within 1 GB of what it was."""
    draw, before = random.Random(seed), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    originals = {name: (whole / name).read_text() for name in JSON_FILES}
    weights, refused = (whole / SINGLE_FILE).read_bytes(), 0
    length = struct.unpack("<Q", weights[:8])[0]
    for _ in range(count):
        name = draw.choice([*JSON_FILES, "config.json", SINGLE_FILE])
        if name == SINGLE_FILE:
            header = mutate(weights[8 : 8 + length].decode(), draw)
            changed, kept = struct.pack("<Q", len(header)) + header + weights[8 + length :], weights
        else:
            changed, kept = mutate(originals[name], draw), originals[name].encode()
        (folder / name).write_bytes(changed)
        try:
            use(folder)
        except ValueError as error:
            refused += len(str(error)) < 20_000
        except BaseException as error:
            raise AssertionError(f"{name}: {changed[:3000]!r}") from error
        (folder / name).write_bytes(kept)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    assert 0.2 * count < refused < count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # in KiB


def test_mutated_checkpoints_are_refused_or_answer(whole: Path, folder: Path) -> None:
    fuzz(whole, folder, count=60, seed=0)


@pytest.mark.slow(part=True)
@pytest.mark.parametrize("seed", range(1, 11))
def test_ten_thousand_mutated_checkpoints_are_refused_or_answer(whole: Path, folder: Path, seed: int) -> None:
    fuzz(whole, folder, count=1000, seed=seed)


def test_a_tokenizer_that_fails_on_a_whole_prompt_is_refused(folder: Path) -> None:
    """The library panics, which is no Exception, where the template of a prompt names a token that is not described."""
    edit(folder / "tokenizer.json", "post_processor", "special_tokens", to={})
    with pytest.raises(ValueError, match="has no tokenizer that transformers can load"):
        Processor.from_pretrained(folder)


def test_read_object_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.json cannot be read: No such file"):
        read_object(tmp_path / "none.json")


LINKS = [*JSON_FILES, "preprocessor_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", [*LINKS, "chat_template.json"])
def test_a_link_to_nothing_is_no_absent_file(folder: Path, name: str) -> None:
    """A cache that was copied in part: its settings would be left out without a word."""
    if name == "preprocessor_config.json":
        (folder / "processor_config.json").unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder / "blobs" / "1")
    with pytest.raises(ValueError, match=name):
        use(folder)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "folder", "device"])
def test_read_object_of_what_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.json is not a regular file"):
        read_object(tmp_path / "a.json")
