"""A page as a parser reads it, and as a browser draws it."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

VOID = {"meta", "img"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LIGHT, DARK = 1, 0  # schemes of colours


class Page(HTMLParser):
    """Collects what a page holds; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.places = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.places += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def drawn(page: Path, scheme: int, folder: Path, size: str = "1200,1400") -> dict[tuple[int, int, int], int]:
    """The colours of the page in a headless browser, and how many pixels each has; fails on anything that its console says."""
    shot = folder / f"shot-{scheme}.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", f"--window-size={size}"]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}"]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    return {colour: count for count, colour in Image.open(shot).convert("RGB").getcolors(1 << 24)}
