"""Launches taken from the card: what is recorded, how it is specialised, what interpreter and canaries see. The kernels are made for it."""

import pytest
import torch
import triton
import triton.language as tl

from idefics2_fast.benchmarks.sm90 import launches as sm90
from idefics2_fast.benchmarks.sm90.faults import UnwrittenRead
from idefics2_fast.benchmarks.sm90.launches import chosen, executed, interpreted, launches, recorded


@triton.jit
def _half_of(x):
    return x * 0.5


@triton.jit
def row_softmax(X, Y, stride, columns, scale, BLOCK: tl.constexpr, SHIFT: tl.constexpr = 0):
    """A helper, library functions in Python (`tl.max`, `tl.cdiv`), and a mask."""
    row = tl.program_id(0) + tl.cdiv(SHIFT, 1)
    at = tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + at, mask=at < columns, other=float("-inf")) * scale
    e = tl.exp(x - tl.max(x, 0))
    tl.store(Y + row * columns + at, _half_of(2 * e / tl.sum(e, 0)), mask=at < columns)


@triton.jit
def product(X, Y, Z, N: tl.constexpr, ACCUMULATOR: tl.constexpr):
    at = tl.arange(0, N)
    place = at[:, None] * N + at[None, :]
    total = tl.zeros([N, N], ACCUMULATOR)
    total = tl.dot(tl.load(X + place), tl.load(Y + place), total, input_precision="ieee", out_dtype=ACCUMULATOR)
    tl.store(Z + place, total)


@triton.jit
def add_one(X, Y, size, BLOCK: tl.constexpr, MASKED: tl.constexpr, SHIFT: tl.constexpr, WRITES: tl.constexpr = True):
    """With MASKED and no SHIFT as it should be, otherwise broken in one way each."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size if MASKED else at < size + BLOCK
    x = tl.load(X + at + SHIFT, mask=inside, other=0)
    if WRITES:
        tl.store(Y + at, x + 1, mask=inside)


def softmax(x, *, scale=1.0, **options):
    y = torch.empty(x.shape, dtype=x.dtype)
    options = {"num_warps": 1, "enable_fp_fusion": True, **options}
    row_softmax[lambda meta: (x.shape[0],)](x, y, x.stride(0), x.shape[1], scale, BLOCK=64, **options)
    return y


def plus_one(x, *, masked=True, shift=0, writes=True):
    y = torch.empty_like(x)
    options = {"MASKED": masked, "SHIFT": shift, "WRITES": writes, "enable_fp_fusion": True}
    add_one[(triton.cdiv(x.numel(), 32),)](x, y, x.numel(), BLOCK=32, **options)
    return y


def compiled(function, *args, **kwargs):
    with launches(recorded()) as record:
        function(*args, **kwargs)
    return sm90.compile(record.launches[0])


# --- recorded ---


def test_a_launch_knows_its_arguments_by_name_and_runs_nothing():
    x = torch.randn(3, 48)
    with launches(recorded()) as record:
        y = softmax(x, num_warps=2, num_stages=1)
    (launch,) = record.launches
    assert (launch.name, launch.grid) == ("row_softmax", (3, 1, 1))
    assert launch.constexprs == {"BLOCK": 64, "SHIFT": 0}
    assert launch.options == {"num_warps": 2, "num_stages": 1, "enable_fp_fusion": True}
    assert list(launch.arguments) == ["X", "Y", "stride", "columns", "scale"]
    assert launch.tensors["X"] is x
    assert launch.tensors["Y"] is y
    assert y.isnan().all()


def test_after_the_block_launches_go_to_the_card_again():
    run, call = triton.JITFunction.run, triton.JITFunction.__call__
    with launches(interpreted()):
        softmax(torch.randn(1, 8))
    with pytest.raises(ZeroDivisionError), launches(lambda launch: 1 / 0):
        softmax(torch.randn(1, 8))
    assert (triton.JITFunction.run, triton.JITFunction.__call__) == (run, call)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not triton.knobs.runtime.interpret


def test_what_is_no_tensor_and_no_number_is_refused():
    with launches(recorded()), pytest.raises(ValueError, match="row_softmax: X is a str"):
        row_softmax[(1,)]("x", torch.empty(1), 1, 1, 1.0, BLOCK=8)


# --- compiled ---


def test_pointers_and_integers_are_specialised_as_by_the_launcher():
    whole = compiled(softmax, torch.randn(3, 48))
    assert whole.parameters == {"X": "*fp32", "Y": "*fp32", "stride": "i32", "columns": "i32", "scale": "fp32"}
    assert "ld.global.v2.b32" in whole.ptx
    odd = compiled(softmax, torch.randn(3, 47))
    assert "ld.global.v" not in odd.ptx
    shifted = compiled(softmax, torch.randn(3 * 48 + 1)[1:].view(3, 48))
    assert "ld.global.v" not in shifted.ptx
    ones = compiled(softmax, torch.randn(3, 1))
    assert set(ones.parameters) == {"X", "Y", "scale"}, "a stride and a count of 1 are constants"


def test_what_the_machine_code_says_of_itself():
    kernel = compiled(softmax, torch.randn(3, 48).bfloat16(), num_warps=2)
    assert kernel.num_warps == 2
    assert 0 < kernel.registers <= 255
    assert kernel.stack == 0
    assert ".target sm_90" in kernel.ptx
    assert "MUFU.EX2" in kernel.sass


def test_an_unknown_option_is_an_error():
    with pytest.raises(KeyError, match="warps"):
        compiled(softmax, torch.randn(3, 48), warps=2)


def test_one_specialisation_is_compiled_once():
    assert compiled(softmax, torch.randn(3, 48)) is compiled(softmax, torch.randn(5, 48))
    assert compiled(softmax, torch.randn(3, 48)) is not compiled(softmax, torch.randn(5, 48), num_warps=8)


# --- interpreted ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_interpreter_computes(dtype):
    x = torch.randn(5, 41, dtype=dtype)
    with launches(interpreted()):
        y = softmax(x, scale=0.5)
    torch.testing.assert_close(y, (x * 0.5).softmax(-1), rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_products_in_fp64():
    x, y = torch.randn(2, 16, 16, dtype=torch.float64)
    z = torch.empty_like(x)
    with launches(interpreted()):
        product[(1,)](x, y, z, N=16, ACCUMULATOR=tl.float64)
    torch.testing.assert_close(z, x @ y, rtol=1e-14, atol=1e-14)


def test_bf16_is_not_interpreted():
    with launches(interpreted()), pytest.raises(ValueError, match="X is bfloat16"):
        softmax(torch.randn(2, 8).bfloat16())


def test_interpreting_leaves_the_compiler_alone():
    with launches(interpreted()):
        softmax(torch.randn(2, 40))
    assert compiled(softmax, torch.randn(2, 48), num_warps=4).registers > 0


def test_views_and_broadcast_arguments_keep_their_strides():
    buffer = torch.randn(6, 3, 40)
    kept = buffer.clone()
    with launches(interpreted()):
        y = softmax(buffer[:, 1])
        z = softmax(torch.randn(1, 40).expand(4, 40))
    torch.testing.assert_close(y, kept[:, 1].softmax(-1))
    assert torch.equal(buffer, kept)
    assert torch.equal(z, z[:1].expand(4, 40))


def test_in_place_tensors_stay_one():
    x = torch.arange(40.0)
    with launches(interpreted()):
        add_one[(2,)](x, x, 40, BLOCK=32, MASKED=True, SHIFT=0)
    assert torch.equal(x, torch.arange(40.0) + 1)


def test_no_rows_at_all():
    with launches(interpreted()):
        add_one[(1,)](torch.empty(0), torch.empty(0), 0, BLOCK=32, MASKED=True, SHIFT=0)


# --- executed ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_code_computes(dtype):
    x = torch.randn(5, 41).to(dtype)
    with launches(executed()) as run:
        y = softmax(x, scale=0.5)
    expected = (x.double() * 0.5).softmax(-1)
    torch.testing.assert_close(y.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)
    (counts,) = run.counts
    assert counts.ctas == 5
    assert counts.bytes("load") == counts.bytes("store") == 5 * 41 * dtype.itemsize


def test_chosen_ctas_alone_run():
    x = torch.randn(40, 41)
    with launches(executed(chosen(6))) as run:
        y = softmax(x)
    assert run.counts[0].ctas == 6
    ran = ~y.isnan().any(1)
    assert ran.sum() == 6
    assert ran[[0, -1]].all()
    torch.testing.assert_close(y[ran], x[ran].softmax(-1))


def test_what_is_chosen():
    launch = sm90.Launch(row_softmax, (3, 4, 5), {}, {}, {})
    few, many = chosen(4)(launch), chosen(100)(launch)
    assert few[:2] == [(0, 0, 0), (2, 3, 4)]
    assert len(few) == len(set(few)) == 4
    assert sorted(many) == sorted((x, y, z) for x in range(3) for y in range(4) for z in range(5))
    assert chosen(20, seed=1)(launch) != chosen(20, seed=2)(launch)
    assert chosen(9)(sm90.Launch(row_softmax, (1, 1, 1), {}, {}, {})) == [(0, 0, 0)]


def test_a_read_of_what_nothing_wrote_is_a_fault():
    with launches(executed()), pytest.raises(UnwrittenRead, match="'X'"):
        plus_one(torch.empty(40))
    with launches(executed()):
        plus_one(torch.zeros(40))


# --- what a broken kernel does ---


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_store_behind_the_end_is_seen():
    with launches(interpreted()), pytest.raises(AssertionError, match="add_one wrote outside of its tensors"):
        plus_one(torch.randn(40), masked=False)


def test_a_store_between_the_rows_of_a_view_is_seen():
    x = torch.zeros(8, 8)[:, :4]
    with launches(interpreted()), pytest.raises(AssertionError, match="add_one wrote outside of its tensors"):
        add_one[(1,)](torch.zeros(64), x, 32, BLOCK=32, MASKED=True, SHIFT=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("shift", [-1, 40])
def test_a_read_outside_is_poison(shift):
    with launches(interpreted()):
        y = plus_one(torch.zeros(40), shift=shift)
        indices = plus_one(torch.zeros(40, dtype=torch.int32), shift=shift)
    assert y.isnan().any()
    assert (indices <= 0).any(), "no index of a row, plus 1"


def test_what_is_not_written_is_poison():
    with launches(interpreted()):
        assert plus_one(torch.zeros(40), writes=False).isnan().all()
