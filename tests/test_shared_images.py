"""One opened PIL image in several places: of a batch, of several batches on threads, or with other images of its file."""

import functools
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.memory import survives

from idefics2_fast import images, pack_images
from idefics2_fast.image_processor import Idefics2ImageProcessor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "MPO", "AVIF", "JPEG2000")
TIMES = 3


def noise(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC).convert(mode)


@functools.cache
def encoded(format: str, frames: int = 1, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    several = {"save_all": True, "append_images": [noise(i, mode) for i in range(1, frames)]}
    noise(0, mode).save(stream, format, **(several if frames > 1 else {}))
    return stream.getvalue()


def opened(data: bytes, frame: int = 0) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.seek(frame)
    return image


def alone(image: Image.Image) -> torch.Tensor:
    """The patches of an image that is decoded before anything else sees it."""
    return pack_images([np.asarray(image.convert("RGB"))]).patches


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_in_several_places_of_a_batch(format: str) -> None:
    data = encoded(format)
    expected = alone(opened(data)).repeat(6, 1)
    for _ in range(TIMES):
        image = opened(data)
        assert torch.equal(pack_images([image] * 6, threads=4).patches, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_in_batches_of_several_threads(format: str) -> None:
    data = encoded(format)
    expected = alone(opened(data))
    with ThreadPoolExecutor(6) as threads:
        for _ in range(TIMES):
            image = opened(data)
            made = [threads.submit(pack_images, [image], threads=1) for _ in range(6)]
            assert all(torch.equal(batch.result().patches, expected) for batch in made)


@pytest.mark.parametrize("mode", ["P", "LA", "RGBA", "CMYK", "F", "1"])
def test_an_image_in_memory_in_several_threads(mode: str) -> None:
    """A palette is handed to Pillow's core where it is first used, and others are converted."""
    image = noise(0, mode)
    expected = pack_images([image.copy()]).patches
    with ThreadPoolExecutor(4) as threads:
        made = [threads.submit(pack_images, [image, image], threads=2) for _ in range(8)]
        assert all(torch.equal(each.result().patches, expected.repeat(2, 1)) for each in made)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG", "MPO", "AVIF"])
def test_the_frame_that_was_sought(format: str) -> None:
    data = encoded(format, frames=3)
    expected = alone(opened(data, frame=2))
    assert not torch.equal(expected, alone(opened(data)))
    for _ in range(TIMES):
        image = opened(data, frame=2)
        assert torch.equal(pack_images([image] * 4, threads=4).patches, expected.repeat(4, 1))
        assert image.tell() == 2


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "GIF"])
def test_images_that_share_a_file(format: str, tmp_path: Path) -> None:
    """Each seeks and reads where the other does."""
    (tmp_path / "photo").write_bytes(encoded(format))
    expected = alone(opened(encoded(format)))
    for _ in range(TIMES):
        with open(tmp_path / "photo", "rb") as file:
            several = [Image.open(file) for _ in range(4)]
            assert torch.equal(pack_images(several, threads=4).patches, expected.repeat(4, 1))


def test_an_image_of_a_path_in_several_threads(tmp_path: Path) -> None:
    (tmp_path / "photo.webp").write_bytes(encoded("WEBP"))
    expected = alone(opened(encoded("WEBP")))
    with ThreadPoolExecutor(6) as threads:
        for _ in range(TIMES):
            with Image.open(tmp_path / "photo.webp") as image:
                made = [threads.submit(pack_images, [image] * 2, threads=2) for _ in range(4)]
                assert all(torch.equal(each.result().patches[: len(expected)], expected) for each in made)


def test_an_image_whose_file_is_closed(tmp_path: Path) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as unread:
        pass
    with pytest.raises(ValueError, match="image 0: the PIL image cannot be decoded: its file was closed first, expected an open one"):
        pack_images([unread])
    with Image.open(tmp_path / "a.png") as read:
        read.load()
    assert len(pack_images([read]).patches)


def test_an_array_in_several_places() -> None:
    array = np.asarray(noise(0, "RGBA"))
    expected = pack_images([array.copy()]).patches
    assert torch.equal(pack_images([array] * 5, threads=4).patches, expected.repeat(5, 1))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG"])
def test_an_image_in_several_threads_of_the_image_processor(format: str) -> None:
    data = encoded(format)
    processor = Idefics2ImageProcessor()

    def values(image: Image.Image) -> torch.Tensor:
        return processor([[image, image]], return_tensors="pt")["pixel_values"]

    expected = values(opened(data).copy())
    with ThreadPoolExecutor(4) as threads:
        image = opened(data)
        made = [threads.submit(values, image) for _ in range(4)]
        assert all(torch.equal(each.result(), expected) for each in made)


def test_a_bad_image_in_several_places_is_named_each_time() -> None:
    image = opened(encoded("JPEG")[:4000])
    for _ in range(2):
        with pytest.raises(ValueError, match="^image 0: the PIL image cannot be decoded: .*truncated"):
            pack_images([image] * 3, threads=3)


def test_locks_are_not_inherited_by_a_fork() -> None:
    """A child made while a thread decodes has no thread that would open its lock."""
    image = opened(encoded("PNG"))

    def pack(image: Image.Image) -> Callable[[], None]:
        return lambda: pack_images([image], threads=1)

    with images._alone(image), images.one_block(), images._in_use_lock, images._block_lock, ThreadPoolExecutor(1) as thread:
        assert thread.submit(survives, pack(image), seconds=20).result()
    assert not images._in_use
