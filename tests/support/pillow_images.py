"""The resize and the patches by Pillow and NumPy, step by step, and NumPy's model of Pillow's resize for either order of its passes."""

from __future__ import annotations

import numpy as np
from PIL import Image

from idefics2_fast.images import PATCH_DIM, PATCH_SIZE, Crop, plan_crops


def pillow_patches(image: Image.Image, *, split: bool = False, shortest_edge: int = 378, longest_edge: int = 980) -> np.ndarray:
    """uint8 [P, 588] of an RGB image, each crop resized by Pillow and then cut."""
    crops = plan_crops(image.height, image.width, split=split, shortest_edge=shortest_edge, longest_edge=longest_edge)
    return np.concatenate([crop_patches(image, crop) for crop in crops])


def crop_patches(image: Image.Image, crop: Crop) -> np.ndarray:
    top, left, height, width = crop.box
    part = image if image.size == (width, height) else image.crop((left, top, left + width, top + height))
    if crop.size != (height, width):
        part = part.resize(crop.size[::-1], Image.Resampling.BILINEAR)
    return cut(np.asarray(part), crop.grid)


def cut(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """uint8 [rows * columns, 588]: the full patches of [H, W, 3]."""
    rows, columns = grid
    pixels = pixels[: rows * PATCH_SIZE, : columns * PATCH_SIZE]
    return pixels.reshape(rows, PATCH_SIZE, columns, PATCH_SIZE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, PATCH_DIM)


def numpy_resize(pixels: np.ndarray, size: tuple[int, int], order: str) -> np.ndarray:
    """uint8 [H, W, C] resized as Pillow's C code does it; `order` as in `_C.pack_patches`."""
    fewer_rows, fewer_columns = pixels.shape[0] - size[0], pixels.shape[1] - size[1]
    rows_first = order == "shrinking-first" and fewer_rows > 0 and fewer_rows > 2 * fewer_columns
    for axis in (0, 1) if rows_first else (1, 0):
        pixels = one_pass(pixels, size[axis], axis)
    return pixels


def one_pass(pixels: np.ndarray, length: int, axis: int) -> np.ndarray:
    if pixels.shape[axis] == length:
        return pixels
    lines = np.moveaxis(pixels, axis, 0).astype(np.int64)
    scale = len(lines) / length
    support = max(scale, 1.0)
    made = []
    for i in range(length):
        center = (i + 0.5) * scale
        first, end = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), len(lines))
        weights = [max(1.0 - abs((at - center + 0.5) * (1.0 / support)), 0.0) for at in range(first, end)]
        total = sum(weights)
        whole = [int(0.5 + weight / total * (1 << 22)) for weight in weights]
        made.append((np.tensordot(np.array(whole), lines[first:end], 1) + (1 << 21)) >> 22)
    return np.moveaxis(np.minimum(np.stack(made), 255).astype(np.uint8), 0, axis)
