"""The interpreter on what Triton compiles for sm_90a: right kernels give right numbers, kernels broken on purpose are caught by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from idefics2_fast.benchmarks.sm90.asynchronous import TensorMap
from idefics2_fast.benchmarks.sm90.counters import Counts
from idefics2_fast.benchmarks.sm90.faults import Fault, Misaligned, MissingBarrier, MissingWait, OutOfBounds, UnwrittenRead, WriteConflict
from idefics2_fast.benchmarks.sm90.machine import execute
from idefics2_fast.kernels.philox import philox

triton = pytest.importorskip("triton", reason="compiles kernels for sm_90a with Triton")
tl = pytest.importorskip("triton.language")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

BF16, F32, I32 = "*bf16", "*fp32", "*i32"


def compiled(kernel: object, signature: Mapping[str, str], constants: Mapping[str, int], **options: int) -> object:
    """For sm_90a; every pointer and integer is promised to be divisible by 16, as Triton's launcher finds it on a card."""
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    types = dict(signature) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True, **options})


def run(built: object, grid: tuple[int, int, int], arguments: Mapping[str, object], ptx: str | None = None, **more: object) -> Counts:
    meta = built.metadata
    return execute(ptx or built.asm["ptx"], grid=grid, arguments=arguments, shared_bytes=meta.shared, num_warps=meta.num_warps, **more)


def without(ptx: str, pattern: str) -> str:
    """The text without the instructions that match, of which there must be some."""
    edited, count = re.subn(pattern, "", ptx)
    assert count, f"nothing matches {pattern!r}"
    return edited


# ---- vector addition: masks, bounds, alignment, conflicts


@triton.jit
def add(X, Y, OUT, n, step, B: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * step + tl.arange(0, B)
    keep = i < n if MASKED else i >= 0
    tl.store(OUT + i, tl.load(X + i, mask=keep, other=0.0) + tl.load(Y + i, mask=keep, other=0.0), mask=keep)


def added(n: int = 1000, step: int = 256, masked: int = 1, shift: int = 0, **more: object) -> tuple[Tensor, Tensor, Counts]:
    built = compiled(add, {"X": F32, "Y": F32, "OUT": F32, "n": "i32", "step": "i32"}, {"B": 256, "MASKED": masked}, num_warps=4)
    # Four times as much as needed lies behind x: what a missing mask would read is allocated, but is not x.
    x, y, out = torch.randn(4096)[shift : shift + n], torch.randn(n), torch.full((n,), float("nan"))
    counts = run(built, (-(-n // 256), 1, 1), {"X": x, "Y": y, "OUT": out, "n": n, "step": step}, **more)
    return out, x + y, counts


def test_masked_addition() -> None:
    out, expected, counts = added(unwritten=["OUT"])
    assert torch.equal(out, expected)
    assert counts.bytes("load", argument="X") == counts.bytes("store", argument="OUT") == 4000
    assert counts.widths("load").keys() == counts.widths("store").keys() == {4, 8} or counts.widths("load").keys() <= {4, 8, 16}


def test_missing_mask() -> None:
    with pytest.raises(OutOfBounds, match=r"argument 'X'.*outside its 4000 bytes.*CTA \(3, 0, 0\)"):
        added(masked=0)


def test_false_promise_of_alignment() -> None:
    with pytest.raises(Misaligned, match="argument 'X'"):
        added(n=1024, shift=1)


def test_overlapping_stores() -> None:
    """Tiles of 256 that start every 240: x + y is the same twice, the neighbours' numbers are not."""
    added(n=1024, step=240)
    built = compiled(fill, {"OUT": I32}, {"B": 256, "STEP": 240}, num_warps=4)
    with pytest.raises(WriteConflict, match=r"argument 'OUT'"):
        run(built, (4, 1, 1), {"OUT": torch.zeros(1024, dtype=torch.int32)})
    with pytest.raises(UnwrittenRead, match="argument 'Y'"):
        added(unwritten=["Y"])


@triton.jit
def fill(OUT, B: tl.constexpr, STEP: tl.constexpr):
    tl.store(OUT + tl.program_id(0) * STEP + tl.arange(0, B), tl.program_id(0) + tl.zeros([B], tl.int32))


# ---- softmax: reductions, exponentials, bf16


@triton.jit
def softmax(X, OUT, n, B: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, B)
    x = tl.load(X + row * n + i, mask=i < n, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(OUT + row * n + i, (e / tl.sum(e, 0)).to(tl.bfloat16), mask=i < n)


def test_softmax() -> None:
    built = compiled(softmax, {"X": BF16, "OUT": BF16, "n": "i32"}, {"B": 1024}, num_warps=8)
    x = (torch.randn(9, 720) * 4).bfloat16()
    out = torch.full_like(x, float("nan"))
    run(built, (9, 1, 1), {"X": x, "OUT": out, "n": 720}, unwritten=["OUT"])
    expected = x.double().softmax(-1)
    # One rounding to bf16, and fp32 arithmetic before it.
    assert ((out.double() - expected).abs() <= expected * (2.0**-8 + 2.0**-17)).all()


# ---- Philox: integer arithmetic to the last bit


@triton.jit
def words(OUT, seed, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    a, b, c, d = tl.randint4x(seed, i)
    tl.store(OUT + 4 * i, a)
    tl.store(OUT + 4 * i + 1, b)
    tl.store(OUT + 4 * i + 2, c)
    tl.store(OUT + 4 * i + 3, d)


def test_philox_is_that_of_the_package() -> None:
    seed = 0x1234567890ABCD
    attributes = {(0,): [["tt.divisibility", 16]]}
    source = ASTSource(fn=words, signature={"OUT": I32, "seed": "i64", "B": "constexpr"}, constexprs={"B": 256}, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})
    out = torch.zeros(1024, 4, dtype=torch.int32)
    run(built, (4, 1, 1), {"OUT": out, "seed": seed}, unwritten=["OUT"])
    zero = torch.zeros(1, dtype=torch.int64)
    expected = philox((torch.arange(1024), zero, zero, zero), (seed & 0xFFFFFFFF, seed >> 32))
    assert torch.equal(out, torch.stack([word.expand(1024) for word in expected], 1))


# ---- matrix product: cp.async, swizzled shared memory, wgmma


@triton.jit
def gemm(X, W, OUT, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, k, BK):
        depth = start + tl.arange(0, BK)
        x = tl.load(X + rows[:, None] * k + depth[None, :], mask=(rows[:, None] < m) & (depth[None, :] < k), other=0.0)
        w = tl.load(W + columns[:, None] * k + depth[None, :], mask=(columns[:, None] < n) & (depth[None, :] < k), other=0.0)
        acc = tl.dot(x, w.T, acc)
    tl.store(OUT + rows[:, None] * n + columns[None, :], acc.to(tl.bfloat16), mask=(rows[:, None] < m) & (columns[None, :] < n))


@pytest.fixture(scope="module")
def product() -> object:
    signature = {"X": BF16, "W": BF16, "OUT": BF16, "m": "i32", "n": "i32", "k": "i32"}
    return compiled(gemm, signature, {"BM": 64, "BN": 64, "BK": 64}, num_warps=4, num_stages=3)


def multiplied(built: object, ptx: str | None = None, m: int = 80, n: int = 96, k: int = 208) -> tuple[Tensor, Tensor, Counts]:
    x, w, out = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16(), torch.full((m, n), float("nan")).bfloat16()
    grid = (-(-m // 64), -(-n // 64), 1)
    counts = run(built, grid, {"X": x, "W": w, "OUT": out, "m": m, "n": n, "k": k}, ptx=ptx, unwritten=["OUT"])
    return out, x.double() @ w.double().T, counts


def test_gemm(product: object) -> None:
    out, expected, counts = multiplied(product)
    # bf16 rounds once; fp32 sums of 208 products of size ~1 err by less than 208 * 2^-24 * sqrt(208).
    assert ((out.double() - expected).abs() <= expected.abs() * 2.0**-8 + 2e-4).all()
    # Four CTAs, four steps each, 64 x 64 x 64.
    assert sum(counts.flops.values()) == 4 * 4 * 2 * 64**3
    assert counts.widths("copy").keys() == {16}
    # Each row of X is read by two column tiles, each row of W by two row tiles.
    assert counts.bytes("copy") == 2 * 208 * (80 * 2 + 96 * 2)


BROKEN = {
    r"cp\.async\.wait_group\s+\d+;": MissingWait,
    r"wgmma\.wait_group\.sync\.aligned\s+\d+;": MissingWait,
    r"bar\.sync\s+0;": MissingBarrier,
    r"(@%p\d+\s+)?cp\.async\.cg\S*\s[^;]*;": UnwrittenRead,
}


@pytest.mark.parametrize("pattern", BROKEN)
def test_gemm_without_a_wait_or_barrier(product: object, pattern: str) -> None:
    with pytest.raises(Fault) as caught:
        multiplied(product, ptx=without(product.asm["ptx"], pattern))
    assert caught.type is BROKEN[pattern], caught.value


def test_gemm_with_waits_for_too_little(product: object) -> None:
    """One group more may be unfinished than the kernel allows."""
    ptx = re.sub(r"cp\.async\.wait_group\s+(\d+);", lambda match: f"cp.async.wait_group {int(match[1]) + 2};", product.asm["ptx"])
    with pytest.raises(MissingWait, match="asynchronous copy"):
        multiplied(product, ptx=ptx)


# ---- tensor copies and mbarriers


@triton.jit
def gemm_tma(X, W, OUT, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, k, BK):
        acc = tl.dot(X.load([row, start]), W.load([column, start]).T, acc)
    OUT.store([row, column], acc.to(tl.bfloat16))


def test_gemm_by_tensor_copies() -> None:
    signature = dict.fromkeys(("X", "W", "OUT"), "tensordesc<bf16[64,64]>") | {"k": "i32"}
    built = compiled(gemm_tma, signature, {"BM": 64, "BN": 64, "BK": 64}, num_warps=4, num_stages=3)
    x, w, out = torch.randn(80, 208).bfloat16(), torch.randn(96, 208).bfloat16(), torch.full((80, 96), float("nan")).bfloat16()
    arguments: dict[str, object] = {}
    for name, tensor, meta in zip(("X", "W", "OUT"), (x, w, out), built.metadata.tensordesc_meta, strict=True):
        arguments[name] = TensorMap(tensor, tuple(meta["block_size"][-2:]), meta["swizzle"])
        arguments |= {
            f"{name}.shape0": tensor.shape[0],
            f"{name}.shape1": tensor.shape[1],
            f"{name}.stride0": tensor.stride(0),
            f"{name}.stride1": 1,
        }
    arguments["k"] = 208
    run(built, (2, 2, 1), arguments, unwritten=["OUT"])
    expected = x.double() @ w.double().T
    assert ((out.double() - expected).abs() <= expected.abs() * 2.0**-8 + 2e-4).all()
    ptx = re.sub(r"\n\s*waitLoop:.*?bra\.uni waitLoop;", "\n", built.asm["ptx"], flags=re.S)
    assert ptx != built.asm["ptx"]
    with pytest.raises(MissingWait, match="asynchronous copy"):
        run(built, (2, 2, 1), arguments, ptx=ptx)
