"""The C++ resize and packing: every set of inner loops, bit for bit against Pillow, Hugging Face and NumPy; memory that is not theirs."""

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.hf_images import hf_patches
from support.memory import Guarded, survives
from support.pillow_images import cut, numpy_resize, pillow_patches

from idefics2_fast import _C, pack_images
from idefics2_fast.images import NORMALISED, PASS_ORDER, plan_crops

PATHS = _C.simd_paths()
ORDERS = ["horizontal-first", "shrinking-first"]
SAME = np.repeat(np.arange(256, dtype=np.float32)[None], 3, axis=0)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.simd()
    _C.use_simd(request.param)
    yield request.param
    _C.use_simd(before)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, channels), dtype=np.uint8)


def resize(pixels: np.ndarray, size: tuple[int, int], order: str = PASS_ORDER, threads: int = 1) -> np.ndarray:
    """uint8 [height, width, 3]."""
    out = np.full((3, *size), -1, np.float32)
    _C.resize_planes(pixels, ((0, 0, *pixels.shape[:2]), size), out, SAME, order, threads)
    return out.transpose(1, 2, 0).astype(np.uint8)


def pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels[..., :3])).resize(size[::-1], Image.Resampling.BILINEAR))


# --- the resize, to the bit ---

SIZES = {
    "many taps, wide": ((30, 20000), (378, 980)),
    "many taps, high": ((20000, 30), (980, 378)),
    "hundreds of taps in few pixels": ((700, 800), (3, 2)),
    "just smaller": ((981, 982), (980, 981)),
    "half": ((400, 600), (200, 300)),
    "a quarter": ((400, 600), (100, 150)),
    "windows of five": ((408, 816), (200, 400)),
    "up from one pixel": ((1, 1), (378, 378)),
    "up from two": ((2, 3), (378, 380)),
    "one row": ((1, 5000), (378, 980)),
    "one column": ((5000, 1), (980, 378)),
    "rows alone": ((500, 378), (378, 378)),
    "columns alone": ((378, 500), (378, 378)),
    "nothing": ((37, 53), (37, 53)),
    "down in one way and up in the other": ((2000, 200), (980, 378)),
    "page of a telephone": ((2532, 1170), (980, 452)),
    "to one pixel": ((50, 60), (1, 1)),
}


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("name", SIZES)
def test_resize_equals_pillow(name: str, channels: int, path: str) -> None:
    size, to = SIZES[name]
    pixels = noise(*size, channels)
    np.testing.assert_array_equal(resize(pixels, to), pillow(pixels, to))


@pytest.mark.parametrize("channels", [3, 4])
def test_every_width_around_the_vectors_ends_equals_pillow(channels: int, path: str) -> None:
    """Where the loops change from whole vectors to what is left over."""
    for width in range(1, 200):
        for to in ((5, 37), (7, width)):
            pixels = noise(9, width, channels)
            np.testing.assert_array_equal(resize(pixels, to), pillow(pixels, to), err_msg=str(width))


def test_random_resizes_equal_pillow(path: str) -> None:
    draw = np.random.default_rng(7)
    for most in (8, 40, 200, 700):
        for _ in range(12):
            height, width, new_height, new_width = draw.integers(1, most, 4).tolist()
            pixels = noise(height, width, int(draw.integers(3, 5)))
            np.testing.assert_array_equal(
                resize(pixels, (new_height, new_width)), pillow(pixels, (new_height, new_width)), err_msg=f"{height}x{width}"
            )


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_a_plain_colour_stays(value: int, path: str) -> None:
    """Rounded weights that do not add up to one, or a sum that is cut and not rounded, would change it."""
    for size, to in ((700, 900), (378, 490)), ((5, 6), (378, 380)), ((900, 40), (80, 378)):
        assert (resize(np.full((*size, 3), value, np.uint8), to) == value).all()


def test_black_beside_white(path: str) -> None:
    """The largest sums, and rounding between the passes that a wider intermediate would not have."""
    pixels = (noise(333, 444) // 128 * 255).astype(np.uint8)
    for to in ((378, 400), (100, 130), (378, 100)):
        np.testing.assert_array_equal(resize(pixels, to), pillow(pixels, to))


def test_the_fourth_channel_changes_nothing(path: str) -> None:
    for size, to in ((50, 70), (40, 90)), ((50, 70), (50, 90)), ((50, 70), (40, 70)), ((2000, 20), (100, 30)), ((28, 42), (28, 42)):
        pixels = noise(*size, 4)
        other = pixels.copy()
        other[..., 3] = 255 - other[..., 3]
        np.testing.assert_array_equal(resize(pixels, to), resize(other, to))


# --- the order of the passes ---


ORDER_SIZES = [
    ((633, 292), (245, 113)),
    ((200, 40), (98, 60)),
    ((300, 190), (100, 91)),  # 200 rows less, and twice 99 columns
    ((300, 190), (100, 90)),  # twice 100: the border
    ((300, 190), (100, 89)),
    ((100, 300), (101, 100)),
]


@pytest.mark.parametrize(("size", "to"), ORDER_SIZES)
def test_either_order_of_the_passes(size: tuple[int, int], to: tuple[int, int], path: str) -> None:
    """Around the border of Pillow's rule, against a model in NumPy, for a Pillow that is not installed too."""
    pixels = noise(*size, 4)
    for order in ORDERS:
        np.testing.assert_array_equal(resize(pixels, to, order), numpy_resize(pixels[..., :3], to, order))
    np.testing.assert_array_equal(resize(pixels, to), pillow(pixels, to))


def test_the_order_is_the_installed_pillows() -> None:
    pixels, to = noise(200, 40), (98, 60)
    first, second = (numpy_resize(pixels, to, order) for order in ORDERS)
    assert (first != second).mean() > 0.1
    np.testing.assert_array_equal(numpy_resize(pixels, to, PASS_ORDER), pillow(pixels, to))


# --- patches ---


@cache
def expected_patches(size: tuple[int, int], split: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Hugging Face's patches of `noise(*size)`, normalised and as bytes; no path of ours changes them."""
    image = Image.fromarray(noise(*size))
    return hf_patches([image], split=split), torch.from_numpy(pillow_patches(image, split=split))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "size",
    [(735, 980), (692, 555), (480, 640), pytest.param((2532, 1170), marks=pytest.mark.slow), (979, 981), (30, 3000), (3, 2), (1400, 300)],
    ids=str,
)
def test_patches_equal_hugging_face_on_every_path(size: tuple[int, int], split: bool, path: str) -> None:
    pixels = noise(*size)
    as_pillow = Image.fromarray(pixels)  # 4 bytes a pixel
    expected, as_bytes = expected_patches(size, split)
    for source in (pixels, as_pillow):
        assert torch.equal(pack_images([source], split=split, dtype=torch.float32).patches, expected)
        assert torch.equal(pack_images([source], split=split, dtype=torch.bfloat16).patches, expected.to(torch.bfloat16))
    assert torch.equal(pack_images([pixels], split=split).patches, as_bytes)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
def test_all_bytes_in_all_places_of_a_patch(dtype: torch.dtype, channels: int, path: str) -> None:
    """Each byte at least once in each lane of a vector, against a table."""
    pixels = (np.arange(14 * 3)[:, None, None] * 5 + np.arange(14 * 150)[:, None] + np.arange(channels) * 77).astype(np.uint8)
    out = torch.zeros(3 * 150, 588, dtype=dtype)
    table = None if dtype == torch.uint8 else torch.from_numpy(NORMALISED).to(dtype).view(torch.uint8).numpy()
    _C.pack_patches(pixels, [((0, 0, 42, 2100), (42, 2100))], out.view(torch.uint8).numpy(), table, PASS_ORDER)
    expected = torch.from_numpy(cut(pixels[..., :3], (3, 150)))
    assert torch.equal(out, expected if table is None else torch.from_numpy(NORMALISED).to(dtype)[expected.long()])
    assert expected.unique().numel() == 256


@pytest.mark.parametrize("width", [1, 2, 4])
def test_any_table_of_values(width: int, path: str) -> None:
    """Tables that are almost the usual ones must not be taken for them."""
    table = np.random.default_rng(width).integers(0, 256, (256, width), dtype=np.uint8)
    if width == 4:
        table = NORMALISED.copy().view(np.uint8).reshape(256, 4)
        table[255] = table[0]
    pixels = noise(30, 45)
    out = np.zeros((6, 588 * width), np.uint8)
    _C.pack_patches(pixels, [((0, 0, 30, 45), (30, 45))], out, table.ravel(), PASS_ORDER)
    np.testing.assert_array_equal(out.reshape(6, 588, width), table[cut(pixels, (2, 3))])


def check_random_sizes(count: int, most: int, seed: int) -> None:
    """Small sides more often than large ones, all scales alike; a split needs sides of two pixels."""
    draw = np.random.default_rng(seed)
    for index in range(count):
        split = bool(draw.integers(2))
        size = np.exp(draw.uniform(np.log(1 + split), np.log(most), 2)).astype(int).tolist()
        pixels = noise(*size, seed=seed)
        expected = hf_patches([Image.fromarray(pixels)], split=split)
        for path in PATHS:
            _C.use_simd(path)
            for source in (pixels, Image.fromarray(pixels)):
                for dtype in (torch.float32, torch.bfloat16):
                    ours = pack_images([source], split=split, dtype=dtype).patches
                    assert torch.equal(ours, expected.to(dtype)), (index, size, split, path, dtype)
    _C.use_simd(PATHS[0])


def test_random_sizes_equal_hugging_face() -> None:
    check_random_sizes(10, 700, seed=1)


@pytest.mark.slow
def test_more_and_larger_random_sizes_equal_hugging_face() -> None:
    check_random_sizes(150, 6000, seed=2)


# --- memory ---


@pytest.mark.parametrize("channels", [3, 4])
def test_no_byte_past_the_source_is_read(channels: int, path: str) -> None:
    """The pixels end where a page begins that cannot be read, and begin where one ends."""

    def work() -> None:
        for width in (*range(1, 70), 127, 128, 129, 200):
            for height, to in ((3, (28, 42)), (3, (3, 15)), (17, (14, 14)), (14, (14, max(14, width))), (40, (14, 2 * width + 14))):
                for at_end in (True, False):
                    with Guarded(height * width * channels, at_end) as source:
                        pixels = source.array.reshape(height, width, channels)
                        pixels[:] = noise(height, width, channels)
                        for order in ORDERS:
                            resize(pixels, to, order)
                            if min(to) >= 14:
                                pack(pixels, to, order)

    assert survives(work)


def pack(pixels: np.ndarray, to: tuple[int, int], order: str, out: np.ndarray | None = None, table: np.ndarray | None = None) -> None:
    if out is None:
        out = np.zeros(((to[0] // 14) * (to[1] // 14), 588), np.uint8)
    _C.pack_patches(pixels, [((0, 0, *pixels.shape[:2]), to)], out, table, order, 1)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_no_byte_past_the_output_is_written(width: int, path: str) -> None:
    """The buffer ends, and begins, where a page is that cannot be written."""
    tables = {1: None, 2: torch.from_numpy(NORMALISED).bfloat16().view(torch.uint8).numpy(), 4: NORMALISED.view(np.uint8)}
    random = np.random.default_rng(0).integers(0, 256, 256 * width, dtype=np.uint8)

    def work() -> None:
        for size, to in ((40, 50), (28, 42)), ((28, 42), (28, 42)), ((28, 50), (28, 45)), ((2, 2), (17, 15)), ((90, 9), (30, 14)):
            for channels in (3, 4):
                for at_end in (True, False):
                    patches = (to[0] // 14) * (to[1] // 14)
                    with Guarded(patches * 588 * width, at_end) as out:
                        for table in (tables[width], random):
                            pack(noise(*size, channels), to, PASS_ORDER, out.array.reshape(patches, 588 * width), table)

    assert survives(work)


def test_a_patch_does_not_touch_its_neighbours(path: str) -> None:
    """Two images into one buffer, the second first: the first one's last patch must leave the second's alone, and the other way round."""
    for width, table in ((1, None), (2, torch.from_numpy(NORMALISED).bfloat16().view(torch.uint8).numpy()), (4, NORMALISED.view(np.uint8))):
        pixels, to = noise(100, 120), (33, 47)
        alone = np.zeros((6, 588 * width), np.uint8)
        pack(pixels, to, PASS_ORDER, alone, table)
        buffer = np.full((18, 588 * width), 0xA5, np.uint8)
        pack(pixels, to, PASS_ORDER, buffer[6:12], table)
        assert (buffer[:6] == 0xA5).all()
        assert (buffer[12:] == 0xA5).all()
        np.testing.assert_array_equal(buffer[6:12], alone)


def test_planes_with_any_strides(path: str) -> None:
    """Into part of a padded tensor, whose other values stay."""
    padded = np.full((3, 60, 80), -1, np.float32)
    pixels = noise(70, 90)
    _C.resize_planes(pixels, ((0, 0, 70, 90), (45, 50)), padded[:, :45, :50], SAME, PASS_ORDER)
    np.testing.assert_array_equal(padded[:, :45, :50].transpose(1, 2, 0), pillow(pixels, (45, 50)))
    assert (padded[:, 45:] == -1).all()
    assert (padded[:, :, 50:] == -1).all()


def test_planes_have_a_table_for_each_channel(path: str) -> None:
    table = np.random.default_rng(0).random((3, 256), dtype=np.float32)
    pixels = noise(20, 30, 4)
    out = np.zeros((3, 20, 30), np.float32)
    _C.resize_planes(pixels, ((0, 0, 20, 30), (20, 30)), out, table, PASS_ORDER)
    np.testing.assert_array_equal(out, np.stack([table[c][pixels[..., c]] for c in range(3)]))


@pytest.mark.parametrize(
    "view", [lambda a: a[::-1], lambda a: a[::3], lambda a: a[:, 5:70], lambda a: a[7:8], lambda a: a[:, :1], lambda a: a[::-2, 3:44]]
)
def test_rows_any_distance_apart(view: Callable[[np.ndarray], np.ndarray], path: str) -> None:
    for channels in (3, 4):
        pixels = view(noise(90, 80, channels))
        np.testing.assert_array_equal(resize(pixels, (30, 41)), pillow(pixels, (30, 41)))


def test_crops_equal_copies(path: str) -> None:
    """A crop's pixels must not be mixed with those beside it."""
    pixels = noise(120, 130)
    out = np.zeros((3, 40, 45), np.float32)
    for top, left, height, width in ((0, 0, 60, 65), (60, 65, 60, 65), (5, 7, 100, 3), (119, 129, 1, 1)):
        _C.resize_planes(pixels, ((top, left, height, width), (40, 45)), out, SAME, PASS_ORDER)
        np.testing.assert_array_equal(out.transpose(1, 2, 0), pillow(pixels[top : top + height, left : left + width], (40, 45)))


def test_more_than_two_gigabytes_apart() -> None:
    """Offsets of 32 bits would wrap around."""
    stride = 3 << 28
    with mmap.mmap(-1, 3 * stride + 300) as memory:
        buffer = np.frombuffer(memory, np.uint8)
        pixels = np.lib.stride_tricks.as_strided(buffer, (4, 100, 3), (stride, 3, 1))
        expected = noise(4, 100)
        pixels[:] = expected
        try:
            for path in PATHS:
                _C.use_simd(path)
                np.testing.assert_array_equal(resize(pixels, (28, 42)), pillow(expected, (28, 42)))
        finally:
            _C.use_simd(PATHS[0])
            del buffer, pixels


# --- choice of the inner loops ---


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("name", PATHS)
def test_the_environment_chooses_the_loops(name: str) -> None:
    child = run_python("from idefics2_fast import _C; print(_C.simd())", IDEFICS2_FAST_SIMD=name)
    assert child.stdout.strip() == name, child.stderr


def test_unknown_loops_are_refused() -> None:
    child = run_python("from idefics2_fast import _C; _C.simd()", IDEFICS2_FAST_SIMD="mmx")
    assert "ValueError: IDEFICS2_FAST_SIMD is 'mmx', expected one that this CPU runs: '" in child.stderr
    with pytest.raises(ValueError, match="simd is 'neon', expected one that this CPU runs: .*'scalar'"):
        _C.use_simd("neon")


def test_the_best_loops_are_taken_unasked() -> None:
    child = run_python("from idefics2_fast import _C; print(_C.simd(), _C.simd_paths())", IDEFICS2_FAST_SIMD="")
    assert child.stdout.strip() == f"{PATHS[0]} {PATHS}", child.stderr
    assert PATHS[-2:] == ["scalar", "vnni-portable"]


# --- bad input ---

BOX = ((0, 0, 28, 28), (28, 28))


def out_of(patches: int = 4, width: int = 588) -> np.ndarray:
    return np.zeros((patches, width), np.uint8)


@pytest.mark.parametrize(
    ("pixels", "crops", "out", "table", "message"),
    [
        (noise(28, 28)[..., 0], [BOX], out_of(), None, r"shape \[H, W, 3\] or \[H, W, 4\]"),
        (noise(28, 28, 2), [BOX], out_of(), None, r"shape \[H, W, 3\] or \[H, W, 4\]"),
        (noise(0, 28), [BOX], out_of(), None, "one pixel at least"),
        (noise(28, 56)[:, ::2], [BOX], out_of(), None, "each row's pixels must lie one after another"),
        (noise(28, 28)[..., ::-1], [BOX], out_of(), None, "each row's pixels must lie one after another"),
        (noise(28, 28), [((1, 0, 28, 28), (28, 28))], out_of(), None, r"crop of 28x28 at \(1, 0\) does not lie within .* 28x28"),
        (noise(28, 28), [((0, -1, 28, 28), (28, 28))], out_of(), None, "does not lie within"),
        (noise(28, 28), [((0, 0, 0, 28), (28, 28))], out_of(), None, "crop of 0x28"),
        (noise(28, 28), [((0, 0, 2**62, 28), (28, 28))], out_of(), None, "does not lie within"),
        (noise(28, 28), [((0, 0, 28, 28), (0, 28))], out_of(), None, "resize to is 0x28, expected 1x1 at least"),
        (noise(28, 28), [((0, 0, 28, 28), (13, 28))], out_of(), None, "13x28 pixels .* no full patch"),
        (noise(28, 28), [BOX, BOX], out_of(), None, "out has 4 patches, expected 8"),
        (noise(28, 28), [BOX], out_of(5), None, "out has 5 patches, expected 4"),
        (noise(28, 28), [BOX], out_of(4, 587), None, "588 values"),
        (noise(28, 28), [BOX], out_of(4, 588 * 3), None, "588 values"),
        (noise(28, 28), [BOX], out_of(8)[::2], None, "out must be contiguous"),
        (noise(28, 28), [BOX], out_of(4, 1176), None, "table must be 256 values as wide"),
        (noise(28, 28), [BOX], out_of(), np.zeros(512, np.uint8), "table must be 256 values as wide"),
    ],
)
def test_bad_values_are_named_and_nothing_is_written(pixels: Any, crops: Any, out: np.ndarray, table: Any, message: str, path: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.pack_patches(pixels, crops, out, table, PASS_ORDER)
    assert not out.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pass_order": "any"}, "pass_order is 'any', expected 'horizontal-first'"), ({"threads": 0}, "threads must be 1 or more")],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.pack_patches(noise(28, 28), [BOX], out_of(), None, **{"pass_order": PASS_ORDER, **options})


def test_a_read_only_buffer_is_refused() -> None:
    out = out_of()
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only|not writeable"):
        _C.pack_patches(noise(28, 28), [BOX], out, None, PASS_ORDER)
    assert not out.any()


@pytest.mark.parametrize("dtype", [np.int8, np.float32, np.uint16])
def test_other_dtypes_are_not_converted(dtype: type) -> None:
    """A converted copy of `out` would be written to and lost."""
    for pixels, out in ((noise(28, 28).astype(dtype), out_of()), (noise(28, 28), out_of().astype(dtype))):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            _C.pack_patches(pixels, [BOX], out, None, PASS_ORDER)


# --- planning ---


def test_a_plan_needs_no_pixels() -> None:
    crops = plan_crops(100_000, 80_000, split=True, shortest_edge=378, longest_edge=980)
    assert [crop.grid for crop in crops] == [(70, 56)] * 5
