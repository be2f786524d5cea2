"""Checkpoints as earlier versions of the trainer wrote them."""

import json
from pathlib import Path

from idefics2_fast.training import checkpoint


def make_format_1(folder: Path) -> None:
    """Rewrites a checkpoint as versions did that knew no identity of a run."""
    run = json.loads((folder / "run.json").read_text())
    run.pop("format")
    run.pop("identity")
    (folder / "run.json").write_text(json.dumps(run))
    names = [path.name for path in folder.iterdir() if path.name != "manifest"]
    (folder / "manifest").write_bytes(checkpoint.manifest_of({name: checkpoint.digest(folder / name) for name in names}))
