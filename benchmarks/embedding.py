"""The first hidden states of a training step: embedding, NEFTune's noise and image features, in transformers' three steps and in one here.

With and without noise, and with the table frozen or trained. A provider whose image rows or gradients are wrong, or whose noise leaves its
bounds, gets no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from idefics2_fast import ops
from idefics2_fast.benchmarks.accuracy import off_by
from idefics2_fast.benchmarks.case import ENGINE, Case, Row, Scope
from idefics2_fast.benchmarks.timing import Call, Watch
from idefics2_fast.kernels.segments import Segments

# Idefics2-8B's table, and images of 64 tokens for a quarter of the rows; fewer tokens on a CPU.
VOCABULARY, WIDTH, IMAGE_TOKEN, LATENTS = 32003, 4096, 32001, 64
TOKENS = {"cpu": 2048, "cuda": 8192}
QUICK = 512
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
ALPHA = 5.0
HF = "hf"
CASES = [(noise, trained) for noise in (False, True) for trained in (False, True)]


def cases(scope: Scope) -> Iterator[Case]:
    torch.manual_seed(0)
    tokens = QUICK if scope.quick else TOKENS[scope.device.type]
    yield from scope.first(embedding_case(*case, scope.device, tokens) for case in CASES)


@dataclass(frozen=True)
class Inputs:
    """One document, its images' features, and the gradient [T, C] that comes back."""

    ids: Tensor
    rows: Tensor
    table: Tensor
    features: Tensor
    grad: Tensor

    @classmethod
    def draw(cls, tokens: int, dtype: torch.dtype, device: torch.device, trained: bool) -> Inputs:
        ids = torch.randint(0, 32000, (tokens,), device=device)
        rows = torch.arange(tokens, device=device).view(-1, LATENTS)[::4].flatten()
        ids[rows] = IMAGE_TOKEN
        table = torch.randn(VOCABULARY, WIDTH, dtype=dtype, device=device).requires_grad_(trained)
        features = torch.randn(rows.shape[0], WIDTH, dtype=dtype, device=device, requires_grad=True)
        return cls(ids, rows, table, features, torch.randn(tokens, WIDTH, dtype=dtype, device=device))

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.table, self.features) if leaf.requires_grad]


def hf_chain(inputs: Inputs, noise: bool) -> Tensor:
    """transformers: the embedding, Trainer's hook on it, then the features scattered over a mask of all values, their number checked."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    ids = inputs.ids[None]
    x = F.embedding(ids, inputs.table, padding_idx=0)
    if noise:
        x = neftune_post_forward_hook(SimpleNamespace(training=True, neftune_noise_alpha=ALPHA), None, x)
    mask = (ids == IMAGE_TOKEN).unsqueeze(-1)
    assert mask.sum() * WIDTH == inputs.features.numel()
    return x.masked_scatter(mask, inputs.features)[0]


def engine(inputs: Inputs, noise: bool) -> Tensor:
    documents = Segments.of_lengths([len(inputs.ids)], inputs.ids.device)
    drawn = ops.Noise.of(documents, alpha=ALPHA, seed=0, step=0) if noise else None
    return ops.embedding(inputs.ids, inputs.table, inputs.features, inputs.rows, drawn, padding_idx=0)


CHAINS = {HF: hf_chain, ENGINE: engine}


def embedding_case(noise: bool, trained: bool, device: torch.device, tokens: int) -> Case:
    """Both providers on the same inputs."""
    dtype = DTYPES[device.type]
    inputs = Inputs.draw(tokens, dtype, device, trained)

    def call(chain: Callable[[Inputs, bool], Tensor]) -> Call:
        def run(watch: Watch) -> list[Tensor]:
            with torch.inference_mode(False), torch.enable_grad():
                watch.start("forward")
                y = chain(inputs, noise)
                watch.start("backward")
                return [y.detach(), *torch.autograd.grad(y, inputs.leaves, inputs.grad)]

        return run

    name = (
        f"{tokens} tokens, {str(dtype).removeprefix('torch.')}, "
        + ("noise, " if noise else "")
        + f"{'trained' if trained else 'frozen'} table"
    )
    rows = tuple(Row(name, (phase,), pass_=phase) for phase in ("forward", "backward"))
    return Case("embedding", {name: call(chain) for name, chain in CHAINS.items()}, partial(_wrong, inputs, noise), rows)


def _wrong(inputs: Inputs, noise: bool, name: str, output: Sequence[Tensor]) -> str:
    """What is wrong with the hidden states, and with the gradients of table and features."""
    y, *gradients = output
    plain = inputs.table.detach().index_select(0, inputs.ids).index_copy(0, inputs.rows, inputs.features.detach())
    added = (y.float() - plain.float()).abs()
    bound = ALPHA / (len(y) * WIDTH) ** 0.5 if noise else 0.0
    if added.index_select(0, inputs.rows).any() or not (added <= bound + plain.float().abs() * torch.finfo(y.dtype).eps).all():
        return f"the noise goes up to {added.max():.1e}, {bound:.1e} is allowed, and none on image rows"
    text = inputs.grad.float().index_fill(0, inputs.rows, 0).index_fill(0, (inputs.ids == 0).nonzero()[:, 0], 0)
    expected = [inputs.grad.float().index_select(0, inputs.rows)]
    if inputs.table.requires_grad:
        expected.insert(0, torch.zeros(VOCABULARY, WIDTH, device=y.device).index_add_(0, inputs.ids, text))
    return off_by(gradients, expected, 4 * torch.finfo(y.dtype).eps)
