"""Photographs that packages ship, so that nothing has to be downloaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# Where each lies: the package, and the folder in it.
SKLEARN, SKIMAGE, MATPLOTLIB = ("sklearn", "datasets/images"), ("skimage", "data"), ("matplotlib", "mpl-data/sample_data")
PLACES = {
    "china.jpg": SKLEARN,
    "flower.jpg": SKLEARN,
    "grace_hopper.jpg": MATPLOTLIB,
    "astronaut.png": SKIMAGE,
    "chelsea.png": SKIMAGE,
    "coffee.png": SKIMAGE,
}


def photograph(name: str) -> Path:
    """Where a photograph lies. Ends the program where its package is not installed or lacks the file."""
    package, folder = PLACES[name]
    return shipped_file(package, folder, name)


def shipped_file(package: str, folder: str, name: str) -> Path:
    """A file inside of a package, which is not imported. Ends the program where the package is not installed or lacks the file."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0], folder, name) if spec else None
    if path is None or not path.is_file():
        raise SystemExit(f"The file {name} ships in the package {package}, which is not installed: pip install 'idefics2-fast[demo]'")
    return path
