"""Attention of mixed images, each to itself: a padded, masked batch as transformers has it, other libraries, and this engine.

Forward and backward at the shapes of the vision tower, in fp32 on a CPU and bf16 on a card. A provider whose output or gradient is off the
formula's in fp32 by more than the type allows gets no time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from idefics2_fast import ops
from idefics2_fast.benchmarks.accuracy import off_by
from idefics2_fast.benchmarks.case import ENGINE, Case, Row, Scope
from idefics2_fast.benchmarks.model import MIXED_SIZES
from idefics2_fast.benchmarks.timing import Call, Watch
from idefics2_fast.kernels.segments import Segments

HEADS, HEAD_DIM, PATCH = 16, 72, 14  # SigLIP-SO400M
HF, VARLEN, FLASH, XFORMERS = "hf", "torch varlen_attn", "flash-attn", "xformers"
PHASES = ("forward", "backward")
QUICK = ((280, 378), (546, 392))
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative; of rows of some thousand keys

Attend = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]


def cases(scope: Scope) -> Iterator[Case]:
    yield attention_case(QUICK if scope.quick else MIXED_SIZES[0.40][:4], scope.device)


def padded(q: Tensor, k: Tensor, v: Tensor, images: Segments) -> Tensor:
    """A padded batch under a mask of its keys."""
    real = torch.arange(images.longest, device=q.device) < torch.tensor(images.lengths, device=q.device)[:, None]
    padded = (torch.nn.utils.rnn.pad_sequence(x.split(images.lengths), batch_first=True).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*padded, attn_mask=real[:, None, None]).transpose(1, 2)[real]


def engine(q: Tensor, k: Tensor, v: Tensor, images: Segments) -> Tensor:
    return ops.segment_attention(q, k, v, images, scale=HEAD_DIM**-0.5)


def by(name: str) -> Attend:
    """The library behind one of the op's paths."""

    def attend(q: Tensor, k: Tensor, v: Tensor, images: Segments) -> Tensor:
        with ops.using(segment_attention=name):
            return engine(q, k, v, images)

    return attend


def varlen(q: Tensor, k: Tensor, v: Tensor, images: Segments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, images.offsets, images.offsets, images.longest, images.longest, scale=HEAD_DIM**-0.5)


ATTENTIONS: dict[str, Attend] = {HF: padded, VARLEN: varlen, FLASH: by("flash_attn"), XFORMERS: by("xformers"), ENGINE: engine}


def absent(device: torch.device) -> dict[str, str]:
    """Those that need a card, or are not installed."""
    found = {VARLEN: importlib.util.find_spec("torch.nn.attention.varlen"), FLASH: importlib.util.find_spec("flash_attn")}
    found[XFORMERS] = importlib.util.find_spec("xformers")
    lacking = {VARLEN: f"torch {torch.__version__} has none", FLASH: "flash-attn is not installed", XFORMERS: "xformers is not installed"}
    missing = {name: lacking[name] for name, spec in found.items() if spec is None}
    return missing if device.type == "cuda" else {**dict.fromkeys(found, "it needs a CUDA device"), **missing}


def attention_case(sizes: Sequence[tuple[int, int]], device: torch.device) -> Case:
    """Images of these sizes in pixels."""
    images = Segments.of_lengths([(height // PATCH) * (width // PATCH) for height, width in sizes], device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    draw = torch.Generator(device).manual_seed(0)
    q, k, v, grad = torch.randn(4, images.total, HEADS, HEAD_DIM, generator=draw, device=device).to(dtype).unbind()
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]

    def call(attend: Attend) -> Call:
        def run(watch: Watch) -> list[Tensor]:
            with torch.inference_mode(False), torch.enable_grad():
                watch.start("forward")
                y = attend(*inputs, images)
                watch.start("backward")
                gradients = torch.autograd.grad(y, inputs, grad)
                watch.stop()
                return [y.detach(), *gradients]

        return run

    missing = absent(device)
    calls = {name: call(attend) for name, attend in ATTENTIONS.items() if name not in missing}
    name = f"{len(sizes)} images, {images.total} patches, {str(dtype).removeprefix('torch.')}"
    rows = (*(Row(name, (phase,), pass_=phase) for phase in PHASES), Row(name, PHASES, needs={HF: 1.0}, pass_="both"))
    return Case("segment_attention", calls, _near(inputs, grad, images), rows, missing)


def _near(inputs: Sequence[Tensor], grad: Tensor, images: Segments) -> Callable[[str, Sequence[Tensor]], str]:
    """A check against the formula, image by image in fp32."""
    exact = [x.detach().float().requires_grad_() for x in inputs]
    with torch.inference_mode(False), torch.enable_grad():
        y = by("reference")(*exact, images)
        expected = [y.detach(), *torch.autograd.grad(y, exact, grad.float())]

    def check(name: str, actual: Sequence[Tensor]) -> str:
        return off_by(actual, expected, TOLERANCES[grad.dtype])

    return check
