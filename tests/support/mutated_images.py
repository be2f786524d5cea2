"""Files of every format with faults put into them: `python mutated_images.py SEED COUNT` packs them, in a process of its own.

Prints how many were refused and how many taken, and the peak of memory in MB. Any error but ValueError ends it.
"""

from __future__ import annotations

import io
import random
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from PIL import Image, ImageFile

from idefics2_fast import images, pack_images
from idefics2_fast.image_limits import FORMATS

SMALL = {"shortest_edge": 28, "longest_edge": 56}
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x1_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)


def originals() -> list[bytes]:
    """Small files: each format, and what is peculiar to some."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((40, 30), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True}
    variants = [(format, "RGB", {}) for format in FORMATS]
    variants += [("JPEG", "RGB", {"progressive": True, "exif": exif}), ("JPEG", "CMYK", {}), ("MPO", "RGB", frames)]
    variants += [("PNG", mode, {"exif": exif}) for mode in ("1", "P", "LA", "RGBA", "I;16")]
    variants += [(format, "RGB", frames) for format in ("GIF", "WEBP", "PNG", "TIFF")]
    variants += [("TIFF", "RGB", {"compression": name}) for name in ("tiff_lzw", "jpeg", "tiff_deflate", "packbits")]
    variants += [("WEBP", "RGBA", {"lossless": True, "exif": exif}), ("TIFF", "F", {})]
    variants += [("PPM", "L", {}), ("BMP", "P", {}), ("TGA", "RGBA", {"compression": "tga_rle"})]
    files = []
    for format, mode, options in variants:
        stream = io.BytesIO()
        source = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16)) if mode == "I;16" else picture.convert(mode)
        turned = {"append_images": [picture.rotate(90)]} if options == frames else {}
        source.save(stream, format, **options, **turned)
        files.append(stream.getvalue())
    return files


def place(draw: random.Random, data: bytearray) -> int:
    """Half of the faults in the first 64 bytes, where formats keep their sizes."""
    return draw.randrange(min(len(data), 64) if draw.random() < 0.5 else len(data))


def flip(draw: random.Random, data: bytearray, _: list[bytes]) -> None:
    for _ in range(draw.randint(1, 8)):
        data[place(draw, data)] ^= 1 << draw.randrange(8)


def cut(draw: random.Random, data: bytearray, _: list[bytes]) -> None:
    del data[draw.randrange(len(data)) :]


def overwrite(draw: random.Random, data: bytearray, _: list[bytes]) -> None:
    for _ in range(draw.randint(1, 3)):
        width, order = draw.choice((1, 2, 4)), draw.choice(("<", ">"))
        value = draw.choice(EXTREMES) & (1 << 8 * width) - 1
        at = place(draw, data)
        data[at : at + width] = struct.pack(order + {1: "B", 2: "H", 4: "L"}[width], value)


def repeat(draw: random.Random, data: bytearray, _: list[bytes]) -> None:
    start = draw.randrange(len(data))
    part = data[start : start + draw.randint(1, 200)]
    data[start:start] = part * draw.choice((1, 2, 50))


def remove(draw: random.Random, data: bytearray, _: list[bytes]) -> None:
    start = draw.randrange(len(data))
    del data[start : start + draw.randint(1, 50)]


def splice(draw: random.Random, data: bytearray, others: list[bytes]) -> None:
    other = draw.choice(others)
    start, end = sorted(draw.randrange(len(other) + 1) for _ in range(2))
    at = draw.randrange(len(data))
    data[at : at + end - start] = other[start:end]


Fault = Callable[[random.Random, bytearray, list[bytes]], None]
FAULTS: tuple[Fault, ...] = (flip, flip, cut, overwrite, overwrite, repeat, remove, splice)


def with_checksums(data: bytearray) -> None:
    """Makes a PNG's checksums right again: without this most faults end there."""
    at = 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + length > len(data):
            return
        data[at + 8 + length : at + 12 + length] = struct.pack(">L", zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length


def mutated(draw: random.Random, files: list[bytes]) -> bytes:
    data = bytearray(draw.choice(files))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        draw.choice(FAULTS)(draw, data, files)
        if not data:
            break
    if data.startswith(b"\x89PNG") and draw.random() < 0.7:
        with_checksums(data)
    return bytes(data)


def state() -> tuple[object, ...]:
    return PIL.Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, Image.core.get_use_block_allocator(), dict(images._in_use)


def peak_memory() -> int:
    """MB; getrusage would count the peak of the process that started this one."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) >> 10


def main(seed: int, count: int) -> None:
    warnings.simplefilter("ignore")
    draw, files = random.Random(seed), originals()
    good = [pack_images([data], **SMALL).patches for data in files]
    before, refused = state(), 0
    for number in range(count):
        data = mutated(draw, files)
        try:
            pack_images([data], threads=1, **SMALL)
        except ValueError:
            refused += 1
            assert state() == before
        except BaseException:
            print(f"number {number} of seed {seed}: {data[:2000]!r}")
            raise
        if number % 1000 == 0:
            assert all(map(torch.equal, good, [pack_images([each], **SMALL).patches for each in files]))
    print(refused, count - refused, peak_memory())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
