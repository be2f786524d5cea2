"""Images to patches: decoded, cut, resized and packed without padding, to the bit as Hugging Face's Idefics2ImageProcessorPil does it.

Planning (sizes alone) and pixels are apart: `plan_crops` says what becomes of an image of some size, `_patches` carries it out.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from idefics2_fast import _C
from idefics2_fast.kernels.segments import Segments

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray

PATCH_SIZE = 14
PATCH_DIM = 3 * PATCH_SIZE * PATCH_SIZE
MAX_PIXELS = 178_000_000
DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)

# Each byte's value after Hugging Face's steps: x / 255 in float64, rounded to float32, minus 0.5, over 0.5.
NORMALISED = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)


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


def plan_crops(height: int, width: int, *, split: bool, shortest_edge: int, longest_edge: int) -> list[Crop]:
    """What becomes of an image of a size: the whole, or, for a split, top left, top right, bottom left, bottom right, then the whole.

    Raises:
        ValueError: an empty image, one too small to be split, edges that do not go together.
    """
    crops = []
    for box in _C.crop_boxes(height, width, split):
        size = _C.output_size(box[2], box[3], shortest_edge, longest_edge)
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
) -> PackedImages:
    """Packs images of any sizes. The longer side is cut to `longest_edge`, then each side is raised to `shortest_edge`.

    Files (paths and bytes) are turned upright by their EXIF orientation; PIL images and arrays are taken as they are. Transparency is
    laid on white; grey, palette, CMYK and other modes become RGB as Pillow converts them; 16-bit and float modes are clipped to 0..255.

    Args:
        images: paths, the bytes of files, PIL images, or uint8 arrays [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (channels last, always).
        split: give each image as its four quarters and then the whole.
        dtype: uint8 for the bytes themselves; float32, bfloat16 or float16 for values normalised to -1..1.
        positions_per_side: side of the vision tower's position table. An image may have more patches on a side.
        position_ids: formula of the positions: "transformers-5", or "transformers-4.40" as when the released model was trained.
        max_pixels: larger images are refused before they are decoded. Pillow's own limit, 178.9 million, holds beside it for files.

    Raises:
        ValueError: an image that cannot be read or used, named by its index; other arguments out of range. Nothing is returned in part.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if isinstance(images, ImageSource):
        raise ValueError(f"images is one {type(images).__name__}, expected a list of images")
    crops, patches = [], [np.empty((0, PATCH_DIM), np.uint8)]
    for index, source in enumerate(images):
        try:
            image = _read_rgb(source, max_pixels)
            planned = plan_crops(image.height, image.width, split=split, shortest_edge=shortest_edge, longest_edge=longest_edge)
        except ValueError as error:
            raise ValueError(f"image {index}: {error}") from error
        crops += planned
        patches += [_patches(image, crop) for crop in planned]
    packed = np.concatenate(patches)
    positions = [_C.grid_positions(*crop.grid, positions_per_side, position_ids) for crop in crops]
    return PackedImages(
        patches=torch.from_numpy(packed if dtype == torch.uint8 else NORMALISED[packed]).to(dtype),
        patch_positions=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *positions])),
        images=Segments.of_lengths(rows * columns for rows, columns in (crop.grid for crop in crops)),
        grids=torch.tensor([crop.grid for crop in crops], dtype=torch.int64).view(-1, 2),
    )


def _patches(image: Image.Image, crop: Crop) -> np.ndarray:
    """uint8 [rows * columns, 588]: a crop of an RGB image, resized and cut into patches."""
    top, left, height, width = crop.box
    part = image if image.size == (width, height) else image.crop((left, top, left + width, top + height))
    if crop.size != (height, width):
        part = part.resize(crop.size[::-1], Image.Resampling.BILINEAR)
    rows, columns = crop.grid
    pixels = np.asarray(part)[: rows * PATCH_SIZE, : columns * PATCH_SIZE]
    return pixels.reshape(rows, PATCH_SIZE, columns, PATCH_SIZE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, PATCH_DIM)


def _read_rgb(source: ImageSource, max_pixels: int) -> Image.Image:
    if isinstance(source, np.ndarray):
        return _rgb_of_array(source, max_pixels)
    if isinstance(source, Image.Image):
        file, name = None, "the PIL image"
    elif isinstance(source, bytes):
        file, name = io.BytesIO(source), f"the file of {len(source)} bytes"
    elif isinstance(source, str | os.PathLike):
        file, name = _existing(os.fspath(source)), str(source)
    else:
        raise ValueError(f"a {type(source).__name__} is not an image: expected a path, bytes, a PIL image or a uint8 array")
    try:
        return _rgb(source, max_pixels) if file is None else _decode_rgb(file, max_pixels)
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image in any format that Pillow reads") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is over Pillow's own limit (PIL.Image.MAX_IMAGE_PIXELS): {error}") from error
    except ValueError:
        raise
    except Exception as error:  # a damaged file makes Pillow's many decoders raise almost anything
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def _existing(path: str) -> str:
    if path.startswith(("http://", "https://")):
        raise ValueError(f"{path} is not downloaded: expected a local file, or the bytes of one")
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}")
    return path


def _decode_rgb(file: str | io.BytesIO, max_pixels: int) -> Image.Image:
    with Image.open(file) as image:
        _require_pixels(image.height, image.width, max_pixels)
        ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image, max_pixels)


def _rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    """Hugging Face's `convert_to_rgb`."""
    _require_pixels(image.height, image.width, max_pixels)
    if image.mode == "F" and np.isnan(np.asarray(image)).any():
        raise ValueError("the image has NaN pixels, expected numbers")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _rgb_of_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    if array.dtype != np.uint8:
        nan = " with NaN pixels" if np.issubdtype(array.dtype, np.floating) and np.isnan(array).any() else ""
        raise ValueError(f"the array is {array.dtype}{nan}, expected uint8 with values 0 to 255")
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ValueError(f"the array has shape {list(array.shape)}, expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]: channels last")
    _require_pixels(*array.shape[:2], max_pixels)
    if array.shape[2:] == (4,):  # Hugging Face's formula for arrays; Pillow's differs in the last bit
        alpha = array[..., 3:] / 255
        array = np.round(alpha * array[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return Image.fromarray(array.squeeze(2) if array.shape[2:] == (1,) else array).convert("RGB")


def _require_pixels(height: int, width: int, max_pixels: int) -> None:
    if not 1 <= height * width <= max_pixels:
        raise ValueError(f"the image has {height}x{width} pixels (height x width), expected 1 to {max_pixels} in all (max_pixels)")
