"""Attention within segments by Triton: in Triton's interpreter, and its Hopper code executed on the CPU, against the formula in fp64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.kernels import check_deterministic, check_fullgraph, check_operator
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

import triton
import triton.language as tl

from idefics2_fast import ops
from idefics2_fast.benchmarks.sm90.launches import executed, interpreted, launches
from idefics2_fast.kernels import segment_attention, segment_attention_triton
from idefics2_fast.kernels.segment_attention_triton import attend
from idefics2_fast.kernels.segments import Segments

RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6}
ROUNDING = 2  # a kernel in half precision may err so many times as much as PyTorch in the same precision
EVERY, CAUSAL = (False, None), (True, None)  # causal, window


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(lengths: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as the model makes them: views of one product."""
    rows, all_heads = sum(lengths), heads + 2 * kv_heads
    return draw(rows, all_heads, dim, seed=0).to(dtype).split([heads, kv_heads, kv_heads], 1)


def run(function, tensors: tuple[Tensor, ...], segments: Segments, dtype: torch.dtype, **rule) -> list[Tensor]:
    """The output and the three gradients, of tensors that are views where the inputs are."""
    leaves = [x.detach().to(dtype).requires_grad_() if x.dtype != dtype else x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, segments, **rule)
    return [out.detach(), *torch.autograd.grad(out, leaves, draw(*out.shape, seed=3).to(tensors[0].dtype).to(dtype))]


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the expected values, or, where they are zero (queries and keys have no gradient with one key), to inputs of size 1."""
    scale = expected.norm().item() or expected.numel() ** 0.5
    return (actual.double() - expected).norm().item() / scale if expected.numel() else 0.0


def check(lengths: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype, handler, causal=False, window=None) -> None:
    tensors, segments = inputs(lengths, heads, kv_heads, dim, dtype), Segments.of_lengths(lengths)
    rule = {"causal": causal, "window": window, "scale": dim**-0.5}
    exact = run(segment_attention.reference, tensors, segments, torch.float64, **rule)
    with launches(handler):
        ours = run(attend, tensors, segments, dtype, **rule)
    if dtype in RELATIVE:
        allowed = [RELATIVE[dtype]] * 4
    else:
        plain = run(segment_attention.sdpa, tensors, segments, dtype, **rule)
        allowed = [ROUNDING * error(x, y) for x, y in zip(plain, exact, strict=True)]
    for name, actual, expected, most in zip(("out", "q", "k", "v"), ours, exact, allowed, strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == dtype
        assert error(actual, expected) <= most, f"{name}: {error(actual, expected):.1e} of {most:.1e}"


@pytest.mark.parametrize(("causal", "window"), [EVERY, CAUSAL, (True, 2)])
def test_reference_gradients(causal, window):
    segments = Segments.of_lengths([3, 0, 1])
    tensors = [x.clone().requires_grad_() for x in inputs([3, 1], 2, 1, 4, torch.float64)]
    rule = {"causal": causal, "window": window, "scale": 0.4}
    assert torch.autograd.gradcheck(lambda *x: segment_attention.reference(*x, segments, **rule), tensors)


# --- where a program works ---


@triton.jit
def places(offsets, begins, lengths, blocks, segments, B: tl.constexpr):
    begin, length, block = segment_attention_triton._place(offsets, segments, B)
    tl.store(begins + tl.program_id(0), begin)
    tl.store(lengths + tl.program_id(0), length)
    tl.store(blocks + tl.program_id(0), block)


@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.sampled_from([0, 1, 3, 4, 5, 9]), min_size=1, max_size=6))
@example(lengths=[0] * 128 + [1, 9, 0])  # more segments than are looked at in one go
@example(lengths=[0])
def test_every_block_of_every_segment_has_one_program(lengths):
    segments, size = Segments.of_lengths(lengths), 4
    programs = segment_attention_triton._blocks(sum(lengths), len(lengths), size)
    found = [torch.empty(programs, dtype=torch.int64) for _ in range(3)]
    with launches(interpreted()):
        places[(programs,)](segments.offsets, *found, len(lengths), B=size)
    working = [(begin, length, block) for begin, length, block in zip(*(x.tolist() for x in found), strict=True) if block < length]
    expected = [(begin, end - begin, block) for begin, end in pairwise(segments.bounds) for block in range(0, end - begin, size)]
    assert working == expected


# --- Triton's interpreter ---


@pytest.mark.slow
@settings(max_examples=2, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 15, 16, 33]), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2)]),
    dim=st.sampled_from([8, 16, 24, 40]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    rule=st.sampled_from([EVERY, CAUSAL, (True, 1), (True, 18)]),
)
@example(lengths=[17, 0, 3], heads=(2, 2), dim=72, dtype=torch.float64, rule=EVERY)
@example(lengths=[40], heads=(2, 1), dim=8, dtype=torch.float64, rule=(True, 5))  # rows that see nothing of their block's first keys
def test_shapes(lengths, heads, dim, dtype, rule):
    check(lengths, *heads, dim, dtype, interpreted(), *rule)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (2, 2), (6, 2), (4, 1)]),
    dim=st.integers(1, 16).map(lambda n: 8 * n),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    rule=st.sampled_from([EVERY, EVERY, EVERY, CAUSAL, (True, 5), (True, 33)]),
)
def test_more_shapes(lengths, heads, dim, dtype, rule):
    check(lengths, *heads, dim, dtype, interpreted(), *rule)


def test_the_borders_on_the_host_are_a_hint():
    """As in a CUDA graph that is replayed with other segments, as many and of as many rows in all."""
    tensors, true = inputs([40, 3], 2, 1, 8, torch.float64), Segments.of_lengths([40, 3])
    told, rule = Segments(true.offsets, (0, 20, 43)), {"causal": False, "window": None, "scale": 0.3}
    exact = run(segment_attention.reference, tensors, true, torch.float64, **rule)
    with launches(interpreted()):
        ours = run(attend, tensors, told, torch.float64, **rule)
    assert all(error(x, y) <= 1e-12 for x, y in zip(ours, exact, strict=True))


@pytest.mark.parametrize(("causal", "window"), [EVERY, (True, 3)])
def test_scores_far_below_zero(causal, window):
    """What lies beyond a ragged tail scores 0, more than all keys: its weight, 2^-lse, is infinite, and counts nowhere."""
    q, k, v = inputs([17, 5], 2, 2, 8, torch.float64)
    tensors, segments, rule = (q + 40, k - 40, v), Segments.of_lengths([17, 5]), {"causal": causal, "window": window, "scale": 0.4}
    exact = run(segment_attention.reference, tensors, segments, torch.float64, **rule)
    with launches(interpreted()):
        ours = run(attend, tensors, segments, torch.float64, **rule)
    assert all(error(x, y) <= 1e-10 for x, y in zip(ours, exact, strict=True))  # scores of 5000 lose four digits


def as_they_are(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [q, k, v]


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]


def strided_by_an_odd_number(*tensors: Tensor) -> list[Tensor]:
    wide = [torch.nn.functional.pad(x.flatten(1), (0, 1 + 2 * i)) for i, x in enumerate(tensors)]
    return [w[:, : x[0].numel()].unflatten(1, x.shape[1:]) for w, x in zip(wide, tensors, strict=True)]


@pytest.mark.parametrize(("layout", "copies"), [(as_they_are, 0), (heads_first, 3), (strided_by_an_odd_number, 0)])
def test_rows_are_read_where_they_are(layout, copies):
    tensors, segments = layout(*inputs([18, 5], 4, 2, 24, torch.float64)), Segments.of_lengths([18, 5])
    rule, copied = {"causal": False, "window": None, "scale": 0.4}, []

    def handler(launch) -> None:
        copied.append(sum(launch.tensors[n].data_ptr() != x.data_ptr() for n, x in zip("qkv", tensors, strict=True) if n in launch.tensors))
        interpreted()(launch)

    exact = run(segment_attention.reference, tensors, segments, torch.float64, **rule)
    with launches(handler):
        ours = run(attend, tensors, segments, torch.float64, **rule)
    assert all(error(x, y) <= 1e-12 for x, y in zip(ours, exact, strict=True))
    assert max(copied) == copies


# --- what surrounds it ---


@pytest.mark.slow
def test_opcheck():
    tensors = [x.clone().requires_grad_() for x in inputs([2, 1], 2, 1, 8, torch.float64)]
    offsets = Segments.of_lengths([2, 1]).offsets
    with launches(interpreted()):
        check_operator(torch.ops.idefics2_fast.segment_attention.default, (*tensors, offsets, False, 0, 0.4))


def test_compiled_as_one_graph():
    tensors, segments = [x.clone() for x in inputs([3, 2], 2, 1, 8, torch.float64)], Segments.of_lengths([3, 2])
    with launches(interpreted()):
        check_fullgraph(lambda *x: attend(*x, segments, causal=False, window=None, scale=0.4), tensors)


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = [torch.empty(9, heads, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
        out = attend(*x, Segments(torch.empty(3, dtype=torch.int32), (0, 4, 9)), causal=False, window=None, scale=0.4)
        assert (out.shape, out.dtype) == ((9, 4, 8), torch.bfloat16)
        assert [g.shape for g in torch.autograd.grad(out.sum(), x)] == [t.shape for t in x]


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_rows(lengths):
    out, *gradients = run(
        attend, inputs(lengths, 2, 1, 8, torch.float32), Segments.of_lengths(lengths), torch.float32, causal=False, window=None, scale=1.0
    )
    assert [x.shape for x in (out, *gradients)] == [(0, 2, 8), (0, 2, 8), (0, 1, 8), (0, 1, 8)]


def test_where_it_is_preferred(monkeypatch):
    """Before flash-attention for head dims that it pads to a multiple of 32, where the kernels are trusted; for no others."""
    trusted = True
    monkeypatch.setattr(ops, "_installed", lambda package: package in ("triton", "flash_attn"))
    monkeypatch.setattr(ops, "_trusted", lambda op: trusted)

    def choose(device: str, dtype: torch.dtype, width: int) -> str:
        return ops._preferred.__wrapped__("segment_attention", device, dtype, width)

    assert [choose("cuda", torch.bfloat16, width) for width in (72, 80, 64, 96, 128, 136)] == ["triton"] * 2 + ["flash_attn"] * 4
    assert [choose("cuda", torch.float32, 72), choose("cpu", torch.bfloat16, 72)] == ["sdpa"] * 2
    trusted = False
    assert choose("cuda", torch.bfloat16, 72) == "flash_attn"


@pytest.mark.parametrize(
    ("dim", "lengths", "given", "said"),
    [
        (12, [3], {}, "head dim 12"),
        (136, [3], {}, "head dim 136"),
        (8, [3], {"scale": -1.0}, "scale -1.0"),
        (8, [3], {"window": 2}, "window 2, causal=False"),
        (8, [3], {"window": 0, "causal": True}, "window 0, causal=True"),
        (8, [2], {}, "segments of 2 rows for 3 queries"),
    ],
)
def test_what_is_not_served(dim, lengths, given, said):
    rule = {"causal": False, "window": None, "scale": 1.0} | given
    with pytest.raises(ValueError, match=said):
        attend(*inputs([3], 2, 2, dim, torch.float32), Segments.of_lengths(lengths), **rule)


def test_a_segment_that_32_bits_do_not_count_is_refused():
    with torch.device("meta"):
        x = torch.empty(1 << 23, 4, 64)
        segments = Segments(torch.empty(2, dtype=torch.int32), (0, 1 << 23))
    with pytest.raises(ValueError, match="a segment of 8388608 rows: expected fewer than"):
        attend(x, x, x, segments, causal=False, window=None, scale=1.0)


# --- Hopper code ---

SHAPES = [
    ([70, 0, 1], 2, 2, 72, torch.bfloat16, EVERY),
    ([301], 2, 2, 72, torch.bfloat16, EVERY),
    ([33, 64, 65, 0, 128], 1, 1, 72, torch.bfloat16, EVERY),
    ([1, 2, 1, 0, 40], 4, 4, 72, torch.bfloat16, EVERY),
    ([129], 6, 2, 72, torch.bfloat16, EVERY),
    ([1200], 1, 1, 72, torch.bfloat16, EVERY),
    ([70, 9], 2, 2, 72, torch.float16, EVERY),
    ([140], 2, 1, 72, torch.bfloat16, CAUSAL),
    ([129], 2, 2, 8, torch.bfloat16, EVERY),
    ([64, 64], 2, 2, 64, torch.bfloat16, EVERY),
    ([100, 28], 2, 2, 40, torch.bfloat16, EVERY),
    ([70], 2, 2, 80, torch.bfloat16, EVERY),
    ([100, 28], 2, 2, 104, torch.float16, EVERY),
    ([70, 301], 2, 2, 128, torch.bfloat16, EVERY),
    ([200, 33], 4, 1, 128, torch.bfloat16, (True, 70)),
]


@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "dim", "dtype", "rule"),
    [pytest.param(*s, marks=() if s is SHAPES[0] else pytest.mark.slow) for s in SHAPES],
)
def test_hopper_code(lengths, heads, kv_heads, dim, dtype, rule):
    check(lengths, heads, kv_heads, dim, dtype, executed(), *rule)


@pytest.mark.slow
def test_hopper_code_gives_the_same_bits_twice():
    tensors, segments = [x.requires_grad_() for x in inputs([33, 5], 1, 1, 72, torch.bfloat16)], Segments.of_lengths([33, 5])
    with launches(executed()):
        check_deterministic(lambda *x: attend(*x, segments, causal=False, window=None, scale=0.1), tensors)


FULL = ([4900, 0, 275], 16, 16, 72)  # the model's largest image, one that is not there, and a small one
HEADS = (0, 15)
RULE = {"causal": False, "window": 0, "scale": 72**-0.5}


class Ends:
    """Executes of one kernel the large image's first block and its ragged last one, and the small image's last. Delta is PyTorch's."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.tensors: dict[str, Tensor] = {}

    def __call__(self, launch) -> None:
        if launch.name == self.kernel:
            block, last = launch.constexprs["BN" if launch.name == "_backward_kv" else "BM"], launch.grid[0] - 1
            executed(lambda _: [(0, HEADS[0], 0), (FULL[0][0] // block, HEADS[1], 0), (last, HEADS[0], 0)])(launch)
            self.tensors = launch.tensors
        elif launch.name == "_deltas":
            launch.tensors["delta"].copy_((launch.tensors["out"].float() * launch.tensors["grad"].float()).sum(2).T)


def of_head(head: int, *tensors: Tensor) -> list[Tensor]:
    return [x[:, head : head + 1].double() for x in tensors]


@pytest.mark.slow
def test_hopper_code_of_the_forward_in_full_size():
    tensors, segments = inputs(*FULL, torch.bfloat16), Segments.of_lengths(FULL[0])
    with launches(Ends("_forward")):
        out, lse = segment_attention_triton.forward(*tensors, segments.offsets, **RULE)
    written = out.isfinite().all(2)
    assert written.sum() == lse.isfinite().sum() == 128 + 4900 % 128 + 275 % 128
    for head in HEADS:
        rows = written[:, head]
        expected, sums = exactly(head, tensors, segments)
        # the weights are rounded to bf16, half an ulp each; the values are exact
        assert error(out[rows, head], expected[rows, 0]) <= 2.0**-8
        assert error(lse[head, rows], sums[rows]) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "names"), [("_backward_q", ["dq"]), ("_backward_kv", ["dk", "dv"])])
def test_hopper_code_of_the_gradients_in_full_size(kernel, names):
    tensors, segments = inputs(*FULL, torch.bfloat16), Segments.of_lengths(FULL[0])
    grad = draw(*tensors[0].shape, seed=3).bfloat16()
    out, lse, exact = torch.zeros_like(grad), torch.zeros(FULL[1], segments.total), {}
    for head in HEADS:
        wide = [x.requires_grad_() for x in of_head(head, *tensors)]
        expected = segment_attention.reference(*wide, segments, causal=False, window=None, scale=RULE["scale"])
        exact[head] = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(expected, wide, *of_head(head, grad)), strict=True))
        out[:, head], lse[head] = expected.detach()[:, 0].bfloat16(), exactly(head, tensors, segments)[1].float()
    ends = Ends(kernel)
    with launches(ends):
        segment_attention_triton.backward(grad, *tensors, segments.offsets, out, lse, **RULE)
    for name in names:
        written = ends.tensors[name].isfinite().all(2)
        assert written.sum() == 64 + 4900 % 64 + 275 % 64
        for head in HEADS:
            rows = written[:, head]
            # of p, dp - delta, ds and the result, each rounded to bf16, and of out in delta
            assert error(ends.tensors[name][rows, head], exact[head][name][rows, 0]) <= 2.0**-6


def exactly(head: int, tensors: tuple[Tensor, ...], segments: Segments) -> tuple[Tensor, Tensor]:
    """The output [T, 1, H] and lse [T] of one head, in fp64."""
    q, k, v = of_head(head, *tensors)
    out = segment_attention.reference(q, k, v, segments, causal=False, window=None, scale=RULE["scale"])
    pairs = zip(*(x[:, 0].split(segments.lengths) for x in (q, k)), strict=True)
    return out, torch.cat([(a @ b.T * RULE["scale"]).logsumexp(1) / math.log(2) for a, b in pairs])


# --- on a card ---


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "dim", "rule"),
    [([4900, 301, 0, 1], 16, 16, 72, EVERY), ([2000, 70], 32, 8, 128, (True, 512)), ([129, 64], 4, 4, 40, CAUSAL)],
)
def test_on_a_card(lengths, heads, kv_heads, dim, rule):
    """At most twice as far from the formula as PyTorch there, and the same bits twice."""
    tensors, segments = [x.cuda() for x in inputs(lengths, heads, kv_heads, dim, torch.bfloat16)], Segments.of_lengths(lengths, "cuda")
    rule = {"causal": rule[0], "window": rule[1], "scale": dim**-0.5}

    def results(function, dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out = function(*leaves, segments, **rule)
        return [out.detach(), *torch.autograd.grad(out, leaves, draw(*out.shape, seed=3).bfloat16().to("cuda", dtype))]

    exact = results(segment_attention.reference, torch.float64)
    plain, ours, again = (results(function, torch.bfloat16) for function in (segment_attention.sdpa, attend, attend))
    for actual, same, other, expected in zip(ours, again, plain, exact, strict=True):
        assert torch.equal(actual, same)
        assert error(actual, expected) <= ROUNDING * error(other, expected)
