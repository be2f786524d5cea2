"""DoRA's linear layer by Triton: in its interpreter, and its Hopper code executed on the CPU, against the formula in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import check_deterministic, check_fake, check_fullgraph, check_operator, check_permuted
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from idefics2_fast import ops
from idefics2_fast.benchmarks.sm90 import roofline
from idefics2_fast.benchmarks.sm90.launches import chosen, executed, interpreted, launches, recorded
from idefics2_fast.kernels import dora_linear, dora_linear_triton
from idefics2_fast.kernels.dora_linear import factored, reference
from idefics2_fast.kernels.dora_linear_triton import folded, fuses, outer, project, row_norm, row_square

SCALING = 0.35
RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6}
ROUNDING = 2  # a kernel in half precision may err so many times as much as PyTorch in the same precision
NAMES = ("x", "weight", "a", "b", "magnitude", "bias")
FRESH = ("a", "b", "magnitude")  # fp32 whatever the model's dtype
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def few_programs_are_enough():
    """Small layers, which are the library's by rights, take Triton's products here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dora_linear_triton, "FULL", 1)
        yield


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(
    rows: int, width: int, out: int, rank: int, dtype: torch.dtype, *, dora: bool = True, bias: bool = True, dropout: bool = False
) -> dict[str, Tensor | None]:
    """By name; the adapter's share of the output is as large as the base's. Some magnitudes are zero, or next to it."""
    magnitude = draw(out, seed=4).abs() / 4 + 1
    magnitude[: out // 8] = torch.tensor([0.0, 3e-4, -2e-3, 1.5]).repeat(out)[: out // 8]
    made = {
        "x": draw(rows, width, seed=0).to(dtype),
        "weight": (draw(out, width, seed=1) / width**0.5).to(dtype),
        "a": (draw(rank, width, seed=2) / width**0.5).to(_wide(dtype)),
        "b": (draw(out, rank, seed=3) * 2 / rank**0.5).to(_wide(dtype)),
        "magnitude": magnitude.to(_wide(dtype)) if dora else None,
        "bias": draw(out, seed=5).to(dtype) if bias else None,
    }
    made["dropped"] = made["x"] * (draw(rows, width, seed=6) > -0.5) * 1.5 if dropout else None
    return made


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def run(function, tensors: dict[str, Tensor | None], dtype: torch.dtype, device: torch.device = CPU, **settings) -> dict[str, Tensor]:
    """The output and the gradients of all tensors, computed in `dtype`; what trains stays at least fp32, as in training."""
    dtypes = {name: _wide(dtype) if name in FRESH else dtype for name in tensors}
    leaves = {name: t.detach().to(device, dtypes[name]).requires_grad_() for name, t in tensors.items() if t is not None}
    y = function(*(leaves.get(name) for name in NAMES), scaling=SCALING, dropped=leaves.get("dropped"), **settings)
    grad = draw(*y.shape, seed=7).to(tensors["x"].dtype).to(device, dtype)
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))


def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None, bias: Tensor | None, **settings) -> Tensor:
    """PyTorch in the same precision, as the model has it: norms in fp32, products in the dtype of x."""
    norm = None if magnitude is None else dora_linear.row_norm(weight, a, b, settings["scaling"])
    return factored(x, weight, a.to(x.dtype), b.to(x.dtype), magnitude, bias, norm=norm, **settings)


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double().cpu() - expected).norm() / expected.norm()).item() if expected.numel() else 0.0


def compare(ours: dict[str, Tensor], tensors: dict[str, Tensor | None], dtype: torch.dtype, **settings) -> None:
    exact = run(reference, tensors, torch.float64, **settings)
    theirs = {} if dtype in RELATIVE else run(plain, tensors, dtype, **settings)
    for name, expected in exact.items():
        most = RELATIVE[dtype] if dtype in RELATIVE else ROUNDING * error(theirs[name], expected)
        assert ours[name].shape == expected.shape
        assert ours[name].dtype == (_wide(dtype) if name in FRESH else dtype)
        assert error(ours[name], expected) <= most, f"{name}: {error(ours[name], expected):.1e} of {most:.1e}"


def check(tensors: dict[str, Tensor | None], dtype: torch.dtype, handler, **settings) -> None:
    with launches(handler):
        ours = run(project, tensors, dtype, **settings)
    compare(ours, tensors, dtype, **settings)


# --- Triton's interpreter ---


@settings(max_examples=4, deadline=None)
@given(
    rows=st.sampled_from([1, 31, 33]),
    width=st.sampled_from([8, 40]),
    out=st.sampled_from([8, 72]),
    rank=st.sampled_from([8, 20]),
    dora=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_shapes(rows, width, out, rank, dora, bias, dtype):
    check(inputs(rows, width, out, rank, dtype, dora=dora, bias=bias), dtype, interpreted())


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 130),
    width=st.integers(1, 20).map(lambda n: 8 * n),
    out=st.integers(1, 12).map(lambda n: 8 * n),
    rank=st.integers(1, 40),
    dora=st.booleans(),
    bias=st.booleans(),
    dropout=st.booleans(),
    base_sees_dropout=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_more_shapes(rows, width, out, rank, dora, bias, dropout, base_sees_dropout, dtype):
    tensors = inputs(rows, width, out, rank, dtype, dora=dora, bias=bias, dropout=dropout)
    check(tensors, dtype, interpreted(), base_sees_dropout=base_sees_dropout)


@pytest.mark.parametrize("rank", [16, 64, 128, 200])
def test_ranks(rank):
    check(inputs(5, 24, 16, rank, torch.float64), torch.float64, interpreted())


@pytest.mark.parametrize("base_sees_dropout", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_dropout(dora, base_sees_dropout):
    check(inputs(9, 24, 16, 8, torch.float64, dora=dora, dropout=True), torch.float64, interpreted(), base_sees_dropout=base_sees_dropout)


@pytest.mark.parametrize(("dora", "bias"), [(False, False), (False, True), (True, False), (True, True)])
def test_the_librarys_products(monkeypatch, dora, bias):
    monkeypatch.setattr(dora_linear_triton, "RATE", 0.0)
    seen = []

    def handler(launch) -> None:
        seen.append(launch.name)
        interpreted()(launch)

    check(inputs(9, 24, 16, 8, torch.float64, dora=dora, bias=bias), torch.float64, handler)
    assert not {"_forward", "_backward_x"} & set(seen)


def test_gradients_are_computed_for_those_that_want_them():
    """As in training, where W and its bias are frozen; and for one tensor alone."""
    tensors = inputs(5, 16, 8, 8, torch.float64)
    exact = run(reference, tensors, torch.float64)
    for wanted in (("x", "a", "b", "magnitude"), *((name,) for name in NAMES)):
        leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items() if t is not None}
        with launches(interpreted()):
            y = project(*(leaves[name] for name in NAMES), scaling=SCALING)
            y.backward(draw(5, 8, seed=7))
        assert [name for name in leaves if leaves[name].grad is not None] == [name for name in NAMES if name in wanted]
        assert all(error(leaves[name].grad, exact[name]) <= 1e-12 for name in wanted)


def root(x: Tensor) -> Tensor:
    """Rounded to nearest, as on a card; a CPU's library may miss by one bit."""
    return x.double().sqrt().to(x.dtype)


def test_a_fresh_adapter_leaves_the_layer_as_it_is():
    """B = 0 and m by these kernels: g is 1 in every bit, from either of them. Whole numbers have the same sums in any order."""
    weight, a, bias = draw(40, 72, seed=0).float(), draw(8, 72, seed=1).float(), draw(40, seed=2).float()
    b = torch.zeros(40, 8)
    with launches(interpreted()):
        norm = row_norm(weight, a, b, SCALING)
        assert torch.equal(norm, root(row_square(weight)))
        assert torch.equal(row_norm(weight, a, b, SCALING, row_square(weight)), norm)
    whole = (weight * 9).round()
    x = (draw(9, 72, seed=3) * 9).round().float()
    with launches(interpreted()):
        magnitude = row_norm(whole, a, b, SCALING)
        bare, y = (project(x, whole, a, b, magnitude, shift, scaling=SCALING) for shift in (None, bias))
    assert torch.equal(bare, F.linear(x, whole))
    expected = F.linear(x, whole, bias)
    assert ((y - expected).abs() <= torch.finfo(torch.float32).eps * expected.abs()).all()


@pytest.mark.parametrize("projections", [1, 3])
def test_projections_that_share_their_input(projections):
    """Their h come from one product with all their A."""
    rows, rank, dtype = (16, 8, 8)[:projections], 8, torch.float64
    tensors = inputs(9, 24, sum(rows), rank, dtype)
    a = draw(projections * rank, 24, seed=8)
    norm = draw(sum(rows), seed=9).abs() + 1

    def loss(layer, x, weight, a, b, magnitude, bias):
        h = F.linear(x.clone(), a)  # of a copy: the interpreter writes what it was given back, which autograd takes for a change
        y = layer(x, h, weight, b, magnitude, norm, bias, scaling=SCALING, rows=rows)
        return (y * draw(9, sum(rows), seed=7)).sum()

    def formula(x, h, weight, b, magnitude, norm, bias, *, scaling, rows):
        own = torch.cat([h_own @ b_own.T for h_own, b_own in zip(h.chunk(len(rows), 1), b.split(list(rows)), strict=True)], 1)
        return magnitude / norm * (x @ weight.T + scaling * own) + bias

    leaves = [t.clone().requires_grad_() for t in (tensors["x"], tensors["weight"], a, tensors["b"], tensors["magnitude"], tensors["bias"])]
    with launches(interpreted()):
        ours = torch.autograd.grad(loss(folded, *leaves), leaves)
    exact = torch.autograd.grad(loss(formula, *leaves), leaves)
    assert all(error(x, y) <= 1e-12 for x, y in zip(ours, exact, strict=True))


# --- norms ---


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("rank", [8, 40])
def test_norms_are_those_of_the_matrix(dtype, relative, rank):
    tensors = inputs(1, 136, 72, rank, dtype)
    weight, a, b = (tensors[name] for name in ("weight", "a", "b"))
    expected = torch.linalg.vector_norm(weight.double() + SCALING * b.double() @ a.double(), dim=1)
    with launches(interpreted()):
        norm = row_norm(weight, a, b, SCALING)
    torch.testing.assert_close(norm.double(), expected, rtol=relative, atol=0)


@pytest.mark.parametrize("residual", [1e-1, 1e-2, 1e-3, 1e-4, 0.0])
def test_rows_that_nearly_cancel_are_right(residual):
    tensors = inputs(1, 72, 40, 8, torch.float32)
    weight, a, b = (tensors[name] for name in ("weight", "a", "b"))
    weight[3:] = -SCALING * b[3:] @ a + residual * weight[3:]
    expected = torch.linalg.vector_norm(weight.double() + SCALING * b.double() @ a.double(), dim=1)
    with launches(interpreted()):
        norm = row_norm(weight, a, b, SCALING)
    atol = 1e-6 * weight.norm(dim=1).max().item()  # fp32's own rounding of the two that cancel
    torch.testing.assert_close(norm.double(), expected, rtol=1e-3, atol=atol)


def test_a_row_of_zeros_and_a_scaling_of_zero():
    tensors = inputs(1, 24, 16, 8, torch.float64)
    weight, a, b = (tensors[name] for name in ("weight", "a", "b"))
    weight[2] = 0
    with launches(interpreted()):
        torch.testing.assert_close(row_norm(weight, a, b, SCALING), torch.linalg.vector_norm(weight + SCALING * b @ a, dim=1))
        torch.testing.assert_close(row_norm(weight, a, b, 0.0), weight.norm(dim=1))


def test_sums_in_parts():
    """None of the parts is empty, and all rows are in one of them."""
    p, q = draw(333, 8, seed=0), draw(333, 40, seed=1)
    with launches(interpreted()):
        assert error(outer(p, q), p.T @ q) <= 1e-13


# --- what surrounds it ---


def arguments(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """As the operator takes them: with n, and an h that A made of x."""
    tensors = inputs(5, 16, 8, 8, dtype)
    x, weight, a, b, magnitude, bias = (tensors[name].requires_grad_() for name in NAMES)
    norm = dora_linear.row_norm(weight, a, b, SCALING)
    return [x, F.linear(x, a).detach(), weight, a, b, magnitude, norm, bias, SCALING]


@pytest.mark.slow
def test_opchecks():
    x, h, weight, a, b, _, norm, *_ = arguments()
    op = torch.ops.idefics2_fast
    with launches(interpreted()):
        check_operator(op.dora_linear_triton.default, arguments())
        check_operator(op.dora_linear_triton.default, [x, h.requires_grad_(), weight, None, b, None, None, None, SCALING])
        check_operator(op.dora_square_triton.default, [weight.detach()])
        check_operator(op.dora_norm_triton.default, [*(t.detach() for t in (weight, a, b)), SCALING, norm])


def layer(*tensors: Tensor) -> Tensor:
    return project(*tensors, scaling=SCALING)


def test_one_graph_fake_tensors_other_layouts_and_the_same_bits():
    tensors = [t.requires_grad_() for t in inputs(5, 16, 8, 8, torch.float64).values() if t is not None]
    with launches(interpreted()):
        check_fullgraph(layer, tensors)
        check_fake(layer, tensors)
        check_permuted(layer, tensors)
        check_deterministic(layer, tensors)


def test_rows_in_any_arrangement_and_none():
    tensors = inputs(12, 16, 8, 8, torch.float64)
    x, *others = (tensors[name] for name in NAMES)
    with launches(interpreted()):
        flat, y = layer(x, *others), layer(x.view(2, 3, 2, 16).requires_grad_(), *others)
        assert layer(x[:0], *others).shape == (0, 8)
    assert not y._is_view()
    assert torch.equal(y.flatten(0, 2), flat)


def test_two_dtypes_are_refused():
    x, *others = (inputs(3, 16, 8, 8, torch.float32)[name] for name in NAMES)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 and the weight torch\.float32"):
        layer(x.bfloat16(), *others)


# --- which implementation ---


def test_what_is_predicted_to_be_no_slower(monkeypatch):
    """Two passes are worth more than what a product of that length loses to the library's; no pass, nothing; nor a grid of few programs."""
    assert [fuses(1, width, 2) for width in (1152, 2160, 2176, 4096, 14336)] == [True, True, False, False, False]
    assert [fuses(1, width, 1) for width in (1024, 1080, 1088, 4096)] == [True, True, False, False]
    assert not fuses(1, 8, 0)
    monkeypatch.setattr(dora_linear_triton, "FULL", 132)
    assert [fuses(programs, 1152, 2) for programs in (131, 132)] == [False, True]


def test_a_card_takes_it_in_bf16(monkeypatch):
    monkeypatch.setattr(ops, "_trusted", lambda op: True)
    prefer = ops._preferred.__wrapped__
    assert prefer("dora_linear", "cuda", torch.bfloat16, 4096) == "triton"
    assert prefer("dora_linear", "cuda", torch.float16, 4096) == "factored"
    assert prefer("dora_linear", "cuda", torch.float32, 4096) == "factored"
    assert prefer("dora_linear", "cuda", torch.bfloat16, 4100) == "factored"
    assert prefer("dora_linear", "cpu", torch.bfloat16, 4096) == "factored"


def test_the_model_meets_it_in_the_ops():
    """`AdaptedLinear`'s way through `ops`: norms, and layers whose projections share an h."""
    tensors = inputs(9, 24, 16, 8, torch.float64)
    x, weight, a, b, magnitude, bias = (tensors[name] for name in NAMES)
    seen = []

    def handler(launch) -> None:
        seen.append(launch.name)
        interpreted()(launch)

    with ops.using(dora_linear="triton"), launches(handler):
        norm = ops.dora_norm(weight, a, b, SCALING, ops.dora_square(weight))
        assert ops.dora_folds(x, weight)
        assert not ops.dora_folds(x, weight.float()), "one dtype"
        y = ops.dora_folded(x, F.linear(x, a), weight, b, magnitude, norm, bias, scaling=SCALING, rows=(16,))
        whole = ops.dora_linear(x, weight, a, b, magnitude, bias, scaling=SCALING)
    assert seen == 2 * ["_square", "_cross", "_outer", "_norm", "_forward"]
    expected = reference(x, weight, a, b, magnitude, bias, scaling=SCALING)
    assert error(y, expected) <= 1e-12
    assert error(whole, expected) <= 1e-12


# --- Hopper code ---

# rows, width, out, rank, DoRA and not LoRA, bias
SHAPES = [
    (70, 96, 72, 16, True, True),
    (1, 64, 64, 8, True, False),
    (70, 1152, 96, 64, True, True),
    (301, 128, 256, 64, True, False),
    (1000, 64, 64, 16, True, True),
    (129, 72, 264, 128, True, True),
    (128, 256, 128, 64, False, False),
    (33, 8, 8, 8, True, True),
    (200, 576, 96, 16, False, True),
    (64, 64, 576, 8, True, False),
    (301, 264, 24, 192, True, True),
    (15, 1024, 40, 128, True, False),
]


@pytest.mark.parametrize(
    ("rows", "width", "out", "rank", "dora", "bias"), [pytest.param(*s, marks=() if s is SHAPES[0] else pytest.mark.slow) for s in SHAPES]
)
def test_hopper_code(rows, width, out, rank, dora, bias):
    check(inputs(rows, width, out, rank, torch.bfloat16, dora=dora, bias=bias), torch.bfloat16, executed())


@pytest.mark.slow
@pytest.mark.parametrize("base_sees_dropout", [False, True])
def test_hopper_code_with_dropout(base_sees_dropout):
    tensors = inputs(70, 96, 72, 16, torch.bfloat16, dropout=True)
    check(tensors, torch.bfloat16, executed(), base_sees_dropout=base_sees_dropout)


def exact_norm(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.double() + SCALING * b.double() @ a.double(), dim=1)


def test_hopper_code_of_the_norm_reads_the_weight_once():
    """As near as fp32 is, also in rows that nearly cancel, which alone are read again."""
    tensors = inputs(1, 192, 300, 16, torch.bfloat16)
    weight, a, b = (tensors[name] for name in ("weight", "a", "b"))
    with launches(executed()):
        square = row_square(weight)
    with launches(executed()) as counted:
        norm = row_norm(weight, a, b, SCALING, square)
    torch.testing.assert_close(norm.double(), exact_norm(weight, a, b), rtol=1e-6, atol=0)
    total = sum(counted.counts[1:], counted.counts[0])
    assert total.bytes("load", "copy", argument="weight") == weight.numel() * 2
    a, b = a.bfloat16().float(), b.bfloat16().float()
    weight[3:9] = (-SCALING * b[3:9] @ a).bfloat16()
    with launches(executed()):
        norm = row_norm(weight, a, b, SCALING)
    torch.testing.assert_close(norm.double(), exact_norm(weight, a, b), rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [8, 64, 128, 192])
def test_hopper_code_of_the_norm_at_other_ranks(rank):
    tensors = inputs(1, 1152, 136, rank, torch.bfloat16)
    weight, a, b = (tensors[name] for name in ("weight", "a", "b"))
    with launches(executed()):
        norm = row_norm(weight, a, b, SCALING)
    torch.testing.assert_close(norm.double(), exact_norm(weight, a, b), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_hopper_code_of_a_fresh_adapter():
    """The base layer's bits: whole numbers, so that the library's sums are the same."""
    weight, x = (draw(72, 96, seed=0) * 3).round().bfloat16(), (draw(70, 96, seed=1) * 3).round().bfloat16()
    a, b, bias = draw(16, 96, seed=2).float(), torch.zeros(72, 16), draw(72, seed=3).bfloat16()
    with launches(executed()):
        norm, square = row_norm(weight, a, b, SCALING), row_square(weight)
        bare, y = (project(x, weight, a, b, norm, shift, scaling=SCALING) for shift in (None, bias))
    assert torch.equal(norm, root(square))
    assert torch.equal(bare, F.linear(x, weight))
    expected = F.linear(x, weight, bias)
    assert ((y.double() - expected.double()).abs() <= torch.finfo(torch.bfloat16).eps * expected.double().abs()).all()


@pytest.mark.slow
def test_hopper_code_keeps_small_corrections():
    """Trained g lie within 0.0015 of 1, where bf16 knows no number but 1: y is rounded once, 0.21 of an ulp, or 0.30 with g in bf16."""
    tensors = inputs(130, 96, 72, 16, torch.bfloat16, bias=False)
    x, weight, a, b, *_ = (tensors[name] for name in NAMES)
    with launches(executed()):
        magnitude = row_norm(weight, a, 0 * b, SCALING) * (1 + torch.linspace(-2e-3, 2e-3, 72))
        y = project(x, weight, a, 0 * b, magnitude, scaling=SCALING)
    expected = reference(*(t.double() for t in (x, weight, a, 0 * b, magnitude)), scaling=SCALING)
    assert error(y, expected) <= torch.finfo(torch.bfloat16).eps / 4


@pytest.mark.slow
def test_hopper_code_gives_the_same_bits_twice():
    tensors = inputs(70, 96, 72, 16, torch.bfloat16)
    with launches(executed()):
        first, second = (run(project, tensors, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_hopper_code_in_full_size(monkeypatch):
    """Chosen tiles of the real model's largest layer: the error of one rounding to bf16, and of h's and s B's."""
    monkeypatch.setattr(dora_linear_triton, "RATE", 1.0)
    rows, width, out, rank = 8192, 4096, 14336, 64
    tensors = inputs(rows, width, out, rank, torch.bfloat16, bias=False)
    x, weight, a, b = (tensors[name] for name in ("x", "weight", "a", "b"))
    h, own, gain = F.linear(x, a.bfloat16()), (SCALING * b).bfloat16(), draw(out, seed=8).float()
    with launches(executed(chosen(2))):
        y = dora_linear_triton.forward(x, h, weight, own, gain, None)
    assert y[0, 0].isfinite()
    assert y[-1, -1].isfinite()
    for at in (slice(0, 128), slice(rows - 128, rows)):
        columns = slice(0, 256) if at.start == 0 else slice(out - 256, out)
        expected = (x[at].double() @ weight[columns].double().T + h[at].double() @ own[columns].double().T) * gain[columns].double()
        assert error(y[at, columns], expected) <= torch.finfo(torch.bfloat16).eps / 4


def test_the_norm_moves_little_more_than_the_least():
    """Every tensor of every launch once, as through a cache that holds the small ones; but what only rows that nearly cancel need."""
    weight, a, b, square = (torch.zeros(4096, 4096).bfloat16(), torch.zeros(64, 4096), torch.zeros(4096, 64), torch.zeros(4096))
    with launches(recorded()) as plan:
        row_norm(weight, a, b, SCALING, square)
    assert [launch.name for launch in plan.launches] == ["_cross", "_outer", "_norm"]
    unread = {("_norm", "weight"), ("_norm", "a")}
    moved = 0
    for launch in plan.launches:
        read = {t.data_ptr(): t.nbytes for name, t in launch.tensors.items() if (launch.name, name) not in unread}
        moved += sum(read.values())
    assert moved <= 1.1 * roofline.dora_norm(4096, 4096, 64).bytes


@pytest.mark.slow
def test_hopper_code_of_the_norm_in_full_size():
    """Chosen parts of 4096 x 4096, each number of W requested once."""
    weight, a, b = draw(4096, 4096, seed=0).bfloat16(), draw(64, 4096, seed=1).float(), draw(4096, 64, seed=2).float()
    with launches(executed(chosen(4))) as counted:
        part = dora_linear_triton.cross(weight, a, b)
    (counts,), (blocks, parts, _) = counted.counts, counted.launches[0].grid
    assert counts.bytes("load", "copy", argument="weight") * blocks * parts == counts.ctas * weight.nbytes
    for block, index in ((0, 0), (blocks - 1, parts - 1)):
        at, columns = slice(block * 256, block * 256 + 256), slice(index * 4096 // parts, (index + 1) * 4096 // parts)
        expected = (b[at].double() * (weight[at, columns].double() @ a[:, columns].double().T)).sum(1)
        assert error(part[index, at], expected) <= 2.0**-17  # of A's numbers, which have 16 bits left


# --- on a card ---


@pytest.mark.cuda
@pytest.mark.parametrize("rate", [0.0, 1.0], ids=["library", "fused"])
@pytest.mark.parametrize(
    ("rows", "width", "out", "rank", "dora", "bias"), [(301, 1152, 1152, 64, True, True), (130, 4096, 1024, 128, False, False)]
)
def test_on_a_card(monkeypatch, rows, width, out, rank, dora, bias, rate):
    """Errs at most twice as much as PyTorch in the same precision, and has the same bits twice."""
    monkeypatch.setattr(dora_linear_triton, "RATE", rate)
    tensors = inputs(rows, width, out, rank, torch.bfloat16, dora=dora, bias=bias)
    ours, again = (run(project, tensors, torch.bfloat16, torch.device("cuda")) for _ in range(2))
    compare(ours, tensors, torch.bfloat16)
    assert all(torch.equal(value, again[name]) for name, value in ours.items())
