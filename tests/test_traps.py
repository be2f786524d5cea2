"""The known traps of image preparation, numbered. Each is a test here or one elsewhere."""

import ast
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.hf_images import hf_patches
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from idefics2_fast import _C, pack_images
from idefics2_fast.image_processor import Idefics2ImageProcessor
from idefics2_fast.images import NORMALISED

ELSEWHERE = {
    1: "geometry: sizes_that_show_the_rule",
    2: "geometry: sizes_where_an_exact_quotient_is_lost_to_rounding",
    3: "geometry: sizes_that_show_the_rule",
    4: "images: patches_equal_hugging_face",
    5: "resample: either_order_of_the_passes",
    6: "resample: black_beside_white",
    7: "resample: resize_equals_pillow",
    8: "resample: no_byte_past_the_source_is_read",
    9: "image_processor: within_two_levels_of_torchvision",
    11: "images: every_byte_is_normalised_as_hugging_face_does",
    12: "image_processor: settings",
    15: "images: patches_are_in_the_order_of_conv2d",
    17: "resample: no_byte_past_the_output_is_written",
    18: "geometry: positions_are_not_the_exact_quotients",
    19: "geometry: positions_equal_transformers_for_every_length",
    21: "geometry: crops_are_hugging_faces_in_its_order",
    22: "images: an_image_too_thin_to_be_split_is_named_by_its_index",
    24: "images: modes_become_rgb_as_hugging_face_does",
    25: "images: transparency_is_laid_on_white",
    26: "images: sixteen_bits_are_clipped_and_not_scaled",
    27: "images: opaque_files_equal_hugging_face",
    29: "images: arrays_are_never_guessed_to_have_channels_first",
    30: "images: grey_arrays_without_channels",
    31: "images: arrays_equal_hugging_face",
    32: "images: a_bad_image_is_named_by_its_index",
    33: "images: arrays_of_any_memory_layout",
    34: "images: pil_images_are_not_turned",
    37: "resample: more_than_two_gigabytes_apart",
    38: "images: pillow_images_of_several_blocks",
    39: "threads: after_a_fork",
    40: "resample: patches_equal_hugging_face_on_every_path",
    42: "images: out_may_begin_anywhere_in_memory",
}


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_trap_has_a_test() -> None:
    folder = Path(__file__).parent
    here = {int(name.split("_")[2]) for name in functions(Path(__file__)) if name.startswith("test_trap_")}
    assert sorted([*here, *ELSEWHERE]) == list(range(1, 43))
    for place in ELSEWHERE.values():
        room, name = place.split(": ")
        assert f"test_{name}" in functions(folder / f"test_{room}.py"), place


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int, width: int) -> Image.Image:
    """What a photograph's file keeps: noise has no detail left to lose."""
    return Image.fromarray(noise(height // 16 + 1, width // 16 + 1)).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def test_trap_10_files_are_decoded_in_full_size() -> None:
    """A JPEG can be decoded to an eighth of its size in no time (`draft`), a resize can begin with whole-number averages
    (`reducing_gap`): both give other pixels."""
    data = encoded(smooth(2400, 3200), quality=90)
    assert torch.equal(pack_images([data]).patches, pack_images([np.asarray(Image.open(io.BytesIO(data)))]).patches)


def test_trap_10_transparency_goes_before_the_resize() -> None:
    """Resized first, with colours multiplied by their alpha or not, edges come out otherwise."""
    array = noise(700, 1200, 4)
    array[..., 3] = np.where(array[..., 3] < 128, 0, 255)
    image = Image.fromarray(array, "RGBA")
    assert torch.equal(pack_images([image], dtype=torch.float32).patches, hf_patches([image]))


def test_trap_13_no_byte_is_zero_after_normalising() -> None:
    """transformers drops images of nothing but zeros, as padding: none that is normalised can be one. Unnormalised, a black one is."""
    assert np.abs(NORMALISED).min() > 0.003
    assert len(pack_images([np.zeros((378, 378, 3), np.uint8)]).images) == 1


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(3000, 4000, 52, 70), (3508, 2480, 70, 49), (480, 640, 34, 45)])
def test_trap_14_only_full_patches_are_kept(height: int, width: int, rows: int, columns: int) -> None:
    """As transformers counts them since 4.45: in a patch all pixels are real, and not one of them."""
    image = Image.new("RGB", (width, height))
    mask = Idefics2ImageProcessorPil()([image, Image.new("RGB", (980, 980))], return_tensors="pt")["pixel_attention_mask"][0, 0]
    full = mask.unfold(0, 14, 14).unfold(1, 14, 14).sum((-1, -2)) == 14 * 14
    assert pack_images([image]).grids.tolist() == [[rows, columns]]
    assert (full.any(1).sum().item(), full.any(0).sum().item()) == (rows, columns)


def test_trap_16_offsets_start_with_zero_in_32_bits() -> None:
    for images in ([], [noise(50, 60)], [noise(50, 60)] * 2):
        offsets = pack_images(images).image_offsets
        assert offsets.dtype == torch.int32
        assert offsets.tolist() == [729 * n for n in range(len(images) + 1)]


def test_trap_20_positions_do_not_depend_on_torchs_default_dtype() -> None:
    """In bfloat16 transformers gives other positions to a tenth of the patches."""
    expected = pack_images([noise(800, 600)]).patch_positions
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(pack_images([noise(800, 600)]).patch_positions, expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_trap_23_each_crop_follows_the_size_rule() -> None:
    """Quarters of 384 x 512 keep their size; those of 240 x 320 become squares."""
    assert pack_images([noise(768, 1024)], split=True).grids.tolist() == [[27, 36]] * 4 + [[52, 70]]
    assert pack_images([noise(480, 640)], split=True).grids.tolist() == [[27, 27]] * 4 + [[34, 45]]


@pytest.mark.parametrize("channels", [1, 4])
def test_trap_28_without_conversion_to_rgb(channels: int) -> None:
    """The channels stay as many as they are; Pillow's mode is left to transformers, torchvision's is refused."""
    settings = {"do_convert_rgb": False, "image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    array = noise(400, 500, channels)
    ours, expected = (kind(**settings)([array])["pixel_values"] for kind in (Idefics2ImageProcessor, Idefics2ImageProcessorPil))
    assert ours.shape[2] == channels
    assert np.array_equal(ours, expected)
    with pytest.raises(ValueError, match="is not supported with match='torchvision'"):
        Idefics2ImageProcessor(**settings, match="torchvision")([array])


FILES: dict[str, Callable[[], bytes]] = {
    **{
        f"{'progressive' if progressive else 'baseline'}, subsampling {name}": lambda progressive=progressive, subsampling=subsampling: (
            encoded(smooth(601, 799), quality=80, progressive=progressive, subsampling=subsampling)
        )
        for progressive in (False, True)
        for name, subsampling in (("4:4:4", 0), ("4:2:2", 1), ("4:2:0", 2))
    },
    "with a colour profile": lambda: encoded(smooth(601, 799), icc_profile=bytes(1000)),
    "several pictures": lambda: encoded(smooth(601, 799), "MPO", save_all=True, append_images=[smooth(200, 300)]),
    "16 bits": lambda: encoded(Image.fromarray(noise(400, 500, 1)[..., 0].astype(np.uint16) * 3), "PNG"),
    "a palette with a transparent colour": lambda: encoded(smooth(400, 500).quantize(16), "PNG", transparency=3),
    "frames": lambda: encoded(smooth(400, 500), "GIF", save_all=True, append_images=[smooth(400, 500).rotate(90)]),
}


@pytest.mark.parametrize("name", FILES)
def test_trap_35_files_of_all_kinds(name: str) -> None:
    """The first picture, its profile ignored, as transformers takes them."""
    data = FILES[name]()
    assert torch.equal(pack_images([data], dtype=torch.float32).patches, hf_patches([Image.open(io.BytesIO(data))]))


def test_trap_36_jpegs_are_decoded_as_pillow_does() -> None:
    """By Pillow itself: another library, or other switches of the same, rounds otherwise."""
    for quality in (30, 75, 95):
        data = encoded(smooth(500, 700), quality=quality)
        assert torch.equal(pack_images([data]).patches, pack_images([Image.open(io.BytesIO(data))]).patches)


@pytest.mark.parametrize("order", ["horizontal-first", "shrinking-first"])
@pytest.mark.parametrize("path", _C.simd_paths())
def test_trap_41_the_same_bits_on_every_machine(order: str, path: str) -> None:
    """Pillow's own, taken on x86-64: weights computed with fused multiply-adds, as compilers for ARM like to, may be others."""
    draw = np.arange(1000 * 1400 * 3, dtype=np.uint32) * np.uint32(2654435761)
    pixels = (draw >> np.uint32(24)).astype(np.uint8).reshape(1000, 1400, 3)
    digest = hashlib.sha256()
    before = _C.simd()
    _C.use_simd(path)
    try:
        for size in ((378, 401), (980, 981), (1400, 517), (77, 2800)):
            out = np.empty((3, *size), np.float32)
            table = np.broadcast_to(np.arange(256, dtype=np.float32), (3, 256)).copy()
            _C.resize_planes(pixels, ((0, 0, 1000, 1400), size), out, table, order)
            digest.update(out.astype(np.uint8).tobytes())
    finally:
        _C.use_simd(before)
    assert digest.hexdigest()[:16] == {"horizontal-first": "f279eabbe1bdddf3", "shrinking-first": "11580ef847fb3e05"}[order]
