"""Limits on what one image may cost, checked against a file's headers before memory is taken."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from PIL import Image

MAX_PIXELS = 178_000_000

FORMATS = tuple("AVIF BMP DDS GIF ICO JPEG JPEG2000 PNG PPM TGA TIFF WEBP".split())

# Bytes of a pixel in Pillow's memory; modes that are not named take 4.
MODE_BYTES = {"1": 1, "L": 1, "P": 1} | dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), 2)
RGB_BYTES = 4
# Bytes for each pixel that a format's decoder takes beside the image itself, at its worst.
# JPEG and JPEG 2000 depend on the file: see `_jpeg_bytes` and `_codestream`.
DECODER_BYTES = {"AVIF": 12, "BMP": 3, "DDS": 4, "GIF": 2, "ICO": 8, "PNG": 0, "PPM": 8, "TGA": 0}
DECODER_BYTES |= {"TIFF": 8, "WEBP": 12}
OTHER_DECODER_BYTES = 8

# EXIF blocks of a JPEG are joined one by one.
MAX_EXIF_SEGMENTS = 256
# Pillow makes Python objects of EXIF's numbers: 8 million fractions take 2.5 GB.
MAX_EXIF_BYTES = 4 << 20
# Pillow passes over what stands between a JPEG's segments byte by byte, and reads a PPM's header so.
MAX_JUNK_BYTES, MAX_PPM_HEADER = 1 << 20, 1 << 16
# Of a file whose decoder is written in Python (BMP with runs, DDS of plain pixels, PPM in decimals
# or of another depth than 8 bits), which takes 2 to 4 seconds a million.
MAX_PYTHON_PIXELS = 1 << 23
# Values of a TIFF tag, which become Python objects: tiles of 16 x 16 pixels fill 268 million.
MAX_TAG_VALUES = 1 << 20

JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
START_OF_SCAN, END_OF_IMAGE, APP1 = 0xDA, 0xD9, 0xE1
CODESTREAM = b"\xff\x4f\xff\x51"


@dataclass(frozen=True)
class ImageLimits:
    """What one image may cost, beside its number of pixels (`max_pixels`). All can be raised.

    Attributes:
        side: pixels of the longer side.
        file_bytes: size of a file; a larger one is not read.
        decoded_bytes: memory that decoding and the conversion to RGB take, estimated from the
            header: size, mode and format. The default suits 178 million pixels of RGB.
        jpeg_scans: scans of a JPEG. Each pass over all pixels costs time, however short it is
            in the file; encoders write about ten.
        segments: marker segments of a JPEG's header, chunks of a PNG beside its pixels, blocks
            before a GIF's first frame, tags of a TIFF.
        formats: Pillow's names of the formats that are read; "JPEG" includes MPO. Animated files
            give their first frame. EPS is never read: Pillow runs Ghostscript for it.

    Raises:
        ValueError: a limit that is not a positive int, a format that Pillow does not name.
    """

    side: int = 65_535
    file_bytes: int = 256 << 20
    decoded_bytes: int = 1 << 30
    jpeg_scans: int = 100
    segments: int = 10_000
    formats: Sequence[str] = FORMATS

    def __post_init__(self) -> None:
        for field in fields(self)[:-1]:
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field.name} is {value!r}, expected an int of 1 or more")
        if isinstance(self.formats, str):
            raise ValueError(f"formats is {self.formats!r}, expected a list of Pillow's names")
        object.__setattr__(self, "formats", tuple(self.formats))
        others = set(self.formats) - set(FORMATS)
        if others:
            Image.init()
        for name in others:
            if name == "EPS" or name not in Image.OPEN:
                raise ValueError(f"formats holds {name!r}, expected names of formats that Pillow reads without other programs")


DEFAULT_LIMITS = ImageLimits()


def require_size(height: int, width: int, max_pixels: int, limits: ImageLimits) -> None:
    """Refuses an image of no pixel, of too many, or of a side too long."""
    if not 1 <= height * width <= max_pixels:
        raise ValueError(f"the image has {height}x{width} pixels (height x width), expected 1 to {max_pixels} in all (max_pixels)")
    if max(height, width) > limits.side:
        raise ValueError(
            f"the image has {height}x{width} pixels (height x width), expected sides of at most {limits.side} (ImageLimits.side)"
        )


def require_file_bytes(size: int, name: str, limits: ImageLimits) -> None:
    if size > limits.file_bytes:
        raise ValueError(f"{name} has {size} bytes, expected at most {limits.file_bytes} (ImageLimits.file_bytes)")


def require_memory(image: Image.Image, data: bytes | None, limits: ImageLimits, max_pixels: int) -> None:
    """Refuses an image of which decoding and conversion take too much.

    Args:
        image: opened; of a file its pixels are not yet decoded.
        data: the file's bytes; None for an image whose pixels Pillow holds already.
    """
    if data is None:
        per_pixel = 2 * 3 if image.mode == "RGB" else RGB_BYTES  # the copy of one in pieces
    else:
        per_pixel = MODE_BYTES.get(image.mode, 4) + _decoder_bytes(image, data)
        per_pixel += 0 if image.mode == "RGB" else RGB_BYTES
    if image.mode == "F":
        per_pixel += 3 * 4  # the search for NaN
    if data is not None and image.tile and image.tile[0][0] in Image.DECODERS:
        require_size(image.height, image.width, max_pixels, limits)
        if image.height * image.width > MAX_PYTHON_PIXELS:
            raise ValueError(
                f"the {image.format} has {image.height}x{image.width} pixels (height x width) in an encoding"
                f" that is slow to read, expected at most {MAX_PYTHON_PIXELS} in all"
            )
    sizes = [(image.height, image.width), *(_inner_sizes(image, data) if data else ())]
    for height, width in sizes:
        require_size(height, width, max_pixels, limits)
        _require_bytes(height, width, per_pixel, image.mode, limits)


def _require_bytes(height: int, width: int, per_pixel: int, mode: str, limits: ImageLimits) -> None:
    needed = height * width * per_pixel
    if needed > limits.decoded_bytes:
        raise ValueError(
            f"the image of {height}x{width} pixels (height x width, {mode}) takes {needed} bytes"
            f" to decode, expected at most {limits.decoded_bytes} (ImageLimits.decoded_bytes)"
        )


def check_headers(data: bytes, max_pixels: int, limits: ImageLimits) -> None:
    """Refuses files whose headers alone are slow to read, before Pillow reads them."""
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data, limits)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _require_segments(_png_chunks(data), "chunks", limits)
    elif data.startswith(b"GIF8"):
        _require_segments(_gif_blocks(data), "blocks before its first frame", limits)
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _check_tiff(data, limits)
    elif data[:1] == b"P" and data[1:2] in b"123456":
        _check_ppm(data)
    elif data.startswith(b"\0\0\1\0"):  # Pillow decodes an icon where it opens it
        for height, width in _sizes_in_icon(data):
            require_size(height, width, max_pixels, limits)
            _require_bytes(height, width, 8 + DECODER_BYTES["ICO"], "ICO", limits)


def _require_segments(segments: Iterator[None], what: str, limits: ImageLimits) -> None:
    found = sum(1 for _ in zip(segments, range(limits.segments + 1), strict=False))
    if found > limits.segments:
        raise ValueError(f"the file has more than {limits.segments} {what} (ImageLimits.segments)")


def _check_jpeg(data: bytes, limits: ImageLimits) -> None:
    """Counts the segments of the header, and the scans."""
    header, exif, scans, junk, at = 0, 0, 0, 0, 2
    few = data.count(b"\xff\xda") <= limits.jpeg_scans
    while marker := JPEG_MARKER.search(data, at):
        kind, before, at = marker[1][0], at, marker.end()
        junk += 0 if scans else at - 2 - before
        if junk > MAX_JUNK_BYTES:
            break
        if kind == END_OF_IMAGE or len(data) < at + 2:
            return
        length = int.from_bytes(data[at : at + 2], "big")
        scans += kind == START_OF_SCAN
        if scans > limits.jpeg_scans:
            raise ValueError(f"the JPEG has more than {limits.jpeg_scans} scans (ImageLimits.jpeg_scans)")
        if scans and few:
            return
        header += not scans
        exif += kind == APP1 and data.startswith(b"Exif", at + 2)
        if header > limits.segments:
            raise ValueError(f"the JPEG's header has more than {limits.segments} segments (ImageLimits.segments)")
        if exif > MAX_EXIF_SEGMENTS:
            raise ValueError(f"the JPEG has more than {MAX_EXIF_SEGMENTS} segments of EXIF, expected one")
        at += length
    if not scans and junk + len(data) - at > MAX_JUNK_BYTES:
        raise ValueError(f"the JPEG's header has more than {MAX_JUNK_BYTES} bytes outside of its segments, expected fewer")


def _check_ppm(data: bytes) -> None:
    """Refuses white space and comments without end before the sizes."""
    words = re.sub(rb"#[^\r\n]*", b" ", data[:MAX_PPM_HEADER]).split(maxsplit=4)
    if len(data) > MAX_PPM_HEADER and len(words) < (3 if data[1:2] in b"14" else 4):
        raise ValueError(f"the PPM's header has more than {MAX_PPM_HEADER} bytes, expected fewer")


def require_exif(image: Image.Image) -> None:
    """Refuses an EXIF block, of those that are read so far, which is too large to look into."""
    size = len(image.info.get("exif") or b"")
    if size > MAX_EXIF_BYTES:
        raise ValueError(f"the image has {size} bytes of EXIF, expected at most {MAX_EXIF_BYTES}")


def _png_chunks(data: bytes) -> Iterator[None]:
    """One for each chunk that holds no pixels."""
    at = 8
    while at + 12 <= len(data):
        if data[at + 4 : at + 8] not in (b"IDAT", b"fdAT"):
            yield
        at += 12 + int.from_bytes(data[at : at + 4], "big")


def _gif_blocks(data: bytes) -> Iterator[None]:
    """One for each block of the extensions before the first frame."""
    if len(data) < 13:
        return
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    while at + 2 < len(data) and data[at] != ord(","):
        at += 2 if data[at] == ord("!") else 1
        while at < len(data) and data[at - 1] != ord(",") and data[at]:
            yield
            at += 1 + data[at]
        yield
        at += 1


def _check_tiff(data: bytes, limits: ImageLimits) -> None:
    """Counts the tags of the first directory, and their values."""
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    start, number, entry = ("Q", "Q", "HHQ8x") if big else ("L", "H", "HHL4x")
    try:
        (at,) = struct.unpack_from(order + start, data, 8 if big else 4)
        (count,) = struct.unpack_from(order + number, data, at)
        if count > limits.segments:
            raise ValueError(f"the TIFF has {count} tags, expected at most {limits.segments} (ImageLimits.segments)")
        at += struct.calcsize(order + number)
        for index in range(count):
            place = at + index * struct.calcsize(order + entry)
            tag, kind, values = struct.unpack_from(order + entry, data, place)
            if values > MAX_TAG_VALUES and kind not in (1, 2, 6, 7):  # numbers, not bytes
                raise ValueError(f"the TIFF's tag {tag} has {values} values, expected at most {MAX_TAG_VALUES}")
    except (struct.error, OverflowError):  # cut short, as Pillow will say
        return


def _decoder_bytes(image: Image.Image, data: bytes) -> int:
    if image.format in ("JPEG", "MPO"):
        several = data.find(b"\xff\xda", data.find(b"\xff\xda") + 2) >= 0
        return 2 * len(image.getbands()) if several else 0  # all coefficients, between scans
    if image.format == "JPEG2000":
        siz = _codestream(data)
        components = int.from_bytes(data[siz + 34 : siz + 36], "big") if siz else 4
        return 4 * components + 4
    return DECODER_BYTES.get(image.format or "", OTHER_DECODER_BYTES)


def _codestream(data: bytes) -> int:
    """Where the sizes of a JPEG 2000's codestream stand: behind the marker and its length."""
    return data.find(CODESTREAM) + 6 if CODESTREAM in data else 0


def _inner_sizes(image: Image.Image, data: bytes) -> Iterator[tuple[int, int]]:
    """(height, width) of what will be decoded where that is not what the header says."""
    if image.format == "JPEG2000" and (siz := _codestream(data)) and len(data) >= siz + 18:
        right, bottom, left, top = struct.unpack_from(">4L", data, siz + 2)
        yield max(bottom - top, 1), max(right - left, 1)
    elif image.format == "TIFF":
        sides = image.tag_v2.get(323), image.tag_v2.get(322)
        if all(isinstance(side, int) and side > 0 for side in sides):
            yield sides


def _sizes_in_icon(data: bytes) -> Iterator[tuple[int, int]]:
    """(height, width) of the pictures in an icon, by their own headers."""
    for entry in range(int.from_bytes(data[4:6], "little")):
        if len(data) < 6 + 16 * (entry + 1):
            return
        (at,) = struct.unpack_from("<L", data, 6 + 16 * entry + 12)
        if data.startswith(b"\x89PNG", at) and len(data) >= at + 24:
            width, height = struct.unpack_from(">LL", data, at + 16)
            yield height, width
        elif len(data) >= at + 12:
            (header,) = struct.unpack_from("<L", data, at)
            width, height = struct.unpack_from("<HH" if header == 12 else "<ll", data, at + 4)
            yield max(abs(height) // 2, 1), max(abs(width), 1)
