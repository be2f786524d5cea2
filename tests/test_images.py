"""Images to patches, bit for bit against Hugging Face's PIL processor: sizes, modes, files, arrays, and everything that is refused."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from support.hf_images import hf_patches
from support.pillow_images import pillow_patches

from idefics2_fast import _C, images, pack_images

ORIENTATION = 0x0112


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def photo(height: int = 400, width: int = 500, mode: str = "RGB", seed: int = 0) -> Image.Image:
    return Image.fromarray(noise(height, width, seed=seed)).convert(mode)


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def turned(orientation: int, format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(photo(), format, exif=exif)


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.dtype == expected.dtype
    assert torch.equal(ours, expected)


# --- sizes ---

SIZES = [
    (768, 1024),
    (899, 1015),  # 867 rows, not 868: a row of patches less
    (1015, 522),
    (500, 377),  # one axis alone is resized
    (2532, 1170),  # Pillow's vertical pass comes first
    (200, 2000),
    (30, 4000),
    (979, 981),  # odd sides: the crops differ by one
    (980, 980),
    (480, 640),
    (3, 2),
    *np.random.default_rng(1).integers(2, 1400, (6, 2)).tolist(),
]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_equal_hugging_face(size: tuple[int, int], split: bool) -> None:
    """Another resampling, size rule, rounding of the normalisation, order of crops or order within a patch would show in some bit."""
    image = photo(*size)
    assert_same(pack_images([image], split=split, dtype=torch.float32).patches, hf_patches([image], split=split))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_thin_images_work_unsplit(size: tuple[int, int]) -> None:
    assert_same(pack_images([photo(*size)], dtype=torch.float32).patches, hf_patches([photo(*size)]))


def test_black_and_white_edges_stay_within_bytes() -> None:
    """Values that a resize without clipping or rounding between its passes would push over."""
    image = Image.fromarray(np.kron(noise(60, 70) // 128 * 255, np.ones((20, 20, 1), np.uint8)))
    assert_same(pack_images([image], dtype=torch.float32).patches, hf_patches([image]))


def test_other_edges() -> None:
    size = {"shortest_edge": 100, "longest_edge": 384}
    assert_same(pack_images([photo()], dtype=torch.float32, **size).patches, hf_patches([photo()], size=size))


def test_patches_are_in_the_order_of_conv2d() -> None:
    """The patch embedding may treat the convolution's weight as a matrix."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 3, 14, 14, generator=draw, dtype=torch.float64)
    pixels = torch.from_numpy(noise(378, 392)).permute(2, 0, 1).double()[None]
    expected = F.conv2d(pixels, weight, stride=14)[0].flatten(1).T
    ours = pack_images([noise(378, 392)]).patches.double() @ weight.view(8, -1).T
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-9)  # sums of 588 products of up to 255 * 4, in another order


def test_a_batch_is_its_images_one_after_another() -> None:
    images = [photo(400, 500, seed=1), photo(1200, 900, seed=2), photo(50, 60, seed=3)]
    for split in (False, True):
        packed = pack_images(images, split=split)
        alone = [pack_images([image], split=split) for image in images]
        assert torch.equal(packed.patches, torch.cat([one.patches for one in alone]))
        assert torch.equal(packed.patch_positions, torch.cat([one.patch_positions for one in alone]))
        assert torch.equal(packed.grids, torch.cat([one.grids for one in alone]))
        assert packed.images.lengths == [length for one in alone for length in one.images.lengths]


def test_offsets_grids_and_positions() -> None:
    packed = pack_images([photo(3000, 4000), photo(480, 640)])
    assert packed.grids.tolist() == [[52, 70], [34, 45]]  # 735 x 980 loses 7 rows, 480 x 640 loses 4 rows and 10 columns
    assert packed.image_offsets.dtype == torch.int32
    assert packed.image_offsets.tolist() == [0, 3640, 5170]
    assert packed.patches.shape == (5170, 588)
    expected = np.concatenate([_C.grid_positions(52, 70, 70, "transformers-5"), _C.grid_positions(34, 45, 70, "transformers-5")])
    assert_same(packed.patch_positions, torch.from_numpy(expected))


def test_a_split_counts_as_five_images() -> None:
    packed = pack_images([photo(768, 1024)], split=True)
    assert packed.grids.tolist() == [[27, 36]] * 4 + [[52, 70]]


@pytest.mark.parametrize(("side", "rule"), [(27, "transformers-5"), (70, "transformers-4.40")])
def test_the_position_table_and_its_formula_can_be_chosen(side: int, rule: str) -> None:
    packed = pack_images([photo(686, 812)], positions_per_side=side, position_ids=rule)  # 49 x 58 patches, where the formulas differ
    assert packed.patch_positions.tolist() == _C.grid_positions(49, 58, side, rule).tolist()
    assert packed.patch_positions.tolist() != pack_images([photo(686, 812)]).patch_positions.tolist()


def test_no_images() -> None:
    packed = pack_images([])
    assert (packed.patches.shape, packed.patch_positions.shape, packed.grids.shape) == ((0, 588), (0,), (0, 2))
    assert packed.image_offsets.tolist() == [0]


# --- dtypes ---


def test_bytes_are_the_pixels_themselves() -> None:
    pixels = noise(378, 378)
    patches = pack_images([pixels]).patches
    assert patches.dtype == torch.uint8
    assert patches[28].tolist() == pixels[14:28, 14:28].transpose(2, 0, 1).flatten().tolist()  # second row, second column


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_are_rounded_from_float32(dtype: torch.dtype) -> None:
    assert_same(pack_images([photo()], dtype=dtype).patches, hf_patches([photo()]).to(dtype))


def test_every_byte_is_normalised_as_hugging_face_does() -> None:
    """All 256 values; half of them differ from (x - 127.5) / 127.5 in the last bits."""
    pixels = np.arange(378 * 378 * 3, dtype=np.int64).astype(np.uint8).reshape(378, 378, 3)
    ours = pack_images([pixels], dtype=torch.float32).patches
    assert_same(ours, hf_patches([pixels]))
    assert ours.unique().numel() == 256
    assert not torch.equal(ours, (pack_images([pixels]).patches.float() - 127.5) / 127.5)


# --- modes ---


def palette(transparency: int | bytes | None) -> Image.Image:
    image = photo().quantize(16)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(noise(400, 500, 4, seed=5), "RGBA")
    return image if mode == "RGBA" else image.convert(mode)


def sixteen_bits(mode: str) -> Image.Image:
    values = np.random.default_rng(0).choice(np.array([0, 100, 254, 255, 256, 1000, 65535]), (400, 500))
    return {
        "I;16": lambda: Image.fromarray(values.astype(np.uint16)),
        "I": lambda: Image.fromarray(values.astype(np.int32) - 300),
        "F": lambda: Image.fromarray(values.astype(np.float32) / 2 - 5),
    }[mode]()


def keyed(mode: str, key: Any) -> Image.Image:
    image = photo(mode=mode)
    image.info["transparency"] = key
    return image


MODES: dict[str, Callable[[], Image.Image]] = {
    **{mode: lambda mode=mode: photo(mode=mode) for mode in ("1", "L", "CMYK", "YCbCr", "LAB", "HSV", "RGBX")},
    **{mode: lambda mode=mode: with_alpha(mode) for mode in ("RGBA", "LA", "RGBa")},
    **{mode: lambda mode=mode: sixteen_bits(mode) for mode in ("I;16", "I", "F")},
    "PA": lambda: palette(None).convert("PA"),
    "P": lambda: palette(None),
    "P, one colour transparent": lambda: palette(3),
    "P, alpha per colour": lambda: palette(bytes(range(0, 256, 16))),
    "L, one grey transparent": lambda: keyed("L", 128),
    "RGB, one colour transparent": lambda: keyed("RGB", tuple(noise(400, 500)[0, 0].tolist())),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_become_rgb_as_hugging_face_does(mode: str) -> None:
    assert_same(pack_images([MODES[mode]()], dtype=torch.float32).patches, hf_patches([MODES[mode]()]))


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (378, 378), (200, 0, 0, 0))
    assert pack_images([image]).patches.min() == 255


def test_sixteen_bits_are_clipped_and_not_scaled() -> None:
    values = np.full((378, 378), 65535, np.uint16)
    values[0, :4] = [0, 100, 255, 256]
    assert pack_images([Image.fromarray(values)]).patches[0, :5].tolist() == [0, 100, 255, 255, 255]


# --- files ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_files_are_turned_upright(orientation: int, format: str, tmp_path: Path) -> None:
    """As Hugging Face does with a path. With all eight, no turn can be taken for its inverse."""
    path = tmp_path / "photo"
    path.write_bytes(turned(orientation, format))
    expected = hf_patches([str(path)])
    for source in (path, str(path), path.read_bytes()):
        assert_same(pack_images([source], dtype=torch.float32).patches, expected)


def test_pil_images_are_not_turned() -> None:
    """As Hugging Face's image processor has it; the image and its tag stay as they were."""
    image = Image.open(io.BytesIO(turned(6)))
    packed = pack_images([image], dtype=torch.float32)
    assert_same(packed.patches, hf_patches([image]))
    assert packed.grids.tolist() == [[28, 35]]
    assert (image.size, image.getexif()[ORIENTATION]) == ((500, 400), 6)


FILES = {
    "grey.jpg": lambda: encoded(photo(mode="L")),
    "cmyk.jpg": lambda: encoded(photo(mode="CMYK")),
    "progressive.jpg": lambda: encoded(photo(), progressive=True, subsampling=2),
    **{
        f"{name}.jpg": lambda number=number: encoded(photo(), subsampling=number) for number, name in enumerate(["4-4-4", "4-2-2", "4-2-0"])
    },
    "profile.jpg": lambda: encoded(photo(), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    "two-photos.mpo": lambda: encoded(photo(), "MPO", save_all=True, append_images=[photo(seed=9)]),
    "photo.bmp": lambda: encoded(photo(), "BMP"),
    "palette.png": lambda: encoded(palette(None), "PNG"),
    "sixteen.png": lambda: encoded(sixteen_bits("I;16"), "PNG"),
    "photo.webp": lambda: encoded(photo(), "WEBP"),
    "photo.tiff": lambda: encoded(photo(mode="CMYK"), "TIFF"),
    "two-frames.gif": lambda: encoded(photo(), "GIF", save_all=True, append_images=[photo(seed=9)]),
}


@pytest.mark.parametrize("name", FILES)
def test_opaque_files_equal_hugging_face(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name]())
    expected = hf_patches([str(tmp_path / name)])
    assert_same(pack_images([tmp_path / name], dtype=torch.float32).patches, expected)


@pytest.mark.parametrize(
    "image",
    [lambda: with_alpha("RGBA"), lambda: with_alpha("LA"), lambda: palette(3), lambda: palette(bytes(range(0, 256, 16)))],
)
def test_transparent_files_are_laid_on_white_like_transparent_images(image: Callable[[], Image.Image]) -> None:
    """Hugging Face does so with opened images; for paths it drops the alpha and shows the colours that it hides."""
    data = encoded(image(), "PNG")
    assert_same(pack_images([data], dtype=torch.float32).patches, hf_patches([ImageOps.exif_transpose(Image.open(io.BytesIO(data)))]))


# --- arrays ---


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_equal_hugging_face(channels: int) -> None:
    array = noise(400, 500, channels)
    assert_same(pack_images([array], dtype=torch.float32).patches, hf_patches([array], image_mean=[0.5] * 3, image_std=[0.5] * 3))


def test_grey_arrays_without_channels() -> None:
    array = noise(400, 500, 1)
    assert torch.equal(pack_images([array[..., 0]]).patches, pack_images([array]).patches)


@pytest.mark.parametrize("height", [1, 3, 4])
def test_arrays_are_never_guessed_to_have_channels_first(height: int) -> None:
    """Hugging Face reads an image of 3 or 4 rows as channels."""
    array = noise(height, 400)
    assert torch.equal(pack_images([array]).patches, pack_images([Image.fromarray(array)]).patches)


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[::-1, ::-1],
        lambda a: a[::2, ::3],
        lambda a: a[..., ::-1],
        lambda a: np.asfortranarray(a),
        lambda a: a.transpose(1, 0, 2),
        lambda a: np.frombuffer(a.tobytes(), np.uint8).reshape(a.shape),  # read-only
    ],
)
def test_arrays_of_any_memory_layout(view: Callable[[np.ndarray], np.ndarray]) -> None:
    array = view(noise(800, 900))
    assert torch.equal(pack_images([array]).patches, pack_images([array.copy(order="C")]).patches)


# --- bad input ---


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds no pixels: reading any would fail."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"")


def damaged(data: bytes, at: int = 1000) -> bytes:
    return data[:at] + bytes(4) + data[at + 4 :]


def file(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


BAD_SOURCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda folder: folder / "none.jpg", r"there is no file .*none\.jpg"),
    "folder": (lambda folder: folder, "there is no file"),
    "url": (lambda _: "https://example.org/a.jpg", "a.jpg is not downloaded: expected a local file"),
    "text named .jpg": (lambda folder: file(folder, "a.jpg", b"Dear Sir"), r"a\.jpg is not an image in any format that Pillow reads"),
    "empty file": (lambda folder: file(folder, "a.jpg", b""), r"a\.jpg is not an image"),
    "no bytes": (lambda _: b"", "the file of 0 bytes is not an image"),
    "truncated file": (lambda folder: file(folder, "a.jpg", encoded(photo())[:20000]), r"a\.jpg cannot be decoded: .*truncated"),
    "truncated bytes": (lambda _: encoded(photo())[:20000], "the file of 20000 bytes cannot be decoded: .*truncated"),
    "truncated PIL image": (lambda _: Image.open(io.BytesIO(encoded(photo())[:20000])), "the PIL image cannot be decoded: .*truncated"),
    "damaged png": (lambda _: damaged(encoded(photo(), "PNG")), "the file of .* bytes cannot be decoded: "),
    "an error that is no OSError": (lambda _: damaged(encoded(photo(), "DDS"), 80), "cannot be decoded: Unknown pixel format"),
    "bomb": (lambda _: png_header(13400, 13300), r"13300x13400 pixels .* expected 1 to 178000000 in all \(max_pixels\)"),
    "larger bomb": (lambda _: png_header(30000, 30000), r"over Pillow's own limit .*900000000 pixels"),
    "float array": (lambda _: noise(50, 60) / 255, "the array is float64, expected uint8 with values 0 to 255"),
    "NaN array": (lambda _: np.full((50, 60, 3), np.nan, np.float32), "the array is float32 with NaN pixels, expected uint8"),
    "NaN image": (lambda _: Image.fromarray(np.full((50, 60), np.nan, np.float32)), "the image has NaN pixels"),
    "16-bit array": (lambda _: noise(50, 60).astype(np.uint16), "the array is uint16, expected uint8"),
    "bool array": (lambda _: noise(50, 60) > 5, "the array is bool, expected uint8"),
    "channels first": (lambda _: noise(50, 60).transpose(2, 0, 1), r"shape \[3, 50, 60\], expected .*\[H, W, 3\].* channels last"),
    "two channels": (lambda _: noise(50, 60, 2), r"shape \[50, 60, 2\]"),
    "batch axis": (lambda _: noise(50, 60)[None], r"shape \[1, 50, 60, 3\]"),
    "flat": (lambda _: noise(50, 60).ravel(), r"shape \[9000\]"),
    "empty array": (lambda _: noise(0, 60), "0x60 pixels"),
    "empty PIL image": (lambda _: Image.new("RGB", (60, 0)), "0x60 pixels"),
    "unknown mode": (lambda _: Image.new("La", (50, 60)), "conversion from La"),
    "closed": (lambda folder: closed(file(folder, "a.jpg", encoded(photo()))), "the PIL image cannot be decoded|closed image"),
    "tensor": (lambda _: torch.zeros(50, 60, 3, dtype=torch.uint8), "a Tensor is not an image: expected a path, bytes"),
    "nothing": (lambda _: None, "a NoneType is not an image"),
}


def closed(path: Path) -> Image.Image:
    image = Image.open(path)
    image.close()
    return image


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_bad_image_is_named_by_its_index(name: str, tmp_path: Path) -> None:
    source, message = BAD_SOURCES[name]
    with pytest.raises(ValueError, match=rf"^image 1: .*({message})"):
        pack_images([photo(), source(tmp_path), photo()])


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
def test_an_image_too_thin_to_be_split_is_named_by_its_index(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"^image 1: .*{size[0]}x{size[1]} pixels .*cannot be split in four: expected 2x2 at least"):
        pack_images([photo(), photo(*size)], split=True)


@pytest.mark.parametrize("source", [lambda: encoded(photo(40, 50)), lambda: photo(40, 50), lambda: noise(40, 50)])
def test_the_limit_of_pixels_can_be_moved(source: Callable[[], Any]) -> None:
    assert pack_images([source()], max_pixels=2000).grids.tolist() == [[27, 27]]
    with pytest.raises(ValueError, match=r"image 0: .*40x50 pixels .*expected 1 to 1999 in all"):
        pack_images([source()], max_pixels=1999)


def test_pillows_own_limit_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 12345678)
    pack_images([encoded(photo())], max_pixels=10**9)
    assert PIL.Image.MAX_IMAGE_PIXELS == 12345678


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ("photo.jpg", {}, "images is one str, expected a list of images"),
        (b"", {}, "images is one bytes, expected a list"),
        (photo(), {}, "images is one Image, expected a list"),
        (noise(50, 60), {}, "images is one ndarray, expected a list"),
        ([photo()], {"dtype": torch.int8}, "dtype is torch.int8, expected one of torch.uint8"),
        ([photo()], {"position_ids": "exact"}, "position_ids is 'exact'"),
        ([photo()], {"positions_per_side": 0}, "positions_per_side is 0"),
        ([photo()], {"longest_edge": 300}, "shortest_edge 378 and longest_edge 300"),
        ([photo(5, 6)], {"shortest_edge": 1}, "5x6 pixels .* no full patch of 14x14"),
    ],
)
def test_bad_arguments_are_named(images: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_images(images, **options)


# --- the caller's buffer ---


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
def test_patches_are_written_to_the_beginning_of_out(dtype: torch.dtype) -> None:
    images = [photo(700, 900), encoded(photo(300, 500)), noise(400, 400)]
    expected = pack_images(images, split=True, dtype=dtype).patches
    out = torch.full((len(expected) + 3, 588), 7, dtype=dtype)
    packed = pack_images(images, split=True, dtype=dtype, out=out)
    assert packed.patches.data_ptr() == out.data_ptr()
    assert torch.equal(packed.patches, expected)
    assert (out[len(expected) :] == 7).all()


@pytest.mark.parametrize("offset", [1, 2, 7])
def test_out_may_begin_anywhere_in_memory(offset: int) -> None:
    """Not at a border of vectors, nor of values."""
    expected = pack_images([photo()], dtype=torch.float32).patches
    memory = np.zeros(expected.numel() * 4 + offset, np.uint8)
    out = memory[offset:].view(np.float32).reshape(-1, 588)
    pack_images([photo()], dtype=torch.float32, out=out)
    np.testing.assert_array_equal(out, expected.numpy())


def test_out_may_be_an_array() -> None:
    out = np.zeros((1000, 588), np.uint8)
    packed = pack_images([photo()], out=out)
    np.testing.assert_array_equal(out[:980], packed.patches.numpy())
    assert not out[980:].any()


def read_only() -> np.ndarray:
    out = np.zeros((3000, 588), np.uint8)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (
            lambda: torch.zeros(1959, 588, dtype=torch.uint8),
            "^image 1: out has room for 1959 patches, expected 1960 up to here and 2940 in all",
        ),
        (lambda: torch.zeros(3000, 588), r"out is torch.float32 \[3000, 588\] on cpu, expected torch.uint8 \[P, 588\]"),
        (lambda: torch.zeros(3000 * 588, dtype=torch.uint8), r"out is torch.uint8 \[1764000\]"),
        (lambda: torch.zeros(3000, 587, dtype=torch.uint8), r"\[3000, 587\]"),
        (lambda: torch.zeros(6000, 588, dtype=torch.uint8)[::2], r"out has strides \(1176, 1\), expected a contiguous tensor"),
        (lambda: torch.zeros(588, 3000, dtype=torch.uint8).T, "expected a contiguous tensor"),
        (lambda: torch.zeros(1, 588, dtype=torch.uint8).expand(3000, 588), r"out has strides \(0, 1\)"),
        (lambda: torch.zeros(3000, 588, dtype=torch.uint8, device="meta"), "on meta, expected"),
        (read_only, "out is read-only"),
        (lambda: np.zeros((6000, 588), np.uint8)[::2], r"out has strides \(1176, 1\), expected a contiguous array"),
        (lambda: [0], "out is a list, expected a Tensor or an array"),
    ],
)
def test_a_bad_buffer_is_refused_before_it_is_written_to(out: Callable[[], Any], message: str) -> None:
    buffer = out()
    with pytest.raises(ValueError, match=message):
        pack_images([photo(), photo(seed=1), photo(seed=2)], out=buffer)
    if isinstance(buffer, torch.Tensor) and buffer.device.type == "cpu":
        assert not buffer.any()


def test_a_buffer_with_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="with gradients, expected"):
        pack_images([photo()], dtype=torch.float32, out=torch.zeros(3000, 588, requires_grad=True))


# --- up-scaling for training ---


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        ((300, 400), 1.5, (450, 600)),
        ((300, 401), 2.3, (690, 922)),  # 922.3
        ((300, 400), 3.0, (735, 980)),  # the longer side is capped
        ((100, 120), 2.0, (378, 378)),  # and both are raised
        ((2000, 1500), 2.5, (980, 735)),
        ((400, 500), 1.0, (400, 500)),
    ],
)
def test_upscaling_is_one_resize_to_a_larger_size(size: tuple[int, int], factor: float, expected: tuple[int, int]) -> None:
    pixels = noise(*size)
    larger = Image.fromarray(pixels).resize(expected[::-1], Image.Resampling.BILINEAR)
    assert torch.equal(pack_images([pixels], upscale=[factor]).patches, torch.from_numpy(pillow_patches(larger)))


def test_each_image_has_its_own_factor() -> None:
    images = [photo(400, 400, seed=seed) for seed in range(3)]
    packed = pack_images(images, upscale=(1.0, 2.0, 1.5))
    assert packed.grids.tolist() == [[28, 28], [57, 57], [42, 42]]
    split = pack_images(images[:1], upscale=[2.0], split=True)
    assert split.grids.tolist() == [[28, 28]] * 4 + [[57, 57]]  # quarters of 200 pixels become 400


@pytest.mark.parametrize(
    ("upscale", "message"),
    [
        ([1.0], "upscale has 1 factors for 2 images"),
        ([1.0, 0.5], r"^image 1: the factor of up-scaling is 0.5, expected 1 to 1000"),
        ([float("nan"), 1.0], "^image 0: the factor of up-scaling is nan"),
        ([1.0, float("inf")], "^image 1: the factor of up-scaling is inf"),
    ],
)
def test_bad_factors_are_named(upscale: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_images([photo(), photo()], upscale=upscale)


# --- Pillow's memory ---


def test_pillow_images_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither small ones nor files larger than one of Pillow's blocks."""
    expected = [pack_images([source]).patches for source in (noise(400, 500), noise(2400, 2500))]
    small, large = photo(400, 500), encoded(Image.fromarray(noise(2400, 2500)), "BMP")
    monkeypatch.setattr(Image.Image, "__array_interface__", property(lambda image: pytest.fail("copied")))
    monkeypatch.setattr(Image.Image, "copy", lambda image: pytest.fail("copied"))
    assert torch.equal(pack_images([small]).patches, expected[0])
    assert torch.equal(pack_images([large]).patches, expected[1])


def test_pillow_images_of_several_blocks() -> None:
    """Those that were made elsewhere lie in pieces, and are copied."""
    image = Image.fromarray(noise(2400, 2500)).convert("RGBX").convert("RGB")
    with pytest.raises(ValueError, match="not contiguous"):
        image.__arrow_c_array__()
    assert torch.equal(pack_images([image]).patches, pack_images([noise(2400, 2500)]).patches)


@pytest.mark.parametrize("before", [0, 1])
def test_pillows_allocator_is_as_it_was_afterwards(before: int) -> None:
    at_first = Image.core.get_use_block_allocator()
    Image.core.set_use_block_allocator(before)
    try:
        pack_images([encoded(photo())] * 3, threads=2)
        with pytest.raises(ValueError, match="truncated"):
            pack_images([encoded(photo()), encoded(photo())[:2000]], threads=2)
        assert Image.core.get_use_block_allocator() == before
    finally:
        Image.core.set_use_block_allocator(at_first)


def test_pillow_images_outlive_their_owner() -> None:
    """The pixels are read from Pillow's memory, which must not be freed before."""
    pixels = _C.arrow_pixels(photo(100, 120).__arrow_c_array__()[1], 100, 120)
    others = [photo(100, 120, seed=seed) for seed in range(20)]
    np.testing.assert_array_equal(pixels[..., :3], noise(100, 120))
    assert not pixels.flags.writeable
    assert others


@pytest.mark.parametrize(("mode", "size"), [("RGB", (120, 99)), ("L", (120, 100))])
def test_other_arrow_arrays_are_refused(mode: str, size: tuple[int, int]) -> None:
    capsule = photo(100, 120, mode).__arrow_c_array__()[1]
    with pytest.raises(ValueError, match="Arrow array"):
        _C.arrow_pixels(capsule, *size[::-1])


# --- planning from headers ---


def test_files_are_planned_before_they_are_decoded() -> None:
    """An image too many for the buffer is found out with no pixel read: the file has none."""
    with pytest.raises(ValueError, match="image 1: out has room for 1000 patches"):
        pack_images([encoded(photo()), png_header(400, 500)], out=torch.zeros(1000, 588, dtype=torch.uint8))


def test_a_png_with_its_orientation_behind_the_pixels(tmp_path: Path) -> None:
    data = turned(6, "PNG")
    start = data.index(b"eXIf") - 4
    length = 12 + struct.unpack(">I", data[start : start + 4])[0]
    moved = data[:start] + data[start + length : -12] + data[start : start + length] + data[-12:]
    (tmp_path / "late.png").write_bytes(moved)
    packed = pack_images([moved], dtype=torch.float32)
    assert packed.grids.tolist() == [[35, 28]]
    assert_same(packed.patches, hf_patches([str(tmp_path / "late.png")]))


@pytest.mark.parametrize("format", ["TIFF", "WEBP", "PNG", "JPEG"])
def test_orientations_of_other_formats(format: str, tmp_path: Path) -> None:
    for orientation in (3, 6):
        (tmp_path / "photo").write_bytes(turned(orientation, format))
        packed = pack_images([tmp_path / "photo"], dtype=torch.float32)
        assert packed.grids.tolist() == [[28, 35] if orientation == 3 else [35, 28]]
        assert_same(packed.patches, hf_patches([str(tmp_path / "photo")]))


def test_a_file_that_is_not_as_large_as_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer is laid out by what the header says: a decoder that yields another size is refused."""
    monkeypatch.setattr(JpegImageFile, "getexif", lambda image: {ORIENTATION: 6})
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image, in_place: None)
    with pytest.raises(ValueError, match=r"image 1: the file announces \(500, 400\) pixels .* and holds \(400, 500\)"):
        pack_images([photo(), encoded(photo())])


def test_an_unreadable_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ValueError, match=r"image 1: .*a\.jpg cannot be read: .*Permission denied"):
        pack_images([photo(), file(tmp_path, "a.jpg", encoded(photo()))])


# --- memory used again ---


def test_a_ring_gives_the_same_memory_in_turn() -> None:
    """The last batch stays while the next is packed; then its memory is used again, for another dtype and fewer patches too."""
    ring = images.BufferRing(slots=2)
    batches = [[noise(100 + 50 * i, 200)] for i in (3, 2, 1, 0)]
    packed = [pack_images(batch, out=ring, dtype=dtype) for batch, dtype in zip(batches[:2], (torch.float32, torch.uint8), strict=True)]
    for batch, made, dtype in zip(batches, packed, (torch.float32, torch.uint8), strict=False):
        assert torch.equal(made.patches, pack_images(batch, dtype=dtype).patches)
    again = pack_images(batches[2], out=ring, dtype=torch.bfloat16)
    assert again.patches.data_ptr() == packed[0].patches.data_ptr()
    assert torch.equal(again.patches, pack_images(batches[2], dtype=torch.bfloat16).patches)
    assert torch.equal(packed[1].patches, pack_images(batches[1]).patches)


def test_a_ring_grows() -> None:
    ring = images.BufferRing(slots=1)
    for size in (14, 400, 14):
        assert torch.equal(pack_images([noise(size, size)], out=ring).patches, pack_images([noise(size, size)]).patches)
    with pytest.raises(ValueError, match="slots is 0, expected 1 or more"):
        images.BufferRing(0)
