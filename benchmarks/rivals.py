"""Libraries that cannot live beside this package's own, each in an environment of its own, timed through a pipe.

`make rivals` makes the environments: pillow-simd takes Pillow's place, and torchvision is built against one torch alone. This file is both
ends of the pipe. As a script, run by another environment's Python, it prepares jobs and runs them one at a time on request: the time is
taken there, around the work alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ENVIRONMENTS = Path(sys.prefix) / "rivals"
PATCH = 14

Run = Callable[[], Any]


class Rival:
    """One library's process.

    Attributes:
        name: of the environment.
        absent: why it cannot be compared with; "" where it can.
        version: of the library.
    """

    def __init__(self, name: str) -> None:
        self.name, self.version = name, ""
        self.absent = f"{name} is not installed: `make rivals` tries to"
        python = ENVIRONMENTS / name / "bin" / "python"
        if not python.exists():
            return
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        self._folder = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [str(python), __file__, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        try:
            self.version = self._ask(do="hello")
            self.absent = ""
        except RuntimeError as error:
            self.absent = f"{name} does not run: {error}"
            self._folder.cleanup()

    def prepare(self, images: Sequence[np.ndarray], **settings: Any) -> Rival.Job:
        """A job on these images, uint8 [H, W, 3]."""
        path = Path(self._folder.name) / "images.npz"
        np.savez(path, *images)
        return Rival.Job(self, self._ask(do="prepare", images=str(path), settings=settings))

    def close(self) -> None:
        if not self.absent:
            self._process.communicate()
            self._folder.cleanup()

    def _ask(self, **request: Any) -> Any:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: its last words follow
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(self._process.communicate()[1].strip().splitlines()[-1])
        return json.loads(answer)

    class Job:
        """Work that the process can do again and again."""

        def __init__(self, rival: Rival, number: int) -> None:
            self.rival, self.number = rival, number

        def seconds(self) -> float:
            """Does it once."""
            return self.rival._ask(do="run", job=self.number)

        def output(self) -> np.ndarray:
            """Of the last run."""
            path = Path(self.rival._folder.name) / "output.npy"
            self.rival._ask(do="output", job=self.number, to=str(path))
            return np.load(path)


def packed(pixel_values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """float32 [P, 588]: the full patches of transformers' padded images [B, N, 3, H, W], in Conv2d's order."""
    patches = [np.empty((0, 3 * PATCH * PATCH), np.float32)]
    for image, real in zip(pixel_values.reshape(-1, *pixel_values.shape[2:]), mask.reshape(-1, *mask.shape[2:]), strict=True):
        rows, columns = int(real[:, 0].sum()) // PATCH, int(real[0].sum()) // PATCH
        grid = image[:, : rows * PATCH, : columns * PATCH].reshape(3, rows, PATCH, columns, PATCH)
        patches.append(grid.transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1))
    return np.concatenate(patches)


# --- the other end: no import of this package, nor of what an environment may lack ---


def _torchvision() -> tuple[str, Callable[..., tuple[Run, Callable[[Any], np.ndarray]]]]:
    """transformers' processor on it. torchvision's own operators may have been built for CUDA alone and not load beside a torch for
    CPUs; the processor uses none of them, but importing torchvision without their signatures fails."""
    import torch

    operators = torch.library.Library("torchvision", "FRAGMENT")
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    from transformers.models.idefics2.image_processing_idefics2 import Idefics2ImageProcessor

    torch.set_num_threads(1)
    processor = Idefics2ImageProcessor()

    def prepare(images: list[np.ndarray], split: bool) -> tuple[Run, Callable[[Any], np.ndarray]]:
        run = partial(processor, [images], do_image_splitting=split, return_tensors="pt")
        return run, lambda out: packed(out["pixel_values"].numpy(), out["pixel_attention_mask"].numpy())

    return torchvision.__version__, prepare


def _pillow_simd() -> tuple[str, Callable[..., tuple[Run, Callable[[Any], np.ndarray]]]]:
    import PIL
    from PIL import Image

    def prepare(images: list[np.ndarray], size: tuple[int, int]) -> tuple[Run, Callable[[Any], np.ndarray]]:
        image = Image.fromarray(images[0])
        return lambda: image.resize((size[1], size[0]), Image.Resampling.BILINEAR), np.asarray

    if "post" not in PIL.__version__:
        raise RuntimeError(f"this is Pillow {PIL.__version__}")
    return PIL.__version__, prepare


def _opencv() -> tuple[str, Callable[..., tuple[Run, Callable[[Any], np.ndarray]]]]:
    import cv2

    cv2.setNumThreads(1)

    def prepare(images: list[np.ndarray], size: tuple[int, int]) -> tuple[Run, Callable[[Any], np.ndarray]]:
        return lambda: cv2.resize(images[0], (size[1], size[0]), interpolation=cv2.INTER_AREA), np.asarray

    return cv2.__version__, prepare


LIBRARIES = {"torchvision": _torchvision, "pillow-simd": _pillow_simd, "opencv-python-headless": _opencv}


def _serve(name: str) -> None:
    """Answers one line of JSON with another until there are no more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # where libraries print
    version, prepare = LIBRARIES[name]()
    jobs: list[tuple[Run, Callable[[Any], np.ndarray]]] = []
    outputs: dict[int, Any] = {}

    def answer(do: str, images: str = "", settings: Mapping[str, Any] | None = None, job: int = 0, to: str = "") -> Any:
        if do == "hello":
            return version
        if do == "prepare":
            with np.load(images) as loaded:
                jobs.append(prepare([loaded[key] for key in loaded.files], **settings))
            return len(jobs) - 1
        if do == "output":
            return np.save(to, jobs[job][1](outputs.pop(job)))
        start = time.perf_counter()
        output = jobs[job][0]()
        seconds = time.perf_counter() - start
        outputs.clear()
        outputs[job] = output
        return seconds

    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
