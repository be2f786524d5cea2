"""A corpus to learn to read from, made on the spot: words in fonts that packages ship, captioned photographs, questions about both.

Every row is a function of its number alone. A style says what drawings vary in; `HELD_OUT` shares no font family, size, hue or place with
`TRAINED`.
"""

from __future__ import annotations

import colorsys
import functools
import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from idefics2_fast.benchmarks.photographs import photograph, shipped_file

PATCH = 14
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = tuple(
    "anchor apple basket bread candle chair cloud dragon dream eagle engine flame forest grape green horse house island jungle knife "
    "lemon light mouse music night ocean paper piano queen river robot snake stone table tiger uncle violin water yellow zebra".split()
)
MORE_WORDS = tuple(
    "actor angel arrow autumn badge banana beach bench berry bird boat bottle branch bridge brush bucket butter button cabin camel "
    "camera carrot castle cherry circle clock coffee copper corner cotton crown dance desert doctor door duck earth falcon farmer "
    "finger fish flower garden ghost giant glass glove gold guitar hammer harbor honey insect jacket jewel kettle king kitten ladder "
    "lamp leaf lion magnet maple marble mirror monkey moon needle nurse onion orange parrot pencil pepper pillow planet pocket potato "
    "rabbit rocket saddle salmon school shadow silver spider spoon spring stamp star storm street sugar summer sunset swan temple "
    "ticket tomato tower train tree tunnel turtle valley velvet wagon walnut wheel".split()
)

READ = "Which word is this?"
CAPTION = "What is shown?"
FIRST, COUNT, KIND = "Which letter is first?", "How many letters are there?", "Is it a word?"
# What photographs show, in few letters.
CAPTIONS = {
    "china.jpg": "temple",
    "flower.jpg": "flower",
    "grace_hopper.jpg": "officer",
    "astronaut.png": "astronaut",
    "chelsea.png": "cat",
    "coffee.png": "coffee",
}

Fonts = tuple[tuple[str, str, str], ...]  # package, folder, file


def _fonts(package: str, folder: str, *names: str) -> Fonts:
    return tuple((package, folder, name) for name in names)


TRAINED_FONTS = (
    *_fonts("matplotlib", "mpl-data/fonts/ttf", "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSansMono.ttf"),
    *_fonts("matplotlib", "mpl-data/fonts/ttf", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "STIXGeneral.ttf", "STIXGeneralBol.ttf"),
    *_fonts("matplotlib", "mpl-data/fonts/ttf", "cmr10.ttf", "cmss10.ttf"),
    *_fonts("font_manrope", "files", "Manrope-Regular.ttf", "Manrope-Bold.ttf"),
)
HELD_OUT_FONTS = (
    *_fonts("font_hanken_grotesk", "files", "HankenGrotesk-Regular.otf", "HankenGrotesk-Medium.otf", "HankenGrotesk-Bold.otf"),
    *_fonts("font_caladea", "files", "Caladea-Regular.ttf", "Caladea-Bold.ttf", "Caladea-Italic.ttf"),
)


@dataclass(frozen=True)
class Style:
    """What drawings vary in: fonts (easy drawings have the first), sizes and places in pixels (from left, from top), bands of hues."""

    fonts: Fonts
    sizes: tuple[int, ...]
    hues: tuple[tuple[float, float], ...]
    lefts: tuple[int, ...]
    tops: tuple[int, ...]


TRAINED = Style(TRAINED_FONTS, (18, 20, 22, 24), ((0.0, 0.25), (0.35, 0.6), (0.7, 1.0)), (0, 2, 4, 6, 8, 10), (0, 2, 4))
HELD_OUT = Style(HELD_OUT_FONTS, (19, 21, 23), ((0.26, 0.34), (0.61, 0.69)), (1, 3, 5, 7, 9), (1, 3))
# To read letters that no word has together: slanted fonts as well, and easy drawings in letters of one width, about a patch each.
TRAINED_MORE = replace(
    TRAINED,
    fonts=(
        *_fonts("matplotlib", "mpl-data/fonts/ttf", "DejaVuSansMono.ttf", "DejaVuSerif-Italic.ttf", "STIXGeneralItalic.ttf"),
        *_fonts("matplotlib", "mpl-data/fonts/ttf", "cmti10.ttf", "cmb10.ttf"),
        *(font for font in TRAINED_FONTS if font[2] != "DejaVuSansMono.ttf"),
    ),
)
# Of patches, the least of a drawing. Positions are shares of an image's sides: on drawings of one size they are learned soon.
COLUMNS, ROWS = 8, 2
SNAPSHOT = 4  # the patches on a side of a photograph


@functools.cache
def load_font(package: str, folder: str, name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of an installed package. Ends the program where the package is missing."""
    return ImageFont.truetype(str(shipped_file(package, folder, name)), size)


@dataclass(frozen=True)
class Drawing:
    """A text as it is to be drawn: `ink` and `ground` are RGB, `place` is where it begins, (left, top)."""

    text: str
    font: tuple[str, str, str, int]
    ink: tuple[int, int, int]
    ground: tuple[int, int, int]
    place: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Columns and rows of patches."""
        shape = _shape(self.text, self.font)
        columns, rows = (-(-(extent + start) // PATCH) for extent, start in zip(shape.size, self.place, strict=True))
        return max(columns, COLUMNS), max(rows, ROWS)

    def image(self) -> Image.Image:
        """An RGB image whose sides are whole patches."""
        columns, rows = self.grid
        image = Image.new("RGB", (columns * PATCH, rows * PATCH), self.ground)
        image.paste(self.ink, self.place, _shape(self.text, self.font))
        return image


@functools.lru_cache(maxsize=8192)
def _shape(text: str, font: tuple[str, str, str, int]) -> Image.Image:
    """How much ink is where, of the text alone: mode L. Words return often."""
    loaded = load_font(*font)
    x0, y0, x1, y1 = loaded.getbbox(text)
    shape = Image.new("L", (x1 - x0, y1 - y0))
    ImageDraw.Draw(shape).text((-x0, -y0), text, fill=255, font=loaded)
    return shape


def draw(text: str, chance: random.Random, difficulty: float = 1.0, style: Style = TRAINED) -> Drawing:
    """A drawing of a text.

    Args:
        difficulty: how likely font, size, colours and place are to vary, each for itself. 0: one font, one size, one place, black on white.
    """
    varies = [chance.random() < difficulty for _ in range(4)]
    font = chance.choice(style.fonts) if varies[0] else style.fonts[0]
    size = chance.choice(style.sizes) if varies[1] else style.sizes[len(style.sizes) // 2]
    ink, ground = _colours(chance, style) if varies[2] else ((0, 0, 0), (255, 255, 255))
    place = (chance.choice(style.lefts), chance.choice(style.tops)) if varies[3] else (style.lefts[1], style.tops[1])
    return Drawing(text, (*font, size), ink, ground, place)


def _colours(chance: random.Random, style: Style) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Dark ink and a light ground, each of one of the style's hues."""

    def colour(saturation: tuple[float, float], value: tuple[float, float]) -> tuple[int, int, int]:
        hue = chance.uniform(*chance.choice(style.hues))
        return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, chance.uniform(*saturation), chance.uniform(*value)))

    return colour((0.1, 0.9), (0.0, 0.45)), colour((0.0, 0.25), (0.85, 1.0))


def blank(image: Image.Image) -> Image.Image:
    """An image of the same size in one grey."""
    return Image.new("RGB", image.size, (127, 127, 127))


def is_held_out(letters: str) -> bool:
    """Whether a string of letters belongs to those that are never trained on: one in eight."""
    return zlib.crc32(letters.encode()) % 8 == 0


def random_letters(chance: random.Random, lengths: tuple[int, int], held_out: bool = False) -> str:
    """A string of random letters, of a length in a range, from those trained on or from the others."""
    while is_held_out(letters := "".join(chance.choices(LETTERS, k=chance.randint(*lengths)))) is not held_out:
        pass
    return letters


@functools.cache
def _thumbnail(name: str) -> Image.Image:
    """The photograph, its longer side 80 pixels."""
    with Image.open(photograph(name)) as opened:
        image = opened.convert("RGB")
    image.thumbnail((80, 80))
    return image


def snapshot(name: str, chance: random.Random) -> Image.Image:
    """A square from anywhere in a small version of the photograph."""
    image, side = _thumbnail(name), SNAPSHOT * PATCH
    box = min(image.size)
    left, top = chance.randint(0, image.width - box), chance.randint(0, image.height - box)
    return image.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + box, top + box))


@dataclass(frozen=True)
class Lessons(Sequence):
    """Rows to learn to read from, easy ones first: words, or random letters, in more and more styles, and captioned photographs.

    Over the first `easy` share of the rows texts become more various, from `WORDS` alone to all words and random letters. The difficulty is
    0 there, then rises to 1 along a line, where it is from `hard` on. Within windows of `WINDOW` rows drawings stand by size: neighbours of
    one size are attended to by one call.

    Args:
        letters: share of the rows that show random letters in place of a word, once the easy rows are over.
        captions: share of the rows that show a photograph.
    """

    rows: int
    words: tuple[str, ...] = WORDS
    style: Style = TRAINED
    letters: float = 0.0
    captions: float = 0.05
    easy: float = 0.07
    hard: float = 0.35
    seed: int = 0

    WINDOW = 256

    @property
    def fingerprint(self) -> str:
        """For a run's identity: what the rows depend on."""
        return repr(self)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < self.rows:
            raise IndexError(row)
        window, place = divmod(row, self.WINDOW)
        subject = _window(self, window)[place]
        if isinstance(subject, Drawing):
            return asked(subject.image(), {READ: subject.text})
        return asked(snapshot(subject, self._chance(row)), {CAPTION: CAPTIONS[subject]})

    def difficulty(self, row: int) -> float:
        """How hard drawings are at a row."""
        return min(1.0, max(0.0, (row / self.rows - self.easy) / (self.hard - self.easy)))

    def variety(self, row: int) -> float:
        """Which share of the words, and of the random letters, there is at a row: few texts come first."""
        return min(1.0, row / max(1.0, self.easy * self.rows))

    def _chance(self, row: int) -> random.Random:
        return random.Random(f"{self.seed} {row}")

    def _subject(self, row: int) -> Drawing | str:
        """A drawing, or the name of a photograph."""
        chance = self._chance(row)
        kind = chance.random()
        if kind < self.captions:
            return chance.choice(sorted(CAPTIONS))
        variety = self.variety(row)
        if kind < self.captions + (1 - self.captions) * self.letters * variety:
            text = random_letters(chance, (3, 6))
        else:
            text = chance.choice(self.words[: max(len(WORDS), round(variety * len(self.words)))])
        return draw(text, chance, self.difficulty(row), self.style)


@functools.lru_cache(maxsize=4)
def _window(lessons: Lessons, window: int) -> list[Drawing | str]:
    """The subjects of a window of rows, by size."""
    begin = window * lessons.WINDOW
    subjects = [lessons._subject(row) for row in range(begin, min(begin + lessons.WINDOW, lessons.rows))]
    size = lambda subject: (math.prod(subject.grid), len(subject.text)) if isinstance(subject, Drawing) else (SNAPSHOT**2, 0)  # noqa: E731
    return sorted(subjects, key=size)


@dataclass(frozen=True)
class Questions(Sequence):
    """Rows of several questions about one image each: four of five show a word, the others a photograph.

    Args:
        held_out: so many of the rows, the last ones, are drawn in the style that is held out.
    """

    rows: int
    held_out: int = 0
    words: tuple[str, ...] = WORDS
    seed: int = 0

    @property
    def fingerprint(self) -> str:
        """For a run's identity: what the rows depend on."""
        return repr(self)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < self.rows:
            raise IndexError(row)
        chance = random.Random(f"questions {self.seed} {row}")
        if chance.random() < 0.2:
            name = chance.choice(sorted(CAPTIONS))
            return asked(snapshot(name, chance), {CAPTION: CAPTIONS[name], KIND: "no"})
        word = chance.choice(self.words)
        style = HELD_OUT if row >= self.rows - self.held_out else TRAINED
        return asked(draw(word, chance, style=style).image(), {FIRST: word[0], COUNT: str(len(word)), KIND: "yes", READ: word})


def asked(image: Image.Image, answers: dict[str, str]) -> dict[str, Any]:
    """A row of The Cauldron's columns: an image, questions and their answers."""
    return {"images": [image], "texts": [{"user": question, "assistant": answer} for question, answer in answers.items()]}
