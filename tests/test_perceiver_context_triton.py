"""The perceiver's context product by Triton: in its interpreter, and its Hopper code executed on the CPU, against the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from idefics2_fast.benchmarks.sm90.launches import chosen, executed, interpreted, launches
from idefics2_fast.kernels import perceiver_context, perceiver_context_triton, rms_norm
from idefics2_fast.kernels.perceiver_context_triton import project

EPS = 1e-2  # of a size that shows where it is added
RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6}
ROUNDING = 2  # a kernel in half precision may err so many times as much as PyTorch in the same precision


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(rows: int, width: int, outs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of different sizes, so that a row's norm is not another's; weights that keep the size of what they multiply."""
    return (draw(rows, width, seed=0) * (1 + torch.arange(rows)[:, None] % 7)).to(dtype), (draw(outs, width, seed=1) / width**0.5).to(dtype)


def run(function, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """The output and both gradients."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    y = function(*leaves, EPS)
    return [y.detach(), *torch.autograd.grad(y, leaves, draw(*y.shape, seed=2).to(tensors[0].dtype).to(dtype))]


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative; of zeros, absolute."""
    return (actual.double() - expected).norm().item() / (expected.norm().item() or 1.0)


def check(rows: int, width: int, outs: int, dtype: torch.dtype, handler) -> None:
    tensors = inputs(rows, width, outs, dtype)
    exact = run(perceiver_context.reference, tensors, torch.float64)
    with launches(handler):
        ours = run(project, tensors, dtype)
    if dtype in RELATIVE:
        allowed = [RELATIVE[dtype]] * 3
    else:
        plain = run(perceiver_context.folded, tensors, dtype)
        allowed = [ROUNDING * error(x, y) for x, y in zip(plain, exact, strict=True)]
    for name, actual, expected, most in zip(("y", "dx", "dw"), ours, exact, allowed, strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == dtype
        assert error(actual, expected) <= most, f"{name}: {error(actual, expected):.1e} of {most:.1e}"
    if dtype not in RELATIVE:
        # rounded once: 0.21 of an ulp in the root mean square, and 0.30 if the product were rounded before it is scaled
        assert error(ours[0], exact[0]) <= torch.finfo(dtype).eps / 4


# --- Triton's interpreter ---


@settings(max_examples=5, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 31, 33]),
    width=st.sampled_from([8, 32, 72]),
    outs=st.sampled_from([8, 40]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_shapes(rows, width, outs, dtype):
    check(rows, width, outs, dtype, interpreted())


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 130),
    width=st.integers(1, 20).map(lambda n: 8 * n),
    outs=st.integers(1, 12).map(lambda n: 8 * n),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_more_shapes(rows, width, outs, dtype):
    check(rows, width, outs, dtype, interpreted())


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_gradients_that_are_needed(needs):
    tensors = inputs(5, 16, 8, torch.float64)
    leaves = [x.requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
    seen = []

    def handler(launch) -> None:
        seen.append(launch.name)
        interpreted()(launch)

    with launches(handler):
        project(*leaves, EPS).sum().backward()
    assert ("_backward_x" in seen, "_backward_weight" in seen) == needs
    assert [x.grad is not None for x in leaves] == list(needs)


def test_permuted_inputs():
    tensors = tuple(x.T.contiguous().T for x in inputs(5, 16, 8, torch.float64))
    exact = run(perceiver_context.reference, tensors, torch.float64)
    with launches(interpreted()):
        ours = run(project, tensors, torch.float64)
    assert all(error(x, y) <= 1e-12 for x, y in zip(ours, exact, strict=True))


# --- what surrounds it ---


def test_opcheck():
    x, weight = (t.requires_grad_() for t in inputs(3, 8, 8, torch.float64))
    with launches(interpreted()):
        torch.library.opcheck(torch.ops.idefics2_fast.perceiver_context.default, (x, weight, EPS))


def test_compiled_as_one_graph():
    leaves = [t.requires_grad_() for t in inputs(3, 8, 8, torch.float64)]

    def loss(x, weight):
        return project(x, weight, EPS).square().sum()

    with launches(interpreted()):
        expected = torch.autograd.grad(loss(*leaves), leaves)
        actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        leaves = [torch.empty(rows, 16, dtype=torch.bfloat16, requires_grad=True) for rows in (5, 8)]
        y = project(*leaves, EPS)
        assert (y.shape, y.dtype) == ((5, 8), torch.bfloat16)
        assert [g.shape for g in torch.autograd.grad(y.sum(), leaves)] == [x.shape for x in leaves]


def test_no_rows():
    """The weight still takes part in what ranks do together."""
    x, weight = torch.empty(0, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    y = project(x, weight, EPS)
    assert y.shape == (0, 8)
    assert [g.tolist() for g in torch.autograd.grad(y.sum(), (x, weight))] == [[], [[0.0] * 16] * 8]


def test_two_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"torch\.bfloat16 and the weight torch\.float32"):
        project(torch.empty(3, 16, dtype=torch.bfloat16), torch.empty(8, 16), EPS)


# --- Hopper code ---

SHAPES = [
    (70, 96, 72, torch.bfloat16),
    (1, 64, 64, torch.bfloat16),
    (70, 4096, 96, torch.bfloat16),
    (301, 128, 256, torch.bfloat16),
    (4900, 64, 64, torch.bfloat16),
    (129, 72, 264, torch.bfloat16),
    (128, 256, 128, torch.bfloat16),
    (33, 8, 8, torch.bfloat16),
    (200, 576, 96, torch.bfloat16),
    (64, 64, 2304, torch.bfloat16),
    (301, 264, 24, torch.bfloat16),
    (15, 1024, 40, torch.bfloat16),
    (70, 96, 72, torch.float16),
]


@pytest.mark.parametrize(
    ("rows", "width", "outs", "dtype"), [pytest.param(*s, marks=() if s is SHAPES[0] else pytest.mark.slow) for s in SHAPES]
)
def test_hopper_code(rows, width, outs, dtype):
    check(rows, width, outs, dtype, executed())


def tiles_of(x: Tensor, weight: Tensor) -> Tensor:
    """y with the first tile and the last, the rest poison; r by PyTorch."""

    def handler(launch) -> None:
        if launch.name == "_rstd":
            launch.tensors["rstd"].copy_(rms_norm.rstd(x, EPS)[:, 0])
        else:
            executed(chosen(2))(launch)

    with launches(handler):
        return perceiver_context_triton.forward(x, weight, EPS)[0]


@pytest.mark.slow
def test_hopper_code_in_full_size():
    """Chosen tiles of the real model's forward product: the error of one rounding to bf16 and no more."""
    x, weight = inputs(4900, 4096, 2304, torch.bfloat16)
    y = tiles_of(x, weight)
    rows, columns = y.isfinite().any(1), y.isfinite().any(0)
    assert rows.sum() >= 128 + 4900 % 128
    written = y[rows][:, columns]
    expected = perceiver_context.reference(x[rows].double(), weight[columns].double(), EPS)
    inside = written.isfinite()
    assert error(written[inside], expected[inside]) <= torch.finfo(torch.bfloat16).eps / 4


@pytest.mark.slow
def test_hopper_code_gives_the_same_bits_twice():
    tensors = inputs(70, 96, 72, torch.bfloat16)
    with launches(executed()):
        first, second = (run(project, tensors, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
