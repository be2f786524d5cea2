"""Prompts and chats to batches, token for token against Hugging Face's Idefics2Processor, and the files both read."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, Idefics2Processor

from idefics2_fast import Batch, ImageLimits, Processor, pack_images
from idefics2_fast.benchmarks.local_checkpoint import write_processor

FAKE, IMAGE, END = 32000, 32001, 32002
SMALL = np.zeros((2, 2), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processor")
    write_processor(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the object in a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "split"])
def pair(request: pytest.FixtureRequest, folder: Path) -> tuple[Processor, Idefics2Processor]:
    """Both processors over the same files. Ours makes one patch of each crop: the patches have their own tests."""
    ours = Processor.from_pretrained(folder, split_images=request.param)
    theirs = AutoProcessor.from_pretrained(folder)
    theirs.image_processor.do_image_splitting = request.param
    return replace(ours, shortest_edge=14, longest_edge=14), theirs


def documents(batch: Batch) -> list[list[int]]:
    return [part.tolist() for part in batch.token_ids.split(batch.documents.lengths)]


def photo(seed: int = 0, height: int = 400, width: int = 500) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- prompts ---

PROMPTS = [
    "Hello",
    " ",
    "\n",
    "What is this?<image>",
    "<image>What is this?",  # a word directly after the closing fake token keeps its word boundary
    "<image> What is this?",
    "<image>\nWhat is this?",
    "<image>",
    "<image><image>",  # neighbours share a fake token
    "<image><image><image>and these?",
    "<image> <image>",
    "<image>\n\n<image>.",
    "one<image>two<image>three",
    "  two  spaces  <image>  two  spaces  ",
    "<image>überall 漢字 🙂 é́",
    "漢<image>字🙂<image>🙂",
    "<image><b>bold</b>",  # '<' takes no space
    "<image><end_of_utterance>\nAssistant:",
    "<image></s>",
    "<fake_token_around_image>word",  # special tokens written by the user are tokens, here as there
    "<fake_token_around_image><image>",
    "<fake_token_around_image><fake_token_around_image><fake_token_around_image>",
    "<image><fake_token_around_image>.",
    "<s>begin <s>again</s> <unk>",
    "<image <image> image>",
    "User:<image>Describe.<end_of_utterance>\nAssistant: A cat.<end_of_utterance>\nUser: And<image>?<end_of_utterance>\nAssistant:",
]


def assert_same_tokens(pair: tuple[Processor, Idefics2Processor], prompts: list[str]) -> None:
    ours, theirs = pair
    batch = ours(prompts, [[SMALL] * prompt.count("<image>") for prompt in prompts])
    assert documents(batch) == theirs(text=prompts)["input_ids"]


def test_tokens_equal_hugging_face(pair: tuple[Processor, Idefics2Processor]) -> None:
    assert_same_tokens(pair, PROMPTS)


PIECES = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<s>", "</s>", "<", ">", " ", "\n", "a", "Ünï", "漢", "🙂", "."]


TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), min_size=1, max_size=9).map("".join).filter(bool)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=3))
def test_tokens_equal_hugging_face_for_any_text(pair: tuple[Processor, Idefics2Processor], prompts: list[str]) -> None:
    assert_same_tokens(pair, prompts)


@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(320, marks=pytest.mark.slow)])
def test_the_run_of_an_image_has_the_length_of_the_files_or_the_argument(length: int, folder: Path, copy: Path) -> None:
    edit(copy / "processor_config.json", lambda config: config.update(image_seq_len=length))
    expected = AutoProcessor.from_pretrained(copy)(text="a<image>b")["input_ids"]
    assert documents(Processor.from_pretrained(copy)("a<image>b", SMALL)) == expected
    assert documents(Processor.from_pretrained(folder, image_seq_len=length)("a<image>b", SMALL)) == expected


# --- chats ---


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


CHATS = [
    [{"role": "user", "content": [{"type": "image"}, text("What is this?")]}],
    [{"role": "user", "content": [text("What is this?"), {"type": "image"}]}],
    [{"role": "user", "content": [text("Compare"), {"type": "image"}, {"type": "image"}, text("and"), {"type": "image"}]}],
    [
        {"role": "user", "content": [{"type": "image"}, text("Who?")]},
        {"role": "assistant", "content": [text("Grace Hopper.")]},
        {"role": "user", "content": [text("And where?"), {"type": "image"}]},
        {"role": "assistant", "content": [text("There.")]},
        {"role": "user", "content": [text(" Thanks\n")]},
    ],
    [{"role": "system", "content": [text("Be brief.")]}, {"role": "user", "content": [text("Hi")]}],
]


def images_of(chat: list[dict[str, Any]]) -> list[np.ndarray]:
    return [SMALL for message in chat for piece in message["content"] if piece["type"] == "image"]


@pytest.mark.parametrize("prompted", [True, False])
def test_chats_equal_hugging_face(pair: tuple[Processor, Idefics2Processor], prompted: bool) -> None:
    ours, theirs = pair
    expected = [theirs.apply_chat_template(chat, add_generation_prompt=prompted, tokenize=True)[0] for chat in CHATS]
    assert documents(ours.chat(CHATS, [images_of(chat) for chat in CHATS], add_generation_prompt=prompted)) == expected
    for chat, tokens in zip(CHATS, expected, strict=True):
        assert documents(ours.chat(chat, images_of(chat), add_generation_prompt=prompted)) == [tokens]


def test_a_template_that_writes_the_bos_token_is_not_given_another(copy: Path) -> None:
    template = copy / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text())
    chat = [{"role": "user", "content": [text("Hi")]}]
    expected = AutoProcessor.from_pretrained(copy).apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
    assert documents(Processor.from_pretrained(copy).chat(chat)) == expected
    assert expected[0].count(1) == 1


def test_chat_of_a_template_that_writes_the_bos_token_at_times(copy: Path) -> None:
    """Each conversation has one, as when it is alone."""
    template = copy / "chat_template.jinja"
    template.write_text("{% if messages[0]['role'] == 'system' %}{{ bos_token }}{% endif %}" + template.read_text())
    user = {"role": "user", "content": "Hi"}
    chats = [[user], [{"role": "system", "content": "Be brief."}, user]]
    processor = Processor.from_pretrained(copy)
    for conversations in (chats, chats[::-1]):
        tokens = documents(processor.chat(conversations))
        assert tokens == [documents(processor.chat(chat))[0] for chat in conversations]
        assert all(document.count(1) == 1 for document in tokens)


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_images_inside_a_chat_are_those_given_beside_it(processor: Processor, tmp_path: Path, key: str) -> None:
    sources = [photo(seed) for seed in range(2)]
    if key != "image":
        for index, image in enumerate(sources):
            image.save(tmp_path / f"{index}.png")
        sources = [str(tmp_path / f"{index}.png") for index in range(2)]
    inside = [
        [
            {"role": "user", "content": [{"type": "image", key: sources[1]}, text("First")]},
            {"role": "user", "content": [text("Second"), {"type": "image", key: sources[0]}]},
        ],
        [{"role": "user", "content": [{"type": "image", key: sources[0]}]}],
    ]
    beside = [
        [{"role": "user", "content": [{"type": "image"}, text("First")]}, {"role": "user", "content": [text("Second"), {"type": "image"}]}],
        [{"role": "user", "content": [{"type": "image"}]}],
    ]
    first, second = processor.chat(inside), processor.chat(beside, [[sources[1], sources[0]], [sources[0]]])
    assert torch.equal(first.token_ids, second.token_ids)
    assert torch.equal(first.patches, second.patches)
    assert inside[0][0]["content"][0] == {"type": "image", key: sources[1]}  # the caller's messages stay as they were


def test_content_that_is_a_str_is_one_text_piece(processor: Processor) -> None:
    """The released template would write nothing of it."""
    short, long = ([{"role": "user", "content": content}] for content in ("Hi", [text("Hi")]))
    assert documents(processor.chat(short)) == documents(processor.chat(long))


# --- the batch ---


@pytest.mark.parametrize("split", [False, True])
def test_the_batch_holds_all_documents_and_images_in_order(folder: Path, split: bool) -> None:
    """Images of three prompts, one of which has none: order, offsets and the rows where the features go."""
    processor = Processor.from_pretrained(folder, split_images=split)
    images = [[photo(0), photo(1, 300, 900)], [], [photo(2, 980, 400)]]
    batch = processor(["a<image><image>b", "no image", "<image>c"], images)
    packed = pack_images([*images[0], *images[2]], split=split)
    assert batch.patches.dtype == torch.uint8
    assert torch.equal(batch.patches, packed.patches)
    assert torch.equal(batch.patch_positions, packed.patch_positions)
    assert torch.equal(batch.image_offsets, packed.image_offsets)
    assert batch.positions.tolist() == [i for length in batch.documents.lengths for i in range(length)]
    assert batch.token_ids[batch.documents.offsets[:-1].long()].tolist() == [1, 1, 1]
    assert batch.image_rows.tolist() == (batch.token_ids == IMAGE).nonzero()[:, 0].tolist()
    assert len(batch.image_rows) == 64 * len(packed.images) == 64 * (15 if split else 3)
    assert (batch.labels, batch.sample_keys, batch.tokenizer) == (None, (), processor.tokenizer)


def test_pixels_and_tokens_together_equal_hugging_face(folder: Path) -> None:
    """The whole call, with Hugging Face's padding taken away: the second image's pixels lie in the second place of its prompt."""
    images = [[photo(0), photo(1, 378, 378)]]
    theirs = AutoProcessor.from_pretrained(folder)(text=["<image>a<image>"], images=images, return_tensors="np")
    ours = Processor.from_pretrained(folder)(["<image>a<image>"], images)
    assert documents(ours) == theirs["input_ids"].tolist()
    last = theirs["pixel_values"][0, 1, :, :378, :378].reshape(3, 27, 14, 27, 14).transpose(1, 3, 0, 2, 4).reshape(729, 588)
    bytes_of_hf = np.rint((last + 1) * 127.5).astype(np.uint8)
    assert ours.patches[ours.images.bounds[1] :].tolist() == bytes_of_hf.tolist()


@pytest.mark.parametrize("images", [None, [[], []]])
def test_a_batch_without_images_has_no_patches(processor: Processor, images: Any) -> None:
    batch = processor(["a", "b c"], images)
    assert (batch.patches, batch.patch_positions, batch.images, batch.image_rows) == (None, None, None, None)


@pytest.mark.parametrize("images", [SMALL, [SMALL], (SMALL,), [[SMALL]]])
def test_one_prompt_takes_one_image_in_any_form(processor: Processor, images: Any) -> None:
    expected = processor(["a<image>"], [[SMALL]])
    batch = processor("a<image>", images)
    assert torch.equal(batch.token_ids, expected.token_ids)
    assert torch.equal(batch.patches, expected.patches)


@pytest.mark.parametrize("images", [None, [], [[]], ()])
def test_one_prompt_without_images(processor: Processor, images: Any) -> None:
    assert documents(processor("a", images)) == documents(processor(["a"]))


def test_ids_become_text_again(processor: Processor) -> None:
    ids = documents(processor("Grace Hopper, 漢字"))[0]
    assert processor.decode(ids) == "Grace Hopper, 漢字"
    assert processor.decode([*ids, END]) == "Grace Hopper, 漢字"
    assert processor.decode([*ids, END], skip_special_tokens=False).endswith("<end_of_utterance>")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    write_processor(tmp_path)
    for rows, fits in ((END + 1, True), (END, False)):
        (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": rows}}))
        with nullcontext() if fits else pytest.raises(ValueError, match=f"the tokenizer has {END + 1} tokens, .* only {END} rows"):
            Processor.from_pretrained(tmp_path)


def test_the_vocabulary_counts_the_added_tokens(processor: Processor) -> None:
    """An embedding of 32000 rows must be seen to be too small."""
    assert processor.vocab_size == END + 1
    assert processor.image_token_id == IMAGE
    assert processor.tokenizer.convert_tokens_to_ids(processor.fake_token) == FAKE


# --- files ---


def assert_read_alike(folder: Path) -> None:
    ours, theirs = Processor.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert documents(ours("a<image>b", SMALL)) == theirs(text="a<image>b")["input_ids"]
    assert documents(ours.chat(CHATS[0], [SMALL])) == theirs.apply_chat_template(CHATS[0], add_generation_prompt=True, tokenize=True)
    size = theirs.image_processor.size
    assert (ours.shortest_edge, ours.longest_edge) == (size["shortest_edge"], size["longest_edge"])
    assert (ours.split_images, ours.image_seq_len) == (theirs.image_processor.do_image_splitting, theirs.image_seq_len)


def change_settings(config: dict[str, Any]) -> None:
    config["image_seq_len"] = 7
    config["image_processor"] |= {"do_image_splitting": True, "size": {"longest_edge": 500, "shortest_edge": 200}}


def test_the_files_settings_are_kept(copy: Path) -> None:
    edit(copy / "processor_config.json", change_settings)
    assert_read_alike(copy)
    processor = Processor.from_pretrained(copy)
    assert (processor.split_images, processor.image_seq_len, processor.shortest_edge, processor.longest_edge) == (True, 7, 200, 500)
    assert Processor.from_pretrained(copy, split_images=False, image_seq_len=9).image_seq_len == 9
    assert not Processor.from_pretrained(copy, split_images=False).split_images
    batch = processor("<image>", photo())
    assert torch.equal(batch.patches, pack_images([photo()], split=True, shortest_edge=200, longest_edge=500).patches)


def test_the_older_layout_of_files(copy: Path) -> None:
    """As the released checkpoints have it: image settings in preprocessor_config.json, the template in chat_template.json."""
    config = json.loads((copy / "processor_config.json").read_text())
    change_settings(config)
    (copy / "preprocessor_config.json").write_text(json.dumps(config.pop("image_processor")))
    (copy / "processor_config.json").write_text(json.dumps(config))
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": "older: " + (copy / "chat_template.jinja").read_text()}))
    assert_read_alike(copy)


def test_a_chat_template_inside_the_tokenizers_file(copy: Path) -> None:
    template = copy / "chat_template.jinja"
    expected = documents(Processor.from_pretrained(copy).chat(CHATS[4]))
    edit(copy / "tokenizer_config.json", lambda config: config.update(chat_template=template.read_text()))
    template.unlink()
    assert documents(Processor.from_pretrained(copy).chat(CHATS[4])) == expected


def test_tokens_that_a_tokenizer_lacks_are_added(copy: Path) -> None:
    """Mistral's own tokenizer: the three tokens follow it in Hugging Face's order."""
    edit(copy / "tokenizer.json", lambda config: config.update(added_tokens=[t for t in config["added_tokens"] if t["id"] < FAKE]))
    edit(copy / "tokenizer_config.json", lambda config: config.pop("extra_special_tokens"))
    assert_read_alike(copy)
    tokenizer = Processor.from_pretrained(copy).tokenizer
    assert tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>", "<end_of_utterance>"]) == [FAKE, IMAGE, END]


def test_what_is_saved_loads_back_in_both(copy: Path, tmp_path: Path) -> None:
    edit(copy / "processor_config.json", change_settings)
    saved = tmp_path / "not" / "yet" / "there"
    Processor.from_pretrained(copy).save_pretrained(saved)
    assert_read_alike(saved)
    theirs = AutoProcessor.from_pretrained(saved)
    before, after = (processor.image_processor.to_dict() for processor in (AutoProcessor.from_pretrained(copy), theirs))
    assert before == after
    assert isinstance(theirs, Idefics2Processor)
    image = photo()
    expected = AutoProcessor.from_pretrained(copy)(text="<image>", images=[[image]], return_tensors="pt")
    assert torch.equal(theirs(text="<image>", images=[[image]], return_tensors="pt")["pixel_values"], expected["pixel_values"])


def write_config(folder: Path, **text_config: int) -> None:
    vision_config = {"image_size": 384, "patch_size": 14}
    (folder / "config.json").write_text(json.dumps({"text_config": text_config, "vision_config": vision_config}))


def test_a_models_config_gives_the_side_of_its_position_table(copy: Path) -> None:
    write_config(copy)
    batch = Processor.from_pretrained(copy)("<image>", photo())
    assert torch.equal(batch.patch_positions, pack_images([photo()], positions_per_side=27).patch_positions)


def test_the_limits_of_images_can_be_moved(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"sides of at most 700 \(ImageLimits.side\)"):
        Processor.from_pretrained(folder, limits=ImageLimits(side=700))("<image>", photo(0, 686, 812))
    assert Processor.from_pretrained(folder)("<image>", photo(0, 686, 812)).images is not None


def test_the_formula_of_the_positions_can_be_chosen(folder: Path) -> None:
    image = photo(0, 686, 812)  # 49 x 58 patches, where the formulas differ
    batch = Processor.from_pretrained(folder, position_ids="transformers-4.40")("<image>", image)
    assert torch.equal(batch.patch_positions, pack_images([image], position_ids="transformers-4.40").patch_positions)
    assert not torch.equal(batch.patch_positions, pack_images([image]).patch_positions)


def test_a_models_config_gives_the_longest_prompt(copy: Path) -> None:
    """To the token: BOS and two images with three fake tokens are 132."""
    prompts = ["a", "<image><image>"], [[], [SMALL] * 2]
    write_config(copy, max_position_embeddings=132)
    assert Processor.from_pretrained(copy)(*prompts).documents.lengths == [2, 132]
    write_config(copy, max_position_embeddings=131)
    with pytest.raises(ValueError, match=r"prompt 1 has 132 tokens, expected at most 131, the model's positions"):
        Processor.from_pretrained(copy)(*prompts)


SETTINGS = [
    ("image_mean", [0.48, 0.45, 0.4]),
    ("image_std", [0.5, 0.5, 0.4]),
    ("do_rescale", False),
    ("do_resize", False),
    ("do_normalize", False),
    ("do_convert_rgb", False),
    ("do_center_crop", True),
    ("resample", 3),
    ("rescale_factor", 1 / 256),
    ("size", {"height": 224, "width": 224}),
    ("image_processor_type", "SiglipImageProcessor"),
]


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_image_settings_that_are_not_implemented_are_refused(copy: Path, name: str, value: Any) -> None:
    edit(copy / "processor_config.json", lambda config: config["image_processor"].update({name: value}))
    with pytest.raises(ValueError, match=name):
        Processor.from_pretrained(copy)


SAME = [{"image_mean": 0.5, "image_std": 0.5}, {"do_pad": False}, {"image_processor_type": "Idefics2ImageProcessorFast"}]


@pytest.mark.parametrize("settings", SAME)
def test_image_settings_that_say_the_same_are_accepted(copy: Path, settings: dict[str, Any]) -> None:
    edit(copy / "processor_config.json", lambda config: config["image_processor"].update(settings))
    Processor.from_pretrained(copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda copy: (copy / "processor_config.json").unlink(),
            "has no image settings: expected them in processor_config.json",
        ),
        (lambda copy: (copy / "processor_config.json").write_text("{"), r"processor_config\.json is not valid JSON"),
        (lambda copy: (copy / "processor_config.json").write_text("[1]"), r"processor_config\.json holds list, expected an object"),
        (lambda copy: [path.unlink() for path in copy.glob("tokenizer*")], "has no tokenizer that transformers can load"),
        (lambda copy: (copy / "tokenizer.json").write_text("{"), "has no tokenizer that transformers can load"),
        (lambda copy: edit(copy / "processor_config.json", lambda c: c.update(image_seq_len=0)), "image_seq_len is 0, expected 1 or more"),
        (lambda copy: (copy / "config.json").write_text('{"vision_config": {"patch_size": 16}}'), "patch_size is 16, expected 14"),
        (shutil.rmtree, "not the folder of a checkpoint"),
    ],
)
def test_missing_and_damaged_files_are_named(copy: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=message):
        Processor.from_pretrained(copy)


def test_code_in_a_checkpoint_is_not_run(copy: Path) -> None:
    (copy / "trap.py").write_text(f"open({str(copy / 'sprung')!r}, 'w')\nclass Trap: pass\n")
    edit(copy / "tokenizer_config.json", lambda config: config.update(auto_map={"AutoTokenizer": ["trap.Trap", None]}))
    edit(copy / "processor_config.json", lambda config: config.update(auto_map={"AutoProcessor": "trap.Trap"}))
    Processor.from_pretrained(copy)
    assert not (copy / "sprung").exists()


# --- bad input ---


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        (["a", "<image>b"], None, "prompt 1 has 1 <image> marks and 0 images, expected as many of both"),
        (["a", "b"], [[], [SMALL]], "prompt 1 has 0 <image> marks and 1 images"),
        (["<image>a", "<image>b"], [[SMALL, SMALL], []], "prompt 0 has 1 <image> marks and 2 images"),
        ("<image>a", [SMALL, SMALL], "prompt 0 has 1 <image> marks and 2 images"),
        (["a", ""], None, "prompt 1 is empty, expected text"),
        ("", None, "prompt 0 is empty"),
        (["a", "b\ud800"], None, r"prompt 1 holds '\\ud800', half of a character"),
        ([], None, "no prompt is given"),
        (["a", 5], None, "prompt 1 is a int, expected a str"),
        (["a", "b"], [[]], "images has 1 lists for 2 prompts, expected one list per prompt"),
        (["<image>", "<image>"], [SMALL, SMALL], "images is not a list of lists, expected the list of each prompt's images"),
        (["<image>"], SMALL, "images is not a list of lists"),
        (["<image>", "<image>"], [[SMALL], [SMALL / 255]], "image 1: the array is float64"),
    ],
)
def test_bad_prompts_are_named(processor: Processor, texts: Any, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(texts, images)


@pytest.mark.parametrize(
    ("conversations", "images", "message"),
    [
        ([], None, "no prompt is given"),
        ([[]], None, r"conversation 0 is \[\], expected a list of messages"),
        ([CHATS[4], "Hi"], None, "conversation 1 is 'Hi', expected a list of messages"),
        ([CHATS[4], ["Hi"]], None, "conversation 1 holds 'Hi', expected"),
        ([{"content": "Hi"}], None, "conversation 0 holds .*expected .*role"),
        ([{"role": "user", "content": []}], None, "conversation 0 holds .*not empty"),
        ([{"role": "user"}], None, "conversation 0 holds .*content"),
        ([{"role": "user", "content": ["Hi"]}], None, "conversation 0 holds the piece 'Hi'"),
        ([{"role": "user", "content": [{"type": "video"}]}], None, "conversation 0 holds the piece .*video"),
        ([{"role": "user", "content": [{"type": "text"}]}], None, "conversation 0 holds the piece"),
        (CHATS[0], None, "prompt 0 has 1 <image> marks and 0 images"),
        (CHATS[4], [SMALL], "prompt 0 has 0 <image> marks and 1 images"),
        ([{"role": "user", "content": [{"type": "image", "image": SMALL}]}], [SMALL], "both inside the conversations and separately"),
        ([{"role": "user", "content": "I wrote <image>"}], None, "prompt 0 has 1 <image> marks and 0 images"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "http://a.b/c.jpg"}]}],
            None,
            "image 0: http://a.b/c.jpg is not downloaded",
        ),
    ],
)
def test_bad_conversations_are_named(processor: Processor, conversations: Any, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor.chat(conversations, images)


def test_a_checkpoint_without_a_chat_template(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="the checkpoint has no chat template"):
        Processor.from_pretrained(copy).chat(CHATS[4])
