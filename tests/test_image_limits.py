"""What an image may cost: refused by its headers, with the value and the limit, before memory and time are taken."""

import io
import os
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from idefics2_fast import images, pack_images
from idefics2_fast.image_limits import FORMATS, ImageLimits
from idefics2_fast.images import image_size


def flat(height: int, width: int, format: str, mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (width, height)).save(stream, format, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(height: int, width: int, *chunks: bytes, depth: int = 1, colours: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join((header, *chunks, chunk(b"IDAT", b""), chunk(b"IEND", b"")))


def many_scans(scans: int) -> bytes:
    """A progressive JPEG with its last scan again and again, which holds next to nothing."""
    data = flat(1000, 1000, "JPEG", "L", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


def with_segments(number: int, segment: bytes) -> bytes:
    data = flat(30, 40, "JPEG")
    return data[:2] + segment * number + data[2:]


def icon(height: int, width: int) -> bytes:
    picture = png(height, width)
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(picture), 22) + picture


def jpeg2000(height: int, width: int) -> bytes:
    """Its container's header says 30 x 40, its codestream something else."""
    data = flat(30, 40, "JPEG2000")
    at = data.index(b"\xff\x4f\xff\x51") + 8
    return data[:at] + struct.pack(">LL", width, height) + data[at + 8 :]


def tiff(tags: list[tuple[int, int, int, int]]) -> bytes:
    """(tag, type, count, value), beside those of a grey picture of 10 x 10."""
    tags = [(256, 3, 1, 10), (257, 3, 1, 10), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), *tags]
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in sorted(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def bitmap_of_runs(height: int, width: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + info + bytes(1024) + b"\1\1\0\0" * height


TOO_COSTLY: dict[str, tuple[Callable[[], bytes], str]] = {
    "a long row": (lambda: png(1, 177_000_000), r"1x177000000 pixels .* at most 65535 \(ImageLimits.side\)"),
    "a long column": (lambda: png(177_000_000, 1), "177000000x1 pixels"),
    "transparency": (
        lambda: png(13_343, 13_340, depth=8, colours=6),
        r"at most 1073741824 \(ImageLimits.decoded_bytes\)",
    ),
    "scans": (lambda: many_scans(100), r"more than 100 scans \(ImageLimits.jpeg_scans\)"),
    "comments of a jpeg": (lambda: with_segments(10_001, b"\xff\xfe\0\2"), r"header has more than 10000 segments"),
    "exif of a jpeg": (lambda: with_segments(257, b"\xff\xe1\0\x09Exif\0\0a"), "more than 256 segments of EXIF"),
    "filling of a jpeg": (lambda: with_segments(1, b"\xff" * (2 << 20)), "more than 1048576 bytes outside of its segments"),
    "zeros in a jpeg": (lambda: with_segments(1, b"\xff" + bytes(2 << 20)), "more than 1048576 bytes outside of its segments"),
    "fractions in a png's exif": (
        lambda: png(30, 40, chunk(b"eXIf", b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHLL", 274, 5, 1 << 19, 22) + bytes(4 + (4 << 20)))),
        "bytes of EXIF, expected at most 4194304",
    ),
    "a webp's exif": (lambda: flat(30, 40, "WEBP", exif=b"Exif\0\0II*\0" + bytes(4 << 20)), "bytes of EXIF, expected at most 4194304"),
    "a comment of a ppm": (lambda: b"P6 #" + bytes(2 << 20), "header has more than 65536 bytes"),
    "runs of a bmp": (lambda: bitmap_of_runs(3000, 3000), "BMP has 3000x3000 pixels .* slow to read, expected at most 8388608"),
    "decimals of a ppm": (lambda: b"P3 3000 3000 255 " + b"1 " * 999, "PPM has 3000x3000 pixels .* slow to read"),
    "depth of a ppm": (lambda: b"P6 3000 3000 254 " + b"1" * 999, "PPM has 3000x3000 pixels .* slow to read"),
    "chunks": (lambda: png(30, 40, *[chunk(b"zzZz", b"")] * 10_000), r"more than 10000 chunks \(ImageLimits.segments\)"),
    "text": (lambda: png(30, 40, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 22)))), "too large|Decompressed"),
    "comments of a gif": (
        lambda: b"GIF89a\x1e\0\x1e\0\0\0\0!\xfe" + b"\x01a" * 10_001 + b"\0,",
        r"more than 10000 blocks before its first frame",
    ),
    "tags": (lambda: tiff([(1000 + i, 3, 1, 1) for i in range(10_000)]), r"has 10005 tags, expected at most 10000"),
    "strips": (lambda: tiff([(273, 4, 2_000_000, 8)]), "tag 273 has 2000000 values"),
    "tiles": (lambda: tiff([(322, 4, 1, 70_000), (323, 4, 1, 16), (324, 4, 1, 8), (325, 4, 1, 100)]), "16x70000 pixels"),
    "an icon": (lambda: icon(1, 177_000_000), "1x177000000 pixels"),
    "a codestream": (lambda: jpeg2000(50_000, 50_000), "50000x50000 pixels"),
    "PostScript": (lambda: flat(30, 40, "EPS"), r"the format is EPS, expected one of AVIF, BMP.*\(ImageLimits.formats\)"),
    "a format of few": (lambda: flat(30, 40, "PCX"), "the format is PCX, expected one of"),
}


@pytest.mark.parametrize("name", TOO_COSTLY)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_costly_image_is_refused(name: str) -> None:
    make, message = TOO_COSTLY[name]
    data = make()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=rf"^image 0: .*({message})"):
        pack_images([data])
    with pytest.raises(ValueError, match=message):
        image_size(data, images.MAX_PIXELS)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert time.process_time() - began < 5


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", ["transparency", "scans", "chunks", "a codestream", "PostScript"])
def test_an_opened_image_is_refused_before_it_is_decoded(name: str) -> None:
    make, message = TOO_COSTLY[name]
    image = Image.open(io.BytesIO(make()))
    image.load = lambda: pytest.fail("decoded")
    with pytest.raises(ValueError, match=message):
        pack_images([image])


@pytest.mark.parametrize(
    ("source", "limits"),
    [
        (lambda: flat(30, 400, "PNG"), {"side": 400}),
        (lambda: Image.new("RGB", (400, 30)), {"side": 400}),
        (lambda: np.zeros((30, 400, 3), np.uint8), {"side": 400}),
        (lambda: flat(30, 40, "PNG", "L"), {"decoded_bytes": 30 * 40 * 5}),
        (lambda: Image.new("L", (40, 30)), {"decoded_bytes": 30 * 40 * 4}),
        (lambda: many_scans(10), {"jpeg_scans": 6 + 10}),
        (lambda: with_segments(50, b"\xff\xfe\0\2"), {"segments": 50 + 8}),
        (lambda: png(30, 40, *[chunk(b"zzZz", b"")] * 50)[:-24] + chunk(b"IDAT", zlib.compress(bytes(30 * 6))), {"segments": 51}),
    ],
)
def test_limits_can_be_moved(source: Callable[[], Any], limits: dict[str, int]) -> None:
    pack_images([source()], limits=ImageLimits(**limits))
    with pytest.raises(ValueError, match=f"ImageLimits.{next(iter(limits))}"):
        pack_images([source()], limits=ImageLimits(**{name: value - 1 for name, value in limits.items()}))


def test_a_large_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(20 << 30)
    with pytest.raises(ValueError, match=r"a\.jpg has 21474836480 bytes, expected at most 268435456 \(ImageLimits.file_bytes\)"):
        pack_images([tmp_path / "a.jpg"])
    with pytest.raises(ValueError, match="the file of 300 bytes has 300 bytes, expected at most 299"):
        pack_images([bytes(300)], limits=ImageLimits(file_bytes=299))
    with open(tmp_path / "b.jpg", "wb") as file:
        file.write(flat(30, 40, "JPEG"))
    with Image.open(tmp_path / "b.jpg") as image, pytest.raises(ValueError, match="expected at most 99"):
        pack_images([image], limits=ImageLimits(file_bytes=99))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_pipes_and_devices_are_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg is no regular file"):
        pack_images([tmp_path / "a.jpg"])


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"/none.jpg"


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b", BytesPath(), "\udc00.jpg", "/dev/null/a"])
def test_paths_that_name_no_file(path: Any) -> None:
    with pytest.raises(ValueError, match="^image 0: "):
        pack_images([path])


@pytest.mark.parametrize("format", FORMATS)
def test_all_formats_of_the_list_are_read(format: str) -> None:
    assert pack_images([flat(40, 30, format)], limits=ImageLimits(formats=[format])).patches.max() == 0
    others = [name for name in FORMATS if name != format]
    with pytest.raises(ValueError, match=f"the format is {format}" if format != "TGA" else "the format is CUR"):
        pack_images([flat(40, 30, format)], limits=ImageLimits(formats=others))


def test_another_format_can_be_allowed() -> None:
    assert len(pack_images([flat(30, 40, "PCX")], limits=ImageLimits(formats=["PCX"])).images) == 1


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"side": 0}, "side is 0, expected an int of 1 or more"),
        ({"jpeg_scans": 1.5}, "jpeg_scans is 1.5"),
        ({"segments": True}, "segments is True"),
        ({"formats": "PNG"}, "formats is 'PNG', expected a list"),
        ({"formats": ["EPS"]}, "formats holds 'EPS'"),
        ({"formats": ["png"]}, "formats holds 'png'"),
    ],
)
def test_bad_limits_are_named(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageLimits(**limits)


@pytest.mark.parametrize("frames", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_other_frames_are_not_decoded(frames: str) -> None:
    """The first frame alone counts, be the others damaged."""
    several = [Image.fromarray(np.full((400, 400, 3), 25 * i, np.uint8)) for i in range(8)]
    stream = io.BytesIO()
    several[3].save(stream, frames, save_all=True, append_images=several)
    expected = pack_images([several[3]]).patches.float()
    assert (pack_images([stream.getvalue()]).patches.float() - expected).abs().max() <= 3


def test_an_array_with_an_alpha_channel_is_blended_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (500, 400, 4), dtype=np.uint8)
    expected = [pack_images([source]).patches for source in (pixels, Image.fromarray(pixels))]
    for rows in (1, 400 * 7, 400 * 500):
        monkeypatch.setattr(images, "PIXELS_AT_ONCE", rows)
        for source, patches in zip((pixels, Image.fromarray(pixels)), expected, strict=True):
            assert torch.equal(pack_images([source]).patches, patches)


def test_the_users_switch_for_truncated_files_is_heeded_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    data = flat(400, 500, "BMP")[:-30_000]
    with pytest.raises(ValueError, match="cannot be decoded: .*truncated"):
        pack_images([data])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    images._warn_of_truncated_images.cache_clear()
    with pytest.warns(UserWarning, match="LOAD_TRUNCATED_IMAGES is set: files that are cut short are taken"):
        pack_images([data])


def peak() -> int:
    """Bytes of this process's memory at its highest since `/proc/self/clear_refs` was written to."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks cannot be reset here")
@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("WEBP", "RGB", {}),
        ("AVIF", "RGBA", {"speed": 10}),
        ("JPEG2000", "RGB", {}),
        ("JPEG", "CMYK", {"progressive": True}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        ("PNG", "LA", {}),
        ("PNG", "I;16", {}),
        ("TIFF", "F", {}),
        ("TIFF", "CMYK", {"compression": "tiff_lzw"}),
        ("GIF", "P", {}),
        ("PPM", "RGB", {}),
    ],
)
def test_the_estimate_of_memory_is_no_less_than_what_is_taken(format: str, mode: str, options: dict[str, Any]) -> None:
    side = 3000
    data = flat(side, side, format, mode, **options)
    with pytest.raises(ValueError, match="bytes to decode") as refusal:
        pack_images([data], limits=ImageLimits(decoded_bytes=1))
    estimate = int(str(refusal.value).split(" takes ")[1].split()[0])
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    pack_images([data], threads=1)
    assert peak() - before <= estimate + (20 << 20)
