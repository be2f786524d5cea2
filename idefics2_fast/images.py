"""Images to patches: decoded, cut, resized and packed without padding, to the bit as Hugging Face's Idefics2ImageProcessorPil does it.

Planning (sizes alone) and pixels are apart: `plan_crops` says what becomes of an image of some size, `_C.pack_patches` carries it out.
A batch is planned from the files' headers. Then each image is decoded, resized and written into the one buffer by one of several threads.
"""

from __future__ import annotations

import functools
import io
import math
import os
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from idefics2_fast import _C
from idefics2_fast.image_limits import (
    DEFAULT_LIMITS,
    MAX_PIXELS,
    ImageLimits,
    check_headers,
    require_exif,
    require_file_bytes,
    require_memory,
    require_size,
)
from idefics2_fast.kernels.segments import Segments

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray

PATCH_SIZE = 14
PATCH_DIM = 3 * PATCH_SIZE * PATCH_SIZE
MAX_UPSCALE = 1000.0
PIXELS_AT_ONCE = 1 << 18  # of steps that make copies
DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)

# Each byte's value after Hugging Face's steps: x / 255 in float64, rounded to float32, minus 0.5, over 0.5.
NORMALISED = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)

# Which pass of a resize Pillow does first: see PassOrder in csrc/resample.hpp. The order shows in the last bit.
PASS_ORDER = "shrinking-first" if int(PIL.__version__.split(".")[0]) >= 13 else "horizontal-first"

# EXIF orientations that exchange height and width.
TURNED = (5, 6, 7, 8)
# A PNG's orientation may stand behind its pixels: it is looked for only where one of these names occurs in the file.
PNG_ORIENTATION_NAMES = (b"eXIf", b"exif", b"xmp", b"XMP")

T = TypeVar("T")


@dataclass(frozen=True)
class PackedImages:
    """I images of P patches in all, one after another. A split image counts as five.

    Attributes:
        patches: [P, 588]; the values of a patch in Conv2d's order (channel, row, column), the patches of an image row by row.
        patch_positions: int64 [P], rows of the vision tower's position table.
        images: I segments over the P patches.
        grids: int64 [I, 2], rows and columns of patches.
    """

    patches: Tensor
    patch_positions: Tensor
    images: Segments
    grids: Tensor

    @property
    def image_offsets(self) -> Tensor:
        """int32 [I + 1]."""
        return self.images.offsets


class BufferRing:
    """Memory for `pack_images(out=...)` that is used again in turn: new pages cost more than the arithmetic. Page-locked where there is
    CUDA, for copies to the card that run beside the next batch's preparation."""

    def __init__(self, slots: int = 2) -> None:
        """A batch stays until `slots` more have been packed."""
        if slots < 1:
            raise ValueError(f"slots is {slots}, expected 1 or more")
        self._slots = [torch.empty(0, dtype=torch.uint8)] * slots

    def next(self, patches: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """[patches, 588] with any contents, in the memory of the oldest batch, or in new memory where that is too small."""
        size = patches * PATCH_DIM * dtype.itemsize
        memory = self._slots.pop(0)
        if memory.numel() < size:
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._slots.append(memory)
        return memory[:size].view(dtype).view(patches, PATCH_DIM)


@dataclass(frozen=True)
class Crop:
    """A part of an image that the vision tower sees as one image, in sizes alone.

    Attributes:
        box: (top, left, height, width) in the source image.
        size: (height, width) after resizing.
        grid: (rows, columns) of full patches; what is left over at the bottom and the right is dropped.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    grid: tuple[int, int]


def plan_crops(height: int, width: int, *, split: bool, shortest_edge: int, longest_edge: int, upscale: float = 1.0) -> list[Crop]:
    """What becomes of an image of a size: the whole, or, for a split, top left, top right, bottom left, bottom right, then the whole.

    Args:
        upscale: factor of both sides before the size rule, as training draws it; fractions of pixels are dropped.

    Raises:
        ValueError: an empty image, one too small to be split, edges that do not go together, a factor out of range.
    """
    if not 1.0 <= upscale <= MAX_UPSCALE:
        raise ValueError(f"the factor of up-scaling is {upscale}, expected 1 to {MAX_UPSCALE:g}")
    crops = []
    for box in _C.crop_boxes(height, width, split):
        size = _C.output_size(int(box[2] * upscale), int(box[3] * upscale), shortest_edge, longest_edge)
        crops.append(Crop(box, size, _C.patch_grid(*size, PATCH_SIZE)))
    return crops


def pack_images(
    images: Sequence[ImageSource],
    *,
    split: bool = False,
    dtype: torch.dtype = torch.uint8,
    shortest_edge: int = 378,
    longest_edge: int = 980,
    positions_per_side: int = 70,
    position_ids: str = "transformers-5",
    max_pixels: int = MAX_PIXELS,
    limits: ImageLimits = DEFAULT_LIMITS,
    upscale: Sequence[float] | None = None,
    out: Tensor | np.ndarray | BufferRing | None = None,
    threads: int | None = None,
) -> PackedImages:
    """Packs images of any sizes. The longer side is cut to `longest_edge`, then each side is raised to `shortest_edge`.

    Files (paths and bytes) are turned upright by their EXIF orientation; PIL images and arrays are taken as they are. Transparency is
    laid on white; grey, palette, CMYK and other modes become RGB as Pillow converts them; 16-bit and float modes are clipped to 0..255.
    Python's lock is released over the pixels: an image or array must not be changed by another thread meanwhile. One PIL image may stand
    in several places of a batch and be packed by several threads at once. `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is heeded, with a warning.

    Args:
        images: paths, the bytes of files, PIL images, or uint8 arrays [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (channels last, always).
        split: give each image as its four quarters and then the whole.
        dtype: uint8 for the bytes themselves; float32, bfloat16 or float16 for values normalised to -1..1.
        positions_per_side: side of the vision tower's position table. An image may have more patches on a side.
        position_ids: formula of the positions: "transformers-5", or "transformers-4.40" as when the released model was trained.
        max_pixels: larger images are refused before they are decoded. Pillow's own limit, 178.9 million, holds beside it for files.
        limits: what an image may cost beside that, and the formats that are read.
        upscale: a factor for each image, 1 or more, by which both sides grow before the rule above; it is all one resize.
        out: contiguous [at least P, 588] of `dtype` on the CPU, to be written to: `patches` is its beginning. After an error its
            contents are undefined. Or a `BufferRing`, which has room for any batch.
        threads: how many to use; `set_num_threads` sets what is used otherwise.

    Raises:
        ValueError: an image that cannot be read or used, named by its index; other arguments out of range. Nothing is returned in part.
    """
    factors = _check_arguments(images, dtype, upscale, threads)
    threads = threads or _C.num_threads()
    workers = max(1, min(threads, len(images)))
    has_files = any(isinstance(image, str | bytes | os.PathLike) for image in images)
    opened = _each_image(lambda index: _open(images[index], max_pixels, limits), len(images), workers if has_files else 1)
    rules = split, shortest_edge, longest_edge, positions_per_side, position_ids
    plans = _each_image(lambda index: _plan(*opened[index].size, float(factors[index]), *rules), len(images))
    ends = list(accumulate(len(plan.positions) for plan in plans))
    patches = _buffer(out, ends, dtype)
    in_bytes = patches.view(torch.uint8).numpy() if dtype == torch.bfloat16 else patches.numpy().view(np.uint8)

    written: list[int] = []

    def write(index: int) -> None:
        part = in_bytes[(0, *ends)[index] : ends[index]]
        pixels = opened[index].read()
        if pixels.shape[:2] != opened[index].size:
            raise ValueError(f"the file announces {opened[index].size} pixels (height, width) and holds {pixels.shape[:2]}")
        busy = min(workers, len(images) - len(written))  # threads with images of their own; the others help here
        _C.pack_patches(pixels, plans[index].crops, part, _table(dtype), PASS_ORDER, 1 + threads - busy)
        written.append(index)

    largest_first = sorted(range(len(images)), key=lambda index: -math.prod(opened[index].size))
    _each_image(write, len(images), workers, largest_first)
    grids = np.concatenate([np.empty((0, 2), np.int64), *(plan.grids for plan in plans)])
    bounds = tuple(accumulate((length for plan in plans for length in plan.lengths), initial=0))
    return PackedImages(
        patches=patches,
        patch_positions=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *(plan.positions for plan in plans)])),
        images=Segments(torch.from_numpy(np.array(bounds, np.int32)), bounds),
        grids=torch.from_numpy(grids),
    )


class _Plan(NamedTuple):
    """Crops of an image of some size: boxes and sizes as `_C` takes them, grids, numbers of patches, all patches' positions."""

    crops: list[tuple[tuple[int, int, int, int], tuple[int, int]]]
    grids: np.ndarray
    lengths: tuple[int, ...]
    positions: np.ndarray


@functools.lru_cache(maxsize=256)
def _plan(
    height: int,
    width: int,
    upscale: float,
    split: bool,
    shortest_edge: int,
    longest_edge: int,
    positions_per_side: int,
    position_ids: str,
) -> _Plan:
    crops = plan_crops(height, width, split=split, shortest_edge=shortest_edge, longest_edge=longest_edge, upscale=upscale)
    positions = [_C.grid_positions(*crop.grid, positions_per_side, position_ids) for crop in crops]
    grids = np.array([crop.grid for crop in crops], np.int64)
    lengths = tuple(map(len, positions))
    return _Plan([(crop.box, crop.size) for crop in crops], grids, lengths, np.concatenate(positions))


def image_size(source: ImageSource, max_pixels: int, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(height, width) of an image as `pack_images` will read it, upright; of most files from their headers alone.

    Raises:
        ValueError: not an image, or one that is over a limit.
    """
    return _open(source, max_pixels, limits).size


def set_num_threads(threads: int) -> None:
    """How many threads `pack_images` uses where it is not told: by default the CPUs that this process may run on."""
    if not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads is {threads!r}, expected 1 or more")
    _C.set_num_threads(threads)


def _check_arguments(images: Any, dtype: torch.dtype, upscale: Sequence[float] | None, threads: int | None) -> Sequence[float]:
    """The factor of up-scaling of each image."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if not isinstance(images, list) and isinstance(images, ImageSource):
        raise ValueError(f"images is one {type(images).__name__}, expected a list of images")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads is {threads!r}, expected 1 or more, or None")
    if upscale is None:
        return [1.0] * len(images)
    if len(upscale) != len(images):
        raise ValueError(f"upscale has {len(upscale)} factors for {len(images)} images, expected one for each")
    return upscale


def _each_image(work: Callable[[int], T], count: int, workers: int = 1, order: Sequence[int] | None = None) -> list[T]:
    """work(0) .. work(count - 1) on some threads, begun in an order. Of the images that fail, the first is named."""

    def named(index: int) -> T:
        try:
            return work(index)
        except ValueError as error:
            raise ValueError(f"image {index}: {error}") from error

    if workers == 1:
        return [named(index) for index in range(count)]
    with ThreadPoolExecutor(workers) as executor:
        futures = {index: executor.submit(named, index) for index in order or range(count)}
        try:
            return [futures[index].result() for index in range(count)]
        finally:
            executor.shutdown(cancel_futures=True)


def _buffer(out: Tensor | np.ndarray | BufferRing | None, ends: Sequence[int], dtype: torch.dtype) -> Tensor:
    """[P, 588] for images whose patches end at `ends`: new, the ring's next, or the beginning of the caller's."""
    total = ends[-1] if ends else 0
    if out is None:
        return torch.empty(total, PATCH_DIM, dtype=dtype)
    if isinstance(out, BufferRing):
        return out.next(total, dtype)
    if isinstance(out, np.ndarray):
        if not out.flags.writeable:
            raise ValueError("out is read-only, expected memory that can be written to")
        if not out.flags.c_contiguous:
            raise ValueError(f"out has strides {out.strides}, expected a contiguous array")
        out = torch.from_numpy(out)
    if not isinstance(out, Tensor):
        raise ValueError(f"out is a {type(out).__name__}, expected a Tensor or an array")
    if out.dtype != dtype or out.ndim != 2 or out.shape[1] != PATCH_DIM or out.device.type != "cpu" or out.requires_grad:
        found = f"{out.dtype} {list(out.shape)} on {out.device}" + (" with gradients" if out.requires_grad else "")
        raise ValueError(f"out is {found}, expected {dtype} [P, {PATCH_DIM}] on the CPU, without gradients")
    if not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()}, expected a contiguous tensor")
    over = next((index for index, end in enumerate(ends) if end > out.shape[0]), None)
    if over is not None:
        raise ValueError(f"image {over}: out has room for {out.shape[0]} patches, expected {ends[over]} up to here and {total} in all")
    return out[:total]


@functools.cache
def _table(dtype: torch.dtype) -> np.ndarray | None:
    """Each byte's value as `_C` takes it; None for the bytes themselves."""
    return None if dtype == torch.uint8 else torch.from_numpy(NORMALISED).to(dtype).view(torch.uint8).numpy()


@dataclass(frozen=True)
class _Opened:
    """An image of which the size is known: (height, width) as it will be read. `read` decodes: uint8 [H, W, 3 or 4], the first 3 RGB."""

    size: tuple[int, int]
    read: Callable[[], np.ndarray]


def _open(source: ImageSource, max_pixels: int, limits: ImageLimits) -> _Opened:
    if isinstance(source, np.ndarray):
        _check_array(source, max_pixels, limits)
        return _Opened(source.shape[:2], lambda: _pixels_of_array(source))
    if isinstance(source, Image.Image):
        return _open_pillow(source, max_pixels, limits)
    if isinstance(source, bytes):
        return _open_file(source, f"the file of {len(source)} bytes", max_pixels, limits)
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        return _open_file(_bytes_of(path, limits), path, max_pixels, limits)
    raise ValueError(f"a {type(source).__name__} is not an image: expected a path, bytes, a PIL image or a uint8 array")


def _open_pillow(image: Image.Image, max_pixels: int, limits: ImageLimits) -> _Opened:
    require_size(image.height, image.width, max_pixels, limits)
    with _decoding_errors_name("the PIL image"), _alone(image):
        data = _undecoded(image, limits)
        if data is not None:
            if image.format not in (*limits.formats, "MPO"):
                raise ValueError(_refusal(str(image.format), limits))
            check_headers(data, max_pixels, limits)
        require_memory(image, data, limits, max_pixels)
        return _Opened((image.height, image.width), lambda: decode(image, "the PIL image"))


def _undecoded(image: Image.Image, limits: ImageLimits) -> bytes | None:
    """The file of an image that is opened and not yet decoded; None of one whose pixels are in memory.

    Raises:
        ValueError: its file is closed.
    """
    file = getattr(image, "fp", None)
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return None
    if file is None or file.closed:
        raise ValueError("the PIL image cannot be decoded: its file was closed first, expected an open one, or image.load() before")
    place = file.tell()
    try:
        require_file_bytes(file.seek(0, os.SEEK_END), "its file", limits)
        file.seek(0)
        return file.read()
    finally:
        file.seek(place)


def _open_file(data: bytes, name: str, max_pixels: int, limits: ImageLimits) -> _Opened:
    require_file_bytes(len(data), name, limits)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        _warn_of_truncated_images()
    with _decoding_errors_name(name):
        check_headers(data, max_pixels, limits)
        image = _identified(data, name, limits)
        require_memory(image, data, limits, max_pixels)
        require_exif(image)
        if image.format in ("JPEG", "MPO", "WEBP"):
            turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
        elif image.format == "PNG" and not any(mark in data for mark in PNG_ORIENTATION_NAMES):
            turned = False
        else:  # other formats show their orientation, and some their size, only when they are decoded
            _turn_upright(image)
            require_size(image.height, image.width, max_pixels, limits)
            turned = False

    def read() -> np.ndarray:
        with _decoding_errors_name(name):
            _turn_upright(image)
        return decode(image, name)

    return _Opened((image.width, image.height) if turned else (image.height, image.width), read)


def _turn_upright(image: Image.Image) -> None:
    """Turns an image by its EXIF, which may stand behind its pixels."""
    image.load()
    require_exif(image)
    ImageOps.exif_transpose(image, in_place=True)


def _identified(data: bytes, name: str, limits: ImageLimits) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=limits.formats)
    except UnidentifiedImageError:
        other = _other_format(data, limits)
        if other:
            raise ValueError(f"{name}: {_refusal(other, limits)}") from None
        raise


def _other_format(data: bytes, limits: ImageLimits) -> str:
    """The format of a file that only another of Pillow's readers would take; "" where none would."""
    for name in Image.OPEN.keys() - {*limits.formats}:
        accepts = Image.OPEN[name][1]
        with suppress(IndexError, struct.error):  # a file shorter than what the reader looks at
            if accepts and accepts(data[:16]) is True:
                return name
    return ""


def _refusal(format: str, limits: ImageLimits) -> str:
    return f"the format is {format}, expected one of {', '.join(limits.formats)} (ImageLimits.formats)"


@functools.cache
def _warn_of_truncated_images() -> None:
    warnings.warn(
        "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: files that are cut short are taken, the rest of their pixels grey or black",
        stacklevel=2,
    )


# Pillow decodes an image where it is first used, by seeking and reading: one thread at a time may do so with an image, or with a file
# that several images share. Of each that is in use: its lock, and how many hold it or wait. By id: who waits keeps the object alive.
_in_use: dict[int, tuple[threading.RLock, list[None]]] = {}
_in_use_lock = threading.Lock()


@contextmanager
def _alone(image: Image.Image) -> Iterator[None]:
    """Within it no other thread is here with the same image, or with one of the same file."""
    with _holding(image), _holding(getattr(image, "fp", None) or getattr(image, "_fp", None)):
        yield


@contextmanager
def _holding(thing: object) -> Iterator[None]:
    if thing is None:
        yield
        return
    with _in_use_lock:
        lock, users = _in_use.setdefault(id(thing), (threading.RLock(), []))
        users.append(None)
    try:
        with lock:
            yield
    finally:
        with _in_use_lock:
            users.pop()
            if not users:
                del _in_use[id(thing)]


@contextmanager
def _decoding_errors_name(name: str) -> Iterator[None]:
    try:
        with one_block():
            yield
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image in any format that Pillow reads") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is over Pillow's own limit (PIL.Image.MAX_IMAGE_PIXELS): {error}") from error
    except ValueError:
        raise
    except Exception as error:  # a damaged file makes Pillow's many decoders raise almost anything
        raise ValueError(f"{name} cannot be decoded: {str(error) or type(error).__name__}") from error


def _forget_other_threads() -> None:
    """In a forked child, where the threads that held these locks do not exist."""
    global _in_use_lock, _block_lock, _block_users
    _in_use.clear()
    _in_use_lock, _block_lock = threading.Lock(), threading.Lock()
    if _block_users:
        Image.core.set_use_block_allocator(_block_before)
    _block_users = 0


os.register_at_fork(after_in_child=_forget_other_threads)

_block_lock = threading.Lock()
_block_users = 0
_block_before = 0


@contextmanager
def one_block() -> Iterator[None]:
    """Within it Pillow makes images in one piece, which alone can be read where they lie. Larger ones than 16 MiB would be in several."""
    global _block_users, _block_before
    if not hasattr(Image.core, "set_use_block_allocator"):
        yield
        return
    with _block_lock:
        if _block_users == 0:
            _block_before = Image.core.get_use_block_allocator()
            Image.core.set_use_block_allocator(1)
        _block_users += 1
    try:
        yield
    finally:
        with _block_lock:
            _block_users -= 1
            if _block_users == 0:
                Image.core.set_use_block_allocator(_block_before)


def decode(image: Image.Image, name: str) -> np.ndarray:
    """uint8 [H, W, 3 or 4], the first three RGB; of an RGB image, where Pillow allows it, a read-only view.

    Raises:
        ValueError: an image that cannot be decoded, by its name.
    """
    with _decoding_errors_name(name), _alone(image):
        image = _rgb(image)
        try:
            _, array = image.__arrow_c_array__()
        except (AttributeError, ValueError):  # a Pillow before 11.2.1, or an image in several pieces
            return np.asarray(image)
        return _C.arrow_pixels(array, image.height, image.width)


def _rgb(image: Image.Image) -> Image.Image:
    """Hugging Face's `convert_to_rgb`. An RGB image is given back itself."""
    if image.mode == "F" and np.isnan(np.asarray(image)).any():
        raise ValueError("the image has NaN pixels, expected numbers")
    image.load()
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """RGB; some rows at once, for each step makes a copy."""
    rows = max(1, PIXELS_AT_ONCE // image.width)
    flat = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        part = Image.alpha_composite(Image.new("RGBA", part.size, "white"), part)
        flat.paste(part.convert("RGB"), (0, top))
    return flat


def _bytes_of(path: str, limits: ImageLimits) -> bytes:
    if path.startswith(("http://", "https://")):
        raise ValueError(f"{path} is not downloaded: expected a local file, or the bytes of one")
    try:
        found = os.stat(path)
    except OSError:
        raise ValueError(f"there is no file {path}") from None
    if stat.S_ISDIR(found.st_mode):
        raise ValueError(f"there is no file {path}: it is a folder")
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, a device never end
        raise ValueError(f"{path} is no regular file")
    require_file_bytes(found.st_size, path, limits)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _check_array(array: np.ndarray, max_pixels: int, limits: ImageLimits) -> None:
    if array.dtype != np.uint8:
        nan = " with NaN pixels" if np.issubdtype(array.dtype, np.floating) and np.isnan(array).any() else ""
        raise ValueError(f"the array is {array.dtype}{nan}, expected uint8 with values 0 to 255")
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ValueError(f"the array has shape {list(array.shape)}, expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]: channels last")
    require_size(*array.shape[:2], max_pixels, limits)


def _pixels_of_array(array: np.ndarray) -> np.ndarray:
    if array.shape[2:] in ((), (1,)):
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    if array.shape[2] == 4:
        return _array_on_white(array)
    rows_are_whole = array.strides[2] == 1 and array.strides[1] == 3
    return array if rows_are_whole else np.array(array, order="C")


def _array_on_white(array: np.ndarray) -> np.ndarray:
    """By Hugging Face's formula for arrays, in double: Pillow's differs in the last bit. Some rows at once."""
    flat = np.empty((*array.shape[:2], 3), np.uint8)
    rows = max(1, PIXELS_AT_ONCE // array.shape[1])
    for top in range(0, len(array), rows):
        part = array[top : top + rows]
        alpha = part[..., 3:] / 255
        flat[top : top + rows] = np.round(alpha * part[..., :3] + (1 - alpha) * 255)
    return flat
