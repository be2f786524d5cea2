"""Linear layers on a CPU, where PyTorch's own path is slow.

    y = x W^T + b

Half precision without half-precision matrix units: PyTorch multiplies in a scalar loop, 15 GFLOP/s against 80 in fp32 on two Zen 3 cores.
`upcast` widens the weight block by block, multiplies in fp32 and rounds once, which is also nearer to the exact product.

A few rows in fp32, as in decoding: x W^T with 2 to 8 rows runs at a third of the speed of W x^T, and a matrix-vector product with a tall
matrix at two thirds. `cpu` turns these products round.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Output rows of W that are widened at a time: 512 x 4096 fp32 is 8 MiB, in reach of the last-level cache.
BLOCK = 512
# Up to so many rows of x the product is bound by reading W, and PyTorch's matrix-vector path reads it at full width.
FEW_ROWS = 4
# Up to so many rows W x^T is the faster order in fp32. For a single row it is with a matrix at least so wide and so many times as high.
TURNED_ROWS = 8
WIDE = 256
TALL = 8


# Operators that say whether oneDNN multiplies a dtype on this CPU, capped or not. Builds without oneDNN have none.
_QUESTIONS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
UNITS = {dtype for dtype, question in _QUESTIONS.items() if getattr(torch.ops.mkldnn, question, bool)()}


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has units for products of a half-precision dtype."""
    return dtype in UNITS


def needs_upcast(device: str, dtype: torch.dtype) -> bool:
    """Whether half precision is asked of a CPU that multiplies such numbers one at a time."""
    return device == "cpu" and dtype in (torch.bfloat16, torch.float16) and not _cpu_multiplies(dtype)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in the inputs' dtype: x [T, in], weight [out, in], bias [out] -> [T, out]."""
    y = x @ weight.T
    return y if bias is None else y + bias


def cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same; few rows without gradients as W x^T."""
    rows, (out, width) = x.shape[0], weight.shape
    tall = width >= WIDE and out >= TALL * width
    if torch.is_grad_enabled() or rows > TURNED_ROWS or (rows < 2 and not tall):
        return F.linear(x, weight, bias)
    columns = x.repeat(2, 1) if rows == 1 else x  # one column would be a matrix-vector product again; a stride of 0 costs as much
    y = (weight @ columns.T)[:, :rows].T.contiguous()
    return y if bias is None else y.add_(bias)


def upcast(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same with products and sums in fp32; differentiable."""
    return _Upcast.apply(x, weight, bias) if x.shape[0] > FEW_ROWS else F.linear(x, weight, bias)


def _wide_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of `weight` in fp32, one after another in the same memory."""
    buffer = torch.empty(min(BLOCK, weight.shape[0]), weight.shape[1], dtype=torch.float32)
    for start in range(0, weight.shape[0], BLOCK):
        rows = slice(start, min(start + BLOCK, weight.shape[0]))
        yield rows, buffer[: rows.stop - start].copy_(weight[rows])


class _Upcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        out = x.new_empty(x.shape[0], weight.shape[0])
        wide = x.float()
        for rows, block in _wide_blocks(weight):
            y = wide @ block.T
            out[:, rows] = y if bias is None else y.add_(bias[rows])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide = grad.float()
        grad_x = torch.zeros(x.shape, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        wide_x = x.float() if ctx.needs_input_grad[1] else None
        for rows, block in _wide_blocks(weight):
            if grad_x is not None:
                grad_x.addmm_(wide[:, rows], block)
            if grad_weight is not None:
                grad_weight[rows] = wide[:, rows].T @ wide_x
        grad_bias = wide.sum(0).to(grad.dtype) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, grad_bias
