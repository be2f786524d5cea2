"""A corpus to learn to read from, made on the spot: words in fonts that Python packages ship, and a model small enough for two cores.

`render` draws one word at a difficulty between 0 (one font, one size, one place, black on white) and 1 (all fonts, sizes, colours and
places). `HELD_OUT` draws in what training never sees: other font families, sizes, hues and places.
"""

from __future__ import annotations

import colorsys
import functools
import importlib.util
import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from idefics2_fast.config import Idefics2Config, PerceiverConfig, TextConfig, VisionConfig

PATCH = 14
WORDS = tuple(
    "apple river stone cloud table green horse light music paper bread chair dream eagle flame grape house island jungle knife "
    "lemon mouse night ocean piano queen robot snake tiger uncle violin water yellow zebra anchor basket candle dragon engine forest".split()
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# package -> folder of its fonts -> files
_MATPLOTLIB = ("matplotlib", "mpl-data/fonts/ttf")
_MANROPE, _HANKEN, _CALADEA = (("font_" + name, "files") for name in ("manrope", "hanken_grotesk", "caladea"))
TRAIN_FONTS = tuple((_MATPLOTLIB, f"{name}.ttf") for name in (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "DejaVuSans-Oblique",
    "STIXGeneral", "STIXGeneralBol", "cmr10", "cmss10",
)) + tuple((_MANROPE, f"Manrope-{weight}.ttf") for weight in ("Regular", "Bold"))  # fmt: skip
HELD_OUT_FONTS = tuple((_HANKEN, f"HankenGrotesk-{weight}.otf") for weight in ("Regular", "Medium", "Bold")) + tuple(
    (_CALADEA, f"Caladea-{style}.ttf") for style in ("Regular", "Bold", "Italic")
)


@dataclass(frozen=True)
class Style:
    """What a drawing varies in."""

    fonts: tuple[tuple[tuple[str, str], str], ...]
    sizes: tuple[int, ...]
    hues: tuple[tuple[float, float], ...]
    offsets: tuple[int, ...]


TRAINED = Style(TRAIN_FONTS, (18, 20, 22, 24, 26, 28), ((0.0, 0.25), (0.35, 0.6), (0.7, 1.0)), (0, 2, 4, 6, 8, 10))
HELD_OUT = Style(HELD_OUT_FONTS, (19, 21, 23, 25, 27), ((0.26, 0.34), (0.61, 0.69)), (1, 3, 5, 7, 9))


@functools.cache
def load_font(place: tuple[str, str], name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of an installed package. Ends the program where the package is missing."""
    package, folder = place
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(
            f"The font {name} ships in the package {package.replace('_', '-')}, which is not installed: pip install 'idefics2-fast[demo]'"
        )
    return ImageFont.truetype(str(Path(spec.submodule_search_locations[0], folder, name)), size)


def render(word: str, draw: random.Random, difficulty: float = 1.0, style: Style = TRAINED) -> Image.Image:
    """The word on a background, as an RGB image whose sides are multiples of 14."""
    hard = lambda: draw.random() < difficulty  # noqa: E731
    place, name = draw.choice(style.fonts) if hard() else style.fonts[0]
    size = draw.choice(style.sizes) if hard() else style.sizes[len(style.sizes) // 2]
    ink, ground = _colours(draw, style) if hard() else ((0, 0, 0), (255, 255, 255))
    left, top = (draw.choice(style.offsets), draw.choice(style.offsets)) if hard() else (style.offsets[1], style.offsets[1])
    font = load_font(place, name, size)
    x0, y0, x1, y1 = font.getbbox(word)
    width, height = (-(-(n + extra + 4) // PATCH) * PATCH for n, extra in ((x1 - x0, left), (y1 - y0, top)))
    image = Image.new("RGB", (max(width, 2 * PATCH), max(height, 2 * PATCH)), ground)
    ImageDraw.Draw(image).text((left - x0, top - y0), word, fill=ink, font=font)
    return image


def blank(image: Image.Image) -> Image.Image:
    """An image of the same size in one grey."""
    return Image.new("RGB", image.size, (127, 127, 127))


def _colours(draw: random.Random, style: Style) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Dark ink on a light ground, both of the style's hues."""

    def colour(least: float, most: float) -> tuple[int, int, int]:
        hue = draw.uniform(*draw.choice(style.hues))
        rgb = colorsys.hsv_to_rgb(hue, draw.uniform(0.1, 0.9) if most < 0.6 else draw.uniform(0.0, 0.25), draw.uniform(least, most))
        return tuple(round(255 * channel) for channel in rgb)

    return colour(0.0, 0.45), colour(0.85, 1.0)


# --- the model ---

VOCABULARY = ("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>")


def config(width: int = 128, latents: int = 8) -> Idefics2Config:
    """A reader of 1.2 million parameters: 16 x 16 positions, characters as tokens."""
    return Idefics2Config(
        vision=VisionConfig(
            hidden_size=width, intermediate_size=3 * width, num_hidden_layers=3, num_attention_heads=4, image_size=16 * PATCH
        ),
        perceiver=PerceiverConfig(n_latents=latents, depth=1, n_heads=4, head_dim=width // 4, num_key_value_heads=2),
        text=TextConfig(
            vocab_size=len(VOCABULARY) + 96,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=width // 4,
            max_position_embeddings=512,
            sliding_window=None,
        ),
        image_token_id=VOCABULARY.index("<image>"),
        eos_token_ids=(VOCABULARY.index("</s>"), VOCABULARY.index("<end_of_utterance>")),
    )


__all__ = ["HELD_OUT", "LETTERS", "TRAINED", "WORDS", "blank", "config", "json", "render"]
