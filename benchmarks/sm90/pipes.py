"""How fast a hot loop could run, by a simple model of a multiprocessor's pipes. It ranks configs and proves nothing.

A loop's instructions are cut into segments at its waits, and where products begin, which need what was computed before. Within a segment
all warps of a CTA overlap, so it takes as long as its busiest pipe; the segments of a CTA add up; the CTAs that a multiprocessor holds
overlap, as far as the busiest pipe of all lets them. With n CTAs, a turn of the loop takes each

    max(sum over segments of the busiest pipe's cycles, n * cycles of the pipe that is busiest over all segments) / n

One rate is fitted: the share of their nominal speed that tensor cores keep up, on a published GEMM. Attention is held out.

    python -m idefics2_fast.benchmarks.sm90.pipes
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache

import torch
import triton
import triton.language as tl

from idefics2_fast.benchmarks.sm90.launches import Compiled, compile, launches, recorded
from idefics2_fast.benchmarks.sm90.resources import Instruction, hot_loop, resident_ctas
from idefics2_fast.kernels.tuned import MULTIPROCESSORS

CLOCK = 1.755e9  # Hz: the boost clock of an H100 SXM; under load it is lower, which the fitted rate takes in

# Published by tritonbench (pull request 894), Triton's TMA GEMM of its persistent matmul tutorial, bf16, [8192, K] x [K, 8192].
# Both are taken for an H100's: the sources do not say.
PUBLISHED_GEMM = {4096: 665.9e12, 8192: 673.6e12, 16384: 688.7e12}
# Published by pytorch/benchmark (pull request 2391): Triton's fused attention tutorial, forward, head dim 128, 16384 tokens in all.
PUBLISHED_ATTENTION = {512: 328.9e12, 1024: 389.7e12, 2048: 433.7e12, 4096: 458.4e12, 8192: 470.7e12, 16384: 476.8e12}

Use = Counter[str]  # pipe -> cycles


# --- the model ---


def use(instruction: Instruction) -> Use:
    """Cycles that four warps, one on each of the multiprocessor's quarters, keep the pipes busy.

    Rates a cycle and multiprocessor (CUDA C++ Programming Guide, arithmetic instructions, compute capability 9.0): 4096 FLOPs of dense
    products, 16 special functions, 128 fp32 multiply-adds, 64 integer and other operations, 32 lanes shuffled, 128 bytes of shared memory.
    """
    name, *modifiers = instruction.opcode.split(".")
    used = Use(issue=1)
    if name == "HGMMA":
        used["tensor"] = int(re.search(r"64x(\d+)x16", instruction.opcode)[1]) // 2
    elif name == "MUFU":
        used["special"] = 8
    elif name in ("FFMA", "FMUL", "FADD"):
        used["fma"] = 1
    elif name in ("LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDG", "STG"):
        used["memory"] = 4 * next((int(bits) // 32 for bits in modifiers if bits in ("64", "128")), 4 if name in ("LDSM", "STSM") else 1)
    elif name == "SHFL":
        used["memory"] = 4
    elif not name.startswith(("U", "WARPGROUP", "BAR", "DEPBAR", "LDGDEPBAR", "BRA", "NOP", "SYNCS", "R2UR")):
        used["other"] = 2
    return used


def segments(sass: str, num_warps: int) -> list[Use]:
    """The pipes' use by one CTA, cut by cut of the hot loop; what follows the last cut runs on into the next turn."""
    parts = [Use()]
    for instruction in hot_loop(sass).instructions:
        if instruction.opcode.startswith(("WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR", "BAR.SYNC", "SYNCS.PHASECHK")):
            parts.append(Use())
        for pipe, cycles in use(instruction).items():
            parts[-1][pipe] += cycles * num_warps / 4
    first, *others = parts
    if others:
        others[-1] += first
    return [part for part in others or [first] if part]


def cycles(parts: list[Use], ctas: int, tensor_rate: float) -> float:
    """Cycles of one CTA's turn of the loop on a multiprocessor that holds `ctas` of them."""
    slowed = [Use({pipe: busy / (tensor_rate if pipe == "tensor" else 1) for pipe, busy in part.items()}) for part in parts]
    alone = sum(max(part.values()) for part in slowed)
    busiest = max(sum((part for part in slowed), Use()).values())
    return max(alone, ctas * busiest) / ctas


def rate(kernel: Compiled, tensor_rate: float | None = None) -> float:
    """Predicted FLOP/s of a card full of this kernel, in its hot loop. Without `tensor_rate`: the fitted one."""
    parts = segments(kernel.sass, kernel.num_warps)
    ctas = resident_ctas(kernel.registers, kernel.shared, kernel.num_warps)
    flops = 4096 * sum(part["tensor"] for part in parts)
    return MULTIPROCESSORS * CLOCK * flops / cycles(parts, ctas, fitted() if tensor_rate is None else tensor_rate)


# --- what it is fitted on, and held out on ---


@triton.jit
def gemm(X, W, Y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The loop of Triton's TMA GEMM."""
    x = tl.make_tensor_descriptor(X, [M, K], [K, 1], [BM, BK])
    w = tl.make_tensor_descriptor(W, [N, K], [K, 1], [BN, BK])
    y = tl.make_tensor_descriptor(Y, [M, N], [N, 1], [BM, BN])
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        total = tl.dot(x.load([row, k]), w.load([column, k]).T, total)
    y.store([row, column], total.to(tl.bfloat16))


@triton.jit
def attention(Q, K, V, O, length, SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """The loop of Triton's fused attention, one head of dense rows."""
    row, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    q = tl.load(Q + row[:, None] * D + d[None, :])
    top, total, out = tl.full([BM], -float("inf"), tl.float32), tl.full([BM], 1.0, tl.float32), tl.zeros([BM, D], tl.float32)
    for start in range(0, length, BN):
        key = start + tl.arange(0, BN)
        score = tl.dot(q, tl.load(K + key[:, None] * D + d[None, :]).T)
        higher = tl.maximum(top, tl.max(score, 1) * SCALE)
        weight = tl.exp2(score * SCALE - higher[:, None])
        rescale = tl.exp2(top - higher)
        total = total * rescale + tl.sum(weight, 1)
        out = tl.dot(weight.to(tl.float16), tl.load(V + key[:, None] * D + d[None, :]), out * rescale[:, None])
        top = higher
    tl.store(O + row[:, None] * D + d[None, :], (out / total[:, None]).to(tl.float16))


@cache
def compiled_gemm() -> Compiled:
    """With the tutorial's tiles."""
    tensors = [torch.empty(256, 256, dtype=torch.bfloat16) for _ in range(3)]
    with launches(recorded()) as record:
        gemm[(1, 1)](*tensors, 256, 256, 256, BM=128, BN=256, BK=64, num_warps=8, num_stages=3, enable_fp_fusion=True)
    return compile(record.launches[0])


@cache
def compiled_attention(BN: int) -> Compiled:
    """With the tutorial's tiles, of which its tuner takes the faster."""
    tensors = [torch.empty(256, 128, dtype=torch.float16) for _ in range(4)]
    with launches(recorded()) as record:
        attention[(1,)](*tensors, 256, SCALE=0.1, BM=128, BN=BN, D=128, num_warps=8, num_stages=3, enable_fp_fusion=True)
    return compile(record.launches[0])


@cache
def fitted() -> float:
    """Share of nominal speed that tensor cores keep up: the published GEMM's, extrapolated over 1/K to a loop without end."""
    k, speed = torch.tensor(list(PUBLISHED_GEMM.items()), dtype=torch.float64).T
    # Time of a tile by its depth, a start and an end to each: 1 / speed = a + b / K.
    a, _ = torch.linalg.lstsq(torch.stack([torch.ones_like(k), 1 / k], 1), (1 / speed)[:, None]).solution.flatten().tolist()
    return 1 / a / rate(compiled_gemm(), 1.0)


def held_out() -> Mapping[int, float]:
    """Predicted over published speed of attention, by length."""
    predicted = max(rate(compiled_attention(BN)) for BN in (64, 128))
    return {length: predicted / speed for length, speed in PUBLISHED_ATTENTION.items()}


def report() -> str:
    """The fit and its residuals, for people."""
    gemm_residuals = ", ".join(f"{rate(compiled_gemm()) / speed - 1:+.0%} at K {k}" for k, speed in PUBLISHED_GEMM.items())
    attention_residuals = ", ".join(f"{ratio - 1:+.0%} at {length}" for length, ratio in held_out().items())
    return (
        f"Fitted: tensor cores keep up {fitted():.0%} of nominal speed. Predicted against published, GEMM: {gemm_residuals}; held out,\n"
        f"attention of head dim 128, 329 to 477 TFLOP/s by length, where the model knows only the loop: {attention_residuals}."
    )


if __name__ == "__main__":
    print(report())
