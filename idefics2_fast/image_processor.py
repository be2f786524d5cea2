"""A drop-in for transformers' Idefics2 image processor: its signature, its outputs, this engine's pixels.

`Idefics2ImageProcessor` is a subclass of transformers' `Idefics2ImageProcessorPil`. It is made when it is first asked for: importing this
module does not import transformers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from idefics2_fast import _C
from idefics2_fast.images import PASS_ORDER, decode, one_block

BILINEAR = Image.Resampling.BILINEAR
ORDERS = {"pil": PASS_ORDER, "torchvision": "horizontal-first"}  # of a resize's passes, and the names of the matches


def __getattr__(name: str) -> type:
    if name == "Idefics2ImageProcessor":
        return _processor_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _processor_class() -> type:
    from transformers.image_processing_utils import BatchFeature
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorKwargs, Idefics2ImageProcessorPil

    class Kwargs(Idefics2ImageProcessorKwargs, total=False):
        match: str

    class Idefics2ImageProcessor(Idefics2ImageProcessorPil):
        """As transformers' Idefics2 image processors, with one setting more.

        `match="pil"` gives the bits of `Idefics2ImageProcessorPil`. What the C++ path does not do (a filter other than bilinear, arrays
        of other numbers than bytes, images left with one or four channels, bytes left as they are) is left to that class.

        `match="torchvision"` gives torch tensors and normalises as the `Idefics2ImageProcessor` of transformers, whose own resizing
        differs from Pillow's by up to 2 of 255 levels. What the C++ path does not do is refused.

        Raises:
            ValueError: an image that cannot be read, used or split, named by its index in the batch; another `match`.
        """

        valid_kwargs = Kwargs
        match = "pil"

        def to_dict(self) -> dict[str, Any]:
            """As transformers' class; `match` where it is not the default."""
            return {name: value for name, value in super().to_dict().items() if (name, value) != ("match", "pil")}

        def fetch_images(self, images: Any) -> Any:
            with one_block(), ThreadPoolExecutor(_C.num_threads()) as threads:
                return _map(Future.result, _map(threads.submit, _calls(super().fetch_images, images)))

        def _prepare_image_like_inputs(self, images: Any, *args: Any, expected_ndims: int = 3, **settings: Any) -> list[list[np.ndarray]]:
            samples = self._prepare_images_structure(images, expected_ndims=expected_ndims)
            return _map(operator.call, _calls(lambda image: self.process_image(image, *args, **settings), samples))

        def process_image(self, image: Any, do_convert_rgb: bool | None = None, **settings: Any) -> np.ndarray:
            """[3, H, W]; of an opened image, where Pillow allows it, a view."""
            if do_convert_rgb and isinstance(image, Image.Image):
                return decode(image, "the PIL image")[..., :3].transpose(2, 0, 1)
            return super().process_image(image, do_convert_rgb=do_convert_rgb, **settings)

        def _preprocess(self, images: list[list[np.ndarray]], *, match: str, return_tensors: Any, **settings: Any) -> BatchFeature:
            if match not in ORDERS:
                raise ValueError(f"match is {match!r}, expected one of {', '.join(map(repr, ORDERS))}")
            obstacle = _obstacle(images, **settings)
            if obstacle and match == "pil":
                return super()._preprocess(images, return_tensors=return_tensors, **settings)
            if obstacle:
                raise ValueError(f"{obstacle} is not supported with match='torchvision'")
            table = _pil_table(self, **settings) if match == "pil" else _torchvision_table(**settings)
            write = partial(_write, table=table, pass_order=ORDERS[match])
            data = _planes(images, write, as_one=return_tensors == "pt", **settings)
            if match == "pil":
                return BatchFeature(data, tensor_type=return_tensors)
            return BatchFeature(_as_tensors(data, settings["device"]), tensor_type=return_tensors)

    Idefics2ImageProcessor.__qualname__ = "Idefics2ImageProcessor"  # where a pickle of an instance, as data loaders make them, finds it
    return Idefics2ImageProcessor


def _obstacle(images: list[list[np.ndarray]], *, do_resize: bool, resample: Any, do_rescale: bool, do_normalize: bool, **_: Any) -> str:
    """What of a batch the C++ path does not do; "" where it does everything."""
    if do_resize and resample not in (None, BILINEAR):
        return f"resample = {resample!r}"
    if not do_rescale and not do_normalize:
        return "do_rescale = False together with do_normalize = False"
    for index, image in enumerate(image for sample in images for image in sample):
        if image.dtype != np.uint8 or image.ndim != 3 or len(image) != 3:
            return f"image {index}, {image.dtype} of shape {list(image.shape)},"
    return ""


def _pil_table(
    processor: Any, *, do_rescale: bool, rescale_factor: float, do_normalize: bool, image_mean: Any, image_std: Any, **_: Any
) -> np.ndarray:
    """float32 [3, 256]: what transformers' own steps make of each byte in each channel."""
    values = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    if do_rescale:
        values = processor.rescale(values, rescale_factor)
    if do_normalize:
        values = processor.normalize(values, image_mean, image_std)
    return np.ascontiguousarray(values[:, 0], np.float32)


def _torchvision_table(
    *, do_rescale: bool, rescale_factor: float, do_normalize: bool, image_mean: Any, image_std: Any, **_: Any
) -> np.ndarray:
    """As `_pil_table`, by the formula of TorchvisionBackend: mean and deviation take the scale, in float32."""
    values = torch.arange(256).expand(3, -1)
    if not do_normalize:
        return (values.to(torch.uint8) * rescale_factor).numpy()
    mean, std = (torch.tensor(np.broadcast_to(value, 3).tolist())[:, None] for value in (image_mean, image_std))
    scale = 1.0 / rescale_factor if do_rescale else 1.0
    return (values.float() - mean * scale).div(std * scale).numpy()


class Part(NamedTuple):
    """One image of the answer: a box (top, left, height, width) of a source [H, W, 3 or 4], and its (height, width) there."""

    source: np.ndarray
    box: tuple[int, int, int, int]
    size: tuple[int, int]


Write = Callable[[Part, np.ndarray], None]  # resizes and normalises a part into float32 [3, height, width]


def _planes(
    images: list[list[np.ndarray]],
    write: Write,
    *,
    as_one: bool,
    do_resize: bool,
    size: Any,
    do_pad: bool,
    do_image_splitting: bool,
    **_: Any,
) -> dict[str, Any]:
    """The data of the processor's answer. Without padding a list of arrays for each sample, or one array where all are of one size."""

    def parts(image: np.ndarray) -> list[Part]:
        boxes = _C.crop_boxes(*image.shape[1:], do_image_splitting)
        pixels = _rows_of_pixels(image)
        return [Part(pixels, box, _size_of(box[2:], size) if do_resize else box[2:]) for box in boxes]

    samples = [[part for image in sample for part in image] for sample in _map(operator.call, _calls(parts, images))]
    if not any(samples):
        raise ValueError("images holds no image, expected one at least")
    if do_pad:
        return _padded(samples, write)
    values = [[_alone(part, write) for part in sample] for sample in samples]
    return {"pixel_values": np.asarray(values) if as_one else values}


def _size_of(image: tuple[int, int], size: Any) -> tuple[int, int]:
    if size.shortest_edge and size.longest_edge:
        return _C.output_size(*image, size.shortest_edge, size.longest_edge)
    if size.height and size.width:
        return size.height, size.width
    raise ValueError(f"size is {dict(size)}, expected shortest_edge and longest_edge, or height and width")


def _padded(samples: list[list[Part]], write: Write) -> dict[str, np.ndarray]:
    """pixel_values [B, N, 3, H, W], zero where a sample has fewer images or an image is smaller, and their mask."""
    height, width = (max(part.size[side] for sample in samples for part in sample) for side in (0, 1))
    shape = (len(samples), max(map(len, samples)))
    values = np.zeros((*shape, 3, height, width), np.float32)
    mask = np.zeros((*shape, height, width), np.int64)
    for i, sample in enumerate(samples):
        for j, part in enumerate(sample):
            rows, columns = part.size
            write(part, values[i, j, :, :rows, :columns])
            mask[i, j, :rows, :columns] = 1
    return {"pixel_values": values, "pixel_attention_mask": mask}


def _alone(part: Part, write: Write) -> np.ndarray:
    values = np.empty((3, *part.size), np.float32)
    write(part, values)
    return values


def _write(part: Part, out: np.ndarray, *, table: np.ndarray, pass_order: str) -> None:
    _C.resize_planes(part.source, (part.box, part.size), out, table, pass_order)


def _rows_of_pixels(image: np.ndarray) -> np.ndarray:
    """[H, W, 3 or 4], the same memory where it holds pixel after pixel. A view of the first three of four channels is widened."""
    pixels, whole = image.transpose(1, 2, 0), image.base
    if isinstance(whole, np.ndarray) and (whole.dtype, whole.shape) == (np.uint8, (*pixels.shape[:2], 4)):
        same = whole.ctypes.data == pixels.ctypes.data and whole.strides == pixels.strides
        if same and whole.strides[1:] == (4, 1):
            return whole
    return pixels if pixels.strides[1:] == (3, 1) else np.array(pixels, order="C")


def _as_tensors(data: dict[str, Any], device: Any) -> dict[str, Any]:
    return {name: _map(lambda array: torch.from_numpy(array).to(device or "cpu"), values) for name, values in data.items()}


def _map(function: Callable[[Any], Any], nested: Any) -> Any:
    """The same lists and tuples, as lists, of the function's answers."""
    return [_map(function, item) for item in nested] if isinstance(nested, list | tuple) else function(nested)


def _calls(function: Callable[[Any], Any], images: Any) -> Any:
    """In the same lists a call of the function for each image, whose errors name the image by its index."""
    index = count()
    return _map(lambda image: partial(_named, next(index), function, image), images)


def _named(index: int, function: Callable[[Any], Any], image: Any) -> Any:
    try:
        return function(image)
    except Exception as error:  # a damaged file makes Pillow's many decoders raise almost anything
        raise ValueError(f"image {index}: {error}") from error
