"""Every implementation of every op against its reference in fp64, and the rule that chooses among them."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics2_fast import Segments, ops
from idefics2_fast.kernels import decode_attention, linear, perceiver_attention, rms_norm, segment_attention
from idefics2_fast.kernels.decode_attention import Slots

FP32 = 2e-6  # relative: 2^-24 times the growth of a few hundred pairwise-summed terms


def close(actual: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    error = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    scale = expected.abs().max().item() if expected.numel() else 0.0
    assert error <= relative * scale, f"error {error:.2e} of {scale:.2e}, allowed {relative:.0e} relative"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (4, 1)]),
    dim=st.sampled_from([8, 18, 72]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 7, 200]),
)
def test_segment_attention(lengths, heads, dim, causal, window):
    window = window if causal else None
    (n, m), total = heads, sum(lengths)
    q, k, v = draw(total, n, dim), draw(total, m, dim, seed=1), draw(total, m, dim, seed=2)
    segments, scale = Segments.of_lengths(lengths), dim**-0.5
    expected = segment_attention.reference(q, k, v, segments, causal=causal, window=window, scale=scale)
    actual = segment_attention.sdpa(q.float(), k.float(), v.float(), segments, causal=causal, window=window, scale=scale)
    assert actual.shape == q.shape
    close(actual, expected, FP32)


def test_segment_attention_reference_is_the_formula():
    q, k, v = draw(5, 2, 4), draw(5, 1, 4, seed=1), draw(5, 1, 4, seed=2)
    out = segment_attention.reference(q, k, v, Segments.of_lengths([2, 3]), causal=True, window=2, scale=0.5)
    row, head = 4, 1  # of the second document it sees rows 3 and 4
    weights = torch.tensor([q[row, head] @ k[j, 0] * 0.5 for j in (3, 4)]).softmax(0)
    torch.testing.assert_close(out[row, head], weights[0] * v[3, 0] + weights[1] * v[4, 0])


def test_a_long_window_crosses_the_blocks_of_queries(monkeypatch):
    monkeypatch.setattr(segment_attention, "WINDOW_BLOCK", 16)
    q, k, v = draw(75, 4, 8), draw(75, 2, 8, seed=1), draw(75, 2, 8, seed=2)
    arguments = {"causal": True, "window": 21, "scale": 0.3}
    segments = Segments.of_lengths([70, 5])
    actual = segment_attention.sdpa(q.float(), k.float(), v.float(), segments, **arguments)
    close(actual, segment_attention.reference(q, k, v, segments, **arguments), FP32)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 5)])
def test_segment_attention_gradients(causal, window):
    inputs = [draw(11, heads, 6, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    segments = Segments.of_lengths([4, 0, 7])
    run = lambda *x: segment_attention.sdpa(*x, segments, causal=causal, window=window, scale=0.4)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=4),
    heads=st.sampled_from([(4, 4), (6, 2)]),
    latents=st.sampled_from([1, 8, 64]),
)
def test_perceiver_attention(lengths, heads, latents):
    (n, m), dim, images = heads, 16, Segments.of_lengths(lengths)
    q, k_l, v_l = (draw(len(lengths) * latents, h, dim, seed=s) for s, h in enumerate((n, m, m)))
    k_c, v_c = draw(sum(lengths), m, dim, seed=5), draw(sum(lengths), m, dim, seed=6)
    expected = perceiver_attention.reference(q, k_c, v_c, k_l, v_l, images, scale=0.25)
    actual = perceiver_attention.sdpa(*(x.float() for x in (q, k_c, v_c, k_l, v_l)), images, scale=0.25)
    close(actual, expected, FP32)


def test_perceiver_attention_gradients():
    images = Segments.of_lengths([3, 5])
    inputs = [draw(rows, heads, 4, seed=rows + heads).requires_grad_() for rows, heads in ((4, 4), (8, 2), (8, 2), (4, 2), (4, 2))]
    assert torch.autograd.gradcheck(lambda *x: perceiver_attention.sdpa(*x, images, scale=0.5), inputs)


@pytest.mark.parametrize("implementation", ["sdpa_ragged", "sdpa_static"])
@pytest.mark.parametrize("window", [None, 4])
def test_decode_attention(implementation, window):
    slots = Slots(torch.tensor([0, 20, 33]), torch.tensor([9, 1, 17]), capacity=20)
    q, k, v = draw(3, 6, 8), draw(50, 2, 8, seed=1), draw(50, 2, 8, seed=2)
    expected = decode_attention.reference(q, k, v, slots, window=window, scale=0.3)
    # rows that no sequence uses are poison: reading one shows
    used = torch.cat([torch.arange(start, end) for start, end in slots.bounds])
    poisoned = torch.full_like(k, 1e30)
    poisoned[used] = k[used]
    actual = getattr(decode_attention, implementation)(q.float(), poisoned.float(), v.float(), slots, window=window, scale=0.3)
    close(actual, expected, FP32)


@pytest.mark.parametrize("rows", [1, linear.FEW_ROWS, linear.FEW_ROWS + 1, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upcast_linear(rows, dtype):
    x, weight, bias = (
        draw(*shape, seed=i).to(dtype) for i, shape in enumerate([(rows, 96), (2 * linear.BLOCK + 3, 96), (2 * linear.BLOCK + 3,)])
    )
    expected = linear.reference(x.double(), weight.double(), bias.double())
    eps = torch.finfo(dtype).eps
    # one rounding of the result, half an ulp, and beside it the fp32 sum of 96 products
    bound = expected.abs() * eps / 2 + 96 * 2.0**-24 * expected.abs().max()
    assert ((linear.upcast(x, weight, bias).double() - expected).abs() <= bound * (1 if rows > linear.FEW_ROWS else 2)).all()


@pytest.mark.parametrize("rows", [0, 1, 2, linear.TURNED_ROWS, linear.TURNED_ROWS + 1])
@pytest.mark.parametrize("shape", [(48, 40), (linear.TALL * linear.WIDE, linear.WIDE)], ids=["square", "tall"])
@pytest.mark.parametrize("biased", [False, True])
def test_few_rows_on_a_cpu(rows, shape, biased):
    x, weight, bias = draw(rows, shape[1]), draw(*shape, seed=1), draw(shape[0], seed=2) if biased else None
    with torch.no_grad():
        actual = linear.cpu(x.float(), weight.float(), None if bias is None else bias.float())
    assert actual.is_contiguous()
    close(actual, linear.reference(x, weight, bias), FP32)


def test_upcast_linear_gradients():
    x, weight, bias = (
        draw(*shape, seed=i).bfloat16().requires_grad_() for i, shape in enumerate([(40, 32), (linear.BLOCK + 8, 32), (linear.BLOCK + 8,)])
    )
    grad = draw(40, linear.BLOCK + 8, seed=9).bfloat16()
    linear.upcast(x, weight, bias).backward(grad)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    linear.reference(*wide).backward(grad.double())
    for ours, exact in zip((x, weight, bias), wide, strict=True):
        close(ours.grad, exact.grad, 2.0**-8)


def is_rounded_once(norm, dtype: torch.dtype) -> bool:
    """Whether an RMSNorm errs by the rounding of its result alone: half an ulp of each value."""
    x, weight = draw(50, 576).to(dtype), draw(576, seed=1).to(dtype)
    expected, info = rms_norm.reference(x.double(), weight.double(), 1e-5), torch.finfo(dtype)
    allowed = expected.abs() * max(info.eps / 2 * 1.001, 4e-7) + info.smallest_normal * info.eps / 2
    return bool(((norm(x, weight, 1e-5).double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [False, True])
def test_rms_norm_is_computed_in_fp32(dtype, grad):
    with torch.set_grad_enabled(grad):
        assert is_rounded_once(rms_norm.cpu, dtype)


def test_a_norm_computed_in_bf16_is_seen():
    assert not is_rounded_once(rms_norm.reference, torch.bfloat16)


def test_rms_norm_gradients():
    x, weight = draw(6, 10).requires_grad_(), draw(10, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm.cpu(x, w, 1e-3), (x, weight))


class Recorder:
    """A stand-in for a GPU library: keeps the arguments of a call."""

    def __init__(self, result) -> None:
        self.result = result

    def __call__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        return self.result(*args, **kwargs)


def test_the_rule_prefers_flash_then_xformers_then_sdpa(monkeypatch):
    installed = {"flash_attn", "xformers"}
    monkeypatch.setattr(ops, "_installed", lambda package: package in installed)
    choose = ops._preferred.__wrapped__
    assert choose("segment_attention", "cuda", torch.bfloat16, 72) == "flash_attn"
    assert choose("segment_attention", "cuda", torch.float32, 72) == "xformers"
    assert choose("segment_attention", "cuda", torch.bfloat16, 73) == "sdpa"
    assert choose("segment_attention", "cpu", torch.bfloat16, 72) == "sdpa"
    assert choose("decode_attention", "cuda", torch.bfloat16, 128) == "flash_attn"
    installed.remove("flash_attn")
    assert choose("segment_attention", "cuda", torch.bfloat16, 72) == "xformers"
    assert choose("decode_attention", "cuda", torch.bfloat16, 128) == "sdpa_static"
    installed.remove("xformers")
    assert choose("segment_attention", "cuda", torch.bfloat16, 72) == "sdpa"
    assert choose("decode_attention", "cpu", torch.float32, 128) == "sdpa_ragged"


def test_flash_attention_is_called_by_its_contract(monkeypatch):
    """The call is replayed by the reference: what we ask of flash_attn_varlen_func is what the op means."""

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == 9
        left, right = window_size  # flash-attention counts keys to the left of the query, itself not included
        assert right == (0 if left >= 0 else -1)
        window = left + 1 if left >= 0 else None
        segments = Segments.of_offsets(cu_seqlens_q)
        return segment_attention.reference(q, k, v, segments, causal=causal, window=window, scale=softmax_scale)

    module = types.SimpleNamespace(flash_attn_varlen_func=Recorder(varlen))
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    q, k, v, segments = draw(12, 4, 8), draw(12, 2, 8, seed=1), draw(12, 2, 8, seed=2), Segments.of_lengths([3, 9])
    for causal, window in ((False, None), (True, None), (True, 4)):
        expected = ops.segment_attention(q, k, v, segments, scale=0.3, causal=causal, window=window)
        with ops.using(segment_attention="flash_attn"):
            close(ops.segment_attention(q, k, v, segments, scale=0.3, causal=causal, window=window), expected, 1e-12)


def test_flash_decode_is_called_by_its_contract(monkeypatch):
    monkeypatch.setattr(ops, "PAGE", 4)
    starts, lengths = torch.tensor([0, 8, 12]), torch.tensor([7, 2, 12])

    def with_kvcache(q, k, v, cache_seqlens, block_table, softmax_scale, causal, window_size):
        assert q.shape[1] == 1
        assert cache_seqlens.dtype == block_table.dtype == torch.int32
        assert causal
        window = window_size[0] + 1 if window_size[0] >= 0 else None
        outputs = []
        for q_d, length, pages in zip(q, cache_seqlens.tolist(), block_table, strict=True):
            assert int(pages.max()) < k.shape[0]
            k_d, v_d = k[pages.long()].flatten(0, 1), v[pages.long()].flatten(0, 1)
            slots = Slots(torch.tensor([0]), torch.tensor([length]), length)
            outputs.append(decode_attention.reference(q_d, k_d, v_d, slots, window=window, scale=softmax_scale))
        return torch.stack(outputs)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_with_kvcache=with_kvcache))
    q, k, v, slots = draw(3, 4, 8), draw(24, 2, 8, seed=1), draw(24, 2, 8, seed=2), Slots(starts, lengths, 12)
    for window in (None, 3):
        with ops.using(decode_attention="flash_attn"):
            actual = ops.decode_attention(q, k, v, slots, scale=0.3, window=window)
        close(actual, decode_attention.reference(q, k, v, slots, window=window, scale=0.3), 1e-12)


def test_xformers_is_called_by_its_contract(monkeypatch):
    class Mask:
        def __init__(self, lengths):
            self.lengths, self.causal, self.window = lengths, False, None

        @classmethod
        def from_seqlens(cls, lengths, device):
            return cls(lengths)

        def make_causal(self):
            self.causal = True
            return self

        def make_local_attention(self, window):  # xformers counts the query itself in its window
            self.window = window
            return self

    def attention(q, k, v, attn_bias, scale):
        assert q.shape == k.shape == v.shape  # it knows no grouped queries
        segments = Segments.of_lengths(attn_bias.lengths)
        out = segment_attention.reference(q[0], k[0], v[0], segments, causal=attn_bias.causal, window=attn_bias.window, scale=scale)
        return out[None]

    fmha = types.SimpleNamespace(attn_bias=types.SimpleNamespace(BlockDiagonalMask=Mask), memory_efficient_attention=attention)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", types.SimpleNamespace(fmha=fmha))
    q, k, v, segments = draw(12, 4, 8), draw(12, 2, 8, seed=1), draw(12, 2, 8, seed=2), Segments.of_lengths([3, 9])
    for causal, window in ((False, None), (True, None), (True, 4)):
        with ops.using(segment_attention="xformers"):
            actual = ops.segment_attention(q, k, v, segments, scale=0.3, causal=causal, window=window)
        close(actual, segment_attention.reference(q, k, v, segments, causal=causal, window=window, scale=0.3), 1e-12)


def test_using_names_what_there_is():
    with (
        pytest.raises(ValueError, match=r"segment_attention has no implementation 'fast'.*flash_attn, xformers, sdpa"),
        ops.using(segment_attention="fast"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="softmax has no implementation 'sdpa': expected an op: segment_attention"),
        ops.using(softmax="sdpa"),
    ):
        pass
    x = torch.zeros(1, 8)
    with ops.using(rms_norm="reference"):
        assert ops.choose("rms_norm", x) == "reference"
        with ops.using(linear="reference"):
            assert (ops.choose("rms_norm", x), ops.choose("linear", x)) == ("reference", "reference")
    assert ops.choose("rms_norm", x) == "cpu"


def test_using_blocks_of_threads_end_in_any_order():
    x = torch.zeros(1, 8)
    first, second = ops.using(rms_norm="reference"), ops.using(rms_norm="torch")
    with first:
        second.__enter__()
        assert ops.choose("rms_norm", x) == "torch"
    assert ops.choose("rms_norm", x) == "torch"
    second.__exit__(None, None, None)
    assert ops.choose("rms_norm", x) == "cpu"
