"""The seam between the model and the kernels: one function an op, which only chooses an implementation.

The rule is `choose`. Every op takes the first implementation of its row in `IMPLEMENTATIONS` that can run here; `using` overrides it:

    with ops.using(segment_attention="sdpa"):
        model(batch)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from idefics2_fast.kernels import decode_attention as _decode_attention
from idefics2_fast.kernels import dora_linear as _dora_linear
from idefics2_fast.kernels import embedding as _embedding
from idefics2_fast.kernels import linear as _linear
from idefics2_fast.kernels import linear_cross_entropy as _linear_cross_entropy
from idefics2_fast.kernels import perceiver_attention as _perceiver_attention
from idefics2_fast.kernels import perceiver_context as _perceiver_context
from idefics2_fast.kernels import philox as _philox
from idefics2_fast.kernels import rms_norm as _rms_norm
from idefics2_fast.kernels import segment_attention as _segment_attention
from idefics2_fast.kernels.decode_attention import Slots
from idefics2_fast.kernels.embedding import Noise
from idefics2_fast.kernels.segments import Segments

_HALF = (torch.bfloat16, torch.float16)
# Of all `using` blocks that are open, in all threads: the last one that names an op decides.
_overrides: list[dict[str, str]] = []


def _installed(package: str) -> bool:
    from idefics2_fast import doctor

    return doctor.installed(package)


def _flash_segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, window: int | None, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=segments.offsets,
        cu_seqlens_k=segments.offsets,
        max_seqlen_q=segments.longest,
        max_seqlen_k=segments.longest,
        softmax_scale=scale,
        causal=causal,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )


def _triton_segments(*args: Any, **kwargs: Any) -> Tensor:
    from idefics2_fast.kernels.segment_attention_triton import attend

    return attend(*args, **kwargs)


def _xformers_segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, window: int | None, scale: float) -> Tensor:
    from xformers.ops import fmha

    groups = q.shape[1] // k.shape[1]
    q, k, v = q[None], *(x[None].repeat_interleave(groups, 2) for x in (k, v))
    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(segments.lengths, device=q.device)
    mask = mask.make_causal() if causal else mask
    mask = mask.make_local_attention(window) if window is not None else mask
    return fmha.memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale)[0]


def _flash_decode(q: Tensor, k: Tensor, v: Tensor, slots: Slots, *, window: int | None, scale: float) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    pages = torch.arange(-(-slots.capacity // PAGE), dtype=torch.int32, device=q.device)
    last = k.shape[0] // PAGE - 1
    return flash_attn_with_kvcache(
        q[:, None],
        k.unflatten(0, (-1, PAGE)),
        v.unflatten(0, (-1, PAGE)),
        cache_seqlens=slots.lengths.to(torch.int32),
        block_table=((slots.starts // PAGE).to(torch.int32)[:, None] + pages).clamp_(max=last),
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )[:, 0]


def _triton_dora_linear(*args: Any, **kwargs: Any) -> Tensor:
    from idefics2_fast.kernels.dora_linear_triton import project

    return project(*args, **kwargs)


def _triton_embedding(*args: Any, **kwargs: Any) -> Tensor:
    from idefics2_fast.kernels.embedding_triton import embedding

    return embedding(*args, **kwargs)


def _triton_linear_cross_entropy(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from idefics2_fast.kernels.linear_cross_entropy_triton import fused

    return fused(*args, **kwargs)


def _triton_perceiver_attention(*args: Any, **kwargs: Any) -> Tensor:
    from idefics2_fast.kernels.perceiver_attention_triton import attend

    return attend(*args, **kwargs)


def _triton_perceiver_context(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from idefics2_fast.kernels.perceiver_context_triton import project

    return project(x, weight, eps)


def _folded_context(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _perceiver_context.folded(x, weight, eps, linear)


def _torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


# Where the kernels' code is.
KERNELS = Path(_linear.__file__).parent
# Rows of a cache page on a GPU: flash-attention's paged cache takes multiples of 256.
PAGE = 256


def _flash_runs(device: str, dtype: torch.dtype, width: int) -> bool:
    return device == "cuda" and dtype in _HALF and width <= 256 and width % 8 == 0 and _installed("flash_attn")


def _xformers_runs(device: str, dtype: torch.dtype, width: int) -> bool:
    return device == "cuda" and width % 8 == 0 and _installed("xformers")


def _triton_runs(device: str, dtype: torch.dtype, width: int) -> bool:
    return device == "cuda" and _installed("triton")


def _triton_attends(device: str, dtype: torch.dtype, width: int) -> bool:
    return _triton_runs(device, dtype, width) and dtype in (*_HALF, torch.float32) and width % 8 == 0 and width <= 128


def _triton_attends_segments(device: str, dtype: torch.dtype, width: int) -> bool:
    """Head dims such as 72, which flash-attention pads to the next multiple of 32: a third more work."""
    return _triton_attends(device, dtype, width) and dtype in _HALF and width % 32 != 0


def _triton_multiplies(device: str, dtype: torch.dtype, width: int) -> bool:
    return _triton_runs(device, dtype, width) and dtype in _HALF and width % 8 == 0


def _on_cuda(device: str, dtype: torch.dtype, width: int) -> bool:
    return device == "cuda"


def _on_cpu(device: str, dtype: torch.dtype, width: int) -> bool:
    return device == "cpu"


def _fp32_on_cpu(device: str, dtype: torch.dtype, width: int) -> bool:
    return device == "cpu" and dtype == torch.float32


def _upcasts(device: str, dtype: torch.dtype, width: int) -> bool:
    return _linear.needs_upcast(device, dtype)


def _triton_adapts(device: str, dtype: torch.dtype, width: int) -> bool:
    return _triton_runs(device, dtype, width) and dtype == torch.bfloat16 and width % 8 == 0


def _always(device: str, dtype: torch.dtype, width: int) -> bool:
    return True


Runs = Callable[[str, torch.dtype, int], bool]

# op -> implementations in order of preference: name, does it run for (device type, dtype, width of the last axis), the function
IMPLEMENTATIONS: dict[str, dict[str, tuple[Runs, Callable[..., Any]]]] = {
    "segment_attention": {
        "triton": (_triton_attends_segments, _triton_segments),
        "flash_attn": (_flash_runs, _flash_segments),
        "xformers": (_xformers_runs, _xformers_segments),
        "sdpa": (_always, _segment_attention.sdpa),
        "reference": (_always, _segment_attention.reference),
    },
    "perceiver_attention": {
        "triton": (_triton_attends, _triton_perceiver_attention),
        "sdpa": (_always, _perceiver_attention.sdpa),
        "reference": (_always, _perceiver_attention.reference),
    },
    "perceiver_context": {
        "triton": (_triton_multiplies, _triton_perceiver_context),
        "folded": (_always, _folded_context),
        "reference": (_always, _perceiver_context.reference),
    },
    "decode_attention": {
        "flash_attn": (_flash_runs, _flash_decode),
        "sdpa_static": (_on_cuda, _decode_attention.sdpa_static),
        "sdpa_ragged": (_always, _decode_attention.sdpa_ragged),
        "reference": (_always, _decode_attention.reference),
    },
    "linear": {
        "upcast": (_upcasts, _linear.upcast),
        "cpu": (_fp32_on_cpu, _linear.cpu),
        "torch": (_always, F.linear),
        "reference": (_always, _linear.reference),
    },
    "dora_linear": {
        "triton": (_triton_adapts, _triton_dora_linear),
        "factored": (_always, _dora_linear.factored),
        "reference": (_always, _dora_linear.reference),
    },
    "rms_norm": {
        "cpu": (_on_cpu, _rms_norm.cpu),
        "torch": (_always, _torch_rms_norm),
        "reference": (_always, _rms_norm.reference),
    },
    "linear_cross_entropy": {
        "triton": (_triton_runs, _triton_linear_cross_entropy),
        "chunked": (_always, _linear_cross_entropy.chunked),
        "reference": (_always, _linear_cross_entropy.reference),
    },
    "embedding": {
        "triton": (_triton_runs, _triton_embedding),
        "cpu": (_on_cpu, _embedding.cpu),
        "reference": (_always, _embedding.reference),
    },
}


def choose(op: str, x: Tensor) -> str:
    """The name of the implementation that `op` takes for queries (or rows) like `x`."""
    # The compiler reads through caches, and says so in a warning.
    preferred = _preferred.__wrapped__ if torch.compiler.is_compiling() else _preferred
    return _forced(op) or preferred(op, "cpu" if x.is_cpu else x.device.type, x.dtype, x.shape[-1])


def _forced(op: str) -> str | None:
    for names in reversed(_overrides):
        if op in names:
            return names[op]
    return None


@cache
def _preferred(op: str, device: str, dtype: torch.dtype, width: int) -> str:
    rows = IMPLEMENTATIONS[op].items()
    return next(name for name, (runs, _) in rows if runs(device, dtype, width) and (name != "triton" or _trusted(op)))


def _trusted(op: str) -> bool:
    """Whether the op's Triton kernels are right on this device: checked at their first use here, see `doctor.py`."""
    from idefics2_fast import doctor

    return doctor.trusts(op)


@contextmanager
def using(**implementations: str) -> Iterator[None]:
    """Force implementations by name, e.g. `using(segment_attention="reference")`, within a `with` block.

    It holds in all threads: autograd recomputes checkpointed layers in threads of its own. Blocks of
    several threads may end in any order; each takes back its own names alone.

    Raises:
        ValueError: no such op, or no such implementation of it.
    """
    for op, name in implementations.items():
        if name not in IMPLEMENTATIONS.get(op, ()):
            known = ", ".join(IMPLEMENTATIONS[op]) if op in IMPLEMENTATIONS else f"an op: {', '.join(IMPLEMENTATIONS)}"
            raise ValueError(f"{op} has no implementation {name!r}: expected {known}")
    _overrides.append(implementations)
    try:
        yield
    finally:
        _overrides[:] = [names for names in _overrides if names is not implementations]


def _run(op: str, x: Tensor) -> Callable[..., Any]:
    return IMPLEMENTATIONS[op][choose(op, x)][1]


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float, causal: bool = False, window: int | None = None
) -> Tensor:
    """Attention of each segment to itself: q [T, N, H], k and v [T, M, H] -> [T, N, H]. See `kernels/segment_attention.py`."""
    return _run("segment_attention", q)(q, k, v, segments, causal=causal, window=window, scale=scale)


def perceiver_attention(
    q: Tensor, k_context: Tensor, v_context: Tensor, k_latents: Tensor, v_latents: Tensor, images: Segments, *, scale: float
) -> Tensor:
    """Attention of each image's latents to its context and themselves -> [I * L, N, H]. See `kernels/perceiver_attention.py`."""
    return _run("perceiver_attention", q)(q, k_context, v_context, k_latents, v_latents, images, scale=scale)


def perceiver_context(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms(x)^-1 * (x W^T), K/V of all layers: x [P, C], weight [K, C] -> [P, K]. See `kernels/perceiver_context.py`."""
    return _run("perceiver_context", x)(x, weight, eps)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, slots: Slots, *, scale: float, window: int | None = None) -> Tensor:
    """One query a sequence against the flat cache: q [D, N, H], k and v [R, M, H] -> [D, N, H]. See `kernels/decode_attention.py`."""
    return _run("decode_attention", q)(q, k, v, slots, window=window, scale=scale)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] W^T + b -> [T, out]. See `kernels/linear.py`."""
    return _run("linear", x)(x, weight, bias)


def dora_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None = None, bias: Tensor | None = None, **settings: Any
) -> Tensor:
    """m / ||W + s B A|| * (W + s B A) x + b: x [..., in] -> [..., out]. See `kernels/dora_linear.py`, for the settings too."""
    return _run("dora_linear", x)(x, weight, a, b, magnitude, bias, **settings)


def dora_combine(
    base: Tensor, h: Tensor, b: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None = None, *, scaling: float
) -> Tensor:
    """DoRA on top of a frozen layer's output: m / n * (base - bias + s B h) + bias. See `kernels/dora_linear.py`."""
    return _dora_linear.combine(base, h, b, magnitude, norm, bias, scaling=scaling)


def dora_folds(x: Tensor, weight: Tensor) -> bool:
    """Whether `dora_folded` is for rows like `x`. See `kernels/dora_linear.py`."""
    return _is_triton_dora(x, weight) or _dora_linear.folds(x, weight)


def dora_folded(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    b: Tensor,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """m / n * (W x + s B h) + bias of a frozen W: by Triton, or in training on a CPU. See `kernels/dora_linear.py`, for the settings too.

    Triton's kernel for the whole is taken where `fuses` in `kernels/dora_linear_triton.py` predicts it to be no slower than the library's
    product with passes over its result, which are taken elsewhere.
    """
    path = _dora_kernels() if _is_triton_dora(x, weight) else _dora_linear
    return path.folded(x, h, weight, b, magnitude, norm, bias, **settings)


def _is_triton_dora(x: Tensor, weight: Tensor) -> bool:
    return choose("dora_linear", x) == "triton" and x.dtype == weight.dtype


def _dora_kernels() -> ModuleType:
    from idefics2_fast.kernels import dora_linear_triton

    return dora_linear_triton


def dora_square(weight: Tensor) -> Tensor:
    """||W||^2 of the rows, the part of DoRA's norm that an adapter does not change. See `kernels/dora_linear.py`."""
    return (_dora_kernels() if choose("dora_linear", weight) == "triton" else _dora_linear).row_square(weight)


def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float, square: Tensor | None = None) -> Tensor:
    """||W + s B A|| of the rows. See `kernels/dora_linear.py`."""
    path = _dora_kernels() if choose("dora_linear", weight) == "triton" else _dora_linear
    return path.row_norm(weight, a, b, scaling, square)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w over the last axis of x [T, C]. See `kernels/rms_norm.py`."""
    return _run("rms_norm", x)(x, weight, eps)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, row_weights: Tensor | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum of the rows' losses and count of rows: hidden [R, C], weight [V, C], targets [R], -100 for a row that does not count.

    See `kernels/linear_cross_entropy.py`; `answer_rows` finds the rows of a padded batch.
    """
    return _run("linear_cross_entropy", hidden)(hidden, weight, targets, row_weights=row_weights, z_loss=z_loss)


def answer_rows(hidden: Tensor, labels: Tensor, *, shifted: bool = False, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Rows [R, C] of hidden [B, S, C] that carry loss, and their targets [R]. See `kernels/linear_cross_entropy.py`."""
    return _linear_cross_entropy.answer_rows(hidden, labels, shifted=shifted, ignore_index=ignore_index)


def embedding(
    token_ids: Tensor | None,
    table: Tensor,
    features: Tensor | None = None,
    image_rows: Tensor | None = None,
    noise: Noise | None = None,
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """Rows of the table [V, C] for token_ids [T], or of features [N, C] in image_rows [N], with NEFTune's noise -> [T, C].

    See `kernels/embedding.py`; `Noise.of` makes the noise of packed documents. Without token_ids the table has the tokens' rows already.
    """
    return _run("embedding", table)(token_ids, table, features, image_rows, noise, padding_idx=padding_idx)


def uniform(seed: int, step: int, rows: Tensor, width: int) -> Tensor:
    """Numbers from U(-1, 1), fp32 [T, width], fixed by (seed, step, row, column) alone. See `kernels/philox.py`."""
    return _philox.uniform(seed, step, rows, width)
