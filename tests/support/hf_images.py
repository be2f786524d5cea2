"""Hugging Face's PIL image processor as the reference for packed patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def hf_patches(images: Sequence[Any], *, split: bool = False, **settings: Any) -> Tensor:
    """float32 [P, 588]: the full patches of Idefics2ImageProcessorPil's pixel values, in the order in which a Conv2d reads a patch."""
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    processor = Idefics2ImageProcessorPil(do_image_splitting=split, do_pad=False, **settings)
    unfolded = []
    for pixels in processor([list(images)])["pixel_values"][0]:
        _, height, width = pixels.shape
        full = torch.from_numpy(np.ascontiguousarray(pixels))[None, :, : height // 14 * 14, : width // 14 * 14]
        unfolded.append(F.unfold(full, 14, stride=14)[0].T)
    return torch.cat(unfolded)
