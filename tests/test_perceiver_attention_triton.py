"""Perceiver pooling attention by Triton: in Triton's interpreter, and its Hopper code executed on the CPU, against the formula in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

import triton

from idefics2_fast.benchmarks.sm90.launches import chosen, executed, interpreted, launches, recorded
from idefics2_fast.kernels import perceiver_attention, perceiver_attention_triton
from idefics2_fast.kernels.perceiver_attention_triton import attend
from idefics2_fast.kernels.segments import Segments

RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6}
ROUNDING = 2  # a kernel in half precision may err so many times as much as PyTorch in the same precision


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(lengths: list[int], latents: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k_context, v_context, k_latents, v_latents as the model makes them: views of the middle one of three layers' products."""
    rows, own = sum(lengths), len(lengths) * latents
    context = draw(rows, 3, 2, kv_heads, dim, seed=1).to(dtype)[:, 1]
    of_latents = draw(own, 2, kv_heads, dim, seed=2).to(dtype)
    return draw(own, heads, dim, seed=0).to(dtype), *context.unbind(1), *of_latents.unbind(1)


def run(function, tensors: tuple[Tensor, ...], images: Segments, scale: float, dtype: torch.dtype) -> list[Tensor]:
    """The output and the five gradients, of tensors that are views where the inputs are."""
    leaves = [x.detach().to(dtype).requires_grad_() if x.dtype != dtype else x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, images, scale=scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, draw(*out.shape, seed=3).to(tensors[0].dtype).to(dtype))]


def error(actual: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """Relative to the expected values' norm, and to no less than that of values of size `least`."""
    scale = max(expected.norm().item(), least * expected.numel() ** 0.5)
    return (actual.double() - expected).norm().item() / scale if expected.numel() else 0.0


def check(lengths: list[int], latents: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, handler) -> None:
    tensors, images, scale = inputs(lengths, latents, heads, kv_heads, dim, dtype), Segments.of_lengths(lengths), dim**-0.5
    exact = run(perceiver_attention.reference, tensors, images, scale, torch.float64)
    with launches(handler):
        ours = run(attend, tensors, images, scale, dtype)
    plain = None if dtype in RELATIVE else run(perceiver_attention.sdpa, tensors, images, scale, dtype)
    for index, name in enumerate(("out", "q", "k_c", "v_c", "k_l", "v_l")):
        assert ours[index].shape == exact[index].shape
        assert ours[index].dtype == dtype
        # With few keys the gradients of scores cancel, with one key to nothing: what is left is rounding of terms of size 1.
        least = 0.25 if name in ("q", "k_c", "k_l") else 0.0
        most = RELATIVE[dtype] if plain is None else ROUNDING * error(plain[index], exact[index], least)
        found = error(ours[index], exact[index], least)
        assert found <= most, f"{name}: {found:.1e} of {most:.1e}"


def test_reference_gradients():
    images = Segments.of_lengths([3, 0])
    tensors = [x.clone().requires_grad_() for x in inputs([3, 0], 2, 4, 2, 8, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: perceiver_attention.reference(*x, images, scale=0.4), tensors)


# --- Triton's interpreter ---


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 15, 16, 17, 40]), min_size=1, max_size=3),
    latents=st.sampled_from([1, 3, 8]),
    heads=st.sampled_from([(1, 1), (6, 2), (4, 1)]),
    dim=st.sampled_from([8, 16, 24, 40]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_shapes(lengths, latents, heads, dim, dtype):
    check(lengths, latents, *heads, dim, dtype, interpreted())


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=3),
    latents=st.integers(1, 20),
    heads=st.sampled_from([(1, 1), (6, 2), (4, 1), (4, 4)]),
    dim=st.integers(1, 16).map(lambda n: 8 * n),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_more_shapes(lengths, latents, heads, dim, dtype):
    check(lengths, latents, *heads, dim, dtype, interpreted())


@pytest.mark.parametrize("lengths", [[37], [50, 0, 5]])
def test_splits_are_combined(monkeypatch, lengths):
    """Also splits without keys: 37 keys are three blocks of 16 for four splits, and images beside a long one have fewer."""
    monkeypatch.setattr(perceiver_attention_triton, "KEYS_PER_SPLIT", 9)
    with launches(recorded()) as plan:
        run(attend, inputs(lengths, 2, 2, 1, 24, torch.float64), Segments.of_lengths(lengths), 0.3, torch.float64)
    splits = [launch.arguments["splits"] for launch in plan.launches if launch.name == "_forward"]
    assert splits == [max(lengths) // 9]
    check(lengths, 2, 2, 1, 24, torch.float64, interpreted())


def test_the_longest_image_is_a_hint(monkeypatch):
    """As in a CUDA graph that is replayed with other offsets: a grid made for shorter images covers longer ones."""
    monkeypatch.setattr(perceiver_attention_triton, "KEYS_PER_SPLIT", 9)
    tensors, offsets, scale = inputs([40, 3], 2, 2, 1, 8, torch.float64), Segments.of_lengths([40, 3]).offsets, 0.3
    told = Segments(offsets, (0, 20, 43))
    exact = run(perceiver_attention.reference, tensors, Segments.of_lengths([40, 3]), scale, torch.float64)
    with launches(interpreted()):
        ours = run(attend, tensors, told, scale, torch.float64)
    assert all(error(x, y) <= 1e-12 for x, y in zip(ours, exact, strict=True))


def test_scores_far_below_zero():
    """What lies beyond a ragged tail scores 0, more than all keys: its weight, 2^-lse, is infinite, and counts nowhere."""
    q, k, *others = inputs([17], 2, 2, 1, 8, torch.float64)
    tensors = (q + 40, k - 40, others[0], others[1] - 40, others[2])
    images = Segments.of_lengths([17])
    exact = run(perceiver_attention.reference, tensors, images, 0.4, torch.float64)
    with launches(interpreted()):
        ours = run(attend, tensors, images, 0.4, torch.float64)
    assert all(error(x, y) <= 1e-10 for x, y in zip(ours, exact, strict=True))  # scores of 5000 lose four digits


def test_permuted_inputs():
    tensors = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs([5], 2, 4, 2, 8, torch.float64))
    images = Segments.of_lengths([5])
    exact = run(perceiver_attention.reference, tensors, images, 0.4, torch.float64)
    with launches(interpreted()):
        ours = run(attend, tensors, images, 0.4, torch.float64)
    assert all(error(x, y) <= 1e-12 for x, y in zip(ours, exact, strict=True))


# --- what surrounds it ---


@pytest.mark.slow
def test_opcheck():
    tensors = [x.clone().requires_grad_() for x in inputs([3, 0], 1, 2, 1, 8, torch.float64)]
    offsets = Segments.of_lengths([3, 0]).offsets
    with launches(interpreted()):
        torch.library.opcheck(torch.ops.idefics2_fast.perceiver_attention.default, (*tensors, offsets, 3, 0.4))


def test_compiled_as_one_graph():
    tensors = [x.clone().requires_grad_() for x in inputs([3, 2], 1, 2, 1, 8, torch.float64)]
    images = Segments.of_lengths([3, 2])

    def loss(*x):
        return attend(*x, images, scale=0.4).square().sum()

    with launches(interpreted()):
        expected = torch.autograd.grad(loss(*tensors), tensors)
        actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = [
            torch.empty(rows, heads, 8, dtype=torch.bfloat16, requires_grad=True)
            for rows, heads in ((4, 4), (9, 2), (9, 2), (4, 2), (4, 2))
        ]
        out = attend(*x, Segments(torch.empty(3, dtype=torch.int32), (0, 4, 9)), scale=0.4)
        assert (out.shape, out.dtype) == ((4, 4, 8), torch.bfloat16)
        assert [g.shape for g in torch.autograd.grad(out.sum(), x)] == [t.shape for t in x]


def test_no_images():
    """All weights before them still take part in what ranks do together."""
    tensors = [x.requires_grad_() for x in inputs([], 4, 2, 1, 8, torch.float32)]
    out = attend(*tensors, Segments.of_lengths([]), scale=1.0)
    assert out.shape == (0, 2, 8)
    assert [x.shape for x in torch.autograd.grad(out.sum(), tensors)] == [x.shape for x in tensors]


@pytest.mark.parametrize(("dim", "scale", "said"), [(12, 1.0, "head dim 12"), (136, 1.0, "head dim 136"), (8, -1.0, "scale -1.0")])
def test_what_is_not_served(dim, scale, said):
    with pytest.raises(ValueError, match=said):
        attend(*inputs([3], 2, 2, 1, dim, torch.float32), Segments.of_lengths([3]), scale=scale)


# --- Hopper code ---

SHAPES = [
    ([70, 0, 1], 16, 4, 2, 96, torch.bfloat16),
    ([1], 8, 4, 1, 96, torch.bfloat16),
    ([301], 64, 4, 1, 96, torch.bfloat16),
    ([0], 3, 2, 1, 96, torch.bfloat16),
    ([4900], 8, 4, 1, 96, torch.bfloat16),
    ([33, 64, 65], 64, 8, 2, 64, torch.bfloat16),
    ([301, 0, 1], 128, 4, 2, 96, torch.bfloat16),
    ([70], 1, 3, 1, 72, torch.bfloat16),
    ([129], 5, 6, 2, 8, torch.bfloat16),
    ([200], 16, 4, 4, 24, torch.bfloat16),
    ([70, 301], 32, 8, 2, 128, torch.bfloat16),
    ([100, 28], 20, 4, 1, 104, torch.float16),
    ([70], 16, 4, 1, 80, torch.bfloat16),
]


@pytest.mark.parametrize(
    ("lengths", "latents", "heads", "kv_heads", "dim", "dtype"),
    [pytest.param(*s, marks=() if s is SHAPES[0] else pytest.mark.slow) for s in SHAPES],
)
def test_hopper_code(lengths, latents, heads, kv_heads, dim, dtype):
    check(lengths, latents, heads, kv_heads, dim, dtype, executed())


@pytest.mark.slow
def test_hopper_code_gives_the_same_bits_twice():
    tensors, images = inputs([70, 5], 16, 4, 1, 96, torch.bfloat16), Segments.of_lengths([70, 5])
    with launches(executed()):
        first, second = (run(attend, tensors, images, 0.1, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


class Only:
    """Executes chosen CTAs of one kernel, and whole those that it needs; leaves the other kernels' outputs poison."""

    def __init__(self, kernel: str, count: int, whole: tuple[str, ...] = ()) -> None:
        self.kernel, self.count, self.whole = kernel, count, whole
        self.tensors: dict[str, Tensor] = {}

    def __call__(self, launch) -> None:
        if launch.name == self.kernel and launch.constexprs.get("OWN") is not True:
            executed(chosen(self.count))(launch)
            self.tensors = launch.tensors
        elif launch.name in self.whole:
            executed()(launch)


FULL = ([4900, 301, 0], 64, 16, 4, 96)


@pytest.mark.slow
def test_hopper_code_of_the_forward_in_full_size():
    """First, last, ragged and random tiles of the real model's shapes, each against its own split of the keys."""
    lengths, latents, heads, kv_heads, dim = FULL
    q, k, v, k_own, v_own = (x.double() for x in inputs(*FULL, torch.bfloat16))
    images, only = Segments.of_lengths(lengths), Only("_forward", 8)
    with launches(only):
        perceiver_attention_triton.forward(*inputs(*FULL, torch.bfloat16), images.offsets, images.longest, dim**-0.5)
    part, groups, compared = only.tensors["part"], heads // kv_heads, 0
    splits = part.shape[2]
    for image, head, split in part[..., 0].isfinite().any(-1).nonzero().tolist():
        start, length = images.bounds[image], lengths[image]
        each = triton.cdiv(triton.cdiv(length, 64), splits) * 64
        keys = range(start + min(split * each, length), start + min((split + 1) * each, length))
        own = range(image * latents, (image + 1) * latents) if split == 0 else range(0)
        all_k = torch.cat([k[keys.start : keys.stop, head], k_own[own.start : own.stop, head]])
        all_v = torch.cat([v[keys.start : keys.stop, head], v_own[own.start : own.stop, head]])
        of_head = q[image * latents : (image + 1) * latents, head * groups : (head + 1) * groups].flatten(0, 1)
        expected = (of_head @ all_k.T * dim**-0.5).softmax(-1) @ all_v
        written = part[image, head, split, :, 0].isfinite()
        if len(all_k):
            # the weights are rounded to bf16, half an ulp each; the values are exact
            assert error(part[image, head, split][written], expected[written]) <= 2.0**-8
        else:
            assert (part[image, head, split][written] == 0).all()
            assert (only.tensors["part_lse"][image, head, split][written] == -math.inf).all()
        compared += 1
    assert compared >= 4


@pytest.mark.slow
def test_hopper_code_of_the_keys_gradients_in_full_size():
    lengths, _, _, _, dim = FULL
    tensors, images = inputs(*FULL, torch.bfloat16), Segments.of_lengths(lengths)
    wide = [x.double().requires_grad_() for x in tensors]
    out = perceiver_attention.reference(*wide, images, scale=dim**-0.5)
    grad = draw(*out.shape, seed=3).bfloat16()
    exact = torch.autograd.grad(out, wide, grad.double())
    only = Only("_backward_kv", 4, whole=("_deltas",))
    lse = log_sums(*(x.detach() for x in wide[:2]), wide[3].detach(), images, dim**-0.5)
    with launches(only):
        perceiver_attention_triton.backward(grad, *tensors, images.offsets, out.detach().bfloat16(), lse, images.longest, dim**-0.5)
    for actual, expected in ((only.tensors["dk"], exact[1]), (only.tensors["dv"], exact[2])):
        written = actual.isfinite().all(-1)
        assert written.sum() >= 128
        # of p, dp - delta, ds and the result, each rounded to bf16, and of out in delta
        assert error(actual[written], expected[written]) <= 2.0**-6


def log_sums(q: Tensor, k: Tensor, k_own: Tensor, images: Segments, scale: float) -> Tensor:
    """lse [I, M, R], fp32, base 2."""
    latents, groups = q.shape[0] // len(images), q.shape[1] // k.shape[1]
    sums = []
    for q_i, k_i, own in zip(q.split(latents), k.split(images.lengths), k_own.split(latents), strict=True):
        packed = q_i.unflatten(1, (-1, groups)).transpose(0, 1).flatten(1, 2)
        sums.append((packed @ torch.cat([k_i, own]).permute(1, 2, 0) * scale).logsumexp(-1) / math.log(2))
    return torch.stack(sums).float()
