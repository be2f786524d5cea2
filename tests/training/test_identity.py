"""The identity of a run: it sees every edit of what decides the numbers, and no move of a folder."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from support.checkpoints import make_format_1
from support.corpus import mixed_rows, picture, write_jsonl

from idefics2_fast import Idefics2, Idefics2Config, Processor
from idefics2_fast.training.checkpoint import Checkpoints
from idefics2_fast.training.identity import Identity, earlier_recipe, of_data, of_model, of_processor
from idefics2_fast.training.recipe import Recipe, instruct
from idefics2_fast.training.sources import open_source


def data_of(data: object) -> dict[str, str]:
    return of_data(open_source(data))


# --- data ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of rows and their images."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", mixed_rows(12, seed=1))
    rows = [{"texts": [{"user": f"{n}?", "assistant": "!"}]} for n in range(4)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "b.parquet")
    return folder


def one_byte(folder: Path) -> None:
    data = bytearray((folder / "a.jsonl").read_bytes())
    place = data.rindex(b"assistant") + 14
    data[place] ^= 1
    (folder / "a.jsonl").write_bytes(data)


def two_lines(folder: Path) -> None:
    first, second, *others = (folder / "a.jsonl").read_text().splitlines()
    (folder / "a.jsonl").write_text("\n".join([second, first, *others]) + "\n")


def image_of(folder: Path) -> Path:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg"))[0]


def another_picture(folder: Path) -> None:
    with Image.open(image_of(folder)) as image:
        size = image.size
    image_of(folder).write_bytes(picture(size[0], size[1] + 1))


def one_pixel(folder: Path) -> None:
    with Image.open(image_of(folder)) as image:
        image = image.convert("RGB")
    image.putpixel((0, 0), (1, 2, 3))
    image.save(image_of(folder), "PNG")


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (one_byte, "a.jsonl"),
        (two_lines, "a.jsonl"),
        (another_picture, "images of row"),
        (one_pixel, "images of row"),
        (lambda folder: image_of(folder).unlink(), "images of row"),
    ],
    ids=["one byte", "two lines", "another picture", "one pixel", "no picture"],
)
def test_of_data_sees_an_edit(folder: Path, edit: Callable[[Path], None], named: str) -> None:
    before = data_of(folder)
    edit(folder)
    after = data_of(folder)
    changed = [name for name in before if before[name] != after.get(name)]
    assert any(name.startswith(named) for name in changed)
    assert named == "a.jsonl" or "a.jsonl" not in changed


def test_of_data_does_not_depend_on_the_place(folder: Path, tmp_path: Path) -> None:
    shutil.move(shutil.copytree(folder, tmp_path / "copied"), tmp_path / "moved")
    assert data_of(tmp_path / "moved") == data_of(folder)
    assert {"a.jsonl", "b.parquet"} < data_of(folder).keys()


def memory_image(colour: int) -> Image.Image:
    return Image.new("RGB", (30, 40), (colour, 0, 0))


def stored_image(colour: int) -> Image.Image:
    buffer = io.BytesIO()
    memory_image(colour).save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()))


def palette_image(colour: int) -> Image.Image:
    image = Image.new("P", (30, 40), 1)
    image.putpalette([0, 0, 0, colour, 0, 0])
    return image


def clear_image(colour: int) -> Image.Image:
    image = Image.new("L", (30, 40), 2)
    image.info["transparency"] = colour
    return image


def frame(number: int) -> Image.Image:
    buffer = io.BytesIO()
    memory_image(9).save(buffer, "GIF", save_all=True, append_images=[memory_image(20 * n) for n in range(1, 6)])
    image = Image.open(buffer)
    image.seek(number)
    return image


IN_MEMORY = {
    "bytes": lambda n: picture(30, 40 + n),
    "memory": memory_image,
    "opened": stored_image,
    "palette": palette_image,
    "transparency": clear_image,
    "frame": frame,
}


@pytest.mark.parametrize("image", IN_MEMORY.values(), ids=IN_MEMORY)
def test_of_data_sees_an_edit_of_rows_in_memory(image: Callable[[int], object]) -> None:
    def rows(*colours: int) -> list[dict]:
        return [{"images": [image(n)], "texts": [{"user": "?", "assistant": "!"}]} for n in colours]

    assert data_of(rows(1, 2, 3)) == data_of(rows(1, 2, 3))
    texts = [row | {"texts": [{"user": "?", "assistant": "."}]} for row in rows(1, 2, 3)]
    others = [rows(2, 1, 3), rows(1, 2, 4), rows(1, 2), rows(1, 2, 3, 3), texts]
    assert all(data_of(other) != data_of(rows(1, 2, 3)) for other in others)


@pytest.mark.parametrize("opened", [Image.open, lambda path: Image.open(open(path, "rb"))], ids=["path", "file"])
def test_of_data_of_images_opened_from_files(opened: Callable[[Path], Image.Image], tmp_path: Path) -> None:
    """An edited file is seen, a folder may move, and nothing is decoded."""

    def rows(folder: str) -> list[dict]:
        return [{"images": [opened(tmp_path / folder / "a.png")], "texts": [{"user": "?", "assistant": "!"}]}]

    for folder, colour in (("first", 1), ("moved", 1), ("edited", 2)):
        (tmp_path / folder).mkdir()
        memory_image(colour).save(tmp_path / folder / "a.png")
    first = rows("first")
    assert data_of(first) == data_of(rows("moved")) != data_of(rows("edited"))
    assert first[0]["images"][0].fp is not None
    assert first[0]["images"][0].getpixel((0, 0)) == (1, 0, 0)


def test_of_data_takes_a_fingerprint_for_the_rows() -> None:
    class Made(list):
        fingerprint = "made of seed 3"

        def __getitem__(self, row: int) -> dict:
            pytest.fail("a row was made")

    first, second = Made([{}]), Made([{}])
    assert data_of(first) == data_of(second)
    second.fingerprint = "made of seed 4"
    assert data_of(first) != data_of(second)


def test_of_data_of_a_dataset_is_that_of_its_rows() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"texts": [{"user": f"{n}?", "assistant": "!"}]} for n in range(5)]
    whole = datasets.Dataset.from_list(rows)
    assert data_of(whole) == data_of(datasets.Dataset.from_list(rows)) == data_of(rows)
    assert data_of(whole.select([1, 0, 2, 3, 4])) != data_of(whole)


# --- model, processor ---


def test_of_model_sees_configuration_and_weights() -> None:
    torch.manual_seed(0)
    model = Idefics2(Idefics2Config.named("tiny"))
    before = of_model(model)
    config = model.config
    model.config = replace(config, eos_token_ids=(7,))
    assert of_model(model) == before
    model.config = replace(config, text=replace(config.text, rms_norm_eps=1e-6))
    assert changes(before, of_model(model)) == ["text.rms_norm_eps"]
    model.config = replace(config, perceiver=replace(config.perceiver, rms_norm_eps=1e-6))
    assert changes(before, of_model(model)) == ["perceiver.rms_norm_eps"]
    model.config = config
    with torch.no_grad():
        model.text_model.layers[1].mlp.gate_up_proj.weight.view(torch.int32)[-1, -1] ^= 1
    assert changes(before, of_model(model)) == ["weights of text_model"]


def changes(before: dict, after: dict) -> list[str]:
    return [name for name in before if before[name] != after[name]]


@pytest.mark.slow
def test_of_processor_sees_template_tokens_and_rules(corpus: Path) -> None:
    processor = Processor.from_pretrained(corpus / "model")
    before = of_processor(processor)
    processor("river stone")
    assert of_processor(Processor.from_pretrained(corpus / "model")) == before == of_processor(processor)
    assert changes(before, of_processor(replace(processor, longest_edge=500))) == ["longest_edge"]
    processor.tokenizer.chat_template += " "
    assert changes(before, of_processor(processor)) == ["chat_template"]
    processor.tokenizer.add_tokens(["<new>"])
    assert changes(before, of_processor(processor)) == ["tokenizer", "chat_template"]


# --- checkpoints of another run ---


def recipe_of(out: Path, **changed: object) -> Recipe:
    return instruct("model", "data.jsonl", out, **changed)


def identity_of(recipe: Recipe, **inputs: dict) -> Identity:
    values = json.loads(json.dumps(asdict(recipe)))
    places = ("model", "data", "out", "save_every", "keep", "log_to", "workers")
    given = {"data": {"a.jsonl": "a" * 64}, "model": {"text.rms_norm_eps": 1e-5, "weights of lm_head": "b" * 64}} | inputs
    return Identity({name: value for name, value in values.items() if name not in places}, given, earlier_recipe(Path(recipe.out)))


def checkpoints_of(recipe: Recipe, **inputs: dict) -> Checkpoints:
    return Checkpoints(Path(recipe.out) / "checkpoints", recipe.digest(), identity=identity_of(recipe, **inputs))


def save(recipe: Recipe) -> None:
    checkpoints_of(recipe).save(1, {"x": torch.zeros(2)}, {}, asynchronous=False)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(
    ("recipe", "inputs", "named"),
    [
        ({"learning_rate": 5e-5, "rank": 8}, {}, r"the recipe's rank is 8 and was 64; the recipe's learning_rate is 5e-05 and was 0.0001"),
        ({"targets": ("text",)}, {}, r"the recipe's targets is \['text'\] and was \['vision', 'text'\]"),
        ({}, {"data": {"a.jsonl": "c" * 64}}, "data: a.jsonl changed .SHA-256 aaaaaaaaaaaa, now cccccccccccc"),
        ({}, {"data": {"a.jsonl": "c" * 64, "images of row 1": "d" * 64}}, r"data: a.jsonl changed [^;]* \("),
        ({}, {"data": {"z.jsonl": "a" * 64}}, "data: a.jsonl is called z.jsonl now"),
        ({}, {"data": {"rows": "4 rows, " + "c" * 64}}, "data: a.jsonl is missing; data: rows is new"),
        ({}, {"model": {"text.rms_norm_eps": 1e-6}}, "model: text.rms_norm_eps is 1e-06 and was 1e-05"),
        ({}, {"model": {"weights of lm_head": "c" * 64}}, "model: weights of lm_head changed"),
    ],
)
def test_load_names_what_differs(tmp_path: Path, recipe: dict, inputs: dict, named: str) -> None:
    save(recipe_of(tmp_path))
    with pytest.raises(ValueError, match=f"step-00000001 belongs to another run: {named}"):
        checkpoints_of(recipe_of(tmp_path, **recipe), **inputs).load({"x": torch.ones(2)})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("changed", [{"steps": 2000}, {"workers": 9, "save_every": 3}], ids=["steps", "places"])
@pytest.mark.parametrize("format_1", [False, True])
def test_load_goes_on_with_more_steps(tmp_path: Path, changed: dict, format_1: bool) -> None:
    first = recipe_of(tmp_path)
    save(first)
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(first)))
    if format_1:
        make_format_1(tmp_path / "checkpoints" / "step-00000001")
    loaded = checkpoints_of(recipe_of(tmp_path, **changed)).load({"x": torch.ones(2)})
    assert loaded.step == 1
    assert (loaded.identity is None) == format_1


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("known", [True, False], ids=["recipe.json", "no recipe.json"])
def test_load_of_format_1_names_the_field(tmp_path: Path, known: bool) -> None:
    first = recipe_of(tmp_path)
    save(first)
    if known:
        (tmp_path / "recipe.json").write_text(json.dumps(asdict(first)))
    make_format_1(tmp_path / "checkpoints" / "step-00000001")
    named = "the recipe's rank is 2 and was 64" if known else f"recipe .* was saved by recipe {first.digest()}"
    with pytest.raises(ValueError, match=named):
        checkpoints_of(recipe_of(tmp_path, rank=2)).load({"x": torch.ones(2)})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_load_refuses_a_newer_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from idefics2_fast.training import checkpoint

    with monkeypatch.context() as newer:
        newer.setattr(checkpoint, "FORMAT", 3)
        save(recipe_of(tmp_path))
    with pytest.raises(ValueError, match="has format 3, expected 2 or less"):
        checkpoints_of(recipe_of(tmp_path)).load({"x": torch.ones(2)})


def test_of_data_sees_which_answers_are_trained() -> None:
    """In rows in memory; the digest of rows without switches is as before there were any."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    plain, switched = ([{"messages": [*talk[:3], talk[3] | {"weight": on}]}] for on in (1, 0))
    assert of_data(open_source(plain)) == of_data(open_source([{"messages": talk}]))
    assert of_data(open_source(plain)) != of_data(open_source(switched))


def test_of_data_passes_over_the_holes_of_a_sparse_file(tmp_path: Path) -> None:
    """A file of 20 GB that takes no room costs no time; a file without holes has its plain SHA-256."""
    path, line = tmp_path / "a.jsonl", b'{"texts": [{"user": "a", "assistant": "b"}]}\n'
    path.write_bytes(line)
    assert of_data(open_source(path)) == {"a.jsonl": hashlib.sha256(line).hexdigest()}
    started, found = time.process_time(), set()
    for size in (20 * 10**9, 21 * 10**9):
        with path.open("r+b") as file:
            file.truncate(size)
        found.add(of_data(open_source(path))["a.jsonl"])
    assert len(found) == 2
    assert time.process_time() - started < 3


def test_earlier_recipe_that_cannot_be_read(tmp_path):
    for text in ("[" * 100_000, "{", "[]", ""):
        (tmp_path / "recipe.json").write_text(text)
        assert earlier_recipe(tmp_path) is None
