"""The drop-in image processor, bit for bit against transformers' own, and within two levels of its torchvision backend."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, Idefics2Processor
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from idefics2_fast.benchmarks.local_checkpoint import write_processor
from idefics2_fast.image_processor import Idefics2ImageProcessor


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def photo(height: int = 400, width: int = 500, mode: str = "RGB", seed: int = 0) -> Image.Image:
    return Image.fromarray(noise(height, width, seed=seed)).convert(mode)


def saved(folder: Path, image: Image.Image, name: str = "photo.png", **options: Any) -> str:
    image.save(folder / name, **options)
    return str(folder / name)


def assert_same(ours: Any, expected: Any) -> None:
    """The same keys, containers, types, shapes and bits."""
    assert type(ours) is type(expected)
    if isinstance(expected, list):
        assert len(ours) == len(expected)
        for item, other in zip(ours, expected, strict=True):
            assert_same(item, other)
    else:
        assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
        assert np.array_equal(ours, expected)


def assert_like_transformers(images: Any, settings: dict[str, Any] | None = None, **call: Any) -> dict[str, Any]:
    ours = Idefics2ImageProcessor(**settings or {})(images, **call)
    expected = Idefics2ImageProcessorPil(**settings or {})(images, **call)
    assert set(ours) == set(expected)
    for name in expected:
        assert_same(ours[name], expected[name])
    return ours


RAGGED = [[photo(768, 1024), photo(300, 200, seed=1)], [photo(981, 979, seed=2)], []]


@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
@pytest.mark.parametrize("split", [False, True])
def test_a_ragged_batch(split: bool, return_tensors: str | None) -> None:
    """Padded in height, width and number of images, with the mask."""
    ours = assert_like_transformers(RAGGED, do_image_splitting=split, return_tensors=return_tensors)
    assert ours["pixel_values"].shape[:2] == (3, 10 if split else 2)


@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_unpadded(return_tensors: str | None) -> None:
    """Lists of arrays; one array of equal images where tensors are asked for."""
    images = [[photo(400, 500), photo(400, 500, seed=1)], [photo(400, 500, seed=2), photo(400, 500, seed=3)]]
    assert_like_transformers(images, do_pad=False, return_tensors=return_tensors)
    if return_tensors is None:
        assert_like_transformers(RAGGED, do_pad=False)


@pytest.mark.parametrize(
    "images", [photo(), [photo(), photo(50, 60)], [[photo()]], ([photo()], (photo(),)), noise(50, 60), np.stack([noise(9, 9)] * 2)]
)
def test_every_nesting(images: Any) -> None:
    assert_like_transformers(images, return_tensors="pt")


SETTINGS = {
    "other edges": {"size": {"shortest_edge": 100, "longest_edge": 384}},
    "one size": {"size": {"height": 100, "width": 90}},
    "no resizing": {"do_resize": False},
    "another mean and deviation": {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.7]},
    "one mean": {"image_mean": 0.3, "image_std": 0.2},
    "another scale": {"rescale_factor": 1 / 256},
    "not rescaled": {"do_rescale": False},
    "not normalised": {"do_normalize": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "bicubic": {"resample": 3},
    "not to RGB": {"do_convert_rgb": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str) -> None:
    """Given when the processor is made, or with the call."""
    images = [photo(), photo(50, 60, seed=1)]
    assert_like_transformers(images, SETTINGS[name])
    assert_like_transformers(images, **SETTINGS[name], return_tensors="pt")


# On palettes with alpha transformers changed its mind, and older versions refuse arrays of one or four channels.
SINCE_5_23 = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="transformers answers otherwise before 5.23")


@pytest.mark.parametrize("mode", ["1", "L", pytest.param("P", marks=SINCE_5_23), "CMYK", "I;16", "RGBA", "LA"])
@pytest.mark.parametrize("source", ["image", "path"])
def test_modes(mode: str, source: str, tmp_path: Path) -> None:
    """Of paths transformers drops the alpha, of opened images it lays them on white: so does this."""
    image = Image.fromarray(noise(400, 500, 4), "RGBA")
    image = Image.fromarray(noise(400, 500, 1)[..., 0].astype(np.uint16) * 3) if mode == "I;16" else image.convert(mode)
    assert_like_transformers([image if source == "image" else saved(tmp_path, image, "photo.tiff")])


def test_a_turned_file_and_the_turned_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, photo(), exif=exif)
    ours = assert_like_transformers([[path], [Image.open(path)]], do_resize=False, return_tensors="pt")
    assert ours["pixel_attention_mask"].sum((2, 3))[:, 0].tolist() == [200_000] * 2
    assert ours["pixel_attention_mask"][:, 0, 0].sum(1).tolist() == [400, 500]


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(noise(400, 500, 1), marks=SINCE_5_23),
        pytest.param(noise(400, 500, 4), marks=SINCE_5_23),
        noise(400, 500).transpose(2, 0, 1),
        noise(800, 900)[::2, ::-3],
        noise(400, 500)[..., ::-1],
        noise(400, 500, 4)[..., :3],
        noise(400, 500, 4)[..., 1:],  # its last pixel has no fourth byte
        np.asfortranarray(noise(400, 500)),
        noise(400, 500).astype(np.float32) / 255,
        torch.from_numpy(noise(400, 500)).permute(2, 0, 1),
    ],
    ids=lambda array: f"{list(array.shape)} {array.dtype}",
)
def test_arrays_and_tensors(array: Any) -> None:
    """Of floats, which Pillow resizes as bytes, too."""
    assert_like_transformers([array], image_mean=[0.5] * 3, image_std=[0.5] * 3)


def test_an_image_that_pillow_keeps_in_several_pieces() -> None:
    """Above 16 MiB."""
    assert_like_transformers([Image.new("RGB", (3000, 2000), (1, 2, 3))])


@pytest.mark.slow
def test_random_sizes() -> None:
    draw = np.random.default_rng(3)
    for number in range(40):
        height, width = np.exp(draw.uniform(np.log(2), np.log(6000), 2)).astype(int).tolist()
        assert_like_transformers([photo(height, width, seed=number)], do_image_splitting=bool(number % 2))


# --- as the torchvision backend ---


def torchvision_pixels(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """float32 [3, h, w] as TorchvisionBackend makes it: `torchvision.transforms.v2.functional.resize` of bytes is torch's own
    interpolation, then the fused scale, in float32."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
    if pixels.shape[2:] != size:
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return (pixels[0].float() - torch.tensor(0.5) * 255.0) / (torch.tensor(0.5) * 255.0)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(768, 1024, (735, 980)), (2532, 1170, (980, 452)), (300, 200, (378, 378)), (480, 640, (480, 640))]
)
def test_within_two_levels_of_torchvision(height: int, width: int, size: tuple[int, int]) -> None:
    smooth = np.array(Image.fromarray(noise(height // 8, width // 8)).resize((width, height), Image.Resampling.BICUBIC))
    for array in (noise(height, width), smooth):
        ours = Idefics2ImageProcessor(match="torchvision")([array])["pixel_values"][0, 0]
        off = (ours - torchvision_pixels(array, size)).abs() * 127.5
        assert ours.shape == (3, *size)
        assert off.max() <= 2.001
        assert off.mean() < 0.02


def test_normalised_as_torchvision_does() -> None:
    """To the bit, where nothing is resized: half of the bytes come out otherwise than with Pillow's backend."""
    every = np.arange(378 * 378 * 3, dtype=np.int64).astype(np.uint8).reshape(378, 378, 3)
    ours = Idefics2ImageProcessor(match="torchvision")([every], return_tensors="pt")["pixel_values"][0, 0]
    assert torch.equal(ours, torchvision_pixels(every, (378, 378)))
    pil = Idefics2ImageProcessor()([every], return_tensors="pt")["pixel_values"][0, 0]
    assert 0 < (ours - pil).abs().max() < 6e-8


def test_torchvision_answers_in_tensors() -> None:
    processor = Idefics2ImageProcessor(match="torchvision")
    padded = processor(RAGGED)
    assert all(isinstance(values, Tensor) for values in padded.values())
    assert isinstance(processor(RAGGED, do_pad=False)["pixel_values"][0][1], Tensor)
    assert isinstance(processor(RAGGED, return_tensors="np")["pixel_values"], np.ndarray)
    assert processor(RAGGED, device="meta", return_tensors="pt")["pixel_values"].device.type == "meta"


def test_torchvision_with_other_settings() -> None:
    array = noise(378, 378)
    pixels = torch.from_numpy(array).permute(2, 0, 1)
    processor = Idefics2ImageProcessor(match="torchvision")
    scaled = processor([array], do_normalize=False)["pixel_values"][0, 0]
    assert torch.equal(scaled, pixels * (1 / 255))
    moved = processor([array], do_rescale=False, image_mean=[1.0, 2.0, 3.0], image_std=[4.0, 5.0, 6.0])["pixel_values"][0, 0]
    assert torch.equal(moved, (pixels.float() - torch.tensor([1.0, 2, 3])[:, None, None]) / torch.tensor([4.0, 5, 6])[:, None, None])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resample": 3}, "resample = .*3.* is not supported with match='torchvision'"),
        ({"do_rescale": False, "do_normalize": False}, "do_rescale = False together with do_normalize = False is not supported"),
        ({"match": "opencv"}, "match is 'opencv', expected one of 'pil', 'torchvision'"),
    ],
)
def test_what_the_torchvision_mode_does_not_do_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Idefics2ImageProcessor()([photo()], **{"match": "torchvision"} | settings)


def test_floats_are_refused_in_the_torchvision_mode() -> None:
    with pytest.raises(ValueError, match=r"image 1, float32 of shape \[3, 50, 60\], is not supported with match='torchvision'"):
        Idefics2ImageProcessor(match="torchvision")([noise(50, 60), noise(50, 60).astype(np.float32) / 255])


# --- as a part of transformers ---


def test_inside_transformers_processor(tmp_path: Path) -> None:
    """The chat processor takes it for its own, saves it, and any transformers loads the files."""
    write_processor(tmp_path)
    theirs = AutoProcessor.from_pretrained(tmp_path)
    ours = Idefics2Processor(Idefics2ImageProcessor(), theirs.tokenizer, image_seq_len=64, chat_template=theirs.chat_template)
    prompt = {"text": ["<image> What is this?"], "images": [[photo()]], "return_tensors": "pt"}
    expected = theirs(**prompt)
    for processor in (ours, (ours.save_pretrained(tmp_path / "again"), AutoProcessor.from_pretrained(tmp_path / "again"))[1]):
        actual = processor(**prompt)
        assert set(actual) == set(expected)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_saved_and_loaded(tmp_path: Path) -> None:
    Idefics2ImageProcessor(match="torchvision", do_image_splitting=True).save_pretrained(tmp_path)
    loaded = Idefics2ImageProcessor.from_pretrained(tmp_path)
    assert (loaded.match, loaded.do_image_splitting) == ("torchvision", True)
    assert Idefics2ImageProcessorPil.from_pretrained(tmp_path).do_image_splitting


def test_pickled() -> None:
    """As a data loader's worker receives it."""
    again = pickle.loads(pickle.dumps(Idefics2ImageProcessor(do_image_splitting=True)))
    assert again.do_image_splitting
    assert isinstance(again, Idefics2ImageProcessorPil)


# --- bad input ---


def truncated(folder: Path) -> str:
    stream = io.BytesIO()
    photo().save(stream, "JPEG")
    (folder / "short.jpg").write_bytes(stream.getvalue()[:20000])
    return str(folder / "short.jpg")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (truncated, "truncated"),
        (lambda _: "no/such/file.jpg", "Incorrect image source"),
        (lambda _: None, "only a single or a list of entries is supported"),
    ],
)
def test_a_bad_file_is_named_by_its_index(source: Any, message: str, tmp_path: Path) -> None:
    path = saved(tmp_path, photo())
    with pytest.raises(ValueError, match=f"^image 2: .*{message}"):
        Idefics2ImageProcessor()([[path, path], [source(tmp_path)], [path]])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("La", (50, 60)), "La"),
        (noise(50, 60, 2), "channel"),
        (photo(1, 500), "1x500 pixels .* cannot be split in four"),
        (photo(500, 1), "500x1 pixels .* cannot be split in four"),
    ],
)
def test_a_bad_image_is_named_by_its_index(image: Any, message: str) -> None:
    """transformers divides by zero for a row, and gives black crops for a column."""
    with pytest.raises(ValueError, match=f"^image 1: .*{message}"):
        Idefics2ImageProcessor(do_image_splitting=True)([[photo()], [image]])


@pytest.mark.parametrize("images", [[], [[]], [[], []]])
def test_no_image(images: Any) -> None:
    with pytest.raises(ValueError, match="image"):
        Idefics2ImageProcessor()(images)


@pytest.mark.parametrize("match", ["pil", "torchvision"])
def test_a_size_without_its_sides(match: str) -> None:
    with pytest.raises(ValueError, match="expected shortest_edge and longest_edge, or height and width"):
        Idefics2ImageProcessor(match=match)([photo()], size={"longest_edge": 300})
