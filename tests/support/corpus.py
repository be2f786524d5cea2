"""Small rows to train on: rendered images as PNG files or bytes, questions and answers of different lengths."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

WORDS = "river stone lamp orange seven window paper cloud music train garden silver".split()


def picture(width: int, height: int, word: str = "word", kind: str = "PNG", **saving: Any) -> bytes:
    """The file of a rendered word."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((width // 8, height // 3), word, fill="black")
    buffer = io.BytesIO()
    image.save(buffer, kind, **saving)
    return buffer.getvalue()


def mixed_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of The Cauldron's columns: most with an image or two of different sizes, some of text alone, 1 to 4 questions each."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        texts = [
            {"user": " ".join(rng.choices(WORDS, k=rng.randint(2, 20))), "assistant": " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))}
            for _ in range(rng.randint(1, 4))
        ]
        count = rng.choice([0, 1, 1, 1, 2])
        images = [picture(rng.randint(20, 500), rng.randint(20, 500), rng.choice(WORDS)) for _ in range(count)]
        rows.append({"images": images, "texts": texts})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines; images given as bytes become files beside it, named by paths relative to it."""
    lines = []
    for number, row in enumerate(rows):
        images = []
        for index, data in enumerate(row.get("images", [])):
            name = f"{path.stem}-{number}-{index}.png"
            (path.parent / name).write_bytes(data)
            images.append(name)
        lines.append(json.dumps({**row, "images": images}))
    path.write_text("\n".join(lines) + "\n")
